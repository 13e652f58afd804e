"""Hooks on models that are compiled, wrapped, replaced or traced: they fire, or somebody says that they did not."""

import copy
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from test_hooks import UpstreamLike, traces
from torch import nn

from bridge import hooks
from bridge.hooks import capture, edit
from bridge.passes import unwrapped

NAMES = [hooks.hook_name(layer, site) for layer in range(2) for site in hooks.SITES]
DEEP, SHALLOW = "blocks.1.hook_resid_post", "blocks.0.hook_mlp_out"


@pytest.fixture(autouse=True)
def nothing_compiled() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def model() -> UpstreamLike:
    torch.manual_seed(0)
    return UpstreamLike()


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.arange(6).reshape(2, 3)


def run(code: str) -> None:
    """Runs a program in a process of its own."""
    program = [sys.executable, "-c", code]
    done = subprocess.run(program, cwd=Path(__file__).parents[1], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]


class Counted:
    """A backend that computes what it is given, and counts how often it compiles and runs."""

    def __init__(self):
        self.compiled = self.ran = 0

    def __call__(self, graph, inputs):
        self.compiled += 1

        def run(*args):
            self.ran += 1
            return graph(*args)

        return run


def whole(model: nn.Module, **settings) -> nn.Module:
    return torch.compile(model, **settings)


def in_place(model: nn.Module, **settings) -> nn.Module:
    model.compile(**settings)
    return model


def blocks(model: nn.Module, **settings) -> nn.Module:
    for i, block in enumerate(model.transformer.h):
        model.transformer.h[i] = torch.compile(block, **settings)
    return model


def blocks_in_place(model: nn.Module, **settings) -> nn.Module:
    for block in model.transformer.h:
        block.compile(**settings)
    return model


def halves(model: nn.Module, **settings) -> nn.Module:
    for block in model.transformer.h:
        block.mlp = torch.compile(block.mlp, **settings)
        block.attn.compile(**settings)
    return model


def its_forward(model: nn.Module, **settings) -> nn.Module:
    model.forward = torch.compile(model.forward, **settings)
    return model


def within_data_parallel(model: nn.Module, **settings) -> nn.Module:
    return nn.DataParallel(torch.compile(model, **settings))


def around_data_parallel(model: nn.Module, **settings) -> nn.Module:
    return torch.compile(nn.DataParallel(model), **settings)


WAYS: tuple[Callable[..., nn.Module], ...] = (
    *(whole, in_place, blocks, blocks_in_place, halves, its_forward),
    *(within_data_parallel, around_data_parallel),
)


@torch.no_grad()
def hooks_fire(wrapped: nn.Module, plain: nn.Module, tokens: torch.Tensor, model: nn.Module) -> None:
    """On `model`, whichever of it and `wrapped` is run: as on the plain model."""
    with capture(plain, NAMES) as expected:
        output = plain(tokens)
    with capture(model, NAMES) as acts:
        assert torch.equal(wrapped(tokens), output)
    assert set(acts) == set(NAMES)
    assert all(torch.equal(acts[name], expected[name]) for name in NAMES)
    with capture(model, [SHALLOW], stop=True) as acts:
        assert wrapped(tokens) is None
    assert torch.equal(acts[SHALLOW], expected[SHALLOW])
    for name in NAMES:
        with edit(plain, {name: lambda x: 2 * x}):
            edited = plain(tokens)
        assert not torch.equal(edited, output)
        with edit(model, {name: lambda x: 2 * x}):
            assert torch.equal(wrapped(tokens), edited)
    assert torch.equal(wrapped(tokens), output)


@pytest.mark.parametrize("ran", [False, True])
@pytest.mark.parametrize("way", WAYS)
@torch.no_grad()
def test_hooks_fire_on_a_compiled_model_before_and_after_it_has_run(way, ran, model, tokens):
    plain, backend = copy.deepcopy(model), Counted()
    wrapped = way(model, backend=backend)
    own = traces(model)
    if ran:
        wrapped(tokens)
    for hooked in (wrapped, unwrapped(wrapped)):
        hooks_fire(wrapped, plain, tokens, hooked)
    compiled, had = backend.compiled, backend.ran
    assert compiled > 0
    wrapped(tokens)
    assert torch.equal(wrapped(tokens), plain(tokens))
    assert backend.ran > had  # the compiled code is used again
    assert traces(model) == own


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_hooks_fire_on_a_graph_without_breaks(backend, model, tokens):
    plain = copy.deepcopy(model)
    wrapped = torch.compile(model, backend=backend, fullgraph=True)
    with torch.no_grad():
        wrapped(tokens)
    hooks_fire(wrapped, plain, tokens, wrapped)


THIS_PROJECTS_MODEL = """
import copy, sys, torch
sys.path.insert(0, "tests")
from test_hooks_compiled import hooks_fire
from tiny_nanochat import tiny
model, ids = tiny("G7"), torch.randint(0, 50, (2, 12), generator=torch.Generator().manual_seed(1))
plain = copy.deepcopy(model)
wrapped = torch.compile(model, backend="eager")
with torch.no_grad():
    wrapped(ids)
hooks_fire(wrapped, plain, ids, wrapped)
"""


def test_hooks_fire_on_this_projects_model_compiled():
    """In a process of its own: pytest has types of arguments checked, which cannot be compiled."""
    run(THIS_PROJECTS_MODEL)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # inductor's own imports
def test_hooks_fire_on_what_inductor_compiled(model, tokens):
    wrapped = torch.compile(model)
    with torch.no_grad():
        output = wrapped(tokens)
        with capture(wrapped, [DEEP]) as acts:
            torch.testing.assert_close(wrapped(tokens), output)
        torch.testing.assert_close(acts[DEEP], output)
        with edit(wrapped, {DEEP: torch.zeros_like}):
            assert not wrapped(tokens).any()
        torch.testing.assert_close(wrapped(tokens), output)


@pytest.mark.parametrize("way", WAYS)
def test_a_model_compiled_within_the_context_keeps_nothing_of_it(way, model, tokens):
    plain, backend = copy.deepcopy(model), Counted()
    with torch.no_grad():
        output = plain(tokens)
        with edit(model, {SHALLOW: torch.zeros_like}):
            wrapped = way(model, backend=backend)
            edited = wrapped(tokens)
        assert not torch.equal(edited, output)
        assert torch.equal(wrapped(tokens), output)
        assert torch.equal(wrapped(tokens), output)
    hooks_fire(wrapped, plain, tokens, unwrapped(wrapped))


COMPILED_BEFORE_ANYBODY_COMPILED = """
import sys, torch
sys.path.insert(0, "tests")
from test_hooks import UpstreamLike
from bridge.hooks import capture, edit
assert "torch._dynamo" not in sys.modules, "hooks must not import the compiler"
model, tokens = UpstreamLike(), torch.arange(6).reshape(2, 3)
name = "blocks.1.hook_resid_post"
with torch.no_grad():
    output = model(tokens)
    with capture(model, [name]) as acts:
        model(tokens)
    assert "torch._dynamo" not in sys.modules, "hooks must not import the compiler"
    with edit(model, {name: torch.zeros_like}), capture(model, [name]) as acts:
        compiled = torch.compile(model, backend="eager")
        edited = compiled(tokens)
    assert name in acts and not edited.any(), "the hooks fired"
    for _ in range(2):
        assert torch.equal(compiled(tokens), output), "nothing of them stayed"
    with edit(model, {name: torch.ones_like}):
        assert (compiled(tokens) == 1).all()
"""


def test_the_first_compilation_of_a_process_may_happen_within_a_context():
    run(COMPILED_BEFORE_ANYBODY_COMPILED)


# ---- wrapped -------------------------------------------------------------------------------------------------------


def test_hooks_fire_within_data_parallel_wrappers(model, tokens, tmp_path):
    plain = copy.deepcopy(model)
    hooks_fire(nn.DataParallel(model), plain, tokens, nn.DataParallel(model))
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(model)
        hooks_fire(wrapped, plain, tokens, wrapped)
    finally:
        torch.distributed.destroy_process_group()


def test_copies_on_several_devices_are_refused(model):
    wrapped = nn.DataParallel(model)
    wrapped.device_ids = [0, 1]
    with pytest.raises(ValueError, match=r"2 devices.*give its \.module"), capture(wrapped, [DEEP]):
        pass


def test_a_traced_or_scripted_model_is_refused(model, tokens):
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # torch.jit is deprecated, and still in use
        traced = torch.jit.trace(model, tokens)
        model.transformer.h[1] = torch.jit.trace(model.transformer.h[1], torch.zeros(2, 3, 8))
    with pytest.raises(ValueError, match="is traced or scripted"), capture(traced, [DEEP]):
        pass
    with pytest.raises(ValueError, match="is traced or scripted"), capture(model, ["blocks.1.hook_mlp_out"]):
        pass


def test_a_graph_of_a_model_is_refused(model):
    graph = torch.fx.symbolic_trace(model)
    with pytest.raises(ValueError, match=r"has no transformer.h\[i\]"), capture(graph, [DEEP]):
        pass


# ---- what a pass does not reach -------------------------------------------------------------------------------------


def contexts(model: nn.Module) -> list:
    return [capture(model, [DEEP]), edit(model, {DEEP: lambda x: x})]


def past_the_module(model: nn.Module) -> Callable:
    first, second = model.transformer.h
    return lambda tokens: second.forward(first(model.transformer.wte(tokens)))


def replayed(model: nn.Module) -> Callable:
    """As torch.cuda.make_graphed_callables leaves a model: a graph is replayed on static memory."""
    static = torch.zeros(2, 3, 8)
    return lambda tokens: static


def test_a_block_that_was_replaced_within_the_context_is_noticed(model, tokens):
    for context in contexts(model):
        with context:
            model(tokens)
            model.transformer.h[1] = UpstreamLike.Block()
            for forward in (model, model.forward):
                with pytest.raises(ValueError, match=rf"pass of the UpstreamLike did not reach {DEEP}"):
                    forward(tokens)
    with capture(model, [DEEP]) as acts:
        output = model(tokens)
    assert torch.equal(acts[DEEP], output)


@pytest.mark.parametrize("made", [past_the_module, replayed])
def test_a_forward_that_passes_the_hooks_by_is_noticed(made, model, tokens):
    model.forward = forward = made(model)
    for context in contexts(model):
        with context:
            for run in (model, model.forward):
                with pytest.raises(ValueError, match=rf"did not reach {DEEP}"):
                    run(tokens)
    assert vars(model)["forward"] is forward


@pytest.mark.parametrize("made", [past_the_module, replayed])
def test_a_forward_that_was_put_in_within_the_context_is_noticed(made, model, tokens):
    forward = made(model)
    for context in contexts(model):
        with context:
            model.forward = forward
            with pytest.raises(ValueError, match="without the forward pass in which hooks fire"):
                model(tokens)
        assert vars(model)["forward"] is forward
        del model.forward


def test_an_activation_that_did_not_come_by_is_not_just_missing(model, tokens):
    with capture(model, [DEEP]) as acts:
        pass
    assert dict(acts) == {}
    with pytest.raises(ValueError, match=rf"nothing was captured at {DEEP}: no forward pass"):
        acts[DEEP]
    with capture(model, [DEEP]) as acts:
        model(tokens)
    with pytest.raises(KeyError, match=rf"{SHALLOW} is not captured; captured are {DEEP}"):
        acts[SHALLOW]


def test_a_wrapper_that_never_runs_the_model_is_noticed(model, tokens):
    """As what was compiled ahead of time does."""
    wrapped = torch.compile(model, backend="eager")
    wrapped.forward = lambda tokens: torch.zeros(2, 3, 8)
    with edit(wrapped, {DEEP: lambda x: x}), pytest.raises(ValueError, match="without the forward pass in which"):
        wrapped(tokens)


def test_contexts_without_a_pass_do_not_complain(model):
    with capture(model, [DEEP]), edit(model, {SHALLOW: lambda x: x}), capture(model, [SHALLOW], stop=True):
        pass


def test_a_pass_that_was_stopped_need_not_reach_what_lies_deeper(model, tokens):
    with edit(model, {DEEP: lambda x: x}), capture(model, [SHALLOW], stop=True) as acts:
        assert model(tokens) is None
    assert set(acts) == {SHALLOW}
    with capture(model, [SHALLOW], stop=True), capture(model, [DEEP]) as acts:
        assert model(tokens) is None
    with pytest.raises(ValueError, match="or it was stopped before"):
        acts[DEEP]


def test_an_exception_in_a_pass_propagates_and_the_next_pass_is_checked_again(model, tokens):
    failing = True

    def sometimes(x):
        if failing:
            raise ZeroDivisionError
        return x

    with edit(model, {SHALLOW: sometimes}), capture(model, [DEEP]) as acts:
        with pytest.raises(ZeroDivisionError):
            model(tokens)
        assert DEEP not in acts
        failing = False
        model(tokens)
        assert DEEP in acts
    assert traces(model) == []


def test_a_hook_may_run_the_model_itself(model, tokens):
    def look(x):
        if not inner:
            inner.append(None)
            inner[0] = model(tokens)
        return x

    inner = []
    with edit(model, {SHALLOW: look}), capture(model, [DEEP]) as acts:
        output = model(tokens)
    assert torch.equal(inner[0], output)
    assert torch.equal(acts[DEEP], output)


def test_contexts_may_close_in_any_order(model, tokens):
    output = model(tokens)
    first, second = capture(model, [DEEP]), edit(model, {SHALLOW: torch.zeros_like})
    acts = first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert not torch.equal(model(tokens), output)
    assert dict(acts) == {}
    second.__exit__(None, None, None)
    assert torch.equal(model(tokens), output)
    assert traces(model) == []


def test_a_copy_made_within_a_context_runs_its_own_weights_without_the_hooks(model, tokens):
    with edit(model, {DEEP: lambda x: x + 1}), capture(model, [DEEP]) as acts:
        other = copy.deepcopy(model)
        with torch.no_grad():
            for weight in other.parameters():
                weight.zero_()
        assert not other(tokens).any()
        assert dict(acts) == {}
        assert model(tokens).any()
    assert not other(tokens).any()
