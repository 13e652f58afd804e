"""Plots of an evaluation, as PNG files: density of the latents, L0 and loss during training. Need no display."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from bridge.run import Run
from jsae import files, jsons

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_SIZE = (7, 4)


def draw(run: Run, entries: dict[str, dict[str, Any]]) -> None:
    """Write `density_HOOK.png` for every entry of eval.json, and `training.png` of metrics.jsonl."""
    from matplotlib.figure import Figure

    plots = run.plots_folder
    plots.mkdir(exist_ok=True)
    for hook, entry in entries.items():
        figure = Figure(figsize=_SIZE, layout="constrained")
        _density(figure.subplots(), hook, entry)
        _save(figure, plots / f"density_{hook}.png")
    if curves := _curves(run.metrics_file):
        figure = Figure(figsize=(_SIZE[0], len(curves) * _SIZE[1]), layout="constrained")
        panels = figure.subplots(len(curves), sharex=True, squeeze=False)[:, 0]
        for axes, (name, (steps, values)) in zip(panels, curves.items(), strict=True):
            axes.plot(steps, values, linewidth=1)
            axes.set(ylabel=name)
            if name == "loss" and min(values) > 0:
                axes.set(yscale="log")
            else:
                axes.set(ylim=(0, 1.1 * max(values) or 1))
            axes.grid(alpha=0.3)
        panels[-1].set(xlabel="step")
        _save(figure, plots / "training.png")


def _save(figure: "Figure", path: Path) -> None:
    """Write a picture, whole or not at all."""
    with files.replacing(path) as partial:
        figure.savefig(partial, format="png", dpi=150)


def _density(axes: Any, hook: str, entry: dict[str, Any]) -> None:
    histogram = entry["density_histogram"]
    edges = histogram["log10_edges"]
    axes.stairs(histogram["counts"], edges, fill=True)
    for x, fraction in ((-2, "1 %"), (-1, "10 %")):
        axes.axvline(x, linestyle="--", color="grey", linewidth=1)
        axes.annotate(fraction, (x, 1), (3, -12), xycoords=("data", "axes fraction"), textcoords="offset points")
    axes.set(
        title=f"{hook}: {sum(histogram['counts']):,} latents that fire, {histogram['never']:,} that never do",
        xlabel=f"log10 of the fraction of {entry['tokens']:,.0f} tokens on which a latent fires",
        ylabel="latents",
        xlim=(edges[0], edges[-1]),
    )


def _curves(path: Path) -> dict[str, tuple[list[float], list[float]]]:
    """Return steps and values of loss and L0 in a run's metrics; {} if there are none."""
    curves: dict[str, tuple[list[float], list[float]]] = {}
    for _, line in jsons.objects(path):
        for name, label in (("loss", "loss"), ("l0", "L0")):
            point = [(line or {}).get("step"), (line or {}).get(name)]
            if all(map(jsons.is_finite, point)):
                for values, value in zip(curves.setdefault(label, ([], [])), point, strict=True):
                    values.append(value)
    return curves
