"""circuit-tracer's feature files: read as its pages read them, by file and by byte range, they hold the records."""

import gzip
import json
import re
import struct
import subprocess
import sys
from pathlib import Path

import explorer_toy as toy
import numpy as np
import pytest

from bridge import circuit_tracer
from bridge.graph_names import token_text
from jsae.records.store import NON_ACTIVATING, Store, StoreError

LAYER = 2
KEYS = {  # of the feature model of circuit-tracer 0.5.0
    "transcoder_id": str,
    "index": int,
    "examples_quantiles": list,
    "top_logits": list,
    "bottom_logits": list,
    "act_min": float,
    "act_max": float,
    "quantile_values": list,
    "histogram": list,
    "activation_frequency": float,
}


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    toy.write_store(folder)
    return folder


@pytest.fixture(scope="module")
def store(run) -> Store:
    return Store(run / "explorer" / "records" / toy.HOOK)


@pytest.fixture(scope="module")
def data(store, run, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("data")
    circuit_tracer.write(store, run / "sae" / toy.HOOK, out, context=4)
    return out / toy.HOOK


def by_file(scan: Path, latent: int) -> dict:
    """As a page of the local server reads it."""
    return json.loads((scan / f"{circuit_tracer.pairing(LAYER, latent)}.json").read_text(encoding="utf-8"))


def by_range(scan: Path, number: int) -> dict:
    """As a page reads it from the hub: the number gives layer and latent, the index gives the bytes."""
    w = int((np.sqrt(8 * number + 1) - 1) // 2)
    latent = number - w * (w + 1) // 2
    entry = json.loads(gzip.decompress((scan / "features" / "index.json.gz").read_bytes()))[str(w - latent)]
    part = (scan / "features" / entry["filename"]).read_bytes()
    part = part[entry["offsets"][latent] : entry["offsets"][latent + 1] + 1]  # a range includes its end
    (size,) = struct.unpack("<I", part[:4])
    return json.loads(gzip.decompress(part[4 : 4 + size]))


def test_both_ways_to_read_a_feature_give_the_same(data):
    for latent in range(toy.D_SAE):
        feature = by_file(data, latent)
        assert feature == by_range(data, circuit_tracer.pairing(LAYER, latent))
        assert {key: type(value) for key, value in feature.items()} == KEYS
        assert feature["index"] == latent
        assert feature["transcoder_id"] == toy.HOOK


def test_a_number_names_one_pair():
    numbers = {circuit_tracer.pairing(layer, latent) for layer in range(20) for latent in range(50)}
    assert len(numbers) == 1000
    assert circuit_tracer.pairing(23, 5458) == (23 + 5458) * (23 + 5458 + 1) // 2 + 5458


def test_an_example_is_the_text_around_its_strongest_token(data, store):
    text, acts = toy.tokens(), toy.activations(toy.tokens())[..., toy.ORDINARY]
    shown = [e for group in by_file(data, toy.ORDINARY)["examples_quantiles"] for e in group["examples"]]
    pointers = [i for i in store.examples(toy.ORDINARY) if store["example_group"][i] != NON_ACTIVATING]
    assert len(shown) == len(pointers)
    for example, i in zip(shown, pointers, strict=True):
        row, at = int(store["example_row"][i]), int(store["example_position"][i])
        start, stop = max(at - 4, 0), at + 5
        np.testing.assert_array_equal(example["tokens_acts_list"], acts[row, start:stop])
        assert len(example["tokens"]) == len(example["tokens_acts_list"]) == len(text[row, start:stop])
        assert example["tokens"][example["train_token_ind"]] == " cat"
        assert example["tokens_acts_list"][example["train_token_ind"]] == store["example_value"][i]
        assert example["is_repeated_datapoint"] is False


def test_groups_are_ordered_from_the_strongest(data):
    names = [group["quantile_name"] for group in by_file(data, toy.DENSE)["examples_quantiles"]]
    assert names[0] == "Top activations"
    assert names[1:] == sorted(names[1:])
    assert all(re.fullmatch(r"Interval \d of 5: [\d.]+ to [\d.]+", name) for name in names[1:])


def test_white_space_and_split_characters_are_told_as_the_pages_tell_them(data):
    def tokens(latent: int) -> set[str]:
        return {
            t for group in by_file(data, latent)["examples_quantiles"] for e in group["examples"] for t in e["tokens"]
        }

    assert {"⏎", "→"} <= tokens(toy.BLANKS)
    assert {r"\xc3", r"\xa9"} <= tokens(toy.SPLIT)
    assert not {"\n", "\t", "\ufffd"} & (tokens(toy.BLANKS) | tokens(toy.SPLIT))
    assert token_text(b"a\xf0\x9f") == r"a\xf0\x9f"
    assert token_text(b"\xed\xa0\x80") == r"\xed\xa0\x80"


def test_a_dead_latent_has_a_file_without_examples(data):
    dead = by_file(data, toy.DEAD)
    assert dead["examples_quantiles"] == dead["quantile_values"] == []
    assert dead["act_min"] == dead["act_max"] == dead["activation_frequency"] == sum(dead["histogram"]) == 0


def test_numbers_of_a_latent_are_those_of_its_activations(data, store):
    values = toy.activations(toy.tokens())[..., toy.DENSE]
    values = values[values > 0]
    dense = by_file(data, toy.DENSE)
    assert dense["act_min"] == values.min()
    assert dense["act_max"] == values.max()
    assert sum(dense["histogram"]) == len(values)
    assert dense["activation_frequency"] == len(values) / store.header.tokens
    bin_width = (values.max() - values.min()) / toy.BINS
    assert dense["quantile_values"] == sorted(dense["quantile_values"])
    np.testing.assert_allclose(
        dense["quantile_values"], np.quantile(values, np.arange(1, 101) / 100, method="inverted_cdf"), atol=bin_width
    )


def test_percentiles_do_not_lie_in_empty_bins():
    hist = np.zeros(10, np.uint32)
    hist[0], hist[9] = 50, 50
    found = np.array(circuit_tracer.percentiles(hist, 0.0, 10.0))
    assert (found[:50] <= 1).all()
    assert (found[50:] >= 9).all()
    assert found[-1] == 10


def test_the_same_records_give_the_same_bytes_and_earlier_files_go(store, run, tmp_path):
    first = circuit_tracer.write(store, run / "sae" / toy.HOOK, tmp_path, scan="one")
    held = {file: file.read_bytes() for file in first}
    (tmp_path / "one" / "99999.json").write_text("{}")
    (tmp_path / "one" / "notes.txt").write_text("kept")
    second = circuit_tracer.write(store, run / "sae" / toy.HOOK, tmp_path, scan="one")
    assert {file: file.read_bytes() for file in second} == held
    assert {file.name for file in (tmp_path / "one").iterdir()} == {file.name for file in first[:-2]} | {
        "features",
        "notes.txt",
    }


def test_invalid_names_and_contexts_are_refused(store, run, tmp_path):
    sae = run / "sae" / toy.HOOK
    for scan in ("", "..", "a/b", "./data"):
        with pytest.raises(ValueError, match="not a valid folder name"):
            circuit_tracer.write(store, sae, tmp_path, scan=scan)
    with pytest.raises(ValueError, match="negative"):
        circuit_tracer.write(store, sae, tmp_path, context=-1)
    other = toy.write_store(tmp_path / "other", seed=1).parents[2] / "sae" / toy.HOOK
    with pytest.raises(StoreError, match="gather the records again"):
        circuit_tracer.write(store, other, tmp_path)


def test_numbers_that_are_none_are_refused(run, tmp_path):
    path = toy.write_store(tmp_path)
    ranges = np.load(path / "hist_range.npy")
    ranges[toy.ORDINARY, 1] = np.nan
    np.save(path / "hist_range.npy", ranges)
    with pytest.raises(StoreError, match=f"latent {toy.ORDINARY} .* are not finite"):
        circuit_tracer.write(Store(path), tmp_path / "sae" / toy.HOOK, tmp_path / "out")


def test_neither_torch_nor_jax_is_loaded():
    check = "import sys, bridge.circuit_tracer; assert not {'torch', 'jax'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", check], check=True, cwd=Path(__file__).parents[1])
