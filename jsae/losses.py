"""Terms of the loss: squared error, L1, AuxK, nested errors."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float


def squared_error(x: Float[Array, "n d"], x_hat: Float[Array, "n d"]) -> Float[Array, ""]:
    """Return mean_n |x - x_hat|^2: summed over d, averaged over tokens."""
    return mean_square(x_hat - x)


def mean_square(error: Float[Array, "n d"]) -> Float[Array, ""]:
    """Return mean_n |error|^2, summed over d."""
    return jnp.square(error).sum(-1).mean()


def l1(means: Float[Array, " f"], W_dec: Float[Array, "f o"]) -> Float[Array, ""]:
    """Return mean_n sum_i latents_i |W_dec,i| from the means over tokens of non-negative latents."""
    return means @ jnp.linalg.norm(W_dec, axis=1)


def auxk(
    y: Float[Array, "n o"], residual: Float[Array, "n o"], e_hat: Float[Array, "n o"], dead: Bool[Array, " f"], k: int
) -> Float[Array, ""]:
    """Return AuxK, Var(y) |e - e_hat|^2 / |e - mean(e)|^2 with e the detached residual; 0 if no latent is dead.

    Gao et al. 2024, "Scaling and evaluating sparse autoencoders" (arXiv 2406.04093), section A.2. Negative
    pre-activations are used too, because otherwise a latent far below zero would never recover. The loss is weighted by
    min(dead / k, 1), so that a few dead latents do not have to explain the whole residual.

    There both terms of the loss are relative to a variance, the squared error to that of the target. Here the squared
    error is not, and so AuxK is multiplied by the target's variance: their ratio is the same.

    Args:
      y: targets, (n, o).
      residual: the error of the reconstruction, e = y - y_hat, (n, o).
      e_hat: the decoding of the k largest dead latents without the bias (`jsae.ops.Ops.decode_dead`), (n, o).
      dead: mask of the dead latents, (f,).
      k: number of dead latents per token.
    """
    e = lax.stop_gradient(residual)
    variance, of_target = (jnp.square(a - a.mean(0)).sum(-1).mean() for a in (e, y))
    share = jnp.where(variance > 0, squared_error(e, e_hat) / jnp.where(variance > 0, variance, 1), 0)
    return jnp.minimum(dead.sum() / k, 1) * of_target * share


def nested(y: Float[Array, "n o"], levels: Float[Array, "l n o"], b_dec: Float[Array, " o"]) -> Float[Array, ""]:
    """Return sum_w mean_n |y - (f[:w] W_dec[:w] + b_dec)|^2 over the inner widths w (all but d_sae).

    Bussmann et al. 2025, "Learning multi-level features with Matryoshka sparse autoencoders" (arXiv 2503.17547),
    equation 3.

    Args:
      y: targets, (n, o).
      levels: the decodings f[:w] W_dec[:w] (`jsae.ops.Ops.decode_levels`), (l, n, o).
      b_dec: the decoder bias, (o,).
    """
    return jnp.square(y - b_dec - levels).sum(-1).mean(1).sum()
