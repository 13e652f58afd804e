"""The optimiser's links and every schedule, value by value."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from alone import begin, fit

from jsae import dead, loop, optim, step
from jsae.architectures import Context, SAEConfig, make, sae_config
from jsae.config import TrainConfig
from jsae.ops import Cpu, Ops, Reference, choose
from jsae.ops.reference import tangent_rows
from jsae.settings import ConfigError
from jsae.state import TrainState

pytestmark = pytest.mark.usefixtures("quickly_compiled")
D, F = 8, 24
RUN = TrainConfig(num_activations=100 * 20, batch_size=20, learning_rate=1e-2)
SAE = sae_config("topk", D, F, k=3)


def x(steps: int, d: int = D) -> list[jax.Array]:
    """So many batches."""
    acts = np.random.default_rng(0).normal(size=(steps, RUN.batch_size, d)) + 0.3
    return [jnp.asarray(batch, jnp.float32) for batch in acts]


@functools.cache
def run(config: SAEConfig, how: TrainConfig, steps: int) -> list[TrainState]:
    """The states before the first step and after every step, as they were then."""
    batches = x(steps)
    start = begin(config, how, batches[0])
    seen = [jax.device_get(start)]
    for _, state, _ in itertools.islice(fit(config, how, start, batches), steps):
        seen.append(jax.device_get(state))
    return seen


# ---- learning rate -------------------------------------------------------------------------------------------------


def test_the_learning_rate_of_every_step_rises_stays_and_falls():
    config = dataclasses.replace(RUN, warmup_fraction=0.04, decay_fraction=0.1)
    rate = optim.schedule(config)
    rates = np.array([rate(step) for step in range(100)])
    expected = np.concatenate([[0.25, 0.5, 0.75, 1], np.full(86, 1), np.arange(10, 0, -1) / 10])
    np.testing.assert_allclose(rates, expected, rtol=1e-5)


def test_without_warm_up_and_decay_the_rate_is_one_and_the_same():
    rate = optim.schedule(dataclasses.replace(RUN, warmup_fraction=0.0, decay_fraction=0.0))
    np.testing.assert_allclose([rate(step) for step in (0, 1, 50, 98, 99)], 1, rtol=1e-6)


def default_rate(num_activations=2**18, batch_size=512, architecture="topk", d_in=128, d_sae=1024, **settings) -> float:
    config = TrainConfig(num_activations=num_activations, batch_size=batch_size)
    return config.default_rate(sae_config(architecture, d_in, d_sae, **settings))


def test_a_rate_that_is_not_given_follows_width_length_batch_and_sparsity():
    rate = 0.9 * 2.3 * (32 * 512**0.5 / 1024) ** (1 / 3) / (128 * 512) ** 0.5
    assert default_rate(k=32) == pytest.approx(rate)
    assert default_rate(k=32, d_in=512) == pytest.approx(rate / 2)
    assert default_rate(k=32, num_activations=2**20) == pytest.approx(rate / 2)
    assert default_rate(k=32, num_activations=2**24, batch_size=512 * 64) == pytest.approx(rate * 2)
    assert default_rate(k=4) == pytest.approx(rate / 2)
    assert default_rate(k=32, d_sae=8192) == pytest.approx(rate / 2)


def test_a_rate_that_is_not_given_depends_on_architecture_and_target():
    once = default_rate(k=32) / 0.9
    assert default_rate(architecture="batchtopk", k=32) == pytest.approx(0.8 * once)
    assert default_rate(architecture="gated", target_l0=32.0) == pytest.approx(1.5 * once)
    assert default_rate(architecture="relu", target_l0=4.0) == pytest.approx(1.3 * once / 2 * 8 ** (1 / 6))
    relu = default_rate(architecture="relu")
    assert default_rate(num_activations=2**17, architecture="relu") == pytest.approx(relu * 2**0.5)
    assert default_rate(num_activations=2**20, architecture="relu") == pytest.approx(relu / 2 * 4**0.1)
    assert default_rate(num_activations=2**22, architecture="relu") == pytest.approx(relu / 4 * 4**0.1)
    assert default_rate(architecture="relu", d_in=512) == pytest.approx(relu / 2 / 4**0.25), "faster with width"
    assert default_rate(architecture="jumprelu", d_in=512) == pytest.approx(1.1 * once / 2 / 4**0.25)
    longer = default_rate(num_activations=2**20, architecture="jumprelu")
    assert longer == pytest.approx(1.1 * once / 2 * 4**0.2)
    assert default_rate(architecture="jumprelu") == pytest.approx(1.1 * once), "without a target as with 32"
    assert default_rate(architecture="jumprelu", jump_recipe="l0") == pytest.approx(0.7 * once)


def test_a_run_takes_the_given_rate_or_the_default_and_less_of_it_with_heavy_tails():
    config = dataclasses.replace(RUN, learning_rate=None)
    even = jnp.where(jax.random.bernoulli(jax.random.key(0), shape=(4096, D)), 1.0, -1.0)
    heavy = even * jnp.where(jnp.arange(4096) % 64 == 0, 8.0, 1e-3)[:, None]
    assert float(begin(SAE, RUN, heavy).rate) == pytest.approx(1e-2)
    assert float(begin(SAE, config, even).rate) == pytest.approx(config.default_rate(SAE), rel=1e-2)
    assert float(begin(SAE, config, heavy).rate) == pytest.approx(config.default_rate(SAE) / 64**0.4, rel=1e-2)


@pytest.mark.parametrize(
    ("name", "share", "factor"),
    [
        ("topk", 0.5, 1),
        ("topk", 0.05, 0.25**0.2),
        ("topk", 0, 0.025**0.2),
        ("batchtopk", 0.05, 0.25**0.3),
        ("relu", 0, 1),
    ],
)
def test_the_rate_is_lower_where_k_directions_span_nearly_all_the_variance(name, share, factor):
    """As many dimensions as latents are active have all of the variance but a share."""
    few, others = SAE.k, D - SAE.k
    acts = np.sign(np.random.default_rng(0).standard_normal((4096, D)))
    acts[:, :few] *= ((1 - share) / few) ** 0.5
    acts[:, few:] *= (share / others) ** 0.5
    sae = sae_config(name, D, SAE.d_sae, **({"k": few} if name != "relu" else {"target_l0": float(few)}))
    config = dataclasses.replace(RUN, learning_rate=None)
    assert float(begin(sae, config, jnp.asarray(acts)).rate) == pytest.approx(
        factor * config.default_rate(sae), rel=0.02
    )


def test_the_longer_a_run_the_less_heavy_tails_lower_its_rate():
    lengths = (2**10, 2**18, 2**20, 2**23, 2**28)
    powers = [TrainConfig(num_activations=n, batch_size=512).tail_exponent(SAE) for n in lengths]
    assert powers == pytest.approx([0.4, 0.4, 0.2614, 0.0534, 0], abs=1e-4)


def test_the_default_rate_of_a_tiny_run_has_a_bound():
    tiny = TrainConfig(num_activations=4, batch_size=4)
    assert tiny.default_rate(sae_config("relu", 1, 1)) == 0.05, "no rate that would throw a short run off"


# ---- start ----------------------------------------------------------------------------------------------------------


def test_the_encoder_starts_at_a_factor_of_the_scale_at_which_the_first_reconstruction_fits():
    """At 1 the reconstruction has the least error of all scales: its product with the target is its square."""
    batch = x(1)[0]
    whole, half = (begin(dataclasses.replace(SAE, encoder_start=at), RUN, batch) for at in (1.0, 0.5))
    np.testing.assert_allclose(half.sae.W_enc[...], 0.5 * whole.sae.W_enc[...], rtol=1e-5)
    np.testing.assert_allclose(half.sae.W_dec[...], whole.sae.W_dec[...])
    scaled = batch * whole.scale
    made = whole.sae.decode(whole.sae.encode(scaled), scaled) - whole.sae.b_dec
    assert float((made * (scaled - whole.sae.b_dec)).sum()) == pytest.approx(float(jnp.square(made).sum()), rel=1e-4)


# ---- links ---------------------------------------------------------------------------------------------------------


def by_hand(gradient: np.ndarray, parameter: np.ndarray, name: str, norm: float, decoder_rate: float) -> np.ndarray:
    """The first update: Adam's first step is the learning rate times the sign, but for epsilon."""
    g = gradient.astype(np.float64) * min(1.0, 1.0 / norm)
    if name == "W_dec":
        g -= (g * parameter).sum(1, keepdims=True) * parameter / np.square(parameter).sum(1, keepdims=True)
    update = -0.01 / 2 * g / (np.abs(g) + 1e-8)
    if name == "log_threshold":
        update *= 10
    if name == "W_dec":
        moved = parameter + decoder_rate * update
        update = moved / np.linalg.norm(moved, axis=1, keepdims=True) - parameter
    return update


OPTIMISING: dict[str, Ops] = {"cpu": Cpu(block=2 * D), "reference": Reference()}


@pytest.fixture(params=OPTIMISING)
def ops(request) -> Ops:
    return OPTIMISING[request.param]


def updated(sae, gradients, optimizer: optim.Optimizer):
    """The weights after one update."""
    return optimizer.apply(gradients, optimizer.init(sae), sae, 0.01)[0]


@pytest.mark.parametrize("decoder_rate", [1.0, 3.0])
def test_the_first_update_is_what_the_chain_says_and_thresholds_move_ten_times_as_fast(ops, decoder_rate):
    config = sae_config("jumprelu", D, F, decoder_rate=decoder_rate)
    how = dataclasses.replace(RUN, warmup_fraction=0.02)
    sae = make(config, key=jax.random.key(0))
    keys = iter(jax.random.split(jax.random.key(1), 9))
    gradients = jax.tree.map(lambda w: 3 * jax.random.normal(next(keys), w.shape), sae)
    norm = float(np.sqrt(sum(np.square(g).sum() for g in map(np.asarray, jax.tree.leaves(gradients)))))
    new = updated(sae, gradients, optim.make(how, config, ops))
    updates = jax.tree.map(jnp.subtract, new, sae)
    for name in ("W_enc", "W_dec", "b_enc", "b_dec", "log_threshold"):
        ours, g, w = (np.asarray(getattr(tree, name)[...]) for tree in (updates, gradients, sae))
        np.testing.assert_allclose(ours, by_hand(g, w, name, norm, decoder_rate), atol=2e-6, err_msg=name)
    np.testing.assert_allclose(np.linalg.norm(new.W_dec[...], axis=1), 1, atol=1e-6)


def test_a_skip_path_and_what_is_kept_beside_the_weights_are_no_decoder_rows(ops):
    config = sae_config("batchtopk", D, F, k=3, d_out=5, skip=True)
    sae = make(config, key=jax.random.key(0))
    ones = jax.tree.map(jnp.ones_like, sae)
    updates = jax.tree.map(jnp.subtract, updated(sae, ones, optim.make(RUN, SAE, ops)), sae)
    for name in ("W_enc", "W_skip", "b_enc", "b_dec", "threshold"):
        np.testing.assert_allclose(getattr(updates, name)[...], -RUN.learning_rate / 2, rtol=1e-4)
    assert not np.allclose(updates.W_dec[...], -RUN.learning_rate / 2, rtol=1e-2)


def test_one_pass_over_the_weights_equals_the_chain_of_optaxs_own_links(ops):
    config = dataclasses.replace(SAE, decoder_rate=1.0)  # optax scales all weights alike
    sae = make(config, key=jax.random.key(0))
    how = optim.make(RUN, config, ops)
    links = optax.chain(
        optax.clip_by_global_norm(RUN.clip_norm),
        on_decoder(tangent_rows),
        optax.scale_by_adam(RUN.beta1, RUN.beta2),
        optax.scale_by_learning_rate(lambda step: 0.01 * optim.schedule(RUN)(step)),
        on_decoder(unit_rows),
    )
    mine = theirs = sae
    state, chain = how.init(sae), links.init(sae)
    for i in range(5):
        keys = iter(jax.random.split(jax.random.key(i), 9))
        gradients = jax.tree.map(lambda w, keys=keys: 0.2 * jax.random.normal(next(keys), w.shape), sae)
        mine, state = how.apply(gradients, state, mine, 0.01)
        updates, chain = links.update(gradients, chain, theirs)
        theirs = optax.apply_updates(theirs, updates)
    for a, b in zip(jax.tree.leaves(mine), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-6)


@pytest.mark.parametrize("name", ["sgd", "adamw", "lion", "adafactor"])
def test_any_transformation_of_optax_trains_an_sae_with_unit_decoder_rows(name):
    """Also with weight decay, which leaves alone what is no weight: the threshold is the mean that it always is."""
    inner = {
        "sgd": optax.sgd(0.02, momentum=0.9),
        "adamw": optax.adamw(1e-2, weight_decay=0.3),
        "lion": optax.lion(2e-3, weight_decay=0.1),
        "adafactor": optax.adafactor(1e-2),
    }[name]
    config = sae_config("batchtopk", D, F, k=3)
    how = dataclasses.replace(RUN, num_activations=60 * 20)
    batches = [x(1)[0]] * 60
    last, losses, threshold = begin(config, how, batches[0], inner), [], 0.0
    assert not any(leaf.weak_type for leaf in jax.tree.leaves(last))  # the step is compiled once
    before = jax.device_get(last)
    for number, last, sums in fit(config, how, last, batches, inner):  # noqa: B020 - the state goes on
        losses.append(float(sums.loss))
        np.testing.assert_allclose(np.linalg.norm(last.sae.W_dec[...], axis=1), 1, atol=1e-6)
        threshold += max(1 / 3, 1 / number) * (least_kept(before, batches[0], 3) - threshold)
        assert float(last.sae.threshold[...]) == pytest.approx(threshold, rel=1e-3)
        before = jax.device_get(last)
    assert losses[-1] < 0.8 * losses[0]
    assert int(last.step) == how.num_steps == len(losses)


def test_a_transformation_gets_projected_gradients_and_its_own_state():
    seen = []

    def update(grads, state, params):
        seen.append((grads, params))
        return jax.tree.map(jnp.zeros_like, grads), state + 1

    inner = optax.GradientTransformation(lambda params: jnp.int32(0), update)
    config = sae_config("relu", D, F)
    start = begin(config, RUN, x(1)[0], inner)
    weights = jax.device_get(start.sae)
    new, sums = step.update(
        RUN, choose(), start, x(1)[0], optimizer=optim.make(RUN, start.sae.config, choose(), inner=inner)
    )
    ((grads, params),) = seen
    assert int(new.opt) == 1
    np.testing.assert_allclose((grads.W_dec * params.W_dec).sum(1), 0, atol=1e-5)
    assert np.asarray(grads.W_dec[...]).any()
    for ours, theirs in zip(jax.tree.leaves(new.sae), jax.tree.leaves(weights), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-6)

    def loss(W_enc):  # the gradient is that of the loss itself, whatever unit the step works in
        sae = jax.tree.map(jnp.asarray, weights)
        sae.W_enc[...] = W_enc
        context = Context(choose(), training=True, strength=step._ramp(RUN, jnp.int32(1)), scale=start.scale)
        return step.loss_of(sae, x(1)[0], x(1)[0] * start.scale_out, context)[0]

    np.testing.assert_allclose(grads.W_enc[...], jax.grad(loss)(weights.W_enc[...]), rtol=1e-4, atol=1e-5)
    assert float(sums.loss) / RUN.batch_size == pytest.approx(float(loss(weights.W_enc[...])), rel=1e-5)


def unit_rows(update, rows):
    """Bends the update so that every row + update has norm 1."""
    new = rows + update
    return new / jnp.linalg.norm(new, axis=1, keepdims=True) - rows


def on_decoder(change) -> optax.GradientTransformation:
    """A link that applies change(update, parameter) to `W_dec` alone."""

    def at(path, update, parameter):
        return change(update, parameter) if "W_dec" in jax.tree_util.keystr(path) else update

    return optax.stateless(lambda updates, params: jax.tree_util.tree_map_with_path(at, updates, params))


# ---- k -------------------------------------------------------------------------------------------------------------


def test_k_comes_down_from_k_start_in_a_straight_line_and_stays():
    config = sae_config("topk", D, F, k=4)
    how = dataclasses.replace(RUN, k_start=14, k_anneal_fraction=0.1)
    limits = [int(step._annealed_k(how, 4, jnp.int32(number))) for number in range(1, 14)]
    assert limits == [13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 4, 4, 4]
    assert [loop.room(loop.Member(config, how), number) for number in (1, 10, 11, 100)] == [14, 14, None, None]
    assert loop.room(loop.Member(config, RUN), 1) is None


def test_every_step_draws_as_many_codes_as_the_schedule_says():
    config, how = sae_config("batchtopk", D, F, k=2), dataclasses.replace(RUN, k_start=6, k_anneal_fraction=0.04)
    steps = itertools.islice(fit(config, how, begin(config, how, x(1)[0]), x(6)), 6)
    assert [float(sums.l0) / RUN.batch_size for _, _, sums in steps] == [5, 4, 3, 2, 2, 2]


@pytest.mark.parametrize("architecture", ["topk", "batchtopk", "matryoshka", "abstopk"])
def test_with_room_for_more_codes_so_many_count_as_k_comes_to(architecture):
    nested = {"nested_widths": (6,)} if architecture == "matryoshka" else {}
    config = sae_config(architecture, D, F, k=3, **nested)
    sae = make(config, key=jax.random.key(0))
    wider = make(dataclasses.replace(config, k=5), key=jax.random.key(0))
    batch, context = x(1)[0], Context(choose(), training=True)
    ours = sae.activate(batch, context._replace(room=7, limit=jnp.int32(5)))[0]
    theirs = wider.activate(batch, context)[0]
    assert ours.values.shape == (RUN.batch_size, 7)
    np.testing.assert_array_equal(ours.dense(len(batch), F), theirs.dense(len(batch), F))


def test_k_start_is_refused_where_it_means_nothing_or_is_no_start():
    how = dataclasses.replace(RUN, k_start=10)
    with pytest.raises(ConfigError, match="relu has no k to lower"):
        how.anneals(sae_config("relu", D, F))
    with pytest.raises(ConfigError, match="k_start=10 must lie between k=12 and d_sae=24"):
        how.anneals(sae_config("topk", D, F, k=12))
    with pytest.raises(ConfigError, match="k_start=25 must lie between k=3 and d_sae=24"):
        dataclasses.replace(RUN, k_start=25).anneals(sae_config("topk", D, F, k=3))


# ---- penalties -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "config",
    [
        sae_config("relu", D, F, l1_coefficient=3.0),
        sae_config("gated", D, F, l1_coefficient=3.0),
        sae_config("jumprelu", D, F, l0_coefficient=3.0, jump_recipe="l0"),
        sae_config("jumprelu", D, F, l0_coefficient=3.0, pre_act_coefficient=0.0),
    ],
    ids=["relu", "gated", "jumprelu, l0", "jumprelu, tanh"],
)
def test_penalties_rise_from_nothing_over_the_warm_up_and_stay(config):
    """Seen in the loss of a state that does not change: it is a straight line in the ramp, from the plain loss up."""
    how, batch = dataclasses.replace(RUN, sparsity_warmup_fraction=0.1), x(1)[0]
    start, ops = begin(config, how, batch), choose()
    loss = jax.jit(lambda number: step.update(how, ops, start._replace(step=number - 1), batch)[1].loss)
    losses = {number: float(loss(jnp.int32(number))) / RUN.batch_size for number in (1, 2, 5, 10, 11, 100)}
    full = losses[10] - losses[5]  # half of the penalty
    plain = losses[10] - 2 * full
    assert full > 0
    expected = {number: plain + 2 * full * min(number / 10, 1) for number in losses}
    assert losses == pytest.approx(expected, rel=1e-5)
    assert float(step._ramp(dataclasses.replace(RUN, sparsity_warmup_fraction=0.0), jnp.int32(1))) == 1


# ---- the mean of the weights ---------------------------------------------------------------------------------------


def test_the_average_is_the_mean_at_first_and_then_an_exponential_one_and_is_what_is_exported():
    how = dataclasses.replace(RUN, average_fraction=0.03)  # over 3 steps
    states = run(sae_config("batchtopk", D, F, k=3), how, 8)
    for name in ("W_enc", "W_dec", "b_enc", "b_dec", "threshold"):
        mean = np.zeros_like(getattr(states[0].sae, name)[...], np.float64)
        for number, state in enumerate(states[1:], 1):
            rate = max(1 / 3, 1 / number)
            mean = (1 - rate) * mean + rate * getattr(state.sae, name)[...]
            np.testing.assert_allclose(getattr(state.average, name)[...], mean, rtol=1e-5, atol=1e-6)
        exported = states[-1].exported.arrays()[name]
        np.testing.assert_allclose(exported, np.broadcast_to(mean, exported.shape), rtol=1e-5, atol=1e-6)
        assert not np.allclose(exported, getattr(states[-1].sae, name)[...], atol=1e-5)


def test_an_average_changes_nothing_of_what_is_trained():
    config = sae_config("batchtopk", D, F, k=3)
    with_mean, without = run(config, dataclasses.replace(RUN, average_fraction=0.03), 8)[-1], run(config, RUN, 8)[-1]
    for ours, theirs in zip(jax.tree.leaves(with_mean.sae), jax.tree.leaves(without.sae), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)
    assert without.average is None
    assert without.exported is without.sae


# ---- what an SAE keeps by itself -----------------------------------------------------------------------------------


def least_kept(before: TrainState, batch: jax.Array, k: int) -> float:
    """The smallest pre-activation that a step from this state keeps."""
    sae = before.sae
    pre = (np.asarray(batch) * before.scale - sae.b_dec[...]) @ sae.W_enc[...].T + sae.b_enc[...]
    return float(np.sort(pre.ravel())[-k * len(batch)])


def test_the_threshold_is_the_mean_of_the_smallest_values_that_were_kept():
    batches = x(8)
    states = run(sae_config("batchtopk", D, F, k=3), RUN, 8)  # 100 steps in all: a mean over the last 5
    threshold = 0.0
    for number, (before, batch) in enumerate(zip(states, batches, strict=False), 1):
        threshold += max(1 / 5, 1 / number) * (least_kept(before, batch, 3) - threshold)
        assert float(states[number].sae.threshold[...]) == pytest.approx(threshold, rel=1e-4)


def test_dead_latents_are_counted_in_tokens_and_not_in_steps():
    since = jnp.array([0, 40, 2**30 - 5, 7], jnp.int32)
    fired = jnp.array([0, 0, 0, 3], jnp.int32)
    np.testing.assert_array_equal(dead.update(since, fired, 20), [20, 60, 2**30, 0])
