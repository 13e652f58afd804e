"""What a run is told: frozen dataclasses, checked when made, JSON both ways. Imports nothing heavy."""

import dataclasses
import functools
import itertools
import math
import numbers
import types
from typing import Any, Literal, NamedTuple, TypeVar, Union, get_args, get_origin, get_type_hints

from jsae import jsons

Architecture = Literal["topk", "batchtopk", "matryoshka", "abstopk", "relu", "gated", "jumprelu"]
SPARSE: frozenset[str] = frozenset({"topk", "batchtopk", "matryoshka", "abstopk"})
ARCHITECTURES: tuple[str, ...] = get_args(Architecture)


class ConfigError(ValueError):
    """A setting that cannot work: says what came, what was expected and what to do."""


def require(condition: bool, message: str) -> None:
    """Raises `ConfigError(message)` unless `condition` holds."""
    if not condition:
        raise ConfigError(message)


class Range(NamedTuple):
    """The numbers that a field may hold: from `low` to `high`, both included, and `also` these."""

    low: float | int
    high: float | int
    words: str
    """Completes "it must …"."""
    also: tuple[float | int, ...] = ()

    def holds(self, value: float | int) -> bool:
        """Return whether a number lies in the range; NaN never does."""
        return self.low <= value <= self.high or value in self.also


def at_least(low: int, high: int = 2**31 - 1) -> Range:
    """Return the range of whole numbers from `low` to `high`."""
    return Range(low, high, f"be at least {low}, and at most {high}")


COUNT = at_least(1)
TOKENS = at_least(1, 2**50)
SEED = Range(0, 2**31 - 1, "lie in [0, 2**31)")
FRACTION = Range(0, 1, "lie between 0 and 1")
RATE = Range(1e-12, 1e6, "be positive, from 1e-12 to 1e6")
WEIGHT = Range(1e-30, 1e30, "be finite and not negative: 0, or from 1e-30 to 1e30", also=(0,))
BANDWIDTH = Range(1e-6, 1e6, "be finite and positive, from 1e-6 to 1e6")
TARGET = Range(1e-6, 2**28, "lie between 0 and d_sae, and be at least 1e-6")
AVERAGED = Range(1e-9, 1, "lie above 0 and at most at 1; leave it out to export the last weights")
BETA = Range(0, 0.999999, "lie in [0, 0.999999]")
DEAD_AFTER = Range(1, 2**30, "lie between 1 and 2**30 activations")
MOST_WEIGHTS = 2**41
"""Of encoder and decoder together: 8 TiB."""
_ANY = {
    int: Range(-(2**63), 2**63 - 1, "be a whole number of at most 63 bits"),
    float: Range(-3.4e38, 3.4e38, "be finite and within float32"),
}


def number(default: Any, range: Range) -> Any:
    """Return a dataclass field with a default and the range that `check_fields` holds it to."""
    return dataclasses.field(default=default, metadata={"range": range})


def check_fields(config: Any) -> None:
    """Check the numbers and choices of a dataclass against the types of its fields and their ranges.

    A field's range is `metadata["range"]`; without one, whole numbers fit 64 bits and other numbers are finite. Where a
    field is a tuple, its items are checked.

    Raises:
      ConfigError: a field that holds something else; names it.
    """
    for field in _fields(type(config)):
        name, value = field.name, getattr(config, field.name)
        if value is None and field.optional:
            continue
        require(not field.several or isinstance(value, (tuple, list)), f"{name} is {value!r}: it must be a list")
        for item in value if field.several else (value,):
            if field.choices:
                require(item in field.choices, f"{name} is {item!r}: choose one of {', '.join(field.choices)}")
            else:
                _check_number(field, item)


class _Field(NamedTuple):
    """A field that `check_fields` knows."""

    name: str
    kind: type | None
    """int or float; None for one of `choices`."""
    choices: tuple[str, ...]
    range: Range
    optional: bool
    several: bool


def _check_number(field: _Field, value: Any) -> None:
    wanted, noun = (numbers.Integral, "whole number") if field.kind is int else (numbers.Real, "number")
    require(
        isinstance(value, wanted) and not isinstance(value, bool), f"{field.name} is {value!r}: it must be a {noun}"
    )
    require(field.range.holds(value), f"{field.name} is {_shown(value)}: it must {field.range.words}")


def _shown(value: Any) -> str:
    """A number without thousands of digits."""
    too_long = isinstance(value, int) and abs(value) >= 10**30
    return "a number of more than 30 digits" if too_long else str(value)


@functools.cache
def _fields(config_class: type) -> list[_Field]:
    """Return the fields of a dataclass that hold numbers or one of several words."""
    found = []
    hints = get_type_hints(config_class)
    for field in dataclasses.fields(config_class):
        hint, optional, several = hints[field.name], False, False
        if get_origin(hint) in (Union, types.UnionType):
            optional = type(None) in get_args(hint)
            (hint, *others) = [arg for arg in get_args(hint) if arg is not type(None)]
            if others:
                continue
        if get_origin(hint) is tuple and len(get_args(hint)) == 2 and get_args(hint)[1] is Ellipsis:
            hint, several = get_args(hint)[0], True
        if get_origin(hint) is Literal:
            found.append(_Field(field.name, None, get_args(hint), _ANY[float], optional, several))
        elif hint in _ANY:
            limits = field.metadata.get("range") or _ANY[hint]
            found.append(_Field(field.name, hint, (), limits, optional, several))
    return found


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
          ValueError: a text that is not JSON.
          ConfigError: a name that is no field, or a field with no default that is missing.
        """
        if isinstance(values, str):
            values = jsons.loads(values)
        require(isinstance(values, dict), f"a {cls.__name__} is read from a JSON object, not from {values!r:.80}")
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
    d_in: int = dataclasses.field(metadata={"range": at_least(1, 2**24)})
    d_sae: int = dataclasses.field(metadata={"range": at_least(1, 2**28)})
    k: int = 32
    """Active latents per token (TopK, AbsTopK), or on average per token of a batch (BatchTopK, Matryoshka)."""
    nested_widths: tuple[int, ...] = ()
    """Matryoshka: how many of the first latents must reconstruct by themselves; d_sae is added."""
    l1_coefficient: float = number(5.0, WEIGHT)
    """ReLU, Gated: weight of the L1 penalty."""
    l0_coefficient: float = number(5.0, WEIGHT)
    """JumpReLU: weight of the sparsity penalty."""
    jump_recipe: Literal["tanh", "l0"] = "tanh"
    bandwidth: float = number(2.0, BANDWIDTH)
    """JumpReLU: width of the window around a threshold through which gradients reach it."""
    initial_threshold: float = number(0.1, Range(1e-30, 1e30, "be finite and positive, from 1e-30 to 1e30"))
    pre_act_coefficient: float = number(3e-6, WEIGHT)
    """JumpReLU, tanh recipe: weight of the pre-activation loss."""
    aux_coefficient: float = number(1 / 32, WEIGHT)
    """TopK family: weight of AuxK, Gao et al. 2024 (arXiv 2406.04093), section A.2."""
    aux_k: int | None = number(None, at_least(1, 2**28))
    """Dead latents that AuxK uses per token; None is `d_in // 2`."""
    target_l0: float | None = number(None, TARGET)
    """ReLU, Gated, JumpReLU: a controller moves the sparsity penalty until this many latents are active per token."""
    d_out: int | None = number(None, at_least(1, 2**24))
    """Width of what a transcoder predicts; None is an autoencoder."""
    skip: bool = False
    """Whether a transcoder has a linear path beside its latents."""
    layers: int = number(1, at_least(1, 2**12))
    """A crosscoder reads this many layers side by side: d_in is their widths together."""

    def __post_init__(self) -> None:
        require(
            self.architecture in ARCHITECTURES,
            f"unknown activation {self.architecture!r}: choose one of {', '.join(ARCHITECTURES)}",
        )
        check_fields(self)
        object.__setattr__(self, "nested_widths", tuple(self.nested_widths))
        if self.architecture in SPARSE:
            require(
                1 <= self.k <= self.d_sae,
                f"k={self.k} active latents out of d_sae={self.d_sae}: k must be between 1 and d_sae; "
                "lower k or raise the expansion factor",
            )
        require(
            self.d_sae * (self.d_in + self.width_out) <= MOST_WEIGHTS,
            f"d_sae={self.d_sae} latents of d_in={self.d_in} are more than {MOST_WEIGHTS} weights: lower d_sae",
        )
        self._check_widths()
        self._check_target()
        require(
            self.d_in % self.layers == 0,
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

    num_activations: int = dataclasses.field(metadata={"range": TOKENS})
    batch_size: int = number(2048, at_least(1, 2**24))
    learning_rate: float | None = number(None, RATE)
    """Peak rate; None is 2e-4 / sqrt(d_sae / 2**14), the scaling of Gao et al. 2024, section A.3."""
    warmup_fraction: float = number(0.02, FRACTION)
    decay_fraction: float = number(0.2, FRACTION)
    clip_norm: float = number(1.0, Range(1e-12, 1e30, "be positive, from 1e-12 to 1e30 or inf", also=(math.inf,)))
    sparsity_warmup_fraction: float = number(0.05, FRACTION)
    """The part of the run over which penalties on sparsity rise from zero."""
    k_start: int | None = number(None, at_least(1, 2**28))
    """TopK family: codes per token at the very start, lowered linearly to k over `k_anneal_fraction`; None is k."""
    k_anneal_fraction: float = number(0.1, FRACTION)
    average_fraction: float | None = number(None, AVERAGED)
    """Keeps an exponential mean of the weights over this part of the run and exports it; None exports the weights."""
    beta1: float = number(0.9, BETA)
    beta2: float = number(0.999, BETA)
    dead_after: int = number(10_000_000, DEAD_AFTER)
    """A latent is dead after this many activations without a value above zero."""
    resample_every: int | None = number(None, TOKENS)
    """Give dead latents new weights and fresh Adam moments every so many activations; None is never."""
    seed: int = number(0, SEED)
    matmul_dtype: Literal["float32", "bfloat16"] = "float32"
    """What matrices are rounded to before they are multiplied; sums, weights and moments are float32 in any case."""

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
            f"warmup_fraction={self.warmup_fraction} and decay_fraction={self.decay_fraction} together exceed the run",
        )
        require(
            self.resample_every is None or self.resample_every >= self.batch_size,
            f"resample_every={self.resample_every} is less than one batch of {self.batch_size}",
        )
        require(
            self.resample_every is None or self.resample_every <= self.num_activations,
            f"resample_every={self.resample_every} lies beyond the run of num_activations={self.num_activations}: "
            "nothing would be resampled",
        )

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
