"""Reconstruction, sparsity, and AuxK."""

import functools

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from jsae import codes, precision, topk


def squared_error(x: Float[Array, "n d"], x_hat: Float[Array, "n d"]) -> Float[Array, ""]:
    """mean_n |x - x_hat|^2: summed over d, averaged over tokens, as everywhere in the field."""
    return mean_square(x_hat - x)


def mean_square(error: Float[Array, "n d"]) -> Float[Array, ""]:
    """mean_n |error|^2, summed over d."""
    return jnp.square(error).sum(-1).mean()


def l1(latents: Float[Array, "n f"], W_dec: Float[Array, "f o"]) -> Float[Array, ""]:
    """mean_n sum_i latents_i |W_dec,i|, for latents that are not negative."""
    return (latents @ jnp.linalg.norm(W_dec, axis=1)).mean()


def auxk(
    given: codes.Input,
    residual: Float[Array, "n o"],
    W_enc: Float[Array, "f d"],
    b_enc: Float[Array, " f"],
    W_dec: Float[Array, "f o"],
    dead: Bool[Array, " f"],
    k: int,
) -> Float[Array, ""]:
    """|e - e_hat|^2 / |e - mean(e)|^2, with e the detached residual and e_hat = sum of the k largest dead latents.

    Gao et al. 2024 (arXiv 2406.04093), section A.2: e_hat is decoded without the bias, and the gradient reaches the
    dead latents' encoder as well as their decoder. Pre-activations count as they are, negative ones too, or a latent
    far below zero would never come back. Weighted by min(dead / k, 1), so that a few dead latents are not asked to
    explain everything; 0 where none is dead. Where at most k are dead, all of them are picked for every token, and
    the sum is a small dense product.
    """
    e = lax.stop_gradient(residual)
    n_dead = dead.sum()

    def all_of_them() -> Float[Array, "n o"]:
        (rows,) = jnp.nonzero(dead, size=k, fill_value=0)
        real = jnp.arange(k) < n_dead
        pre = codes.pre_activations(given, W_enc[rows], b_enc[rows])
        return precision.matmul(jnp.where(real, pre, 0), W_dec[rows])

    def the_largest() -> Float[Array, "n o"]:
        picked = codes.encode(given, W_enc, b_enc, dead, None, functools.partial(topk.top_k, k=k))
        return codes.decode(picked, W_dec, len(given.x))

    e_hat = lax.cond(n_dead > k, the_largest, all_of_them)
    variance = jnp.square(e - e.mean(0)).sum(-1).mean()
    share = jnp.where(variance > 0, squared_error(e, e_hat) / jnp.where(variance > 0, variance, 1), 0)
    return jnp.minimum(n_dead / k, 1) * share


def nested(
    y: Float[Array, "n o"],
    latents: codes.Codes,
    W_dec: Float[Array, "f o"],
    b_dec: Float[Array, " o"],
    widths: tuple[int, ...],
) -> Float[Array, ""]:
    """sum_w mean_n |y - (f[:w] W_dec[:w] + b_dec)|^2 over the inner widths w, all but the last, which is d_sae.

    Bussmann et al. 2025, "Learning multi-level features with Matryoshka sparse autoencoders" (arXiv 2503.17547),
    equation 3. A code counts from the first width that holds its latent: all levels are decoded in one pass, each code
    into its own level, and added up.
    """
    n = len(y)
    level = jnp.searchsorted(jnp.asarray(widths[:-1]), latents.indices, side="right")
    inner = level < len(widths) - 1
    moved = codes.Codes(
        jnp.where(inner, latents.values, 0), latents.indices, jnp.where(inner, level, 0) * n + latents.tokens
    )
    parts = codes.decode(moved, W_dec, n * (len(widths) - 1)).reshape(len(widths) - 1, n, -1)
    errors = y - b_dec - jnp.cumsum(parts, axis=0)
    return jnp.square(errors).sum(-1).mean(1).sum()
