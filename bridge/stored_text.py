"""Read the text of an activation store, written as `store:LOCATION` where data is asked for, as tokens."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from jaxtyping import Int32

from jsae.settings import require
from jsae.store.reading import Store

if TYPE_CHECKING:
    from bridge.nanochat.tokenizer import Tokenizer

PREFIX = "store:"
"""Marks a location of a store in a specification of data."""


class StoredDocument(NamedTuple):
    """A document of a shard: a name that is unique in the store, and its tokens without BOS."""

    name: str
    ids: Int32[np.ndarray, " t"]


def is_stored(data: str) -> bool:
    """Return whether data is the text of a store."""
    return data.startswith(PREFIX)


def open_text(data: str, split: str, tokenizer: Tokenizer) -> Store:
    """Open the store whose text is read.

    Args:
      data: `store:LOCATION`.
      split: the part of the text that is asked for; "all" is what the store has.
      tokenizer: of the model that reads the tokens.

    Raises:
      ConfigError: the store has no tokens, tokens of another tokenizer, or another part of the text.
      FileNotFoundError, OSError: see `jsae.store.reading.Store`.
    """
    store = Store(data.removeprefix(PREFIX))
    origin, columns = store.manifest.origin, ("tokens", "text", "position")
    require(
        set(columns) <= set(store.layout.columns),
        f"{store.location} was written without text: {', '.join(columns)} are needed, as collect writes them",
    )
    require(
        origin.get("tokenizer") == tokenizer.fingerprint,
        f"the tokens of {store.location} are of another tokenizer than the model's: read the text itself with --data",
    )
    part = str(origin.get("split"))[:20]
    require(
        split in ("all", part),
        f"{store.location} holds the {part} part of its text, and {split} is asked for: give --split={part}, or "
        f"collect a store with --split={split}",
    )
    return store


def rows(store: Store, most: int) -> Int32[np.ndarray, "R T"]:
    """Return rows of text, at most `most`, of chunks in a fixed random order, so that few are a fair sample."""
    size = store.layout.chunk_rows
    taken: list[np.ndarray] = []
    for chunk in np.random.default_rng(0).permutation(-(-store.rows // size)):
        missing = most - sum(map(len, taken))
        if missing <= 0:
            break
        start = int(chunk) * size
        tokens = store.tokens(start, min(start + size, store.rows))
        taken.append(tokens.reshape(-1, store.row_len)[:missing])
    return np.concatenate(taken)


def documents(store: Store) -> Iterator[StoredDocument]:
    """Yield the documents of a store, shard by shard in a fixed random order; one in several shards in parts."""
    layout = store.layout
    for shard in np.random.default_rng(0).permutation(layout.shards(store.rows)):
        start, stop = layout.bounds(int(shard), store.rows)
        tokens, text, position = (read(start, stop) for read in (store.tokens, store.text, store.position))
        cells = np.flatnonzero(position > 0)
        order = cells[np.lexsort((position[cells], text[cells]))]
        ends = np.flatnonzero(np.diff(text[order])) + 1
        for part in np.split(order, ends):
            if len(part):
                yield StoredDocument(f"document {text[part[0]]}", tokens[part])
