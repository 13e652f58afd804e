"""Write attribution graphs for circuit-tracer's pages and for Neuronpedia.

    FOLDER/circuit_tracer/SLUG.json, graph-metadata.json     its server's data_dir; features are in HOOK/ beside them
    FOLDER/neuronpedia/SLUG.json                             for an upload

The two differ only in `scan`, by which each finds the pages of features. The same graph always gives the same bytes.
"""

import dataclasses
import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch

import jsae
from bridge.circuits import graph_check
from bridge.circuits.graph import Graph, Node
from bridge.circuits.graph_check import ERROR, FEATURE, LOGIT, TOKEN
from bridge.circuits.scores import Pruned
from bridge.circuits.tracing import Limits
from bridge.graph_names import check_slug, pairing, token_text
from jsae import files, jsons

Site = Literal["circuit_tracer", "neuronpedia"]
SITES: tuple[Site, ...] = ("circuit_tracer", "neuronpedia")
INDEX = "graph-metadata.json"
"""The list of graphs that circuit-tracer's server shows."""
_TYPES = {"feature": FEATURE, "error": ERROR, "token": TOKEN, "logit": LOGIT}
_LONGEST_SLUG = 48


@dataclasses.dataclass(frozen=True)
class Naming:
    """Names in the files of a graph.

    Attributes:
      slug: of the graph, and of its file.
      prompt: the text.
      pieces: returns the bytes of a token id.
      model: Neuronpedia's id of the model.
      source_set: Neuronpedia's source set of the transcoders; a feature is shown as `LAYER-SOURCE_SET`.
      scans: folders of the features of each layer for circuit-tracer's server (`bridge.circuit_tracer`).
      label: returns the label of a latent of a layer, "" without one.
      digests: of the transcoders by layer (`jsae.records.store.digest`), by which the explorer finds their records.
      creator: name of the graph's creator.

    Raises:
      ValueError: a name that an upload would refuse.
    """

    slug: str
    prompt: str
    pieces: Callable[[int], bytes]
    model: str
    source_set: str
    scans: Sequence[str]
    label: Callable[[int, int], str] = lambda layer, latent: ""
    digests: Sequence[str] = ()
    creator: str = "jsae"

    def __post_init__(self) -> None:
        check_slug(self.slug)


def default_slug(prompt: str) -> str:
    """Return a name for the graph of a prompt: what can be read of it, and a hash."""
    words = re.sub(r"[^A-Za-z0-9_]+", "-", prompt).strip("-")[:_LONGEST_SLUG].rstrip("-")
    return f"{words or 'graph'}-{hashlib.sha256(prompt.encode(errors='surrogatepass')).hexdigest()[:8]}"


def write(folder: Path, graph: Graph, pruned: Pruned, naming: Naming, limits: Limits) -> list[Path]:
    """Write a pruned graph for both sites, and list it in the index of circuit-tracer's server; return the paths.

    Raises:
      ValueError: a page could not show the graph (`graph_check.check`), the file would be too large for Neuronpedia, or
        the index that is there is broken.
      OSError: a file cannot be written.
    """
    documents = {site: document(graph, pruned, naming, limits, site) for site in SITES}
    texts = {site: json.dumps(content, ensure_ascii=False, allow_nan=False) for site, content in documents.items()}
    for site in SITES:
        graph_check.check(documents[site])
        size = len(texts[site].encode(errors="replace"))
        if not graph_check.SMALLEST_FILE <= size <= graph_check.LARGEST_FILE:
            raise ValueError(
                f"the graph would have {size:,} bytes, and Neuronpedia takes {graph_check.SMALLEST_FILE:,} to "
                f"{graph_check.LARGEST_FILE:,}: lower the thresholds of nodes or edges if it is too large"
            )
    index = _index(folder / "circuit_tracer" / INDEX, documents["circuit_tracer"]["metadata"])
    paths = [folder / site / f"{naming.slug}.json" for site in SITES]
    for site, path in zip(SITES, paths, strict=True):
        path.parent.mkdir(parents=True, exist_ok=True)
        files.write(path, texts[site])
    files.write(folder / "circuit_tracer" / INDEX, index)
    return paths


def document(graph: Graph, pruned: Pruned, naming: Naming, limits: Limits, site: Site) -> dict[str, Any]:
    """Return a graph in the format of circuit-tracer and Neuronpedia: metadata, qParams, nodes and links.

    The pages hide nodes whose influence is above `node_threshold`, as that of the last node that reaches it may be: the
    file states the largest influence of its features and errors.
    """
    columns = pruned.sources.nonzero()[:, 0].tolist()
    rows = range(graph.feature_count, len(graph.matrix))
    nodes = [_source(graph, pruned, naming, column) for column in columns]
    nodes += [_logit(graph, naming, row) for row in rows]
    nodes.sort(key=_order)
    shown = max(
        [pruned.node_threshold, *(node["influence"] for node in nodes if node["feature_type"] in (FEATURE, ERROR))]
    )
    return {
        "metadata": _metadata(graph, pruned, naming, limits, site) | {"node_threshold": shown},
        "qParams": {"pinnedIds": [], "supernodes": [], "linkType": "both", "clickedId": "", "sg_pos": ""},
        "nodes": nodes,
        "links": _links(graph, pruned),
    }


def _metadata(graph: Graph, pruned: Pruned, naming: Naming, limits: Limits, site: Site) -> dict[str, Any]:
    on_site = site == "neuronpedia"
    return {
        "slug": naming.slug,
        "scan": naming.model if on_site else f"custom-{naming.model}",
        "transcoder_list": [] if on_site else [f"./data/{scan}" for scan in naming.scans],
        "prompt_tokens": [token_text(naming.pieces(token)) for token in graph.tokens],
        "prompt": naming.prompt,
        "schema_version": 1,
        "sae_sha256": list(naming.digests),
        "feature_details": {"neuronpedia_source_set": naming.source_set},
        "info": {
            "description": f"Attribution graph of {naming.model} from transcoders of its {graph.layers} layers",
            "creator_name": naming.creator,
            "generator": {"name": "jsae", "version": jsae.__version__, "url": ""},
            "neuronpedia_source_set": naming.source_set,
        },
        "generation_settings": {
            "max_n_logits": limits.max_logits,
            "desired_logit_prob": limits.logit_probability,
            "batch_size": limits.batch_size or 0,
            "max_feature_nodes": limits.max_features,
        },
        "pruning_settings": {"node_threshold": pruned.node_threshold, "edge_threshold": pruned.edge_threshold},
    }


def _source(graph: Graph, pruned: Pruned, naming: Naming, column: int) -> dict[str, Any]:
    """Return a feature, an error or a token."""
    node = graph.source(column)
    text = token_text(naming.pieces(graph.tokens[node.position]))
    layer, index = node.layer, node.index
    if node.kind == "feature":
        places = (f"{layer}_{index}-0", str(layer), pairing(layer, index), naming.label(layer, index))
    elif node.kind == "error":
        places = (f"{layer}_-1-0", str(layer), -1, f'Err: mlp "{text}"')
    else:
        places = (f"E_{index}-{node.position}", "E", node.position, f'Emb: "{text}"')
    activation = _rounded(graph.activations[column]) if node.kind == "feature" else None
    return _node(graph, node, *places, influence=_rounded(pruned.influence[column]), activation=activation)


def _logit(graph: Graph, naming: Naming, row: int) -> dict[str, Any]:
    """Return the node of an explained token."""
    node = graph.target(row)
    place = row - graph.feature_count
    probability = float(graph.probabilities[place])
    label = f'Output "{token_text(naming.pieces(node.index))}" (p={probability:.3f})'
    layer = str(graph.layers + 1)
    more = {"token_prob": _rounded(graph.probabilities[place]), "is_target_logit": place == 0}
    return _node(graph, node, f"L_{node.index}-{node.position}", layer, node.index, label) | more


def _node(
    graph: Graph,
    node: Node,
    js_id: str,
    layer: str,
    feature: int,
    label: str,
    influence: float | None = None,
    activation: float | None = None,
) -> dict[str, Any]:
    """Return a node with all keys that the pages read."""
    return {
        "node_id": node.node_id(graph.layers),
        "jsNodeId": js_id,
        "feature": feature,
        "layer": layer,
        "ctx_idx": node.position,
        "feature_type": _TYPES[node.kind],
        "clerp": label,
        "influence": influence,
        "activation": activation,
        "token_prob": 0.0,
        "is_target_logit": False,
        "run_idx": 0,
        "reverse_ctx_idx": 0,
    }


def _order(node: Mapping[str, Any]) -> tuple[int, int, int, str]:
    """Sort tokens first, then upwards by layer and position."""
    kinds = {TOKEN: 0, LOGIT: 2}
    layer = int(node["layer"]) if node["layer"] != "E" else 0
    return kinds.get(node["feature_type"], 1), layer, node["ctx_idx"], node["node_id"]


def _links(graph: Graph, pruned: Pruned) -> list[dict[str, Any]]:
    rows, columns = pruned.edges.nonzero(as_tuple=True)
    weights = graph.matrix[rows, columns].tolist()
    sources = {column: graph.source(column).node_id(graph.layers) for column in set(columns.tolist())}
    targets = {row: graph.target(row).node_id(graph.layers) for row in set(rows.tolist())}
    places = zip(rows.tolist(), columns.tolist(), weights, strict=True)
    return [{"source": sources[c], "target": targets[r], "weight": float(f"{w:.6g}")} for r, c, w in places]


def _index(path: Path, metadata: Mapping[str, Any]) -> str:
    """Return the index with this graph, whose entry replaces one of the same slug.

    Raises:
      ValueError: the file that is there is no index.
    """
    known = []
    if path.is_file():
        index = jsons.read(path)
        known = index.get("graphs") if isinstance(index, dict) else None
        if not isinstance(known, list) or not all(isinstance(entry, dict) for entry in known):
            raise ValueError(f"{path} is no list of graphs: move it away")
    others = [entry for entry in known if entry.get("slug") != metadata["slug"]]
    return json.dumps({"graphs": [*others, metadata]}, ensure_ascii=False)


def _rounded(value: torch.Tensor) -> float:
    """Round to six significant digits."""
    return float(f"{float(value):.6g}")
