"""The architectures. Each is a small final class: its equation, its encoder, its one penalty.

An SAE is a `flax.nnx` module used as a plain pytree: `jax.jit`, `jax.grad`, `jax.vmap` and optax take it as it is, and
nothing in it changes when it is called. What every architecture shares (decoding, loss, metrics, training, export) is
written once, elsewhere. Shapes: n tokens, d = d_in, f = d_sae.
"""

import abc
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Key

from jsae import losses, topk
from jsae.config import SAEConfig
from jsae.topk import Codes

Latents = Codes | Float[Array, "n f"]
"""Activations of the latents: sparse codes, or one column per latent."""


class SAE(nnx.Module):
    """What an architecture is: weights by the field's names, an encoder, a penalty.

    `W_enc` and `W_dec` are (f, d), `b_dec` (d,), all other biases (f,). Decoder rows have unit norm.
    """

    W_enc: nnx.Param[Float[Array, "f d"]]
    W_dec: nnx.Param[Float[Array, "f d"]]
    b_dec: nnx.Param[Float[Array, " d"]]
    config: SAEConfig

    def __init__(self, config: SAEConfig, *, key: Key[Array, ""], b_dec: Float[Array, " d"] | None = None):
        """Random unit decoder rows, `W_enc` their copy, every bias zero but `b_dec` where it is given."""
        rows = jax.random.normal(key, (config.d_sae, config.d_in))
        rows = rows / jnp.linalg.norm(rows, axis=1, keepdims=True)
        self.config = config
        self.W_enc = nnx.Param(rows)
        self.W_dec = nnx.Param(jnp.array(rows))
        self.b_dec = nnx.Param(jnp.zeros(config.d_in) if b_dec is None else b_dec)
        for name in self.latent_biases():
            setattr(self, name, nnx.Param(jnp.zeros(config.d_sae)))

    @classmethod
    @abc.abstractmethod
    def latent_biases(cls) -> tuple[str, ...]:
        """Names of the parameters with one number per latent."""

    @abc.abstractmethod
    def activate(self, x: Float[Array, "n d"]) -> tuple[Latents, Any]:
        """The latents of x, and whatever of the computation `penalty` wants to see again."""

    @abc.abstractmethod
    def penalty(
        self, x: Float[Array, "n d"], x_hat: Float[Array, "n d"], latents: Latents, seen: Any, dead: Bool[Array, " f"]
    ) -> Float[Array, ""]:
        """What the loss adds to the squared error."""

    def encode(self, x: Float[Array, "n d"]) -> Latents:
        """The latents of x, which is already scaled as in training."""
        return self.activate(x)[0]

    def decode(self, latents: Latents) -> Float[Array, "n d"]:
        """x_hat = f W_dec + b_dec."""
        if isinstance(latents, Codes):
            return topk.decode(latents, self.W_dec[...]) + self.b_dec
        return latents @ self.W_dec + self.b_dec


class TopK(SAE):
    """f = ReLU(TopK_k((x - b_dec) W_enc^T + b_enc)), with AuxK against dead latents.

    Gao et al. 2024, "Scaling and evaluating sparse autoencoders" (arXiv 2406.04093), equations 3 and 4 and section A.2.
    """

    b_enc: nnx.Param[Float[Array, " f"]]

    @classmethod
    def latent_biases(cls) -> tuple[str, ...]:
        """One bias."""
        return ("b_enc",)

    def activate(self, x: Float[Array, "n d"]) -> tuple[Codes, None]:
        """Exactly k codes a token; those that are not positive have value 0."""
        codes = topk.encode(x, self.W_enc[...], self.b_enc[...], self.b_dec[...], None, self.config.k)
        return codes._replace(values=jax.nn.relu(codes.values)), None

    def penalty(
        self, x: Float[Array, "n d"], x_hat: Float[Array, "n d"], latents: Codes, seen: None, dead: Bool[Array, " f"]
    ) -> Float[Array, ""]:
        """AuxK: dead latents learn what the living left over."""
        weights = (self.W_enc[...], self.b_enc[...], self.W_dec[...], self.b_dec[...])
        return self.config.aux_coefficient * losses.auxk(x, x - x_hat, *weights, dead, self.config.dead_k)


class ReLU(SAE):
    """f = ReLU((x - b_dec) W_enc^T + b_enc), penalty  l1 * sum_i f_i |W_dec,i|.

    Bricken et al. 2023, "Towards monosemanticity"; the weighting by decoder norms from Conerly et al. 2024 (Anthropic,
    April update), where it makes the penalty blind to how a latent's size is shared between encoder and decoder.
    """

    b_enc: nnx.Param[Float[Array, " f"]]

    @classmethod
    def latent_biases(cls) -> tuple[str, ...]:
        """One bias."""
        return ("b_enc",)

    def activate(self, x: Float[Array, "n d"]) -> tuple[Float[Array, "n f"], None]:
        """Every latent that is above zero."""
        pre = topk.pre_activations(x, self.W_enc[...], self.b_enc[...], self.b_dec[...])
        return jax.nn.relu(pre), None

    def penalty(
        self,
        x: Float[Array, "n d"],
        x_hat: Float[Array, "n d"],
        latents: Float[Array, "n f"],
        seen: None,
        dead: Bool[Array, " f"],
    ) -> Float[Array, ""]:
        """L1 of the latents, each weighted by its decoder norm."""
        return self.config.l1_coefficient * losses.l1(latents, self.W_dec[...])


class Gated(SAE):
    """f = 1[pi > 0] * ReLU(h exp(r_mag) + b_mag)  with  h = (x - b_dec) W_enc^T  and  pi = h + b_gate.

    Rajamanoharan et al. 2024, "Improving dictionary learning with gated sparse autoencoders" (arXiv 2404.16014),
    equations 3 to 8: the gate is trained by an L1 penalty on ReLU(pi) and by reconstructing x from ReLU(pi) through a
    frozen copy of the decoder.
    """

    b_gate: nnx.Param[Float[Array, " f"]]
    b_mag: nnx.Param[Float[Array, " f"]]
    r_mag: nnx.Param[Float[Array, " f"]]

    @classmethod
    def latent_biases(cls) -> tuple[str, ...]:
        """Biases of gate and magnitude, and the log of the ratio of their weights."""
        return ("b_gate", "b_mag", "r_mag")

    def activate(self, x: Float[Array, "n d"]) -> tuple[Float[Array, "n f"], Float[Array, "n f"]]:
        """Gated magnitudes; the penalty sees ReLU(pi)."""
        h = topk.pre_activations(x, self.W_enc[...], jnp.zeros_like(self.b_gate[...]), self.b_dec[...])
        gate = h + self.b_gate
        magnitude = jax.nn.relu(h * jnp.exp(self.r_mag[...]) + self.b_mag)
        return jnp.where(gate > 0, magnitude, 0), jax.nn.relu(gate)

    def penalty(
        self,
        x: Float[Array, "n d"],
        x_hat: Float[Array, "n d"],
        latents: Float[Array, "n f"],
        seen: Float[Array, "n f"],
        dead: Bool[Array, " f"],
    ) -> Float[Array, ""]:
        """L1 of the gate, and the error of the gate's own reconstruction through a frozen decoder."""
        W_dec, b_dec = jax.lax.stop_gradient((self.W_dec[...], self.b_dec[...]))
        return self.config.l1_coefficient * losses.l1(seen, W_dec) + losses.squared_error(x, seen @ W_dec + b_dec)


ARCHITECTURES: Mapping[str, type[SAE]] = {"topk": TopK, "relu": ReLU, "gated": Gated}


def make(config: SAEConfig, *, key: Key[Array, ""], b_dec: Float[Array, " d"] | None = None) -> SAE:
    """A freshly initialised SAE of `config.architecture`."""
    return ARCHITECTURES[config.architecture](config, key=key, b_dec=b_dec)


def weights(sae: SAE) -> dict[str, np.ndarray]:
    """The SAE's parameters by name, as numpy arrays in the layout of `jsae.axes.AXES`."""
    return {name: np.asarray(getattr(sae, name)[...]) for name in ("W_enc", "W_dec", "b_dec", *sae.latent_biases())}
