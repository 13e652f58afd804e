"""How a run is trained: a frozen dataclass, checked when made. Imports nothing heavy."""

import dataclasses
import math
from typing import TYPE_CHECKING, Literal

from jsae.settings import ConfigError, Json, require

if TYPE_CHECKING:
    from jsae.architectures import SAEConfig

__all__ = ["ConfigError", "Json", "TrainConfig", "require"]


@dataclasses.dataclass(frozen=True)
class TrainConfig(Json):
    """How an SAE is trained. Lengths are in activations (tokens), never in steps, so that batch size is free."""

    num_activations: int
    batch_size: int = 2048
    learning_rate: float | None = None
    """Peak rate; None is 2e-4 / sqrt(d_sae / 2**14), the scaling of Gao et al. 2024, section A.3."""
    warmup_fraction: float = 0.02
    decay_fraction: float = 0.2
    clip_norm: float = 1.0
    sparsity_warmup_fraction: float = 0.05
    """The part of the run over which penalties on sparsity rise from zero."""
    k_start: int | None = None
    """TopK family: codes per token at the very start, lowered linearly to k over `k_anneal_fraction`; None is k."""
    k_anneal_fraction: float = 0.1
    average_fraction: float | None = None
    """Keeps an exponential mean of the weights over this part of the run and exports it; None exports the weights."""
    beta1: float = 0.9
    beta2: float = 0.999
    dead_after: int = 10_000_000
    """A latent is dead after this many activations without a value above zero."""
    resample_every: int | None = None
    """Give dead latents new weights and fresh Adam moments every so many activations; None is never."""
    seed: int = 0
    matmul_dtype: Literal["float32", "bfloat16"] = "float32"
    """What matrices are rounded to before they are multiplied; sums, weights and moments are float32 in any case."""

    def __post_init__(self) -> None:
        require(
            self.matmul_dtype in ("float32", "bfloat16"),
            f"matmul_dtype is {self.matmul_dtype!r}: it must be float32 or bfloat16",
        )
        require(self.batch_size >= 1, f"batch_size is {self.batch_size}: it must be at least 1")
        require(
            self.num_activations >= self.batch_size,
            f"num_activations={self.num_activations} is less than one batch of {self.batch_size}",
        )
        rate = self.learning_rate
        require(rate is None or (math.isfinite(rate) and rate > 0), f"learning_rate is {rate}: it must be positive")
        for name in ("warmup_fraction", "decay_fraction", "sparsity_warmup_fraction", "k_anneal_fraction"):
            value = getattr(self, name)
            require(0 <= value <= 1, f"{name} is {value}: it must lie between 0 and 1")
        require(
            self.warmup_fraction + self.decay_fraction <= 1,
            f"warm-up ({self.warmup_fraction}) and decay ({self.decay_fraction}) together exceed the run",
        )
        require(self.clip_norm > 0, f"clip_norm is {self.clip_norm}: it must be positive")
        for name in ("beta1", "beta2"):
            require(0 <= getattr(self, name) < 1, f"{name} is {getattr(self, name)}: it must lie in [0, 1)")
        require(
            1 <= self.dead_after <= 2**30,
            f"dead_after is {self.dead_after}: it must lie between 1 and 2**30 activations",
        )
        require(
            self.resample_every is None or self.resample_every >= self.batch_size,
            f"resample_every={self.resample_every} is less than one batch of {self.batch_size}",
        )
        require(0 <= self.seed < 2**31, f"seed is {self.seed}: it must lie in [0, 2**31)")

    @property
    def num_steps(self) -> int:
        """Whole batches in the run."""
        return self.num_activations // self.batch_size

    @property
    def anneal_steps(self) -> int:
        """Steps over which k comes down."""
        return 0 if self.k_start is None else max(round(self.k_anneal_fraction * self.num_steps), 1)

    def anneals(self, sae: "SAEConfig") -> bool:
        """Return whether k starts above that of the SAE.

        Raises:
          ConfigError: it would, but the architecture has no k.
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

    def peak_rate(self, d_sae: int) -> float:
        """The learning rate after warm-up for an SAE of `d_sae` latents."""
        return self.learning_rate if self.learning_rate is not None else 2e-4 / math.sqrt(d_sae / 2**14)
