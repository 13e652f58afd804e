"""Trainers, recipes and sizes of the `quality` and `truth` measurements."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields

from bridge.locations import Checkpoint, Data, FilePath
from bridge.settings import flag
from experiments.benches import peers

OURS = "jsae"


@dataclass(frozen=True)
class Recipe:
    """A way in which a trainer trains an architecture."""

    trainer: str
    name: str
    """The architecture, and the variant if the trainer has several."""
    coefficient: float | None = None
    """Start of the search for the strength of a peer's penalty; None where a number sets L0 directly."""
    aims: bool = False
    """True if a peer is given the L0 too, so that the same strength gives another L0 where another one is asked for."""

    @property
    def architecture(self) -> str:
        """The name of the architecture, without the variant."""
        return self.name.split()[0]

    @property
    def is_penalised(self) -> bool:
        """True if a penalty, not k, determines L0."""
        from jsae.architectures import find

        return find(self.architecture).Config.k is None


RECIPES: Mapping[str, tuple[Recipe, ...]] = {
    "topk": (
        Recipe("SAELens", "topk"),
        Recipe("dictionary_learning", "topk"),
        Recipe("sparsify", "topk signum"),
        Recipe("sparsify", "topk adam"),
        Recipe(OURS, "topk"),
    ),
    "batchtopk": (
        Recipe("SAELens", "batchtopk"),
        Recipe("dictionary_learning", "batchtopk"),
        Recipe(OURS, "batchtopk"),
    ),
    "matryoshka": (
        Recipe("SAELens", "matryoshka"),
        Recipe("dictionary_learning", "matryoshka"),
        Recipe(OURS, "matryoshka"),
    ),
    "relu": (
        Recipe("SAELens", "relu", 2.0),
        Recipe("dictionary_learning", "relu", 0.1),
        Recipe("dictionary_learning", "relu april", 0.15),
        Recipe(OURS, "relu"),
    ),
    "gated": (
        Recipe("SAELens", "gated", 2.0),
        Recipe("dictionary_learning", "gated", 0.2),
        Recipe(OURS, "gated"),
    ),
    "jumprelu": (
        Recipe("SAELens", "jumprelu step", 5.0),
        Recipe("SAELens", "jumprelu tanh", 10.0),
        Recipe("dictionary_learning", "jumprelu", 1.0, aims=True),
        Recipe(OURS, "jumprelu tanh"),
        Recipe(OURS, "jumprelu l0"),
    ),
}
"""By architecture: those of `jsae.architectures` that another trainer has too."""
ARCHITECTURES = tuple(RECIPES)
TRAINERS = tuple(dict.fromkeys(recipe.trainer for recipes in RECIPES.values() for recipe in recipes))


def architectures_of(trainer: str) -> tuple[str, ...]:
    """Return the architectures that a trainer has a recipe for."""
    return tuple(name for name, recipes in RECIPES.items() if any(recipe.trainer == trainer for recipe in recipes))


@dataclass(frozen=True)
class Plan:
    """Sizes, and how learning rate and L0 are searched."""

    trainers: tuple[str, ...]
    d_sae: int
    k: int
    """The L0 at which SAEs are compared."""
    nested_widths: tuple[int, ...]
    num_activations: int
    batch_size: int
    rate: float
    """Learning rate at which the search starts; jsae's starts at its default."""
    rate_range: tuple[float, float]
    seeds: int
    tries: int
    tolerance: float
    threads: int | None = None
    steps: tuple[int, ...] = (2, 1)
    """Steps of the search for a rate, in factors of sqrt(2)."""
    next_steps: tuple[int, ...] = (1,)
    """The same at another L0, from the rate that was best before; none keeps that rate."""
    try_own: bool = True
    """True if another trainer's default rate is tried beside those that are searched."""
    search: bool = True
    """True if rates are searched; if not, every trainer has its default, and jsae nothing but sizes and L0."""

    @property
    def places(self) -> tuple[int, int, int]:
        """Start, first and last place of the search for a rate; a place is a factor of sqrt(2) above the one before."""
        low, high = (round(2 * math.log2(bound / self.rate)) for bound in self.rate_range)
        return 0, min(low, 0), max(high, 0)

    def rate_at(self, place: int) -> float:
        """Return the learning rate of a place."""
        return float(f"{self.rate * 2 ** (place / 2):.4g}")

    def place_of(self, rate: float) -> int:
        """Return the place that is nearest to a learning rate."""
        return round(2 * math.log2(rate / self.rate))


def check_trainers(architectures: tuple[str, ...], trainers: tuple[str, ...]) -> None:
    """Check names of architectures and trainers.

    Raises:
      ValueError: none, or one that is not known.
    """
    for name, known, given in (
        ("architectures", ARCHITECTURES, architectures),
        ("trainers", TRAINERS, trainers),
    ):
        if not given or not set(given) <= set(known):
            raise ValueError(f"{name} must be some of {', '.join(known)}, got {', '.join(given) or 'none'}")


def check_sizes(config: object, *names: str) -> None:
    """Check that fields of a measurement's config are at least 1.

    Raises:
      ValueError: one is not; names it.
    """
    for name in names:
        if getattr(config, name) < 1:
            raise ValueError(f"{name} must be at least 1, got {getattr(config, name)}")


def check_run(num_activations: int, batch_size: int, k: int, d_sae: int, rate: float, rates: tuple[float, ...]) -> None:
    """Check the length of a run, its L0 and the range of learning rates.

    Raises:
      ValueError: too few batches, a k that is not from 1 to d_sae, or rates that are no range around the first one.
    """
    if num_activations < 100 * batch_size:
        raise ValueError(
            f"num_activations={num_activations} is less than 100 batches of batch_size={batch_size}: "
            "warm-up and decay are fractions of the run that must be whole steps"
        )
    if not 1 <= k <= d_sae:
        raise ValueError(f"k={k} is larger than d_sae={d_sae}, or below 1: give a k from 1 to d_sae")
    if len(rates) != 2 or not 0 < rates[0] <= rate <= rates[1]:
        raise ValueError(f"rate_range must be the lowest and the highest rate, with rate={rate:g} between, got {rates}")


SUBJECTS: Mapping[str, str] = {
    "nanochat_mid": "residual stream after half of the nanochat's layers",
    "nanochat_late": "residual stream after its last layer",
    "nanochat_mlp": "output of the MLP half way through the nanochat",
    "nanochat_attn": "output of the attention half way through the nanochat",
    "nanochat_first": "residual stream after the first layer",
    "smollm2": "residual stream of SmolLM2-135M-Instruct after half of its layers",
    "synthetic": "synthetic world with known features",
}
"""Data that `bench quality` can train on."""

UNTUNED = ("nanochat_attn", "nanochat_first")
"""Subjects to which few or no learning rates were fitted. They are measured only when they are named."""

TUNED = tuple(name for name in SUBJECTS if name not in UNTUNED)
"""The other subjects, which are measured by default."""


@dataclass(frozen=True)
class Config:
    """Data, SAEs, trainers and search of the measurement."""

    subjects: tuple[str, ...] = flag(
        TUNED, f"Data to train on: {'; '.join(f'{name}, the {text}' for name, text in SUBJECTS.items())}."
    )
    checkpoint: Checkpoint = flag("demo", "nanochat checkpoint whose activations are learned.")
    data: Data = flag("stdlib", "Text for the checkpoint.")
    architectures: tuple[str, ...] = flag(ARCHITECTURES, "Architectures to compare.")
    trainers: tuple[str, ...] = flag(("SAELens", "dictionary_learning", "sparsify", OURS), "Trainers to compare.")
    d_sae: int = flag(1024, "Latents. The synthetic world has SAEs of its own size.")
    k: int = flag(32, "The L0 at which all SAEs are compared; TopK, BatchTopK and Matryoshka have it as their k.")
    nested_widths: tuple[int, ...] = flag((64, 256), "Matryoshka's inner widths.")
    num_activations: int = flag(2**18, "Activations that every SAE is trained on.")
    batch_size: int = flag(512, "Activations per step.")
    rate: float = flag(
        6e-3, "Learning rate at which the search for the others' best one starts; jsae's starts at its default."
    )
    rate_range: tuple[float, ...] = flag((3.75e-4, 4.8e-2), "Lowest and highest learning rate of the search.")
    seeds: int = flag(3, "Number of seeds for the weights.")
    tries: int = flag(4, "Largest number of runs to find the strength of a penalty that gives the target L0.")
    tolerance: float = flag(0.04, "Largest deviation of L0 from the target, as a fraction of the target.")
    heldout_activations: int = flag(65536, "Held-out activations to score on.")
    loss_tokens: int = flag(16384, "Held-out tokens to measure the model's loss on.")
    interpretability: bool = flag(
        False, "Of a nanochat's SAEs that are reported, measure detection by labels, sparse probing and absorption too."
    )
    threads: int | None = flag(None, "Threads of torch on both sides; none shares the cores among the jobs.")
    jobs: int = flag(1, "Architectures that are compared side by side; seconds are then those of a busy machine.")
    quick: bool = flag(False, "Few activations, one rate, one seed: only to check that everything runs.")
    markdown: bool = flag(False, "Print the tables as Markdown.")
    peer_env: FilePath = flag(peers.TRAINERS_HOME, "The virtual environment of the other trainers.")
    out: FilePath = flag("experiments/results/quality_cpu.json", "File for the results.")

    def __post_init__(self) -> None:
        check_trainers(self.architectures, self.trainers)
        if not self.subjects or not set(self.subjects) <= set(SUBJECTS):
            given = ", ".join(self.subjects) or "none"
            raise ValueError(f"subjects must be some of {', '.join(SUBJECTS)}, got {given}")
        check_sizes(self, "seeds", "tries", "batch_size", "heldout_activations", "loss_tokens", "jobs")
        check_run(self.num_activations, self.batch_size, self.k, self.d_sae, self.rate, self.rate_range)

    def plan(self, **changes: object) -> Plan:
        """Return sizes and search of one subject."""
        names = [field.name for field in fields(Plan) if hasattr(self, field.name)]
        return Plan(**{name: getattr(self, name) for name in names} | changes)
