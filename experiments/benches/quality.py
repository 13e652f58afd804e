"""SAEs at equal L0 on several kinds of data: jsae, SAELens, dictionary_learning and sparsify, on the same batches.

Every trainer reads the same activations in the same order, in batches of the same size, and has the same width. Its
learning rate is searched in factors of sqrt(2), from --rate or jsae's default, beside the trainer's own default; the
rate with the best score at the target L0 is trained with every seed and reported. Activations are scaled, or not, as
each trainer's recipe has it; warm-up and decay are the same fractions of the run. A silent latent is dead after a tenth
of the run for the peers, and at their best rate also after jsae's 1.5 %, whichever is better. TopK, BatchTopK and
Matryoshka have the same k, the target L0. The peers' penalties of ReLU, Gated and JumpReLU are searched until L0 is
close to it; jsae is asked for it. Another SAE of a neighbouring L0 shows how the scores depend on L0, and all are
interpolated to the target: log FVU linearly in log L0. jsae is also trained with nothing given but sizes and L0.

All SAEs are scored as SAELens files by the same code, on held-out activations and, of a nanochat, in the model. Of the
seeds of a row, the share of latents is given that recur in another seed: their decoder rows, matched one to one, have a
cosine above 0.7. --interpretability adds the scores of `experiments.evaluate` that compare trainers: how well labels
predict when latents fire, which are chosen from the same predicates for every SAE, probes of a single latent for places
in code, and absorption of first letters.

The peers have their own environment, --peer_env, which is created if it does not exist (pip, about 2 GB).
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import functools
import os
import queue
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from experiments.benches import peers, quality_sides, quality_subjects, quality_tables, timing
from experiments.benches.quality_config import RECIPES, SUBJECTS, Config, Plan
from experiments.benches.quality_contest import Contest
from experiments.benches.quality_subjects import Subject
from jsae.progress import Progress

Result = TypeVar("Result")

SYNTHETIC = {"d_sae": 256, "k": 5, "nested_widths": (16, 64)}
"""Sizes of SAEs of the small synthetic world, which has 256 features, of which 4.9 fire at once."""


def main(config: Config) -> int:
    """Train and score all SAEs, print a table per subject, write the results."""
    import torch

    config = _quick(config) if config.quick else config
    config = dataclasses.replace(config, threads=threads(config.threads, config.jobs))
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    python = peers.trainers(config.peer_env)
    console = quality_tables.console()
    report = functools.partial(console.print, soft_wrap=True, highlight=False)
    tables: dict[str, Any] = {}
    versions: dict[str, str] = {}

    def write(rows: dict[str, list[dict[str, Any]]]) -> None:
        tables[name] |= {
            "results": [row for architecture in config.architectures for row in rows.get(architecture, [])]
        }
        described = {"machine": timing.machine("cpu"), "settings": timing.settings(config, "peer_env", "quick")}
        timing.write(config.out, described | {"peers": versions, "subjects": tables})  # as far as it is

    for name in config.subjects:
        report(f"{name}: the {SUBJECTS[name]}")
        with tempfile.TemporaryDirectory() as scratch, quality_sides.compiled_once():
            subject, plan = lay_out(name, config, Path(scratch), python)
            with contests_of(plan, subject, Path(scratch), python, report, config.jobs) as (versions, contests):
                tables[name] = {"title": subject.title, "sizes": dataclasses.asdict(plan)}
                shared_out(contests, config.architectures, Contest.rows, write)
        title = f"{subject.title}: scores at L0 {plan.k}; learning rates with the lowest FVU there"
        quality_tables.show(console, title, tables[name]["results"], config.markdown)
    console.print(f"figures: {config.out}", soft_wrap=True)
    return 0


def lay_out(name: str, config: Config, folder: Path, python: Path) -> tuple[Subject, Plan]:
    """Make the activations of a subject; return it with the sizes of its SAEs."""
    sizes = {"train": config.num_activations, "heldout": config.heldout_activations}
    if name == "smollm2":
        return quality_subjects.smollm2(python, **sizes), config.plan()
    if name == "synthetic":
        from jsae.synthetic import SyntheticWorld

        return quality_subjects.synthetic(folder, SyntheticWorld("small"), **sizes, chosen_by="fvu"), config.plan(
            **SYNTHETIC
        )
    layer, site = {
        "nanochat_mid": ("middle", "resid_post"),
        "nanochat_late": ("last", "resid_post"),
        "nanochat_mlp": ("middle", "mlp"),
        "nanochat_attn": ("middle", "attn"),
        "nanochat_first": ("first", "resid_post"),
    }[name]
    model = {"checkpoint": config.checkpoint, "data": config.data, "layer": layer, "site": site}
    extent = {"loss": config.loss_tokens, "interpretability": config.interpretability}
    return quality_subjects.nanochat(folder, **model, **sizes, **extent), config.plan()


@contextmanager
def contests_of(
    plan: Plan, subject: Subject, scratch: Path, python: Path, report: Callable[[str], None], jobs: int
) -> Iterator[tuple[dict[str, str], list[Contest]]]:
    """Yield the versions of the peers and as many contests; each has a process of the peers, which runs meanwhile."""
    script = Path(__file__).with_name("quality_peer.py")
    with contextlib.ExitStack() as running:
        opened = [running.enter_context(peers.process(python, script, subject.folder)) for _ in range(jobs)]
        yield opened[0][0], [Contest(plan, subject, scratch, ask, report) for _, ask in opened]


def shared_out(
    contests: Sequence[Contest],
    architectures: Sequence[str],
    work: Callable[[Contest, str], Result],
    after: Callable[[dict[str, Result]], None],
) -> dict[str, Result]:
    """Do some work for every architecture; contests do theirs side by side.

    Those with the most searches begin, so that all contests end at about the same time.

    Args:
      contests: at least one.
      architectures: their names.
      work: given a contest that is free and an architecture.
      after: called with all that is done, whenever an architecture is.

    Returns:
      What the work returned, by architecture.
    """
    free: queue.SimpleQueue[Contest] = queue.SimpleQueue()
    for contest in contests:
        free.put(contest)

    def one(architecture: str) -> Result:
        contest = free.get()
        try:
            return work(contest, architecture)
        finally:
            free.put(contest)

    with (
        concurrent.futures.ThreadPoolExecutor(len(contests)) as pool,
        Progress("training and scoring", len(architectures), "architectures") as progress,
    ):
        works = {name: pool.submit(one, name) for name in sorted(architectures, key=_searches, reverse=True)}
        try:
            for _ in concurrent.futures.as_completed(works.values()):
                after({name: works[name].result() for name in architectures if works[name].done()})
                progress.advance()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return {name: works[name].result() for name in architectures}


def _searches(architecture: str) -> int:
    """Return about how many SAEs the searches of an architecture train, in units of one search for a rate."""
    return sum(1 + 2 * recipe.is_penalised for recipe in RECIPES[architecture])


def threads(given: int | None, jobs: int) -> int | None:
    """Return the number of threads of torch: what is given, or a share of the cores where several contests run."""
    return given if given is not None or jobs == 1 else max((os.cpu_count() or 1) // jobs, 1)


def _quick(config: Config) -> Config:
    changes: dict[str, Any] = {
        "num_activations": 120 * config.batch_size,
        "rate_range": (config.rate, config.rate),
        "seeds": 1,
        "tries": 1,
    }
    return dataclasses.replace(config, **changes, heldout_activations=4096, loss_tokens=2048)


def markdown(results: Sequence[dict[str, Any]]) -> str:
    """Return the table of one subject in Markdown."""
    return quality_tables.markdown(results)
