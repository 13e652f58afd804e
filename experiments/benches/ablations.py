"""Ablations of the training recipes: each part is undone alone, and each option added, on several kinds of data.

Every architecture is trained with nothing given but sizes and L0, then with one default after the other set to what it
was before: Adam's memory, the learning rate, that of the decoder, the scale of the encoder at the start, the weight of
AuxK, the time until a latent counts as dead, the penalty of ReLU, the pull on Gated's few dead, the window of
JumpReLU's thresholds, the controller of L0. The options are aligned training (arXiv 2605.18629), HierarchicalTopK
(arXiv 2505.24473), and activations whitened by their covariance (arXiv 2511.13981). Scores are those of the exported
SAE on held-out activations. Penalised architectures aim at an L0 of k; where one misses it, FVU is moved to that L0 by
the slope of -0.5 of log FVU in log L0.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bridge.locations import FilePath
from bridge.settings import flag
from experiments.benches import quality_runs, whitening

if TYPE_CHECKING:
    from experiments.benches.quality_config import Plan
    from experiments.benches.quality_subjects import Subject
    from jsae.architectures import SAEConfig

RECIPES = ("topk", "batchtopk", "matryoshka", "relu", "gated", "jumprelu tanh", "jumprelu l0")
AS_IT_IS = "nothing"
FIXED = "a fixed penalty, of the last strength of the controller's"
WHITENED = "with whitened activations"
_COLUMNS = ("recipe", "changed", "FVU", "F1", "dead", "FVU over the default's")
_PATIENCE = 10_000_000  # activations until a latent was dead


@dataclass(frozen=True)
class Config(quality_runs.Sizes):
    """Data, SAEs, recipes and changes of the measurement."""

    subjects: tuple[str, ...] = flag(("nanochat_mid", "synthetic"), "Data to train on, as for `bench quality`.")
    recipes: tuple[str, ...] = flag(RECIPES, "Recipes to train.")
    changes: tuple[str, ...] = flag((), "Beginnings of the names of the changes to make; none makes all.")
    out: FilePath = flag("experiments/results/ablations_cpu.json", "File for the results.")

    def __post_init__(self) -> None:
        if not self.recipes or not set(self.recipes) <= set(RECIPES):
            given = ", ".join(self.recipes) or "none"
            raise ValueError(f"recipes must be some of {', '.join(RECIPES)}, got {given}")
        if self.changes:
            names = tuple(dict.fromkeys(name for recipe in self.recipes for name, _, _ in changes(recipe, 64, 256, 4)))
            unknown = [start for start in self.changes if not any(name.startswith(start) for name in names)]
            if unknown:
                given = f"{', '.join(self.recipes)} begins with {', '.join(map(repr, unknown))}"
                raise ValueError(f"no change of {given}: choose of {', '.join(names)}")
        super().__post_init__()


def main(config: Config) -> int:
    """Train with and without every part and option, print a table per kind of data, write the results."""
    rows = functools.partial(_rows, config)
    return quality_runs.on_every_subject(config, config.recipes, "recipes", rows, _COLUMNS, _cells)


def changes(recipe: str, d_in: int, d_sae: int, k: int) -> Iterator[tuple[str, dict[str, Any], dict[str, Any]]]:
    """Yield names of changes to a recipe, and their settings of the SAE and of its training.

    `WHITENED` has no settings: it changes the activations. `FIXED` has none: they follow from the default's run.

    Args:
      recipe: one of `RECIPES`.
      d_in: width of the activations.
      d_sae: latents.
      k: active latents per token, or the target L0.
    """
    kind, defaults = _defaults(recipe)
    yield AS_IT_IS, {}, {}
    yield "memory of second moments: 0.999", {}, {"beta2": 0.999}
    yield "learning rate: 2e-4 / sqrt(d_sae / 16384)", {}, {"learning_rate": 2e-4 / math.sqrt(d_sae / 16384)}
    if defaults["decoder_rate"] != 1:
        yield "decoder_rate: 1", {"decoder_rate": 1.0}, {}
    if defaults["encoder_start"] != 1:
        yield "encoder_start: 1", {"encoder_start": 1.0}, {}
    yield "AuxK: 8 times its weight", {"aux_coefficient": 8 * defaults["aux_coefficient"]}, {}
    if not kind.sae.sparse:
        yield "L0 at its target after 30 % of the run", {"target_l0_fraction": 0.3}, {}
        yield FIXED, {}, {}
        yield "AuxK and revival: none", {"aux_coefficient": 0.0, "revival_coefficient": 0.0}, {}
        yield "AuxK: none", {"aux_coefficient": 0.0}, {}
        if "sparsity_penalty" in defaults:
            yield "sparsity_penalty: l1", {"sparsity_penalty": "l1"}, {}
        if "revival_floor" in defaults:
            yield "revival_floor: 1", {"revival_floor": 1.0}, {}
    else:
        yield "AuxK: 1 / d_in of its weight", {"aux_coefficient": defaults["aux_coefficient"] / d_in}, {}
        yield "dead after 10 million activations", {}, {"dead_after": _PATIENCE}
        yield "k_start: 2 k, lowered over half of the run", {}, {"k_start": 2 * k, "k_anneal_fraction": 0.5}
    if kind.sae.name == "jumprelu":
        yield "bandwidth: 2", {"bandwidth": 2.0}, {}
    yield "with aligned training", {"aligned": True}, {}
    if kind.sae.name == "topk":
        yield "with hierarchical_k of a quarter and a half", {"hierarchical_k": (max(k // 4, 1), k // 2)}, {}
    yield WHITENED, {}, {}


def _rows(config: Config, recipe: str, subject: Subject, plan: Plan, scratch: Path) -> list[dict[str, Any]]:
    """Return the scores of a recipe as it is, and with each of the changes."""
    rows: list[dict[str, Any]] = []
    for name, sae, train in changes(recipe, subject.d_in, plan.d_sae, plan.k):
        if rows and config.changes and not name.startswith(config.changes):
            continue
        if name == FIXED:
            sae, train = _fixed(recipe, rows[0]["scores"])
        job = quality_runs.job_of(recipe, plan, subject.d_in) | {"sae": sae, "train": train}
        data = whitening.whitened(subject, scratch / "whitened") if name == WHITENED else subject
        trial = quality_runs.trained(job, config.seeds, data, scratch)
        first = rows[0]["scores"]["fvu"] if rows else trial["fvu"]
        rows.append({"recipe": recipe, "changed": name, "scores": trial, "fvu_over_default": trial["fvu"] / first})
    return rows


def _fixed(recipe: str, scores: dict[str, float]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the settings of a penalty that keeps the last strength and the rate of a controlled run."""
    _, defaults = _defaults(recipe)
    name = next(name for name in ("l1_coefficient", "l0_coefficient") if name in defaults)
    penalty = {"target_l0": None, name: scores["strength"] * defaults[name]}
    return penalty, {"learning_rate": scores["rate"]}


def _defaults(recipe: str) -> tuple[type[SAEConfig], dict[str, Any]]:
    """Return the class of a recipe's settings, and their defaults by name."""
    from jsae.architectures import find

    kind = find(recipe.split()[0]).Config
    return kind, {field.name: field.default for field in dataclasses.fields(kind)}


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    scores = row["scores"]
    return (
        row["recipe"] if row["changed"] == AS_IT_IS else "",
        row["changed"],
        f"{scores['fvu']:.4f}",
        f"{scores['f1']:.3f}" if "f1" in scores else "",
        f"{scores['dead_in_training']:.1%}" if "dead_in_training" in scores else f"{scores['dead_fraction']:.1%}",
        f"{row['fvu_over_default']:.3f}",
    )
