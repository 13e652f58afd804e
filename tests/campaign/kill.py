"""Kill runs at random moments until they are done, and compare them with an undisturbed run.

    python -m tests.campaign.kill --kills=100 --out=tests/campaign/kill.json

Every round takes a run from nothing to its exports: train (with export and evaluation at its end), train --resume
--prepare_neuronpedia on the trained run (with records and Neuronpedia's files), evaluate, explore, export. Its commands
get SIGKILL at random moments from the seed: half of them at a time since the start of the command, half just after a
change in the run directory. After a kill the same command is run again, training with --resume. In the end everything
must equal the reference, bit for bit: weights, metrics, TensorBoard, evaluation, checkpoints, records, exports; and no
unfinished files may remain.

Takes about ten minutes per hundred kills on two idle cores. Exit code 1 if anything differs.
"""

import argparse
import collections
import json
import platform
import random
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from tests.campaign import small_run

KILLS = {"train": 10, "finish": 3, "evaluate": 3, "explore": 3, "export": 3}
"""Number of kills of each command in a round."""

_LIMIT = 600  # seconds for a command


@dataclass
class Campaign:
    """The folder of a campaign, durations and changes of its commands, and the results."""

    work: Path
    random: random.Random
    seconds: dict[str, float] = field(default_factory=dict)
    changes: dict[str, int] = field(default_factory=dict)
    landed: collections.Counter[str] = field(default_factory=collections.Counter)
    problems: list[str] = field(default_factory=list)

    @property
    def run(self) -> Path:
        """The run directory; always the same path, because some results contain it."""
        return self.work / "run"

    @property
    def text(self) -> Path:
        return self.work / "text"

    @property
    def log(self) -> Path:
        return self.work / "log"


def main() -> int:
    """Run the campaign; print where the kills occurred and what differed."""
    arguments = _arguments()
    work = Path(tempfile.mkdtemp(prefix="jsae-kill-", dir=arguments.work))
    campaign = Campaign(work, random.Random(arguments.seed))
    began = time.monotonic()
    try:
        small_run.make_text(campaign.text)
        first, expected = _whole(campaign), _whole(campaign)  # the first also fills the cache of compiled programs
        rounds = [small_run.differences(first, expected)]  # an undisturbed run must be reproducible
        while campaign.landed.total() < arguments.kills and not (campaign.problems or rounds[-1]):
            rounds.append(_round(campaign, expected, arguments.kills - campaign.landed.total()))
            print(
                f"round {len(rounds) - 1}: {campaign.landed.total()} kills, {len(rounds[-1])} differences", flush=True
            )
    finally:
        if not arguments.keep:
            shutil.rmtree(work)
    problems = campaign.problems + [problem for differences in rounds for problem in differences]
    _show(campaign, problems)
    if arguments.out is not None:
        _write(arguments, campaign, len(rounds) - 1, problems, time.monotonic() - began)
    return 1 if problems else 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100, help="total number of kills (default: 100)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the moments (default: 0)")
    parser.add_argument("--work", type=Path, default=None, help="folder for the runs; default: a temporary directory")
    parser.add_argument("--out", type=Path, default=None, help="file for the result, JSON")
    parser.add_argument("--keep", action="store_true", help="do not remove the last run")
    return parser.parse_args()


def _whole(campaign: Campaign) -> dict[str, Any]:
    """Return the results of an undisturbed run; record the durations and changes of its commands."""
    shutil.rmtree(campaign.run, ignore_errors=True)
    for command in small_run.CHAIN:
        began = time.monotonic()
        process = small_run.start(small_run.line(command, campaign.run, campaign.text), campaign.log)
        campaign.changes[command] = _watch(campaign, process, until=float("inf"), changes=None)
        campaign.seconds[command] = time.monotonic() - began
        if process.returncode:
            raise SystemExit(f"{command} failed without a kill:\n{campaign.log.read_text()[-4000:]}")
    return small_run.results(campaign.run)


def _round(campaign: Campaign, expected: dict[str, Any], max_kills: int) -> list[str]:
    """Kill a run in all its commands; return the differences in the end."""
    shutil.rmtree(campaign.run, ignore_errors=True)
    for command, kills in KILLS.items():
        while kills and max_kills and _killed(campaign, command):
            kills, max_kills = kills - 1, max_kills - 1
        process = small_run.start(small_run.line(command, campaign.run, campaign.text), campaign.log)
        if process.wait(_LIMIT):
            campaign.problems.append(f"{command} after kills: exit code {process.returncode}: {_last(campaign)}")
            return []
    return small_run.differences(small_run.results(campaign.run), expected)


def _killed(campaign: Campaign, command: str) -> bool:
    """Start a command and kill it at a random moment; return whether it was still running."""
    before = small_run.paths(campaign.run)
    until, changes = campaign.random.uniform(0, campaign.seconds[command]), None
    if campaign.random.random() < 0.5:
        until, changes = float("inf"), campaign.random.randint(1, max(campaign.changes[command], 1))
    delay = campaign.random.choice([0, 0, 0.002, 0.01, 0.05])
    process = small_run.start(small_run.line(command, campaign.run, campaign.text), campaign.log)
    _watch(campaign, process, until, changes)
    time.sleep(delay)
    alive = process.poll() is None
    process.kill()
    process.wait()
    if alive:
        resumed = "resumed " if command == "train" and "config.json" in before else ""
        campaign.landed[resumed + _place(campaign, command, before)] += 1
    elif process.returncode:
        campaign.problems.append(f"{command}: exit code {process.returncode} before it was killed: {_last(campaign)}")
    return alive


def _watch(campaign: Campaign, process: subprocess.Popen[bytes], until: float, changes: int | None) -> int:
    """Wait for a time, a number of changes in the run directory, or the end; return the number of changes."""
    began, seen, count = time.monotonic(), small_run.paths(campaign.run), 0
    while process.poll() is None and time.monotonic() - began < min(until, _LIMIT) and count != changes:
        now = small_run.paths(campaign.run)
        count, seen = count + (now != seen), now
        time.sleep(0.002)
    return count


def _place(campaign: Campaign, command: str, before: set[str]) -> str:
    """Return the phase of a command in which it was killed, by new files in the run directory and its output."""
    new = small_run.paths(campaign.run) - before
    unfinished = sorted(name for name in new if name.endswith((".partial", ".unfinished", ".outdated")))
    if any("orbax-checkpoint-tmp" in name for name in new):
        return f"{command}: writing a checkpoint"
    if unfinished:
        return f"{command}: writing {Path(unfinished[0]).parts[0].removesuffix('.partial')}"
    if not campaign.log.stat().st_size:
        return f"{command}: starting"
    if command != "train":
        return f"{command}: working"
    if "exported SAE" in campaign.log.read_text(errors="replace"):
        return "train: ending"
    if (campaign.run / "sae").is_dir():
        return "train: exporting and evaluating"
    return "train: training" if any(name.startswith("tb/") for name in new) else "train: loading"


def _last(campaign: Campaign) -> str:
    return " ".join(campaign.log.read_text(errors="replace").split())[-600:]


def _show(campaign: Campaign, problems: list[str]) -> None:
    table = Table(title=f"{campaign.landed.total()} kills")
    table.add_column("where they landed", no_wrap=True)
    table.add_column("kills", justify="right")
    for place, count in sorted(campaign.landed.items()):
        table.add_row(place, str(count))
    console = Console(width=120)
    console.print(table)
    for problem in problems:
        console.print(problem, style="red", markup=False, soft_wrap=True)
    console.print("differences: " + (str(len(problems)) if problems else "none"))


def _write(arguments: argparse.Namespace, campaign: Campaign, rounds: int, problems: list[str], seconds: float) -> None:
    result = {
        "command": f"python -m tests.campaign.kill --kills={arguments.kills} --seed={arguments.seed}",
        "kills": campaign.landed.total(),
        "runs": rounds,
        "where": dict(sorted(campaign.landed.items())),
        "differences": problems,
        "seconds": round(seconds),
        "python": platform.python_version(),
    }
    arguments.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
