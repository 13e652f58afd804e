"""Which data a corpus reads: parts of a spec to files, files to units, and what of them is held out.

A unit is a piece of data that is read at once and shuffled as a whole: a text file or some of a large one, a parquet
row group, some hundred JSON lines. What can be wrong with the data and can be seen without reading all of it is an
error here, before anything is computed. Files are not trusted: see the limits in `documents`, `lines` and `pages`.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import io
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path

from bridge.nanochat import library, lines, shards
from bridge.nanochat.contents import read_again
from bridge.nanochat.documents import (
    PIECE,
    Document,
    Split,
    Unit,
    by_hash,
    by_place,
    heldout_digest,
    is_heldout,
    pieces,
)

__all__ = ["Document", "Split", "Unit", "documents", "find_units", "is_heldout"]

FORMS = ("text", "jsonl", "json", "parquet")
"""Forms of files; written before a path with a colon, one of them says how to read it whatever its name."""

_SUFFIXES = {".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "json", ".parquet": "parquet"}
_PACKED = {".gz": "gunzip", ".zst": "zstd -d", ".xz": "xz -d", ".bz2": "bunzip2", ".zip": "unzip", ".lz4": "lz4 -d"}
_BINARY = {
    b"\x1f\x8b": "gzip-compressed: name it .jsonl.gz if it holds JSON lines, or unpack it",
    b"PAR1": "a parquet file: name it .parquet",
    b"PK\x03\x04": "a zip archive: unpack it",
    b"\x28\xb5\x2f\xfd": "zstd-compressed: unpack it",
    b"\xff\xfe": "UTF-16 text: save it as UTF-8",
    b"\xfe\xff": "UTF-16 text: save it as UTF-8",
    b"ARROW1": "an Arrow file, as Dataset.save_to_disk writes it: save it with Dataset.to_parquet",
}


def find_units(spec: str, split: Split, heldout_fraction: float) -> list[Unit]:
    """Return the units of a comma-separated spec; a unit's `read` gives the documents of the split.

    Parts of a spec are `stdlib`, parquet shards or a directory of them, `.jsonl`, `.ndjson` and `.json` files, also
    with `.gz`, and text files; suffixes in any letter case; globs, `~` and environment variables. A form of `FORMS` and
    a colon before a path says how to read it: `text:notes.json` is prose.

    What is held out: of nanochat's own directories (`base_data*`) the last shard. Otherwise whole documents, by a hash
    of their content. If that leaves one side without any, as with a single text file, the last `heldout_fraction` of
    every document, from the nearest paragraph, line, word or turn of a chat on.

    Raises:
        FileNotFoundError: nothing matches a part of the spec.
        ValueError: a file cannot be read as what its name says, or is larger in some way than it may be.
    """
    return split_units(all_units(spec), split, heldout_fraction)


def all_units(spec: str) -> list[Unit]:
    """Return the units of a spec with all their documents (see `find_units`)."""
    spool = lines.Spool()
    found: list[Unit] = []
    checked = 0
    for part in filter(None, (part.strip() for part in spec.split(","))):
        if part == "stdlib":
            found += library.units()
            continue
        form, files = _matches(part)
        for file in files:
            kind, gzipped = (form, file.suffix.lower() == ".gz") if form else _form(file)
            if kind == "parquet":
                siblings = _shards(file.parent) if file.parent.name.startswith("base_data") else [file]
                new = shards.units(file, siblings, checked)
                found, checked = found + new, checked + len(new)
                continue
            _refuse_binary(file, kind, gzipped)
            if kind == "text":
                found += _text_units(file, asked=form == "text")
            else:
                found += lines.units(file, kind, gzipped, spool)
    return found


def split_units(units: list[Unit], split: Split, fraction: float) -> list[Unit]:
    """Return units that give the documents of a split alone (see `find_units`)."""
    if split == "all":
        return units
    if is_split_by_place(units, fraction):
        return [
            dataclasses.replace(unit, read=functools.partial(by_place, unit.read, split, fraction, unit.span))
            for unit in units
        ]
    chosen = []
    for unit in units:
        side = _side(unit, fraction)
        if side is None:
            chosen.append(dataclasses.replace(unit, read=functools.partial(by_hash, unit.read, split, fraction)))
        elif side == split:
            chosen.append(unit)
    return chosen


def is_split_by_place(units: list[Unit], fraction: float) -> bool:
    """Return whether the last share of every document is held out, because whole documents leave one side empty."""
    if not 0 < fraction < 1 or any(unit.side for unit in units):
        return False
    missing = {"train", "heldout"}
    for unit in units:
        side = _side(unit, fraction)
        sides = (side,) if side else (("train", "heldout")[is_heldout(d, fraction)] for d in unit.read())
        for found in sides:
            missing.discard(found)
            if not missing:
                return False
    return bool(units)


def _side(unit: Unit, fraction: float) -> Split | None:
    """The split of a unit that belongs to one as a whole."""
    if unit.content is None:
        return unit.side
    return "heldout" if heldout_digest(unit.content, fraction) else "train"


def documents(unit: Unit) -> Iterator[Document]:
    """Yield what a unit gives to be tokenized: its documents, long ones in pieces."""
    for document in unit.read():
        yield from pieces(document)


# ---- paths --------------------------------------------------------------------------------------------------------


def _matches(part: str) -> tuple[str, list[Path]]:
    """The form that a part of a spec asks for, or '', and its files."""
    form, colon, rest = part.partition(":")
    form, part = (form, rest) if colon and form in FORMS else ("", part)
    path = _expanded(part)
    if path.is_dir():
        return form, _of_directory(path, part)
    if path.is_file():
        return form, [path]
    _check_descriptors()
    root = Path(path.anchor)  # '' for a relative one
    files = sorted(file for file in root.glob(str(path.relative_to(root))) if file.is_file())
    _check_descriptors()
    if not files:
        raise FileNotFoundError(
            f"no file matches {part!r}; give stdlib, a directory of parquet shards, files or a glob"
        )
    return form, files


def _expanded(part: str) -> Path:
    """The path of a part, `~` and environment variables replaced."""
    if Path(part).exists():
        return Path(part)
    path = os.path.expandvars(part)
    if (unset := re.search(r"\$\{?(\w+)\}?", path)) and not Path(path).exists():
        raise ValueError(f"{part!r} names the environment variable {unset[1]}, which is not set")
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        user = Path(path).parts[0]
        raise FileNotFoundError(f"{part!r}: there is no home directory of {user!r} here") from error


def _of_directory(path: Path, part: str) -> list[Path]:
    files = _shards(path)
    if files:
        return files
    deeper = next((file for file in path.rglob("*") if file.suffix.lower() == ".parquet"), None)
    if deeper is not None:
        raise FileNotFoundError(f"no .parquet file in {path}, but further down: give '{part}/**/*.parquet'")
    if any(file.suffix == ".arrow" for file in path.iterdir()):
        raise FileNotFoundError(
            f"no .parquet file in {path}, but .arrow files, as Dataset.save_to_disk writes: save it with "
            "Dataset.to_parquet"
        )
    raise FileNotFoundError(f"no .parquet file in {path}; for text files give a glob such as '{part}/**/*.py'")


def _shards(folder: Path) -> list[Path]:
    return sorted(file for file in folder.iterdir() if file.suffix.lower() == ".parquet")


def _check_descriptors() -> None:
    """Raise OSError where no file can be opened: newer Pythons' `glob` then finds fewer files, and says nothing."""
    with Path(os.devnull).open("rb"):
        pass


def _form(file: Path) -> tuple[str, bool]:
    """How a file is to be read by its name: the form, and whether through gzip."""
    suffixes = [suffix.lower() for suffix in file.suffixes[-2:]]
    last = suffixes[-1] if suffixes else ""
    inner = _SUFFIXES.get(suffixes[0]) if len(suffixes) == 2 else None
    if last == ".gz" and inner in ("jsonl", "json"):
        return inner, True
    if last in _PACKED:
        raise ValueError(
            f"{file} is compressed, and only .jsonl.gz, .ndjson.gz and .json.gz are read so: unpack it with "
            f"{_PACKED[last]}"
        )
    return _SUFFIXES.get(last, "text"), False


def _refuse_binary(file: Path, kind: str, gzipped: bool) -> None:
    """Refuse what is not the UTF-8 text that its name says."""
    with file.open("rb") as stream:
        head = stream.read(8)
    for magic, what in _BINARY.items():
        if head.startswith(magic) and not (gzipped and magic == b"\x1f\x8b"):
            raise ValueError(f"{file} is not {'UTF-8 text' if kind == 'text' else kind}; it is {what}")


# ---- text files ---------------------------------------------------------------------------------------------------


def _text_units(file: Path, asked: bool) -> list[Unit]:
    """A text file as one document; of a long one, a unit per piece, read again by place."""
    whole, found = hashlib.sha256(), []
    with file.open("rb") as stream:
        for start, data in _byte_pieces(stream):
            if start == 0 and not asked:
                _ask_about_json(file, data)
            if (place := data.find(0)) >= 0:
                raise ValueError(
                    f"{file} is not UTF-8 text: byte {start + place} is 0x00, as in UTF-16 or in no text at all"
                )
            whole.update(_decoded(file, start, data).encode())
            found.append((start, len(data), hashlib.sha256(data).digest()))
    digest = whole.hexdigest()[:12]
    size = found[-1][0] + found[-1][1] if found else 0
    return [
        Unit(
            f"text {file.name} {digest}" + (f" {start}" if len(found) > 1 else ""),
            functools.partial(_read_piece, file, start, length, expected),
            (file.name, digest),
            content=whole.digest(),
            span=(start / size, (start + length) / size),
        )
        for start, length, expected in found
    ]


def _byte_pieces(stream: io.BufferedIOBase) -> Iterator[tuple[int, bytes]]:
    """A file in pieces of at most `PIECE` bytes, that end at a paragraph, a line, a space, or at least a character."""
    start, held = 0, b""
    while held := held + stream.read(PIECE - len(held)):
        end = len(held)
        if end == PIECE:
            places = (held.rfind(separator, PIECE // 2) + len(separator) for separator in (b"\n\n", b"\n", b" "))
            end = next((place for place in places if place > PIECE // 2), 0) or _end_of_character(held)
        yield start, held[:end]
        start, held = start + end, held[end:]


def _end_of_character(data: bytes) -> int:
    """Where the last whole character of UTF-8 ends; a carriage return is left for the line feed that may follow."""
    end = len(data) - (data[-1] == 0x0D)
    for back in range(1, 4):
        if data[end - back] >= 0xC0:
            return end - back
        if data[end - back] < 0x80:
            break
    return end


def _decoded(file: Path, start: int, data: bytes) -> str:
    """Text of UTF-8, ends of lines as Python has them."""
    try:
        text = data.decode("utf-8-sig" if start == 0 else "utf-8")
    except UnicodeDecodeError as error:
        place, byte = start + error.start, error.object[error.start]
        raise ValueError(f"{file} is not UTF-8 text: byte {place} is {byte:#04x}") from error
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _read_piece(file: Path, start: int, length: int, digest: bytes) -> list[Document]:
    text = _decoded(file, start, read_again(file, start, length, digest))
    return [text] if text else []


def _ask_about_json(file: Path, head: bytes) -> None:
    """Refuse a file of a text's name whose content is JSON: as prose it would be learned with all its brackets."""
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
            f"is an array of them; or give it as text:{file} to learn it as it is written, brackets and all"
        )
