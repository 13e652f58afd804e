"""Attribution graphs on a GPU are exact, and those of the processor."""

import pytest
import torch
from tiny_nanochat import SIZES, tiny, tokens
from toy_saes import toy_transcoder

from bridge.circuits import Traced, intervene, prune, scores, trace
from bridge.circuits.tracing import Limits

LENGTH = 24


def traced(generation: str, device: str, **limits) -> Traced:
    toys = [toy_transcoder(layer, SIZES["n_embd"], 64) for layer in range(SIZES["n_layer"])]
    return trace(
        tiny(generation).to(device),
        {sae.metadata["hook_name"]: sae.to(device) for sae in toys},
        tokens(LENGTH, 1)[0].to(device),
        limits=Limits(max_logits=4, **limits),
    )


@pytest.mark.parametrize("generation", ["G0", "G4e", "G7"])
def test_rows_are_exact_and_those_of_the_processor(device, generation):
    graph, expected = traced(generation, device).graph, traced(generation, "cpu").graph
    assert float(graph.residuals().max()) < 1e-5
    assert torch.equal(graph.features.cpu(), expected.features)
    torch.testing.assert_close(graph.matrix.cpu(), expected.matrix, atol=2e-4, rtol=0)
    assert scores(graph).replacement == pytest.approx(scores(expected).replacement, abs=1e-3)


def test_a_part_of_the_features_an_intervention_and_pruning(device):
    few = traced("G7", device, max_features=30)
    assert few.graph.feature_count == 30
    assert float(few.graph.residuals().max()) < 1e-5
    assert intervene(few, 3).frozen_gap < 1e-4
    pruned = prune(few.graph)
    assert pruned.sources.device.type == torch.device(device).type
    assert pruned.edges.any()
