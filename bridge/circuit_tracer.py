"""Feature files for the pages of circuit-tracer 0.5 (its attribution graphs), from the records. numpy only.

Its pages name a feature by the Cantor pairing of layer and latent, and read it in one of two ways:

    SCAN/{pairing}.json                  the local server, for a scan named "./data/SCAN" and SCAN in its data_dir
    SCAN/features/index.json.gz          the hub, for a scan named "owner/name//SCAN", where SCAN is a folder of the
    SCAN/features/layer_{L}.bin          repository: by byte ranges; each part is its length (uint32) and gzipped JSON

A graph whose layers come from several hooks names a scan for each in `transcoder_list`.
"""

import gzip
import json
import re
import struct
from pathlib import Path
from typing import Any

import numpy as np

from jsae import files
from jsae.records.store import NON_ACTIVATING, TOP, Store, StoreError, digest

_SHOWN = str.maketrans({"\n": "⏎", "\t": "→", "\r": "↵"})
"""How circuit-tracer shows white space that would break a line."""


def write(
    store: Store,
    sae_dir: Path,
    out: Path,
    *,
    scan: str | None = None,
    context: int = 32,
) -> list[Path]:
    """Write the features of an SAE for circuit-tracer's pages, whole or not at all; return the files.

    Earlier ones are replaced; other files in the folder of the scan stay.

    Args:
      store: the records.
      sae_dir: the export that they must be of.
      out: where the folder of the scan goes: the `data_dir` of circuit-tracer's server, or what is uploaded.
      scan: the folder's name; by default the hook's.
      context: tokens shown on each side of an example's strongest one.

    Raises:
      StoreError: the records are of another SAE, or broken.
      ValueError: a scan that is no name of a folder, or a negative context.
      OSError: the files cannot be written, for example because the disk is full; earlier ones stay.
    """
    scan = store.header.hook if scan is None else scan
    if not re.fullmatch(r"[A-Za-z0-9_][\w.-]*", scan, re.ASCII):
        raise ValueError(f"scan {scan!r} cannot name a folder: give letters, digits, '.', '_' and '-'")
    if context < 0:
        raise ValueError(f"context must not be negative, got {context}")
    if digest(Path(sae_dir)) != store.header.sae_sha256:
        raise StoreError(f"the records at {store.path} are not of {sae_dir}")
    folder = Path(out) / scan
    with files.replacing_folder(folder, keep=_is_foreign) as partial:
        names = _write(store, partial, scan, context)
    return [folder / name for name in names]


def _is_foreign(file: Path) -> bool:
    """Return whether a file of the scan's folder is none that `write` makes."""
    return not re.fullmatch(r"[0-9][^/]*\.json|features/(layer_[^/]*\.bin|index\.json\.gz)", file.as_posix())


def _write(store: Store, folder: Path, scan: str, context: int) -> list[str]:
    """Write the files into an empty folder; return their names."""
    layer, names, offsets = store.header.layer, [], [0]
    packed, index = f"features/layer_{layer}.bin", "features/index.json.gz"
    (folder / "features").mkdir()
    with (folder / packed).open("wb") as file:
        for latent in range(store.header.d_sae):
            told = _json(feature(store, latent, scan, context), store.path)
            names.append(f"{pairing(layer, latent)}.json")
            (folder / names[-1]).write_text(told, encoding="utf-8")
            part = gzip.compress(told.encode(), 6, mtime=0)  # 9 takes twenty times as long for a twentieth less
            file.write(struct.pack("<I", len(part)) + part)
            offsets.append(file.tell())
    entry = {str(layer): {"filename": Path(packed).name, "offsets": offsets}}
    (folder / index).write_bytes(gzip.compress(json.dumps(entry).encode(), mtime=0))
    return [*names, packed, index]


def _json(told: dict[str, Any], path: Path) -> str:
    try:
        return json.dumps(told, ensure_ascii=False, allow_nan=False)
    except ValueError as error:
        raise StoreError(f"the records of latent {told['index']} at {path} hold no numbers ({error})") from error


def pairing(layer: int, latent: int) -> int:
    """Cantor's number for a pair: what a graph's nodes call a feature."""
    return (layer + latent) * (layer + latent + 1) // 2 + latent


def feature(store: Store, latent: int, scan: str, context: int = 32) -> dict[str, Any]:
    """One latent as circuit-tracer's pages read it. A dead one has no examples; examples without it are not shown."""
    count = int(store["count"][latent])
    low, high = map(float, store["hist_range"][latent]) if count else (0.0, 0.0)
    return {
        "transcoder_id": scan,
        "index": latent,
        "examples_quantiles": _quantiles(store, latent, context),
        "top_logits": _logits(store, "top", latent),
        "bottom_logits": _logits(store, "bottom", latent),
        "act_min": _short(low),
        "act_max": _short(high),
        "quantile_values": percentiles(store["hist"][latent], low, high),
        "histogram": [float(bar) for bar in store["hist"][latent]],
        "activation_frequency": count / max(store.header.tokens, 1),
    }


def percentiles(hist: np.ndarray, low: float, high: float) -> list[float]:
    """The 1st to the 100th percentile of activations, read off their histogram, even within a bin; [] of none."""
    total = int(hist.sum())
    if total == 0:
        return []
    wanted = np.arange(1, 101) / 100 * total
    upto = np.cumsum(hist, dtype=np.int64)
    bins = np.searchsorted(upto, wanted)
    within = 1 - (upto[bins] - wanted) / hist[bins]
    return [_short(value) for value in low + (bins + within) * (high - low) / len(hist)]


def _quantiles(store: Store, latent: int, context: int) -> list[dict[str, Any]]:
    """The examples by group, the strongest first."""
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
    """The tokens around an example's strongest one, each with its activation."""
    row = store.texts.tokens[int(store["example_row"][example])]
    at = int(store["example_position"][example])
    values = np.zeros(len(row), np.float32)
    positions, strengths = store.activations(example)
    values[positions] = strengths
    start, stop = max(at - context, 0), at + context + 1
    return {
        "tokens": [_token(store.texts.vocabulary[i]) for i in row[start:stop].tolist()],
        "tokens_acts_list": [_short(value) for value in values[start:stop].tolist()],
        "train_token_ind": at - start,
        "is_repeated_datapoint": False,  # the records hold no text twice
    }


def _logits(store: Store, side: str, latent: int) -> list[str]:
    ids, values = store[f"{side}_logits"][latent], store[f"{side}_logit_values"][latent]
    return [_token(store.texts.vocabulary[i]) for i in ids[~np.isnan(values)].tolist()]


def _token(piece: bytes) -> str:
    r"""A token's text. Bytes of one that is part of a character are told as \xNN, which the pages join to it again."""
    try:
        return piece.decode("utf-8").translate(_SHOWN)
    except UnicodeDecodeError:
        return "".join(chr(byte) if byte < 0x80 else f"\\x{byte:02x}" for byte in piece).translate(_SHOWN)


def _short(value: float | np.floating) -> float:
    """Four significant digits, which is more than a page shows."""
    return float(f"{value:.4g}")
