"""Score latents as steering directions: effect on the tokens they stand for, at a given side effect.

A latent is steered as `bridge.steering` does in the mode `additive`, at all positions, with multiples of its greatest
activation. Three sets of tokens are targets. `following`: the tokens that come after the latent's label in text more
often than elsewhere, so that a model that is steered as if the label held should predict them. `label`: the tokens that
the label itself names, if it names some. Both need a label that fits. `promoted`: the tokens whose logits the latent
raises most. The effect is the mean gain of a target's log-probability in nats, the side effect KL(unsteered || steered)
in nats per token; both at positions at which the latent does not fire.

Baselines of the same norm: a random direction, and the difference between the mean activations where the latent's label
holds and where it does not (or, for a latent without a label that fits, before its promoted tokens and elsewhere), the
strong baseline of AxBench (arXiv 2501.17148). Any direction raises some tokens, so the random direction is also scored
on the tokens that it promotes itself (`own`): on the demo it gains as much there as latents do on theirs, so that
`promoted` says little about an SAE, whereas `following` and `label` are chosen without its decoder.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from bridge import steering
from bridge.evaluate import bootstrap, concepts, steering_sample
from bridge.evaluate.concepts import Concepts
from bridge.evaluate.labels import Label
from bridge.evaluate.site import Site
from bridge.evaluate.steered import Outcome, Trial, at_divergence, measure, promoted
from bridge.evaluate.steering_sample import Calibration
from bridge.evaluate.text import Text
from bridge.nanochat.tokenizer import Tokenizer
from bridge.steering import Feature
from bridge.torch_sae import TorchSAE

MULTIPLES = (0.5, 1.0, 2.0, 4.0)
"""Strengths, as multiples of the latent's greatest activation."""
MORE_MULTIPLES = (8.0, 16.0, 32.0)
"""Further strengths for directions that do not reach the side effect of the score."""
SIDE_EFFECT = 0.1
"""KL in nats per token at which effects are compared."""
PROMOTED = 10
"""Tokens that a direction promotes."""
FITTING_F1 = 0.3
"""Least F1 of a label that gives a latent targets."""
_PROMOTING_ROWS = 4
_SEED = 0


@dataclasses.dataclass(frozen=True)
class Extent:
    """Size of the measurement."""

    latents: tuple[int, ...] = ()
    """The latents; () draws `sample_size` of those that fire, evenly by how often they fire."""
    sample_size: int = 24
    tokens: int = 1024
    """Tokens of the text on which every strength of every direction is measured."""


Targets = dict[str, Bool[np.ndarray, " V"]]
"""Sets of tokens by name."""


@dataclasses.dataclass(frozen=True)
class _Plan:
    """The directions that are compared for a latent, each with its targets."""

    unit: float
    """The greatest activation, of which strengths are multiples."""
    directions: dict[str, tuple[Feature, Targets]]
    description: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class _Subject:
    """An SAE with what was read from the calibrating text."""

    site: Site
    sae: TorchSAE
    tokenizer: Tokenizer
    text: Text
    calibration: Calibration
    concepts: Concepts

    def plan(self, latent: int, label: Label | None) -> _Plan:
        """Return what is steered for a latent."""
        feature, unit = steering.feature(self.sae, latent), float(self.calibration.top[latent])
        noise = torch.randn(len(feature.direction), generator=torch.Generator().manual_seed(_SEED + latent))
        random = _along(noise.to(feature.direction), feature)
        rows = self.text.tokens[:_PROMOTING_ROWS, : steering_sample.ROW]
        strength = MULTIPLES[0] * unit
        raised, own = promoted(self.site, rows, [(feature, strength), (random, strength)], PROMOTED)
        holds = self._holds(label)
        targets = self._targets(label, holds) | {"promoted": self._members(raised)}
        directions = {"latent": (feature, targets), "random": (random, targets | {"own": self._members(own)})}
        if (mean := self._difference_of_means(holds, targets["promoted"])) is not None:
            directions["difference_of_means"] = (_along(mean.to(feature.direction), feature), targets)
        description = {
            "label": None if label is None else label.label,
            "f1": None if label is None else label.f1,
            "greatest_activation": unit,
            "promoted": [self.tokenizer.token_text(int(i)) for i in raised],
        }
        return _Plan(unit, directions, description)

    def _holds(self, label: Label | None) -> Bool[np.ndarray, " N"] | None:
        """Return where the label of a latent holds; None without a label that fits."""
        fits = label is not None and (label.f1 or 0) >= FITTING_F1
        return self.concepts.holds(label.label) if fits else None

    def _targets(self, label: Label | None, holds: Bool[np.ndarray, " N"] | None) -> Targets:
        """Return the targets that follow from the label."""
        if label is None or holds is None:
            return {}
        found = {"following": self.concepts.following(holds, PROMOTED), "label": self.concepts.tokens(label.label)}
        return {name: tokens for name, tokens in found.items() if tokens is not None}

    def _difference_of_means(
        self, holds: Bool[np.ndarray, " N"] | None, promoted: Bool[np.ndarray, " V"]
    ) -> Float[Tensor, " C"] | None:
        """Return the difference of means of the label, or of what precedes promoted tokens; None if too rare."""
        counts = self.calibration.counts
        holds = self.concepts.followed_by(promoted) if holds is None else holds
        mean = concepts.difference_of_means(self.calibration.acts[counts], holds[: len(counts)][counts])
        return None if mean is None else torch.from_numpy(mean)

    def _members(self, ids: Int[Tensor, " n"]) -> Bool[np.ndarray, " V"]:
        members = np.zeros(self.tokenizer.vocab_size, bool)
        members[ids.cpu().numpy()] = True
        return members


def _along(vector: Float[Tensor, " C"], feature: Feature) -> Feature:
    """Return a direction along a vector with the norm of a feature's; it has no activation."""
    scaled = vector * (feature.direction.norm() / vector.norm())
    return Feature(scaled, lambda h: torch.zeros(h.shape[:-1], device=h.device))


def score(
    site: Site,
    sae: TorchSAE,
    text: Text,
    tokenizer: Tokenizer,
    labels: Sequence[Label] | None = None,
    extent: Extent = Extent(),
) -> dict[str, Any]:
    """Return the curve of effect against side effect of every chosen latent and its baselines, and a summary.

    Args:
      site: the activation that the SAE reads and that is steered.
      sae: neither a transcoder nor a crosscoder.
      text: held-out text of at least two rows; the first part calibrates, the last rows are measured.
      tokenizer: the model's.
      labels: of all latents; None gives every latent its promoted tokens as the only target.
      extent: how much is measured.

    Raises:
      ValueError: a latent that the SAE does not have or that never fires, too little text, or an SAE that does not
        reconstruct its own input.
    """
    if sae.is_transcoder or sae.layers > 1:
        raise ValueError(f"a {sae.architecture} SAE of {sae.layers} layers cannot be steered: give an SAE of one hook")
    calibrating, rows = steering_sample.split(text, extent.tokens)
    rows_kept = max(steering_sample.CALIBRATION_TOKENS // calibrating.tokens.shape[1], 1)
    calibration = steering_sample.calibrate(site, sae, concepts.sample(calibrating, rows_kept))
    chosen = steering_sample.chosen(sae, calibration, extent.latents, extent.sample_size)
    silent = steering_sample.silent(site, sae, rows, chosen)
    subject = _Subject(site, sae, tokenizer, calibrating, calibration, Concepts(calibrating, tokenizer))
    latents = {}
    for latent, positions in zip(chosen, silent, strict=True):
        plan = subject.plan(latent, None if labels is None else labels[latent])
        curves = {
            name: curve(site, rows, direction, plan.unit, targets, positions, tokenizer.token_bytes)
            for name, (direction, targets) in plan.directions.items()
        }
        latents[str(latent)] = plan.description | {"directions": curves}
    return {
        "setting": {
            "mode": "additive",
            "positions": "all",
            "tokens": int(rows.size),
            "kl": SIDE_EFFECT,
            "fitting_f1": FITTING_F1,
        },
        "latents": latents,
        "summary": summary(latents),
    }


def curve(
    site: Site,
    rows: Int[np.ndarray, "R T"],
    feature: Feature,
    unit: float,
    targets: Mapping[str, Bool[np.ndarray, " V"]],
    positions: Bool[Tensor, "R T"],
    token_bytes: Int[np.ndarray, " V"],
) -> dict[str, Any]:
    """Return effect and side effects of a direction at growing strengths, and the effects at `SIDE_EFFECT`.

    Args:
      site: the activation that is steered.
      rows: the text.
      feature: the direction.
      unit: the strength of which `MULTIPLES` are multiples.
      targets: sets of tokens by name.
      positions: which positions are measured.
      token_bytes: length in bytes of every token.
    """
    sets = torch.from_numpy(np.stack(list(targets.values()))).to(site.device)

    def at(multiples: Sequence[float]) -> list[tuple[float, Outcome]]:
        trials = [Trial(feature, m * unit, sets, positions) for m in multiples]
        return list(zip(multiples, measure(site, rows, trials, token_bytes), strict=True))

    points = at(MULTIPLES)
    for multiple in MORE_MULTIPLES:
        if points[-1][1].divergence >= SIDE_EFFECT or not np.isfinite(points[-1][1].divergence):
            break
        points += at((multiple,))
    divergences = [outcome.divergence for _, outcome in points]
    bits = [outcome.bits_per_byte - outcome.bits_per_byte_before for _, outcome in points]
    scores = {}
    for i, name in enumerate(targets):
        gain, reached = at_divergence(divergences, [outcome.gain[i] for _, outcome in points], SIDE_EFFECT)
        change = [outcome.share[i] - outcome.share_before[i] for _, outcome in points]
        scores[name] = {"gain": gain, "share": at_divergence(divergences, change, SIDE_EFFECT)[0], "reached": reached}
    return {
        "points": [_point(multiple, multiple * unit, outcome, list(targets)) for multiple, outcome in points],
        "at_kl": scores,
        "bits_per_byte_at_kl": at_divergence(divergences, bits, SIDE_EFFECT, power=1.0)[0],
    }


def _point(multiple: float, strength: float, outcome: Outcome, names: Sequence[str]) -> dict[str, Any]:
    return {
        "multiple": multiple,
        "strength": strength,
        "kl": outcome.divergence,
        "bits_per_byte": outcome.bits_per_byte,
        "bits_per_byte_before": outcome.bits_per_byte_before,
        "gain": dict(zip(names, outcome.gain, strict=True)),
        "share": dict(zip(names, outcome.share, strict=True)),
        "share_before": dict(zip(names, outcome.share_before, strict=True)),
    }


def summary(latents: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Return median and quartiles over latents of the effects at `SIDE_EFFECT`, by target and direction.

    `surpasses_difference_of_means` is the share of latents whose effect is greater than that of their difference of
    means, with the 95 % interval of a bootstrap over latents.
    """
    table: dict[str, Any] = {"latents": len(latents), "kl": SIDE_EFFECT}
    for target in ("following", "label", "promoted", "own"):
        rows = {}
        for direction in ("latent", "difference_of_means", "random"):
            found = list(_scores(latents, direction, target))
            if found:
                gains = [entry["gain"] for entry in found]
                low, middle, high = np.quantile(gains, (0.25, 0.5, 0.75))
                rows[direction] = {
                    "median": float(middle),
                    "quartiles": [float(low), float(high)],
                    "latents": len(found),
                    "reached": sum(entry["reached"] for entry in found),
                }
        if rows:
            table[target] = rows | _comparison(latents, target)
    bits = [entry["directions"]["latent"]["bits_per_byte_at_kl"] for entry in latents.values()]
    table["bits_per_byte"] = float(np.median(bits)) if bits else None
    return table


def _scores(latents: Mapping[str, Mapping[str, Any]], direction: str, target: str) -> Iterator[dict[str, Any]]:
    for entry in latents.values():
        found = entry["directions"].get(direction, {}).get("at_kl", {}).get(target)
        if found is not None:
            yield found


def _comparison(latents: Mapping[str, Mapping[str, Any]], target: str) -> dict[str, Any]:
    """Return how often a latent surpasses the difference of means for the same target."""
    wins = []
    for entry in latents.values():
        ours, theirs = (next(_scores({"": entry}, name, target), None) for name in ("latent", "difference_of_means"))
        if ours and theirs:
            wins.append(float(ours["gain"] > theirs["gain"]))
    if not wins:
        return {}
    share = {"share": float(np.mean(wins)), "interval": bootstrap.of_mean(wins), "latents": len(wins)}
    return {"surpasses_difference_of_means": share}
