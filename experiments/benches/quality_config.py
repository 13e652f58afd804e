"""Trainers, recipes and sizes of the `quality` measurement."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

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

    @property
    def is_penalised(self) -> bool:
        """True if a penalty, not k, determines L0."""
        from jsae.architectures import find

        return find(self.name.split()[0]).Config.k is None


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
        Recipe("dictionary_learning", "jumprelu", 1.0),
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
class Config:
    """Model, SAEs, trainers and search of the measurement."""

    checkpoint: Checkpoint = flag("demo", "nanochat checkpoint whose activations are learned.")
    data: Data = flag("stdlib", "Text for the checkpoint.")
    layer: int = flag(2, "Layer whose residual stream is read.")
    architectures: tuple[str, ...] = flag(ARCHITECTURES, "Architectures to compare.")
    trainers: tuple[str, ...] = flag(("SAELens", "dictionary_learning", "sparsify", OURS), "Trainers to compare.")
    d_sae: int = flag(1024, "Latents.")
    k: int = flag(32, "Active latents per token; the target L0 of all architectures.")
    nested_widths: tuple[int, ...] = flag((64, 256), "Matryoshka's inner widths.")
    num_activations: int = flag(2**18, "Activations that every SAE is trained on.")
    batch_size: int = flag(512, "Activations per step.")
    rates: tuple[float, ...] = flag((3e-3, 6e-3, 1.2e-2, 2.4e-2), "Learning rates to try beside a trainer's own.")
    seeds: int = flag(3, "Number of seeds for the weights.")
    tries: int = flag(4, "Largest number of runs to find the strength of a penalty that gives the target L0.")
    tolerance: float = flag(0.04, "Largest deviation of L0 from the target, as a fraction of the target.")
    heldout_activations: int = flag(65536, "Held-out activations to score on.")
    loss_tokens: int = flag(16384, "Held-out tokens to measure the model's loss on.")
    threads: int | None = flag(None, "Threads of torch on both sides; none is torch's default.")
    quick: bool = flag(False, "Few activations, one rate, one seed: only to check that everything runs.")
    markdown: bool = flag(False, "Print the table as Markdown.")
    peer_env: FilePath = flag(peers.TRAINERS_HOME, "The virtual environment of the other trainers.")
    out: FilePath = flag("experiments/results/quality_cpu.json", "File for the results.")

    def __post_init__(self) -> None:
        for name, known in (("architectures", ARCHITECTURES), ("trainers", TRAINERS)):
            given = getattr(self, name)
            if not given or not set(given) <= set(known):
                raise ValueError(f"{name} must be some of {', '.join(known)}, got {', '.join(given) or 'none'}")
        for name in ("seeds", "tries", "batch_size", "heldout_activations", "loss_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.num_activations < 100 * self.batch_size:
            raise ValueError(
                f"num_activations={self.num_activations} is less than 100 batches of batch_size={self.batch_size}: "
                "warm-up and decay are fractions of the run that must be whole steps"
            )
        if not 1 <= self.k <= self.d_sae:
            raise ValueError(f"k={self.k} is larger than d_sae={self.d_sae}, or below 1: give a k from 1 to d_sae")
