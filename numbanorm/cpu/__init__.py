"""The CPU backend: Numba kernels for arrays in host memory."""
