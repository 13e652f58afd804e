"""Writes what a run found in the field's formats: SAELens, Neuronpedia, SAEDashboard, delphi, circuit-tracer.

    python -m experiments.export --run_dir=runs/demo --format=neuronpedia,saedashboard
    python -m experiments.export --run_dir=runs/demo --format=sae_lens --hub_repo=owner/name --license=mit

All but sae_lens need records (`python -m experiments.explore`). The same run gives the same bytes on any day.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from bridge.locations import FilePath
from bridge.run import directory as rundir
from bridge.settings import flag, settle
from experiments import flags
from jsae.settings import at_least, require

if TYPE_CHECKING:
    from bridge.neuronpedia.sources import Source, Wanted

Format = Literal["sae_lens", "neuronpedia", "saedashboard", "delphi", "circuit_tracer"]


@dataclass(frozen=True)
class ExportConfig:
    """What is written, where, under which names."""

    run_dir: FilePath = flag(None, "The run.")
    format: tuple[Format, ...] = flag(
        ("neuronpedia",), "Any of sae_lens,neuronpedia,saedashboard,delphi,circuit_tracer."
    )
    hook: str | None = flag(None, "Only the SAE of this hook.")
    out: FilePath | None = flag(None, "Where to write, a folder per format; none is neuronpedia/ in the run.")
    model_id: str | None = flag(None, "Neuronpedia's id of the model; none is nanochat-dDEPTH-HASH.")
    source_set: str | None = flag(None, "Its source set; none is SITE-WIDTH-HASH, res-16k-1a2b3c for example.")
    release: str | None = flag(None, "Its release; none is the model's id and the hash of the run's SAEs.")
    title: str | None = flag(None, "Title of the release.")
    creator: str = flag("jsae", "Who is named as its creator.")
    url: str | None = flag(None, "Of the release.")
    created_at: str = flag("2026-01-01T00:00:00Z", "When the export says it was made; a fixed time, not the clock's.")
    layers: int | None = flag(None, "Layers of the model; none asks its checkpoint.", at_least(1, 2**12))
    vectors: bool = flag(False, "Put the decoder rows into neuronpedia and saedashboard, to steer without the SAE.")
    hub_repo: str | None = flag(None, "Also push the SAEs to this repository of the Hugging Face hub (extra [hub]).")
    license: str | None = flag(None, "Licence of --hub_repo, mit or apache-2.0 for example.")
    private: bool = flag(False, "Make --hub_repo a private one.")
    dry_run: bool = flag(False, "Say what --hub_repo would get, and send nothing.")

    def __post_init__(self) -> None:
        settle(self)
        require(bool(self.run_dir), "nothing to export: give --run_dir")
        require(bool(self.format or self.hub_repo), "nothing to write: give --format or --hub_repo")
        require(not (self.hub_repo and not self.license), "--hub_repo publishes: say under which --license")
        for name in ("private", "dry_run"):
            require(bool(self.hub_repo) or not getattr(self, name), f"--{name} is of --hub_repo, which is not given")
        self.wanted()

    def wanted(self) -> Wanted:
        """The names that the flags give; refuses what Neuronpedia would refuse."""
        from bridge.neuronpedia.sources import Wanted

        return Wanted(
            self.model_id,
            self.source_set,
            self.release,
            self.title,
            self.creator,
            self.url,
            self.created_at,
            self.hub_repo,
            self.layers,
        )


def main(config: ExportConfig) -> int:
    """Write every format for every SAE; before that, everything that can be refused is."""
    run = Path(config.run_dir)
    out = Path(config.out) if config.out else run / "neuronpedia"
    # Held also when all goes elsewhere, as far as that is possible: what is read must not change meanwhile.
    with rundir.writing(run) if rundir.is_writable(run) else contextlib.nullcontext():
        return _export(run, out, config)


def _export(run: Path, out: Path, config: ExportConfig) -> int:
    from bridge import hub
    from bridge.neuronpedia import sources
    from bridge.run.exports import warn_of_marked

    if not run.is_dir():
        raise FileNotFoundError(f"{run} is no run: there is no such directory")
    found = sources.of_run(run, config.wanted(), config.hook)
    hooks = [source.ids.hook for source in found]
    warn_of_marked(source.sae_dir for source in found)
    uploads = hub.plan(run, config.hub_repo, license=config.license, hooks=hooks) if config.hub_repo else []
    if set(config.format) - {"sae_lens"}:
        for source in found:
            store = source.store()
            if "delphi" in config.format:
                store.all.activations_of_latent(0)
    for source in found:
        for name in config.format:
            folder, write = FORMATS[name]
            files = write(source, out / folder, config)
            size = sum(file.stat().st_size for file in files)
            print(f"{name:<15} {_common(files)}   {len(files)} files, {size / 2**20:.1f} MiB", flush=True)
    if config.hub_repo:
        for upload in uploads:
            print(f"{'hub':<15} {upload.path}   {upload.size:,} bytes", flush=True)
        _push(run, hooks, config)
    return 0


def _common(files: list[Path]) -> Path:
    """The folder that all of them lie in."""
    import os

    return Path(os.path.commonpath([file.parent for file in files]))


def _sae_lens(source: Source, out: Path, config: ExportConfig) -> list[Path]:
    from bridge.neuronpedia import saelens

    return saelens.write(source.sae_dir, out, ids=source.ids)


def _neuronpedia(source: Source, out: Path, config: ExportConfig) -> list[Path]:
    from bridge.neuronpedia import v1
    from bridge.run.labels import Names

    names = Names.read(config.run_dir, source.ids.hook)
    return v1.write(
        source.store(), source.sae_dir, out, ids=source.ids, about=source.about, names=names, vectors=config.vectors
    )


def _saedashboard(source: Source, out: Path, config: ExportConfig) -> list[Path]:
    from bridge.neuronpedia import dashboard

    return dashboard.write(
        source.store(), source.sae_dir, out, ids=source.ids, about=source.about, vectors=config.vectors
    )


def _delphi(source: Source, out: Path, config: ExportConfig) -> list[Path]:
    from bridge import delphi

    return delphi.write(source.store(), source.sae_dir, out)


def _circuit_tracer(source: Source, out: Path, config: ExportConfig) -> list[Path]:
    from bridge import circuit_tracer

    return circuit_tracer.write(source.store(), source.sae_dir, out)


FORMATS: Mapping[str, tuple[str, Callable[[Source, Path, ExportConfig], list[Path]]]] = {
    "sae_lens": ("sae_lens", _sae_lens),
    "neuronpedia": ("v1", _neuronpedia),
    "saedashboard": ("saedashboard", _saedashboard),
    "delphi": ("delphi", _delphi),
    "circuit_tracer": ("circuit_tracer", _circuit_tracer),
}
"""Formats: the folder of each, and what writes it."""


def _push(run: Path, hooks: list[str], config: ExportConfig) -> None:
    from bridge import hub

    sent = hub.push(
        run, config.hub_repo, license=config.license, hooks=hooks, private=config.private, dry_run=config.dry_run
    )
    told = "would go to" if config.dry_run else "are at"
    print(f"{'hub':<15} {len(sent)} files {told} https://huggingface.co/{config.hub_repo}")


if __name__ == "__main__":
    flags.run(ExportConfig, main)
