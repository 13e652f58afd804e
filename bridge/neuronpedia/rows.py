"""The contents that both bulk formats have of a latent: tables, histograms, and texts in groups by activation."""

import dataclasses
import functools
import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np

from bridge.neuronpedia import text
from jsae.records.store import NON_ACTIVATING, TOP, Store, StoreError, digest
from jsae.saelens.settings import is_complete

SHOWN = 127
"""Largest number of tokens of a text: a row of 128 without BOS."""
LOGITS = 10
_DECIMALS, _VALUE_DECIMALS, _BIN_DECIMALS = 5, 4, 3


@dataclasses.dataclass(frozen=True)
class Context:
    """A text on which a latent fires: tokens, activations, and the group of the example."""

    tokens: list[str]
    values: list[float]
    qualifying: int
    """Index of the token whose activation determines the group."""
    low: float
    """Lower end of the group's interval of activations; -1 for the group of the strongest."""
    high: float
    share: float
    """Share of all tokens in the interval; -1 for the group of the strongest."""

    @property
    def max(self) -> float:
        """The largest activation."""
        return max(self.values)


@dataclasses.dataclass(frozen=True)
class Latent:
    """The contents of the bulk formats for one latent."""

    index: int
    tables: dict[str, Any]
    """The columns that both formats share, by their common names."""
    contexts: tuple[Context, ...]
    """The strongest texts first, then those of the intervals from the highest to the lowest."""
    neighbours: tuple[list[int], list[float]]
    """Latents with the most similar decoder rows and their cosines, itself first."""
    vector: list[float]
    """The decoder row, or []."""

    @property
    def max(self) -> float:
        """The largest activation in its texts; 0 if it is dead."""
        return max((context.max for context in self.contexts), default=0.0)


class Latents:
    """The latents of an SAE; `latents[i]` is read from the store on access.

    Args:
      store: the records.
      sae_dir: the export of the same SAE.
      vectors: whether to include decoder rows.
      shown: largest number of tokens of a text, around the one that determines the group.

    Raises:
      FileNotFoundError: there is no export.
      StoreError: the records are of another SAE.
    """

    def __init__(self, store: Store, sae_dir: Path, vectors: bool = False, shown: int = SHOWN):
        check(store, sae_dir)
        self.store, self._shown = store, shown
        self._W_dec = _decoder(sae_dir) if vectors else None
        self._row_texts = functools.lru_cache(4096)(self._spell)  # one row is an example of many latents

    def __len__(self) -> int:
        return self.store.header.d_sae

    def __getitem__(self, index: int) -> Latent:
        store = self.store
        near, cosines = _unpadded(store["neighbours"][index], store["neighbour_cosines"][index])
        return Latent(
            index=index,
            tables=self._tables(index),
            contexts=tuple(self._contexts(index)),
            neighbours=([index, *near], [1.0, *cosines]),
            vector=[] if self._W_dec is None else self._W_dec[index].tolist(),
        )

    def _tables(self, i: int) -> dict[str, Any]:
        store = self.store
        aligned, entries, shares = (store[name][i] for name in ("channels", "channel_values", "channel_shares"))
        channels, pearson = _unpadded(store["correlated_channels"][i], store["channel_pearson"][i])
        down, lows = self._logits("bottom", i)
        up, highs = self._logits("top", i)
        fires = int(store["count"][i]) > 0
        return {
            "neuron_alignment_indices": aligned.tolist(),
            "neuron_alignment_values": _rounded(entries),
            "neuron_alignment_l1": _rounded(shares),
            "correlated_neurons_indices": channels,
            "correlated_neurons_pearson": pearson,
            "correlated_neurons_l1": _rounded(store["channel_cosine"][i][: len(channels)]),
            "correlated_features_indices": [],  # SAEDashboard's are of one batch only, and are dropped on import
            "correlated_features_pearson": [],
            "correlated_features_l1": [],
            "neg_str": down,
            "neg_values": lows,
            "pos_str": up,
            "pos_values": highs,
            "frac_nonzero": self.density(i),
            "freq_hist_data_bar_heights": store["hist"][i].tolist() if fires else [],
            "freq_hist_data_bar_values": _centres(store["hist_range"][i], store["hist"].shape[1]) if fires else [],
            "logits_hist_data_bar_heights": store["logit_hist"][i].tolist(),
            "logits_hist_data_bar_values": _centres(store["logit_range"][i], store["logit_hist"].shape[1]),
            "decoder_weights_dist": [],  # of attention heads
        }

    def density(self, i: int) -> float:
        """Return the exact share of the counted tokens on which a latent fires."""
        return int(self.store["count"][i]) / max(self.store.header.tokens, 1)

    def _logits(self, side: str, i: int) -> tuple[list[str], list[float]]:
        ids, values = _unpadded(self.store[f"{side}_logits"][i], self.store[f"{side}_logit_values"][i])
        return [text.word(self.store.texts, token) for token in ids[:LOGITS]], values[:LOGITS]

    def _contexts(self, latent: int) -> list[Context]:
        """Return the texts without duplicates and those that do not fire, because pages hide both."""
        seen: set[tuple[str, ...]] = set()
        contexts = []
        for example in self._order(latent):
            context = self._context(latent, example)
            key = tuple(sorted(context.tokens))
            if key not in seen and context.max > 0:
                seen.add(key)
                contexts.append(context)
        return contexts

    def _order(self, latent: int) -> list[int]:
        """Return the activating examples: the strongest in descending order, then by group in the store's order."""
        groups, values = (self.store[f"example_{name}"] for name in ("group", "value"))

        def rank(example: int) -> tuple[int, float]:
            group = int(groups[example])
            return group, -float(values[example]) if group == TOP else 0.0

        return sorted((e for e in self.store.examples(latent) if groups[e] != NON_ACTIVATING), key=rank)

    def _context(self, latent: int, example: int) -> Context:
        store = self.store
        row, position, group = (int(store[f"example_{name}"][example]) for name in ("row", "position", "group"))
        start, end = self._window(row, position)
        top = float(store["max"][latent])
        values = [0.0] * (end - start)
        decimals = _decimals(top, _VALUE_DECIMALS)
        for index, value in zip(*(column.tolist() for column in store.activations(example)), strict=True):
            if not math.isfinite(value):
                raise StoreError(f"{store.path}: an activation of latent {latent} is {value}")
            if start <= index < end:
                values[index - start] = round(value, decimals)
        low, high, share = -1.0, round(top, _decimals(top, _BIN_DECIMALS)), -1.0
        if group != TOP:
            low, high = (round(top * (k - group) / 5, _decimals(top, _BIN_DECIMALS)) for k in (5, 6))
            share = round(float(store["group_share"][latent][group]), _DECIMALS)
        return Context(self._row_texts(row)[start:end], values, position - start, low, high, share)

    def _window(self, row: int, position: int) -> tuple[int, int]:
        """Return (start, end) of the tokens to show: without BOS, in a long row the part around a position."""
        header = self.store.texts.header
        first = int(self.store.texts.tokens[row, 0] == header.bos)
        start = max(first, min(position - self._shown // 2, header.row_length - self._shown))
        return start, min(start + self._shown, header.row_length)

    def _spell(self, row: int) -> list[str]:
        return text.spell(self.store.texts, self.store.texts.tokens[row].tolist())


def _decoder(sae_dir: Path) -> np.ndarray:
    """Return the decoder rows, (d_sae, d_out), after the settings of the export have been applied to them."""
    from bridge import torch_sae

    return torch_sae.load(sae_dir).W_dec.numpy()


def check(store: Store, sae_dir: Path) -> None:
    """Raise FileNotFoundError if there is no export, and StoreError if the records are of another SAE."""
    if not is_complete(sae_dir):
        raise FileNotFoundError(
            f"no exported SAE at {sae_dir}: `python -m experiments.train` writes one at the end of a run"
        )
    actual = digest(sae_dir)
    if store.header.sae_sha256 != actual:
        raise StoreError(
            f"the records at {store.path} are of the SAE {store.header.sae_sha256[:12]}, but {sae_dir} contains "
            f"{actual[:12]}"
        )


def _decimals(largest: float, minimum: int) -> int:
    """Return the number of decimals to round to, at least `minimum`, so that `largest` keeps four digits."""
    return max(minimum, 3 - math.floor(math.log10(largest))) if 0 < largest < math.inf else minimum


def _rounded(values: np.ndarray) -> list[float]:
    return [round(value, _DECIMALS) for value in values.tolist()]


def _unpadded(indices: np.ndarray, values: np.ndarray) -> tuple[list[int], list[float]]:
    """Return indices and values without the padding at the end, whose values are NaN."""
    length = sum(1 for _ in itertools.takewhile(lambda value: not math.isnan(value), values.tolist()))
    return indices[:length].tolist(), _rounded(values[:length])


def _centres(limits: np.ndarray, bins: int) -> list[float]:
    """Return the centres of equal bins between two limits."""
    low, high = (float(limit) for limit in limits)
    decimals = _decimals(max(abs(low), abs(high)), _DECIMALS)
    return [round(value, decimals) for value in (low + (np.arange(bins) + 0.5) * (high - low) / bins).tolist()]
