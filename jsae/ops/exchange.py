"""Selection over latents that several devices divide among themselves: what each of them computes and sends.

Called within `jax.shard_map` over the axes of `jsae.axes`. What travels are the values of candidates and counts, never
pre-activations.
"""

from collections.abc import Callable

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from jsae.axes import DATA, LATENT
from jsae.ops.types import Codes

_DIGIT = 4  # bits of a threshold that are found in one exchange


def largest_of_token(
    sizes: Float[Array, "n k"], k: int, limit: Int[Array, ""] | None, top_k: Callable[..., Codes], shards: int
) -> Bool[Array, "n k"]:
    """Return which of this device's candidates are among the k largest of all devices that share the latents.

    Every token has one device that compares all of its candidates. It sends back the smallest that is selected, and how
    many of those that equal it every device may take: the first devices take theirs. NaN is always taken.

    Args:
      sizes: of n tokens the sizes of the k largest candidates of this device, in any order.
      k: codes per token that are selected.
      limit: how many of them count; None: all.
      top_k: selects within a row; of the form of `jsae.ops.Ops.top_k`.
      shards: number of devices that share the latents.
    """
    gathered = lax.all_to_all(sizes, LATENT, split_axis=0, concat_axis=1, tiled=True)
    largest = top_k(gathered, k, limit=limit).values
    least = largest.min(1) if limit is None else jnp.take(largest, limit - 1, axis=1)
    equal = (gathered == least[:, None]).reshape(len(gathered), shards, -1).sum(2)
    room = (k if limit is None else limit) - (gathered > least[:, None]).sum(1)
    quotas = jnp.clip(room[:, None] - (jnp.cumsum(equal, axis=1) - equal), 0, equal)
    answers = jnp.stack([jnp.broadcast_to(least[:, None], quotas.shape), quotas.astype(sizes.dtype)], axis=2)
    answers = lax.all_to_all(answers, LATENT, split_axis=1, concat_axis=0, tiled=True)
    least, quota = answers[..., 0], answers[..., 1]
    ties = sizes == least
    return ~(sizes <= least) | (ties & (jnp.cumsum(ties, axis=1) <= quota))


def largest_of_all(values: Float[Array, "n k"], count: int | Int[Array, ""]) -> Bool[Array, "n k"]:
    """Return which of this device's values are among the `count` largest positive ones of all devices.

    Of values that equal the smallest of them those of the first devices are taken, in the order of their places.
    """
    least = _kth_largest(values, count)
    above, equal = values > least, (values == least) & (values > 0)
    counts = lax.all_gather(jnp.stack([above.sum(), equal.sum()]), (DATA, LATENT))
    before = jnp.where(jnp.arange(len(counts)) < lax.axis_index((DATA, LATENT)), counts[:, 1], 0).sum()
    own = count - counts[:, 0].sum() - before
    return above | (equal & (jnp.cumsum(equal.ravel()).reshape(equal.shape) <= own))


def _kth_largest(values: Float[Array, "n k"], k: int | Int[Array, ""]) -> Float[Array, ""]:
    """Return the k-th largest of the positive values of all devices; 0 where fewer are positive.

    Positive floats are ordered like their bits: four bits are found at a time, by counts of the values that reach each
    of 15 thresholds, added over devices.
    """
    bits = jnp.where(values > 0, lax.bitcast_convert_type(values, jnp.int32), 0)
    digits = jnp.arange(1, 2**_DIGIT, dtype=jnp.int32)

    def decide(i: Int[Array, ""], found: Int[Array, ""]) -> Int[Array, ""]:
        shift = 32 - _DIGIT * (i + 1)
        # A first digit above 7 would be the sign: no value reaches it.
        thresholds = jnp.where((shift == 28) & (digits > 7), 2**31 - 1, found | (digits << shift))
        reached = (bits[..., None] >= thresholds).sum((0, 1), dtype=jnp.int32)
        return found | ((lax.psum(reached, (DATA, LATENT)) >= k).sum(dtype=jnp.int32) << shift)

    found = lax.fori_loop(0, 32 // _DIGIT, decide, jnp.int32(0))
    return lax.bitcast_convert_type(found, jnp.float32)
