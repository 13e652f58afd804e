"""Names for latents without a language model: the simple predicate that says best when a latent fires."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float32, Int

from bridge.evaluate.predicates import Predicates, build
from bridge.evaluate.site import Site
from bridge.evaluate.text import Text
from bridge.nanochat.tokenizer import Tokenizer
from bridge.torch_sae import TorchSAE

LEVELS = (0.0, 0.25, 0.5)
"""What counts as firing: more than this part of the greatest activation that the latent showed."""
DOUBT = 20
"""Misses that are added to those of every candidate where labels are chosen: what fits a few tokens may do so by
chance, and of candidates there are thousands. On the demo, 20 to 40 gave the best F1 where it is measured."""
MOST_FIRINGS = 2**25
"""The text is cut where the SAE has fired so often: a third of a GiB, 260,000 tokens at L0 128."""


@dataclasses.dataclass(frozen=True)
class Firings:
    """All activations above zero of `d_sae` latents on the tokens of a text, flat; ordered by token.

    Of latents that may be negative (AbsTopK) these are the positive ones: each side would need a name of its own.
    """

    latent: Int[np.ndarray, " m"]
    token: Int[np.ndarray, " m"]
    value: Float32[np.ndarray, " m"]
    counts: Bool[np.ndarray, " N"]
    """Which tokens of the text were looked at: not BOS, no sinks."""
    d_sae: int

    def where(self, chosen: np.ndarray) -> "Firings":
        """Only the chosen ones: a mask, or their numbers."""
        return dataclasses.replace(self, latent=self.latent[chosen], token=self.token[chosen], value=self.value[chosen])


@dataclasses.dataclass(frozen=True)
class Label:
    """A name for a latent, and how well it fits on text that had no part in choosing it.

    `f1`, `precision` and `recall` are of "the latent is above `threshold`" against "the predicate holds", `n` how often
    the latent was above it. A latent that did not fire where labels are chosen has no label (None), and numbers that
    are not defined are None.
    """

    label: str | None
    f1: float | None
    precision: float | None
    recall: float | None
    n: int
    threshold: float | None


@dataclasses.dataclass(frozen=True)
class _Family:
    """Predicates of one kind: `best` per row of firings (F1 and number), and whether one holds at a token."""

    best: tuple[np.ndarray, np.ndarray]
    holds: Callable[[np.ndarray, np.ndarray], np.ndarray]
    """Of token and predicate, alike long: whether it holds."""
    frequency: np.ndarray
    """How often each predicate holds in the half that gives the numbers."""
    name: Callable[[int], str]


@torch.no_grad()
def firings(site: Site, sae: TorchSAE, text: Text, enough: Callable[[], bool] = lambda: False) -> Firings:
    """Where the latents fire in a text.

    The rest of the text is not looked at after `MOST_FIRINGS`, or when `enough`, which is asked after every batch,
    returns True.
    """
    rows, length = text.tokens.shape
    counts = np.zeros((rows, length), bool)
    found: list[tuple[np.ndarray, ...]] = []
    total = 0
    for start, tokens, acts, _, mask in site.read(site.batches(text.tokens, sae.d_sae)):
        latents = sae.encode(acts[mask].float())
        row, latent = (latents > 0).nonzero(as_tuple=True)
        token = mask.flatten().nonzero()[:, 0][row] + start * length
        columns = (latent.int(), token.int(), latents[row, latent])
        found.append(tuple(column.cpu().numpy() for column in columns))
        counts[start : start + len(tokens)] = mask.cpu().numpy()
        total += len(token)
        if total > MOST_FIRINGS or enough():
            break
    latent, token, value = (np.concatenate(parts) for parts in zip(*found, strict=True))
    return Firings(latent, token, value, counts.reshape(-1), sae.d_sae)


def label(found: Firings, text: Text, tokenizer: Tokenizer) -> list[Label]:
    """The best label of every latent.

    Candidates are all of `predicates.build`, and "the token is X", "after the token X" and "before the token X" for
    every token of the vocabulary. Every other row chooses predicate and level (`LEVELS`) by F1, the rows between give
    the numbers; a single row is halved.
    """
    rows, length = text.tokens.shape
    chooses = np.arange(rows * length) // length % 2 == 0 if rows > 1 else np.arange(length) < length // 2
    return search(found, build(text, tokenizer), _neighbours(text), tokenizer.token_text, chooses)


def search(
    found: Firings,
    predicates: Predicates,
    exact: dict[str, Int[np.ndarray, " N"]],
    spelled: Callable[[int], str],
    chooses: Bool[np.ndarray, " N"],
) -> list[Label]:
    """The best label of every latent out of given candidates.

    Args:
      found: where the latents fire.
      predicates: of the same tokens.
      exact: one more candidate per token id and name: that the id found here is this one (-1 is none).
      spelled: a token id as text.
      chooses: the tokens that choose; the others give the numbers.
    """
    first, second = (found.where(half[found.token]) for half in (chooses, ~chooses))
    halves = found.counts & chooses, found.counts & ~chooses
    top = np.zeros(found.d_sae, np.float32)
    np.maximum.at(top, first.latent, first.value)
    level, fires = _levels(first, top)
    row = level * found.d_sae + fires.latent  # one row per level and latent
    size = len(LEVELS) * found.d_sae
    fired = np.bincount(row, minlength=size)

    families = [_exact(kind, ids, row, fires.token, fired, halves, spelled) for kind, ids in exact.items()]
    families.append(_general(predicates, row, fires.token, fired, halves))
    f1 = np.stack([family.best[0] for family in families]).reshape(len(families), len(LEVELS), found.d_sae)
    flat = f1.reshape(-1, found.d_sae)  # the first of equals: an exact token, no threshold
    winner = flat.argmax(0)
    family, chosen_level = np.divmod(winner, len(LEVELS))
    number = np.stack([f.best[1] for f in families]).reshape(flat.shape)[winner, np.arange(found.d_sae)]
    threshold = np.asarray(LEVELS, np.float32)[chosen_level] * top
    return _score(second, families, family, number, threshold, top > 0)


def _levels(first: Firings, top: np.ndarray) -> tuple[np.ndarray, Firings]:
    """The firings that pass each level, one level after the other, and the level of each."""
    passing = [first.value > part * top[first.latent] for part in LEVELS]
    level = np.concatenate([np.full(np.count_nonzero(p), i) for i, p in enumerate(passing)])
    return level, first.where(np.concatenate([np.flatnonzero(p) for p in passing]))


def _exact(
    kind: str,
    ids: np.ndarray,
    row: np.ndarray,
    token: np.ndarray,
    fired: np.ndarray,
    halves: tuple[np.ndarray, np.ndarray],
    spelled: Callable[[int], str],
) -> _Family:
    """That the id is X, for every X: counted by sorting (row, id), as nearly all of the pairs never meet."""
    width = int(ids.max(initial=0)) + 1
    meets = ids[token] >= 0
    pairs, hits = np.unique(row[meets].astype(np.int64) * width + ids[token[meets]], return_counts=True)
    at, which = np.divmod(pairs, width)
    frequency = [np.bincount(ids[half & (ids >= 0)], minlength=width) for half in halves]
    f1 = 2 * hits / (fired[at] + frequency[0][which] + DOUBT)
    order = np.lexsort((-which, f1, at))  # the last of each row is its best
    best = np.zeros(len(fired)), np.zeros(len(fired), np.int64)
    best[0][at[order]], best[1][at[order]] = f1[order], which[order]
    return _Family(best, lambda t, p: ids[t] == p, frequency[1], lambda p: f"{kind} {spelled(p)!r}")


def _general(
    predicates: Predicates, row: np.ndarray, token: np.ndarray, fired: np.ndarray, halves: tuple[np.ndarray, np.ndarray]
) -> _Family:
    """Predicates that hold of many tokens: counted by a product of sparse firings with the table of truth."""
    truth = predicates.truth
    end = int(token.max(initial=-1)) + 1
    where = torch.from_numpy(np.stack([row, token]).astype(np.int64))
    fires = torch.sparse_coo_tensor(where, torch.ones(len(row)), (len(fired), end), check_invariants=False)
    hits = torch.sparse.mm(fires, torch.from_numpy(truth[:end].astype(np.float32))).numpy()
    frequency = [truth[half].sum(0) for half in halves]
    f1 = 2 * hits / (fired[:, None] + frequency[0] + DOUBT)
    best = f1.max(1), f1.argmax(1)
    return _Family(best, lambda t, p: truth[t, p], frequency[1], lambda p: predicates.names[p])


def _score(
    second: Firings,
    families: list[_Family],
    family: np.ndarray,
    number: np.ndarray,
    threshold: np.ndarray,
    alive: np.ndarray,
) -> list[Label]:
    """The labels that were chosen, with their numbers on the other half."""
    fires = second.where(second.value > threshold[second.latent])
    n = np.bincount(fires.latent, minlength=second.d_sae)
    hits, holds = np.zeros(second.d_sae, np.int64), np.zeros(second.d_sae, np.int64)
    for i, kind in enumerate(families):
        own = family[fires.latent] == i
        true = kind.holds(fires.token[own], number[fires.latent[own]])
        hits += np.bincount(fires.latent[own][true], minlength=second.d_sae)
        holds[family == i] = kind.frequency[number[family == i]]

    def one(i: int, n: int, hits: int, holds: int) -> Label:
        if not alive[i]:
            return Label(None, None, None, None, n, None)
        name = families[family[i]].name(int(number[i]))
        ratios = _ratio(2 * hits, n + holds), _ratio(hits, n), _ratio(hits, holds)
        return Label(name, *ratios, n, float(threshold[i]))

    return [one(*numbers) for numbers in zip(range(len(n)), n.tolist(), hits.tolist(), holds.tolist(), strict=True)]


def _ratio(part: int, whole: int) -> float | None:
    return part / whole if whole else None


def _neighbours(text: Text) -> dict[str, np.ndarray]:
    """The token itself, the one before it and the one after it, flat."""
    before = np.pad(text.tokens[:, :-1], ((0, 0), (1, 0)), constant_values=-1)
    after = np.pad(text.tokens[:, 1:], ((0, 0), (0, 1)), constant_values=-1)
    return {"token": text.tokens.reshape(-1), "after": before.reshape(-1), "before": after.reshape(-1)}


def table(labels: list[Label]) -> dict[str, Any]:
    """For `labels.json`: the number of each latent to its label."""
    return {str(i): dataclasses.asdict(found) for i, found in enumerate(labels)}


def summary(labels: list[Label]) -> dict[str, Any]:
    """How many latents have a label, and how well labels fit."""
    f1 = [found.f1 or 0.0 for found in labels if found.label is not None]
    return {
        "labelled": len(f1),
        "mean_f1": float(np.mean(f1)) if f1 else None,
        **{f"f1_over_{int(bar * 100)}_percent": sum(value > bar for value in f1) for bar in (0.5, 0.8)},
    }


def best(labels: list[Label], most: int) -> Iterator[tuple[int, Label]]:
    """The latents whose labels fit best, with their numbers."""
    order = sorted(range(len(labels)), key=lambda i: -(labels[i].f1 or 0.0))
    return ((i, labels[i]) for i in order[:most])
