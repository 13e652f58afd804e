"""Upload the features of a run to Neuronpedia, or import an export into a local Neuronpedia's database.

    python -m experiments.publish --run_dir=runs/demo --dry_run
    python -m experiments.publish --run_dir=runs/demo
    python -m experiments.publish --import_to=postgresql://postgres@localhost/postgres --folder=runs/demo/neuronpedia/v1

An upload prints what it will send and asks for confirmation; NEURONPEDIA_API_KEY holds the key of your account page on
neuronpedia.org. After an interruption the same command continues and sends nothing twice. An import reads files of
`experiments.export`.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bridge.locations import FilePath
from bridge.run import Run, commands
from bridge.settings import flag, settle
from experiments import flags
from jsae.settings import Range, at_least, require

if TYPE_CHECKING:
    from bridge.neuronpedia.client import Client
    from bridge.neuronpedia.publication import Publication
    from bridge.neuronpedia.sources import Source

SITE = "https://www.neuronpedia.org"
SECONDS = Range(0, 1e6, "be seconds, from 0 to a million")


@dataclass(frozen=True)
class PublishConfig:
    """Run, names, site and limits of an upload; or the database of an import."""

    run_dir: FilePath | None = flag(
        None, "The run whose features are uploaded; it needs the records of experiments.explore."
    )
    hook: str | None = flag(None, "Only the SAE of this hook.")
    model_id: str | None = flag(None, "Neuronpedia's id of the model; none is nanochat-dDEPTH-HASH.")
    source_set: str | None = flag(None, "Neuronpedia's source set; none is SITE-WIDTH-HASH, such as res-16k-1a2b3c.")
    url: str | None = flag(None, "URL that describes model and SAE: a paper, a repository.")
    layers: int | None = flag(None, "Layers of the model; none reads them from its checkpoint.", at_least(1, 2**12))
    base_url: str = flag(SITE, "The site, or a local one such as http://localhost:3000.")
    dry_run: bool = flag(False, "Check everything and write the requests' bodies; send nothing.")
    out: FilePath | None = flag(None, "Folder for the bodies; none is neuronpedia/upload in the run.")
    yes: bool = flag(False, "Do not ask before sending.")
    keep_uploaded: bool = flag(False, "Do not replace features that were uploaded with other content.")
    batch_features: int = flag(128, "Most features per request.", Range(1, 128, "fit: the site takes 1 to 128"))
    batch_bytes: int = flag(
        3_500_000,
        "Most bytes per request; the site's host takes 4.5 MB.",
        Range(1000, 2**31 - 1, "be at least 1000: no feature is smaller"),
    )
    patience: float = flag(
        7200.0, "Total seconds to wait for a site that is busy or limits the rate of requests.", SECONDS
    )
    settle: float = flag(
        20.0, "Seconds to wait after an unclear failure before asking the site what has arrived.", SECONDS
    )
    explanations: tuple[int, ...] = flag(
        (), "Send nothing: show the site's explanations of these features.", at_least(0)
    )
    import_to: str | None = flag(None, "Database of a local Neuronpedia; the password may come from PGPASSWORD.")
    folder: FilePath | None = flag(None, "Folder to import: a source of a v1 export, or a folder of several.")

    def __post_init__(self) -> None:
        settle(self)
        require(bool(self.run_dir or self.import_to), "nothing to publish: give --run_dir, or --import_to and --folder")
        require(not (self.run_dir and self.import_to), "--run_dir uploads and --import_to imports: give one of them")
        require(bool(self.import_to) == bool(self.folder), "--import_to and --folder belong together: give both")


def main(config: PublishConfig) -> int:
    """Upload features after checks and confirmation; or import an export; or show explanations."""
    if config.import_to:
        return _import(config)
    run = Run(config.run_dir or "")
    if not run.path.is_dir():
        raise FileNotFoundError(f"{run.path} is not a run: there is no such directory")
    if config.explanations:
        return _show_explanations(_sources(run, config), config)
    with run.writing():
        return _publish(run, config)


def _publish(run: Run, config: PublishConfig) -> int:
    from bridge.run.exports import warn_of_marked

    sources = _sources(run, config)
    marked = warn_of_marked(source.sae_dir for source in sources)
    require(not marked or config.dry_run, "SAEs marked as of no use are not uploaded: choose others with --hook")
    limits = {"max_features": config.batch_features, "max_bytes": config.batch_bytes}
    out = Path(config.out) if config.out else None
    with contextlib.nullcontext() if config.dry_run else _client(config, _key()) as client:
        publications = [_prepare(run, source, config.base_url, out=out, **limits) for source in sources]
        missing = [_show(publication, config) for publication in publications]
        if client is None or (any(missing) and not _confirmed(config)):
            print("Nothing was sent.")
            return 0 if config.dry_run else 1
        try:
            for publication in publications:
                _upload(publication, client, config)
        except KeyboardInterrupt:
            print("What arrived is recorded: the same command continues the upload.", file=sys.stderr)
            raise
    return 0


# ---- uploading ----------------------------------------------------------------------------------------------------


def _sources(run: Run, config: PublishConfig) -> list[Source]:
    from bridge.neuronpedia import sources

    wanted = sources.Wanted(config.model_id, config.source_set, url=config.url, layers=config.layers)
    return sources.of_run(run.path, wanted, config.hook)


def _prepare(run: Run, source: Source, server: str, **options: Any) -> Publication:
    from bridge.neuronpedia.publication import Publication
    from jsae.progress import Progress

    with Progress(f"preparing {source.ids.source}", source.store().header.d_sae, "features") as progress:
        return Publication.prepare(run, source, server, each=progress.each, **options)


def _key() -> str:
    key = os.environ.get("NEURONPEDIA_API_KEY", "")
    require(
        bool(key.strip()),
        f"NEURONPEDIA_API_KEY is not set: sign in at {SITE}, copy the key of your account page and put it into the "
        "environment; --dry_run does without",
    )
    return key


def _client(config: PublishConfig, key: str | None) -> Client:
    from bridge.neuronpedia.client import Client, Patience

    return Client(key, config.base_url, Patience(total=config.patience, recheck=config.settle))


def _show(publication: Publication, config: PublishConfig) -> int:
    """Print what will be sent; return the number of features to send."""
    plan, missing = publication.plan, publication.missing(config.keep_uploaded)
    sent = plan.features - missing.features
    known = f", {sent} were uploaded before" if sent else ""
    print(
        f"{publication.link} at {config.base_url}\n"
        f"  {missing.features} features, {missing.size / 1e6:.1f} MB in {missing.requests} requests; {plan.dead} dead "
        f"are left out{known}\n"
        f"  bodies in {plan.folder}",
        flush=True,
    )
    return missing.features


def _confirmed(config: PublishConfig) -> bool:
    print(
        "Model, source set and features become readable for everyone who knows their address. "
        "The site's public API can neither change nor delete them.",
        flush=True,
    )
    if config.yes:
        return True
    require(sys.stdin.isatty(), "the input is not a terminal, so nobody can confirm: give --yes to send")
    return input("Send it? [y/N] ").strip().lower() in ("y", "yes")


def _upload(publication: Publication, client: Client, config: PublishConfig) -> None:
    from jsae.progress import Progress

    plan = publication.plan
    with Progress("uploading", plan.features, "features") as progress:
        done = publication.send(client, config.keep_uploaded, lambda sent: progress.update(sent.features))
    first = next(iter(plan.batches[0].contents))
    print(
        f"{done.features} features are there, {done.sent / 1e6:.1f} MB were sent: "
        f"{client.base_url}/{publication.link}/{first}\nThey are unlisted: the site's team lists them on request."
    )


# ---- explanations and imports -------------------------------------------------------------------------------------


def _show_explanations(sources: list[Source], config: PublishConfig) -> int:
    with _client(config, os.environ.get("NEURONPEDIA_API_KEY")) as client:
        for source, index in itertools.product(sources, config.explanations):
            for explanation in client.explanations(source.ids.model, source.ids.source, index):
                author = ", ".join(part for part in (explanation.method, explanation.model) if part)
                scores = "".join(f"   {kind} {value:.2f}" for kind, value in explanation.scores)
                line = f"{source.ids.link}/{index}   {explanation.text}" + (f"   ({author})" if author else "") + scores
                print("".join(c if c.isprintable() else " " for c in line))  # foreign text: no terminal codes
    return 0


def _import(config: PublishConfig) -> int:
    from bridge.neuronpedia.importer import import_folder
    from jsae.progress import Progress

    with Progress("importing", None):
        counts = import_folder(
            Path(config.folder or ""), config.import_to or "", report=lambda file, _: print(f"  {file}", flush=True)
        )
    for table, count in counts.items():
        print(f"{table:<14} {count.inserted} new, {count.existing} there before")
    return 0


def next_commands(config: PublishConfig) -> list[str]:
    """Return what to do next with features that were uploaded, or would be."""
    if config.run_dir is None or config.explanations:
        return []
    return commands.after_publishing(Path(config.run_dir), config.hook, config.dry_run)


if __name__ == "__main__":
    flags.run(PublishConfig, main, after=next_commands)
