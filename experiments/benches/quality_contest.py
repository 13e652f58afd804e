"""The comparison of the quality measurements: search for each trainer's learning rate and L0, then its figures."""

from __future__ import annotations

import dataclasses
import functools
import math
import statistics
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments.benches import quality_search, quality_sides
from experiments.benches.quality_config import OURS, RECIPES, TRAINERS, Plan, Recipe

if TYPE_CHECKING:
    from experiments.benches.peers import Ask
    from experiments.benches.quality_subjects import Subject

_PARTS = {"warmup": 0.02, "decay": 0.2, "sparsity_warmup": 0.05}
"""Fractions of a run: warm-up and decay of the learning rate, warm-up of penalties."""
_DEAD = (0.1, 0.015)
"""Fractions of a run after which a silent latent is dead for the other trainers: in the search of the rate, and the one
that is tried at the best rate too. The latter is jsae's default. Their own defaults are longer than such a run."""

_NEAR, _FAR = math.log(1.06), math.log(1.7)
"""Distances in log L0 between which a second SAE shows how the scores depend on L0."""
_SAME = 0.005
"""Distance in log L0 from the target up to which scores are as at the target."""
_OFF = 0.02
"""The same where the k of a recipe should give the target: rates are then compared with the scores' slope in L0."""
_MOVABLE = math.log(1.15)
"""Distance in log L0 over which the scores of a penalised SAE are moved along their slopes to choose a rate."""
_APART = 1.25
"""Factor on k, or on the strength, of a second SAE that is trained for that."""
_GRID = 0.03
"""Distance in log L0 of the targets that jsae is asked for where L0 misses the first: rates share compiled programs."""

_MEASURED = ("l0", "dead_fraction", "dead_in_training", "dead_latents", "true_l0", "seconds")
"""Scores that are reported as they were measured; the others are interpolated to the target L0."""

OWN, BEST, NOTHING = "own", "best", "nothing"
"""Ways in which a rate was chosen: the trainer's default, the best of all, or no setting given at all."""


@dataclasses.dataclass(frozen=True)
class Trained:
    """A trained SAE and its scores."""

    recipe: Recipe
    rate: float | None
    """None is the trainer's default."""
    seed: int
    coefficient: float | None
    """Weight of the penalty; for jsae the target L0."""
    folder: Path
    k: int = 0
    nothing_given: bool = False
    seconds: float = math.nan
    scores: dict[str, float] = dataclasses.field(default_factory=dict)
    """Empty if training diverged."""
    dead: float = _DEAD[0]
    """Fraction of the run after which a silent latent is dead; jsae has its own."""
    peak: float | None = None
    """Peak of the learning rate, where the training tells it."""

    @property
    def dead_after(self) -> float | None:
        """`dead`; None of jsae."""
        return None if self.recipe.trainer == OURS else self.dead

    @property
    def l0(self) -> float:
        """L0 on held-out activations; NaN if training diverged."""
        return self.scores.get("l0", math.nan)


class Contest:
    """Trains the recipes of one architecture after another on one subject.

    Args:
      plan: sizes and search.
      subject: activations and scores.
      scratch: folder for the SAEs.
      ask: sends a job to the peers' process.
      report: called with a line for every SAE that is trained.
    """

    def __init__(self, plan: Plan, subject: Subject, scratch: Path, ask: Ask, report: Callable[[str], None]):
        self._plan, self._subject, self._ask, self._report = plan, subject, ask, report
        self._saes, self._count = Path(tempfile.mkdtemp(dir=scratch)), 0
        self._done: dict[tuple[Any, ...], Trained] = {}
        self._places: dict[Recipe, int] = {}
        self._strengths: dict[Recipe, dict[float, float]] = {}
        self._seen: dict[tuple[Recipe, float | None, int | None], list[tuple[float, float]]] = {}
        self._slopes: dict[Recipe, dict[str, float]] = {}

    def at(self, k: int) -> None:
        """Compare at another L0 from now on; searches start from the rates that were best before."""
        self._plan = dataclasses.replace(self._plan, k=k)
        self._slopes.clear()

    def rows(self, architecture: str) -> list[dict[str, Any]]:
        """Return the figures of every trainer that has the architecture; jsae's last, also with nothing given."""
        rows: list[dict[str, Any]] = []
        trainers = [t for t in TRAINERS if t in self._plan.trainers and t != OURS]
        for trainer in (*trainers, *({OURS} & set(self._plan.trainers))):
            recipes = [recipe for recipe in RECIPES[architecture] if recipe.trainer == trainer]
            default = self._with_nothing_given(recipes[0]) if trainer == OURS else None
            if recipes and (self._plan.search or default is None):
                rows.append({"architecture": architecture} | self._best(recipes, default))
            if default is not None:
                rows.append({"architecture": architecture} | self._figures_of_default(default))
        return rows

    # ---- one trainer ----------------------------------------------------------------------------------------------

    def _best(self, recipes: Sequence[Recipe], default: Trained | None = None) -> dict[str, Any]:
        """Choose a trainer's best recipe and rate with seed 0, train it with every seed; return the figures.

        Args:
          recipes: of the trainer, at least one.
          default: jsae's SAE with nothing given: one of those to choose from, and the search begins at its rate.
        """
        tried = [] if default is None else [default]
        for recipe in recipes:
            tried += self._search_rate(recipe, default if recipe == recipes[0] else None)
        finite = [t for t in tried if t.scores]
        if not finite:
            return {"trainer": recipes[0].trainer, "recipe": recipes[0].name, "failed": "every run diverged"}
        close = [t for t in finite if self._is_comparable(t, self._slopes_at(t, finite))] or finite
        best = min(close, key=lambda t: self._cost(t, self._slopes_at(t, finite)))
        if best.recipe.trainer != OURS and self._plan.search:
            other, slopes = self._again(best, 0, dead=_DEAD[1]), self._slopes_at(best, finite)
            tried.append(other)
            best = min(best, other, key=lambda t: self._cost(t, slopes))
        return self._figures(best, tried, OWN if best.rate is None else BEST)

    def _with_nothing_given(self, recipe: Recipe) -> Trained:
        """Return an SAE of jsae with L0 and sizes only: rate, schedules and dead latents at their defaults."""
        return self._train(recipe, None, 0, self._first_coefficient(recipe), nothing_given=True)

    def _figures_of_default(self, default: Trained) -> dict[str, Any]:
        """Return the figures of jsae with nothing given."""
        if not default.scores:
            recipe = default.recipe
            return {"trainer": recipe.trainer, "recipe": recipe.name, "chosen": NOTHING, "failed": "it diverged"}
        return self._figures(default, [default], NOTHING)

    def _figures(self, best: Trained, tried: Sequence[Trained], chosen: str) -> dict[str, Any]:
        """Train the remaining seeds and an SAE of another L0; return the scores of all seeds at the target L0."""
        seeds = [best] + [self._again(best, seed) for seed in range(1, self._plan.seeds)]
        finals = [self._final(t) for t in seeds if t.scores]
        slopes = {}
        if any(quality_search.distance(scores["l0"], self._plan.k) > _SAME for scores in finals):
            same = [t for t in tried if _same_setting(t, best) and t.scores]
            near = (t for t in same if _NEAR <= abs(math.log(t.l0 / best.l0)) <= _FAR)
            second = next(near, None) or self._apart(best)
            slopes = quality_search.slopes(finals[0], self._final(second)) if second.scores else {}
        target = float(self._plan.k)
        names = set(finals[0]) - set(_MEASURED)
        at_target = [quality_search.at_l0(scores, slopes, target, names) for scores in finals]
        return {
            "trainer": best.recipe.trainer,
            "recipe": best.recipe.name,
            "chosen": chosen,
            "chosen_by": None if chosen == NOTHING else f"{self._subject.chosen_by} at L0 {self._plan.k}",
            "target_l0": self._plan.k,
            "missed": any(self._is_far(f["l0"]) for f in finals),
            "rate": best.rate,
            "coefficient": best.coefficient,
            "dead_after": best.dead_after,
            "diverged_seeds": len(seeds) - len(finals),
            "slopes": {name: slope for name, slope in slopes.items() if name in names},
            "scores": {name: _spread([scores[name] for scores in at_target]) for name in finals[0]}
            | recurring([t.folder for t in seeds if t.scores]),
            "as_measured": {name: _spread([scores[name] for scores in finals]) for name in sorted(names)},
            "tried": [
                {
                    "recipe": t.recipe.name,
                    "rate": t.rate,
                    "coefficient": t.coefficient,
                    "dead_after": t.dead_after,
                    **t.scores,
                }
                for t in tried
                if t.scores
            ],
        }

    # ---- searches -------------------------------------------------------------------------------------------------

    def _search_rate(self, recipe: Recipe, default: Trained | None = None) -> list[Trained]:
        """Return the SAEs of a search for the rate with the lowest cost, but `default`.

        It begins with the rate that was best at the L0 before; else with the best rate of another recipe of the trainer
        for the same architecture; else with the trainer's default rate, where it is given; else with the plan's.
        Another trainer's default is tried first, if it is: its number is not known, and it is made for far longer runs.

        Args:
          recipe: the recipe.
          default: jsae's SAE with nothing given, which stands for the place that is nearest to its rate.
        """
        runs: list[Trained] = []

        def cost(rate: float | None, first: Trained | None = None) -> float:
            tries = self._near_target(recipe, rate, first)
            runs.extend(t for t in tries if t is not default)
            closest = min(tries, key=lambda t: quality_search.distance(t.l0, self._plan.k))
            return self._cost(closest, self._slopes_at(closest, tries))

        start, low, high = self._plan.places
        own = None if default is None or default.peak is None else self._plan.place_of(default.peak)
        start = start if own is None else own
        known = recipe in self._places
        if not self._plan.search or (self._plan.try_own and not known and recipe.trainer != OURS):
            cost(None)
        if not self._plan.search:
            return runs

        def at(place: int) -> float:
            return cost(None, default) if place == own else cost(self._plan.rate_at(place))

        climb = functools.partial(quality_search.climb, at, low=low, high=high)
        steps = self._plan.next_steps if known else self._plan.steps
        self._places[recipe] = climb(start=self._places.get(recipe, self._of_sibling(recipe, start)), steps=steps)
        return runs

    def _of_sibling(self, recipe: Recipe, otherwise: int) -> int:
        """Return the best place of the trainer's last recipe for the same architecture."""
        alike = [
            one for one in self._places if (one.trainer, one.architecture) == (recipe.trainer, recipe.architecture)
        ]
        return self._places[alike[-1]] if alike else otherwise

    def _near_target(self, recipe: Recipe, rate: float | None, first: Trained | None = None) -> list[Trained]:
        """Return SAEs of one rate, the last or an earlier one of which is near the target L0 if that was found.

        The search for a peer's strength starts from what the same rate gave when another L0 was the target; else from
        the strengths that were found for other rates. `first` is the first SAE, where it is trained already.
        """
        if recipe.coefficient is None:
            return self._direct(recipe, rate, first)
        seen = self._seen.setdefault((recipe, rate, self._plan.k if recipe.aims else None), [])
        tries: list[Trained] = []
        found = self._strengths.setdefault(recipe, {})
        for _ in range(self._plan.tries):
            if seen:
                strength = quality_search.next_strength(seen, self._plan.k)
            else:
                strength = quality_search.first_strength(found, rate or self._plan.rate, recipe.coefficient)
            tries.append(self._train(recipe, rate, 0, strength))
            seen.append((tries[-1].coefficient, tries[-1].l0))
            if self._is_close(tries[-1].l0):
                if rate is not None:
                    found[rate] = tries[-1].coefficient
                break
            if quality_search.is_hopeless([t.l0 for t in tries], self._plan.k):
                break
        return tries

    def _direct(self, recipe: Recipe, rate: float | None, first: Trained | None = None) -> list[Trained]:
        """Return an SAE trained with k or a target L0, and a second one if L0 on held-out text misses the target."""
        target = self._first_coefficient(recipe)
        runs = [first or self._train(recipe, rate, 0, target)]
        if not runs[0].scores:
            return runs
        if target is not None and not self._is_close(runs[0].l0):
            steps = round(math.log(target / max(runs[0].l0, 0.1)) / _GRID)
            corrected = min(target * math.exp(steps * _GRID), self._plan.d_sae)
            runs.append(self._train(recipe, rate, 0, corrected, nothing_given=runs[0].nothing_given))
        off = quality_search.distance(runs[0].l0, self._plan.k) > _OFF
        if target is None and off and recipe not in self._slopes:  # the same for all rates of a recipe with a k
            second = self._apart(runs[0])
            self._slopes[recipe] = quality_search.slopes(runs[0].scores, second.scores) if second.scores else {}
        return runs

    def _apart(self, trained: Trained) -> Trained:
        """Return an SAE of the same setting and seed with a larger L0."""
        coefficient, k = trained.coefficient, self._plan.k
        if coefficient is None:
            k = min(math.ceil(k * _APART), self._plan.d_sae)
        else:
            coefficient *= _APART if trained.recipe.trainer == OURS else 1 / _APART
        how = {"nothing_given": trained.nothing_given, "dead": trained.dead}
        return self._train(trained.recipe, trained.rate, 0, coefficient, k=k, **how)

    def _again(self, trained: Trained, seed: int, dead: float | None = None) -> Trained:
        how = {"nothing_given": trained.nothing_given, "dead": dead or trained.dead}
        return self._train(trained.recipe, trained.rate, seed, trained.coefficient, **how)

    def _first_coefficient(self, recipe: Recipe) -> float | None:
        """Return jsae's target L0; None for an architecture with a k, and for peers with a k."""
        return float(self._plan.k) if recipe.is_penalised and recipe.trainer == OURS else None

    def _slopes_at(self, trained: Trained, tries: Sequence[Trained]) -> dict[str, float]:
        """Return how scores depend on L0: from the other one of its setting, or as found for its recipe with a k."""
        others = [t for t in tries if t.scores and t is not trained and _same_setting(t, trained)]
        other = min(others, key=lambda t: quality_search.distance(t.l0, self._plan.k), default=None)
        if not trained.scores or other is None:
            return self._slopes.get(trained.recipe, {})
        return quality_search.slopes(trained.scores, other.scores)

    def _cost(self, trained: Trained, slopes: dict[str, float]) -> float:
        """Return the cost of an SAE at the target L0, along the slopes of its scores.

        An SAE whose L0 is not comparable costs its distance from the target more: it shows little of the scores there.
        """
        if not trained.scores:
            return math.inf
        moved = quality_search.at_l0(trained.scores, slopes, float(self._plan.k), {self._subject.chosen_by})
        away = 0.0 if self._is_comparable(trained, slopes) else quality_search.distance(trained.l0, self._plan.k)
        return self._subject.cost(moved) + away

    def _is_comparable(self, trained: Trained, slopes: dict[str, float]) -> bool:
        """Return whether L0 is close to the target, near enough to move scores along slopes, or where k leaves it.

        Every rate of a recipe with a k misses the target alike on some text.
        """
        if self._is_close(trained.l0):
            return True
        if not trained.recipe.is_penalised:
            return not self._is_far(trained.l0)
        return bool(slopes) and quality_search.distance(trained.l0, self._plan.k) <= _MOVABLE

    def _is_close(self, l0: float) -> bool:
        return abs(l0 / self._plan.k - 1) <= self._plan.tolerance

    def _is_far(self, l0: float) -> bool:
        return quality_search.distance(l0, float(self._plan.k)) > quality_search.FARTHEST

    # ---- one SAE --------------------------------------------------------------------------------------------------

    def _train(
        self,
        recipe: Recipe,
        rate: float | None,
        seed: int,
        coefficient: float | None,
        *,
        k: int | None = None,
        nothing_given: bool = False,
        dead: float = _DEAD[0],
    ) -> Trained:
        """Return one SAE, trained and scored; the same one for the same arguments."""
        plan = self._plan
        k = plan.k if k is None else k
        key = (recipe, rate, seed, coefficient, k, nothing_given, dead)
        if key in self._done:
            return self._done[key]
        self._count += 1
        folder = self._saes / str(self._count)
        job = {
            "library": recipe.trainer,
            "recipe": recipe.name,
            "rate": rate,
            "seed": seed,
            "coefficient": coefficient,
            "nothing_given": nothing_given,
            "folder": str(folder),
            "steps": plan.num_activations // plan.batch_size,
            "batch_size": plan.batch_size,
            "k": k,
            "d_in": self._subject.d_in,
            "d_sae": plan.d_sae,
            "widths": [*plan.nested_widths, plan.d_sae],
            "threads": plan.threads,
            "dead": dead,
            **_PARTS,
        }
        answer = self._train_here(job) if recipe.trainer == OURS else self._ask(job)
        trained = Trained(
            *(recipe, rate, seed, coefficient, folder, k, nothing_given, answer["seconds"]),
            dead=dead,
            peak=answer.get("rate"),
        )
        if answer["finite"]:
            trained = dataclasses.replace(trained, scores=self._scores(trained))
        self._report(_line(trained, self._subject.chosen_by))
        self._done[key] = trained
        return trained

    def _train_here(self, job: dict[str, Any]) -> dict[str, Any]:
        if self._subject.train is not None:
            return self._subject.train(job)
        return quality_sides.train_here(job, self._subject.folder)

    def _scores(self, trained: Trained) -> dict[str, float]:
        try:
            return self._subject.scores(trained.folder) | {"seconds": trained.seconds}
        except ValueError as error:
            what = f"{trained.recipe.trainer} {trained.recipe.name} at rate {trained.rate}, seed {trained.seed}"
            raise ValueError(f"{what}: {error}") from error

    def _final(self, trained: Trained) -> dict[str, float]:
        return trained.scores | self._subject.final_scores(trained.folder)


def _line(trained: Trained, chosen_by: str) -> str:
    """Return one line about an SAE."""
    strength = "" if trained.coefficient is None else f"strength {trained.coefficient:.3g}"
    rate = "none" if trained.nothing_given else trained.rate or "own"
    line = f"{trained.recipe.trainer:20}{trained.recipe.name:14} rate {rate:<9} seed {trained.seed} {strength:14}"
    if not trained.scores:
        return f"{line} diverged after {trained.seconds:.1f} s"
    names = dict.fromkeys(["fvu", chosen_by])
    shown = " ".join(f"{'FVU' if name == 'fvu' else name} {trained.scores[name]:.4f}" for name in names)
    dead = trained.scores["dead_fraction"]
    return f"{line} {shown} L0 {trained.l0:.1f} dead {dead:.1%} {trained.seconds:.1f} s"


def _same_setting(a: Trained, b: Trained) -> bool:
    return all(getattr(a, n) == getattr(b, n) for n in ("recipe", "rate", "seed", "nothing_given", "dead"))


def recurring(folders: Sequence[Path]) -> dict[str, dict[str, float]]:
    """Return the share of latents that recur in another seed, over pairs of SAEs; {} of a single one."""
    from bridge import torch_sae
    from jsae import stability

    if len(folders) < 2:
        return {}
    pairs = stability.stability([torch_sae.load(folder).W_dec.numpy() for folder in folders])["pairs"]
    return {"recurring": _spread([pair[f"share_over_{stability.SAME}"] for pair in pairs])}


def _spread(values: Sequence[float]) -> dict[str, float]:
    return {"mean": statistics.fmean(values), "min": min(values), "max": max(values)}
