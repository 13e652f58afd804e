"""Elementwise functions of pre-activations, as dense architectures use them: some maps, and some sums over tokens."""

import abc
import dataclasses
from typing import ClassVar

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

Maps = tuple[Float[Array, "n f"], ...]
PerLatent = tuple[Float[Array, " f"], ...]


@dataclasses.dataclass(frozen=True)
class Formula(abc.ABC):
    """An elementwise function of pre-activations and arrays of latents. Its fields are constants."""

    name: ClassVar[str] = ""
    """Name by which an implementation finds its kernel, if it has one; a subclass of another formula has its own."""

    @abc.abstractmethod
    def __call__(self, pre: Float[Array, "n f"], *arrays: Float[Array, " f"]) -> tuple[Maps, Maps]:
        """Return the maps, and the terms of the sums; all are (n, f), and differentiable."""


def latent_totals(latents: Float[Array, "n f"]) -> tuple[Int[Array, " f"], Float[Array, " f"]]:
    """Return of every latent the number of tokens on which it is not zero, and the sum of its magnitudes."""
    return (latents != 0).sum(0, dtype=jnp.int32), jnp.abs(latents).sum(0)


def evaluate(formula: Formula, pre: Float[Array, "n f"], arrays: PerLatent) -> tuple[Maps, PerLatent]:
    """Return the maps of a formula, and the sums of its terms over tokens."""
    maps, terms = formula(pre, *arrays)
    return maps, tuple(term.sum(0) for term in terms)
