"""The measurement of the default learning rate: what it trains, and what it writes."""

import json

import pytest

from experiments.benches import rates

SIZES = {"num_activations": 120 * 64, "batch_size": 64, "heldout_activations": 2048, "places": 1}


def test_the_default_is_one_of_the_rates_and_its_ratio_to_the_best_is_written(tmp_path):
    out = tmp_path / "rates.json"
    names = ("matryoshka", "relu")
    config = rates.Config(subjects=("synthetic",), architectures=names, out=str(out), **SIZES)
    assert rates.main(config) == 0
    found = json.loads(out.read_text())["subjects"]["synthetic"]["results"]
    assert [row["architecture"] for row in found] == list(names)
    for row in found:
        tried = [trial["rate"] for trial in row["tried"]]
        default = row["default"]["rate"]
        assert tried == pytest.approx([default / 2**0.5, default, default * 2**0.5], rel=1e-5)
        assert row["best"]["fvu"] == min(trial["fvu"] for trial in row["tried"])
        assert row["default_over_best"] == pytest.approx(row["default"]["fvu"] / row["best"]["fvu"])
        assert row["default_over_best"] >= 1
        assert len({trial["fvu"] for trial in row["tried"]}) == 3, "rates make a difference"


def test_no_rates_beside_the_default_leave_the_scores_of_the_default(tmp_path):
    out = tmp_path / "rates.json"
    sizes = SIZES | {"places": 0}
    assert rates.main(rates.Config(subjects=("synthetic",), architectures=("topk",), out=str(out), **sizes)) == 0
    (row,) = json.loads(out.read_text())["subjects"]["synthetic"]["results"]
    assert row["tried"] == [row["default"]]
    assert row["default_over_best"] == 1


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"subjects": ("moon",)}, "subjects must be some of"),
        ({"places": -1}, "places must be at least 0"),
        ({"k": 0}, "k=0"),
        ({"num_activations": 100}, "less than 100 batches"),
    ],
)
def test_settings_that_cannot_work_are_refused(given, message):
    with pytest.raises(ValueError, match=message):
        rates.Config(**given)
