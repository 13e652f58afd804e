"""Rows hold the documents, in an order that the seed alone decides and that a saved position continues."""

import gzip
import itertools
import json
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from safetensors.numpy import load_file

from bridge.nanochat import lines, units
from bridge.nanochat import tokenizer as tokenizers
from bridge.nanochat.corpus import Corpus, bestfit_rows, whole_position
from bridge.nanochat.loss import assistant_tokens
from bridge.nanochat.tokenizer import Tokenizer

ROOT = Path(__file__).resolve().parents[1]
TOKENIZER = Tokenizer({bytes([i]): i for i in range(256)})
BOS = TOKENIZER.bos_token_id


def document(i: int) -> str:
    """A text of its own length that tells its number wherever it is cut."""
    return f"[{i}]" * (3 + i * 7 % 50)


def write_texts(folder: Path, count: int = 40) -> str:
    folder.mkdir(exist_ok=True)
    for i in range(count):
        (folder / f"{i:03}.txt").write_text(document(i))
    return str(folder / "*.txt")


def write_shard(file: Path, texts: list[str], row_group_size: int = 4, column: str = "text") -> None:
    file.parent.mkdir(exist_ok=True)
    table = pyarrow.table({column: texts})
    pyarrow.parquet.write_table(table, file, row_group_size=row_group_size)


def write_jsonl(file: Path, texts: list[str]) -> None:
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    file.write_bytes(gzip.compress(lines.encode()) if file.suffix == ".gz" else lines.encode())


@pytest.fixture(params=["text", "parquet", "jsonl", "jsonl.gz"])
def spec(request, tmp_path, monkeypatch) -> str:
    """Forty documents in each of the forms."""
    texts = [document(i) for i in range(40)]
    monkeypatch.setattr(lines, "LINES_PER_UNIT", 4)
    if request.param == "text":
        return write_texts(tmp_path / "texts")
    if request.param == "parquet":
        write_shard(tmp_path / "a.parquet", texts[:18])
        write_shard(tmp_path / "b.parquet", texts[18:])
        return str(tmp_path)
    write_jsonl(tmp_path / f"all.{request.param}", texts)
    return str(tmp_path / f"all.{request.param}")


def corpus(spec: str, **kwargs) -> Corpus:
    return Corpus(spec, TOKENIZER, **{"split": "all", "row_len": 32, "lanes": 4, **kwargs})


# ---- rows ---------------------------------------------------------------------------------------------------------


def test_rows_start_with_bos_and_hold_the_documents_in_one_piece(spec):
    reader = corpus(spec, lanes=1)
    count = len(list(reader.documents()))
    rows = reader.next_rows(600)
    assert rows.dtype == np.int32
    assert rows.shape == (600, 32)
    assert (rows[:, 0] == BOS).all()
    # Without the BOS the lane's stream is document after document.
    text = TOKENIZER.decode(rows[rows != BOS].tolist())
    at, order = 0, []
    while len(order) < 2 * count:
        number = int(text[at + 1 : text.index("]", at)])
        assert text.startswith(document(number), at)
        at += len(document(number))
        order.append(number)
    assert sorted(order[:count]) == sorted(order[count:]) == list(range(40))
    assert order[:count] != order[count:]


def test_a_document_starts_with_one_bos_wherever_it_starts(tmp_path):
    (tmp_path / "a.txt").write_text("aaaa")
    rows = corpus(str(tmp_path / "a.txt"), row_len=5).next_rows(3)
    assert rows.tolist() == [[BOS, *b"aaaa"]] * 3
    rows = corpus(str(tmp_path / "a.txt"), row_len=4).next_rows(3)
    assert rows.tolist() == [[BOS, *b"aaa"], [BOS, *b"a", BOS, *b"a"], [BOS, *b"aaa"]]


def test_near_rows_come_from_many_documents(tmp_path):
    rows = corpus(write_texts(tmp_path), lanes=8, row_len=6).next_rows(8)
    assert len({row.tobytes() for row in rows}) == 8


def test_the_order_depends_on_the_seed_alone(spec):
    first, same, other = (corpus(spec, seed=seed).next_rows(50) for seed in (3, 3, 4))
    assert np.array_equal(first, same)
    assert not np.array_equal(first, other)


@pytest.mark.parametrize("taken", [0, 1, 7, 50, 333])
def test_rows_after_seek_are_the_rows_without_interruption(spec, taken):
    whole = corpus(spec, seed=1)
    whole.next_rows(taken)
    position = json.loads(json.dumps(whole.position()))
    expected = whole.next_rows(60)
    resumed = corpus(spec, seed=1)
    resumed.next_rows(13)
    resumed.seek(position)
    assert np.array_equal(resumed.next_rows(60), expected)
    assert resumed.position() == whole.position()


def test_rows_do_not_depend_on_how_many_are_asked_for_at_once(spec):
    reader = corpus(spec)
    assert np.array_equal(corpus(spec).next_rows(30), np.concatenate([reader.next_rows(n) for n in (1, 9, 0, 20)]))


def test_processes_share_the_rows_of_one(spec):
    alone = corpus(spec).next_rows(40)
    shared = [corpus(spec, process_index=i, process_count=2).next_rows(20) for i in range(2)]
    assert np.array_equal(alone[0::2], shared[0])
    assert np.array_equal(alone[1::2], shared[1])


def test_the_rows_of_data_shards_do_not_depend_on_the_number_of_processes(spec):
    whole = corpus(spec, lanes=8, data_shards=4).next_rows(40)
    assert np.array_equal(whole, corpus(spec, lanes=8).next_rows(40))
    for count in (2, 4):
        parts = [corpus(spec, lanes=8, data_shards=4, process_index=i, process_count=count) for i in range(count)]
        rows = [part.next_rows(40 // count) for part in parts]
        assert [shard for part in parts for shard in part.own_shards] == [0, 1, 2, 3]
        for number, part in enumerate(parts):
            own = np.isin(np.arange(40) % 4, part.own_shards)
            assert np.array_equal(rows[number], whole[own])


@pytest.mark.parametrize("before", [1, 2, 4])
@pytest.mark.parametrize("after", [1, 2, 4])
def test_another_number_of_processes_goes_on_with_the_same_rows(spec, before, after):
    parts = [corpus(spec, lanes=8, data_shards=4, process_index=i, process_count=before) for i in range(before)]
    for part in parts:
        part.next_rows(5 * len(part.own_shards))
    position = whole_position([part.position() for part in parts])
    expected = corpus(spec, lanes=8, data_shards=4).next_rows(60)[20:]
    for number in range(after):
        part = corpus(spec, lanes=8, data_shards=4, process_index=number, process_count=after)
        part.seek(json.loads(json.dumps(position)))
        own = np.isin(np.arange(40) % 4, part.own_shards)
        assert np.array_equal(part.next_rows(40 // after), expected[own])


def test_a_position_of_an_earlier_version_is_read(spec):
    reader = corpus(spec)
    reader.next_rows(13)
    position = reader.position()
    earlier = {key: value for key, value in position.items() if key != "data_shards"} | {"process": [0, 1]}
    later = corpus(spec)
    later.seek(earlier)
    assert np.array_equal(later.next_rows(9), reader.next_rows(9))


def test_shards_that_cannot_be_divided_are_refused(spec):
    with pytest.raises(ValueError, match="4 data shards cannot be divided among 3 processes"):
        corpus(spec, lanes=8, data_shards=4, process_count=3)


def test_every_lane_has_a_unit_of_its_own(tmp_path):
    rows = corpus(write_texts(tmp_path, 3), lanes=32, row_len=6).next_rows(2)
    assert not np.array_equal(rows[0], rows[1])
    with pytest.raises(ValueError, match="2 lanes over 3 units cannot be divided into 3 data shards"):
        corpus(write_texts(tmp_path, 3), lanes=32, process_count=3)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"seed": 2}, "seed 1 \\(here 2\\)"),
        ({"row_len": 33}, "row_len 32 \\(here 33\\)"),
        ({"split": "train"}, "corpus "),
        ({"lanes": 2}, "lane_count 4 \\(here 2\\)"),
        ({"process_index": 1, "process_count": 2}, "data_shards 1 \\(here 2\\)"),
    ],
)
def test_a_position_of_another_corpus_is_refused(tmp_path, change, told):
    spec = write_texts(tmp_path)
    position = corpus(spec, seed=1).position()
    with pytest.raises(ValueError, match=told):
        corpus(spec, **{"seed": 1, **change}).seek(position)


def test_a_position_of_other_data_or_another_tokenizer_is_refused(tmp_path):
    spec = write_texts(tmp_path)
    position = corpus(spec).position()
    other = tokenizers.train(["lamp lamp lamp lamp"], 267)
    with pytest.raises(ValueError, match="tokenizer "):
        Corpus(spec, other, split="all", row_len=32, lanes=4).seek(position)
    (tmp_path / "000.txt").write_text("changed")
    with pytest.raises(ValueError, match="corpus "):
        corpus(spec).seek(position)


def test_the_fingerprint_names_the_data_wherever_it_lies(tmp_path):
    here, there = (corpus(write_texts(tmp_path / name)).fingerprint for name in ("here", "there"))
    assert here == there
    assert here != corpus(write_texts(tmp_path / "more", 41)).fingerprint


# ---- splits -------------------------------------------------------------------------------------------------------


def test_train_and_heldout_share_nothing_and_make_up_all(spec):
    train, heldout, everything = (
        set(corpus(spec, split=split, heldout_fraction=0.3).documents()) for split in ("train", "heldout", "all")
    )
    assert train
    assert heldout
    assert not train & heldout
    assert train | heldout == everything == {document(i) for i in range(40)}


def test_a_document_is_held_out_in_whatever_form_it_comes(tmp_path):
    texts = [document(i) for i in range(40)]
    write_jsonl(tmp_path / "all.jsonl", texts)
    write_shard(tmp_path / "all.parquet", texts)
    specs = (str(tmp_path / "all.jsonl"), str(tmp_path / "all.parquet"), write_texts(tmp_path))
    heldout = [set(corpus(spec, split="heldout", heldout_fraction=0.3).documents()) for spec in specs]
    assert heldout[0] == heldout[1] == heldout[2]


def test_one_pass_reads_each_document_once_and_does_not_move_the_rows(spec):
    reader = corpus(spec)
    rows = list(reader.one_pass())
    assert all(row[0] == BOS and row.shape == (32,) for row in rows)
    read = sum(int((row != BOS).sum()) for row in rows)
    total = sum(len(document(i)) for i in range(40))
    assert total - 32 < read <= total
    assert np.array_equal(reader.next_rows(9), corpus(spec).next_rows(9))


def test_one_pass_is_the_same_for_every_seed_and_can_be_cut(spec):
    whole = np.stack(list(corpus(spec, seed=1).one_pass()))
    assert np.array_equal(np.stack(list(corpus(spec, seed=2).one_pass(5))), whole[:5])
    shares = [np.stack(list(corpus(spec, process_index=i, process_count=2).one_pass(3))) for i in range(2)]
    assert np.array_equal(shares[0], whole[0:6:2])
    assert np.array_equal(shares[1], whole[1:6:2])


# ---- nanochat's own data ------------------------------------------------------------------------------------------


def test_the_last_shard_of_a_nanochat_directory_is_held_out(tmp_path):
    folder = tmp_path / "base_data_climbmix"
    for i in range(3):
        write_shard(folder / f"shard_{i:05}.parquet", [f"shard {i} document {j}" for j in range(6)])
    assert {text[:7] for text in corpus(str(folder), split="train").documents()} == {"shard 0", "shard 1"}
    assert {text[:7] for text in corpus(str(folder), split="heldout").documents()} == {"shard 2"}
    assert len(list(corpus(str(folder)).documents())) == 18
    # A shard named by itself keeps its part.
    assert len(list(corpus(str(folder / "shard_00002.parquet"), split="heldout").documents())) == 6
    with pytest.raises(ValueError, match="no document in its train split"):
        corpus(str(folder / "shard_00002.parquet"), split="train")


@pytest.mark.parametrize(("split", "name"), [("train", "train"), ("heldout", "val")])
def test_best_fit_rows_are_upstreams(goldens, split, name):
    base = goldens / "basedir-2026-07-03-92d63d4"
    tokenizer = tokenizers.load(base / "nanochat" / "tokenizer")
    reader = Corpus(str(base / "nanochat" / "base_data_climbmix"), tokenizer, split=split, row_len=129)
    golden = load_file(base / "golden.safetensors")
    inputs, targets = golden[f"{name}_inputs"], golden[f"{name}_targets"]
    rows = bestfit_rows(itertools.cycle(list(reader.documents())), tokenizer, 129)
    rows = np.stack(list(itertools.islice(rows, inputs.shape[0] * inputs.shape[1]))).reshape(*inputs.shape[:2], 129)
    assert np.array_equal(rows[..., :-1], inputs)
    assert np.array_equal(rows[..., 1:], targets)


def test_best_fit_ends_with_the_documents():
    rows = list(bestfit_rows(["aa", "bbbb", "c"], TOKENIZER, 5))
    assert [row.tolist() for row in rows] == [[BOS, *b"bbbb"], [BOS, *b"aa", BOS, *b"c"]]
    assert list(bestfit_rows(["aa"], TOKENIZER, 5)) == []


# ---- chats --------------------------------------------------------------------------------------------------------


def test_chats_are_rendered(tmp_path):
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    (tmp_path / "chats.jsonl").write_text(json.dumps({"messages": messages}) + "\n\n" + json.dumps({"text": "plain"}))
    reader = corpus(str(tmp_path / "chats.jsonl"), row_len=12)
    ids, _ = TOKENIZER.render_conversation({"messages": messages})
    assert list(reader.documents()) == [TOKENIZER.decode(ids[1:]), "plain"]
    assert reader.next_rows(1)[0].tolist() == ids[:12]


# ---- the standard library -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stdlib_units() -> list[units.Unit]:
    return units.find_units("stdlib", "all", 0.05)


def test_the_standard_library_is_source_and_documentation(stdlib_units):
    names = {unit.name.split()[1] for unit in stdlib_units}
    assert {"json/decoder.py", "argparse.py", "help(math)", "topic"} <= names
    assert not any("-packages" in name for name in names)
    texts = [text for unit in stdlib_units for text in unit.read()]
    assert len(set(texts)) == len(texts)
    assert sum(map(len, texts)) > 10_000_000
    helps = "".join(text for unit in stdlib_units if "help(" in unit.name for text in unit.read())
    assert "Return the arc cosine (measured in radians) of x." in helps
    assert " at 0x" not in helps
    assert sys.prefix not in helps


def test_the_standard_library_is_the_same_in_every_process(stdlib_units):
    code = "from bridge.nanochat import units; print(*(u.name for u in units.find_units('stdlib', 'all', 0)), sep='#')"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip().split("#") == [unit.name for unit in stdlib_units]


def test_the_standard_library_is_split_by_document(stdlib_units):
    train, heldout = ({u.name for u in units.find_units("stdlib", split, 0.05)} for split in ("train", "heldout"))
    assert not train & heldout
    assert train | heldout == {u.name for u in stdlib_units}
    assert 0.02 < len(heldout) / len(stdlib_units) < 0.08


def test_several_sources_make_one_corpus(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", ["from lines"])
    (tmp_path / "b.txt").write_text("from a file")
    spec = f"{tmp_path}/a.jsonl, {tmp_path}/b.txt"
    assert list(corpus(spec).documents()) == ["from lines", "from a file"]


# ---- what can be wrong --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("spec", "told"), [("nowhere/*.txt", "nowhere"), ("no/where.parquet", "no file matches")])
def test_a_spec_that_matches_nothing_is_an_error(spec, told):
    with pytest.raises(FileNotFoundError, match=told):
        corpus(spec)


def test_a_directory_without_shards_asks_for_a_glob(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"\*\*/\*\.py"):
        corpus(str(tmp_path))


@pytest.mark.parametrize("spec", ["", " , "])
def test_an_empty_spec_is_an_error(spec):
    with pytest.raises(ValueError, match="contains no text"):
        corpus(spec)


def test_empty_files_make_no_corpus(tmp_path):
    (tmp_path / "a.txt").write_text("")
    write_jsonl(tmp_path / "b.jsonl", [""])
    with pytest.raises(ValueError, match="contains no text"):
        corpus(f"{tmp_path}/a.txt,{tmp_path}/b.jsonl")


def test_a_split_without_documents_is_an_error(tmp_path):
    (tmp_path / "a.txt").write_text("alone")
    with pytest.raises(ValueError, match="no document in its heldout split"):
        corpus(str(tmp_path / "a.txt"), split="heldout", heldout_fraction=0.0)


@pytest.mark.parametrize(
    ("line", "told"),
    [
        (b'{"text": "a"', "line 3: Expecting"),
        (b'{"txt": "a"}', "line 3: expected"),
        (b'{"text": 5}', "line 3: expected"),
        (b"[1, 2]", "line 3: expected"),
        (b'{"text": "\xff"}', "line 3: 'utf-8' codec"),
        (b"[" * 100_000, "line 3: "),
        (b'{"messages": [{"role": "assistant", "content": "a"}]}', "line 3: turn 0 must be the user's"),
    ],
)
def test_a_broken_line_is_named_before_anything_is_read(tmp_path, line, told):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "first"}\n{"text": "second"}\n' + line + b"\n")
    with pytest.raises(ValueError, match=rf"a\.jsonl, {told}"):
        corpus(str(tmp_path / "a.jsonl"))


def test_a_truncated_gzip_file_is_named(tmp_path):
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(b'{"text": "first"}\n' * 1000)[:-20])
    with pytest.raises(ValueError, match=r"a\.jsonl\.gz cannot be read"):
        corpus(str(tmp_path / "a.jsonl.gz"))
    (tmp_path / "a.jsonl.gz").write_bytes(zlib.compress(b"no gzip"))
    with pytest.raises(ValueError, match=r"a\.jsonl\.gz cannot be read"):
        corpus(str(tmp_path / "a.jsonl.gz"))


def test_text_that_is_not_utf8_is_named_with_its_byte(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"abc\xff")
    with pytest.raises(ValueError, match=r"a\.txt is not UTF-8 text: byte 3 is 0xff"):
        corpus(str(tmp_path / "a.txt"))


def test_a_parquet_file_of_another_form_is_named(tmp_path):
    write_shard(tmp_path / "a.parquet", ["x"], column="content")
    with pytest.raises(ValueError, match=r"a\.parquet has no column 'text'; it has content"):
        corpus(str(tmp_path))
    pyarrow.parquet.write_table(pyarrow.table({"text": [1, 2]}), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match="must contain strings, got int64"):
        corpus(str(tmp_path))
    (tmp_path / "a.parquet").write_bytes(b"PAR1 nothing of the kind PAR1")
    with pytest.raises(ValueError, match="is not a parquet file"):
        corpus(str(tmp_path))


def test_a_damaged_row_group_is_named(tmp_path):
    texts = [f"{i} {'lamp' * 50}" for i in range(100)]
    write_shard(tmp_path / "a.parquet", texts, row_group_size=100)
    data = bytearray((tmp_path / "a.parquet").read_bytes())
    data[4:400] = b"\xff" * 396
    (tmp_path / "a.parquet").write_bytes(data)
    with pytest.raises(ValueError, match=r"a\.parquet, row group 0: cannot be read"):
        corpus(str(tmp_path))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"row_len": 1}, "row_len must be at least 2"),
        ({"lanes": 0}, "lanes must be at least 1"),
        ({"heldout_fraction": 1.5}, "heldout_fraction must be in"),
        ({"process_index": 2, "process_count": 2}, r"process_index must be in 0\.\.1, got 2"),
    ],
)
def test_arguments_out_of_range_are_errors(tmp_path, change, told):
    with pytest.raises(ValueError, match=told):
        corpus(write_texts(tmp_path), **change)


def test_chats_of_the_standard_library_ask_and_answer_and_differ_in_training_and_held_out():
    train, heldout = (units.find_units("stdlib_chats", split, 0.05) for split in ("train", "heldout"))
    assert not {u.name for u in train} & {u.name for u in heldout}
    assert 0.02 < len(heldout) / len([*train, *heldout]) < 0.08
    chats = [chat for unit in (*train, *heldout) for chat in unit.read()]
    assert len(chats) > 1500
    said = {chat["messages"][0]["content"]: chat["messages"][1]["content"] for chat in chats}
    (sentence,) = [answer for question, answer in said.items() if "textwrap.dedent" in question]
    assert sentence.startswith("Sure! textwrap.dedent: Remove any common leading whitespace")
    assert {answer for question, answer in said.items() if "17" in question and " 5" in question} >= {
        "Sure! 17 + 5 is 22."
    }
    assert {len(chat["messages"]) for chat in chats} == {2, 4}
    rows = Corpus("stdlib_chats", TOKENIZER, split="heldout", row_len=129).next_rows(4)
    assert assistant_tokens(rows, TOKENIZER.special_tokens).any(1).all()


def test_a_seek_into_the_stdlib_continues_there():
    options = {"split": "train", "row_len": 257, "lanes": 8, "seed": 5}
    whole = Corpus("stdlib", TOKENIZER, **options)
    whole.next_rows(500)
    position = whole.position()
    resumed = Corpus("stdlib", TOKENIZER, **options)
    resumed.seek(position)
    assert np.array_equal(resumed.next_rows(40), whole.next_rows(40))
