"""Attribution graphs are exact: rows sum to their values, the frozen network is linear, interventions are columns."""

import dataclasses

import pytest
import torch
from tiny_nanochat import SIZES, tiny, tokens
from toy_saes import toy_sae, toy_transcoder

from bridge.circuits import Graph, Traced, intervene, prune, scores, trace
from bridge.circuits.frozen import Frozen
from bridge.circuits.interventions import agreement, total_effects
from bridge.circuits.paths import strongest
from bridge.circuits.scores import influence, normalised
from bridge.circuits.tracing import Limits
from bridge.hooks import edit, hook_name
from bridge.nanochat.config import GENERATIONS
from bridge.nanochat.model import GPT, GPTConfig
from bridge.torch_sae import TorchSAE

WIDTH, LAYERS = SIZES["n_embd"], SIZES["n_layer"]
LENGTH = 16


def transcoders(dtype: torch.dtype = torch.float64, *, skip: bool = True, layers: int = LAYERS) -> dict[str, TorchSAE]:
    toys = [toy_transcoder(layer, WIDTH, 32, skip=skip, dtype=dtype) for layer in range(layers)]
    return {sae.metadata["hook_name"]: sae for sae in toys}


def traced(generation: str = "G7", dtype: torch.dtype = torch.float64, *, skip: bool = True, **settings) -> Traced:
    model = tiny(generation).to(dtype)
    limits = Limits(max_logits=4, batch_size=settings.pop("batch_size", 256), **settings.pop("limits", {}))
    return trace(model, transcoders(dtype, skip=skip), tokens(LENGTH, 1)[0], limits=limits, **settings)


@pytest.fixture(scope="module")
def g7() -> Traced:
    return traced()


# ---- exactness ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("skip", [True, False], ids=["skip", "no skip"])
@pytest.mark.parametrize("generation", GENERATIONS)
def test_every_row_sums_to_its_value(generation, skip):
    result = traced(generation, skip=skip)
    assert result.graph.feature_count > 100
    assert float(result.graph.residuals().max()) < 1e-12


@pytest.mark.parametrize("generation", GENERATIONS)
def test_every_row_sums_to_its_value_in_float32(generation):
    assert float(traced(generation, torch.float32).graph.residuals().max()) < 1e-5


def test_values_are_the_models_own(g7):
    r, graph = g7.replacement, g7.graph
    model = r.frozen.model
    logits = model(r.frozen.tokens[None])[0, -1].double()
    cap = model.config.softcap
    before = cap * torch.atanh(logits / cap)  # the softcap undone, from float32 logits
    top = list(graph.logits)
    assert top == logits.topk(len(top)).indices.tolist()
    torch.testing.assert_close(graph.values[graph.feature_count :], (before - before.mean())[top], atol=1e-4, rtol=0)
    torch.testing.assert_close(graph.probabilities.double(), logits.softmax(-1)[top], atol=1e-6, rtol=0)
    layer, position, latent = graph.features[20].tolist()
    read = r.frozen.mlp_in[layer][position]
    assert float(r.transcoders[layer].encode(read)[latent]) == pytest.approx(float(graph.activations[20]), abs=1e-12)


def test_a_window_that_is_shorter_than_the_prompt_is_exact():
    model = GPT(GPTConfig.of_generation("G3", **(SIZES | {"sequence_len": 32, "window_pattern": "SSL"}))).double()
    model.requires_grad_(False)
    assert model.config.window_sizes[0] < 24
    result = trace(model, transcoders(), tokens(24, 1)[0], limits=Limits(max_logits=2))
    assert float(result.graph.residuals().max()) < 1e-12


@pytest.mark.parametrize("generation", GENERATIONS)
def test_the_frozen_network_is_linear_and_gives_the_models_activations(generation):
    model = tiny(generation).double()
    saes = list(transcoders().values())
    frozen = Frozen(model, tokens(LENGTH, 1)[0], [sae.W_skip for sae in saes])
    base = [h - u @ sae.W_skip.T for h, u, sae in zip(frozen.mlp, frozen.mlp_in, saes, strict=True)]
    inputs = frozen.inputs(base)
    reads, final = frozen.run(inputs)
    torch.testing.assert_close(final, frozen.final, atol=1e-12, rtol=0)
    for read, expected in zip(reads, frozen.mlp_in, strict=True):
        torch.testing.assert_close(read, expected, atol=1e-12, rtol=0)

    def random(x: torch.Tensor | None) -> torch.Tensor | None:
        return None if x is None else torch.randn_like(x)

    def inputs_of(function, *several):
        fields = [dataclasses.astuple(one) for one in several]
        (e, v, b, m) = zip(*fields, strict=True)
        values = {i: function(*(one[i] for one in v)) for i in v[0]}
        bigram = None if b[0] is None else function(*b)
        return type(inputs)(function(*e), values, bigram, [function(*parts) for parts in zip(*m, strict=True)])

    torch.manual_seed(0)
    x, y = inputs_of(random, inputs), inputs_of(random, inputs)
    mixed = frozen.run(inputs_of(lambda a, b: 2 * a - 3 * b, x, y))[1]
    expected = 2 * frozen.run(x)[1] - 3 * frozen.run(y)[1]
    assert float((mixed - expected).abs().max() / expected.abs().max()) < 1e-13


@pytest.mark.parametrize("kind", ["feature", "error"])
def test_an_intervention_in_the_frozen_network_is_a_column(g7, kind):
    graph, r = g7.graph, g7.replacement
    column = 17 if kind == "feature" else graph.errors.start + graph.layers * 2 + 3
    layer, position, vector = r.written(column)
    change = torch.zeros_like(r.frozen.embedding)
    change[position] = vector
    base = [h + change * (i == layer) for i, h in enumerate(r.base)]
    reads, final = r.frozen.run(r.frozen.inputs(base))  # the source twice
    moved = []
    for i, transcoder in enumerate(r.transcoders):
        _, positions, latents = graph.features[r.of_layer(i)].T
        before = r.frozen.mlp_in[i][positions]
        moved.append(((reads[i][positions] - before) * transcoder.W_enc.T[latents]).sum(1))
    moved.append(g7.targets @ (final[-1] - r.frozen.final[-1]))
    torch.testing.assert_close(torch.cat(moved), graph.matrix[:, column], atol=1e-11, rtol=0)


def test_a_prediction_of_an_ablation_is_exact_in_the_frozen_network_and_compared_with_the_model(g7):
    graph = g7.graph
    column = int(graph.matrix[graph.feature_count, : graph.feature_count].abs().argmax())
    effect = intervene(g7, column, 0.0)
    torch.testing.assert_close(effect.direct, -graph.matrix[graph.feature_count :, column])
    torch.testing.assert_close(effect.frozen, effect.direct, atol=1e-11, rtol=0)
    model, r = g7.replacement.frozen.model, g7.replacement
    layer, position, vector = r.written(column)
    change = torch.zeros(1, LENGTH, WIDTH, dtype=torch.float64)
    change[0, position] = vector
    with edit(model, {hook_name(layer, "mlp"): lambda h: h - change}):
        logits = model(r.frozen.tokens[None])[0, -1]
    torch.testing.assert_close(effect.probabilities[1], logits.softmax(-1)[list(graph.logits)])
    assert not torch.equal(*effect.probabilities)


def test_what_changes_nothing_has_no_effect(g7):
    effect = intervene(g7, 5, 1.0)
    assert float(effect.direct.abs().max()) == 0
    assert float(effect.real.abs().max()) < 1e-12


def test_the_effect_over_all_paths_is_that_of_the_replacement_model(g7):
    """Features on the paths change as their rows say: solved here as a linear system instead of layer by layer."""
    graph = g7.graph
    count = graph.feature_count
    inner, outer = graph.matrix[:count, :count], graph.matrix[count:, :count]
    system = torch.eye(count, dtype=torch.float64) - inner / graph.activations
    expected = graph.matrix[count:, 3] + outer @ (torch.linalg.solve(system, inner[:, 3]) / graph.activations)
    torch.testing.assert_close(total_effects(graph, 3), expected, atol=1e-11, rtol=0)


def test_ablations_of_the_strongest_features_are_reported(g7):
    result = agreement(g7, 6)
    assert result.count == 6
    assert result.frozen_gap < 1e-11
    assert -1 <= result.direct <= 1
    with pytest.raises(ValueError, match="at least two features: 1 of"):
        agreement(g7, 1)


@pytest.mark.parametrize("generation", ["G0", "G7"])
def test_the_logarithm_of_a_probability_is_explained_by_its_gradient(generation):
    result = traced(generation, measure="logprob")
    model, r = result.replacement.frozen.model, result.replacement
    final = r.frozen.final[-1].clone().requires_grad_()
    cap = model.config.softcap
    logits = cap * torch.tanh(model.lm_head(final)[: model.config.vocab_size] / cap)
    for token, target in zip(result.graph.logits, result.targets, strict=True):
        (gradient,) = torch.autograd.grad(logits.log_softmax(-1)[token], final, retain_graph=True)
        torch.testing.assert_close(target, gradient, atol=1e-6, rtol=0)  # the model's logits are float32
    assert float(result.graph.residuals().max()) < 1e-12


# ---- the order and number of rows -----------------------------------------------------------------------------------


def test_the_size_of_a_batch_changes_nothing_but_rounding(g7):
    other = traced(batch_size=7)
    torch.testing.assert_close(other.graph.matrix, g7.graph.matrix, atol=1e-12, rtol=0)
    again = traced()
    assert torch.equal(again.graph.matrix, g7.graph.matrix)


@pytest.mark.parametrize("most", [40, 7500])
def test_what_is_called_between_backward_passes_can_end_the_computation(g7, most):
    calls = []

    def between() -> None:
        calls.append(len(calls))
        if len(calls) == 3:
            raise TimeoutError("enough")

    with pytest.raises(TimeoutError, match="enough"):
        traced(batch_size=4, limits={"max_features": most}, between=between)
    assert calls == [0, 1, 2]


def test_only_what_is_below_and_before_reaches_a_feature(g7):
    graph = g7.graph
    for row in range(0, graph.feature_count, 29):
        target = graph.target(row)
        for column in graph.matrix[row].nonzero()[:, 0].tolist():
            source = graph.source(column)
            assert source.position <= target.position
            assert source.kind == "token" or source.layer < target.layer


def test_features_without_nodes_are_part_of_the_errors(g7):
    few = traced(limits={"max_features": 40})
    graph = few.graph
    assert (graph.feature_count, graph.active) == (40, g7.graph.feature_count)
    assert float(graph.residuals().max()) < 1e-12
    errors = few.replacement.errors[1] + few.replacement.writes[1].sum(1)
    torch.testing.assert_close(errors, g7.replacement.errors[1] + g7.replacement.writes[1].sum(1), atol=1e-12, rtol=0)
    column = few.graph.errors.start + LAYERS + 3
    torch.testing.assert_close(intervene(few, column).frozen, -graph.matrix[40:, column], atol=1e-11, rtol=0)
    assert scores(graph).replacement < scores(g7.graph).replacement


def test_the_most_influential_features_get_the_nodes(g7):
    few = traced(limits={"max_features": 40})
    total = influence(
        normalised(g7.graph.matrix), torch.arange(g7.graph.feature_count), g7.graph.probabilities, LAYERS
    )[: g7.graph.feature_count]
    named = {tuple(feature) for feature in few.graph.features.tolist()}
    kept = [value for value, f in zip(total.tolist(), g7.graph.features.tolist(), strict=True) if tuple(f) in named]
    assert sum(kept) > 0.5 * float(total.topk(40).values.sum())


def test_where_transcoders_were_not_trained_the_errors_take_in_the_features(g7):
    first = int(tokens(LENGTH, 1)[0, 0])
    other = traced(untrained=(first,))
    places = (tokens(LENGTH, 1)[0] == first).nonzero()[:, 0].tolist()
    assert not set(other.graph.features[:, 1].tolist()) & set(places)
    assert float(other.graph.residuals().max()) < 1e-12


# ---- scores by hand -------------------------------------------------------------------------------------------------


def hand() -> Graph:
    """One layer, two tokens: a feature at the second, two errors, two logits."""
    matrix = torch.tensor([[0.0, 0.0, 0.0, 1.0, -3.0], [2.0, -1.0, 0.0, 1.0, 0.0], [0.0, 0.0, 4.0, 0.0, 4.0]])
    return Graph(
        tokens=(7, 9),
        layers=1,
        features=torch.tensor([[0, 1, 3]]),
        activations=torch.tensor([0.5]),
        logits=(4, 5),
        probabilities=torch.tensor([0.6, 0.25]),
        matrix=matrix,
        biases=torch.tensor([[0.5, 2.0], [0.25, 0.0], [0.0, 0.0]]),
        values=torch.tensor([0.5, 2.25, 8.0]),
        active=1,
    )


def test_influence_and_scores_are_those_of_a_calculation_by_hand():
    graph = hand()
    # N: feature 0 0 0 .25 .75; logits .5 .25 0 .25 0 and 0 0 .5 0 .5. w N, plus .3 times the feature's row
    total = influence(normalised(graph.matrix), torch.arange(1), graph.probabilities, 1)
    torch.testing.assert_close(total, torch.tensor([0.3, 0.15, 0.125, 0.225, 0.35]))
    result = scores(graph)
    assert result.replacement == pytest.approx(0.575 / 0.85)
    assert result.completeness == pytest.approx(1 - (0.6 * 0.25 + 0.25 * 0.5) / (1.15 + 0.85))
    assert (result.from_tokens, result.from_features, result.from_errors) == (1.0, 2.0, -1.0)
    assert (result.from_biases, result.logit) == (0.25, 2.25)
    assert float(graph.residuals().max()) == 0


def test_pruning_is_that_of_a_calculation_by_hand():
    # In order .35 token, .3 feature, .225 token, .15 and .125 errors, of 1.15: half needs the first two.
    pruned = prune(hand(), 0.5, 1.0)
    assert pruned.sources.tolist() == [True, False, False, True, True]
    torch.testing.assert_close(pruned.influence, torch.tensor([0.65, 1.025, 1.15, 0.875, 0.35]) / 1.15)
    assert pruned.edges.tolist() == [
        [False, False, False, True, True],
        [True, False, False, True, False],
        [False, False, False, False, True],
    ]
    # Scores of edges without the errors: .4 and .2 of the first logit, .25 of the second, .1 and .3 of the feature
    assert prune(hand(), 0.5, 0.6).edges.tolist() == [
        [False, False, False, False, True],
        [True, False, False, False, False],
        [False, False, False, False, True],
    ]


def test_features_that_lose_all_edges_go():
    for generation in ("G4e", "G7"):
        result = traced(generation)
        pruned = prune(result.graph)
        count = result.graph.feature_count
        assert pruned.edges[:, : result.graph.errors.stop].any(0)[pruned.sources[: result.graph.errors.stop]].all()
        assert pruned.edges[:count].any(1)[pruned.sources[:count]].all()
        assert not pruned.edges[:, ~pruned.sources].any()
        assert not pruned.edges[:count][~pruned.sources[:count]].any()


def test_the_strongest_paths_are_products_of_shares():
    graph = hand()
    paths = strongest(graph, prune(graph, 1.0, 1.0), 10)
    assert [round(path.share, 4) for path in paths] == [0.225, 0.15, 0.15, 0.125, 0.125, 0.075]
    first = paths[0]
    assert [(node.kind, node.position, node.index) for node in first.nodes] == [
        ("token", 1, 9),
        ("feature", 1, 3),
        ("logit", 1, 4),
    ]
    assert first.weights == (-3.0, 2.0)
    assert len(strongest(graph, prune(graph, 1.0, 1.0), 10, least_features=1)) == 2


def test_two_tokens_by_hand():
    """One layer, one head, two channels; values and head are 1: every effect is a product that can be written down."""
    config = GPTConfig.of_generation("G0", **(SIZES | {"n_layer": 1, "n_head": 1, "n_kv_head": 1, "n_embd": 2}))
    model = GPT(config).double().requires_grad_(False)
    with torch.no_grad():
        for weight in model.parameters():
            weight.zero_()
        model.transformer.wte.weight[1] = torch.tensor([3.0, 4.0])
        model.transformer.wte.weight[2] = torch.tensor([1.0, -1.0])
        attn = model.transformer.h[0].attn
        attn.c_v.weight.copy_(torch.eye(2))
        attn.c_proj.weight.copy_(torch.tensor([[0.0, 1.0], [0.0, 0.0]]))  # the second channel into the first
        model.lm_head.weight[0] = torch.tensor([1.0, 0.0])
    weights = {
        "W_enc": torch.tensor([[2.0], [0.0]]),
        "b_enc": torch.tensor([0.25]),
        "W_dec": torch.tensor([[0.0, 1.0]]),
        "b_dec": torch.tensor([0.5, 0.0]),
    }
    cfg = {"architecture": "transcoder", "d_in": 2, "d_out": 2, "d_sae": 1}
    sae = TorchSAE(cfg, {name: weight.double() for name, weight in weights.items()})
    result = trace(model, {hook_name(0, "mlp_in"): sae}, torch.tensor([1, 2]), limits=Limits(max_logits=1))
    graph = result.graph
    # Queries are 0, so the second token reads the mean of both: (.8 2^.5 - 1) / 2 into the first channel of [1, -1].
    first = 0.8 * 2**0.5  # the second channel of the first token: 4 / 3.5355
    x = torch.tensor([1 + (first - 1) / 2, -1.0], dtype=torch.float64)
    scale = float(x.square().mean().rsqrt())
    row = int((graph.features[:, 1] == 1).nonzero())
    effects = graph.matrix[row, graph.token_columns].tolist()
    assert effects == pytest.approx([2 * scale * first / 2, 2 * scale * (1 - 1 / 2)], rel=1e-6)
    assert graph.biases[row].tolist() == [0.0, 0.25]
    assert float(graph.values[row]) == pytest.approx(2 * scale * float(x[0]) + 0.25, rel=1e-6)
    # The MLP is 0: its error cancels feature and bias. The first logit reads the first channel, minus the mean of 50.
    error = graph.matrix[-1, graph.errors].tolist()
    final = float(x.square().mean().rsqrt()) * (1 - 1 / 50)
    assert graph.logits == (0,)
    assert error == pytest.approx([0.0, -0.5 * final], rel=1e-6)
    assert graph.biases[-1].tolist() == pytest.approx([0.5 * final, 0.0], rel=1e-6)


# ---- bad input ------------------------------------------------------------------------------------------------------


def refused(
    match: str, saes: dict[str, TorchSAE] | None = None, length: int = LENGTH, model: GPT | None = None, **limits
):
    model = tiny("G7", sequence_len=24) if model is None else model
    with pytest.raises(ValueError, match=match):
        trace(
            model,
            transcoders(torch.float32) if saes is None else saes,
            tokens(length, 1)[0],
            limits=Limits(**limits),
        )


def test_transcoders_that_do_not_replace_the_model_are_refused():
    saes = transcoders(torch.float32)
    first, *others = saes
    refused(
        r"needs one for each of its layers 0 to 3 and lacks those of 0, 2",
        {n: saes[n] for n in saes if "1" in n or "3" in n},
    )
    refused(
        "a topk SAE, which reconstructs its input. Attribution graphs need", saes | {first: toy_sae("topk", 32, 64)}
    )
    refused("reads 16 channels, but this model has 32", saes | {first: toy_transcoder(0, 16, 64)})
    wrong = toy_transcoder(0, 32, 64, hook_name_out="blocks.0.hook_attn_out")
    refused("predicts blocks.0.hook_attn_out, not the output of its MLP", saes | {first: wrong})
    refused("layer 0 is in torch.float64, the model in torch.float32", saes | {first: transcoders()[first]})
    assert others


def test_prompts_and_models_that_have_no_graph_are_refused():
    refused("the prompt has 1 tokens: an attribution graph needs 2", length=1)
    refused("the prompt has 25 tokens: .* to 24, the model's context", length=25)
    refused("the model is in torch.bfloat16, too coarse", model=tiny("G7", sequence_len=24).bfloat16())


def test_a_graph_that_does_not_fit_is_refused_with_its_size(monkeypatch):
    monkeypatch.setattr("bridge.circuits.tracing.free_memory", lambda device: 2**12)
    refused(r"16 tokens has \d+ active features, \d+ of them nodes: it needs about 0.0 GiB, and 0.0 are free: give a")


@pytest.mark.parametrize(
    ("name", "value"), [("max_features", 0), ("max_logits", -1), ("batch_size", 0), ("logit_probability", 1.5)]
)
def test_limits_that_cannot_be_are_refused(name, value):
    with pytest.raises(ValueError, match=f"{name} is {value}: it must be"):
        Limits(**{name: value})


def test_nodes_that_do_not_exist_are_refused(g7):
    with pytest.raises(ValueError, match="column 100000 is no feature or error"):
        intervene(g7, 100_000)
    with pytest.raises(ValueError, match="layer 9, position 0 is outside 4 layers and 16 tokens"):
        g7.replacement.column(9, 0, 1)
    with pytest.raises(ValueError, match="latent 99 of layer 0 is not a node at position 0"):
        g7.replacement.column(0, 0, 99)


def test_a_node_that_is_asked_for_is_missed_before_the_backward_passes():
    def between() -> None:
        pytest.fail("a backward pass began")

    for node, problem in (((9, 0, 1), "outside 4 layers"), ((0, 0, 99), "is not active")):
        with pytest.raises(ValueError, match=problem):
            traced(between=between, node=node)


def test_columns_and_nodes_name_each_other(g7):
    for column in (0, 33, g7.graph.errors.start + 27):
        node = g7.graph.source(column)
        assert g7.replacement.column(node.layer, node.position, node.index) == column
