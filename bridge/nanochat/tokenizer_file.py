"""Read the files of a nanochat tokenizer without trusting them: nothing in them is executed."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, final

import numpy as np
import torch

from bridge.nanochat import json_file, pickles, torch_file
from bridge.nanochat.names import shown

# A tokenizer of 65,536 tokens takes about one megabyte, as JSON five; no real one exceeds these limits.
MAX_FILE_BYTES = 32 * 2**20
MAX_VOCAB_SIZE = 2**19
_MAX_JSON_BYTES = 12 * 2**20
_MAX_JSON_CONTAINERS = 2**19
_MAX_OPCODES = 5 * MAX_VOCAB_SIZE  # four per token: its bytes, its id, and two memo entries

# The opcodes of an Encoding pickled with protocol 4 or 5. No REDUCE (calls), no PUT with an index.
_OPCODES = (
    "PROTO FRAME STOP MEMOIZE BINGET LONG_BINGET MARK STACK_GLOBAL NEWOBJ BUILD EMPTY_TUPLE EMPTY_DICT "
    "SETITEM SETITEMS SHORT_BINUNICODE BINUNICODE SHORT_BINBYTES BINBYTES BININT BININT1 BININT2"
)
_ENCODING = "tiktoken.core.Encoding"


@dataclasses.dataclass(frozen=True)
class Contents:
    """Contents of a tokenizer file: ids by token bytes, the split pattern, ids by special token."""

    ranks: dict[bytes, int]
    pattern: str
    special_tokens: dict[str, int]


@final
class _State:
    """A placeholder for the pickled tiktoken.Encoding, which only stores its state."""

    def __init__(self) -> None:
        self.state: Any = None


def read_pickle(file: Path) -> Contents:
    """Return the contents of nanochat's tokenizer.pkl. Raises ValueError for any other pickle, without executing it."""
    try:
        value = pickles.read(
            file.read_bytes(),
            opcodes=_OPCODES,
            names=(_ENCODING,),
            max_opcodes=_MAX_OPCODES,
            call=_new,
            build=_set_state,
        )
    except ValueError as error:
        raise ValueError(f"{file} is not a nanochat tokenizer (it was not executed): {shown(error, 300)}") from error
    state = value.state if isinstance(value, _State) else None
    types = {"name": str, "pat_str": str, "mergeable_ranks": dict, "special_tokens": dict}
    if not (isinstance(state, dict) and state.keys() == types.keys()):
        raise ValueError(f"{file} is not a pickled tiktoken.Encoding with the fields {', '.join(types)}")
    for field, kind in types.items():
        if not isinstance(state[field], kind):
            raise ValueError(f"{file}: field {field} must be a {kind.__name__}, got {type(state[field]).__name__}")
    if not all(type(token) is bytes and type(rank) is int for token, rank in state["mergeable_ranks"].items()):
        raise ValueError(f"{file}: every token must be bytes with an integer id")
    return Contents(state["mergeable_ranks"], state["pat_str"], state["special_tokens"])


def _new(_: str, arguments: tuple) -> _State:
    if arguments:
        raise pickles.ForbiddenError("it creates an Encoding from arguments")
    return _State()


def _set_state(target: Any, state: Any) -> Any:
    if not isinstance(target, _State):
        raise pickles.ForbiddenError("it sets the state of something other than an Encoding")
    target.state = state
    return target


def read_json(file: Path, specials: Sequence[str]) -> Contents:
    """Return the contents of a nanochat tokenizer that was converted to transformers' tokenizer.json.

    Its merges are only checked: tiktoken merges by rank, and the vocabulary without special tokens is in rank order.

    Args:
        file: the file.
        specials: nanochat's special tokens, in the order of their ids.

    Raises ValueError for any other tokenizer, whose ids would differ from nanochat's.
    """
    table = json_file.read_table(
        file, "tokenizer.json", "fetch it again", max_bytes=_MAX_JSON_BYTES, max_containers=_MAX_JSON_CONTAINERS
    )
    try:
        return _from_json(table, specials)
    except ValueError as error:
        raise ValueError(
            f"{file} is not a nanochat tokenizer converted for transformers: {error}; give nanochat's own tokenizer.pkl"
        ) from error


def _from_json(table: dict[str, Any], specials: Sequence[str]) -> Contents:
    model = table.get("model")
    if not isinstance(model, dict) or model.get("type", "BPE") != "BPE":
        raise ValueError("its model is not BPE")
    for name in (
        "dropout",
        "unk_token",
        "continuing_subword_prefix",
        "end_of_word_suffix",
        "fuse_unk",
        "byte_fallback",
    ):
        if model.get(name):
            raise ValueError(f"its model has {name}={str(model[name])[:50]}")
    if table.get("normalizer") is not None:
        raise ValueError("it has a normalizer")
    vocab = model.get("vocab")
    if not isinstance(vocab, dict) or not all(type(i) is int for i in vocab.values()):
        raise ValueError("its vocabulary does not map tokens to ids")
    if len(vocab) > MAX_VOCAB_SIZE:
        raise ValueError(f"its vocabulary has {len(vocab)} tokens; at most {MAX_VOCAB_SIZE} are read")
    added = _added(table.get("added_tokens"))
    ranks = {_bytes_of(token): i for token, i in vocab.items() if token not in specials}
    special = {token: i for token, i in (vocab | added).items() if token in specials}
    if foreign := [token for token in added if token not in specials]:
        raise ValueError(f"it has special tokens that no nanochat has, {str(foreign[:4])[:200]}")
    _check_merges(model.get("merges"), vocab)
    return Contents(ranks, _pattern(table.get("pre_tokenizer")), special)


def _added(tokens: Any) -> dict[str, int]:
    """Return the ids of the added tokens."""
    tokens = [] if tokens is None else tokens
    if not isinstance(tokens, list) or not all(
        isinstance(t, dict) and isinstance(t.get("content"), str) and type(t.get("id")) is int for t in tokens
    ):
        raise ValueError("its added_tokens are not a list of tokens with ids")
    return {t["content"]: t["id"] for t in tokens}


def _pattern(pre: Any) -> str:
    """Return the split pattern of a pre-tokenizer that consists of a Split and a ByteLevel step."""
    steps = pre.get("pretokenizers") if isinstance(pre, dict) and pre.get("type") == "Sequence" else None
    if not isinstance(steps, list) or [s.get("type") if isinstance(s, dict) else s for s in steps] != [
        "Split",
        "ByteLevel",
    ]:
        raise ValueError("its pre_tokenizer is not a Split and a ByteLevel")
    split, level = steps
    pattern = split.get("pattern")
    if not isinstance(pattern, dict) or not isinstance(pattern.get("Regex"), str):
        raise ValueError("it does not split with a regular expression")
    if (
        split.get("behavior") != "Isolated"
        or split.get("invert")
        or level.get("add_prefix_space")
        or level.get("use_regex")
    ):
        raise ValueError("it does not split as nanochat does")
    return pattern["Regex"]


def _check_merges(merges: Any, vocab: dict[str, int]) -> None:
    """Raise ValueError unless the merges are in the order of the resulting ids, which is the order of tiktoken."""
    if not isinstance(merges, list):
        raise ValueError("its merges are not a list")
    last = -1
    for merge in merges:
        pair = merge.split(" ") if isinstance(merge, str) else merge
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(part, str) for part in pair):
            raise ValueError("a merge is not a pair")
        token_id = vocab.get(pair[0] + pair[1], -1)
        if token_id < max(last, 0) or pair[0] not in vocab or pair[1] not in vocab:
            raise ValueError("its merges are not in the order of their ids")
        last = token_id


def _letters() -> dict[str, int]:
    """Return the byte of each letter in GPT-2's byte-level encoding, in which printable bytes stand for themselves."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [b for b in range(256) if b not in set(printable)]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(rest)}


_LETTERS = _letters()


def _bytes_of(token: str) -> bytes:
    try:
        return bytes(_LETTERS[letter] for letter in token)
    except KeyError as error:
        raise ValueError(f"its token {token[:50]!r} is not in the byte-level encoding") from error


def read_token_bytes(file: Path) -> np.ndarray:
    """Return the token lengths in a token_bytes.pt, (V,). Raises ValueError unless the file has one integer tensor."""
    if file.stat().st_size > MAX_FILE_BYTES:
        raise ValueError(f"{file} has {file.stat().st_size} bytes; at most {MAX_FILE_BYTES} are expected")
    try:
        table = torch_file.read(file)
    except ValueError as error:
        raise ValueError(
            f"{file} is not a tensor that torch.load(weights_only=True) reads: {shown(error, 300)}"
        ) from error
    if not isinstance(table, torch.Tensor) or table.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"{file} must contain one integer tensor, got {getattr(table, 'dtype', type(table).__name__)}")
    if table.numel() * table.element_size() > file.stat().st_size:
        raise ValueError(f"{file} describes a tensor that is larger than the file")
    return table.clone().numpy()
