"""Documents of a corpus: parsing of records, division into splits, and division of long documents into pieces."""

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
"""Largest size of a document, and of a line that contains one, in bytes."""
PIECE = 2**20
"""Characters; longer documents are read in pieces that end at a paragraph, a line or a space."""

CHAT_KEYS = ("messages", "conversations")
_ROLES = {"human": "user", "gpt": "assistant"}  # of ShareGPT, which also has `from` and `value`
_EXPECTED = 'expected {"text": ...}, {"messages": [...]}, or a list of {"role": ..., "content": ...}'


@dataclass(frozen=True)
class Unit:
    """A part of the data that is read at once and shuffled as a whole.

    Attributes:
        name: identifies its kind and content, independent of its path: copies of the data have the same names.
        read: returns its documents in order.
        source: (name, digest) of the file that contains it.
        content: SHA-256 digest of its only document, or of the document that it is a piece of; None for several.
        side: the split that it belongs to by a rule of its data set (nanochat's last shard), or None.
        span: the part of a document that it contains, from 0 to 1; (0, 1) for whole documents.
        where: its part of the file, for people: "row group 3"; "" for the whole file.
        number: of a parquet file's row group, from 0.
    """

    name: str
    read: Callable[[], Iterable[Document]]
    source: tuple[str, str]
    content: bytes | None = None
    side: Split | None = None
    span: tuple[float, float] = (0.0, 1.0)
    where: str = ""
    number: int = 0


def document_from_record(record: Any) -> Document | None:
    """Return the document in a JSON value or a row: text, a chat, or None for an empty text.

    Raises:
        ValueError: the record has none of the known forms, or is a chat that nanochat cannot render.
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
        messages: a list of messages, or a dict of lists, as Hugging Face's `Sequence` stores them. A message has `role`
            and `content`, or ShareGPT's `from` and `value`.

    Raises:
        ValueError: nanochat cannot render the chat.
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
    """Return whether a document is held out, which depends on a hash of its content alone."""
    text = document if isinstance(document, str) else json.dumps(document["messages"], sort_keys=True)
    return heldout_digest(digest(text), fraction)


def heldout_digest(content: bytes, fraction: float) -> bool:
    """Return whether a document with the SHA-256 digest `content` is held out."""
    return int.from_bytes(content[:8], "big") < fraction * 2**64


def digest(text: str) -> bytes:
    """Return the SHA-256 digest of a text."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()


def split_by_hash(read: Callable[[], Iterable[Document]], split: Split, fraction: float) -> Iterator[Document]:
    """Yield the documents of a split, selected by `is_heldout`."""
    return (document for document in read() if is_heldout(document, fraction) == (split == "heldout"))


def split_by_position(
    read: Callable[[], Iterable[Document]], split: Split, fraction: float, span: tuple[float, float]
) -> Iterator[Document]:
    """Yield the part of every document that belongs to a split: the last `fraction` of it is held out.

    Args:
        read: returns documents, or a part of one.
        split: "train" or "heldout".
        fraction: share of the whole document that is held out.
        span: the part of the document that `read` returns, from 0 to 1.
    """
    begin, end = span
    share = min(max((end - 1 + fraction) / (end - begin), 0.0), 1.0) if end > begin else 0.0
    for document in read():
        first, last = _parts(document, share)
        if part := (last if split == "heldout" else first):
            yield part


def _parts(document: Document, share: float) -> tuple[Document | None, Document | None]:
    """Return a document without its last share, and that share; None for an empty part."""
    if share in (0.0, 1.0):
        return (document, None) if share == 0.0 else (None, document)
    if isinstance(document, str):
        cut = _cut_near(document, share)
        return document[:cut] or None, document[cut:] or None
    messages = document["messages"]
    starts = [
        i for i, message in enumerate(messages) if message["role"] == "user" and i > messages[0]["role"].count("system")
    ]
    if not starts:
        return document, None
    cut = min(starts, key=lambda i: abs(i - (1 - share) * len(messages)))
    return {"messages": messages[:cut]}, {"messages": messages[cut:]}


def _cut_near(text: str, share: float) -> int:
    """Return the offset where the last share of a text begins: the nearest start of a paragraph, line or word."""
    target = min(max(round((1 - share) * len(text)), 1), max(len(text) - 1, 1))
    low, high = target - min(target, len(text) - target) // 2, target + (len(text) - target) // 2
    for separator in ("\n\n", "\n", " "):
        before = text.rfind(separator, low, target)
        after = text.find(separator, target, high)
        cuts = [position + len(separator) for position in (before, after) if position >= 0]
        cuts = [cut for cut in cuts if 0 < cut < len(text)]
        if cuts:
            return min(cuts, key=lambda cut: abs(cut - target))
    return target


# ---- pieces -------------------------------------------------------------------------------------------------------


def pieces(document: Document) -> Iterator[Document]:
    """Yield a document, or the pieces of a long text, so that little is tokenized at once."""
    if not isinstance(document, str) or len(document) <= PIECE:
        yield document
        return
    start = 0
    while len(document) - start > PIECE:
        end = start + PIECE
        for separator in ("\n\n", "\n", " "):
            position = document.rfind(separator, start + PIECE // 2, end)
            if position >= 0:
                end = position + len(separator)
                break
        yield document[start:end]
        start = end
    yield document[start:]
