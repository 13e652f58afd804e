"""Settings of training: a frozen dataclass, checked on creation. Imports nothing heavy."""

import dataclasses
import math
from typing import TYPE_CHECKING, Literal, TypeVar

from jsae.settings import (
    AVERAGED,
    BETA,
    DEAD_AFTER,
    FRACTION,
    RATE,
    SEED,
    TOKENS,
    Json,
    Range,
    at_least,
    check_fields,
    number,
    require,
)

if TYPE_CHECKING:
    from jax import Array

    from jsae.architectures import SAEConfig

    Scalar = TypeVar("Scalar", float, Array)
else:
    Scalar = TypeVar("Scalar")  # no jax is imported for its sake

RECIPE = 15
"""Raised whenever a run with the same settings trains differently. A run is resumed by its own recipe only."""

_DIFFUSION = 2.3
_HIGHEST_RATE = 0.05
_SWEPT = 2**18
_LONGEST_SWEPT = 2**20
_SWEPT_WIDTH = 128
_SWEPT_DENSITY = 1 / 32
_TAIL_FADES = 0.1
_DEAD_FRACTION = 0.015
_LONGEST_SILENCE = 10_000_000


@dataclasses.dataclass(frozen=True)
class TrainConfig(Json):
    """Settings of training. Lengths are in activations (tokens), not in steps, so they do not depend on batch size.

    Raises:
      ConfigError: values out of range or that contradict each other.
    """

    num_activations: int = dataclasses.field(metadata={"range": TOKENS})
    batch_size: int = number(2048, at_least(1, 2**24))
    learning_rate: float | None = number(None, RATE)
    """Peak rate; None is `default_rate` for the SAE, lowered for activations with heavy tails (`jsae.state`)."""
    warmup_fraction: float = number(0.02, FRACTION)
    decay_fraction: float = number(0.2, FRACTION)
    clip_norm: float = number(1.0, Range(1e-12, 1e30, "be positive, from 1e-12 to 1e30 or inf", also=(math.inf,)))
    sparsity_warmup_fraction: float = number(0.05, FRACTION)
    """Fraction of the run over which sparsity penalties rise from zero."""
    k_start: int | None = number(None, at_least(1, 2**28))
    """TopK family: active latents per token at the start, lowered linearly to k over `k_anneal_fraction`; None is k."""
    k_anneal_fraction: float = number(0.1, FRACTION)
    average_fraction: float | None = number(None, AVERAGED)
    """Export an exponential mean of the weights over this fraction of the run; None exports the weights."""
    beta1: float = number(0.9, BETA)
    beta2: float = number(0.97, BETA)
    """Decay of the second moment: latents fire rarely, and with a longer memory their steps are uneven."""
    dead_after: int | None = number(None, DEAD_AFTER)
    """A latent is dead after so many activations on which it is zero; None is 1.5 % of the run, at most 10 million."""
    resample_every: int | None = number(None, TOKENS)
    """Activations between resamplings, which give dead latents new weights and zero Adam moments; None is never."""
    seed: int = number(0, SEED)
    matmul_dtype: Literal["float32", "bfloat16"] = "float32"
    """Type to which matrices are rounded before they are multiplied; sums, weights and moments are always float32."""

    def __post_init__(self) -> None:
        require(
            self.matmul_dtype in ("float32", "bfloat16"),
            f"matmul_dtype is {self.matmul_dtype!r}: it must be float32 or bfloat16",
        )
        check_fields(self)
        require(
            self.num_activations >= self.batch_size,
            f"num_activations={self.num_activations} is less than one batch of {self.batch_size}",
        )
        require(
            self.num_steps < 2**31,
            f"num_activations={self.num_activations} are {self.num_steps} steps of batch_size={self.batch_size}: "
            "they must be less than 2**31",
        )
        require(
            self.warmup_fraction + self.decay_fraction <= 1,
            f"warmup_fraction={self.warmup_fraction} and decay_fraction={self.decay_fraction} exceed 1 together",
        )
        require(
            self.resample_every is None or self.resample_every >= self.batch_size,
            f"resample_every={self.resample_every} is less than one batch of {self.batch_size}",
        )
        require(
            self.resample_every is None or self.resample_every <= self.num_activations,
            f"resample_every={self.resample_every} is longer than the run of num_activations={self.num_activations}: "
            "nothing would be resampled",
        )

    @property
    def num_steps(self) -> int:
        """Whole batches in the run."""
        return self.num_activations // self.batch_size

    @property
    def anneal_steps(self) -> int:
        """Steps over which k is lowered; 0 without `k_start`."""
        return 0 if self.k_start is None else max(round(self.k_anneal_fraction * self.num_steps), 1)

    def anneals(self, sae: "SAEConfig") -> bool:
        """Return whether training starts with a larger k than that of the SAE.

        Raises:
          ConfigError: `k_start` is set, but the architecture has no k, or it is not between k and d_sae.
        """
        if self.k_start is None:
            return False
        require(sae.k is not None, f"{sae.architecture} has no k to lower: leave out k_start")
        require(
            sae.k <= self.k_start <= sae.d_sae,
            f"k_start={self.k_start} must lie between k={sae.k} and d_sae={sae.d_sae}",
        )
        return True

    @property
    def resample_steps(self) -> int | None:
        """`resample_every` in steps, rounded down."""
        return None if self.resample_every is None else max(self.resample_every // self.batch_size, 1)

    @property
    def dead_window(self) -> int:
        """`dead_after`, or its default: a latent is dead after this many activations on which it is zero."""
        if self.dead_after is not None:
            return self.dead_after
        return min(max(round(_DEAD_FRACTION * self.num_activations), 1), _LONGEST_SILENCE)

    def default_rate(self, sae: "SAEConfig") -> float:
        """Return the peak learning rate where none is given.

            rate_scale * 2.3 * (k sqrt(batch_size) / d_sae)^(1/3) / sqrt(d_in num_steps)

        Adam moves every weight by about the rate in a step, so the root in the denominator makes the distance that a
        row of d_in weights can diffuse in a run the same for all widths and lengths. The other factor stands for the
        noise of gradients: a latent is active on batch_size k / d_sae tokens of a batch on average. It and the constant
        were fitted to sweeps on activations of two language models and of a synthetic world (docs/performance.md).
        `rate_scale` is the architecture's; k is its target L0, or 32, where it has no k. Where an architecture has a
        `length_exponent`, the rate is higher for longer runs: times (num_activations / 2^18)^length_exponent between
        2^18 and 2^20 activations, and by the same factor as there beyond. Where it has a `width_exponent`, the rate is
        lower for wider activations: times (128 / d_in)^width_exponent. ReLU's falls about as 1 / d_in, as Adam's rate
        does in muP (Yang et al. 2022, arXiv 2203.03466): a step moves a pre-activation by up to d_in times the rate,
        and ReLU compares it with zero, where TopK compares it with others that have moved too. A `density_exponent`
        makes the rate depend less on the share of active latents: times (d_sae / 32 k)^density_exponent.
        """
        density = sae.expected_l0 / sae.d_sae
        noise = (density * math.sqrt(self.batch_size)) ** (1 / 3)
        rate = sae.rate_scale * _DIFFUSION * noise / math.sqrt(sae.d_in * max(self.num_steps, 1))
        rate *= self.length_gain(sae) * (_SWEPT_WIDTH / sae.d_in) ** sae.width_exponent
        rate *= (_SWEPT_DENSITY / density) ** sae.density_exponent
        return min(rate, _HIGHEST_RATE)

    def rate_for(self, sae: "SAEConfig", heaviness: Scalar, remainder: Scalar) -> Scalar:
        """Return the peak learning rate where none is given, for activations of a heaviness and a remainder.

        Of activations with heavy tails few tokens of a batch determine its gradient, as if the batch were smaller. The
        power is larger for architectures with a penalty: at higher rates many of their latents died, or they
        reconstructed worse.

        Where k directions already span nearly all the variance, little error is left, and more of it is the noise of
        the steps. The best rates of TopK and BatchTopK are lower there: at the output of the demo's attention with an
        L0 of 32, and elsewhere in it with one of 80.

        Args:
          sae: settings of the SAE.
          heaviness: E|c|^4 / (E|c|^2)^2 of the centred activations, at least 1.
          remainder: share of their variance outside the k leading principal components, relative to 0.2, at most 1.
        """
        return self.default_rate(sae) * remainder**sae.remainder_exponent / heaviness ** self.tail_exponent(sae)

    def length_gain(self, sae: "SAEConfig") -> float:
        """Return the factor on the default rate of a run that is longer than 2^18 activations, at least 1."""
        longer = max(min(self.num_activations, _LONGEST_SWEPT) / _SWEPT, 1)
        return float(longer**sae.length_exponent)

    def tail_exponent(self, sae: "SAEConfig") -> float:
        """Return the power of the heaviness of activations by which the default rate is divided.

        It is the architecture's for up to 2^18 activations, and falls by 0.1 for every factor of 2.7 in length, to 0:
        where few tokens have most of the variance, the best rate falls more slowly than with the root of the steps. At
        the demo's MLP, four times the activations multiplied the best rate by 0.6 to 1.3, not by 0.5.
        """
        longer = max(self.num_activations / _SWEPT, 1)
        return max(sae.tail_exponent - _TAIL_FADES * math.log(longer), 0.0)
