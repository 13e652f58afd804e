"""Keys and arrays of a store on local disk, in memory or on object storage; the only importer of TensorStore.

Arrays are zarr3 with the codec `sharding_indexed`: a shard is one file or object, its chunks and its index have crc32c
checksums. A shard is written as a whole: TensorStore's file driver writes to a lock file, flushes and renames it, and
object storage replaces objects atomically. Credentials are TensorStore's business, which reads the environment.
"""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tensorstore as ts

from jsae.manifest import DamagedError
from jsae.settings import ConfigError, require

_REMAINS = ".__lock"  # suffix of a file that the file driver has not renamed yet
_AT_ONCE = 64  # requests for small values
_SCHEMES = ("file", "gs", "memory", "s3")


@functools.cache
def _context() -> ts.Context:
    """Return the one context of the process, in which stores in memory live; chunks are not cached."""
    return ts.Context({"cache_pool": {"total_bytes_limit": 0}})


# ---- locations ----------------------------------------------------------------------------------------------------


class Location(NamedTuple):
    """Location of a store."""

    name: str
    """As it is shown in messages."""
    spec: dict[str, Any]
    """TensorStore's JSON specification of the key-value store; its path ends with a slash."""
    folder: Path | None
    """The folder on local disk; None elsewhere."""


def locate(location: str | os.PathLike[str]) -> Location:
    """Return a location from a path or an address.

    An S3 service other than Amazon's is given by the variables `AWS_ENDPOINT_URL` (or `AWS_ENDPOINT_URL_S3`) and
    `AWS_REGION`, as for Amazon's own tools.

    Args:
      location: a path, `file:///path`, `gs://bucket/path`, `s3://bucket/path` or `memory://name`.

    Raises:
      ConfigError: an unknown scheme, or no bucket or name.
    """
    text = os.fspath(location)
    require(isinstance(text, str) and bool(text) and "\0" not in text, f"{text!r} is not a location of a store")
    match = re.match(r"([a-z][a-z0-9+.-]*)://(.*)", text)
    if match is None:
        return _on_disk(Path(text))
    scheme, rest = match[1], match[2].rstrip("/")
    require(scheme in _SCHEMES, f"{text} is not a location of a store: give a path, gs://, s3:// or memory://")
    if scheme == "file":
        return _on_disk(Path("/", rest))
    require(bool(rest.strip("/")), f"{text} names no {'store' if scheme == 'memory' else 'bucket'}: give {scheme}://…")
    name = f"{scheme}://{rest}"
    if scheme == "memory":
        return Location(name, {"driver": "memory", "path": rest + "/"}, None)
    bucket, _, path = rest.partition("/")
    spec: dict[str, Any] = {"driver": "gcs" if scheme == "gs" else "s3", "bucket": bucket}
    if path:
        spec["path"] = path + "/"
    return Location(name, spec | (_service() if scheme == "s3" else {}), None)


def _on_disk(path: Path) -> Location:
    folder = Path(os.path.abspath(path))  # noqa: PTH100 - `resolve` would follow links, which messages should not
    return Location(str(path), {"driver": "file", "path": f"{folder}/"}, folder)


def _service() -> dict[str, str]:
    """Return endpoint and region of an S3 service, where the environment names them."""
    names = {
        "endpoint": ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL"),
        "aws_region": ("AWS_REGION", "AWS_DEFAULT_REGION"),
    }
    values = {key: next(filter(None, map(os.environ.get, variables)), None) for key, variables in names.items()}
    return {key: value for key, value in values.items() if value}


# ---- values by key ------------------------------------------------------------------------------------------------


class Place:
    """A location that is read and written by key.

    Args:
      location: see `locate`.

    Raises:
      ConfigError: a location that cannot be one.
    """

    def __init__(self, location: str | os.PathLike[str]):
        self.location = locate(location)
        try:
            self._values = ts.KvStore.open(self.location.spec, context=_context()).result()
        except ValueError as error:
            raise ConfigError(f"{self.location.name} is not a location of a store: {_detail(error)}") from error

    def __str__(self) -> str:
        return self.location.name

    def read(self, key: str, largest: int) -> bytes | None:
        """Return a value; None if there is none.

        Raises:
          DamagedError: it has more than `largest` bytes.
          OSError: it cannot be read.
        """
        if self.location.folder is not None:  # before a large file is read
            path = self.location.folder / key
            self._check_size(key, path.stat().st_size if path.is_file() else 0, largest)
        return self.read_all([key], largest)[0]

    def read_all(self, keys: Iterable[str], largest: int) -> list[bytes | None]:
        """Return the values of several keys, None where there is none; errors are those of `read`."""
        names, values = list(keys), []
        for start in range(0, len(names), _AT_ONCE):
            part = names[start : start + _AT_ONCE]
            for key, future in zip(part, [self._values.read(key) for key in part], strict=True):
                result = Pending(future, f"{self}: {key}").result()
                self._check_size(key, len(result.value), largest)
                values.append(result.value if result.state == "value" else None)
        return values

    def write(self, key: str, value: bytes) -> None:
        """Write a value atomically, and wait until it is durable.

        Raises:
          OSError: it cannot be written, for example because the disk is full.
        """
        Pending(self._values.write(key, value), f"{self}: {key}").result()

    def remove(self, key: str) -> None:
        """Remove a value, if there is one."""
        Pending(self._values.write(key, None), f"{self}: {key}").result()

    def keys(self, folder: str) -> list[str]:
        """Return the keys that begin with `folder` and a slash, without what killed processes left."""
        within = ts.KvStore.KeyRange(f"{folder}/", f"{folder}0")  # "0" follows "/"
        keys = Pending(self._values.list(within), f"{self}: {folder}").result()
        return sorted(key.decode() for key in keys if not key.endswith(_REMAINS.encode()))

    def is_empty(self) -> bool:
        """Return whether there is nothing but what killed processes left."""
        folder = self.location.folder
        if folder is not None:
            require(not folder.exists() or folder.is_dir(), f"{self} is a file: choose another location")
            return not folder.exists() or all(path.name.endswith(_REMAINS) for path in folder.iterdir())
        keys = Pending(self._values.list(), str(self)).result()
        return all(key.endswith(_REMAINS.encode()) for key in keys)

    def array(self, form: Form, rows: int) -> Array:
        """Return an array of a known form; neither its metadata nor its data is read or written yet."""
        spec = self._spec(form, rows) | {"assume_metadata": True, "open": True}
        return Array(f"{self}: {form.name}", Pending(ts.open(spec, context=_context()), str(self)).result())

    def describe(self, form: Form, rows: int) -> None:
        """Write the metadata of an array, `zarr.json`, for other readers of zarr.

        Raises:
          DamagedError: there is another one.
        """
        self._open_described(form, rows, create=True)

    def check_described(self, form: Form, rows: int) -> None:
        """Check the metadata of an array.

        Raises:
          DamagedError: it is missing or another one.
        """
        self._open_described(form, rows, create=False)

    def _open_described(self, form: Form, rows: int, create: bool) -> None:
        spec = self._spec(form, rows) | {"open": True, "create": create}
        Pending(ts.open(spec, context=_context()), f"{self}: {form.name}/zarr.json").result()

    def _check_size(self, key: str, size: int, largest: int) -> None:
        if size > largest:
            raise DamagedError(f"{self}: {key} has {size:,} bytes, and at most {largest:,} are read")

    def _spec(self, form: Form, rows: int) -> dict[str, Any]:
        values = dict(self.location.spec)
        values["path"] = f"{values.get('path', '')}{form.name}/"
        return {
            "driver": "zarr3",
            "kvstore": values,
            "metadata": form.metadata(rows),
            "fill_missing_data_reads": False,  # a missing shard would read as zeros
            "store_data_equal_to_fill_value": True,  # chunks of zeros would be missing
        }


# ---- arrays -------------------------------------------------------------------------------------------------------


class Form(NamedTuple):
    """Name of an array, which is its path in the store, its type and its shape."""

    name: str
    dtype: str
    width: int | None
    """Numbers in a row; None for an array of one dimension."""
    chunk_rows: int
    shard_rows: int

    @property
    def row_bytes(self) -> int:
        """Bytes of a row."""
        return self.numpy_dtype.itemsize * (self.width or 1)

    @property
    def numpy_dtype(self) -> np.dtype:
        """The type of its numbers in memory."""
        return ts.dtype(self.dtype).numpy_dtype

    def empty(self, rows: int) -> np.ndarray:
        """Return an uninitialised array for some of its rows."""
        return np.empty(self.shape(rows), self.numpy_dtype)

    def shape(self, rows: int) -> list[int]:
        """Return the shape of some rows."""
        return [rows] if self.width is None else [rows, self.width]

    def key(self, shard: int) -> str:
        """Return the key of a shard."""
        return f"{self.name}/c/{shard}" + ("" if self.width is None else "/0")

    def metadata(self, rows: int) -> dict[str, Any]:
        """Return the metadata of the array, as zarr3 defines them."""
        order = {"configuration": {"endian": "little"}} if self.numpy_dtype.itemsize > 1 else {}
        checked = {"name": "crc32c"}
        sharding = {
            "chunk_shape": self.shape(self.chunk_rows),
            "codecs": [{"name": "bytes", **order}, checked],
            "index_codecs": [{"name": "bytes", "configuration": {"endian": "little"}}, checked],
            "index_location": "end",
        }
        return {
            "shape": self.shape(rows),
            "data_type": self.dtype,
            "fill_value": 0,
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": self.shape(self.shard_rows)}},
            "codecs": [{"name": "sharding_indexed", "configuration": sharding}],
        }


class Array:
    """The rows of an array; reading checks checksums."""

    def __init__(self, name: str, values: ts.TensorStore):
        self._name, self._values = name, values

    def read(self, start: int, stop: int) -> np.ndarray:
        """Return rows.

        Raises:
          DamagedError: a shard is missing, too short or has changed; names it.
          OSError: they cannot be read.
        """
        return Pending(self._values[start:stop].read(), self._name).result()

    def begin_read(self, start: int, stop: int, out: np.ndarray) -> Pending:
        """Begin to read rows into `out`; the result of the future is None, its errors are those of `read`."""
        target = ts.array(out, context=_context())
        return Pending(target.write(self._values[start:stop]).commit, self._name)

    def begin_write(self, start: int, stop: int, rows: np.ndarray) -> Pending:
        """Begin to write the rows of a shard, which must not change before the future is done and they are durable.

        The result of the future is None.

        Raises:
          OSError: they cannot be written, for example because the disk is full.
        """
        write = self._values[start:stop].write(rows, can_reference_source_data_indefinitely=True)
        return Pending(write.commit, self._name)


class Pending:
    """Work of TensorStore in other threads. `result` waits for it and raises errors of this package."""

    def __init__(self, future: Any, name: str):
        self._future, self._name = future, name

    @property
    def done(self) -> bool:
        """True if `result` returns at once."""
        return self._future.done()

    def result(self) -> Any:
        """Wait; return the result.

        Raises:
          DamagedError: data is missing or has changed.
          OSError: data cannot be read or written.
        """
        try:
            return self._future.result()
        except ValueError as error:
            raise _translated(error, self._name) from error


_DAMAGE = ("NOT_FOUND", "DATA_LOSS", "FAILED_PRECONDITION", "OUT_OF_RANGE", "INVALID_ARGUMENT")


def _translated(error: ValueError, name: str) -> OSError:
    """Return an error of TensorStore as one of this package, in one line."""
    detail = _detail(error)
    system = re.search(r"os_error_code='(\d+)'", str(error))
    if system is not None:
        return OSError(int(system[1]), os.strerror(int(system[1])), name)
    status, _, text = detail.partition(": ")
    if status == "NOT_FOUND":
        return DamagedError(f"{name} is not complete, a shard is missing: {text}")
    if status in _DAMAGE:
        return DamagedError(f"{name} is damaged: {text}")
    if status in ("PERMISSION_DENIED", "UNAUTHENTICATED"):
        return PermissionError(f"{name} must not be used with these credentials: {text}")
    return OSError(f"{name} cannot be reached: {detail}")


def _detail(error: ValueError) -> str:
    """Return the text of an error without TensorStore's specification, in one line of bounded length."""
    text = " ".join(re.sub(r"\[(tensorstore_spec|os_error_code)=.*", "", str(error), flags=re.DOTALL).split())
    return text if len(text) <= 400 else f"{text[:200]} … {text[-200:]}"
