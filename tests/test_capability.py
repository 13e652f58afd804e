"""CORE tasks from a bundle made here: what is read, what is refused, how answers are scored, what steering costs."""

import json
import random
from pathlib import Path

import core_bundle
import numpy as np
import pytest
import torch
from core_bundle import BASELINES, FILES, LISTING
from tiny_nanochat import tiny
from torch import nn

from bridge.evaluate import Site, capability, eval_bundle
from bridge.evaluate.eval_bundle import Task
from bridge.hooks import edit
from bridge.nanochat import tokenizer as tokenizers
from bridge.steering import Feature, additive


@pytest.fixture
def bundle(tmp_path) -> Path:
    return core_bundle.write(tmp_path)


@pytest.fixture(scope="module")
def tokenizer() -> tokenizers.Tokenizer:
    return tokenizers.train([Path(json.__file__).read_text()], 300)


def test_a_bundle_is_read_as_upstream_orders_it(bundle):
    colours, schemata, words = eval_bundle.read(bundle)
    assert (colours.name, colours.kind, colours.shots) == ("colours", "multiple_choice", 2)
    assert (colours.delimiter, colours.baseline, schemata.delimiter) == ("\nAnswer: ", 0.25, " ")
    assert words.baseline == 0
    expected = list(FILES["words.jsonl"])
    random.Random(1337).shuffle(expected)
    assert words.examples == expected


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("core.yaml", "icl_tasks: 3", "icl_tasks must be a list"),
        ("core.yaml", "icl_tasks: [3]", "a task is a int, expected a mapping"),
        ("core.yaml", "a: [", "core.yaml is broken"),
        ("core.yaml", "[" * 5000, "core.yaml is broken"),
        ("core.yaml", "!!python/object/apply:os.system ['true']", "core.yaml is broken"),
        ("core.yaml", "a" * 2**19, "at most"),
        ("core.yaml", LISTING.replace("schemata.jsonl", "../eval_meta_data.csv"), "leads out of"),
        ("core.yaml", LISTING.replace("schemata.jsonl", "/etc/passwd"), "leads out of"),
        ("core.yaml", LISTING.replace("type: schema", "type: other"), "expected one of multiple_choice"),
        ("core.yaml", LISTING.replace("[0]", "[-1]"), "num_fewshot of schemata"),
        ("core.yaml", LISTING.replace("[1]", "[5]"), "has 5 examples, but words needs 6"),
        ("core.yaml", LISTING.replace("label: words", "label: other"), "no random baseline for other"),
        ("eval_meta_data.csv", BASELINES.replace("25", "many"), "eval_meta_data.csv is broken"),
        ("eval_meta_data.csv", BASELINES.replace("25", "100"), "expected 0 to below 100"),
        ("eval_data/words.jsonl", '{"context": "a", "continuation": " "}\n', "line 1, is no example of language"),
        ("eval_data/words.jsonl", "[" * 5000 + "\n", "line 1, is no example of language"),
        ("eval_data/schemata.jsonl", '{"continuation": "a", "context_options": ["b", "c"], "gold": 2}', "line 1"),
        ("eval_data/schemata.jsonl", '{"continuation": "a", "context_options": ["b", "c"], "gold": true}', "line 1"),
    ],
)
def test_bundles_that_are_broken_or_hostile_are_refused_by_name(bundle, name, content, complaint):
    (bundle / name).write_text(content)
    with pytest.raises(ValueError, match=complaint) as error:
        eval_bundle.read(bundle)
    assert len(str(error.value)) < 500
    assert "\n" not in str(error.value)


def test_missing_files_are_named(bundle, monkeypatch):
    (bundle / "eval_data" / "words.jsonl").unlink()
    with pytest.raises(FileNotFoundError, match=r"words\.jsonl does not exist"):
        eval_bundle.read(bundle)
    with pytest.raises(FileNotFoundError, match=r"it has no core\.yaml"):
        eval_bundle.read(bundle / "eval_data")
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(bundle))
    assert eval_bundle.default_location() == bundle / "eval_bundle"


# ---- prompts -------------------------------------------------------------------------------------------------------


def test_prompts_have_solved_examples_and_score_what_differs(bundle, tokenizer):
    colours, schemata, words = eval_bundle.read(bundle)

    def parts(task: Task, index: int) -> list[tuple[str, str]]:
        prompt = capability.render(task, index, tokenizer, 10_000)
        assert all(row[0] == tokenizer.bos_token_id for row in prompt.rows)
        pairs = zip(prompt.rows, prompt.starts, strict=True)
        return [(tokenizer.decode(row[1:start]), tokenizer.decode(row[start:])) for row, start in pairs]

    first = parts(colours, 0)
    assert len(first) == 4
    assert [(before + after).rsplit("Answer: ")[-1] for before, after in first] == ["red", "green", "blue", "grey"]
    assert first[0][0].count("which colour?\nAnswer:") == 3
    assert first[0][0].count("\n\n") == 2
    assert colours.examples[0]["query"] in first[0][0].split("\n\n")[-1]
    for before, after in parts(schemata, 1):
        assert after.endswith("is small")
        assert before + after in [f"{c} is small" for c in schemata.examples[1]["context_options"]]
    ((before, after),) = parts(words, 2)
    question = words.examples[2]
    assert (before + after).endswith(f"\n\n{question['context'].strip()} {question['continuation']}")
    assert after.strip() == question["continuation"]


def test_long_prompts_keep_their_end(bundle, tokenizer):
    colours, _, words = eval_bundle.read(bundle)
    for task in (colours, words):
        whole, cut = (capability.render(task, 0, tokenizer, longest) for longest in (10_000, 12))
        for full, row, a, b in zip(whole.rows, cut.rows, whole.starts, cut.starts, strict=True):
            assert row == full[-12:]
            assert full[a:] == row[b:] or b == 1


# ---- answers -------------------------------------------------------------------------------------------------------


class Copier(nn.Module):
    """Predicts its favourite token everywhere, and where `right` is a set, nothing else."""

    def __init__(self, vocab_size: int):
        super().__init__()
        self.wte = nn.Embedding(vocab_size, 4)
        self.transformer = nn.ModuleDict({"h": nn.ModuleList([nn.Identity()])})
        self.head = nn.Linear(4, vocab_size, bias=False)
        with torch.no_grad():
            self.wte.weight.zero_()
            self.head.weight.copy_(torch.from_numpy(np.random.default_rng(0).normal(size=(vocab_size, 4))))
        self.requires_grad_(False)

    def forward(self, tokens):
        return self.head(self.transformer.h[0](self.wte(tokens)))


def test_the_option_of_the_lowest_mean_loss_is_the_answer(tokenizer):
    model = Copier(tokenizer.vocab_size)
    site = Site(model, "blocks.0.hook_resid_post", ())
    favourite, other = 65, 66
    prompt = capability.Prompt([[1, 2, other, other], [1, 2, favourite]], [2, 2], 1)
    lift = additive(Feature(model.head.weight[favourite], lambda h: h[..., 0]), 1.0)
    padding, size = tokenizer.bos_token_id, tokenizer.vocab_size
    with edit(model, {site.hook_name: lift}):
        assert capability.is_right(site, prompt, padding, size)
        assert not capability.is_right(site, capability.Prompt(prompt.rows, [2, 2], 0), padding, size)
        one_by_one = Site(model, site.hook_name, (), tokens_per_forward=4)
        assert capability.is_right(one_by_one, prompt, padding, size)
        best = int(model(torch.tensor([[1]])).argmax())
        assert capability.is_right(site, capability.Prompt([[1, best, best]], [1], None), padding, size)
        assert not capability.is_right(site, capability.Prompt([[1, best, best + 1]], [1], None), padding, size)


def test_the_cost_is_that_of_centred_accuracies(bundle, tokenizer):
    """Steering that changes nothing costs nothing; accuracies are those that single answers come to."""
    tasks = eval_bundle.read(bundle)
    model = tiny("G5", vocab_size=tokenizer.vocab_size)
    site = Site(model, "blocks.2.hook_resid_post", (tokenizer.bos_token_id,))
    direction = torch.from_numpy(np.random.default_rng(0).normal(size=32)).float()
    features = {7: (Feature(direction, lambda h: h[..., 0]), 3.0)}
    found = capability.cost(site, tokenizer, tasks, 5, features, (0.0, 2.0))
    still, strong = found["strengths"]
    assert (still["multiple"], still["cost"], still["interval"]) == (0.0, 0.0, [0.0, 0.0])
    assert found["examples"] == {"colours": 5, "schemata": 5, "words": 5}
    assert found["latents"] == [7]
    with edit(model, {site.hook_name: additive(features[7][0], 6.0)}):
        for task in tasks:
            prompts = (capability.render(task, i, tokenizer, 4000) for i in range(5))
            right = [capability.is_right(site, p, tokenizer.bos_token_id, tokenizer.vocab_size) for p in prompts]
            assert strong["tasks"][task.name] == pytest.approx((np.mean(right) - task.baseline) / (1 - task.baseline))
    assert strong["core"] == pytest.approx(np.mean(list(strong["tasks"].values())))
    assert strong["cost"] == pytest.approx(found["plain"]["core"] - strong["core"])
    low, high = strong["interval"]
    assert low <= strong["cost"] <= high
    json.dumps(found, allow_nan=False)
