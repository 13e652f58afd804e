"""Files that the real sae-lens writes, of every version and setting: they load as sae-lens computes, or are refused."""

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sae_lens
import torch
from sae_lens.registry import get_sae_class, get_sae_training_class
from safetensors.torch import load_file, save_file

import jsae
from bridge import torch_sae

D, F, K, N = 12, 40, 5, 64
VERSION = "6.54.12"
SAES = ("standard", "gated", "jumprelu", "topk", "abstopk")
TRANSCODERS = ("transcoder", "skip_transcoder", "jumprelu_transcoder", "jumprelu_skip_transcoder")
EXACT = 2e-5
"""Relative to the largest number: both compute in float32, in another order."""
ROUNDED = {"float32": EXACT, "float64": EXACT, "float16": 0.003, "bfloat16": 0.025}
"""The median relative error of a token's reconstruction by a module in the file's own type."""


def normal(seed: int, *shape: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape)).float()


def trained(module: torch.nn.Module) -> torch.nn.Module:
    """The module with weights as if trained: decoder rows of norms between 0.5 and 2, biases that matter."""
    with torch.no_grad():
        for i, (name, weight) in enumerate(sorted(module.named_parameters())):
            drawn = normal(i, *weight.shape)
            if name in ("threshold", "log_threshold"):
                drawn = 0.3 + 0.2 * drawn.abs()
            elif name.startswith("W_dec"):
                drawn = torch.nn.functional.normalize(drawn, dim=1) * torch.linspace(0.5, 2, len(drawn))[:, None]
            elif weight.ndim == 1:
                drawn = 0.3 * drawn
            else:
                drawn = drawn / weight.shape[-2] ** 0.5
            weight.copy_(drawn)
    return module


def made(architecture: str, **settings: Any) -> sae_lens.SAE:
    """An SAE of the real library."""
    kind, config = get_sae_class(architecture)
    if "transcoder" in architecture:
        settings = {"d_out": D + 3, "apply_b_dec_to_input": False} | settings
    if architecture in ("topk", "abstopk"):
        settings = {"k": K} | settings
    return trained(kind(config(d_in=D, d_sae=F, **settings)))


def saved(folder: Path, sae: sae_lens.SAE, **cfg: Any) -> Path:
    """As its own save_model writes it, with other settings in cfg.json; None removes one."""
    sae.save_model(folder)
    return rewritten(folder, **cfg)


def rewritten(folder: Path, **cfg: Any) -> Path:
    found = json.loads((folder / "cfg.json").read_text()) | cfg
    (folder / "cfg.json").write_text(json.dumps({name: v for name, v in found.items() if v is not None}))
    return folder


def legacy(folder: Path, **cfg: Any) -> Path:
    """A file of version 5: no metadata, what describes the SAE between the settings."""
    described = {"metadata": None, "model_name": "toy", "hook_name": "blocks.0.hook_resid_post"}
    return rewritten(folder, **(described | cfg))


def tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> Path:
    """The weights, changed in place."""
    weights = load_file(folder / "sae_weights.safetensors")
    change(weights)
    save_file({name: w.contiguous() for name, w in weights.items()}, folder / "sae_weights.safetensors")
    return folder


def inputs() -> torch.Tensor:
    return 2 * normal(99, N, D) + 1


def relative(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    assert ours.shape == theirs.shape
    return float((ours - theirs.float()).abs().max() / theirs.float().abs().max())


@torch.no_grad()
def agree(ours: torch_sae.TorchSAE, theirs: sae_lens.SAE) -> None:
    """The same latents are chosen, and encode, decode and forward give the same numbers."""
    x = inputs()
    latents, expected = ours.encode(x), theirs.encode(x)
    assert torch.equal(latents != 0, expected != 0)
    assert 0 < (latents != 0).sum() < latents.numel()
    assert relative(latents, expected) < EXACT
    assert relative(ours.decode(expected.float()), theirs.decode(expected)) < EXACT
    reconstruction = theirs(x)
    assert relative(ours(x), reconstruction) < EXACT
    with torch.enable_grad():
        assert relative(ours(x).detach(), reconstruction) < EXACT
    k = ours.cfg.get("k", 3)
    values, indices = ours.encode_sparse(x, k)
    sparse = ours.decode_sparse(values, indices)
    chosen = torch.zeros_like(latents).scatter(-1, indices, values)
    assert relative(sparse, ours.decode(chosen)) < EXACT


@torch.no_grad()
def agree_rounded(ours: torch_sae.TorchSAE, folder: Path, dtype: str) -> None:
    """With the library in the file's own type, whose rounding may choose another latent here and there."""
    theirs = sae_lens.SAE.load_from_disk(str(folder))
    assert theirs.dtype == getattr(torch, dtype)
    x = inputs()
    expected = theirs(x.to(theirs.dtype)).float()
    error = (ours(x) - expected).norm(dim=-1) / expected.norm(dim=-1)
    assert float(error.median()) < ROUNDED[dtype]


@torch.no_grad()
def agree_in_jax(ours: torch_sae.TorchSAE, folder: Path) -> None:
    """jsae computes what torch computes."""
    x, jax_sae = inputs(), jsae.load(folder)
    latents = torch.from_numpy(np.array(jax_sae.encode(x.numpy())))
    assert relative(latents, ours.encode(x)) < EXACT
    assert relative(torch.from_numpy(np.array(jax_sae(x.numpy()))), ours(x)) < EXACT
    assert jax_sae.architecture == ours.architecture


def in_float32(folder: Path) -> sae_lens.SAE:
    return sae_lens.SAE.load_from_disk(str(folder), dtype="float32")


# ---- formats with an exact rewrite ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "bfloat16"])
@pytest.mark.parametrize("architecture", ["topk", "abstopk"])
def test_latents_rescaled_by_decoder_norms_are_folded_and_the_same_are_chosen(architecture, dtype, tmp_path):
    folder = saved(tmp_path / "sae", made(architecture, rescale_acts_by_decoder_norm=True, dtype=dtype))
    ours = torch_sae.load(folder)
    agree(ours, in_float32(folder))
    agree_rounded(ours, folder, dtype)
    torch.testing.assert_close(ours.W_dec.norm(dim=1), torch.ones(F))
    plain = torch_sae.load(rewritten(folder, rescale_acts_by_decoder_norm=False))
    assert not torch.equal(plain.encode(inputs()) != 0, ours.encode(inputs()) != 0)


@pytest.mark.parametrize("architecture", SAES)
def test_a_bias_that_is_not_subtracted_is_folded_into_the_encoder(architecture, tmp_path):
    folder = saved(tmp_path / "sae", made(architecture, apply_b_dec_to_input=False))
    ours = torch_sae.load(folder)
    agree(ours, in_float32(folder))
    assert ours.cfg["apply_b_dec_to_input"] is True
    assert relative(ours(inputs()), torch_sae.load(rewritten(folder, apply_b_dec_to_input=True))(inputs())) > 0.01


def test_weights_are_rounded_to_the_dtype_of_the_file_as_saelens_rounds_them(tmp_path):
    folder = saved(tmp_path / "sae", made("standard"), dtype="bfloat16")
    ours, theirs = torch_sae.load(folder), sae_lens.SAE.load_from_disk(str(folder))
    assert torch.equal(ours.W_dec, theirs.W_dec.float())
    assert not torch.equal(ours.W_dec, made("standard").W_dec)


def test_numbers_that_the_dtype_of_the_file_cannot_hold_are_refused(tmp_path):
    folder = saved(tmp_path / "sae", made("standard"), dtype="float16")
    tensors(folder, lambda w: w["b_dec"].fill_(1e6))
    with pytest.raises(ValueError, match=r"b_dec holds numbers that are not finite in float16"):
        torch_sae.load(folder)


CHECKPOINTS = ("standard", "gated", "jumprelu", "topk", "abstopk", "batchtopk", "matryoshka_batchtopk")


def checkpoint(architecture: str, folder: Path, **settings: Any) -> sae_lens.TrainingSAE:
    """A training SAE, saved as the trainer saves a checkpoint."""
    kind, config = get_sae_training_class(architecture)
    if "topk" in architecture:
        settings = {"k": K} | settings
    if "matryoshka" in architecture:
        settings |= {"matryoshka_widths": [F // 2, F]}
    sae = trained(kind(config(d_in=D, d_sae=F, **settings)))
    if "batch" in architecture:
        sae.topk_threshold.fill_(0.7)
    sae.save_model(folder)
    return sae


@pytest.mark.parametrize("architecture", CHECKPOINTS)
def test_a_training_checkpoint_loads_as_the_inference_form_that_saelens_would_write(architecture, tmp_path):
    sae = checkpoint(architecture, tmp_path / "checkpoint")
    sae.save_inference_model(tmp_path / "inference")
    ours = torch_sae.load(tmp_path / "checkpoint")
    agree(ours, in_float32(tmp_path / "inference"))
    agree(torch_sae.load(tmp_path / "inference"), in_float32(tmp_path / "inference"))
    assert ours.architecture in SAES
    agree_in_jax(ours, tmp_path / "checkpoint")


@pytest.mark.parametrize("apply_b_dec_to_input", [True, False])
@pytest.mark.parametrize("normalization", ["expected_average_only_in", "covariance_whitening"])
@pytest.mark.parametrize("architecture", CHECKPOINTS)
def test_estimated_statistics_beside_a_checkpoint_are_folded_as_the_trainer_folds_them(
    architecture, normalization, apply_b_dec_to_input, tmp_path
):
    from sae_lens.training.activation_scaler import ActivationScaler

    settings = {"normalize_activations": normalization, "apply_b_dec_to_input": apply_b_dec_to_input}
    sae = checkpoint(architecture, tmp_path / "checkpoint", **settings)
    scaler, batches = ActivationScaler(), itertools.repeat(inputs())
    if normalization == "covariance_whitening":
        scaler.estimate_whitening(D, batches, 2)
        scaler.save(str(tmp_path / "checkpoint" / "activation_scaler.json"))
        whitening = scaler.whitening
        sae.fold_activation_whitening(whitening.mean, whitening.matrix, whitening.inverse_matrix)
    else:
        scaler.estimate_scaling_factor(D, batches, 2)
        scaler.save(str(tmp_path / "checkpoint" / "activation_scaler.json"))
        sae.fold_activation_norm_scaling_factor(scaler.scaling_factor)
    sae.save_inference_model(tmp_path / "inference")
    ours = torch_sae.load(tmp_path / "checkpoint")
    agree(ours, in_float32(tmp_path / "inference"))
    agree_in_jax(ours, tmp_path / "checkpoint")


@pytest.mark.parametrize("normalization", ["expected_average_only_in", "covariance_whitening"])
def test_a_normalisation_whose_statistics_are_missing_is_refused(normalization, tmp_path):
    """SAELens loads such a file without any scaling and says nothing."""
    folder = saved(tmp_path / "sae", made("standard"), normalize_activations=normalization)
    with pytest.raises(ValueError, match=rf"cfg.json: normalize_activations is '{normalization}', but its statistics"):
        torch_sae.load(folder)


@pytest.mark.parametrize(
    "scaler", ["", "[]", '{"scaling_factor": null}', '{"scaling_factor": true}', '{"scaling_factor": 0}', "[" * 10**5]
)
def test_broken_statistics_are_refused_by_name(scaler, tmp_path):
    folder = saved(tmp_path / "sae", made("standard"), normalize_activations="expected_average_only_in")
    (folder / "activation_scaler.json").write_text(scaler)
    with pytest.raises(ValueError, match="activation_scaler"):
        torch_sae.load(folder)


@pytest.mark.parametrize("normalization", ["layer_norm", "constant_norm_rescale"])
def test_a_normalisation_by_token_is_refused_with_the_reason(normalization, tmp_path):
    folder = saved(tmp_path / "sae", made("standard", normalize_activations=normalization))
    with pytest.raises(ValueError, match=rf"normalize_activations is '{normalization}': scales every token"):
        torch_sae.load(folder)


def test_a_threshold_in_logarithms_is_read_as_the_trainer_of_saelens_reads_it(tmp_path):
    sae = made("jumprelu")
    folder = saved(tmp_path / "sae", sae)
    tensors(folder, lambda w: w.__setitem__("log_threshold", w.pop("threshold").log()))
    agree(torch_sae.load(folder), sae)


# ---- configurations before version 6 -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["activation_fn_str", "activation_fn"])
@pytest.mark.parametrize("architecture", ["topk", "standard", None])
def test_topk_of_an_old_configuration_keeps_its_k(architecture, name, tmp_path):
    folder = saved(tmp_path / "sae", made("topk"), k=None, rescale_acts_by_decoder_norm=None)
    legacy(folder, architecture=architecture, **{name: "topk", "activation_fn_kwargs": {"k": 3}})
    ours = torch_sae.load(folder)
    agree(ours, in_float32(folder))
    assert (ours.architecture, ours.cfg["k"]) == ("topk", 3)
    assert (ours.encode(inputs()) != 0).sum(-1).max() == 3


@pytest.mark.parametrize("architecture", ["standard", "gated", "jumprelu"])
def test_other_old_configurations_compute_as_saelens_does(architecture, tmp_path):
    folder = saved(tmp_path / "sae", made(architecture))
    legacy(
        folder,
        architecture=None if architecture == "standard" else architecture,
        reshape_activations=None,
        normalize_activations=False,
        activation_fn_str="relu",
        activation_fn_kwargs={},
        finetuning_scaling_factor=False,
        dtype="torch.float32",
        hook_layer=0,
        hook_head_index=None,
        sae_lens_training_version="3.0.0",
        context_size=128,
        prepend_bos=True,
        dataset_path="text",
        dataset_trust_remote_code=True,
    )
    ours = torch_sae.load(folder)
    agree(ours, in_float32(folder))
    assert ours.metadata["hook_name"] == "blocks.0.hook_resid_post"
    assert ours.metadata["model_name"] == "toy"
    assert ours.metadata["context_size"] == 128


def test_names_of_the_oldest_configurations_are_understood(tmp_path):
    folder = saved(tmp_path / "sae", made("standard"))
    legacy(folder, hook_name=None, hook_point="blocks.1.hook_mlp_out", hook_point_layer=1, normalize_activations=None)
    ours = torch_sae.load(folder)
    assert ours.metadata["hook_name"] == "blocks.1.hook_mlp_out"
    agree(ours, in_float32(folder))


@pytest.mark.parametrize("name", ["scaling_factor", "finetuning_scaling_factor"])
def test_factors_of_finetuning_multiply_latents_before_they_are_decoded(name, tmp_path):
    """By the words of SAELens 5, whose decode multiplied the latents; version 6 does not load such a file."""
    sae = made("standard")
    folder = legacy(saved(tmp_path / "sae", sae), architecture=None, finetuning_scaling_factor=True)
    factors = 0.5 + normal(7, F).abs()
    tensors(folder, lambda w: w.__setitem__(name, factors))
    ours = torch_sae.load(folder)
    with torch.no_grad():
        latents = sae.encode(inputs())
        assert relative(ours.encode(inputs()), latents) < EXACT
        assert relative(ours(inputs()), (latents * factors) @ sae.W_dec + sae.b_dec) < EXACT


def test_factors_of_one_change_nothing_and_others_must_be_announced(tmp_path):
    folder = legacy(saved(tmp_path / "sae", made("standard")), architecture=None, finetuning_scaling_factor=False)
    tensors(folder, lambda w: w.__setitem__("scaling_factor", torch.ones(F)))
    agree(torch_sae.load(folder), in_float32(folder))
    tensors(folder, lambda w: w["scaling_factor"].fill_(2))
    with pytest.raises(ValueError, match="finetuning_scaling_factor is false, but the weights hold scaling_factor"):
        torch_sae.load(folder)
    tensors(rewritten(folder, finetuning_scaling_factor=True), lambda w: w.pop("scaling_factor"))
    with pytest.raises(ValueError, match="finetuning_scaling_factor is true, but the weights hold no scaling_factor"):
        torch_sae.load(folder)


REFUSED_LEGACY = {
    "another activation": ({"activation_fn_str": "tanh-relu"}, "activation_fn is 'tanh-relu'"),
    "topk without k": ({"activation_fn_str": "topk"}, "k is None"),
    "topk of another architecture": ({"architecture": "gated", "activation_fn_str": "topk"}, "activation_fn is 'topk'"),
    "two activations": ({"activation_fn_str": "topk", "activation_fn": "relu"}, "activation_fn_str is 'topk'"),
    "other arguments": ({"activation_fn_str": "topk", "activation_fn_kwargs": {"j": 3}}, "activation_fn_kwargs is"),
    "arguments of relu": ({"activation_fn_str": "relu", "activation_fn_kwargs": {"k": 3}}, "activation_fn is 'relu'"),
    "two k": ({"activation_fn_str": "topk", "activation_fn_kwargs": {"k": 3}, "k": 4}, "k is 4: contradicts"),
    "activations by head": ({"hook_name": "blocks.0.attn.hook_z", "reshape_activations": None}, "hook_name is"),
    "one head": ({"hook_head_index": 3}, "hook_head_index is 3"),
    "scaling that is not folded": ({"normalize_activations": True}, "normalize_activations is 'expected_average"),
}


@pytest.mark.parametrize("what", REFUSED_LEGACY)
def test_an_old_configuration_that_cannot_be_computed_is_refused_by_name(what, tmp_path):
    cfg, complaint = REFUSED_LEGACY[what]
    folder = legacy(saved(tmp_path / "sae", made("standard")), architecture=None)
    with pytest.raises(ValueError, match=complaint):
        torch_sae.load(rewritten(folder, **cfg))


# ---- everything together -------------------------------------------------------------------------------------------


def drawn(seed: int) -> tuple[str, dict[str, Any], dict[str, Any]]:
    """A random architecture with settings that the library accepts, and what is changed in the file afterwards."""
    random = np.random.default_rng(seed)

    def one(*choices: Any) -> Any:
        return choices[random.integers(len(choices))]

    architecture = one(*SAES, *TRANSCODERS)
    settings = {"dtype": one("float32", "float64", "float16", "bfloat16")}
    if architecture in SAES:
        settings["apply_b_dec_to_input"] = one(True, False)
    if architecture in ("topk", "abstopk"):
        settings |= {"k": int(random.integers(1, F)), "rescale_acts_by_decoder_norm": one(True, False)}
    if one(True, False, False):
        normalizations = ("layer_norm", "constant_norm_rescale", "expected_average_only_in", "covariance_whitening")
        settings["normalize_activations"] = one(*normalizations)
    change = one({}, {}, {"metadata": None}, {"activation_fn_str": "relu"}, {"finetuning_scaling_factor": False})
    change |= one({}, {}, {"secret": 1}, {"activation_fn": "gelu"}, {"l1_coefficient": 5, "lr": [1, 2]})
    return architecture, settings, change


REFUSED_SETTINGS = ("normalize_activations", "activation_fn", "secret")


@pytest.mark.parametrize("seed", range(150))
def test_random_settings_compute_as_saelens_does_or_are_refused_by_name(seed, tmp_path):
    architecture, settings, change = drawn(seed)
    folder = saved(tmp_path / "sae", made(architecture, **settings), **change)
    asked = {**settings, **change}
    unsupported = [name for name in REFUSED_SETTINGS if asked.get(name) not in (None, "none")]
    if unsupported:
        with pytest.raises(ValueError, match=rf"^{folder}/cfg.json: .*({'|'.join(unsupported)})[^\n]*$"):
            torch_sae.load(folder)
        return
    ours = torch_sae.load(folder)
    if architecture in TRANSCODERS:
        with torch.no_grad():
            assert relative(ours(inputs()), in_float32(folder)(inputs())) < EXACT
            assert relative(ours.encode(inputs()), in_float32(folder).encode(inputs())) < EXACT
    else:
        agree(ours, in_float32(folder))
    agree_rounded(ours, folder, settings["dtype"])
    agree_in_jax(ours, folder)


def test_the_random_settings_are_not_all_of_one_kind():
    draws = [drawn(seed) for seed in range(150)]
    assert {d[0] for d in draws} == {*SAES, *TRANSCODERS}
    plain = [d for d in draws if not any({**d[1], **d[2]}.get(name) for name in REFUSED_SETTINGS)]
    assert 40 < len(plain) < 120
