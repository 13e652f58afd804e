"""Attribution graphs of prompts with the transcoders of a run: computed, named, and put beside the explorer's page."""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from bridge.circuits import Graph, Pruned, Traced, graph_file, prune, trace
from bridge.circuits.graph_file import Naming, default_slug
from bridge.circuits.tracing import Limits, Measure, Node, check_length
from bridge.compatibility import check_transcoders, known_fingerprint
from bridge.explorer import graphs as shown
from bridge.explorer import page
from bridge.hooks import depth, hook_name
from bridge.nanochat import Nanochat
from bridge.neuronpedia import ids
from bridge.run import Run
from bridge.run.labels import Names
from bridge.run.saes import exports_at
from bridge.selection import recorded_ids
from bridge.torch_sae import TorchSAE
from jsae.records.store import StoreError, digest

EXPLORER_NODES, EXPLORER_EDGES = 0.97, 0.99
"""Thresholds of pruning for the explorer, whose sliders then show less."""
MOST_SHOWN = 2**16
"""Edges of a graph in the explorer; one with more is pruned as its file is."""


class Tracer:
    """The transcoders of a run on their nanochat, ready to trace prompts. The model is converted to float32.

    bfloat16 is too coarse for graphs whose rows must add up.

    Args:
      run: a run, or a folder of exported transcoders.
      nano: the model, with its tokenizer.
      transcoders: by the hook of their input, in the order of `Run.transcoders`.
      model_id: Neuronpedia's id of the model; None is made from its depth and fingerprint.
      source_set: its source set of the transcoders; None is made from their width and digests.

    Raises:
      ValueError: a layer has no transcoder, or they do not fit the model.
    """

    def __init__(
        self,
        run: Run,
        nano: Nanochat,
        transcoders: Mapping[str, TorchSAE],
        *,
        model_id: str | None = None,
        source_set: str | None = None,
    ):
        check_transcoders(nano.model, transcoders, known_fingerprint(nano, transcoders))
        self.run, self.nano = run, nano
        nano.model.float()
        self.transcoders = {hook: sae.float() for hook, sae in transcoders.items()}
        self.hooks = sorted(transcoders, key=depth)
        digests = dict(zip(transcoders, map(digest, exports_at(run.path)), strict=True))
        self._digests = [digests[hook] for hook in self.hooks]
        width = max(sae.d_sae for sae in transcoders.values())
        self._model_id = model_id or ids.default_model(nano.config.n_layer, nano.fingerprint)
        self._source_set = source_set or ids.default_transcoder_set(width, list(digests.values()))
        untrained = {token for sae in transcoders.values() for token in recorded_ids(sae.metadata, nano.tokenizer)}
        self._untrained = tuple(sorted(untrained))

    def trace(
        self,
        prompt: str,
        measure: Measure = "logit",
        limits: Limits | None = None,
        between: Callable[[], object] = lambda: None,
        node: Node | None = None,
    ) -> Traced:
        """Return the graph of a prompt, with BOS before it; see `bridge.circuits.trace`.

        Raises:
          ValueError: the prompt is longer than the model's context, there is no such `node`, or the graph does not fit
            into memory.
        """
        tokens = self.nano.tokenizer.encode(prompt, prepend_bos=True)
        check_length(len(tokens), self.nano.config.sequence_len)
        return trace(
            self.nano.model,
            self.transcoders,
            torch.tensor(tokens, device=self.nano.model.lm_head.weight.device),
            untrained=self._untrained,
            measure=measure,
            limits=limits,
            between=between,
            node=node,
        )

    def naming(self, prompt: str, slug: str | None = None) -> Naming:
        """Return the names of model, transcoders and latents in files; the labels are those that the run has now."""
        names = [Names.read(self.run.path, hook) for hook in self.hooks]
        return Naming(
            slug or default_slug(prompt),
            prompt,
            self.nano.tokenizer.token_bytes_of,
            self._model_id,
            self._source_set,
            self.hooks,
            lambda layer, latent: names[layer].label(latent),
            self._digests,
        )

    def document(self, prompt: str, measure: Measure, limits: Limits, between: Callable[[], object]) -> dict[str, Any]:
        """Return the graph of a prompt as the explorer shows it.

        Raises:
          ValueError: as `trace`.
        """
        traced = self.trace(prompt, measure, limits, between)
        return explorer_document(traced.graph, prune(traced.graph), self.naming(prompt), limits)


def tracer(run: Run, nano: Nanochat, saes: Mapping[str, TorchSAE]) -> Tracer | None:
    """Return the tracer of a run that has transcoders of all layers, else None."""
    layers = {hook_name(layer, "mlp_in") for layer in range(nano.config.n_layer)}
    written = (sae.metadata.get("hook_name_out") for sae in saes.values())
    if not all(sae.is_transcoder for sae in saes.values()) or set(saes) != layers:
        return None
    return Tracer(run, nano, saes) if all("hook_mlp_out" in str(name or "hook_mlp_out") for name in written) else None


def explorer_document(graph: Graph, pruned: Pruned, naming: Naming, limits: Limits) -> dict[str, Any]:
    """Return a graph for the explorer: pruned less than the file `pruned`, to whose thresholds its sliders are set."""
    nodes, edges = max(pruned.node_threshold, EXPLORER_NODES), max(pruned.edge_threshold, EXPLORER_EDGES)
    wide = prune(graph, nodes, edges)
    if int(wide.edges.sum()) > MOST_SHOWN:
        wide = pruned
    document = graph_file.document(graph, wide, naming, limits, "neuronpedia")
    document["metadata"]["pruning_settings"] = {
        "node_threshold": pruned.node_threshold,
        "edge_threshold": pruned.edge_threshold,
    }
    return document


@dataclasses.dataclass(frozen=True)
class Written:
    """The files of a graph for other tools, and its address in the explorer, if it is shown there."""

    files: list[Path]
    address: str | None


def write(graph: Graph, pruned: Pruned, naming: Naming, limits: Limits, run: Run, out: Path | None = None) -> Written:
    """Write the files of a graph, and put it beside the explorer's page of its run.

    Args:
      graph: the graph.
      pruned: what the files keep.
      naming: names in the files.
      limits: of the graph.
      run: the run of the transcoders.
      out: a folder for the files instead of the run, which is then not written to.

    Raises:
      ValueError: as `bridge.circuits.graph_file.write` and `bridge.explorer.graphs.add`.
      OSError: a file cannot be written.
    """
    files = graph_file.write(out or run.graphs_folder, graph, pruned, naming, limits)
    if out is not None:
        return Written(files, None)
    shown.add(run, explorer_document(graph, pruned, naming, limits))
    if not page.is_current(run):
        _write_page(run)
    return Written(files, f"{run.page_file.resolve().as_uri()}#view=graph&graph={naming.slug}")


def _write_page(run: Run) -> None:
    """Write the page of a run that has none of this version; records that do not fit its SAEs are left out."""
    with run.held():
        try:
            page.write(run.path)
        except StoreError:
            page.write(run.path, ())
