"""Pictures of an evaluation: which lines they have, and that they are written where they belong."""

import json
from pathlib import Path

import numpy as np
import pytest
from toy_saes import export, toy_sae

from bridge.run import Run
from experiments import plots

HOOKS = ("blocks.1.hook_resid_post", "blocks.2.hook_resid_post")


def entry(l0: float, fvu: float) -> dict:
    histogram = {"log10_edges": [-3.0, -2.0, -1.0], "counts": [3, 4], "never": 1}
    score = {"ce_loss_score": 1 - fvu}
    numbers = {"l0": l0, "fvu": fvu, "explained_variance": 1 - fvu, "tokens": 1000.0}
    return numbers | {"density_histogram": histogram, "model_performance_preservation": score}


@pytest.fixture
def sweep(tmp_path) -> Path:
    """A sweep of two variants with two hooks, trained and evaluated."""
    (tmp_path / "config.json").write_text('{"flags": {}, "facts": {}}')
    for k, fvu in ((8, 0.2), (16, 0.1)):
        run = tmp_path / f"k{k}"
        lines = []
        for number, hook in enumerate(HOOKS):
            export(toy_sae("topk", 8, 16, hook_name=hook), run / "sae" / hook)
            lines += [
                {"step": s, "hook": hook, "fvu": 1 / s + number, "l0": k, "dead_fraction": 0.0, "learning_rate": 1e-3}
                for s in (1, 2)
            ]
        (run / "config.json").write_text('{"flags": {}, "facts": {}}')
        (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        (run / "eval.json").write_text(json.dumps({hook: entry(k, fvu) for hook in HOOKS}))
    return tmp_path


def test_hooks_of_a_training_have_lines_of_their_own(sweep):
    curves = plots._curves(plots._reports(sweep / "k8" / "metrics.jsonl"))
    assert list(curves) == ["fvu", "l0", "dead_fraction", "learning_rate"]
    assert curves["fvu"] == {HOOKS[0]: ([1, 2], [1.0, 0.5]), HOOKS[1]: ([1, 2], [2.0, 1.5])}
    panels = plots._training(curves).axes
    assert [panel.get_title(loc="left") for panel in panels] == [plots._CURVES[name] for name in curves]
    assert [len(panel.lines) for panel in panels] == [2] * 4
    np.testing.assert_array_equal(panels[0].lines[1].get_ydata(), [2.0, 1.5])
    assert [panel.get_yscale() for panel in panels] == ["log", "linear", "linear", "linear"]


def test_densities_are_drawn_report_by_report_from_the_highest_bin_down(tmp_path):
    def line(step: int, counts: list, never: int, hook: str = HOOKS[0]) -> str:
        return json.dumps({"step": step, "hook": hook, "density_histogram": {"counts": counts, "never": never}})

    lines = [line(1, [1, 2, 3, 4], 10), line(2, [5, 5], 10), line(2, [1], 1, HOOKS[1]), line(3, ["x"], 0), "[", "{}"]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    densities = plots._densities(plots._reports(tmp_path / "metrics.jsonl"))
    assert densities == {HOOKS[0]: [(1, [1, 2, 3, 4], 10), (2, [5, 5], 10)]}
    upper, lower, _ = plots._over_training(HOOKS[0], densities[HOOKS[0]]).axes
    shares = upper.collections[0].get_array().filled(0)
    np.testing.assert_allclose(np.nan_to_num(shares), [[0.05, 0], [0.1, 0], [0.15, 0.25], [0.2, 0.25]])
    np.testing.assert_allclose(lower.lines[0].get_ydata(), [0.5, 0.5])


def test_pictures_are_written_into_the_run_and_its_sweep(sweep):
    run = Run(sweep / "k8")
    plots.draw(run, run.evaluation)
    assert {path.name for path in run.plots_folder.iterdir()} == {
        "training.png",
        "layers.png",
        *(f"density_{hook}.png" for hook in HOOKS),
    }
    assert (sweep / "plots" / "sweep.png").read_bytes().startswith(b"\x89PNG")


def test_a_sweep_has_a_point_for_every_evaluated_sae(sweep):
    points = plots._frontier(Run(sweep))
    assert points == [(f"k{k}", hook, k, fvu) for k, fvu in ((16, 0.1), (8, 0.2)) for hook in HOOKS]
    lines = plots._sweep(points).axes[0].lines
    assert [(list(line.get_xdata()), list(line.get_ydata())) for line in lines] == [([8, 16], [0.2, 0.1])] * 2
    (sweep / "k16" / "eval.json").unlink()
    assert len(plots._frontier(Run(sweep))) == 2


def test_a_run_by_itself_is_no_sweep(sweep, tmp_path):
    (sweep / "config.json").unlink()
    assert plots._frontier(Run(sweep)) == []
    assert plots._frontier(Run(tmp_path / "nowhere")) == []
