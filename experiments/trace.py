"""Explain why a nanochat predicts a token: its attribution graph, from transcoders of all its layers.

    python -m experiments.train --layer=all --hook_type=mlp_in --target_hook=mlp --skip --output_dir=runs/transcoders
    python -m experiments.trace --run_dir=runs/transcoders --prompt="def "
    python -m experiments.trace --run_dir=runs/transcoders --prompt="def " --intervene=3_12_2 --factor=0

Prints the strongest paths, and writes graph files for circuit-tracer's pages and Neuronpedia into the run directory.
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
    from torch import Tensor

    from bridge.circuits import Traced
    from bridge.circuits.graph_file import Naming
    from bridge.circuits.tracing import Limits
    from bridge.nanochat import Nanochat
    from bridge.torch_sae import TorchSAE

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
    out: FilePath | None = flag(None, "Folder of the graph files; none is graphs/ in the run.")
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
    tokens = _tokens(config, nano)
    transcoders = run.transcoders(config.device)
    traced = _trace(config, nano, transcoders, tokens)
    column = _column(config, traced)
    from bridge.circuits import graph_file, prune
    from experiments import trace_view

    pruned = prune(traced.graph, config.node_threshold, config.edge_threshold)
    naming = _naming(config, run, nano, transcoders)
    folder = Path(config.out) if config.out else run.graphs_folder
    files = graph_file.write(folder, traced.graph, pruned, naming, _limits(config))
    trace_view.show_graph(traced.graph, pruned, naming, config.paths)
    if column is not None:
        trace_view.show_effect(traced, naming, column, config.factor)
    if config.ablations:
        trace_view.show_agreement(traced, config.ablations)
    for path in files:
        print(f"graph           {path}", flush=True)
    return 0


def _is_text(prompt: str) -> bool:
    """Return whether a prompt can be written as UTF-8, which bytes of other encodings on a command line cannot."""
    try:
        prompt.encode()
    except UnicodeEncodeError:
        return False
    return True


def _model(config: TraceConfig, run: Run) -> Nanochat:
    """Load the model, in float32: bfloat16 is too coarse for graphs whose rows must add up."""
    model = run.model_path(checkpoint=config.checkpoint, step=config.step, tokenizer=config.tokenizer)
    nano = model.load(config.device)
    nano.model.float()
    return nano


def _tokens(config: TraceConfig, nano: Nanochat) -> Tensor:
    """Return the ids of the prompt with BOS, and check how many there are."""
    import torch

    from bridge.circuits.tracing import check_length

    ids = nano.tokenizer.encode(config.prompt, prepend_bos=True)
    check_length(len(ids), nano.config.sequence_len)
    return torch.tensor(ids, device=config.device)


def _limits(config: TraceConfig) -> Limits:
    from bridge.circuits.tracing import Limits

    return Limits(**flags.shared(Limits, config))


def _trace(config: TraceConfig, nano: Nanochat, transcoders: dict[str, TorchSAE], tokens: Tensor) -> Traced:
    """Check that the transcoders are of this model, and compute the graph."""
    from bridge.circuits import trace
    from bridge.compatibility import check_transcoders, known_fingerprint
    from bridge.selection import recorded_ids

    check_transcoders(nano.model, transcoders, known_fingerprint(nano, transcoders))
    untrained = {token for sae in transcoders.values() for token in recorded_ids(sae.metadata, nano.tokenizer)}
    return trace(
        nano.model,
        {hook: sae.float() for hook, sae in transcoders.items()},
        tokens,
        untrained=tuple(sorted(untrained)),
        measure=config.measure,
        limits=_limits(config),
    )


def _column(config: TraceConfig, traced: Traced) -> int | None:
    """Return the column of the node of --intervene; ValueError if it is not in the graph."""
    if config.intervene is None:
        return None
    return traced.replacement.column(*graph_names.parse_writer(config.intervene))


def _naming(config: TraceConfig, run: Run, nano: Nanochat, transcoders: dict[str, TorchSAE]) -> Naming:
    """Return the names of model, transcoders and latents in the files."""
    from bridge.circuits.graph_file import Naming, default_slug
    from bridge.hooks import depth
    from bridge.neuronpedia import ids
    from bridge.run.labels import Names
    from bridge.run.saes import exports_at
    from jsae.records.store import digest

    hooks = sorted(transcoders, key=depth)
    names = [Names.read(run.path, hook) for hook in hooks]
    digests = [digest(folder) for folder in exports_at(run.path)]
    width = max(sae.d_sae for sae in transcoders.values())
    return Naming(
        config.slug or default_slug(config.prompt),
        config.prompt,
        nano.tokenizer.token_bytes_of,
        config.model_id or ids.default_model(nano.config.n_layer, nano.fingerprint),
        config.source_set or ids.default_transcoder_set(width, digests),
        hooks,
        lambda layer, latent: names[layer].label(latent),
    )


def next_commands(config: TraceConfig) -> list[str]:
    """Return commands to test the graph against the model."""
    model = {name: getattr(config, name) for name in ("checkpoint", "step", "tokenizer")}
    return commands.after_tracing(Path(config.run_dir), config.prompt, bool(config.ablations), **model)


if __name__ == "__main__":
    flags.run(TraceConfig, main, after=next_commands)
