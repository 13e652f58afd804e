"""The goldens: outputs of upstream's own code, at ten commits of nine months."""

import json
import shutil

import pytest
import torch
from golden_table import TOLERANCES, cases, differences, gap
from safetensors.torch import load_file

from bridge import nanochat
from bridge.nanochat.engine import generate
from bridge.nanochat.loss import bits_per_byte

CASES = [
    "2025-10-13-3a5e0bc",
    "2025-11-17-4a87a0d",
    "2026-01-11-201d705",
    "2026-01-18-d58fcd9",
    "2026-01-28-d5418ea",
    "2026-01-31-348fbb3",
    "2026-03-04-324e69c",
    "2026-03-09-6ed7d1d",
    "2026-03-14-a825e63",
    "2026-07-03-92d63d4",
]


@pytest.fixture(scope="module")
def basedir(goldens):
    return goldens / "basedir-2026-07-03-92d63d4"


@pytest.fixture(scope="module")
def base_golden(basedir):
    return json.loads((basedir / "golden.json").read_text()), load_file(basedir / "golden.safetensors")


def test_no_golden_case_is_left_out(goldens):
    assert [case.name for case in cases(goldens)] == CASES


@pytest.mark.parametrize("name", CASES)
def test_every_output_is_upstreams(goldens, name, record_property):
    found = differences(goldens / name)
    for what, difference in found.items():
        record_property(what, difference)
    assert found.keys() >= TOLERANCES.keys() - {"greedy"}
    assert {what: d for what, d in found.items() if not d <= TOLERANCES[what]} == {}


@pytest.mark.parametrize("name", CASES)
def test_the_files_alone_tell_the_arithmetic(goldens, name):
    case = json.loads((goldens / name / "case.json").read_text())
    nano = nanochat.load(goldens / name)
    expect = case["expect"]
    windows = expect.pop("window_sizes") or [None] * case["config"]["n_layer"]
    assert nano.generation == case["generation"]
    assert {field: getattr(nano.config, field) for field in expect} == expect
    assert list(nano.config.window_sizes) == windows
    assert {field: getattr(nano.config, field) for field in case["config"]} == case["config"]


def test_the_experiment_of_a_side_branch_is_refused_by_name(goldens):
    with pytest.raises(ValueError, match="side branch ve"):
        nanochat.load(goldens / "experimental-2026-01-16-e3f58b8")


@pytest.mark.parametrize(("kind", "folder"), [("base", "base_checkpoints"), ("sft", "chatsft_checkpoints")])
def test_a_directory_of_models_gives_upstreams_default(basedir, base_golden, kind, folder):
    told, tensors = base_golden
    nano = nanochat.load(basedir / "nanochat" / folder)
    assert nano.path.name == f"model_{told[kind + '_default']['step']:06d}.pt"
    assert nano.config.n_layer == told[kind + "_default"]["n_layer"]
    assert nano.tokenizer.vocab_size == nano.config.vocab_size
    assert gap(nano.model(tensors["prompt"]), tensors[kind + "_default_logits"]) < TOLERANCES["logits"]


def test_a_base_directory_is_its_base_model(basedir, base_golden):
    told, _ = base_golden
    nano = nanochat.load(basedir / "nanochat")
    assert nano.path.parent == basedir / "nanochat" / told["base_default"]["dir"] / "d3"
    assert {field: getattr(nano.config, field) for field in told["expect"]} == told["expect"]


def test_every_checkpoint_of_a_base_directory_gives_upstreams_logits(basedir, base_golden):
    _, tensors = base_golden
    names = [name for name in tensors if name.startswith("logits.")]
    assert len(names) == 4
    for name in names:
        _, folder, tag, step = name.split(".")
        nano = nanochat.load(basedir / "nanochat" / folder / tag, step=int(step))
        assert gap(nano.model(tensors["prompt"]), tensors[name]) < TOLERANCES["logits"], name


@pytest.mark.parametrize("split", ["train", "val"])
def test_bits_per_byte_are_upstreams(basedir, base_golden, split):
    told, tensors = base_golden
    nano = nanochat.load(basedir / "nanochat")
    batches = zip(tensors[f"{split}_inputs"], tensors[f"{split}_targets"], strict=True)
    assert bits_per_byte(nano.model, batches, nano.tokenizer.token_bytes) == pytest.approx(told["bpb"][split], abs=1e-5)


def test_the_greedy_continuation_of_a_text_is_upstreams(basedir, base_golden):
    told, tensors = base_golden
    nano = nanochat.load(basedir / "nanochat")
    prompt = nano.tokenizer.encode(told["prompt_text"], prepend_bos=True)
    assert prompt == tensors["prompt"][0].tolist()
    count = len(told["engine_greedy"]) - len(prompt)
    columns = generate(nano.model, prompt, max_tokens=count, temperature=0)
    assert prompt + [column[0] for column in columns] == told["engine_greedy"]


def test_a_checkpoint_moved_next_to_its_tokenizer_finds_it(basedir, tmp_path):
    for file in (*(basedir / "nanochat/tokenizer").iterdir(), *(basedir / "nanochat/base_checkpoints/d2").iterdir()):
        shutil.copyfile(file, tmp_path / file.name)
    nano = nanochat.load(tmp_path / "model_000003.pt")
    assert nano.tokenizer.vocab_size == 320
    assert torch.isfinite(nano.model(torch.tensor([nano.tokenizer.encode("a page")]))).all()
