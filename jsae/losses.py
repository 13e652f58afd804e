"""Terms of the loss: squared error, L1, nested errors."""

import jax.numpy as jnp
from jaxtyping import Array, Float


def squared_error(x: Float[Array, "n d"], x_hat: Float[Array, "n d"]) -> Float[Array, ""]:
    """Return mean_n |x - x_hat|^2: summed over d, averaged over tokens."""
    return mean_square(x_hat - x)


def mean_square(error: Float[Array, "n d"]) -> Float[Array, ""]:
    """Return mean_n |error|^2, summed over d."""
    return jnp.square(error).sum(-1).mean()


def l1(means: Float[Array, " f"], W_dec: Float[Array, "f o"]) -> Float[Array, ""]:
    """Return mean_n sum_i latents_i |W_dec,i| from the means over tokens of non-negative latents."""
    return means @ jnp.linalg.norm(W_dec, axis=1)


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
