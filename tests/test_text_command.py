"""Text as the training command takes it: one file is enough, and a run goes on with its own data only."""

import json
import subprocess
import sys
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

ROOT = Path(__file__).resolve().parents[1]
HOOK = "blocks.2.hook_resid_post"
SMALL = {
    "num_activations": 2000,
    "batch_size": 500,
    "block_size": 1000,
    "checkpoint_every": 1000,
    "context_size": 64,
    "expansion_factor": 1,
    "k": 4,
    "heldout_tokens": 500,
}


def train(run: Path, data: object, **flags: object) -> subprocess.CompletedProcess[str]:
    told = {**SMALL, "data": data, "output_dir": run, **flags}
    command = [sys.executable, "-m", "experiments.train", *(f"--{name}={value}" for name, value in told.items())]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)


def refusal(done: subprocess.CompletedProcess[str]) -> str:
    """The line after FATAL; there is no traceback."""
    assert done.returncode == 1, done.stdout
    assert "Traceback" not in done.stderr
    (line,) = (line for line in done.stderr.splitlines() if line.startswith("FATAL"))
    return line


@pytest.fixture(scope="module")
def prose() -> str:
    return Path(json.decoder.__file__).read_text() * 3


@pytest.mark.parametrize("name", ["input.txt", "input.jsonl"])
def test_one_file_of_one_document_is_enough(tmp_path, prose, name):
    file = tmp_path / name
    file.write_text(prose if name == "input.txt" else json.dumps({"text": prose}))
    done = train(tmp_path / "run", file)
    assert done.returncode == 0, done.stderr
    assert "the last 5 % of each is held out" in done.stdout
    summary = json.loads((tmp_path / "run" / "eval.json").read_text())[HOOK]
    assert summary["tokens"] >= 400
    (name_and_digest,) = json.loads((tmp_path / "run" / "config.json").read_text())["facts"]["data_files"]
    assert name_and_digest[0] == name


def test_one_file_that_is_too_short_says_so_and_advises_what_there_is(tmp_path):
    (tmp_path / "input.txt").write_text("a short text")
    line = refusal(train(tmp_path / "run", tmp_path / "input.txt"))
    assert "give more text, or a smaller --context_size" in line


def test_a_shard_rewritten_with_other_text_of_the_same_size_is_named_and_the_run_not_resumed(tmp_path, prose):
    def write(name: str, text: str) -> int:
        documents = [f"{i} {text[i * 400 : i * 400 + 900]}" for i in range(60)]
        pyarrow.parquet.write_table(pyarrow.table({"text": documents}), tmp_path / name, compression="none")
        return (tmp_path / name).stat().st_size

    before = [write(name, prose) for name in ("shard_00000.parquet", "shard_00001.parquet")]
    done = train(tmp_path / "run", tmp_path)
    assert done.returncode == 0, done.stderr
    assert train(tmp_path / "run", tmp_path, resume=True).returncode == 0
    assert write("shard_00001.parquet", prose.swapcase()) == before[1]
    line = refusal(train(tmp_path / "run", tmp_path, resume=True))
    assert "its data has changed: shard_00001.parquet has changed" in line
    (tmp_path / "shard_00001.parquet").unlink()
    assert "shard_00001.parquet is missing" in refusal(train(tmp_path / "run", tmp_path, resume=True))


def test_a_run_of_a_version_without_digests_is_refused_in_a_clear_line(tmp_path, prose):
    (tmp_path / "input.txt").write_text(prose)
    run = tmp_path / "run"
    assert train(run, tmp_path / "input.txt").returncode == 0
    record = json.loads((run / "config.json").read_text())
    del record["facts"]["data_files"], record["flags"]["exclude_tokens"]
    (run / "config.json").write_text(json.dumps(record))
    assert "did not record its data" in refusal(train(run, tmp_path / "input.txt", resume=True))
