"""Recovery of known features at equal L0: jsae, SAELens, dictionary_learning and sparsify on a synthetic world.

The world is that of SynthSAEBench (arXiv 2602.14687), `jsae.synthetic`; the scores are `jsae.recovery`'s, which are
SAELens's too. --preset=small fits two cores: every trainer reads the same samples in the same order, at several L0s.
Its learning rate is the one with the highest F1, searched in factors of 2 from --rate, or from jsae's default. The
others' defaults are for far longer runs and are not tried. With --nosearch_every_l0 the first L0 decides, which takes
less time; at the others another rate may be better. All scores are interpolated to the L0, as in `bench quality`. jsae
is also trained with nothing given but sizes and L0. Three seeds; means, with half of the range.

--preset=published is SynthSAEBench-16k, for a GPU: jsae alone, on samples that are made on the device, beside the
values that were published for SAELens.

--world changes the world: --world=seed=7,num_features=1024,d_in=192 --d_sae=512 --l0s=6 is one of other features, and
--world=seed=7 draws the same kind anew. The recipes were not tuned on it.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from bridge.locations import FilePath
from bridge.settings import flag
from experiments.benches import peers, quality, quality_sides, quality_subjects, quality_tables, timing
from experiments.benches.quality_config import (
    ARCHITECTURES,
    OURS,
    TRAINERS,
    Plan,
    check_run,
    check_sizes,
    check_trainers,
)
from experiments.benches.quality_contest import Contest

if TYPE_CHECKING:
    from jsae.synthetic import SyntheticWorld, WorldConfig

PUBLISHED: Mapping[tuple[str, int], dict[str, float]] = {
    ("batchtopk", 25): {"f1": 0.73},
    ("matryoshka", 25): {"f1": 0.88},
}
"""Published scores of SAEs of 4,096 latents after 200 million samples, by architecture and L0 (arXiv 2602.14687)."""

_SIZES: Mapping[str, dict[str, Any]] = {
    "small": {
        "d_sae": 256,
        "l0s": (5, 8),
        "nested_widths": (16, 64),
        "num_activations": 2**17,
        "batch_size": 512,
        "rate": 1.2e-2,
        "samples": 25_000,
        "seeds": 3,
    },
    "published": {
        "d_sae": 4096,
        "l0s": (25, 15, 35),
        "nested_widths": (128, 512, 2048),
        "num_activations": 200_000_000,
        "batch_size": 1024,
        "rate": 6e-4,
        "samples": 500_000,
        "seeds": 1,
    },
}


_OPEN = ("d_sae", "l0s", "num_activations", "batch_size", "rate", "samples", "seeds")
"""Fields that the preset decides where they are not given."""


@dataclass(frozen=True)
class Config:
    """World, SAEs, trainers and search of the measurement. Where none is given, the preset decides."""

    preset: Literal["small", "published"] = flag("small", "World and sizes: for two cores, or for a GPU.")
    world: tuple[str, ...] | None = flag(
        None, "Settings of jsae.synthetic.WorldConfig as name=value, where they differ from the preset's."
    )
    architectures: tuple[str, ...] = flag(ARCHITECTURES, "Architectures to compare.")
    trainers: tuple[str, ...] = flag(TRAINERS, "Trainers to compare; of the published world jsae alone.")
    l0s: tuple[int, ...] | None = flag(None, "L0s to compare at; the search for a rate begins with the one before.")
    d_sae: int | None = flag(None, "Latents.")
    num_activations: int | None = flag(None, "Samples that every SAE is trained on.")
    batch_size: int | None = flag(None, "Samples per step.")
    seeds: int | None = flag(None, "Number of seeds for the weights.")
    rate: float | None = flag(None, "Learning rate at which the search starts; jsae's starts at its default.")
    rate_range: tuple[float, ...] = flag((9e-5, 4.8e-2), "Lowest and highest learning rate of the search.")
    samples: int | None = flag(None, "Held-out samples to score on.")
    search: bool = flag(True, "Search the best learning rate; if not, every trainer has its default.")
    search_every_l0: bool = flag(True, "Search it again at every further L0, from the one before.")
    tries: int = flag(4, "Largest number of runs to find the strength of a penalty that gives the target L0.")
    tolerance: float = flag(0.06, "Largest deviation of L0 from the target, as a fraction of the target.")
    threads: int | None = flag(None, "Threads of torch on both sides; none shares the cores among the jobs.")
    jobs: int = flag(2, "Architectures of the small world that are compared side by side.")
    quick: bool = flag(False, "Few samples, one L0, one rate, one seed: only to check that everything runs.")
    markdown: bool = flag(False, "Print the tables as Markdown.")
    peer_env: FilePath = flag(peers.TRAINERS_HOME, "The virtual environment of the other trainers.")
    out: FilePath = flag("experiments/results/truth_cpu.json", "File for the results.")

    def __post_init__(self) -> None:
        check_trainers(self.architectures, self.trainers)
        if self.preset not in _SIZES:
            raise ValueError(f"preset is {self.preset!r}: choose one of {', '.join(_SIZES)}")
        if self.world:  # the preset's is valid, and reading it would import jax
            self.world_config()
        if any(getattr(self, name) is None for name in _OPEN):
            self.sizes()  # checks itself
            return
        check_sizes(self, "seeds", "batch_size", "samples", "tries", "jobs")
        if not self.l0s:
            raise ValueError("l0s is empty: give at least one L0")
        for l0 in self.l0s:
            if not 1 <= l0 <= self.d_sae:
                raise ValueError(f"l0s: {l0} is not between 1 and d_sae={self.d_sae}")
            check_run(self.num_activations, self.batch_size, l0, self.d_sae, self.rate, self.rate_range)

    def sizes(self) -> Config:
        """Return the same settings, with the preset's where none was given."""
        return dataclasses.replace(
            self, **{name: _SIZES[self.preset][name] for name in _OPEN if getattr(self, name) is None}
        )

    def world_config(self) -> WorldConfig:
        """Return the preset's world, with the settings that `world` changes.

        Raises:
          ValueError: `world` has an entry that is not name=value.
          ConfigError: a name is not one of `WorldConfig`, or a value does not fit.
        """
        from jsae.synthetic import PRESETS, WorldConfig

        changed = {}
        for entry in self.world or ():
            name, _, value = entry.partition("=")
            try:
                changed[name] = json.loads(value)
            except ValueError:
                raise ValueError(
                    f"world: {entry!r} is not name=value with a number, true or false, like seed=7"
                ) from None
        return WorldConfig.from_json(PRESETS[self.preset].to_json() | changed)


def main(config: Config) -> int:
    """Train and score all SAEs, print a table per L0, write the results."""
    import torch

    from jsae.synthetic import SyntheticWorld

    sizes = config.sizes()
    sizes = _quick(sizes) if config.quick else sizes
    sizes = dataclasses.replace(sizes, threads=quality.threads(sizes.threads, sizes.jobs))
    if sizes.threads is not None:
        torch.set_num_threads(sizes.threads)
    console, started = quality_tables.console(), time.perf_counter()
    report = functools.partial(console.print, soft_wrap=True, highlight=False)
    world = SyntheticWorld(config.world_config())
    tables: dict[str, list[dict[str, Any]]] = {}
    with (
        tempfile.TemporaryDirectory() as scratch,
        quality_sides.compiled_once(),
        _contests(sizes, world, Path(scratch), report) as (versions, contests),
    ):

        def write(found: dict[str, dict[int, list[dict[str, Any]]]]) -> None:
            tables.update({str(l0): [row for rows in found.values() for row in rows[l0]] for l0 in sizes.l0s})
            results = {"seconds": time.perf_counter() - started, "results": tables}  # as far as they are
            timing.write(config.out, _described(sizes, world, versions) | results)

        quality.shared_out(contests, config.architectures, functools.partial(_at_every_l0, l0s=sizes.l0s), write)
    for l0, rows in sorted(tables.items(), key=lambda item: int(item[0])):
        shown = rows + _published(world.config, rows, int(l0))
        title = f"recovery of known features at L0 {l0}; learning rates with the highest F1 there"
        quality_tables.show(console, title, shown, config.markdown)
    console.print(f"figures: {config.out}", soft_wrap=True)
    return 0


def _at_every_l0(contest: Contest, architecture: str, l0s: Sequence[int]) -> dict[int, list[dict[str, Any]]]:
    """Return the rows of an architecture by L0."""
    found = {}
    for l0 in l0s:
        contest.at(l0)
        found[l0] = contest.rows(architecture)
    return found


def _described(sizes: Config, world: SyntheticWorld, versions: dict[str, str]) -> dict[str, Any]:
    """Return what the results belong to."""
    return {
        "machine": timing.machine("cpu" if sizes.preset == "small" else _device()),
        "peers": versions,
        "settings": timing.settings(sizes, "peer_env", "quick"),
        "world": world.config.to_json(),
        "published": [{"architecture": a, "l0": k, **scores} for (a, k), scores in PUBLISHED.items()],
    }


def _device() -> str:
    """Return torch's name of the device that jax computes on."""
    import jax

    return "cpu" if jax.default_backend() == "cpu" else "cuda"


@contextmanager
def _contests(
    sizes: Config, world: SyntheticWorld, scratch: Path, report: Any
) -> Iterator[tuple[dict[str, str], list[Contest]]]:
    """Yield the versions of the peers and contests, each with a process of the peers where they take part."""
    plan = _plan(sizes)
    if sizes.preset == "published":
        subject = quality_subjects.endless(scratch, world, sizes.samples, "f1")
        yield {}, [Contest(dataclasses.replace(plan, trainers=(OURS,)), subject, scratch, _no_peers, report)]
        return
    subject = quality_subjects.synthetic(scratch, world, sizes.num_activations, sizes.samples, "f1")
    python = peers.trainers(sizes.peer_env)
    with quality.contests_of(plan, subject, scratch, python, report, sizes.jobs) as opened:
        yield opened


def _no_peers(job: dict[str, Any]) -> dict[str, Any]:
    raise ValueError(f"{job['library']} is not trained on this world")


def _plan(sizes: Config) -> Plan:
    """Return sizes and search of the contest."""
    return Plan(
        trainers=sizes.trainers,
        d_sae=sizes.d_sae,
        k=sizes.l0s[0],
        nested_widths=tuple(width for width in _SIZES[sizes.preset]["nested_widths"] if width < sizes.d_sae),
        num_activations=sizes.num_activations,
        batch_size=sizes.batch_size,
        rate=sizes.rate,
        rate_range=sizes.rate_range,
        seeds=sizes.seeds,
        tries=sizes.tries,
        tolerance=sizes.tolerance,
        threads=sizes.threads,
        steps=(2,),
        next_steps=(2,) if sizes.search_every_l0 else (),
        search=sizes.search,
        try_own=False,
    )


def _published(world: WorldConfig, rows: list[dict[str, Any]], l0: int) -> list[dict[str, Any]]:
    """Return rows with the published scores of the architectures at an L0; of the published world only."""
    from jsae.synthetic import PRESETS

    if world != PRESETS["published"]:
        return []
    architectures = dict.fromkeys(row["architecture"] for row in rows)
    return [
        {
            "architecture": architecture,
            "trainer": "SAELens, published",
            "recipe": architecture,
            "chosen": "own",
            "rate": 3e-4,
            "scores": {name: {"mean": v, "min": v, "max": v} for name, v in PUBLISHED[architecture, l0].items()},
        }
        for architecture in architectures
        if (architecture, l0) in PUBLISHED
    ]


def _quick(sizes: Config) -> Config:
    changes: dict[str, Any] = {
        "num_activations": 120 * sizes.batch_size,
        "rate_range": (sizes.rate, sizes.rate),
        "l0s": sizes.l0s[:1],
        "seeds": 1,
        "tries": 1,
        "samples": 4096,
    }
    return dataclasses.replace(sizes, **changes)
