"""Import a v1 export folder into the Postgres database of a local Neuronpedia, as the site's own importer does.

The site's importer reads its public bucket only; this one reads a folder. Needs psycopg.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gzip
import json
import logging
import re
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jsae import extras
from jsae.files import is_system_error
from jsae.settings import require

if TYPE_CHECKING:
    import psycopg
    from psycopg import sql

_log = logging.getLogger(__name__)

METADATA = {"release": "SourceRelease", "model": "Model", "sourceset": "SourceSet", "source": "Source"}
"""Files of one line each and their tables, in the order that foreign keys require."""
ROWS = {"features": "Neuron", "activations": "Activation", "explanations": "Explanation"}
"""Folders of batches and their tables, in the same order."""

CHUNK_BYTES, CHUNK_ROWS = 32 * 2**20, 65_000
"""Limits of one INSERT; Postgres stores at most 256 MB in one jsonb."""
_LONGEST_LINE = 64 * 2**20
_USERS = ("creatorId", "authorId")


class ImportRefusedError(ValueError):
    """The folder or the database is not usable. Nothing of the current file was stored."""


@dataclasses.dataclass
class Counts:
    """Numbers of rows of one table."""

    inserted: int = 0
    existing: int = 0
    """Rows whose key existed before; they are not changed."""


def import_folder(
    folder: Path, database: str, *, report: Callable[[Path, Counts], None] = lambda file, counts: None
) -> dict[str, Counts]:
    """Import all sources in a folder.

    Each file is one transaction, so after an error the same command continues. Existing rows are not changed.

    Args:
      folder: `MODEL/SOURCE` of a v1 export, or a parent of such folders.
      database: a libpq address, `postgresql://user@host/name`; the password may be in PGPASSWORD or ~/.pgpass.
      report: called after each file with its path and the counts of its table.

    Returns:
      The numbers of rows, by table.

    Raises:
      ImportError: psycopg is not installed.
      FileNotFoundError: there is no v1 export, or a file of it is missing.
      ImportRefusedError: the database cannot be opened, lacks Neuronpedia's tables or a user, or a line is damaged or
        refused by the database; names the file.
    """
    sources = _sources(Path(folder))
    counts = {table: Counts() for table in (*METADATA.values(), *ROWS.values())}
    with _connect(database) as connection:
        importer = _Importer(connection, counts)
        for source in sources:
            importer.metadata(source)
            report(source, counts["Source"])
            for name, table in ROWS.items():
                for file in _batches(source / name):
                    importer.rows(file, table)
                    report(file, counts[table])
    return counts


# ---- the folder ---------------------------------------------------------------------------------------------------


def _sources(folder: Path) -> list[Path]:
    """Return the folders of all sources. Raises FileNotFoundError if there is none, or one is incomplete."""
    sources = sorted(path.parent for path in folder.rglob("source.jsonl"))
    if not sources:
        raise FileNotFoundError(
            f"no v1 export in {folder}: create one with `python -m experiments.export --format=neuronpedia`"
        )
    for source in sources:
        missing = [f"{name}.jsonl" for name in METADATA if not (source / f"{name}.jsonl").is_file()]
        if missing or not _batches(source / "features"):
            raise FileNotFoundError(
                f"{source} lacks {', '.join(missing) or 'features/batch-N.jsonl.gz'}: export it again"
            )
    return sources


def _batches(folder: Path) -> list[Path]:
    """Return the batch files in a folder, by number."""
    matches = [(re.fullmatch(r"batch-(\d+)\.jsonl\.gz", path.name), path) for path in folder.glob("*")]
    return [path for _, path in sorted((int(match[1]), path) for match, path in matches if match)]


def _lines(file: Path) -> Iterator[tuple[int, bytes, dict[str, Any]]]:
    """Yield (number, text, row) of the lines of a .jsonl or .jsonl.gz file. Raises ImportRefusedError."""
    number = 0
    with gzip.open(file) if file.suffix == ".gz" else file.open("rb") as stream:
        try:
            while line := stream.readline(_LONGEST_LINE + 1):
                number += 1
                require(len(line) <= _LONGEST_LINE, f"longer than {_LONGEST_LINE} bytes")
                row = json.loads(line, parse_constant=_refuse_constant) if line.strip() else None
                require(isinstance(row, dict | None), "not a JSON object")
                if row is not None:
                    yield number, line.strip(), row
        except (ValueError, RecursionError, EOFError, OSError, zlib.error) as error:
            if is_system_error(error):
                raise
            raise ImportRefusedError(f"{file}, line {number} is damaged ({error}): export it again") from error


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _clean(value: Any) -> Any:
    """Return a JSON value with a space for every NUL, which Postgres cannot store."""
    if isinstance(value, str):
        return value.replace("\0", " ")
    if isinstance(value, list):
        return [_clean(item) for item in value]
    if isinstance(value, dict):
        return {_clean(key): _clean(item) for key, item in value.items()}
    return value


def _ready(line: bytes, row: dict[str, Any], table: str) -> tuple[dict[str, Any], bytes]:
    """Return a row in the form of its table, and its JSON.

    Raises:
      ValueError, TypeError: a lone surrogate, or attention indices that are not a pair of lists.
    """
    if table == "Activation" and "zIndices" in row:
        row = _split_z(row)
    elif b"\\u" not in line:
        return row, line  # without escapes there is neither NUL nor surrogate
    row = _clean(row)
    return row, json.dumps(row, ensure_ascii=False, allow_nan=False).encode()


def _split_z(row: dict[str, Any]) -> dict[str, Any]:
    """Return an activation with its `zIndices`, keys and queries of attention, split into the table's two columns."""
    keys, queries = row["zIndices"] or ((), ())
    return {k: v for k, v in row.items() if k != "zIndices"} | {"zKIndices": list(keys), "zQIndices": list(queries)}


@dataclasses.dataclass
class _Chunk:
    """Rows that fit into one INSERT."""

    first: Mapping[str, Any]
    rows: list[bytes] = dataclasses.field(default_factory=list)
    users: set[str] = dataclasses.field(default_factory=set)
    size: int = 0

    def add(self, row: Mapping[str, Any], encoded: bytes) -> None:
        self.rows.append(encoded)
        self.size += len(encoded)
        self.users |= {str(row[key]) for key in _USERS if row.get(key) is not None}

    def json(self) -> str:
        return (b"[" + b",".join(self.rows) + b"]").decode()


def _chunks(file: Path, table: str) -> Iterator[_Chunk]:
    """Yield the rows of a file in the form of its table, in chunks. Raises ImportRefusedError."""
    chunk: _Chunk | None = None
    for number, line, row in _lines(file):
        try:
            row, encoded = _ready(line, row, table)
        except (ValueError, TypeError) as error:
            raise ImportRefusedError(f"{file}, line {number} cannot be stored ({error}): export it again") from error
        if chunk is not None and (len(chunk.rows) == CHUNK_ROWS or chunk.size + len(encoded) > CHUNK_BYTES):
            yield chunk
            chunk = None
        chunk = chunk or _Chunk(row)
        chunk.add(row, encoded)
    if chunk is not None:
        yield chunk


# ---- the database -------------------------------------------------------------------------------------------------


def _connect(database: str) -> psycopg.Connection:
    """Return a connection. Errors do not contain the address, which may have a password."""
    try:
        import psycopg
    except ImportError as error:
        raise ImportError(f"psycopg is not installed: {extras.advice('neuronpedia')}") from error
    try:
        psycopg.conninfo.conninfo_to_dict(database)
    except psycopg.Error:
        raise ImportRefusedError(
            "this is not the address of a database: expected postgresql://user@host:port/name"
        ) from None
    try:
        return psycopg.connect(database, autocommit=True, connect_timeout=15, application_name="jsae")
    except psycopg.Error as error:
        raise ImportRefusedError(f"the database cannot be opened: {_first_line(error)}") from error


class _Importer:
    """A writer of rows to the database of a Neuronpedia.

    Raises:
      ImportRefusedError: the database lacks a table.
    """

    def __init__(self, connection: psycopg.Connection, counts: dict[str, Counts]):
        self._connection, self._counts = connection, counts
        self._columns = {table: self._types(table) for table in (*counts, "User")}
        missing = [table for table, columns in self._columns.items() if not columns]
        if missing:
            raise ImportRefusedError(
                f"the database {connection.info.dbname} is not a Neuronpedia's, missing tables: {', '.join(missing)}; "
                "create them with Neuronpedia's `make db-init`, or give another database"
            )
        self._users: set[str] = set()

    def metadata(self, source: Path) -> None:
        """Insert the four metadata rows of a source in one transaction."""
        with self._transaction(source):
            for name, table in METADATA.items():
                self._insert(source / f"{name}.jsonl", table)

    def rows(self, file: Path, table: str) -> None:
        """Insert the rows of a file in one transaction."""
        with self._transaction(file):
            self._insert(file, table)

    @contextlib.contextmanager
    def _transaction(self, path: Path) -> Iterator[None]:
        """Open a transaction. Errors of the database are raised as ImportRefusedError with the path."""
        import psycopg

        try:
            with self._connection.transaction():
                yield
        except psycopg.Error as error:
            raise ImportRefusedError(
                f"{path}: the database refuses it: {_first_line(error)}; nothing of it was stored"
            ) from error

    def _insert(self, file: Path, table: str) -> None:
        columns: dict[str, str] | None = None
        for chunk in _chunks(file, table):
            if columns is None:
                columns = self._common_columns(file, table, chunk.first)
            self._check_users(file, chunk.users)
            inserted = self._connection.execute(_statement(table, columns), [chunk.json()]).rowcount
            self._counts[table].inserted += inserted
            self._counts[table].existing += len(chunk.rows) - inserted

    def _common_columns(self, file: Path, table: str, first: Mapping[str, Any]) -> dict[str, str]:
        """Return the table's columns that the first line of a file has, with their types."""
        columns = self._columns[table]
        unknown = [name for name in first if name not in columns and first[name]]
        if unknown:
            _log.warning("%s: the table %s of this Neuronpedia has no column %s", file, table, ", ".join(unknown))
        return {name: kind for name, kind in columns.items() if name in first}

    def _types(self, table: str) -> dict[str, str]:
        """Return the columns of a table with their SQL types; empty if there is no such table."""
        rows = self._connection.execute(
            "SELECT attname, format_type(atttypid, atttypmod) FROM pg_attribute "
            "WHERE attrelid = to_regclass(quote_ident(%s)) AND attnum > 0 AND NOT attisdropped ORDER BY attnum",
            [table],
        )
        return {str(name): str(kind) for name, kind in rows}

    def _check_users(self, file: Path, users: set[str]) -> None:
        """Raise ImportRefusedError for a user that the database does not have."""
        unknown = users - self._users
        if unknown:
            rows = self._connection.execute('SELECT id FROM "User" WHERE id = ANY(%s)', [sorted(unknown)])
            self._users |= {str(name) for (name,) in rows}
        if unknown - self._users:
            raise ImportRefusedError(
                f"{file} belongs to the user {', '.join(sorted(unknown - self._users))}, whom the database does not "
                "have: create its users with Neuronpedia's `make db-init`"
            )


def _statement(table: str, columns: Mapping[str, str]) -> sql.Composed:
    """Return the statement that inserts an array of rows, except those whose key exists, with the catalogue's types."""
    from psycopg import sql

    names = sql.SQL(", ").join(map(sql.Identifier, columns))
    typed = sql.SQL(", ").join(
        sql.SQL("{} {}").format(sql.Identifier(name), sql.SQL(kind)) for name, kind in columns.items()
    )
    return sql.SQL(
        "INSERT INTO {} ({}) SELECT {} FROM jsonb_to_recordset(%s::jsonb) AS t({}) ON CONFLICT DO NOTHING"
    ).format(sql.Identifier(table), names, names, typed)


def _first_line(error: Exception) -> str:
    return " ".join(str(error).split("\n", 1)[0].split())
