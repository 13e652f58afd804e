"""The elementwise parts of ReLU, Gated and JumpReLU. Kernels for a GPU have the same functions under the same names."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jsae import jump
from jsae.ops.formulas import Formula, Maps


@dataclasses.dataclass(frozen=True)
class Rectified(Formula):
    """Map: ReLU(p). Sums: the same, and ReLU(-p)."""

    name: ClassVar[str] = "rectified"

    def __call__(self, pre: Float[Array, "n f"], *arrays: Float[Array, " f"]) -> tuple[Maps, Maps]:
        """Return latents and terms."""
        latents = jax.nn.relu(pre)
        return (latents,), (latents, jax.nn.relu(-pre))


@dataclasses.dataclass(frozen=True)
class GatedMagnitude(Formula):
    """Maps: 1[pi > 0] ReLU(h exp(r_mag) + b_mag), and ReLU(pi) with pi = h + b_gate. Sums: ReLU(pi), ReLU(-pi)."""

    name: ClassVar[str] = "gated"

    def __call__(self, pre: Float[Array, "n f"], *arrays: Float[Array, " f"]) -> tuple[Maps, Maps]:
        """Return latents, gate and terms; the arrays are b_gate, b_mag and r_mag."""
        b_gate, b_mag, r_mag = arrays
        gate = pre + b_gate
        magnitude = jax.nn.relu(pre * jnp.exp(r_mag) + b_mag)
        opened = jax.nn.relu(gate)
        return (jnp.where(gate > 0, magnitude, 0), opened), (opened, jax.nn.relu(-gate))


@dataclasses.dataclass(frozen=True)
class TanhJump(Formula):
    """Map: z = p 1[p > theta]. Sums: tanh(4 z w), and ReLU(theta - p). Gradients of the jump reach p too."""

    name: ClassVar[str] = "tanh jump"

    width: float
    """Width of the window around thresholds in which they have gradients."""

    def __call__(self, pre: Float[Array, "n f"], *arrays: Float[Array, " f"]) -> tuple[Maps, Maps]:
        """Return latents and terms; the arrays are the thresholds theta and the decoder norms w."""
        threshold, norms = arrays
        latents = jump.jump_relu(pre, threshold, self.width, True)
        return (latents,), (jnp.tanh(4 * latents * norms), jax.nn.relu(threshold - pre))


@dataclasses.dataclass(frozen=True)
class CountedJump(Formula):
    """Map: p 1[p > theta]. Sums: 1[p > theta], and ReLU(theta - p)."""

    name: ClassVar[str] = "counted jump"

    width: float
    """Width of the window around thresholds in which they have gradients."""

    def __call__(self, pre: Float[Array, "n f"], *arrays: Float[Array, " f"]) -> tuple[Maps, Maps]:
        """Return latents and terms; the array is the thresholds theta."""
        (threshold,) = arrays
        latents = jump.jump_relu(pre, threshold, self.width, False)
        return (latents,), (jump.step(pre, threshold, self.width), jax.nn.relu(threshold - pre))


@dataclasses.dataclass(frozen=True)
class LogRectified(Formula):
    """Map: ReLU(p). Sums: log(1 + ReLU(p) w), and ReLU(-p)."""

    name: ClassVar[str] = "log rectified"

    def __call__(self, pre: Float[Array, "n f"], *arrays: Float[Array, " f"]) -> tuple[Maps, Maps]:
        """Return latents and terms; the array is the weights w."""
        (weights,) = arrays
        latents = jax.nn.relu(pre)
        return (latents,), (jnp.log1p(latents * weights), jax.nn.relu(-pre))
