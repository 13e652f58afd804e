"""Compiled forward passes: the outputs of eager ones, the same hooks, one compilation per kind of layer, a fallback."""

import inspect
import types

import pytest
import torch
from tiny_nanochat import tiny, tokens

from bridge.hooks import SITES, capture, edit, hook_name
from bridge.nanochat import compiled
from bridge.nanochat import model as model_module
from bridge.nanochat.config import GENERATIONS
from bridge.nanochat.model import GPT, MLP, Attention, Block, GPTConfig

ROWS, LENGTH = 3, 300  # longer than the short windows of the tiny models
HOOKS = [hook_name(layer, site) for layer in range(4) for site in SITES]


class Counting:
    """A compiler that runs graphs as they are and counts them."""

    def __init__(self):
        self.count = 0

    def __call__(self, graph, inputs):
        self.count += 1
        return graph.forward


@pytest.fixture
def compiler(monkeypatch):
    """The types of tests are checked by wrappers that no compiler sees in use: the functions are called without."""
    for holder in (model_module, Attention, MLP, Block, GPT):
        for name, function in list(vars(holder).items()):
            if isinstance(function, types.FunctionType) and name != "init_weights":
                monkeypatch.setattr(holder, name, inspect.unwrap(function))
    torch._dynamo.reset()
    yield Counting()
    torch._dynamo.reset()


def programs(compiler, **kwargs) -> compiled.Programs:
    return compiled.Programs(8, backend=compiler, **kwargs)


@pytest.mark.parametrize("use_flex", [False, True], ids=["masks", "flex"])
@pytest.mark.parametrize("generation", ["G0", "G3", "G4e", "G7"])
def test_compiled_parts_give_the_outputs_of_an_eager_pass(generation, use_flex, compiler):
    model, ids = tiny(generation, window_pattern="SSSL" if "window" in GENERATIONS[generation] else "L"), tokens(LENGTH)
    run = programs(compiler, use_flex=use_flex)
    with torch.no_grad():
        torch.testing.assert_close(model(ids, run=run), model(ids), atol=1e-5, rtol=1e-5)
    assert compiler.count
    assert run.failure is None


def test_layers_of_one_kind_share_a_program_and_further_passes_compile_nothing(compiler):
    model, run = tiny("G7", n_layer=8, window_pattern="SSSL"), programs(compiler)
    with torch.no_grad():
        model(tokens(LENGTH), run=run)
        first = compiler.count
        model(tokens(LENGTH), run=run)
    assert first <= 2 + 4  # embedding, lambdas; short or long windows, with or without value embeddings
    assert compiler.count == first


@pytest.mark.parametrize(
    "hooks", [[name] for name in HOOKS[4:8]] + [HOOKS], ids=["attn", "mlp_in", "mlp", "out", "all"]
)
def test_hooks_capture_and_edit_in_a_compiled_pass(hooks, compiler):
    model, ids, run = tiny("G7"), tokens(LENGTH), programs(compiler)
    edits = {name: lambda h: 1.5 * h + 0.1 for name in hooks}
    passes = []
    for arguments in ({}, {"run": run}):
        with torch.no_grad(), edit(model, edits), capture(model, hooks) as acts:
            logits = model(ids, **arguments)
        passes.append({"logits": logits, **acts})
    for name, expected in passes[0].items():
        torch.testing.assert_close(passes[1][name], expected, atol=1e-4, rtol=1e-4, msg=name)
    assert compiler.count


def test_a_pass_that_stops_at_a_hook_is_compiled_up_to_it(compiler):
    model, ids, run = tiny("G7"), tokens(LENGTH), programs(compiler)
    acts = []
    for arguments in ({}, {"run": run}):
        with torch.no_grad(), capture(model, [HOOKS[5]], stop=True) as captured:
            assert model(ids, **arguments) is None
        acts.append(captured[HOOKS[5]])
    torch.testing.assert_close(*acts, atol=1e-5, rtol=1e-5)


def test_what_cannot_be_compiled_runs_eagerly_after_one_line(compiler, capsys):
    def broken(graph, inputs):
        raise RuntimeError("no compiler here\nand a long trace")

    model, ids, run = tiny("G7", window_pattern="SSSL"), tokens(LENGTH), programs(broken, use_flex=False)
    with torch.no_grad():
        assert torch.equal(model(ids, run=run), model(ids))
        assert torch.equal(model(ids, run=run), model(ids))
    told = capsys.readouterr().err.strip().splitlines()
    assert len(told) == 1
    assert "no compiler here" in told[0]
    assert "the model runs eagerly" in told[0]


def test_windows_fall_back_to_masks_where_flex_attention_cannot_be_compiled(compiler, capsys):
    def without_flex(graph, inputs):
        if any("flex_attention" in str(node.target) for node in graph.graph.nodes):
            raise RuntimeError("no flex_attention here")
        return compiler(graph, inputs)

    model, ids, run = tiny("G7", window_pattern="SSSL"), tokens(LENGTH), programs(without_flex, use_flex=True)
    with torch.no_grad():
        torch.testing.assert_close(model(ids, run=run), model(ids), atol=1e-5, rtol=1e-5)
    assert "computed with masks" in capsys.readouterr().err
    assert run.failure is None
    assert compiler.count


def test_running_out_of_memory_is_not_taken_for_a_failure_of_the_compiler(compiler):
    def full(*args):
        raise torch.OutOfMemoryError("CUDA out of memory")

    def out_of_memory(graph, inputs):
        return full

    run = programs(out_of_memory)
    with torch.no_grad(), pytest.raises(torch.OutOfMemoryError):
        tiny("G7")(tokens(LENGTH), run=run)
    assert run.failure is None


def test_a_cached_pass_is_not_compiled(compiler):
    model, ids = tiny("G7"), tokens(20)
    with torch.no_grad():
        logits = model(ids, cache=model.new_cache(2), run=programs(compiler))
        assert torch.equal(logits, model(ids, cache=model.new_cache(2)))
    assert compiler.count == 0


D20 = GPTConfig.of_generation(
    "G7", sequence_len=2048, vocab_size=65536, n_layer=20, n_head=10, n_kv_head=10, n_embd=1280
)


def test_compilation_pays_in_a_long_run_only():
    assert compiled.is_worthwhile(D20, 10, 500_000_000, 32768)
    assert not compiled.is_worthwhile(D20, 10, 4_000_000, 32768)


@pytest.mark.parametrize(
    ("choice", "device", "tokens", "reason"),
    [
        ("off", "cuda", 10**9, "--compile_model=off"),
        ("auto", "cpu", 10**9, "programs are compiled for GPUs"),
        ("on", "cpu", 10**9, "programs are compiled for GPUs"),
    ],
)
def test_the_choice_says_why(choice, device, tokens, reason):
    assert compiled.choose(choice, D20, torch.device(device), 10, tokens, 32768) == (None, reason)


def test_where_a_gpu_can_compile_long_runs_do_and_others_only_when_told(monkeypatch):
    monkeypatch.setattr(compiled, "unavailable", lambda device: None)
    chosen = {
        (choice, tokens): compiled.choose(choice, D20, torch.device("cuda"), 10, tokens, 32768)[0] is not None
        for choice in ("auto", "on")
        for tokens in (10**6, 10**9)
    }
    assert chosen == {("auto", 10**6): False, ("auto", 10**9): True, ("on", 10**6): True, ("on", 10**9): True}
