"""Explain why a nanochat predicts a token: its attribution graph, from transcoders of all its layers.

    python -m experiments.train --layer=all --hook_type=mlp_in --target_hook=mlp --skip --output_dir=runs/transcoders
    python -m experiments.trace --run_dir=runs/transcoders --prompt="def "
    python -m experiments.trace --run_dir=runs/transcoders --prompt="def " --intervene=3_12_2 --factor=0

Prints the strongest paths, writes graph files for circuit-tracer's pages and Neuronpedia into the run directory, and
puts the graph beside the explorer's page, explorer/index.html, which shows it; --open opens it there.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from bridge import graph_names
from bridge.accelerators import check_name, require_torch
from bridge.locations import Checkpoint, FilePath
from bridge.run import Run, commands
from bridge.settings import STEP, flag, settle
from experiments import flags
from jsae.settings import COUNT, Range, at_least, require

if TYPE_CHECKING:
    from bridge.circuits.tracing import Limits
    from bridge.graphs import Tracer
    from bridge.nanochat import Nanochat

SHARE = Range(0, 1, "lie in [0, 1]")
FACTOR = Range(-1000, 1000, "lie between -1000 and 1000")


@dataclass(frozen=True)
class TraceConfig:
    """The prompt, the sizes of its graph, and interventions."""

    run_dir: FilePath = dataclasses.field(metadata={"help": "A run of transcoders, or a folder of exported ones."})
    prompt: str = flag("", "Text whose next token is explained; BOS is put before it.")
    measure: Literal["logit", "logprob"] = flag(
        "logit", "What is explained: a token's logit minus the mean of all, or the linear part of its log-probability."
    )
    max_logits: int = flag(10, "Most tokens to explain.", at_least(1, 2**20))
    logit_probability: float = flag(0.95, "Explain no more tokens than together have this probability.", SHARE)
    max_features: int = flag(7500, "Most features with nodes of their own; errors take in the others.", COUNT)
    batch_size: int | None = flag(
        None, "Rows per backward pass; none is at most 512, as memory allows.", at_least(1, 2**16)
    )
    node_threshold: float = flag(0.8, "Share of the influence that the nodes in the file have.", SHARE)
    edge_threshold: float = flag(0.98, "Share of the edges' scores that the edges in the file have.", SHARE)
    paths: int = flag(10, "Paths to print.", at_least(0, 10_000))
    intervene: str | None = flag(None, "Id of a feature or error to change in the model: LAYER_LATENT_POSITION.")
    factor: float = flag(0.0, "What --intervene multiplies the node by; 0 removes it.", FACTOR)
    ablations: int = flag(0, "Ablate this many features in the model and print the correlation.", at_least(0, 2**20))
    slug: str | None = flag(None, "Name of the graph; none is made from the prompt.")
    model_id: str | None = flag(None, "Neuronpedia's id of the model; none is nanochat-dDEPTH-HASH.")
    source_set: str | None = flag(None, "Its source set of the transcoders; none is transcoder-WIDTH-HASH.")
    out: FilePath | None = flag(
        None, "Folder of the graph files; none is graphs/ in the run, and the graph is put into its explorer."
    )
    open: bool = flag(False, "Open the graph in the explorer, in a browser.")
    checkpoint: Checkpoint | None = flag(None, "The nanochat, as for training; none is the run's.")
    step: int | None = flag(None, "Step of --checkpoint; none is the last.", STEP)
    tokenizer: FilePath | None = flag(None, "Directory of its tokenizer; none looks beside and above the checkpoint.")
    device: str = flag("cpu", "Device of the model.")

    def __post_init__(self) -> None:
        settle(self)
        check_name(self.device)
        require(bool(self.run_dir), "nothing to trace: give --run_dir")
        require(bool(self.prompt), "the prompt is empty: give --prompt=TEXT")
        require(_is_text(self.prompt), "the prompt is not valid UTF-8")
        require(self.logit_probability > 0, "logit_probability is 0: it must be above 0, and at most 1")
        require(self.ablations != 1, "--ablations=1 gives no correlation: give 0 or at least 2")
        require(
            self.intervene is not None or self.factor == 0.0,
            f"--factor={self.factor:g} is for --intervene, which is not given",
        )
        require(
            not (self.open and self.out), "--open shows the graph in the run's explorer, which --out leaves as it is"
        )
        self._check_names()

    def _check_names(self) -> None:
        """Raise ValueError for names that would be refused when the graph is written, and for ids of no node."""
        from bridge.neuronpedia import ids

        checks = {"model_id": ids.check_model, "source_set": ids.check_source_set, "slug": graph_names.check_slug}
        for name, check in (checks | {"intervene": graph_names.parse_writer}).items():
            if (value := getattr(self, name)) is not None:
                check(value)


def main(config: TraceConfig) -> int:
    """Trace the prompt, write the graph and print its strongest paths and the effects of interventions."""
    require_torch(config.device)
    run = Run(config.run_dir)
    nano = _model(config, run)
    tracer = _tracer(config, run, nano)
    node = None if config.intervene is None else graph_names.parse_writer(config.intervene)
    traced = tracer.trace(config.prompt, config.measure, _limits(config), node=node)
    column = None if node is None else traced.replacement.column(*node)
    from bridge import graphs
    from bridge.circuits import prune
    from experiments import trace_view

    pruned = prune(traced.graph, config.node_threshold, config.edge_threshold)
    naming = tracer.naming(config.prompt, config.slug)
    out = Path(config.out) if config.out else None
    written = graphs.write(traced.graph, pruned, naming, _limits(config), run, out)
    trace_view.show_graph(traced.graph, pruned, naming, config.paths)
    if column is not None:
        trace_view.show_effect(traced, naming, column, config.factor)
    if config.ablations:
        trace_view.show_agreement(traced, config.ablations)
    trace_view.show_files(written, config.open)
    return 0


def _is_text(prompt: str) -> bool:
    """Return whether a prompt can be written as UTF-8, which bytes of other encodings on a command line cannot."""
    try:
        prompt.encode()
    except UnicodeEncodeError:
        return False
    return True


def _model(config: TraceConfig, run: Run) -> Nanochat:
    """Load the model, and check the length of the prompt before anything takes long."""
    from bridge.circuits.tracing import check_length

    nano = run.model_path(checkpoint=config.checkpoint, step=config.step, tokenizer=config.tokenizer).load(
        config.device
    )
    check_length(len(nano.tokenizer.encode(config.prompt, prepend_bos=True)), nano.config.sequence_len)
    return nano


def _tracer(config: TraceConfig, run: Run, nano: Nanochat) -> Tracer:
    """Load the transcoders, and check that they are of this model."""
    from bridge.graphs import Tracer

    names = {name: getattr(config, name) for name in ("model_id", "source_set")}
    return Tracer(run, nano, run.transcoders(config.device), **names)


def _limits(config: TraceConfig) -> Limits:
    from bridge.circuits.tracing import Limits

    return Limits(**flags.shared(Limits, config))


def next_commands(config: TraceConfig) -> list[str]:
    """Return commands to test the graph against the model."""
    model = {name: getattr(config, name) for name in ("checkpoint", "step", "tokenizer")}
    return commands.after_tracing(Path(config.run_dir), config.prompt, bool(config.ablations), **model)


if __name__ == "__main__":
    flags.run(TraceConfig, main, after=next_commands)
