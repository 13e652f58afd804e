"""Measure speed, memory and quality: python -m experiments.bench NAME, and NAME --help for its flags.

Every measurement takes --name=value flags, or --flagfile=FILE, and writes its results to experiments/results/.
"""

import importlib
import sys
from collections.abc import Mapping, Sequence
from typing import NoReturn

from experiments import flags

BENCHES: Mapping[str, str] = {
    "ablations": "experiments.benches.ablations",
    "alarms": "experiments.benches.alarms",
    "circuits": "experiments.benches.circuits",
    "dashboard": "experiments.benches.dashboard",
    "finetune": "experiments.benches.finetune",
    "gpu": "experiments.benches.gpu",
    "memory": "experiments.benches.memory",
    "peers": "experiments.benches.contest",
    "quality": "experiments.benches.quality",
    "rates": "experiments.benches.rates",
    "runtime": "experiments.benches.runtime",
    "scaling": "experiments.benches.scaling",
    "stages": "experiments.benches.stages",
    "step": "experiments.benches.step",
    "store": "experiments.benches.store",
    "stream": "experiments.benches.stream",
    "sweep": "experiments.benches.sweep",
    "truth": "experiments.benches.truth",
    "watch": "experiments.benches.watch",
}


def main(argv: Sequence[str]) -> NoReturn:
    """Run the measurement that the first argument names."""
    name = argv[1] if len(argv) > 1 else ""
    if name in BENCHES:
        bench = importlib.import_module(BENCHES[name])
        flags.run(bench.Config, bench.main, argv=[f"{argv[0]} {name}", *argv[2:]])
    print(__doc__)
    for known, module in BENCHES.items():
        print(f"  {known:9} {importlib.import_module(module).__doc__.splitlines()[0]}")
    if name in ("--help", "-h"):
        sys.exit(0)
    print(f"FATAL {name!r} is not a measurement: choose one of {', '.join(BENCHES)}", file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    main(sys.argv)
