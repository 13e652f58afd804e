"""A run with records that fit on a page: eight latents of eight kinds on hostile text, always the same.

`columns` is a plain reference implementation, with which the real gathering of records is compared.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np

from bridge.run.timelines import REVISION
from jsae import export
from jsae.architectures import sae_config
from jsae.records.store import (
    NON_ACTIVATING,
    TOP,
    VERSION,
    ActivationsWriter,
    AllHeader,
    Header,
    Store,
    Texts,
    TextsHeader,
    digest,
)

HOOK = "blocks.2.hook_resid_post"
ORDINARY, DEAD, DENSE, HOSTILE, BLANKS, SPLIT, EMPTY, ONCE = range(8)
"""Latents by what they fire on: ` cat`; nothing; every token; a script tag and similar tokens; newline, tab and NUL;
both halves of é; the token without bytes; a single token of the text."""

WORDS = [" the", " cat", " sat", " on", " mat", "\n", "\t", "\0", "<script>alert(1)</script>", "&amp;", '"', "'", " 語"]
VOCABULARY = [
    *(word.encode() for word in WORDS),
    "é".encode()[:1],
    "é".encode()[1:],
    b"",
    b"\xed\xa0\x80",  # a surrogate, which is not valid UTF-8
    b" once",
    b"<|bos|>",
    b"<|user_start|>",
]
ID = {word: i for i, word in enumerate(WORDS)} | {
    "é0": 13,
    "é1": 14,
    "": 15,
    "surrogate": 16,
    " once": 17,
    "<|bos|>": 18,
    "<|user_start|>": 19,
}
ROWS, LENGTH, D_IN, D_SAE = 40, 12, 8, 8
LOGITS, BINS, NEAREST, EACH = 6, 50, 4, 3


def tokens() -> np.ndarray:
    """Return the text, (ROWS, LENGTH) uint16: BOS first in every row and inside row 3, ` once` only in row 7."""
    rng = np.random.default_rng(0)
    chance = np.ones(17)
    chance[:5] = 5
    rows = rng.choice(17, (ROWS, LENGTH), p=chance / chance.sum())
    for row in rows[::2]:  # the halves of é belong together
        at = rng.integers(1, LENGTH - 1)
        row[at : at + 2] = ID["é0"], ID["é1"]
    rows[:, 0] = ID["<|bos|>"]
    rows[3, 5] = ID["<|bos|>"]
    rows[5, 4] = ID["<|user_start|>"]
    rows[7, 9] = ID[" once"]
    return rows.astype(np.uint16)


def activations(text: np.ndarray) -> np.ndarray:
    """Return activations, (ROWS, LENGTH, D_SAE) float32, 0 at BOS; many values are equal."""
    rng = np.random.default_rng(1)
    on = {
        ORDINARY: [" cat"],
        HOSTILE: ["<script>alert(1)</script>", "&amp;", '"', "'"],
        BLANKS: ["\n", "\t", "\0"],
        SPLIT: ["é0", "é1"],
        EMPTY: [""],
        ONCE: [" once"],
    }
    acts = np.zeros((*text.shape, D_SAE), np.float32)
    for latent, words in on.items():
        fires = np.isin(text, [ID[word] for word in words])
        acts[fires, latent] = rng.integers(1, 40, fires.sum()) / 4
    acts[..., DENSE] = 0.5 + rng.integers(0, 40, text.shape) / 8
    acts[text == ID["<|bos|>"]] = 0
    return acts


def write_store(
    folder: Path, hook: str = HOOK, everything: bool = True, seed: int = 0, stage: str | None = None
) -> Path:
    """Write a run of one hook: config.json, labels.json, sae/HOOK, explorer/records; return the path of its store.

    May be called again for another hook of the same run.

    Args:
      folder: the run directory.
      hook: of the SAE.
      everything: whether to keep all activations, besides those of the examples.
      seed: of the SAE's weights.
      stage: the checkpoint whose own SAE it is, of a crosscoder that `write_stages` describes.
    """
    sae_folder = folder / "sae" / hook if stage is None else folder / "stages" / stage / hook
    weights = _weights(seed)
    metadata = {"hook_name": hook, "model_name": "nanochat-toy", "model_fingerprint": "ab" * 32, "context_size": LENGTH}
    export.write(sae_folder, sae_config("topk", D_IN, D_SAE, k=2), weights, 1.0, 1.0, metadata)
    text = tokens()
    acts = activations(text)
    records = folder / "explorer" / "records"
    texts_header = TextsHeader(
        version=VERSION,
        rows=ROWS,
        row_length=LENGTH,
        vocab_size=len(VOCABULARY),
        bos=ID["<|bos|>"],
        special=[ID["<|bos|>"], ID["<|user_start|>"]],
        dataset="toy <b>text</b>",
        split="all",
        model="nanochat-toy",
        fingerprint="ab" * 32,
        seed=0,
    )
    Texts.write(records / "texts", texts_header, text, VOCABULARY)
    header = Header(
        version=VERSION,
        hook=hook,
        layer=int(hook.split(".")[1]),
        d_in=D_IN,
        d_sae=D_SAE,
        architecture="topk",
        sae_sha256=digest(sae_folder),
        tokens=int((text != ID["<|bos|>"]).sum()),
        direct_path=0.5,
        duplicate_rows=0,
        settings={"num_tokens": text.size, "context_length": LENGTH, "data": "toy", "split": "all", "seed": 0}
        | ({} if stage is None else {"stage": stage}),
    )
    Store.write(records / hook, header, columns(text, acts) | _weight_columns(weights["W_dec"]))
    if everything:
        _write_all(records / hook / "all", acts, header.sae_sha256)
    _write_labels(folder, hook)
    return records / hook


STAGES = ("step-10", "step-100", "sft")
LEVELS = [[1, 1, 1], [0, 0, 0], [1, 0.9, 1], [0, 1, 0.9], [0, 0, 1], [1, 1, 0], [0.2, 0.4, 1], [1, 1, 1]]
"""Of every latent in every checkpoint of `STAGES`: HOSTILE appears in the second, BLANKS and EMPTY in the last, where
SPLIT dies; ONCE rotates there."""
KINDS = ["shared", "dead", "shared", "exclusive", "exclusive", "exclusive", "weakened", "rotated"]


def write_stages(folder: Path, hook: str = HOOK) -> dict[str, Any]:
    """Write `stages.json` and the losses of a run whose records are of the stage of a crosscoder; return its table."""
    level = np.array(LEVELS, float)
    turn = np.ones_like(level)
    turn[ONCE, 2] = 0.2
    final = np.where(level > 0, 1.0, 0.1)
    final[ONCE, :2] = 0.2
    measures = dict.fromkeys(("norm", "corrected_norm", "strength", "present", "own_mean"), level)
    measures |= {"turn": turn, "final": final, "own_density": 0.1 * level}
    events = [(HOSTILE, "appears", 1), (BLANKS, "appears", 2), (SPLIT, "dies", 2), (EMPTY, "appears", 2)]
    events.append((ONCE, "rotates", 2))
    table = {
        "revision": REVISION,
        "crosscoder": "not exported",
        "checkpoints": [{"name": name, "path": "somewhere", "step": None} for name in STAGES],
        "kinds": KINDS,
        "events": [{"latent": latent, "kind": kind, "stage": STAGES[at]} for latent, kind, at in events],
        "latents": {name: values.tolist() for name, values in measures.items()},
    }
    (folder / "stages.json").write_text(json.dumps({hook: table}))
    losses = (5 - level).tolist()
    losses[DEAD] = [None] * len(STAGES)
    file = folder / "explorer" / "records" / hook / "losses.json"
    file.write_text(json.dumps({"everywhere": [6.0, 5.0, 4.5], "latents": losses}))
    return table


def write_origin(folder: Path, latent: int, hook: str = HOOK, sha256: str = "not exported") -> dict[str, Any]:
    """Write where a latent comes from, as `experiments.provenance` does; return the content of the file.

    Args:
      folder: the run directory.
      latent: its number.
      hook: of the crosscoder.
      sha256: of its export.
    """
    text = {"text_before": "<script>alert(1)</script> sat\n", "at": " cat", "text_after": " on"}
    source = {"file": "<b>shard.parquet", "part": "row group 3", "document": 7}
    sums = {"total": 12.5, "fired": 5, "tokens": 100}
    origin = {
        "latent": latent,
        "crosscoder": hook,
        "sha256": sha256,
        "grew": {"from": STAGES[0], "to": STAGES[1]},
        "text": {"note": "row group 3 of <b>shard.parquet", "documents": 40, "tokens": 4000},
        "fired": 5,
        "documents": [source | sums | text | {"document": number} for number in range(12)],
        "files": [{"file": "<b>shard.parquet row group 3", "density": 0.05} | sums],
        "loss": {
            "where_it_fires": {"tokens": 5, "before": 6.5, "after": 2.25},
            "elsewhere": {"tokens": 95, "before": 5.0, "after": 4.5},
        },
        "tokens": [{"token": "<i> on", "id": 3, "occurrences": 3, "mean_fall": 4.25, "total_fall": 12.75}],
        "occurrences": [{"predicted": " on", "before": 7.5, "after": 0.5, "value": 2.0} | source | text],
    }
    file = folder / "provenance" / hook / f"{latent}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(origin))
    return origin


def columns(text: np.ndarray, acts: np.ndarray) -> dict[str, np.ndarray]:
    """Return the columns of counts and examples, one latent at a time; the first rows are the sample of a group."""
    counted = text != ID["<|bos|>"]
    statistics: dict[str, list] = {name: [] for name in ("count", "max", "mean", "hist_range", "hist", "group_share")}
    examples: list[list[tuple]] = []
    for latent in range(D_SAE):
        values = acts[..., latent][acts[..., latent] > 0].astype(float)
        top = values.max(initial=0)
        statistics["count"].append(len(values))
        statistics["max"].append(top)
        statistics["mean"].append(values.mean() if len(values) else 0)
        statistics["hist_range"].append([values.min(), top] if len(values) else [0, 0])
        histogram = np.histogram(values, BINS, statistics["hist_range"][-1])[0] if len(values) else [0] * BINS
        statistics["hist"].append(histogram)
        interval = np.array([_interval(v, top) for v in values], int)
        statistics["group_share"].append(
            [np.sum(interval == k) / counted.sum() if k else len(values) / counted.sum() for k in range(6)]
        )
        examples.append(_examples(acts[..., latent], counted))
    fires = (acts > 0)[counted].astype(float)
    with np.errstate(invalid="ignore"):
        shares = np.nan_to_num(fires.T @ fires / fires.sum(0)[:, None])
    np.fill_diagonal(shares, 0)
    more = shares - fires.mean(0)
    order = np.argsort(-more, axis=1, kind="stable")[:, :NEAREST]
    exists = np.take_along_axis(more, order, 1) > 0
    together = np.where(exists, order, np.arange(D_SAE)[:, None])
    share = np.where(exists, np.take_along_axis(shares, order, 1), np.nan)
    flat = [example for group in examples for example in group]
    fired = [np.flatnonzero(acts[row, :, i]) for i, group in enumerate(examples) for _, row, _, _ in group]
    strong = [acts[row, :, i][acts[row, :, i] > 0] for i, group in enumerate(examples) for _, row, _, _ in group]
    return {
        **{name: np.array(values) for name, values in statistics.items()},
        "example_offsets": np.cumsum([0, *map(len, examples)]),
        **{
            f"example_{name}": np.array([example[i] for example in flat])
            for i, name in enumerate(("group", "row", "position", "value"))
        },
        "activation_offsets": np.cumsum([0, *map(len, fired)]),
        "activation_position": np.concatenate(fired),
        "activation_value": np.concatenate(strong),
        "together": together,
        "together_share": share,
    }


def _interval(value: float, top: float) -> int:
    """Return 1 for the uppermost fifth of [0, top], 5 for the lowest."""
    return int(6 - np.clip(np.searchsorted(np.linspace(0, top, 6), value, side="right"), 1, 5))


def _examples(values: np.ndarray, counted: np.ndarray) -> list[tuple[int, int, int, float]]:
    """Return (group, row, position, value) of one latent: three strongest rows, then up to three per interval."""
    strongest = values.max(1)
    top = strongest.max()
    if top == 0:
        return []
    order = [int(row) for row in np.argsort(-strongest, kind="stable") if strongest[row] > 0]
    chosen = [(TOP, row) for row in order[:EACH]]
    for k in range(1, 6):
        chosen += [(k, row) for row in order[EACH:] if _interval(strongest[row], top) == k][:EACH]
    examples = [(group, row, int(values[row].argmax()), float(strongest[row])) for group, row in chosen]
    quiet = np.flatnonzero(strongest == 0)[:EACH]
    return examples + [(NON_ACTIVATING, int(row), int(np.flatnonzero(counted[row])[0]), 0.0) for row in quiet]


def _weights(seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    W_dec = rng.standard_normal((D_SAE, D_IN))
    W_dec /= np.linalg.norm(W_dec, axis=1, keepdims=True)
    zeros = {"b_enc": np.zeros(D_SAE), "b_dec": np.zeros(D_IN)}
    return {"W_enc": W_dec.copy(), "W_dec": W_dec} | zeros


def _weight_columns(W_dec: np.ndarray) -> dict[str, np.ndarray]:
    """Return the columns that depend on the decoder, with a random unembedding."""
    logits = 0.5 * W_dec @ np.random.default_rng(2).standard_normal((D_IN, len(VOCABULARY)))
    down = np.argsort(-logits, axis=1)
    cosines = W_dec @ W_dec.T
    np.fill_diagonal(cosines, -2)
    near = np.argsort(-cosines, axis=1)[:, :NEAREST]
    channels = np.argsort(-W_dec, axis=1)[:, :3]
    ends = np.stack([logits.min(1), logits.max(1)], 1)
    entries = np.take_along_axis(W_dec, channels, 1)
    return {
        "top_logits": down[:, :LOGITS],
        "top_logit_values": np.take_along_axis(logits, down[:, :LOGITS], 1),
        "bottom_logits": down[:, ::-1][:, :LOGITS],
        "bottom_logit_values": np.take_along_axis(logits, down[:, ::-1][:, :LOGITS], 1),
        "logit_range": ends,
        "logit_hist": np.stack([np.histogram(row, BINS, tuple(end))[0] for row, end in zip(logits, ends, strict=True)]),
        "neighbours": near,
        "neighbour_cosines": np.take_along_axis(cosines, near, 1),
        "channels": channels,
        "channel_values": entries,
        "channel_shares": abs(entries) / abs(W_dec).sum(1, keepdims=True),
        "correlated_channels": channels,
        "channel_pearson": 0.9 * entries,
        "channel_cosine": 0.8 * entries,
    }


def _write_all(folder: Path, acts: np.ndarray, sae_sha256: str) -> None:
    latent, cell = acts.reshape(-1, D_SAE).T.nonzero()
    writer = ActivationsWriter(folder)
    writer.append(cell, acts.reshape(-1, D_SAE)[cell, latent])
    writer.finish(AllHeader(VERSION, D_SAE, ROWS, LENGTH, sae_sha256), np.bincount(latent, minlength=D_SAE))


def _write_labels(folder: Path, hook: str) -> None:
    """Write labels.json as the evaluation does, and the config.json of a run."""
    names = ["token ' cat'", None, "any token", "token '<script>alert(1)</script>'", None, None, None, "token ' once'"]
    numbers = {"f1": 0.5, "precision": 0.5, "recall": 0.5, "n": 10, "threshold": 0.25}
    table = {
        str(i): {"label": name} | (numbers if name else dict.fromkeys(numbers) | {"n": 0})
        for i, name in enumerate(names)
    }
    file = folder / "labels.json"
    kept = json.loads(file.read_text()) if file.is_file() else {}
    file.write_text(json.dumps(kept | {hook: table}))
    flags = {
        "checkpoint": "demo",
        "step": None,
        "tokenizer": None,
        "data": "stdlib",
        "context_size": LENGTH,
        "drop_sinks": True,
    }
    (folder / "config.json").write_text(json.dumps({"flags": flags, "facts": {}, "versions": {}}))
