"""Reports of a run in training: lines of metrics and TensorBoard's events, whole on a full disk too."""

import json
import subprocess
import sys
import textwrap
from pathlib import Path

import file_limit

from bridge.training.events import Events

ROOT = Path(__file__).resolve().parents[1]


def read(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """The scalars of a folder as TensorBoard shows them."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    shown = EventAccumulator(str(folder)).Reload()
    return {tag: [(event.step, event.value) for event in shown.Scalars(tag)] for tag in shown.Tags()["scalars"]}


def test_tensorboard_reads_the_events_and_forgets_what_comes_again(tmp_path):
    first = Events(tmp_path / "tb", 1)
    for step in (10, 20, 30):
        first.add(step, {"loss": step / 8, "k8 blocks.1/fvu": 0.5})
    resumed = Events(tmp_path / "tb", 21)  # from the checkpoint of step 20
    resumed.add(30, {"loss": 9.0, "k8 blocks.1/fvu": 0.25})
    assert len(list((tmp_path / "tb").iterdir())) == 2
    assert read(tmp_path / "tb") == {
        "loss": [(10, 1.25), (20, 2.5), (30, 9.0)],
        "k8 blocks.1/fvu": [(10, 0.5), (20, 0.5), (30, 0.25)],
    }


def test_a_full_disk_is_one_error_and_leaves_whole_reports(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(SCRIPT), str(tmp_path)],
        cwd=ROOT,
        env=file_limit.ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert "Traceback" not in done.stderr
    said, reported = done.stdout.splitlines()
    assert said.startswith("[Errno 27] File too large: nothing was appended")
    assert str(tmp_path) in said
    lines = [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    shown = [step for step, _ in read(tmp_path / "tb")["loss"]]
    whole = list(range(1, int(reported) + 1))
    assert len(whole) > 2
    assert lines[: len(whole)] == shown[: len(whole)] == whole
    assert max(len(lines), len(shown)) <= len(whole) + 1


SCRIPT = """
    import resource, sys
    from pathlib import Path
    from types import SimpleNamespace
    from bridge.training import report
    run, reported = Path(sys.argv[1]), 0
    trainee = SimpleNamespace(folder=run, name="blocks.1", label="blocks.1")
    values = {"loss": 1.0, "fvu": 0.5, "l0": 8.0, "dead_fraction": 0.0, "activations": 9}
    try:
        with report.Reporter(run, [trainee], 0, 1000) as reporter:
            resource.setrlimit(resource.RLIMIT_FSIZE, (1300, 1300))
            for step in range(1, 1000):
                reporter.report(step, [values], 9)
                reported = step
    except OSError as error:
        print(error)
    print(reported)
"""
