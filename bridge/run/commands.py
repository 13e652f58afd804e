"""Command lines to try next, which a command prints when it is done, with the paths of its run."""

import importlib.util
import os
import shlex
import shutil
import sys
from pathlib import Path
from typing import Any

from bridge.run.layout import Layout
from bridge.run.tables import LARGEST_TABLE
from jsae import jsons
from jsae.saelens.settings import CFG

PROMPT = "def "
"""A prompt that the packaged nanochat can continue."""


def line(name: str, extra: str = "", **flags: object) -> str:
    """Return the command line of `experiments.NAME`, quoted for a shell.

    Args:
      name: of the module.
      extra: the optional dependencies that it needs; a comment says how to install those that are missing.
      flags: their values; True is a flag without a value, None leaves the flag out.
    """
    values = {name: value for name, value in flags.items() if value is not None}
    words = [f"--{name}" if value is True else f"--{name}={value}" for name, value in values.items()]
    text = shlex.join([python(), "-m", f"experiments.{name}", *words])
    return text + (f"  # first: {install(extra)}" if extra and not is_installed(extra) else "")


_MODULES = {"eval": ("sklearn", "matplotlib"), "web": ("starlette", "uvicorn", "h11"), "hub": ("huggingface_hub",)}
_MODULES |= {"neuronpedia": ("httpx", "psycopg")}


def is_installed(extra: str) -> bool:
    """Return whether the modules of an extra are installed."""
    return all(importlib.util.find_spec(module) for module in _MODULES[extra])


def install(extra: str) -> str:
    """Return the command that installs an extra from a clone."""
    return shlex.join([python(), "-m", "pip", "install", "-e", f".[{extra}]"])


def python() -> str:
    """Return the shell command of this interpreter: `python`, else its path, relative if that is shorter."""
    on_path = shutil.which("python")
    if on_path and Path(on_path).absolute() == Path(sys.executable):
        return "python"
    return min(sys.executable, os.path.relpath(sys.executable), key=len)


def after_training(run: Path) -> list[str]:
    """Return commands for a trained run, or the first run of a sweep; transcoders of all layers can be traced."""
    if _has_transcoders(run):
        explore = line("explore", "web", run_dir=run, serve=True)
        return [line("trace", run_dir=run, prompt=PROMPT), explore] if _is_traceable(run) else [explore]
    return [
        line("evaluate", "eval", run_dir=run),
        line("explore", "web", run_dir=run, serve=True),
        line("steer", run_dir=run, prompt=PROMPT, hook=_hook(run)),
    ]


def after_stages(run: Path) -> list[str]:
    """Return commands for a run with crosscoders over checkpoints."""
    return [line("diff", run_dir=run), line("explore", "web", run_dir=run, serve=True)]


def after_comparing(run: Path) -> list[str]:
    """Return commands for a run whose latents were compared with those of other seeds."""
    return [line("explore", "web", run_dir=run, serve=True), line("export", run_dir=run, format="neuronpedia")]


def after_evaluation(run: Path) -> list[str]:
    """Return commands for a run that was evaluated."""
    return [line("explore", "web", run_dir=run, serve=True), line("steer", run_dir=run, prompt=PROMPT, hook=_hook(run))]


def after_exploring(run: Path, served: bool) -> list[str]:
    """Return commands for a run whose records were gathered; `served` is whether its page was served."""
    return [
        *([] if served else [line("explore", "web", run_dir=run, serve=True)]),
        *_after_records(run),
    ]


def _after_records(run: Path) -> list[str]:
    if _flags(run).get("checkpoints"):
        return [line("diff", run_dir=run, film="film.svg")]
    if _has_transcoders(run):
        return [line("trace", run_dir=run, prompt=PROMPT, open=True)] if _is_traceable(run) else []
    return [
        *([] if _is_evaluated(run) else [line("evaluate", "eval", run_dir=run)]),
        line("export", run_dir=run, format="neuronpedia"),
        line("publish", run_dir=run, dry_run=True),
    ]


def after_steering(run: Path, hook: str | None, pushed: bool, **model: Any) -> list[str]:
    """Return commands to use after a prompt was continued.

    Args:
      run: the run, or an exported SAE.
      hook: value of --hook.
      pushed: whether features were pushed.
      model: the flags of the model.
    """
    more: dict[str, Any] = (
        {"interactive": True} if pushed else {"feature": _best(run, hook), "strength": 8, "mode": "clamp"}
    )
    steer = line("steer", run_dir=run, prompt=PROMPT, hook=hook, **model, **more)
    return [steer, line("explore", "web", run_dir=run, serve=True)] if Layout(run).config_file.is_file() else [steer]


def after_tracing(run: Path, prompt: str, ablated: bool, **model: Any) -> list[str]:
    """Return commands for a run with a graph: that show what features fire on, and that compare it with the model.

    Args:
      run: the run.
      prompt: of the graph.
      ablated: whether the graph was compared with the model.
      model: the flags of the model.
    """
    has_texts = Layout(run).records_folder.is_dir() or not Layout(run).config_file.is_file()
    return [
        *([] if has_texts else [line("explore", run_dir=run)]),
        *([] if ablated else [line("trace", run_dir=run, prompt=prompt, **model, ablations=80)]),
    ]


def after_lens(fitted: str | None, out: Path | None, **model: Any) -> list[str]:
    """Return a command that shows a lens which was fitted into the file `out`, or into the run."""
    return [] if fitted is None else [line("lens", **model, lens=out, prompt=PROMPT)]


def after_export(run: Path, out: Path, formats: tuple[str, ...], hook: str | None) -> list[str]:
    """Return commands and code that read an export of these formats in the folder `out`."""
    readers = {
        "sae_lens": f'sae_lens.SAE.load_from_disk("{_first(out / "sae_lens", CFG)}")',
        "neuronpedia": line("publish", "neuronpedia", run_dir=run, hook=hook, dry_run=True),
        "saedashboard": f"SAEDashboard's files: {out / 'saedashboard'}",
        "delphi": f'delphi.latents.LatentDataset("{_first(out / "delphi", "latents", True)}", …)',
        "circuit_tracer": f"circuit-tracer's server: data_dir={out / 'circuit_tracer'}",
    }
    return [readers[name] for name in formats]


def after_publishing(run: Path, hook: str | None, dry_run: bool) -> list[str]:
    """Return commands for features that were uploaded, or would be."""
    if dry_run:
        return ["NEURONPEDIA_API_KEY=… " + line("publish", "neuronpedia", run_dir=run, hook=hook)]
    return [line("publish", "neuronpedia", run_dir=run, hook=hook, explanations=0)]


def after_pretraining(out: Path, data: str, watched: Path | None = None) -> list[str]:
    """Return commands for a nanochat that was trained; `watched` is the run with the SAEs that learned meanwhile."""
    if watched is not None:
        return after_training(watched)
    return [line("train", checkpoint=out, data=data, output_dir=out.with_name(out.name + "-sae"))]


def _hook(run: Path) -> str | None:
    """Return the first hook of a run with several SAEs; None if --hook is not needed."""
    hooks = sorted(path.parent.name for path in Layout(run).saes_folder.glob("*/cfg.json"))
    return hooks[0] if len(hooks) > 1 else None


def _flags(run: Path) -> dict[str, Any]:
    """Return the flags that a run was started with; {} if its file cannot be read."""
    try:
        return dict(jsons.read(Layout(run).config_file)["flags"])
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _has_transcoders(run: Path) -> bool:
    return _flags(run).get("target_hook") is not None


def _is_traceable(run: Path) -> bool:
    """Return whether a run has transcoders of the MLPs of all layers."""
    flags = _flags(run)
    return (flags.get("layer"), flags.get("hook_type"), flags.get("target_hook")) == (["all"], "mlp_in", "mlp")


def _best(run: Path, hook: str | None) -> int:
    """Return the latent whose label has the highest F1; 0 if none has a label."""
    try:
        tables = jsons.read(Layout(run).table_file("labels"), LARGEST_TABLE)
        table = tables[hook if hook is not None else next(iter(tables))]
        return int(max(table, key=lambda latent: table[latent]["f1"] or 0))
    except (OSError, ValueError, KeyError, TypeError, StopIteration):
        return 0


def _is_evaluated(run: Path) -> bool:
    """Return whether `experiments.evaluate` wrote eval.json, and not only the end of the training."""
    try:
        evaluation = jsons.read(Layout(run).table_file("eval"), LARGEST_TABLE)
        return any("setting" in metrics for metrics in evaluation.values())
    except (OSError, ValueError, AttributeError, TypeError):
        return False


def _first(folder: Path, name: str, itself: bool = False) -> Path:
    """Return the parent of the first path of this name in a folder, or the path itself; `folder` if there is none."""
    paths = sorted(folder.rglob(name))
    if not paths:
        return folder
    return paths[0] if itself else paths[0].parent
