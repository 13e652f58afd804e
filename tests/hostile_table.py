"""Cost of reading hostile files: `python -m tests.hostile_table` prints time and peak memory of each."""

import dataclasses
import json
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
MAX_SECONDS, MAX_MEGABYTES = 30, 500

# What opens a file of each kind. A new kind is one line here; a new file is one line in `hostile_files.HOSTILE`.
OPENERS = {
    "checkpoint": "import bridge.nanochat.checkpoint as m; act = m.load",
    "tokenizer": "import bridge.nanochat.tokenizer as m; act = lambda path: m.load(path).encode('Hi, world. 12 ' * 50)",
}
_CHILD = """
import json, sys, time, warnings
warnings.simplefilter("ignore")
{opener}
def peak():
    lines = open("/proc/self/status").read().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) / 1024
for path in sys.argv[1:]:
    open("/proc/self/clear_refs", "w").write("5")  # the peak counts from here
    before, start = peak(), time.perf_counter()
    try:
        act(path)
        kind, message = None, "it was read"
    except (ValueError, OSError) as error:
        kind, message = type(error).__name__, str(error)
    print(json.dumps([kind, message, time.perf_counter() - start, before, peak()]), flush=True)
"""


@dataclasses.dataclass(frozen=True)
class Cost:
    """The outcome and the cost of one file."""

    error: str | None
    message: str
    seconds: float
    before: float
    """Megabytes of the process with its imports."""
    peak: float
    """Peak megabytes of the process."""


def costs(opener: str, paths: list[Path]) -> list[Cost]:
    """Open files one after the other in a separate process. Raises RuntimeError if a file crashes it."""
    command = [sys.executable, "-c", _CHILD.format(opener=OPENERS[opener]), *map(str, paths)]
    limit = MAX_SECONDS * (1 + len(paths))
    run = subprocess.run(command, capture_output=True, text=True, cwd=HERE.parent, timeout=limit, check=False)
    costs_by_file = [Cost(*json.loads(line)) for line in run.stdout.splitlines()]
    if run.returncode or run.stderr:
        raise RuntimeError(f"after {len(costs_by_file)} files exit code {run.returncode}: {run.stderr[-2000:]}")
    return costs_by_file


def main() -> None:
    """Print a line per file."""
    sys.path.insert(0, str(HERE))
    from hostile_files import HOSTILE

    print("| file | bytes | seconds | MB at the peak | of which it added | answer |\n|---|---|---|---|---|---|")
    for opener in OPENERS:
        cases = [(name, make) for name, kind, make in HOSTILE if kind == opener]
        with tempfile.TemporaryDirectory() as folder:
            paths = []
            for i, (_, make) in enumerate(cases):
                (Path(folder) / str(i)).mkdir()
                paths.append(make(Path(folder) / str(i)))
            for (name, _), path, cost in zip(cases, paths, costs(opener, paths), strict=True):
                size = max(p.stat().st_size for p in path.iterdir())
                answer = f"{cost.error or 'READ'}: {cost.message.replace(f'{path}/', '').replace('|', '/')[:200]}"
                figures = f"{cost.seconds:.2f} | {cost.peak:.0f} | {cost.peak - cost.before:.0f}"
                print(f"| {opener}: {name} | {size} | {figures} | {answer} |", flush=True)


if __name__ == "__main__":
    main()
