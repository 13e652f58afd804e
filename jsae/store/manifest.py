"""The JSON files of a store: what is written, a record of every shard, and the manifest, which is written last.

`writing.json` stands in a store that is being written. `shards/NUMBER.json` follows the arrays of a shard when they are
durable. `store.json` is the mark of a complete store, and takes the place of `writing.json`. Each has a digest of its
own content, so that a change is noticed.
"""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from jsae import jsons
from jsae.manifest import DamagedError, json_digest
from jsae.settings import ConfigError, require
from jsae.store.layout import MOST_ROWS, Layout
from jsae.store.statistics import Statistics, Sums

VERSION = 1
COMPLETE, WRITING, SHARDS = "store.json", "writing.json", "shards"
LARGEST = 64 * 2**20
"""Bytes of a JSON file that is read."""
_DIGEST = "sha256"
_PACKAGES = ("jsae", "tensorstore", "numpy", "ml-dtypes", "torch", "jax")


class IncompleteError(OSError):
    """A store is still being written, or writing it was interrupted."""


@dataclass(frozen=True)
class Identity:
    """Description of a store's content: two stores of the same identity have the same shards.

    Raises:
      ConfigError: a number of rows or an origin that no store can have.
    """

    layout: Layout
    rows: int | None
    """Rows in all; None if that is not known yet."""
    origin: Mapping[str, Any] = field(default_factory=dict)
    """Origin of the activations, as JSON values: model, tokenizer, text and so on."""

    def __post_init__(self) -> None:
        valid = self.rows is None or (type(self.rows) is int and 1 <= self.rows <= MOST_ROWS)
        require(valid, f"rows is {self.rows!r:.40}: a store has 1 to 2**48 rows")
        require(
            self.rows is None or self.rows % self.layout.row_len == 0,
            f"{self.rows} rows are not whole rows of text of {self.layout.row_len} tokens",
        )
        try:
            plain = jsons.loads(json.dumps(self.origin))
        except (TypeError, ValueError) as error:
            raise ConfigError(f"origin must hold JSON values: {error}") from error
        require(isinstance(plain, dict), "origin must be a dict")
        object.__setattr__(self, "origin", plain)

    @property
    def digest(self) -> str:
        """SHA-256 of the identity, as hex."""
        return json_digest(self.to_json())

    def to_json(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        return {
            "version": VERSION,
            "layout": self.layout.to_json(),
            "rows": self.rows,
            "origin": dict(self.origin),
        }

    @classmethod
    def from_json(cls, values: Any) -> Identity:
        """Return an identity from JSON values of anyone.

        Raises:
          ConfigError: they are not one.
        """
        require(isinstance(values, dict), "it is not a JSON object")
        version = values.get("version")
        require(
            version == VERSION,
            f"it has version {version!r:.20} of the format, and this jsae reads {VERSION}: update jsae",
        )
        layout, rows, origin = Layout.from_json(values.get("layout")), values.get("rows"), values.get("origin")
        require(rows is None or type(rows) is int, f"rows is {rows!r:.40}: it must be a whole number")
        require(isinstance(origin, dict), "it has no origin")
        return cls(layout, rows, origin)

    def differences(self, other: Identity) -> str:
        """Return what differs in another identity, as a text for messages; "" if they are the same."""
        mine, others = _flat(self.to_json()), _flat(other.to_json())
        names = [name for name in sorted(mine.keys() | others.keys()) if mine.get(name) != others.get(name)]
        shown = [f"{name} {_short(mine.get(name))} (now {_short(others.get(name))})" for name in names]
        return ", ".join(shown[:5]) + (f" and {len(shown) - 5} more" if len(shown) > 5 else "")


@dataclass(frozen=True)
class Record:
    """Record of a shard that was written."""

    shard: int
    rows: int
    identity: str
    """Digest of the store's identity."""
    digests: Mapping[str, str]
    """SHA-256 of the bytes of the shard's rows, by array."""
    sums: Mapping[str, Sums]
    """Sums of the statistics, by hook."""
    position: Any
    """Position of the text, or of the input, behind the shard, as JSON values."""

    def to_bytes(self) -> bytes:
        """Return the content of its file."""
        values = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return to_bytes(values | {"sums": {hook: sums.to_json() for hook, sums in self.sums.items()}})

    @classmethod
    def from_bytes(cls, data: bytes, shard: int, identity: Identity) -> Record:
        """Return a record from the content of its file.

        Raises:
          ValueError: it is damaged, or of another shard or store.
        """
        values, layout = from_bytes(data), identity.layout
        if set(values) != set(cls.__dataclass_fields__) or values["shard"] != shard:
            raise ValueError(f"it is not the record of shard {shard}")
        if values["identity"] != identity.digest:
            raise ValueError("it is of another store")
        rows, digests, sums = values["rows"], values["digests"], values["sums"]
        if type(rows) is not int or not 1 <= rows <= layout.shard_rows:
            raise ValueError(f"a shard cannot have {rows!r:.40} rows")
        if not _is_text_table(digests) or set(digests) != {form.name for form in layout.forms()}:
            raise ValueError("it has not the digests of its arrays")
        if not isinstance(sums, dict) or set(sums) != set(layout.widths):
            raise ValueError("it has not the sums of its hooks")
        parsed = {hook: Sums.from_json(sums[hook], width) for hook, width in layout.widths.items()}
        return cls(shard, rows, values["identity"], digests, parsed, values["position"])

    @staticmethod
    def key(shard: int) -> str:
        """Return the key of a record."""
        return f"{SHARDS}/{shard:06}.json"


@dataclass(frozen=True)
class Manifest:
    """Manifest of a complete store."""

    identity: Identity
    rows: int
    records: str
    """Digest over the digests of all shards."""
    statistics: Mapping[str, Statistics]
    """By hook."""
    versions: Mapping[str, str]
    """Of the packages that wrote it."""

    @property
    def layout(self) -> Layout:
        """The arrays of the store."""
        return self.identity.layout

    @property
    def origin(self) -> Mapping[str, Any]:
        """Origin of the activations, as JSON values."""
        return self.identity.origin

    @property
    def digest(self) -> str:
        """SHA-256 of identity, rows and content, as hex: equal stores have the same."""
        return json_digest([self.identity.digest, self.rows, self.records])

    @classmethod
    def from_records(cls, identity: Identity, records: Iterable[Record]) -> Manifest:
        """Return the manifest of a store with these records, which are in order."""
        layout, all_records = identity.layout, list(records)
        return cls(
            identity,
            sum(record.rows for record in all_records),
            digest_of_records(all_records),
            {
                hook: Statistics.from_sums(Sums.added((record.sums[hook] for record in all_records), width))
                for hook, width in layout.widths.items()
            },
            _versions(),
        )

    def to_bytes(self) -> bytes:
        """Return the content of its file."""
        values = {
            **self.identity.to_json(),
            "total_rows": self.rows,
            "records": self.records,
            "statistics": {hook: statistics.to_json() for hook, statistics in self.statistics.items()},
            "versions": dict(self.versions),
        }
        return to_bytes(values)

    @classmethod
    def from_bytes(cls, data: bytes) -> Manifest:
        """Return a manifest from the content of its file.

        Raises:
          ValueError: it is damaged, or of another version.
        """
        values = from_bytes(data)
        identity = Identity.from_json(values)
        rows, records, statistics = (values.get(name) for name in ("total_rows", "records", "statistics"))
        row_len = identity.layout.row_len
        if type(rows) is not int or not 1 <= rows <= MOST_ROWS or rows % row_len or identity.rows not in (None, rows):
            raise ValueError(f"a store cannot have {rows!r:.40} rows")
        if not isinstance(records, str) or not isinstance(statistics, dict):
            raise ValueError("it has no digest of its shards, or no statistics")
        if set(statistics) != set(identity.layout.widths):
            raise ValueError("it has not the statistics of its hooks")
        parsed = {h: Statistics.from_json(statistics[h], width) for h, width in identity.layout.widths.items()}
        versions = values.get("versions")
        return cls(identity, rows, records, parsed, versions if _is_text_table(versions) else {})


def digest_of_records(records: Iterable[Record]) -> str:
    """Return the digest over the digests of some shards."""
    return json_digest([[record.shard, record.rows, sorted(record.digests.items())] for record in records])


def to_bytes(values: Mapping[str, Any]) -> bytes:
    """Return the text of a JSON object, with its digest."""
    return (json.dumps({**values, _DIGEST: json_digest(values)}, indent=1) + "\n").encode()


def from_bytes(data: bytes) -> dict[str, Any]:
    """Return a JSON object of `to_bytes`, without its digest.

    Raises:
      ValueError: it is not one, or its digest does not match.
    """
    values = jsons.loads(data)
    if not isinstance(values, dict):
        raise ValueError("it is not a JSON object")
    digest = values.pop(_DIGEST, None)
    if digest != json_digest(values):
        raise ValueError("its digest does not match")
    return values


def damaged(name: object, key: str, error: ValueError) -> DamagedError:
    """Return the error of a JSON file that cannot be read."""
    return DamagedError(f"{name}: {key} is damaged: {str(error)[:300]}")


def _is_text_table(values: Any) -> bool:
    return isinstance(values, dict) and all(isinstance(value, str) for value in values.values())


def _versions() -> dict[str, str]:
    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested dicts as one, with names joined by dots; `layout.` and `origin.` are left out."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        path = prefix + name
        if isinstance(value, dict):
            flat |= _flat(value, "" if path in ("layout", "origin") else f"{path}.")
        else:
            flat[path] = value
    return flat


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else f"{text[:60]}…"
