"""The packaged series of checkpoints: it loads, it learns from step to step, and its chat training answers."""

import json
from pathlib import Path

import bridge.nanochat
from bridge.nanochat import engine, pretraining
from bridge.nanochat.corpus import Corpus
from tests import series

SERIES = Path(__file__).parent / "data" / "series"
BASE, SFT = SERIES / "base_checkpoints" / "d4", SERIES / "chatsft_checkpoints" / "d4"


def test_it_is_small_and_names_no_machine():
    files = [path for path in SERIES.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 10_000_000
    assert len(list(BASE.glob("model_*.pt"))) == len(series.STEPS) == 9
    for path in SERIES.rglob("meta_*.json"):
        assert not Path(json.loads(path.read_text())["user_config"]["out"]).is_absolute()


def test_every_checkpoint_predicts_held_out_text_better_than_the_one_before():
    nanos = [bridge.nanochat.load(BASE, step) for step in series.STEPS]
    corpus = Corpus("stdlib", nanos[0].tokenizer, split="heldout", row_len=257)
    found = [pretraining.heldout_bits_per_byte(nano.model, corpus, 16, 8) for nano in nanos]
    assert found == sorted(found, reverse=True)
    assert found[0] > 2.8
    assert found[-1] < 1.8


def test_chat_training_taught_it_to_answer():
    nano = bridge.nanochat.load(SFT)
    assert nano.is_chat
    for question, start in {"Please add 2 and 3.": "Sure! 2 + 3 is", "Thank you!": "You are welcome."}.items():
        chat = [{"role": "user", "content": question}]
        answer = "".join(engine.chat(nano.model, nano.tokenizer, chat, temperature=0.0, max_tokens=40))
        assert answer.startswith(start)


def test_the_command_trains_such_a_series(tmp_path, monkeypatch):
    monkeypatch.setitem(series.SHARED, "sequence_len", 64)
    monkeypatch.setitem(series.SHARED, "vocab_size", 300)
    monkeypatch.setitem(series.SHARED, "eval_rows", 2)
    series.train(tmp_path, (1, 3), 2)
    assert sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("model_*")) == [
        "base_checkpoints/d4/model_000001.pt",
        "base_checkpoints/d4/model_000003.pt",
        "chatsft_checkpoints/d4/model_000002.pt",
    ]
    sft = bridge.nanochat.load(tmp_path / "chatsft_checkpoints" / "d4")
    assert sft.tokenizer.vocab_size == 300
    assert sft.meta["user_config"]["init_from"] == "base_checkpoints/d4"
    assert not list(tmp_path.rglob("optim_*"))
