"""Write the results of a run in the formats of SAELens, Neuronpedia, SAEDashboard, delphi and circuit-tracer.

    python -m experiments.export --run_dir=runs/demo --format=neuronpedia,saedashboard
    python -m experiments.export --run_dir=runs/demo --format=sae_lens --hub_repo=owner/name --license=mit

All formats but sae_lens need records (`python -m experiments.explore`). The same run always gives the same bytes.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bridge import formats
from bridge.formats import Format
from bridge.locations import FilePath
from bridge.run import Run, commands
from bridge.settings import flag, settle
from experiments import flags
from jsae.settings import at_least, require

if TYPE_CHECKING:
    from bridge.neuronpedia.sources import Wanted


@dataclass(frozen=True)
class ExportConfig:
    """Formats, output folder and names of an export."""

    run_dir: FilePath = flag(None, "The run to export.")
    format: tuple[Format, ...] = flag(
        ("neuronpedia",), "Formats to write: any of sae_lens,neuronpedia,saedashboard,delphi,circuit_tracer."
    )
    hook: str | None = flag(None, "Only the SAE of this hook.")
    out: FilePath | None = flag(None, "Folder to write to, a folder per format; none is neuronpedia/ in the run.")
    model_id: str | None = flag(None, "Neuronpedia's id of the model; none is nanochat-dDEPTH-HASH.")
    source_set: str | None = flag(None, "Neuronpedia's source set; none is SITE-WIDTH-HASH, such as res-16k-1a2b3c.")
    release: str | None = flag(None, "Neuronpedia's release; none is the model's id and the hash of the run's SAEs.")
    title: str | None = flag(None, "Title of the release.")
    creator: str = flag("jsae", "Creator of the release.")
    url: str | None = flag(None, "URL of the release.")
    created_at: str = flag("2026-01-01T00:00:00Z", "Time of creation that the export states; not the current time.")
    layers: int | None = flag(None, "Layers of the model; none reads them from its checkpoint.", at_least(1, 2**12))
    vectors: bool = flag(False, "Add the decoder rows to neuronpedia and saedashboard, to steer without the SAE.")
    hub_repo: str | None = flag(None, "Also push the SAEs to this repository of the Hugging Face hub (extra [hub]).")
    license: str | None = flag(None, "Licence of --hub_repo, such as mit or apache-2.0.")
    private: bool = flag(False, "Create --hub_repo as a private repository.")
    dry_run: bool = flag(False, "Print what would be pushed to --hub_repo, and send nothing.")

    def __post_init__(self) -> None:
        settle(self)
        require(bool(self.run_dir), "nothing to export: give --run_dir")
        require(bool(self.format or self.hub_repo), "nothing to write: give --format or --hub_repo")
        require(not (self.hub_repo and not self.license), "--hub_repo publishes the SAEs: give their --license")
        for name in ("private", "dry_run"):
            require(bool(self.hub_repo) or not getattr(self, name), f"--{name} needs --hub_repo, which is not given")
        self.wanted()

    def wanted(self) -> Wanted:
        """Return the names that the flags give.

        Raises:
          ConfigError: a name that Neuronpedia would refuse.
        """
        from bridge.neuronpedia.sources import Wanted

        return Wanted(**flags.shared(Wanted, self))


def main(config: ExportConfig) -> int:
    """Check everything, then write every format for every SAE."""
    run = Run(config.run_dir)
    # The lock is taken also when --out is elsewhere, if the run is writable: its files must not change meanwhile.
    with run.held():
        return _export(run, config)


def _export(run: Run, config: ExportConfig) -> int:
    from bridge import hub
    from bridge.neuronpedia import sources
    from bridge.run.exports import warn_of_marked
    from jsae.progress import Progress

    if not run.path.is_dir():
        raise FileNotFoundError(f"{run.path} is not a run: there is no such directory")
    chosen = sources.of_run(run.path, config.wanted(), config.hook)
    hooks = [source.ids.hook for source in chosen]
    warn_of_marked(source.sae_dir for source in chosen)
    uploads = hub.plan(run.path, config.hub_repo, license=config.license, hooks=hooks) if config.hub_repo else []
    formats.check(chosen, config.format)
    out = Path(config.out) if config.out else None
    with Progress("exporting", len(chosen) * len(config.format), "formats") as progress:
        for written in progress.each(formats.write(run, chosen, config.format, out=out, vectors=config.vectors)):
            print(written, flush=True)
    if config.hub_repo:
        for upload in uploads:
            print(f"{'hub':<15} {upload.path}   {upload.size:,} bytes", flush=True)
        shared: dict[str, Any] = {
            "license": config.license,
            "hooks": hooks,
            "private": config.private,
            "dry_run": config.dry_run,
        }
        sent = hub.push(run.path, config.hub_repo, **shared)
        state = "would go to" if config.dry_run else "are at"
        print(f"{'hub':<15} {len(sent)} files {state} https://huggingface.co/{config.hub_repo}")
    return 0


def next_commands(config: ExportConfig) -> list[str]:
    """Return commands and code that read the written or pushed files."""
    run = Run(config.run_dir)
    out = Path(config.out) if config.out else run.neuronpedia_folder
    lines = commands.after_export(run.path, out, config.format, config.hook)
    if config.hub_repo and not config.dry_run:
        hook = config.hook or next(iter(run.exports))
        lines.append(f'sae_lens.SAE.from_pretrained("{config.hub_repo}", "{hook}")')
    return lines


if __name__ == "__main__":
    flags.run(ExportConfig, main, after=next_commands)
