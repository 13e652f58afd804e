"""Lenses against what can be computed by hand: blocks that write nothing, finite differences, identities."""

import dataclasses

import pytest
import torch
from tiny_nanochat import SIZES, tiny, tokens

from bridge import lenses
from bridge.hooks import edit, hook_name
from bridge.lenses import jacobian, quality, streams, tables, tuned
from bridge.lenses.jacobian import row_jacobians
from bridge.lenses.prompts import chunks
from bridge.nanochat.config import GENERATIONS
from bridge.nanochat.model import GPT

WIDTH, LAYERS, VOCABULARY = SIZES["n_embd"], SIZES["n_layer"], SIZES["vocab_size"]
FEW = 4
"""First valid position, so that texts may be short."""


def quiet(generation: str, seed: int = 0, **fields) -> GPT:
    """Return a model whose blocks write nothing, with random lambdas, some of them negative."""
    model = tiny(generation, **fields)
    generator = torch.Generator().manual_seed(seed)
    for name, weight in model.named_parameters():
        if "c_proj" in name:
            weight.zero_()
        elif weight.ndim == 1:
            weight.copy_(torch.randn(weight.shape, generator=generator) + 0.3)
    return model


def lens_of(model: GPT, rows: torch.Tensor, **settings) -> lenses.JacobianLens:
    mean = jacobian.Mean()
    for row in rows:
        mean.add(row_jacobians(model, row, first=FEW, **settings))
    return mean.lens()


# ---- the direct path ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("generation", GENERATIONS)
def test_the_direct_lens_gives_the_logits_of_blocks_that_write_nothing(generation, seed):
    model = quiet(generation, seed).double()
    texts = tokens(30)
    read = lenses.read(model, texts)
    direct = lenses.DirectLens(model)
    for layer in direct.layers:
        logits = lenses.unembed(model, direct.stream(read, layer))
        torch.testing.assert_close(logits, model(texts), atol=4e-6, rtol=0)
    if GENERATIONS[generation].get("lambdas"):
        assert any(path.own < 0 for path in direct.paths) or seed


@pytest.mark.parametrize("generation", GENERATIONS)
def test_jacobians_of_blocks_that_write_nothing_are_the_factor_of_the_direct_path(generation):
    model = quiet(generation).double()
    paths = lenses.direct_paths(model)
    for matrix, path in zip(row_jacobians(model, tokens(20, 1)[0], first=FEW), paths, strict=True):
        torch.testing.assert_close(matrix, path.own * torch.eye(WIDTH).double(), atol=1e-12, rtol=0)


@pytest.mark.parametrize("generation", GENERATIONS)
def test_later_writes_that_are_zeroed_leave_the_direct_path(generation):
    """The lens at a layer is the model with all later attention and MLPs zeroed, whatever earlier ones write."""
    model, texts = tiny(generation), tokens(12)
    read, direct = lenses.read(model, texts), lenses.DirectLens(model)
    for layer in direct.layers:
        later = [hook_name(i, site) for i in range(layer + 1, LAYERS) for site in ("attn", "mlp")]
        with edit(model, dict.fromkeys(later, torch.zeros_like)):
            expected = model(texts)
        torch.testing.assert_close(lenses.unembed(model, direct.stream(read, layer)), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("generation", GENERATIONS)
def test_the_direct_lens_ends_in_the_models_logits(generation):
    model, texts = tiny(generation), tokens(12)
    read = lenses.read(model, texts)
    torch.testing.assert_close(lenses.unembed(model, streams.final(model, read)), model(texts), atol=1e-5, rtol=0)


def test_neutral_lambdas_leave_the_output_as_it_is():
    model = tiny("G7")
    model.resid_lambdas.fill_(1)
    for weight in (model.x0_lambdas, model.backout_lambda):
        weight.zero_()
    assert lenses.direct_paths(model) == [(1.0, 0.0, 0.0, 0.0)] * LAYERS
    assert lenses.direct_paths(tiny("G0")) == [(1.0, 0.0, 0.0, 0.0)] * LAYERS


def test_the_only_layer_is_backed_out_of_itself():
    model = tiny("G7", n_layer=1)
    (path,) = lenses.direct_paths(model)
    backout = model.backout_lambda.item()
    assert path.own == pytest.approx(1 - backout, abs=1e-7)
    (matrix,) = row_jacobians(model.double(), tokens(20, 1)[0], first=FEW)
    torch.testing.assert_close(matrix, (1 - backout) * torch.eye(WIDTH).double(), atol=1e-7, rtol=0)


def test_the_logit_lens_turns_an_output_whose_factor_is_negative():
    model = quiet("G2", seed=0)
    read, lens = lenses.read(model, tokens(9)), lenses.LogitLens(model)
    signs = [path.own < 0 for path in lenses.direct_paths(model)]
    assert any(signs)
    for layer, turned in enumerate(signs):
        assert torch.equal(lens.stream(read, layer), -read.blocks[layer] if turned else read.blocks[layer])


# ---- the Jacobian lens ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("generation", ["G4e", "G7"])
def test_jacobians_are_finite_differences_summed_over_later_targets(generation):
    """Attention mixes positions, so a mean over equal positions would differ."""
    model, row = tiny(generation).double(), tokens(12, 1)[0]
    valid = torch.arange(FEW, len(row) - 1)
    matrices = row_jacobians(model, row, first=FEW)
    step = 1e-5
    for layer in range(LAYERS):
        direction = torch.randn(WIDTH, generator=torch.Generator().manual_seed(layer)).double()
        change = torch.zeros(2, len(valid), len(row), WIDTH).double()  # a text per sign and position
        change[0, torch.arange(len(valid)), valid] = step * direction
        change[1] = -change[0]
        with edit(model, {hook_name(layer, "resid_post"): lambda h, change=change: h + change.flatten(0, 1)}):
            read = lenses.read(model, row.expand(2 * len(valid), -1))
        up, down = streams.final(model, read)[:, valid].sum(1).unflatten(0, (2, -1))
        expected = ((up - down) / (2 * step)).mean(0)
        assert float((matrices[layer] @ direction - expected).norm() / expected.norm()) < 1e-7


def test_any_number_of_copies_gives_the_same_jacobians():
    model, row = tiny("G7").double(), tokens(14, 1)[0]
    expected = row_jacobians(model, row, WIDTH, first=FEW)
    for copies in (1, 5, 31, 64):
        torch.testing.assert_close(row_jacobians(model, row, copies, first=FEW), expected, atol=1e-12, rtol=0)


def test_the_last_token_changes_nothing():
    model, row = tiny("G7").double(), tokens(14, 1)[0]
    other = torch.cat([row[:-1], (row[-1:] + 1) % VOCABULARY])
    assert torch.equal(row_jacobians(model, row, first=FEW), row_jacobians(model, other, first=FEW))


def test_lenses_of_halves_merge_to_the_lens_of_all():
    model, rows = tiny("G7").double(), tokens(14, 5)
    whole, halves = lens_of(model, rows), [lens_of(model, rows[:2]), lens_of(model, rows[2:])]
    merged = lenses.merge(halves)
    assert merged.n_prompts == whole.n_prompts == 5
    for layer in whole.layers:
        torch.testing.assert_close(merged.matrices[layer], whole.matrices[layer], atol=1e-12, rtol=0)


def test_a_fit_ends_when_the_mean_has_settled_or_prompts_end():
    model = tiny("G7", n_layer=2)
    same = [tokens(19, 1)[0]] * 20
    short = tokens(jacobian.SHORTEST - 1, 1)[0]
    settled = jacobian.fit(model, same, jacobian.Settings(min_prompts=12))
    assert settled.count == 12
    assert settled.movement == pytest.approx(0, abs=1e-6)
    assert jacobian.fit(model, [short, *same[:3], short]).count == 3
    assert jacobian.fit(model, same, jacobian.Settings(max_prompts=4)).count == 4
    continued = jacobian.fit(model, same, jacobian.Settings(max_prompts=6), mean=jacobian.Mean(settled.lens()))
    assert continued.count == 12
    with pytest.raises(ValueError, match="no prompt of at least 18 tokens"):
        jacobian.fit(model, [short]).lens()


def test_what_cannot_be_fitted_is_refused():
    with pytest.raises(ValueError, match="bfloat16, too coarse for Jacobian lenses"):
        row_jacobians(tiny("G7").bfloat16(), tokens(30, 1)[0])
    with pytest.raises(ValueError, match="the prompt has 17 tokens: at least 18"):
        row_jacobians(tiny("G7"), tokens(17, 1)[0])
    with pytest.raises(ValueError, match=r"need a bridge\.nanochat\.model\.GPT"):
        lenses.read(torch.nn.Linear(2, 2), tokens(3))


def test_pieces_of_text_are_consecutive():
    documents = ["a" * 7, "b" * 3, "", "c" * 12]
    pieces = list(chunks(documents, 5))
    assert "".join(pieces) == "\n\n".join(documents[:3]) + "\n\n" + documents[3]
    assert {len(piece) for piece in pieces[:-1]} == {5}


# ---- the tuned lens -------------------------------------------------------------------------------------------------


def test_a_tuned_lens_starts_as_the_logit_lens_and_learns():
    model = quiet("G7")
    for name, weight in model.named_parameters():
        if "c_proj" in name:
            weight.normal_(0, 0.2, generator=torch.Generator().manual_seed(1))
    texts = tokens(20, 3)
    read, start, logit = lenses.read(model, texts), tuned.new(model), lenses.LogitLens(model)
    for layer in start.layers:
        assert torch.equal(start.stream(read, layer), logit.stream(read, layer))
    before = quality.measure(model, [start], [texts], first=FEW)["tuned"]
    lens = tuned.fit(model, [texts] * 20, tuned.Settings(steps=20, learning_rate=1e-2))
    after = quality.measure(model, [lens], [texts], first=FEW)["tuned"]
    assert sum(one.kl for one in after.values()) < 0.8 * sum(one.kl for one in before.values())
    with pytest.raises(ValueError, match="batches for 3 steps of 5"):
        tuned.fit(model, [texts] * 3, tuned.Settings(steps=5))


def test_quality_is_zero_for_the_direct_lens_at_the_end():
    model, texts = tiny("G7"), tokens(24, 3)
    found = quality.measure(model, [lenses.DirectLens(model), lenses.LogitLens(model)], [texts[:2], texts[2:]])
    last = found["direct"][LAYERS - 1]
    assert last.kl == pytest.approx(0, abs=1e-6)
    assert last.agreement == 1
    assert found["logit"][LAYERS - 1].kl > 1e-3  # the backout
    read = lenses.read(model, texts)
    guess = lenses.unembed(model, read.blocks[0]).softmax(-1)[:, 16:-1]
    own = model(texts).softmax(-1)[:, 16:-1]
    expected = (own * (own.log() - guess.log())).sum(-1).mean()
    sign = lenses.direct_paths(model)[0].sign
    assert sign < 0 or found["logit"][0].kl == pytest.approx(float(expected), rel=1e-4)
    with pytest.raises(ValueError, match="no position counts: give rows of more than 17 tokens"):
        quality.measure(model, [lenses.LogitLens(model)], [tokens(17)])


# ---- tables ---------------------------------------------------------------------------------------------------------


def test_a_table_has_the_lenses_tokens_and_ends_in_the_models_output(monkeypatch):
    model, row = tiny("G7"), tokens(12, 1)[0]
    read, lens = lenses.read(model, row[None]), lenses.LogitLens(model)
    found = lenses.table(model, lens, read, row, top=3)
    assert found.layers == tuple(range(LAYERS))
    for place, layer in enumerate(found.layers):
        last = layer == LAYERS - 1
        p = (model(row[None]) if last else lenses.unembed(model, lens.stream(read, layer)))[0].softmax(-1)
        best = p.topk(3)
        assert torch.equal(found.tokens[place], best.indices)
        torch.testing.assert_close(found.probabilities[place], best.values, atol=1e-6, rtol=1e-5)
        ranks = [int((p[t] > p[t, row[t + 1]]).sum()) for t in range(len(row) - 1)]
        assert found.ranks[place].tolist() == ranks
        torch.testing.assert_close(found.entropy[place], -(p * p.log()).sum(-1), atol=1e-5, rtol=0)
    monkeypatch.setattr(tables, "_NUMBERS_AT_ONCE", 5 * VOCABULARY)
    pieces = lenses.table(model, lens, read, row, top=3)
    for name in ("tokens", "ranks"):
        assert torch.equal(getattr(pieces, name), getattr(found, name))
    part = lenses.table(model, lens, read, row, top=3, layers=[1])
    assert part.layers == (1, LAYERS - 1)
    assert torch.equal(part.tokens[0], found.tokens[1])


def test_a_table_has_the_rows_that_a_lens_has():
    model, row = tiny("G7"), tokens(20, 1)[0]
    lens = lens_of(model, row[None])
    some = dataclasses.replace(lens, matrices={2: lens.matrices[2]})
    assert lenses.table(model, some, lenses.read(model, row[None]), row).layers == (2, LAYERS - 1)


def test_a_direction_writes_along_the_direct_path_and_through_the_jacobian():
    model = tiny("G7")
    direction = torch.randn(WIDTH, generator=torch.Generator().manual_seed(0))
    lens = lens_of(model, tokens(20, 2))
    W_U = model.lm_head.weight[:VOCABULARY]
    for layer, path in enumerate(lenses.direct_paths(model)):
        direct, through = lenses.written(model, direction, layer, lens, top=12)
        for found, vector in ((direct, path.own * direction), (through, lens.matrices[layer] @ direction)):
            logits = W_U @ vector
            logits = logits - logits.mean()
            assert found.top.tolist() == logits.topk(12).indices.tolist()
            torch.testing.assert_close(found.bottom_values, logits.sort().values[:12], atol=1e-5, rtol=0)
        shared = set(direct.top[:10].tolist()) & set(through.top[:10].tolist())
        assert direct.overlap(through) == through.overlap(direct) == len(shared)
    assert [one.lens for one in lenses.written(model, direction, 0)] == ["direct"]
    with pytest.raises(ValueError, match=r"shape \(3,\) in layer 0: the model has width 32 and layers 0 to 3"):
        lenses.written(model, direction[:3], 0)
