"""AuxK, the loss of dead latents: they learn what the living leave over.

Gao et al. 2024, "Scaling and evaluating sparse autoencoders" (arXiv 2406.04093), section A.2, with two changes.

There every token selects its k_aux largest dead latents, here every dead latent selects its largest tokens, as many as
an average latent fires on. With k_aux = d_in / 2 a few hundred dead latents would each be used on most tokens. They
then learn what all tokens have in common, and once they are alive they fire where they do not belong. Largest is meant
relative to the token's norm or its root: else a few tokens of great norm are the largest for all dead latents.

There the dead latents of a token reconstruct its residual together. Here the largest of them does so alone, and the
others together reconstruct what it leaves. Together, many dead latents have shares that are too small to be among the k
largest of a token: of a BatchTopK SAE with an L0 of 8 on the output of an attention, half of all latents stayed dead.
`lifted` latents do not compete, and still share.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from jsae.losses import mean_square, squared_error
from jsae.ops import Input, Ops

_FEW = 128  # dead latents up to which the smaller of two products is enough
_LARGEST_L0 = 10.0  # of lifted latents, if all were dead
_FEWEST_TOKENS = 4  # that one of them learns from, where an average latent fires on as many

Parts = tuple[Float[Array, "n o"], ...]
"""Reconstructions by dead latents: each of what the former ones leave."""


def tokens_of(n: int, l0: float, d_sae: int, *, lifted: bool = False) -> int:
    """Return on how many of n tokens a dead latent learns: as many as an average latent fires on, at least 1.

    For `lifted` latents (`decode_dead`) L0 counts as 10 at most, where that leaves at least 4 tokens. Those that learn
    on many tokens each, all at once, kill others where they come to life: of a ReLU SAE on a nanochat's middle layer
    with an L0 of 80, 78 % died, and without AuxK none. Where a batch has few tokens for a latent, fewer than 4 teach it
    too little: more died.
    """
    average = min(max(round(n * l0 / d_sae), 1), n)
    if not lifted or l0 <= _LARGEST_L0:
        return average
    return min(average, max(round(n * _LARGEST_L0 / d_sae), _FEWEST_TOKENS))


def room(d_sae: int) -> int:
    """Return the largest number of dead latents that learn in one step: an eighth of all, from 512 to 4,096."""
    return min(max(512, min(d_sae // 8, 4096)), d_sae)


def decode_dead(
    ops: Ops,
    inputs: Input,
    W_enc: Float[Array, "f d"],
    b_enc: Float[Array, " f"],
    W_dec: Float[Array, "f o"],
    dead: Bool[Array, " f"],
    tokens: int,
    step: Int[Array, ""] | int,
    *,
    norm_power: float = 1.0,
    lifted: bool = False,
) -> Parts:
    """Return the reconstruction by dead latents without a bias, each active on the tokens where it is largest.

    These are the tokens with the largest (x . w + min(b, 0)) / |x|^norm_power, for inputs x, and a row w and bias b of
    the encoder: a positive bias would make a token of no norm the largest. Negative pre-activations count as they are:
    otherwise a latent far below zero would never recover. If more latents are dead than there is room for, each step
    uses the next ones.

    Of the latents that chose a token, the one for which this number is largest makes the first part, the others make
    the second.

    A latent with a threshold of its own does not come to life by becoming larger than others. `lifted` gives it the
    values that it would have with a bias that lets it fire on these tokens, p - max(p of the other tokens); encoder and
    decoder learn their directions, and the bias is left to `jsae.architectures.penalised.revival`. Its tokens
    are those with the largest p, and all make one part.

    Args:
      ops: the implementation.
      inputs: input of the encoder.
      W_enc: encoder, (f, d).
      b_enc: encoder bias, (f,).
      W_dec: decoder, (f, o).
      dead: mask of the dead latents, (f,).
      tokens: number of tokens on which each is active.
      step: number of the training step.
      norm_power: the power of a token's norm that its pre-activations are relative to; `lifted` ones are not.
      lifted: whether values count from the largest of the tokens on which the latent is not active.
    """
    f, most = len(dead), room(len(dead))
    first = (step * most) % f

    def decoded(size: int) -> Parts:
        (rows,) = jnp.nonzero(jnp.roll(dead, -first), size=size, fill_value=f)
        is_dead, rows = rows < f, (rows + first) % f
        pre = ops.pre_activations(inputs, W_enc[rows], b_enc[rows])
        count = min(tokens + lifted, len(pre))
        rank = lax.stop_gradient(pre if lifted else (pre - jax.nn.relu(b_enc[rows])) / _norm(inputs) ** norm_power)
        least = ops.top_k(rank.T, count).values.min(axis=1)
        if lifted:
            parts: Parts = (jnp.where(is_dead, jax.nn.relu(pre - least), 0),)
        else:
            chosen = is_dead & (rank >= least)
            largest = jnp.where(chosen, rank, -jnp.inf).max(axis=1, keepdims=True)
            parts = tuple(jnp.where(chosen & which, pre, 0) for which in (rank == largest, rank < largest))
        return tuple(ops.matmul(values, W_dec[rows]) for values in parts)

    if most <= _FEW:
        return decoded(most)
    return lax.cond(dead.sum() > _FEW, lambda: decoded(most), lambda: decoded(_FEW))


def _norm(inputs: Input) -> Float[Array, "n 1"]:
    """Return |x| of every token; of one that is nearly 0, what exceeds the rounding of its pre-activations."""
    norm = jnp.linalg.norm(inputs.read().astype(jnp.float32), axis=1, keepdims=True)
    least = jnp.finfo(jnp.float32)
    return jnp.maximum(norm, jnp.maximum(least.eps * norm.mean(), least.tiny))


def loss(
    y: Float[Array, "n o"], residual: Float[Array, "n o"], parts: Parts, dead: Bool[Array, " f"]
) -> Float[Array, ""]:
    """Return Var(y) |e - e_hat|^2 / |e - mean(e)|^2 with e the detached residual, and e_hat the sum of all parts.

    It is 0 where no latent is dead, or the residual has no variance. The gradient of a part is that of the error which
    it and the former parts leave, as if there were no later ones.

    In the paper both terms of the loss are relative to a variance, the squared error to that of the target. Here the
    squared error is not, and so AuxK is multiplied by the target's variance: their ratio is the same.

    Args:
      y: targets, (n, o).
      residual: the error of the reconstruction, e = y - y_hat, (n, o).
      parts: the reconstruction by dead latents (`decode_dead`).
      dead: mask of the dead latents, (f,).
    """
    e = lax.stop_gradient(residual)
    variance, of_target = (jnp.square(a - a.mean(0)).sum(-1).mean() for a in (e, y))
    is_any = dead.any() & (variance > 0)
    first, *others = parts
    error, rest = squared_error(e, first), e - lax.stop_gradient(first)
    for part in others:
        error += squared_error(rest, part) - mean_square(rest)
        rest -= lax.stop_gradient(part)
    return of_target * jnp.where(is_any, error / jnp.where(is_any, variance, 1), 0)
