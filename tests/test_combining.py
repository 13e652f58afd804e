"""Labels of joined predicates, on tokens whose predicates are known."""

import dataclasses

import numpy as np
import pytest
import scipy.sparse

from bridge.evaluate import combining, labels, predicates

N = 4000
RNG = np.random.default_rng(0)
A, B, C = (RNG.random(N) < share for share in (0.1, 0.1, 0.5))
IDS = RNG.integers(0, 12, N)
TABLE = predicates.Predicates(["A", "B", "C"], np.stack([A, B, C], axis=1))
CHOOSES = np.arange(N) % 2 == 0


def described(*columns: np.ndarray, chooses: np.ndarray = CHOOSES) -> tuple[list[labels.Label], list[labels.Label]]:
    """Return simple and combined labels of latents that fire where the columns hold."""
    token, latent = np.stack(columns, axis=1).nonzero()
    fires = labels.Firings(latent, token, np.ones(len(token), np.float32), np.ones(N, bool), len(columns))
    return labels.describe(fires, labels.Material(TABLE, {"token": IDS}, str, chooses))


def test_latents_get_the_rules_they_follow():
    seven, nine = IDS == 7, IDS == 9
    rules = [A | B, A & C, A & ~C, A, seven | nine, (seven | nine) & C, np.zeros(N, bool)]
    simple, combined = described(*rules)
    found = [label.label for label in combined]
    assert set(found[0].split(" or ")) == {"A", "B"}
    assert set(found[1].split(" and ")) == {"A", "C"}
    assert found[2] == "A but not C"
    assert found[3] == "A"
    assert set(found[4].split(" or ")) == {"token '7'", "token '9'"}
    assert found[5].count("token '") == 2  # in three predicates; which are joined first may differ
    assert combined[5].f1 > simple[5].f1 + 0.2
    assert found[6] is None
    assert [label.f1 for label in combined[:5]] == [1.0] * 5
    assert all(old.f1 < 0.8 for i, old in enumerate(simple[:6]) if i != 3)
    table = labels.table(combined, simple)
    assert table["2"]["simple"] == {"label": "A", "f1": simple[2].f1}
    assert "simple" not in table["3"]
    summary = labels.summary(combined, simple)
    assert summary["f1_over_80_percent"] >= 5
    assert summary["detection"] == labels.detection(simple)  # of one predicate for every SAE


def test_scores_are_those_of_the_other_tokens():
    # Where labels are chosen the latent fires on A or B; where they are scored, on A only.
    (simple,), (combined,) = described(np.where(CHOOSES, A | B, A))
    assert set(combined.label.split(" or ")) == {"A", "B"}
    scored = ~CHOOSES
    assert combined.n == int(A[scored].sum())
    assert combined.precision == 1
    assert combined.recall == pytest.approx(A[scored].sum() / (A | B)[scored].sum())
    assert combined.f1 == pytest.approx(2 * A[scored].sum() / (A[scored].sum() + (A | B)[scored].sum()))
    assert dataclasses.replace(simple, label=None).threshold == combined.threshold


def test_noise_gets_no_longer_labels():
    latents = [A & (RNG.random(N) < 0.8) for _ in range(20)]
    _, combined = described(*latents)
    assert [label.label for label in combined] == ["A"] * 20


def test_a_label_that_would_be_too_long_stays_simple(monkeypatch):
    monkeypatch.setattr(combining, "LONGEST", 5)
    simple, combined = described(A | B)
    assert combined == simple


def test_many_latents_are_combined_as_few_are():
    few = described(A | B, A & C)[1]
    many = described(*([A | B, A & C] * 50))[1]
    assert many == few * 50


def test_rare_tokens_have_no_column():
    ids = np.where(np.arange(N) < combining.FEWEST - 1, 3, 5)
    candidates, columns = combining.candidates(A[:, None], ["A"], {"token": ids}, str, np.ones(N, bool))
    assert columns[0].tolist() == [-1, -1, -1, -1, -1, 0]
    assert columns[1].tolist() == [1]
    assert [candidates.name(i) for i in range(2)] == ["token '5'", "A"]
    dense = scipy.sparse.csr_array(candidates.holds).toarray()
    np.testing.assert_array_equal(dense, np.stack([ids == 5, A], axis=1))
