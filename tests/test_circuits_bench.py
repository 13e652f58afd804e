"""The measurement of attribution graphs."""

import json

import pytest

from experiments.benches import circuits
from jsae.settings import ConfigError

SIZES = {"depth": 2, "vocab_size": 64, "tokens": 6, "features": 60, "device": "cpu"}


def test_operations_are_counted_and_do_not_depend_on_how_many_rows_are_computed(tmp_path):
    counts = []
    for rows in (1, 3):
        out = tmp_path / f"{rows}.json"
        assert circuits.main(circuits.Config(rows_per_layer=rows, out=str(out), **SIZES)) == 0
        results = json.loads(out.read_text())["results"]
        assert results["features"] == 60
        assert results["sources"] == 60 + 2 * 6 + 6
        counts.append(results["TFLOP of all rows"])
    assert counts[0] == pytest.approx(counts[1])
    width, tokens = 128, 6
    # of a row of layer 1: back through W_o, the pattern, W_v and the skip of layer 0, at every token
    through = 2 * tokens * (3 * width**2 + tokens * width)
    assert counts[0] * 1e12 > 30 * through


def test_a_whole_graph_is_timed_and_exact(tmp_path):
    out = tmp_path / "whole.json"
    assert circuits.main(circuits.Config(out=str(out), **SIZES)) == 0
    results = json.loads(out.read_text())["results"]
    assert results["seconds to trace"] > 0
    assert results["seconds to prune"] > 0
    assert results["largest residual"] < 1e-5


def test_sizes_that_cannot_be_measured_are_refused():
    with pytest.raises(ConfigError):
        circuits.Config(tokens=1)
    with pytest.raises(ConfigError):
        circuits.Config(rows_per_layer=0)
