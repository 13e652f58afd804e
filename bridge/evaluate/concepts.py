"""Concepts that labels name: the tokens of a text at which a label holds, and the tokens that it names."""

import collections
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float32, Float64

from bridge.evaluate import predicates
from bridge.evaluate.text import Text
from bridge.nanochat.tokenizer import Tokenizer

_FEWEST = 10  # places at which a concept holds
_EXACT = ("token ", "after ", "before ")


class Concepts:
    """The labels of `bridge.evaluate.labels`, read back.

    Args:
      text: the text in which labels are looked up.
      tokenizer: the one with which labels were found.
    """

    def __init__(self, text: Text, tokenizer: Tokenizer):
        built = predicates.build(text, tokenizer)
        self._truth = dict(zip(built.names, built.truth.T, strict=True))
        self._tables = predicates.vocabulary(tokenizer)
        self._ids = _unique([repr(tokenizer.token_text(i)) for i in range(tokenizer.vocab_size)])
        self._vocab_size = tokenizer.vocab_size
        self._tokens = text.tokens

    def tokens(self, label: str | None) -> Bool[np.ndarray, " V"] | None:
        """Return which tokens of the vocabulary a label names, (V,); None for a label that names no tokens.

        "token 'x'" and "before 'x'" name the token x; a predicate of the token itself or of the next one names all
        tokens for which it holds. Labels of the text before a token, its position or its syntax name none.
        """
        kind, token = self._exact(label)
        if token is not None:
            return np.arange(self._vocab_size) == token if kind != "after " else None
        table = self._tables.get((label or "").removeprefix("before: "))
        return table if table is not None and table.any() else None

    def holds(self, label: str | None) -> Bool[np.ndarray, " N"] | None:
        """Return at which tokens of the text a label holds, flattened; None for a label that is not known there."""
        kind, token = self._exact(label)
        if token is None:
            return self._truth.get(label or "")
        where = np.zeros(self._tokens.shape, bool)
        equal = self._tokens == token
        if kind == "token ":
            where = equal
        elif kind == "after ":
            where[:, 1:] = equal[:, :-1]
        else:
            where[:, :-1] = equal[:, 1:]
        return where.reshape(-1)

    def followed_by(self, tokens: Bool[np.ndarray, " V"]) -> Bool[np.ndarray, " N"]:
        """Return the tokens of the text whose next token is among the given ones, flattened."""
        where = np.zeros(self._tokens.shape, bool)
        where[:, :-1] = tokens[self._tokens[:, 1:]]
        return where.reshape(-1)

    def following(self, holds: Bool[np.ndarray, " N"], count: int) -> Bool[np.ndarray, " V"] | None:
        """Return the tokens that typically come after a concept, (V,): at most `count`; None if it is too rare.

        Those of the greatest n ln(p / q), with n the number of times that the token follows the concept, p its share of
        the tokens that follow the concept, and q its share of all tokens; p must exceed q, and n be at least 2.
        """
        after = holds.reshape(self._tokens.shape)[:, :-1]
        if after.sum() < _FEWEST:
            return None
        everywhere = np.bincount(self._tokens[:, 1:].reshape(-1), minlength=self._vocab_size)
        here = np.bincount(self._tokens[:, 1:][after], minlength=self._vocab_size)
        lift = (here / here.sum()) / np.maximum(everywhere / everywhere.sum(), 1e-12)
        weight = here * np.log(np.maximum(lift, 1e-12)) * (here >= 2)
        chosen = np.argsort(-weight, kind="stable")[:count]
        chosen = chosen[weight[chosen] > 0]
        members = np.zeros(self._vocab_size, bool)
        members[chosen] = True
        return members if len(chosen) else None

    def _exact(self, label: str | None) -> tuple[str, int | None]:
        """Return kind and token of a label that names one token; the token is None for other labels."""
        for kind in _EXACT:
            if (
                label is not None
                and label.startswith(kind)
                and (token := self._ids.get(label[len(kind) :])) is not None
            ):
                return kind, token
        return "", None


def _unique(names: Sequence[str]) -> dict[str, int]:
    """Return the index of every name that occurs once: parts of characters are spelt alike."""
    counts = collections.Counter(names)
    return {name: i for i, name in enumerate(names) if counts[name] == 1}


def sample(text: Text, rows: int) -> Text:
    """Return the first rows of a text."""
    return Text(text.tokens[:rows], text.document[:rows], text.place[:rows], text.sources)


def difference_of_means(
    acts: Float32[np.ndarray, "N d"], holds: Bool[np.ndarray, " N"], fewest: int = _FEWEST
) -> Float64[np.ndarray, " d"] | None:
    """Return mean(acts where a concept holds) - mean(elsewhere), (d,); None with fewer than `fewest` of either."""
    if min(holds.sum(), (~holds).sum()) < fewest:
        return None
    return acts[holds].mean(0, dtype=np.float64) - acts[~holds].mean(0, dtype=np.float64)
