"""Dead latents: how long ago a latent last fired, and resampling."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from jsae import optim
from jsae.architectures import SAE, Context
from jsae.ops import Codes, Latents, Ops

_LONGEST = 2**30  # the counter stops here instead of running over


def times_fired(latents: Latents, d_sae: int) -> Int[Array, " f"]:
    """Return on how many tokens each latent is not zero. A latent that was picked with value 0 did not fire."""
    if isinstance(latents, Codes):
        return jnp.zeros(d_sae, jnp.int32).at[latents.indices].add(latents.values != 0)
    return (latents != 0).sum(0, dtype=jnp.int32)


def after(since_fired: Int[Array, " f"], fired: Int[Array, " f"], tokens: int) -> Int[Array, " f"]:
    """Return the tokens since each latent last fired, after `tokens` more of which it fired on `fired`."""
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
    """Give every dead latent the direction of a badly reconstructed token, and zero its Adam moments.

    After Bricken et al. 2023 ("Neuron resampling"): tokens are drawn with probability proportional to the square of
    their loss, without replacement; the decoder row becomes the direction of the token's target from `b_dec`, the
    encoder row that of the token at 0.2 times the mean norm of the living, arrays of latents start anew.

    Args:
      sae: the SAE.
      moments: any tree whose leaves carry the names of the weights (the optimiser's state).
      dead: which latents to resample, (f,).
      x: scaled activations, (n, d).
      y: scaled targets, (n, o): x itself unless it is a transcoder.
      key: for the draw.
      ops: the implementation.
    """
    latents, _ = sae.activate(x, Context(ops, training=True))
    losses = jnp.square(y - sae.decode(latents, x, ops)).sum(-1)
    order = jnp.argsort(-(2 * jnp.log(losses + 1e-30) + jax.random.gumbel(key, losses.shape)))
    token = order[(jnp.cumsum(dead) - 1) % x.shape[0]]  # the i-th dead latent takes the i-th token drawn
    alive = jnp.linalg.norm(sae.W_enc[...], axis=1)
    mean_norm = jnp.where(dead, 0, alive).sum() / jnp.maximum((~dead).sum(), 1)
    read = x if sae.b_in is None else x - sae.b_in
    fresh: dict[str, Any] = {
        "W_dec": _directions(y - sae.b_dec)[token],
        "W_enc": 0.2 * mean_norm * _directions(read)[token],
    }
    fresh |= sae.initial_latents(sae.config)

    def renew(path: tuple[Any, ...], leaf: Array) -> Array:
        name = next((n for n in optim.names_of(path) if n in fresh), None)
        return leaf if name is None else jnp.where(_column(dead, leaf), fresh[name], leaf)

    def forget(path: tuple[Any, ...], leaf: Array) -> Array:
        is_of_latents = any(n in fresh for n in optim.names_of(path))
        return jnp.where(_column(dead, leaf), 0, leaf) if is_of_latents else leaf

    return jax.tree_util.tree_map_with_path(renew, sae), jax.tree_util.tree_map_with_path(forget, moments)


def _column(dead: Bool[Array, " f"], like: Array) -> Array:
    return dead.reshape(dead.shape + (1,) * (like.ndim - 1))


def _directions(x: Float[Array, "n d"]) -> Float[Array, "n d"]:
    return x / (jnp.linalg.norm(x, axis=1, keepdims=True) + 1e-30)
