"""Reconstruction, sparsity, and AuxK."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from jsae import topk


def squared_error(x: Float[Array, "n d"], x_hat: Float[Array, "n d"]) -> Float[Array, ""]:
    """mean_n |x - x_hat|^2: summed over d, averaged over tokens, as everywhere in the field."""
    return jnp.square(x - x_hat).sum(-1).mean()


def l1(latents: Float[Array, "n f"], W_dec: Float[Array, "f d"]) -> Float[Array, ""]:
    """mean_n sum_i latents_i |W_dec,i|, for latents that are not negative."""
    return (latents @ jnp.linalg.norm(W_dec, axis=1)).mean()


def auxk(
    x: Float[Array, "n d"],
    residual: Float[Array, "n d"],
    W_enc: Float[Array, "f d"],
    b_enc: Float[Array, " f"],
    W_dec: Float[Array, "f d"],
    b_dec: Float[Array, " d"],
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

    def none() -> Float[Array, "n d"]:
        return jnp.zeros_like(e)

    def all_of_them() -> Float[Array, "n d"]:
        (rows,) = jnp.nonzero(dead, size=k, fill_value=0)
        real = jnp.arange(k) < n_dead
        pre = topk.pre_activations(x, W_enc[rows], b_enc[rows], b_dec)
        return jnp.where(real, pre, 0) @ W_dec[rows]

    def the_largest() -> Float[Array, "n d"]:
        return topk.decode(topk.encode(x, W_enc, b_enc, b_dec, dead, k), W_dec)

    branch = (n_dead > 0).astype(jnp.int32) + (n_dead > k)
    e_hat = lax.switch(branch, (none, all_of_them, the_largest))
    variance = jnp.square(e - e.mean(0)).sum(-1).mean()
    return jnp.minimum(n_dead / k, 1) * jnp.nan_to_num(squared_error(e, e_hat) / variance)
