"""Sparse probing, and targeted probe perturbation (TPP).

Sparse probing measures how well few latents classify text, compared with as few raw channels, principal components and
random directions. TPP measures whether ablating the latents of a class harms the probe of this class alone;
arXiv 2605.18229 finds that TPP and SCR rank SAEs unreliably, so it is kept for comparison with older tables only.

Definitions and names are SAEBench's, with two differences: probes are fitted on standardised features, so that their
penalty does not depend on the unit of activations; and TPP ablates only latents that speak for a class (SAEBench
continues with those that speak against it when no others are left).
"""

import dataclasses
import math
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Float32, Int

from bridge.evaluate import bootstrap
from jsae import extras

TOP_K = (1, 2, 5)
BASELINES = ("llm", "pca", "random")
"""Features that sparse probing compares latents with."""
TPP_LATENTS = (2, 5, 10, 20, 50, 100, 500)
_FEWEST = 10  # examples of a class, and of the rest, in training; a tenth of that in the test
_SEED = 0


@dataclasses.dataclass(frozen=True)
class Examples:
    """Examples to classify: each is a token, or the mean over a passage's tokens without BOS."""

    acts: Float32[np.ndarray, "n d"]
    latents: Float32[np.ndarray, "n f"]
    member: Bool[np.ndarray, "n C"]
    """Whether an example is in a class; an example may be in none or in several."""
    train: Bool[np.ndarray, " n"]
    """Which examples train probes; the others test them."""
    classes: list[str]
    random: Float32[np.ndarray, "n r"] | None = None
    """Latents of a random SAE (`bridge.evaluate.random_sae`), a baseline; None leaves the baseline out."""
    document: Int[np.ndarray, " n"] | None = None
    """The document of each example; examples of one document are resampled together. None: each is its own."""


@dataclasses.dataclass(frozen=True)
class Task:
    """One class against the rest, balanced: rows of the examples, and which of them are in the class."""

    train: np.ndarray
    test: np.ndarray
    train_is: np.ndarray
    test_is: np.ndarray


def require_sklearn() -> None:
    """Raise ImportError, with advice, unless scikit-learn is installed."""
    try:
        import sklearn  # noqa: F401
    except ImportError as error:
        raise ImportError(
            f"probes need scikit-learn: {extras.advice('eval')}, or leave them out with --noprobes"
        ) from error


def sparse_probing(examples: Examples, top_k: tuple[int, ...] = TOP_K) -> dict[str, Any]:
    """Return test accuracies of logistic probes, one class against the rest, balanced: their mean, and by class.

    `X_top_K_test_accuracy` uses the K features of X whose means differ most between class and rest, all on training
    examples. X is `sae` (the latents), or a baseline: `llm` (channels of the activations), `pca` (principal components
    of the training examples' activations) or `random` (latents of a random SAE with as many latents and the same L0).
    `sae_test_accuracy` uses all latents, `llm_test_accuracy` all channels.

    `intervals` holds the 95 % interval of every mean accuracy, from a bootstrap over classes and, in each class, over
    documents of the test examples (`bootstrap.two_level`). `advantage` holds for every K the difference between latents
    and the baseline of the highest mean accuracy, with the paired interval: both are resampled together. The baseline
    is chosen with the test examples, which favours the baselines.

    Raises:
      ImportError: scikit-learn is not installed.
    """
    require_sklearn()
    components = _components(examples)
    by_task = tasks(examples)
    correct = {name: _by_probe(examples, components, task, top_k) for name, task in by_task.items()}
    if not correct:
        return {"examples": len(examples.train), "classes": {}}
    by_class = {name: {key: float(hits.mean()) for key, hits in probes.items()} for name, probes in correct.items()}
    means = _mean(by_class)
    tests = [task.test for task in by_task.values()]
    groups = tests if examples.document is None else [examples.document[test] for test in tests]
    draws = bootstrap.two_level([np.stack(list(probes.values())) for probes in correct.values()], groups)
    samples = dict(zip(means, draws, strict=True))
    return {
        "examples": len(examples.train),
        **means,
        "intervals": {name: bootstrap.interval(sample) for name, sample in samples.items()},
        "advantage": {str(k): _advantage(k, means, samples) for k in top_k},
        "classes": by_class,
    }


def _by_probe(
    examples: Examples, components: Float32[np.ndarray, "n c"], task: Task, top_k: tuple[int, ...]
) -> dict[str, Bool[np.ndarray, " t"]]:
    """Return for every probe which test examples of a class it classifies correctly."""
    kinds = {"llm": examples.acts, "sae": examples.latents, "pca": components, "random": examples.random}
    correct = {}
    for kind, features in kinds.items():
        if features is None:
            continue
        if kind in ("llm", "sae"):
            correct[f"{kind}_test_accuracy"] = _correct(features, task)
        order = by_difference(features, task)
        for k in top_k:
            correct[f"{kind}_top_{k}_test_accuracy"] = _correct(features[:, order[:k]], task)
    return correct


def _advantage(k: int, means: dict[str, float], samples: dict[str, np.ndarray]) -> dict[str, Any]:
    """Return how far k latents surpass k features of the best baseline, with the paired interval."""
    names = [name for kind in BASELINES if (name := f"{kind}_top_{k}_test_accuracy") in means]
    best, own = max(names, key=means.__getitem__), f"sae_top_{k}_test_accuracy"
    return {
        "baseline": best.split("_", 1)[0],
        "difference": means[own] - means[best],
        "interval": bootstrap.interval(samples[own] - samples[best]),
    }


def _components(examples: Examples) -> Float32[np.ndarray, "n c"]:
    """Return the coordinates of all activations along the principal components of the training examples."""
    mean = examples.acts[examples.train].mean(0, dtype=np.float64)
    centred = examples.acts[examples.train] - mean
    _, vectors = np.linalg.eigh(centred.T @ centred)
    return ((examples.acts - mean) @ vectors[:, ::-1]).astype(np.float32)


def tpp(
    examples: Examples, W_dec: Float32[np.ndarray, "f d"], most: tuple[int, ...] = TPP_LATENTS
) -> dict[str, float | None]:
    """Return how much more the ablation of a class's N strongest latents harms its own probe than the others'.

    A class's latents are ranked by (mean of the class - mean of the rest, where positive) x (weights of the class's
    probe . decoder row). The N strongest are set to zero and the SAE's error is kept: activations lose f W_dec. As this
    is linear, means over a passage may be taken first. `intended` is the loss of accuracy of the class's own probe,
    `unintended` the mean loss of the other probes, `total` their difference; each is a mean over classes.

    Raises:
      ImportError: scikit-learn is not installed.
    """
    require_sklearn()
    by_name = tasks(examples)
    if len(by_name) < 2:  # there is no other class to compare with
        return {}
    probes = {name: fit(examples.acts[task.train], task.train_is) for name, task in by_name.items()}
    baseline = {name: _score(examples.acts[task.test], task.test_is, probes[name]) for name, task in by_name.items()}
    scores: dict[str, float | None] = {}
    for n in (n for n in most if n <= len(W_dec)):
        intended, unintended = [], []
        for name, task in by_name.items():
            chosen = _strongest(examples, task, probes[name][0], W_dec, n)
            removed = examples.latents[:, chosen] @ W_dec[chosen]
            drops = {
                other: baseline[other]
                - _score(examples.acts[other_task.test] - removed[other_task.test], other_task.test_is, probes[other])
                for other, other_task in by_name.items()
            }
            intended.append(drops.pop(name))
            unintended.append(np.mean(list(drops.values())))
        scores[f"tpp_threshold_{n}_total_metric"] = float(np.mean(intended) - np.mean(unintended))
        scores[f"tpp_threshold_{n}_intended_diff_only"] = float(np.mean(intended))
        scores[f"tpp_threshold_{n}_unintended_diff_only"] = float(np.mean(unintended))
    return scores


def tasks(examples: Examples) -> dict[str, Task]:
    """Return every class with enough examples in training and test, with equally many others drawn at random."""
    rng = np.random.default_rng(_SEED)
    found = {}
    for name, member in zip(examples.classes, examples.member.T, strict=True):
        halves = []
        for part, fewest in ((examples.train, _FEWEST), (~examples.train, math.ceil(_FEWEST / 10))):
            in_class, others = np.flatnonzero(part & member), np.flatnonzero(part & ~member)
            size = min(len(in_class), len(others))
            if size < fewest:
                break
            rows = np.concatenate([rng.permutation(in_class)[:size], rng.permutation(others)[:size]])
            halves.append((rows, np.arange(2 * size) < size))
        if len(halves) == 2:
            (train, train_is), (test, test_is) = halves
            found[name] = Task(train, test, train_is, test_is)
    return found


def by_difference(features: Float32[np.ndarray, "n f"], task: Task) -> np.ndarray:
    """Return the indices of features, ordered by the distance of their means in class and rest, greatest first."""
    return np.argsort(-np.abs(_difference(features, task)), kind="stable")


def _difference(features: Float32[np.ndarray, "n f"], task: Task) -> Float[np.ndarray, " f"]:
    """Return the mean of each feature in the class minus that in the rest."""
    return features[task.train[task.train_is]].mean(0) - features[task.train[~task.train_is]].mean(0)


def _strongest(
    examples: Examples, task: Task, weights: np.ndarray, W_dec: Float32[np.ndarray, "f d"], n: int
) -> np.ndarray:
    """Return at most n latents that are more active in the class and increase its probe's output, strongest first."""
    effect = np.maximum(_difference(examples.latents, task), 0) * (W_dec @ weights)
    order = np.argsort(-effect, kind="stable")[:n]
    return order[effect[order] > 0]


def _correct(features: np.ndarray, task: Task) -> Bool[np.ndarray, " t"]:
    """Return which test examples a probe of these features classifies correctly."""
    return predictions(features[task.test], fit(features[task.train], task.train_is)) == task.test_is


def predictions(features: np.ndarray, probe: tuple[np.ndarray, float]) -> Bool[np.ndarray, " t"]:
    """Return which examples a probe puts into the class."""
    weights, bias = probe
    return features @ weights + bias > 0


def _score(features: np.ndarray, is_class: np.ndarray, probe: tuple[np.ndarray, float]) -> float:
    return float((predictions(features, probe) == is_class).mean())


def fit(features: np.ndarray, is_class: np.ndarray) -> tuple[np.ndarray, float]:
    """Return weights and bias, for raw features, of a logistic probe fitted on standardised ones."""
    from sklearn.linear_model import LogisticRegression

    features = features.astype(np.float64)
    mean, spread = features.mean(0), features.std(0)
    spread = np.where(spread > 0, spread, 1)
    probe = LogisticRegression(max_iter=1000).fit((features - mean) / spread, is_class)
    weights = probe.coef_[0] / spread
    return weights, float(probe.intercept_[0] - mean @ weights)


def _mean(by_class: dict[str, dict[str, float]]) -> dict[str, float]:
    """Return the mean over classes of each accuracy."""
    names = next(iter(by_class.values()), {})
    return {name: float(np.mean([accuracies[name] for accuracies in by_class.values()])) for name in names}
