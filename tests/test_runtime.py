"""The running model: features seen, pushed and explained; nothing stays behind; what does not fit is refused."""

import contextlib
import itertools
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from test_hooks import UpstreamLike, traces
from tiny_nanochat import SIZES, tiny, tokens
from toy_saes import FORMS, export, toy_sae, toy_transcoder

import bridge.nanochat
from bridge import torch_sae
from bridge.hooks import capture, edit
from bridge.nanochat.engine import generate
from bridge.nanochat.tokenizer import Tokenizer
from bridge.runtime import InterpretableModel, Steer, load_saes
from bridge.steering import MODES, POSITIONS
from jsae.architectures import sae_config
from jsae.export import write

ROOT = Path(__file__).resolve().parents[1]
C = SIZES["n_embd"]
EARLY, HOOK, LATE = "blocks.0.hook_mlp_out", "blocks.1.hook_resid_post", "blocks.3.hook_attn_out"


@pytest.fixture(scope="module")
def model():
    return tiny("G7")


@pytest.fixture(scope="module")
def im(model):
    return InterpretableModel(model, {HOOK: toy_sae("topk", C, 4 * C)}, SomeSpecial())


class SomeSpecial:
    """As much of a tokenizer as a vocabulary of fifty tokens allows."""

    def __init__(self):
        self.special_tokens = {"<|bos|>": 0, "<|user_start|>": 7}

    def token_bytes_of(self, token: int) -> bytes:
        return f"[{token}]".encode()

    def encode(self, text: str, prepend_bos: bool) -> list[int]:
        return [0] * prepend_bos + [ord(c) % 50 for c in text]


def busiest(im: InterpretableModel, ids: torch.Tensor, hook: str = HOOK) -> int:
    """The feature with the largest sum of activations on a text."""
    with capture(im.model, [hook]) as acts:
        im(ids)
    return int(im.sae(hook).encode(acts[hook]).sum((0, 1)).argmax())


# ---- seeing --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
def test_active_features_are_the_saes_own(model, form):
    sae = toy_sae(form, C, 4 * C)
    im, ids = InterpretableModel(model, {HOOK: sae}), tokens(30)
    with capture(model, [HOOK]) as acts:
        plain = model(ids)
    latents = sae.encode(acts[HOOK])
    with im.interpretation_enabled():
        assert torch.equal(im(ids), plain)
        found = im.get_active_features()
        values, indices = found
        widest = int((latents != 0).sum(-1).max())
        assert values.shape == indices.shape == (2, 30, widest)
        assert widest == 4 or form not in ("topk", "abstopk")
        assert (values[..., :-1].abs() >= values[..., 1:].abs()).all()
        assert (values < 0).any() == (form == "abstopk")
        torch.testing.assert_close(latents.gather(-1, indices), values)
        largest, at = im.get_active_features(top_k=2)
    assert torch.equal(largest, values[..., :2])
    assert torch.equal(at, indices[..., :2])
    torch.testing.assert_close(found.dense(), latents)


def test_cached_decoding_sees_what_one_forward_sees(im, model):
    ids, cache = tokens(30), model.new_cache(2)
    with im.interpretation_enabled():
        im(ids)
        whole = im.get_active_features()
    with im.interpretation_enabled():
        for chunk in ids.split((11, 1, 1, 4, 13), dim=1):
            im(chunk, cache=cache)
            last = im.get_active_features()
            assert last.values.shape[:2] == chunk.shape
        text = im.get_active_features(whole_text=True)
    torch.testing.assert_close(text.values, whole.values, atol=1e-4, rtol=1e-4)
    assert torch.equal(text.indices, whole.indices)
    assert torch.equal(last.indices, whole.indices[:, -13:])


def test_a_new_text_starts_a_new_trace(im, model):
    with im.interpretation_enabled():
        im(tokens(20), cache=model.new_cache(2))
        im(tokens(9), cache=model.new_cache(2))
        assert im.get_active_features(whole_text=True).values.shape == (2, 9, 4)
        im(tokens(5))
        im(tokens(6))
        assert im.get_active_features(whole_text=True).values.shape == (2, 6, 4)
        cache = model.new_cache(2)
        im(tokens(20), cache=cache)
        cache.position = 8
        im(tokens(3), cache=cache)
        im(tokens(2), cache=cache)
        assert im.get_active_features(whole_text=True).values.shape == (2, 5, 4)


def test_several_hooks_are_seen_and_steered_at_once(model):
    saes = {
        name: toy_sae(form, C, 64, seed)
        for seed, (name, form) in enumerate(zip((LATE, EARLY, HOOK), FORMS, strict=False))
    }
    im, ids = InterpretableModel(model, saes), tokens(12)
    assert im.hooks == (EARLY, HOOK, LATE)
    requests = [Steer(name, busiest(im, ids, name), "additive", 3.0) for name in im.hooks]
    with im.steering_enabled(requests), im.interpretation_enabled(), capture(model, im.hooks) as acts:
        im(ids)
        for name in im.hooks:
            expected = saes[name].encode(acts[name])
            values, indices = im.get_active_features(name, top_k=4)
            torch.testing.assert_close(values, expected.gather(-1, indices))
        with pytest.raises(ValueError, match=f"several hooks have an SAE: choose one of {EARLY}, {HOOK}, {LATE}"):
            im.get_active_features()
    with im.interpretation_enabled([HOOK]):
        im(ids)
        assert im.get_active_features().d_sae == 64
        with pytest.raises(ValueError, match=f"no SAE at '{EARLY}': choose one of {HOOK}"):
            im.get_active_features(EARLY)


def test_features_can_be_read_after_the_context_until_the_next_one(im):
    with im.interpretation_enabled():
        im(tokens(7))
    assert im.get_active_features().values.shape == (2, 7, 4)
    with im.interpretation_enabled():
        with pytest.raises(ValueError, match="no forward pass has been tracked"):
            im.get_active_features()
        im(tokens(8))
        for length in (9, 3):
            with im.interpretation_enabled():
                im(tokens(length))
                assert im.get_active_features().values.shape == (2, length, 4)
        im(tokens(5))
        assert im.get_active_features().values.shape == (2, 5, 4)


def test_gradients_flow_through_features():
    model = tiny("G7").requires_grad_(True)
    im = InterpretableModel(model, {HOOK: toy_sae("topk", C, 64)})
    with im.interpretation_enabled():
        im(tokens(6))
        im.get_active_features().values.sum().backward()
    assert model.transformer.h[0].mlp.c_fc.weight.grad.abs().sum() > 0
    assert model.transformer.h[2].mlp.c_fc.weight.grad is None


# ---- steering ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("mode", "neutral"), [("additive", 0.0), ("scale", 1.0), ("orthogonal", 1.0)])
def test_the_neutral_strength_changes_no_logit(im, mode, neutral):
    ids = tokens(25)
    assert torch.equal(im.steer(ids, (HOOK, busiest(im, ids)), neutral, mode), im(ids))


def test_steering_is_the_edit_by_hand(im, model):
    ids, sae = tokens(25), im.sae()
    index = busiest(im, ids)
    with edit(model, {HOOK: lambda h: h + 2.5 * sae.W_dec[index]}):
        expected = model(ids)
    assert torch.equal(im.steer(ids, feature_id=(HOOK, index), strength=2.5), expected)
    assert torch.equal(im.steer(ids, (HOOK, index), 0.5, strength_multiplier=5), expected)
    assert not torch.allclose(expected, model(ids), atol=0.01)


def test_clamp_scale_and_ablate_act_where_the_feature_is_on(im):
    ids = tokens(25)
    index = busiest(im, ids)
    with im.interpretation_enabled():
        im(ids)
        on = im.get_active_features().dense()[..., index]
        with im.steering_enabled([Steer(HOOK, index, "scale", 2.0)]), im.interpretation_enabled():
            im(ids)
            doubled = im.get_active_features().dense()[..., index]
    assert (doubled > 1.5 * on)[on > 0].all()
    # The unit row that is added gives back, by this encoder's 0.8, four fifths of what is pushed.
    torch.testing.assert_close(doubled[on > 0], 1.8 * on[on > 0], atol=1e-4, rtol=1e-4)
    assert not doubled[on == 0].any()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("positions", POSITIONS)
def test_cached_decoding_with_steering_is_the_uncached_forward(im, model, mode, positions):
    ids = tokens(30)
    requests = [Steer(HOOK, busiest(im, ids), mode, 3.0, positions), Steer(HOOK, 5, mode, -1.5, positions)]
    with im.steering_enabled(requests, prompt_length=13):
        whole = im(ids)
        for split in ((13,) + (1,) * 17, (9, 8, 13)):
            cache = model.new_cache(2)
            pieces = [im(chunk, cache=cache) for chunk in ids.split(split, dim=1)]
            torch.testing.assert_close(torch.cat(pieces, dim=1), whole, atol=1e-4, rtol=0)
    assert not torch.allclose(whole, model(ids), atol=1e-3)


@pytest.mark.parametrize(
    ("positions", "touched"),
    [("prompt", [1, 1, 1, 1, 0, 0, 0]), ("generated", [0, 0, 0, 0, 1, 1, 1]), ("not_special", [0, 1, 1, 0, 1, 1, 1])],
)
def test_positions_choose_the_tokens_that_change(im, model, positions, touched):
    ids = torch.tensor([[0, 3, 4, 7, 5, 6, 1]])
    with capture(model, [HOOK]) as plain:
        model(ids)
    with (
        im.steering_enabled([Steer(HOOK, 3, "additive", 2.0, positions)], prompt_length=4),
        capture(model, [HOOK]) as acts,
    ):
        im(ids)
    changed = (acts[HOOK] != plain[HOOK]).any(-1)
    assert changed[0].int().tolist() == touched


def test_requests_act_in_order_and_contexts_from_the_outside_in(im):
    ids = tokens(10)
    index = busiest(im, ids)
    add, ablate = Steer(HOOK, index, "additive", 4.0), Steer(HOOK, index, "orthogonal", 0.0)
    with im.steering_enabled([add, ablate]):
        in_order = im(ids)
    with im.steering_enabled([ablate, add]):
        reversed_order = im(ids)
    with im.steering_enabled([add]), im.steering_enabled([ablate]):
        nested = im(ids)
    assert torch.equal(in_order, nested)
    assert not torch.allclose(in_order, reversed_order, atol=0.01)
    torch.testing.assert_close(in_order, im.steer(ids, (HOOK, index), 0.0, "orthogonal"), atol=1e-4, rtol=0)


def test_nothing_stays_on_the_model(im, model):
    ids = tokens(8)
    plain = model(ids)
    im.steer(ids, (HOOK, 1), 5.0)
    im.attribution(ids, HOOK, (3, 4))
    broken = {HOOK: lambda h: h[:, :1]}
    with (
        pytest.raises(ValueError, match="returned the shape"),
        im.steering_enabled([Steer(HOOK, 1, "clamp", 5.0)]),
        edit(model, broken),
    ):
        im(ids)
    with contextlib.suppress(KeyError), im.steering_enabled([Steer(HOOK, 1)]), im.interpretation_enabled():
        raise KeyError
    with pytest.raises(ValueError, match="ids"), im.steering_enabled([Steer(HOOK, 1)]):
        im(ids + 1000)
    stream = im.generate([1, 2, 3], [Steer(HOOK, 1, "additive", 5.0)], max_tokens=5)
    next(stream)
    assert traces(model) == []  # while the generation waits, too
    assert not model._forward_pre_hooks
    assert torch.equal(model(ids), plain)


def test_a_strength_is_given_relative_to_the_norm_of_activations(im, model):
    ids = torch.tensor([[0, 3, 4, 7, 5]])  # 0 and 7 are special
    with capture(model, [HOOK]) as acts:
        model(ids)
    mean = acts[HOOK][0, [1, 2, 4]].norm(dim=-1).mean().item()
    for mode in ("additive", "projection_cap"):
        assert im.relative_strength(Steer(HOOK, 3, mode, 2.0), ids, 1.5) == pytest.approx(3.0 / mean)
    assert im.relative_strength(Steer(HOOK, 3, "clamp", -2.0), ids, 1.5) == pytest.approx(-2.0 / mean)
    assert im.relative_strength(Steer(HOOK, 3, "scale", 2.0), ids) is None
    assert im.relative_strength(Steer(HOOK, 3, "additive", 2.0), ids[:, :1]) > 0


# ---- generating ----------------------------------------------------------------------------------------------------


def test_a_generation_is_the_engines(im, model):
    for settings in ({"temperature": 0}, {"seed": 5}, {"seed": 5, "top_k": 3, "temperature": 2.0}):
        expected = [column[0] for column in generate(model, [1, 2, 3], max_tokens=20, **settings)]
        assert [token.id for token in im.generate([1, 2, 3], max_tokens=20, **settings)] == expected
    assert [t.id for t in im.generate([1], seed=1, max_tokens=20)] != [
        t.id for t in im.generate([1], seed=2, max_tokens=20)
    ]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("positions", POSITIONS)
def test_a_steered_generation_is_greedy_on_uncached_logits(im, mode, positions):
    prompt = [0, 11, 7, 13]
    requests = [Steer(HOOK, busiest(im, tokens(30)), mode, 6.0, positions)]
    told = [token.id for token in im.generate(prompt, requests, max_tokens=12, temperature=0)]
    ids = list(prompt)
    with im.steering_enabled(requests, prompt_length=4):
        for _ in range(12):
            ids.append(int(im(torch.tensor([ids]))[0, -1].argmax()))
    assert told == ids[4:]


def test_every_token_comes_with_its_active_features(im):
    requests = [Steer(HOOK, 9, "clamp", 30.0, "generated")]
    told = list(im.generate([5, 6, 7], requests, max_tokens=10, seed=3, echo=True))
    ids = torch.tensor([[token.id for token in told]])
    assert ids[0, :3].tolist() == [5, 6, 7]
    assert [token.position for token in told] == list(range(13))
    assert [token.generated for token in told] == [False] * 3 + [True] * 10
    assert "".join(token.text for token in told) == "".join(f"[{i}]" for i in ids[0].tolist())
    with im.steering_enabled(requests, prompt_length=3), im.interpretation_enabled():
        im(ids)
        values, indices = im.get_active_features()
    for i, token in enumerate(told):
        pairs = dict(token.features[HOOK])
        assert list(pairs) == indices[0, i][values[0, i] > 0].tolist()
        assert list(pairs.values()) == pytest.approx(values[0, i][values[0, i] > 0].tolist(), abs=1e-4)
        assert (9 in pairs) == token.generated
    (short,) = im.generate([5, 6, 7], max_tokens=1, features=2)
    assert short.position == 3
    assert len(short.features[HOOK]) == 2


def test_features_of_a_generation_may_be_negative(model):
    im = InterpretableModel(model, {HOOK: toy_sae("abstopk", C, 64, k=5)})
    (token,) = im.generate([5, 6, 7], max_tokens=1)
    with im.interpretation_enabled():
        im(torch.tensor([[5, 6, 7, token.id]]))
        values, indices = im.get_active_features()
    pairs = token.features[HOOK]
    assert [i for i, _ in pairs] == indices[0, -1].tolist()
    assert [v for _, v in pairs] == pytest.approx(values[0, -1].tolist(), abs=1e-4)
    assert any(v < 0 for _, v in pairs)


def test_a_generation_ends_at_a_stop_token_and_at_the_last_position(im, model):
    free = [token.id for token in im.generate([1, 2], max_tokens=30, seed=4)]
    stop = free[10]
    stopped = [token.id for token in im.generate([1, 2], max_tokens=30, seed=4, stop_tokens=[stop])]
    assert stopped == free[: free.index(stop)]
    limit = model.config.max_positions
    prompt = tokens(limit - 2)[0].tolist()
    assert len(list(im.generate(prompt, max_tokens=2))) == 2


def test_two_generations_may_go_on_by_turns(im):
    push = [Steer(HOOK, 9, "additive", 20.0)]
    alone = [[t.id for t in im.generate([1, 2], steer, max_tokens=9, temperature=0)] for steer in ((), push)]
    both = zip(
        im.generate([1, 2], max_tokens=9, temperature=0),
        im.generate([1, 2], push, max_tokens=9, temperature=0),
        strict=True,
    )
    assert [list(ids) for ids in zip(*((a.id, b.id) for a, b in both), strict=True)] == alone
    assert alone[0] != alone[1]


def test_text_goes_in_and_whole_characters_come_out(monkeypatch):
    tokenizer = Tokenizer({bytes([i]): i for i in range(256)})
    model = tiny("G7", vocab_size=tokenizer.vocab_size)
    im = InterpretableModel(model, {HOOK: toy_sae("topk", C, 64)}, tokenizer)
    told = list(im.generate("héllo", max_tokens=1, echo=True))
    assert [token.text for token in told][:7] == ["<|bos|>", "h", "", "é", "l", "l", "o"]
    script = iter("aß→😀".encode())
    monkeypatch.setattr("bridge.nanochat.engine._sample", lambda logits, *_: torch.tensor([next(script)]))
    assert [token.text for token in im.generate("x", max_tokens=10)] == ["a", "", "ß", "", "", "→", "", "", "", "😀"]


def test_the_packaged_nanochat_says_what_its_tokenizer_decodes():
    nano = bridge.nanochat.load("demo")
    im = InterpretableModel.from_nanochat(nano, {"blocks.0.hook_resid_post": toy_sae("topk", nano.config.n_embd, 256)})
    told = list(im.generate("def main(argv):\n", max_tokens=40, temperature=0, echo=True))
    assert "".join(token.text for token in told) == nano.tokenizer.decode(token.id for token in told)
    assert [token.id for token in told if not token.generated] == nano.tokenizer.encode("def main(argv):\n", True)


def test_a_context_around_a_generation_sees_it_before_its_steering(im):
    with im.interpretation_enabled():
        told = list(im.generate([1, 2, 3], [Steer(HOOK, 9, "clamp", 50.0)], max_tokens=4))
        seen = im.get_active_features(whole_text=True)
    assert seen.values.shape == (1, 7, 4)
    assert all(token.features[HOOK][0][0] == 9 for token in told)
    assert (seen.indices[..., 0] != 9).any()


# ---- attribution ---------------------------------------------------------------------------------------------------


def difference(im, ids, hook, index, at, by, target):
    """Return the derivative of the target by one activation of a feature at one position."""
    row = im.sae(hook).W_dec[index]
    scores = []
    for step in (by, -by):
        with edit(
            im.model,
            {
                hook: lambda h, step=step: h.index_put(
                    (torch.tensor([0]), torch.tensor([at])), step * row, accumulate=True
                )
            },
        ):
            scores.append(float(target(im(ids).double())))
    return (scores[0] - scores[1]) / (2 * by)


@pytest.mark.parametrize("form", FORMS)
def test_attribution_is_activation_times_the_finite_difference(model, form):
    im, ids = InterpretableModel(model, {HOOK: toy_sae(form, C, 64)}), tokens(9, rows=1)
    for target, function in (
        ((5, 17), lambda logits: logits[0, 5, 17]),
        (lambda logits: logits.log_softmax(-1)[0, -1, 3], lambda logits: logits.log_softmax(-1)[0, -1, 3]),
    ):
        found = im.attribution(ids, None, target)
        with im.interpretation_enabled():
            im(ids)
            activations = im.get_active_features(top_k=64).dense()
        dense = found.dense()
        assert dense.abs().sum() > 0
        assert not dense[activations == 0].any()
        for at, rank in itertools.product((2, 5, 8), (0, 1)):
            index = int(found.indices[0, at, rank])
            slope = difference(im, ids, HOOK, index, at, 1e-2, function)
            assert dense[0, at, index].item() == pytest.approx(activations[0, at, index].item() * slope, abs=2e-3)
        assert (found.values.abs()[..., :-1] >= found.values.abs()[..., 1:]).all()


def test_later_tokens_have_no_attribution(im):
    found = im.attribution(tokens(9), HOOK, (4, 3)).dense()
    assert found[:, :5].abs().sum() > 0
    assert not found[:, 5:].any()


def test_every_row_has_its_own_causes(im):
    ids = tokens(9)
    found = im.attribution(ids, HOOK, (4, 3)).dense()
    for row in (0, 1):
        alone = im.attribution(ids[row : row + 1], HOOK, (4, 3)).dense()
        torch.testing.assert_close(found[row], alone[0], atol=1e-5, rtol=1e-4)


def test_attribution_leaves_no_gradient_and_works_without_any(im):
    model = tiny("G7").requires_grad_(True)
    trainable = InterpretableModel(model, im.saes)
    expected = trainable.attribution(tokens(9), HOOK, (4, 3))
    assert all(weight.grad is None for weight in model.parameters())
    with torch.no_grad():
        torch.testing.assert_close(im.attribution(tokens(9), HOOK, (4, 3)).values, expected.values)
    assert not expected.values.requires_grad


@pytest.mark.parametrize(
    ("target", "complaint"),
    [
        ((9, 0), "no logit at position 9 for token 0: there are 9 positions and 50 tokens"),
        ((0, 50), "no logit at position 0 for token 50"),
        (lambda logits: logits[0, 0], "one number computed from the logits"),
        (lambda logits: torch.zeros(()), "one number computed from the logits"),
    ],
)
def test_a_target_that_is_none_is_refused(im, target, complaint):
    with pytest.raises(ValueError, match=complaint):
        im.attribution(tokens(9), HOOK, target)
    assert traces(im.model) == []


# ---- other models, other files -------------------------------------------------------------------------------------


def test_another_authors_model_works_too():
    model = UpstreamLike()
    im = InterpretableModel(model, {"blocks.1.hook_mlp_out": toy_sae("topk", 8, 16)})
    ids = torch.arange(6).reshape(2, 3)
    with im.interpretation_enabled():
        plain = im(ids)
        assert im.get_active_features().values.shape == (2, 3, 4)
    steered = im.steer(ids, ("blocks.1.hook_mlp_out", 5), 2.0)
    torch.testing.assert_close(steered, plain + 2.0 * im.sae().W_dec[5])
    assert im.attribution(ids, None, (2, 3)).values.shape == (2, 3, 4)
    assert traces(model) == []


def test_a_model_that_makes_no_cache_generates_the_same(im, model):
    class Upstream(torch.nn.Module):
        """The rooms and the config of upstream's GPT, and its way to be called."""

        def __init__(self):
            super().__init__()
            self.inner = model
            self.transformer, self.lm_head = model.transformer, model.lm_head
            self.config = type("Config", (), {"sequence_len": model.config.sequence_len})

        def forward(self, idx, targets=None, kv_cache=None, loss_reduction="mean"):
            return self.inner(idx)

    theirs = InterpretableModel(Upstream(), im.saes, SomeSpecial())
    for positions in POSITIONS:
        requests = [Steer(HOOK, 9, "clamp", 15.0, positions)]
        ours, other = (list(m.generate([1, 7, 3], requests, max_tokens=8, seed=2, echo=True)) for m in (im, theirs))
        assert [t.id for t in ours] == [t.id for t in other]
        assert [[i for i, _ in t.features[HOOK]] for t in ours] == [[i for i, _ in t.features[HOOK]] for t in other]
    with pytest.raises(ValueError, match="4000 positions"):
        theirs.generate([1] * 4000, max_tokens=1)


def test_upstreams_cache_tells_where_a_chunk_starts(im, model):
    class KVCache:
        def __init__(self):
            self.ours = model.new_cache(1)

        def get_pos(self):
            return self.ours.position

    class Upstream(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.transformer = model, model.transformer

        def forward(self, idx, targets=None, kv_cache=None):
            return self.inner(idx, cache=kv_cache.ours)

    theirs, ids, cache = InterpretableModel(Upstream(), im.saes), tokens(12, rows=1), KVCache()
    with im.steering_enabled([Steer(HOOK, 9, "additive", 9.0, "generated")], prompt_length=5):
        expected = im(ids)
    with theirs.steering_enabled([Steer(HOOK, 9, "additive", 9.0, "generated")], prompt_length=5):
        pieces = [theirs(chunk, kv_cache=cache) for chunk in ids.split((3, 4, 5), dim=1)]
    torch.testing.assert_close(torch.cat(pieces, dim=1), expected, atol=1e-4, rtol=0)


def test_saes_are_found_in_a_run_a_folder_and_by_themselves(tmp_path):
    run = tmp_path / "run"
    export(toy_sae("topk", C, 64, hook_name=HOOK), run / "sae" / HOOK)
    export(toy_sae("jumprelu", C, 64), run / "sae" / EARLY)
    (run / "checkpoints").mkdir()
    for path in (run, run / "sae", str(run)):
        assert set(load_saes(path)) == {HOOK, EARLY}
    assert list(load_saes(run / "sae" / HOOK)) == [HOOK]
    (run / "sae" / HOOK).rename(tmp_path / "renamed")
    (sae,) = load_saes(tmp_path / "renamed").values()
    assert sae.architecture == "topk"


def test_a_directory_without_saes_is_refused_with_its_contents(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "metrics.jsonl").touch()
    with pytest.raises(FileNotFoundError, match=r"contains checkpoints, metrics\.jsonl: give an exported SAE"):
        load_saes(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"no SAE at .*nowhere"):
        load_saes(tmp_path / "nowhere")
    nameless = export(toy_sae("topk", C, 64), tmp_path / "saes" / "mine")
    with pytest.raises(ValueError, match=r"does not say which activation it reads: no hook is called 'mine'"):
        load_saes(nameless)
    export(toy_sae("topk", C, 64, hook_name=HOOK), tmp_path / "two" / "a")
    export(toy_sae("topk", C, 64, hook_name=HOOK), tmp_path / "two" / "b")
    with pytest.raises(ValueError, match=f"two SAEs of {HOOK}"):
        load_saes(tmp_path / "two")


def test_of_a_sweep_the_variants_are_named(tmp_path):
    for variant in ("k8", "k16"):
        export(toy_sae("topk", C, 64, hook_name=HOOK), tmp_path / "sweep" / variant / "sae" / HOOK)
    (tmp_path / "sweep" / "checkpoints").mkdir()
    with pytest.raises(FileNotFoundError, match=r"is a sweep.* give one of them, such as .*k16; there are k16, k8$"):
        load_saes(tmp_path / "sweep")
    assert list(load_saes(tmp_path / "sweep" / "k8")) == [HOOK]


def test_partial_and_outdated_exports_are_not_saes(tmp_path):
    for name in (HOOK, f"{HOOK}.unfinished", f"{EARLY}.outdated"):
        export(toy_sae("topk", C, 64), tmp_path / "run" / "sae" / name)
    assert list(load_saes(tmp_path / "run")) == [HOOK]


OTHERS = {
    "transcoder": (
        sae_config("relu", C, 64, d_out=C),
        {"hook_name": "blocks.1.ln2.hook_normalized", "hook_name_out": "blocks.1.hook_mlp_out"},
        "is a transcoder, which predicts blocks.1.hook_mlp_out from its input",
    ),
    "crosscoder": (
        sae_config("relu", 3 * C, 64, layers=3),
        {"hook_name": EARLY, "hook_names": [EARLY, HOOK, LATE]},
        "is a crosscoder, which reconstructs 3 layers from one code",
    ),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_transcoders_and_crosscoders_are_refused_by_name(kind, model, tmp_path):
    config, metadata, complaint = OTHERS[kind]
    random = np.random.default_rng(0)
    shapes = {"W_enc": (64, config.d_in), "W_dec": (64, config.width_out), "b_dec": config.width_out, "b_enc": 64}
    weights = {name: random.standard_normal(shape) for name, shape in shapes.items()}
    folder = tmp_path / "run" / "sae" / EARLY
    write(folder, config, weights, 1.0, 1.0, metadata)
    with pytest.raises(ValueError, match=f"{complaint}.*bridge.torch_sae.load to get it as a module"):
        load_saes(tmp_path / "run")
    with pytest.raises(ValueError, match=f"the SAE of {EARLY} {complaint}"):
        InterpretableModel(model, {EARLY: torch_sae.load(folder)})


def test_transcoders_are_tracked_where_that_is_asked_for_and_never_steered(model):
    transcoder = toy_transcoder(1, C, 64)
    hook = transcoder.metadata["hook_name"]
    im = InterpretableModel(model, {hook: transcoder}, transcoders=True)
    tokens = torch.arange(6)[None]
    with torch.no_grad(), capture(model, [hook]) as acts, im.interpretation_enabled():
        im(tokens)
    features = im.get_active_features(top_k=3)
    expected = transcoder.encode(acts[hook]).topk(3, dim=-1)
    torch.testing.assert_close(features.values, expected.values)
    with pytest.raises(ValueError, match=f"the SAE of {hook} is a transcoder"):
        im.steer(tokens, (hook, 0), 1.0)
    with pytest.raises(ValueError, match=f"the SAE of {hook} is a transcoder"):
        im.attribution(tokens, hook, (0, 1))


@pytest.mark.parametrize(
    ("saes", "complaint"),
    [
        ({}, "no SAE was given"),
        ({HOOK: ("topk", 16)}, f"the SAE of {HOOK} reads 16 channels, but this model has 32"),
        ({"blocks.4.hook_mlp_out": ("topk", C)}, "the model has 4 layers, 0 to 3"),
        ({"blocks.1.hook_resid_pre": ("topk", C)}, "no hook is called 'blocks.1.hook_resid_pre': names are"),
    ],
)
def test_an_sae_of_another_width_or_layer_is_refused(model, saes, complaint):
    with pytest.raises(ValueError, match=complaint):
        InterpretableModel(model, {name: toy_sae(form, width, 64) for name, (form, width) in saes.items()})


def test_an_sae_of_another_checkpoint_is_refused(model):
    saes = {HOOK: toy_sae("topk", C, 64, model_fingerprint="abc")}
    InterpretableModel(model, saes)
    InterpretableModel(model, saes, fingerprint="abc")
    InterpretableModel(model, {HOOK: toy_sae("topk", C, 64)}, fingerprint="def")
    with pytest.raises(ValueError, match="trained on the checkpoint with sha256 abc, but this one has def"):
        InterpretableModel(model, saes, fingerprint="def")


@pytest.mark.parametrize(
    ("call", "complaint"),
    [
        (lambda im: im.steer(tokens(3), (HOOK, 128), 1.0), f"{HOOK}: no feature 128: this SAE has features 0 to 127"),
        (lambda im: im.steer(tokens(3), (EARLY, 1), 1.0), f"no SAE at '{EARLY}': choose one of {HOOK}"),
        (lambda im: im.steer(tokens(3), (HOOK, 1), float("nan")), "must be a finite number"),
        (lambda im: im.steer(tokens(3), (HOOK, 1), 1.0, "push"), "no steering mode 'push'"),
        (lambda im: im.steer(tokens(3), (HOOK, 1), 1.0, positions="prompt"), "need prompt_length"),
        (lambda im: im.generate([], max_tokens=3), "the prompt is empty"),
        (lambda im: im.generate("", max_tokens=3), "the prompt is empty"),
        (lambda im: im.generate([1] * 4000, max_tokens=1), "exceed the model's 4000 positions"),
        (lambda im: im.generate([1], max_tokens=0), "max_tokens"),
        (lambda im: im.generate([1], [Steer(HOOK, 500)], max_tokens=1), "features 0 to 127"),
        (lambda im: list(im.generate([1], max_tokens=1, features=0)), "k is 0"),
        (lambda im: im.steer(torch.zeros(1, 4001).long(), (HOOK, 1), 1.0), "at most 4000 .* have positions"),
    ],
)
def test_invalid_requests_are_refused_with_the_allowed_values(im, call, complaint):
    with pytest.raises(ValueError, match=complaint):
        call(im)
    assert traces(im.model) == []


def test_without_a_tokenizer_text_and_special_tokens_are_refused(model):
    im = InterpretableModel(model, {HOOK: toy_sae("topk", C, 64)})
    with pytest.raises(ValueError, match="a text prompt needs a tokenizer"):
        im.generate("def", max_tokens=3)
    with pytest.raises(ValueError, match="'not_special' need a tokenizer"):
        im.steer(tokens(3), (HOOK, 1), 1.0, positions="not_special")
    assert [token.text for token in im.generate([1, 2], max_tokens=3)] == [""] * 3


def test_the_runtime_runs_without_jax():
    check = "import sys; sys.modules['jax'] = None; import bridge.runtime"
    done = subprocess.run(
        [sys.executable, "-c", check], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
