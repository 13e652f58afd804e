"""A store on object storage: a server of this machine with the interface of S3, used through TensorStore's driver."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import object_storage
import pytest

from jsae import store
from jsae.manifest import DamagedError
from jsae.store import StoreSource

ROOT = Path(__file__).resolve().parents[1]
CREDENTIALS = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_EC2_METADATA_DISABLED": "true"}
OPTIONS = {"shard_rows": 500, "storage": "int8"}


@pytest.fixture
def bucket(monkeypatch):
    with object_storage.serving() as (address, bucket):
        for name, value in {**CREDENTIALS, "AWS_ENDPOINT_URL": address, "AWS_REGION": "us-east-1"}.items():
            monkeypatch.setenv(name, value)
        yield bucket


@pytest.fixture(scope="module")
def acts():
    return np.random.default_rng(0).standard_normal((3000, 8)).astype(np.float32)


def contents(opened):
    return {form.name: opened.array(form.name).read(0, opened.rows) for form in opened.layout.forms()}


def test_a_store_on_object_storage_is_the_one_in_memory(bucket, acts):
    written = store.write("s3://bucket/some/acts", acts, **OPTIONS)
    in_memory = store.write("memory://objects", acts, **OPTIONS)
    assert all(path.startswith("/bucket/some/acts/") for path in bucket.objects)
    assert written.manifest.digest == in_memory.manifest.digest
    expected = contents(in_memory)
    assert all(np.array_equal(array, expected[name]) for name, array in contents(written).items())
    assert np.array_equal(StoreSource(written).row_numbers(3000), StoreSource(in_memory).row_numbers(3000))
    store.open("s3://bucket/some/acts").verify()


def test_an_interrupted_store_on_object_storage_continues(bucket, acts):
    def batches(first):
        for start in range(first, 3000, 250):
            bucket.full = start > 1500 and first == 0
            yield acts[start : start + 250]

    with pytest.raises(OSError, match=r"shard \d cannot be written: .*QuotaExceeded.*--resume"):
        store.write("s3://bucket/acts", batches, rows=3000, **OPTIONS)
    bucket.full = False
    with pytest.raises(store.IncompleteError, match="of 6 shards are complete"):
        store.open("s3://bucket/acts")
    resumed = store.write("s3://bucket/acts", batches, rows=3000, resume=True, **OPTIONS)
    assert resumed.manifest.digest == store.write("memory://again", acts, **OPTIONS).manifest.digest
    resumed.verify()


def test_lost_and_changed_objects_are_named(bucket, acts):
    opened = store.write("s3://bucket/acts", acts, **OPTIONS)
    key = "/bucket/acts/acts/acts/c/1/0"
    content = bucket.objects.pop(key)
    with pytest.raises(DamagedError, match=r"a shard is missing.*acts/c/1/0"):
        opened.read("acts", 0, 3000)
    bucket.objects[key] = bytes([content[0] ^ 1]) + content[1:]
    with pytest.raises(DamagedError, match=r"acts/c/1/0.*Digest mismatch"):
        opened.read("acts", 0, 3000)


def test_an_address_without_a_store_and_one_with_something_else_are_told_apart(bucket, acts):
    with pytest.raises(FileNotFoundError, match="there is no store of activations in s3://bucket/acts"):
        store.open("s3://bucket/acts")
    bucket.objects["/bucket/acts/notes.txt"] = b"mine"
    with pytest.raises(ValueError, match="already holds something else"):
        store.write("s3://bucket/acts", acts)


def test_the_command_writes_to_object_storage(bucket):
    words = ["--num_tokens=2000", "--context_size=64", "--out=s3://bucket/acts"]
    done = subprocess.run(
        [sys.executable, "-m", "experiments.collect", *words],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    opened = store.open("s3://bucket/acts")
    assert opened.rows == 2048
    assert opened.tokens(0, 64).any()
    opened.verify()
