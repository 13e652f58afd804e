"""Write the records of a run as a page that opens from disk, without a server and without a network.

    explorer/index.html                           names the folder of the page that it shows
             page-DIGEST/explorer.css, *.js       the page itself, the same for every run
                         manifest.js              properties of the run and its SAEs
                         vocabulary.js            the bytes of every token
                         list-H.js                a line per latent of hook number H
                         shard-H-S.js             details of the latents S * 64 to S * 64 + 63 of hook number H
                         texts-N.js               the tokens that the examples of all hooks show
                         timeline-H.js            of a crosscoder over checkpoints: what became of every latent
             origins-H.js             of such: where those latents come from that were traced
                         lens-N.js                lenses on text number N
                         through-H.js             what latents write through later layers, by the Jacobian lens
                         across-H.js              of two runs: the latents of the other that write most alike
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
from collections.abc import Sequence
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

import numpy as np

from bridge.explorer import across, directions, graphs, lens_sample, origins, parts, timeline
from bridge.explorer.parts import Part
from bridge.explorer.windows import Shown, is_near, radius_within
from bridge.run import Run
from bridge.run.labels import Names
from jsae import files
from jsae.records.store import TOP, Store, Texts

BYTES_PER_LATENT = 19_000
"""Limits 500 latents to less than 10 MB; a smaller SAE may take as much as one of 500 latents."""
SHARD = 64
_BEFORE, _AFTER = 8, 11  # tokens of a snippet in the list
_LOGITS = 8  # of a latent in the list
_PEAKS = 6  # distinct tokens on which a latent is strongest, in the list
_FORMER = ("manifest.js", "vocabulary.js", "list-*.js", "shard-*.js", "texts-*.js")
"""Data files that earlier versions wrote next to index.html."""


def write(run: str | Path, hooks: Sequence[str] | None = None, second: str | Path | None = None) -> Path:
    """Write the page of a run's records; return the path of its `index.html`.

    The same records and exports give the same bytes. A run without records gets a page if it has attribution graphs,
    which that page then shows.

    The page changes in one step: after a kill, or with a full disk, there is either the former page or the new one.

    Args:
      run: the run's directory, with its records in explorer/records.
      hooks: which stores to show; None shows all, from the lowest layer up, and () none, but graphs.
      second: another run on the same model, whose records the page shows beside those of the first.

    Raises:
      FileNotFoundError: there are no records and no attribution graphs.
      ConfigError: the records of the second run do not fit; see `parts.join`.
      StoreError: records are broken, of another version, or of another SAE than the run's export.
      ValueError: the run's labels or notes are broken.
      OSError: the page cannot be written; the former one stays.
    """
    run = Run(run)
    shown = parts.of_run(run, _hooks(run, hooks))
    if second is not None:
        shown = parts.join(run, shown, Run(second))
    unnamed = run.explorer_folder / "page"
    with files.replacing_folder(unnamed) as partial:
        if shown:
            _write_records(partial, run, shown)
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


def _write_records(folder: Path, run: Run, shown: Sequence[Part]) -> None:
    """Write the data files of the records of a page."""
    rows, texts = parts.tokens(shown), shown[0].store.texts
    radius = radius_within(shown, rows.shape, _left(shown))
    cells = Shown.around_examples(shown, rows.shape, radius)
    _put(folder, "vocabulary", _vocabulary(texts))
    for number, (starts, lengths, tokens) in enumerate(cells.chunks(rows)):
        columns = {"starts": _b64(starts, "<u4"), "lengths": _b64(lengths, "<u4"), "tokens": _b64(tokens, "<u2")}
        _put(folder, f"texts-{number}", columns)
    timelines = [timeline.of_hook(part.run, part.store) for part in shown]
    for number, (part, stages) in enumerate(zip(shown, timelines, strict=True)):
        decoder = part.decoder()
        places = None if decoder is None else directions.project(decoder)
        _put(folder, f"list-{number}", _list(part.store, part.names, places))
        if stages is not None:
            _put(folder, f"timeline-{number}", stages)
        for shard, first in enumerate(range(0, part.store.header.d_sae, SHARD)):
            _put(folder, f"shard-{number}-{shard}", _shard(part, first, radius, decoder))
    manifest = _manifest(run.path, shown, rows, cells, radius)
    of_lenses = {path: lens_sample.read(one) for path, one in {part.run.path: part.run for part in shown}.items()}
    manifest["lenses"] = _lenses(folder, of_lenses[run.path][0])
    for info, columns in zip(manifest["hooks"], timelines, strict=True):
        info["over_checkpoints"] = columns is not None
    for number, part in enumerate(shown):
        of_latents = origins.of_hook(part.run, part.store)
        manifest["hooks"][number]["origins"] = list(of_latents)
        if of_latents:
            _put(folder, f"origins-{number}", of_latents)
        _, through = of_lenses[part.run.path]
        manifest["hooks"][number]["through"] = part.hook in through
        if part.hook in through:
            _put(folder, f"through-{number}", through[part.hook])
    for number, alike in _across(folder, shown).items():
        manifest["hooks"][number]["across"] = alike
    _put(folder, "manifest", manifest)


def _lenses(folder: Path, texts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Write the tables of lenses by text; return the names of the lenses, and how many texts there are."""
    for number, text in enumerate(texts):
        _put(folder, f"lens-{number}", text)
    return {"names": list(texts[0]["lenses"]) if texts else [], "texts": len(texts)}


def _across(folder: Path, shown: Sequence[Part]) -> dict[int, dict[str, int]]:
    """Write the nearest latents of the other run for every SAE that has such; return how many have one alike."""
    alike = {}
    for one, other in across.pairs(shown):
        rows, others = shown[one].decoder(), shown[other].decoder()
        assert rows is not None
        assert others is not None
        ids, cosines = across.nearest(rows, others)
        _put(folder, f"across-{one}", {"hook": other, "ids": _b64(ids, "<u4"), "cosines": _b64(cosines, "<f4")})
        alike[one] = {"hook": other, "alike": int((cosines[:, 0] >= across.ALIKE).sum())}
    return alike


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


def _hooks(run: Run, hooks: Sequence[str] | None) -> Sequence[str]:
    """Return the hooks to show."""
    if hooks is None and not (hooks := run.recorded_hooks) and not graphs.listed(run):
        raise FileNotFoundError(
            f"no records in {run.records_folder}: `python -m experiments.explore --run_dir={run.path}` gathers them"
        )
    return hooks


def _left(shown: Sequence[Part]) -> float:
    """Return the bytes of a page, within `BYTES_PER_LATENT`, that are left for texts and activations."""
    first, texts = shown[0].store, shown[0].store.texts
    latents = sum(part.store.header.d_sae for part in shown)
    numbers = 4 * (2 * first["hist"].shape[1] + 3 * first["top_logits"].shape[1] + 4 * first["together"].shape[1])
    decoders = sum(part.store.header.d_sae * part.store.header.d_in for part in shown)
    examples = sum(len(part.store["example_row"]) for part in shown)
    fixed = 200_000 + 4 / 3 * (len(b"".join(texts.vocabulary)) + 2 * len(texts.vocabulary))
    fixed += 4 / 3 * (latents * (numbers + 200) + decoders + 15 * examples)
    return BYTES_PER_LATENT * max(latents, 500) - fixed


# ---- the files -----------------------------------------------------------------------------------------------------


def _manifest(run: Path, shown: Sequence[Part], rows: np.ndarray, cells: Shown, radius: int) -> dict[str, Any]:
    header = shown[0].store.texts.header
    return {
        "run": run.resolve().name,
        "model": header.model,
        "fingerprint": header.fingerprint,
        "rows": len(rows),
        "row_length": header.row_length,
        "special": list(header.special),
        "radius": radius,
        "shard": SHARD,
        "texts": cells.cuts(),
        "hooks": [
            {
                "hook": part.hook,
                "name": part.name,
                "run": part.beside,
                "layer": part.store.header.layer,
                "d_in": part.store.header.d_in,
                "d_sae": part.store.header.d_sae,
                "architecture": part.store.header.architecture,
                "sae": part.store.header.sae_sha256,
                "tokens": part.store.header.tokens,
                "dataset": part.store.texts.header.dataset,
                "split": part.store.texts.header.split,
                "direct_path": _number(part.store.header.direct_path),
                "other_seeds": 0 if part.names.recurrence is None else part.names.recurrence.others,
            }
            for part in shown
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


def _shard(part: Part, first: int, radius: int, decoder: np.ndarray | None) -> dict[str, Any]:
    """Return the details of some latents.

    Activations are in 65535ths of the latent's largest one, entries of decoder rows in 127ths of the row's largest one.
    """
    store = part.store
    last = min(first + SHARD, store.header.d_sae)
    rows = slice(first, last)
    examples = store["example_offsets"][first : last + 1]
    low, high = int(examples[0]), int(examples[-1])
    offsets = store["activation_offsets"][low : high + 1]
    near = is_near(part, first, last, radius)
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
        "row": _b64(part.first_row + store["example_row"][low:high].astype(np.int64), "<u4"),
        "position": _b64(store["example_position"][low:high], "<u2"),
        "value": _b64(store["example_value"][low:high], "<f4"),
        "activations": _b64(np.concatenate([[0], np.cumsum(np.bincount(example[near], minlength=high - low))]), "<u4"),
        "activation_position": _b64(store["activation_position"][offsets[0] : offsets[-1]][near], "<u2"),
        "activation_share": _b64(np.rint(np.clip(share[near], 0, 1) * 65535), "<u2"),
        "decoder": "" if decoder is None else _b64(_in_127ths(decoder[rows]), "i1"),
    }


def _in_127ths(rows: np.ndarray) -> np.ndarray:
    """Return rows of whole numbers from -127 to 127, in proportion to each row."""
    largest = np.abs(rows).max(axis=1, keepdims=True)
    return np.rint(127 * rows / np.where(largest > 0, largest, 1))


def _b64(values: Any, dtype: str) -> str:
    return base64.b64encode(np.ascontiguousarray(values).astype(dtype).tobytes()).decode("ascii")


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None
