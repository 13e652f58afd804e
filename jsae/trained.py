"""A finished SAE in the units of the activations, as `jsae.train` and `jsae.load` return it."""

import copy
import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

from jsae import export, saelens
from jsae.saelens.settings import RANKED, TRANSCODERS, check_pursuit
from jsae.state import TrainState

Weights = Mapping[str, Array]


class TrainedSAE:
    """A finished SAE: `f = act((x - b_dec) W_enc + b)`, `y_hat = f W_dec + b_dec`.

    It computes the same as the exported SAE, in float32, on unscaled activations. A transcoder does not subtract
    `b_dec`, and may add `x W_skip^T`. A crosscoder reads and returns the activations of its layers side by side. The
    weights do not change.

    Attributes:
      cfg: the settings, by SAELens's names.
      layers: layers of a crosscoder, else 1.
      weights: `W_enc` (d_in, d_sae), `W_dec` (d_sae, d_out), `b_dec` (d_out,), arrays of latents (d_sae,), `W_skip`
        (d_out, d_in) of a transcoder with a skip path.
      metrics: of its training; empty if it was loaded.
    """

    def __init__(self, plain: saelens.Plain, metrics: Mapping[str, float] | None = None):
        self.cfg, self.layers = dict(plain.cfg), plain.layers
        self.weights: Weights = {name: jnp.asarray(weight) for name, weight in plain.weights.items()}
        self.metrics = dict(metrics or {})

    @classmethod
    def from_state(cls, state: TrainState, metrics: Mapping[str, float] | None = None) -> "TrainedSAE":
        """Return the SAE of a training state, with input scale and decoder norms folded into the weights.

        Raises:
          ConfigError: a weight that is not finite, or an architecture without an exported form.
        """
        sae = state.exported
        plain = export.plain(sae.config, sae.arrays(), np.asarray(state.scale), np.asarray(state.scale_out))
        return cls(plain, metrics)

    @property
    def plain(self) -> saelens.Plain:
        """The SAE in plain form, in numpy."""
        return saelens.Plain(self.cfg, {name: np.asarray(weight) for name, weight in self.weights.items()}, self.layers)

    @property
    def architecture(self) -> str:
        """SAELens's name of the architecture; for a crosscoder the name of its encoder's form."""
        return self.cfg["architecture"]

    @property
    def is_transcoder(self) -> bool:
        """True if the target is a different activation from the input."""
        return self.architecture in TRANSCODERS

    @property
    def d_in(self) -> int:
        """Width of the input, of all layers together."""
        return self.cfg["d_in"]

    @property
    def d_sae(self) -> int:
        """Number of latents."""
        return self.cfg["d_sae"]

    @property
    def d_out(self) -> int:
        """Width of the output."""
        return self.cfg.get("d_out", self.d_in)

    @property
    def metadata(self) -> dict[str, Any]:
        """SAELens's metadata of an SAE, such as `model_name` and `hook_name`."""
        return self.cfg["metadata"]

    @property
    def W_enc(self) -> Float[Array, "d f"]:  # noqa: N802 - the field's name
        """Encoder, (d_in, d_sae)."""
        return self.weights["W_enc"]

    @property
    def W_dec(self) -> Float[Array, "f o"]:  # noqa: N802 - the field's name
        """Decoder, (d_sae, d_out); rows of an SAE of this project have norm 1."""
        return self.weights["W_dec"]

    @property
    def b_dec(self) -> Float[Array, " o"]:
        """Decoder bias, (d_out,)."""
        return self.weights["b_dec"]

    def encode(self, x: Float[Array | np.ndarray, "*n d"]) -> Float[Array, "*n f"]:
        """Return the latents of activations, (..., d_in) to (..., d_sae)."""
        form = TRANSCODERS.get(self.architecture, self.architecture)
        return _encode(form, self.cfg.get("k"), not self.is_transcoder, self.weights, jnp.asarray(x, jnp.float32))

    def pursue(
        self, x: Float[Array | np.ndarray, "*n d"], k: int, residual_threshold: float = 0.0
    ) -> Float[Array, "*n f"]:
        """Return latents by matching pursuit on the decoder instead of the encoder, (..., d_in) to (..., d_sae).

        Mallat and Zhang 1993, "Matching pursuits with time-frequency dictionaries", with positive coefficients: k times
        the decoder row with the largest inner product with the residual of a token, over its norm, is taken, and its
        part of the residual goes into its latent. A token stops at a row that it has taken before, or where nothing is
        positive. As `matching_pursuit` of SAELens.

        Args:
          x: activations.
          k: most latents per token.
          residual_threshold: norm of the residual below which a token stops; 0 is none.

        Raises:
          ValueError: a transcoder, whose decoder rows are not in the space of its input, or k below 1.
        """
        check_pursuit(self.is_transcoder, k)
        x = jnp.asarray(x, jnp.float32)
        residual = (x - self.b_dec).reshape(-1, self.d_in)
        return _pursue(self.W_dec, residual, k, jnp.float32(residual_threshold)).reshape(*x.shape[:-1], self.d_sae)

    def decode(self, latents: Float[Array | np.ndarray, "*n f"]) -> Float[Array, "*n o"]:
        """Return activations from latents, (..., d_sae) to (..., d_out), without a transcoder's skip path."""
        return _matmul(jnp.asarray(latents, jnp.float32), self.W_dec) + self.b_dec

    def __call__(self, x: Float[Array | np.ndarray, "*n d"]) -> Float[Array, "*n o"]:
        """Return the reconstruction of activations, or a transcoder's prediction of its target."""
        y_hat = self.decode(self.encode(x))
        skip = self.weights.get("W_skip")
        return y_hat if skip is None else y_hat + _matmul(jnp.asarray(x, jnp.float32), skip.T)

    def with_k(self, k: int) -> "TrainedSAE":
        """Return the TopK or AbsTopK SAE with another k; the weights are shared.

        Raises:
          ValueError: the SAE selects no k latents, or k is not between 1 and d_sae.
        """
        if self.architecture not in RANKED:
            raise ValueError(f"a {self.architecture} SAE selects no k latents: of {', '.join(RANKED)} k can be changed")
        if not 1 <= k <= self.d_sae:
            raise ValueError(f"k is {k}: it must lie between 1 and d_sae={self.d_sae}")
        other = copy.copy(self)
        other.cfg = self.cfg | {"k": k}
        return other

    def save(self, folder: str | Path, metadata: Mapping[str, Any] | None = None) -> Path:
        """Write a SAELens directory, whole or not at all; return its path.

        SAELens and `bridge.load_sae` also read it. An existing export is replaced.

        Args:
          folder: the directory.
          metadata: SAELens's metadata, such as `model_name` and `hook_name`; added to the SAE's own.

        Raises:
          OSError: the folder cannot be written; an earlier export is kept.
        """
        added = dict(metadata or {}) | {"sae_lens_version": export.SAELENS_VERSION}
        export.write_plain(Path(folder), self.plain, added)
        return Path(folder)

    def __repr__(self) -> str:
        sizes: dict[str, object] = {"d_in": self.d_in, "d_sae": self.d_sae}
        sizes |= {"d_out": self.d_out} if self.is_transcoder else {}
        sizes |= {"layers": self.layers} if self.layers > 1 else {}
        sizes |= {"k": self.cfg["k"]} if self.architecture in RANKED else {}
        shown: dict[str, object] = dict(sizes)
        shown |= {name: round(self.metrics[name], 4) for name in ("fvu", "l0") if name in self.metrics}
        return f"TrainedSAE({self.architecture}, {', '.join(f'{name}={value}' for name, value in shown.items())})"


def load(path: str | Path) -> TrainedSAE:
    """Load a SAELens directory, written by jsae or by any version of SAELens.

    Args:
      path: the directory, or `hf://owner/name[@revision]/folder` on the Hugging Face hub (extra [hub]). Nothing in it
        is executed.

    Raises:
      FileNotFoundError: no such directory, or a file in it is missing.
      ValueError: a broken file, a setting that is unknown or not supported, an array that is missing, unexpected or of
        another shape or type, or numbers that are not finite; names file and setting.
      ImportError: an address on the hub, and huggingface_hub is not installed.
    """
    return TrainedSAE(saelens.read(path))


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _encode(form: str, k: int | None, subtracts: bool, w: Weights, x: Float[Array, "*n d"]) -> Float[Array, "*n f"]:
    return _FORMS[form](w, x - w["b_dec"] if subtracts else x, k)


@functools.partial(jax.jit, static_argnums=2)
def _pursue(
    W_dec: Float[Array, "f d"], residual: Float[Array, "n d"], k: int, residual_threshold: Float[Array, ""]
) -> Float[Array, "n f"]:
    norms = jnp.maximum(jnp.linalg.norm(W_dec, axis=1), jnp.finfo(jnp.float32).tiny)
    tokens = jnp.arange(len(residual))

    def step(_: Int[Array, ""], carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        latents, residual, active = carry
        products = _matmul(residual, W_dec.T) / norms
        index = products.argmax(axis=1)
        largest = products[tokens, index]
        taken = (latents[tokens, index] != 0) | (largest <= 0)
        value = jax.nn.relu(largest) / norms[index] * active
        residual = residual - value[:, None] * W_dec[index]
        far = (residual_threshold <= 0) | (jnp.linalg.norm(residual, axis=1) >= residual_threshold)
        return latents.at[tokens, index].add(value), residual, active & ~taken & far

    start = jnp.zeros((len(residual), len(W_dec))), residual, jnp.ones(len(residual), bool)
    return jax.lax.fori_loop(0, k, step, start)[0]


def _matmul(a: Array, b: Array) -> Array:
    return jnp.matmul(a, b, precision=lax.Precision.HIGHEST)


def _standard(w: Weights, u: Float[Array, "*n d"], k: int | None) -> Float[Array, "*n f"]:
    return jax.nn.relu(_matmul(u, w["W_enc"]) + w["b_enc"])


def _topk(w: Weights, u: Float[Array, "*n d"], k: int | None) -> Float[Array, "*n f"]:
    pre = _matmul(u, w["W_enc"]) + w["b_enc"]
    values, indices = lax.top_k(pre, k)
    return jnp.put_along_axis(jnp.zeros_like(pre), indices, jax.nn.relu(values), axis=-1, inplace=False)


def _abstopk(w: Weights, u: Float[Array, "*n d"], k: int | None) -> Float[Array, "*n f"]:
    pre = _matmul(u, w["W_enc"]) + w["b_enc"]
    indices = lax.top_k(jnp.abs(pre), k)[1]
    values = jnp.take_along_axis(pre, indices, axis=-1)
    return jnp.put_along_axis(jnp.zeros_like(pre), indices, values, axis=-1, inplace=False)


def _jumprelu(w: Weights, u: Float[Array, "*n d"], k: int | None) -> Float[Array, "*n f"]:
    pre = _matmul(u, w["W_enc"]) + w["b_enc"]
    return jnp.where(pre > w["threshold"], jax.nn.relu(pre), 0)


def _gated(w: Weights, u: Float[Array, "*n d"], k: int | None) -> Float[Array, "*n f"]:
    h = _matmul(u, w["W_enc"])
    magnitude = jax.nn.relu(h * jnp.exp(w["r_mag"]) + w["b_mag"])
    return jnp.where(h + w["b_gate"] > 0, magnitude, 0)


_FORMS: Mapping[str, Callable[[Weights, Array, int | None], Array]] = {
    "standard": _standard,
    "topk": _topk,
    "abstopk": _abstopk,
    "jumprelu": _jumprelu,
    "gated": _gated,
}
"""Encoders by SAELens's names of their forms (`jsae.saelens.settings.ENCODERS`)."""
