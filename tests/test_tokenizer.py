"""The tokenizer gives upstream's ids, and its reader runs nothing that a file brings along."""

import io
import json
import pickle
import re
import struct
import sys

import numpy as np
import pytest
import tiktoken
import torch

from bridge.nanochat import tokenizer as tokenizers
from bridge.nanochat.tokenizer import PATTERN, SPECIAL_TOKENS, Tokenizer
from jsae import extras

BYTES = {bytes([i]): i for i in range(256)}
SPECIAL = {name: 256 + i for i, name in enumerate(SPECIAL_TOKENS)}
STATE = {"name": "rustbpe", "pat_str": PATTERN, "mergeable_ranks": BYTES, "special_tokens": SPECIAL}


@pytest.fixture(scope="module")
def upstream(goldens):
    return goldens / "basedir-2026-07-03-92d63d4" / "nanochat" / "tokenizer"


@pytest.fixture(scope="module")
def cases(goldens):
    return json.loads((goldens / "basedir-2026-07-03-92d63d4" / "tokenizer_cases.json").read_text())


@pytest.fixture(scope="module")
def loaded(upstream):
    return tokenizers.load(upstream)


# ---- upstream's results -------------------------------------------------------------------------------------------


def test_sizes_and_special_tokens_are_upstreams(loaded, cases):
    assert loaded.vocab_size == cases["vocab_size"]
    assert loaded.bos_token_id == cases["bos_token_id"]
    assert loaded.special_tokens == cases["special_tokens"]
    assert cases["pattern"] == PATTERN


def test_each_token_has_upstreams_bytes(loaded, cases):
    for i, expected in enumerate(cases["token_bytes_hex"]):
        if expected is not None:
            assert loaded.token_bytes_of(i) == bytes.fromhex(expected)
    assert loaded.token_bytes.dtype == np.int32
    assert loaded.token_bytes.tolist() == cases["token_bytes_pt"]


def test_encoding_is_upstreams(loaded, cases):
    for case in cases["encode"]:
        assert loaded.encode(case["text"]) == case["ids"], case["text"]
    for case in cases["encode_prepend_append"]:
        ids = loaded.encode(case["text"], prepend_bos=True)
        assert [*ids, loaded.special_tokens[case["append"]]] == case["ids"]
    case = cases["encode_batch"]
    assert loaded.encode_batch(case["texts"], prepend_bos=True) == case["ids"]


def test_decoding_is_upstreams(loaded, cases):
    for case in cases["decode"]:
        assert loaded.decode(case["ids"]) == case["text"]


def test_chats_are_rendered_as_upstream_renders_them(loaded, cases):
    for case in cases["render_conversation"]:
        assert loaded.render_conversation(case["conversation"]) == (case["ids"], case["mask"])
        assert loaded.render_for_completion(case["conversation"]) == case["completion_ids"]
    case = cases["render_truncated"]
    assert loaded.render_conversation(case["conversation"], case["max_tokens"]) == (case["ids"], case["mask"])


def test_the_pickle_itself_may_be_named(upstream, loaded):
    assert tokenizers.load(upstream / "tokenizer.pkl").fingerprint == loaded.fingerprint


# ---- our files ----------------------------------------------------------------------------------------------------


def test_saving_writes_upstreams_bytes(upstream, loaded, tmp_path):
    tokenizers.save(loaded, tmp_path / "new" / "tokenizer")
    written = tmp_path / "new" / "tokenizer"
    assert (written / "tokenizer.pkl").read_bytes() == (upstream / "tokenizer.pkl").read_bytes()
    ours, theirs = (torch.load(folder / "token_bytes.pt", weights_only=True) for folder in (written, upstream))
    assert ours.dtype == theirs.dtype
    assert ours.tolist() == theirs.tolist()


def test_upstream_reads_what_we_save(loaded, tmp_path):
    tokenizers.save(loaded, tmp_path)
    encoding = pickle.loads((tmp_path / "tokenizer.pkl").read_bytes())
    assert isinstance(encoding, tiktoken.Encoding)
    assert encoding.encode_ordinary("The lamp is lit.") == loaded.encode("The lamp is lit.")
    assert encoding.encode_single_token("<|bos|>") == loaded.bos_token_id


def test_without_a_table_the_true_lengths_are_counted(upstream, tmp_path):
    (tmp_path / "tokenizer.pkl").write_bytes((upstream / "tokenizer.pkl").read_bytes())
    tokenizer = tokenizers.load(tmp_path)
    lengths = [len(tokenizer.token_bytes_of(i)) for i in range(tokenizer.bos_token_id)]
    assert tokenizer.token_bytes.tolist() == [*lengths, *[0] * 9]


def test_an_older_table_is_followed_not_recomputed(upstream, tmp_path):
    (tmp_path / "tokenizer.pkl").write_bytes((upstream / "tokenizer.pkl").read_bytes())
    table = torch.load(upstream / "token_bytes.pt", weights_only=True)
    table[128:256] = 3  # how upstream counted the raw bytes until July 2026
    torch.save(table, tmp_path / "token_bytes.pt")
    assert tokenizers.load(tmp_path).token_bytes[200] == 3


def test_training_learns_merges_and_is_repeatable():
    texts = ["the lamp and the boat and the pier"] * 20
    first, second = (tokenizers.train(texts, 275) for _ in range(2))
    assert first.vocab_size == 275
    assert len(first.encode(texts[0])) < len(texts[0])
    assert first.decode(first.encode(texts[0])) == texts[0]
    assert first.fingerprint == second.fingerprint


def test_training_on_too_little_text_says_so():
    with pytest.raises(ValueError, match=r"allow only 2\d\d tokens, got vocab_size 400"):
        tokenizers.train(["the boat"], 400)


def test_a_vocabulary_that_cannot_hold_the_bytes_is_refused():
    with pytest.raises(ValueError, match=r"vocab_size must be in 265\.\."):
        tokenizers.train(["text"], 264)


def test_without_rustbpe_training_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "rustbpe", None)
    with pytest.raises(ImportError, match=re.escape(extras.advice("pretrain"))):
        tokenizers.train(["text"], 300)


# ---- text ---------------------------------------------------------------------------------------------------------


def test_names_of_special_tokens_in_text_are_text():
    tokenizer = Tokenizer(BYTES)
    assert tokenizer.encode("<|bos|>") == list(b"<|bos|>")
    assert tokenizer.decode([tokenizer.bos_token_id]) == "<|bos|>"


def test_a_part_of_a_character_is_shown_as_a_replacement():
    tokenizer = Tokenizer(BYTES)
    assert tokenizer.token_text(0xC3) == "\ufffd"
    assert tokenizer.token_bytes_of(0xC3) == b"\xc3"
    assert tokenizer.decode([0xC3, 0xA9]) == "é"


@pytest.mark.parametrize("token", [-1, 265])
def test_an_id_outside_the_vocabulary_is_an_error(token):
    with pytest.raises(ValueError, match=r"outside this tokenizer's 0\.\.264"):
        Tokenizer(BYTES).decode([token])


@pytest.mark.parametrize("blank", [" ", " \t"])
def test_white_space_that_overflows_the_regex_engine_is_encoded(blank):
    text = "a" + blank * 1_500_000 + "b" + blank * 700_000
    tokenizer = Tokenizer(BYTES)
    assert tokenizer.encode(text) == list(text.encode())


def test_lone_surrogates_do_not_stop_the_tokenizer():
    assert Tokenizer(BYTES).decode(Tokenizer(BYTES).encode("a\ud800b")) == "a\ufffdb"


# ---- chats that are none ------------------------------------------------------------------------------------------


USER, ASSISTANT = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}


@pytest.mark.parametrize(
    ("messages", "told"),
    [
        ([], "at least one"),
        ("text", "at least one"),
        ([ASSISTANT], "turn 0 must be the user's"),
        ([USER, USER], "turn 1 must be the assistant's"),
        ([{"role": "system", "content": "Be kind."}], "followed by a user's text"),
        ([{"role": "system", "content": "Be kind."}, ASSISTANT], "followed by a user's text"),
        ([{"role": "user", "content": ["a"]}], "user's content must be text, got list"),
        ([USER, {"role": "assistant", "content": 3}], "text or a list of parts, got int"),
        ([USER, {"role": "assistant", "content": [{"type": "text"}]}], 'is {"type"'),
        ([USER, {"role": "assistant", "content": [{"type": "image", "text": ""}]}], "got 'image'"),
    ],
)
def test_a_chat_of_another_form_is_an_error(messages, told):
    with pytest.raises(ValueError, match=re.escape(told)):
        Tokenizer(BYTES).render_conversation({"messages": messages})


def test_a_completion_needs_an_assistant_to_complete():
    with pytest.raises(ValueError, match="the last message must be the assistant's, got role 'user'"):
        Tokenizer(BYTES).render_for_completion({"messages": [USER]})


def test_rendering_leaves_the_conversation_as_it_was():
    conversation = {"messages": [{"role": "system", "content": "Be kind."}, USER, ASSISTANT]}
    before = json.dumps(conversation)
    Tokenizer(BYTES).render_for_completion(conversation)
    assert json.dumps(conversation) == before


# ---- hostile files ------------------------------------------------------------------------------------------------


class Encoding:
    """Pickles as upstream's file does, with any state."""

    def __init__(self, state):
        self.state = state


class _Pickler(pickle._Pickler):
    def save(self, obj, save_persistent_id=True):
        if isinstance(obj, Encoding):
            self.write(b"\x8c\x0dtiktoken.core\x8c\x08Encoding\x93)\x81")
            super().save(obj.state)
            self.write(b"b")
        else:
            super().save(obj, save_persistent_id)


def pickled(state) -> bytes:
    file = io.BytesIO()
    _Pickler(file, protocol=4).dump(Encoding(state))
    return file.getvalue()


def load_bytes(tmp_path, data: bytes) -> Tokenizer:
    (tmp_path / "tokenizer.pkl").write_bytes(data)
    return tokenizers.load(tmp_path)


class Runs:
    """Pickles to a call of a function."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def test_the_pickles_made_here_are_read_when_they_are_honest(tmp_path):
    assert load_bytes(tmp_path, pickled(STATE)).vocab_size == 265


@pytest.mark.parametrize("place", ["whole", "rank", "special", "name"])
@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
def test_a_pickle_that_calls_something_is_refused_and_not_run(tmp_path, place, protocol):
    evil = Runs(open, str(tmp_path / "ran"), "w")
    states = {
        "rank": {**STATE, "mergeable_ranks": {**BYTES, b"ab": evil}},
        "special": {**STATE, "special_tokens": {**SPECIAL, "evil": evil}},
        "name": {**STATE, "name": evil},
    }
    data = pickle.dumps(evil, protocol) if place == "whole" else pickled(states[place])
    with pytest.raises(ValueError, match="it was not executed"):
        load_bytes(tmp_path, data)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("data", "told"),
    [
        (b"", "not a nanochat tokenizer"),
        (b"not a pickle", "not a nanochat tokenizer"),
        (b"\x80\x04\x8c\x08builtins\x8c\x04eval\x93.", r"refers to builtins\.eval"),
        (b"\x80\x04\x8c\x0dtiktoken.core\x8c\x08Encoding\x93.", "not a pickled tiktoken.Encoding"),
        (b"\x80\x04\x8c\x0dtiktoken.core\x8c\x08Encoding\x93)\x81.", "not a pickled tiktoken.Encoding"),
        (b"\x80\x04\x8c\x0dtiktoken.core\x8c\x08Encoding\x93}b.", "not a nanochat tokenizer"),
        (b"\x80\x04}r" + struct.pack("<I", 2**31) + b".", "opcode LONG_BINPUT"),
        (b"\x80\x04\x82\x01.", "opcode EXT1"),
        (b"\x80\x04Pid\n.", "opcode PERSID"),
        (b"\x80\x04\x8e" + struct.pack("<Q", 2**40) + b".", "not a nanochat tokenizer"),
        (b"\x80\x04" + b"(" * 10_000, "not a nanochat tokenizer"),
        (pickled(STATE)[:-500], "not a nanochat tokenizer"),
        (pickle.dumps({"mergeable_ranks": BYTES}), "not a pickled tiktoken.Encoding"),
    ],
)
def test_anything_but_a_tokenizer_is_refused(tmp_path, data, told):
    with pytest.raises(ValueError, match=told):
        load_bytes(tmp_path, data)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"mergeable_ranks": {b"a": 0}}, "expected 256.."),
        ({"mergeable_ranks": {**BYTES, b"ab": 300}}, r"must be 0\.\.256, each once"),
        ({"mergeable_ranks": {**BYTES, b"ab": 5}}, "each once"),
        ({"mergeable_ranks": {**BYTES, b"\x00": 1, b"\x01": 0}}, "single bytes in order"),
        ({"mergeable_ranks": {**BYTES, "ab": 256}}, "every token must be bytes"),
        ({"mergeable_ranks": {**BYTES, b"ab": "256"}}, "with an integer id"),
        ({"mergeable_ranks": "many"}, "mergeable_ranks must be a dict, got str"),
        ({"special_tokens": {}}, "special tokens must be"),
        ({"special_tokens": {**SPECIAL, "<|bos|>": 0}}, "special tokens must be"),
        ({"pat_str": "("}, "refuses the split pattern"),
        ({"pat_str": "a" * 100_000}, "the split pattern has 100000 characters"),
        ({"more": 1}, "with the fields name, pat_str"),
    ],
)
def test_a_state_that_is_not_a_tokenizer_is_refused(tmp_path, change, told):
    with pytest.raises(ValueError, match=told):
        load_bytes(tmp_path, pickled({**STATE, **change}))


PATTERNS = [
    PATTERN,
    PATTERN.replace("{1,2}", "{1,3}"),
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}]*[\p{Ll}\p{M}]+(?i:'s|'t|'ll)?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s+",
    r"\w+|[^\w\s]+|\s+",
    r"(?s).",
    r"[一-龥]|\d|\D",
]


@pytest.mark.parametrize("pattern", PATTERNS)
def test_split_patterns_of_tokenizers_are_read(tmp_path, pattern):
    text = "Don't say 12345 – 你好,\r\n\t x  "
    loaded = load_bytes(tmp_path, pickled({**STATE, "pat_str": pattern}))
    assert loaded.encode(text) == tiktoken.Encoding(
        "x", pat_str=pattern, mergeable_ranks=BYTES, special_tokens={}
    ).encode(text)


@pytest.mark.parametrize(
    ("pattern", "told"),
    [
        ("", "matches the empty string"),
        ("a*", "matches the empty string"),
        ("a|(b?|c)", "matches the empty string"),
        (r"(?=a)", "matches the empty string"),
        (r"\p{L}{65}", "the repetition {65}; at most 64"),
        ("|".join([r"\w{60}"] * 140), "expanded it has 8400 character classes"),
        (r"(?:\w{60}){60}", "expanded it has 3600 character classes"),
        (r"(?:a+)+", "nests unbounded repetitions"),
        ("(" * 20 + "a" + ")" * 20, "nested more than 16 levels deep"),
        ("a**", "repetition of a repetition"),
        (r"(a)\1", "is not supported in a split pattern"),
        (r"a\K", "is not supported in a split pattern"),
        ("a)", "unmatched parenthesis"),
        ("[a", "unclosed bracket"),
    ],
)
def test_split_patterns_that_cost_too_much_or_match_nothing_are_refused(pattern, told):
    with pytest.raises(ValueError, match=re.escape(told)):
        Tokenizer(BYTES, pattern=pattern)


def test_a_panic_of_the_regex_engine_is_an_error_as_any_other(capfd):
    tokenizer = Tokenizer(BYTES, pattern=r"(?:\w|\w\w)+(?=!)|\w|\W")
    with pytest.raises(ValueError, match="tiktoken failed on this text or split pattern"):
        tokenizer.encode("a" * 60)
    assert "panicked" in capfd.readouterr().err  # it was one


def test_a_file_that_is_too_large_is_not_read(tmp_path):
    with (tmp_path / "tokenizer.pkl").open("wb") as file:
        file.truncate(2**33)
    with pytest.raises(ValueError, match="8589934592 bytes"):
        tokenizers.load(tmp_path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"tokenizer\.pkl"):
        tokenizers.load(tmp_path)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        tokenizers.load(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("table", "told"),
    [
        (torch.ones(5, dtype=torch.int32), r"has shape \(5,\), the tokenizer needs \(265,\)"),
        (torch.ones(265), "one integer tensor, got torch.float32"),
        (torch.ones(265, dtype=torch.int32), "0 for the special tokens"),
        (-torch.ones(265, dtype=torch.int64), "must contain lengths"),
        ([1, 2, 3], "one integer tensor, got list"),
    ],
)
def test_a_table_of_another_form_is_refused(tmp_path, table, told):
    torch.save(table, tmp_path / "token_bytes.pt")
    with pytest.raises(ValueError, match=told):
        load_bytes(tmp_path, pickled(STATE))


def test_a_table_that_calls_something_is_refused_and_not_run(tmp_path):
    torch.save(Runs(open, str(tmp_path / "ran"), "w"), tmp_path / "token_bytes.pt")
    with pytest.raises(ValueError, match="weights_only=True"):
        load_bytes(tmp_path, pickled(STATE))
    assert not (tmp_path / "ran").exists()
