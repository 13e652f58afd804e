"""Folders of .npy columns under a JSON header: mapped, not read, and checked against what they must be. numpy only."""

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
    """A store that is of another version, of another SAE, or broken; `what` says it, the message also what to do."""

    def __init__(self, what: str):
        super().__init__(f"{what}: gather the records anew with `python -m experiments.explore --run_dir=…`")
        self.what = what


_KINDS: Mapping[Any, tuple[str, Callable[[Any], bool]]] = {
    int: ("a whole number from 0", lambda x: type(x) is int and x >= 0),
    float: ("a number with a point", lambda x: type(x) is float),
    str: ("text", lambda x: isinstance(x, str)),
    list[int]: ("a list of whole numbers", lambda x: isinstance(x, list) and all(type(i) is int for i in x)),
    dict[str, Any]: ("a table", lambda x: isinstance(x, dict)),
}
"""What the fields of a header may be."""


class Folder(abc.ABC):
    """Columns in a folder, mapped when first asked for and checked then. Abstract."""

    _columns: Mapping[str, tuple[str, tuple[str, ...]]]
    _file: str
    _header: type[Any]

    def __init__(self, path: str | Path):
        self.path = Path(path)
        file = self.path / self._file
        if not file.is_file():
            raise FileNotFoundError(
                f"no records at {self.path}: `python -m experiments.explore --run_dir=…` makes them"
            )
        try:
            told = jsons.read(file)
        except ValueError as error:
            raise StoreError(str(error)) from error
        version = told.get("version") if isinstance(told, dict) else told
        if version != VERSION:
            raise StoreError(f"{file} is of version {version!r:.80}, this program reads {VERSION}")
        for field in dataclasses.fields(self._header):
            if field.name in told and not _KINDS[field.type][1](told[field.name]):
                raise StoreError(f"{file}: {field.name} is {told[field.name]!r:.80}, not {_KINDS[field.type][0]}")
        try:
            self.header = self._header.from_json(told)
        except ValueError as error:
            raise StoreError(f"{file}: {error}") from error
        self._cache: dict[str, np.ndarray] = {}

    @abc.abstractmethod
    def _sizes(self) -> dict[str, int]:
        """Return the lengths of axes that the header says."""

    @abc.abstractmethod
    def _below(self) -> dict[str, int]:
        """Return the columns of pointers, and the bound that each must be below."""

    _partitions: ClassVar[Mapping[str, str]] = {}
    """Columns of offsets, and the columns they cut into parts."""

    def __getitem__(self, name: str) -> np.ndarray:
        """A column, mapped, its shape and pointers checked once."""
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
            if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE):  # a column holds a file open
                advice = f"{os.strerror(error.errno)}: allow this process more, for example with `ulimit -n 4096`"
                raise OSError(error.errno, advice, str(file)) from error
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
        """The length of an axis: what the header says, or the offsets, or else the first column which has it."""
        known = self._sizes()
        if axis in known:
            return known[axis]
        if axis.endswith("+1"):
            return self._length(axis.removesuffix("+1")) + 1
        for offsets, parted in self._partitions.items():
            if self._columns[parted][1] == (axis,):
                return int(self._mapped(offsets).reshape(-1)[-1:].sum())
        first, axes = next((name, axes) for name, (_, axes) in self._columns.items() if axis in axes)
        shape = self._mapped(first).shape
        return shape[axes.index(axis)] if len(shape) == len(axes) else -1

    def _check_pointers(self, name: str, column: np.ndarray) -> None:
        below = self._below().get(name)
        if below is not None and column.size and int(column.max()) >= below:
            raise StoreError(f"{self.path}: {name} holds {int(column.max())}, but must be below {below}")
        if name in self._partitions:
            end = self._mapped(self._partitions[name]).size
            if column[0] != 0 or column[-1] != end or (column[:-1] > column[1:]).any():
                raise StoreError(f"{self.path}: {name} does not partition {self._partitions[name]}")


def write(folder: Path, file: str, header: Json, columns: Mapping[str, np.ndarray], known: Mapping[str, Any]) -> None:
    """Write the columns of a store into a folder; the header last, since a folder without it is no store.

    Raises:
      OSError: a file cannot be written; the folder is then no store.
    """
    require(set(columns) == set(known), f"a store has the columns {sorted(known)}, got {sorted(columns)}")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / file).unlink(missing_ok=True)
    for name, column in columns.items():
        np.save(folder / f"{name}.npy", np.asarray(column, known[name][0]), allow_pickle=False)
    write_header(folder / file, header)


def write_header(path: Path, header: Json) -> None:
    """Write the JSON that makes a folder of columns a store, whole or not at all."""
    files.write(path, json.dumps(header.to_json(), indent=2, allow_nan=False) + "\n")


class Growing:
    """A .npy file of one axis that is written piece by piece; `close` makes it readable."""

    def __init__(self, path: Path, dtype: str):
        self._dtype, self._length = np.dtype(dtype), 0
        self._file = path.open("wb")
        self._head()

    def _head(self) -> None:
        """Says how long the array is. numpy leaves room for any length, so the header's own size stays."""
        told = {"descr": np.lib.format.dtype_to_descr(self._dtype), "fortran_order": False, "shape": (self._length,)}
        np.lib.format.write_array_header_1_0(self._file, told)

    def append(self, values: np.ndarray) -> None:
        """Writes more of the array."""
        self._file.write(np.ascontiguousarray(values, self._dtype).data)
        self._length += len(values)

    def close(self) -> None:
        """Writes what the header could not know before."""
        if not self._file.closed:
            self._file.seek(0)
            self._head()
            self._file.close()
