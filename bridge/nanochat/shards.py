"""Documents from parquet files: nanochat's own shards, and those of Hugging Face's `datasets` and other tools."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from bridge.nanochat import pages
from bridge.nanochat.contents import Content, DataChangedError
from bridge.nanochat.documents import CHAT_KEYS, MAX_DOCUMENT, Document, Split, Unit, document_from_record
from jsae.files import is_system_error

_ROWS = 8  # decoded at a time
_MAX_CELLS = 500_000  # in that many rows; each value in a list becomes a Python object
_CHECKED = 64  # row groups whose pages are checked before the run starts; the others are checked when they are read
_BUFFER = 2**20


def units(file: Path, siblings: Sequence[Path], checked: int) -> list[Unit]:
    """Return a unit per row group of a shard with a column `text`, `messages` or `conversations`.

    For nanochat's own directories (`base_data*`) its rule applies: the last shard is held out.

    Args:
        file: the shard.
        siblings: all shards in its directory.
        checked: number of row groups of other files that have been checked already.

    Raises:
        ValueError: not a parquet file, no such column, or pages beyond the limits (see `bridge.nanochat.pages`).
    """
    with file.open("rb") as stream:
        try:
            footer = pages.footer_length(stream)
        except ValueError as error:
            raise ValueError(f"{file} is not a parquet file that can be read: {error}") from error
    content = Content(file, tail=footer + 8)
    try:
        meta = _metadata(file)
        schema = meta.schema.to_arrow_schema()
    except Exception as error:  # pyarrow raises many kinds of exceptions for damaged files
        if is_system_error(error):
            raise
        raise ValueError(f"{file} is not a parquet file: {_first_line(error)}") from error
    column = _column(file, schema)
    side: Split | None = None
    if file.parent.name.startswith("base_data"):
        side = "heldout" if file == max(siblings) else "train"
    group_units = []
    for group in range(meta.num_row_groups):
        read = functools.partial(_documents, content, column, group)
        name = f"parquet {file.name} {content.digest} {group}"
        source, where = (file.name, content.digest), f"row group {group}"
        group_units.append(Unit(name, read, source, side=side, where=where, number=group))
        if checked + group < _CHECKED:
            _check_group(content, meta, column, group)
    if group_units and column != "text":
        next(iter(group_units[0].read()), None)  # so that a chat that nanochat cannot render is reported now
    return group_units


def _metadata(file: Path) -> pyarrow.parquet.FileMetaData:
    return pyarrow.parquet.ParquetFile(
        file, thrift_string_size_limit=pages.MAX_FOOTER, thrift_container_size_limit=2**20
    ).metadata


def _column(file: Path, schema: pyarrow.Schema) -> str:
    """Return the name of the column with the documents."""
    kinds = {name: schema.field(name).type for name in ("text", *CHAT_KEYS) if schema.names.count(name) == 1}
    if "text" in kinds and _is_text(kinds["text"]):
        return "text"
    for name in CHAT_KEYS:
        if name in kinds and _is_chat(kinds[name]):
            return name
    if "text" in kinds:
        raise ValueError(f"{file}: the column 'text' must contain strings, got {kinds['text']}")
    if kinds:
        name, kind = next(iter(kinds.items()))
        raise ValueError(
            f"{file}: the column {name!r} must contain lists of messages with role and content, got {kind}"
        )
    names = ", ".join(schema.names[:20]) + (f" and {len(schema.names) - 20} more" if len(schema.names) > 20 else "")
    raise ValueError(
        f"{file} has no column 'text'; it has {names or 'none'}. A document is a string in a column text, or a list of "
        f"messages in a column {' or '.join(CHAT_KEYS)}: rename yours"
    )


def _is_text(kind: pyarrow.DataType) -> bool:
    kind = kind.value_type if pyarrow.types.is_dictionary(kind) else kind
    views = getattr(pyarrow.types, "is_string_view", lambda _: False)
    return pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind) or views(kind)


def _is_list(kind: pyarrow.DataType) -> bool:
    return pyarrow.types.is_list(kind) or pyarrow.types.is_large_list(kind)


def _is_chat(kind: pyarrow.DataType) -> bool:
    """Return whether a type is a list of structs, or the struct of lists that `datasets.Sequence` writes."""
    is_list = _is_list(kind)
    kind = kind.value_type if is_list else kind
    if not pyarrow.types.is_struct(kind):
        return False
    fields = {field.name: field.type for field in kind}
    if not is_list and not any(map(_is_list, fields.values())):
        return False
    return bool({"role", "from"} & fields.keys()) and bool({"content", "value"} & fields.keys())


# ---- row groups ---------------------------------------------------------------------------------------------------


def _check_group(content: Content, meta: pyarrow.parquet.FileMetaData, column: str, group: int) -> None:
    """Check the pages of a column in a row group without unpacking them. Raises ValueError."""
    try:
        row_group = meta.row_group(group)
        with content.path.open("rb") as stream:
            for i in range(row_group.num_columns):
                chunk = row_group.column(i)
                if chunk.path_in_schema.split(".")[0] == column:
                    start = min(filter(None, (chunk.dictionary_page_offset, chunk.data_page_offset)), default=0)
                    pages.check_column(stream, start, chunk.total_compressed_size, "." in chunk.path_in_schema)
    except Exception as error:  # pyarrow raises many kinds of exceptions for damaged footers
        if is_system_error(error):
            raise
        message = f"{content.path}, row group {group}: cannot be read: {_first_line(error)}"
        raise _RefusedError(message) from error


def _documents(content: Content, column: str, group: int) -> Iterator[Document]:
    """Yield the documents of a row group, a few rows at a time. Raises `DataChangedError` if the file has changed."""
    content.verify()
    number = -1
    try:
        with pyarrow.parquet.ParquetFile(
            content.path,
            read_dictionary=[column] if column == "text" else None,
            buffer_size=_BUFFER,
            thrift_string_size_limit=pages.MAX_FOOTER,
            thrift_container_size_limit=2**20,
        ) as shard:
            _check_group(content, shard.metadata, column, group)
            for batch in shard.iter_batches(_ROWS, row_groups=[group], columns=[column], use_threads=False):
                for row in _rows(batch.column(column), content, group, number + 1):
                    number += 1
                    if row is not None and (document := _document(row, content, group, number)):
                        yield document
    except (DataChangedError, _RefusedError):
        raise
    except Exception as error:  # pyarrow raises many kinds of exceptions for damaged files
        if is_system_error(error):
            raise
        content.verify()
        raise ValueError(f"{content.path}, row group {group}: cannot be read: {_first_line(error)}") from error
    content.verify()


class _RefusedError(ValueError):
    """A row that was read, but is too large or malformed."""


def _rows(rows: pyarrow.Array, content: Content, group: int, first: int) -> Iterator[Any]:
    """Check the size of the rows and yield them as Python values."""
    location = f"{content.path}, row group {group}, rows from {first}"
    if _is_text(rows.type):
        encoded = pyarrow.types.is_dictionary(rows.type)
        for number, row in enumerate(rows, first):
            if row.is_valid and (row.value if encoded else row).as_buffer().size > MAX_DOCUMENT:
                raise _RefusedError(f"{content.path}, row group {group}, row {number}: {_too_long()}")
            yield row.as_py()
        return
    if rows.nbytes > 2 * MAX_DOCUMENT:
        raise _RefusedError(f"{location}: {_too_long()}")
    if (cells := _cells(rows)) > _MAX_CELLS:
        raise _RefusedError(f"{location}: {cells:,} values in {_ROWS} chats; at most {_MAX_CELLS:,} are allowed")
    yield from rows.to_pylist()


def _document(row: Any, content: Content, group: int, number: int) -> Document | None:
    try:
        return document_from_record(row if isinstance(row, str) else {"messages": row})
    except ValueError as error:
        raise _RefusedError(f"{content.path}, row group {group}, row {number}: {error}") from error


def _cells(array: pyarrow.Array) -> int:
    """Return the number of values in an array, including those in nested lists."""
    if _is_list(array.type):
        return len(array) + _cells(array.flatten())
    if pyarrow.types.is_struct(array.type):
        return sum(map(_cells, array.flatten()))
    return len(array)


def _too_long() -> str:
    return f"it is longer than {MAX_DOCUMENT // 2**20} MiB, the limit of one document: split it into several"


def _first_line(error: Exception) -> str:
    text = (str(error).strip() or type(error).__name__).splitlines()[0]
    return text if len(text) <= 300 else text[:300] + " …"
