"""Decoding in static memory: the tokens, logits, features and steering of the plain way, and what it leaves alone."""

import pytest
import torch
from golden_table import cases
from tiny_nanochat import SIZES, tiny, tokens
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map
from toy_saes import toy_sae

from bridge.hooks import capture, edit, hook_name
from bridge.nanochat import decoding, load
from bridge.nanochat.config import GENERATIONS
from bridge.nanochat.decoding import Decoder
from bridge.nanochat.engine import generate
from bridge.nanochat.model import GPT
from bridge.runtime import InterpretableModel, Steer
from bridge.steering import MODES, POSITIONS

C = SIZES["n_embd"]
HOOK, LATE = hook_name(1, "resid_post"), hook_name(3, "attn")


class Recording(TorchDispatchMode):
    """What a CUDA graph is on a GPU: the operations of a step, replayed on the same memory without any Python."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        assert "local_scalar" not in str(operation), "a step waits for the device"
        output = operation(*args, **(kwargs or {}))
        aliased = any(result.alias_info is not None for result in operation._schema.returns)
        if not aliased or operation._schema.is_mutable:
            self.calls.append((operation, args, kwargs or {}, None if aliased else output))
        return output

    def replay(self):
        for operation, args, kwargs, output in self.calls:
            again = operation(*args, **kwargs)
            if output is not None:
                tree_map(lambda old, new: old.copy_(new) if isinstance(old, torch.Tensor) else None, output, again)


RECORDINGS = []


def record(step, undo):
    step()
    undo()
    recording = Recording()
    with pytest.MonkeyPatch.context() as patch, recording:
        patch.setattr(GPT, "_check", lambda *arguments: None)  # it reads the ids, on a processor only
        output = step()
    RECORDINGS.append(recording)
    return recording.replay, output


@pytest.fixture
def recorded(monkeypatch):
    """Steps are recorded on this processor too, from 8 keys on."""
    RECORDINGS.clear()
    monkeypatch.setattr(decoding, "_SHORTEST", 8)
    plain = Decoder.__init__

    def recording(self, *args):
        plain(self, *args, record=record)

    monkeypatch.setattr(Decoder, "__init__", recording)
    return RECORDINGS


def logits_of(model, ids, prompt: int, decode) -> torch.Tensor:
    """Return the logits after every token behind the prompt, read one by one."""
    return torch.cat([decode(ids[:, t : t + 1]) for t in range(prompt, ids.size(1))], dim=1)


def prompted(model, ids, prompt: int):
    cache = model.new_cache(len(ids), prompt)
    with torch.no_grad():
        model(ids[:, :prompt], cache=cache)
    return cache


@pytest.mark.parametrize("way", ["run", "recorded"])
@pytest.mark.parametrize("generation", list(GENERATIONS))
def test_a_static_step_gives_the_logits_of_a_full_pass(generation, way, monkeypatch):
    monkeypatch.setattr(decoding, "_SHORTEST", 64)
    pattern = {"window_pattern": "SSSL"} if "window" in GENERATIONS[generation] else {}
    model, ids, prompt = tiny(generation, **pattern), tokens(230), 30  # longer than short windows of 200 and 128
    decoder = Decoder(model, model, prompted(model, ids, prompt), 200, record if way == "recorded" else None)
    with torch.no_grad():
        steps = [decoder.step(ids[:, t : t + 1]).clone() for t in range(prompt, 230)]
        expected = model(ids)[:, prompt:]
    torch.testing.assert_close(torch.cat(steps, dim=1), expected, atol=1e-4, rtol=0)
    assert decoder.cache.position == 230


def test_every_golden_is_decoded_in_static_memory(goldens):
    folders = cases(goldens)
    assert len(folders) >= 10
    for folder in folders:
        model = load(folder).model
        ids = tokens(40, 1)[0].tolist()
        plain, static = (
            list(generate(model, ids, max_tokens=30, temperature=0, num_samples=2, graphs=graphs))
            for graphs in (False, True)
        )
        assert static == plain, folder.name


@pytest.mark.parametrize("sampling", [{"temperature": 0}, {"seed": 3}, {"top_k": 5, "num_samples": 3}], ids=str)
def test_recorded_generations_are_the_plain_ones(sampling, recorded):
    model, ids = tiny("G7", window_pattern="SSSL"), tokens(5)[0].tolist()
    plain = list(generate(model, ids, max_tokens=60, **sampling))
    assert not recorded
    assert list(generate(model, ids, max_tokens=60, graphs=True, **sampling)) == plain
    assert len(recorded) == 3  # for 16, 32 and 64 keys: 8 are full too soon


def test_a_generation_that_is_nearly_over_is_not_recorded(recorded):
    list(generate(tiny("G7"), [1, 2], max_tokens=3, graphs=True))
    assert not recorded


def assert_equal_tokens(plain, static):
    assert [t.id for t in static] == [t.id for t in plain]
    for ours, theirs in zip(static, plain, strict=True):
        assert ours.features.keys() == theirs.features.keys()
        for hook, pairs in theirs.features.items():
            assert [i for i, _ in ours.features[hook]] == [i for i, _ in pairs]
            torch.testing.assert_close(
                torch.tensor([v for _, v in ours.features[hook]]),
                torch.tensor([v for _, v in pairs]),
                atol=1e-4,
                rtol=0,
            )


@pytest.mark.parametrize(("form", "top_k"), [("topk", None), ("topk", 3), ("jumprelu", None), ("jumprelu", 3)])
def test_features_of_recorded_steps_are_those_of_plain_ones(form, top_k, recorded):
    im = InterpretableModel(tiny("G7"), {HOOK: toy_sae(form, C, 4 * C), LATE: toy_sae("abstopk", C, 2 * C)})
    ids = tokens(5)[0].tolist()
    plain, static = (
        list(im.generate(ids, max_tokens=40, temperature=0, features=top_k, echo=True, graphs=graphs))
        for graphs in (False, True)
    )
    assert_equal_tokens(plain, static)
    assert recorded
    assert len({tuple(i for i, _ in t.features[HOOK]) for t in static}) > 10


class Specials:
    special_tokens = {"<|bos|>": 0, "<|user_start|>": 7}  # noqa: RUF012

    def token_bytes_of(self, token: int) -> bytes:
        return f"[{token}]".encode()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("positions", POSITIONS)
def test_steering_is_recorded_with_the_step(mode, positions, recorded):
    im = InterpretableModel(tiny("G7"), {HOOK: toy_sae("topk", C, 4 * C)}, Specials())
    steer = [Steer(HOOK, 7, mode, 3.0, positions)]
    ids = tokens(5)[0].tolist()
    plain, static = (
        list(im.generate(ids, steer, max_tokens=30, temperature=0, graphs=graphs)) for graphs in (False, True)
    )
    assert_equal_tokens(plain, static)
    assert recorded


def test_hooks_that_others_open_during_a_generation_take_effect(recorded):
    model, ids = tiny("G7"), tokens(5)[0].tolist()
    results = []
    for graphs in (False, True):
        seen, columns = [], generate(model, ids, max_tokens=40, temperature=0, graphs=graphs)
        ids_made = [next(columns) for _ in range(10)]
        with edit(model, {HOOK: lambda h: h + 1}), capture(model, [LATE]) as acts:
            for _ in range(5):
                ids_made.append(next(columns))
                seen.append(acts[LATE].clone())
        handle = model.transformer.h[2].register_forward_hook(lambda module, inputs, output: output * 1.1)
        ids_made += [next(columns) for _ in range(5)]
        handle.remove()
        results.append((ids_made + list(columns), torch.cat(seen)))
    assert results[0][0] == results[1][0]
    torch.testing.assert_close(results[0][1], results[1][1], atol=1e-4, rtol=0)
    assert len(recorded) >= 3


def test_a_step_that_cannot_be_recorded_runs_as_it_is_after_one_line(monkeypatch, capsys):
    def refuse(step, undo):
        step()
        undo()
        step()
        raise RuntimeError("operation not permitted when stream is capturing\nand more")

    plain_init = Decoder.__init__
    monkeypatch.setattr(Decoder, "__init__", lambda self, *args: plain_init(self, *args, record=refuse))
    model, ids = tiny("G7"), tokens(5)[0].tolist()
    plain = list(generate(model, ids, max_tokens=40, temperature=0))
    assert list(generate(model, ids, max_tokens=40, temperature=0, graphs=True)) == plain
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 1
    assert "operation not permitted when stream is capturing" in told[0]


def test_a_forward_of_unknown_doing_is_not_recorded(recorded):
    model, calls = tiny("G7"), []

    def counting(*args, **kwargs):
        calls.append(args[0].shape)
        return model(*args, **kwargs)

    list(generate(model, [1, 2, 3], max_tokens=20, forward=counting, graphs=True))
    assert len(calls) == 20
    assert not recorded


def test_a_static_cache_takes_one_token_at_a_time():
    model, ids = tiny("G7"), tokens(20)
    decoder = Decoder(model, model, prompted(model, ids, 10), 10)
    with pytest.raises(ValueError, match="one token at a time, not 2"):
        model(ids[:, :2], cache=decoder.cache)
