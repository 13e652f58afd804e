"""Statements about latents over checkpoints, against definitions and hand-made cases, in float64 where it matters."""

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from bridge.run import timelines
from bridge.stages import latents, own_encoders, sums, survival, validation
from bridge.stages.latents import Latents, Thresholds
from bridge.torch_sae import TorchSAE
from jsae import saelens
from jsae.export import write_plain
from jsae.saelens import Plain, layers
from jsae.settings import ConfigError
from jsae.synthetic import StagesConfig, StageWorld

D, F, L = 5, 7, 3


def crosscoder(form: str = "jumprelu", seed: int = 0, **cfg: object) -> Plain:
    """A crosscoder whose encoder reads what its decoder writes, in unequal shares."""
    random = np.random.default_rng(seed)
    W_dec = random.normal(size=(F, L * D)).astype(np.float32)
    shares = random.uniform(0.2, 1, (F, L))
    shares[0, 1] = 0  # absent in the second layer
    W_enc = (W_dec.reshape(F, L, D) * (shares / shares.sum(1, keepdims=True))[:, :, None]).reshape(F, -1)
    W_enc = W_enc / np.square(W_dec.reshape(F, L, D)).sum(2).repeat(D, axis=1)
    arrays = {"b_enc": np.zeros(F), "threshold": np.full(F, 0.3)}
    if form == "gated":
        arrays = {"b_gate": np.full(F, -0.3), "b_mag": np.zeros(F), "r_mag": np.zeros(F)}
    elif form != "jumprelu":
        del arrays["threshold"]
    weights = {"W_enc": W_enc.T, "W_dec": W_dec, "b_dec": random.normal(size=L * D), **arrays}
    weights = {name: np.ascontiguousarray(array, np.float32) for name, array in weights.items()}
    base = {"architecture": form, "d_in": L * D, "d_sae": F, "metadata": {}} | cfg
    return Plain(base, weights, L)


def module(plain: Plain) -> TorchSAE:
    return TorchSAE(plain.cfg, {name: torch.from_numpy(w) for name, w in plain.weights.items()}, plain.layers).double()


# ---- one layer as an SAE --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["jumprelu", "standard", "gated", "topk", "abstopk"])
def test_a_latent_that_fires_alone_has_its_value_in_every_layer_that_has_it(form):
    plain = crosscoder(form, **({"k": F} if "topk" in form else {}))
    b_dec = plain.weights["b_dec"].reshape(L, D)
    for layer in range(L):
        single = layers.single(plain, layer)
        assert (single.layers, single.cfg["d_in"]) == (1, D)
        sae = module(single)
        for latent in range(F):
            row = plain.weights["W_dec"].reshape(F, L, D)[latent, layer]
            value = sae.encode(torch.from_numpy(2.5 * row + b_dec[layer]).double())[latent]
            assert float(value) == pytest.approx(0 if (latent, layer) == (0, 1) else 2.5, rel=1e-5), (layer, latent)


def test_shares_are_those_of_the_pre_activation_and_a_silent_latent_never_fires():
    plain = crosscoder()
    assert layers.shares(plain).sum(1) == pytest.approx(np.ones(F))
    assert layers.shares(plain)[0, 1] == 0
    x = torch.from_numpy(np.random.default_rng(1).normal(size=(1000, D)) * 100)
    assert not module(layers.single(plain, 1)).encode(x)[:, 0].any()


@pytest.mark.parametrize("form", ["jumprelu", "standard", "gated", "topk", "abstopk"])
def test_a_fitted_encoder_reads_what_the_crosscoder_reads_where_a_layer_tells_all(form):
    plain = crosscoder(form, **({"k": 2} if "topk" in form else {}))
    random = np.random.default_rng(3)
    first = random.normal(size=(4000, D)) * 3
    turns = [np.linalg.qr(random.normal(size=(D, D)))[0] for _ in range(2)]
    parts = [first, first @ turns[0] + 1, 2 * first @ turns[1] - 2]
    x = torch.from_numpy(np.concatenate(parts, axis=1))
    sae = module(plain)
    fitted = own_encoders.fit(plain, sae, x.split(1000))
    expected = sae.encode(x)
    for layer, (own, part) in enumerate(zip(fitted, parts, strict=True)):
        silent = layers.shares(plain)[:, layer] < layers.LEAST_SHARE
        found = module(own).encode(torch.from_numpy(part))
        if "topk" in form:  # without the silent latent, others are selected
            assert not found[:, silent].any()
            if silent.any():
                continue
        wrong = ((found - expected).abs() > 1e-2 * expected.abs().max()).double().mean(0)
        assert wrong[~silent].max() < 0.01, (layer, wrong)
        np.testing.assert_array_equal(own.weights["W_dec"], layers.single(plain, layer).weights["W_dec"])


def test_a_fitted_encoder_is_the_least_squares_solution():
    plain, random = crosscoder("standard"), np.random.default_rng(4)
    x = random.normal(size=(500, L * D)) + 1
    own = own_encoders.fit(plain, module(plain), [torch.from_numpy(x)])[1]
    centred = x - plain.weights["b_dec"]
    u = np.concatenate([centred[:, D : 2 * D], np.ones((500, 1))], axis=1)
    exact, *_ = np.linalg.lstsq(u, centred @ plain.weights["W_enc"], rcond=None)
    found = np.concatenate([own.weights["W_enc"], own.weights["b_enc"][None]])[:, 1:]
    gain = np.linalg.norm(found, axis=0) / np.linalg.norm(exact[:, 1:], axis=0)
    assert gain.min() > 1  # one layer tells less than all: its values are raised
    np.testing.assert_allclose(found / gain, exact[:, 1:], rtol=2e-3, atol=2e-4)
    assert not own.weights["W_enc"][:, 0].any()  # the latent is not in this layer
    with pytest.raises(ValueError, match="no tokens to fit the encoders"):
        own_encoders.fit(plain, module(plain), [])


def test_as_many_latents_fire_as_in_the_crosscoder_and_their_values_are_nearest_to_its():
    plain, random = crosscoder(), np.random.default_rng(5)
    shared = random.normal(size=(6000, D)) * 3
    x = torch.from_numpy(np.concatenate([shared + random.normal(size=(6000, D)) for _ in range(L)], axis=1))
    sae = module(plain)
    expected = sae.encode(x)
    for layer, own in enumerate(own_encoders.fit(plain, sae, x.split(1500))):
        present = layers.shares(plain)[:, layer] >= layers.LEAST_SHARE
        found = module(own).encode(x.chunk(L, dim=1)[layer])[:, present]
        fired, wanted = (float((codes != 0).double().mean()) for codes in (found, expected[:, present]))
        assert fired == pytest.approx(wanted, rel=0.01)
        gain = (found * expected[:, present]).sum(0) / found.square().sum(0)
        np.testing.assert_allclose(gain, 1, rtol=1e-4)


@pytest.mark.parametrize("layer", [-1, 3])
def test_a_layer_that_there_is_not_is_refused(layer):
    with pytest.raises(ConfigError, match=f"layer {layer} of an SAE of 3"):
        layers.single(crosscoder(), layer)
    with pytest.raises(ConfigError, match="give a layer of a crosscoder"):
        layers.single(layers.single(crosscoder(), 0), 0)


# ---- measures -------------------------------------------------------------------------------------------------------


def measured(seed: int = 0, tokens: int = 500) -> tuple[Plain, np.ndarray, np.ndarray, sums.StageSums]:
    """A crosscoder, activations, its code, and the sums over them in two batches."""
    plain = crosscoder(seed=seed)
    x = np.random.default_rng(seed + 1).normal(size=(tokens, L * D)) * 2
    sae, own = module(plain), [module(layers.single(plain, layer)) for layer in range(L)]
    batches = [torch.from_numpy(part) for part in (x[:200], x[200:])]
    return plain, x, sae.encode(torch.from_numpy(x)).numpy(), sums.add_up(sae, own, batches)


def test_a_corrected_row_is_the_least_squares_fit_to_what_the_others_leave_over():
    plain, x, code, total = measured()
    rows, b_dec = plain.weights["W_dec"].astype(np.float64), plain.weights["b_dec"]
    fitted = rows.reshape(F, L, D) + total.residual / total.square[:, None, None]
    for latent in range(F):
        others = np.delete(np.arange(F), latent)
        left = x - b_dec - code[:, others] @ rows[others]
        expected = np.linalg.lstsq(code[:, [latent]], left, rcond=None)[0]
        np.testing.assert_allclose(fitted[latent].ravel(), expected[0], rtol=1e-4, atol=1e-4)


def test_the_sums_of_two_batches_are_those_of_their_tokens():
    plain, x, code, total = measured()
    x_hat = code @ plain.weights["W_dec"] + plain.weights["b_dec"]
    assert total.tokens == 500
    np.testing.assert_array_equal(total.fired, (code != 0).sum(0))
    np.testing.assert_allclose(total.largest, code.max(0), rtol=1e-5)
    np.testing.assert_array_equal(total.largest_at[total.fired > 0], code.argmax(0)[total.fired > 0])
    error, parts = (x - x_hat).reshape(-1, L, D), x.reshape(-1, L, D)
    expected = np.square(error).sum((0, 2)) / np.square(parts - parts.mean(0)).sum((0, 2))
    np.testing.assert_allclose(total.fvu, expected, rtol=1e-4)


def test_a_norm_that_is_shrunk_does_not_look_like_a_difference():
    """Both stages have one direction equally; the decoder says 0.2 of it in the first, as a shrunk latent would."""
    random = np.random.default_rng(0)
    code, direction = random.exponential(size=(4000, 1)), np.array([1.0, 0, 0])
    x = np.concatenate([code * direction, code * direction], 1) + 0.01 * random.normal(size=(4000, 6))
    rows = np.stack([0.2 * direction, direction])[None]
    x_hat = code @ rows.reshape(1, -1)
    zero = np.zeros((2, 1))
    total = sums.StageSums(
        *(4000, (code > 0).sum(0).astype(float), code.sum(0), np.square(code).sum(0), code.max(0), code.argmax(0)),
        residual=(code.T @ (x - x_hat)).reshape(1, 2, 3),
        together=(code.T @ x_hat).reshape(1, 2, 3),
        acts=x.sum(0).reshape(2, 3),
        reconstructions=x_hat.sum(0).reshape(2, 3),
        acts_square=np.square(x).reshape(-1, 2, 3).sum((0, 2)),
        error_square=np.ones(2),
        own_fired=zero,
        own_total=zero,
        own_error_square=np.ones(2),
    )
    found = latents.measure(rows, total)
    assert found.norm[0, 0] / found.norm[0, 1] == pytest.approx(0.2, rel=0.02)
    assert found.corrected_norm[0, 0] / found.corrected_norm[0, 1] == pytest.approx(1, rel=0.02)
    assert latents.kinds(found) == ["shared"]


@pytest.mark.parametrize("scale", [19.0, 0.01])
def test_the_unit_of_a_checkpoint_changes_nothing(scale):
    """The norm of activations grows in training many times over; no latent is weaker before because of that."""
    plain, x, code, total = measured()
    larger = {name: weight.copy() for name, weight in plain.weights.items()}
    for name, factor in (("W_enc", 1 / scale), ("W_dec", scale), ("b_dec", scale)):
        array = larger[name].T if name == "W_enc" else larger[name]  # a view: its last axis are the channels
        array[..., D : 2 * D] *= factor
    changed = Plain(plain.cfg, larger, L)
    x = x * np.repeat([1, scale, 1], D)
    own = [module(layers.single(changed, layer)) for layer in range(L)]
    sae = module(changed)
    np.testing.assert_allclose(sae.encode(torch.from_numpy(x)), code, atol=1e-4)
    scaled = sums.add_up(sae, own, [torch.from_numpy(x)])
    before, after = (
        latents.measure(one.weights["W_dec"].reshape(F, L, D), of) for one, of in ((plain, total), (changed, scaled))
    )
    for name, values in before._asdict().items():
        np.testing.assert_allclose(getattr(after, name), values, rtol=1e-3, atol=1e-4, err_msg=name)


def test_what_others_express_is_its_covariance_with_the_latent():
    plain, x, code, total = measured()
    rows = plain.weights["W_dec"].reshape(F, L, D)
    found = latents.measure(rows, total)
    size = np.sqrt(x.reshape(-1, L, D).var(0).sum(1))
    made = (code @ plain.weights["W_dec"]).reshape(-1, L, D) / size[:, None]
    for latent in range(F):
        stage = int(np.argmax(np.linalg.norm(rows[latent], axis=1) / size))
        assert found.strongest[latent] == stage
        along = made @ (rows[latent, stage] / size[stage])
        covariance = np.cov(code[:, latent], along.T)[0, 1:]
        np.testing.assert_allclose(found.present[latent], covariance / covariance[stage], rtol=1e-4, atol=1e-5)


def test_every_latent_is_absent_from_a_checkpoint_whose_activations_are_constant():
    """As those of an MLP before the first step, whose output projection is zero."""
    plain, x, _, _ = measured()
    x[:, :D] = 0
    own = [module(layers.single(plain, layer)) for layer in range(L)]
    total = sums.add_up(module(plain), own, [torch.from_numpy(x)])
    found = latents.measure(plain.weights["W_dec"].reshape(F, L, D), total)
    assert not found.level[:, 0].any()
    assert (found.strongest > 0).all()
    assert all(np.isfinite(values).all() for values in found)


def described(strength: list[list[float]], turn: list[list[float]] | None = None, density: float = 0.1) -> Latents:
    """Latents of these strengths in every checkpoint."""
    values = np.array(strength, float)
    ones = np.ones_like(values)
    turned = ones if turn is None else np.array(turn, float)
    fired = np.full(len(values), density)
    return Latents(fired, values.argmax(1), values, values, values, values, turned, turned, turned, ones, ones)


def test_kinds_follow_the_bounds():
    found = described([[1, 0.04], [0.3, 1], [0.9, 1], [1, 1]], turn=[[1, 0], [1, 1], [1, 0.8], [1, 0.99]])
    assert latents.kinds(found) == ["exclusive", "weakened", "rotated", "shared"]
    assert latents.kinds(found, Thresholds(absent=0.01)) == ["weakened", "weakened", "rotated", "shared"]
    assert latents.kinds(described([[1, 0]], density=1e-5)) == ["dead"]
    counted = latents.summary(("a", "b"), found)
    assert (counted["exclusive"], counted["strongest of exclusive"]) == (1, {"a": 1, "b": 0})


def test_another_latent_that_has_the_direction_makes_it_present():
    found = described([[0.0, 1.0]])._replace(present=np.array([[0.6, 1.0]]))
    assert latents.kinds(found) == ["shared"]


def test_events_tell_a_life_in_its_order():
    life = described(
        [[0.0, 0.2, 0.7, 1.0, 1.0, 0.6, 0.02], [0.9, 0.9, 1.0, 1.0, 1.0, 1.0, 1.0], [0, 0, 0, 0, 0, 0.3, 1]],
        turn=[[1, 1, 1, 1, 0.5, 1, 1], [1] * 7, [1, 0, 0, 0, 0, 0, 0]],
    )
    told = [(event.latent, event.kind, event.stage) for event in latents.events(life)]
    assert told == [
        (0, "appears", 2),
        (0, "grows", 3),
        (0, "rotates", 4),
        (0, "shrinks", 5),
        (0, "dies", 6),
        (2, "appears", 6),
    ]


def test_bounds_that_contradict_each_other_are_refused():
    with pytest.raises(ConfigError, match=r"absent=0.6 is above weak=0.5"):
        Thresholds(absent=0.6)


def test_what_is_gained_or_lost_changes_in_level_and_in_norm():
    level = np.array([[1.0, 0.4, 0.4], [1.0, 0.4, 0.4], [1.0, 1.0, 0.1], [0.1, 1.0, 0.7], [0.0, 0.0, 0.0]])
    norm = np.array([[2.0, 2.0, 2.0], [2.0, 0.6, 0.6], [3.0, 0.3, 0.3], [0.5, 5.0, 2.0], [0.0, 0.0, 0.0]])
    # turned, weakened, taken over, risen, empty
    expected_gains = [[0, 0, 0], [0, 0, 0], [0, 0, 0], [0, 0.9, 0], [0, 0, 0]]
    expected_losses = [[0, 0, 0], [0, 0.6, 0], [0, 0, 0], [0, 0, 0.3], [0, 0, 0]]
    gained, lost = timelines.gained_and_lost(level, norm)
    np.testing.assert_allclose(gained, expected_gains, atol=1e-12)
    np.testing.assert_allclose(lost, expected_losses, atol=1e-12)


# ---- survival -------------------------------------------------------------------------------------------------------


def test_survivors_keep_their_line_through_permutations_and_the_rest_are_born_and_die():
    random = np.random.default_rng(0)
    rows = random.normal(size=(12, 64))
    order = random.permutation(12)
    second = rows[order] + 0.05 * random.normal(size=(12, 64))
    second[[3, 5]] = random.normal(size=(2, 64))
    alive = np.ones(12, bool)
    dead = np.arange(12) != 7
    snapshots = [
        survival.Snapshot(name, decoder, living)
        for name, decoder, living in (("a", rows, alive), ("b", second, alive), ("c", second, dead))
    ]
    report = survival.report(snapshots)
    assert [step["survived"] for step in report["steps"]] == [10, 11]
    assert [step["died"] for step in report["steps"]] == [2, 1]
    assert report["born"] == [[3, 5], []]
    for latent in range(12):
        line, at = report["lineage"][str(latent)], int(np.flatnonzero(order == latent)[0])
        expected = 0 if at in (3, 5) else 1 if at == 7 else 2
        assert [entry["latent"] for entry in line] == [at] * expected


def test_snapshots_are_read_with_what_fires_and_others_are_refused(tmp_path):
    plain = layers.single(crosscoder(), 0)
    for name in ("a", "b"):
        cfg = plain.cfg | {"dtype": "float32", "device": "cpu", "apply_b_dec_to_input": True}
        cfg |= {"normalize_activations": "none", "metadata": {"sae_lens_version": "6.54.12", "hook_name": "x"}}
        write_plain(tmp_path / name, Plain(cfg, plain.weights, 1), {})
    sparsity = np.full(F, -2.0, np.float32)
    sparsity[2] = -10
    save_file({"sparsity": sparsity}, tmp_path / "b" / "sparsity.safetensors")
    first, second = (survival.read(tmp_path / name) for name in ("a", "b"))
    assert first.alive.all()
    assert np.flatnonzero(~second.alive).tolist() == [2]
    np.testing.assert_array_equal(first.decoder, saelens.read(tmp_path / "a").weights["W_dec"])
    with pytest.raises(ConfigError, match=r"has SAEs of a, b: choose one with --hook"):
        survival.read(tmp_path)
    with pytest.raises(ConfigError, match=r"reads 4 channels, .* 5: give SAEs of one hook"):
        survival.follow([first, second._replace(decoder=second.decoder[:, :4])])
    save_file({"other": sparsity}, tmp_path / "b" / "sparsity.safetensors")
    with pytest.raises(ValueError, match=r"sparsity\.safetensors is broken"):
        survival.read(tmp_path / "b")


# ---- a known world --------------------------------------------------------------------------------------------------

SMALL = {"width": 32, "shared": 12, "rotated": 3, "weakened": 2, "exclusive": 3, "active": 2.0}


def test_the_world_is_what_its_words_say():
    world = StageWorld(StagesConfig(**SMALL))
    before, after = (np.linalg.norm(rows, axis=1) for rows in (world.before, world.after))
    of = {kind: (before[world.kinds == kind], after[world.kinds == kind]) for kind in set(world.kinds)}
    assert of["new"] == (pytest.approx(np.zeros(3)), pytest.approx(np.ones(3)))
    assert of["removed"] == (pytest.approx(np.ones(3)), pytest.approx(np.zeros(3)))
    assert of["weakened"][0] == pytest.approx(np.full(2, 0.1))
    turned = world.kinds == "rotated"
    assert (world.before[turned] * world.after[turned]).sum(1) == pytest.approx(np.full(3, np.cos(np.pi / 6)))
    first, again, other = world.sample(50), world.sample(50), world.sample(50, seed=1)
    np.testing.assert_array_equal(first.before, again.before)
    assert not np.allclose(first.before, other.before)


def truth(world: StageWorld) -> Plain:
    """The crosscoder whose latents are the features."""
    rows = np.concatenate([world.before, world.after], axis=1)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    width = rows.shape[1]
    weights = {
        "W_enc": np.linalg.pinv(rows),
        "W_dec": rows,
        "b_dec": np.full(width, 0.3),
        "b_enc": np.zeros(len(rows)),
        "threshold": np.full(len(rows), 1.5),
    }
    cfg = {"architecture": "jumprelu", "d_in": width, "d_sae": len(rows), "metadata": {}}
    return Plain(cfg, {name: array.astype(np.float32) for name, array in weights.items()}, 2)


def test_the_true_crosscoder_finds_everything_and_raises_no_alarm():
    world = StageWorld(StagesConfig(**SMALL))
    finding = validation.score(world, truth(world), 20_000)
    assert finding.found == finding.features
    assert (finding.recall, finding.false_alarms, finding.exclusive) == (1, [], 6)


@pytest.mark.parametrize("backwards", [False, True])
def test_what_is_new_or_stronger_is_gained_what_is_removed_or_weaker_is_lost_and_what_turns_is_neither(backwards):
    """Features of the world are ten times stronger in its second stage; with 60 degrees a level falls by half."""
    world = StageWorld(StagesConfig(**SMALL, angle=60.0))
    plain = truth(world)
    order = slice(None, None, -1 if backwards else 1)
    for name, axis in (("W_enc", 0), ("W_dec", 1)):
        plain.weights[name] = np.concatenate(np.split(plain.weights[name], 2, axis)[order], axis)
    x = np.concatenate(world.sample(20_000, seed=1)[order], axis=1)
    own = [module(layers.single(plain, stage)) for stage in range(2)]
    total = sums.add_up(module(plain), own, [torch.from_numpy(x)])
    found = latents.measure(plain.weights["W_dec"].reshape(len(world.kinds), 2, -1), total)
    gained, lost = (part[:, 1] for part in timelines.gained_and_lost(found.level, found.corrected_norm)[order])
    assert gained[world.kinds == "new"].min() > 0.95
    assert lost[world.kinds == "removed"].min() > 0.95
    assert gained[world.kinds == "weakened"] == pytest.approx(np.full(2, 0.9), abs=0.05)
    assert gained[np.isin(world.kinds, ("rotated", "shared", "removed"))].max() < 0.1  # stages differ in unit
    assert lost[np.isin(world.kinds, ("rotated", "shared", "new", "weakened"))].max() < 0.1
    assert found.level[world.kinds == "rotated"].min() < 0.6


def test_a_new_feature_whose_latent_points_elsewhere_is_not_found():
    world = StageWorld(StagesConfig(**SMALL))
    plain = truth(world)
    new, shared = (int(np.flatnonzero(world.kinds == kind)[0]) for kind in ("new", "shared"))
    plain.weights["W_dec"][new, 32:] = world.after[shared]
    finding = validation.score(world, plain, 20_000)
    assert finding.found["new"] == 2
    assert finding.recall == pytest.approx(5 / 6)
