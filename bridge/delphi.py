"""delphi's cache of latents, written from the records, and a tokenizer for its loader. numpy only: no torch, no jax.

delphi (EleutherAI, package eai-delphi 0.1.3) explains and scores latents from such a cache:

    latents/MODULE/{start}_{end}.safetensors   the latents from start to end, both included
    latents/MODULE/config.json                 delphi's CacheConfig, and model_name

    dataset = LatentDataset(out / "latents", SamplerConfig(), ConstructorConfig(), Tokenizer(store.texts))

It needs neither a Hugging Face model nor a data set, since the tokens lie in the cache. It cuts rows into examples of
`ConstructorConfig.example_ctx_len` tokens (32), which must divide the length of the records' rows.
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
"""About how many activations share a file: what bounds the memory to write it, and to read it in delphi."""


def write(
    store: Store,
    sae_dir: Path,
    out: Path,
    *,
    module: str | None = None,
    activations_per_file: int = ACTIVATIONS_PER_FILE,
) -> list[Path]:
    """Write every activation of an SAE as delphi's cache, whole or not at all; return the files.

    A cache that is there is replaced; other files in its folder stay.

    A file holds `locations` (N, 3), row, position and latent minus start, uint16 where they fit, else uint32;
    `activations` (N,) float16; `tokens` (R, T) int32. N of a file is above the bound only for a single latent.

    Args:
      store: the records, with every activation (`all/`).
      sae_dir: the export that they must be of.
      out: what delphi calls the run's folder, `results/NAME`.
      module: the name of the hook there; by default the hook's own.
      activations_per_file: the bound on N.

    Raises:
      StoreError: the records are of another SAE, or broken.
      FileNotFoundError: every activation was not kept.
      ValueError: a module that is no name of a folder, or a bound below 1.
      OSError: the cache cannot be written, for example because the disk is full; an earlier one stays.
    """
    module = store.header.hook if module is None else module
    if activations_per_file < 1:
        raise ValueError(f"activations_per_file must be at least 1, got {activations_per_file}")
    if not module or module in (".", "..") or {"/", "\\", "\0"} & set(module):
        raise ValueError(f"module {module!r} cannot name a folder: give one like {store.header.hook!r}")
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
    """Return whether a file of the folder is none of a cache, for which delphi takes every `*_*.safetensors`."""
    return len(file.parts) > 1 or not (file.match("*_*.safetensors") or file.name == "config.json")


def _activations(store: Store, sae_dir: Path) -> Activations:
    """All activations, of the SAE at hand and of the text beside them."""
    told, texts = store.header, store.texts.header
    found = digest(Path(sae_dir))
    try:
        acts = store.all
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{store.path} holds the activations of its examples only, delphi needs all: "
            "gather the records with python -m experiments.explore --keep_activations"
        ) from error
    expected = (found, told.d_sae, texts.rows, texts.row_length)
    header = acts.header
    if told.sae_sha256 != found or (header.sae_sha256, header.d_sae, header.rows, header.row_length) != expected:
        raise StoreError(f"the activations at {acts.path} are not those of {sae_dir}")
    return acts


def _splits(offsets: np.ndarray, bound: int) -> Iterator[tuple[int, int]]:
    """Ranges of latents that follow each other, each as long as its activations stay within the bound."""
    start, end = 0, len(offsets) - 1
    while start < end:
        fits = int(np.searchsorted(offsets, int(offsets[start]) + bound, side="right")) - 1
        stop = min(max(fits, start + 1), end)
        yield start, stop
        start = stop


def _cells(acts: Activations, start: int, stop: int, row_length: int) -> dict[str, np.ndarray]:
    """`locations` and `activations` of latents start to stop."""
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
    """What delphi asks of a Hugging Face tokenizer, from the vocabulary beside the records. It only decodes.

    Args:
      texts: the records' texts.
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
        """Names of tokens to their ids; a name for each id."""
        return dict(self.vocab)

    def decode(self, ids: Any, skip_special_tokens: bool = False) -> str:
        """The text of one id or of ids that follow each other."""
        return "".join(self._texts.spell(self._kept(_ids(ids), skip_special_tokens)))

    def batch_decode(self, sequences: Any, skip_special_tokens: bool = False) -> list[str]:
        """The text of each sequence, or, of a single sequence of ids, of each token.

        Tokens of a single sequence are told as they follow each other: a character that is split over tokens stands
        with the one that completes it.
        """
        sequences = list(sequences)
        if all(np.ndim(sequence) == 0 for sequence in sequences):
            ids = _ids(sequences)
            kept = set(self._kept(ids, skip_special_tokens))
            return [text if i in kept else "" for i, text in zip(ids, self._texts.spell(ids), strict=True)]
        return [self.decode(sequence, skip_special_tokens) for sequence in sequences]

    def _kept(self, ids: Sequence[int], skip_special_tokens: bool) -> list[int]:
        return [i for i in ids if not (skip_special_tokens and i in self.all_special_ids)]


def _ids(ids: Any) -> list[int]:
    """Ids as Python has them: of a number, a list, an array or a tensor."""
    return [int(ids)] if np.ndim(ids) == 0 else [int(i) for i in ids]


def _names(vocabulary: Sequence[bytes]) -> dict[str, int]:
    """A name for each token: its text; where that is none, its bytes; where it is another's, with its number."""
    names: dict[str, int] = {}
    for i, piece in enumerate(vocabulary):
        try:
            name = piece.decode("utf-8")
        except UnicodeDecodeError:
            name = "".join(f"<0x{byte:02X}>" for byte in piece)
        names[name if name and name not in names else f"{name}<{i}>"] = i
    return names
