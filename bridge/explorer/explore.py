"""The explorer's files of a run: records of its SAEs, gathered unless those that are there fit, and their page."""

import contextlib
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

from bridge.explorer import gather, page
from bridge.explorer.gather import Plan, Tell
from bridge.nanochat import Nanochat
from bridge.nanochat.units import Split
from bridge.run import Run, subjects
from bridge.run.subjects import Choice, Subject
from bridge.torch_sae import TorchSAE
from jsae.records.recorder import Settings
from jsae.records.store import digest
from jsae.settings import require

Say = Callable[[str], None]
"""Shows a line to the user."""
Progress = Callable[[], contextlib.AbstractContextManager[Tell]]
"""Gives a context within which progress is shown by what it yields."""


@dataclass(frozen=True)
class Extent:
    """How much text is read, and what is kept of it."""

    num_tokens: int = 1_000_000
    context_length: int = 128
    """Tokens of a row of text, BOS first."""
    split: Split = "all"
    seed: int = 0
    """Of the random samples of texts."""
    keep_activations: bool = True
    """Whether every activation is kept, six bytes each: delphi's files are made of them."""


@dataclass(frozen=True)
class Explored:
    """The model and the SAEs by hook that records were gathered of: what a server needs."""

    nano: Nanochat
    saes: dict[str, TorchSAE]


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _silent() -> contextlib.AbstractContextManager[Tell]:
    return contextlib.nullcontext(lambda what, share: None)


def explore(
    choice: Choice,
    extent: Extent,
    *,
    force: bool = False,
    keep_page: bool = False,
    say: Say = _say,
    progress: Progress = _silent,
) -> Explored:
    """Gather the records of a run's SAEs unless those that are there fit, and write the page.

    Args:
      choice: one run, and what is to be other than it recorded; see `of_run`.
      extent: which text is read, and what is kept.
      force: gather again though the records fit.
      keep_page: leave a page as it is if the run cannot be written to.
      say: shows lines.
      progress: shows how far it is.

    Raises:
      ConfigError, ValueError: an SAE that does not fit, SAEs trained on different tokens, too little text.
      FileNotFoundError: no such run, export, checkpoint or text.
      OSError: something cannot be written; what was there before stays.
    """
    run = Run(choice.places[0])
    with run.held():
        chosen = subjects.find(choice)
        nano, saes = chosen[0].nano, {subject.hook: subject.sae for subject in chosen}
        run.warn_of_marked(saes)
        _gather(run, nano, saes, _plan(choice, extent, chosen), force, say, progress)
        if keep_page and run.page_file.is_file() and not run.is_writable:
            say(f"{run.path} cannot be written to: the page is served as it is")
        else:
            with progress() as tell:
                tell("writing the page", 0.0)
                page.write(run.path, list(saes))
            say(f"written to {run.page_file}")
    return Explored(nano, saes)


def of_run(run: Run, device: str = "cpu") -> Choice:
    """Return the choice of all SAEs of a run, on its model and its text."""
    return Choice((run.path,), run.path, device=device)


def _plan(choice: Choice, extent: Extent, chosen: list[Subject]) -> Plan:
    """Return what is read and kept for the SAEs, all of which count the same tokens."""
    counted = {(subject.excluded, subject.drop_sinks) for subject in chosen}
    require(
        len(counted) == 1,
        f"the SAEs of {choice.places[0]} were trained on different tokens: say with --exclude_tokens and --drop_sinks "
        "which count",
    )
    excluded, drop_sinks = counted.pop()
    data = subjects.reading(choice, choice.places[0]).data
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
    )


def _gather(
    run: Run, nano: Nanochat, saes: dict[str, TorchSAE], plan: Plan, force: bool, say: Say, progress: Progress
) -> None:
    """Gather records unless those that are there fit; say which, and what was gathered."""
    digests = {hook: digest(run.sae_folder(hook)) for hook in saes}
    reason = "--force" if force else gather.unfit(run.records_folder, digests, nano, plan)
    if reason is None:
        say(f"the records in {run.records_folder} fit: --force gathers them again")
        if plan.data_fingerprint is None:
            say(f"{plan.data} is not on this machine: whether its text is still the same was not looked at")
    else:
        say(f"gathering records: {reason}")
        before = time.perf_counter()
        with progress() as tell:
            gather.gather(nano, saes, digests, run.records_folder, plan, tell)
        say(f"gathered in {time.perf_counter() - before:.0f} s")
    for hook in saes:
        say(_summary(run, hook))


def _summary(run: Run, hook: str) -> str:
    """Return a line about the records of one SAE."""
    store = run.records(hook)
    dead = int((store["count"] == 0).sum())
    again = store.header.duplicate_rows
    dropped = f", {again:,} repeated row{'s' * (again > 1)} dropped" if again else ""
    return f"{hook}: {store.header.d_sae:,} latents ({dead:,} dead) on {store.header.tokens:,} tokens{dropped}"
