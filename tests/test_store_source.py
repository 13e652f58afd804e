"""A store as a source of training: every row once per epoch, exact resuming, the same however streams are divided."""

import uuid

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jsae
from jsae import store
from jsae.data import Shuffled, Source
from jsae.health import DegenerateError
from jsae.settings import ConfigError
from jsae.store import SiteSource, StoreSource
from jsae.store.order import Order

ROWS, D = 6000, 8


@pytest.fixture(scope="module")
def acts():
    rng = np.random.default_rng(0)
    strengths = rng.random((ROWS, 20)) * (rng.random((ROWS, 20)) < 0.1)
    return (strengths @ rng.standard_normal((20, D)) + 0.01 * rng.standard_normal((ROWS, D))).astype(np.float32)


@pytest.fixture(scope="module")
def masks():
    rng = np.random.default_rng(1)
    return {"a": rng.random(ROWS) < 0.9, "b": rng.random(ROWS) < 0.8}


def write(acts, masks, storage="float32", **options):
    batch = {"a": acts, "b": acts[:, :4] + 1, "kept": masks}
    return store.write(f"memory://{uuid.uuid4().hex}", batch, storage=storage, **options)


@pytest.fixture(scope="module")
def opened(acts, masks):
    return write(acts, masks)


def fill(source, rows):
    """The next block of a source, on the host."""
    filling, shares = source.fill(rows), [0.0]
    while True:
        try:
            shares.append(next(filling))
        except StopIteration as done:
            assert shares == sorted(shares)
            return jax.tree.map(np.asarray, done.value)


def same(one, other):
    return jax.tree.all(jax.tree.map(np.array_equal, one, other))


def test_it_is_a_source(opened):
    assert isinstance(StoreSource(opened, "a"), Source)
    assert isinstance(SiteSource(opened, [["a"], ["b"]]), Source)


def test_every_row_that_counts_comes_once_per_epoch(opened, acts, masks):
    source, numbers = StoreSource(opened, "a"), StoreSource(opened, "a")
    count = int(masks["a"].sum())
    orders = []
    for _ in range(3):
        rows = numbers.row_numbers(count)
        assert np.array_equal(np.sort(rows), np.flatnonzero(masks["a"]))
        assert np.array_equal(fill(source, count), acts[rows])
        orders.append(rows)
    assert not np.array_equal(orders[0], orders[1])
    assert not np.array_equal(orders[0], StoreSource(opened, "a", seed=1).row_numbers(count))


def test_rows_must_count_at_all_hooks_of_an_sae(opened, acts, masks):
    both = masks["a"] & masks["b"]
    source, numbers = StoreSource(opened, ("a", "b")), StoreSource(opened, ("a", "b"))
    rows = numbers.row_numbers(int(both.sum()))
    assert np.array_equal(np.sort(rows), np.flatnonzero(both))
    a, b = fill(source, len(rows))
    assert np.array_equal(a, acts[rows])
    assert np.array_equal(b, acts[rows][:, :4] + 1)


@pytest.mark.parametrize("rows", [1, 100, 777, 5000])
def test_a_block_may_have_any_size(opened, rows):
    source = StoreSource(opened, "a")
    assert np.array_equal(
        np.concatenate([fill(source, rows) for _ in range(3)]), fill(StoreSource(opened, "a"), 3 * rows)
    )


def test_a_block_mixes_at_least_16_chunks(opened):
    rows = StoreSource(opened, "a").row_numbers(1000)
    assert len(set(rows // opened.layout.chunk_rows)) >= 16


@pytest.mark.parametrize("kind", ["hook", "hooks", "sites"])
def test_any_block_follows_exactly_after_seek(opened, kind):
    new = {
        "hook": lambda: StoreSource(opened, "a", seed=3),
        "hooks": lambda: StoreSource(opened, ("a", "b"), seed=3),
        "sites": lambda: SiteSource(opened, [["a"], ["a", "b"], ["b"]], seed=3),
    }[kind]
    source = new()
    positions, blocks = [], []
    for _ in range(9):  # more than an epoch
        positions.append(source.position())
        blocks.append(fill(source, 1000))
    for position, block in zip(positions, blocks, strict=True):
        resumed = new()
        resumed.seek(position)
        assert same(fill(resumed, 1000), block)
    source.seek(positions[4])
    assert same(fill(source, 1000), blocks[4])


@pytest.mark.parametrize("division", [[[0, 1, 2, 3]], [[0, 1], [2, 3]], [[0], [1], [2], [3]], [[0], [1, 2, 3]]])
def test_blocks_do_not_depend_on_how_streams_are_divided(opened, division):
    whole = StoreSource(opened, "a", streams=4)
    parts = [StoreSource(opened, "a", streams=4, serve=numbers) for numbers in division]
    for _ in range(4):
        block = fill(whole, 4 * 500)
        assert np.array_equal(
            block, np.concatenate([fill(part, len(part.position()["positions"]) * 500) for part in parts])
        )
    alone = StoreSource(opened, "a", streams=4, serve=[3])
    alone.seek(whole.position())
    following = fill(alone, 500)
    assert np.array_equal(fill(whole, 2000)[1500:], following)


def test_streams_together_read_every_chunk_once():
    order = Order(chunks=37, seed=5, streams=4)
    for epoch in range(3):
        groups = [chunk for stream in range(4) for group in order.groups(stream, epoch) for chunk in group]
        assert sorted(groups) == list(range(37))


def test_a_group_has_the_rows_that_fit_into_the_memory():
    opened = store.write("memory://large", np.zeros((400_000, 4), np.float32))
    for memory, rows in ((1, 65_536), (16 * 131_072, 131_072), (2**30, 400_000)):
        numbers = StoreSource(opened, memory=memory).row_numbers(400_000)[: rows - 2048]
        chunks = len(set(numbers // opened.layout.chunk_rows))
        assert abs(chunks * opened.layout.chunk_rows - rows) < 0.2 * rows


def test_sites_of_several_saes_are_those_of_each_alone(opened):
    together = SiteSource(opened, [["a"], ["a", "b"]], seed=2)
    a, both = StoreSource(opened, "a", seed=2), StoreSource(opened, ("a", "b"), seed=2)
    for _ in range(3):
        assert same(fill(together, 900), ((fill(a, 900),), fill(both, 900)))


@pytest.mark.parametrize("storage", ["bfloat16", "int8"])
def test_other_types_arrive_as_they_are_read_on_the_host(acts, masks, storage):
    opened = write(acts, masks, storage)
    rows = StoreSource(opened, "a").row_numbers(2000)
    block = fill(StoreSource(opened, "a"), 2000)
    assert block.dtype == jnp.bfloat16
    assert np.array_equal(block, opened.read("a", 0, ROWS)[rows])


def test_a_faulty_store_is_an_error_of_the_block_that_needs_it(acts, masks, tmp_path):
    store.write(tmp_path / "s", {"a": acts, "kept": masks["a"]})
    (tmp_path / "s/acts/a/c/1/0").unlink()
    with pytest.raises(jsae.DamagedError, match="a shard is missing"):
        fill(StoreSource(store.open(tmp_path / "s")), 5000)


def test_a_store_of_which_no_row_counts_is_refused(acts):
    opened = write(acts, {"a": np.zeros(ROWS, bool), "b": np.ones(ROWS, bool)})
    with pytest.raises(ValueError, match=r"no row of .* counts at a, b"):
        fill(StoreSource(opened, ["a", "b"]), 10)


def test_what_cannot_be_served_is_refused(opened):
    with pytest.raises(ConfigError, match=r"has the hooks a, b: choose, as in .*StoreSource\(store, 'a'\)"):
        StoreSource(opened)
    with pytest.raises(ConfigError, match="no hook 'c'"):
        StoreSource(opened, "c")
    with pytest.raises(ConfigError, match="cannot be dealt to 10000 streams"):
        StoreSource(opened, "a", streams=10_000)
    with pytest.raises(ConfigError, match="some of the streams 0 to 3"):
        StoreSource(opened, "a", streams=4, serve=[4])
    with pytest.raises(ConfigError, match="cannot be divided among 4 streams"):
        fill(StoreSource(opened, "a", streams=4), 10)


def test_a_position_of_something_else_is_refused(opened, acts, masks):
    position = StoreSource(opened, "a").position()
    for other, text in [
        (StoreSource(opened, "a", seed=1), "seed was 0"),
        (StoreSource(opened, "b"), "hooks was"),
        (StoreSource(opened, "a", streams=2), "streams was 1"),
        (StoreSource(write(acts + 1, masks), "a"), "store was"),
    ]:
        with pytest.raises(ConfigError, match=text):
            other.seek(position)


# ---- training --------------------------------------------------------------------------------------------------------

SAE = {"d_in": D, "d_sae": 64, "k": 3}


def config(**options):
    return jsae.TrainConfig(num_activations=20_000, batch_size=250, learning_rate=3e-3, **options)


def test_training_from_a_store_equals_training_on_the_same_rows_in_memory(opened, acts):
    block, batches = 4000, 20_000 // 4000
    rows = StoreSource(opened, "a", seed=7).row_numbers(block * batches)
    in_memory = jsae.train(
        (acts[rows[i * block : (i + 1) * block]] for i in range(batches)),
        jsae.TopK.Config(**SAE),
        config(),
        block_size=block,
        data_seed=7,
    )
    stored = jsae.train(
        StoreSource(opened, "a", seed=7), jsae.TopK.Config(**SAE), config(), block_size=block, data_seed=7
    )
    assert in_memory.metrics["fvu"] == stored.metrics["fvu"]
    assert same(in_memory.encode(acts), stored.encode(acts))


def test_a_store_of_one_hook_is_trained_on_as_it_is(acts):
    opened = store.write(f"memory://{uuid.uuid4().hex}", acts)
    trained = jsae.train(opened, jsae.TopK.Config(**SAE), config())
    in_memory = jsae.train(acts, jsae.TopK.Config(**SAE), config())
    assert trained.metrics["fvu"] < 0.5
    assert abs(trained.metrics["fvu"] - in_memory.metrics["fvu"]) < 0.03


def test_a_transcoder_reads_two_hooks(opened):
    trained = jsae.train(StoreSource(opened, ("a", "b")), jsae.BatchTopK.Config(**SAE, d_out=4), config())
    assert trained.metrics["fvu"] < 0.6


def test_an_interrupted_training_continues_to_the_same_numbers(opened, acts, tmp_path):
    options = {"block_size": 1000, "checkpoints": tmp_path / "c", "checkpoint_every": 5000, "report_every": 10}

    def reports(folder):
        source = StoreSource(opened, "a")
        return jsae.fit(source, jsae.TopK.Config(**SAE), config(), **options | {"checkpoints": tmp_path / folder})

    whole = list(reports("whole"))[-1].trained()
    interrupted = reports("c")
    while next(interrupted).step < 50:
        pass
    interrupted.close()
    resumed = list(reports("c"))
    assert resumed[0].step > 20
    assert same(whole.encode(acts), resumed[-1].trained().encode(acts))


def test_batches_of_two_runs_over_the_same_store_are_the_same(opened):
    streams = [
        Shuffled(StoreSource(opened, "a"), batch_size=100, batches_per_block=10, seed=0, num_batches=70) for _ in "ab"
    ]
    for one, other in zip(*streams, strict=True):
        assert np.array_equal(one, other)


def test_activations_that_nothing_is_learned_from_are_refused():
    opened = store.write(f"memory://{uuid.uuid4().hex}", np.ones((2000, D), np.float32))
    with pytest.raises(DegenerateError):
        jsae.train(opened, jsae.TopK.Config(**SAE), config())
