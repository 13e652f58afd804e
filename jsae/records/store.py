"""The columnar store of records of latents: folders of memory-mapped .npy files. numpy only.

    records/texts/   texts.json, tokens.npy, token_offsets.npy, token_bytes.npy
    records/HOOK/    records.json, and one .npy for each column of `COLUMNS`
    records/HOOK/all/   all.json, and the columns of `ALL_COLUMNS`: all activations by latent; optional

Every example is a pointer (row, position) into one token array, which all hooks of a run share. Axes: R rows of T
tokens, V tokens of the vocabulary, f latents, E examples, A activations in the examples' rows, L logits,
B bins, N neighbours, M activations in total.
"""

import codecs
import dataclasses
import hashlib
import itertools
import json
from collections.abc import Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from jsae import jsons
from jsae.records.columns import VERSION, ColumnWriter, Folder, StoreError, write, write_header
from jsae.saelens.settings import CFG, SCALER, WEIGHTS, WHITENING
from jsae.settings import Json

__all__ = [
    "ALL_COLUMNS",
    "COLUMNS",
    "NON_ACTIVATING",
    "TEXT_COLUMNS",
    "TOP",
    "VERSION",
    "Activations",
    "ActivationsWriter",
    "AllHeader",
    "Header",
    "Store",
    "StoreError",
    "Texts",
    "TextsHeader",
    "digest",
]

TOP, NON_ACTIVATING = 0, 6
"""Groups of examples: 0: strongest; 1 to 5: from the fifths of [0, max], the highest first; 6: without activation."""

TEXT_COLUMNS: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "tokens": ("uint16", ("R", "T")),
    "token_offsets": ("uint32", ("V+1",)),
    "token_bytes": ("uint8", ("bytes",)),
}
"""Token `t` of the vocabulary has the bytes `token_offsets[t]` to `token_offsets[t + 1]`."""

COLUMNS: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "count": ("int64", ("f",)),  # tokens on which the latent fires
    "max": ("float32", ("f",)),
    "mean": ("float32", ("f",)),  # of the activations above 0
    "hist_range": ("float32", ("f", "2")),  # smallest and largest activation above 0
    "hist": ("uint32", ("f", "B")),  # tokens per bin of this range
    "group_share": ("float32", ("f", "6")),  # share of all tokens in each group's interval; [0]: all above 0
    "example_offsets": ("int64", ("f+1",)),  # examples of latent i: offsets[i] to offsets[i + 1], by group
    "example_group": ("uint8", ("E",)),
    "example_row": ("uint32", ("E",)),
    "example_position": ("uint16", ("E",)),  # the strongest token of the row; in group 6 a random one
    "example_value": ("float32", ("E",)),
    "activation_offsets": ("int64", ("E+1",)),  # activations of the example's latent in the example's row
    "activation_position": ("uint16", ("A",)),
    "activation_value": ("float32", ("A",)),
    "top_logits": ("uint16", ("f", "L")),  # ids of the tokens whose logits rise most; values include `direct_path`
    "top_logit_values": ("float32", ("f", "L")),
    "bottom_logits": ("uint16", ("f", "L")),  # ids of the tokens whose logits fall most
    "bottom_logit_values": ("float32", ("f", "L")),
    "logit_range": ("float32", ("f", "2")),
    "logit_hist": ("uint32", ("f", "B")),  # tokens of the vocabulary per bin of this range
    "neighbours": ("uint32", ("f", "N")),  # other latents with the most similar decoder rows
    "neighbour_cosines": ("float32", ("f", "N")),
    "together": ("uint32", ("f", "N")),  # latents that fire on the same tokens more often than on all tokens
    "together_share": ("float32", ("f", "N")),  # share of this latent's tokens on which they fire
    "channels": ("uint32", ("f", "3")),  # channels of the stream with the largest entries of the decoder row
    "channel_values": ("float32", ("f", "3")),
    "channel_shares": ("float32", ("f", "3")),  # |entry| / sum of |entries|
    "correlated_channels": ("uint32", ("f", "3")),  # channels with the largest correlation to the activation
    "channel_pearson": ("float32", ("f", "3")),
    "channel_cosine": ("float32", ("f", "3")),
}
"""Columns: dtype and axes. A list shorter than its axis is padded with the latent itself or 0, and with NaN values."""

ALL_COLUMNS: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "offsets": ("int64", ("f+1",)),  # activations of latent i: offsets[i] to offsets[i + 1], in the order of the text
    "cell": ("uint32", ("M",)),  # row * T + position
    "value": ("float16", ("M",)),  # at most 65504
}


@dataclasses.dataclass(frozen=True)
class TextsHeader(Json):
    """The content of `texts.json`."""

    version: int
    rows: int
    row_length: int
    vocab_size: int
    bos: int
    """Id of BOS. Latents are not counted on it."""
    special: list[int]
    """Ids of the special tokens, including BOS."""
    dataset: str
    split: str
    model: str
    fingerprint: str
    """SHA-256 of the checkpoint."""
    seed: int


@dataclasses.dataclass(frozen=True)
class Header(Json):
    """The content of `records.json`."""

    version: int
    hook: str
    layer: int
    d_in: int
    d_sae: int
    architecture: str
    sae_sha256: str
    """`digest` of the export."""
    tokens: int
    """Number of counted tokens, without BOS and dropped duplicates."""
    direct_path: float
    """Factor of nanochat's residual mixing on this hook's direct path to the logits; if negative, it flips signs."""
    duplicate_rows: int
    settings: dict[str, Any]
    """Settings with which the records were gathered: num_tokens, per_group and so on."""


@dataclasses.dataclass(frozen=True)
class AllHeader(Json):
    """The content of `all.json`."""

    version: int
    d_sae: int
    rows: int
    row_length: int
    sae_sha256: str


_DESCRIPTIVE = ("metadata", "device")
_HOOKS = ("hook_name", "hook_name_out", "hook_names", "sae_lens_version")


def digest(export: Path) -> str:
    """Return the SHA-256 of an exported SAE, as hex: of everything in its directory that its latents depend on.

    These are the weights, the statistics that scale its input if there are any, and the settings of `cfg.json` except
    for the device and the metadata, of which only the names of hooks and the version of SAELens count.

    Raises:
      FileNotFoundError: the weights or the settings are missing.
      ValueError: `cfg.json` is broken.
    """
    settings = json.dumps(_settings(export / CFG), sort_keys=True)
    names = [WEIGHTS, *(name for name in (SCALER, WHITENING) if (export / name).is_file())]
    total = hashlib.sha256(settings.encode())
    for name in names:
        with (export / name).open("rb") as file:
            total.update(f"\n{name} {hashlib.file_digest(file, 'sha256').hexdigest()}".encode())
    return total.hexdigest()


def _settings(file: Path) -> dict[str, Any]:
    """Return the settings in a `cfg.json` on which latents may depend."""
    cfg = jsons.read(file)
    if not isinstance(cfg, dict):
        raise ValueError(f"{file} is broken: expected an object, got {type(cfg).__name__}")
    metadata = cfg.get("metadata")
    described = {name: metadata[name] for name in _HOOKS if name in metadata} if isinstance(metadata, dict) else {}
    return {name: value for name, value in cfg.items() if name not in _DESCRIPTIVE} | {"metadata": described}


class Texts(Folder):
    """The token rows that all records of a run point into, and the bytes of the vocabulary.

    Raises:
      FileNotFoundError: there are no texts.
      StoreError: they are broken or have another version.
    """

    _columns, _file, _header = TEXT_COLUMNS, "texts.json", TextsHeader
    _partitions: ClassVar = {"token_offsets": "token_bytes"}

    header: TextsHeader

    def __init__(self, path: str | Path):
        super().__init__(path)
        self._check_shape("tokens", self._mapped("tokens"))  # the header's numbers are used before any column is read

    def _sizes(self) -> dict[str, int]:
        header = self.header
        return {"R": header.rows, "T": header.row_length, "V": header.vocab_size}

    def _upper_bounds(self) -> dict[str, int]:
        return {"tokens": self.header.vocab_size}

    @property
    def tokens(self) -> np.ndarray:
        """Token rows, uint16 (R, T)."""
        return self["tokens"]

    @cached_property
    def vocabulary(self) -> list[bytes]:
        """The bytes of every token."""
        data, offsets = self["token_bytes"].tobytes(), self["token_offsets"].tolist()
        return [data[a:b] for a, b in itertools.pairwise(offsets)]

    @cached_property
    def words(self) -> list[str]:
        """Every token as text; invalid UTF-8, such as a part of a character, becomes U+FFFD."""
        return [piece.decode("utf-8", "replace") for piece in self.vocabulary]

    def spell(self, ids: Iterable[int]) -> list[str]:
        """Return one string for each of some consecutive tokens, which joined are their text.

        A character of several tokens is in the string of the last of them; the strings of the others are "". Invalid
        UTF-8 becomes U+FFFD.
        """
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        strings = [decoder.decode(self.vocabulary[i]) for i in ids]
        if strings:
            strings[-1] += decoder.decode(b"", final=True)
        return strings

    @staticmethod
    def write(folder: Path, header: TextsHeader, tokens: np.ndarray, vocabulary: list[bytes]) -> None:
        """Write token rows (R, T) and the bytes of the vocabulary. Raises OSError, see `columns.write`."""
        columns = {
            "tokens": tokens,
            "token_offsets": np.cumsum([0, *map(len, vocabulary)]),
            "token_bytes": np.frombuffer(b"".join(vocabulary), np.uint8),
        }
        write(folder, Texts._file, header, columns, TEXT_COLUMNS)


class Activations(Folder):
    """All activations above 0, by latent: the folder `all` of a store.

    Raises:
      FileNotFoundError: the activations were not stored.
      StoreError: they are broken or have another version.
    """

    _columns, _file, _header = ALL_COLUMNS, "all.json", AllHeader
    _partitions: ClassVar = {"offsets": "cell"}

    header: AllHeader

    def _sizes(self) -> dict[str, int]:
        return {"f": self.header.d_sae}

    def _upper_bounds(self) -> dict[str, int]:
        return {"cell": self.header.rows * self.header.row_length}

    def activations_of_latent(self, latent: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the cells (row * T + position) on which a latent fires, in ascending order, and its activations."""
        start, end = (int(self["offsets"][latent + i]) for i in (0, 1))
        return self["cell"][start:end], self["value"][start:end]

    @staticmethod
    def write(folder: Path, header: AllHeader, columns: Mapping[str, np.ndarray]) -> None:
        """Write the columns of `ALL_COLUMNS` at once; `ActivationsWriter` writes them in pieces."""
        write(folder, Activations._file, header, columns, ALL_COLUMNS)


class ActivationsWriter:
    """A writer of the columns of `ALL_COLUMNS` in pieces. The store exists only after `finish`.

    Args:
      folder: the folder, created if missing.
    """

    def __init__(self, folder: Path):
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._files = {name: ColumnWriter(folder / f"{name}.npy", ALL_COLUMNS[name][0]) for name in ("cell", "value")}

    def append(self, cells: np.ndarray, values: np.ndarray) -> None:
        """Append activations, ordered by latent and then by cell."""
        self._files["cell"].append(cells)
        self._files["value"].append(np.minimum(values, np.finfo(np.float16).max))

    def finish(self, header: AllHeader, counts: np.ndarray) -> None:
        """Write the header and the number of activations of each latent, (f,)."""
        self.close()
        np.save(self._folder / "offsets.npy", np.concatenate([[0], np.cumsum(counts, dtype=np.int64)]))
        write_header(self._folder / Activations._file, header)

    def close(self) -> None:
        """Close the files."""
        for file in self._files.values():
            file.close()


class Store(Folder):
    """The records of one SAE. `store["max"]` is a column; examples point into `store.texts`.

    Args:
      path: `records/HOOK`; the texts are in `records/texts`.
      sae_sha256: `digest` of the current SAE, with which the records must agree; None: do not check.
      hook: the hook of the records; None: that of the header.

    Raises:
      FileNotFoundError: there are no records.
      StoreError: the records are broken, or have another version or SAE. Pointers out of range are detected on access.
    """

    _columns, _file, _header = COLUMNS, "records.json", Header
    _partitions: ClassVar = {"example_offsets": "example_row", "activation_offsets": "activation_position"}

    header: Header

    def __init__(self, path: str | Path, sae_sha256: str | None = None, hook: str | None = None):
        super().__init__(path)
        if hook is not None and hook != self.header.hook:
            raise StoreError(f"the records at {self.path} are of {self.header.hook!r:.200}, not of {hook}")
        self.texts = Texts(self.path.parent / "texts")
        recorded = self.header.sae_sha256
        if sae_sha256 is not None and recorded != sae_sha256:
            raise StoreError(
                f"the records at {self.path} are of the SAE {recorded[:12]}, not of {sae_sha256[:12]}: "
                "it was trained again or its settings changed since"
            )

    def _sizes(self) -> dict[str, int]:
        return {"f": self.header.d_sae, "2": 2, "3": 3, "6": 6}

    def _upper_bounds(self) -> dict[str, int]:
        texts, f = self.texts.header, self.header.d_sae
        return {
            "example_group": NON_ACTIVATING + 1,
            "example_row": texts.rows,
            "example_position": texts.row_length,
            "activation_position": texts.row_length,
            "top_logits": texts.vocab_size,
            "bottom_logits": texts.vocab_size,
            "neighbours": f,
            "together": f,
            "channels": self.header.d_in,
            "correlated_channels": self.header.d_in,
        }

    @cached_property
    def all(self) -> Activations:
        """All activations above 0. Raises FileNotFoundError if they were not stored."""
        return Activations(self.path / "all")

    def examples(self, latent: int) -> range:
        """Return the examples of a latent, as indices into the example columns."""
        offsets = self["example_offsets"]
        return range(int(offsets[latent]), int(offsets[latent + 1]))

    def activations(self, example: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the positions in an example's row on which its latent fires, and the activations."""
        start, end = (int(self["activation_offsets"][example + i]) for i in (0, 1))
        return self["activation_position"][start:end], self["activation_value"][start:end]

    @staticmethod
    def write(folder: Path, header: Header, columns: Mapping[str, np.ndarray]) -> None:
        """Write all columns of `COLUMNS`. Raises OSError, see `columns.write`."""
        write(folder, Store._file, header, columns, COLUMNS)
