"""Names of latents: the evaluation's, and over them what people wrote, whatever the file has come to hold."""

import json
import multiprocessing
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from bridge.run import labels
from bridge.run.labels import Name, Names

HOOK = "blocks.2.hook_resid_post"


@pytest.fixture
def run(tmp_path) -> Path:
    """A run whose evaluation named latents 0 and 2."""
    table = {
        "0": {"label": "token ' cat'", "f1": 0.75, "precision": 0.6, "recall": 1.0, "n": 9, "threshold": 0.5},
        "1": {"label": None, "f1": None, "precision": None, "recall": None, "n": 0, "threshold": None},
        "2": {"label": "digits", "f1": None, "precision": None, "recall": None, "n": 0, "threshold": 0.1},
    }
    (tmp_path / "labels.json").write_text(json.dumps({HOOK: table}))
    return tmp_path


def test_automatic_labels_come_with_how_well_they_fit(run):
    names = Names.read(run, HOOK)
    assert names[0] == Name("token ' cat'", f1=0.75, precision=0.6, recall=1.0)
    assert (names.label(1), names.label(2), names.label(99)) == ("", "digits", "")
    assert list(names) == [0, 2]


def test_a_run_without_labels_and_notes_has_no_names(tmp_path):
    assert len(Names.read(tmp_path, HOOK)) == 0
    assert labels.notes(tmp_path) == []


def test_what_a_person_says_comes_first_and_the_last_word_counts(run):
    labels.append(run, HOOK, 0, "cats", "a first guess")
    labels.append(run, HOOK, 0, " cats that sat ", "é ≠ ␀\n" * 2)
    labels.append(run, HOOK, 7, "", "only a note")
    labels.append(run, "blocks.1.hook_mlp_out", 0, "another hook's")
    names = Names.read(run, HOOK)
    assert names[0] == Name("cats that sat", "é ≠ ␀\né ≠ ␀", by_person=True)
    assert names[7] == Name("", "only a note")
    assert names.automatic(0).label == "token ' cat'"


def test_an_empty_label_gives_the_automatic_one_back(run):
    labels.append(run, HOOK, 0, "cats")
    labels.append(run, HOOK, 0, "")
    assert Names.read(run, HOOK)[0] == Name("token ' cat'", f1=0.75, precision=0.6, recall=1.0)


def test_what_is_kept_is_what_was_returned(run):
    line = labels.append(run, HOOK, 3, "a label", "a note")
    assert json.loads(labels.notes_file(run).read_text()) == line == labels.notes(run)[0]
    assert set(line) == {"hook", "latent", "label", "note", "time"}
    assert line["time"].endswith("+00:00")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"label": "x" * 513}, "513 characters: at most 512"),
        ({"note": "x" * 10_001}, "at most 10,000"),
        ({"label": "half \ud83d"}, "U+D83D"),
        ({"note": "\udc00"}, "U+DC00"),
        ({"label": "two\nlines"}, "U+000A"),
        ({"note": "a bell\x07"}, "U+0007"),
        ({"latent": -1}, "latent is -1"),
        ({"latent": True}, "latent is True"),
        ({"latent": 2**31}, "latent is"),
        ({"hook": ""}, "hook is empty"),
    ],
)
def test_what_cannot_be_kept_is_refused_and_nothing_is_written(run, given, said):
    with pytest.raises(ValueError, match=said.replace("+", r"\+")):
        labels.append(run, **({"hook": HOOK, "latent": 0, "label": "fine", "note": ""} | given))
    assert not labels.notes_file(run).exists()


def test_lines_that_are_no_notes_are_left_out_with_a_warning_each(run):
    labels.append(run, HOOK, 0, "cats")
    odd = [
        "{",
        "[1]",
        json.dumps({"hook": HOOK, "latent": 1, "label": 5}),
        '{"hook": "x"}',
        json.dumps({"hook": HOOK, "latent": 1, "label": "\ud800"}),
        "[" * 100_000,
    ]
    with labels.notes_file(run).open("a") as file:
        file.write("\n".join(odd) + "\n\n")
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        names = Names.read(run, HOOK)
    assert list(names) == [0, 2]
    assert names.label(0) == "cats"
    assert [f"line {n} is left out" in str(one.message) for n, one in enumerate(told, 2)] == [True] * len(odd)


def test_a_line_that_was_cut_off_spoils_no_other(run):
    labels.append(run, HOOK, 0, "cats")
    with labels.notes_file(run).open("a") as file:
        file.write('{"hook": "blocks.2')
    labels.append(run, HOOK, 2, "numbers")
    with pytest.warns(UserWarning, match="line 2 is left out"):
        names = Names.read(run, HOOK)
    assert (names.label(0), names.label(2)) == ("cats", "numbers")


def test_many_lines_that_are_no_notes_are_warned_of_together(run):
    labels.append(run, HOOK, 0, "cats")
    with labels.notes_file(run).open("a") as file:
        file.write("{}\n" * 1000)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        assert labels.notes(run)[0]["label"] == "cats"
    assert len(told) == 21
    assert str(told[-1].message).endswith("980 more lines are left out")


HOSTILE = """
import sys, time, warnings, resource
from bridge.run import labels
warnings.simplefilter("ignore")
before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
try:
    labels.Names.read(sys.argv[1], "blocks.2.hook_resid_post")
except ValueError as error:
    print(error)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024, time.process_time() - start)
"""


@pytest.mark.parametrize(
    ("name", "piece", "times", "told"),
    [
        ("explorer/notes.jsonl", b"{}\n", 20_000_000, "more than 262,144 lines"),
        ("explorer/notes.jsonl", b"\n", 60_000_000, "more than 262,144 lines"),
        ("explorer/notes.jsonl", b"{},", 22_000_000, ""),
        ("explorer/notes.jsonl", b"{},", 30_000_000, "too many for notes"),
        ("labels.json", b"{},", 22_000_000, "more than 1,048,576 labels"),
        ("labels.json", b"1,", 40_000_000, "at most 67,108,864 are read"),
    ],
)
def test_files_of_names_that_are_hostile_take_little_time_and_memory(run, name, piece, times, told):
    (run / "explorer").mkdir()
    with (run / name).open("wb") as file:
        file.write(b"[")
        for _ in range(100):
            file.write(piece * (times // 100))
    words = [sys.executable, "-c", HOSTILE, str(run)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=100, check=False)
    *said, figures = done.stdout.splitlines()
    assert told in "".join(said), done.stderr
    memory, seconds = map(float, figures.split())
    assert memory < 400
    assert seconds < 10


def test_a_file_that_is_no_notes_at_all_says_so(run, monkeypatch):
    labels.append(run, HOOK, 0, "cats")
    monkeypatch.setattr(labels, "_LARGEST_FILE", 10)
    with pytest.raises(ValueError, match="too many for notes"):
        labels.notes(run)
    labels.notes_file(run).write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="not UTF-8"):
        labels.notes(run)


@pytest.mark.parametrize(
    "text", ["{", "[]", "{%r: []}", '{"HOOK": {"x": {"label": "y"}}}', '{"HOOK": {"0": {"label": 5}}}']
)
def test_broken_automatic_labels_say_how_to_make_them_anew(run, text):
    (run / "labels.json").write_text(text.replace("HOOK", HOOK).replace("%r", f'"{HOOK}"'))
    with pytest.raises(ValueError, match="writes it anew"):
        Names.read(run, HOOK)


def test_writers_at_the_same_time_mix_no_lines(run):
    context = multiprocessing.get_context("spawn")
    writers = [context.Process(target=_write_many, args=(run, latent)) for latent in range(2)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert len(labels.notes(run)) == 2 * 40
    assert {line["label"][:1] for line in labels.notes(run)} == {"0", "1"}


def _write_many(run: Path, latent: int) -> None:
    for _ in range(40):
        labels.append(run, HOOK, latent, f"{latent}" * 500)
