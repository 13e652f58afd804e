"""Files that attack their reader are refused in one line, in bounded time and memory."""

import tempfile
from pathlib import Path

import numpy as np
import pytest
from fuzz_nanochat import CHANGES, damage, outcome
from hostile_files import HOSTILE
from hostile_table import MAX_MEGABYTES, MAX_SECONDS, OPENERS, Cost, costs
from tiny_nanochat import tiny, write

from bridge import nanochat
from bridge.nanochat import tokenizer as tokenizers
from bridge.nanochat.tokenizer import Tokenizer

BYTES = {bytes([i]): i for i in range(256)}


@pytest.fixture(scope="module")
def found() -> dict[str, Cost]:
    """Cost of each file, of every opener in one process."""
    found = {}
    for opener in OPENERS:
        chosen = [(name, make) for name, kind, make in HOSTILE if kind == opener]
        with tempfile.TemporaryDirectory() as folder:
            places = [Path(folder) / str(i) for i in range(len(chosen))]
            for place in places:
                place.mkdir()
            paths = [make(place) for (_, make), place in zip(chosen, places, strict=True)]
            answers = costs(opener, paths)
        found |= {f"{opener}: {name}": cost for (name, _), cost in zip(chosen, answers, strict=True)}
    return found


@pytest.mark.parametrize("name", [f"{opener}: {name}" for name, opener, _ in HOSTILE])
def test_a_hostile_file_is_refused_in_one_line_within_its_budget(found, name):
    cost = found[name]
    assert cost.error in ("ValueError", "FileNotFoundError", "OSError"), cost.message
    assert "\n" not in cost.message
    assert 0 < len(cost.message) < 1500
    assert cost.seconds < MAX_SECONDS
    assert cost.peak < MAX_MEGABYTES


def test_the_budget_is_one_that_python_itself_breaks(tmp_path):
    """The measurement measures: an honest but large file of strings is seen."""
    (tmp_path / "tokenizer.json").write_bytes(b'{"a":[' + b'"abc",' * 1_000_000 + b"1]}")
    (cost,) = costs("tokenizer", [tmp_path])
    assert cost.peak - cost.before > 40
    assert cost.seconds > 0


@pytest.mark.parametrize("seed", range(40))
def test_a_damaged_checkpoint_is_loaded_or_refused_in_one_line(tmp_path, seed):
    source = write(tmp_path / "honest", tiny("G7", n_layer=2), "G7")
    tokenizers.save(Tokenizer(BYTES), source)
    damage(source, tmp_path / "damaged", seed)
    assert outcome(tmp_path / "damaged")


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_of_the_weights_in_a_torch_file_is_always_noticed(tmp_path, change):
    """Its archive has checksums; what no checksum covers changes no weight."""
    folder = write(tmp_path, tiny("G7", n_layer=2), "G7")
    file = folder / "model_000000.pt"
    honest = file.read_bytes()
    expected = nanochat.load(folder).model.state_dict()
    loaded = 0
    for seed in range(60):
        file.write_bytes(change(honest, np.random.default_rng(seed)))
        if outcome(folder) == "loaded":
            loaded += 1
            weights = nanochat.load(folder).model.state_dict()
            assert all(bool((weights[name] == expected[name]).all()) for name in expected)
    assert loaded < 30
