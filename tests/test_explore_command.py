"""Exploring as its user does it: a real process on the packaged nanochat; what it writes, keeps, serves and refuses."""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from toy_saes import export, toy_sae

import bridge.nanochat
from bridge.run import directory as rundir
from experiments import explore
from experiments.explore import ExploreConfig
from jsae import files
from jsae.records.store import Store, digest
from jsae.settings import ConfigError

ROOT = Path(__file__).resolve().parents[1]
HOOKS = ("blocks.1.hook_mlp_out", "blocks.2.hook_resid_post")
SMALL = {"num_tokens": 6000, "context_length": 64}


def make_run(folder: Path, data: str = "stdlib") -> Path:
    """A run on the demo with SAEs of two hooks, as training leaves it."""
    nano = bridge.nanochat.load("demo")
    for i, hook in enumerate(HOOKS):
        sae = toy_sae("topk", nano.config.n_embd, 48, i, hook_name=hook, model_fingerprint=nano.fingerprint)
        export(sae, folder / "sae" / hook)
    flags = {"checkpoint": "demo", "step": None, "tokenizer": None, "data": data, "drop_sinks": True}
    record = {"flags": flags | {"context_size": 512}, "facts": {}, "versions": {}}
    (folder / "config.json").write_text(json.dumps(record))
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> str:
    """A few files that are quick to read."""
    folder = tmp_path_factory.mktemp("text")
    for path in sorted(Path(json.__file__).parent.glob("*.py")):
        shutil.copy(path, folder)
    return f"{folder}/*.py"


@pytest.fixture(scope="module")
def run(text, tmp_path_factory) -> Path:
    return make_run(tmp_path_factory.mktemp("runs") / "two", text)


def line(**flags: object) -> list[str]:
    told = [f"--{name}" if value is True else f"--{name}={value}" for name, value in (SMALL | flags).items()]
    return [sys.executable, "-W", "error", "-m", "experiments.explore", *told]


ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}


def command(**flags: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        line(**flags), cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=300, check=False
    )


@pytest.fixture(scope="module")
def explored(run) -> subprocess.CompletedProcess[str]:
    return command(run_dir=run)


def stores(run: Path) -> list[Store]:
    return [Store(run / "explorer" / "records" / hook, digest(run / "sae" / hook)) for hook in HOOKS]


def test_a_run_is_gathered_and_its_page_written(explored, run):
    assert explored.returncode == 0, explored.stderr
    found = stores(run)
    for store in found:
        assert store.header.settings["num_tokens"] == SMALL["num_tokens"]
        assert store.header.settings["split"] == "all"
        assert store.texts.header.row_length == SMALL["context_length"]
        assert store["count"].sum() == store["hist"].sum() == store.all["offsets"][-1] > 0
        assert f"{store.header.hook}: 48 latents" in explored.stderr
    assert found[0].header.tokens <= SMALL["num_tokens"]
    assert "<script" in (run / "explorer" / "index.html").read_text()
    assert f"written to {run / 'explorer' / 'index.html'}" in explored.stderr


def test_the_packaged_sae_is_explored_without_a_run(tmp_path):
    done = command(demo=True, run_dir=tmp_path / "demo")
    assert done.returncode == 0, done.stderr
    assert f"the packaged SAE is copied to {tmp_path / 'demo'}" in done.stderr
    assert "1,024 latents have labels in" in done.stderr
    assert (tmp_path / "demo" / "explorer" / "index.html").is_file()


def test_latents_get_labels_from_a_part_of_the_text_and_the_output_says_how_many(explored, run):
    table = json.loads((run / "labels.json").read_text())
    page = "".join(file.read_text() for file in (run / "explorer").glob("page-*/list-*.js"))
    for hook in HOOKS:
        named = [label["label"] for label in table[hook].values() if label["label"]]
        assert len(named) > 24
        assert f"{hook}: {len(named)} latents labelled from a part of the text" in explored.stderr
        assert json.dumps(named[0])[1:-1].replace("<", "\\u003c") in page
    assert f"experiments.evaluate --run_dir={run}" in explored.stderr


def test_labels_that_are_there_are_left_alone(explored, run):
    before = (run / "labels.json").stat().st_mtime_ns
    again = command(run_dir=run)
    assert again.returncode == 0, again.stderr
    assert f"latents have labels in {run / 'labels.json'}" in again.stderr
    assert (run / "labels.json").stat().st_mtime_ns == before


def test_records_that_fit_are_not_gathered_again(explored, run):
    before = {path: path.stat().st_mtime_ns for path in (run / "explorer" / "records").rglob("*.npy")}
    again = command(run_dir=run)
    assert again.returncode == 0, again.stderr
    assert "fit: --force gathers them again" in again.stderr
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_records_that_were_gathered_otherwise_are_gathered_anew(explored, run, tmp_path, capsys):
    copy = shutil.copytree(run, tmp_path / "copy")
    small = SMALL | {"run_dir": str(copy), "context_length": 32}
    assert explore.main(ExploreConfig(**small)) == 0
    assert "context_length was 64" in capsys.readouterr().err
    assert {store.texts.header.row_length for store in stores(copy)} == {32}
    assert explore.main(ExploreConfig(**small, force=True)) == 0
    assert "gathering records: --force" in capsys.readouterr().err
    assert explore.main(ExploreConfig(**small, keep_activations=False)) == 0
    assert "fit" in capsys.readouterr().err


def test_records_of_a_text_that_has_changed_are_gathered_anew_and_kept_without_the_text(run, tmp_path, capsys):
    copy = shutil.copytree(run, tmp_path / "copy")
    data = tmp_path / "a.txt"
    data.write_text(Path(json.__file__).read_text() * 2)
    small = SMALL | {"run_dir": str(copy), "data": str(data)}
    assert explore.main(ExploreConfig(**small)) == 0
    capsys.readouterr()
    assert explore.main(ExploreConfig(**small)) == 0
    assert "fit: --force" in capsys.readouterr().err
    data.write_text(data.read_text().swapcase())
    assert explore.main(ExploreConfig(**small)) == 0
    assert "a.txt has changed since the records of" in capsys.readouterr().err
    data.unlink()
    assert explore.main(ExploreConfig(**small)) == 0
    told = capsys.readouterr().err
    assert "fit: --force" in told
    assert "a.txt is not on this machine" in told


def test_an_sae_that_was_trained_again_is_gathered_anew(explored, run, tmp_path):
    copy = shutil.copytree(run, tmp_path / "copy")
    shutil.rmtree(copy / "sae" / HOOKS[0])
    export(toy_sae("topk", 128, 32, 7, hook_name=HOOKS[0]), copy / "sae" / HOOKS[0])
    done = command(run_dir=copy)
    assert done.returncode == 0, done.stderr
    assert "trained again" in done.stderr
    assert stores(copy)[0].header.d_sae == 32


def test_a_killed_gathering_leaves_the_old_records(explored, run, tmp_path):
    copy = shutil.copytree(run, tmp_path / "copy")
    # So much that it cannot be through; the partial folder says when it has begun.
    process = subprocess.Popen(
        line(run_dir=copy, data="stdlib", num_tokens=10_000_000), cwd=ROOT, env=ENVIRONMENT, stderr=subprocess.DEVNULL
    )
    partial = copy / "explorer" / "records.partial"
    _wait(lambda: partial.is_dir(), process)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert partial.is_dir()
    assert stores(copy)[1].header.settings["num_tokens"] == SMALL["num_tokens"]
    done = command(run_dir=copy, seed=3)
    assert done.returncode == 0, done.stderr
    assert stores(copy)[1].texts.header.seed == 3
    folders = [path.name for path in (copy / "explorer").iterdir() if path.is_dir()]
    assert {name for name in folders if not name.startswith("page-")} == {"graphs", "records"}
    assert len(folders) == 3


def test_a_run_that_cannot_be_written_to_is_served_as_it_is(explored, run, monkeypatch, capsys):
    """Root may write anywhere, so the system's answer is replaced."""
    from bridge.server import server

    before = {path: path.stat().st_mtime_ns for path in (run, *run.rglob("*"))}
    served = []
    monkeypatch.setattr(rundir, "is_writable", lambda folder: False)
    monkeypatch.setattr(server, "serve", lambda folder, load, **settings: served.append(folder))
    assert explore.main(ExploreConfig(run_dir=str(run), serve=True, port=0, **SMALL)) == 0
    assert served == [run]
    assert "the existing page is served" in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in (run, *run.rglob("*"))} == before


def test_a_run_is_served_until_it_is_interrupted(explored, run):
    with _serving(run) as (address, process):
        with files.Lock(run):  # a server keeps nobody out who writes
            pass
        with urllib.request.urlopen(address, timeout=20) as answer:
            assert b"<script" in answer.read()
        with urllib.request.urlopen(f"{address}api/info", timeout=20) as answer:
            info = json.load(answer)
        assert [sae["hook"] for sae in info["saes"]] == list(HOOKS)
        assert info["model"]["chat"] is False
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=30) == 0


def test_a_neuronpedia_drives_the_model_with_the_given_secret_and_name(explored, run):
    flags = {"secret": "s", "model_id": "mine", "names": "neuronpedia.test", "chat": True}
    with _serving(run, **flags) as (address, _):

        def asked(path: str, **headers: str) -> tuple[int, dict]:
            body = None if path.startswith("api") else b'{"model": "%b", "text": "def"}' % model
            headers |= {"Content-Type": "application/json"}
            try:
                with urllib.request.urlopen(urllib.request.Request(address + path, body, headers), timeout=20) as got:
                    return got.status, json.load(got)
            except urllib.error.HTTPError as error:
                return error.code, json.load(error)

        model = b"mine"
        assert asked("v1/tokenize")[0] == 401
        assert asked("v1/tokenize", **{"X-Secret-Key": "s"})[0] == 200
        model = b"other"
        status, told = asked("v1/tokenize", **{"X-Secret-Key": "s"})
        assert (status, "mine" in told["error"]) == (400, True)
        assert asked("api/info", Host="neuronpedia.test")[1]["model"]["chat"] is True
        assert asked("api/info", Host="elsewhere.test")[0] == 403


@contextlib.contextmanager
def _serving(run: Path, **flags: object) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """The address of a server of the run, and its process."""
    process = subprocess.Popen(
        line(run_dir=run, serve=True, port=0, **flags), cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.PIPE, text=True
    )
    try:
        told = process.stdout.readline()
        assert "http://127.0.0.1:" in told
        yield told.split()[-1], process
    finally:
        process.kill()
        process.communicate()


def _wait(holds, process: subprocess.Popen, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert process.poll() is None, "the command ended before it began to gather"
        assert time.monotonic() < end
        time.sleep(0.02)


def refused(**flags: object) -> str:
    with pytest.raises((ConfigError, ValueError, OSError)) as error:
        explore.main(ExploreConfig(**(SMALL | flags)))
    return str(error.value)


def test_runs_that_cannot_be_explored_are_refused_before_long_work(run, text, tmp_path):
    assert "is not a run" in refused(run_dir=str(tmp_path / "missing"))
    unfinished = tmp_path / "unfinished"
    unfinished.mkdir()
    shutil.copy(run / "config.json", unfinished)
    assert "config.json" in refused(run_dir=str(unfinished))
    assert "finished" in refused(run_dir=str(unfinished))
    other_model = make_run(tmp_path / "other", text)
    shutil.rmtree(other_model / "sae" / HOOKS[0])
    export(toy_sae("topk", 128, 8, hook_name=HOOKS[0], model_fingerprint="0123"), other_model / "sae" / HOOKS[0])
    assert "0123" in refused(run_dir=str(other_model))
    there = make_run(tmp_path / "there", text)
    assert "this model takes 2 to" in refused(run_dir=str(there), context_length=100_000)
    assert "nowhere.txt" in refused(run_dir=str(there), data="nowhere.txt")
    (tmp_path / "short.txt").write_text("Too short.")
    assert "does not fill one row of 64 tokens" in refused(run_dir=str(there), data=str(tmp_path / "short.txt"))
    assert not (there / "explorer" / "records").exists()


def test_a_port_in_use_is_reported_before_records_are_gathered(text, tmp_path):
    folder = make_run(tmp_path / "run", text)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        done = command(run_dir=folder, serve=True, port=port)
    assert done.returncode == 1
    assert str(port) in done.stderr
    assert "Traceback" not in done.stderr
    assert not (folder / "explorer").exists()


def test_flags_that_make_no_sense_are_refused():
    for flags, complaint in (
        ({}, "--run_dir"),
        ({"run_dir": "a", "num_tokens": 0}, "num_tokens is 0"),
        ({"run_dir": "a", "seed": -1}, "seed is -1"),
        ({"run_dir": "a", "port": 65_536}, "port is 65536"),
        ({"run_dir": "a", "secret": "s"}, "--secret needs --serve"),
        ({"run_dir": "a", "chat": False}, "--chat needs --serve"),
    ):
        with pytest.raises(ConfigError, match=complaint):
            ExploreConfig(**flags)


def test_no_jax_is_loaded():
    check = (
        "import sys, bridge.explorer.gather, bridge.explorer.page, bridge.server.server, bridge.exploration,"
        "experiments.explore; assert 'jax' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", check], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
