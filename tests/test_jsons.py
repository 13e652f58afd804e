"""JSON that others wrote, or that a killed process left half written: nested, huge and broken, wherever it is read."""

import json
import math
import subprocess
import sys
from pathlib import Path

import explorer_toy as toy
import pytest

from bridge import hub
from bridge.neuronpedia import sources
from bridge.neuronpedia.ledger import Ledger
from bridge.run import directory, labels
from bridge.training import report
from experiments import plots
from jsae import export, jsons
from jsae.architectures import TopK
from jsae.records.store import Store
from jsae.settings import ConfigError

DEEP = "[" * 100_000
BROKEN = {"deep": DEEP, "objects": '{"a":' * 100_000, "cut": '{"flags": {', "bytes": "\udcff", "digits": "1" * 5000}


@pytest.fixture
def run(tmp_path) -> Path:
    toy.write_store(tmp_path)
    return tmp_path


def spoil(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    return path


KEY = ("https://s", "m", "2-res")
READERS = {
    "config.json": directory.read,
    "eval.json": lambda run: hub.plan(run, "me/sae", license="mit"),
    "labels.json": lambda run: labels.Names.read(run, toy.HOOK),
    f"explorer/records/{toy.HOOK}/records.json": lambda run: Store(run / "explorer" / "records" / toy.HOOK),
    f"sae/{toy.HOOK}/cfg.json": lambda run: export.mark(run / "sae" / toy.HOOK, "of no use"),
    "uploads.jsonl": lambda run: Ledger(run / "uploads.jsonl", KEY).__enter__(),
}


@pytest.mark.parametrize("text", BROKEN.values(), ids=BROKEN)
@pytest.mark.parametrize("name", READERS)
def test_a_broken_file_of_a_run_is_one_error_that_names_it(run, name, text):
    path = spoil(run / name, text + "\n")  # of lines the last one counts when it is whole
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - of several kinds; what they say is checked
        READERS[name](run)
    assert str(path) in str(caught.value)
    assert len(str(caught.value)) < 1000


def test_the_number_of_layers_is_not_read_from_a_broken_file(run):
    path = spoil(run / "config.json", DEEP)
    with pytest.raises(ValueError, match="is broken"):
        sources.of_run(run, sources.Wanted("toy", "toy-res"), toy.HOOK)
    path.unlink()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("data", 7),
        ("data", ["a"]),
        ("checkpoint", {"a": 1}),
        ("checkpoint", None),
        ("step", "last"),
        ("step", True),
        ("tokenizer", 3),
        ("context_size", "64"),
        ("drop_sinks", "x"),
    ],
)
def test_flags_of_a_run_that_other_commands_take_over_have_their_kinds(run, name, value):
    flags = {"checkpoint": "demo", "step": None, "tokenizer": None, "data": "stdlib", "context_size": 64}
    spoil(run / "config.json", json.dumps({"flags": flags | {"drop_sinks": True}, "facts": {}}))
    assert directory.read(run)["flags"]["data"] == "stdlib"
    spoil(run / "config.json", json.dumps({"flags": flags | {name: value}, "facts": {}}))
    with pytest.raises(ConfigError, match=rf"config\.json is not what a run writes: {name} is "):
        directory.read(run)
    if name in ("checkpoint", "step", "tokenizer") and value is not True:
        with pytest.raises(ValueError, match=r"config\.json (is not what a run writes|names no checkpoint)"):
            sources.of_run(run, sources.Wanted("toy", "toy-res"), toy.HOOK)


@pytest.mark.parametrize(
    ("metadata", "complaint"),
    [({"dataset_path": "\ud800"}, None), ({"model_name": "a\ud800\x1b["}, None), ({"a": math.nan}, "not finite")],
)
def test_a_card_is_made_of_whatever_the_metadata_says(run, metadata, complaint):
    path = run / "sae" / toy.HOOK / "cfg.json"
    cfg = json.loads(path.read_text())
    path.write_text(json.dumps(cfg | {"metadata": cfg["metadata"] | metadata}))
    if complaint is None:
        assert all(isinstance(upload.content, Path) or upload.size for upload in hub.plan(run, "me/sae", license="mit"))
    else:
        with pytest.raises(ValueError, match=rf"cfg\.json holds numbers that are {complaint}"):
            hub.plan(run, "me/sae", license="mit")


@pytest.mark.parametrize("flags", ['{"flags": [], "facts": {}}', '{"flags": {}, "facts": 7}', "[]", "{}"])
def test_a_config_that_is_not_what_a_run_writes_is_refused(run, flags):
    spoil(run / "config.json", flags)
    with pytest.raises(ConfigError, match="is not what a run writes"):
        directory.read(run)


METRICS = [
    '{"step": 1, "loss": 2.5, "l0": 8}',
    DEEP,
    "[1]",
    "null",
    '{"step": "a", "loss": 1}',
    '{"step": 2, "loss": 1',
]
METRICS += ['{"step": 1' + "0" * 400 + ', "loss": 1}', '{"step": 3, "loss": NaN}', "\udcff", '{"step": 2, "loss": 1.5}']


def test_lines_of_metrics_that_are_none_are_left_out(run):
    path = spoil(run / "metrics.jsonl", "\n".join(METRICS))
    assert plots._curves(plots._reports(path)) == {"loss": {"": ([1, 2], [2.5, 1.5])}, "l0": {"": ([1], [8])}}
    assert hub._last_line(path) == {"step": 2, "loss": 1.5}
    report.keep_until(path, 1)
    assert path.read_text() == METRICS[0] + "\n"


def test_a_ledger_with_a_time_beyond_every_number_is_refused(tmp_path):
    line = {"server": "https://s", "model": "m", "source": "2-res", "state": "sending", "time": 10**400, "features": {}}
    spoil(tmp_path / "uploads.jsonl", json.dumps(line) + "\n")
    with pytest.raises(ValueError, match=r"uploads\.jsonl, line 1"), Ledger(tmp_path / "uploads.jsonl", KEY):
        pass


def test_a_configuration_that_is_nested_too_deeply_is_an_error_of_value():
    with pytest.raises(ValueError, match="nested too deeply"):
        TopK.Config.from_json(DEEP)


@pytest.mark.parametrize(
    ("value", "finite"),
    [(0, True), (-1.5, True), (10**400, False), (math.inf, False), (math.nan, False), (True, False), ("1", False)],
)
def test_numbers_that_a_float_can_hold(value, finite):
    assert jsons.is_finite(value) == finite


def test_a_file_that_is_too_large_is_refused_before_it_is_read(tmp_path):
    with (tmp_path / "a.json").open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(ValueError, match=r"a\.json has 1,099,511,627,776 bytes, and at most 16,777,216 are read"):
        jsons.read(tmp_path / "a.json")


LIMITED = """
import resource, sys
from pathlib import Path
from jsae import jsons
resource.setrlimit(resource.RLIMIT_AS, (600 * 2**20,) * 2)
print([values for _, values in jsons.objects(Path(sys.argv[1]))][-1])
"""


def test_a_line_without_end_takes_no_memory(tmp_path):
    with (tmp_path / "lines").open("wb") as file:
        file.write(b"[")
        file.seek(2**30)
        file.write(b"\n" + b'{"step": 1}\n')
    words = [sys.executable, "-c", LIMITED, str(tmp_path / "lines")]
    done = subprocess.run(words, capture_output=True, text=True, timeout=100, check=False)
    assert done.stdout == "{'step': 1}\n", done.stderr
