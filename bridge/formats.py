"""Write a run in standard formats: SAELens, Neuronpedia, SAEDashboard, delphi, circuit-tracer. No jax.

torch is imported only when something is written.
"""

import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from bridge.neuronpedia.sources import Source
    from bridge.run import Run

Format = Literal["sae_lens", "neuronpedia", "saedashboard", "delphi", "circuit_tracer"]


@dataclass(frozen=True)
class Written:
    """The files of one SAE in one format."""

    format: Format
    files: Sequence[Path]

    def __str__(self) -> str:
        folder = os.path.commonpath([file.parent for file in self.files])
        size = sum(file.stat().st_size for file in self.files)
        return f"{self.format:<15} {folder}   {len(self.files)} files, {size / 2**20:.1f} MiB"


def check(sources: Collection["Source"], formats: Collection[Format]) -> None:
    """Check that the records exist that the formats need.

    Raises:
      FileNotFoundError: there are none, or delphi is requested and not every activation was kept; says what to run.
      StoreError: the records are broken, of another version or of another SAE.
    """
    if set(formats) - {"sae_lens"}:
        for source in sources:
            store = source.store()
            if "delphi" in formats:
                store.all.activations_of_latent(0)


def write(
    run: "Run",
    sources: Sequence["Source"],
    formats: Sequence[Format] = ("neuronpedia",),
    *,
    out: Path | None = None,
    vectors: bool = False,
) -> Iterator[Written]:
    """Write every format for every SAE; yield the written files after each. The same run gives the same bytes.

    Args:
      run: the run.
      sources: its SAEs, as `bridge.neuronpedia.sources.of_run` names them.
      formats: which formats; call `check` first to know whether they can be written.
      out: where to write, a folder per format; None writes to the run's own folder.
      vectors: include decoder rows in neuronpedia and saedashboard, to steer without the SAE.

    Raises:
      FileNotFoundError, StoreError: as `check`.
      OSError: a file cannot be written; earlier files stay.
    """
    with run.held():
        for source in sources:
            for name in formats:
                folder, writer = _FORMATS[name]
                yield Written(name, writer(run, source, (out or run.neuronpedia_folder) / folder, vectors))


Writer = Callable[["Run", "Source", Path, bool], list[Path]]


def _sae_lens(run: "Run", source: "Source", out: Path, vectors: bool) -> list[Path]:
    from bridge.neuronpedia import saelens

    return saelens.write(source.sae_dir, out, ids=source.ids)


def _neuronpedia(run: "Run", source: "Source", out: Path, vectors: bool) -> list[Path]:
    from bridge.neuronpedia import v1
    from bridge.run.labels import Names

    names = Names.read(run.path, source.ids.hook)
    return v1.write(
        source.store(), source.sae_dir, out, ids=source.ids, about=source.about, names=names, vectors=vectors
    )


def _saedashboard(run: "Run", source: "Source", out: Path, vectors: bool) -> list[Path]:
    from bridge.neuronpedia import dashboard

    return dashboard.write(source.store(), source.sae_dir, out, ids=source.ids, about=source.about, vectors=vectors)


def _delphi(run: "Run", source: "Source", out: Path, vectors: bool) -> list[Path]:
    from bridge import delphi

    return delphi.write(source.store(), source.sae_dir, out)


def _circuit_tracer(run: "Run", source: "Source", out: Path, vectors: bool) -> list[Path]:
    from bridge import circuit_tracer

    return circuit_tracer.write(source.store(), source.sae_dir, out)


_FORMATS: Mapping[Format, tuple[str, Writer]] = {
    "sae_lens": ("sae_lens", _sae_lens),
    "neuronpedia": ("v1", _neuronpedia),
    "saedashboard": ("saedashboard", _saedashboard),
    "delphi": ("delphi", _delphi),
    "circuit_tracer": ("circuit_tracer", _circuit_tracer),
}
"""The folder and the writer of each format."""
