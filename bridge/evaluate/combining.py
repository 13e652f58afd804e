"""Combine predicates: up to three, joined by "or", "and" and "but not", fit a latent better than one."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import scipy.sparse
from jaxtyping import Bool, Float, Int
from scipy.sparse import csr_array

MOST_RULES = 3
"""Most predicates of a label."""
GAIN = 0.02
"""Least gain in F1, on the tokens that choose labels, for which a predicate is added: a longer label must pay."""
FEWEST = 8
"""Fewest tokens of those that choose labels at which a predicate about a single token must hold to be added."""
JOINTS = ("or", "and", "but not")
LONGEST = 500
"""Most characters of a label of several predicates: Neuronpedia takes 512."""
_LATENTS = 64  # at a time


@dataclass(frozen=True)
class Candidates:
    """Predicates that may be joined: where each holds, and how it is named."""

    holds: csr_array
    """(N, C): 1 where a predicate holds at a token."""
    name: Callable[[int], str]


@dataclass(frozen=True)
class Rule:
    """Predicates, the columns of `Candidates`, each joined to all before it; the first joint is ""."""

    joints: tuple[str, ...]
    columns: tuple[int, ...]

    def spell(self, name: Callable[[int], str]) -> str:
        """Return the rule as text; parentheses surround what another joint follows."""
        text = name(self.columns[0])
        for i, (joint, column) in enumerate(zip(self.joints[1:], self.columns[1:], strict=True), start=1):
            text = f"({text})" if i > 1 and joint != self.joints[i - 1] else text
            text = f"{text} {joint} {name(column)}"
        return text


@dataclass(frozen=True)
class Fit:
    """Counts of tokens, of those that did not choose a rule, on which it holds and its latent fires."""

    rule: Rule
    hits: int
    """The latent is above its threshold and the rule holds."""
    holds: int


def candidates(
    truth: Bool[np.ndarray, "N P"],
    names: Sequence[str],
    exact: dict[str, Int[np.ndarray, " N"]],
    spell: Callable[[int], str],
    counted: Bool[np.ndarray, " N"],
) -> tuple[Candidates, list[np.ndarray]]:
    """Return all predicates as columns, and for each kind of `exact` and at last for `names` their columns by number.

    Args:
      truth: where the general predicates hold.
      names: of the general predicates.
      exact: arrays of token ids by name, as `labels.search` takes them; ids that are rare among the counted have no
        column of their own (-1).
      spell: returns the text of a token id.
      counted: the tokens that choose labels.
    """
    tokens, parts, columns, kinds, first = len(truth), [], [], [], 0
    for kind, ids in exact.items():
        width = int(ids.max(initial=0)) + 1
        common = np.bincount(ids[counted & (ids >= 0)], minlength=width) >= FEWEST
        column = np.where(common, np.cumsum(common) - 1, -1)
        token = np.flatnonzero((ids >= 0) & (column[ids] >= 0))
        ones = np.ones(len(token), np.float32)
        parts.append(csr_array((ones, (token, column[ids[token]])), shape=(tokens, int(common.sum()))))
        columns.append(np.where(common, column + first, -1))
        kinds += [(kind, int(i)) for i in np.flatnonzero(common)]
        first += int(common.sum())
    parts.append(csr_array(truth.astype(np.float32)))
    columns.append(np.arange(first, first + truth.shape[1]))

    def name(column: int) -> str:
        return names[column - first] if column >= first else f"{kinds[column][0]} {spell(kinds[column][1])!r}"

    return Candidates(csr_array(scipy.sparse.hstack(parts, format="csr")), name), columns


def combine(
    fires: tuple[csr_array, csr_array],
    holds: tuple[csr_array, csr_array],
    start: Int[np.ndarray, " f"],
    doubt: int,
) -> list[Fit | None]:
    """Return the best rule of every latent that begins with a given predicate, and how it fits on other tokens.

    A predicate is added greedily while that raises F1 = 2 hits / (firings + holds + doubt) by at least `GAIN`.

    Args:
      fires: for the tokens that choose and for those that score, (f, n): 1 where a latent is above its threshold.
      holds: for the same tokens, (n, C): 1 where a predicate holds.
      start: the first predicate of each latent; -1 leaves the latent out, its fit is None.
      doubt: misses that are added to those of every candidate.
    """
    fits: list[Fit | None] = [None] * len(start)
    known = np.flatnonzero(start >= 0)
    turned = tuple(csr_array(half.T) for half in holds)
    frequency = np.asarray(holds[0].sum(axis=0)).reshape(-1)
    for latents in np.split(known, range(_LATENTS, len(known), _LATENTS)):
        chunk = fires[0][latents], fires[1][latents]
        for latent, fit in zip(latents, _combine(chunk, holds, turned, frequency, start[latents], doubt), strict=True):
            fits[latent] = fit
    return fits


def _combine(
    fires: tuple[csr_array, csr_array],
    holds: tuple[csr_array, csr_array],
    turned: tuple[csr_array, ...],
    frequency: Float[np.ndarray, " C"],
    start: np.ndarray,
    doubt: int,
) -> list[Fit]:
    """Return the fits of some latents."""
    rules = [Rule(("",), (int(column),)) for column in start]
    truths = [half[start] for half in turned]
    fired, hits = _sums(fires[0]), (fires[0] @ holds[0]).toarray()
    current = 2 * _sums(fires[0].multiply(truths[0])) / (fired + _sums(truths[0]) + doubt)
    for _ in range(MOST_RULES - 1):
        scores = _scores(fires[0], truths[0], holds[0], (fired, hits, frequency), doubt)
        best = scores.reshape(len(rules), -1).argmax(1)
        joint, column = np.divmod(best, scores.shape[2])
        score = scores.reshape(len(rules), -1)[np.arange(len(rules)), best]
        better = score >= current + GAIN
        if not better.any():
            break
        current = np.where(better, score, current)
        for i in np.flatnonzero(better):
            rules[i] = Rule((*rules[i].joints, JOINTS[joint[i]]), (*rules[i].columns, int(column[i])))
        truths = [_joined(truth, half[column], joint, better) for truth, half in zip(truths, turned, strict=True)]
    both = _sums(fires[1].multiply(truths[1]))
    return [
        Fit(*fit) for fit in zip(rules, both.astype(int).tolist(), _sums(truths[1]).astype(int).tolist(), strict=True)
    ]


def _scores(
    fires: csr_array, truth: csr_array, holds: csr_array, known: tuple[np.ndarray, np.ndarray, np.ndarray], doubt: int
) -> Float[np.ndarray, "f 3 C"]:
    """Return the F1 of every predicate joined to the rules so far, by joint."""
    fired, hits, frequency = known
    firing = csr_array(fires.multiply(truth))
    hits_so_far, holds_so_far = _sums(firing)[:, None], _sums(truth)[:, None]
    both_hits, both_hold = (firing @ holds).toarray(), (truth @ holds).toarray()
    pairs = (
        (hits_so_far + hits - both_hits, holds_so_far + frequency - both_hold),
        (both_hits, both_hold),
        (hits_so_far - both_hits, holds_so_far - both_hold),
    )
    return np.stack([2 * hit / (fired[:, None] + held + doubt) for hit, held in pairs], axis=1)


def _joined(truth: csr_array, added: csr_array, joint: np.ndarray, better: np.ndarray) -> csr_array:
    """Return where the rules hold once each is joined to its new predicate, if that is better."""
    both = truth.multiply(added)
    results = truth + added - both, both, truth - both
    parts = [_rows(truth, ~better)] + [_rows(result, better & (joint == i)) for i, result in enumerate(results)]
    total = csr_array(sum(parts[1:], start=parts[0]))
    total.eliminate_zeros()
    return total


def _rows(matrix: csr_array, kept: Bool[np.ndarray, " f"]) -> csr_array:
    """Return a matrix with zeros in the rows that are not kept."""
    return csr_array(scipy.sparse.diags_array(kept.astype(np.float32)) @ matrix)


def _sums(matrix: csr_array) -> Float[np.ndarray, " f"]:
    return np.asarray(matrix.sum(axis=1), np.float64).reshape(-1)
