"""Shows what every latent of a run means: gathers what it fires on, writes a page of it, and serves the page live.

    python -m experiments.explore --run_dir=runs/demo
    python -m experiments.explore --run_dir=runs/demo --serve
    python -m experiments.explore --run_dir=runs/demo --serve --port=5002 --secret=localhost-secret

Writes explorer/index.html, which opens without a server and a network, and explorer/records/ into the run directory.
Records that fit are not gathered again. With --serve (extra [web]) a person can also type text, steer and take notes,
and a local Neuronpedia can drive the model: the last line is for one with USE_LOCALHOST_INFERENCE=true.
"""

from __future__ import annotations

import contextlib
import functools
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from bridge.accelerators import check_name, require_torch
from bridge.locations import Checkpoint, Data, FilePath
from bridge.run import directory as rundir
from bridge.settings import CONTEXT, LONG_SEED, STEP, ExcludeTokens, flag, settle
from experiments import flags
from jsae.settings import TOKENS, Range, require

if TYPE_CHECKING:
    from bridge.explorer.gather import Plan
    from bridge.nanochat import Nanochat
    from bridge.torch_sae import TorchSAE
    from experiments.subjects import Subject


@dataclass(frozen=True)
class ExploreConfig:
    """Which run, what text, how much of it, and whether it is served."""

    run_dir: FilePath | None = flag(None, "The run: all of its SAEs, on its model and its text.")
    num_tokens: int = flag(1_000_000, "Tokens of text to read.", TOKENS)
    context_length: int = flag(128, "Tokens of a row of text, BOS first.", CONTEXT)
    data: Data | None = flag(None, "Text, as for training; none is the run's.")
    split: Literal["all", "train", "heldout"] = flag("all", "Which part of it.")
    seed: int = flag(0, "Of the random samples of texts.", LONG_SEED)
    keep_activations: bool = flag(
        True, "Keep every activation, 6 bytes each: --format=delphi of the export is of them."
    )
    force: bool = flag(False, "Gather again though the records fit.")
    checkpoint: Checkpoint | None = flag(None, "The nanochat, as of training; none is the one the run was trained on.")
    step: int | None = flag(None, "Step of --checkpoint; none is the last.", STEP)
    tokenizer: FilePath | None = flag(None, "Directory of its tokenizer; none looks beside and above the checkpoint.")
    exclude_tokens: ExcludeTokens | None = flag(None, "Special tokens not to count; none is as the SAEs were trained.")
    drop_sinks: bool | None = flag(None, "Do not count tokens of extreme norm; none is as in the run.")
    device: str = flag("cpu", "Where the model runs.")
    serve: bool = flag(False, "Serve the page, with text and steering live (extra [web]).")
    host: str = flag("127.0.0.1", "Where --serve listens. Anything but loopback asks for a token that it prints.")
    port: int = flag(
        8000, "Where --serve listens; 0 is any that is free.", Range(0, 2**16 - 1, f"be from 0 to {2**16 - 1}")
    )
    names: tuple[str, ...] = flag(
        (), "Other names by which browsers may call --host, host.docker.internal for example."
    )
    chat: bool | None = flag(None, "Whether the page offers to chat; none asks where the checkpoint lies.")
    secret: str | None = flag(None, "What a Neuronpedia that asks the server brings as its INFERENCE_SERVER_SECRET.")
    model_id: str | None = flag(None, "What that Neuronpedia calls the model; none takes any name.")

    def __post_init__(self) -> None:
        settle(self)
        check_name(self.device)
        require(bool(self.run_dir), "nothing to explore: give --run_dir")
        for name in ("names", "chat", "secret", "model_id"):
            require(self.serve or getattr(self, name) in (None, ()), f"--{name} is of --serve, which is not given")


def main(config: ExploreConfig) -> int:
    """Gather unless there is nothing to gather, write the page, serve it."""
    run = Path(config.run_dir)
    require_torch(config.device)
    with rundir.writing(run) if rundir.is_writable(run) else contextlib.nullcontext():
        if config.serve:
            _can_serve(config)
        nano, saes = _explore(run, config)
    if config.serve:  # without the lock: all that the server writes is people's notes
        from bridge.runtime import InterpretableModel
        from bridge.server.server import serve

        address = functools.partial(print, flush=True)  # at once, also into a pipe
        loaded = InterpretableModel.from_nanochat(nano, saes), nano
        settings = {name: getattr(config, name) for name in ("host", "port", "names", "chat", "secret", "model_id")}
        serve(run, lambda: loaded, **settings, say=address)
    return 0


def _explore(run: Path, config: ExploreConfig) -> tuple[Nanochat, dict[str, TorchSAE]]:
    """Gather records unless those that are there fit, and write the page; return what a server shows."""
    from rich.console import Console
    from rich.text import Text

    from bridge.explorer import gather, page
    from bridge.run.exports import warn_of_marked
    from experiments import explore_view
    from jsae.records.store import digest

    console = Console(stderr=True)

    def say(text: str) -> None:
        console.print(Text(text), soft_wrap=True)

    # The SAEs, their model, and what is wanted of them.
    subjects, plan = _found(config)
    nano = subjects[0].nano
    saes = {subject.hook: subject.sae for subject in subjects}
    warn_of_marked(run / "sae" / hook for hook in saes)
    digests = {hook: digest(run / "sae" / hook) for hook in saes}
    records = run / "explorer" / "records"

    # The records.
    reason = "--force" if config.force else gather.unfit(records, digests, nano, plan)
    if reason is None:
        say(f"the records in {records} fit: --force gathers them again")
        if plan.data_fingerprint is None:
            say(f"{plan.data} is not on this machine: whether its text is still the same was not looked at")
    else:
        say(f"gathering records: {reason}")
        before = time.perf_counter()
        with explore_view.progress(console) as tell:
            gather.gather(nano, saes, digests, records, plan, tell)
        say(f"gathered in {time.perf_counter() - before:.0f} s")
    for hook in saes:
        say(explore_view.summary(records, hook))

    # The page.
    index = run / "explorer" / "index.html"
    if config.serve and index.is_file() and not rundir.is_writable(run):
        say(f"{run} cannot be written to: the page is served as it is")
        return nano, saes
    with console.status("writing the page"):
        page.write(run, list(saes))
    say(f"written to {index}")
    return nano, saes


def _can_serve(config: ExploreConfig) -> None:
    """Complains of a missing extra and of a port in use before anything is done."""
    from bridge.server.server import listen

    listen(config.host, config.port).close()


def _found(config: ExploreConfig) -> tuple[list[Subject], Plan]:
    """The SAEs of the run with their model, and what is read on which text."""
    from bridge.explorer.gather import Plan, data_fingerprint
    from experiments import subjects
    from experiments.evaluate import EvaluateConfig
    from jsae.records.recorder import Settings

    place = Path(config.run_dir)
    shared = ("run_dir", "checkpoint", "step", "tokenizer", "data", "exclude_tokens", "drop_sinks", "device")
    asked = EvaluateConfig(**{name: getattr(config, name) for name in shared})
    told = subjects.told(asked, place)
    found = subjects.find(asked)
    choices = {(subject.excluded, subject.drop_sinks) for subject in found}
    require(
        len(choices) == 1,
        f"the SAEs of {place} were trained on different tokens: say with --exclude_tokens and --drop_sinks which count",
    )
    excluded, drop_sinks = choices.pop()
    plan = Plan(
        data=told["data"],
        split=config.split,
        num_tokens=config.num_tokens,
        context_length=config.context_length,
        excluded=excluded,
        data_fingerprint=data_fingerprint(found[0].nano, told["data"], config.split),
        drop_sinks=drop_sinks,
        keep_activations=config.keep_activations,
        records=Settings(seed=config.seed),
    )
    return found, plan


if __name__ == "__main__":
    flags.run(ExploreConfig, main)
