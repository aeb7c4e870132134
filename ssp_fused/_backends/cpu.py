"""The C++ kernels for CPU tensors."""

from ._interface import CompiledBackend

BACKEND = CompiledBackend("cpu", library="ops", device="cpu", writes_over=True)
