"""Label latents without a language model: with the simple predicate that best predicts when a latent fires."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import scipy.sparse
import torch
from jaxtyping import Bool, Float32, Int

from bridge.evaluate import bootstrap, combining
from bridge.evaluate.predicates import Predicates, build
from bridge.evaluate.site import Site, most_numbers, parts
from bridge.evaluate.text import Text
from bridge.nanochat.tokenizer import Tokenizer
from bridge.torch_sae import TorchSAE

LEVELS = (0.0, 0.25, 0.5)
"""Firing thresholds to try, as fractions of the latent's greatest activation."""
DETECTED_FIRINGS = 10
"""Fewest firings in the text that scores labels of a latent that counts in the scores of detection."""
DOUBT = 20
"""Misses added to those of every candidate when labels are chosen: among thousands of candidates, one that fits a few
tokens may fit by chance. On the demo, 20 to 40 gave the best F1 on the tokens that score labels."""
MOST_FIRINGS = 2**25
"""The text is cut after this many firings of the SAE: a third of a GiB, 260,000 tokens at L0 128."""


@dataclasses.dataclass(frozen=True)
class Firings:
    """All activations above zero of `d_sae` latents on the tokens of a text, flattened and ordered by token.

    For latents that may be negative (AbsTopK) these are the positive activations: each sign would need its own label.
    """

    latent: Int[np.ndarray, " m"]
    token: Int[np.ndarray, " m"]
    value: Float32[np.ndarray, " m"]
    counts: Bool[np.ndarray, " N"]
    """Which tokens of the text count: no BOS, no sinks."""
    d_sae: int

    def where(self, chosen: np.ndarray) -> "Firings":
        """Return the chosen firings; `chosen` is a mask or an array of indices."""
        return dataclasses.replace(self, latent=self.latent[chosen], token=self.token[chosen], value=self.value[chosen])


@dataclasses.dataclass(frozen=True)
class Label:
    """The label of a latent, and how well it fits on text that was not used to choose it.

    `f1`, `precision` and `recall` compare "the latent is above `threshold`" with "the predicate holds"; `n` counts
    how often the latent was above the threshold. The label of a latent that did not fire where labels are
    chosen is None, and so are undefined numbers.
    """

    label: str | None
    f1: float | None
    precision: float | None
    recall: float | None
    n: int
    threshold: float | None
    balanced_accuracy: float | None = None
    """Mean of the share of firings at which the predicate holds and the share of other tokens at which it does not."""


@dataclasses.dataclass(frozen=True)
class _Family:
    """Predicates of one kind: the best one per row of firings (its F1 and number), and where predicates hold."""

    best: tuple[np.ndarray, np.ndarray]
    holds: Callable[[np.ndarray, np.ndarray], np.ndarray]
    """Return, for equally long arrays of tokens and predicates, whether each predicate holds at its token."""
    frequency: np.ndarray
    """How often each predicate holds in the half that scores labels."""
    name: Callable[[int], str]


@torch.no_grad()
def firings(site: Site, sae: TorchSAE, text: Text, enough: Callable[[], bool] = lambda: False) -> Firings:
    """Return all firings of the latents on a text.

    Reading stops after `MOST_FIRINGS` firings, or when `enough`, which is called after every batch, returns True.
    """
    rows, length = text.tokens.shape
    counts = np.zeros((rows, length), bool)
    batches: list[tuple[np.ndarray, ...]] = []
    total = 0
    for start, tokens, acts, _, mask in site.read(site.batches(text.tokens, sae.d_sae)):
        x, place = acts[mask].float(), mask.flatten().nonzero()[:, 0] + start * length
        for part in parts(len(x), most_numbers(x.device) // sae.d_sae):
            latents = sae.encode(x[part])
            row, latent = (latents > 0).nonzero(as_tuple=True)
            columns = (latent.int(), place[part][row].int(), latents[row, latent])
            batches.append(tuple(column.cpu().numpy() for column in columns))
            total += len(row)
        counts[start : start + len(tokens)] = mask.cpu().numpy()
        if total > MOST_FIRINGS or enough():
            break
    latent, token, value = (np.concatenate(parts) for parts in zip(*batches, strict=True))
    return Firings(latent, token, value, counts.reshape(-1), sae.d_sae)


@dataclasses.dataclass(frozen=True)
class Material:
    """Candidates for labels at every token of a text, and which of its tokens choose among them."""

    predicates: Predicates
    exact: dict[str, Int[np.ndarray, " N"]]
    """Arrays of token ids by name; each adds one candidate per id: that the array holds it (-1: no id)."""
    spell: Callable[[int], str]
    """Return the text of a token id."""
    chooses: Bool[np.ndarray, " N"]
    """The tokens that choose labels; the others score them."""

    @classmethod
    def of_text(cls, text: Text, tokenizer: Tokenizer) -> "Material":
        """Return all predicates of `predicates.build`, and "the token is X", "after the token X" and "before the token
        X" for every token of the vocabulary. Even rows choose, or the first half of a single row.
        """
        rows, length = text.tokens.shape
        chooses = np.arange(rows * length) // length % 2 == 0 if rows > 1 else np.arange(length) < length // 2
        return cls(build(text, tokenizer), _neighbours(text), tokenizer.token_text, chooses)


@dataclasses.dataclass(frozen=True)
class _Chosen:
    """The best predicate of every latent, and what it was chosen from."""

    families: list[_Family]
    family: np.ndarray
    number: np.ndarray
    threshold: np.ndarray
    alive: np.ndarray


def describe(firings: Firings, material: Material) -> tuple[list[Label], list[Label]]:
    """Return the labels of `search`, and labels of up to three predicates that are joined (`combining`).

    The second list has the same thresholds. It describes latents better; the first compares SAEs, whose labels are all
    of one predicate.
    """
    chosen = _choose(firings, material)
    simple = _score(firings, chosen, material.chooses)
    return simple, _combined(firings, chosen, simple, material)


def search(firings: Firings, material: Material) -> list[Label]:
    """Return the best label of one predicate of every latent.

    The tokens that choose do so by F1, of predicate and level (`LEVELS`); the others score the choice.
    """
    return _score(firings, _choose(firings, material), material.chooses)


def _choose(firings: Firings, material: Material) -> _Chosen:
    """Return the best predicate and level of every latent on the tokens that choose."""
    first = firings.where(material.chooses[firings.token])
    halves = _halves(firings, material)
    top = np.zeros(firings.d_sae, np.float32)
    np.maximum.at(top, first.latent, first.value)
    level, fires = _levels(first, top)
    row = level * firings.d_sae + fires.latent  # one row per level and latent
    size = len(LEVELS) * firings.d_sae
    fired = np.bincount(row, minlength=size)

    families = [
        _exact(kind, ids, row, fires.token, fired, halves, material.spell) for kind, ids in material.exact.items()
    ]
    families.append(_general(material.predicates, row, fires.token, fired, halves))
    f1 = np.stack([family.best[0] for family in families]).reshape(len(families), len(LEVELS), firings.d_sae)
    flat = f1.reshape(-1, firings.d_sae)  # argmax takes the first of equals: an exact token, no threshold
    winner = flat.argmax(0)
    family, chosen_level = np.divmod(winner, len(LEVELS))
    number = np.stack([f.best[1] for f in families]).reshape(flat.shape)[winner, np.arange(firings.d_sae)]
    threshold = np.asarray(LEVELS, np.float32)[chosen_level] * top
    return _Chosen(families, family, number, threshold, top > 0)


def _halves(firings: Firings, material: Material) -> tuple[Bool[np.ndarray, " N"], Bool[np.ndarray, " N"]]:
    """Return the tokens that choose labels and those that score them, of those that count."""
    return firings.counts & material.chooses, firings.counts & ~material.chooses


def _combined(firings: Firings, chosen: _Chosen, simple: list[Label], material: Material) -> list[Label]:
    """Return the labels with joined predicates; a latent whose predicate gains nothing by that keeps its label."""
    halves, predicates = _halves(firings, material), material.predicates
    candidates, columns = combining.candidates(
        predicates.truth, predicates.names, material.exact, material.spell, halves[0]
    )
    start = np.select(
        [chosen.family == i for i in range(len(columns))],
        [np.pad(column, (0, 1), constant_values=-1)[np.minimum(chosen.number, len(column))] for column in columns],
    )
    start = np.where(chosen.alive, start, -1)
    above = firings.where(firings.value > chosen.threshold[firings.latent])
    shape = (firings.d_sae, len(material.chooses))
    fires = scipy.sparse.csr_array((np.ones(len(above.latent), np.float32), (above.latent, above.token)), shape=shape)
    places = [np.flatnonzero(half) for half in halves]
    fits = combining.combine(
        (fires[:, places[0]], fires[:, places[1]]),
        (candidates.holds[places[0]], candidates.holds[places[1]]),
        start,
        DOUBT,
    )
    tokens, labels = len(places[1]), list(simple)
    for latent, fit in enumerate(fits):
        if (
            fit is not None
            and len(fit.rule.columns) > 1
            and len(name := fit.rule.spell(candidates.name)) <= combining.LONGEST
        ):
            old = simple[latent]
            labels[latent] = _labelled(name, old.n, fit.hits, fit.holds, old.threshold, tokens)
    return labels


def _levels(first: Firings, top: np.ndarray) -> tuple[np.ndarray, Firings]:
    """Return the level of each passing firing, and the firings that pass each level, one level after the other."""
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
    spell: Callable[[int], str],
) -> _Family:
    """Return the family "the id is X" for every X; counts sorted (row, id) pairs, as most pairs never occur."""
    width = int(ids.max(initial=0)) + 1
    has_id = ids[token] >= 0
    pairs, hits = np.unique(row[has_id].astype(np.int64) * width + ids[token[has_id]], return_counts=True)
    pair_row, pair_id = np.divmod(pairs, width)
    frequency = [np.bincount(ids[half & (ids >= 0)], minlength=width) for half in halves]
    f1 = 2 * hits / (fired[pair_row] + frequency[0][pair_id] + DOUBT)
    order = np.lexsort((-pair_id, f1, pair_row))  # the last of each row is its best
    best = np.zeros(len(fired)), np.zeros(len(fired), np.int64)
    best[0][pair_row[order]], best[1][pair_row[order]] = f1[order], pair_id[order]
    return _Family(best, lambda t, p: ids[t] == p, frequency[1], lambda p: f"{kind} {spell(p)!r}")


def _general(
    predicates: Predicates, row: np.ndarray, token: np.ndarray, fired: np.ndarray, halves: tuple[np.ndarray, np.ndarray]
) -> _Family:
    """Return the family of general predicates; hits are counted by a product of sparse firings with the truth table."""
    truth = predicates.truth
    n_tokens = int(token.max(initial=-1)) + 1
    fires = scipy.sparse.csr_array((np.ones(len(row), np.float32), (row, token)), shape=(len(fired), n_tokens))
    hits = fires @ truth[:n_tokens].astype(np.float32)
    frequency = [truth[half].sum(0) for half in halves]
    f1 = 2 * hits / (fired[:, None] + frequency[0] + DOUBT)
    best = f1.max(1), f1.argmax(1)
    return _Family(best, lambda t, p: truth[t, p], frequency[1], lambda p: predicates.names[p])


def _score(firings: Firings, chosen: _Chosen, chooses: Bool[np.ndarray, " N"]) -> list[Label]:
    """Return the chosen labels, scored on the tokens that did not choose them."""
    family, number = chosen.family, chosen.number
    second = firings.where(~chooses[firings.token])
    fires = second.where(second.value > chosen.threshold[second.latent])
    n = np.bincount(fires.latent, minlength=second.d_sae)
    hits, holds = np.zeros(second.d_sae, np.int64), np.zeros(second.d_sae, np.int64)
    for i, current in enumerate(chosen.families):
        in_family = family[fires.latent] == i
        hit = current.holds(fires.token[in_family], number[fires.latent[in_family]])
        hits += np.bincount(fires.latent[in_family][hit], minlength=second.d_sae)
        holds[family == i] = current.frequency[number[family == i]]
    tokens = int((firings.counts & ~chooses).sum())
    numbers = zip(n.tolist(), hits.tolist(), holds.tolist(), chosen.threshold.tolist(), strict=True)
    return [
        _labelled(chosen.families[family[i]].name(int(number[i])), *counts, tokens)
        if chosen.alive[i]
        else Label(None, None, None, None, counts[0], None)
        for i, counts in enumerate(numbers)
    ]


def _labelled(name: str, n: int, hits: int, holds: int, threshold: float | None, tokens: int) -> Label:
    """Return a label with its scores.

    Args:
      name: the label.
      n: tokens at which the latent is above its threshold.
      hits: those at which the label holds too.
      holds: tokens at which the label holds.
      threshold: of the latent.
      tokens: all tokens that score labels.
    """
    ratios = _ratio(2 * hits, n + holds), _ratio(hits, n), _ratio(hits, holds)
    rejected = _ratio(tokens - n - holds + hits, tokens - n)
    balanced = None if ratios[1] is None or rejected is None else (ratios[1] + rejected) / 2
    return Label(name, *ratios, n, threshold, balanced)


def _ratio(part: int, whole: int) -> float | None:
    return part / whole if whole else None


def _neighbours(text: Text) -> dict[str, np.ndarray]:
    """Return the token itself, the one before it and the one after it, flattened."""
    before = np.pad(text.tokens[:, :-1], ((0, 0), (1, 0)), constant_values=-1)
    after = np.pad(text.tokens[:, 1:], ((0, 0), (0, 1)), constant_values=-1)
    return {"token": text.tokens.reshape(-1), "after": before.reshape(-1), "before": after.reshape(-1)}


def table(labels: list[Label], simple: list[Label] | None = None) -> dict[str, Any]:
    """Return the labels as `labels.json` holds them, by the number of the latent.

    Where `simple` has another label of a latent, its label and F1 are added as "simple".
    """
    entries = {str(i): dataclasses.asdict(label) for i, label in enumerate(labels)}
    for i, label in enumerate(simple or []):
        if label.label != labels[i].label:
            entries[str(i)]["simple"] = {"label": label.label, "f1": label.f1}
    return entries


def summary(labels: list[Label], simple: list[Label] | None = None) -> dict[str, Any]:
    """Return how many latents have a label, and how well labels fit; `detection` is that of `simple` if it is given."""
    f1 = [label.f1 or 0.0 for label in labels if label.label is not None]
    return {
        "labelled": len(f1),
        "mean_f1": float(np.mean(f1)) if f1 else None,
        **{f"f1_over_{int(bar * 100)}_percent": sum(value > bar for value in f1) for bar in (0.5, 0.8)},
        "detection": detection(simple or labels),
    }


def detection(labels: list[Label]) -> dict[str, Any]:
    """Return how well labels predict on other text when their latents fire: means over latents, 95 % intervals.

    Every latent that fires at least `DETECTED_FIRINGS` times where labels are scored counts. As the candidates are the
    same for every SAE, the numbers compare SAEs of any trainer that are evaluated on the same text. `precision` is the
    share of the tokens named by the label at which the latent fires, `recall` the share of its firings that the label
    names: the label predicts the latent, whereas `Label` scores the latent as a detector of the predicate. Intervals
    are from a bootstrap over latents; they do not contain the choice of the text.
    """
    scored = [label for label in labels if label.label is not None and label.n >= DETECTED_FIRINGS]
    columns = {
        "f1": [label.f1 or 0.0 for label in scored],
        "balanced_accuracy": [label.balanced_accuracy or 0.0 for label in scored],
        "precision": [label.recall or 0.0 for label in scored],
        "recall": [label.precision or 0.0 for label in scored],
    }
    means = {name: float(np.mean(values)) if values else None for name, values in columns.items()}
    intervals = {name: bootstrap.of_mean(values) for name, values in columns.items()}
    return {"latents": len(scored), **means, "intervals": intervals}


def best(labels: list[Label], most: int) -> Iterator[tuple[int, Label]]:
    """Yield the number and label of the latents whose labels fit best, at most `most` of them."""
    order = sorted(range(len(labels)), key=lambda i: -(labels[i].f1 or 0.0))
    return ((i, labels[i]) for i in order[:most])
