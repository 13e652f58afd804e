"""Pretraining learns, saves what nanochat's loaders read, and resumes to the same numbers."""

import dataclasses
import json
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import bridge.nanochat
from bridge.nanochat import pretraining
from bridge.nanochat.corpus import Corpus
from bridge.nanochat.loss import assistant_tokens
from bridge.nanochat.model import GPT, GPTConfig
from bridge.nanochat.pretraining import Recipe, Trainer
from bridge.nanochat.tokenizer import Tokenizer
from experiments.pretrain import PretrainConfig, main

ROOT = Path(__file__).resolve().parents[1]
TOKENIZER = Tokenizer({bytes([i]): i for i in range(256)})
SIZES = {"sequence_len": 32, "n_layer": 2, "n_head": 2, "n_kv_head": 1, "n_embd": 32, "window_pattern": "SL"}
TINY = {
    **SIZES,
    "vocab_size": 270,
    "batch_rows": 4,
    "micro_rows": 2,
    "warmup_steps": 2,
    "eval_every": 6,
    "eval_rows": 4,
    "log_every": 4,
    "heldout_fraction": 0.3,
}


@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> str:
    """Thirty texts with an order that a small model learns at once."""
    folder = tmp_path_factory.mktemp("texts")
    for i in range(30):
        (folder / f"{i}.txt").write_text(f"{i}: " + "the lamp, the boat, the pier; " * 12)
    return f"{folder}/*.txt"


def trainer(texts: str, workers: int = 1, **recipe) -> Trainer:
    model = GPT(GPTConfig.of_generation("G7", vocab_size=TOKENIZER.vocab_size, **SIZES))
    model.init_weights(torch.Generator().manual_seed(1))
    corpus = Corpus(texts, TOKENIZER, split="all", row_len=33)
    recipe = {"steps": 20, "batch_rows": 4, "micro_rows": 2, "warmup_steps": 2, **recipe}
    return Trainer(model, corpus, Recipe(**recipe), workers)


def weights(of: Trainer) -> dict[str, torch.Tensor]:
    return {name: weight.clone() for name, weight in of.model.state_dict().items()}


def assert_equal(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    assert first.keys() == second.keys()
    for name, weight in first.items():
        assert torch.equal(weight, second[name]), name


# ---- the trainer --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bf16", [True, False])
def test_the_loss_falls_and_every_weight_moves(texts, bf16):
    learner = trainer(texts, bf16=bf16)
    before = weights(learner)
    losses = [figures["loss"] for figures in learner.run()]
    assert len(losses) == learner.step == 20
    assert losses[0] == pytest.approx(np.log(265), abs=0.3)
    assert losses[-1] < 0.75 * losses[0]
    still = [name for name, weight in learner.model.state_dict().items() if torch.equal(weight, before[name])]
    assert still == []


def test_workers_change_no_number(texts):
    alone, shared = trainer(texts, workers=1, micro_rows=1), trainer(texts, workers=3, micro_rows=1)
    losses = [[figures["loss"] for figures in learner.run(5)] for learner in (alone, shared)]
    assert losses[0] == losses[1]
    assert_equal(weights(alone), weights(shared))


def test_a_resumed_trainer_takes_the_steps_of_an_uninterrupted_one(texts, tmp_path):
    whole = trainer(texts)
    expected = [figures["loss"] for figures in whole.run()]
    first = trainer(texts)
    losses = [figures["loss"] for figures in first.run(7)]
    pretraining.save(tmp_path, weights(first), {"step": 7}, first.state_dict())
    second = trainer(texts)
    list(second.run(3))
    second.load_state_dict(pretraining.last_state(tmp_path))
    losses += [figures["loss"] for figures in second.run()]
    assert losses == expected
    assert_equal(weights(second), weights(whole))


def test_rates_rise_stay_and_fall_to_zero():
    recipe = Recipe(steps=100, warmup_steps=10, warmdown=0.4)
    rates = [recipe.rate(step) for step in range(101)]
    assert rates[0] == pytest.approx(1 / 11)
    assert np.all(np.diff(rates[:11]) > 0)
    assert rates[10:61] == [1.0] * 51
    assert np.all(np.diff(rates[60:]) < 0)
    assert rates[100] == 0


def test_a_loss_that_is_no_number_stops_with_the_step_named(texts):
    learner = trainer(texts)
    list(learner.run(2))
    with torch.no_grad():
        learner.model.lm_head.weight[0, 0] = float("nan")
    before = weights(learner)
    with pytest.raises(FloatingPointError, match="step 2: loss nan"):
        list(learner.run())
    assert torch.equal(before["transformer.wte.weight"], learner.model.transformer.wte.weight)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"steps": 0}, "steps must be at least 1"),
        ({"batch_rows": 5}, "batch_rows 5 must be a multiple of micro_rows 2"),
        ({"matrix_lr": 0.0}, "matrix_lr must be positive"),
        ({"head_lr": float("nan")}, "head_lr must be positive"),
        ({"warmdown": 1.5}, "warmdown must be in"),
    ],
)
def test_a_recipe_that_cannot_work_is_refused(change, told):
    with pytest.raises(ValueError, match=told):
        Recipe(**{"steps": 10, "batch_rows": 4, "micro_rows": 2, **change})


def test_a_save_of_another_model_is_refused(texts):
    learner = trainer(texts)
    state = learner.state_dict()
    state["model"] = {**state["model"], "lm_head.weight": torch.zeros(3, 3)}
    with pytest.raises(ValueError, match=r"another model: lm_head\.weight is \(3, 3\), here \(320, 32\)"):
        learner.load_state_dict(state)


def test_a_full_disk_leaves_the_last_save_as_it_was(texts, tmp_path, monkeypatch):
    learner = trainer(texts)
    pretraining.save(tmp_path, weights(learner), {"step": 0}, learner.state_dict())
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def full(_, file):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="No space left"):
        pretraining.save(tmp_path, weights(learner), {"step": 1}, learner.state_dict())
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_only_the_last_save_is_kept(texts, tmp_path):
    learner = trainer(texts)
    for step in (1, 2):
        pretraining.save(tmp_path, weights(learner), {"step": step}, learner.state_dict())
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "meta_000002.json",
        "model_000002.pt",
        "optim_000002_rank0.pt",
    ]


def test_steps_to_keep_are_not_deleted_by_later_saves(texts, tmp_path):
    learner = trainer(texts)
    for step in (1, 2, 3, 4):
        pretraining.save(tmp_path, weights(learner), {"step": step}, learner.state_dict(), kept_steps=(1, 3))
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        *(f"meta_00000{step}.json" for step in (1, 3, 4)),
        *(f"model_00000{step}.pt" for step in (1, 3, 4)),
        "optim_000004_rank0.pt",
    ]


# ---- what the assistant says --------------------------------------------------------------------------------------

CHAT = {
    "messages": [
        {"role": "user", "content": "add 2 and 3"},
        {
            "role": "assistant",
            "content": [
                {"type": "text", "text": "let me see: "},
                {"type": "python", "text": "2+3"},
                {"type": "python_output", "text": "5"},
                {"type": "text", "text": "it is 5"},
            ],
        },
        {"role": "user", "content": "thanks"},
        {"role": "assistant", "content": "bye"},
    ]
}


def test_the_assistants_tokens_in_a_row_are_those_of_a_rendered_chat():
    ids, mask = TOKENIZER.render_conversation(CHAT)
    rows = np.array([[*ids, *ids[:-4]], [*ids[:-4], *ids]], np.int32)  # one chat after the other, the first one cut
    expected = np.array([[*mask, *mask[:-4]], [*mask[:-4], *mask]], bool)
    assert np.array_equal(assistant_tokens(rows, TOKENIZER.special_tokens), expected)


def test_a_row_that_begins_within_a_turn_is_read_by_what_ends_the_turn():
    ids, mask = TOKENIZER.render_conversation(CHAT)
    for start in range(1, len(ids)):
        row = np.array([[TOKENIZER.bos_token_id, *ids[start:]]], np.int32)
        assert assistant_tokens(row, TOKENIZER.special_tokens)[0, 1:].tolist() == [bool(m) for m in mask[start:]]


def test_text_without_a_chat_has_no_assistant():
    rows = np.array([[TOKENIZER.bos_token_id, *TOKENIZER.encode("the lamp")]], np.int32)
    assert not assistant_tokens(rows, TOKENIZER.special_tokens).any()


# ---- the command --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(texts, tmp_path_factory) -> tuple[PretrainConfig, Path]:
    """A run of twelve steps from nothing to the end."""
    out = tmp_path_factory.mktemp("runs") / "tiny"
    config = PretrainConfig(out=str(out), data=texts, steps=12, **TINY)
    assert main(config) == 0
    return config, out


def test_a_run_leaves_a_directory_that_nanochats_reader_loads(trained):
    config, out = trained
    assert {path.name for path in out.iterdir()} == {
        "model_000012.pt",
        "meta_000012.json",
        "optim_000012_rank0.pt",
        "tokenizer",
    }
    loaded = bridge.nanochat.load(out)
    assert loaded.generation == "G7"
    assert loaded.tokenizer.vocab_size == loaded.config.vocab_size == 270
    assert {name: getattr(loaded.config, name) for name in SIZES} == SIZES
    meta = json.loads((out / "meta_000012.json").read_text())
    assert meta["step"] == 12
    assert meta["user_config"] == json.loads(json.dumps(dataclasses.asdict(config)))
    assert meta["model_config"] == {**SIZES, "vocab_size": 270}


def test_the_file_is_in_bfloat16_and_its_bits_per_byte_are_of_the_file(trained, texts):
    _, out = trained
    stored = torch.load(out / "model_000012.pt", weights_only=True)
    assert {weight.dtype for weight in stored.values() if weight.ndim > 1} == {torch.bfloat16}
    assert {weight.dtype for weight in stored.values() if weight.ndim == 1} == {torch.float32}
    loaded = bridge.nanochat.load(out)
    heldout = Corpus(texts, loaded.tokenizer, split="heldout", row_len=33, heldout_fraction=0.3)
    bpb = pretraining.heldout_bits_per_byte(loaded.model, heldout, 16, 2)
    meta = json.loads((out / "meta_000012.json").read_text())
    assert meta["val_bpb"] == pytest.approx(bpb, rel=1e-6)
    assert meta["loop_state"]["val_bpb_float32"] == pytest.approx(bpb, rel=0.01)


def test_a_run_that_is_told_to_stop_saves_and_resumes_to_the_same_weights(trained, texts, tmp_path):
    config, out = trained
    flags = {**TINY, "out": tmp_path / "tiny", "data": texts, "steps": 12, "log_every": 1, "eval_every": 100}
    command = [sys.executable, "-m", "experiments.pretrain", *(f"--{name}={value}" for name, value in flags.items())]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        for line in process.stdout:
            if line.startswith("step 2 "):
                process.send_signal(signal.SIGTERM)
                break
        rest = process.stdout.read()
    assert process.returncode == 75, rest
    assert "--resume continues from here" in rest
    stopped = pretraining.last_state(tmp_path / "tiny")["step"]
    assert 2 <= stopped < 12
    resumed = dataclasses.replace(config, out=str(tmp_path / "tiny"), resume=True)
    assert main(resumed) == 0
    assert_equal(
        torch.load(tmp_path / "tiny" / "model_000012.pt", weights_only=True),
        torch.load(out / "model_000012.pt", weights_only=True),
    )


@pytest.fixture(scope="module")
def chats(tmp_path_factory) -> str:
    """Chats whose questions are noise, and whose answers are always the same."""
    rng = np.random.default_rng(0)
    path = tmp_path_factory.mktemp("chats") / "chats.jsonl"
    lines = []
    for _ in range(60):
        question = "".join(rng.choice(list("abcdefgh"), 12))
        turns = [{"role": "user", "content": question}, {"role": "assistant", "content": "the pier"}]
        lines.append(json.dumps({"messages": turns}))
    path.write_text("\n".join(lines))
    return str(path)


def test_chat_training_starts_from_a_checkpoint_and_learns_what_the_assistant_says(trained, chats, tmp_path):
    _, base = trained
    sizes = {name: value for name, value in TINY.items() if name not in SIZES and name != "vocab_size"}
    losses = {}
    for learned in ("all", "assistant"):
        out = tmp_path / learned
        config = PretrainConfig(
            out=str(out), init_from=str(base), data=chats, learned=learned, steps=20, keep_steps=(1, 10), **sizes
        )
        assert main(config) == 0
        assert sorted(path.name for path in out.glob("model_*")) == [f"model_0000{step}.pt" for step in ("01", 10, 20)]
        losses[learned] = [json.loads(path.read_text())["val_bpb"] for path in sorted(out.glob("meta_*.json"))]
        assert bridge.nanochat.load(out).tokenizer.fingerprint == bridge.nanochat.load(base).tokenizer.fingerprint
    assert losses["assistant"][-1] < 0.5 * losses["assistant"][0]
    assert losses["assistant"][-1] < 0.5 * losses["all"][-1], "noise cannot be learned, and is measured only with all"


def test_a_checkpoint_to_start_from_stays_as_it_is(trained, chats, tmp_path):
    _, base = trained
    before = (base / "model_000012.pt").read_bytes()
    sizes = {name: value for name, value in TINY.items() if name not in SIZES and name != "vocab_size"}
    assert main(PretrainConfig(out=str(tmp_path / "x"), init_from=str(base), data=chats, steps=2, **sizes)) == 0
    assert (base / "model_000012.pt").read_bytes() == before


def test_a_model_is_not_overwritten_unasked(trained):
    config, _ = trained
    with pytest.raises(ValueError, match="already holds a model: give --resume"):
        main(config)


def test_a_broken_save_is_named(tmp_path, texts):
    (tmp_path / "optim_000005_rank0.pt").write_bytes(b"half a file")
    with pytest.raises(ValueError, match=r"optim_000005_rank0\.pt cannot be read"):
        main(PretrainConfig(out=str(tmp_path), data=texts, steps=12, resume=True, **TINY))


def test_a_flipped_bit_in_a_save_is_noticed(trained, tmp_path):
    _, out = trained
    (whole,) = out.glob("optim_*_rank0.pt")
    path = tmp_path / whole.name
    for part in (0.2, 0.5, 0.8):
        data = bytearray(whole.read_bytes())
        data[int(part * len(data))] ^= 1
        path.write_bytes(data)
        torch.load(path, weights_only=True)  # says nothing
        with pytest.raises(
            ValueError, match=rf"{path.name} cannot be read \(its member .* does not match its checksum"
        ):
            pretraining.last_state(tmp_path)


def test_there_must_be_something_to_resume_from(tmp_path, texts):
    (tmp_path / "model_000005.pt").write_bytes(b"")
    with pytest.raises(ValueError, match=r"no optim_\*_rank0\.pt to resume from"):
        main(PretrainConfig(out=str(tmp_path), data=texts, steps=12, resume=True, **TINY))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"n_head": 3}, "n_head"),
        ({"window_pattern": "SX"}, "window_pattern"),
        ({"data": "nowhere/*.txt"}, "no file matches"),
        ({"heldout_fraction": 0.0}, "no document in its heldout split"),
        ({"tokenizer": "nowhere"}, "no tokenizer at"),
        ({"vocab_size": 100}, "vocab_size must be"),
        ({"micro_rows": 3}, "multiple of micro_rows"),
        ({"workers": 0}, "workers must be at least 1"),
        ({"keep_steps": (4, 13)}, "keep_steps must be from 1 to steps=12, got 4, 13"),
        ({"learned": "questions"}, "learned"),
        ({"init_from": "nowhere"}, "nowhere"),
        ({"init_from": "demo", "tokenizer": "somewhere"}, "--tokenizer is for a model from scratch"),
    ],
)
def test_settings_that_cannot_work_end_before_training(tmp_path, texts, change, told):
    with pytest.raises((ValueError, FileNotFoundError), match=told):
        main(PretrainConfig(**{"out": str(tmp_path / "run"), "data": texts, "steps": 12, **TINY, **change}))
    assert not list(tmp_path.rglob("model_*.pt"))


# ---- numbers that go wrong ----------------------------------------------------------------------------------------


def test_a_model_worse_than_guessing_is_kept_to_look_at_and_an_error(tmp_path, texts):
    rates = {"matrix_lr": 50.0, "embedding_lr": 1000.0, "head_lr": 1000.0}
    with pytest.raises(FloatingPointError, match="lower the learning rates"):
        main(PretrainConfig(out=str(tmp_path), data=texts, steps=12, **TINY, **rates))


def test_a_run_that_diverges_is_stopped_with_the_last_good_save_kept(tmp_path, texts, monkeypatch):
    losses = iter([5.0] * 20 + [30.0] * 200)
    real = Trainer._update
    monkeypatch.setattr(Trainer, "_update", lambda self, rows: real(self, rows) | {"loss": next(losses)})
    with pytest.raises(FloatingPointError, match=r"from step 21 to 120 the loss \(5\.\d+ is guessing\) is above 11"):
        main(PretrainConfig(out=str(tmp_path), data=texts, steps=300, **TINY | {"eval_every": 10}))
    assert sorted(path.name for path in tmp_path.glob("model_*.pt")) == ["model_000020.pt"]


def test_weights_that_are_not_finite_are_not_saved_over_the_last_good_save(tmp_path, texts, monkeypatch):
    real = pretraining.heldout_bits_per_byte
    found = iter([1.0, float("nan")])
    monkeypatch.setattr(pretraining, "heldout_bits_per_byte", lambda *a, **b: real(*a, **b) * next(found))
    with pytest.raises(FloatingPointError, match="at step 12 the held-out bits per byte are nan"):
        main(PretrainConfig(out=str(tmp_path), data=texts, steps=18, **TINY))
    assert [path.name for path in tmp_path.glob("model_*.pt")] == ["model_000006.pt"]
