"""The comparison of the `quality` measurement: search for each trainer's learning rate and L0, then its figures."""

from __future__ import annotations

import dataclasses
import math
import statistics
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments.benches import quality_sides
from experiments.benches.quality_config import OURS, RECIPES, TRAINERS, Config, Recipe

if TYPE_CHECKING:
    from experiments.benches.peers import Ask
    from experiments.benches.quality_sides import Subject

_LONGEST_STEP = math.log(8)  # of the search for a strength: L0 hardly depends on it where the rate is far too low
_PARTS = {"warmup": 0.02, "decay": 0.2, "sparsity_warmup": 0.05, "dead": 0.1}
"""Fractions of a run: warm-up and decay of the learning rate, warm-up of penalties, silence of a dead latent."""


@dataclass(frozen=True)
class Trained:
    """A trained SAE and its scores."""

    recipe: Recipe
    rate: float | None
    """None is the trainer's default."""
    seed: int
    coefficient: float | None
    """Weight of the penalty; for jsae the target L0."""
    folder: Path
    seconds: float = math.nan
    fvu: float = math.inf
    """Infinite if training diverged."""
    l0: float = math.nan
    dead_fraction: float = math.nan


class Contest:
    """Trains the recipes of one architecture after another.

    Args:
      config: sizes and search.
      subject: model and held-out text for the scores.
      folder: of the activations; SAEs are written to a new folder in it.
      ask: sends a job to the peers' process.
      report: called with a line for every SAE that is trained.
    """

    def __init__(self, config: Config, subject: Subject, folder: Path, ask: Ask, report: Callable[[str], None]):
        self._config, self._subject, self._folder, self._ask, self._report = config, subject, folder, ask, report
        self._saes, self._count = Path(tempfile.mkdtemp(dir=folder)), 0

    def rows(self, architecture: str) -> list[dict[str, Any]]:
        """Return the figures of every trainer that has the architecture, the peers' first."""
        rows: list[dict[str, Any]] = []
        trainers = [t for t in TRAINERS if t in self._config.trainers and t != OURS]
        for trainer in (*trainers, *({OURS} & set(self._config.trainers))):
            recipes = [recipe for recipe in RECIPES[architecture] if recipe.trainer == trainer]
            if recipes:
                rows.append({"architecture": architecture} | self._figures(recipes, self._target(recipes, rows)))
        return rows

    def _target(self, recipes: Sequence[Recipe], peers: Sequence[dict[str, Any]]) -> float | None:
        """Return the target L0: k, or for jsae that of the best peer; None for architectures that have a k."""
        if not recipes[0].is_penalised:
            return None
        if recipes[0].trainer != OURS or not peers:
            return float(self._config.k)
        return min(peers, key=lambda row: row["fvu"]["mean"])["l0"]["mean"]

    def _figures(self, recipes: Sequence[Recipe], target: float | None) -> dict[str, Any]:
        """Choose a trainer's best recipe and rate with seed 0, train it with every seed; return the figures."""
        tried = [trained for recipe in recipes for trained in self._rates(recipe, target)]
        close = [t for t in tried if target is None or self._is_close(t.l0, target)] or tried
        best = min(close, key=lambda t: t.fvu)
        again = [self._train(best.recipe, best.rate, s, best.coefficient) for s in range(1, self._config.seeds)]
        return _summary(best, [best, *again], tried, [self._loss(t) for t in (best, *again)])

    def _rates(self, recipe: Recipe, target: float | None) -> Iterable[Trained]:
        """Yield one SAE per rate, with L0 close to the target; a search starts from the last successful strength."""
        coefficient = recipe.coefficient
        for rate in (None, *self._config.rates):
            if coefficient is None:
                yield self._direct(recipe, rate, target)
            else:
                trained = self._search(recipe, rate, coefficient, target)
                coefficient = trained.coefficient if self._is_close(trained.l0, target) else recipe.coefficient
                yield trained

    def _direct(self, recipe: Recipe, rate: float | None, target: float | None) -> Trained:
        """Return an SAE trained with k or a target L0; train again if L0 on held-out text misses the target."""
        trained = self._train(recipe, rate, 0, target)
        if target is None or self._is_close(trained.l0, target) or not math.isfinite(trained.l0):
            return trained
        again = self._train(recipe, rate, 0, target * target / trained.l0)
        return min(trained, again, key=lambda t: _distance(t, target))

    def _search(self, recipe: Recipe, rate: float | None, coefficient: float, target: float) -> Trained:
        """Return the SAE whose L0 is closest, by the secant method on the logarithms of strength and L0."""
        seen: list[Trained] = []
        for _ in range(self._config.tries):
            seen.append(self._train(recipe, rate, 0, coefficient))
            if self._is_close(seen[-1].l0, target):
                break
            coefficient = _next(seen, target)
        return min(seen, key=lambda t: _distance(t, target))

    def _is_close(self, l0: float, target: float) -> bool:
        return abs(l0 / target - 1) <= self._config.tolerance

    def _train(self, recipe: Recipe, rate: float | None, seed: int, coefficient: float | None) -> Trained:
        """Return one SAE, trained and scored."""
        self._count += 1
        config, folder = self._config, self._saes / str(self._count)
        job = {
            "library": recipe.trainer,
            "recipe": recipe.name,
            "rate": rate,
            "seed": seed,
            "coefficient": coefficient,
            "folder": str(folder),
            "steps": config.num_activations // config.batch_size,
            "batch_size": config.batch_size,
            "k": config.k,
            "d_in": self._subject.d_in,
            "d_sae": config.d_sae,
            "widths": [*config.nested_widths, config.d_sae],
            "threads": config.threads,
            **_PARTS,
        }
        answer = quality_sides.train_here(job, self._folder) if recipe.trainer == OURS else self._ask(job)
        trained = Trained(recipe, rate, seed, coefficient, folder, answer["seconds"])
        if answer["finite"]:
            trained = dataclasses.replace(trained, **quality_sides.score(folder, self._folder, self._subject))
        strength = "" if coefficient is None else f"strength {coefficient:.3g}"
        self._report(
            f"{recipe.trainer:20}{recipe.name:14} rate {rate or 'own':<6} seed {seed} {strength:14}"
            f"FVU {trained.fvu:.4f} L0 {trained.l0:.1f} dead {trained.dead_fraction:.1%} {trained.seconds:.1f} s"
        )
        return trained

    def _loss(self, trained: Trained) -> float:
        return quality_sides.loss_recovered(trained.folder, self._subject)


def _distance(trained: Trained, target: float) -> float:
    """Return |log(L0 / target)|; infinite if training diverged."""
    return abs(math.log(max(trained.l0, 0.1) / target)) if math.isfinite(trained.l0) else math.inf


def _next(seen: Sequence[Trained], target: float) -> float:
    """Return the strength to try next: on the line through the two closest points, or of slope -1 through one."""
    points = sorted((t for t in seen if math.isfinite(t.l0)), key=lambda t: _distance(t, target))
    if not points:
        return seen[-1].coefficient / 2
    x, y = zip(*((math.log(t.coefficient), math.log(max(t.l0, 0.1) / target)) for t in points), strict=True)
    slope = (y[1] - y[0]) / (x[1] - x[0]) if len(points) > 1 and x[0] != x[1] else -1.0
    step = -y[0] / min(max(slope, -3.0), -0.3)
    return math.exp(x[0] + min(max(step, -_LONGEST_STEP), _LONGEST_STEP))


def _summary(
    best: Trained, seeds: Sequence[Trained], tried: Sequence[Trained], loss: Sequence[float]
) -> dict[str, Any]:
    """Return the figures of one trainer."""
    values = {name: [getattr(t, name) for t in seeds] for name in ("fvu", "l0", "dead_fraction", "seconds")}
    values["loss_recovered"] = list(loss)
    return {
        "trainer": best.recipe.trainer,
        "recipe": best.recipe.name,
        "rate": best.rate,
        "coefficient": best.coefficient,
        **{name: {"mean": statistics.fmean(v), "min": min(v), "max": max(v)} for name, v in values.items()},
        "tried": [
            {"recipe": t.recipe.name, "rate": t.rate, "coefficient": t.coefficient, "l0": t.l0, "fvu": t.fvu}
            for t in tried
            if math.isfinite(t.fvu)
        ],
    }
