"""SAEs at equal L0 on several kinds of data: jsae, SAELens, dictionary_learning and sparsify, on the same batches.

Every trainer reads the same activations in the same order, in batches of the same size, and has the same width. Its
learning rate is searched from --rate in factors of sqrt(2), beside the trainer's own default; the rate with the best
score at the target L0 is trained with every seed and reported. Activations are scaled, or not, as each trainer's recipe
has it; all lengths of schedules are the same fractions of the run. TopK, BatchTopK and Matryoshka have the same k, the
target L0. The peers' penalties of ReLU, Gated and JumpReLU are searched until L0 is close to it; jsae is asked for it.
Another SAE of a neighbouring L0 shows how the scores depend on L0, and all are interpolated to the target: log FVU
linearly in log L0. jsae is also trained with nothing given but sizes and L0.

All SAEs are scored as SAELens files by the same code, on held-out activations and, of a nanochat, in the model. The
peers have their own environment, --peer_env, which is created if it does not exist (pip, about 2 GB).
"""

from __future__ import annotations

import dataclasses
import functools
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from experiments.benches import peers, quality_sides, quality_subjects, quality_tables, timing
from experiments.benches.quality_config import SUBJECTS, Config, Plan
from experiments.benches.quality_contest import Contest
from experiments.benches.quality_subjects import Subject
from jsae.progress import Progress

SYNTHETIC = {"d_sae": 256, "k": 5, "nested_widths": (16, 64)}
"""Sizes of SAEs of the small synthetic world, which has 256 features, of which 4.9 fire at once."""


def main(config: Config) -> int:
    """Train and score all SAEs, print a table per subject, write the results."""
    import torch

    config = _quick(config) if config.quick else config
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    python = peers.trainers(config.peer_env)
    console = quality_tables.console()
    report = functools.partial(console.print, soft_wrap=True, highlight=False)
    tables: dict[str, Any] = {}
    versions: dict[str, str] = {}
    for name in config.subjects:
        report(f"{name}: the {SUBJECTS[name]}")
        with tempfile.TemporaryDirectory() as scratch, quality_sides.compiled_once():
            subject, plan = lay_out(name, config, Path(scratch), python)
            with contest_of(plan, subject, Path(scratch), python, report) as (versions, contest):
                results = []
                with Progress("training and scoring", len(config.architectures), "architectures") as progress:
                    for architecture in config.architectures:
                        results += contest.rows(architecture)
                        progress.advance()
        tables[name] = {"title": subject.title, "sizes": dataclasses.asdict(plan), "results": results}
        title = f"{subject.title}: scores at L0 {plan.k}; learning rates with the lowest FVU there"
        quality_tables.show(console, title, results, config.markdown)
        described = {"machine": timing.machine("cpu"), "settings": timing.settings(config, "peer_env", "quick")}
        timing.write(config.out, described | {"peers": versions, "subjects": tables})  # as far as it is
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
    }[name]
    model = {"checkpoint": config.checkpoint, "data": config.data, "layer": layer, "site": site}
    return quality_subjects.nanochat(folder, **model, **sizes, loss=config.loss_tokens), config.plan()


@contextmanager
def contest_of(
    plan: Plan, subject: Subject, scratch: Path, python: Path, report: Callable[[str], None]
) -> Iterator[tuple[dict[str, str], Contest]]:
    """Yield the versions of the peers and a contest; the peers' process runs meanwhile."""
    script = Path(__file__).with_name("quality_peer.py")
    with peers.process(python, script, subject.folder) as (versions, ask):
        yield versions, Contest(plan, subject, scratch, ask, report)


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
