"""The activation stream on a real nanochat: right activations, no BOS or sinks, exact resume, no hidden copies."""

import copy

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from tiny_nanochat import tiny

from bridge import selection
from bridge.ahead import ReadAhead
from bridge.hooks import capture, hook_name
from bridge.nanochat.model import GPT
from bridge.stream import ActivationStream, forbid_waiting
from jsae import loop
from jsae.architectures import sae_config
from jsae.config import TrainConfig
from jsae.data import Cursor, Shuffled
from jsae.health import ActivationsError

NAME, BOS, ROW = hook_name(1, "resid_post"), 0, 16


class Text:
    """Rows of random tokens that start with BOS; row i depends on i alone."""

    row_len = ROW

    def __init__(self):
        self.at = 0

    def next_rows(self, n):
        rows = [np.random.default_rng(self.at + i).integers(1, 50, ROW) for i in range(n)]
        self.at += n
        rows = np.stack(rows).astype(np.int32)
        rows[:, 0] = BOS
        return rows

    def position(self):
        return {"at": self.at}

    def seek(self, position):
        self.at = position["at"]


@pytest.fixture(scope="module")
def model() -> GPT:
    return tiny("G7")


def stream(model, **kwargs) -> ActivationStream:
    return ActivationStream(model, Text(), [[NAME]], excluded=(BOS,), rows_per_forward=4, **kwargs)


def take(source: ActivationStream, rows: int) -> np.ndarray:
    filling = source.fill(rows)
    try:
        while True:
            share = next(filling)
            assert 0 <= share <= 1
    except StopIteration as done:
        ((block,),) = done.value
        return np.asarray(block)


def read(model, name: str, rows: int, start: int = 0) -> np.ndarray:
    """Return the activations of rows of text, (rows, ROW, 32)."""
    text = Text()
    text.seek({"at": start})
    with torch.no_grad(), capture(model, [name]) as acts:
        model(torch.from_numpy(text.next_rows(rows).astype(np.int64)))
    return acts[name].numpy()


def test_the_stream_gives_the_models_own_activations_without_bos(model):
    expected = read(model, NAME, 8)[:, 1:].reshape(-1, 32)
    np.testing.assert_allclose(take(stream(model), 8 * ROW)[: 8 * (ROW - 1)], expected, atol=1e-5)


def test_the_places_of_tokens_left_out_are_filled_with_the_first_of_the_others(model):
    block = take(stream(model), 8 * ROW)
    np.testing.assert_array_equal(block[8 * (ROW - 1) :], block[:8])


def test_without_a_bos_id_every_token_stays(model):
    source = ActivationStream(model, Text(), [[NAME]], excluded=(), drop_sinks=False)
    np.testing.assert_allclose(take(source, 10 * ROW), read(model, NAME, 10).reshape(-1, 32), atol=1e-5)
    assert source.tokens_seen == 10 * ROW


def test_blocks_go_on_with_the_next_row_of_text(model):
    source = stream(model)
    take(source, 70)  # four rows and a part of the fifth
    np.testing.assert_allclose(take(source, 2 * ROW)[:30], read(model, NAME, 2, 5)[:, 1:].reshape(-1, 32), atol=1e-5)


def test_sites_of_one_pass_are_each_as_if_alone(model):
    def shout(module, inputs, output):
        output[:, 5] *= 100
        return output

    other = hook_name(2, "mlp")
    handle = model.transformer.h[2].mlp.register_forward_hook(shout)
    try:
        source = ActivationStream(model, Text(), [[NAME], [other], [NAME, other]], excluded=(BOS,))
        filling = source.fill(100)
        while True:
            next(filling)
    except StopIteration as done:
        (first,), (second,), both = (tuple(map(np.asarray, site)) for site in done.value)
    finally:
        handle.remove()
    np.testing.assert_allclose(first, take(stream(model), 100), atol=1e-5)
    kept = np.delete(read(model, NAME, 7), [0, 5], axis=1).reshape(-1, 32)
    np.testing.assert_allclose(both[0][:80], kept[:80], atol=1e-5)  # what is a sink at one hook of a site is left out
    assert first.shape == second.shape == both[0].shape == both[1].shape == (100, 32)


def test_a_stream_that_went_back_gives_the_same_bits(model):
    source = stream(model)
    take(source, 70)
    position = source.position()
    expected = take(source, 130)
    again = stream(model)
    again.seek(position)
    np.testing.assert_array_equal(take(again, 130), expected)
    assert again.position() == source.position()


def test_sink_tokens_are_dropped_unless_asked_for(model):
    def shout(module, inputs, output):
        output[:, 5] *= 100
        return output

    handle = model.transformer.h[1].register_forward_hook(shout)
    try:
        quiet, loud = take(stream(model), 4 * ROW), take(stream(model, drop_sinks=False), 4 * ROW)
    finally:
        handle.remove()
    assert np.linalg.norm(quiet, axis=1).max() < 0.1 * np.linalg.norm(loud, axis=1).max()
    np.testing.assert_array_equal(quiet[4 * (ROW - 2) :], quiet[:8])


def test_a_token_that_is_not_finite_is_no_sink_but_is_named(model):
    handle = model.transformer.h[1].register_forward_hook(lambda m, i, o: o.index_fill(1, torch.tensor(3), torch.nan))
    try:
        with pytest.raises(ActivationsError, match=rf"4 of 60 tokens .* at {NAME} .* NaN; .* position 3 of its row"):
            take(stream(model), 4 * ROW)
    finally:
        handle.remove()


def test_bfloat16_activations_arrive_as_bfloat16(model):
    block = take(stream(copy.deepcopy(model).to(torch.bfloat16)), 64)
    assert block.dtype == jnp.bfloat16


def test_text_of_nothing_but_bos_is_refused(model):
    source = stream(model)
    source._rows.next_rows = lambda n: np.full((n, ROW), BOS, np.int32)
    with pytest.raises(ValueError, match=r"none of the \d+ tokens of a block is kept at .* read larger blocks"):
        take(source, 10)


class Rounded:
    """Calls the parts of a pass as they are, and records the shapes of the passes."""

    def __init__(self):
        self.shapes = set()

    def __call__(self, function, *arguments):
        self.shapes |= {tuple(a.shape) for a in arguments if isinstance(a, torch.Tensor) and a.dtype == torch.int64}
        return function(*arguments)

    def mask(self, length, window, device):
        return None


@pytest.mark.parametrize("rows", [70, 32, 130])
def test_passes_of_compiled_parts_have_one_shape_and_give_the_same_block(model, rows):
    run = Rounded()
    source = stream(model, run=run)
    np.testing.assert_allclose(take(source, rows), take(stream(model), rows), atol=1e-5)
    assert run.shapes == {(min(4, -(-rows // ROW)), ROW)}
    assert source.tokens_seen == -(-rows // ROW) * ROW
    assert source.position() == {"at": -(-rows // ROW)}


def test_the_tokens_of_the_next_pass_are_read_before_a_share_is_reported(model):
    source = stream(model)
    assert [source.position()["at"] for _ in source.fill(12 * ROW)] == [8, 12, 12]


def test_rows_that_a_thread_reads_ahead_have_the_sources_order_and_positions():
    plain, ahead = Text(), ReadAhead(Text())
    for n in (4, 4, 1, 6, 2, 3):
        assert ahead.position() == plain.position()
        np.testing.assert_array_equal(ahead.next_rows(n), plain.next_rows(n))
    ahead.seek({"at": 2})
    plain.seek({"at": 2})
    assert ahead.position() == {"at": 2}
    np.testing.assert_array_equal(ahead.next_rows(3), plain.next_rows(3))
    assert ahead.row_len == ROW


def test_an_error_of_the_thread_that_reads_ahead_is_raised_to_who_takes_rows():
    class Damaged(Text):
        def next_rows(self, n):
            if self.at >= 6:
                raise OSError("the shard cannot be read")
            return super().next_rows(n)

    ahead = ReadAhead(Damaged())
    ahead.next_rows(4)
    with pytest.raises(OSError, match="the shard cannot be read"):
        ahead.next_rows(4)


@pytest.mark.parametrize("count", [1, 2, 7, 8, 21])
@pytest.mark.parametrize("broken", [0, 1, 3])
def test_norms_are_compared_with_the_quantile_of_those_that_are_numbers(count, broken):
    x = torch.randn(2, count, generator=torch.Generator().manual_seed(count))
    x[0, : min(broken, count)] = torch.nan
    expected = x.nanquantile(selection.SINK_NORM_QUANTILE, dim=1, keepdim=True, interpolation="lower")
    assert torch.equal(selection.high(x).nan_to_num(7), expected.nan_to_num(7))


def test_tokens_that_an_mlp_writes_on_are_no_sinks_where_it_is_silent_on_most():
    acts = torch.full((1, 32, 4), 1e-6)
    acts[0, :6] = 1
    acts[0, 6] = 20
    mask = selection.kept(acts, torch.ones(1, 32, dtype=torch.int64), (), drop_sinks=True)
    assert (~mask).nonzero().tolist() == [[0, 6]]


def test_a_sink_is_found_by_its_own_row_whatever_rows_are_beside_it():
    acts = torch.ones(2, 8, 4)
    acts[0, 3] = 11
    acts[1] = 100
    tokens = torch.ones(2, 8, dtype=torch.int64)
    together = selection.kept(acts, tokens, (), drop_sinks=True)
    assert together.tolist() == [[True] * 3 + [False] + [True] * 4, [True] * 8]
    for row in range(2):
        assert torch.equal(selection.kept(acts[row : row + 1], tokens[:1], (), drop_sinks=True)[0], together[row])


def test_what_a_shard_gives_depends_on_its_own_rows_only(model):
    """Two shards at once, and each of them alone from every second row, give the same activations."""

    class Every(Text):
        def __init__(self, first, step):
            super().__init__()
            self.first, self.step = first, step

        def next_rows(self, n):
            rows = super().next_rows(n * self.step)
            return rows[self.first :: self.step]

    def block(rows, size, shards):
        options = {"excluded": (BOS,), "rows_per_forward": 3, "shards": shards}
        return take(ActivationStream(model, rows, [[NAME]], **options), size)

    together = block(Text(), 4 * ROW + 6, 2)
    apart = [block(Every(first, 2), 2 * ROW + 3, 1) for first in range(2)]
    np.testing.assert_allclose(together, np.concatenate(apart), rtol=1e-5, atol=1e-6)
    assert len(np.unique(together[:, 0])) > ROW


def test_a_step_between_reports_copies_nothing_implicitly(model):
    members = [loop.Member(sae_config("topk", 32, 64, k=4), TrainConfig(2000, 100, dead_after=1000), 0)]
    batches = Shuffled(stream(model), batch_size=100, batches_per_block=3, seed=0)
    steps = loop.fit(members, loop.init(members, batches.peek()), batches)
    next(steps)
    with forbid_waiting():
        taken = [next(steps)[0] for _ in range(8)]
        with pytest.raises(Exception, match="Disallowed host-to-device"):
            jnp.ones(3) + np.ones(3)
    assert taken == list(range(2, 10))


def test_a_layer_that_does_not_exist_is_refused_before_anything_runs(model):
    with pytest.raises(ValueError, match="4 layers"):
        ActivationStream(model, Text(), [[NAME], [hook_name(4, "mlp")]], excluded=(BOS,))


def test_training_from_the_stream_makes_no_silent_transfers_and_resumes_to_the_same_bits(model):
    run = TrainConfig(num_activations=3000, batch_size=100, dead_after=1000)
    members = [loop.Member(sae_config("topk", 32, 64, k=k), run, 0) for k in (4, 8)]

    def batches(cursor=None):
        return Shuffled(
            stream(model), batch_size=100, batches_per_block=7, seed=0, num_batches=run.num_steps, cursor=cursor
        )

    start = batches()
    initial = loop.init(members, start.peek())
    midway = None
    with jax.transfer_guard("disallow"):
        for step, states, _ in loop.fit(members, initial, start):
            if step == 12:
                with jax.transfer_guard("allow"):
                    midway = jax.device_get(states), start.cursor().to_json()
    assert midway is not None
    restored = jax.tree.map(jnp.asarray, midway[0])
    *_, (_, again, _) = loop.fit(members, restored, batches(Cursor(**midway[1])))
    for ours, theirs in zip(jax.tree.leaves(again), jax.tree.leaves(states), strict=True):
        np.testing.assert_array_equal(ours, theirs)
