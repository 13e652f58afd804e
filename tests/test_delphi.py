"""delphi's cache: a reader of the documented shape finds every activation again, and its tokenizer reads the text."""

import json
import subprocess
import sys
from pathlib import Path

import explorer_toy as toy
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from bridge import delphi
from jsae.records.store import VERSION, Activations, AllHeader, Store, StoreError


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    toy.write_store(folder)
    return folder


@pytest.fixture(scope="module")
def store(run) -> Store:
    return Store(run / "explorer" / "records" / toy.HOOK)


def read(module: Path) -> tuple[np.ndarray, np.ndarray]:
    """Return what a module's files hold, as delphi's loader joins it: activations (R, T, f), tokens (R, T)."""
    acts = np.zeros((toy.ROWS, toy.LENGTH, toy.D_SAE), np.float32)
    expected = 0
    for file in sorted(module.glob("*.safetensors"), key=lambda path: int(path.stem.split("_")[0])):
        start, end = map(int, file.stem.split("_"))
        held = load_file(file)
        assert start == expected
        assert held["locations"].shape == (len(held["activations"]), 3)
        assert held["locations"].dtype in (np.uint16, np.uint32)
        assert held["activations"].dtype == np.float16
        row, position, latent = held["locations"].astype(np.int64).T
        assert (latent + start <= end).all()
        acts[row, position, latent + start] = held["activations"]
        tokens, expected = held["tokens"], end + 1
    assert expected == toy.D_SAE
    return acts, tokens


@pytest.mark.parametrize("bound", [1, 100, 10**9])
def test_every_activation_is_found_again_in_however_many_files(store, run, tmp_path, bound):
    written = delphi.write(store, run / "sae" / toy.HOOK, tmp_path, activations_per_file=bound)
    module = tmp_path / "latents" / toy.HOOK
    acts, tokens = read(module)
    np.testing.assert_array_equal(acts, toy.activations(toy.tokens()))
    np.testing.assert_array_equal(tokens, toy.tokens())
    assert sorted(written) == sorted(module.iterdir())
    sizes = [len(load_file(file)["activations"]) for file in module.glob("*.safetensors")]
    counts = store["count"]
    assert all(size <= max(bound, counts.max()) for size in sizes)


def test_the_config_is_a_cache_config_with_the_name_of_the_model(store, run, tmp_path):
    *files, config = delphi.write(store, run / "sae" / toy.HOOK, tmp_path, module="layers.2")
    assert config == tmp_path / "latents" / "layers.2" / "config.json"
    assert json.loads(config.read_text()) == {
        "dataset_repo": "toy <b>text</b>",
        "dataset_split": "all",
        "dataset_name": "",
        "dataset_column": "text",
        "batch_size": 32,
        "cache_ctx_len": toy.LENGTH,
        "n_tokens": toy.ROWS * toy.LENGTH,
        "n_splits": len(files),
        "model_name": "nanochat-toy",
    }


def test_files_of_an_earlier_cache_do_not_stay(store, run, tmp_path):
    delphi.write(store, run / "sae" / toy.HOOK, tmp_path, activations_per_file=1)
    delphi.write(store, run / "sae" / toy.HOOK, tmp_path)
    assert [file.name for file in (tmp_path / "latents" / toy.HOOK).glob("*.safetensors")] == ["0_7.safetensors"]


def test_rows_beyond_16_bits_are_written_in_32(tmp_path):
    folder, rows = tmp_path / "all", (1 << 16) + 1
    cells = np.array([5, rows * 4 - 1], np.uint32)
    columns = {"offsets": np.array([0, 1, 1, 2]), "cell": cells, "value": np.array([1, 2])}
    Activations.write(folder, AllHeader(VERSION, 3, rows, 4, "ab"), columns)
    held = delphi._cells(Activations(folder), 1, 3, 4)
    assert held["locations"].dtype == np.uint32
    assert held["locations"].tolist() == [[rows - 1, 3, 1]]
    assert delphi._cells(Activations(folder), 0, 1, 4)["locations"].dtype == np.uint16


def test_names_and_records_that_do_not_fit_are_refused(store, run, tmp_path):
    for module in ("", "..", "a/b"):
        with pytest.raises(ValueError, match="not a valid folder name"):
            delphi.write(store, run / "sae" / toy.HOOK, tmp_path, module=module)
    with pytest.raises(ValueError, match="at least 1"):
        delphi.write(store, run / "sae" / toy.HOOK, tmp_path, activations_per_file=0)
    toy.write_store(tmp_path / "other", seed=1)
    with pytest.raises(StoreError, match="gather the records again"):
        delphi.write(store, tmp_path / "other" / "sae" / toy.HOOK, tmp_path)
    bare = Store(toy.write_store(tmp_path / "bare", everything=False))
    with pytest.raises(FileNotFoundError, match="delphi needs all"):
        delphi.write(bare, tmp_path / "bare" / "sae" / toy.HOOK, tmp_path)
    assert not (tmp_path / "latents").exists()


def test_the_tokenizer_reads_tokens_one_by_one_with_split_characters_whole(store):
    tokenizer = delphi.Tokenizer(store.texts)
    row = torch.tensor([toy.ID[word] for word in ("<|bos|>", " the", "é0", "é1", "", "\n")])
    assert tokenizer.batch_decode(row) == ["<|bos|>", " the", "", "é", "", "\n"]
    assert tokenizer.batch_decode(row, skip_special_tokens=True)[0] == ""
    assert tokenizer.batch_decode(torch.stack([row, row])) == ["<|bos|> theé\n"] * 2
    assert tokenizer.decode(row.tolist(), skip_special_tokens=True) == " theé\n"
    assert tokenizer.decode(toy.ID["é0"]) == "�"


def test_the_tokenizer_has_one_name_for_each_id(store):
    tokenizer = delphi.Tokenizer(store.texts)
    assert sorted(tokenizer.vocab.values()) == list(range(len(toy.VOCABULARY))) == list(range(len(tokenizer)))
    assert tokenizer.get_vocab()[" cat"] == toy.ID[" cat"]
    assert tokenizer.vocab["<0xC3>"] == toy.ID["é0"]
    assert tokenizer.bos_token_id == toy.ID["<|bos|>"]


def test_two_tokens_of_the_same_bytes_keep_a_name_each():
    assert delphi._names([b"a", b"a", b""]) == {"a": 0, "a<1>": 1, "<2>": 2}


def test_neither_torch_nor_jax_is_loaded():
    check = "import sys, bridge.delphi; assert not {'torch', 'jax'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", check], check=True, cwd=Path(__file__).parents[1])
