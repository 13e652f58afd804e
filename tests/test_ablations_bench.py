"""The measurement of what parts of the training recipes are worth."""

import json

import numpy as np
import pytest
import torch

from bridge import torch_sae
from experiments.benches import ablations, whitening
from experiments.benches.quality_subjects import Subject
from jsae import export
from jsae.architectures import sae_config
from jsae.config import TrainConfig

SIZES = {"num_activations": 120 * 64, "batch_size": 64, "heldout_activations": 2000}


def test_every_part_is_undone_alone_and_compared_with_the_default(tmp_path, capsys):
    out = tmp_path / "found.json"
    config = ablations.Config(subjects=("synthetic",), recipes=("jumprelu l0",), markdown=True, out=str(out), **SIZES)
    assert ablations.main(config) == 0
    rows = json.loads(out.read_text())["subjects"]["synthetic"]["results"]
    assert [row["changed"] for row in rows] == [name for name, _, _ in ablations.changes("jumprelu l0", 64, 256, 4)]
    assert rows[0]["changed"] == ablations.AS_IT_IS
    assert rows[0]["fvu_over_default"] == 1
    fvus = [row["scores"]["fvu"] for row in rows]
    assert len(set(fvus)) == len(fvus)  # every part changes the training
    assert all(0 < row["scores"]["f1"] < 1 for row in rows)
    assert "| jumprelu l0 | nothing | " in capsys.readouterr().out


def test_an_sae_of_whitened_activations_is_scored_on_the_activations(tmp_path):
    """Four components of sizes 1 to 1,000: the identity in the whitened space is the identity of the activations."""
    rng = np.random.default_rng(0)
    acts = (
        rng.standard_normal((5000, 4)) * [1, 10, 100, 1000] @ np.linalg.qr(rng.standard_normal((4, 4)))[0] + 5
    ).astype(np.float32)
    np.save(tmp_path / "train.npy", acts)
    subject = Subject("toy", tmp_path, 4, lambda export: {"x_hat": torch_sae.load(export)(torch.from_numpy(acts))})
    data = whitening.whitened(subject, tmp_path / "whitened")
    z = np.load(data.folder / "train.npy")
    np.testing.assert_allclose(np.cov(z.T), np.eye(4), atol=5e-3)
    identity = np.concatenate([np.eye(4), -np.eye(4)]).astype(np.float32)
    weights = {
        "W_enc": identity,
        "W_dec": identity,
        "b_dec": np.zeros(4, np.float32),
        "b_enc": np.zeros(8, np.float32),
    }
    export.write(tmp_path / "sae", sae_config("relu", 4, 8), weights, 1.0, 1.0, {})
    np.testing.assert_allclose(data.scores(tmp_path / "sae")["x_hat"], acts, rtol=1e-4, atol=1e-2)


def test_only_the_changes_that_are_named_are_made(tmp_path):
    out = tmp_path / "found.json"
    chosen = {"subjects": ("synthetic",), "recipes": ("topk",), "changes": ("with hier", "AuxK")}
    assert ablations.main(ablations.Config(**chosen, out=str(out), **SIZES)) == 0
    rows = json.loads(out.read_text())["subjects"]["synthetic"]["results"]
    assert [row["changed"] for row in rows] == [
        "nothing",
        "AuxK: 8 times its weight",
        "AuxK: 1 / d_in of its weight",
        "with hierarchical_k of a quarter and a half",
    ]


@pytest.mark.parametrize("recipe", ablations.RECIPES)
def test_parts_are_settings_that_differ_from_the_defaults(recipe):
    name, _, variant = recipe.partition(" ")
    given = {"target_l0": 4.0} if name in ("relu", "gated", "jumprelu") else {"k": 4}
    given |= {"jump_recipe": variant} if variant else {}
    given |= {"nested_widths": (16,)} if name == "matryoshka" else {}
    sizes = {"num_activations": 2**18, "batch_size": 512}
    default = sae_config(name, 64, 256, **given), TrainConfig(**sizes)
    for change, sae, train in ablations.changes(recipe, 64, 256, 4):
        changed = sae_config(name, 64, 256, **given, **sae), TrainConfig(**sizes, **train)
        same = (ablations.AS_IT_IS, ablations.FIXED, ablations.WHITENED)
        assert (changed == default) == (change in same), change


def test_unknown_recipes_and_sizes_that_cannot_be_measured_are_refused():
    with pytest.raises(ValueError, match=r"recipes must be some of topk, .*, got l0"):
        ablations.Config(recipes=("l0",))
    with pytest.raises(ValueError, match=r"no change of topk begins with 'AuxK: none': choose of .*encoder_start: 1"):
        ablations.Config(recipes=("topk",), changes=("with hier", "AuxK: none"))
    with pytest.raises(ValueError, match="seeds must be at least 1"):
        ablations.Config(seeds=0)
    with pytest.raises(ValueError, match="less than 100 batches"):
        ablations.Config(num_activations=1000)
