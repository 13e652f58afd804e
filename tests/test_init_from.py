"""Training that continues an exported SAE: the same SAE before the first step, or refused with what it is."""

import dataclasses
import json
import shutil
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sae_lens
import torch
from sae_lens.registry import get_sae_class

import jsae
from jsae import axes, export, loop, pretrained, trained
from jsae.architectures import ARCHITECTURES, SAEConfig, make, sae_config
from jsae.config import TrainConfig
from jsae.saelens import Plain
from jsae.settings import ConfigError
from jsae.state import TrainState

pytestmark = pytest.mark.usefixtures("quickly_compiled")
D, F, D_OUT, N = 12, 40, 9, 256
CASES: dict[str, SAEConfig] = {
    "topk": sae_config("topk", D, F, k=3),
    "batchtopk": sae_config("batchtopk", D, F, k=3),
    "matryoshka": sae_config("matryoshka", D, F, k=3, nested_widths=(10,)),
    "abstopk": sae_config("abstopk", D, F, k=3),
    "relu": sae_config("relu", D, F),
    "gated": sae_config("gated", D, F),
    "jumprelu": sae_config("jumprelu", D, F, target_l0=4.0),
    "transcoder": sae_config("relu", D, F, d_out=D_OUT),
    "skip transcoder": sae_config("jumprelu", D, F, d_out=D_OUT, skip=True),
    "batchtopk skip transcoder": sae_config("batchtopk", D, F, k=3, d_out=D_OUT, skip=True),
    "crosscoder": sae_config("topk", 2 * D, F, k=3, layers=2),
    "batchtopk crosscoder": sae_config("batchtopk", 2 * D, F, k=3, layers=2),
    "gated crosscoder": sae_config("gated", 2 * D, F, layers=2),
}
RUN = TrainConfig(num_activations=10 * 64, batch_size=64, learning_rate=1e-3)


def acts(width: int, seed: int = 0, rows: int = N) -> np.ndarray:
    drawn = np.random.default_rng(seed).standard_normal((rows, width)) @ np.random.default_rng(7).standard_normal(
        (width, width)
    )
    return (drawn + 2).astype(np.float32)


def sample(config: SAEConfig, factor: float = 1.0, rows: int = N):
    """Activations for an SAE: an array, or one of every layer, or input and target."""
    widths = [D] * config.layers + ([D_OUT] if config.is_transcoder else [])
    parts = tuple((1 + i) * factor * acts(width, i, rows) for i, width in enumerate(widths))
    return parts if len(parts) > 1 else parts[0]


def as_trained(config: SAEConfig) -> Plain:
    """An exported SAE with weights as if trained."""
    random = np.random.default_rng(3)
    sae = make(config, key=jax.random.key(5))
    for name in ("W_enc", "b_dec", *sae.initial_latents(config), *(("W_skip",) if config.skip else ())):
        array = getattr(sae, name)
        array[...] = array[...] + jnp.asarray(0.3 * random.standard_normal(array.shape), jnp.float32)
    for name in sae.initial_statistics(config):
        getattr(sae, name)[...] = jnp.float32(0.4)
    start = state_of(config)
    return export.plain(config, sae.arrays(), np.asarray(start.scale), np.asarray(start.scale_out))


def state_of(config: SAEConfig, start: Plain | None = None, factor: float = 1.0) -> TrainState:
    member = loop.Member(config, RUN)
    found = None if start is None else pretrained.from_plain(start, "the file")
    return loop.init([member], (sample(config, factor),), starts=[found])[0]


def exported(state: TrainState) -> Plain:
    return export.plain(state.sae.config, state.sae.arrays(), np.asarray(state.scale), np.asarray(state.scale_out))


def assert_same(ours: Plain, theirs: Plain, tolerance: float = 1e-6) -> None:
    assert ours.cfg | {"metadata": None} == theirs.cfg | {"metadata": None}
    assert ours.weights.keys() == theirs.weights.keys()
    for name, weight in theirs.weights.items():
        assert np.abs(ours.weights[name] - weight).max() <= tolerance * np.abs(weight).max(), name


def test_every_architecture_is_among_the_cases():
    assert {config.architecture for config in CASES.values()} == set(ARCHITECTURES)


@pytest.mark.parametrize("factor", [1.0, 0.03], ids=["the same activations", "smaller activations"])
@pytest.mark.parametrize("case", CASES)
def test_without_a_step_the_export_is_what_it_continues(case, factor):
    start = as_trained(CASES[case])
    state = state_of(CASES[case], start, factor)
    assert_same(exported(state), start)
    assert not any(
        np.any(leaf) for leaf in (*map(np.asarray, jax.tree.leaves(state.opt)), np.asarray(state.since_fired))
    )
    np.testing.assert_allclose(np.linalg.norm(state.sae.W_dec, axis=1), 1, atol=1e-6)


def test_on_a_mesh_the_state_is_the_same_and_divided():
    config = CASES["batchtopk"]
    start = pretrained.from_plain(as_trained(config), "the file")
    whole = state_of(config, start.plain)
    mesh = axes.make_mesh(latent=2, devices=jax.devices()[:4])
    (sharded,) = loop.init([loop.Member(config, RUN)], (sample(config),), mesh=mesh, starts=[start])
    for ours, theirs in zip(jax.tree.leaves(sharded), jax.tree.leaves(whole), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)
    assert not sharded.sae.W_dec[...].sharding.is_fully_replicated


FOREIGN = {
    "standard": ("relu", {}),
    "gated": ("gated", {}),
    "jumprelu": ("jumprelu", {}),
    "topk": ("topk", {"k": 5, "rescale_acts_by_decoder_norm": True}),
    "abstopk": ("abstopk", {"k": 5, "rescale_acts_by_decoder_norm": True}),
    "jumprelu_skip_transcoder": ("jumprelu", {"d_out": D_OUT, "apply_b_dec_to_input": False}),
}


def foreign(folder: Path, architecture: str, **settings) -> sae_lens.SAE:
    """An SAE of the real library, with decoder norms from 0.5 to 2."""
    kind, config = get_sae_class(architecture)
    sae = kind(config(d_in=D, d_sae=F, **settings))
    random = np.random.default_rng(11)
    with torch.no_grad():
        for name, weight in sorted(sae.named_parameters()):
            drawn = torch.from_numpy(random.standard_normal(tuple(weight.shape))).float() / 3
            if name == "threshold":
                drawn = drawn.abs()
            elif name == "W_dec":
                drawn = torch.nn.functional.normalize(drawn, dim=1) * torch.linspace(0.5, 2, F)[:, None]
            weight.copy_(drawn)
    sae.save_model(folder)
    return sae


@pytest.mark.parametrize("form", FOREIGN)
def test_an_sae_of_saelens_computes_the_same_before_the_first_step(form, tmp_path):
    architecture, settings = FOREIGN[form]
    theirs = foreign(tmp_path / "sae", form, **settings)
    start = pretrained.read(tmp_path / "sae")
    config = dataclasses.replace(
        sae_config(architecture, D, F),
        d_out=settings.get("d_out"),
        skip="skip" in form,
        **{"k": 5} if "k" in settings else {},
    )
    (state,) = loop.init([loop.Member(config, RUN)], (sample(config),), starts=[start])
    ours = trained.TrainedSAE.from_state(state)
    x = acts(D, 99)
    with torch.no_grad():
        expected = theirs(torch.from_numpy(x)).numpy()
    assert np.abs(np.asarray(ours(x)) - expected).max() < 2e-6 * np.abs(expected).max()


def test_training_continues_with_the_error_of_what_it_continues(tmp_path):
    """And reports of the first steps show it: a new SAE needs longer."""
    config, run = sae_config("topk", D, F, k=4), dataclasses.replace(RUN, num_activations=64 * 300)
    data = acts(D, 1, 4096)
    first = jsae.train(data, config, run)
    first.save(tmp_path / "sae")
    short = dataclasses.replace(run, num_activations=64 * 5, learning_rate=1e-5)
    continued = jsae.train(data, config, short, init_from=tmp_path / "sae")
    assert continued.metrics["fvu"] < 1.1 * first.metrics["fvu"]
    assert jsae.train(data, config, short).metrics["fvu"] > 1.5 * first.metrics["fvu"]
    same = jsae.train(data, config, short, init_from=first)
    np.testing.assert_allclose(same.W_dec, continued.W_dec, atol=1e-6)


def test_a_run_resumes_without_the_directory_that_it_continued(tmp_path):
    config, data = sae_config("relu", D, F), acts(D, 1, 4096)
    jsae.train(data, config, RUN).save(tmp_path / "sae")
    options = {"checkpoints": tmp_path / "checkpoints", "checkpoint_every": 64 * 4, "report_every": 4}
    whole = jsae.train(data, config, RUN, init_from=tmp_path / "sae", report_every=4)
    reports = jsae.fit(data, config, RUN, init_from=tmp_path / "sae", **options)
    next(reports)
    next(reports)
    reports.close()
    shutil.move(tmp_path / "sae", tmp_path / "elsewhere")
    resumed = jsae.train(data, config, RUN, init_from=tmp_path / "sae", **options)
    np.testing.assert_array_equal(resumed.W_dec, whole.W_dec)
    with pytest.raises(ConfigError, match="init_from"):
        jsae.train(data, config, RUN, **options)


def test_a_new_run_needs_the_directory(tmp_path):
    for options in ({}, {"checkpoints": tmp_path}):
        with pytest.raises(FileNotFoundError, match="missing"):
            jsae.train(acts(D, 1), sae_config("relu", D, F), RUN, init_from=tmp_path / "missing", **options)


def renamed(plain: Plain, change) -> Plain:
    weights = {name: np.array(weight) for name, weight in plain.weights.items()}
    change(weights)
    return plain._replace(weights=weights)


REFUSED = {
    "another form": ("relu", "topk", "the file is a standard SAE, which topk, .*that can continue it are relu"),
    "an autoencoder for a transcoder": ("relu", "transcoder", "this run trains a transcoder"),
    "a transcoder for an autoencoder": ("transcoder", "relu", "a standard transcoder, and this run trains no transc"),
    "a crosscoder for an autoencoder": ("crosscoder", "topk", "crosscoder of 2 layers, and this run"),
    "a skip path for none": ("skip transcoder", "jumprelu transcoder", "without a skip path"),
    "another width": ("relu", "wider", "has d_in=12, d_sae=40, and this run d_in=12, d_sae=41: sizes are those"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_an_sae_of_another_kind_is_refused(case):
    own, wanted, message = REFUSED[case]
    others = {
        "jumprelu transcoder": dataclasses.replace(CASES["skip transcoder"], skip=False),
        "wider": sae_config("relu", D, F + 1),
    }
    config = others[wanted] if wanted in others else CASES[wanted]
    with pytest.raises(ConfigError, match=message):
        pretrained.from_plain(as_trained(CASES[own]), "the file").check(config)


def test_one_threshold_cannot_stand_for_many():
    start = pretrained.from_plain(as_trained(CASES["jumprelu"]), "the file")
    with pytest.raises(
        ConfigError, match=r"thresholds differ by \d+%, which batchtopk .* can continue it are jumprelu$"
    ):
        start.check(CASES["batchtopk"])
    start.check(CASES["jumprelu"])
    equal = pretrained.from_plain(as_trained(CASES["batchtopk"]), "the file")
    assert equal.description.architectures == ["batchtopk", "matryoshka", "jumprelu"]


def test_thresholds_of_zero_stay_below_every_value():
    start = renamed(as_trained(CASES["jumprelu"]), lambda weights: weights["threshold"].fill(0))
    ours = trained.TrainedSAE.from_state(state_of(CASES["jumprelu"], start))
    x = acts(D, 99)
    expected = np.asarray(trained.TrainedSAE(start)(x))
    assert np.abs(np.asarray(ours(x)) - expected).max() < 1e-5 * np.abs(expected).max()


def test_decoder_rows_of_norm_0_are_refused():
    with pytest.raises(ConfigError, match="the file: 1 decoder rows have norm 0"):
        pretrained.from_plain(renamed(as_trained(CASES["relu"]), lambda w: w["W_dec"][3].fill(0)), "the file")


def test_ranking_that_training_changes_is_said(tmp_path):
    foreign(tmp_path / "sae", "topk", k=5, rescale_acts_by_decoder_norm=False)
    assert "ranked by what they add" in pretrained.read(tmp_path / "sae").description.note
    with pytest.warns(UserWarning, match="norms of decoder rows differ by up to 60% from their mean"):
        jsae.fit(acts(D), sae_config("topk", D, F, k=5), RUN, init_from=tmp_path / "sae")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert pretrained.from_plain(as_trained(CASES["topk"]), "the file").description.note is None


@pytest.mark.parametrize(
    ("details", "k", "widths", "inner"),
    [
        ({"k": 7, "nested_widths": [4, 8]}, 7, (4, 8), ()),
        ({"k": 7.0, "hierarchical_k": [1, 3]}, 7, (), (1, 3)),
        ({"k": -1, "nested_widths": [8, 4], "hierarchical_k": [2, 2]}, None, (), ()),
        ({"k": True, "nested_widths": ["x", [1]], "hierarchical_k": "12"}, None, (), ()),
        ({"k": float("inf"), "nested_widths": 3, "hierarchical_k": [1, 10**9]}, None, (), ()),
        ([], None, (), ()),
    ],
)
def test_what_a_file_says_of_its_training_is_checked(details, k, widths, inner):
    plain = as_trained(CASES["batchtopk"])
    plain.cfg["metadata"] = {"training_architecture_details": details}
    found = pretrained.from_plain(plain, "the file").description
    assert (found.k, found.nested_widths, found.hierarchical_k) == (k, widths, inner)
    assert pretrained.description_from_json(json.loads(json.dumps(found.to_json()))) == found
