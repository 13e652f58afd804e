"""What a run is told: frozen dataclasses, checked when made, JSON both ways. Imports nothing heavy."""

import dataclasses
import json
import math
from typing import Any, Literal, TypeVar, get_args

Architecture = Literal["topk", "relu", "gated"]
ARCHITECTURES: tuple[str, ...] = get_args(Architecture)


class ConfigError(ValueError):
    """A setting that cannot work: says what came, what was expected and what to do."""


def require(condition: bool, message: str) -> None:
    """Raises `ConfigError(message)` unless `condition` holds."""
    if not condition:
        raise ConfigError(message)


_Config = TypeVar("_Config", bound="Json")


class Json:
    """Mixed into frozen dataclasses of plain fields: `to_json()` and `from_json()`, strict about unknown names."""

    def to_json(self) -> dict[str, Any]:
        """The fields as plain JSON values."""
        return dataclasses.asdict(self)  # type: ignore[call-overload]

    @classmethod
    def from_json(cls: type[_Config], values: dict[str, Any] | str) -> _Config:
        """The inverse of `to_json`.

        Raises:
          ConfigError: a name that is no field, or a field with no default that is missing.
        """
        if isinstance(values, str):
            values = json.loads(values)
        fields = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
        unknown = sorted(set(values) - set(fields))
        require(not unknown, f"{cls.__name__} has no field {', '.join(unknown)}; it has {', '.join(fields)}")
        no_default = dataclasses.MISSING
        missing = [n for n, f in fields.items() if n not in values and f.default is no_default is f.default_factory]
        require(not missing, f"{cls.__name__} needs {', '.join(missing)}")
        return cls(**values)


@dataclasses.dataclass(frozen=True)
class SAEConfig(Json):
    """What an SAE is. `d_in` and `d_sae` are widths, `k` the active latents per token (TopK only)."""

    architecture: Architecture
    d_in: int
    d_sae: int
    k: int = 32
    l1_coefficient: float = 5.0
    """Weight of the L1 penalty (ReLU, Gated), on inputs with a mean squared norm of `d_in`."""
    aux_coefficient: float = 1 / 32
    """Weight of AuxK (TopK), Gao et al. 2024 (arXiv 2406.04093), section A.2."""
    aux_k: int | None = None
    """Dead latents that AuxK uses per token; None is `d_in // 2`."""

    def __post_init__(self) -> None:
        require(
            self.architecture in ARCHITECTURES,
            f"unknown activation {self.architecture!r}: choose one of {', '.join(ARCHITECTURES)}",
        )
        require(self.d_in >= 1, f"d_in is {self.d_in}: it must be at least 1")
        require(self.d_sae >= 1, f"d_sae is {self.d_sae}: it must be at least 1")
        if self.architecture == "topk":
            require(
                1 <= self.k <= self.d_sae,
                f"k={self.k} active latents out of d_sae={self.d_sae}: k must be between 1 and d_sae; "
                "lower k or raise the expansion factor",
            )
        require(
            math.isfinite(self.l1_coefficient) and self.l1_coefficient >= 0,
            f"l1_coefficient is {self.l1_coefficient}: it must be finite and not negative",
        )
        require(
            math.isfinite(self.aux_coefficient) and self.aux_coefficient >= 0,
            f"aux_coefficient is {self.aux_coefficient}: it must be finite and not negative",
        )
        require(self.aux_k is None or self.aux_k >= 1, f"aux_k is {self.aux_k}: it must be at least 1, or none")

    @property
    def dead_k(self) -> int:
        """How many dead latents AuxK gives a token: `aux_k`, else half of `d_in`; never more than there are."""
        return min(self.aux_k or max(self.d_in // 2, 1), self.d_sae)


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
    beta1: float = 0.9
    beta2: float = 0.999
    dead_after: int = 10_000_000
    """A latent is dead after this many activations without a value above zero."""
    resample_every: int | None = None
    """Give dead latents new weights and fresh Adam moments every so many activations; None is never."""
    seed: int = 0

    def __post_init__(self) -> None:
        require(self.batch_size >= 1, f"batch_size is {self.batch_size}: it must be at least 1")
        require(
            self.num_activations >= self.batch_size,
            f"num_activations={self.num_activations} is less than one batch of {self.batch_size}",
        )
        rate = self.learning_rate
        require(rate is None or (math.isfinite(rate) and rate > 0), f"learning_rate is {rate}: it must be positive")
        for name in ("warmup_fraction", "decay_fraction"):
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
    def resample_steps(self) -> int | None:
        """`resample_every` in steps, rounded down."""
        return None if self.resample_every is None else max(self.resample_every // self.batch_size, 1)

    def peak_rate(self, d_sae: int) -> float:
        """The learning rate after warm-up for an SAE of `d_sae` latents."""
        return self.learning_rate if self.learning_rate is not None else 2e-4 / math.sqrt(d_sae / 2**14)
