"""The block shuffle: nothing lost, nothing doubled, resumed exactly."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from jsae import data
from jsae.arrays import ArraySource
from jsae.data import Cursor, Shuffled
from jsae.settings import ConfigError


class CountingSource:
    """Rows 0, 1, 2, ... in pieces of three, so that pieces and blocks do not line up."""

    d_in = 1

    def __init__(self):
        self.next, self.pieces = 0, 0

    def fill(self, rows):
        got = []
        while len(got) < rows:
            take = min(3, rows - len(got))
            got += range(self.next, self.next + take)
            self.next += take
            self.pieces += 1
            yield len(got) / rows
        return jnp.asarray(got, jnp.float32)[:, None]

    def position(self):
        return {"next": self.next}

    def seek(self, position):
        self.next = position["next"]


def stream(source=None, cursor=None, num_batches=None):
    return Shuffled(
        source or CountingSource(), batch_size=4, batches_per_block=5, seed=7, num_batches=num_batches, cursor=cursor
    )


def test_every_block_is_drained_completely_and_mixed():
    batches = stream()
    for block in range(3):
        rows = np.concatenate([next(batches)[:, 0] for _ in range(5)])
        assert sorted(rows) == list(range(20 * block, 20 * block + 20))
        assert list(rows) != sorted(rows)


def test_blocks_are_permuted_differently():
    batches = stream()
    orders = [np.concatenate([next(batches)[:, 0] for _ in range(5)]) - 20 * b for b in range(2)]
    assert (orders[0] != orders[1]).any()


def test_a_stream_resumed_at_any_batch_continues_with_the_same_numbers():
    batches = stream()
    cursors, expected = [], []
    for _ in range(13):
        cursors.append(batches.cursor())
        expected.append(np.asarray(next(batches)))
    for i, cursor in enumerate(cursors):
        resumed = stream(cursor=Cursor(**cursor.to_json()))
        for batch in expected[i:]:
            np.testing.assert_array_equal(next(resumed), batch)


def test_peeking_changes_nothing():
    plain, peeked = stream(), stream()
    assert peeked.peek().shape == (20, 1)
    for _ in range(7):
        np.testing.assert_array_equal(next(peeked), next(plain))


def test_the_next_block_fills_while_this_one_drains():
    source = CountingSource()
    batches = stream(source)
    done = []
    for _ in range(5):
        next(batches)
        done.append(source.pieces)
    assert done[0] == 7  # the first block, which nothing can hide
    assert done == sorted(set(done))  # then a few pieces of the second at every batch


def test_a_stream_ends_where_it_should_and_asks_the_source_for_no_more():
    source = CountingSource()
    batches = list(stream(source, num_batches=8))
    assert len(batches) == 8
    assert source.next == 40


def test_a_cursor_of_another_block_size_is_refused():
    with pytest.raises(ConfigError, match="batch 9 of a block of 5"):
        stream(cursor=Cursor(0, 9, {"next": 0}))


def test_cursors_are_plain_values():
    assert dataclasses.asdict(Cursor(1, 2, {"a": 3})) == Cursor(1, 2, {"a": 3}).to_json()


def test_an_array_is_walked_round_and_round():
    batches = Shuffled(ArraySource(np.arange(6.0)[:, None]), batch_size=4, batches_per_block=1, seed=0)
    assert sorted(np.concatenate([next(batches)[:, 0], next(batches)[:, 0], next(batches)[:, 0]])) == sorted(
        2 * list(range(6))
    )


def test_the_scale_brings_the_mean_squared_norm_to_the_width():
    acts = jnp.asarray(np.random.default_rng(0).normal(3, 5, (100, 8)), jnp.float32)
    scaled = acts * data.scale_of(acts)
    assert float(jnp.square(scaled).sum(-1).mean()) == pytest.approx(8, rel=1e-5)


@pytest.mark.parametrize("k", [1, 5, 11])
def test_the_remainder_is_the_variance_outside_the_leading_principal_components(k):
    acts = np.random.default_rng(0).standard_normal((500, 12)) @ np.diag(0.7 ** np.arange(12)) + 3
    values = np.linalg.svd(acts - acts.mean(0), compute_uv=False) ** 2
    assert float(data.remainder(jnp.asarray(acts), k)) == pytest.approx(values[k:].sum() / values.sum(), rel=0.02)


def test_all_dimensions_leave_no_remainder():
    assert float(data.remainder(jnp.eye(12), 12)) == 0


def test_the_geometric_median_withstands_outliers_that_move_the_mean():
    rng = np.random.default_rng(0)
    x = np.concatenate([rng.normal(0, 1, (400, 3)), np.full((40, 3), 1000.0)]).astype(np.float32)
    median = data.geometric_median(jnp.asarray(x))
    assert np.abs(median).max() < 0.5
    assert np.abs(x.mean(0)).min() > 50
