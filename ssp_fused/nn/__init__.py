"""Layers: residual blocks that take one strong-stability-preserving Runge-Kutta step.

A block's residual branch is pre-activation, F(u) = conv2(act(norm2(conv1(act(norm1(u)))))), and shared by all stages
of the step. Between two convolutions a block runs one fused op (``ssp_fused.functional``).
"""

from .blocks import AdaptiveSSPBlock, PreActDownsample, SSPBlock
from .integrator import SSPIntegrator
from .norms import NORMS, make_norm
from .stack import SSPStack

__all__ = [
    "NORMS",
    "AdaptiveSSPBlock",
    "PreActDownsample",
    "SSPBlock",
    "SSPIntegrator",
    "SSPStack",
    "make_norm",
]
