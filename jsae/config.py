"""What a run is told: frozen dataclasses, checked when made, JSON both ways. Imports nothing heavy."""

import dataclasses
import itertools
import json
import math
from typing import Any, Literal, TypeVar, get_args

Architecture = Literal["topk", "batchtopk", "matryoshka", "abstopk", "relu", "gated", "jumprelu"]
SPARSE: frozenset[str] = frozenset({"topk", "batchtopk", "matryoshka", "abstopk"})
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
    """What an SAE is. `d_in` and `d_sae` are widths; coefficients are for inputs with a mean squared norm of `d_in`."""

    architecture: Architecture
    d_in: int
    d_sae: int
    k: int = 32
    """Active latents per token (TopK, AbsTopK), or on average per token of a batch (BatchTopK, Matryoshka)."""
    nested_widths: tuple[int, ...] = ()
    """Matryoshka: how many of the first latents must reconstruct by themselves; d_sae is added."""
    l1_coefficient: float = 5.0
    """ReLU, Gated: weight of the L1 penalty."""
    l0_coefficient: float = 5.0
    """JumpReLU: weight of the sparsity penalty."""
    jump_recipe: Literal["tanh", "l0"] = "tanh"
    bandwidth: float = 2.0
    """JumpReLU: width of the window around a threshold through which gradients reach it."""
    initial_threshold: float = 0.1
    pre_act_coefficient: float = 3e-6
    """JumpReLU, tanh recipe: weight of the pre-activation loss."""
    aux_coefficient: float = 1 / 32
    """TopK family: weight of AuxK, Gao et al. 2024 (arXiv 2406.04093), section A.2."""
    aux_k: int | None = None
    """Dead latents that AuxK uses per token; None is `d_in // 2`."""
    target_l0: float | None = None
    """ReLU, Gated, JumpReLU: a controller moves the sparsity penalty until this many latents are active per token."""
    d_out: int | None = None
    """Width of what a transcoder predicts; None is an autoencoder."""
    skip: bool = False
    """Whether a transcoder has a linear path beside its latents."""
    layers: int = 1
    """A crosscoder reads this many layers side by side: d_in is their widths together."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "nested_widths", tuple(self.nested_widths))
        require(
            self.architecture in ARCHITECTURES,
            f"unknown activation {self.architecture!r}: choose one of {', '.join(ARCHITECTURES)}",
        )
        for name in ("d_in", "d_sae"):
            require(getattr(self, name) >= 1, f"{name} is {getattr(self, name)}: it must be at least 1")
        if self.architecture in SPARSE:
            require(
                1 <= self.k <= self.d_sae,
                f"k={self.k} active latents out of d_sae={self.d_sae}: k must be between 1 and d_sae; "
                "lower k or raise the expansion factor",
            )
        for name in ("l1_coefficient", "l0_coefficient", "aux_coefficient", "pre_act_coefficient"):
            value = getattr(self, name)
            require(math.isfinite(value) and value >= 0, f"{name} is {value}: it must be finite and not negative")
        for name in ("bandwidth", "initial_threshold"):
            value = getattr(self, name)
            require(math.isfinite(value) and value > 0, f"{name} is {value}: it must be finite and positive")
        require(self.aux_k is None or self.aux_k >= 1, f"aux_k is {self.aux_k}: it must be at least 1, or none")
        self._check_widths()
        self._check_target()
        require(self.d_out is None or self.d_out >= 1, f"d_out is {self.d_out}: it must be at least 1")
        require(
            self.layers >= 1 and self.d_in % self.layers == 0,
            f"d_in={self.d_in} cannot be {self.layers} layers of one width",
        )
        require(not self.skip or self.is_transcoder, "only a transcoder has a skip path: give a target hook")

    def _check_widths(self) -> None:
        widths = self.all_widths
        if self.architecture != "matryoshka":
            require(not self.nested_widths, f"nested widths {self.nested_widths} are matryoshka's alone")
            return
        require(len(widths) > 1, "a matryoshka SAE needs nested widths, such as d_sae/16, d_sae/4")
        require(
            widths[0] >= 1 and all(a < b for a, b in itertools.pairwise(widths)),
            f"nested widths must increase strictly from at least 1 up to d_sae: {widths} do not",
        )

    def _check_target(self) -> None:
        if self.target_l0 is None:
            return
        require(
            0 < self.target_l0 <= self.d_sae,
            f"target_l0 is {self.target_l0}: it must lie between 0 and d_sae={self.d_sae}",
        )
        require(
            self.architecture not in SPARSE,
            f"{self.architecture} has k for its L0: target_l0 is for {', '.join(sorted(set(ARCHITECTURES) - SPARSE))}",
        )

    @property
    def is_transcoder(self) -> bool:
        """Whether it predicts another activation than the one it reads."""
        return self.d_out is not None

    @property
    def width_out(self) -> int:
        """Width of what it makes."""
        return self.d_in if self.d_out is None else self.d_out

    @property
    def all_widths(self) -> tuple[int, ...]:
        """The nested widths, d_sae the last of them."""
        inner = self.nested_widths
        return inner if inner and inner[-1] == self.d_sae else (*inner, self.d_sae)

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

    def anneals(self, sae: SAEConfig) -> bool:
        """Whether k starts above that of the SAE.

        Raises:
          ConfigError: it would, but the architecture has no k.
        """
        if self.k_start is None:
            return False
        require(sae.architecture in SPARSE, f"{sae.architecture} has no k to lower: leave out k_start")
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
