"""Nothing that is written is ever half there: killed and on a full disk, writers leave the old or the new, whole."""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import explorer_toy as toy
import file_limit
import pytest
from atomic_writers import WRITERS

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def outcomes() -> dict:
    """Results of every writer that was killed or had no room. In memory, where that is possible: it syncs a lot."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as folder:
        done = subprocess.run(
            [sys.executable, ROOT / "tests" / "atomic_writers.py", folder],
            env=file_limit.ENVIRONMENT,
            capture_output=True,
            text=True,
            timeout=600,
            check=False,
        )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("writer", WRITERS)
def test_a_kill_leaves_the_old_or_the_new_and_the_next_writer_clears_up(outcomes, writer):
    kills = outcomes[writer]["kills"]
    assert {tuple(outcome) for outcome in kills} <= {("old", "again"), ("new", "again")}
    assert ["old", "again"] in kills


@pytest.mark.parametrize("writer", [name for name in WRITERS if name not in ("ledger", "notes")])
def test_a_kill_after_the_last_step_finds_the_new(outcomes, writer):
    assert ["new", "again"] in outcomes[writer]["kills"]


@pytest.mark.parametrize("writer", WRITERS)
def test_a_full_disk_leaves_the_old_and_is_told_with_the_path(outcomes, writer):
    assert outcomes[writer]["full"]
    for said, unchanged, named in outcomes[writer]["full"]:
        assert said.startswith(("OSError: [Errno 27] File too large", "OSError: [Errno 28] No space left")), said
        assert unchanged, said
        assert named, said


# The limit is set by the process itself: jax warns, an error here, where a process that uses it forks to set one.
LIMITED = """
import os, resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (300, 300))
os.execv(sys.executable, [sys.executable, "-m", "experiments.export", *sys.argv[1:]])
"""


@pytest.mark.parametrize("kind", ["sae_lens", "neuronpedia", "saedashboard", "delphi", "circuit_tracer"])
def test_an_export_that_does_not_fit_is_one_line_with_the_path(tmp_path, kind):
    run = tmp_path / "toy"
    toy.write_store(run)
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, f"--run_dir={run}", f"--format={kind}", "--layers=9"],
        cwd=ROOT,
        env=file_limit.ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 1
    first, *rest = done.stderr.strip().splitlines()
    assert first.startswith("FATAL [Errno 2")
    assert str(run / "neuronpedia") in first
    assert rest == ["Pass --debug to see where."]
    assert not [path for path in (run / "neuronpedia").rglob("*") if path.is_file()]
