"""Quick labels of the explorer: from a part of the text, in bounded time, without replacing existing ones."""

import json
from pathlib import Path

import numpy as np
import pytest
from toy_saes import toy_sae

import bridge.nanochat
from bridge import quick_labels
from bridge.evaluate import Site, labels, text
from bridge.explorer.gather import Plan
from bridge.run import Run
from bridge.run.labels import automatic_hooks
from bridge.torch_sae import TorchSAE

HOOK, OTHER = "blocks.1.hook_mlp_out", "blocks.2.hook_resid_post"


@pytest.fixture(scope="module")
def nano() -> bridge.nanochat.Nanochat:
    return bridge.nanochat.load("demo")


@pytest.fixture(scope="module")
def saes(nano, tmp_path_factory) -> dict[str, TorchSAE]:
    from toy_saes import export

    from bridge import torch_sae

    folder = tmp_path_factory.mktemp("saes")
    for i, hook in enumerate((HOOK, OTHER)):
        export(toy_sae("topk", nano.config.n_embd, 48, i, hook_name=hook), folder / hook)
    return {hook: torch_sae.load(folder / hook) for hook in (HOOK, OTHER)}


@pytest.fixture(scope="module")
def plan(nano) -> Plan:
    data = f"{Path(json.__file__).parent}/*.py"
    bos = nano.tokenizer.bos_token_id
    return Plan(data=data, split="all", num_tokens=12_000, context_length=64, drop_sinks=True, excluded=(bos,))


class Clock:
    """A clock that advances one second with every call."""

    def __init__(self):
        self.now = 0

    def __call__(self) -> float:
        self.now += 1
        return self.now


def test_every_sae_without_labels_gets_those_that_an_evaluation_of_that_text_finds(nano, saes, plan, tmp_path):
    summaries = quick_labels.write(Run(tmp_path), nano, saes, plan)
    read = text.read(text.documents(plan.data, "all", nano.tokenizer), nano.tokenizer, 64, 10_000)
    table = json.loads((tmp_path / "labels.json").read_text())
    for hook, sae in saes.items():
        simple, combined = labels.describe(
            labels.firings(Site(nano.model, hook, plan.excluded, True), sae, read),
            labels.Material.of_text(read, nano.tokenizer),
        )
        assert table[hook] == labels.table(combined, simple)
        assert summaries[hook] == labels.summary(combined, simple)
        assert summaries[hook]["labelled"] > 24
    assert automatic_hooks(tmp_path) == {hook: summaries[hook]["labelled"] for hook in saes}


def test_labels_that_are_there_stay(nano, saes, plan, tmp_path):
    label = {"label": "mine", "f1": 0.5, "precision": 0.5, "recall": 0.5, "n": 3, "threshold": 0.0}
    (tmp_path / "labels.json").write_text(json.dumps({HOOK: {"3": label}, "else": {}}))
    assert list(quick_labels.write(Run(tmp_path), nano, saes, plan)) == [OTHER]
    table = json.loads((tmp_path / "labels.json").read_text())
    assert table[HOOK] == {"3": label}
    assert table["else"] == {}
    before = (tmp_path / "labels.json").read_bytes()
    assert quick_labels.write(Run(tmp_path), nano, saes, plan) == {}
    assert (tmp_path / "labels.json").read_bytes() == before


def test_no_more_is_read_when_the_time_is_over(nano, saes, plan, tmp_path):
    site = Site(nano.model, HOOK, plan.excluded, True, tokens_per_forward=1024)
    read = text.read(text.documents(plan.data, "all", nano.tokenizer), nano.tokenizer, 64, 10_000)
    clock = Clock()
    some = labels.firings(site, saes[HOOK], read, lambda: clock() > 2)
    rows = np.flatnonzero(some.counts.reshape(read.tokens.shape).any(1))
    assert rows.tolist() == list(range(3 * 1024 // 64))
    clock = Clock()
    summaries = quick_labels.write(Run(tmp_path), nano, {HOOK: saes[HOOK]}, plan, 1.0, clock)
    assert clock.now == 2  # once to see when it ends, once after the first batch
    assert summaries[HOOK]["labelled"] > 0


def test_a_part_of_the_text_is_read(nano, saes, plan, tmp_path, monkeypatch):
    sizes = []

    def reads(documents, tokenizer, row_len, max_tokens):
        sizes.append(max_tokens)
        raise FileNotFoundError

    monkeypatch.setattr(text, "read", reads)
    for tokens in (1_000, 50_000, 500_000, 10_000_000):
        with pytest.raises(FileNotFoundError):
            quick_labels.write(Run(tmp_path), nano, saes, Plan(**(vars(plan) | {"num_tokens": tokens})))
    assert sizes == [1_000, 10_000, 50_000, 100_000]


def test_a_broken_file_of_labels_is_named(nano, saes, plan, tmp_path):
    for content in ("{", "[]", '{"a": {"x": 1}}'):
        (tmp_path / "labels.json").write_text(content)
        with pytest.raises(ValueError, match=r"labels.json is broken \(\w+: "):
            quick_labels.write(Run(tmp_path), nano, saes, plan)
        assert (tmp_path / "labels.json").read_text() == content
