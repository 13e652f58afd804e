"""Where a corpus's documents come from: the standard library, parquet shards, JSON lines, text files.

`find_units` turns a spec into units: pieces of data that are read at once and shuffled as wholes (a text file, a
parquet row group, some hundred JSON lines). Everything that can be wrong with the data and can be seen without
reading all of it is an error here, before anything is computed.
"""

from __future__ import annotations

import functools
import gzip
import hashlib
import importlib
import importlib.util
import inspect
import json
import pydoc
import re
import sys
import sysconfig
import tokenize
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pyarrow
import pyarrow.parquet

from bridge.nanochat.tokenizer import check_conversation
from jsae.files import is_system_error

Split = Literal["train", "heldout", "all"]
Document = str | dict[str, Any]  # text, or a chat {"messages": [...]}

_JSONL_CHUNK = 256  # lines of a unit


@dataclass(frozen=True)
class Unit:
    """A piece of data that is read at once.

    Attributes:
        name: says what it is and how large, but not where: the same data elsewhere has the same names.
        read: returns its documents.
        sorted_out: all of its documents are of the wanted split; if False, documents choose by `is_heldout`.
    """

    name: str
    read: Callable[[], Iterable[Document]]
    sorted_out: bool = True


def is_heldout(document: Document, fraction: float) -> bool:
    """Whether a document is held out: decided by a hash of its content, so wherever and whenever it is met."""
    text = document if isinstance(document, str) else json.dumps(document["messages"], sort_keys=True)
    return int.from_bytes(_digest(text)[:8], "big") < fraction * 2**64


def find_units(spec: str, split: Split, heldout_fraction: float) -> list[Unit]:
    """The units of a comma-separated spec: `stdlib`, parquet shards, `.jsonl[.gz]` or text files; globs allowed.

    A directory stands for the parquet shards in it. nanochat's own data directories (`base_data*`) keep nanochat's
    rule: the last shard is held out. Everywhere else documents are held out by hash.

    Raises:
        FileNotFoundError: nothing matches a part of the spec.
        ValueError: a file cannot be read as what its name says.
    """
    wanted = functools.partial(_wanted, split=split, fraction=heldout_fraction)
    units: list[Unit] = []
    for part in filter(None, (part.strip() for part in spec.split(","))):
        if part == "stdlib":
            units += _stdlib_units(wanted)
            continue
        for file in _matches(part):
            if file.suffix == ".parquet":
                units += _parquet_units(file, split)
            elif file.name.endswith((".jsonl", ".jsonl.gz")):
                units += _jsonl_units(file)
            else:
                text = _read_text(file)
                if text and wanted(text):
                    units.append(_text_unit(file.name, text, functools.partial(_read_text, file)))
    return units


def _wanted(document: Document, split: Split, fraction: float) -> bool:
    return split == "all" or is_heldout(document, fraction) == (split == "heldout")


def _matches(part: str) -> list[Path]:
    path = Path(part).expanduser()
    if path.is_dir():
        files = sorted(path.glob("*.parquet"))
        if not files:
            raise FileNotFoundError(f"no .parquet file in {path}; for text files give a glob such as '{part}/**/*.py'")
        return files
    if path.is_file():
        return [path]
    root = Path(path.anchor)  # '' for a relative one
    files = sorted(file for file in root.glob(str(path.relative_to(root))) if file.is_file())
    if not files:
        raise FileNotFoundError(
            f"no file matches {part!r}; give stdlib, a directory of parquet shards, files or a glob"
        )
    return files


def _text_unit(name: str, text: str, read: Callable[[], str]) -> Unit:
    """One document as a unit; the text is read again when its turn comes."""
    return Unit(f"text {name} {_digest(text).hex()[:12]}", functools.partial(_alone, read))


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()


def _alone(read: Callable[[], str]) -> list[Document]:
    return [read()]


def _read_text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8 text: byte {error.start} is {error.object[error.start]:#04x}") from error


# ---- parquet ------------------------------------------------------------------------------------------------------


def _parquet_units(file: Path, split: Split) -> list[Unit]:
    """A unit per row group of a shard with a string column `text`."""
    try:
        meta = pyarrow.parquet.read_metadata(file)
        schema = meta.schema.to_arrow_schema()
    except (pyarrow.ArrowException, OSError) as error:
        if is_system_error(error):
            raise
        raise ValueError(f"{file} is not a parquet file: {error}") from error
    if "text" not in schema.names:
        raise ValueError(f"{file} has no column 'text'; it has {', '.join(schema.names) or 'none'}")
    kind = schema.field("text").type
    if not (pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)):
        raise ValueError(f"{file}: the column 'text' must hold strings, it holds {kind}")
    by_shard = file.parent.name.startswith("base_data")
    if by_shard and split != "all":
        last = max(file.parent.glob("*.parquet"))
        if (file == last) != (split == "heldout"):
            return []
    size = file.stat().st_size
    return [
        Unit(f"parquet {file.name} {size} {group}", functools.partial(_read_row_group, file, group), by_shard)
        for group in range(meta.num_row_groups)
    ]


def _read_row_group(file: Path, group: int) -> list[Document]:
    try:
        with pyarrow.parquet.ParquetFile(file) as shard:
            column = shard.read_row_group(group, columns=["text"]).column("text")
        return [text for text in column.to_pylist() if text]
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        if is_system_error(error):
            raise
        raise ValueError(f"{file}, row group {group}: cannot be read: {error}") from error


# ---- JSON lines ---------------------------------------------------------------------------------------------------


def _jsonl_units(file: Path) -> list[Unit]:
    """A unit per chunk of lines. Every line is parsed once here, so that a broken one is found before the work starts.

    A plain file is read again by offset; of a compressed one, which cannot be, the chunks stay in memory, compressed.
    """
    compressed = file.suffix == ".gz"
    units: list[Unit] = []
    chunk: list[bytes] = []
    start = first = 0
    for number, line in enumerate(_lines(file, compressed), 1):
        _parse_line(line, file, number)
        chunk.append(line)
        if len(chunk) == _JSONL_CHUNK:
            units.append(_jsonl_unit(file, b"".join(chunk), start, first, compressed))
            start, first, chunk = start + sum(map(len, chunk)), number, []
    if chunk:
        units.append(_jsonl_unit(file, b"".join(chunk), start, first, compressed))
    return units


def _lines(file: Path, compressed: bool) -> Iterator[bytes]:
    try:
        with gzip.open(file) if compressed else file.open("rb") as stream:
            yield from stream
    except (OSError, EOFError, zlib.error) as error:
        if is_system_error(error):
            raise
        raise ValueError(f"{file} cannot be read: {error}") from error


def _jsonl_unit(file: Path, data: bytes, start: int, first: int, compressed: bool) -> Unit:
    if compressed:
        fetch = functools.partial(zlib.decompress, zlib.compress(data))
    else:
        fetch = functools.partial(_read_bytes, file, start, len(data))
    name = f"jsonl {file.name} {first} {hashlib.sha256(data).hexdigest()[:12]}"
    return Unit(name, functools.partial(_read_jsonl, file, fetch, first), sorted_out=False)


def _read_bytes(file: Path, start: int, length: int) -> bytes:
    with file.open("rb") as stream:
        stream.seek(start)
        return stream.read(length)


def _read_jsonl(file: Path, fetch: Callable[[], bytes], first: int) -> list[Document]:
    lines = fetch().split(b"\n")
    return [doc for number, line in enumerate(lines, first + 1) if (doc := _parse_line(line, file, number))]


def _parse_line(line: bytes, file: Path, number: int) -> Document | None:
    """The document of one line; None for a blank line or an empty text."""
    if not line.strip():
        return None
    try:
        record = json.loads(line)
        if isinstance(record, dict) and isinstance(record.get("text"), str):
            return record["text"] or None
        if isinstance(record, dict) and "messages" in record:
            check_conversation(record)
            return {"messages": record["messages"]}
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file}, line {number}: {error}") from error
    raise ValueError(f'{file}, line {number}: expected {{"text": ...}} or {{"messages": [...]}}')


# ---- the standard library -----------------------------------------------------------------------------------------


def _stdlib_units(wanted: Callable[[Document], bool]) -> list[Unit]:
    """The running interpreter's library: its Python source, the docs of its compiled modules, the language reference.

    Each document once: exact copies are dropped.
    """
    units: list[Unit] = []
    seen: set[bytes] = set()
    for name, text, read in (*_stdlib_files(), *_documentation()):
        digest = _digest(text)
        if text and digest not in seen:
            seen.add(digest)
            if wanted(text):
                units.append(_text_unit(name, text, read))
    return units


def _stdlib_files() -> Iterator[tuple[str, str, Callable[[], str]]]:
    root = Path(sysconfig.get_path("stdlib"))
    for file in sorted(root.rglob("*.py")):
        name = file.relative_to(root).as_posix()
        # Third parties' packages; what the machine was built with; the reference, which comes as text below.
        if "-packages/" in name or name.startswith("_sysconfigdata") or name == "pydoc_data/topics.py":
            continue
        yield name, _read_source(file), functools.partial(_read_source, file)


def _read_source(file: Path) -> str:
    """A source file in the encoding it declares; '' if it cannot be read (the test package has broken ones)."""
    try:
        with tokenize.open(file) as stream:
            return stream.read()
    except (OSError, SyntaxError, ValueError, LookupError) as error:
        if is_system_error(error):
            raise
        return ""


@functools.cache
def _documentation() -> tuple[tuple[str, str, Callable[[], str]], ...]:
    """What `help` says of the modules written in C, whose docstrings are in no source file, and of the language."""
    found = [(f"help({name})", text) for name, text in _compiled_module_docs()]
    try:
        from pydoc_data.topics import topics
    except ImportError:
        topics = {}
    found += [(f"topic {name}", text) for name, text in sorted(topics.items())]
    return tuple((name, text, functools.partial(str, text)) for name, text in found)


def _compiled_module_docs() -> Iterator[tuple[str, str]]:
    for name in sorted(sys.stdlib_module_names | set(sys.builtin_module_names)):
        if name.startswith(("_test", "_xx", "xx", "_ctypes_test")):
            continue
        try:
            spec = importlib.util.find_spec(name)
            if spec is None or not spec.loader or (spec.origin or "").endswith((".py", ".pyc")):
                continue
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # some are deprecated
                text = _module_doc(importlib.import_module(name), name)
        except Exception as error:  # a module that this build lacks or that does not import here has nothing to say
            if is_system_error(error):
                raise
            continue
        yield name, text


def _module_doc(module: Any, name: str) -> str:
    """The module's docstring and `help` of its own functions and classes; its data are the machine's, not Python's."""
    parts = [f"Help on module {name}:", inspect.getdoc(module) or ""]
    for key, member in sorted(vars(module).items()):
        # Hooks of sys are there to be replaced: what hangs there is the process's own.
        own = getattr(member, "__module__", name) in (name, None) and not key.endswith("hook")
        if own and not key.startswith("_") and (inspect.isclass(member) or inspect.isroutine(member)):
            parts.append(pydoc.plaintext.document(member, key))
    text = re.sub(r".\x08", "", "\n\n".join(parts))
    # What differs from process to process: the types that happen to be loaded, and addresses.
    text = re.sub(r"^ *\|  Built-in subclasses:\n(?: *\|   +\S.*\n)+ *\| *\n", "", text, flags=re.MULTILINE)
    return re.sub(r" at 0x[0-9a-fA-F]+", "", text)
