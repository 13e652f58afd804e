"""Say where a latent comes from: the documents that a nanochat read when the latent grew, and what it learned by it.

    python -m experiments.diff --run_dir=runs/growth
    python -m experiments.provenance --run_dir=runs/growth --latent=17,402

--run_dir is a run with a crosscoder over checkpoints that was compared by `diff`. Printed, and written as JSON into
the run, where `explore` finds it: documents, files and row groups on which the latent fires most, among those that
were read between the two checkpoints where it grew most; and the tokens whose loss fell most there, where it fires.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Literal

from bridge.accelerators import check_name, require_torch
from bridge.locations import Data, FilePath
from bridge.run import Run
from bridge.settings import InMemory, flag, settle
from experiments import flags
from jsae.settings import TOKENS, Range, at_least, require


@dataclass(frozen=True)
class ProvenanceConfig:
    """Latents of a crosscoder over checkpoints, and the text in which they are looked for."""

    run_dir: FilePath | None = flag(None, "The run with a crosscoder over checkpoints, after `diff`.")
    latent: tuple[int, ...] = flag((), "Numbers of latents, at most 16.", at_least(0, 2**31))
    hook: str | None = flag(None, "The crosscoder of this hook, where the run has several.")
    data: Data | None = flag(None, "The text that the nanochat was trained on; none is the run's.")
    split: Literal["heldout", "train", "all"] = flag(
        "train", "Part of the text, where the checkpoints do not say what was read between them."
    )
    num_tokens: int = flag(1_000_000, "Tokens to read at most, of what was read between the checkpoints.", TOKENS)
    show: int = flag(20, "Entries of every table.", Range(1, 10_000, "lie between 1 and 10,000"))
    models_in_memory: InMemory = flag(
        "all", "'all' checkpoints, or 'one' that has the weights of each in turn, read from its file."
    )
    device: str = flag("cpu", "Device of the models.")

    def __post_init__(self) -> None:
        settle(self)
        check_name(self.device)
        require(bool(self.run_dir), "nothing to trace: give --run_dir")
        require(bool(self.latent), "nothing to trace: give --latent, such as --latent=17")
        require(len(set(self.latent)) == len(self.latent), f"--latent={self.latent} names a latent twice")


def main(config: ProvenanceConfig) -> int:
    """Trace the latents, print where they come from, and write it."""
    require_torch(config.device)
    assert config.run_dir is not None
    run = Run(config.run_dir)
    with run.writing():
        return _trace(config, run)


def _trace(config: ProvenanceConfig, run: Run) -> int:
    from bridge.stages import provenance
    from experiments import provenance_view
    from jsae import files

    extent = provenance.Extent(**flags.shared(provenance.Extent, config))
    found = provenance.trace(
        run, config.latent, config.hook, extent, config.device, config.models_in_memory, show_progress=True
    )
    for latent, origin in found.items():
        provenance_view.show(origin, config.show)
        file = run.provenance_file(origin["crosscoder"], latent)
        file.parent.mkdir(parents=True, exist_ok=True)
        files.write(file, json.dumps(origin, indent=2, allow_nan=False) + "\n")
        print(f"provenance      {file}")
    return 0


if __name__ == "__main__":
    flags.run(ProvenanceConfig, main)
