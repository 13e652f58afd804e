"""The measurement of what parts of the training recipes are worth."""

import json

import pytest

from experiments.benches import ablations
from jsae.architectures import sae_config
from jsae.config import TrainConfig

SIZES = {"num_activations": 120 * 64, "batch_size": 64, "heldout_activations": 2000}


def test_every_part_is_undone_alone_and_compared_with_the_default(tmp_path, capsys):
    out = tmp_path / "found.json"
    config = ablations.Config(subjects=("synthetic",), recipes=("jumprelu l0",), markdown=True, out=str(out), **SIZES)
    assert ablations.main(config) == 0
    rows = json.loads(out.read_text())["subjects"]["synthetic"]["results"]
    assert [row["undone"] for row in rows] == [name for name, _, _ in ablations.undone("jumprelu l0", 64, 256)]
    assert rows[0]["undone"] == ablations.AS_IT_IS
    assert rows[0]["fvu_over_default"] == 1
    fvus = [row["scores"]["fvu"] for row in rows]
    assert len(set(fvus)) == len(fvus)  # every part changes the training
    assert all(0 < row["scores"]["f1"] < 1 for row in rows)
    assert "| jumprelu l0 | nothing | " in capsys.readouterr().out


@pytest.mark.parametrize("recipe", ablations.RECIPES)
def test_parts_are_settings_that_differ_from_the_defaults(recipe):
    name, _, variant = recipe.partition(" ")
    given = {"target_l0": 4.0} if name in ("relu", "gated", "jumprelu") else {"k": 4}
    given |= {"jump_recipe": variant} if variant else {}
    given |= {"nested_widths": (16,)} if name == "matryoshka" else {}
    sizes = {"num_activations": 2**18, "batch_size": 512}
    default = sae_config(name, 64, 256, **given), TrainConfig(**sizes)
    for part, sae, train in ablations.undone(recipe, 64, 256):
        without = sae_config(name, 64, 256, **given, **sae), TrainConfig(**sizes, **train)
        assert (without == default) == (part == ablations.AS_IT_IS), part


def test_unknown_recipes_and_sizes_that_cannot_be_measured_are_refused():
    with pytest.raises(ValueError, match=r"recipes must be some of topk, .*, got l0"):
        ablations.Config(recipes=("l0",))
    with pytest.raises(ValueError, match="seeds must be at least 1"):
        ablations.Config(seeds=0)
    with pytest.raises(ValueError, match="less than 100 batches"):
        ablations.Config(num_activations=1000)
