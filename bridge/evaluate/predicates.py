"""A few hundred simple predicates of tokens: on the token's text, on the text before it, on its position."""

import builtins
import dataclasses
import keyword
import re
import string
from collections.abc import Callable, Iterator

import numpy as np
from jaxtyping import Bool

from bridge.evaluate import patterns, syntax
from bridge.evaluate.text import Text
from bridge.nanochat.tokenizer import Tokenizer

_PYTHON_SHARE = 0.5
"""Predicates of syntax are left out if fewer than this fraction of the tokens are in source that parses as Python."""


@dataclasses.dataclass(frozen=True)
class Predicates:
    """Names of predicates, simple ones first, and for every token of a text, row after row, whether each holds."""

    names: list[str]
    truth: Bool[np.ndarray, "N P"]


def build(text: Text, tokenizer: Tokenizer) -> Predicates:
    """Return all predicates that hold for some tokens of the text, but not for all.

    Syntax is known in documents that parse as Python (`syntax.contexts`), speakers in rendered chats; all other
    predicates need only the tokens and the bytes around them.
    """
    candidates = [
        *_by_token(text, tokenizer),
        *_by_place(text),
        *_by_left(text),
        *_by_syntax(text),
        *_by_role(text, tokenizer),
    ]
    flat = [(name, truth.reshape(-1)) for name, truth in candidates]
    informative = [(name, truth) for name, truth in flat if truth.any() and not truth.all()]
    columns = [truth for _, truth in informative] or [np.zeros(text.tokens.size, bool)]
    return Predicates([name for name, _ in informative] or ["nothing"], np.stack(columns, axis=1))


# ---- the token itself ----------------------------------------------------------------------------------------------


def _by_token(text: Text, tokenizer: Tokenizer) -> Iterator[tuple[str, np.ndarray]]:
    """Yield predicates of the texts of a token and of the next token, evaluated once per token id."""
    for name, table in vocabulary(tokenizer).items():
        truth = table[text.tokens]
        yield name, truth
        yield f"before: {name}", np.pad(truth[:, 1:], ((0, 0), (0, 1)))


def vocabulary(tokenizer: Tokenizer) -> dict[str, Bool[np.ndarray, " V"]]:
    """Return the predicates of a token's own text: for each name, whether it holds for every token id, (V,)."""
    n_ordinary = tokenizer.vocab_size - len(tokenizer.special_tokens)
    tokens = [tokenizer.token_text(i) for i in range(n_ordinary)]
    special = [False] * len(tokenizer.special_tokens)
    return {name: np.array([bool(holds(token)) for token in tokens] + special) for name, holds in _statements()}


def _statements() -> Iterator[tuple[str, Callable[[str], object]]]:
    """Yield predicates of a token's text, by name."""
    for name, pattern in patterns.KINDS.items():
        yield name, re.compile(pattern, re.DOTALL).fullmatch
    words = {
        "Python keyword": set(keyword.kwlist),
        "name that is built in": set(dir(builtins)) - set(keyword.kwlist),
        "exception": {name for name in dir(builtins) if name.endswith(("Error", "Exception", "Warning"))},
        "name of a type": {"int", "str", "float", "bool", "bytes", "list", "dict", "set", "tuple", "type", "object"},
        "True, False or None": {"True", "False", "None"},
        **{name: set(listed.split()) for name, listed in patterns.ENGLISH.items()},
    }
    for name, listed in words.items():
        yield name, lambda token, listed=listed: token.strip() in listed  # type: ignore[misc]
    for ending in patterns.ENDINGS:
        yield f"ends in -{ending}", re.compile(rf"\s?[^\W\d_]{{2,}}{ending}").fullmatch
    for beginning in patterns.BEGINNINGS:
        yield f"begins with {beginning}-", re.compile(rf"\s?{beginning}[^\W\d_]{{2,}}", re.IGNORECASE).fullmatch
    for letter in string.ascii_lowercase:
        yield f"begins with the letter {letter}", re.compile(rf"\s?{letter}\w*", re.IGNORECASE).fullmatch
    yield "part of a character", lambda token: "\ufffd" in token


# ---- its position --------------------------------------------------------------------------------------------------


def _by_place(text: Text) -> Iterator[tuple[str, np.ndarray]]:
    """Yield predicates of the position in the row, the line and the document, and of repetition."""
    rows, length = text.tokens.shape
    position = np.broadcast_to(np.arange(length), (rows, length))
    for n in (1, 2, 4, 8, 16, 32):
        if n < length:
            yield f"among the first {n} of the context" if n > 1 else "first of the context", position <= n
    yield "in the second half of the context", position > length // 2
    line, column, indent, last = _lines(text)
    yield "first of its line", (column == indent) & (text.document >= 0)
    yield "last of its line", last
    yield "on the first line of the document", (line == 0) & (text.document >= 0)
    yield "among the first 10 lines of the document", (line < 10) & (text.document >= 0)
    for low, high in ((0, 0), (1, 4), (5, 8), (9, 12), (13, 999)):
        yield f"on a line indented by {low}" + (f" to {high}" if high > low else ""), (indent >= low) & (indent <= high)
    yield "beyond column 40", column > 40
    yield "beyond column 70", column > 70
    previous = np.pad(text.tokens[:, :-1], ((0, 0), (1, 0)), constant_values=-1)
    yield "the same token as before", previous == text.tokens
    yield "seen before in the context", _repeated(text.tokens)
    yield "seen before after the same token", _repeated(previous.astype(np.int64) * 2**31 + text.tokens)


def _lines(text: Text) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return for each token its line, its column and the line's indentation in bytes, and whether it ends the line."""
    line, column, indent = (np.full(text.tokens.size, -1) for _ in range(3))
    for indices, source in text.by_document():
        lines, offset = source.split(b"\n"), text.place.reshape(-1)[indices]
        starts = np.cumsum([0, *(len(raw) + 1 for raw in lines)])
        indents = np.array([len(raw) - len(raw.lstrip(b" \t")) for raw in lines])
        line[indices] = np.minimum(np.searchsorted(starts, offset, side="right") - 1, len(lines) - 1)
        column[indices] = offset - starts[line[indices]]
        indent[indices] = indents[line[indices]]
    line, column, indent = (array.reshape(text.tokens.shape) for array in (line, column, indent))
    last = np.zeros(text.tokens.shape, bool)
    last[:, :-1] = (line[:, :-1] != line[:, 1:]) & (text.document[:, :-1] >= 0)
    return line, column, indent, last


def _repeated(keys: np.ndarray) -> np.ndarray:
    """Return whether each key occurs earlier in its row."""
    seen = np.ones(keys.shape, bool)
    for row, values in zip(seen, keys, strict=True):
        row[np.unique(values, return_index=True)[1]] = False
    return seen


# ---- the text before it --------------------------------------------------------------------------------------------


def _by_left(text: Text) -> Iterator[tuple[str, np.ndarray]]:
    """Yield predicates that hold where the token's text begins at the end of a pattern's match."""
    for name, pattern in patterns.LEFT.items():
        compiled = re.compile(pattern.encode())
        truth = np.zeros(text.tokens.shape, bool)
        for indices, source in text.by_document():
            match_ends = np.zeros(len(source) + 1, bool)
            match_ends[[match.end() for match in compiled.finditer(source)]] = True
            truth.reshape(-1)[indices] = match_ends[text.place.reshape(-1)[indices]]
        yield name, truth


# ---- its syntax and speaker ----------------------------------------------------------------------------------------


def _by_syntax(text: Text) -> Iterator[tuple[str, np.ndarray]]:
    """Yield predicates of Python's syntax, if enough of the text parses as Python."""
    marks, known = text.syntax
    if known.mean() < _PYTHON_SHARE:
        return
    for i, name in enumerate(syntax.CONTEXTS):
        yield name, (marks & np.uint64(1 << i)) > 0


_ROLES = {
    "<|user_start|>": "in a user's message",
    "<|assistant_start|>": "in an assistant's message",
    "<|python_start|>": "in a tool's input",
    "<|output_start|>": "in a tool's output",
}


def _by_role(text: Text, tokenizer: Tokenizer) -> Iterator[tuple[str, np.ndarray]]:
    """Yield predicates of the speaker in a chat, given by the last special token in the row."""
    special = tokenizer.vocab_size - len(tokenizer.special_tokens)
    marked = np.where(text.tokens >= special, np.arange(text.tokens.shape[1]), 0)
    last = np.take_along_axis(text.tokens, np.maximum.accumulate(marked, axis=1), axis=1)
    yield "special token", text.tokens >= special
    for token, name in _ROLES.items():
        yield name, last == tokenizer.special_tokens[token]
