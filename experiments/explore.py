"""Show what every latent of a run fires on: gather records, write a page, and serve the page live.

    python -m experiments.explore --run_dir=runs/demo
    python -m experiments.explore --run_dir=runs/demo --serve
    python -m experiments.explore --run_dir=runs/demo --serve --port=5002 --secret=localhost-secret

Writes explorer/index.html, which opens without a server or a network, and explorer/records/ into the run directory.
Records that fit the flags are kept. Of crosscoders over checkpoints (`train --checkpoints`) they are those of one
checkpoint's own SAE, and the page shows what became of every latent. With --serve (extra [web]) a person can also type
text, steer and take notes, and a local Neuronpedia with USE_LOCALHOST_INFERENCE=true can use the model (last line).
"""

from __future__ import annotations

import functools
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from bridge.accelerators import check_name, require_torch
from bridge.locations import Checkpoint, Data, FilePath, check_origins
from bridge.run import Run, commands, packaged
from bridge.settings import CONTEXT, LONG_SEED, STEP, ExcludeTokens, InMemory, flag, settle
from experiments import browsing, flags
from jsae.settings import TOKENS, Range, require

if TYPE_CHECKING:
    from bridge.exploration import Explored

NUM_TOKENS = 1_000_000
DEMO_TOKENS = 200_000
"""Tokens that are read if a user gives no number: with --demo few, so that the page opens soon."""


@dataclass(frozen=True)
class ExploreConfig:
    """Run, text and server of the explorer."""

    run_dir: FilePath | None = flag(None, "The run: all of its SAEs or transcoders, on its model and its text.")
    with_run: FilePath | None = flag(
        None, "Another run on the same model, which was explored; the page shows both, with the latents that are alike."
    )
    demo: bool = flag(
        False,
        f"Explore the packaged SAE of the packaged nanochat; it is copied to --run_dir, by default {packaged.FOLDER}.",
    )
    num_tokens: int | None = flag(
        None, f"Tokens of text to read; none is {NUM_TOKENS:,}, with --demo {DEMO_TOKENS:,}.", TOKENS
    )
    open: bool = flag(False, "Open the page in a browser.")
    context_length: int = flag(128, "Tokens of a row of text, BOS first.", CONTEXT)
    data: Data | None = flag(None, "Text, as for training, or store:LOCATION for that of a store; none is the run's.")
    split: Literal["all", "train", "heldout"] = flag("all", "Part of the text.")
    stage: str | None = flag(
        None, "Of a run with --checkpoints: the checkpoint whose own SAE is explored; none is the last."
    )
    models_in_memory: InMemory = flag(
        "all", "Of such a run: 'all', or 'one' that has the weights of every checkpoint in turn, read from its file."
    )
    seed: int = flag(0, "Seed of the random samples of texts.", LONG_SEED)
    keep_activations: bool = flag(True, "Keep every activation, 6 bytes each; the export --format=delphi needs them.")
    force: bool = flag(False, "Gather again even if the records fit.")
    checkpoint: Checkpoint | None = flag(None, "The nanochat, as for training; none is the run's.")
    step: int | None = flag(None, "Step of --checkpoint; none is the last.", STEP)
    tokenizer: FilePath | None = flag(None, "Directory of its tokenizer; none looks beside and above the checkpoint.")
    exclude_tokens: ExcludeTokens | None = flag(None, "Special tokens not to count; none is as the SAEs were trained.")
    drop_sinks: bool | None = flag(None, "Do not count tokens of extreme norm; none is as in the run.")
    device: str = flag("cpu", "Device of the model.")
    serve: bool = flag(False, "Serve the page, with live text and steering (extra [web]).")
    host: str = flag(
        "127.0.0.1", "Address on which --serve listens. Any but loopback requires a token, which is printed."
    )
    port: int = flag(
        8000, "Port on which --serve listens; 0 is any free port.", Range(0, 2**16 - 1, f"be from 0 to {2**16 - 1}")
    )
    names: tuple[str, ...] = flag((), "Other names of --host in browsers, such as host.docker.internal.")
    embed: tuple[str, ...] = flag((), "Origins whose pages may show the page in a frame, such as https://blog.example.")
    chat: bool | None = flag(None, "Offer to chat on the page; none decides by the checkpoint's directory.")
    secret: str | None = flag(None, "INFERENCE_SERVER_SECRET of the Neuronpedia that uses the server.")
    model_id: str | None = flag(None, "That Neuronpedia's name for the model; none accepts any name.")

    def __post_init__(self) -> None:
        settle(self)
        check_name(self.device)
        if self.demo and not self.run_dir:
            object.__setattr__(self, "run_dir", packaged.FOLDER)
        require(bool(self.run_dir), "nothing to explore: give --run_dir, or --demo for the packaged SAE")
        if self.num_tokens is None:
            object.__setattr__(self, "num_tokens", DEMO_TOKENS if self.demo else NUM_TOKENS)
        require(
            not (self.open and self.serve), "--open is for the page from disk: open the address that --serve prints"
        )
        check_origins(self.embed)
        for name in ("names", "embed", "chat", "secret", "model_id"):
            require(self.serve or getattr(self, name) in (None, ()), f"--{name} needs --serve, which is not given")


def main(config: ExploreConfig) -> int:
    """Gather records unless the existing ones fit, write the page, serve it."""
    run = Run(config.run_dir)
    require_torch(config.device)
    if config.demo and packaged.install(run.path):
        print(f"the packaged SAE is copied to {run.path}", file=sys.stderr, flush=True)
    with run.held():  # before torch is loaded, so that a run in use is refused at once
        if config.serve:
            _check_serving(config)
        explored = _explore(run, config)
    if config.open:
        browsing.open_page(run.page_file.resolve().as_uri())
    if config.chat:
        flags.warn_of_base(explored.nano)
    if config.serve:  # without the lock: the server writes only users' notes
        from bridge import graphs
        from bridge.runtime import InterpretableModel
        from bridge.server.server import serve

        say = functools.partial(print, flush=True)  # at once, also into a pipe
        tracer = graphs.tracer(run, explored.nano, explored.saes)
        loaded = InterpretableModel.from_nanochat(explored.nano, explored.saes, transcoders=True), explored.nano
        settings = {
            name: getattr(config, name) for name in ("host", "port", "names", "embed", "chat", "secret", "model_id")
        }
        serve(run.path, lambda: loaded, **settings, tracer=tracer, checkpoints=explored.checkpoints, say=say)
    return 0


def _explore(run: Run, config: ExploreConfig) -> Explored:
    from bridge.exploration import Extent, explore
    from bridge.run.subjects import Choice

    choice = Choice((run.path,), run.path, transcoders=True, **flags.shared(Choice, config))
    extent = Extent(**flags.shared(Extent, config))
    return explore(
        choice, extent, second=config.with_run, force=config.force, keep_page=config.serve, show_progress=True
    )


def _check_serving(config: ExploreConfig) -> None:
    """Raise ImportError without the extra [web] and OSError for a port in use, before anything takes long."""
    from bridge.server.server import listen

    listen(config.host, config.port).close()


def next_commands(config: ExploreConfig) -> list[str]:
    """Return what to do next with the records."""
    return commands.after_exploring(Run(config.run_dir).path, config.serve)


if __name__ == "__main__":
    flags.run(ExploreConfig, main, after=next_commands)
