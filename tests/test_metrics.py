"""Metrics against values worked out by hand."""

import numpy as np
import pytest
import torch

from jsae import metrics

X = np.array([[1.0, 0.0], [3.0, 0.0], [2.0, 2.0]])
X_HAT = np.array([[1.0, 1.0], [3.0, 0.0], [0.0, 2.0]])
LATENTS = np.array([[1.0, 0.0, 2.0], [0.0, 0.0, 1.0], [0.5, 0.0, 0.0]])


def sums_of(x, x_hat, latents):
    return metrics.of(x, x_hat, latents, (latents > 0).sum(0), loss=x.sum() * 0 + 2.0, nonfinite=x.sum() * 0)


# |e|^2 = 1, 0, 4; |x|^2 = 1, 9, 8; mean x = (2, 2/3), so the variance is 6 - 40/9 = 14/9 and FVU (5/3) / (14/9)
BY_HAND = {
    "tokens": 3.0,
    "loss": 2.0,
    "fvu": 15 / 14,
    "explained_variance": -1 / 14,
    "mse": 5 / 3,
    "l0": 4 / 3,
    "l1": 4.5 / 3,
    "cosine": (1 / np.sqrt(2) + 1 + 4 / (np.sqrt(8) * 2)) / 3,
    "l2_ratio": (np.sqrt(2) + 1 + 2 / np.sqrt(8)) / 3,
    "relative_reconstruction_bias": 15 / 14,  # |x_hat|^2 = 2, 9, 4; x . x_hat = 1, 9, 4
    "dead_fraction": 1 / 3,
}


@pytest.mark.parametrize("library", [np.asarray, torch.tensor], ids=["numpy", "torch"])
def test_metrics_equal_the_values_worked_out_by_hand(library):
    summary = metrics.summarize(sums_of(library(X), library(X_HAT), library(LATENTS)))
    assert summary == pytest.approx(BY_HAND)


def test_metrics_of_batches_add_up_to_those_of_the_whole():
    whole = metrics.summarize(sums_of(X, X_HAT, LATENTS))
    parts = [sums_of(X[i : i + 1], X_HAT[i : i + 1], LATENTS[i : i + 1]) for i in range(3)]
    assert metrics.summarize(metrics.add(metrics.add(parts[0], parts[1]), parts[2])) == pytest.approx(whole)


def test_density_is_the_share_of_tokens():
    np.testing.assert_allclose(metrics.density(sums_of(X, X_HAT, LATENTS)), [2 / 3, 0, 2 / 3])


def test_metrics_of_nothing_are_refused():
    nothing = sums_of(np.zeros((0, 2)), np.zeros((0, 2)), np.zeros((0, 3)))
    with pytest.raises(ValueError, match="no tokens"):
        metrics.summarize(nothing)
