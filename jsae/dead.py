"""Dead latents: the time since each latent last fired, and resampling."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from jsae import optim
from jsae.architectures import SAE, Context
from jsae.ops import Ops

_LONGEST = 2**30  # the counter saturates here


def update(since_fired: Int[Array, " f"], fired: Int[Array, " f"], tokens: int) -> Int[Array, " f"]:
    """Return the number of tokens since each latent last fired, after a batch.

    Args:
      since_fired: the numbers before the batch, (f,).
      fired: tokens of the batch on which each latent fired, (f,).
      tokens: tokens in the batch.
    """
    return jnp.where(fired > 0, 0, jnp.minimum(since_fired + tokens, _LONGEST))


def resample(
    sae: SAE,
    moments: Any,
    dead: Bool[Array, " f"],
    x: Float[Array, "n d"],
    y: Float[Array, "n o"],
    key: Key[Array, ""],
    ops: Ops,
) -> tuple[SAE, Any]:
    """Set every dead latent to the direction of a badly reconstructed token, and its Adam moments to zero.

    Bricken et al. 2023, "Towards Monosemanticity", section "Neuron resampling": tokens are drawn with probability
    proportional to the square of their loss, without replacement. The decoder row becomes the direction from `b_dec`
    to the token's target; the encoder row becomes that of the token, with 0.2 times the mean norm of the alive rows.
    Other arrays of latents are initialised again.

    Args:
      sae: the SAE.
      moments: a tree whose leaves have the names of the weights (the optimiser's state).
      dead: mask of the latents to resample, (f,).
      x: scaled activations, (n, d).
      y: scaled targets, (n, o); equal to x except for a transcoder.
      key: random key of the draw.
      ops: the implementation.

    Returns:
      The SAE and the moments.
    """
    latents, _ = sae.activate(x, Context(ops, training=True))
    losses = jnp.square(y - sae.decode(latents, x, ops)).sum(-1)
    order = jnp.argsort(-(2 * jnp.log(losses + 1e-30) + jax.random.gumbel(key, losses.shape)))
    token = order[(jnp.cumsum(dead) - 1) % x.shape[0]]  # the i-th dead latent takes the i-th token drawn
    norms = jnp.linalg.norm(sae.W_enc[...], axis=1)
    mean_norm = jnp.where(dead, 0, norms).sum() / jnp.maximum((~dead).sum(), 1)
    centred = x if sae.b_in is None else x - sae.b_in
    fresh: dict[str, Any] = {
        "W_dec": _directions(ops.rows_of_tokens(y, token) - sae.b_dec),
        "W_enc": 0.2 * mean_norm * _directions(ops.rows_of_tokens(centred, token)),
    }
    fresh |= sae.initial_latents(sae.config)

    def replace(path: tuple[Any, ...], leaf: Array) -> Array:
        name = next((n for n in optim.names_of(path) if n in fresh), None)
        return leaf if name is None else jnp.where(_column(dead, leaf), fresh[name], leaf)

    def zero(path: tuple[Any, ...], leaf: Array) -> Array:
        has_latent_axis = any(n in fresh for n in optim.names_of(path))
        return jnp.where(_column(dead, leaf), 0, leaf) if has_latent_axis else leaf

    return jax.tree_util.tree_map_with_path(replace, sae), jax.tree_util.tree_map_with_path(zero, moments)


def _column(dead: Bool[Array, " f"], like: Array) -> Array:
    return dead.reshape(dead.shape + (1,) * (like.ndim - 1))


def _directions(x: Float[Array, "n d"]) -> Float[Array, "n d"]:
    return x / (jnp.linalg.norm(x, axis=1, keepdims=True) + 1e-30)
