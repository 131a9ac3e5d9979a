"""The CUDA backend: Numba kernels for arrays in device memory."""
