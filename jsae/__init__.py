"""Sparse autoencoders in JAX: architectures, training, checkpoints, export. No torch, no flags, no prints."""

__version__ = "0.2.0"
