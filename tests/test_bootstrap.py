"""Bootstrap intervals against the formulas of normal theory, and what is resampled together."""

import numpy as np
import pytest

from bridge.evaluate import bootstrap


def test_the_interval_of_a_mean_is_that_of_normal_theory():
    values = np.random.default_rng(0).normal(3, 2, 2000)
    low, high = bootstrap.of_mean(values.tolist())
    assert low == pytest.approx(values.mean() - 1.96 * 2 / 2000**0.5, abs=0.02)
    assert high == pytest.approx(values.mean() + 1.96 * 2 / 2000**0.5, abs=0.02)
    assert bootstrap.of_mean([]) is None
    assert bootstrap.of_mean([2.0]) == [2.0, 2.0]


def test_classes_and_examples_are_both_resampled():
    """The variance of the mean is that between classes, over their number, plus that within, over the examples."""
    rng = np.random.default_rng(0)
    centres = rng.normal(0, 1, 30)
    classes = [rng.normal(centre, 3, (1, 40)) for centre in centres]
    samples = bootstrap.two_level(classes, [np.arange(40)] * 30)[0]
    means = np.array([values.mean() for values in classes])
    expected = means.var() / 30 + np.mean([values.var() for values in classes]) / 30 / 40
    assert samples.mean() == pytest.approx(means.mean(), abs=0.05)
    assert samples.std() == pytest.approx(expected**0.5, rel=0.1)


def test_groups_are_resampled_whole():
    values = np.repeat(np.random.default_rng(0).normal(size=20), 50)[None]
    alone = bootstrap.two_level([values], [np.arange(1000)])[0].std()
    grouped = bootstrap.two_level([values], [np.arange(1000) // 50])[0].std()
    assert grouped == pytest.approx(values.std() / 20**0.5, rel=0.1)
    assert alone == pytest.approx(values.std() / 1000**0.5, rel=0.1)


def test_quantities_of_the_same_examples_are_paired():
    first = np.random.default_rng(0).normal(size=100)
    samples = bootstrap.two_level([np.stack([first, first + 1])], [np.arange(100) % 7])
    np.testing.assert_allclose(samples[1] - samples[0], 1)
