"""Fine-tuning by KL divergence against as much further training by squared error, for several architectures.

SAEs are trained with nothing given but k or a target L0, then fine-tuned by every objective from the same weights, on
the same windows of text and at the same rates. All are measured on the same held-out text.
"""

from __future__ import annotations

import contextlib
import itertools
import statistics
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from bridge.finetuning import FinetuneConfig, finetune
from bridge.finetuning.config import Objective
from bridge.locations import Checkpoint, Data, FilePath
from bridge.run import Run
from bridge.settings import flag, settle
from bridge.training import RunConfig, train
from experiments.benches import tables, timing
from experiments.benches.quality_config import ARCHITECTURES
from jsae.settings import COUNT, RATE, TOKENS, ConfigError, require

_COLUMNS = ("architecture", "objective", "rate", "loss recovered", "KL", "FVU", "L0", "dead")
_METRICS = ("loss_recovered", "kl", "fvu", "l0", "dead")


@dataclass(frozen=True)
class Config:
    """Sizes and objectives of the measurement."""

    checkpoint: Checkpoint = flag("demo", "nanochat checkpoint.")
    data: Data = flag("stdlib", "Text.")
    architectures: tuple[str, ...] = flag(("topk", "batchtopk", "jumprelu", "relu"), "Architectures.")
    objectives: tuple[str, ...] = flag(("kl", "mse"), "Objectives of fine-tuning: any of kl,ce,mse.")
    factors: tuple[float, ...] = flag((1.0,), "Rates of fine-tuning, as factors on its default.", RATE)
    expansion_factor: int = flag(8, "Latents per dimension.", COUNT)
    k: int = flag(32, "Active latents per token, or the target L0.", COUNT)
    num_activations: int = flag(2**18, "Activations of the training.", TOKENS)
    batch_size: int = flag(1024, "Activations per step of the training.", COUNT)
    tuning_activations: int = flag(2**16, "Activations of the fine-tuning.", TOKENS)
    tuning_batch_size: int = flag(2048, "Activations per step of the fine-tuning.", COUNT)
    seeds: int = flag(1, "Number of seeds.", COUNT)
    heldout_tokens: int = flag(20_000, "Held-out tokens to measure on.", TOKENS)
    runs: FilePath | None = flag(None, "Directory in which the runs are kept; those that it has are used again.")
    markdown: bool = flag(False, "Print the table as Markdown.")
    out: FilePath = flag("experiments/results/finetune_cpu.json", "File for the results.")

    def __post_init__(self) -> None:
        settle(self)
        for name in self.architectures:
            require(name in ARCHITECTURES, f"--architectures has {name!r}: choose of {','.join(ARCHITECTURES)}")
        for objective in self.objectives:
            require(objective in get_args(Objective), f"--objectives has {objective!r}: choose of kl,ce,mse")
        for name, number in (("num_activations", self.batch_size), ("tuning_activations", self.tuning_batch_size)):
            require(getattr(self, name) >= number, f"--{name}={getattr(self, name)} is less than one batch of {number}")


def main(config: Config) -> int:
    """Train and fine-tune everything, print a table, write the results."""
    found: list[dict[str, Any]] = []
    with _runs(config) as folder:
        for seed, architecture in itertools.product(range(config.seeds), config.architectures):
            trained = _trained(config, architecture, seed, folder)
            rate: float | None = None
            for factor, objective in itertools.product(config.factors, config.objectives):
                if rate is None and factor != 1.0:
                    rate = _default_rate(_tuned(config, trained, config.objectives[0], None))
                run = _tuned(config, trained, objective, None if factor == 1.0 else factor * float(rate or 0))
                rate = _default_rate(run) if factor == 1.0 else rate
                (entry,) = run.evaluation.values()
                measured = {"rate": _default_rate(run), **entry["finetuning"]}
                found.append({"architecture": architecture, "seed": seed, "objective": objective, **measured})
    rows = list(_rows(config, found))
    machine = timing.machine("cpu")
    tables.show("Fine-tuning", _COLUMNS, rows, machine, config.markdown)
    settings = timing.settings(config, "runs", "markdown")
    timing.write(config.out, {"machine": machine, "settings": settings, "results": found})
    return 0


@contextlib.contextmanager
def _runs(config: Config) -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as scratch:
        yield Path(config.runs or scratch)


def _trained(config: Config, architecture: str, seed: int, folder: Path) -> Run:
    """Return a trained run; one that is there already is used again."""
    from jsae.architectures import find

    run = Run(folder / f"{architecture}-s{seed}")
    if run.table_file("eval").is_file():
        return run
    sparsity: dict[str, Any] = {"k": (config.k,)}
    if find(architecture).Config.k is None:
        sparsity = {"target_l0": (float(config.k),)}
    names = ("checkpoint", "data", "expansion_factor", "num_activations", "batch_size", "heldout_tokens")
    sizes = {name: getattr(config, name) for name in names}
    return train(RunConfig(activation=architecture, seed=(seed,), output_dir=str(run.path), **sizes, **sparsity))


def _tuned(config: Config, trained: Run, objective: str, rate: float | None) -> Run:
    """Return a fine-tuned run; one that is there already is used again."""
    name = f"{objective}-{config.tuning_activations}-{'default' if rate is None else f'{rate:.3g}'}"
    run = Run(trained.path.with_name(f"{trained.path.name}-{name}"))
    if run.table_file("eval").is_file():
        return run
    try:
        return finetune(
            FinetuneConfig(
                sae=str(trained.path),
                out=str(run.path),
                objective=objective,
                learning_rate=rate,
                num_activations=config.tuning_activations,
                batch_size=config.tuning_batch_size,
                heldout_tokens=config.heldout_tokens,
            )
        )
    except ConfigError as error:
        raise ConfigError(f"{trained.path.name}, {objective}: {error}") from error


def _default_rate(run: Run) -> float:
    return float(run.facts["finetuning"]["rate"])


def _rows(config: Config, found: list[dict[str, Any]]) -> Iterator[tuple[str, ...]]:
    """Yield a row before fine-tuning and a row per objective and rate, means over seeds."""
    for architecture in config.architectures:
        own = [entry for entry in found if entry["architecture"] == architecture]
        before = {entry["seed"]: entry["before"] for entry in own}
        yield architecture, "before", "", *_cells([*before.values()])
        groups = dict.fromkeys((entry["objective"], round(entry["rate"], 9)) for entry in own)
        for objective, rate in groups:
            same = [e["after"] for e in own if e["objective"] == objective and round(e["rate"], 9) == rate]
            yield "", objective, f"{rate:.2g}", *_cells(same)


def _cells(entries: list[dict[str, float]]) -> tuple[str, ...]:
    def cell(name: str) -> str:
        values = [entry[name] for entry in entries]
        mean, form = statistics.fmean(values), {"l0": ".2f", "dead": ".2%"}.get(name, ".4f")
        spread = f" ± {statistics.stdev(values):{form}}" if len(values) > 1 and name != "dead" else ""
        return f"{mean:{form}}{spread}"

    return tuple(cell(name) for name in _METRICS)
