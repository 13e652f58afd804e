"""A small attribution graph on hostile text, with features of the toy run's latents, always the same."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import explorer_toy as toy

from bridge.graph_names import pairing
from jsae.records.store import digest

LAYERS = 3
TOKENS = ["<|bos|>", "<script>alert(1)</script>", " cat", "⏎"]
HOOKS = [f"blocks.{layer}.ln2.hook_normalized" for layer in range(LAYERS)]
BOS, SCRIPT, CAT, LINE = "E_18_0", "E_8_1", "E_1_2", "E_5_3"
LOW, FIRES, HOSTILE, TOP, ERROR = "0_2_2", "1_0_2", "1_3_1", "2_3_3", "0_-1_1"
LOGIT, OTHER = "4_1_3", "4_8_3"
WEIGHTS = {
    (CAT, LOW): 2.0,
    (SCRIPT, LOW): -1.0,
    (LOW, FIRES): 3.0,
    (CAT, FIRES): 1.0,
    (SCRIPT, HOSTILE): 4.0,
    (ERROR, HOSTILE): 1.0,
    (FIRES, TOP): 1.5,
    (HOSTILE, TOP): -0.5,
    (LINE, TOP): 0.25,
    (TOP, LOGIT): 2.0,
    (FIRES, LOGIT): 1.0,
    (BOS, LOGIT): -0.5,
    (TOP, OTHER): 0.5,
    (HOSTILE, OTHER): 1.0,
}
INFLUENCE = {LOW: 0.7, FIRES: 0.5, HOSTILE: 0.85, TOP: 0.3, ERROR: 0.95}


def write_run(run: Path) -> Path:
    """Write records at the inputs of the MLPs of all layers, as transcoders have them."""
    for layer, hook in enumerate(HOOKS):
        toy.write_store(run, hook, seed=layer)
    return run


def digests(run: Path) -> list[str]:
    """Return the digests of the exports, by layer."""
    return [digest(run / "sae" / hook) for hook in HOOKS]


def document(sae_sha256: Sequence[str] = (), slug: str = "toy") -> dict[str, Any]:
    """Return the graph in Neuronpedia's format; `graph_check` accepts it."""
    nodes = [
        *(
            _node(name, "embedding", "E", i, i, f'Emb: "{TOKENS[i]}"')
            for i, name in enumerate((BOS, SCRIPT, CAT, LINE))
        ),
        *(_feature(name) for name in (LOW, FIRES, HOSTILE, TOP)),
        _node(ERROR, "mlp reconstruction error", "0", 1, -1, "Err: mlp"),
        _node(LOGIT, "logit", "4", 3, 1, 'Output " cat" (p=0.600)', token_prob=0.6),
        _node(OTHER, "logit", "4", 3, 8, f'Output "{TOKENS[1]}" (p=0.200)', token_prob=0.2),
    ]
    metadata = {
        "slug": slug,
        "scan": "toy",
        "prompt": "<script>alert(1)</script> cat\n",
        "prompt_tokens": TOKENS,
        "schema_version": 1,
        "node_threshold": 1.0,
        "sae_sha256": list(sae_sha256),
        "pruning_settings": {"node_threshold": 0.9, "edge_threshold": 0.98},
    }
    links = [{"source": source, "target": target, "weight": w} for (source, target), w in WEIGHTS.items()]
    return {"metadata": metadata, "qParams": {}, "nodes": nodes, "links": links}


def _feature(name: str) -> dict[str, Any]:
    layer, latent, position = map(int, name.split("_"))
    more = {"activation": 1.5 * (layer + 1), "influence": INFLUENCE[name]}
    label = f"<b>label {latent}</b>"
    return _node(name, "cross layer transcoder", str(layer), position, pairing(layer, latent), label, **more)


def _node(name: str, kind: str, layer: str, position: int, feature: int, label: str, **more: Any) -> dict[str, Any]:
    fields = {"influence": INFLUENCE.get(name), "activation": None, "token_prob": 0.0}
    return {
        "node_id": name,
        "jsNodeId": f"{name}-0",
        "feature": feature,
        "layer": layer,
        "ctx_idx": position,
        "feature_type": kind,
        "clerp": label,
        **fields,
        **more,
    }
