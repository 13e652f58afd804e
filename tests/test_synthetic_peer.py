"""Synthetic worlds against SAELens's own module, with the same features, probabilities, correlations and trees.

Both sides draw their own samples, so statistics agree within sampling errors: z is a difference over its standard
error. The seeds are fixed, so a test passes always or never.
"""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from sae_lens import synthetic as peer
from test_synthetic import TINY

from jsae.synthetic import SyntheticWorld, features
from jsae.synthetic.features import levels

ROWS = 60_000
LIMIT = 4.5
"""Largest |z| of hundreds to thousands of statistics; one of 1,770 exceeds it with a probability of 1.2 %."""


def generator_of(world):
    """Return SAELens's generator for the arrays and trees of a world, with its module for the vectors."""
    parts = [torch.from_numpy(np.array(array)) for array in world.parts]
    vectors, bias, probabilities, loadings, means, spreads, exclusive = parts
    nodes = [peer.HierarchyNode(feature_index=i) for i in range(world.config.num_features)]
    for level in reversed(levels(world.config)):
        groups = np.arange(level.children.start, level.children.stop).reshape(-1, world.config.branching)
        for parent, group in zip(range(level.parents.start, level.parents.stop), groups, strict=True):
            nodes[parent].children = [nodes[i] for i in group]
            nodes[parent].mutually_exclusive_children = bool(exclusive[parent])
            nodes[parent].scale_children_by_parent = world.config.scale_children
    generator = peer.ActivationGenerator(
        num_features=world.config.num_features,
        firing_probabilities=probabilities,
        std_firing_magnitudes=spreads,
        mean_firing_magnitudes=means,
        modify_activations=peer.hierarchy_modifier(nodes[: world.config.roots]),
        correlation_matrix=peer.LowRankCorrelationMatrix(loadings, 1 - loadings.square().sum(1)),
    )
    dictionary = peer.FeatureDictionary(*vectors.shape, bias=True, initializer=None)
    dictionary.feature_vectors.data, dictionary.bias.data = vectors, bias
    return generator, dictionary


@dataclasses.dataclass
class Statistics:
    """Statistics of samples with their standard errors, as arrays."""

    values: dict
    errors: dict

    @classmethod
    def of(cls, acts, values):
        fires, n = values > 0, len(values)
        count = fires.sum(0)
        means = values.sum(0) / count
        centred = np.where(fires, values - means, 0)
        variances, fourth = (centred**2).sum(0) / count, (centred**4).sum(0) / count
        rates = fires.mean(0)
        together = fires.T.astype(np.float32) @ fires / n
        correlation = (together - np.outer(rates, rates)) / np.sqrt(np.outer(rates * (1 - rates), rates * (1 - rates)))
        pairs = np.triu_indices(len(rates), 1)
        l0, norms = fires.sum(1), np.linalg.norm(acts, axis=1)
        found = {
            "firing rates": (rates, np.sqrt(rates * (1 - rates) / n)),
            "correlations of firing": (correlation[pairs], correlation_errors(rates, together, n)[pairs]),
            "mean magnitudes": (means, np.sqrt(variances / count)),
            "variances of magnitudes": (variances, np.sqrt((fourth - variances**2) / count)),
            "L0": moments(l0),
            "norms of activations": moments(norms),
        }
        return cls({k: v for k, (v, _) in found.items()}, {k: e for k, (_, e) in found.items()})

    def z(self, other):
        """Return the differences over their standard errors, by statistic."""
        return {
            name: (value - other.values[name]) / np.hypot(self.errors[name], other.errors[name])
            for name, value in self.values.items()
        }


def moments(x):
    """Return the mean and variance of numbers, and their standard errors."""
    n, centred = len(x), x - x.mean()
    variance = centred.var()
    return np.array([x.mean(), variance]), np.sqrt([variance / n, ((centred**4).mean() - variance**2) / n])


def correlation_errors(rates, together, n):
    """Return the standard errors of the correlations of firing, from the counts of the four cases of each pair.

    The influence of a row on a correlation of standardised a and b is a b - r (a^2 + b^2) / 2.
    """
    p, q = rates[:, None], rates[None, :]
    unit_p, unit_q = np.sqrt(p * (1 - p)), np.sqrt(q * (1 - q))
    r = (together - p * q) / (unit_p * unit_q)
    cases = {(1, 1): together, (1, 0): p - together, (0, 1): q - together, (0, 0): 1 - p - q + together}
    square = 0
    for (i, j), probability in cases.items():
        a, b = (i - p) / unit_p, (j - q) / unit_q
        square = square + probability * (a * b - r * (a**2 + b**2) / 2) ** 2
    return np.sqrt(np.maximum(square, 1e-12) / n)


def statistics(world):
    return Statistics.of(*(np.asarray(array) for array in world.sample(0, ROWS)))


@pytest.fixture(scope="module")
def theirs():
    torch.manual_seed(0)
    found = {}
    for scaled in (True, False):
        generator, dictionary = generator_of(SyntheticWorld(dataclasses.replace(TINY, scale_children=scaled)))
        values = generator.sample(ROWS)
        with torch.no_grad():
            found[scaled] = Statistics.of(dictionary(values).numpy(), values.numpy())
    return found


def worst(zs):
    return max(float(np.abs(z).max()) for z in zs.values())


@pytest.mark.parametrize("scaled", [True, False])
def test_statistics_are_those_of_saelens(theirs, scaled):
    zs = statistics(SyntheticWorld(dataclasses.replace(TINY, scale_children=scaled))).z(theirs[scaled])
    for name, z in zs.items():
        assert np.abs(z).max() < LIMIT, name
    for name in ("firing rates", "correlations of firing", "mean magnitudes", "variances of magnitudes"):
        assert 0.75 < np.sqrt(np.mean(zs[name] ** 2)) < 1.25, name  # the standard errors are right


@pytest.mark.parametrize(
    ("change", "statistic"),
    [
        ({"probabilities": lambda p: p.at[30].multiply(1.2)}, "firing rates"),
        ({"loadings": lambda w: w.at[0].set(0)}, "correlations of firing"),
        ({"loadings": lambda w: 0 * w}, "L0"),
        ({"means": lambda m: m.at[55].multiply(1.05)}, "mean magnitudes"),
        ({"spreads": lambda s: 1.2 * s}, "variances of magnitudes"),
        ({"exclusive": lambda e: e & False}, "firing rates"),
        ({"bias": lambda b: 2 * b}, "norms of activations"),
    ],
)
def test_a_small_difference_between_worlds_is_noticed(theirs, change, statistic):
    parts = features.make(TINY)
    changed = parts._replace(**{name: alter(getattr(parts, name)) for name, alter in change.items()})
    zs = statistics(SyntheticWorld(TINY, parts=changed)).z(theirs[True])
    assert np.abs(zs[statistic]).max() > LIMIT


def test_probabilities_are_those_of_saelens():
    law = peer.zipfian_firing_probabilities(60, 0.5, TINY.max_probability, TINY.min_probability)
    ours = features.zipf(60, 0.5, TINY.max_probability, TINY.min_probability)
    np.testing.assert_allclose(ours, law, rtol=1e-5)
    config = peer.HierarchyConfig(TINY.roots, TINY.branching, TINY.depth, mutually_exclusive_portion=1.0)
    expected = law * peer.generate_hierarchy(60, config, seed=0).compute_probability_correction_factors(law)
    np.testing.assert_allclose(features.make(TINY).probabilities, expected.clamp(max=1), rtol=1e-5)


def test_vectors_are_orthogonalised_as_by_saelens():
    start = torch.randn(60, 16, generator=torch.Generator().manual_seed(0))
    start = start / start.norm(dim=1, keepdim=True)
    expected = peer.orthogonalize_embeddings(start, num_steps=100, lr=1e-3)
    ours = features.orthogonalized(jnp.asarray(start.numpy()), 100, 1e-3)
    np.testing.assert_allclose(ours, expected, atol=2e-4)
    assert np.abs(ours - start.numpy()).max() > 0.02
