"""Capture and edit: what they see, what they change, and that nothing of them stays."""

import numpy as np
import pytest
import torch
from tiny_nanochat import tiny
from torch import nn

from bridge import activations, hooks
from bridge.hooks import blocks_before, capture, edit, hook_name, replay
from bridge.nanochat.model import GPT

LAYERS = 4
NAMES = [hook_name(layer, site) for layer in range(LAYERS) for site in hooks.SITES]


class UpstreamLike(nn.Module):
    """Another author's model, of which only `transformer.h[i].attn` and `.mlp` are known."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.attn, self.mlp = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x):
            x = x + self.attn(x)
            return x + self.mlp(x)

    def __init__(self):
        super().__init__()
        self.transformer = nn.ModuleDict({"wte": nn.Embedding(16, 8), "h": nn.ModuleList([self.Block(), self.Block()])})

    def forward(self, tokens):
        x = self.transformer.wte(tokens)
        for block in self.transformer.h:
            x = block(x)
        return x


@pytest.fixture(scope="module")
def model() -> GPT:
    return tiny("G7")


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randint(0, 50, (2, 12), generator=torch.Generator().manual_seed(1))


def traces(model: nn.Module) -> list:
    return [m for m in model.modules() if m._forward_hooks or m._forward_pre_hooks or "forward" in vars(m)]


def test_capture_sees_what_plain_forward_hooks_see(model, tokens):
    seen = {}
    handles = [
        hooks.find(model, name).register_forward_hook(
            lambda m, i, o, name=name: seen.__setitem__(name, i[0] if name.endswith("normalized") else o)
        )
        for name in NAMES
    ]
    logits = model(tokens)
    for handle in handles:
        handle.remove()
    with capture(model, NAMES) as acts:
        captured_logits = model(tokens)
    assert torch.equal(logits, captured_logits)
    assert set(acts) == set(NAMES)
    for name in NAMES:
        assert acts[name].shape == (2, 12, 32)
        assert torch.equal(acts[name], seen[name])


def test_batches_of_different_sizes_are_read_one_after_the_other(model):
    rows = np.arange(72).reshape(36, 2) % 50
    batches = np.split(rows, np.cumsum(range(1, 8)))  # of 1 to 8 rows
    name = hook_name(0, "resid_post")
    for _ in range(4):  # beartype looks at one batch of a list, and chooses it at random
        passes = list(activations.read(model, [name], batches, excluded=(), drop_sinks=False))
        assert [one.first_row for one in passes] == [0, 1, 3, 6, 10, 15, 21, 28]
        np.testing.assert_array_equal(torch.cat([one.tokens for one in passes]), rows)
        assert [len(one.acts[name]) for one in passes] == [len(batch) for batch in batches]


def test_stop_ends_the_forward_after_the_deepest_hook_and_not_before(model, tokens):
    names = ["blocks.2.hook_attn_out", "blocks.1.hook_mlp_out", "blocks.1.hook_resid_post"]
    ran = []
    handles = [b.register_forward_hook(lambda *_, i=i: ran.append(i)) for i, b in enumerate(model.transformer.h)]
    try:
        with capture(model, names, stop=True) as acts:
            assert model(tokens) is None
            after = "the block goes on"
    finally:
        for handle in handles:
            handle.remove()
    assert after
    assert ran == [0, 1]
    with capture(model, names) as whole:
        model(tokens)
    assert all(torch.equal(acts[n], whole[n]) for n in names)


def test_a_hooks_module_is_named_as_torch_names_it(model):
    for name in NAMES:
        assert model.get_submodule(hooks.module_name(name)) is hooks.find(model, name)


def test_an_edit_reaches_everything_after_it(model, tokens):
    name = "blocks.1.hook_resid_post"
    with capture(model, NAMES) as plain:
        logits = model(tokens)
    with edit(model, {name: lambda x: x * 2}), capture(model, NAMES) as edited:
        changed = model(tokens)
    assert torch.equal(edited[name], plain[name] * 2)
    assert torch.equal(edited["blocks.0.hook_resid_post"], plain["blocks.0.hook_resid_post"])
    assert not torch.allclose(edited["blocks.2.hook_attn_out"], plain["blocks.2.hook_attn_out"])
    assert not torch.allclose(changed, logits)
    with edit(model, {name: lambda x: x}):
        assert torch.equal(model(tokens), logits)


def test_nested_edits_run_from_the_outside_in(model, tokens):
    name = "blocks.0.hook_mlp_out"
    with edit(model, {name: lambda x: x + 1}), edit(model, {name: lambda x: x * 0}), capture(model, [name]) as acts:
        model(tokens)
    assert not acts[name].any()


def test_nothing_stays_after_the_context_nor_after_an_exception(model, tokens):
    logits = model(tokens)
    with capture(model, NAMES, stop=True):
        model(tokens)
    with pytest.raises(ZeroDivisionError), edit(model, {NAMES[0]: lambda x: x * (1 / 0)}):
        model(tokens)
    with pytest.raises(KeyError), capture(model, [NAMES[0]], stop=True):
        raise KeyError
    assert traces(model) == []
    assert torch.equal(model(tokens), logits)


def test_gradients_flow_through_captured_activations(model, tokens):
    scale = torch.ones((), requires_grad=True)
    with edit(model, {"blocks.1.hook_mlp_out": lambda x: x * scale}):
        model(tokens).square().mean().backward()
    assert scale.grad.abs() > 0


@pytest.mark.parametrize("name", NAMES)
def test_a_replayed_pass_gives_the_same_logits_under_an_edit_without_running_earlier_blocks(model, tokens, name):
    earlier = blocks_before(name)
    with capture(model, [*dict.fromkeys([*earlier, name])]) as acts:
        model(tokens)
    with edit(model, {name: lambda x: x * 0.5}), capture(model, NAMES) as whole:
        expected = model(tokens)
    ran = []
    handles = [block.attn.register_forward_hook(lambda m, *_: ran.append(m.layer)) for block in model.transformer.h]
    with replay(model, {one: acts[one] for one in earlier}), edit(model, {name: lambda x: x * 0.5}):
        assert torch.equal(model(tokens), expected)
    for handle in handles:
        handle.remove()
    assert ran == list(range(len(earlier), LAYERS))
    assert torch.equal(whole[name], acts[name] * 0.5)


def test_replaying_leaves_nothing_behind_and_keeps_a_forward_of_others(model, tokens):
    logits, name = model(tokens), "blocks.1.hook_resid_post"
    with pytest.raises(KeyError), replay(model, {name: torch.zeros(2, 12, 32)}):
        raise KeyError
    assert traces(model) == []
    assert torch.equal(model(tokens), logits)
    other = UpstreamLike()
    block = other.transformer.h[0]
    block.forward = own = torch.zeros_like
    with replay(other, {"blocks.0.hook_resid_post": torch.ones(2, 3, 8)}):
        assert block(torch.rand(2, 3, 8)).all()
    assert block.forward is own


def test_only_outputs_of_blocks_are_replayed(model):
    with pytest.raises(ValueError, match=r"blocks\.1\.hook_mlp_out is not the output of a block"):
        replay(model, {"blocks.1.hook_mlp_out": torch.zeros(2, 12, 32)}).__enter__()


def test_another_model_with_the_same_rooms_works_too():
    model = UpstreamLike()
    tokens = torch.arange(6).reshape(2, 3)
    with capture(model, ["blocks.0.hook_resid_post", "blocks.1.hook_attn_out"], stop=True) as acts:
        assert model(tokens) is None
    assert acts["blocks.0.hook_resid_post"].shape == (2, 3, 8)
    with edit(model, {"blocks.1.hook_resid_post": torch.zeros_like}):
        assert not model(tokens).any()


@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        ("blocks.4.hook_resid_post", "4 layers, 0 to 3"),
        ("blocks.0.hook_resid_pre", "names are blocks"),
        ("resid_post", "names are blocks"),
        ("blocks.-1.hook_mlp_out", "names are blocks"),
    ],
)
def test_a_name_that_does_not_exist_is_refused_with_those_that_do(model, name, complaint):
    with pytest.raises(ValueError, match=complaint), capture(model, [name]):
        pass
    with pytest.raises(ValueError, match=complaint), edit(model, {name: lambda x: x}):
        pass


def test_other_bad_requests_are_refused(model, tokens):
    with pytest.raises(ValueError, match="at least one"), capture(model, []):
        pass
    with pytest.raises(ValueError, match="no hook type 'resid'"):
        hook_name(0, "resid")
    with pytest.raises(ValueError, match="hooks need a nanochat"), capture(nn.Linear(2, 2), [NAMES[0]]):
        pass
    with pytest.raises(ValueError, match="returned the shape"), edit(model, {NAMES[0]: lambda x: x[:, :1]}):
        model(tokens)
    assert traces(model) == []
