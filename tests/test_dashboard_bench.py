"""The measurement of dashboards: jsae's side on given activations, and the error when the peer ends."""

import sys

import numpy as np
import pytest
import torch

from bridge import torch_sae
from experiments.benches import dashboard
from jsae.records.store import Store


@pytest.fixture
def config():
    return dashboard.Config(prompts=6, length=16, d_model=8, layers=3, vocab_size=40, d_sae=12, k=3)


def test_every_latent_is_counted_on_the_activations_that_lie_there(config, tmp_path):
    dashboard._lay_out(config, tmp_path)
    random = np.random.default_rng(1)
    acts = torch.from_numpy(random.standard_normal((6, 16, 8)).astype(np.float32))
    np.save(tmp_path / "unembed.npy", random.standard_normal((40, 8)).astype(np.float32))
    (tmp_path / "activations").mkdir()
    for i, part in enumerate(acts.split(4)):
        torch.save({config.hook: part.clone()}, tmp_path / "activations" / f"model_activations_{i}.pt")
    assert dashboard._ours(config, tmp_path) > 0
    store = Store(tmp_path / "records" / config.hook)
    codes = torch_sae.load(tmp_path / "sae" / config.hook).encode(acts)
    codes[:, 0] = 0  # BOS
    np.testing.assert_array_equal(store["count"], (codes > 0).sum((0, 1)))
    np.testing.assert_allclose(store["max"], codes.amax((0, 1)), rtol=1e-5)
    assert len(list((tmp_path / "ours").glob("*/batch-0.json"))) == 1


def test_figures_are_per_latent_and_compared_round_by_round(config):
    records = {dashboard.PEER: [10.0, 20.0], dashboard.OURS: [1.0, 1.0]}
    found = dashboard._figures(config, records, {name: [2 * s for s in own] for name, own in records.items()})
    assert found["times_faster"]["records"]["median"] == 15
    assert found["ms_per_latent"]["files"][dashboard.OURS]["median"] == pytest.approx(2000 / 12)
    assert found["ns_per_latent_and_token"]["records"][dashboard.OURS]["median"] == pytest.approx(1e9 / 12 / 96)


def test_a_peer_that_ends_says_why(tmp_path):
    with (
        pytest.raises(OSError, match=r"process ended:\n(.*\n)*.*job\.json"),
        dashboard._peer(sys.executable, tmp_path),
    ):
        pytest.fail("it was ready without a job")


@pytest.mark.parametrize("wrong", [{"rounds": 1}, {"k": 300}, {"d_model": 6}, {"vocab_size": 70000}, {"prompts": 0}])
def test_sizes_that_cannot_be_measured_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        dashboard.Config(**wrong)
