"""Export records as delphi's cache of latents, with a tokenizer for its loader. numpy only: no torch, no jax.

delphi (EleutherAI, package eai-delphi 0.1.3) explains and scores latents from this cache:

    latents/MODULE/{start}_{end}.safetensors   the latents from start to end, inclusive
    latents/MODULE/config.json                 delphi's CacheConfig, and model_name

    dataset = LatentDataset(out / "latents", SamplerConfig(), ConstructorConfig(), Tokenizer(store.texts))

It needs neither a Hugging Face model nor a data set, because the cache contains the tokens. It splits rows into
examples of `ConstructorConfig.example_ctx_len` tokens (32), which must divide the length of the records' rows.
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from jsae import files
from jsae.records.store import Activations, Store, StoreError, Texts, digest

ACTIVATIONS_PER_FILE = 1 << 23
"""Approximate number of activations per file, which limits the memory to write it and to read it in delphi."""


def write(
    store: Store,
    sae_dir: Path,
    out: Path,
    *,
    module: str | None = None,
    activations_per_file: int = ACTIVATIONS_PER_FILE,
) -> list[Path]:
    """Write all activations of an SAE as delphi's cache, atomically.

    An existing cache is replaced; other files in its folder are kept. A file contains `locations` (N, 3): row, position
    and latent - start, uint16 or, if they do not fit, uint32; `activations` (N,) float16; `tokens` (R, T) int32. N
    exceeds the bound only for a single latent.

    Args:
      store: the records, with all activations (`all/`).
      sae_dir: the export of the same SAE.
      out: delphi's folder of the run, `results/NAME`.
      module: delphi's name of the hook; default: the hook's name.
      activations_per_file: the bound on N.

    Returns:
      The paths of the files.

    Raises:
      StoreError: the records are of another SAE, or damaged.
      FileNotFoundError: the activations were not stored.
      ValueError: module is not a valid folder name, or the bound is below 1.
      OSError: the cache cannot be written, for example because the disk is full; an earlier one remains.
    """
    module = store.header.hook if module is None else module
    if activations_per_file < 1:
        raise ValueError(f"activations_per_file must be at least 1, got {activations_per_file}")
    if not module or module in (".", "..") or {"/", "\\", "\0"} & set(module):
        raise ValueError(f"module {module!r} is not a valid folder name: give one such as {store.header.hook!r}")
    acts = _activations(store, sae_dir)
    folder = Path(out) / "latents" / module
    tokens = np.ascontiguousarray(store.texts.tokens, np.int32)
    names = []
    with files.replacing_folder(folder, keep=_is_foreign) as partial:
        for start, stop in _splits(acts["offsets"], activations_per_file):
            names.append(f"{start}_{stop - 1}.safetensors")
            save_file(_cells(acts, start, stop, tokens.shape[1]) | {"tokens": tokens}, partial / names[-1])
        config = json.dumps(_config(store.texts, len(names)), indent=4) + "\n"
        (partial / "config.json").write_text(config, encoding="utf-8")
    return [folder / name for name in (*names, "config.json")]


def _is_foreign(file: Path) -> bool:
    """Return whether a file does not belong to a cache; delphi reads every `*_*.safetensors`."""
    return len(file.parts) > 1 or not (file.match("*_*.safetensors") or file.name == "config.json")


def _activations(store: Store, sae_dir: Path) -> Activations:
    """Return all activations after checking that they are of this SAE and text."""
    records, texts = store.header, store.texts.header
    sae_digest = digest(Path(sae_dir))
    try:
        acts = store.all
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{store.path} contains only the activations of its examples, but delphi needs all: "
            "gather the records with python -m experiments.explore --keep_activations"
        ) from error
    expected = (sae_digest, records.d_sae, texts.rows, texts.row_length)
    header = acts.header
    actual = (header.sae_sha256, header.d_sae, header.rows, header.row_length)
    if records.sae_sha256 != sae_digest or actual != expected:
        raise StoreError(f"the activations at {acts.path} are not those of {sae_dir}")
    return acts


def _splits(offsets: np.ndarray, bound: int) -> Iterator[tuple[int, int]]:
    """Yield consecutive ranges of latents, each with as many latents as the bound on activations allows."""
    start, end = 0, len(offsets) - 1
    while start < end:
        fitting = int(np.searchsorted(offsets, int(offsets[start]) + bound, side="right")) - 1
        stop = min(max(fitting, start + 1), end)
        yield start, stop
        start = stop


def _cells(acts: Activations, start: int, stop: int, row_length: int) -> dict[str, np.ndarray]:
    """Return `locations` and `activations` of the latents start to stop - 1."""
    offsets = acts["offsets"][start : stop + 1]
    cells = acts["cell"][offsets[0] : offsets[-1]]
    locations = np.empty((len(cells), 3), np.uint32)
    np.floor_divide(cells, row_length, out=locations[:, 0])
    np.remainder(cells, row_length, out=locations[:, 1])
    locations[:, 2] = np.repeat(np.arange(stop - start, dtype=np.uint32), np.diff(offsets))
    if locations.max(initial=0) < 1 << 16:
        locations = locations.astype(np.uint16)
    return {"locations": locations, "activations": np.array(acts["value"][offsets[0] : offsets[-1]])}


def _config(texts: Texts, splits: int) -> dict[str, Any]:
    header = texts.header
    return {
        "dataset_repo": header.dataset,
        "dataset_split": header.split,
        "dataset_name": "",
        "dataset_column": "text",
        "batch_size": 32,
        "cache_ctx_len": header.row_length,
        "n_tokens": header.rows * header.row_length,
        "n_splits": splits,
        "model_name": header.model,
    }


class Tokenizer:
    """The part of a Hugging Face tokenizer that delphi uses, for the vocabulary of the records. It only decodes.

    Args:
      texts: the texts of the records.
    """

    def __init__(self, texts: Texts):
        self._texts = texts
        self.name_or_path: str = texts.header.model
        self.bos_token_id: int = texts.header.bos
        self.all_special_ids: list[int] = list(texts.header.special)
        self.vocab: dict[str, int] = _names(texts.vocabulary)
        self.vocab_size: int = len(self.vocab)

    def __len__(self) -> int:
        return self.vocab_size

    def get_vocab(self) -> dict[str, int]:
        """Return ids by the unique names of tokens."""
        return dict(self.vocab)

    def decode(self, ids: Any, skip_special_tokens: bool = False) -> str:
        """Return the text of one id or of consecutive ids."""
        return "".join(self._texts.spell(self._shown_ids(_ids(ids), skip_special_tokens)))

    def batch_decode(self, sequences: Any, skip_special_tokens: bool = False) -> list[str]:
        """Return the text of each sequence, or, for a single sequence of ids, of each token.

        Tokens of a single sequence are decoded together: a character of several tokens is in the text of the last.
        """
        sequences = list(sequences)
        if all(np.ndim(sequence) == 0 for sequence in sequences):
            ids = _ids(sequences)
            shown = set(self._shown_ids(ids, skip_special_tokens))
            return [text if i in shown else "" for i, text in zip(ids, self._texts.spell(ids), strict=True)]
        return [self.decode(sequence, skip_special_tokens) for sequence in sequences]

    def _shown_ids(self, ids: Sequence[int], skip_special_tokens: bool) -> list[int]:
        return [i for i in ids if not (skip_special_tokens and i in self.all_special_ids)]


def _ids(ids: Any) -> list[int]:
    """Return the ids in a number, a list, an array or a tensor as Python integers."""
    return [int(ids)] if np.ndim(ids) == 0 else [int(i) for i in ids]


def _names(vocabulary: Sequence[bytes]) -> dict[str, int]:
    """Return ids by name: the text of a token, or its bytes if it is not text, with its id if that is not unique."""
    names: dict[str, int] = {}
    for i, piece in enumerate(vocabulary):
        try:
            name = piece.decode("utf-8")
        except UnicodeDecodeError:
            name = "".join(f"<0x{byte:02X}>" for byte in piece)
        names[name if name and name not in names else f"{name}<{i}>"] = i
    return names
