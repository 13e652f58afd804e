"""The table of an evaluation: what it shows of probes, baselines and steering, and of older files without them."""

from experiments import evaluate_view

PROBES = {
    "examples": 100,
    "llm_test_accuracy": 0.9,
    "sae_top_1_test_accuracy": 0.85,
    "llm_top_1_test_accuracy": 0.7,
    "pca_top_1_test_accuracy": 0.75,
    "intervals": {
        "llm_test_accuracy": [0.88, 0.92],
        "sae_top_1_test_accuracy": [0.8, 0.9],
        "pca_top_1_test_accuracy": [0.7, 0.8],
    },
    "advantage": {"1": {"baseline": "pca", "difference": 0.1, "interval": [0.02, 0.17]}},
}


def shown(capsys, *entries: dict) -> dict[str, list[str]]:
    evaluate_view.show([(f"sae {i}", {"tokens": 10.0} | entry) for i, entry in enumerate(entries)])
    lines = (line.split("│") for line in capsys.readouterr().out.splitlines() if "│" in line)
    return {cells[1].strip(): [cell.strip() for cell in cells[2:-1]] for cells in lines}


def test_probes_are_shown_with_interval_and_best_baseline(capsys):
    rows = shown(capsys, {"sparse_probing": {"package": PROBES}})
    assert rows["package, by 1 latent"] == ["85.0% [80.0, 90.0]"]
    assert rows["by the best baseline"] == ["components 75.0% [70.0, 80.0]"]
    assert rows["difference, in points"] == ["+10.0 [2.0, 17.0]"]
    assert rows["by all channels"] == ["90.0% [88.0, 92.0]"]
    assert "package, by 5 latents" not in rows


def test_evaluations_without_intervals_are_shown_beside_newer_ones(capsys):
    older = {"sparse_probing": {"package": {"sae_top_1_test_accuracy": 0.5}, "syntax": None}}
    rows = shown(capsys, {"sparse_probing": {"package": PROBES}}, older)
    assert rows["package, by 1 latent"] == ["85.0% [80.0, 90.0]", "50.0%"]
    assert rows["difference, in points"] == ["+10.0 [2.0, 17.0]", "–"]


def test_tpp_is_marked_as_unreliable(capsys):
    rows = shown(capsys, {"tpp": {"package": {"tpp_threshold_10_total_metric": 0.25}}})
    names = list(rows)
    assert names.index("TPP of 10 latents, package") == 1 + next(
        i for i, name in enumerate(names) if name.startswith("unreliable (arXiv 2605.18229)")
    )


def test_steering_is_shown_with_its_baselines(capsys):
    def entry(median: float) -> dict:
        return {"median": median, "quartiles": [median - 1, median + 1], "latents": 7, "reached": 7}

    steering = {
        "following": {"latent": entry(2.0), "random": entry(0.5)},
        "promoted": {"latent": entry(1.5), "random": entry(0.0)},
        "own": {"random": entry(1.0)},
    }
    rows = shown(capsys, {"steering": steering | {"bits_per_byte": 0.01}})
    assert rows["what follows the label, by latents"] == ["+2.00 [1.00, 3.00] of 7"]
    assert rows["by random directions"] == ["+0.50 [-0.50, 1.50] of 7"]
    assert rows["tokens that it promotes, by latents"] == ["+1.50 [0.50, 2.50] of 7"]
    assert rows["by random directions, their own"] == ["+1.00 [0.00, 2.00] of 7"]
    assert rows["bits per byte that this costs"] == ["+0.0100"]
