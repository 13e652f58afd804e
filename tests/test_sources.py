"""Text as users bring it: what is read, how it is divided, what is refused, and what is noticed when it changes."""

import gzip
import io
import json
import os
import resource
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from bridge.nanochat import contents, documents, lines, units
from bridge.nanochat.contents import DataChangedError
from bridge.nanochat.corpus import Corpus, changed
from bridge.nanochat.tokenizer import Tokenizer

TOKENIZER = Tokenizer({bytes([i]): i for i in range(256)})
MESSAGES = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
CHAT = TOKENIZER.decode(TOKENIZER.render_conversation({"messages": MESSAGES})[0][1:])


def corpus(spec: object, **kwargs) -> Corpus:
    return Corpus(str(spec), TOKENIZER, **{"split": "all", "row_len": 32, "lanes": 4, **kwargs})


def texts(spec: object, **kwargs) -> list[str]:
    return list(corpus(spec, **kwargs).documents())


def refusal(spec: object) -> str:
    """Return the error of reading a corpus; only a ValueError is a refusal."""
    try:
        texts(spec)
    except ValueError as error:
        return str(error)
    return "read"


def parquet(path: Path, columns: dict, **settings) -> Path:
    pyarrow.parquet.write_table(pyarrow.table(columns), path, **settings)
    return path


def json_lines(*values: object) -> bytes:
    return b"".join(json.dumps(value).encode() + b"\n" for value in values)


# ---- forms --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "data", "expected"),
    {
        "ndjson": ("a.ndjson", json_lines({"text": "one"}, {"text": "two"}), ["one", "two"]),
        "upper case": ("A.JSONL", json_lines({"text": "one"}), ["one"]),
        "upper case, packed": ("A.JSONL.GZ", gzip.compress(json_lines({"text": "one"}), mtime=0), ["one"]),
        "packed ndjson": ("a.ndjson.gz", gzip.compress(json_lines({"text": "one"}), mtime=0), ["one"]),
        "array": ("a.json", json.dumps([{"text": "one"}, {"text": ""}, {"text": "two"}]).encode(), ["one", "two"]),
        "indented array": ("a.json", json.dumps([{"text": "a\nb"}, "two"], indent=2).encode(), ["a\nb", "two"]),
        "packed array": ("a.json.gz", gzip.compress(b'[{"text": "one"} , {"text": "two"}]\n', mtime=0), ["one", "two"]),
        "array of chats": ("a.json", json.dumps([{"messages": MESSAGES}, MESSAGES]).encode(), [CHAT, CHAT]),
        "one chat": ("a.json", json.dumps(MESSAGES, indent=1).encode(), [CHAT]),
        "one object": ("a.json", json.dumps({"text": "one"}, indent=1).encode(), ["one"]),
        "lines named json": ("a.json", json_lines({"text": "one"}, {"text": "two"}), ["one", "two"]),
        "nanochat's own chats": ("a.jsonl", json_lines(MESSAGES, MESSAGES), [CHAT, CHAT]),
        "ShareGPT": (
            "a.jsonl",
            json_lines({"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]}),
            [CHAT],
        ),
        "strings": ("a.jsonl", json_lines("one", "two"), ["one", "two"]),
        "a byte order mark": ("a.jsonl", b"\xef\xbb\xbf" + json_lines({"text": "one"}), ["one"]),
        "windows' lines": ("a.txt", b"\xef\xbb\xbfone\r\ntwo\r\n", ["one\ntwo\n"]),
        "no suffix": ("README", b"[1] is a footnote, {2} is not JSON", ["[1] is a footnote, {2} is not JSON"]),
    }.values(),
)
def test_a_file_is_read_as_what_it_is(tmp_path, name, data, expected):
    (tmp_path / name).write_bytes(data)
    assert texts(tmp_path / name) == expected


def test_an_array_that_is_read_in_parts_is_whole(tmp_path, monkeypatch):
    values = [{"text": f"{i} é {'x' * (i * 997 % 5000)}"} for i in range(2000)]
    (tmp_path / "a.json").write_text(json.dumps(values, ensure_ascii=False), encoding="utf-8")
    assert texts(tmp_path / "a.json") == [value["text"] for value in values]
    monkeypatch.setattr(lines, "_IN_MEMORY", 100)
    assert corpus(tmp_path / "a.json").next_rows(3).tolist() == corpus(tmp_path / "a.json").next_rows(3).tolist()


STRUCTS = pyarrow.list_(pyarrow.struct([("role", pyarrow.string()), ("content", pyarrow.string())]))
COLUMNS = {
    "string": ("text", pyarrow.array(["one", None, "two", ""])),
    "large_string": ("text", pyarrow.array(["one", "two"], pyarrow.large_string())),
    "dictionary": ("text", pyarrow.array(["one", "two"]).dictionary_encode()),
    "messages": ("messages", pyarrow.array([MESSAGES, MESSAGES], STRUCTS)),
    "more fields": (
        "messages",
        pyarrow.array([[message | {"name": None, "id": 3} for message in MESSAGES]] * 2),
    ),
    "lists of a struct": (
        "messages",
        pyarrow.array([{"role": ["user", "assistant"], "content": ["Hi", "Hello"]}] * 2),
    ),
    "conversations": (
        "conversations",
        pyarrow.array([[{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]] * 2),
    ),
}


@pytest.mark.parametrize("kind", COLUMNS)
def test_parquet_as_datasets_writes_it_is_read(tmp_path, kind):
    name, column = COLUMNS[kind]
    parquet(tmp_path / "train-00000-of-00001.PARQUET", {"id": pyarrow.array(range(len(column))), name: column})
    assert texts(tmp_path) == (["one", "two"] if name == "text" else [CHAT, CHAT])


def test_text_goes_before_chats_and_chats_before_a_text_that_is_none(tmp_path):
    parquet(tmp_path / "a.parquet", {"messages": COLUMNS["messages"][1], "text": pyarrow.array(["one", "two"])})
    parquet(tmp_path / "b.parquet", {"messages": COLUMNS["messages"][1], "text": pyarrow.array([1, 2])})
    assert texts(tmp_path / "a.parquet") == ["one", "two"]
    assert texts(tmp_path / "b.parquet") == [CHAT, CHAT]


@pytest.mark.parametrize(
    ("columns", "told"),
    [
        (
            {"content": ["a"], "id": [1]},
            "no column 'text'; it has content, id. A document is a string in a column text",
        ),
        ({"text": [["a"]]}, "the column 'text' must contain strings, got list<"),
        (
            {"messages": ["a"]},
            "the column 'messages' must contain lists of messages with role and content, got string",
        ),
        ({"messages": [[{"role": "assistant", "content": "a"}]]}, "row group 0, row 0: turn 0 must be the user's"),
        ({"messages": [[{"role": "user", "content": None}]]}, "row group 0, row 0: turn 0: a user's content"),
    ],
)
def test_columns_without_documents_are_named(tmp_path, columns, told):
    parquet(tmp_path / "a.parquet", columns)
    with pytest.raises(ValueError, match=rf"a\.parquet.*{told}"):
        corpus(tmp_path)


def test_a_directory_says_where_its_parquet_is(tmp_path):
    (tmp_path / "data").mkdir()
    parquet(tmp_path / "data" / "train.parquet", {"text": ["a"]})
    with pytest.raises(FileNotFoundError, match=r"in its subdirectories: give '.*/\*\*/\*\.parquet'"):
        corpus(tmp_path)
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved" / "data-00000-of-00001.arrow").write_bytes(b"ARROW1")
    with pytest.raises(FileNotFoundError, match=r"Dataset\.to_parquet"):
        corpus(tmp_path / "saved")


@pytest.mark.parametrize(
    "data",
    [
        json_lines({"text": "one"}, {"text": "two"}),
        json_lines(MESSAGES),
        json.dumps([{"text": "one"}], indent=4).encode(),
        json.dumps({"prompt": "a", "answer": [1, 2]}, indent=2).encode(),
        b"\xef\xbb\xbf\n  " + json_lines({"text": "one"}),
        b'[\n{"te\\"xt": "one"},',
    ],
)
@pytest.mark.parametrize("name", ["a.txt", "a.md", "corpus"])
def test_json_under_the_name_of_prose_is_asked_about_and_read_when_that_is_meant(tmp_path, name, data):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError, match=rf"{name} looks like JSON.*\.jsonl.*\.json .*text:"):
        corpus(tmp_path / name)
    assert texts(f"text:{tmp_path / name}") == [data.decode("utf-8-sig")]


def test_a_form_before_a_path_says_how_to_read_it(tmp_path):
    (tmp_path / "a.txt").write_bytes(json_lines({"text": "one"}))
    assert texts(f"jsonl:{tmp_path}/*.txt") == ["one"]
    (tmp_path / "b.json").write_text("{}")
    assert texts(f"text:{tmp_path}/b.json") == ["{}"]


@pytest.mark.parametrize(
    ("name", "data", "told"),
    [
        ("a.txt", "Grüße".encode("latin-1"), "is not UTF-8 text: byte 2 is 0xfc"),
        ("a.txt", "Hello".encode("utf-16"), "UTF-16 text: save it as UTF-8"),
        ("a.txt", "Hello".encode("utf-16-le"), "byte 1 is 0x00, as in UTF-16"),
        ("a.jsonl", '{"text": "a"}'.encode("utf-16"), "UTF-16 text: save it as UTF-8"),
        ("a.json", '["\xfc"]'.encode("latin-1"), "is not UTF-8"),
        ("a.txt", gzip.compress(b"a", mtime=0), r"gzip-compressed: name it \.jsonl\.gz"),
        ("a.jsonl", gzip.compress(b"a", mtime=0), r"gzip-compressed: name it \.jsonl\.gz"),
        ("a.txt.gz", gzip.compress(b"a", mtime=0), "is compressed; .*: unpack it with gunzip"),
        ("a.jsonl.zst", b"\x28\xb5\x2f\xfd", "is compressed; .*: unpack it with zstd -d"),
        ("a.txt", b"PAR1", r"a parquet file: name it \.parquet"),
        ("a.json", b'[{"text": "one"} {"text": "two"}]', "element 1: expected ',' or ']' after it, got '{'"),
        ("a.json", b'[{"text": "one"},', "element 2: Expecting value"),
        ("a.json", b'[{"text": "one"}] x', "expected nothing after the JSON value, got 'x'"),
        ("a.json", b'{"train": [1, 2]}', "element 1: expected .*; its keys are 'train'"),
        ("a.jsonl", b'{"prompt": "a", "answer": "b"}', "line 1: expected .*; its keys are 'prompt', 'answer'"),
        ("a.parquet", b"PAR1PARE" + bytes(20) + b"PARE", "its footer is encrypted"),
        ("a.parquet", b"PAR1", "it does not end with PAR1"),
    ],
)
def test_unreadable_data_is_reported_in_one_line(tmp_path, name, data, told):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError, match=told) as caught:
        corpus(tmp_path / name)
    assert str(tmp_path / name) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("damage", range(0, 600, 7))
def test_a_parquet_file_with_a_byte_changed_is_read_or_named(tmp_path, damage):
    parquet(tmp_path / "a.parquet", {"text": [f"document {i}" for i in range(40)]}, row_group_size=20)
    data = bytearray((tmp_path / "a.parquet").read_bytes())
    data[-1 - damage % len(data)] ^= 0x55
    (tmp_path / "a.parquet").write_bytes(data)
    told = refusal(tmp_path)
    assert told == "read" or told.startswith(str(tmp_path / "a.parquet"))
    assert "\n" not in told


def test_a_document_above_16_mib_is_refused_and_one_below_is_read_in_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr(documents, "PIECE", 100)
    text = "".join(f"paragraph {i} of a book.\n\n" for i in range(40))
    (tmp_path / "a.jsonl").write_bytes(json_lines({"text": text}, {"text": "x" * 250}))
    found = texts(tmp_path / "a.jsonl")
    assert "".join(found) == text + "x" * 250
    assert max(map(len, found)) <= 100
    assert all(piece.endswith("\n\n") for piece in found[:-3])
    (tmp_path / "b.jsonl").write_bytes(json_lines({"text": "x" * (documents.MAX_DOCUMENT + 1)}))
    with pytest.raises(ValueError, match="line 1 is longer than 16 MiB"):
        corpus(tmp_path / "b.jsonl")
    parquet(
        tmp_path / "c.parquet", {"text": ["x" * (documents.MAX_DOCUMENT + 1)]}, compression="none", use_dictionary=False
    )
    with pytest.raises(ValueError, match="row group 0, row 0: it is longer than 16 MiB"):
        texts(tmp_path / "c.parquet")


def test_a_large_text_file_is_read_in_pieces_that_make_it_up(tmp_path, monkeypatch):
    monkeypatch.setattr(units, "PIECE", 64)
    text = "".join(f"Zeile {i} mit Grüßen, 日本語 und mehr\r\n" for i in range(50)) + "é" * 200 + "日" * 99
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbf" + text.encode())
    found = texts(tmp_path / "a.txt")
    assert "".join(found) == text.replace("\r\n", "\n")
    assert max(len(piece.encode()) for piece in found) <= 64
    (tmp_path / "a.txt").write_bytes(text.encode() + b"\xff")
    with pytest.raises(ValueError, match=f"byte {len(text.encode())} is 0xff"):
        corpus(tmp_path / "a.txt")


# ---- what is held out ---------------------------------------------------------------------------------------------


def sides(spec: object, **kwargs) -> tuple[list[str], list[str]]:
    return texts(spec, split="train", **kwargs), texts(spec, split="heldout", **kwargs)


PARAGRAPHS = "".join(f"paragraph {i} has some words.\n\n" for i in range(300))


@pytest.mark.parametrize("form", ["a.txt", "a.jsonl", "a.jsonl.gz", "a.json", "a.parquet"])
def test_of_a_single_document_the_last_share_is_held_out(tmp_path, form):
    path = tmp_path / form
    if form == "a.txt":
        path.write_text(PARAGRAPHS)
    elif form == "a.parquet":
        parquet(path, {"text": [PARAGRAPHS]})
    else:
        data = json.dumps([{"text": PARAGRAPHS}] if form == "a.json" else {"text": PARAGRAPHS}).encode()
        path.write_bytes(gzip.compress(data) if form.endswith("gz") else data)
    train, heldout = sides(path)
    assert train[0] + heldout[0] == PARAGRAPHS
    assert train[0].endswith("\n\n")
    assert 0.04 < len(heldout[0]) / len(PARAGRAPHS) < 0.06
    assert texts(path) == [PARAGRAPHS]
    assert corpus(path, split="train").split_by_place


def test_the_share_of_a_file_in_pieces_is_at_its_end(tmp_path, monkeypatch):
    monkeypatch.setattr(units, "PIECE", 1000)
    (tmp_path / "a.txt").write_text(PARAGRAPHS)
    train, heldout = sides(tmp_path / "a.txt", heldout_fraction=0.25)
    assert "".join(train + heldout) == PARAGRAPHS
    assert 0.24 < sum(map(len, heldout)) / len(PARAGRAPHS) < 0.26


def test_of_a_few_documents_a_share_of_each_is_held_out_and_of_many_whole_ones(tmp_path):
    for i in range(3):
        (tmp_path / f"{i}.txt").write_text(f"{i} {PARAGRAPHS}")
    train, heldout = sides(f"{tmp_path}/*.txt")
    assert [a + b for a, b in zip(train, heldout, strict=True)] == [f"{i} {PARAGRAPHS}" for i in range(3)]
    for i in range(3, 80):
        (tmp_path / f"{i}.txt").write_text(f"{i} {PARAGRAPHS}")
    train, heldout = sides(f"{tmp_path}/*.txt")
    assert sorted(train + heldout) == sorted(f"{i} {PARAGRAPHS}" for i in range(80))
    assert train
    assert heldout


def test_of_a_single_chat_the_last_turns_are_held_out(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(json_lines(MESSAGES * 10))
    train, heldout = sides(tmp_path / "a.jsonl", heldout_fraction=0.2)
    assert (train[0].count("Hi"), heldout[0].count("Hi")) == (8, 2)
    assert heldout[0].startswith("<|user_start|>")
    (tmp_path / "a.jsonl").write_bytes(json_lines(MESSAGES))
    with pytest.raises(ValueError, match="no document in its heldout split; its documents are too short to be divided"):
        corpus(tmp_path / "a.jsonl", split="heldout")


def test_a_document_goes_to_the_same_side_in_every_form(tmp_path):
    chats = [[{"role": "user", "content": f"{i}"}, {"role": "assistant", "content": "a"}] for i in range(60)]
    (tmp_path / "a.jsonl").write_bytes(json_lines(*({"messages": chat, "source": "x"} for chat in chats)))
    (tmp_path / "b.jsonl").write_bytes(json_lines(*chats))
    parquet(tmp_path / "c.parquet", {"messages": pyarrow.array(chats, STRUCTS)})
    found = [set(texts(tmp_path / name, split="heldout")) for name in ("a.jsonl", "b.jsonl", "c.parquet")]
    assert found[0] == found[1] == found[2]
    assert found[0]


# ---- data that changes --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["a.txt", "a.jsonl", "a.jsonl.gz", "a.json", "a.parquet"])
def test_other_text_of_the_same_size_has_another_fingerprint_and_is_named(tmp_path, form):
    def write(word: str) -> int:
        values = [{"text": f"{word} {i}"} for i in range(50)]
        if form == "a.txt":
            (tmp_path / form).write_text(f"{word} {PARAGRAPHS}")
        elif form == "a.parquet":
            parquet(tmp_path / form, {"text": [value["text"] for value in values]}, compression="none")
        elif form == "a.json":
            (tmp_path / form).write_text(json.dumps(values))
        else:
            data = json_lines(*values)
            (tmp_path / form).write_bytes(gzip.compress(data, 0, mtime=0) if form.endswith("gz") else data)
        return (tmp_path / form).stat().st_size

    assert write("lamp") == write("lamp")
    before = corpus(tmp_path / form)
    again = corpus(tmp_path / form)
    assert (before.fingerprint, before.files) == (again.fingerprint, again.files)
    write("tree")
    after = corpus(tmp_path / form)
    assert after.fingerprint != before.fingerprint
    assert changed(before.files, after.files) == f"{form} has changed"


@pytest.mark.parametrize("place", ["start", "footer", "sample"])
def test_a_file_too_large_to_be_hashed_whole_is_sampled(tmp_path, monkeypatch, place):
    for name, value in (("WHOLE", 2**14), ("EDGE", 2**12), ("SAMPLE", 2**10)):
        monkeypatch.setattr(contents, name, value)
    path = parquet(tmp_path / "a.parquet", {"text": [f"{i} lamp" for i in range(20_000)]}, compression="none")
    data = bytearray(path.read_bytes())
    before = contents.Content(path)
    assert contents.Content(path).digest == before.digest
    samples = contents._samples(len(data))
    assert len(samples) == contents.SAMPLES
    assert all(start >= contents.EDGE and start + length <= len(data) - contents.EDGE for start, length in samples)
    at = {"start": 100, "footer": len(data) - 20, "sample": samples[3][0] + 5}[place]
    data[at] ^= 1
    path.write_bytes(data)
    assert contents.Content(path).digest != before.digest
    with pytest.raises(DataChangedError, match=r"a\.parquet has changed"):
        before.verify()


def test_files_that_came_and_went_are_named():
    before, now = [["a", "1"], ["b", "2"], ["c", "3"]], [["a", "1"], ["b", "9"], ["d", "4"]]
    assert changed(before, before) == ""
    assert changed(before, now) == "b has changed, c is missing, d is new"
    assert changed(before, before[::-1]) == "its files have another order"
    many = [[str(i), "0"] for i in range(9)]
    assert changed(many, []).endswith("4 is missing and 4 more")


def test_many_files_are_listed_in_groups(tmp_path):
    for i in range(600):
        (tmp_path / f"{i:03}.txt").write_text(f"text {i}")
    found = corpus(f"{tmp_path}/*.txt").files
    assert len(found) == 200
    assert found[0][0] == "000.txt to 002.txt (3 files)"
    (tmp_path / "004.txt").write_text("other")
    assert changed(found, corpus(f"{tmp_path}/*.txt").files) == "003.txt to 005.txt (3 files) has changed"


@pytest.mark.parametrize("form", ["a.txt", "a.jsonl", "a.parquet"])
@pytest.mark.parametrize(
    ("harm", "told"),
    [("other", "has changed"), ("short", "has become shorter|has changed"), ("gone", "has disappeared")],
)
def test_a_file_that_changes_while_it_is_read_is_noticed(tmp_path, form, harm, told):
    path = tmp_path / form

    def write(word: str) -> None:
        if form == "a.txt":
            path.write_text(f"{word} {PARAGRAPHS}")
        elif form == "a.jsonl":
            path.write_bytes(json_lines(*({"text": f"{word} {i}"} for i in range(50))))
        else:
            parquet(path, {"text": [f"{word} {i}" for i in range(50)]}, compression="none", row_group_size=10)

    write("lamp")
    reader = corpus(path, split="train")
    reader.next_rows(2)
    if harm == "gone":
        path.unlink()
    elif harm == "short":
        path.write_bytes(path.read_bytes()[:-30])
    else:
        write("tree")
    with pytest.raises(DataChangedError, match=rf"{form} ({told}) since this run began to read it"):
        reader.next_rows(1000)


def test_a_file_that_was_only_touched_is_read_on(tmp_path, monkeypatch):
    path = parquet(tmp_path / "a.parquet", {"text": [f"lamp {i}" for i in range(50)]}, row_group_size=10)
    reader = corpus(path, split="train")
    os.utime(path, ns=(1, 1))
    reader.next_rows(1000)
    monkeypatch.setattr(contents, "WHOLE", 100)
    monkeypatch.setattr(contents, "EDGE", 100)
    monkeypatch.setattr(contents, "SAMPLE", 10)
    reader = corpus(path, split="train")
    os.utime(path, ns=(2, 2))
    with pytest.warns(UserWarning, match="was written to while in use"):
        reader.next_rows(1000)


def test_a_changed_module_of_the_standard_library_is_noticed(monkeypatch):
    parts = [unit for unit in units.find_units("stdlib", "all", 0.05) if unit.name.startswith("text json/decoder.py")]
    assert len(list(parts[0].read())) == 1
    monkeypatch.setattr("tokenize.open", lambda file: io.StringIO("other"))
    with pytest.raises(DataChangedError, match=r"json/decoder\.py of the standard library has changed"):
        list(parts[0].read())


# ---- paths and the machine ----------------------------------------------------------------------------------------


def test_home_and_variables_are_replaced(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("one")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("MY_TEXT", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    for spec in ("~/a.txt", "$MY_TEXT/a.txt", "${MY_TEXT}/*.txt", "a.txt", "./*.txt"):
        assert texts(spec) == ["one"]
    (tmp_path / "$NOT_SET.txt").write_text("two")
    assert texts("$NOT_SET.txt") == ["two"]


def test_unknown_users_and_variables_are_named(monkeypatch):
    monkeypatch.delenv("NOT_SET", raising=False)
    with pytest.raises(FileNotFoundError, match="'~nosuchuser/x': no home directory of '~nosuchuser' is known"):
        corpus("~nosuchuser/x")
    with pytest.raises(ValueError, match="contains the environment variable NOT_SET, which is not set"):
        corpus("$NOT_SET/x")


@pytest.mark.parametrize("spec", ["stdlib", "{}/*.txt", "{}/a.txt", "{}/a.jsonl", "{}/a.parquet"])
def test_too_many_open_files_are_reported_and_nothing_is_left_out(tmp_path, spec):
    (tmp_path / "a.txt").write_text("one")
    (tmp_path / "a.jsonl").write_bytes(json_lines({"text": "one"}))
    parquet(tmp_path / "a.parquet", {"text": ["one"]})
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (1, before[1]))
    try:
        with pytest.raises((OSError, ValueError), match="Too many open files"):
            corpus(spec.format(tmp_path))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
