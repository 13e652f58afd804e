"""The parts of watching: budget, pool, settings, shared memory."""

import math

import numpy as np
import pytest

from bridge.live.budget import Budget
from bridge.live.config import Sizes, WatchConfig
from bridge.live.pool import Pool
from bridge.live.ring import Ring, Shape
from jsae.settings import ConfigError


class Clock:
    """Seconds that pass when they are told to."""

    def __init__(self):
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def simulated(share: float, steps: int, cost: float, own: float = 1.0, preparation: float = 50.0) -> Budget:
    clock = Clock()
    budget = Budget(share, clock)
    budget.begin()
    for number in range(steps):
        allowed = budget.allows()
        clock.now += own
        if allowed:
            before, seconds = budget.spent, preparation if number == 0 else cost
            with budget.measuring(lambda number=number: number == 0):
                clock.now += seconds
            if number:
                budget.batch(budget.spent - before)
    return budget


# ---- the budget ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cost", [0.01, 0.2, 3.0])
def test_a_budget_is_kept_and_used(cost):
    budget = simulated(0.05, 2000, cost)
    assert budget.elapsed == pytest.approx(2000)
    assert budget.ratio <= 0.05 + 1e-9
    if cost > 0.05:
        assert budget.ratio > 0.045
    else:
        assert budget.skipped == 0
    assert budget.setup == 50


def test_without_a_limit_nothing_is_skipped():
    budget = simulated(math.inf, 100, 30.0)
    assert budget.skipped == 0
    assert budget.ratio == pytest.approx(99 * 30 / 100)


def test_a_budget_that_is_too_small_is_reported_once():
    budget = simulated(0.05, 500, 1.0)
    problem = budget.too_slow()
    assert "a batch takes 1 s" in problem
    assert "one in 20 of the steps" in problem
    assert budget.too_slow() is None
    assert simulated(0.05, 500, 0.04).too_slow() is None


def test_a_budget_before_the_training_began_is_zero():
    budget = Budget(0.05, Clock())
    assert (budget.elapsed, budget.ratio, budget.spent) == (0, 0, 0)


# ---- the pool -----------------------------------------------------------------------------------------------------


def test_a_pool_keeps_every_row_in_order_and_of_all_hooks():
    pool, rows = Pool(4, [2, 3]), np.arange(11, dtype=np.float32)
    parts = [np.repeat(rows[:, None], width, axis=1) * factor for width, factor in ((2, 1), (3, -1))]
    batches = []
    for start, stop in ((0, 3), (3, 9), (9, 11)):
        batches += pool.batches([part[start:stop] for part in parts])
    assert [batch[0][:, 0].tolist() for batch in batches] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert all(np.array_equal(batch[1][:, 0], -batch[0][:, 0]) for batch in batches)
    assert pool.filled == 3
    again = Pool(4, [2, 3])
    again.restore(pool.arrays, pool.filled)
    (last,) = again.batches([np.full((1, 2), 11, np.float32), np.full((1, 3), -11, np.float32)])
    assert last[0][:, 0].tolist() == [8, 9, 10, 11]


def test_a_batch_is_never_written_again():
    pool = Pool(2, [1])
    (first,) = pool.batches([np.ones((2, 1), np.float32)])
    list(pool.batches([np.zeros((2, 1), np.float32)]))
    assert first[0].tolist() == [[1], [1]]


# ---- shared memory ------------------------------------------------------------------------------------------------


def test_what_is_written_into_a_slot_is_read_in_another_mapping():
    shape = Shape(slots=3, rows=5, hooks=2, width=4)
    ring = Ring(shape)
    other = Ring(shape, ring.descriptor)
    parts = [np.random.default_rng(i).random((3, 4), np.float32) for i in range(2)]
    ring.write(1, parts)
    assert all(np.array_equal(a, b) for a, b in zip(other.read(1, 3), parts, strict=True))
    assert all(not part.any() for part in other.read(2, 5))


# ---- settings -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"checkpoint": None}, "checkpoint is not given"),
        ({"share": 0.0}, "share is 0.0: it must lie between 1e-6 and 1e6"),
        ({"every": 0}, "every is 0"),
        ({"layer": ("x",)}, "layer 'x' is neither a number from 0 nor 'all'"),
        ({"layer": ("1", "1")}, "names a layer twice"),
        ({"activation": "topkk"}, "topkk"),
        ({"device": "cuda:1"}, "give place='sidecar'"),
        ({"resume_from": -2}, "resume_from is -2"),
        ({"k": 0}, "k is 0"),
    ],
)
def test_settings_that_cannot_work_are_refused_by_name(settings, message):
    with pytest.raises(ConfigError, match=message.replace("(", r"\(")):
        WatchConfig(**({"checkpoint": "models/d3"} | settings))


def test_settings_survive_json_and_describe_a_training_of_the_same_saes():
    config = WatchConfig(checkpoint="models/d3", layer=("1",), k=8, activation="batchtopk", share=1e6)
    assert WatchConfig.from_json(config.to_json()) == config
    settings = config.run_config()
    assert settings.sae_config(32).k == 8
    assert settings.train_config().dead_after == 256 * 2048
    assert WatchConfig(checkpoint="m", activation="relu").run_config().activation == "relu"


def test_special_tokens_are_the_last_nine():
    sizes = Sizes(n_layer=2, n_embd=8, vocab_size=100)
    assert sizes.excluded("bos") == (91,)
    assert sizes.excluded("special") == tuple(range(91, 100))
    assert sizes.excluded("nothing") == ()
    with pytest.raises(ConfigError, match="exclude_tokens='nothing'"):
        Sizes(n_layer=2, n_embd=8, vocab_size=5).excluded("bos")
