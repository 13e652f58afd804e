"""Export records as feature files for the attribution graphs of circuit-tracer 0.5. numpy only.

Its pages identify a feature by the Cantor pairing of layer and latent, and read it in one of two ways:

    SCAN/{pairing}.json                  local server: the scan is "./data/SCAN", and SCAN is in the server's data_dir
    SCAN/features/index.json.gz          hub: the scan is "owner/name//SCAN", and SCAN is a folder of the repository;
    SCAN/features/layer_{L}.bin          read by byte ranges, each the length (uint32) and gzipped JSON of a feature

A graph whose layers have several hooks lists the scan of each in `transcoder_list`.
"""

import gzip
import json
import re
import struct
from pathlib import Path
from typing import Any

import numpy as np

from bridge.graph_names import pairing, token_text
from jsae import files
from jsae.records.store import NON_ACTIVATING, TOP, Store, StoreError, digest


def write(
    store: Store,
    sae_dir: Path,
    out: Path,
    *,
    scan: str | None = None,
    context: int = 32,
) -> list[Path]:
    """Write the features of an SAE for circuit-tracer's pages, atomically.

    Earlier files are replaced; other files in the folder of the scan are kept.

    Args:
      store: the records.
      sae_dir: the export of the same SAE.
      out: the parent folder of the scan: the `data_dir` of circuit-tracer's server, or a folder to upload.
      scan: name of the scan's folder; default: the hook's name.
      context: number of tokens on each side of an example's strongest token.

    Returns:
      The paths of the files.

    Raises:
      StoreError: the records are of another SAE, or damaged.
      ValueError: scan is not a valid folder name, or context is negative.
      OSError: the files cannot be written, for example because the disk is full; earlier files remain.
    """
    scan = store.header.hook if scan is None else scan
    if not re.fullmatch(r"[A-Za-z0-9_][\w.-]*", scan, re.ASCII):
        raise ValueError(f"scan {scan!r} is not a valid folder name: give letters, digits, '.', '_' and '-'")
    if context < 0:
        raise ValueError(f"context must not be negative, got {context}")
    if digest(Path(sae_dir)) != store.header.sae_sha256:
        raise StoreError(f"the records at {store.path} are not of {sae_dir}")
    folder = Path(out) / scan
    with files.replacing_folder(folder, keep=_is_foreign) as partial:
        names = _write(store, partial, scan, context)
    return [folder / name for name in names]


def _is_foreign(file: Path) -> bool:
    """Return whether a file in the scan's folder does not come from `write`."""
    return not re.fullmatch(r"[0-9][^/]*\.json|features/(layer_[^/]*\.bin|index\.json\.gz)", file.as_posix())


def _write(store: Store, folder: Path, scan: str, context: int) -> list[str]:
    """Write the files into an empty folder; return their names."""
    layer, names, offsets = store.header.layer, [], [0]
    packed, index = f"features/layer_{layer}.bin", "features/index.json.gz"
    (folder / "features").mkdir()
    with (folder / packed).open("wb") as file:
        for latent in range(store.header.d_sae):
            text = _json(feature(store, latent, scan, context), store.path)
            names.append(f"{pairing(layer, latent)}.json")
            (folder / names[-1]).write_text(text, encoding="utf-8")
            part = gzip.compress(text.encode(), 6, mtime=0)  # level 9 takes twenty times as long and saves 5 %
            file.write(struct.pack("<I", len(part)) + part)
            offsets.append(file.tell())
    entry = {str(layer): {"filename": Path(packed).name, "offsets": offsets}}
    (folder / index).write_bytes(gzip.compress(json.dumps(entry).encode(), mtime=0))
    return [*names, packed, index]


def _json(entry: dict[str, Any], path: Path) -> str:
    """Return a feature as JSON. Raises StoreError for a number that is not finite."""
    try:
        return json.dumps(entry, ensure_ascii=False, allow_nan=False)
    except ValueError as error:
        raise StoreError(f"the records of latent {entry['index']} at {path} are not finite ({error})") from error


def feature(store: Store, latent: int, scan: str, context: int = 32) -> dict[str, Any]:
    """Return a latent in the format of circuit-tracer's pages, without examples that do not activate it."""
    count = int(store["count"][latent])
    low, high = map(float, store["hist_range"][latent]) if count else (0.0, 0.0)
    return {
        "transcoder_id": scan,
        "index": latent,
        "examples_quantiles": _quantiles(store, latent, context),
        "top_logits": _logits(store, "top", latent),
        "bottom_logits": _logits(store, "bottom", latent),
        "act_min": _rounded(low),
        "act_max": _rounded(high),
        "quantile_values": percentiles(store["hist"][latent], low, high),
        "histogram": [float(bar) for bar in store["hist"][latent]],
        "activation_frequency": count / max(store.header.tokens, 1),
    }


def percentiles(hist: np.ndarray, low: float, high: float) -> list[float]:
    """Return the 1st to the 100th percentile of activations, interpolated in their histogram; [] if it is empty.

    Args:
      hist: counts of equal bins from `low` to `high`.
      low: smallest activation.
      high: largest activation.
    """
    total = int(hist.sum())
    if total == 0:
        return []
    ranks = np.arange(1, 101) / 100 * total
    cumulative = np.cumsum(hist, dtype=np.int64)
    bins = np.searchsorted(cumulative, ranks)
    fractions = 1 - (cumulative[bins] - ranks) / hist[bins]
    return [_rounded(value) for value in low + (bins + fractions) * (high - low) / len(hist)]


def _quantiles(store: Store, latent: int, context: int) -> list[dict[str, Any]]:
    """Return the examples by group, the strongest first."""
    edges = np.linspace(float(store["max"][latent]), 0, 6)
    groups: dict[int, list[dict[str, Any]]] = {}
    for example in store.examples(latent):
        group = int(store["example_group"][example])
        if group != NON_ACTIVATING:
            groups.setdefault(group, []).append(_example(store, example, context))
    return [
        {
            "quantile_name": "Top activations"
            if group == TOP
            else f"Interval {group} of 5: {edges[group]:.3g} to {edges[group - 1]:.3g}",
            "examples": examples,
        }
        for group, examples in sorted(groups.items())
    ]


def _example(store: Store, example: int, context: int) -> dict[str, Any]:
    """Return the tokens around an example's strongest token, with the activation of each."""
    row = store.texts.tokens[int(store["example_row"][example])]
    center = int(store["example_position"][example])
    values = np.zeros(len(row), np.float32)
    positions, activations = store.activations(example)
    values[positions] = activations
    start, stop = max(center - context, 0), center + context + 1
    return {
        "tokens": [token_text(store.texts.vocabulary[i]) for i in row[start:stop].tolist()],
        "tokens_acts_list": [_rounded(value) for value in values[start:stop].tolist()],
        "train_token_ind": center - start,
        "is_repeated_datapoint": False,  # the records contain every text once
    }


def _logits(store: Store, side: str, latent: int) -> list[str]:
    ids, values = store[f"{side}_logits"][latent], store[f"{side}_logit_values"][latent]
    return [token_text(store.texts.vocabulary[i]) for i in ids[~np.isnan(values)].tolist()]


def _rounded(value: float | np.floating) -> float:
    """Round to four significant digits, more than a page shows."""
    return float(f"{value:.4g}")
