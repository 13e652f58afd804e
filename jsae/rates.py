"""Find the learning rate of SAEs: short runs of copies at several rates on one stream, and what follows for a long run.

The best rate falls with the length of a run. It is found for runs of some hundred steps, with warm-up and decay over
the same fractions, and lowered as the default rate is (`TrainConfig`): with the root of the number of steps, for heavy
tails less.
"""

import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jsae import loop, metrics, processes, state
from jsae.config import TrainConfig
from jsae.health import NotFiniteError
from jsae.loop import Batch, Member
from jsae.ops import Ops
from jsae.pretrained import Pretrained
from jsae.settings import require

SHARE, FEWEST, MOST = 0.05, 150, 1000
"""Steps of the short runs: this share of the run, but at least and at most so many, and never more than the run."""
AROUND = (-3, -2, -1, 0, 1, 2)
"""Octaves around the default rate at which copies are trained together first."""
_EXTENSIONS = 2  # times that the grid grows by `_AT_ONCE` octaves where the best rate is its first or last
_AT_ONCE = 2
_TAIL = 0.1  # fraction of a short run that is scored: its last steps, where the rate falls to zero
_L0_SLOPE = 0.5  # d log FVU / d log L0, with which an L0 beside its target is corrected
_NEAR = 1.33  # factor beside the target beyond which an L0 has missed it
_AS_GOOD = 0.01  # relative difference of scores that is worth less than latents that stay alive
_LOWEST, _HIGHEST = 1e-12, 1e6  # of `TrainConfig.learning_rate`

Open = Callable[[int], tuple[Iterator[Batch], Batch]]
"""Returns, for a number of steps, the batches from the start of the stream, and a sample that initialises."""


class Trial(NamedTuple):
    """A short run at one learning rate; metrics are of its last tenth."""

    rate: float
    fvu: float
    l0: float
    dead_fraction: float
    """Share of latents that did not fire in that tenth."""
    score: float
    """What is compared, lower is better; infinite where the loss was not finite."""


class RateSweep(NamedTuple):
    """The short runs of one SAE, and the learning rate that follows."""

    rate: float
    """The rate for the whole run."""
    best: float
    """The best rate for the short runs: interpolated, the lowest of those that are as good to 1 %."""
    num_steps: int
    """Steps of a short run."""
    criterion: str
    """What was compared."""
    trials: tuple[Trial, ...]
    """In order of their rates."""
    seconds: float
    """Time of the search; of several SAEs together."""

    def to_json(self) -> dict[str, Any]:
        """Return the sweep as plain JSON values; a number that is not finite is None."""
        trials = [
            {name: value if math.isfinite(value) else None for name, value in trial._asdict().items()}
            for trial in self.trials
        ]
        return self._asdict() | {"trials": trials}

    def __str__(self) -> str:
        """Return the trials as a table, a line each, and a line with the rates that follow."""
        rows = [f"{'rate':>10} {'FVU':>8} {'L0':>8} {'silent':>7} {'score':>9}"]
        for rate, fvu, l0, silent, score in self.trials:
            rows.append(f"{rate:>10.3g} {fvu:>8.4f} {l0:>8.1f} {silent:>7.1%} {score:>9.4g}")
        rows.append(
            f"best of {self.num_steps} steps by {self.criterion}: {self.best:.3g}; learning rate of the run: "
            f"{self.rate:.3g}; took {self.seconds:.0f} s"
        )
        return "\n".join(rows)


def short_steps(config: TrainConfig) -> int:
    """Return the number of steps of the short runs for a run."""
    return min(max(round(SHARE * config.num_steps), FEWEST), MOST, config.num_steps)


def short_run(config: TrainConfig) -> TrainConfig:
    """Return the settings of a short run at the default rate: those of the run, with its lengths shortened alike."""
    steps = short_steps(config)
    return dataclasses.replace(
        config,
        num_activations=steps * config.batch_size,
        learning_rate=None,
        dead_after=(
            None if config.dead_after is None else max(config.dead_after * steps // config.num_steps, config.batch_size)
        ),
        resample_every=None,
        average_fraction=None,
    )


def sweep(
    members: Sequence[Member],
    open_stream: Open,
    ops: Ops | None = None,
    mesh: jax.sharding.Mesh | None = None,
    starts: Sequence[Pretrained | None] | None = None,
) -> list[RateSweep]:
    """Find the learning rate of every member; those of one pass are trained together.

    The first pass has rates a factor 2 apart around the default. Where the best is the first or the last of them, the
    grid grows. The last pass has the rates a factor sqrt(2) beside the best. Scores are compared as functions of the
    logarithm of the rate, by the parabola that fits those within a factor 2 of the best; of the rates that are as good
    as its lowest point to 1 %, the lowest is taken, because higher ones kill latents.

    Penalised SAEs trade error for sparsity, so equal FVU is not equal quality. With `target_l0` the score is
    FVU * sqrt(L0 / target), which corrects what the controller has left in a short run. Where L0 is off by more than a
    third it is FVU times the factor by which it is off: an SAE without active latents is no good one. Without a target
    it is the loss.

    Args:
      members: the SAEs; their learning rates are not used.
      open_stream: opens the stream of activations at its start.
      ops: the implementation of operations; None chooses it by the device.
      mesh: devices that share every step; None: one.
      starts: for every member the exported SAE that it continues, or None.

    Raises:
      ConfigError: members with optimisers of their own, which have their own rates.
      NotFiniteError: no short run of a member has a finite loss.
    """
    require(all(member.inner is None for member in members), "an optimiser of your own has its own learning rate")
    started = time.perf_counter()
    search = _Search(members, open_stream, ops, mesh, starts or [None] * len(members))
    _, sample = open_stream(short_steps(members[0].train))
    statistics = [state.rate_statistics(member.sae, sample[member.site]) for member in members]
    defaults = [_default(member, of_member) for member, of_member in zip(members, statistics, strict=True)]
    search.run([[default * 2.0**octave for octave in AROUND] for default in defaults])
    for _ in range(_EXTENSIONS):
        search.run([_beyond(trials) for trials in search.trials])
    search.run([_between(trials) for trials in search.trials])
    seconds = time.perf_counter() - started
    return [
        _result(member, trials, _fall(member, of_member.heaviness), seconds)
        for member, trials, of_member in zip(members, search.trials, statistics, strict=True)
    ]


def _default(member: Member, statistics: state.RateStatistics) -> float:
    """Return the default rate of a short run."""
    return short_run(member.train).rate_for(member.sae, *statistics)


def _fall(member: Member, heaviness: float) -> float:
    """Return the factor from the best rate of a short run to that of the whole one."""
    short, whole = short_run(member.train), member.train
    power = short.tail_exponent(member.sae) - whole.tail_exponent(member.sae)
    gain = whole.length_gain(member.sae) / short.length_gain(member.sae)
    return math.sqrt(short.num_steps / whole.num_steps) * gain * heaviness**power


class _Search:
    """Short runs of several members, and their results so far.

    Copies of a member differ only in a factor on the learning rate, so they start as one state and share a program.
    """

    def __init__(
        self,
        members: Sequence[Member],
        open_stream: Open,
        ops: Ops | None,
        mesh: jax.sharding.Mesh | None,
        starts: Sequence[Pretrained | None],
    ):
        self._open, self._ops, self._mesh, self._starts = open_stream, ops, mesh, starts
        self._members = [member._replace(train=short_run(member.train)) for member in members]
        self._programs = [loop.Programs([member], ops, mesh) for member in self._members]
        self._copy = jax.jit(lambda state: jax.tree.map(jnp.copy, state))
        self._add = jax.jit(metrics.add)
        self.trials: list[list[Trial]] = [[] for _ in members]

    def run(self, rates: Sequence[Sequence[float]]) -> None:
        """Train every member at its rates, all in one pass, and add their results."""
        copies = [(i, rate) for i, own in enumerate(rates) for rate in own if _LOWEST <= rate <= _HIGHEST]
        if not copies:
            return
        for (i, rate), sums in zip(copies, processes.fetch(self._trained(copies)), strict=True):
            self.trials[i].append(_trial(self._members[i], rate, metrics.summarize(sums)))
            self.trials[i].sort()

    def _trained(self, copies: list[tuple[int, float]]) -> list[metrics.Sums]:
        """Return the sums of every copy, a member's number and a rate, over the last steps of its run."""
        steps = self._members[0].train.num_steps
        batches, sample = self._open(steps)
        first = loop.init(self._members, sample, self._ops, self._mesh, self._starts)
        states = [self._copy(first[i])._replace(rate=jnp.full_like(first[i].rate, rate)) for i, rate in copies]
        tails: list[metrics.Sums | None] = [None] * len(copies)
        for number in range(1, steps + 1):
            batch = next(batches, None)
            require(batch is not None, f"the activations ended after {number - 1} of {steps} steps: give more of them")
            for copy, (i, _) in enumerate(copies):
                program = self._programs[i].at(number)
                (states[copy],), (sums,) = program((states[copy],), tuple(batch))
                if number > (1 - _TAIL) * steps:
                    tails[copy] = sums if tails[copy] is None else self._add(tails[copy], sums)
        return tails


def to_target(l0: float, target: float) -> float:
    """Return the factor from the FVU at an L0 to that at the target; one that has missed it costs as much."""
    ratio = max(l0, 1e-3) / target
    return ratio**_L0_SLOPE if 1 / _NEAR <= ratio <= _NEAR else max(ratio, 1 / ratio)


def _trial(member: Member, rate: float, summary: dict[str, float]) -> Trial:
    target, fvu, l0 = member.sae.target_l0, summary["fvu"], summary["l0"]
    score = summary["loss"] if target is None and member.sae.k is None else fvu
    score *= 1 if target is None else to_target(l0, target)
    score = score if math.isfinite(score) and math.isfinite(fvu) else math.inf
    return Trial(rate, fvu, l0, summary["dead_fraction"], score)


def _best(trials: Sequence[Trial]) -> int:
    return min(range(len(trials)), key=lambda i: trials[i].score)


def _beyond(trials: Sequence[Trial]) -> list[float]:
    """Return rates beyond the end of the grid at which the best one lies; [] where it lies within."""
    best = _best(trials)
    if best not in (0, len(trials) - 1) or math.isinf(trials[best].score):
        return []
    sign = -1 if best == 0 else 1
    return [trials[best].rate * 2.0 ** (sign * octave) for octave in range(1, _AT_ONCE + 1)]


def _between(trials: Sequence[Trial]) -> list[float]:
    """Return the rates a factor sqrt(2) beside the best one."""
    rate = trials[_best(trials)].rate
    return [rate / math.sqrt(2), rate * math.sqrt(2)]


def _result(member: Member, trials: Sequence[Trial], fall: float, seconds: float) -> RateSweep:
    """Return the sweep of a member; `fall` is the factor from the best rate of a short run to the run's."""
    best = trials[_best(trials)]
    if math.isinf(best.score):
        raise NotFiniteError(
            f"no learning rate from {trials[0].rate:.3g} to {trials[-1].rate:.3g} trains with a finite loss: look at "
            "the activations"
        )
    finest = max(best.rate * 2 ** _vertex([(math.log2(t.rate / best.rate), t.score) for t in trials]), trials[0].rate)
    if member.sae.target_l0 is not None:
        criterion = "FVU * sqrt(L0 / target_l0)"
    else:
        criterion = "FVU" if member.sae.k is not None else "loss"
    rate, finest = float(f"{finest * fall:.3g}"), float(f"{finest:.3g}")
    return RateSweep(rate, finest, short_steps(member.train), criterion, tuple(trials), seconds)


def _vertex(points: Sequence[tuple[float, float]]) -> float:
    """Return the lowest rate that is as good as the best, in octaves above the best of the trials.

    The parabola through the logarithms of scores is lowest within half an octave of the best trial. Rates below it
    whose score is higher by less than `_AS_GOOD` keep more latents alive; the lowest is taken, within an octave.

    Args:
      points: octaves above the best rate, and scores; those within an octave of it count.
    """
    near = [(octave, math.log(score)) for octave, score in points if abs(octave) < 1.01 and 0 < score < math.inf]
    if len(near) < 3:
        return 0.0
    octaves, logarithms = zip(*near, strict=True)
    curvature, slope, _ = np.polyfit(octaves, logarithms, 2)
    if curvature <= 0:
        return 0.0
    lowest = float(np.clip(-slope / (2 * curvature), -0.5, 0.5))
    return lowest - min(math.sqrt(math.log1p(_AS_GOOD) / curvature), 1.0)
