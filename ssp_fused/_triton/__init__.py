"""The Triton kernels of the ops, imported only where that backend is asked for."""
