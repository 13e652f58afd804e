"""Plots of an evaluation, as PNG files: densities, curves of the training, layers, a sweep. Need no display."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bridge.run import Run
from jsae import files, jsons

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_SIZE = (7, 4)
_PANEL = 2.2  # height of a panel of several, in inches
_CURVES = {
    "fvu": "FVU",
    "loss": "loss",
    "l0": "L0: active latents per token",
    "dead_fraction": "dead latents",
    "learning_rate": "learning rate",
}
"""Metrics to draw by name, with their titles."""
_LOGARITHMIC = ("fvu", "loss")

Curves = dict[str, dict[str, tuple[list[float], list[float]]]]
Densities = list[tuple[float, list[float], float]]
"""By report: its step, the latents per bin of density, the highest bin last, and the latents that did not fire."""


def draw(run: Run, entries: dict[str, dict[str, Any]]) -> None:
    """Write the pictures of an evaluation.

    They are `density_HOOK.png` for every entry of eval.json; of metrics.jsonl `training.png` and, for every hook,
    `densities_HOOK.png`; `layers.png` for several hooks, and `sweep.png` into the sweep that the run is a variant of.
    """
    plots = run.plots_folder
    plots.mkdir(exist_ok=True)
    for hook, entry in entries.items():
        figure = _figure(_SIZE)
        _density(figure.subplots(), hook, entry)
        _save(figure, plots / f"density_{hook}.png")
    reports = _reports(run.metrics_file)
    if curves := _curves(reports):
        _save(_training(curves), plots / "training.png")
    for hook, densities in _densities(reports).items():
        _save(_over_training(hook, densities), plots / f"densities_{hook}.png")
    if len(entries) > 1:
        _save(_layers(entries), plots / "layers.png")
    sweep = Run(run.path.absolute().parent)
    if len(points := _frontier(sweep)) > 1 and sweep.is_writable:
        sweep.plots_folder.mkdir(exist_ok=True)
        _save(_sweep(points), sweep.plots_folder / "sweep.png")


def _figure(size: tuple[float, float]) -> "Figure":
    from matplotlib.figure import Figure

    return Figure(figsize=size, layout="constrained")


def _save(figure: "Figure", path: Path) -> None:
    """Write a picture, whole or not at all."""
    with files.replacing(path) as partial:
        figure.savefig(partial, format="png", dpi=150)


def _density(axes: "Axes", hook: str, entry: dict[str, Any]) -> None:
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


# ---- training ------------------------------------------------------------------------------------------------------


def _reports(path: Path) -> list[dict[str, Any]]:
    """Return the lines of a run's metrics, without those that are broken."""
    return [line for _, line in jsons.objects(path) if line]


def _curves(reports: Sequence[dict[str, Any]]) -> Curves:
    """Return steps and values by metric and hook from a run's reports; {} if there are none."""
    curves: Curves = {}
    for report in reports:
        hook = report.get("hook")
        for name in _CURVES:
            point = [report.get("step"), report.get(name)]
            if all(map(jsons.is_finite, point)):
                by_hook = curves.setdefault(name, {})
                series = by_hook.setdefault(hook if isinstance(hook, str) else "", ([], []))
                for values, value in zip(series, point, strict=True):
                    values.append(value)
    return {name: curves[name] for name in _CURVES if name in curves}


def _training(curves: Curves) -> "Figure":
    """Return a panel per metric, with a line per hook."""
    from matplotlib.ticker import EngFormatter, PercentFormatter

    figure = _figure((_SIZE[0], max(_SIZE[1], _PANEL * len(curves))))
    panels = figure.subplots(len(curves), sharex=True, squeeze=False)[:, 0]
    for axes, (name, by_hook) in zip(panels, curves.items(), strict=True):
        for hook, (steps, values) in by_hook.items():
            axes.plot(steps, values, linewidth=1.2, label=hook)
        positive = min(min(values) for _, values in by_hook.values()) > 0
        if name in _LOGARITHMIC and positive:
            axes.set_yscale("log")
        else:
            axes.set_ylim(0, 1.1 * max(max(values) for _, values in by_hook.values()) or 1)
        if name == "dead_fraction":
            axes.yaxis.set_major_formatter(PercentFormatter(1))
        axes.set_title(_CURVES[name], loc="left", fontsize="medium")
        axes.grid(alpha=0.3)
    hooks = [hook for hook in next(iter(curves.values())) if hook]
    if len(hooks) > 1:
        panels[0].legend(fontsize="small")
    panels[-1].set_xlabel("step")
    panels[-1].xaxis.set_major_formatter(EngFormatter(sep=""))
    figure.suptitle(f"Training of {hooks[0]}" if len(hooks) == 1 else "Training")
    return figure


def _densities(reports: Sequence[dict[str, Any]]) -> dict[str, Densities]:
    """Return the histograms of density by hook that a run's reports hold, where there are at least two."""
    found: dict[str, Densities] = {}
    for report in reports:
        histogram = report.get("density_histogram")
        if not (isinstance(histogram, dict) and isinstance(report.get("hook"), str)):
            continue
        numbers = [report.get("step"), histogram.get("never"), *(histogram.get("counts") or [])]
        if len(numbers) > 2 and all(map(jsons.is_finite, numbers)):
            found.setdefault(report["hook"], []).append((numbers[0], numbers[2:], numbers[1]))
    return {hook: some for hook, some in found.items() if len(some) > 1}


def _over_training(hook: str, densities: Densities) -> "Figure":
    """Return the histogram of density, report by report, over the share of latents that did not fire."""
    import numpy as np
    from matplotlib.ticker import EngFormatter, PercentFormatter

    from jsae.metrics import BINS_PER_DECADE

    steps = [step for step, _, _ in densities]
    bins = max(len(counts) for _, counts, _ in densities)
    latents = [sum(counts) + never for _, counts, never in densities]
    shares = np.zeros((bins, len(steps)))
    for column, (_, counts, _) in enumerate(densities):
        shares[bins - len(counts) :, column] = np.divide(counts, max(latents[column], 1))
    figure = _figure((_SIZE[0], 1.3 * _SIZE[1]))
    upper, lower = figure.subplots(2, sharex=True, height_ratios=(3, 1))
    centres = (np.arange(bins) + 0.5 - bins) / BINS_PER_DECADE
    image = upper.pcolormesh(steps, centres, np.where(shares > 0, shares, np.nan), shading="nearest", cmap="viridis")
    figure.colorbar(image, ax=upper, label="share of latents", format=PercentFormatter(1))
    upper.set(title=f"{hook}: how often latents fire", ylabel="log10 of the share of tokens")
    lower.plot(steps, [never / max(number, 1) for (_, _, never), number in zip(densities, latents, strict=True)])
    lower.set(xlabel="step", ylabel="never fire", ylim=(0, None))
    lower.yaxis.set_major_formatter(PercentFormatter(1))
    lower.xaxis.set_major_formatter(EngFormatter(sep=""))
    lower.grid(alpha=0.3)
    return figure


# ---- layers and sweeps ---------------------------------------------------------------------------------------------


def _layers(entries: dict[str, dict[str, Any]]) -> "Figure":
    """Return explained variance and recovered loss of every hook, in the order of the hooks."""
    figure = _figure(_SIZE)
    axes = figure.subplots()
    scores = {
        "explained variance": [entry.get("explained_variance") for entry in entries.values()],
        "loss recovered (CE score)": [
            (entry.get("model_performance_preservation") or {}).get("ce_loss_score") for entry in entries.values()
        ],
    }
    for name, values in scores.items():
        axes.plot(
            range(len(values)),
            [value if jsons.is_finite(value) else float("nan") for value in values],
            "o-",
            label=name,
        )
    axes.set_xticks(range(len(entries)), list(entries), rotation=30, ha="right", fontsize="small")
    axes.set(title="What the SAE of every layer keeps", ylabel="1 is all")
    axes.legend()
    axes.grid(alpha=0.3)
    return figure


def _frontier(sweep: Run) -> list[tuple[str, str, float, float]]:
    """Return variant, hook, L0 and FVU of everything in a sweep that is evaluated; [] if it is not a sweep."""
    points = []
    for variant in sweep.variants if sweep.config_file.is_file() else []:
        if not variant.table_file("eval").is_file():
            continue
        try:
            evaluation = variant.evaluation
        except ValueError:  # the variant's own commands report it
            continue
        for hook, entry in evaluation.items():
            if jsons.is_finite(entry.get("l0")) and jsons.is_finite(entry.get("fvu")):
                points.append((variant.path.name, hook, entry["l0"], entry["fvu"]))
    return points


def _sweep(points: list[tuple[str, str, float, float]]) -> "Figure":
    """Return FVU against L0, a line per hook and a name per variant."""
    figure = _figure(_SIZE)
    axes = figure.subplots()
    for hook in dict.fromkeys(hook for _, hook, _, _ in points):
        own = sorted((l0, fvu, name) for name, other, l0, fvu in points if other == hook)
        axes.plot([l0 for l0, _, _ in own], [fvu for _, fvu, _ in own], "o-", label=hook)
        for l0, fvu, name in own:
            axes.annotate(name, (l0, fvu), (4, 4), textcoords="offset points", fontsize="small")
    axes.set(title="Sparsity against error", xlabel="L0: active latents per token", ylabel="FVU")
    axes.legend(fontsize="small")
    axes.grid(alpha=0.3)
    return figure
