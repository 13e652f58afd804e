"""The measurement of false alarms of model diffing, at a size that takes seconds."""

import json

import pytest
import python_text

from bridge.training import origins
from experiments.benches import alarms
from jsae.settings import ConfigError


def test_every_noise_and_number_of_dedicated_latents_is_counted(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(origins, "FITTED_TOKENS", 2000)
    text = python_text.copied(tmp_path, 20)
    sizes = {
        "num_activations": 8192,
        "batch_size": 256,
        "tokens": 1000,
        "context_size": 32,
        "expansion_factor": 1,
        "k": 8,
    }
    config = alarms.Config(
        data=text,
        noises=(0.01,),
        exclusive=(0, 8),
        out=str(tmp_path / "out.json"),
        runs=str(tmp_path / "runs"),
        **sizes,
    )
    assert alarms.main(config) == 0
    results = json.loads((tmp_path / "out.json").read_text())["results"]
    assert [(row["noise"], row["dedicated"]) for row in results] == [(0.01, 0), (0.01, 8)]
    for row in results:
        assert row["alarms"] == row["exclusive"] + row["weakened"] + row["rotated"] <= row["living"] <= 128
        assert row["dedicated_alarms"] + row["rare_alarms"] <= row["alarms"]
        assert row["dedicated_alarms"] <= 2 * row["dedicated"]
        assert all(0 < value < 1 for value in row["fvu"] + row["own_sae_fvu"])
    assert "false alarms" in capsys.readouterr().out


def test_settings_without_a_value_are_refused():
    with pytest.raises(ConfigError, match="need at least one value each"):
        alarms.Config(noises=())
