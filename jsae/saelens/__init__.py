"""SAELens directories: checked settings, and weights in one plain form. numpy only, no jax, no torch."""

from jsae.saelens.reading import Plain, read

__all__ = ["Plain", "read"]
