"""The columnar store of what each latent fires on: folders of .npy files that are mapped, not read. numpy only.

    records/texts/   texts.json, tokens.npy, token_offsets.npy, token_bytes.npy
    records/HOOK/    records.json, and one .npy for each column of `COLUMNS`

Every context is a pointer (row, position) into the one token array that all hooks of a run share. Axes: R rows of T
tokens, V tokens of the vocabulary, f latents, E examples, A activations within the examples' rows, L logits kept,
B bins, N neighbours kept.
"""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from jsae.config import Json, require

VERSION = 1

TOP, NON_ACTIVATING = 0, 6
"""Groups of examples: 0 the strongest texts, 1 to 5 the fifths of [0, max] from the highest down, 6 texts without."""

TEXT_COLUMNS: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "tokens": ("uint16", ("R", "T")),
    "token_offsets": ("uint32", ("V+1",)),
    "token_bytes": ("uint8", ("bytes",)),
}
"""Token `t` of the vocabulary is the bytes `token_offsets[t]` to `token_offsets[t + 1]`."""

COLUMNS: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "count": ("int64", ("f",)),  # tokens on which it fires
    "max": ("float32", ("f",)),
    "mean": ("float32", ("f",)),  # of the activations above 0
    "hist_range": ("float32", ("f", "2")),  # of those: smallest and largest
    "hist": ("uint32", ("f", "B")),  # tokens per bin of that range
    "group_share": ("float32", ("f", "6")),  # share of all tokens inside each group's interval, [0] is all above 0
    "example_offsets": ("int64", ("f+1",)),  # examples of latent i: offsets[i] to offsets[i + 1], by group
    "example_group": ("uint8", ("E",)),
    "example_row": ("uint32", ("E",)),
    "example_position": ("uint16", ("E",)),  # the strongest token of the row; of group 6 a random one
    "example_value": ("float32", ("E",)),
    "activation_offsets": ("int64", ("E+1",)),  # where the example's latent fires in the example's row
    "activation_position": ("uint16", ("A",)),
    "activation_value": ("float32", ("A",)),
    "top_logits": ("uint16", ("f", "L")),  # token ids, the most raised first
    "top_logit_values": ("float32", ("f", "L")),
    "bottom_logits": ("uint16", ("f", "L")),  # the most lowered first
    "bottom_logit_values": ("float32", ("f", "L")),
    "logit_range": ("float32", ("f", "2")),
    "logit_hist": ("uint32", ("f", "B")),  # tokens of the vocabulary per bin of that range
    "neighbours": ("uint32", ("f", "N")),  # latents with the most alike decoder rows, itself not among them
    "neighbour_cosines": ("float32", ("f", "N")),
    "together": ("uint32", ("f", "N")),  # latents that most often fire on the same token
    "together_share": ("float32", ("f", "N")),  # on what share of this latent's tokens
    "channels": ("uint32", ("f", "3")),  # channels of the stream with the largest entries of the decoder row
    "channel_values": ("float32", ("f", "3")),
    "channel_shares": ("float32", ("f", "3")),  # |entry| / sum of |entries|
    "correlated_channels": ("uint32", ("f", "3")),  # channels that go with the activation
    "channel_pearson": ("float32", ("f", "3")),
    "channel_cosine": ("float32", ("f", "3")),
}
"""Columns: dtype and axes. Padding of a list that is shorter than its axis: the latent itself, or token 0, value NaN."""


@dataclasses.dataclass(frozen=True)
class TextsHeader(Json):
    """What `texts.json` says."""

    version: int
    rows: int
    row_length: int
    vocab_size: int
    bos: int
    """Its id; where it stands no latent is counted."""
    special: tuple[int, ...] | list[int]
    """Ids of the special tokens, BOS among them."""
    dataset: str
    split: str
    model: str
    fingerprint: str
    """sha256 of the checkpoint."""
    seed: int


@dataclasses.dataclass(frozen=True)
class Header(Json):
    """What `records.json` says."""

    version: int
    hook: str
    layer: int
    d_in: int
    d_sae: int
    architecture: str
    sae_sha256: str
    """`digest` of the export."""
    tokens: int
    """How many tokens were counted: BOS and dropped duplicates are not."""
    direct_path: float
    """Factor that nanochat's residual mixing puts on this hook's direct path to the logits; below 0 it turns them."""
    duplicate_rows: int
    settings: dict[str, Any]
    """How the records were gathered: num_tokens, per_group and so on."""


class StoreError(ValueError):
    """A store that is of another version, of another SAE, or broken."""


def digest(export: Path) -> str:
    """sha256 of an exported SAE: of its weights' file."""
    with (export / "sae_weights.safetensors").open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class _Folder:
    """Columns in a folder, mapped when first asked for."""

    _columns: Mapping[str, tuple[str, tuple[str, ...]]]
    _file: str

    def __init__(self, path: str | Path):
        self.path = Path(path)
        file = self.path / self._file
        if not file.is_file():
            raise FileNotFoundError(
                f"no records at {self.path}: `python -m experiments.explore --run_dir=…` makes them"
            )
        try:
            told = json.loads(file.read_text(encoding="utf-8"))
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise StoreError(f"{file} is broken: {error}") from error
        version = told.get("version") if isinstance(told, dict) else told
        if version != VERSION:
            raise StoreError(f"{file} is of version {version!r}, this program reads {VERSION}: gather the records anew")
        self._told = told

    def _sizes(self) -> dict[str, int]:
        raise NotImplementedError

    def _column(self, name: str) -> np.ndarray:
        """One column, checked against what it must be."""
        dtype, axes = self._columns[name]
        file = self.path / f"{name}.npy"
        try:
            found = np.load(file, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise StoreError(f"{file} is missing or broken ({error}): gather the records anew") from error
        sizes = self._sizes()
        fits = len(axes) == found.ndim and all(
            sizes.get(axis, found.shape[i]) == found.shape[i] for i, axis in enumerate(axes)
        )
        if found.dtype != dtype or not fits:
            raise StoreError(f"{file} is {found.dtype}{found.shape}, expected {dtype}({', '.join(axes)}) of {sizes}")
        return found


def _write(folder: Path, file: str, header: Json, columns: Mapping[str, np.ndarray], known: Mapping[str, Any]) -> None:
    """Writes a folder; the header last, so that one without it is no store."""
    require(set(columns) == set(known), f"a store has the columns {sorted(known)}, got {sorted(columns)}")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / file).unlink(missing_ok=True)
    for name, column in columns.items():
        np.save(folder / f"{name}.npy", np.asarray(column, known[name][0]), allow_pickle=False)
    partial = folder / f"{file}.partial"
    partial.write_text(json.dumps(header.to_json(), indent=2, allow_nan=False) + "\n", encoding="utf-8")
    partial.replace(folder / file)


class Texts(_Folder):
    """The token rows that all records of a run point into, and the vocabulary's bytes to show them by.

    Raises:
      FileNotFoundError: there are none.
      StoreError: of another version, or broken.
    """

    _columns, _file = TEXT_COLUMNS, "texts.json"

    def __init__(self, path: str | Path):
        super().__init__(path)
        self.header = TextsHeader.from_json(self._told)

    def _sizes(self) -> dict[str, int]:
        header = self.header
        return {"R": header.rows, "T": header.row_length, "V+1": header.vocab_size + 1}

    @cached_property
    def tokens(self) -> np.ndarray:
        """uint16 (R, T)."""
        return self._column("tokens")

    @cached_property
    def vocabulary(self) -> list[bytes]:
        """The bytes of every token."""
        data, offsets = self._column("token_bytes").tobytes(), self._column("token_offsets").tolist()
        if (
            offsets[0] != 0
            or offsets[-1] != len(data)
            or any(a > b for a, b in zip(offsets, offsets[1:], strict=False))
        ):
            raise StoreError(f"{self.path}: token_offsets do not partition token_bytes: gather the records anew")
        return [data[a:b] for a, b in zip(offsets, offsets[1:], strict=False)]

    @staticmethod
    def write(folder: Path, header: TextsHeader, tokens: np.ndarray, vocabulary: list[bytes]) -> None:
        """Writes rows (R, T) and the vocabulary."""
        columns = {
            "tokens": tokens,
            "token_offsets": np.cumsum([0, *map(len, vocabulary)]),
            "token_bytes": np.frombuffer(b"".join(vocabulary), np.uint8),
        }
        _write(folder, Texts._file, header, columns, TEXT_COLUMNS)


class Store(_Folder):
    """The records of one SAE; `store["max"]` is a column, `store.texts` what the examples point into.

    Args:
      path: `records/HOOK`; the texts lie beside it.
      sae_sha256: `digest` of the SAE at hand; records of another are refused.

    Raises:
      FileNotFoundError: there are none.
      StoreError: of another version or SAE, or broken; pointers out of range are found when their column is asked for.
    """

    _columns, _file = COLUMNS, "records.json"

    def __init__(self, path: str | Path, sae_sha256: str | None = None):
        super().__init__(path)
        self.header = Header.from_json(self._told)
        self.texts = Texts(self.path.parent / "texts")
        found = self.header.sae_sha256
        if sae_sha256 is not None and found != sae_sha256:
            raise StoreError(
                f"the records at {self.path} are of the SAE {found[:12]}, not of {sae_sha256[:12]}: "
                "it was trained again since; gather the records anew"
            )
        self._cache: dict[str, np.ndarray] = {}

    def _sizes(self) -> dict[str, int]:
        return {"f": self.header.d_sae, "f+1": self.header.d_sae + 1, "2": 2, "3": 3, "6": 6}

    def __getitem__(self, name: str) -> np.ndarray:
        """A column, mapped and checked once."""
        if name not in self._cache:
            column = self._column(name)
            self._check_pointers(name, column)
            self._cache[name] = column
        return self._cache[name]

    def _check_pointers(self, name: str, column: np.ndarray) -> None:
        """Raises StoreError for a pointer that points nowhere."""
        texts, f = self.texts.header, self.header.d_sae
        below = {
            "example_row": texts.rows,
            "example_position": texts.row_length,
            "activation_position": texts.row_length,
            "top_logits": texts.vocab_size,
            "bottom_logits": texts.vocab_size,
            "neighbours": f,
            "together": f,
            "channels": self.header.d_in,
            "correlated_channels": self.header.d_in,
        }.get(name)
        if below is not None and column.size and int(column.max()) >= below:
            raise StoreError(f"{self.path}: {name} holds {int(column.max())}, but must be below {below}")
        ends = {"example_offsets": "example_row", "activation_offsets": "activation_position"}.get(name)
        if ends is not None:
            whole = column[0] == 0 and column[-1] == len(self[ends]) and (np.diff(column) >= 0).all()
            if not whole:
                raise StoreError(f"{self.path}: {name} does not partition {ends}: gather the records anew")

    def examples(self, latent: int) -> range:
        """The examples of a latent, as indices into the example columns."""
        offsets = self["example_offsets"]
        return range(int(offsets[latent]), int(offsets[latent + 1]))

    def activations(self, example: int) -> tuple[np.ndarray, np.ndarray]:
        """Where in its row an example's latent fires, and how strongly."""
        start, end = (int(self["activation_offsets"][example + i]) for i in (0, 1))
        return self["activation_position"][start:end], self["activation_value"][start:end]

    @staticmethod
    def write(folder: Path, header: Header, columns: Mapping[str, np.ndarray]) -> None:
        """Writes the columns of `COLUMNS`, all of them."""
        _write(folder, Store._file, header, columns, COLUMNS)
