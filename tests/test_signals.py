"""Ctrl-C and SIGTERM, at any moment of every command: neither a traceback nor a lost request."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bridge.training import origins
from bridge.training.config import RunConfig
from experiments import flags, train

ROOT = Path(__file__).resolve().parents[1]
SMALL = {
    "num_activations": 4_000,
    "batch_size": 500,
    "block_size": 2_000,
    "context_size": 64,
    "checkpoint_every": 1_000,
    "log_every": 2,
    "heldout_tokens": 1_000,
    "expansion_factor": 1,
    "k": 8,
}


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    """Some thirty files of Python."""
    folder = tmp_path_factory.mktemp("text")
    for path in sorted(Path(json.__file__).parents[1].glob("*.py"))[:60:2]:
        shutil.copy(path, folder)
    return folder


def words(run: Path, text: Path, **more: object) -> list[str]:
    return [f"--{name}={value}" for name, value in {**SMALL, "data": f"{text}/*.py", "output_dir": run, **more}.items()]


@pytest.fixture(scope="module")
def run(tmp_path_factory, text) -> Path:
    """A small run that nothing happened to, with records, so that every command has something to do."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    done = subprocess.run(
        [sys.executable, "-m", "experiments.train", *words(folder, text), "--prepare_neuronpedia"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return folder


# ---- a program under `flags.run` -----------------------------------------------------------------------------------

PROGRAM = """
import os, signal, sys, time
from dataclasses import dataclass
from pathlib import Path
from experiments import flags

def ask(number=signal.SIGINT):
    os.kill(os.getpid(), number)
    time.sleep(0)  # the handler runs between two instructions

@dataclass(frozen=True)
class Config:
    pass

def main(config):
BODY
    return 0

if __name__ == "__main__":
    flags.run(Config, main)
"""


def program(folder: Path, body: str) -> subprocess.CompletedProcess[str]:
    file = folder / "program.py"
    file.write_text(PROGRAM.replace("BODY", "\n".join("    " + line for line in body.splitlines())))
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{folder}"}
    return subprocess.run(
        [sys.executable, file], env=environment, cwd=folder, capture_output=True, text=True, timeout=120, check=False
    )


IGNORED = {
    "a destructor": """
class Thing:
    def __del__(self):
        ask()
thing = Thing()
del thing
""",
    "a weak reference's callback": """
import weakref
class Thing: pass
thing = Thing()
there = weakref.ref(thing, lambda _: ask())
del thing
""",
}


@pytest.mark.parametrize("where", IGNORED)
def test_a_request_that_python_must_ignore_comes_again(where, tmp_path):
    done = program(tmp_path, IGNORED[where] + "time.sleep(60)\nprint('lost')")
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "FATAL interrupted\n")


def test_a_request_within_a_callback_of_xla_is_an_interruption(tmp_path):
    done = program(
        tmp_path,
        """
import jax, numpy as np
def called(x):
    ask()
    return np.float32(x)
f = jax.jit(lambda x: jax.pure_callback(called, jax.ShapeDtypeStruct((), np.float32), x))
f(np.float32(1)).block_until_ready()
time.sleep(60)
print('lost')
""",
    )
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "FATAL interrupted\n")


def test_a_request_while_jax_computes_in_the_background_neither_crashes_nor_waits(tmp_path):
    body = """
import jax, jax.numpy as jnp
f = jax.jit(lambda x: jax.lax.fori_loop(0, 100_000, lambda i, x: jnp.sin(x @ x), x))
y = f.lower(x := jnp.ones((800, 800))).compile()(x)
ask()
"""
    began = time.monotonic()
    done = program(tmp_path, body)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "FATAL interrupted\n")
    assert time.monotonic() - began < 60


def test_a_request_within_an_import_ends_the_process_at_once(tmp_path):
    (tmp_path / "careless.py").write_text(
        "import os, signal\ntry:\n    os.kill(os.getpid(), signal.SIGINT)\n    x = 1\nexcept BaseException:\n    pass\n"
    )
    done = program(tmp_path, "import careless\nprint('lost')")
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "FATAL interrupted\n")


@pytest.mark.parametrize(("number", "code", "told"), [("SIGINT", 130, "interrupted"), ("SIGTERM", 143, "terminated")])
def test_what_is_open_is_closed(number, code, told, tmp_path):
    body = f"import tempfile\nwith tempfile.TemporaryDirectory(dir='.'):\n    ask(signal.{number})\n    time.sleep(60)"
    done = program(tmp_path, body)
    assert (done.returncode, done.stderr) == (code, f"FATAL {told}\n")
    assert [p.name for p in tmp_path.iterdir()] == ["program.py"]


def test_a_second_ctrl_c_ends_what_takes_its_time_to_close(tmp_path):
    done = program(tmp_path, "try:\n    ask()\nfinally:\n    ask()\n    time.sleep(60)\n    print('late')")
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "FATAL interrupted\n")


def test_a_second_ctrl_c_ends_a_run_that_is_stopping(tmp_path):
    body = """
from experiments.signals import stop_requests
with stop_requests() as stopped:
    ask()
    print(stopped, flush=True)
    ask()
    time.sleep(60)
    print('late')
"""
    done = program(tmp_path, body)
    assert (done.returncode, done.stdout, done.stderr) == (130, "[2]\n", "FATAL interrupted\n")


def test_an_error_after_a_recorded_request_is_told_as_an_error(tmp_path):
    body = """
from experiments.signals import stop_requests
with stop_requests() as stopped:
    ask()
    raise OSError("the disk is full")
"""
    done = program(tmp_path, body)
    assert done.returncode == 1
    assert done.stderr.startswith("FATAL the disk is full\n")


def test_a_command_that_obeyed_a_request_goes_on_and_obeys_the_next(tmp_path):
    body = """
from experiments import signals
for _ in range(3):
    try:
        ask()
    except KeyboardInterrupt:
        signals.answered()
        print("stopped")
"""
    done = program(tmp_path, body)
    assert (done.returncode, done.stdout, done.stderr) == (0, "stopped\n" * 3, "")


def test_an_ignored_interrupt_stays_ignored(tmp_path):
    file = tmp_path / "program.py"
    program(tmp_path, "ask()\nprint('went on')")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    line = f"trap '' INT; exec {sys.executable} {file}"
    done = subprocess.run(["sh", "-c", line], env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (0, "went on\n")


def test_what_orbax_leaves_behind_is_not_printed_even_at_the_end_but_what_we_leave_is(tmp_path):
    body = """
import asyncio, gc
async def fail():
    raise ValueError("of a library")
async def several():
    tasks = [asyncio.ensure_future(fail()) for _ in range(3)]
    await asyncio.sleep(0.01)
    return tasks
global kept
kept = asyncio.run(several())
fail()
class Thing:
    def __del__(self):
        raise ValueError("of ours")
Thing()
raise OSError("the disk is full")
"""
    done = program(tmp_path, body)
    assert done.returncode == 1
    assert "of a library" not in done.stderr
    assert "never awaited" not in done.stderr
    assert "ValueError: of ours" in done.stderr
    assert done.stderr.count("FATAL the disk is full") == 1


# ---- the commands --------------------------------------------------------------------------------------------------

COMMANDS = {
    "train": lambda run, text, new: words(new, text),
    "collect": lambda run, text, new: [f"--out={new}", f"--data={text}/*.py", "--num_tokens=4_000_000"],
    "pretrain": lambda run, text, new: [f"--out={new}", f"--data={text}/*.py", "--vocab_size=300", "--n_embd=64"],
    "evaluate": lambda run, text, new: [f"--run_dir={run}"],
    "explore": lambda run, text, new: [f"--run_dir={run}"],
    "export": lambda run, text, new: [f"--run_dir={run}", "--format=sae_lens"],
    "publish": lambda run, text, new: [f"--run_dir={run}", "--dry_run"],
    "steer": lambda run, text, new: [f"--run_dir={run}", "--prompt=def f(x):"],
    "bench": lambda run, text, new: ["step"],
}
MOMENTS = ("multiarray", "libtorch libjax", "later")


def reach(process: subprocess.Popen[str], moment: str) -> None:
    """Returns when the process has mapped a library, so that it is importing; or, later, has computed for a while."""
    libraries = MOMENTS[1 if moment == "later" else MOMENTS.index(moment)].split()
    until = time.monotonic() + 60
    while process.poll() is None and time.monotonic() < until:
        try:
            mapped = Path(f"/proc/{process.pid}/maps").read_text()
            if any(library in mapped for library in libraries):
                break
        except OSError:
            break
        time.sleep(0.005)
    if moment == "later":
        time.sleep(1.5)


@pytest.mark.parametrize("command", COMMANDS)
def test_ctrl_c_at_any_moment_of_a_command_is_neither_a_traceback_nor_lost(command, run, text, tmp_path):
    here = shutil.copytree(run, tmp_path / "run")
    for number, moment in enumerate(MOMENTS):
        line = [
            sys.executable,
            "-m",
            f"experiments.{command}",
            *COMMANDS[command](here, text, tmp_path / f"new{number}"),
        ]
        process = subprocess.Popen(line, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        reach(process, moment)
        asked = process.poll() is None
        process.send_signal(signal.SIGINT)
        try:
            out, err = process.communicate(timeout=120)
        finally:
            process.kill()
        for word in ("Traceback", "Exception ignored", "Error"):
            assert word not in out + err, (moment, err)
        # 75 where a run saved first; a signal's number before the command has begun; where it was ending anyway its own
        # code, which is 1 of publish, as there are no records.
        own = (1 if command == "publish" else 0,) if not asked or moment == "later" else ()
        assert process.returncode in (130, 75, -signal.SIGINT, *own), err


def test_a_stop_while_the_result_is_measured_is_a_stopped_run_that_goes_on(text, tmp_path, monkeypatch, capsys):
    measure = origins.survey

    def asked(*args, **kwargs):
        os.kill(os.getpid(), signal.SIGTERM)
        return measure(*args, **kwargs)

    line = ["experiments.train", *words(tmp_path / "run", text)]
    monkeypatch.setattr(sys, "argv", line)
    monkeypatch.setattr(origins, "survey", asked)
    with pytest.raises(SystemExit) as end:
        flags.run(RunConfig, train.main, argv=line)
    assert end.value.code == 75
    assert "stopped and saved; continue with: python -m experiments.train" in capsys.readouterr().out
    assert not (tmp_path / "run" / "eval.json").exists()
    monkeypatch.setattr(origins, "survey", measure)
    with pytest.raises(SystemExit) as end:
        flags.run(RunConfig, train.main, argv=[*line, "--resume"])
    assert end.value.code == 0
    assert (tmp_path / "run" / "eval.json").exists()
