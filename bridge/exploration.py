"""Write the explorer's files of a run: records of its SAEs or transcoders, unless existing ones fit, and their page."""

import sys
import time
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from bridge import quick_labels
from bridge.explorer import gather, lens_sample, page, parts
from bridge.explorer.gather import Plan
from bridge.nanochat import Nanochat
from bridge.nanochat.units import Split
from bridge.run import Run, subjects
from bridge.run.labels import automatic_hooks
from bridge.run.subjects import Choice, Subject
from bridge.settings import InMemory
from bridge.stages import exploring
from bridge.stages.names import Stage
from bridge.torch_sae import TorchSAE
from jsae.progress import Progress
from jsae.records.recorder import Settings
from jsae.records.store import digest
from jsae.settings import require


@dataclass(frozen=True)
class Extent:
    """The amount of text to read, and what to keep of it."""

    num_tokens: int = 1_000_000
    context_length: int = 128
    """Tokens of a row of text, BOS first."""
    split: Split = "all"
    seed: int = 0
    """Seed of the random samples of texts."""
    keep_activations: bool = True
    """Whether to keep every activation, six bytes each; delphi's files need them."""
    stage: str | None = None
    """Of a crosscoder over checkpoints, the checkpoint whose own SAE is explored; None is the last."""
    models_in_memory: InMemory = "all"
    """Of such a crosscoder, see `bridge.stages.loading.load`."""


@dataclass(frozen=True)
class Explored:
    """The model, and the SAEs by hook whose records were gathered; a server needs both."""

    nano: Nanochat
    saes: dict[str, TorchSAE]
    checkpoints: exploring.Checkpoints | None = None
    """The checkpoints that the run's crosscoders read; None for a run on one."""


def explore(
    choice: Choice,
    extent: Extent,
    *,
    second: str | Path | None = None,
    force: bool = False,
    keep_page: bool = False,
    show_progress: bool = False,
) -> Explored:
    """Gather the records of a run's SAEs unless existing ones fit, label latents, and write the page.

    SAEs without labels get quick ones, from a part of the text. Progress is reported on stderr. Of crosscoders over
    checkpoints, one checkpoint's own SAEs are explored, and the page shows what became of their latents: for this the
    checkpoints are compared (`stages.json`), unless they were.

    Args:
      choice: one run, with settings that override those that it recorded; see `of_run`.
      extent: how much text to read, and what to keep.
      second: another run on the same model, whose records the page shows beside those of the run.
      force: gather again even if existing records fit.
      keep_page: leave an existing page unchanged if the run is not writable.
      show_progress: show progress bars.

    Raises:
      ConfigError, ValueError: an SAE does not fit, SAEs were trained on different tokens, there is too little text, or
        the second run has no records or is on another model.
      FileNotFoundError: the run, an export, the checkpoint or the text does not exist.
      OSError: a file cannot be written; earlier files stay.
    """
    run, console = Run(choice.paths[0]), Console(stderr=True, quiet=not show_progress)
    if second is not None:
        parts.check_second(run, Run(second), extent.context_length)
    with run.held():
        choice, stage = exploring.choose(run, choice, extent.stage)
        if stage is not None and run.is_writable:
            exploring.compare_unless_done(run, choice.device, extent.models_in_memory, console)
        chosen = subjects.find(choice)
        nano, saes = chosen[0].nano, {subject.hook: subject.sae for subject in chosen}
        run.warn_of_marked(saes)
        plan = _plan(choice, extent, chosen, stage)
        seconds = _gather(run, nano, saes, plan, force, console)
        if stage is not None and run.is_writable:
            exploring.write_losses(run, list(saes), choice.device, extent.models_in_memory, console)
        if run.is_writable:
            _label(run, nano, saes, plan, seconds, console)
            with Progress("reading lenses", None, console=console):
                lens_sample.write(run, nano, saes)
        if keep_page and run.page_file.is_file() and not run.is_writable:
            _say(f"{run.path} is not writable: the existing page is served")
        else:
            with Progress("writing the page", None, console=console):
                page.write(run.path, list(saes), second)
            _say(f"written to {run.page_file}")
    return Explored(nano, saes, None if stage is None else exploring.Checkpoints(run, stage.name, nano))


def of_run(run: Run, device: str = "cpu") -> Choice:
    """Return the choice of all SAEs and transcoders of a run, on its model and its text."""
    return Choice((run.path,), run.path, device=device, transcoders=True)


def _plan(choice: Choice, extent: Extent, chosen: list[Subject], stage: Stage | None) -> Plan:
    """Return what to read and keep for the SAEs, which must all count the same tokens."""
    counted = {(subject.excluded, subject.drop_sinks) for subject in chosen}
    require(
        len(counted) == 1,
        f"the SAEs of {choice.paths[0]} were trained on different tokens: say with --exclude_tokens and --drop_sinks "
        "which count",
    )
    excluded, drop_sinks = counted.pop()
    data = subjects.reading(choice, choice.paths[0]).data
    return Plan(
        data=data,
        split=extent.split,
        num_tokens=extent.num_tokens,
        context_length=extent.context_length,
        excluded=excluded,
        data_fingerprint=gather.data_fingerprint(chosen[0].nano, data, extent.split),
        drop_sinks=drop_sinks,
        keep_activations=extent.keep_activations,
        records=Settings(seed=extent.seed),
        stage=None if stage is None else stage.name,
    )


def _gather(
    run: Run, nano: Nanochat, saes: dict[str, TorchSAE], plan: Plan, force: bool, console: Console
) -> float | None:
    """Gather records unless existing ones fit; return the seconds that it took, or None if they fit."""
    stage = plan.stage
    exports = {hook: run.sae_folder(hook) if stage is None else run.stage_folder(stage, hook) for hook in saes}
    digests = {hook: digest(folder) for hook, folder in exports.items()}
    reason = "--force" if force else gather.mismatch(run.records_folder, digests, nano, plan)
    seconds = None
    if reason is None:
        _say(f"the records in {run.records_folder} fit: --force gathers them again")
        if plan.data_fingerprint is None:
            _say(f"{plan.data} is not on this machine: could not check whether the text has changed")
    else:
        _say(f"gathering records: {reason}")
        start = time.perf_counter()
        with Progress("gathering", console=console) as progress:
            gather.gather(nano, saes, digests, run.records_folder, plan, progress.share)
        seconds = time.perf_counter() - start
        _say(f"gathered in {seconds:.0f} s")
    for hook in saes:
        _say(_summary(run, hook))
    return seconds


def _label(
    run: Run, nano: Nanochat, saes: dict[str, TorchSAE], plan: Plan, gathered: float | None, console: Console
) -> None:
    """Find quick labels for SAEs that have none, in at most a third of the time that gathering took.

    A checkpoint's own SAEs get new ones with new records, which may be of another checkpoint than before.
    """
    anew = plan.stage is not None and gathered is not None
    try:
        with Progress("labelling latents", None, console=console):
            summaries = quick_labels.write(run, nano, saes, plan, None if gathered is None else gathered / 6, anew=anew)
    except FileNotFoundError as error:
        _say(f"latents were not labelled: {error}")
        return
    for hook, count in automatic_hooks(run.path).items():
        if hook in summaries:
            fitting = summaries[hook]["f1_over_50_percent"]
            _say(f"{hook}: {count:,} latents labelled from a part of the text, {fitting:,} with an F1 over 0.5")
        elif hook in saes:
            _say(f"{hook}: {count:,} latents have labels in {run.table_file('labels')}")
    if summaries and not any(sae.is_transcoder for sae in saes.values()):
        _say(f"labels from more text, and their scores: python -m experiments.evaluate --run_dir={run.path}")


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _summary(run: Run, hook: str) -> str:
    """Return one line about the records of an SAE."""
    store = run.records(hook)
    dead = int((store["count"] == 0).sum())
    repeated = store.header.duplicate_rows
    dropped = f", {repeated:,} repeated row{'s' * (repeated > 1)} dropped" if repeated else ""
    return f"{hook}: {store.header.d_sae:,} latents ({dead:,} dead) on {store.header.tokens:,} tokens{dropped}"
