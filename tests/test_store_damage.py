"""A store that others have damaged or forged: every fault is one line, which names the file, and nothing is trusted."""

import json
import os

import numpy as np
import pytest

from jsae import store
from jsae.manifest import DamagedError, json_digest
from jsae.settings import ConfigError

ROWS, D = 3000, 24


@pytest.fixture(scope="module")
def acts():
    return np.random.default_rng(0).standard_normal((ROWS, D)).astype(np.float32)


@pytest.fixture
def memory(request):
    return f"memory://{request.node.name}"


def contents(opened):
    """All arrays of a store, as they are stored."""
    return {form.name: opened.array(form.name).read(0, opened.rows) for form in opened.layout.forms()}


@pytest.fixture
def folder(acts, tmp_path):
    store.write(tmp_path / "s", {"h": acts, "tokens": np.arange(ROWS)}, shard_rows=1000)
    return tmp_path / "s"


def change(path, at=100):
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def test_a_flipped_byte_is_noticed_where_it_is_read(folder):
    change(folder / "acts/h/c/1/0")
    opened = store.open(folder)
    assert len(opened.read("h", 0, 1000)) == 1000
    with pytest.raises(DamagedError, match=r"acts/h is damaged.*c/1/0.*Digest mismatch"):
        opened.read("h", 1000, 1100)
    with pytest.raises(DamagedError, match="Digest mismatch"):
        opened.verify()


def test_a_missing_shard_is_named_and_does_not_read_as_zeros(folder):
    (folder / "acts/h/c/1/0").unlink()
    with pytest.raises(DamagedError, match=r"a shard is missing.*acts/h/c/1/0"):
        store.open(folder).read("h", 0, ROWS)


@pytest.mark.parametrize("length", [0, 1000])
def test_a_truncated_shard_is_named(folder, length):
    os.truncate(folder / "acts/h/c/2/0", length)
    with pytest.raises(DamagedError, match=r"damaged.*acts/h/c/2/0"):
        store.open(folder).read("h", 2500, 2600)


def test_shards_in_the_place_of_others_are_found_when_all_is_verified(folder):
    first, second = folder / "acts/h/c/0/0", folder / "acts/h/c/1/0"
    data = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(data)
    with pytest.raises(DamagedError, match="shard 0 of acts/h is not what was written"):
        store.open(folder).verify()


@pytest.mark.parametrize("shard", [1, 2])
def test_a_damaged_shard_can_be_written_again(folder, acts, shard):
    whole = contents(store.open(folder))
    change(folder / f"acts/h/c/{shard}/0")
    (folder / f"tokens/c/{shard}").unlink()
    (folder / "store.json").rename(folder / "writing.json")
    (folder / f"shards/00000{shard}.json").unlink()
    store.write(folder, {"h": acts, "tokens": np.arange(ROWS)}, shard_rows=1000, resume=True).verify()
    assert all(np.array_equal(array, whole[name]) for name, array in contents(store.open(folder)).items())


def test_a_description_of_an_array_that_is_missing_or_another_is_found_and_not_written(folder):
    described = folder / "acts/h/zarr.json"
    described.write_text(described.read_text().replace("3000", "2000"))
    with pytest.raises(DamagedError, match=r"acts/h/zarr.json is damaged.*shape"):
        store.open(folder).verify()
    described.unlink()
    with pytest.raises(DamagedError, match=r"acts/h/zarr.json"):
        store.open(folder).verify()
    assert not described.exists()


def test_a_record_that_is_missing_or_changed_is_found(folder):
    change(folder / "shards/000001.json", 40)
    with pytest.raises(DamagedError, match=r"shards/000001.json is damaged"):
        store.open(folder).verify()
    (folder / "shards/000001.json").unlink()
    with pytest.raises(DamagedError, match=r"shards/000001.json is missing"):
        store.open(folder).verify()


def test_a_changed_manifest_is_refused(folder):
    manifest = folder / "store.json"
    manifest.write_text(manifest.read_text().replace('"total_rows": 3000', '"total_rows": 2000'))
    with pytest.raises(DamagedError, match=r"store.json is damaged: its digest does not match"):
        store.open(folder)


def forged(folder, **changes):
    """Replace parts of a manifest and give it the digest of its new content."""
    values = json.loads((folder / "store.json").read_text())
    del values["sha256"]
    for name, value in changes.items():
        (values["layout"] if name in values["layout"] else values)[name] = value
    (folder / "store.json").write_text(json.dumps({**values, "sha256": json_digest(values)}))


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"version": 2}, "version 2 of the format"),
        ({"total_rows": 2**60}, "cannot have"),
        ({"total_rows": "many"}, "cannot have"),
        ({"total_rows": True}, "cannot have"),
        ({"widths": {"h": 2**40}}, "whole number from 1"),
        ({"widths": {"../../etc": 4}}, "cannot be the name of a hook"),
        ({"widths": {}}, "1 to 1024 hooks"),
        ({"chunk_rows": 2**30, "shard_rows": 2**30}, "at most 2 GiB"),
        ({"chunk_rows": 0}, "whole number from 1"),
        ({"row_len": 7}, "whole rows of text"),
        ({"storage": "object"}, "choose one of"),
        ({"columns": ["tokens", "tokens"]}, "named twice"),
        ({"columns": [["tokens"]]}, "choose one of"),
        ({"layout": []}, "no layout"),
        ({"origin": 5}, "no origin"),
        ({"statistics": {"h": {"mean": "AAAA"}}}, "no statistics"),
        ({"records": 1}, "no digest"),
    ],
)
def test_a_forged_manifest_is_refused_in_one_line(folder, changes, text):
    forged(folder, **changes)
    with pytest.raises(DamagedError, match=text) as caught:
        store.open(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"[]", b"\xff", b"[" * 100_000, b'{"sha256": 1}', b"null"])
def test_a_manifest_that_is_none_is_refused(folder, content):
    (folder / "store.json").write_bytes(content)
    with pytest.raises(DamagedError, match=r"store.json is damaged"):
        store.open(folder)


def test_a_manifest_of_gigabytes_is_not_read(folder):
    with (folder / "store.json").open("r+b") as file:
        file.truncate(2**31)
    with pytest.raises(DamagedError, match="2,147,483,648 bytes, and at most"):
        store.open(folder)


def test_where_there_is_no_store_is_said(tmp_path, memory):
    with pytest.raises(FileNotFoundError, match="there is no store of activations"):
        store.open(tmp_path)
    with pytest.raises(FileNotFoundError, match="there is no store of activations"):
        store.open(memory)
    (tmp_path / "file").touch()
    with pytest.raises(FileNotFoundError, match="is a file, not a store"):
        store.open(tmp_path / "file")


def test_rows_and_hooks_that_do_not_exist_are_refused(folder):
    opened = store.open(folder)
    with pytest.raises(ConfigError, match="has 3,000 rows"):
        opened.read("h", 2990, 3001)
    with pytest.raises(ConfigError, match="no hook 'g': it has h"):
        opened.read("g", 0, 1)
    with pytest.raises(ConfigError, match="written without text"):
        opened.text(0, 1)
