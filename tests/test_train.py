"""Many SAEs from one stream: each of them equals the one that is trained alone."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from alone import begin, fit

from jsae import loop, metrics, optim
from jsae.architectures import ARCHITECTURES, sae_config
from jsae.arrays import ArraySource
from jsae.checkpoint import Checkpoints
from jsae.config import TrainConfig
from jsae.data import Cursor, Shuffled
from jsae.loop import Member
from jsae.settings import ConfigError

pytestmark = pytest.mark.usefixtures("quickly_compiled")
D, F, STEPS = 12, 48, 20
RUN = TrainConfig(num_activations=STEPS * 64, batch_size=64, learning_rate=2e-3, dead_after=300)
ANNEALED = dataclasses.replace(RUN, k_start=12, k_anneal_fraction=1.0)

# Another architecture, width, k, seed, learning rate or site each; sites 0 and 1 are layers, 2 the ends of a
# transcoder, 3 the layers of a crosscoder.
MEMBERS = (
    Member(sae_config("topk", D, F, k=4), RUN, 0),
    Member(sae_config("topk", D, F, k=8), dataclasses.replace(ANNEALED, seed=1, learning_rate=5e-3), 1),
    Member(sae_config("matryoshka", D, F, k=4, nested_widths=(8, 16)), dataclasses.replace(ANNEALED, seed=2), 0),
    Member(sae_config("jumprelu", D, F // 2, target_l0=5.0), dataclasses.replace(RUN, seed=3), 1),
    Member(sae_config("relu", D, F, skip=True, d_out=D), dataclasses.replace(RUN, average_fraction=0.2), 2),
    Member(sae_config("topk", 2 * D, F, k=4, layers=2), RUN, 3),
)
PROGRAMS = loop.Programs(MEMBERS)


def activations(seed: int) -> np.ndarray:
    random = np.random.default_rng(seed)
    parts = random.exponential(size=(3000, 20)) * (random.random((3000, 20)) < 0.15)
    return (3 * parts @ random.normal(size=(20, D)) + random.normal(size=D)).astype(np.float32)


class Sites:
    """A source of four sites: the same rows of the same layers for all of them."""

    d_in = D

    def __init__(self):
        self._one = ArraySource(activations(0), activations(1))

    def fill(self, rows):
        a, b = yield from self._one.fill(rows)
        return (a,), (b,), (a, b), (a, b)

    def position(self):
        return self._one.position()

    def seek(self, position):
        self._one.seek(position)


def stream(site: int | None = None, cursor: Cursor | None = None) -> Shuffled:
    """Batches of all sites, or as a run by itself gets them, of one."""
    source = Sites()
    if site is not None:
        fill = source.fill

        def only(rows):
            return (yield from fill(rows))[site]

        source.fill = only
    return Shuffled(source, batch_size=64, batches_per_block=8, seed=5, num_batches=STEPS, cursor=cursor)


def first(batches: Shuffled) -> loop.States:
    """The states before the first step, where restored ones are, too, so that both run the same program."""
    return jax.device_put(loop.init(MEMBERS, batches.peek()), jax.devices()[0])


@pytest.fixture(scope="module")
def together() -> tuple[list[loop.States], list[loop.AllSums]]:
    """States and sums after every step of the pass, the states before the first one in front."""
    batches = stream()
    begun = first(batches)
    seen, sums = [jax.device_get(begun)], []
    for _, states, found in loop.fit(MEMBERS, begun, batches, PROGRAMS):
        seen.append(jax.device_get(states))
        sums.append(jax.device_get(found))
    return seen, sums


@pytest.mark.parametrize("i", range(len(MEMBERS)), ids=lambda i: f"{i} {MEMBERS[i].sae.architecture}")
def test_each_sae_of_a_pass_equals_the_one_trained_alone(i, together):
    member = MEMBERS[i]
    batches = stream(member.site)
    begun = begin(member.sae, member.train, batches.peek())
    steps = list(fit(member.sae, member.train, begun, batches))
    for (number, _, sums), all_sums in zip(steps, together[1], strict=True):
        theirs = metrics.summarize(all_sums[i])
        assert metrics.summarize(sums) == pytest.approx(theirs, rel=1e-4, abs=1e-5), number
    state, found = steps[-1][1], together[0][-1][i]
    assert int(state.step) == int(found.step) == STEPS
    assert jax.tree.structure(state) == jax.tree.structure(found)
    for (path, alone), of_the_pass in zip(
        jax.tree_util.tree_leaves_with_path(state), jax.tree.leaves(found), strict=True
    ):
        np.testing.assert_allclose(of_the_pass, alone, rtol=1e-5, atol=1e-5, err_msg=jax.tree_util.keystr(path))


def test_abstract_states_have_the_shapes_and_dtypes_of_the_first_ones(together):
    abstract, first_states = loop.abstract_states(MEMBERS), together[0][0]
    assert jax.tree.structure(abstract) == jax.tree.structure(first_states)
    for like, leaf in zip(jax.tree.leaves(abstract), jax.tree.leaves(first_states), strict=True):
        assert (like.shape, like.dtype) == (leaf.shape, leaf.dtype)


def test_summaries_count_the_latents_that_are_dead_and_give_the_rate_of_the_last_step(together):
    states, sums = together[0][-1], together[1][-1]
    for member, state, own, summary in zip(
        MEMBERS, states, sums, loop.summaries(MEMBERS, STEPS, states, sums), strict=True
    ):
        assert summary["fvu"] == metrics.summarize(own)["fvu"]
        assert summary["dead_fraction"] == np.mean(state.since_fired >= 300)
        rate = float(state.rate) * optim.schedule(member.train)(STEPS - 1)
        assert summary["learning_rate"] == pytest.approx(float(rate))
    given = MEMBERS[0]._replace(inner=optax.sgd(1e-2))
    assert "learning_rate" not in loop.summaries([given], STEPS, states[:1], sums[:1])[0]


def test_members_of_a_pass_differ_from_one_another(together):
    """Lest they equal the ones trained alone because seeds, rates, sites and k do nothing."""
    last = together[0][-1]
    for a, b in itertools.combinations(range(len(MEMBERS)), 2):
        mine, other = (np.asarray(last[i].sae.W_enc[...]) for i in (a, b))
        assert mine.shape != other.shape or np.abs(mine - other).max() > 1e-3, (a, b)


def test_every_sae_draws_its_own_k_while_it_comes_down(together):
    l0 = np.array([[sums.l0 / 64 for sums in step] for step in together[1]])
    # From 12 to 4, and to 8, over 20 steps. A token of a TopK SAE may have fewer that are positive.
    fours = [12, 11, 11, 10, 10, 10, 9, 9, 8, 8, 8, 7, 7, 6, 6, 6, 5, 5, 4, 4]
    np.testing.assert_allclose(l0[:, 2], fours, atol=0.01)
    assert (l0[:, 0] <= 4).all()
    assert (l0[:, 1] <= [12, 12, 11, 11, 11, 11, 11, 10, 10, 10, 10, 10, 9, 9, 9, 9, 9, 8, 8, 8]).all()
    assert (l0[:, 1] > 4).all()


def test_the_program_changes_where_k_has_come_down_and_nowhere_else():
    half = dataclasses.replace(ANNEALED, k_anneal_fraction=0.5)
    programs = loop.Programs((MEMBERS[0], Member(MEMBERS[1].sae, half, 1)))
    assert programs.at(1) is programs.at(10)
    assert programs.at(11) is programs.at(20)
    assert programs.at(10) is not programs.at(11)


@pytest.mark.parametrize("number", [3, 17])
def test_a_pass_that_was_cut_off_goes_on_to_the_same_bits(number, together, tmp_path):
    batches = stream()
    begun = loop.fit(MEMBERS, first(batches), batches, PROGRAMS)
    *_, (_, states, _) = itertools.islice(begun, number)
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        checkpoints.save(number, states, {"cursor": batches.cursor().to_json()}, fvu=0.5)
        checkpoints.wait()
        found = checkpoints.restore(jax.eval_shape(lambda sample: loop.init(MEMBERS, sample), stream().peek()))
    rest = stream(cursor=Cursor(**found.notes["cursor"]))
    *_, (last, states, _) = steps = list(loop.fit(MEMBERS, found.states, rest, PROGRAMS))
    assert (len(steps), last) == (STEPS - number, STEPS)
    for ours, theirs in zip(jax.tree.leaves(states), jax.tree.leaves(together[0][-1]), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_members_with_another_number_of_steps_are_refused_with_the_numbers():
    longer = Member(MEMBERS[0].sae, dataclasses.replace(RUN, num_activations=64 * (STEPS + 3)), 0)
    states = jax.eval_shape(lambda sample: loop.init([MEMBERS[0]], sample), stream().peek())
    with pytest.raises(ConfigError, match=r"same number of steps, not \[20, 23\]"):
        next(loop.fit([MEMBERS[0], longer], states, iter([])))


def test_activations_that_end_before_the_run_are_told_with_the_steps_taken():
    member = Member(sae_config("relu", D, F), RUN)
    batch = jnp.asarray(activations(0)[:64])
    steps = loop.fit([member], loop.init([member], [batch]), iter([[batch]] * 3))
    with pytest.raises(ConfigError, match="the activations ended after 3 of 20 steps"):
        list(steps)


@pytest.mark.parametrize(
    ("config", "widths", "wanted"),
    [
        (sae_config("relu", D, F), [D + 1], r"\[12\], got \[13\]"),
        (sae_config("relu", D, F, d_out=5), [D, 6], r"\[12, 5\], got \[12, 6\]"),
        (sae_config("relu", D, F, d_out=5), [D], r"\[12, 5\], got \[12\]"),
        (sae_config("relu", 3 * D, F, layers=3), [D, D], r"\[12, 12, 12\], got \[12, 12\]"),
        (sae_config("relu", 2 * D, F, layers=2), [D, 2 * D], r"\[12, 12\], got \[12, 24\]"),
    ],
)
def test_activations_of_other_widths_are_refused_before_anything_is_trained(config, widths, wanted):
    acts = tuple(np.ones((8, width), np.float32) for width in widths)
    with pytest.raises(ConfigError, match=f"needs activations of the widths {wanted}"):
        begin(config, RUN, acts)


def test_a_loss_that_is_not_finite_is_told_of_the_one_sae_that_had_it(together):
    good, bad = together[0][-1][:2]
    sums = together[1][-1]
    loop.check_finite(good, sums[0], "k4 blocks.0")
    broken = bad._replace(bad_step=jnp.int32(7))
    with pytest.raises(loop.NotFiniteError, match=r"the loss of k8 blocks\.1 is not finite at step 7; the activations"):
        loop.check_finite(broken, sums[1], "k8 blocks.1")


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_state_keeps_its_types_so_that_a_step_is_compiled_once(name):
    member = Member(sae_config(name, D, F, **({"nested_widths": (8,)} if name == "matryoshka" else {})), RUN)
    sample = (jnp.asarray(activations(0)[:64]),)
    before = loop.init([member], sample)
    after, _ = jax.eval_shape(loop.Programs([member]).at(STEPS), before, sample)
    for (path, old), new in zip(jax.tree_util.tree_leaves_with_path(before), jax.tree.leaves(after), strict=True):
        old = jax.typeof(old)
        types = (old.shape, old.dtype, old.weak_type), (new.shape, new.dtype, new.weak_type)
        assert types[0] == types[1], jax.tree_util.keystr(path)
