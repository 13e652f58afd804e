"""The data of a corpus: find the files of a spec, divide them into units, and hold out a part of them.

A unit is a part of the data that is read at once and shuffled as a whole: a text file or a piece of a large one, a
parquet row group, a few hundred JSON lines. Faults in the data that can be detected without reading all of it are
reported here, before any computation. Files are not trusted: see the limits in `documents`, `lines` and `pages`.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import io
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from bridge.nanochat import library, library_chats, lines, shards
from bridge.nanochat.contents import read_again
from bridge.nanochat.documents import (
    PIECE,
    Document,
    Split,
    Unit,
    heldout_digest,
    is_heldout,
    pieces,
    split_by_hash,
    split_by_position,
)

__all__ = ["Document", "Split", "Unit", "documents", "find_units", "is_heldout"]

BUILT_IN: Mapping[str, Callable[[], Sequence[Unit]]] = {"stdlib": library.units, "stdlib_chats": library_chats.units}
"""Data that every Python installation has, by name."""
FORMS = ("text", "jsonl", "json", "parquet")
"""Forms of files; `FORM:path` reads a file in this form, whatever its name."""

_SUFFIXES = {".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "json", ".parquet": "parquet"}
_PACKED = {".gz": "gunzip", ".zst": "zstd -d", ".xz": "xz -d", ".bz2": "bunzip2", ".zip": "unzip", ".lz4": "lz4 -d"}
_BINARY = {
    b"\x1f\x8b": "gzip-compressed: name it .jsonl.gz if it contains JSON lines, or unpack it",
    b"PAR1": "a parquet file: name it .parquet",
    b"PK\x03\x04": "a zip archive: unpack it",
    b"\x28\xb5\x2f\xfd": "zstd-compressed: unpack it",
    b"\xff\xfe": "UTF-16 text: save it as UTF-8",
    b"\xfe\xff": "UTF-16 text: save it as UTF-8",
    b"ARROW1": "an Arrow file, as Dataset.save_to_disk writes it: save the data with Dataset.to_parquet",
}


def find_units(spec: str, split: Split, heldout_fraction: float) -> list[Unit]:
    """Return the units of a comma-separated spec; a unit's `read` returns the documents of the split.

    Parts of a spec are the names in `BUILT_IN`, parquet shards or directories of them, `.jsonl`, `.ndjson` and `.json`
    files, also with `.gz`, and text files. Suffixes are not case-sensitive. Globs, `~` and environment variables are
    expanded. One of `FORMS` and a colon before a path determine how it is read: `text:notes.json` is read as prose.

    In nanochat's own directories (`base_data*`) the last shard is held out. Otherwise whole documents are, selected by
    a hash of their content. If this leaves one split empty, as with a single text file, the last `heldout_fraction` of
    every document is held out, cut at the nearest paragraph, line, word or turn of a chat.

    Args:
        spec: the data.
        split: "train", "heldout" or "all".
        heldout_fraction: the fraction that is held out.

    Raises:
        FileNotFoundError: no file matches a part of the spec.
        ValueError: a file cannot be read in the form that its name implies, or exceeds a limit.
    """
    return split_units(all_units(spec), split, heldout_fraction)


def all_units(spec: str) -> list[Unit]:
    """Return the units of a spec, with the documents of all splits (see `find_units`)."""
    spool = lines.Spool()
    units: list[Unit] = []
    checked = 0
    for part in filter(None, (part.strip() for part in spec.split(","))):
        if part in BUILT_IN:
            units += BUILT_IN[part]()
            continue
        form, files = _matches(part)
        for file in files:
            kind, gzipped = (form, file.suffix.lower() == ".gz") if form else _form(file)
            if kind == "parquet":
                siblings = _shards(file.parent) if file.parent.name.startswith("base_data") else [file]
                new = shards.units(file, siblings, checked)
                units, checked = units + new, checked + len(new)
                continue
            _refuse_binary(file, kind, gzipped)
            if kind == "text":
                units += _text_units(file, explicit=form == "text")
            else:
                units += lines.units(file, kind, gzipped, spool)
    return units


def split_units(units: list[Unit], split: Split, fraction: float) -> list[Unit]:
    """Return units with the documents of a split only (see `find_units`)."""
    if split == "all":
        return units
    if is_split_by_place(units, fraction):
        return [
            dataclasses.replace(unit, read=functools.partial(split_by_position, unit.read, split, fraction, unit.span))
            for unit in units
        ]
    chosen = []
    for unit in units:
        side = _side(unit, fraction)
        if side is None:
            chosen.append(dataclasses.replace(unit, read=functools.partial(split_by_hash, unit.read, split, fraction)))
        elif side == split:
            chosen.append(unit)
    return chosen


def is_split_by_place(units: list[Unit], fraction: float) -> bool:
    """Return whether the end of every document is held out, because whole documents would leave one split empty."""
    if not 0 < fraction < 1 or any(unit.side for unit in units):
        return False
    missing = {"train", "heldout"}
    for unit in units:
        side = _side(unit, fraction)
        sides = (side,) if side else (("train", "heldout")[is_heldout(d, fraction)] for d in unit.read())
        for side in sides:
            missing.discard(side)
            if not missing:
                return False
    return bool(units)


def _side(unit: Unit, fraction: float) -> Split | None:
    """Return the split that a unit belongs to as a whole, or None."""
    if unit.content is None:
        return unit.side
    return "heldout" if heldout_digest(unit.content, fraction) else "train"


def documents(unit: Unit) -> Iterator[Document]:
    """Yield the documents of a unit for tokenization, long ones in pieces."""
    for document in unit.read():
        yield from pieces(document)


# ---- paths --------------------------------------------------------------------------------------------------------


def _matches(part: str) -> tuple[str, list[Path]]:
    """Return the explicit form of a part of a spec, or '', and its files."""
    form, colon, rest = part.partition(":")
    form, part = (form, rest) if colon and form in FORMS else ("", part)
    path = _expanded(part)
    if path.is_dir():
        return form, _directory_shards(path, part)
    if path.is_file():
        return form, [path]
    _check_descriptors()
    root = Path(path.anchor)  # '' for a relative path
    files = sorted(file for file in root.glob(str(path.relative_to(root))) if file.is_file())
    _check_descriptors()
    if not files:
        raise FileNotFoundError(
            f"no file matches {part!r}; give stdlib or stdlib_chats, a directory of parquet shards, files or a glob"
        )
    return form, files


def _expanded(part: str) -> Path:
    """Return the path of a part with `~` and environment variables expanded."""
    if Path(part).exists():
        return Path(part)
    path = os.path.expandvars(part)
    if (unset := re.search(r"\$\{?(\w+)\}?", path)) and not Path(path).exists():
        raise ValueError(f"{part!r} contains the environment variable {unset[1]}, which is not set")
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        user = Path(path).parts[0]
        raise FileNotFoundError(f"{part!r}: no home directory of {user!r} is known") from error


def _directory_shards(path: Path, part: str) -> list[Path]:
    """Return the parquet files in a directory. Raises FileNotFoundError, with a suggestion, if there are none."""
    files = _shards(path)
    if files:
        return files
    nested = next((file for file in path.rglob("*") if file.suffix.lower() == ".parquet"), None)
    if nested is not None:
        raise FileNotFoundError(f"no .parquet file in {path}, but in its subdirectories: give '{part}/**/*.parquet'")
    if any(file.suffix == ".arrow" for file in path.iterdir()):
        raise FileNotFoundError(
            f"no .parquet file in {path}, but .arrow files, as Dataset.save_to_disk writes them: save the data with "
            "Dataset.to_parquet"
        )
    raise FileNotFoundError(f"no .parquet file in {path}; for text files give a glob such as '{part}/**/*.py'")


def _shards(folder: Path) -> list[Path]:
    return sorted(file for file in folder.iterdir() if file.suffix.lower() == ".parquet")


def _check_descriptors() -> None:
    """Raise OSError if no file can be opened, in which case `glob` of newer Pythons silently finds fewer files."""
    with Path(os.devnull).open("rb"):
        pass


def _form(file: Path) -> tuple[str, bool]:
    """Return the form of a file by its name, and whether it is gzipped."""
    suffixes = [suffix.lower() for suffix in file.suffixes[-2:]]
    last = suffixes[-1] if suffixes else ""
    inner = _SUFFIXES.get(suffixes[0]) if len(suffixes) == 2 else None
    if last == ".gz" and inner in ("jsonl", "json"):
        return inner, True
    if last in _PACKED:
        raise ValueError(
            f"{file} is compressed; only .jsonl.gz, .ndjson.gz and .json.gz are read compressed: unpack it with "
            f"{_PACKED[last]}"
        )
    return _SUFFIXES.get(last, "text"), False


def _refuse_binary(file: Path, kind: str, gzipped: bool) -> None:
    """Raise ValueError for a file with the magic number of a binary format."""
    with file.open("rb") as stream:
        head = stream.read(8)
    for magic, description in _BINARY.items():
        if head.startswith(magic) and not (gzipped and magic == b"\x1f\x8b"):
            raise ValueError(f"{file} is not {'UTF-8 text' if kind == 'text' else kind}; it is {description}")


# ---- text files ---------------------------------------------------------------------------------------------------


def _text_units(file: Path, explicit: bool) -> list[Unit]:
    """Return a unit per piece of a text file, which is one document; pieces are read again by offset."""
    hasher, spans = hashlib.sha256(), []
    with file.open("rb") as stream:
        for start, data in _byte_pieces(stream):
            if start == 0 and not explicit:
                _refuse_json(file, data)
            if (offset := data.find(0)) >= 0:
                raise ValueError(
                    f"{file} is not UTF-8 text: byte {start + offset} is 0x00, as in UTF-16 or binary data"
                )
            hasher.update(_decoded(file, start, data).encode())
            spans.append((start, len(data), hashlib.sha256(data).digest()))
    digest = hasher.hexdigest()[:12]
    size = spans[-1][0] + spans[-1][1] if spans else 0
    return [
        Unit(
            f"text {file.name} {digest}" + (f" {start}" if len(spans) > 1 else ""),
            functools.partial(_read_piece, file, start, length, expected),
            (file.name, digest),
            content=hasher.digest(),
            span=(start / size, (start + length) / size),
            where=f"from byte {start}" if len(spans) > 1 else "",
        )
        for start, length, expected in spans
    ]


def _byte_pieces(stream: io.BufferedIOBase) -> Iterator[tuple[int, bytes]]:
    """Yield (start, bytes) of pieces of at most `PIECE` bytes that end at a paragraph, line, space or character."""
    start, buffer = 0, b""
    while buffer := buffer + stream.read(PIECE - len(buffer)):
        end = len(buffer)
        if end == PIECE:
            cuts = (buffer.rfind(separator, PIECE // 2) + len(separator) for separator in (b"\n\n", b"\n", b" "))
            end = next((cut for cut in cuts if cut > PIECE // 2), 0) or _end_of_character(buffer)
        yield start, buffer[:end]
        start, buffer = start + end, buffer[end:]


def _end_of_character(data: bytes) -> int:
    """Return the end of the last complete UTF-8 character, without a final carriage return, which may begin CR LF."""
    end = len(data) - (data[-1] == 0x0D)
    for back in range(1, 4):
        if data[end - back] >= 0xC0:
            return end - back
        if data[end - back] < 0x80:
            break
    return end


def _decoded(file: Path, start: int, data: bytes) -> str:
    """Decode UTF-8 and normalise line endings. Raises ValueError with the offset of an invalid byte."""
    try:
        text = data.decode("utf-8-sig" if start == 0 else "utf-8")
    except UnicodeDecodeError as error:
        offset, byte = start + error.start, error.object[error.start]
        raise ValueError(f"{file} is not UTF-8 text: byte {offset} is {byte:#04x}") from error
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _read_piece(file: Path, start: int, length: int, digest: bytes) -> list[Document]:
    text = _decoded(file, start, read_again(file, start, length, digest))
    return [text] if text else []


def _refuse_json(file: Path, head: bytes) -> None:
    """Raise ValueError for a file with the name of a text but JSON content, whose syntax would be taken for prose."""
    text = head.decode("utf-8-sig", "replace").lstrip()
    if text[:1] not in ("{", "["):
        return
    line = text.split("\n", 1)[0]
    try:
        value = json.loads(line) if len(line) < PIECE else None
    except (ValueError, RecursionError):
        value = None
    records = isinstance(value, dict) or (isinstance(value, list) and value and isinstance(value[0], dict))
    if records or re.match(r'(\[\s*)?\{\s*"(?:[^"\\\n]|\\.){0,200}"\s*:', text):
        raise ValueError(
            f"{file} looks like JSON, not like text: name it .jsonl if every line is a document or a chat, .json if it "
            f"is an array of them; or give text:{file} to read it as plain text"
        )
