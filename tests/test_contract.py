"""Every architecture of the package keeps the contract (`jsae.testing`), and torch and SAELens read what it exports."""

from pathlib import Path

import jax
import numpy as np
import pytest
import sae_lens
import torch

from bridge import torch_sae
from jsae import export
from jsae.architectures import ARCHITECTURES, SAEConfig, sae_config
from jsae.state import TrainState
from jsae.testing import contract, toy
from jsae.testing.contract import decode, dense, encode, same_latents, scaled, trained_on

pytestmark = pytest.mark.usefixtures("quickly_compiled")
D, F = toy.D_IN, 64
CASES = {
    "topk": sae_config("topk", D, F, k=3),
    "hierarchical": sae_config("topk", D, F, k=3, hierarchical_k=(1, 2)),
    "batchtopk": sae_config("batchtopk", D, F, k=3),
    "matryoshka": sae_config("matryoshka", D, F, k=3, nested_widths=(52,)),
    "abstopk": sae_config("abstopk", D, F, k=3),
    "relu": sae_config("relu", D, F, l1_coefficient=2.0),
    "gated": sae_config("gated", D, F, l1_coefficient=2.0, target_l0=2.5),
    "jumprelu": sae_config("jumprelu", D, F, l0_coefficient=0.5, target_l0=2.0),
    "jumprelu_l0": sae_config("jumprelu", D, F, l0_coefficient=0.5, jump_recipe="l0", target_l0=2.0),
    "transcoder": sae_config("relu", D, F, l1_coefficient=1.0, d_out=toy.D_OUT),
    "skip_transcoder": sae_config("batchtopk", D, F, k=3, d_out=toy.D_OUT, skip=True),
    "crosscoder": sae_config("batchtopk", 2 * D, F, k=3, layers=2),
}
SHARDED = ("topk", "hierarchical", "batchtopk", "relu", "gated", "jumprelu", "skip_transcoder")

# The jump lets gradients through near a threshold only, where no pre-activation may be at the start.
for case_name, case_config in CASES.items():
    tests = contract(case_config, sharded=case_name in SHARDED, no_gradient=("log_threshold",))
    globals()[f"Test_{case_name}"] = tests


def test_every_architecture_is_in_the_contract():
    assert {c.architecture for c in CASES.values()} == set(ARCHITECTURES)
    assert len(jax.devices()) == 4  # so that a sharded step is a real one


@pytest.fixture(params=CASES)
def case(request) -> SAEConfig:
    return CASES[request.param]


@pytest.fixture
def state(case) -> TrainState:
    return trained_on(case)[0]


def scales(state: TrainState) -> tuple[np.ndarray, np.ndarray]:
    """Of input and target, for the export."""
    return np.asarray(state.scale), np.asarray(state.scale_out)


def relative(ours: np.ndarray, theirs: np.ndarray) -> float:
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


def test_jax_torch_and_saelens_agree_on_the_export(case, state, tmp_path):
    """But for a crosscoder, whose layout is this project's own; test_export.py works out its files by hand."""
    sae = state.sae
    metadata = {"model_name": "toy", "hook_name": "blocks.0.hook_resid_post", "context_size": 8, "prepend_bos": True}
    export.write(tmp_path / "sae", case, sae.arrays(), *scales(state), metadata)
    readers = [torch_sae.load(tmp_path / "sae")]
    if case.layers == 1:
        readers.append(sae_lens.SAE.load_from_disk(str(tmp_path / "sae")))
        assert readers[-1].cfg.metadata.hook_name == "blocks.0.hook_resid_post"
    x, _ = scaled(case, state)
    latents = encode(sae, x)
    norms = np.linalg.norm(np.asarray(sae.W_dec) / state.scale_out, axis=1)  # which go into the latents
    by_jax, y_hat = dense(case, latents) * norms, np.asarray(decode(sae, latents, x)) / state.scale_out
    raw = torch.from_numpy(np.asarray(x) / np.asarray(state.scale))
    thresholds = dict(readers[0].named_parameters()).get("threshold")
    thresholds = None if thresholds is None else thresholds.detach().numpy()
    for reader in readers:
        with torch.no_grad():
            encoded = reader.encode(raw)
            same = same_latents(encoded.numpy(), by_jax, thresholds)
            assert relative(encoded.numpy()[same], by_jax[same]) < 1e-5
            assert relative(reader.forward(raw).numpy()[same], y_hat[same]) < 1e-5
            if not case.skip:
                assert relative(reader.decode(encoded).numpy()[same], y_hat[same]) < 1e-5
    np.testing.assert_allclose(readers[0].W_dec.norm(dim=1), 1, atol=1e-5)


def test_an_export_replaces_the_one_before_and_leaves_nothing_else(case, state, tmp_path):
    for _ in range(2):
        export.write(tmp_path / "sae", case, state.sae.arrays(), *scales(state), {})
    export.write_sparsity(tmp_path / "sae", np.linspace(0, 1, case.d_sae))
    assert [p.name for p in tmp_path.iterdir()] == ["sae"]
    names = {"cfg.json", "sae_weights.safetensors", "sparsity.safetensors"}
    assert {p.name for p in Path(tmp_path / "sae").iterdir()} == names
