"""One process writes to a run at a time: real processes that meet in one directory."""

import json
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import explorer_toy as toy
import pytest

from bridge import hub
from bridge.run import commands, tables
from bridge.run import directory as rundir
from bridge.training.config import RunConfig
from experiments import export, publish
from jsae import files
from jsae.settings import ConfigError

ROOT = Path(__file__).resolve().parents[1]
TINY = {
    "num_activations": 12_000,
    "batch_size": 500,
    "block_size": 2_000,
    "context_size": 64,
    "checkpoint_every": 4_000,
    "log_every": 2,
    "heldout_tokens": 1_000,
    "expansion_factor": 2,
    "k": 8,
}


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    """Some files of Python."""
    folder = tmp_path_factory.mktemp("text")
    for path in sorted(Path(json.__file__).parents[1].glob("*.py"))[:30:2]:
        shutil.copy(path, folder)
    return folder


@pytest.fixture
def run(tmp_path) -> Path:
    """A small run with records."""
    toy.write_store(tmp_path / "toy")
    return tmp_path / "toy"


@pytest.fixture
def holder(run) -> Iterator[int]:
    """The number of another process that writes to the run."""
    code = """
        import sys, time
        from pathlib import Path
        from jsae import files
        with files.Lock(Path(sys.argv[1])):
            print("held", flush=True)
            time.sleep(100)
    """
    command = [sys.executable, "-c", textwrap.dedent(code), str(run)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        assert process.stdout.readline() == "held\n"
        yield process.pid
        process.kill()


def train(run: Path, text: Path, **flags: object) -> subprocess.Popen[str]:
    told = {**TINY, "data": f"{text}/*.py", "output_dir": run, **flags}
    command = [sys.executable, "-m", "experiments.train", *(f"--{name}={value}" for name, value in told.items())]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_of_two_identical_commands_at_once_exactly_one_runs(tmp_path, text):
    run = tmp_path / "run"
    both = [train(run, text) for _ in range(2)]
    ended = [(*process.communicate(timeout=300), process.returncode) for process in both]
    assert sorted(status for *_, status in ended) == [0, 1], ended
    (loser,) = (error for _, error, status in ended if status)
    (winner,) = (process.pid for process in both if process.returncode == 0)
    first, *rest = loser.strip().splitlines()
    assert first.startswith(f"FATAL {run} is in use by process {winner} on ")
    assert rest == ["Pass --debug to see where."]
    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(2, 25, 2))
    assert not (run / files.LOCK).exists()


def test_a_killed_run_locks_nobody_out(tmp_path, text):
    run = tmp_path / "run"
    process = train(run, text, num_activations=400_000)
    until = time.monotonic() + 200
    while not (run / "metrics.jsonl").is_file():
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < until
        time.sleep(0.05)
    refused = train(run, text, num_activations=400_000, resume=True)
    assert f"in use by process {process.pid} on" in refused.communicate(timeout=100)[1]
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert (run / files.LOCK).is_file()
    resumed = train(run, text, num_activations=400_000, resume=True)
    while json.loads((run / files.LOCK).read_text() or "{}").get("pid") != resumed.pid:
        assert resumed.poll() is None, resumed.stderr.read()
        assert time.monotonic() < until
        time.sleep(0.05)
    resumed.send_signal(signal.SIGTERM)
    resumed.communicate(timeout=200)


COMMANDS = {
    "train": "from experiments import train as c; c.main(c.RunConfig(output_dir=run, resume=True))",
    "pretrain": "from experiments import pretrain as c; c.main(c.PretrainConfig(out=run))",
    "evaluate": "from experiments import evaluate as c; c.main(c.EvaluateConfig(run_dir=run, plots=False))",
    "evaluate --sae": f"from experiments import evaluate as c; c.main(c.EvaluateConfig(sae=run + '/sae/{toy.HOOK}'))",
    "explore": "from experiments import explore as c; c.main(c.ExploreConfig(run_dir=run))",
    "explore --serve": "from experiments import explore as c; c.main(c.ExploreConfig(run_dir=run, serve=True, port=0))",
    "export --out": "from experiments import export as c; c.main(c.ExportConfig(run_dir=run, out='/tmp/elsewhere'))",
    "export": "from experiments import export as c; c.main(c.ExportConfig(run_dir=run))",
    "publish": "from experiments import publish as c; c.main(c.PublishConfig(run_dir=run, dry_run=True))",
}


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_that_writes_is_refused_before_it_loads_torch_or_starts_a_device(command, run, holder):
    """Settings of a training know the classes of SAEs, which take jax to import but no device."""
    (run / "config.json").write_text("{}")
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    code = f"""
import sys
def started():
    from jax._src import xla_bridge
    return xla_bridge.backends_are_initialized()
run = sys.argv[1]
try:
    {COMMANDS[command]}
except OSError as error:
    print(error)
    print([name for name in ("torch", "jax") if name in sys.modules and (name == "torch" or started())])
"""
    done = subprocess.run([sys.executable, "-c", code, run], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert f"{run} is in use by process {holder} on" in done.stdout, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before


def test_a_run_that_can_only_be_read_needs_no_lock(run, holder, tmp_path, monkeypatch, capsys):
    """Root may write anywhere, so the system's answer is replaced."""
    monkeypatch.setattr(rundir, "is_writable", lambda folder: False)
    assert export.main(export.ExportConfig(run_dir=str(run), format=("sae_lens",), out=str(tmp_path / "out"))) == 0
    assert str(tmp_path / "out") in capsys.readouterr().out
    plan = hub.plan(run, "owner/name", license="mit")
    assert not [upload.path for upload in plan if files.LOCK in upload.path]


def test_the_lock_is_in_no_export(run):
    with files.Lock(run), files.Lock(run / "sae" / toy.HOOK):
        export.main(export.ExportConfig(run_dir=str(run), format=("sae_lens", "neuronpedia")))
        paths = [upload.path for upload in hub.plan(run, "owner/name", license="mit")]
    written = [path.name for path in (run / "neuronpedia").rglob("*")]
    assert files.LOCK not in [*written, *paths]
    assert len(written) > 5


def test_variants_of_a_sweep_are_held_with_the_run_and_by_themselves(tmp_path):
    run, config = tmp_path / "sweep", RunConfig(k=(8, 16), resume=True)
    for folder in (run, run / "k8"):
        folder.mkdir()
        rundir.record(folder, config, {})
    with rundir.claimed(run, config, ["k8", "k16"]):
        assert (run / "k8" / files.LOCK).is_file()
        assert not (run / "k16").exists()
    with rundir.writing(run / "k8" / "sae" / toy.HOOK):
        assert (run / "k8" / files.LOCK).is_file()
        assert not (run / files.LOCK).exists()


def test_a_folder_of_somebodys_partial_downloads_is_something_else(tmp_path):
    (tmp_path / "film.partial").touch()
    with pytest.raises(ConfigError, match="something else"), rundir.claimed(tmp_path, RunConfig()):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["film.partial"]


def test_a_run_continues_with_the_implementation_it_began_with(tmp_path):
    begun = {"model": "hash", "operations": "gpu"}
    rundir.record(tmp_path, RunConfig(), begun, {"operations": "kernels run here"})
    rundir.record(tmp_path, RunConfig(), begun, {"operations": "for another reason"})
    with pytest.raises(ConfigError, match="operations was gpu, is xla"):
        rundir.record(tmp_path, RunConfig(), begun | {"operations": "xla"})
    assert rundir.read(tmp_path)["reasons"] == {"operations": "kernels run here"}


def test_a_run_of_a_version_that_recorded_no_implementation_continues(tmp_path):
    rundir.record(tmp_path, RunConfig(), {"model": "hash"})
    rundir.record(tmp_path, RunConfig(), {"model": "hash", "operations": "gpu"})
    with pytest.raises(ConfigError, match="data was None, is text"):
        rundir.record(tmp_path, RunConfig(), {"model": "hash", "data": "text"})


@pytest.mark.parametrize("left", ["config.json.partial", "config.partial", files.LOCK])
def test_a_start_that_was_killed_is_started_over(tmp_path, left):
    run = tmp_path / "run"
    run.mkdir()
    (run / left).write_text('{"half')
    with rundir.claimed(run, RunConfig()):
        assert [path.name for path in run.iterdir()] == [files.LOCK]
        rundir.record(run, RunConfig(), {"model": "hash"})
    assert [path.name for path in run.iterdir()] == ["config.json"]
    assert rundir.read(run)["facts"] == {"model": "hash"}


def test_a_directory_without_a_run_is_refused_and_nothing_is_created(tmp_path):
    def refused(run: Path, **flags: object) -> str:
        with pytest.raises(ConfigError) as error, rundir.claimed(run, RunConfig(**flags)):
            pass
        return str(error.value)

    (tmp_path / "file").touch()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").touch()
    assert "is a file" in refused(tmp_path / "file")
    assert "already holds something else" in refused(tmp_path / "other")
    assert "no run to resume" in refused(tmp_path / "none", resume=True)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["file", "other", "thesis.tex"]


def test_a_broken_table_of_an_evaluation_is_said_to_be_replaced(tmp_path, capsys):
    (tmp_path / "eval.json").write_text('{"half')
    tables.write(tmp_path, {"hook": {"eval": {"fvu": 0.5}}})
    assert "was broken and is replaced" in capsys.readouterr().err
    tables.write(tmp_path, {"other": {"eval": {"fvu": 0.6}}})
    assert capsys.readouterr().err == ""
    assert json.loads((tmp_path / "eval.json").read_text()) == {"hook": {"fvu": 0.5}, "other": {"fvu": 0.6}}


def test_publish_and_explore_take_the_lock_twice_in_one_process(run, capsys):
    with files.Lock(run):
        config = publish.PublishConfig(run_dir=str(run), dry_run=True, layers=9)
        assert publish.main(config) == 0
    assert "Nothing was sent" in capsys.readouterr().out


def test_commands_for_a_finished_run_stand_in_one_line_without_comments(monkeypatch, run):
    monkeypatch.setattr(commands, "is_installed", lambda extra: False)
    record = rundir.read(run)
    config = RunConfig.from_json(record["flags"])
    (run / "config.json").write_text(json.dumps(record | {"flags": config.to_json()}))  # all flags, as a run has them
    (run / "eval.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"finished\. Next: .*evaluate.*; .*explore.*; .*steer") as refused:
        rundir._check_new(run, config)
    assert "#" not in str(refused.value)
