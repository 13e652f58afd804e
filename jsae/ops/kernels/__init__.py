"""Triton kernels for NVIDIA GPUs, and the functions that call them inside compiled jax programs.

Only this package imports triton and jax-triton, and only `jsae.ops.gpu` imports this package, when it is used.
"""
