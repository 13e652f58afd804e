"""Write the records of a run as a page that opens from disk, without a server and without a network.

    explorer/index.html                           names the folder of the page that it shows
             page-DIGEST/explorer.css, *.js       the page itself, the same for every run
                         manifest.js              properties of the run and its SAEs
                         vocabulary.js            the bytes of every token
                         list-H.js                a line per latent of hook number H
                         shard-H-S.js             details of the latents S * 64 to S * 64 + 63 of hook number H
                         texts-N.js               the tokens that the examples of all hooks show
                         timeline-H.js            of a crosscoder over checkpoints: what became of every latent
             graphs/                      attribution graphs (`bridge.explorer.graphs`)

The folder is named by a digest of its content and written atomically; replacing index.html then changes the page in one
step. A page from disk may not read files, but it may load scripts: each data file calls `jsae.put(name, data)`. Columns
are base64 of little-endian numbers. The context of examples shrinks until the page needs at most `BYTES_PER_LATENT`.
"""

import base64
import hashlib
import math
import re
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

import numpy as np

from bridge.explorer import directions, graphs, timeline
from bridge.run import Run
from bridge.run.labels import Names
from jsae import files
from jsae.records.store import TOP, Store, Texts

BYTES_PER_LATENT = 19_000
"""Limits 500 latents to less than 10 MB; a smaller SAE may take as much as one of 500 latents."""
RADII = (128, 96, 64, 48, 32, 24, 16, 12, 8)
"""Tokens to show on either side of an example's strongest one; the first radius that fits is used."""
SHARD = 64
_CHUNK = 2**19  # tokens of a file of texts
_BEFORE, _AFTER = 8, 11  # tokens of a snippet in the list
_LOGITS = 8  # of a latent in the list
_PEAKS = 6  # distinct tokens on which a latent is strongest, in the list
_FORMER = ("manifest.js", "vocabulary.js", "list-*.js", "shard-*.js", "texts-*.js")
"""Data files that earlier versions wrote next to index.html."""


def write(run: str | Path, hooks: Sequence[str] | None = None) -> Path:
    """Write the page of a run's records; return the path of its `index.html`.

    The same records and exports give the same bytes. A run without records gets a page if it has attribution graphs,
    which that page then shows.

    The page changes in one step: after a kill, or with a full disk, there is either the former page or the new one.

    Args:
      run: the run's directory, with its records in explorer/records.
      hooks: which stores to show; None shows all, from the lowest layer up, and () none, but graphs.

    Raises:
      FileNotFoundError: there are no records and no attribution graphs.
      StoreError: records are broken, of another version, or of another SAE than the run's export.
      ValueError: the run's labels or notes are broken.
      OSError: the page cannot be written; the former one stays.
    """
    run = Run(run)
    stores = _stores(run, hooks)
    names = [Names.read(run.path, store.header.hook) for store in stores]
    unnamed = run.explorer_folder / "page"
    with files.replacing_folder(unnamed) as partial:
        if stores:
            _write_records(partial, run, stores, names)
        else:
            _put(partial, "vocabulary", {"lengths": "", "bytes": ""})
            _put(partial, "manifest", {"run": run.path.resolve().name, "special": [], "hooks": []})
        for asset in _assets().iterdir():
            if asset.is_file() and asset.name != "index.html":
                (partial / asset.name).write_bytes(asset.read_bytes())
    graphs.write_empty(run)
    return _publish(run.explorer_folder, unnamed, _index())


def is_current(run: Run) -> bool:
    """Return whether a run has a page of this version, whatever it shows."""
    page = run.page_file
    return page.is_file() and _without_folders(page.read_text(encoding="utf-8", errors="replace")) == _index()


def _write_records(folder: Path, run: Run, stores: Sequence[Store], names: Sequence[Names]) -> None:
    """Write the data files of the records of a page."""
    texts = stores[0].texts
    radius = _radius(stores, texts)
    shown = _Shown.around_examples(stores, texts, radius)
    _put(folder, "vocabulary", _vocabulary(texts))
    for number, chunk in enumerate(shown.chunks(texts)):
        _put(folder, f"texts-{number}", chunk)
    stages = [timeline.of_hook(run, store) for store in stores]
    for number, (store, named) in enumerate(zip(stores, names, strict=True)):
        places = directions.of_export(run.sae_folder(store.header.hook))
        _put(folder, f"list-{number}", _list(store, named, places))
        if stages[number] is not None:
            _put(folder, f"timeline-{number}", stages[number])
        for shard, first in enumerate(range(0, store.header.d_sae, SHARD)):
            _put(folder, f"shard-{number}-{shard}", _shard(store, first, radius))
    manifest = _manifest(run.path, stores, names, texts, shown, radius)
    for info, columns in zip(manifest["hooks"], stages, strict=True):
        info["over_checkpoints"] = columns is not None
    _put(folder, "manifest", manifest)


def _put(folder: Path, name: str, data: Any) -> None:
    (folder / f"{name}.js").write_text(graphs.script(name, data), encoding="ascii")


def _assets() -> Traversable:
    return resources.files("bridge.explorer").joinpath("assets")


def _index() -> str:
    """Return the packaged index.html, whose references name no folder."""
    return _assets().joinpath("index.html").read_text(encoding="utf-8")


def _without_folders(index: str) -> str:
    return re.sub(r'(href|src)="page-[0-9a-f]{16}/', r'\1="', index)


def _publish(folder: Path, page: Path, index: str) -> Path:
    """Rename the folder `page` by its digest, let `folder/index.html` show it, and remove the former page."""
    digest = _digest(page)
    named = folder / f"page-{digest}"
    if named.is_dir() and _digest(named) == digest:
        shutil.rmtree(page)
    else:
        with files.replacing(named) as partial:
            page.replace(partial)
    index = re.sub(r'(href|src)="([\w.-]+\.(?:css|js))"', rf'\1="{named.name}/\2"', index)
    if not (folder / "index.html").is_file() or (folder / "index.html").read_text(encoding="utf-8") != index:
        files.write(folder / "index.html", index)
    for former in folder.glob("page-*"):
        if former != named:
            shutil.rmtree(former)
    for pattern in (*_FORMER, *(file.name for file in named.iterdir())):
        for file in folder.glob(pattern):
            file.unlink()
    return folder / "index.html"


def _digest(page: Path) -> str:
    """Return the digest of all files of a page, for the name of its folder."""
    total = hashlib.sha256()
    for file in sorted(page.iterdir()):
        with file.open("rb") as opened:
            total.update(f"{file.name} {hashlib.file_digest(opened, 'sha256').hexdigest()}\n".encode())
    return total.hexdigest()[:16]


def _stores(run: Run, hooks: Sequence[str] | None) -> list[Store]:
    """Return the stores of a run, from the lowest layer up, checked against the exports that the run has."""
    if hooks is None and not (hooks := run.recorded_hooks) and not graphs.listed(run):
        raise FileNotFoundError(
            f"no records in {run.records_folder}: `python -m experiments.explore --run_dir={run.path}` gathers them"
        )
    return sorted(map(run.records, hooks), key=lambda store: (store.header.layer, store.header.hook))


# ---- the visible part of texts -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Shown:
    """The cells (row * T + position) of the texts that the page shows: runs of them, from each start so many."""

    starts: np.ndarray
    lengths: np.ndarray
    row_length: int

    @classmethod
    def around_examples(cls, stores: Sequence[Store], texts: Texts, radius: int) -> "_Shown":
        """Return all cells within a radius of an example, in its row."""
        edges = np.zeros(texts.header.rows * texts.header.row_length + 1, np.int64)
        for store in stores:
            start, end = _windows(store, radius)
            edges += np.bincount(start, minlength=len(edges)) - np.bincount(end, minlength=len(edges))
        kept = np.diff((np.cumsum(edges) > 0).astype(np.int8), prepend=0)
        starts = np.flatnonzero(kept > 0)
        return cls(starts, np.flatnonzero(kept < 0) - starts, texts.header.row_length)

    @property
    def size(self) -> int:
        return int(self.lengths.sum())

    def cuts(self) -> list[int]:
        """Return the cells at which a new file of texts begins, each the first of a row."""
        cuts, size = [0], 0
        for start, length in zip(self.starts.tolist(), self.lengths.tolist(), strict=True):
            position = start
            while position < start + length:  # a run of cells may span many rows
                end = min(start + length, position - position % self.row_length + self.row_length)
                row = position - position % self.row_length
                if size + end - position > _CHUNK and row > cuts[-1]:
                    cuts.append(row)
                    size = 0
                size += end - position
                position = end
        return cuts

    def chunks(self, texts: Texts) -> Iterator[dict[str, str]]:
        """Yield the files of texts: starts and lengths of runs of cells, and their concatenated tokens."""
        cuts = self.cuts()
        flat = texts.tokens.reshape(-1)
        run_ends = self.starts + self.lengths
        for low, high in zip(cuts, [*cuts[1:], flat.size], strict=True):
            inside = (run_ends > low) & (self.starts < high)
            starts, stops = np.maximum(self.starts[inside], low), np.minimum(run_ends[inside], high)
            tokens = [flat[a:b] for a, b in zip(starts, stops, strict=True)]
            joined = np.concatenate(tokens) if tokens else flat[:0]
            yield {"starts": _b64(starts, "<u4"), "lengths": _b64(stops - starts, "<u4"), "tokens": _b64(joined, "<u2")}


def _windows(store: Store, radius: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the first cell of each example's window, and the cell after its last."""
    length = store.texts.header.row_length
    row, position = store["example_row"].astype(np.int64), store["example_position"].astype(np.int64)
    return row * length + np.maximum(position - radius, 0), row * length + np.minimum(position + radius + 1, length)


def _radius(stores: Sequence[Store], texts: Texts) -> int:
    """Return the largest radius with which the page keeps within `BYTES_PER_LATENT`, else the smallest radius."""
    latents = sum(store.header.d_sae for store in stores)
    numbers = 4 * (
        2 * stores[0]["hist"].shape[1] + 3 * stores[0]["top_logits"].shape[1] + 4 * stores[0]["together"].shape[1]
    )
    examples = sum(len(store["example_row"]) for store in stores)
    fixed = 200_000 + 4 / 3 * (len(b"".join(texts.vocabulary)) + 2 * len(texts.vocabulary))
    fixed += 4 / 3 * (latents * (numbers + 200) + 15 * examples)
    left = BYTES_PER_LATENT * max(latents, 500) - fixed
    for radius in RADII:
        near = sum(int(np.count_nonzero(_near(store, 0, store.header.d_sae, radius))) for store in stores)
        if 4 / 3 * (2 * _Shown.around_examples(stores, texts, radius).size + 4 * near) <= left:
            return radius
    return RADII[-1]


def _near(store: Store, first: int, last: int, radius: int) -> np.ndarray:
    """Return which activations of the latents `first` to `last - 1` lie within a radius of their examples."""
    low, high = int(store["example_offsets"][first]), int(store["example_offsets"][last])
    offsets = store["activation_offsets"][low : high + 1]
    centre = np.repeat(store["example_position"][low:high].astype(np.int64), np.diff(offsets))
    return np.abs(store["activation_position"][offsets[0] : offsets[-1]] - centre) <= radius


# ---- the files -----------------------------------------------------------------------------------------------------


def _manifest(
    run: Path, stores: Sequence[Store], names: Sequence[Names], texts: Texts, shown: _Shown, radius: int
) -> dict[str, Any]:
    header = texts.header
    return {
        "run": run.resolve().name,
        "model": header.model,
        "fingerprint": header.fingerprint,
        "dataset": header.dataset,
        "split": header.split,
        "rows": header.rows,
        "row_length": header.row_length,
        "special": list(header.special),
        "radius": radius,
        "shard": SHARD,
        "texts": shown.cuts(),
        "hooks": [
            {
                "hook": store.header.hook,
                "layer": store.header.layer,
                "d_in": store.header.d_in,
                "d_sae": store.header.d_sae,
                "architecture": store.header.architecture,
                "sae": store.header.sae_sha256,
                "tokens": store.header.tokens,
                "direct_path": _number(store.header.direct_path),
                "other_seeds": 0 if named.recurrence is None else named.recurrence.others,
            }
            for store, named in zip(stores, names, strict=True)
        ],
    }


def _vocabulary(texts: Texts) -> dict[str, str]:
    return {
        "lengths": _b64([len(token) for token in texts.vocabulary], "<u2"),
        "bytes": base64.b64encode(b"".join(texts.vocabulary)).decode("ascii"),
    }


def _list(store: Store, names: Names, places: np.ndarray | None = None) -> dict[str, Any]:
    """Return a line per latent: numbers, names, the tokens by which the search finds it, its place on a map."""
    latents = range(store.header.d_sae)
    named = [names[i] for i in latents]
    f1 = [math.nan if name.f1 is None else name.f1 for name in named]
    snippets = [_snippet(store, i) for i in latents]
    peaks = [_peaks(store, i) for i in latents]
    return {
        "count": _b64(store["count"], "<f8"),
        "max": _b64(store["max"], "<f4"),
        "mean": _b64(store["mean"], "<f4"),
        "f1": _b64(f1, "<f4"),
        "places": "" if places is None else _b64(places, "<f4"),
        "labels": [name.label for name in named],
        "by_person": [[i, names.automatic(i).label, names.automatic(i).f1] for i in latents if named[i].by_person],
        "recurs": "" if names.recurrence is None else _b64(names.recurrence.share, "<f4"),
        "notes": [[i, named[i].note] for i in latents if named[i].note],
        "fit": [[i, name.precision, name.recall] for i, name in enumerate(named) if name.precision is not None],
        "logits": _b64(store["top_logits"][:, :_LOGITS], "<u2"),
        "snippet_lengths": _b64([len(tokens) for tokens, _ in snippets], "u1"),
        "snippet_peaks": _b64([at for _, at in snippets], "u1"),
        "snippets": _b64(np.concatenate([tokens for tokens, _ in snippets]), "<u2"),
        "peak_lengths": _b64([len(tokens) for tokens in peaks], "u1"),
        "peaks": _b64(np.concatenate(peaks), "<u2"),
    }


def _top(store: Store, latent: int) -> slice:
    """Return the examples of the first group, which precedes the others."""
    examples = store.examples(latent)
    groups = store["example_group"][examples.start : examples.stop]
    return slice(examples.start, examples.start + int(np.count_nonzero(groups == TOP)))


def _snippet(store: Store, latent: int) -> tuple[np.ndarray, int]:
    """Return a few tokens around the strongest one of the strongest text, and its index among them."""
    top = _top(store, latent)
    if top.start == top.stop:
        return np.zeros(0, np.uint16), 0
    best = top.start + int(np.argmax(store["example_value"][top]))
    row, position = int(store["example_row"][best]), int(store["example_position"][best])
    start = max(position - _BEFORE, 0)
    return np.asarray(store.texts.tokens[row, start : position + _AFTER + 1]), position - start


def _peaks(store: Store, latent: int) -> np.ndarray:
    """Return the distinct tokens on which a latent is strongest in its strongest texts."""
    top = _top(store, latent)
    tokens = store.texts.tokens[store["example_row"][top], store["example_position"][top]]
    return np.fromiter(dict.fromkeys(tokens.tolist()), np.uint16)[:_PEAKS]


def _shard(store: Store, first: int, radius: int) -> dict[str, Any]:
    """Return the details of some latents. Activations are in 65535ths of the latent's largest one."""
    last = min(first + SHARD, store.header.d_sae)
    rows = slice(first, last)
    examples = store["example_offsets"][first : last + 1]
    low, high = int(examples[0]), int(examples[-1])
    offsets = store["activation_offsets"][low : high + 1]
    near = _near(store, first, last, radius)
    example = np.repeat(np.arange(high - low), np.diff(offsets))
    owner = np.repeat(np.arange(first, last), np.diff(examples))
    largest = np.maximum(store["max"], np.finfo(np.float32).tiny)[owner[example]]
    share = store["activation_value"][offsets[0] : offsets[-1]] / largest
    return {
        "first": first,
        "hist": _b64(store["hist"][rows], "<u4"),
        "hist_range": _b64(store["hist_range"][rows], "<f4"),
        "group_share": _b64(store["group_share"][rows], "<f4"),
        "logit_hist": _b64(store["logit_hist"][rows], "<u4"),
        "logit_range": _b64(store["logit_range"][rows], "<f4"),
        **{name: _b64(store[name][rows], "<u2") for name in ("top_logits", "bottom_logits")},
        **{name: _b64(store[name][rows], "<f4") for name in ("top_logit_values", "bottom_logit_values")},
        **{name: _b64(store[name][rows], "<u4") for name in ("neighbours", "together")},
        **{name: _b64(store[name][rows], "<f4") for name in ("neighbour_cosines", "together_share")},
        "examples": _b64(examples - low, "<u4"),
        "group": _b64(store["example_group"][low:high], "u1"),
        "row": _b64(store["example_row"][low:high], "<u4"),
        "position": _b64(store["example_position"][low:high], "<u2"),
        "value": _b64(store["example_value"][low:high], "<f4"),
        "activations": _b64(np.concatenate([[0], np.cumsum(np.bincount(example[near], minlength=high - low))]), "<u4"),
        "activation_position": _b64(store["activation_position"][offsets[0] : offsets[-1]][near], "<u2"),
        "activation_share": _b64(np.rint(np.clip(share[near], 0, 1) * 65535), "<u2"),
    }


def _b64(values: Any, dtype: str) -> str:
    return base64.b64encode(np.ascontiguousarray(values).astype(dtype).tobytes()).decode("ascii")


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None
