"""Features in the format of the public upload: windows of text and rounded numbers, without dead latents."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bridge.neuronpedia.rows import Context, Latent, Latents
from bridge.run.labels import Names
from jsae.records.store import Store

WINDOW = 64
"""Tokens per text. The size of requests is limited, and pages show only a few dozen tokens at first."""
LONGEST_EXPLANATION = 512
"""Limit in UTF-16 code units, which the server counts."""


def api_features(store: Store, sae_dir: Path, names: Names) -> Iterator[dict[str, Any]]:
    """Yield the alive latents as elements of `features` in the body of an upload.

    Args:
      store: the records.
      sae_dir: the export of the same SAE.
      names: manual and automatic labels, which become explanations without method and model; with how often latents
        recur in other seeds, where that is known.

    Raises:
      FileNotFoundError, StoreError: there is no export, or the records are of another SAE; raised at the first latent.
    """
    latents = Latents(store, sae_dir, shown=WINDOW)
    for i in range(len(latents)):
        latent = latents[i]
        if latent.contexts:
            yield _feature(latent, names.description(i))


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
    """Return a text with the interval of its group; null for the strongest, because the server refuses -1."""
    interval = (context.high, context.low, context.share) if context.share >= 0 else (None, None, None)
    names = ("quantileMax", "quantileMin", "quantileFraction")
    values = [_four(value) if value else 0 for value in context.values]
    return {"tokens": context.tokens, "values": values, **dict(zip(names, interval, strict=True))}


def _logits(tokens: list[str], values: list[float]) -> list[dict[str, Any]]:
    return [{"token": token, "value": _four(value)} for token, value in zip(tokens, values, strict=True)]


def _four(value: float) -> float:
    """Round to four significant digits, because half of a body consists of digits."""
    return float(f"{value:.4g}")


def _cut(label: str) -> str:
    """Return a label, cut to the length that the server accepts."""
    if len(label.encode("utf-16-le", "surrogatepass")) // 2 <= LONGEST_EXPLANATION:
        return label
    prefix = label.encode("utf-16-le", "surrogatepass")[: 2 * (LONGEST_EXPLANATION - 1)]
    return prefix.decode("utf-16-le", "ignore") + "…"
