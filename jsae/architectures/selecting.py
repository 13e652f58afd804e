"""Architectures that select k latents: TopK, AbsTopK, and BatchTopK and Matryoshka with one threshold per batch."""

import dataclasses
import functools
import itertools
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from jsae import losses
from jsae.architectures.base import Arrays, Context, Forward, SAEConfig, Statistic
from jsae.architectures.reviving import Reviving
from jsae.ops import Codes, Latents, Select
from jsae.settings import FACTOR, WEIGHT, number, require


@dataclasses.dataclass(frozen=True)
class SelectingConfig(SAEConfig):
    """Settings of architectures that select k latents.

    Raises:
      ConfigError: k is not between 1 and d_sae, or a setting is out of its range.
    """

    k: int = 32  # type: ignore[misc]  # a class variable where no architecture has a k
    """Active latents per token, or on average per token of a batch."""
    decoder_rate: float = number(3.0, FACTOR)
    aux_coefficient: float = number(1 / 8, WEIGHT)
    """Weight of AuxK (`jsae.auxk`); Gao et al. 2024 (arXiv 2406.04093), section A.2, have 1/32."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            1 <= self.k <= self.d_sae,
            f"k={self.k} active latents out of d_sae={self.d_sae}: k must be between 1 and d_sae; "
            "lower k or raise the expansion factor",
        )


@dataclasses.dataclass(frozen=True)
class TokenSelectingConfig(SelectingConfig):
    """Settings of architectures that select k latents of every token."""

    encoder_start: float = number(0.6, FACTOR)


class Selecting(Reviving):
    """Sparse codes and AuxK, shared by the architectures that select latents. Abstract."""

    sparse: ClassVar[bool] = True

    b_enc: nnx.Param[Float[Array, " f"]]

    @classmethod
    def initial_latents(cls, config: SAEConfig) -> dict[str, float]:
        """Return the encoder bias."""
        return {"b_enc": 0.0}

    def select(self, x: Float[Array, "n d"], select: Select, context: Context, by_token: bool = True) -> Codes:
        """Return the codes that `select(pre, k=, limit=, bias=)` picks of the pre-activations, raw."""
        return context.ops.encode(
            self.inputs(x, context),
            self.W_enc[...],
            self.b_enc[...],
            functools.partial(select, k=self.config.k if context.room is None else context.room),
            limit=context.limit,
            by_token=by_token,
        )

    def of_dead(self, forward: Forward) -> Float[Array, ""]:
        """Return AuxK, or 0 where it is known that no latent is dead."""
        if forward.context.dead is None:
            return jnp.zeros(())
        return self.auxk(forward, self.b_enc[...], float(self.config.k))


class TopK(Selecting):
    """f = ReLU(TopK_k((x - b_dec) W_enc^T + b_enc)), with AuxK against dead latents.

    Gao et al. 2024, "Scaling and evaluating sparse autoencoders" (arXiv 2406.04093), equations 3 and 4 and section A.2.

    With `hierarchical_k` it is HierarchicalTopK, one SAE for several sparsities: Balagansky et al. 2025, "Train one
    sparse autoencoder across multiple sparsity budgets to preserve interpretability and accuracy" (arXiv 2505.24473).
    The squared error is the mean over those numbers j and k of |x - x_hat_j|^2, where x_hat_j is the reconstruction
    from the j largest latents of a token.
    """

    name = "topk"
    form = "topk"

    @dataclasses.dataclass(frozen=True)
    class Config(TokenSelectingConfig):
        """Settings of TopK.

        Raises:
          ConfigError: numbers of `hierarchical_k` that do not increase up to k.
        """

        rate_scale = 0.9
        tail_exponent = 0.4
        remainder_exponent = 0.2

        aux_coefficient: float = number(1 / 32, WEIGHT)
        """Weight of AuxK (`jsae.auxk`), that of Gao et al. 2024 (arXiv 2406.04093), section A.2."""
        hierarchical_k: tuple[int, ...] = ()
        """Numbers of largest latents that must reconstruct by themselves; k is added. () is plain TopK."""

        def __post_init__(self) -> None:
            object.__setattr__(self, "hierarchical_k", _frozen(self.hierarchical_k))
            super().__post_init__()
            counts = (*self.inner_k, self.k)
            require(
                counts[0] >= 1 and all(a < b for a, b in itertools.pairwise(counts)),
                f"hierarchical_k must increase strictly from at least 1 up to k={self.k}: {self.hierarchical_k} do not",
            )

        @property
        def inner_k(self) -> tuple[int, ...]:
            """`hierarchical_k` without k."""
            counts = self.hierarchical_k
            return counts[:-1] if counts and counts[-1] == self.k else counts

    def activate(self, x: Float[Array, "n d"], context: Context) -> tuple[Codes, None]:
        """Return exactly k codes per token; those that are not positive have value 0."""
        codes = self.select(x, context.ops.top_k, context)
        return codes._replace(values=jax.nn.relu(codes.values)), None

    def penalty(self, forward: Forward) -> Float[Array, ""]:
        """Return AuxK, and what turns the squared error into its mean over the sparsities of `hierarchical_k`."""
        inner = self.config.inner_k
        return self.of_dead(forward) + (self._hierarchy(forward, inner) if inner else 0)

    def _hierarchy(self, forward: Forward, inner: tuple[int, ...]) -> Float[Array, ""]:
        """Return the mean over sparsities of the squared error, less that of the largest.

        From the error at k, what the smallest latents contribute is taken away, level by level in one decoding.
        """
        codes: Codes = forward.latents  # type: ignore[assignment]  # sparse
        rank = jnp.argsort(jnp.argsort(-codes.values, axis=1), axis=1)  # on a mesh codes are in no order
        level = len(inner) - jnp.searchsorted(jnp.asarray(inner), rank, side="right")
        smallest = forward.context.ops.decode_parts(codes, self.W_dec[...], level, len(inner), len(forward.y))
        whole = losses.mean_square(forward.error)
        total = whole + jnp.square(forward.error - smallest).sum(-1).mean(1).sum()
        return total / (len(inner) + 1) - whole

    def inference_arrays(self) -> Arrays:
        """Return the encoder bias."""
        return {"b_enc": self.b_enc[...]}


class AbsTopK(Selecting):
    """f = the k entries of (x - b_dec) W_enc^T + b_enc with the largest magnitude, with their signs; AuxK.

    Zhu et al. 2025, "AbsTopK: rethinking sparse autoencoders for bidirectional features" (arXiv 2510.00404).
    """

    name = "abstopk"
    form = "abstopk"

    @dataclasses.dataclass(frozen=True)
    class Config(TokenSelectingConfig):
        """Settings of AbsTopK."""

        rate_scale = 0.6
        aux_coefficient: float = number(1 / 4, WEIGHT)
        """Weight of AuxK: with that of TopK more latents die."""

    def activate(self, x: Float[Array, "n d"], context: Context) -> tuple[Codes, None]:
        """Return exactly k codes per token, of either sign."""
        return self.select(x, context.ops.abs_top_k, context), None

    def penalty(self, forward: Forward) -> Float[Array, ""]:
        """Return AuxK."""
        return self.of_dead(forward)

    def inference_arrays(self) -> Arrays:
        """Return the encoder bias."""
        return {"b_enc": self.b_enc[...]}


class BatchSelecting(Selecting):
    """Selection from a whole batch in training and a threshold afterwards: BatchTopK and Matryoshka. Abstract."""

    form = "jumprelu"
    norm_power = 0.5  # tokens compete too, and those of great norm win

    threshold: Statistic

    @classmethod
    def initial_statistics(cls, config: SAEConfig) -> dict[str, float]:
        """Return the threshold: the mean over batches of the smallest value that was kept."""
        return {"threshold": 0.0}

    def activate(self, x: Float[Array, "n d"], context: Context) -> tuple[Latents, None]:
        """Return on average k codes per token in training, afterwards every latent above the threshold."""
        if context.training:
            return self.select(x, context.ops.batch_top_k, context, by_token=False), None
        pre = self.pre_activations(x, context)
        return jnp.where(pre > self.threshold[...], jax.nn.relu(pre), 0), None

    def batch_statistics(self, forward: Forward) -> dict[str, Float[Array, ""]]:
        """Return the smallest value above 0 of the batch."""
        return {"threshold": least_active(forward.latents)}  # type: ignore[arg-type]  # sparse: Codes

    def inference_arrays(self) -> Arrays:
        """Return the encoder bias, and the threshold once per latent."""
        threshold = jnp.full(self.config.d_sae, self.threshold[...], jnp.float32)
        return {"b_enc": self.b_enc[...], "threshold": threshold}

    def own_arrays(self, arrays: Mapping[str, Array]) -> Mapping[str, Array]:
        """Return the encoder bias, and as the one threshold the mean of the latents' thresholds."""
        return {"b_enc": arrays["b_enc"], "threshold": arrays["threshold"].mean()}


class BatchTopK(BatchSelecting):
    """In training f = ReLU of the n k largest pre-activations of the whole batch; afterwards those above a threshold.

    Bussmann et al. 2024, "BatchTopK sparse autoencoders" (arXiv 2412.06410), equations 4 to 6: the threshold is the
    mean over batches of the smallest value kept. It is exported as JumpReLU. AuxK as for TopK.
    """

    name = "batchtopk"

    @dataclasses.dataclass(frozen=True)
    class Config(SelectingConfig):
        """Settings of BatchTopK."""

        rate_scale = 0.8
        tail_exponent = 0.5
        remainder_exponent = 0.3

    def penalty(self, forward: Forward) -> Float[Array, ""]:
        """Return AuxK."""
        return self.of_dead(forward)


class Matryoshka(BatchSelecting):
    """BatchTopK whose first w latents must reconstruct by themselves, for every nested width w.

    Bussmann et al. 2025, "Learning multi-level features with Matryoshka sparse autoencoders" (arXiv 2503.17547):
    one batch-wide selection serves all widths, and their squared errors count alike.
    """

    name = "matryoshka"

    @dataclasses.dataclass(frozen=True)
    class Config(SelectingConfig):
        """Settings of Matryoshka.

        Raises:
          ConfigError: nested widths that do not increase up to d_sae.
        """

        rate_scale = 0.57
        nested_widths: tuple[int, ...] = ()
        """How many of the first latents must reconstruct by themselves; d_sae is added."""

        def __post_init__(self) -> None:
            object.__setattr__(self, "nested_widths", _frozen(self.nested_widths))
            super().__post_init__()
            widths = self.all_widths
            require(len(widths) > 1, "a matryoshka SAE needs nested widths, such as d_sae/16, d_sae/4")
            require(
                widths[0] >= 1 and all(a < b for a, b in itertools.pairwise(widths)),
                f"nested widths must increase strictly from at least 1 up to d_sae: {widths} do not",
            )

        @property
        def all_widths(self) -> tuple[int, ...]:
            """The nested widths, d_sae the last of them."""
            inner = self.nested_widths
            return inner if inner and inner[-1] == self.d_sae else (*inner, self.d_sae)

    def penalty(self, forward: Forward) -> Float[Array, ""]:
        """Return the errors of the inner widths, and AuxK."""
        inner = self.config.all_widths[:-1]
        codes: Codes = forward.latents  # type: ignore[assignment]  # sparse
        parts = forward.context.ops.decode_levels(codes, self.W_dec[...], inner, len(forward.y))
        return losses.nested(forward.y, parts, self.b_dec[...]) + self.of_dead(forward)


def _frozen(numbers: Any) -> Any:
    """Return a list as a tuple, and anything else as it is, for `check_fields` to judge."""
    return tuple(numbers) if isinstance(numbers, list) else numbers


def least_active(codes: Codes) -> Float[Array, ""]:
    """Return the smallest value above 0, the threshold of the batch; 0 where there is none."""
    least = jnp.where(codes.values > 0, codes.values, jnp.inf).min()
    return jnp.where(jnp.isinf(least), 0, least)
