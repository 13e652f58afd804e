"""Documents of a corpus: from records of data, their split, and the pieces in which long ones are read."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

from bridge.nanochat.tokenizer import check_conversation

Split = Literal["train", "heldout", "all"]
Document = str | dict[str, Any]  # text, or a chat {"messages": [{"role", "content"}, ...]}

MAX_DOCUMENT = 16 * 2**20
"""Bytes of the largest document, and of the longest line that may hold one."""
PIECE = 2**20
"""Characters; a longer document is read in pieces that end at a paragraph, a line or a space."""

CHAT_KEYS = ("messages", "conversations")
_ROLES = {"human": "user", "gpt": "assistant"}  # of ShareGPT, which also has `from` and `value`
_EXPECTED = 'expected {"text": ...}, {"messages": [...]}, or a list of {"role": ..., "content": ...}'


@dataclass(frozen=True)
class Unit:
    """A piece of data that is read at once, and shuffled as a whole.

    Attributes:
        name: says what it is and which content it has, but not where: the same data elsewhere has the same names.
        read: returns its documents, one after the other.
        source: name of the file it is from and a digest of that file's content.
        content: SHA-256 digest of the document that it is, or is a piece of; None if it holds several.
        side: the split to which it belongs by a rule of its data set (nanochat's last shard); else None.
        span: the part of one document that it holds, from 0 to 1; (0, 1) if its documents are whole.
    """

    name: str
    read: Callable[[], Iterable[Document]]
    source: tuple[str, str]
    content: bytes | None = None
    side: Split | None = None
    span: tuple[float, float] = (0.0, 1.0)


def of_record(record: Any) -> Document | None:
    """Return the document of a JSON value or a row: text, a chat, or None for an empty text.

    Raises:
        ValueError: it is none of the known forms, or a chat that nanochat cannot render.
    """
    if isinstance(record, str):
        return record or None
    if isinstance(record, list) and record and all(isinstance(item, dict) for item in record):
        return chat(record)
    if isinstance(record, dict):
        if isinstance(record.get("text"), str):
            return record["text"] or None
        for key in CHAT_KEYS:
            if record.get(key) is not None:
                return chat(record[key])
        keys = ", ".join(map(repr, list(record)[:12])) or "none"
        raise ValueError(f"{_EXPECTED}; its keys are {keys}")
    raise ValueError(f"{_EXPECTED}; got a {type(record).__name__}")


def chat(messages: Any) -> dict[str, Any]:
    """Return a chat as {"messages": [{"role", "content"}, ...]}, the form that nanochat renders.

    Args:
        messages: a list of messages, or the table of lists in which Hugging Face's `Sequence` stores them. A message
            has `role` and `content`, or ShareGPT's `from` and `value`.

    Raises:
        ValueError: nanochat cannot render it.
    """
    if isinstance(messages, dict):
        columns = {name: column for name, column in messages.items() if isinstance(column, list)}
        length = max(map(len, columns.values()), default=0)
        if any(len(column) != length for column in columns.values()):
            raise ValueError("the columns of its messages have different lengths")
        messages = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    if isinstance(messages, list):
        messages = [_message(item) if isinstance(item, dict) else item for item in messages]
    conversation = {"messages": messages}
    check_conversation(conversation)
    return conversation


def _message(item: dict[str, Any]) -> dict[str, Any]:
    role = item.get("role", item.get("from"))
    content = item.get("content", item.get("value"))
    if isinstance(content, list):
        content = [
            {key: part.get(key) for key in ("type", "text")} if isinstance(part, dict) else part for part in content
        ]
    return {"role": _ROLES.get(role, role) if isinstance(role, str) else role, "content": content}


# ---- splits -------------------------------------------------------------------------------------------------------


def is_heldout(document: Document, fraction: float) -> bool:
    """Return whether a document is held out: by a hash of its content, so wherever and whenever it is met."""
    text = document if isinstance(document, str) else json.dumps(document["messages"], sort_keys=True)
    return heldout_digest(digest(text), fraction)


def heldout_digest(content: bytes, fraction: float) -> bool:
    """Return whether a document with this SHA-256 digest is held out."""
    return int.from_bytes(content[:8], "big") < fraction * 2**64


def digest(text: str) -> bytes:
    """Return the SHA-256 digest of a text."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()


def by_hash(read: Callable[[], Iterable[Document]], split: Split, fraction: float) -> Iterator[Document]:
    """Yield the documents of a split, chosen by `is_heldout`."""
    return (document for document in read() if is_heldout(document, fraction) == (split == "heldout"))


def by_place(
    read: Callable[[], Iterable[Document]], split: Split, fraction: float, span: tuple[float, float]
) -> Iterator[Document]:
    """Yield every document's part of a split: the last `fraction` of it is held out.

    Args:
        read: returns documents, or a part of one.
        split: "train" or "heldout".
        fraction: of the whole document.
        span: which part of the whole `read` returns.
    """
    begin, end = span
    share = min(max((end - 1 + fraction) / (end - begin), 0.0), 1.0) if end > begin else 0.0
    for document in read():
        first, last = _parts(document, share)
        if part := (last if split == "heldout" else first):
            yield part


def _parts(document: Document, share: float) -> tuple[Document | None, Document | None]:
    """A document without its last share, and that share; None where a part is empty."""
    if share in (0.0, 1.0):
        return (document, None) if share == 0.0 else (None, document)
    if isinstance(document, str):
        at = _cut_near(document, share)
        return document[:at] or None, document[at:] or None
    messages = document["messages"]
    starts = [
        i for i, message in enumerate(messages) if message["role"] == "user" and i > messages[0]["role"].count("system")
    ]
    if not starts:
        return document, None
    at = min(starts, key=lambda i: abs(i - (1 - share) * len(messages)))
    return {"messages": messages[:at]}, {"messages": messages[at:]}


def _cut_near(text: str, share: float) -> int:
    """Where the last share of a text begins: at the paragraph, line or word nearest to that place."""
    target = min(max(round((1 - share) * len(text)), 1), max(len(text) - 1, 1))
    low, high = target - min(target, len(text) - target) // 2, target + (len(text) - target) // 2
    for separator in ("\n\n", "\n", " "):
        before = text.rfind(separator, low, target)
        after = text.find(separator, target, high)
        places = [place + len(separator) for place in (before, after) if place >= 0]
        places = [place for place in places if 0 < place < len(text)]
        if places:
            return min(places, key=lambda place: abs(place - target))
    return target


# ---- pieces -------------------------------------------------------------------------------------------------------


def pieces(document: Document) -> Iterator[Document]:
    """Yield a document, a long text as several: what is tokenized at once stays small."""
    if not isinstance(document, str) or len(document) <= PIECE:
        yield document
        return
    start = 0
    while len(document) - start > PIECE:
        end = start + PIECE
        for separator in ("\n\n", "\n", " "):
            place = document.rfind(separator, start + PIECE // 2, end)
            if place >= 0:
                end = place + len(separator)
                break
        yield document[start:end]
        start = end
    yield document[start:]
