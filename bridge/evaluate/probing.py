"""Whether few latents tell the classes of a text apart (sparse probing), and whether taking a class's latents away
takes away this class alone (targeted probe perturbation, TPP).

Definitions and names are SAEBench's. Two things are done otherwise: a probe sees standardised features, so that its
penalty does not depend on the unit of activations; and TPP takes away only latents that speak for a class
(SAEBench goes on to those that speak against it when no others are left).
"""

import dataclasses
import math
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Float32

TOP_K = (1, 2, 5)
TPP_LATENTS = (2, 5, 10, 20, 50, 100, 500)
_FEWEST = 10  # examples of a class, and others, in training; a tenth of that in the test
_SEED = 0


@dataclasses.dataclass(frozen=True)
class Examples:
    """What a class is told from: a token each, or the mean over a passage's tokens without BOS."""

    acts: Float32[np.ndarray, "n d"]
    latents: Float32[np.ndarray, "n f"]
    member: Bool[np.ndarray, "n C"]
    """Whether an example is of a class; of none is allowed, and of several."""
    train: Bool[np.ndarray, " n"]
    """What probes learn from; the others test them."""
    classes: list[str]


@dataclasses.dataclass(frozen=True)
class _Task:
    """One class against the rest, as many of either: rows of the examples, and which of them are of the class."""

    train: np.ndarray
    test: np.ndarray
    train_is: np.ndarray
    test_is: np.ndarray


def require_sklearn() -> None:
    """Raises ImportError, with what to do, unless scikit-learn is installed."""
    try:
        import sklearn  # noqa: F401
    except ImportError as error:
        raise ImportError(
            "probes need scikit-learn: pip install 'jsae[eval]', or leave them out with --noprobes"
        ) from error


def sparse_probing(examples: Examples, top_k: tuple[int, ...] = TOP_K) -> dict[str, Any]:
    """Test accuracies of logistic probes, one class against the rest, balanced; the mean over classes, and each.

    `sae_top_K_test_accuracy` sees the K latents whose means differ most between class and rest, `sae_test_accuracy`
    all latents; `llm_...` the same of the activations themselves.

    Raises:
      ImportError: scikit-learn is not installed.
    """
    require_sklearn()
    by_class: dict[str, dict[str, float]] = {}
    for name, task in _tasks(examples).items():
        found = {}
        for kind, features in (("llm", examples.acts), ("sae", examples.latents)):
            found[f"{kind}_test_accuracy"] = _accuracy(features, task)
            order = _by_difference(features, task)
            for k in top_k:
                found[f"{kind}_top_{k}_test_accuracy"] = _accuracy(features[:, order[:k]], task)
        by_class[name] = found
    return {"examples": len(examples.train), **_mean(by_class), "classes": by_class}


def tpp(
    examples: Examples, W_dec: Float32[np.ndarray, "f d"], most: tuple[int, ...] = TPP_LATENTS
) -> dict[str, float | None]:
    """How much more a class's probe suffers than the others' from the loss of the class's N strongest latents.

    A class's latents are ranked by (mean of the class - mean of the rest, where positive) x (weights of the class's
    probe . decoder row). The N strongest are set to zero, the SAE's error is kept: activations lose f W_dec, and
    as that is linear, means over a passage may be taken first. `intended` is the loss of accuracy of the class's own
    probe, `unintended` the mean loss of the others', `total` their difference; each is a mean over classes.

    Raises:
      ImportError: scikit-learn is not installed.
    """
    require_sklearn()
    tasks = _tasks(examples)
    if len(tasks) < 2:  # there is no other class to suffer
        return {}
    probes = {name: _fit(examples.acts[task.train], task.train_is) for name, task in tasks.items()}
    before = {name: _score(examples.acts[task.test], task.test_is, probes[name]) for name, task in tasks.items()}
    found: dict[str, float | None] = {}
    for n in (n for n in most if n <= len(W_dec)):
        intended, unintended = [], []
        for name, task in tasks.items():
            chosen = _strongest(examples, task, probes[name][0], W_dec, n)
            lost = examples.latents[:, chosen] @ W_dec[chosen]
            drops = {
                other: before[other] - _score(examples.acts[o.test] - lost[o.test], o.test_is, probes[other])
                for other, o in tasks.items()
            }
            intended.append(drops.pop(name))
            unintended.append(np.mean(list(drops.values())))
        found[f"tpp_threshold_{n}_total_metric"] = float(np.mean(intended) - np.mean(unintended))
        found[f"tpp_threshold_{n}_intended_diff_only"] = float(np.mean(intended))
        found[f"tpp_threshold_{n}_unintended_diff_only"] = float(np.mean(unintended))
    return found


def _tasks(examples: Examples) -> dict[str, _Task]:
    """Every class that has enough examples in training and test, with as many others drawn at random."""
    rng = np.random.default_rng(_SEED)
    tasks = {}
    for name, member in zip(examples.classes, examples.member.T, strict=True):
        halves = []
        for half, fewest in ((examples.train, _FEWEST), (~examples.train, math.ceil(_FEWEST / 10))):
            own, others = np.flatnonzero(half & member), np.flatnonzero(half & ~member)
            size = min(len(own), len(others))
            if size < fewest:
                break
            rows = np.concatenate([rng.permutation(own)[:size], rng.permutation(others)[:size]])
            halves.append((rows, np.arange(2 * size) < size))
        if len(halves) == 2:
            (train, train_is), (test, test_is) = halves
            tasks[name] = _Task(train, test, train_is, test_is)
    return tasks


def _by_difference(features: Float32[np.ndarray, "n f"], task: _Task) -> np.ndarray:
    """Features by how far their means in class and rest lie apart, the farthest first."""
    return np.argsort(-np.abs(_difference(features, task)), kind="stable")


def _difference(features: Float32[np.ndarray, "n f"], task: _Task) -> Float[np.ndarray, " f"]:
    return features[task.train[task.train_is]].mean(0) - features[task.train[~task.train_is]].mean(0)


def _strongest(
    examples: Examples, task: _Task, weights: np.ndarray, W_dec: Float32[np.ndarray, "f d"], n: int
) -> np.ndarray:
    """At most n latents that are more active in the class and push its probe up, the strongest first."""
    effect = np.maximum(_difference(examples.latents, task), 0) * (W_dec @ weights)
    order = np.argsort(-effect, kind="stable")[:n]
    return order[effect[order] > 0]


def _accuracy(features: np.ndarray, task: _Task) -> float:
    return _score(features[task.test], task.test_is, _fit(features[task.train], task.train_is))


def _score(features: np.ndarray, is_class: np.ndarray, probe: tuple[np.ndarray, float]) -> float:
    weights, bias = probe
    return float(((features @ weights + bias > 0) == is_class).mean())


def _fit(features: np.ndarray, is_class: np.ndarray) -> tuple[np.ndarray, float]:
    """Weights and bias, for features as they are, of a logistic probe that saw them standardised."""
    from sklearn.linear_model import LogisticRegression

    features = features.astype(np.float64)
    mean, spread = features.mean(0), features.std(0)
    spread = np.where(spread > 0, spread, 1)
    probe = LogisticRegression(max_iter=1000).fit((features - mean) / spread, is_class)
    weights = probe.coef_[0] / spread
    return weights, float(probe.intercept_[0] - mean @ weights)


def _mean(by_class: dict[str, dict[str, float]]) -> dict[str, float]:
    """The mean over classes of each accuracy."""
    names = next(iter(by_class.values()), {})
    return {name: float(np.mean([found[name] for found in by_class.values()])) for name in names}
