"""Chats about the standard library: what functions and classes do, and sums; for chat training without a data set."""

from __future__ import annotations

import ast
import functools
import hashlib
import json
import random
from collections.abc import Iterator
from typing import Any

from bridge.nanochat import library
from bridge.nanochat.documents import Document, Unit, digest

_QUESTIONS = ("What does {} do?", "Please explain {}.", "How do I use {}?", "Tell me about {}.")
_SUMS = ("What is {} + {}?", "Please add {} and {}.", "How much is {} plus {}?")
_THANKS = (("Thank you!", "You are welcome."), ("Thanks, that helps.", "Glad to help."))
_LENGTHS = range(20, 121)  # characters of a description
_HIGHEST = 20  # of the numbers that are added


@functools.cache
def units() -> tuple[Unit, ...]:
    """Return a unit per chat: a question about a function, a class or a sum, an answer, and to some of them thanks.

    The descriptions are first lines of docstrings of the running interpreter's library. Chats depend on nothing else,
    and reading them takes seconds, so a process does it once.
    """
    chats = [(chat, digest(json.dumps(chat))) for chat in _chats()]
    source = ("stdlib_chats", hashlib.sha256(b"".join(content for _, content in chats)).hexdigest()[:12])
    return tuple(
        Unit(f"chat {content.hex()[:12]}", functools.partial(_one, chat), source, content=content)
        for chat, content in chats
    )


def _one(chat: dict[str, Any]) -> list[Document]:
    return [chat]


def _chats() -> Iterator[dict[str, Any]]:
    rng = random.Random(0)
    for name, line in _described():
        yield _chat(rng, rng.choice(_QUESTIONS).format(name), f"Sure! {name}: {line}")
    for a in range(_HIGHEST):
        for b in range(_HIGHEST):
            yield _chat(rng, rng.choice(_SUMS).format(a, b), f"Sure! {a} + {b} is {a + b}.")


def _chat(rng: random.Random, question: str, answer: str) -> dict[str, Any]:
    turns = [("user", question), ("assistant", answer)]
    if rng.random() < 0.4:
        thanks, reply = rng.choice(_THANKS)
        turns += [("user", thanks), ("assistant", reply)]
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


def _described() -> Iterator[tuple[str, str]]:
    """Yield names of public functions and classes of the library, and the first line of their docstrings."""
    for file, text in library.sources():
        parts = file.removesuffix(".py").split("/")
        parts = parts[:-1] if parts[-1] == "__init__" else parts
        if any(part.startswith(("_", "test", "idle")) for part in parts):
            continue
        for node in ast.parse(text).body:
            if not isinstance(node, ast.FunctionDef | ast.ClassDef) or node.name.startswith("_"):
                continue
            line = (ast.get_docstring(node) or "").partition("\n")[0].strip()
            if len(line) in _LENGTHS:
                yield ".".join((*parts, node.name)), line
