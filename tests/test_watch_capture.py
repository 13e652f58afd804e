"""Listening to a training's forward passes: what is heard is what was computed, and nothing else changes."""

import copy
import threading

import numpy as np
import pytest
import torch
import upstream_loop
from tiny_nanochat import tiny, tokens
from torch import nn

from bridge import hooks
from bridge.hooks import hook_name
from bridge.live.capture import Capture

NAMES = [hook_name(layer, site) for layer in range(2) for site in hooks.SITES]
BOS = upstream_loop.VOCAB - 9


def ids(seed: int = 0, rows: int = 4) -> torch.Tensor:
    return upstream_loop.batch(seed, 0, 0, rows)[0]


@pytest.fixture
def model() -> upstream_loop.GPT:
    torch.manual_seed(0)
    return upstream_loop.GPT()


def listening(model: nn.Module, names=NAMES, excluded=(), drop_sinks=False, seed=0) -> Capture:
    return Capture(model, names, excluded=excluded, drop_sinks=drop_sinks, seed=seed)


def expected(model: nn.Module, x: torch.Tensor, names=NAMES) -> list[np.ndarray]:
    with hooks.capture(model, names) as acts, torch.no_grad():
        model(x)
    return [acts[name].flatten(0, 1).numpy() for name in names]


def assert_same(heard: list[np.ndarray], wanted: list[np.ndarray]) -> None:
    for one, other in zip(heard, wanted, strict=True):
        np.testing.assert_array_equal(one, other)


def test_a_pass_is_heard_at_every_kind_of_hook(model):
    capture = listening(model)
    capture.arm(10**6, 0)
    model(ids())
    assert_same(capture.take(), expected(model, ids()))
    assert capture.take() is None


def test_a_model_of_this_project_is_heard_too():
    model = tiny("G7").train()
    capture = listening(model)
    capture.arm(10**6, 0)
    model(tokens(12))
    assert_same(capture.take(), expected(model, tokens(12)))


def test_evaluation_copies_and_a_disarmed_watch_are_not_heard(model):
    capture = listening(model)
    model(ids())
    capture.arm(10**6, 0)
    copy.deepcopy(model)(ids())
    model.eval()
    model(ids())
    assert capture.take() is None
    model.train()
    capture.arm(0, 0)
    model(ids())
    assert capture.take() is None


def test_tokens_that_do_not_count_are_left_out(model):
    with torch.no_grad():
        model.transformer.wte.weight[5] *= 1e4
        model.transformer.wte.weight[5, 1:] = 0
    x = ids()
    capture = listening(model, ["blocks.0.hook_resid_post"], excluded=(BOS,))
    capture.arm(10**6, 0)
    model(x)
    (heard,) = capture.take()
    wanted = expected(model, x, ["blocks.0.hook_resid_post"])[0][(x != BOS).flatten().numpy()]
    np.testing.assert_array_equal(heard, wanted)


def test_a_sink_at_one_hook_leaves_the_token_out_at_all(model):
    def grow(module, inputs, output):
        output = output.clone()
        output[0, 3] *= 1000
        return output

    model.transformer.h[1].register_forward_hook(grow)
    names = ["blocks.0.hook_resid_post", "blocks.1.hook_resid_post"]
    capture = listening(model, names, drop_sinks=True)
    capture.arm(10**6, 0)
    model(ids())
    heard = capture.take()
    keep = np.ones(ids().numel(), bool)
    keep[3] = False
    assert_same(heard, [acts[keep] for acts in expected(model, ids(), names)])


def test_as_many_rows_are_taken_as_are_wanted_and_they_depend_on_step_and_seed(model):
    def taken(step: int, seed: int = 0) -> np.ndarray:
        capture = listening(model, ["blocks.1.hook_mlp_out"], seed=seed)
        capture.arm(30, step)
        for number in range(3):
            model(ids(number, rows=8))
        return capture.take()[0]

    first = taken(1)
    assert first.shape == (30, upstream_loop.WIDTH)
    rows = {row.tobytes() for row in expected(model, ids(0, rows=8), ["blocks.1.hook_mlp_out"])[0]}
    assert all(row.tobytes() in rows for row in first)
    np.testing.assert_array_equal(first, taken(1))
    assert not np.array_equal(first, taken(2))
    assert not np.array_equal(first, taken(1, seed=3))


def test_passes_of_threads_are_taken_in_an_order_of_their_own(model):
    def taken(order: list[int]) -> list[np.ndarray]:
        capture = listening(model)
        capture.arm(120, 0)
        for number in order:
            thread = threading.Thread(target=model, args=(ids(number),))
            thread.start()
            thread.join()
        return capture.take()

    forwards, backwards = taken([0, 1, 2]), taken([2, 0, 1])
    assert forwards[0].shape == (120, upstream_loop.WIDTH)
    assert_same(forwards, backwards)


def test_an_error_while_listening_does_not_reach_the_training(model, monkeypatch):
    capture = listening(model)
    monkeypatch.setattr(capture, "_hear", lambda number, value: 1 / 0)
    capture.arm(10, 0)
    assert torch.isfinite(model(ids())).all()
    assert isinstance(capture.error, ZeroDivisionError)


def test_gradients_are_the_same_bits(model):
    def gradients(listen: bool) -> list[torch.Tensor]:
        one = copy.deepcopy(model)
        capture = listening(one)
        capture.arm(100 if listen else 0, 0)
        one(*upstream_loop.batch(1, 0, 0, 4)).backward()
        return [weight.grad for weight in one.parameters()]

    assert all(torch.equal(a, b) for a, b in zip(gradients(True), gradients(False), strict=True))


def test_nothing_stays_after_detaching(model):
    capture = listening(model)
    capture.detach()
    assert not [m for m in model.modules() if m._forward_hooks or m._forward_pre_hooks]


def test_other_models_are_refused(model):
    with pytest.raises(ValueError, match="the model has 3 layers, 0 to 2"):
        listening(model, ["blocks.3.hook_resid_post"])
    with pytest.raises(ValueError, match="hooks need a nanochat"):
        listening(nn.Linear(2, 2))


def test_compiled_code_is_whole_and_the_same_whether_anybody_listens(model):
    """The backend compiles what inductor would, without its C++."""
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    capture = listening(model)
    compiled = torch.compile(model, dynamic=False, fullgraph=True, backend="aot_eager")
    for step in range(4):
        capture.arm(10**6 if step % 2 else 0, step)
        compiled(*upstream_loop.batch(step, 0, 0, 4)).backward()
        heard = capture.take()
        assert (heard is None) == (step % 2 == 0)
        if heard is not None:
            assert_same(heard, expected(copy.deepcopy(model), ids(step)))
    assert counters["stats"]["unique_graphs"] == 1
    torch._dynamo.reset()
