"""nanochat's tokenizer: encode and decode text, render chats, and read and write its files.

A nanochat tokenizer is a byte-level BPE: ids 0..255 are the single bytes, followed by the merges in rank order and nine
special tokens. On disk it is a pickle of a `tiktoken.Encoding` with a tensor of the tokens' lengths in bytes;
transformers converts it to a tokenizer.json. `tokenizer_file` reads these untrusted files.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import pickle
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar, final

import numpy as np
import tiktoken
import torch
from jaxtyping import Int32

from bridge.nanochat import locate, split_pattern, tokenizer_file
from bridge.nanochat.tokenizer_file import MAX_FILE_BYTES, MAX_VOCAB_SIZE
from jsae import extras, files

Result = TypeVar("Result")

SPECIAL_TOKENS = (
    "<|bos|>",
    "<|user_start|>",
    "<|user_end|>",
    "<|assistant_start|>",
    "<|assistant_end|>",
    "<|python_start|>",
    "<|python_end|>",
    "<|output_start|>",
    "<|output_end|>",
)
PATTERN = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,2}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
)

# Longer runs of white space are cut before splitting: tiktoken's regex engine overflows its stack (and panics) at about
# a million characters.
_LONGEST_BLANK = 2**19


@final
class Tokenizer:
    """A nanochat tokenizer: text to ids and back, and chats to ids.

    Args:
        ranks: id of every token, by its bytes; ids 0..255 are the single bytes, and the ids are 0..len(ranks)-1.
        pattern: the regular expression that splits text before merging.
        token_bytes: (V,) lengths in bytes of the tokens, for bits per byte; default: their true lengths.

    Raises:
        ValueError: the ranks, the pattern (`split_pattern.check`) or token_bytes are not those of a nanochat tokenizer.
    """

    def __init__(self, ranks: dict[bytes, int], *, pattern: str = PATTERN, token_bytes: np.ndarray | None = None):
        _check_ranks(ranks)
        self.special_tokens: dict[str, int] = {name: len(ranks) + i for i, name in enumerate(SPECIAL_TOKENS)}
        self.vocab_size: int = len(ranks) + len(SPECIAL_TOKENS)
        self.bos_token_id: int = self.special_tokens["<|bos|>"]
        self._bytes = sorted(ranks, key=ranks.__getitem__) + [name.encode() for name in SPECIAL_TOKENS]
        self._encoding = _build_encoding(ranks, pattern, self.special_tokens)
        lengths = np.array([len(b) for b in self._bytes[: len(ranks)]] + [0] * len(SPECIAL_TOKENS), np.int32)
        self.token_bytes: np.ndarray = lengths if token_bytes is None else _check_token_bytes(token_bytes, lengths)

    @property
    def fingerprint(self) -> str:
        """Sixteen hex digits that identify vocabulary and split pattern; equal digits mean equal ids for any text."""
        digest = hashlib.sha256(self._encoding._pat_str.encode())
        for token in self._bytes:
            digest.update(len(token).to_bytes(4, "little") + token)
        return digest.hexdigest()[:16]

    def encode(self, text: str, prepend_bos: bool = False) -> list[int]:
        """Return the ids of a text. Names of special tokens in it are encoded as ordinary text.

        Args:
            text: the text.
            prepend_bos: whether to put the BOS token first.

        Raises ValueError if tiktoken's regex engine fails, which may happen with patterns other than nanochat's own.
        """
        pieces = _cut_long_blanks(text) if len(text) > _LONGEST_BLANK else [text]
        ids = _without_panic(lambda: [i for piece in pieces for i in self._encoding.encode_ordinary(piece)])
        return [self.bos_token_id, *ids] if prepend_bos else ids

    def encode_batch(self, texts: Sequence[str], prepend_bos: bool = False) -> list[list[int]]:
        """Return the ids of each text, see `encode`."""
        return [self.encode(text, prepend_bos) for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of ids; invalid UTF-8 becomes U+FFFD. Raises ValueError for an id outside 0..V-1."""
        return b"".join(self.token_bytes_of(i) for i in ids).decode("utf-8", errors="replace")

    def token_text(self, token_id: int) -> str:
        """Return one token as text; a token that is part of a character becomes U+FFFD."""
        return self.decode([token_id])

    def token_bytes_of(self, token_id: int) -> bytes:
        """Return the bytes of one token, or of a special token's name. Raises ValueError for an id outside 0..V-1."""
        if not 0 <= token_id < self.vocab_size:
            raise ValueError(f"token id {token_id} is outside this tokenizer's 0..{self.vocab_size - 1}")
        return self._bytes[token_id]

    def render_conversation(self, conversation: dict[str, Any], max_tokens: int = 2048) -> tuple[list[int], list[int]]:
        """Return the ids of a chat, and a mask that is 1 on the assistant's tokens, as in nanochat's chat training.

        Args:
            conversation: {"messages": [{"role", "content"}, ...]}, alternating between user and assistant, the user
                first. A system message may precede them and is prepended to the first user's text. An assistant's
                content is text or a list of parts {"type": "text" | "python" | "python_output", "text"}. Tool output
                has mask 0.
            max_tokens: the length at which the result is cut.

        Returns:
            (ids, mask), of equal length.

        Raises:
            ValueError: the conversation does not have this form.
        """
        special = self.special_tokens
        pieces: list[tuple[list[int], int]] = [([self.bos_token_id], 0)]
        for role, content in _turns(conversation):
            if role == "user":
                pieces.append(([special["<|user_start|>"], *self.encode(content), special["<|user_end|>"]], 0))
                continue
            pieces.append(([special["<|assistant_start|>"]], 0))
            pieces.extend(self._render_part(part) for part in _parts(content))
            pieces.append(([special["<|assistant_end|>"]], 1))
        ids = [i for piece, _ in pieces for i in piece]
        mask = [m for piece, m in pieces for _ in piece]
        return ids[:max_tokens], mask[:max_tokens]

    def render_for_completion(self, conversation: dict[str, Any]) -> list[int]:
        """Return the prompt for the last message: the chat before it and the token that starts the assistant's answer.

        Raises ValueError if the last message is not an assistant's.
        """
        messages = _messages(conversation)
        if messages[-1].get("role") != "assistant":
            raise ValueError(f"the last message must be the assistant's, got role {messages[-1].get('role')!r}")
        ids, _ = self.render_conversation({"messages": messages[:-1]})
        return [*ids, self.special_tokens["<|assistant_start|>"]]

    def _render_part(self, part: dict[str, str]) -> tuple[list[int], int]:
        ids = self.encode(part["text"])
        if part["type"] == "text":
            return ids, 1
        name, mask = ("python", 1) if part["type"] == "python" else ("output", 0)
        return [self.special_tokens[f"<|{name}_start|>"], *ids, self.special_tokens[f"<|{name}_end|>"]], mask


def load(path: str | Path) -> Tokenizer:
    """Load a tokenizer from nanochat's `tokenizer.pkl`, its conversion `tokenizer.json`, or the directory of either.

    A `token_bytes.pt` beside it is used, because older files have lengths other than the true ones, and bits per byte
    are comparable only for the same table.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not a nanochat tokenizer. It is never executed.
    """
    path = locate.expand(path)
    candidates = [path / "tokenizer.pkl", path / "tokenizer.json"] if path.is_dir() else [path]
    file = next((file for file in candidates if file.is_file()), None)
    if file is None:
        raise FileNotFoundError(
            f"no tokenizer at {candidates[0]}; give nanochat's tokenizer directory or its tokenizer.pkl"
        )
    if file.stat().st_size > MAX_FILE_BYTES:
        raise ValueError(f"{file} has {file.stat().st_size} bytes; a tokenizer has at most {MAX_FILE_BYTES}")
    is_json = file.suffix.lower() == ".json"
    contents = tokenizer_file.read_json(file, SPECIAL_TOKENS) if is_json else tokenizer_file.read_pickle(file)
    table = file.parent / "token_bytes.pt"
    token_bytes = tokenizer_file.read_token_bytes(table) if table.is_file() else None
    try:
        tokenizer = Tokenizer(contents.ranks, pattern=contents.pattern, token_bytes=token_bytes)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error
    if contents.special_tokens != tokenizer.special_tokens:
        raise ValueError(f"{file}: special tokens must be {tokenizer.special_tokens}, nanochat's nine after the merges")
    return tokenizer


def train(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Train a tokenizer of vocab_size tokens, including the nine special ones, on texts.

    Raises:
        ImportError: rustbpe is not installed.
        ValueError: vocab_size is out of range, or the texts are too short for so many merges.
    """
    try:
        import rustbpe
    except ImportError as error:
        raise ImportError(f"training a tokenizer needs rustbpe: {extras.advice('pretrain')}") from error
    if not 256 + len(SPECIAL_TOKENS) <= vocab_size <= MAX_VOCAB_SIZE:
        raise ValueError(f"vocab_size must be in 265..{MAX_VOCAB_SIZE}, got {vocab_size}")
    trainer = rustbpe.Tokenizer()
    trainer.train_from_iterator(iter(texts), vocab_size - len(SPECIAL_TOKENS), pattern=PATTERN)
    ranks = {bytes(token): rank for token, rank in trainer.get_mergeable_ranks()}
    if len(ranks) + len(SPECIAL_TOKENS) < vocab_size:
        raise ValueError(
            f"the texts allow only {len(ranks) + len(SPECIAL_TOKENS)} tokens, got vocab_size {vocab_size}: "
            "give more text or a smaller vocab_size"
        )
    return Tokenizer(ranks)


def save(tokenizer: Tokenizer, directory: str | Path) -> None:
    """Write nanochat's own two files, `tokenizer.pkl` and `token_bytes.pt`, into a directory, created if missing.

    Raises:
        OSError: a file cannot be written, for example because the disk is full; its previous content remains.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    table = io.BytesIO()
    torch.save(torch.from_numpy(tokenizer.token_bytes.copy()), table)
    files.write(directory / "token_bytes.pt", table.getvalue())
    files.write(directory / "tokenizer.pkl", pickle.dumps(tokenizer._encoding, protocol=4))


# ---- checks ---------------------------------------------------------------------------------------------------------


def _check_ranks(ranks: dict[bytes, int]) -> None:
    if not 256 <= len(ranks) <= MAX_VOCAB_SIZE:
        raise ValueError(f"expected 256..{MAX_VOCAB_SIZE} tokens, got {len(ranks)}")
    if sorted(ranks.values()) != list(range(len(ranks))):
        raise ValueError(f"the ids of the tokens must be 0..{len(ranks) - 1}, each once")
    if any(ranks.get(bytes([i])) != i for i in range(256)):
        raise ValueError("ids 0..255 must be the 256 single bytes in order")


def _check_token_bytes(table: np.ndarray, lengths: np.ndarray) -> Int32[np.ndarray, " V"]:
    if table.shape != lengths.shape:
        raise ValueError(f"token_bytes has shape {table.shape}, the tokenizer needs {lengths.shape}")
    if table.min() < 0 or table.max() > 2**20 or np.any(table[-len(SPECIAL_TOKENS) :]):
        raise ValueError("token_bytes must contain lengths, with 0 for the special tokens")
    return table.astype(np.int32)


def _build_encoding(ranks: dict[bytes, int], pattern: str, special_tokens: dict[str, int]) -> tiktoken.Encoding:
    split_pattern.check(pattern)
    try:
        return _without_panic(
            lambda: tiktoken.Encoding(
                name="rustbpe", pat_str=pattern, mergeable_ranks=ranks, special_tokens=special_tokens
            )
        )
    except Exception as error:
        raise ValueError(f"tiktoken rejects the split pattern or the ranks: {error}") from error


def _without_panic(call: Callable[[], Result]) -> Result:
    """Return call(); raise ValueError if Rust panics, for which pyo3 raises a BaseException."""
    try:
        return call()
    except BaseException as error:
        if type(error).__name__ == "PanicException":
            raise ValueError(f"tiktoken failed on this text or split pattern: {str(error)[:200]}") from error
        raise


def _cut_long_blanks(text: str) -> list[str]:
    """Split a text so that no piece has a longer run of white space than tiktoken can process."""
    pieces, start = [], 0
    for run in re.finditer(rf"(?<!\s)\s{{{_LONGEST_BLANK},}}", text):
        for cut in range(run.start() + _LONGEST_BLANK, run.end(), _LONGEST_BLANK):
            pieces.append(text[start:cut])
            start = cut
    return [*pieces, text[start:]]


# ---- chats --------------------------------------------------------------------------------------------------------


def check_conversation(conversation: dict[str, Any]) -> None:
    """Raise ValueError unless `Tokenizer.render_conversation` accepts the conversation."""
    for role, content in _turns(conversation):
        if role == "assistant":
            _parts(content)


def _messages(conversation: dict[str, Any]) -> list[dict[str, Any]]:
    messages = conversation.get("messages")
    if not isinstance(messages, list) or not messages or not all(isinstance(m, dict) for m in messages):
        raise ValueError('a conversation is {"messages": [{"role": ..., "content": ...}, ...]} with at least one')
    return messages


def _turns(conversation: dict[str, Any]) -> list[tuple[str, Any]]:
    """Return (role, content) of alternating user and assistant turns, a system message merged into the first."""
    turns = [(m.get("role"), m.get("content")) for m in _messages(conversation)]
    if turns[0][0] == "system":
        if (
            len(turns) < 2
            or turns[1][0] != "user"
            or not (isinstance(turns[0][1], str) and isinstance(turns[1][1], str))
        ):
            raise ValueError("a system message must be text and be followed by a user's text")
        turns = [("user", f"{turns[0][1]}\n\n{turns[1][1]}"), *turns[2:]]
    for i, ((role, content), expected) in enumerate(zip(turns, itertools.cycle(("user", "assistant")), strict=False)):
        if role != expected:
            raise ValueError(f"turn {i} must be the {expected}'s, got role {role!r}")
        if role == "user" and not isinstance(content, str):
            raise ValueError(f"turn {i}: a user's content must be text, got {type(content).__name__}")
    return turns


def _parts(content: Any) -> list[dict[str, str]]:
    """Return an assistant's content as a list of {"type", "text"}."""
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    if not isinstance(parts, list):
        raise ValueError(f"an assistant's content must be text or a list of parts, got {type(content).__name__}")
    for part in parts:
        if not isinstance(part, dict) or not isinstance(part.get("text"), str):
            raise ValueError('a part of an assistant\'s content is {"type": ..., "text": ...}')
        if part.get("type") not in ("text", "python", "python_output"):
            raise ValueError(f"a part's type is text, python or python_output, got {part.get('type')!r}")
    return parts
