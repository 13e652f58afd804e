"""The text of an activation store, as the explorer and the evaluation read it."""

import json
import uuid

import numpy as np
import pytest
import python_text
from toy_saes import export, toy_sae

import bridge.nanochat
from bridge import collecting, exploration, stored_text
from bridge.evaluate import evaluation
from bridge.evaluate import text as texts
from bridge.nanochat.corpus import Corpus
from bridge.run import Run
from bridge.run.subjects import Choice
from jsae import store
from jsae.records.store import Store
from jsae.settings import ConfigError

T = 64
HOOK = "blocks.2.hook_resid_post"


@pytest.fixture(scope="module")
def nano():
    return bridge.nanochat.load("demo")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return python_text.copied(tmp_path_factory.mktemp("text"), 60)


@pytest.fixture(scope="module")
def location(nano, data):
    location = f"memory://{uuid.uuid4().hex}"
    settings = collecting.Text(data, split="heldout", num_tokens=60 * T, context_size=T, shard_rows=640)
    collecting.collect(nano, [HOOK], location, settings)
    return location


@pytest.fixture
def run(nano, tmp_path):
    sae = toy_sae("topk", nano.config.n_embd, 64, 0, hook_name=HOOK, model_fingerprint=nano.fingerprint)
    export(sae, tmp_path / "sae" / HOOK)
    flags = {"checkpoint": "demo", "step": None, "tokenizer": None, "data": "stdlib", "drop_sinks": True}
    (tmp_path / "config.json").write_text(
        json.dumps({"flags": flags | {"context_size": T}, "facts": {}, "versions": {}})
    )
    return tmp_path


def test_rows_are_those_of_the_store_from_all_over_it(location, nano):
    opened = store.open(location)
    all_rows = opened.tokens(0, opened.rows).reshape(-1, T)
    rows = stored_text.rows(opened, 10)
    assert rows.shape == (10, T)
    numbers = [int(np.flatnonzero((all_rows == row).all(1))[0]) for row in rows]
    assert max(numbers) - min(numbers) > 10
    assert len(stored_text.rows(opened, 10_000)) == opened.rows // T


def test_documents_are_those_of_the_text(location, nano, data):
    corpus = Corpus(data, nano.tokenizer, split="all", row_len=T)
    whole = [nano.tokenizer.encode(document) for document in corpus.documents()]
    read = list(texts.documents(f"store:{location}", "heldout", nano.tokenizer))
    assert len({document.unit for document in read}) > 1
    assert sum(len(document.ids) for document in read) > 0.9 * 60 * T * (1 - 1 / T)
    text = ["\0".join(map(str, ids)) for ids in whole]
    first = "\0".join(map(str, read[0].ids.tolist()))
    assert any(first in document for document in text)


def test_records_are_gathered_on_the_tokens_of_a_store(run, location):
    choice = Choice((run,), run, data=f"store:{location}")
    exploration.explore(choice, exploration.Extent(context_length=T, keep_activations=False))
    opened = store.open(location)
    records = Store(Run(run).records_folder / HOOK, None, HOOK)
    assert records.header.settings["data"] == f"store:{location}"
    assert records.header.settings["data_fingerprint"] == opened.manifest.digest[:16]


def test_an_sae_is_measured_on_the_tokens_of_a_store(run, location):
    extent = evaluation.Extent(heldout_tokens=20 * T, probes=False, labels=False)
    choice = Choice((run,), run, data=f"store:{location}")
    ((_, results),) = evaluation.evaluate(choice, extent)
    assert results["eval"]["setting"]["data"] == f"store:{location}"
    assert results["eval"]["fvu"] > 0


def test_text_that_does_not_fit_is_refused(run, location, nano, data, monkeypatch):
    choice = Choice((run,), run, data=f"store:{location}")
    with pytest.raises(ConfigError, match="have 64 tokens, and rows of"):
        exploration.explore(choice, exploration.Extent(context_length=32))
    with pytest.raises(ConfigError, match="holds the heldout part of its text, and train is asked for"):
        stored_text.open_text(f"store:{location}", "train", nano.tokenizer)
    plain = f"memory://{uuid.uuid4().hex}"
    store.write(plain, np.ones((100, 4), np.float32))
    with pytest.raises(ConfigError, match="written without text"):
        stored_text.open_text(f"store:{plain}", "all", nano.tokenizer)
    with pytest.raises(FileNotFoundError, match="no store of activations"):
        stored_text.open_text("store:memory://none", "all", nano.tokenizer)
    monkeypatch.setattr(type(nano.tokenizer), "fingerprint", "another")
    with pytest.raises(ConfigError, match="of another tokenizer than the model's"):
        stored_text.open_text(f"store:{location}", "all", nano.tokenizer)
