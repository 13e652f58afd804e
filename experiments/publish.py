"""Uploads the features of a run to Neuronpedia, or imports an export into a local Neuronpedia's database.

    python -m experiments.publish --run_dir=runs/demo --dry_run
    python -m experiments.publish --run_dir=runs/demo
    python -m experiments.publish --import_to=postgresql://postgres@localhost/postgres --folder=runs/demo/neuronpedia/v1

An upload says what it will send and asks; NEURONPEDIA_API_KEY is the key of neuronpedia.org/account. Interrupted, it
goes on by the same command and sends nothing twice. An import wants the files of `experiments.export`.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from bridge.locations import FilePath
from bridge.run import directory as rundir
from bridge.settings import flag, settle
from experiments import flags
from jsae.settings import Range, at_least, require

if TYPE_CHECKING:
    from bridge.neuronpedia.client import Client
    from bridge.neuronpedia.ledger import Ledger
    from bridge.neuronpedia.payload import Plan
    from bridge.neuronpedia.sources import Source

SITE = "https://www.neuronpedia.org"
SECONDS = Range(0, 1e6, "be seconds, from 0 to a million")


@dataclass(frozen=True)
class PublishConfig:
    """What goes where."""

    run_dir: FilePath | None = flag(
        None, "The run whose features are uploaded; needs records, as experiments.explore makes."
    )
    hook: str | None = flag(None, "Only the SAE of this hook.")
    model_id: str | None = flag(None, "Neuronpedia's id of the model; none is nanochat-dDEPTH-HASH.")
    source_set: str | None = flag(None, "Its source set; none is SITE-WIDTH-HASH, res-16k-1a2b3c for example.")
    url: str | None = flag(None, "Where model and SAE are told of: a paper, a repository.")
    layers: int | None = flag(None, "Layers of the model; none asks its checkpoint.", at_least(1, 2**12))
    base_url: str = flag(SITE, "The site, or a local one, http://localhost:3000.")
    dry_run: bool = flag(False, "Check everything and write the requests' bodies; send nothing.")
    out: FilePath | None = flag(None, "Folder for the bodies; none is neuronpedia/upload in the run.")
    yes: bool = flag(False, "Do not ask before sending.")
    keep_uploaded: bool = flag(False, "Leave features that were uploaded with other content as they are there.")
    batch_features: int = flag(128, "Features per request at most.", Range(1, 128, "fit: the site takes 1 to 128"))
    batch_bytes: int = flag(
        3_500_000,
        "Bytes per request at most; the site's host takes 4.5 MB.",
        Range(1000, 2**31 - 1, "be at least 1000: no feature is smaller"),
    )
    patience: float = flag(
        7200.0, "Seconds to wait in all for a site that is busy, or has had enough requests.", SECONDS
    )
    settle: float = flag(20.0, "Seconds after an unclear failure before the site is asked what has arrived.", SECONDS)
    explanations: tuple[int, ...] = flag(
        (), "Send nothing: show what the site's people say of these features.", at_least(0)
    )
    import_to: str | None = flag(None, "Database of a local Neuronpedia; the password may come from PGPASSWORD.")
    folder: FilePath | None = flag(None, "What is imported: a source of a v1 export, or a folder of several.")

    def __post_init__(self) -> None:
        settle(self)
        require(bool(self.run_dir or self.import_to), "nothing to publish: give --run_dir, or --import_to and --folder")
        require(not (self.run_dir and self.import_to), "--run_dir uploads and --import_to imports: give one of them")
        require(bool(self.import_to) == bool(self.folder), "--import_to and --folder belong together: give both")


def main(config: PublishConfig) -> int:
    """Prepares and checks everything, says what will be sent, sends it; or imports; or reads."""
    if config.import_to:
        return _import(config)
    run = Path(config.run_dir or "")
    if not run.is_dir():
        raise FileNotFoundError(f"{run} is no run: there is no such directory")
    if config.explanations:
        return _read(_sources(run, config), config)
    with rundir.writing(run):
        return _publish(run, config)


def _publish(run: Path, config: PublishConfig) -> int:
    from bridge.run.exports import warn_of_marked

    sources = _sources(run, config)
    marked = warn_of_marked(source.sae_dir for source in sources)
    require(not marked or config.dry_run, "SAEs marked as of no use are not uploaded: choose others with --hook")
    with contextlib.nullcontext() if config.dry_run else _client(config, _key()) as client:
        plans = [_prepare(run, source, config) for source in sources]
        left = [_tell(run, plan, config) for plan in plans]
        if client is None or (sum(left) and not _agreed(config)):
            print("Nothing was sent.")
            return 0 if config.dry_run else 1
        try:
            for plan in plans:
                _upload(run, plan, client, config)
        except KeyboardInterrupt:
            print("What arrived is kept in mind: the same command goes on.", file=sys.stderr)
            raise
    return 0


# ---- uploading ----------------------------------------------------------------------------------------------------


def _sources(run: Path, config: PublishConfig) -> list[Source]:
    from bridge.neuronpedia import sources

    wanted = sources.Wanted(config.model_id, config.source_set, url=config.url, layers=config.layers)
    return sources.of_run(run, wanted, config.hook)


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


def _prepare(run: Path, source: Source, config: PublishConfig) -> Plan:
    """The checked bodies of one SAE's features, on the disk."""
    from bridge.neuronpedia.api import api_features
    from bridge.neuronpedia.payload import Target
    from bridge.neuronpedia.upload import NeuronpediaUploader
    from bridge.run.labels import Names

    ids, about = source.ids, source.about
    target = Target(ids, about.n_layer, description=about.description, url=about.url)
    folder = (Path(config.out) if config.out else run / "neuronpedia" / "upload") / ids.model / ids.source
    store = source.store()
    features = api_features(store, source.sae_dir, Names.read(run, ids.hook))
    return NeuronpediaUploader(target).prepare_sae_for_upload(
        features,
        folder,
        d_sae=store.header.d_sae,
        max_features=config.batch_features,
        max_bytes=config.batch_bytes,
    )


def _ledger(run: Path, plan: Plan, config: PublishConfig) -> Ledger:
    from bridge.neuronpedia.client import site
    from bridge.neuronpedia.ledger import Ledger

    ids = plan.target.ids
    return Ledger(run / "neuronpedia" / "uploads.jsonl", (site(config.base_url), ids.model, ids.source))


def _tell(run: Path, plan: Plan, config: PublishConfig) -> int:
    """Says what of a plan will be sent; how many features that is."""
    from bridge.neuronpedia.upload import NeuronpediaUploader

    ledger = _ledger(run, plan, config)
    with ledger if ledger.path.is_file() else contextlib.nullcontext():
        missing = NeuronpediaUploader(plan.target).missing(plan, ledger, config.keep_uploaded)
    left = sum(len(indices) for _, indices in missing)
    size = sum(batch.size for batch, _ in missing)
    known = f", {plan.features - left} were uploaded before" if left < plan.features else ""
    print(
        f"{plan.target.ids.link} at {config.base_url}\n"
        f"  {left} features, {size / 1e6:.1f} MB in {len(missing)} requests; {plan.dead} dead are left out{known}\n"
        f"  bodies in {plan.folder}",
        flush=True,
    )
    return left


def _agreed(config: PublishConfig) -> bool:
    print(
        "Model, source set and features become readable for all who know their address. "
        "The site's public API can neither change nor delete them.",
        flush=True,
    )
    if config.yes:
        return True
    require(sys.stdin.isatty(), "nobody is there to be asked: give --yes to send it")
    return input("Send it? [y/N] ").strip().lower() in ("y", "yes")


def _upload(run: Path, plan: Plan, client: Client, config: PublishConfig) -> None:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from bridge.neuronpedia.upload import NeuronpediaUploader

    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with _ledger(run, plan, config) as ledger, Progress(*columns, transient=True) as bar:
        task = bar.add_task("features", total=plan.features)
        done = NeuronpediaUploader(plan.target).upload(
            plan,
            client,
            ledger,
            keep=config.keep_uploaded,
            report=lambda progress: bar.update(task, completed=progress.features),
        )
    first = next(iter(plan.batches[0].contents))
    print(
        f"{done.features} features are there, {done.sent / 1e6:.1f} MB were sent: "
        f"{client.base_url}/{plan.target.ids.link}/{first}\nThey are unlisted: the site's team lists them on request."
    )


# ---- reading and importing ----------------------------------------------------------------------------------------


def _read(sources: list[Source], config: PublishConfig) -> int:
    with _client(config, os.environ.get("NEURONPEDIA_API_KEY")) as client:
        for source, index in itertools.product(sources, config.explanations):
            for found in client.explanations(source.ids.model, source.ids.source, index):
                by = ", ".join(part for part in (found.method, found.model) if part)
                scores = "".join(f"   {kind} {value:.2f}" for kind, value in found.scores)
                told = f"{source.ids.link}/{index}   {found.text}" + (f"   ({by})" if by else "") + scores
                print("".join(c if c.isprintable() else " " for c in told))  # others' text: no codes for the terminal
    return 0


def _import(config: PublishConfig) -> int:
    from bridge.neuronpedia.importer import import_folder

    counts = import_folder(
        Path(config.folder or ""), config.import_to or "", report=lambda file, _: print(f"  {file}", flush=True)
    )
    for table, count in counts.items():
        print(f"{table:<14} {count.inserted} new, {count.existing} there before")
    return 0


if __name__ == "__main__":
    flags.run(PublishConfig, main)
