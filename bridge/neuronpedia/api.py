"""Features as the public upload takes them: windows of text, rounded numbers, and of dead latents nothing."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bridge.neuronpedia.rows import Context, Latent, Latents
from bridge.run.labels import Names
from jsae.records.store import Store

WINDOW = 64
"""Tokens of a text: requests are limited by bytes, and no page shows more than some tens of tokens at first."""
LONGEST_EXPLANATION = 512
"""In units of UTF-16, as the server counts."""


def api_features(store: Store, sae_dir: Path, names: Names) -> Iterator[dict[str, Any]]:
    """The living latents one by one, as `features` of an upload's body wants them.

    Args:
      store: the records.
      sae_dir: the export they are of.
      names: people's and automatic labels; they become explanations of no method and model.

    Raises:
      FileNotFoundError, StoreError: no export, or records of another; when the first is asked for.
    """
    latents = Latents(store, sae_dir, shown=WINDOW)
    for i in range(len(latents)):
        latent = latents[i]
        if latent.contexts:
            yield _feature(latent, names.label(i))


def _feature(latent: Latent, label: str) -> dict[str, Any]:
    tables = latent.tables
    return {
        "index": latent.index,
        "density": _four(tables["frac_nonzero"]),
        "topLogits": _logits(tables["pos_str"], tables["pos_values"]),
        "bottomLogits": _logits(tables["neg_str"], tables["neg_values"]),
        "explanations": [{"text": _cut(label)}] if label else [],
        "activations": [_activation(context) for context in latent.contexts],
    }


def _activation(context: Context) -> dict[str, Any]:
    """A text with its interval; the group of the strongest has none, and -1 would be refused as a share."""
    interval = (context.high, context.low, context.share) if context.share >= 0 else (None, None, None)
    names = ("quantileMax", "quantileMin", "quantileFraction")
    values = [_four(value) if value else 0 for value in context.values]
    return {"tokens": context.tokens, "values": values, **dict(zip(names, interval, strict=True))}


def _logits(tokens: list[str], values: list[float]) -> list[dict[str, Any]]:
    return [{"token": token, "value": _four(value)} for token, value in zip(tokens, values, strict=True)]


def _four(value: float) -> float:
    """Four significant digits: half the bytes of a body are digits."""
    return float(f"{value:.4g}")


def _cut(label: str) -> str:
    """The label, at most as long as the server takes."""
    if len(label.encode("utf-16-le", "surrogatepass")) // 2 <= LONGEST_EXPLANATION:
        return label
    kept = label.encode("utf-16-le", "surrogatepass")[: 2 * (LONGEST_EXPLANATION - 1)]
    return kept.decode("utf-16-le", "ignore") + "…"
