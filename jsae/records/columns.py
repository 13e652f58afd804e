"""Folders of .npy columns with a JSON header, memory-mapped and validated. numpy only."""

import abc
import dataclasses
import errno
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from jsae import files, jsons
from jsae.settings import Json, require

VERSION = 2
"""Of the layout. Version 1 named SAEs by their weights alone, so that a change of their settings was not noticed."""


class StoreError(ValueError):
    """A store is broken, has another version, or belongs to another SAE.

    Attributes:
      problem: what is wrong; the message also says what to do.
    """

    def __init__(self, problem: str):
        super().__init__(f"{problem}: gather the records again with `python -m experiments.explore --run_dir=…`")
        self.problem = problem


_KINDS: Mapping[Any, tuple[str, Callable[[Any], bool]]] = {
    int: ("a non-negative integer", lambda x: type(x) is int and x >= 0),
    float: ("a floating-point number", lambda x: type(x) is float),
    str: ("text", lambda x: isinstance(x, str)),
    list[int]: ("a list of integers", lambda x: isinstance(x, list) and all(type(i) is int for i in x)),
    dict[str, Any]: ("an object", lambda x: isinstance(x, dict)),
}
"""Description and check of each type of header field."""


class Folder(abc.ABC):
    """Columns in a folder, memory-mapped and checked on first access. Abstract.

    Args:
      path: the folder.

    Raises:
      FileNotFoundError: there is no header.
      StoreError: the header is broken or has another version.
    """

    _columns: Mapping[str, tuple[str, tuple[str, ...]]]
    _file: str
    _header: type[Any]

    def __init__(self, path: str | Path):
        self.path = Path(path)
        file = self.path / self._file
        if not file.is_file():
            raise FileNotFoundError(
                f"no records at {self.path}: create them with `python -m experiments.explore --run_dir=…`"
            )
        try:
            values = jsons.read(file)
        except ValueError as error:
            raise StoreError(str(error)) from error
        version = values.get("version") if isinstance(values, dict) else values
        if version != VERSION:
            raise StoreError(f"{file} has version {version!r:.80}; this version of jsae reads {VERSION}")
        for field in dataclasses.fields(self._header):
            if field.name in values and not _KINDS[field.type][1](values[field.name]):
                value, kind = values[field.name], _KINDS[field.type][0]
                raise StoreError(f"{file}: {field.name} is {value!r:.80}; it must be {kind}")
        try:
            self.header = self._header.from_json(values)
        except ValueError as error:
            raise StoreError(f"{file}: {error}") from error
        self._cache: dict[str, np.ndarray] = {}

    @abc.abstractmethod
    def _sizes(self) -> dict[str, int]:
        """Return the lengths of axes that the header contains."""

    @abc.abstractmethod
    def _upper_bounds(self) -> dict[str, int]:
        """Return the exclusive upper bound of each column of pointers."""

    _partitions: ClassVar[Mapping[str, str]] = {}
    """Columns of offsets, and the columns that they partition."""

    def __getitem__(self, name: str) -> np.ndarray:
        """Return a memory-mapped column after checking its shape and pointers. Raises StoreError."""
        if name not in self._cache:
            column = self._mapped(name)
            self._check_shape(name, column)
            self._check_pointers(name, column)
            self._cache[name] = column
        return self._cache[name]

    def _mapped(self, name: str) -> np.ndarray:
        file = self.path / f"{name}.npy"
        try:
            return np.lib.format.open_memmap(file, mode="r")
        except (OSError, ValueError, EOFError) as error:
            if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE):  # each column opens a file
                message = f"{os.strerror(error.errno)}: raise the limit, for example with `ulimit -n 4096`"
                raise OSError(error.errno, message, str(file)) from error
            if files.is_system_error(error):
                raise
            raise StoreError(f"{file} is missing or broken ({error})") from error

    def _check_shape(self, name: str, column: np.ndarray) -> None:
        dtype, axes = self._columns[name]
        sizes = [self._length(axis) for axis in axes]
        if column.dtype != dtype or list(column.shape) != sizes:
            raise StoreError(
                f"{self.path / name}.npy is {column.dtype}{column.shape}, expected {dtype}{tuple(sizes)}, "
                f"({', '.join(axes)})"
            )

    def _length(self, axis: str) -> int:
        """Return the length of an axis, from the header, the offsets, or the first column that has it."""
        sizes = self._sizes()
        if axis in sizes:
            return sizes[axis]
        if axis.endswith("+1"):
            return self._length(axis.removesuffix("+1")) + 1
        for offsets, partitioned in self._partitions.items():
            if self._columns[partitioned][1] == (axis,):
                return int(self._mapped(offsets).reshape(-1)[-1:].sum())
        first, axes = next((name, axes) for name, (_, axes) in self._columns.items() if axis in axes)
        shape = self._mapped(first).shape
        return shape[axes.index(axis)] if len(shape) == len(axes) else -1

    def _check_pointers(self, name: str, column: np.ndarray) -> None:
        bound = self._upper_bounds().get(name)
        if bound is not None and column.size and int(column.max()) >= bound:
            raise StoreError(f"{self.path}: {name} contains {int(column.max())}, but must be below {bound}")
        if name in self._partitions:
            end = self._mapped(self._partitions[name]).size
            if column[0] != 0 or column[-1] != end or (column[:-1] > column[1:]).any():
                raise StoreError(f"{self.path}: {name} does not partition {self._partitions[name]}")


def write(folder: Path, file: str, header: Json, columns: Mapping[str, np.ndarray], known: Mapping[str, Any]) -> None:
    """Write a store. The header is written last, because a folder without a header is not a store.

    Args:
      folder: the folder, created if missing.
      file: name of the header file.
      header: the header.
      columns: all columns by name.
      known: (dtype, axes) of the columns by name.

    Raises:
      ConfigError: the columns are not the known ones.
      OSError: a file cannot be written; the folder is not a store then.
    """
    require(set(columns) == set(known), f"a store needs the columns {sorted(known)}, got {sorted(columns)}")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / file).unlink(missing_ok=True)
    for name, column in columns.items():
        np.save(folder / f"{name}.npy", np.asarray(column, known[name][0]), allow_pickle=False)
    write_header(folder / file, header)


def write_header(path: Path, header: Json) -> None:
    """Write the header of a store atomically."""
    files.write(path, json.dumps(header.to_json(), indent=2, allow_nan=False) + "\n")


class ColumnWriter:
    """A writer of a one-dimensional .npy file in pieces; `close` makes it readable.

    Args:
      path: the file.
      dtype: dtype of the array.
    """

    def __init__(self, path: Path, dtype: str):
        self._dtype, self._length = np.dtype(dtype), 0
        self._file = path.open("wb")
        self._write_header()

    def _write_header(self) -> None:
        """Write the header with the current length. numpy pads it, so its size does not depend on the length."""
        header = {"descr": np.lib.format.dtype_to_descr(self._dtype), "fortran_order": False, "shape": (self._length,)}
        np.lib.format.write_array_header_1_0(self._file, header)

    def append(self, values: np.ndarray) -> None:
        """Append values to the array."""
        self._file.write(np.ascontiguousarray(values, self._dtype).data)
        self._length += len(values)

    def close(self) -> None:
        """Write the final length into the header and close the file."""
        if not self._file.closed:
            self._file.seek(0)
            self._write_header()
            self._file.close()
