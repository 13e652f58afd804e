"""A v1 export folder into the Postgres of a local Neuronpedia, row for row as the site's own importer does it.

The site imports from its public bucket only; this reads a folder. Needs psycopg.
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

from jsae.files import is_system_error
from jsae.settings import require

if TYPE_CHECKING:
    import psycopg
    from psycopg import sql

_log = logging.getLogger(__name__)

METADATA = {"release": "SourceRelease", "model": "Model", "sourceset": "SourceSet", "source": "Source"}
"""Files of one line each and their tables, in the order that foreign keys ask for."""
ROWS = {"features": "Neuron", "activations": "Activation", "explanations": "Explanation"}
"""Folders of batches and their tables, in the same order."""

CHUNK_BYTES, CHUNK_ROWS = 32 * 2**20, 65_000
"""Of one INSERT; Postgres holds at most 256 MB in one jsonb."""
_LONGEST_LINE = 64 * 2**20
_USERS = ("creatorId", "authorId")


class ImportRefusedError(ValueError):
    """A folder or a database that does not fit; nothing of the file at hand was kept."""


@dataclasses.dataclass
class Counts:
    """What became of the rows of one table."""

    inserted: int = 0
    already: int = 0
    """There before: a row of the same key is never changed."""


def import_folder(
    folder: Path, database: str, *, told: Callable[[Path, Counts], None] = lambda file, counts: None
) -> dict[str, Counts]:
    """Imports every source in a folder.

    Each file is a transaction, so that after an error the same command goes on; rows that are there already stay as
    they are.

    Args:
      folder: `MODEL/SOURCE` of a v1 export, or one above it.
      database: as libpq takes it, `postgresql://user@host/name`; a password may come from PGPASSWORD or ~/.pgpass.
      told: hears of every file that was read.

    Returns:
      what became of the rows, by table.

    Raises:
      ImportError: psycopg is missing.
      FileNotFoundError: there is no v1 export, or it lacks a file.
      ImportRefusedError: no such database, one without Neuronpedia's tables, a user that it does not have, a line
        that is broken or that the database refuses; names the file.
    """
    sources = _sources(Path(folder))
    counts = {table: Counts() for table in (*METADATA.values(), *ROWS.values())}
    with _connect(database) as connection:
        importer = _Importer(connection, counts)
        for source in sources:
            importer.metadata(source)
            told(source, counts["Source"])
            for name, table in ROWS.items():
                for file in _batches(source / name):
                    importer.rows(file, table)
                    told(file, counts[table])
    return counts


# ---- the folder ---------------------------------------------------------------------------------------------------


def _sources(folder: Path) -> list[Path]:
    """The folders of sources, complete."""
    found = sorted(path.parent for path in folder.rglob("source.jsonl"))
    if not found:
        raise FileNotFoundError(
            f"{folder} holds no v1 export: `python -m experiments.export --format=neuronpedia` does"
        )
    for source in found:
        missing = [f"{name}.jsonl" for name in METADATA if not (source / f"{name}.jsonl").is_file()]
        if missing or not _batches(source / "features"):
            raise FileNotFoundError(
                f"{source} lacks {', '.join(missing) or 'features/batch-N.jsonl.gz'}: export it anew"
            )
    return found


def _batches(folder: Path) -> list[Path]:
    """Its files, by number."""
    numbered = [(re.fullmatch(r"batch-(\d+)\.jsonl\.gz", path.name), path) for path in folder.glob("*")]
    return [path for _, path in sorted((int(found[1]), path) for found, path in numbered if found)]


def _lines(file: Path) -> Iterator[tuple[int, bytes, dict[str, Any]]]:
    """The lines of a .jsonl or .jsonl.gz: number, text, row."""
    number = 0
    with gzip.open(file) if file.suffix == ".gz" else file.open("rb") as stream:
        try:
            while line := stream.readline(_LONGEST_LINE + 1):
                number += 1
                require(len(line) <= _LONGEST_LINE, f"longer than {_LONGEST_LINE} bytes")
                row = json.loads(line, parse_constant=_refuse_constant) if line.strip() else None
                require(isinstance(row, dict | None), "no JSON object")
                if row is not None:
                    yield number, line.strip(), row
        except (ValueError, RecursionError, EOFError, OSError, zlib.error) as error:
            if is_system_error(error):
                raise
            raise ImportRefusedError(f"{file}, line {number} is broken ({error}): export it anew") from error


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


def _clean(value: Any) -> Any:
    """The value with a blank for every NUL, which Postgres cannot hold."""
    if isinstance(value, str):
        return value.replace("\0", " ")
    if isinstance(value, list):
        return [_clean(item) for item in value]
    if isinstance(value, dict):
        return {_clean(key): _clean(item) for key, item in value.items()}
    return value


def _ready(line: bytes, row: dict[str, Any], table: str) -> tuple[dict[str, Any], bytes]:
    """The row as the table wants it, and its JSON.

    Raises:
      ValueError, TypeError: a lone surrogate, or indices of attention that are no pair of lists.
    """
    if table == "Activation" and "zIndices" in row:
        row = _split_z(row)
    elif b"\\u" not in line:
        return row, line  # as it is: nothing escaped, so neither NUL nor surrogate
    row = _clean(row)
    return row, json.dumps(row, ensure_ascii=False, allow_nan=False).encode()


def _split_z(row: dict[str, Any]) -> dict[str, Any]:
    """An activation whose `zIndices`, keys and queries of attention, are two columns as in the table."""
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
    """The rows of a file as the table wants them."""
    chunk: _Chunk | None = None
    for number, line, row in _lines(file):
        try:
            row, encoded = _ready(line, row, table)
        except (ValueError, TypeError) as error:
            raise ImportRefusedError(f"{file}, line {number} cannot be stored ({error}): export it anew") from error
        if chunk is not None and (len(chunk.rows) == CHUNK_ROWS or chunk.size + len(encoded) > CHUNK_BYTES):
            yield chunk
            chunk = None
        chunk = chunk or _Chunk(row)
        chunk.add(row, encoded)
    if chunk is not None:
        yield chunk


# ---- the database -------------------------------------------------------------------------------------------------


def _connect(database: str) -> psycopg.Connection:
    """A connection; errors do not repeat what may hold a password."""
    try:
        import psycopg
    except ImportError as error:
        raise ImportError("psycopg is not installed: pip install 'jsae[neuronpedia]'") from error
    try:
        psycopg.conninfo.conninfo_to_dict(database)
    except psycopg.Error:
        raise ImportRefusedError(
            "this is no address of a database: expected postgresql://user@host:port/name"
        ) from None
    try:
        return psycopg.connect(database, autocommit=True, connect_timeout=15, application_name="jsae")
    except psycopg.Error as error:
        raise ImportRefusedError(f"the database cannot be opened: {_first_line(error)}") from error


class _Importer:
    """Writes rows through one connection, whose database has been found to be a Neuronpedia's.

    Raises:
      ImportRefusedError: a table is missing.
    """

    def __init__(self, connection: psycopg.Connection, counts: dict[str, Counts]):
        self._connection, self._counts = connection, counts
        self._columns = {table: self._types(table) for table in (*counts, "User")}
        missing = [table for table, columns in self._columns.items() if not columns]
        if missing:
            raise ImportRefusedError(
                f"the database {connection.info.dbname} is no Neuronpedia's: it has no table {', '.join(missing)}; "
                "set one up with Neuronpedia's `make db-init`, or name its database"
            )
        self._users: set[str] = set()

    def metadata(self, source: Path) -> None:
        """The four rows that say what a source is, together or not at all."""
        with self._whole(source):
            for name, table in METADATA.items():
                self._insert(source / f"{name}.jsonl", table)

    def rows(self, file: Path, table: str) -> None:
        """A batch of rows, all or none."""
        with self._whole(file):
            self._insert(file, table)

    @contextlib.contextmanager
    def _whole(self, path: Path) -> Iterator[None]:
        """A transaction; what the database refuses is told with the path."""
        import psycopg

        try:
            with self._connection.transaction():
                yield
        except psycopg.Error as error:
            raise ImportRefusedError(
                f"{path}: the database refuses it: {_first_line(error)}; nothing of this was kept"
            ) from error

    def _insert(self, file: Path, table: str) -> None:
        columns: dict[str, str] | None = None
        for chunk in _chunks(file, table):
            if columns is None:
                columns = self._shared(file, table, chunk.first)
            self._check_users(file, chunk.users)
            inserted = self._connection.execute(_statement(table, columns), [chunk.json()]).rowcount
            self._counts[table].inserted += inserted
            self._counts[table].already += len(chunk.rows) - inserted

    def _shared(self, file: Path, table: str, first: Mapping[str, Any]) -> dict[str, str]:
        """The columns that the first line and the table have in common, with their types; the line decides."""
        columns = self._columns[table]
        unknown = [name for name in first if name not in columns and first[name]]
        if unknown:
            _log.warning("%s: this Neuronpedia keeps no %s of a %s", file, ", ".join(unknown), table)
        return {name: kind for name, kind in columns.items() if name in first}

    def _types(self, table: str) -> dict[str, str]:
        """Columns of a table and their types as SQL; none where there is no such table."""
        found = self._connection.execute(
            "SELECT attname, format_type(atttypid, atttypmod) FROM pg_attribute "
            "WHERE attrelid = to_regclass(quote_ident(%s)) AND attnum > 0 AND NOT attisdropped ORDER BY attnum",
            [table],
        )
        return {str(name): str(kind) for name, kind in found}

    def _check_users(self, file: Path, wanted: set[str]) -> None:
        """Raises ImportRefusedError for a row of a user that the database does not have."""
        unknown = wanted - self._users
        if unknown:
            found = self._connection.execute('SELECT id FROM "User" WHERE id = ANY(%s)', [sorted(unknown)])
            self._users |= {str(name) for (name,) in found}
        if unknown - self._users:
            raise ImportRefusedError(
                f"{file} is by the user {', '.join(sorted(unknown - self._users))}, whom the database does not have: "
                "fill its users with Neuronpedia's `make db-init`"
            )


def _statement(table: str, columns: Mapping[str, str]) -> sql.Composed:
    """Inserts an array of rows, but those whose key is there; types are written as the catalogue spells them."""
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
