"""Matches of SAEs against permutations that are known."""

import numpy as np
import pytest

from jsae import stability


def rows(seed: int, count: int = 40, width: int = 64) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(count, width)).astype(np.float32)


def test_a_permutation_is_found_whatever_the_norms_are():
    first = rows(0)
    order = np.random.default_rng(1).permutation(40)
    found = stability.match(first, 3 * first[order])
    np.testing.assert_array_equal(order[found.second], found.first)
    np.testing.assert_allclose(found.cosine, 1, atol=1e-6)
    assert stability.stability([first, first[order]])["share_over_0.9"] == 1


def test_the_assignment_is_the_best_of_all_and_not_greedy():
    angle = np.deg2rad([0.0, 40.0])
    first = np.stack([np.cos(angle), np.sin(angle)], 1)
    angle = np.deg2rad([10.0, -60.0])
    second = np.stack([np.cos(angle), np.sin(angle)], 1)
    # Greedy would pair 0 with 10 degrees (0.985) and 40 with -60 (-0.174).
    assert stability.match(first, second).second.tolist() == [1, 0]


def test_an_opposite_direction_is_another_latent():
    first = rows(0)
    assert stability.stability([first, -first])["share_over_0.7"] == 0


def test_shares_are_of_the_living_latents_of_the_larger():
    first, second = rows(0), rows(1)
    second[:10] = first[:10]
    both = np.arange(40) < 20
    found = stability.stability([first, second], [both, np.arange(40) < 16])
    assert found["alive"] == [20, 16]
    assert found["share_over_0.9"] == 10 / 20
    dead = np.zeros(40, bool)
    assert stability.stability([first, second], [dead, dead])["mean_cosine"] == 0


def test_several_seeds_are_compared_in_pairs():
    first = rows(0)
    found = stability.stability([first, first[::-1], rows(2)])
    assert len(found["pairs"]) == 3
    assert [pair["share_over_0.9"] for pair in found["pairs"]] == [1, 0, 0]
    assert found["share_over_0.9"] == pytest.approx(1 / 3)


def test_saes_that_cannot_be_compared_are_refused(monkeypatch):
    with pytest.raises(ValueError, match="1 SAEs were given"):
        stability.stability([rows(0)])
    with pytest.raises(ValueError, match="give SAEs of one size"):
        stability.stability([rows(0), rows(0, 41)])
    with pytest.raises(ValueError, match="64 and 32 channels"):
        stability.match(rows(0), rows(0, width=32))
    monkeypatch.setattr(stability, "MOST_LATENTS", 30)
    with pytest.raises(ValueError, match="40 latents are alive, at most 30"):
        stability.match(rows(0), rows(1))
