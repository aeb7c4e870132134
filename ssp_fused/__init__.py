"""Fused kernels for Strong Stability Preserving Runge-Kutta residual blocks, and robust training of their networks."""

from . import adversarial, functional, models, nn, schemes
from ._backends import available_backends, use_backend
from ._convert import convert
from ._version import __version__

__all__ = [
    "__version__",
    "adversarial",
    "available_backends",
    "convert",
    "functional",
    "models",
    "nn",
    "schemes",
    "use_backend",
]
