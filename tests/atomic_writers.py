"""Every writer of files: killed before each of its disk operations, and on a full disk. Run as a script.

    python tests/atomic_writers.py FOLDER [NAME...]     prints the outcomes as JSON

A writer writes version 1, then version 2 over it in a child process that kills itself, or that has a limit on the size
of files, which acts like a full disk. Files under final names must then be version 1 or 2, complete.
"""

import functools
import importlib
import json
import os
import re
import resource
import shutil
import signal
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))  # a script's path contains its folder, not the repository

from explorer_toy import HOOK, write_store

from jsae import files

Content = Mapping[str, Any]


class Writer(NamedTuple):
    """A function that writes a version, the path of the result in the run, and a function that reads it."""

    write: Callable[[Path, int], object]
    place: str
    read: Callable[[Path], Content]


def tree(root: Path) -> Content:
    """Return the bytes of all finished files at a path, by relative name."""
    paths = [path for path in (root, *root.rglob("*")) if path.is_file()]
    return {
        str(path.relative_to(root.parent)): path.read_bytes()
        for path in paths
        if not any(files.is_remains(part) for part in (path, *path.relative_to(root.parent).parents))
    }


def _page(explorer: Path) -> Content:
    """Return the files that index.html uses."""
    index = explorer / "index.html"
    if not index.is_file():
        return {}
    folder = index.read_text().partition('src="')[2].partition("/")[0]
    return {"index.html": index.read_bytes()} | tree(explorer / folder)


def _checkpoint(folder: Path) -> Content:
    """Return the files of the last model."""
    last = max((path.stem.removeprefix("model_") for path in folder.glob("model_*.pt")), default="none")
    return {path.name: path.read_bytes() for path in folder.glob(f"*_{last}*") if not files.is_remains(path)}


def _lines(file: Path) -> Content:
    """Return the distinct lines of a file, without their times."""
    lines = file.read_text().splitlines() if file.is_file() else []
    return dict.fromkeys(str({key: x for key, x in json.loads(line).items() if key != "time"}) for line in lines)


def _source(run: Path, version: int) -> Any:
    from bridge.neuronpedia import sources

    wanted = sources.Wanted("toy", "toy-res", title=f"version {version}", layers=9)
    (source,) = sources.of_run(run, wanted, HOOK)
    return source


def _weights(version: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(version)
    shapes = {"W_enc": (40, 8), "b_enc": (40,), "W_dec": (40, 8), "b_dec": (8,)}
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def _export(run: Path, version: int) -> None:
    from jsae import export
    from jsae.architectures import sae_config

    export.write(run / "sae" / "new", sae_config("topk", 8, 40, k=2), _weights(version), 1.0, 1.0, {"v": version})


def _sparsity(run: Path, version: int) -> None:
    from jsae import export

    export.write_sparsity(run / "sae" / HOOK, np.full(40, version / 100))


def _sae_lens(run: Path, version: int) -> None:
    from bridge.neuronpedia import saelens, sources

    (source,) = sources.of_run(run, sources.Wanted("toy", f"toy{version}-res", layers=9), HOOK)
    saelens.write(source.sae_dir, run / "out", ids=source.ids)


def _v1(run: Path, version: int) -> None:
    from bridge.neuronpedia import v1
    from bridge.run.labels import Names

    source, names = _source(run, version), Names.read(run, HOOK)
    v1.write(source.store(), source.sae_dir, run / "out", ids=source.ids, about=source.about, names=names)


def _dashboard(run: Path, version: int) -> None:
    from bridge.neuronpedia import dashboard

    source = _source(run, version)
    dashboard.write(source.store(), source.sae_dir, run / "out", ids=source.ids, about=source.about)


def _delphi(run: Path, version: int) -> None:
    from bridge import delphi

    source = _source(run, version)
    delphi.write(source.store(), source.sae_dir, run / "out", activations_per_file=[0, 10**9, 100][version])


def _circuit_tracer(run: Path, version: int) -> None:
    from bridge import circuit_tracer

    source = _source(run, version)
    circuit_tracer.write(source.store(), source.sae_dir, run / "out", context=version)


def _upload(run: Path, version: int) -> None:
    from bridge.neuronpedia.payload import Target, prepare

    act = {"tokens": ["a"] * 40, "values": [float(version)] * 40}
    features = [{"index": i, "activations": [act] * (i + 1)} for i in range(6)]
    target = Target(_source(run, version).ids, 9)
    prepare(features, target, run / "out", max_features=[0, 6, 2][version])


def _ledger(run: Path, version: int) -> None:
    from bridge.neuronpedia.ledger import Ledger

    with Ledger(run / "uploads.jsonl", ("https://s", "m", "2-res")) as ledger:
        if not ledger.state(version, "hash"):
            ledger.write("sending", {version: "hash"})


def _write_page(run: Path, version: int) -> None:
    from bridge.explorer import page

    page.write(run, [HOOK] if version == 1 else None)


def _note(run: Path, version: int) -> None:
    from bridge.run import labels

    if version == 1:
        labels.notes_file(run).unlink(missing_ok=True)
    labels.append(run, HOOK, version, f"name {version}")


def _records(run: Path, version: int) -> None:
    import torch
    from toy_saes import toy_sae

    import bridge.nanochat
    from bridge.explorer import gather

    torch.set_num_threads(1)
    nano = bridge.nanochat.load("demo")
    sae = toy_sae("topk", 128, 24, version, hook_name=HOOK)
    plan = gather.Plan(__file__, "all", 64 * 4, 64, False, excluded=(nano.tokenizer.bos_token_id,))
    gather.gather(nano, {HOOK: sae}, {HOOK: f"{version}" * 64}, run / "gathered", plan)


def _table(run: Path, version: int) -> None:
    from bridge.run import tables

    tables.write(run, {HOOK: {"eval": {"fvu": version / 10, "long": [version] * 400}}})


def _metrics(run: Path, version: int) -> None:
    from bridge.training import report

    if version == 1:
        files.write(run / "metrics.jsonl", "".join(json.dumps({"step": step}) + "\n" for step in range(900)))
    else:
        report.keep_until(run / "metrics.jsonl", 500)


def _config(run: Path, version: int) -> None:
    from bridge.run import directory as rundir
    from bridge.training.config import RunConfig

    if version == 2:
        rundir.record(run / "fresh", RunConfig(), {"model": "hash"})
    else:
        (run / "fresh").mkdir(exist_ok=True)


def _model(run: Path, version: int) -> None:
    import torch

    from bridge.nanochat import pretraining

    weights = {"w": torch.full((500,), float(version))}
    pretraining.save(run / "model", weights, {"step": 100 * version}, {"state": weights["w"]})


def _tokenizer(run: Path, version: int) -> None:
    from bridge.nanochat import tokenizer

    merged = {} if version == 1 else {b"ab": 256}
    tokenizer.save(tokenizer.Tokenizer({bytes([i]): i for i in range(256)} | merged), run / "tokenizer")


def _picture(run: Path, version: int) -> None:
    from matplotlib.figure import Figure

    from experiments import plots

    figure = Figure()
    figure.subplots().plot([1, version])
    plots._save(figure, run / "training.png")


def _results(run: Path, version: int) -> None:
    from experiments.benches import timing

    timing.write(str(run / "results" / "step.json"), {"seconds": [version] * 100})


def _graph(run: Path, version: int) -> None:
    import torch

    from bridge.circuits import Graph, graph_file, prune
    from bridge.circuits.tracing import Limits

    matrix = version * torch.tensor([[0.0, 1.0, 1.0, 0.0, 0.0, 1.0, 2.0], [2.0, 0.0, 0.0, 0.0, 1.0, 1.0, 0.0]])
    feature, one = torch.tensor([[1, 1, 3]]), torch.ones(1)
    graph = Graph((5, 6), 2, feature, one, (7,), 0.5 * one, matrix, torch.zeros(2, 2), matrix.sum(1), 1)
    naming = graph_file.Naming("toy", "ab", lambda token: b"x", "toy", "toy-tc", ("first", "second"))
    graph_file.write(run / "graphs", graph, prune(graph), naming, Limits())


def _shown_graph(run: Path, version: int) -> None:
    from graph_toy import document

    from bridge.explorer import graphs
    from bridge.run import Run

    graphs.add(Run(run), document(slug=f"graph{version}"))


def _listed(folder: Path) -> Content:
    """Return the graphs of a list that exist."""
    names = re.findall(r'"slug":"(\w+)"', (folder / "list.js").read_text()) if (folder / "list.js").is_file() else []
    return {name: (folder / f"{name}.graph.js").read_bytes() for name in names}


def _lens(run: Path, version: int) -> None:
    import torch

    from bridge import lenses
    from bridge.run import Run

    lenses.save(lenses.JacobianLens({0: torch.full((40, 40), float(version))}, version), Run(run).lens_file("jacobian"))


WRITERS: Mapping[str, Writer] = {
    "SAE": Writer(_export, "sae/new", tree),
    "sparsity": Writer(_sparsity, f"sae/{HOOK}/sparsity.safetensors", tree),
    "sae_lens": Writer(_sae_lens, "out", tree),
    "neuronpedia": Writer(_v1, "out", tree),
    "saedashboard": Writer(_dashboard, "out", tree),
    "delphi": Writer(_delphi, "out", tree),
    "circuit_tracer": Writer(_circuit_tracer, "out", tree),
    "graph": Writer(_graph, "graphs/neuronpedia", tree),
    "shown graph": Writer(_shown_graph, "explorer/graphs", _listed),
    "lens": Writer(_lens, "lenses/jacobian.pt", tree),
    "upload": Writer(_upload, "out", tree),
    "ledger": Writer(_ledger, "uploads.jsonl", _lines),
    "page": Writer(_write_page, "explorer", _page),
    "notes": Writer(_note, "explorer/notes.jsonl", _lines),
    "records": Writer(_records, "gathered", tree),
    "eval.json": Writer(_table, "eval.json", tree),
    "metrics": Writer(_metrics, "metrics.jsonl", tree),
    "config.json": Writer(_config, "fresh", tree),
    "checkpoint": Writer(_model, "model", _checkpoint),
    "tokenizer.pkl": Writer(_tokenizer, "tokenizer/tokenizer.pkl", tree),
    "token_bytes.pt": Writer(_tokenizer, "tokenizer/token_bytes.pt", tree),
    "plot": Writer(_picture, "training.png", tree),
    "results": Writer(_results, "results", tree),
}

_OPERATIONS = ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.link", "os.truncate", "fcntl.flock")
_MOST_KILLS = 16


class _Counter:
    """Counts disk operations by Python's audit events; kills the process before operation number `last`."""

    def __init__(self, last: int | None):
        self.count, self._last = 0, last

    def __call__(self, event: str, arguments: tuple) -> None:
        writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        if writes or event in _OPERATIONS or event.startswith("ctypes.dlsym"):
            if self.count == self._last:
                os.kill(os.getpid(), signal.SIGKILL)
            self.count += 1


def _child(act: Callable[[], str]) -> tuple[int, str]:
    """Run a function in a child process; return the exit code, negative for a signal, and its text or error."""
    reading, writing = os.pipe()
    process = os.fork()
    if process == 0:
        os.close(reading)
        try:
            text = act()
        except BaseException as error:
            text = f"{type(error).__name__}: {error}"
        os.write(writing, text.encode()[:60_000])
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        text = pipe.read()
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]), text


def _counted(write: Callable[[], object], last: int | None) -> str:
    counter = _Counter(last)
    sys.addaudithook(counter)
    write()
    return f"{counter.count}"


def _limited(write: Callable[[], object], size: int) -> str:
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
    write()
    return "written"


def campaign(name: str, start: Path, folder: Path) -> dict[str, Any]:
    """Kill a writer at every operation, or at a sample of them and the last ten; then fill its disk.

    Returns:
      `kills`: for every kill the version that was left, "old" or "new", and "again" if the next writer succeeded.
      `full`: for every file that did not fit the writer's message, whether nothing changed, and whether the message
        names the run.
    """
    writer = WRITERS[name]

    def fresh(case: str) -> Path:
        run = Path(shutil.copytree(start, folder / name / case / "run"))
        status, text = _child(lambda: str(writer.write(run, 1)))
        assert (status, "Error" in text) == (0, False), text
        return run

    def content(run: Path) -> Content:
        return writer.read(run / writer.place)

    whole = fresh("whole")
    old = content(whole)
    _, operations = _child(functools.partial(_counted, functools.partial(writer.write, whole, 2), None))
    assert operations.isdecimal(), operations
    new = content(whole)
    assert old != new
    assert not _remains(whole)
    kills = range(int(operations))
    if len(kills) > _MOST_KILLS:
        kills = sorted({*kills[-10:], *kills[:: len(kills) // (_MOST_KILLS - 10)]})
    outcomes = []
    for last in kills:
        run = fresh(f"killed {last}")
        write = functools.partial(writer.write, run, 2)
        status, text = _child(functools.partial(_counted, write, last))
        assert status == -signal.SIGKILL, text
        outcome = {str(old): "old", str(new): "new"}.get(str(content(run)), f"a mixture: {sorted(content(run))}")
        status, text = _child(functools.partial(_counted, write, None))
        again = str(content(run)) == str(new) and text.isdecimal() and not _remains(run)
        outcomes.append((outcome, "again" if again else f"{text}, {_remains(run)} left"))
        shutil.rmtree(run.parent)
    full = fresh("full")
    sizes = {len(value) for value in new.values() if isinstance(value, bytes)}
    if (full / writer.place).is_file():
        sizes |= {(full / writer.place).stat().st_size + 4}  # only a part of an appended line fits
    refused = []
    for size in sorted(sizes)[:: max(len(sizes) // 6, 1)]:
        before = tree(full)
        _, text = _child(functools.partial(_limited, functools.partial(writer.write, full, 2), size - 1))
        if text == "written":  # no file of this size is written
            break
        refused.append((text, tree(full) == before and not _remains(full), str(full) in text))
    return {"kills": outcomes, "full": refused}


def _remains(run: Path) -> list[str]:
    return sorted(str(path.relative_to(run)) for path in run.rglob("*") if files.is_remains(path))


_IMPORTED = (
    "torch",
    "matplotlib.figure",
    "bridge.circuit_tracer",
    "bridge.circuits.graph_file",
    "bridge.delphi",
    "bridge.explorer.gather",
    "bridge.explorer.page",
    "bridge.neuronpedia.dashboard",
    "bridge.neuronpedia.saelens",
    "bridge.neuronpedia.upload",
    "bridge.neuronpedia.v1",
    "experiments.evaluate",
    "bridge.training.report",
)

if __name__ == "__main__":
    for module in _IMPORTED:  # once, before processes split off
        importlib.import_module(module)
    place, chosen = Path(sys.argv[1]), sys.argv[2:] or list(WRITERS)
    place.mkdir(parents=True, exist_ok=True)
    write_store(place / "start")
    write_store(place / "start", "blocks.1.hook_mlp_out", seed=1)
    print(json.dumps({name: campaign(name, place / "start", place) for name in chosen}))
