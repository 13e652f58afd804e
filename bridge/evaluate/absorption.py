"""Splitting and absorption of simple concepts, where a probe shows that the activations hold them.

Definitions are SAEBench's (arXiv 2503.09532, section on absorption; arXiv 2409.14507), on concepts of single tokens,
their first letter and whether they are capitalised, instead of spelling prompts, which small models cannot answer.

Splitting: latents are ranked by the difference of their means in class and rest; k grows from 1 while a probe of one
latent more gains at least `GAIN` in F1. The k latents are the concept's main latents.

Absorption, on the test tokens of the concept that a probe of the activations classifies correctly: with p the unit
vector of the probe, latent i contributes a_i (d_i . p) to the projection (x - b_dec) . p. (SAEBench projects x itself.)
"""

from typing import Any

import numpy as np
from jaxtyping import Float32

from bridge.evaluate import bootstrap, probing
from bridge.evaluate.probing import Examples

GAIN = 0.03
"""Least gain in F1 of one latent more."""
MOST_LATENTS = 10
"""Most main latents."""
PROBE_F1 = 0.8
"""Least F1 of the probe of the activations: below, the activations do not hold the concept well enough."""
ALIGNED, STRONGEST_ALIGNED = 0.1, 0.025
"""Least cosine with the probe of absorbing latents, and of the single one in `rate`."""
SHARE = 0.4
"""Least share of the projection that absorbing latents contribute."""
ABSORBING = 3
"""Most absorbing latents."""


def absorption(
    examples: Examples, W_dec: Float32[np.ndarray, "f d"], b_dec: Float32[np.ndarray, " d"]
) -> dict[str, Any]:
    """Return splitting and absorption of every concept that a probe finds, and their means over concepts.

    `fraction` is the mean over tokens of the share of the concept that at most `ABSORBING` aligned latents carry in
    place of the main ones: 0 if these carry all of the projection or the absorbing ones less than `SHARE` of it, 1 if
    the main ones carry nothing. `rate` is the share of tokens at which no main latent is active and the strongest
    latent is aligned and carries at least `SHARE`. `latents` is the number of main latents, `main_f1` the F1 of a
    probe of these: where it is low, no latents stand for the concept, and absorption says little. Intervals are from a
    bootstrap over concepts.

    Args:
      examples: single tokens, their activations, latents and concepts.
      W_dec: decoder rows.
      b_dec: decoder bias.

    Returns:
      The means, their intervals, `concepts`, and `left_out`: the F1 of the probes that are not good enough.

    Raises:
      ImportError: scikit-learn is not installed.
    """
    probing.require_sklearn()
    found: dict[str, dict[str, Any]] = {}
    left_out: dict[str, float] = {}
    for name, task in probing.tasks(examples).items():
        probe = probing.fit(examples.acts[task.train], task.train_is)
        f1 = _f1(examples.acts, task, probe)
        if f1 < PROBE_F1:
            left_out[name] = f1
            continue
        curve = splitting(examples, task)
        main = probing.by_difference(examples.latents, task)[: curve["latents"]]
        hit = task.test[task.test_is & probing.predictions(examples.acts[task.test], probe)]
        scores = _absorbed(examples, hit, probe[0] / np.linalg.norm(probe[0]), main, W_dec, b_dec)
        main_f1 = curve["f1"][curve["latents"] - 1]
        found[name] = {"probe_f1": f1, **curve, "main_latents": main.tolist(), "main_f1": main_f1, "tokens": len(hit)}
        found[name] |= scores
    columns = {name: [entry[name] for entry in found.values()] for name in ("fraction", "rate", "latents", "main_f1")}
    return {
        **{name: float(np.mean(values)) if values else None for name, values in columns.items()},
        "intervals": {name: bootstrap.of_mean([float(v) for v in values]) for name, values in columns.items()},
        "least_probe_f1": PROBE_F1,
        "concepts": found,
        "left_out": left_out,
    }


def splitting(examples: Examples, task: probing.Task) -> dict[str, Any]:
    """Return the F1 of probes of 1, 2, ... latents, and the number of latents after which one more gains little."""
    order = probing.by_difference(examples.latents, task)
    curve: list[float] = []
    for k in range(1, min(MOST_LATENTS, len(order)) + 1):
        features = examples.latents[:, order[:k]]
        curve.append(_f1(features, task, probing.fit(features[task.train], task.train_is)))
        if k > 1 and curve[-1] - curve[-2] < GAIN:
            return {"latents": k - 1, "f1": curve}
    return {"latents": len(curve), "f1": curve}


def _absorbed(
    examples: Examples,
    rows: np.ndarray,
    p: np.ndarray,
    main: np.ndarray,
    W_dec: Float32[np.ndarray, "f d"],
    b_dec: Float32[np.ndarray, " d"],
) -> dict[str, float]:
    """Return `fraction` and `rate` of one concept over its correctly classified tokens."""
    if not len(rows):
        return {"fraction": 0.0, "rate": 0.0}
    writes = W_dec @ p
    cosine = writes / np.maximum(np.linalg.norm(W_dec, axis=1), 1e-12)
    total = (examples.acts[rows] - b_dec) @ p
    latents = examples.latents[rows]
    parts = latents * writes
    by_main = parts[:, main].sum(1)
    others = parts.copy()
    others[:, main] = 0
    aligned = np.where(cosine >= ALIGNED, others, 0).clip(min=0)
    absorbed = np.sort(aligned, axis=1)[:, -ABSORBING:].sum(1)
    rest = np.minimum(absorbed, total - by_main)
    fraction = np.where(by_main <= 0, 1.0, rest / np.maximum(rest + by_main, 1e-12))
    fraction = np.where((by_main >= total) | (absorbed < SHARE * total) | (absorbed <= 0), 0, fraction)
    strongest = parts.argmax(1)
    carries = parts.max(1) >= SHARE * total
    silent = (np.abs(latents[:, main]) < 1e-8).all(1)
    whole = silent & (total > 0) & carries & (cosine[strongest] >= STRONGEST_ALIGNED)
    return {"fraction": float(fraction.clip(0, 1).mean()), "rate": float(whole.mean())}


def _f1(features: np.ndarray, task: probing.Task, probe: tuple[np.ndarray, float]) -> float:
    """Return the F1 of a probe on the test examples."""
    predicted = probing.predictions(features[task.test], probe)
    both = (predicted & task.test_is).sum()
    return float(2 * both / max(predicted.sum() + task.test_is.sum(), 1))
