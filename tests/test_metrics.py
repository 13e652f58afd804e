"""Every metric against values worked out by hand, in every library that it is computed with."""

import math

import jax.numpy as jnp
import numpy as np
import pytest
import torch

from jsae import metrics

X = np.array([[1.0, 0.0], [3.0, 0.0], [2.0, 2.0]])
X_HAT = np.array([[1.0, 1.0], [3.0, 0.0], [0.0, 2.0]])
LATENTS = np.array([[1.0, 0.0, 2.0], [0.0, 0.0, -1.0], [0.5, 0.0, 0.0]])


def sums_of(x, x_hat, latents):
    return metrics.batch_sums(
        x,
        x_hat - x,
        l0=(latents != 0).sum(),
        l1=abs(latents).sum(),
        fired=(latents != 0).sum(0),
        loss=x.sum() * 0 + 2.0,
        nonfinite=x.sum() * 0,
    )


# |e|^2 = 1, 0, 4; |x|^2 = 1, 9, 8; mean x = (2, 2/3), so the variance is 6 - 40/9 = 14/9 and FVU (5/3) / (14/9)
# |x - mean|^2 = 1 + 4/9, 1 + 4/9, 16/9
BY_HAND = {
    "tokens": 3.0,
    "loss": 2.0,
    "fvu": 15 / 14,
    "explained_variance": -1 / 14,
    "explained_variance_legacy": ((1 - 9 / 13) + 1 + (1 - 4 * 9 / 16)) / 3,
    "mse": 5 / 3,
    "l0": 4 / 3,
    "l1": 4.5 / 3,
    "cosine": (1 / np.sqrt(2) + 1 + 4 / (np.sqrt(8) * 2)) / 3,
    "l2_ratio": (np.sqrt(2) + 1 + 2 / np.sqrt(8)) / 3,
    "relative_reconstruction_bias": 15 / 14,  # |x_hat|^2 = 2, 9, 4; x . x_hat = 1, 9, 4
    "dead_fraction": 1 / 3,
}


@pytest.mark.parametrize("library", [np.asarray, torch.tensor, jnp.asarray], ids=["numpy", "torch", "jax"])
def test_metrics_equal_the_values_worked_out_by_hand(library):
    summary = metrics.summarize(sums_of(library(X), library(X_HAT), library(LATENTS)))
    assert summary == pytest.approx(BY_HAND, rel=1e-5)


def test_metrics_of_batches_add_up_to_those_of_the_whole_but_for_the_old_explained_variance():
    whole = metrics.summarize(sums_of(X, X_HAT, LATENTS))
    first, second = sums_of(X[:2], X_HAT[:2], LATENTS[:2]), sums_of(X[2:], X_HAT[2:], LATENTS[2:])
    parts = metrics.summarize(metrics.add(first, second))
    # Of the first two the mean is (2, 0): 1 - 1/1 and 1 - 0/1. One token alone has no variance that could be explained.
    assert parts.pop("explained_variance_legacy") == pytest.approx((0 + 1 + 0) / 3)
    del whole["explained_variance_legacy"]
    assert parts == pytest.approx(whole)


def test_the_mean_of_the_batches_fvu_is_another_number_and_not_ours():
    """Batches (X[0], X[2]) and (X[1], X[2]): variances 1.25 and 1.25 with errors 2.5 and 2, so (2 + 1.6) / 2."""
    halves = [metrics.summarize(sums_of(X[i], X_HAT[i], LATENTS[i]))["fvu"] for i in ([0, 2], [1, 2])]
    assert np.mean(halves) == pytest.approx(1.8)
    both = metrics.add(*(sums_of(X[i], X_HAT[i], LATENTS[i]) for i in ([0, 2], [1, 2])))
    # Of the four tokens |e|^2 is 9, |x|^2 26, the mean (2, 1).
    assert metrics.summarize(both)["fvu"] == pytest.approx((9 / 4) / (26 / 4 - 5))


def test_scaling_activations_and_reconstructions_changes_only_what_has_a_unit():
    """Also where the unit is such that a mean of squares is no square of means."""
    scaled = metrics.summarize(sums_of(100 * X, 100 * X_HAT, LATENTS))
    expected = BY_HAND | {"mse": 100**2 * BY_HAND["mse"]}
    assert scaled == pytest.approx(expected)


def test_shifting_activations_changes_neither_fvu_nor_error():
    shift = np.array([5.0, -3.0])
    shifted = metrics.summarize(sums_of(X + shift, X_HAT + shift, LATENTS))
    for name in ("fvu", "explained_variance", "explained_variance_legacy", "mse"):
        assert shifted[name] == pytest.approx(BY_HAND[name]), name


def test_undefined_metrics_are_nan():
    same = np.ones((4, 2))
    summary = metrics.summarize(sums_of(same, same * 0, LATENTS[:1]))
    assert math.isnan(summary["fvu"])
    assert math.isnan(summary["explained_variance"])
    assert math.isnan(summary["relative_reconstruction_bias"])
    assert summary["explained_variance_legacy"] == 0
    assert summary["l2_ratio"] == 0


def test_a_token_of_norm_zero_counts_with_cosine_and_ratio_of_zero():
    summary = metrics.summarize(
        sums_of(np.array([[0.0, 0.0], [1.0, 0.0]]), np.array([[0.0, 0.0], [2.0, 0.0]]), LATENTS)
    )
    assert (summary["cosine"], summary["l2_ratio"]) == (0.5, 1)


def test_density_is_the_share_of_tokens_and_what_is_negative_fires_too():
    np.testing.assert_allclose(metrics.density(sums_of(X, X_HAT, LATENTS)), [2 / 3, 0, 2 / 3])


def test_a_latent_is_dead_on_some_tokens_and_alive_when_more_are_added():
    sums = sums_of(X, X_HAT, LATENTS)
    assert [metrics.summarize(sums)[name] for name in ("dead_fraction", "tokens")] == [pytest.approx(1 / 3), 3]
    more = metrics.add(sums, sums_of(X[:1], X_HAT[:1], np.array([[0.0, 1.0, 0.0]])))
    assert [metrics.summarize(more)[name] for name in ("dead_fraction", "tokens")] == [0, 4]


def test_the_histogram_counts_every_latent_once():
    found = metrics.histogram(np.array([0.0, 1.0, 0.1, 0.01, 1 / 5000]), 5000.0)
    assert found["never"] == 1
    assert sum(found["counts"]) == 4
    assert (found["log10_edges"][0], found["log10_edges"][-1]) == (-4, 0)
    assert len(found["log10_edges"]) == len(found["counts"]) + 1 == 17
    # 1 lies in the last bin, 0.1 in the one that begins at -1
    assert found["counts"][-1] == 1
    assert found["counts"][12] == 1


def test_the_histogram_of_sums_is_that_of_their_densities():
    sums = sums_of(X, X_HAT, LATENTS)
    assert metrics.density_histogram(sums) == metrics.histogram(np.array([2 / 3, 0, 2 / 3]), 3.0)


@pytest.mark.parametrize("tokens", [1.0, 7.0, 1000.0])
def test_the_histogram_has_a_bin_for_one_firing_and_for_all(tokens):
    found = metrics.histogram(np.array([1 / tokens, 1.0, 0.0]), tokens)
    assert sum(found["counts"]) == 2
    assert found["never"] == 1
    assert found["counts"][-1] >= 1


def test_metrics_of_nothing_are_refused():
    nothing = sums_of(np.zeros((0, 2)), np.zeros((0, 2)), np.zeros((0, 3)))
    with pytest.raises(ValueError, match="no tokens"):
        metrics.summarize(nothing)
