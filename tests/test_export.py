"""Exports: what was trained, what lies in the files worked out in numpy, and what torch and SAELens make of them."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sae_lens
import torch
from safetensors.numpy import load_file, save_file

from bridge import torch_sae
from jsae import export
from jsae.architectures import ARCHITECTURES, SAE, SAEConfig, make, sae_config
from jsae.ops import Codes, Latents
from jsae.settings import ConfigError

D, F, L, N = 6, 20, 3, 50
METADATA = {
    "model_name": "toy",
    "hook_name": "blocks.1.ln2.hook_normalized",
    "hook_name_out": "blocks.1.hook_mlp_out",
    "context_size": 8,
    "prepend_bos": True,
}
SETTINGS = {
    "topk": {"k": 4},
    "abstopk": {"k": 4},
    "batchtopk": {"k": 4},
    "matryoshka": {"k": 4, "nested_widths": (5,)},
}
CROSSCODERS = {
    "relu": sae_config("relu", L * D, F, layers=L),
    "topk": sae_config("topk", L * D, F, k=4, layers=L),
    "abstopk": sae_config("abstopk", L * D, F, k=4, layers=L),
    "batchtopk": sae_config("batchtopk", L * D, F, k=4, layers=L),
    "jumprelu": sae_config("jumprelu", L * D, F, layers=L),
    "gated": sae_config("gated", L * D, F, layers=L),
}
TRANSCODERS = {
    "transcoder": sae_config("relu", D, F, d_out=D + 1),
    "skip_transcoder": sae_config("relu", D, F, d_out=D + 1, skip=True),
    "jumprelu_transcoder": sae_config("batchtopk", D, F, k=4, d_out=D + 1),
    "jumprelu_skip_transcoder": sae_config("jumprelu", D, F, d_out=D + 1, skip=True),
}


def made(config: SAEConfig) -> SAE:
    """An SAE whose every number is as if it had been trained."""
    sae = make(config, key=jax.random.key(0))
    for i, name in enumerate(("W_enc", "b_dec", "W_skip", "b_enc", "b_gate", "b_mag", "r_mag", "log_threshold")):
        if hasattr(sae, name):
            noise = 0.3 * jax.random.normal(jax.random.key(i), getattr(sae, name).shape)
            getattr(sae, name)[...] = getattr(sae, name) + noise
    if hasattr(sae, "threshold") and config.architecture == "batchtopk":
        sae.threshold[...] = jnp.float32(0.4)
    return sae


def layered(*factors: float) -> np.ndarray:
    return np.repeat(np.float32(factors), D)


def written(folder: Path, config: SAEConfig, sae: SAE, scale, scale_out) -> tuple[dict, dict[str, np.ndarray]]:
    """Return the contents of an export's files."""
    export.write(folder, config, sae.arrays(), scale, scale_out, METADATA)
    return json.loads((folder / "cfg.json").read_text()), load_file(folder / "sae_weights.safetensors")


def dense(latents: Latents) -> np.ndarray:
    return np.asarray(latents.dense(N, F) if isinstance(latents, Codes) else latents)


def close(ours: np.ndarray, theirs: np.ndarray) -> None:
    assert ours.shape == theirs.shape
    assert np.abs(ours - theirs).max() < 1e-5 * np.abs(theirs).max()


def by_hand(cfg: dict, w: dict[str, np.ndarray], x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Latents and reconstructions, (n, layers, d), of a crosscoder's file, from the words of its documentation."""
    w = {name: array.astype(np.float64) for name, array in w.items()}
    h = sum((x[:, layer] - w["b_dec"][layer]) @ w["W_enc"][layer] for layer in range(cfg["layers"]))
    if cfg["activation"] == "gated":
        latents = np.where(h + w["b_gate"] > 0, np.maximum(h * np.exp(w["r_mag"]) + w["b_mag"], 0), 0)
    else:
        pre = h + w["b_enc"]
        size = {"topk": pre, "abstopk": np.abs(pre)}.get(cfg["activation"])
        if size is not None:
            least = np.sort(size, axis=1)[:, -cfg["k"], None]
            latents = np.where(size >= least, pre, 0)
            latents = latents if cfg["activation"] == "abstopk" else np.maximum(latents, 0)
        else:
            latents = np.where(pre > w.get("threshold", 0), np.maximum(pre, 0), 0)
    return latents, np.einsum("nf,fld->nld", latents, w["W_dec"]) + w["b_dec"]


@pytest.mark.parametrize("name", CROSSCODERS)
def test_a_crosscoder_comes_back_as_it_was_with_the_scale_of_every_layer_folded(name, tmp_path):
    config, sae = CROSSCODERS[name], made(CROSSCODERS[name])
    scale = layered(0.5, 3.0, 11.0)
    cfg, weights = written(tmp_path / "sae", config, sae, scale, scale)
    x = np.random.default_rng(0).normal(size=(N, L, D)).astype(np.float32) / np.float32([[0.5], [3.0], [11.0]])
    beside = x.reshape(N, L * D)
    scaled = jnp.asarray(beside * scale)
    latents = sae.encode(scaled)
    expected = np.asarray(sae.decode(latents, scaled)) / scale

    found, y_hat = by_hand(cfg, weights, x)
    np.testing.assert_array_equal(found != 0, dense(latents) != 0)
    close(y_hat.reshape(N, L * D), expected)
    ours = torch_sae.load(tmp_path / "sae")
    with torch.no_grad():
        close(ours.encode(torch.from_numpy(beside)).numpy(), found)
        close(ours(torch.from_numpy(beside)).numpy(), expected)
    assert (ours.layers, ours.d_in, ours.d_out, ours.is_transcoder) == (L, L * D, L * D, False)


def test_the_files_of_a_crosscoder_are_what_is_written_about_them(tmp_path):
    config = CROSSCODERS["batchtopk"]
    scale = layered(0.5, 3.0, 11.0)
    cfg, weights = written(tmp_path / "sae", config, made(config), scale, scale)
    assert (cfg["architecture"], cfg["activation"], cfg["layers"], cfg["d_in"], cfg["d_sae"]) == (
        "crosscoder",
        "jumprelu",
        L,
        D,
        F,
    )
    assert {name: w.shape for name, w in weights.items()} == {
        "W_enc": (L, D, F),
        "W_dec": (F, L, D),
        "b_dec": (L, D),
        "b_enc": (F,),
        "threshold": (F,),
    }
    np.testing.assert_allclose(np.linalg.norm(weights["W_dec"].reshape(F, -1), axis=1), 1, atol=1e-6)


def test_one_scale_and_unit_rows_fold_as_worked_out_by_hand():
    """scale 2: W_enc times 2, W_dec and b_dec over 2; then norms of 1/2 go from W_dec to W_enc and the biases."""
    weights = {
        "W_enc": np.array([[1.0, 2.0], [3.0, 4.0]]),
        "W_dec": np.array([[0.0, 1.0], [-1.0, 0.0]]),
        "b_dec": np.array([8.0, 6.0]),
        "b_enc": np.array([1.0, 2.0]),
        "threshold": np.array([4.0, 8.0]),
    }
    folded = export.fold(weights, 2.0, 2.0)
    np.testing.assert_array_equal(folded["W_enc"], [[1, 3], [2, 4]])
    np.testing.assert_array_equal(folded["W_dec"], [[0, 1], [-1, 0]])
    np.testing.assert_array_equal(folded["b_dec"], [4, 3])
    np.testing.assert_array_equal(folded["b_enc"], [0.5, 1])
    np.testing.assert_array_equal(folded["threshold"], [2, 4])


def test_a_skip_path_and_two_scales_fold_as_worked_out_by_hand():
    """Read at scale 2, made at scale 4: W_skip times 2 / 4; rows of norm 3 become 3/4, which goes to the latents."""
    weights = {
        "W_enc": np.array([[1.0, 2.0]]),
        "W_dec": np.array([[0.0, 3.0, 0.0]]),
        "b_dec": np.array([4.0, 8.0, 12.0]),
        "W_skip": np.arange(6.0).reshape(3, 2),
        "b_enc": np.array([8.0]),
    }
    folded = export.fold(weights, 2.0, 4.0)
    np.testing.assert_array_equal(folded["W_enc"], [[1.5], [3]])
    np.testing.assert_array_equal(folded["W_dec"], [[0, 1, 0]])
    np.testing.assert_array_equal(folded["b_dec"], [1, 2, 3])
    np.testing.assert_array_equal(folded["W_skip"], np.arange(6.0).reshape(3, 2) / 2)
    np.testing.assert_array_equal(folded["b_enc"], [6])


@pytest.mark.parametrize("architecture", ["topk", "abstopk"])
def test_averaged_weights_choose_the_same_latents_when_they_are_exported(architecture, tmp_path):
    """Their rows have other norms than 1: were those folded one by one, the largest latents would be others."""
    config = sae_config(architecture, D, F, k=3)
    sae = made(config)
    sae.W_dec[...] = sae.W_dec * jnp.linspace(0.3, 1, F)[:, None]
    written(tmp_path / "sae", config, sae, 4.0, 4.0)
    x = np.random.default_rng(0).normal(size=(N, D)).astype(np.float32)
    scaled = jnp.asarray(4 * x)
    expected = np.asarray(sae.decode(sae.encode(scaled), scaled)) / 4
    for found in (torch_sae.load(tmp_path / "sae"), sae_lens.SAE.load_from_disk(str(tmp_path / "sae"))):
        with torch.no_grad():
            close(found(torch.from_numpy(x)).numpy(), expected)


# ---- SAELens's own operations --------------------------------------------------------------------------------------

SAELENS_FORMS = {name: sae_config(name, D, F, **SETTINGS.get(name, {})) for name in ARCHITECTURES}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("form", [*SAELENS_FORMS, *TRANSCODERS])
def test_what_saelens_does_with_an_sae_works_on_an_export(form, tmp_path):
    """Load, fold decoder norms, name, cast, save and load again: the same numbers after each."""
    config = SAELENS_FORMS.get(form) or TRANSCODERS[form]
    cfg, _ = written(tmp_path / "sae", config, made(config), 2.0, 2.0)
    lens = sae_lens.SAE.load_from_disk(str(tmp_path / "sae"))
    x = torch.from_numpy(np.random.default_rng(0).normal(size=(N, D))).float()
    ours = torch_sae.load(tmp_path / "sae")
    with torch.no_grad():
        latents, y_hat = lens.encode(x), lens(x)
        decoded = lens.decode(latents)
    folded = sae_lens.SAE.load_from_disk(str(tmp_path / "sae"), fold_W_dec_norm=True)
    lens.save_model(tmp_path / "again")
    again = sae_lens.SAE.load_from_disk(str(tmp_path / "again"))
    folded.save_model(tmp_path / "folded")
    readers = (folded, again, ours, torch_sae.load(tmp_path / "again"), torch_sae.load(tmp_path / "folded"))
    for reader in readers:
        with torch.no_grad():
            assert torch.equal(reader.encode(x) != 0, latents != 0)
            close(reader.encode(x).numpy(), latents.numpy())
            close(reader.decode(latents).numpy(), decoded.numpy())
            close(reader(x).numpy(), y_hat.numpy())
    assert lens.get_name() == f"sae_toy_blocks.1.ln2.hook_normalized_{F}"
    assert again.cfg.to_dict() == lens.cfg.to_dict()
    half = again.to(dtype=torch.bfloat16)
    half.save_model(tmp_path / "half")
    with torch.no_grad():
        rounded = sae_lens.SAE.load_from_disk(str(tmp_path / "half"))(x.bfloat16()).float()
        error = (torch_sae.load(tmp_path / "half")(x) - rounded).norm(dim=1) / rounded.norm(dim=1)
    assert error.median() < 0.03
    assert cfg.get("rescale_acts_by_decoder_norm") == (True if form in ("topk", "abstopk") else None)


@pytest.mark.parametrize("architecture", ["topk", "abstopk"])
def test_norms_that_differ_are_not_announced_as_foldable(architecture, tmp_path):
    """Latents are ranked without their decoder norms, so folding those would choose others: SAELens refuses it."""
    config = sae_config(architecture, D, F, k=3)
    sae = made(config)
    sae.W_dec[...] = sae.W_dec * jnp.linspace(0.3, 1, F)[:, None]
    cfg, _ = written(tmp_path / "sae", config, sae, 4.0, 4.0)
    assert cfg["rescale_acts_by_decoder_norm"] is False
    with pytest.raises(NotImplementedError, match="not safe"):
        sae_lens.SAE.load_from_disk(str(tmp_path / "sae"), fold_W_dec_norm=True)


# ---- transcoders ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", TRANSCODERS)
def test_a_transcoder_with_its_own_scale_at_each_end_is_read_by_torch_and_saelens(form, tmp_path):
    config, sae = TRANSCODERS[form], made(TRANSCODERS[form])
    cfg, _ = written(tmp_path / "sae", config, sae, 0.25, 5.0)
    assert cfg["architecture"] == form
    assert (cfg["d_in"], cfg["d_out"], cfg["apply_b_dec_to_input"]) == (D, D + 1, False)
    x = 4 * np.random.default_rng(0).normal(size=(N, D)).astype(np.float32)
    scaled = jnp.asarray(0.25 * x)
    latents = sae.encode(scaled)
    expected = np.asarray(sae.decode(latents, scaled)) / 5
    ours, lens = torch_sae.load(tmp_path / "sae"), sae_lens.SAE.load_from_disk(str(tmp_path / "sae"))
    for found in (ours, lens):
        with torch.no_grad():
            close(found.encode(torch.from_numpy(x)).numpy(), dense(latents) / 5)
            close(found(torch.from_numpy(x)).numpy(), expected)
    assert (ours.is_transcoder, ours.d_in, ours.d_out) == (True, D, D + 1)
    assert lens.cfg.architecture() == form
    assert isinstance(lens, {"t": sae_lens.Transcoder, "s": sae_lens.SkipTranscoder}.get(form[0], sae_lens.SAE))
    assert lens.cfg.metadata.hook_name == "blocks.1.ln2.hook_normalized"
    assert lens.cfg.metadata.hook_name_out == "blocks.1.hook_mlp_out"


@pytest.mark.parametrize("architecture", ["topk", "abstopk", "gated"])
def test_a_transcoder_without_an_exported_form_is_refused_with_those_that_have_one(architecture):
    with pytest.raises(
        ConfigError, match=f"no exported form of a {architecture} transcoder: use batchtopk, matryoshka"
    ):
        export.architecture(sae_config(architecture, D, F, d_out=D, **SETTINGS.get(architecture, {})))


def test_weights_that_are_broken_are_not_written(tmp_path):
    config = sae_config("relu", D, F)
    sae = made(config)
    sae.b_enc[...] = sae.b_enc.at[3].set(jnp.nan)
    with pytest.raises(ConfigError, match="b_enc holds numbers that are not finite"):
        written(tmp_path / "sae", config, sae, 1.0, 1.0)
    sae = made(config)
    sae.W_dec[...] = sae.W_dec.at[3].set(0)
    with pytest.raises(ConfigError, match="1 decoder rows have norm 0"):
        written(tmp_path / "sae", config, sae, 1.0, 1.0)
    assert not list(tmp_path.iterdir())


# ---- files of others -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def crosscoder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("exports") / "crosscoder"
    config = CROSSCODERS["jumprelu"]
    written(folder, config, made(config), layered(1, 2, 3), layered(1, 2, 3))
    return folder


@pytest.fixture(scope="module")
def transcoder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("exports") / "transcoder"
    config = TRANSCODERS["skip_transcoder"]
    written(folder, config, made(config), 1.0, 2.0)
    return folder


def changed(source: Path, folder: Path, cfg: dict, weights: dict[str, np.ndarray | None]) -> Path:
    """A copy with other settings and weights; None leaves one out."""
    folder.mkdir()
    found = json.loads((source / "cfg.json").read_text()) | cfg
    (folder / "cfg.json").write_text(json.dumps({name: v for name, v in found.items() if v is not None}))
    arrays = load_file(source / "sae_weights.safetensors") | weights
    save_file(
        {n: np.ascontiguousarray(w) for n, w in arrays.items() if w is not None}, folder / "sae_weights.safetensors"
    )
    return folder


ODD_CROSSCODERS = {
    "a fraction of layers": ({"layers": 3.0}, {}, r"must be positive integers, not \{'layers': 3\.0"),
    "layers that are a word": ({"layers": "3"}, {}, "must be positive integers"),
    "layers that are true": ({"layers": True}, {}, "must be positive integers"),
    "no layers": ({"layers": None}, {}, "must be positive integers"),
    "fewer layers than there are": ({"layers": 2}, {}, "a crosscoder of 2 layers of width 6 has"),
    "layers of no width": ({"d_in": 0}, {}, "must be positive integers"),
    "too many latents to believe": ({"d_sae": 2**60}, {}, "a crosscoder of 3 layers"),
    "an unknown activation": (
        {"activation": "sparsemax"},
        {},
        "activation 'sparsemax' is unknown: expected one of standard, topk",
    ),
    "an activation that is a list": ({"activation": ["topk"]}, {}, "is unknown"),
    "no activation": ({"activation": None}, {}, "activation None is unknown"),
    "an activation that is a transcoder": ({"activation": "transcoder"}, {}, "activation 'transcoder' is unknown"),
    "a flat encoder": ({}, {"W_enc": np.zeros((L * D, F), np.float32)}, r"the file \{'W_enc': \(18, 20\)"),
    "no decoder": ({}, {"W_dec": None}, "'W_dec': None"),
    "a threshold too few": ({}, {"threshold": np.zeros(F - 1, np.float32)}, r"'threshold': \(19,\)"),
    "an array too many": ({}, {"secret": np.zeros(1, np.float32)}, "'secret'"),
    "a bias that is not finite": ({}, {"b_dec": np.full((L, D), np.inf, np.float32)}, "b_dec holds numbers that are"),
    "a bias that is subtracted nowhere": ({"apply_b_dec_to_input": False}, {}, "apply_b_dec_to_input must be true"),
    "a topk without k": ({"activation": "topk"}, {"threshold": None}, "k is None"),
}


@pytest.mark.parametrize("what", ODD_CROSSCODERS)
def test_a_crosscoder_that_is_not_what_it_says_is_refused_with_what_is_wrong(what, crosscoder, tmp_path):
    cfg, weights, complaint = ODD_CROSSCODERS[what]
    with pytest.raises(ValueError, match=complaint):
        torch_sae.load(changed(crosscoder, tmp_path / "odd", cfg, weights))


ODD_TRANSCODERS = {
    "no width of what it makes": ({"d_out": None}, {}, "the file has"),
    "a width that is a fraction": ({"d_out": 7.0}, {}, "must be positive integers"),
    "a bias subtracted from the input": ({"apply_b_dec_to_input": True}, {}, "apply_b_dec_to_input must be false"),
    "nothing said about the bias": ({"apply_b_dec_to_input": None}, {}, "apply_b_dec_to_input must be false"),
    "no skip path": ({}, {"W_skip": None}, "W_skip"),
    "a skip path the wrong way round": ({}, {"W_skip": np.zeros((D, D + 1), np.float32)}, "W_skip"),
    "a skip path it should not have": ({"architecture": "transcoder"}, {}, "W_skip"),
    "no SAE of SAELens": ({"architecture": "topk_transcoder", "k": 3}, {}, "'topk_transcoder' is unknown"),
    "an architecture that is a table": ({"architecture": {}}, {}, r"architecture \{\} is unknown"),
    "an SAE with another width to make": ({"architecture": "standard", "apply_b_dec_to_input": True}, {}, "W_dec"),
}


@pytest.mark.parametrize("what", ODD_TRANSCODERS)
def test_a_transcoder_that_is_not_what_it_says_is_refused_with_what_is_wrong(what, transcoder, tmp_path):
    cfg, weights, complaint = ODD_TRANSCODERS[what]
    with pytest.raises(ValueError, match=complaint):
        torch_sae.load(changed(transcoder, tmp_path / "odd", cfg, weights))


@pytest.mark.parametrize("text", ["", "{", "[1]", "null", '{"architecture": "crosscoder"}', "[" * 10**5, "\xff"])
def test_a_broken_cfg_is_refused_by_name(text, crosscoder, tmp_path):
    folder = changed(crosscoder, tmp_path / "odd", {}, {})
    (folder / "cfg.json").write_text(text, encoding="latin-1")
    with pytest.raises(ValueError, match="odd"):
        torch_sae.load(folder)


@pytest.mark.parametrize("size", [0, 7, 8, 100, 1000])
def test_a_truncated_file_of_weights_is_refused_by_name(size, crosscoder, tmp_path):
    folder = changed(crosscoder, tmp_path / "odd", {}, {})
    whole = (folder / "sae_weights.safetensors").read_bytes()
    (folder / "sae_weights.safetensors").write_bytes(whole[:size])
    with pytest.raises(ValueError, match="odd holds a broken export"):
        torch_sae.load(folder)


def test_every_architecture_leaves_as_a_form_that_is_read(tmp_path):
    for architecture in ARCHITECTURES:
        config = sae_config(architecture, D, F, **SETTINGS.get(architecture, {}))
        written(tmp_path / architecture, config, made(config), 1.0, 1.0)
        assert torch_sae.load(tmp_path / architecture).architecture == export.architecture(config)
        wider = dataclasses.replace(config, layers=2)
        assert export.architecture(wider) == export.architecture(config)
