"""Check graph files: what Neuronpedia's schema requires, and what its page and circuit-tracer's stumble over."""

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

from bridge.graph_names import NAME, unpairing
from jsae import jsons

FEATURE, ERROR, TOKEN, LOGIT = "cross layer transcoder", "mlp reconstruction error", "embedding", "logit"
"""Types of nodes; that of features is used for per-layer transcoders too."""
SMALLEST_FILE, LARGEST_FILE = 1024, 100 * 2**20
"""Bytes of a file that Neuronpedia accepts."""
_LOGIT_LABEL = re.compile(r'"(?s:.*)" \(p=[0-9.]+\)$')
_LARGEST_EXACT = 2**53
_Fields = Mapping[str, tuple[type, ...]]
_TEXT, _WHOLE, _NUMBER = (str,), (int,), (int, float)
_METADATA: _Fields = {"slug": _TEXT, "scan": _TEXT, "prompt": _TEXT, "prompt_tokens": (list,)}
_NODE: _Fields = {
    **dict.fromkeys(("node_id", "feature_type", "jsNodeId", "clerp"), _TEXT),
    "ctx_idx": _WHOLE,
    "layer": (str, int),
    "feature": (int, type(None)),
}
_OPTIONAL: _Fields = {
    "influence": (int, float, type(None)),
    "activation": (int, float, type(None)),
    "token_prob": _NUMBER,
}
_LINK: _Fields = {"source": _TEXT, "target": _TEXT, "weight": _NUMBER}


def check(document: Any) -> None:
    """Check a graph of this project.

    Raises:
      ValueError: a page or an upload would refuse it, or show it wrongly; says the first thing that is wrong.
    """
    if (problem := next(problems(document), None)) is not None:
        raise ValueError(f"the graph cannot be shown: {problem}")


def problems(document: Any) -> Iterator[str]:
    """Yield what is wrong with a graph, in one line each; `document` is any JSON value."""
    shape = list(_shape(document))
    if shape:
        yield from shape
        return
    metadata, nodes, links = document["metadata"], document["nodes"], document["links"]
    yield from _metadata(metadata)
    by_id = {node["node_id"]: node for node in nodes}
    if len(by_id) < len(nodes):
        yield "two nodes have the same id"
    if len({(node["jsNodeId"], node["ctx_idx"]) for node in nodes}) < len(nodes):
        yield "two nodes have the same jsNodeId at a position"
    for node in nodes:
        yield from (f"{_shown(node['node_id'])}: {problem}" for problem in _node(node, metadata))
    yield from _whole(nodes, len(metadata["prompt_tokens"]))
    yield from _links(links, by_id)
    yield from _view(document["qParams"], by_id)


def _shape(document: Any) -> Iterator[str]:
    """Yield fields that are missing or of another type."""
    if not isinstance(document, Mapping):
        yield f"a graph is an object, not a {type(document).__name__}"
        return
    for name, kind in (("metadata", dict), ("qParams", dict), ("nodes", list), ("links", list)):
        if not isinstance(document.get(name), kind):
            yield f"{name} is missing, or no {kind.__name__}"
    if isinstance(metadata := document.get("metadata"), dict):
        yield from _fields("metadata", metadata, _METADATA)
        tokens = metadata.get("prompt_tokens")
        if isinstance(tokens, list) and not all(isinstance(token, str) for token in tokens):
            yield "prompt_tokens are not all text"
    for name, fields in (("nodes", _NODE), ("links", _LINK)):
        for number, item in enumerate(document[name] if isinstance(document.get(name), list) else ()):
            if isinstance(item, dict):
                yield from _fields(f"{name}[{number}]", item, fields)
                yield from _fields(f"{name}[{number}]", item, {key: _OPTIONAL[key] for key in _OPTIONAL if key in item})
            else:
                yield f"{name}[{number}] is no object"


def _fields(place: str, item: Mapping[str, Any], fields: _Fields) -> Iterator[str]:
    for name, kinds in fields.items():
        value = item.get(name, ...)
        if not isinstance(value, kinds) or isinstance(value, bool):
            yield f"{place}: {name} is missing, or not {' or '.join(kind.__name__ for kind in kinds)}"
        elif isinstance(value, float) and not jsons.is_finite(value):
            yield f"{place}: {name} is not finite"


def _metadata(metadata: Mapping[str, Any]) -> Iterator[str]:
    for name in ("slug", "scan"):
        if not NAME.fullmatch(metadata[name]):
            yield f"{name} {_shown(metadata[name])}: give at most 128 of letters, digits, '_', '.' and '-'"
    if len(metadata["prompt_tokens"]) < 2:
        yield "it has a prompt of fewer than two tokens, of which circuit-tracer's page shows nothing"
    if metadata.get("schema_version") != 1:
        yield "schema_version is not 1, so ids of features are not read as Cantor pairings"


def _node(node: Mapping[str, Any], metadata: Mapping[str, Any]) -> Iterator[str]:
    kind, length = node["feature_type"], len(metadata["prompt_tokens"])
    if kind not in (FEATURE, ERROR, TOKEN, LOGIT):
        yield f"feature_type {_shown(kind)} is unknown to the pages"
    if not 0 <= node["ctx_idx"] < length:
        yield f"position {_shown(node['ctx_idx'])} is outside the prompt"
    if kind in (FEATURE, ERROR) and not _is_layer(node["layer"]):
        yield f"layer {_shown(node['layer'])} is no number"
    elif kind == FEATURE:
        yield from _feature(node)
    if kind == LOGIT and not _LOGIT_LABEL.search(node["clerp"]):
        yield 'the label of a logit must end with "TOKEN" (p=0.123): the pages read it'
    if kind == LOGIT and node["ctx_idx"] != length - 1:
        yield "it is a logit that is not at the last position"
    influence, threshold = node.get("influence"), metadata.get("node_threshold")
    if influence is not None and not 0 <= influence <= 1 + 1e-6:
        yield f"influence {_shown(influence)} is no cumulative share from 0 to 1"
    if kind in (FEATURE, ERROR) and isinstance(threshold, int | float) and (influence or 0) > threshold:
        yield f"influence {_shown(influence)} is above node_threshold {threshold}, so the pages hide it"


def _feature(node: Mapping[str, Any]) -> Iterator[str]:
    number = node["feature"]
    if number is None or not 0 <= number < _LARGEST_EXACT:
        yield f"feature {_shown(number)} is no number that JavaScript counts exactly"
        return
    layer, latent = unpairing(number)
    if str(node["layer"]) != str(layer) or node["node_id"] != f"{layer}_{latent}_{node['ctx_idx']}":
        yield f"feature {number} is latent {latent} of layer {layer}, which its id or layer contradicts"


def _whole(nodes: list[Any], length: int) -> Iterator[str]:
    inner = [
        int(node["layer"]) for node in nodes if node["feature_type"] in (FEATURE, ERROR) and _is_layer(node["layer"])
    ]
    if max(inner, default=0) < 1:
        yield "no feature or error above layer 0 is left, which Neuronpedia's page cannot draw: raise node_threshold"
    if sum(node["feature_type"] == TOKEN for node in nodes) != length:
        yield "there is not one node per token of the prompt"
    total = sum(node.get("token_prob", 0) for node in nodes if node["feature_type"] == LOGIT)
    if not 0 < total <= 1 + 1e-5:
        yield f"the probabilities of the logits (token_prob) sum to {total}"


def _links(links: list[Any], by_id: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    seen = set()
    for link in links:
        ends = source, target = link["source"], link["target"]
        name = f"{_shown(source)} -> {_shown(target)}"
        if ends in seen:
            yield f"{name} is there twice"
        seen.add(ends)
        if source not in by_id or target not in by_id:
            yield f"{name}: no such node, so the pages drop it"
        elif _depth(by_id[source]) >= _depth(by_id[target]):
            yield f"{name} does not lead upwards, so influence may not converge"
        elif by_id[source]["ctx_idx"] > by_id[target]["ctx_idx"]:
            yield f"{name} leads back in time"


def _view(view: Mapping[str, Any], by_id: Mapping[str, Any]) -> Iterator[str]:
    """Yield what is wrong with a saved view: its nodes must exist, in lists, though circuit-tracer saves text."""
    pinned, groups = view.get("pinnedIds", []), view.get("supernodes", [])
    if not isinstance(pinned, list) or not isinstance(groups, list) or not all(isinstance(g, list) for g in groups):
        yield "pinnedIds and supernodes of qParams are not lists"
        return
    for name in [*pinned, *(name for group in groups for name in group[1:])]:
        if not isinstance(name, str) or name not in by_id:
            yield f"qParams name {_shown(name)}, which is no node"


def _is_layer(layer: str | int) -> bool:
    return re.fullmatch(r"[0-9]{1,6}", str(layer), re.ASCII) is not None


def _depth(node: Mapping[str, Any]) -> float:
    outer = {TOKEN: -1.0, LOGIT: math.inf}
    if node["feature_type"] in outer:
        return outer[node["feature_type"]]
    return float(node["layer"]) if _is_layer(node["layer"]) else math.nan


def _shown(value: object) -> str:
    return repr(value)[:60]
