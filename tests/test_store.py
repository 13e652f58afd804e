"""The activation store: written whole or not at all, continued after any interruption, every fault named."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
import uuid
from pathlib import Path

import file_limit
import ml_dtypes
import numpy as np
import pytest

import jsae
from jsae import store
from jsae.settings import ConfigError
from jsae.store import encoding
from jsae.store.backend import Place, locate
from jsae.store.statistics import QUANTILES

ROWS, D = 3000, 24


@pytest.fixture(scope="module")
def acts():
    rng = np.random.default_rng(0)
    return (rng.standard_normal((ROWS, D)) * np.exp(rng.standard_normal(D)) + 1).astype(np.float32)


@pytest.fixture
def memory():
    return f"memory://{uuid.uuid4().hex}"


def contents(opened):
    """All arrays of a store, as they are stored."""
    return {form.name: opened.array(form.name).read(0, opened.rows) for form in opened.layout.forms()}


def assert_equal(one, other):
    assert one.manifest.digest == other.manifest.digest
    assert {n: s.to_json() for n, s in one.manifest.statistics.items()} == {
        n: s.to_json() for n, s in other.manifest.statistics.items()
    }
    for (name, a), (other_name, b) in zip(contents(one).items(), contents(other).items(), strict=True):
        assert name == other_name
        assert a.dtype == b.dtype
        assert np.array_equal(a.view(np.uint8), b.view(np.uint8)), name


# ---- what is written is read -----------------------------------------------------------------------------------------


def test_float32_is_read_as_it_was(acts, memory):
    written = store.write(memory, acts, storage="float32")
    assert written.read("acts", 0, ROWS).dtype == np.float32
    assert np.array_equal(written.read("acts", 0, ROWS), acts)
    assert np.array_equal(written.read("acts", 1234, 1239), acts[1234:1239])


def test_bfloat16_is_the_default_and_rounds(acts, memory):
    read = store.write(memory, acts).read("acts", 0, ROWS)
    assert np.array_equal(read, acts.astype(ml_dtypes.bfloat16))


def test_int8_has_an_error_of_at_most_half_a_step_per_row(acts, memory):
    acts = acts.copy()
    acts[7], acts[8] = 0, 1e6 * acts[8]
    written = store.write(memory, acts, storage="int8")
    error = np.abs(written.read("acts", 0, ROWS, np.float32) - acts)
    step = np.abs(acts).max(1, keepdims=True) / 127
    assert (error <= 0.5005 * step + 1e-12).all()  # scales are rounded up to float16
    assert not written.read("acts", 7, 8).any()
    assert written.read("acts", 0, 4).dtype == ml_dtypes.bfloat16


def test_int8_refuses_rows_beyond_its_scales(acts, memory):
    large = acts.copy()
    large[2000, 3] = 65504 * 127 * 1.01
    with pytest.raises(ConfigError, match=r"8\.4e\+06 in row 2000.*bfloat16"):
        store.write(memory, large, storage="int8")
    fits = np.full((1, 2), 65504 * 127, np.float32)
    assert np.isfinite(encoding.encode(fits, "int8", "h")["scale"]).all()
    with pytest.raises(ConfigError, match="too small for float16 scales"):
        encoding.encode(acts * 1e-7, "int8", "h")


@pytest.mark.parametrize("storage", ["bfloat16", "int8", "float32"])
@pytest.mark.parametrize(("value", "text"), [(np.nan, "NaN"), (np.inf, "infinite"), (1e20, "as large as")])
def test_numbers_that_nothing_is_learned_from_are_named_and_not_written(acts, memory, storage, value, text):
    bad = acts.copy()
    bad[1999, 5] = value
    with pytest.raises(jsae.ActivationsError, match=rf"acts are {text}.* in row 1999"):
        store.write(memory, bad, storage=storage)
    with pytest.raises(store.IncompleteError):
        store.open(memory)


def test_all_columns_and_hooks_are_read_back(acts, memory):
    rng = np.random.default_rng(1)
    tokens, text = rng.integers(0, 2**31 - 1, ROWS), rng.integers(0, 2**62, ROWS)
    position, kept = np.arange(ROWS) % 50, rng.random(ROWS) < 0.7
    batch = {"a": acts, "b.c": acts[:, :3], "tokens": tokens, "text": text, "position": position, "kept": kept}
    opened = store.write(memory, batch, row_len=50)
    assert dict(opened.hooks) == {"a": D, "b.c": 3}
    assert np.array_equal(opened.tokens(0, ROWS), tokens)
    assert np.array_equal(opened.text(0, ROWS), text)
    assert np.array_equal(opened.position(5, 60), position[5:60])
    assert np.array_equal(opened.kept("b.c", 0, ROWS), kept)
    assert np.array_equal(opened.read("b.c", 0, ROWS), acts[:, :3].astype(ml_dtypes.bfloat16))
    opened.verify()


def test_rows_of_zeros_are_data_and_not_missing(memory):
    opened = store.write(memory, {"h": np.zeros((4000, 4), np.float32), "kept": np.zeros(4000, bool)})
    assert not opened.read("h", 0, 4000).any()
    assert not opened.kept("h", 0, 4000).any()


def test_whole_rows_of_text_stay_in_a_chunk(memory):
    opened = store.write(memory, np.ones((1000 * 7, 2), np.float32), row_len=7)
    assert opened.layout.chunk_rows % 7 == 0
    assert opened.layout.shard_rows % opened.layout.chunk_rows == 0
    assert opened.rows // opened.layout.chunk_rows >= 16


def test_a_large_store_has_chunks_of_about_1024_rows_in_shards_of_about_65536():
    for row_len, chunk in ((1, 1024), (512, 1024), (2048, 2048), (100, 1000)):
        layout = store.layout.suited({"h": 1280}, rows=10**9, row_len=row_len)
        assert (layout.chunk_rows, layout.shard_rows) == (chunk, 64 * chunk)


def test_statistics_are_numpys(acts, memory):
    kept = np.random.default_rng(2).random(ROWS) < 0.5
    statistics = store.write(memory, {"h": acts, "kept": kept}, storage="float32", shard_rows=160).statistics("h")
    x = acts[kept].astype(np.float64)
    assert statistics.kept == kept.sum()
    assert np.allclose(statistics.mean, x.mean(0), rtol=1e-12)
    assert np.isclose(statistics.mean_squared_norm, np.square(x).sum(1).mean(), rtol=1e-12)
    assert np.isclose(statistics.mean_norm, np.linalg.norm(x.mean(0)))
    assert statistics.largest == np.abs(acts[kept]).max()
    norms = np.linalg.norm(x, axis=1)  # all rows are in the sample where a shard has less than 128
    for q in QUANTILES:
        assert np.isclose(statistics.norm_quantiles[f"{q:g}"], np.quantile(norms, q), rtol=1e-5)
    assert abs(statistics.value_quantiles["0.5"] - np.median(x)) < 0.05 * x.std()


def test_the_metadata_are_those_of_zarr(acts, tmp_path):
    opened = store.write(tmp_path / "s", acts)
    metadata = json.loads((tmp_path / "s/acts/acts/zarr.json").read_text())
    assert metadata["shape"] == [ROWS, D]
    assert metadata["data_type"] == "bfloat16"
    assert metadata["codecs"][0]["name"] == "sharding_indexed"
    assert metadata["chunk_grid"]["configuration"]["chunk_shape"] == [opened.layout.shard_rows, D]


def test_equal_activations_give_equal_stores_however_they_come(acts, tmp_path):
    whole = store.write(tmp_path / "a", acts)
    options = {"rows": ROWS, "shard_rows": None}
    parts = store.write("memory://parts", (acts[i : i + 77] for i in range(0, ROWS, 77)), **options)
    assert_equal(whole, parts)


def test_batches_may_be_arrays_of_jax(memory):
    import jax.numpy as jnp

    x = jnp.arange(200.0, dtype=jnp.bfloat16).reshape(50, 4)
    assert np.array_equal(store.write(memory, [x, x]).read("acts", 50, 100), np.asarray(x))


@pytest.mark.parametrize(
    ("batches", "text"),
    [
        (np.ones((5, 3), np.int32), "floating-point"),
        (np.ones(5, np.float32), "at least one hook"),
        ([], "no activations"),
        (7, "not int"),
        ({"h": np.ones((5, 3), np.float32), "tokens": np.ones(5)}, "tokens must be 5 whole numbers"),
        ({"h": np.ones((5, 3), np.float32), "tokens": np.full(5, 2**40)}, "int32 cannot hold"),
        ({"h": np.ones((5, 3), np.float32), "kept": np.ones(5)}, "kept must be 5 booleans"),
        ({"../h": np.ones((5, 3), np.float32)}, "cannot be the name of a hook"),
        ({"h": np.ones((5, 3), np.float32), "g": np.ones((4, 3), np.float32)}, "different numbers of rows"),
        ([np.ones((5, 3), np.float32), np.ones((5, 4), np.float32)], "at first were"),
    ],
)
def test_batches_that_are_none_are_refused(batches, text, memory):
    with pytest.raises(ConfigError, match=text):
        store.write(memory, batches)


def test_torch_tensors_are_refused_with_advice(memory):
    import torch

    with pytest.raises(ConfigError, match=r"torch tensor: convert it"):
        store.write(memory, torch.ones(5, 3))


def test_rows_that_are_not_whole_rows_of_text_are_refused(memory):
    with pytest.raises(ConfigError, match="whole rows of text of 7 tokens"):
        store.write(memory, iter([np.ones((50, 3), np.float32)]), row_len=7)


# ---- locations -------------------------------------------------------------------------------------------------------


def test_addresses_are_tensorstores(monkeypatch):
    for name in ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_REGION", "AWS_DEFAULT_REGION"):
        monkeypatch.delenv(name, raising=False)
    assert locate("gs://b/a/c/").spec == {"driver": "gcs", "bucket": "b", "path": "a/c/"}
    assert locate("s3://b").spec == {"driver": "s3", "bucket": "b"}
    assert locate("file:///a/b").folder == locate("/a/b").folder == Path("/a/b")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://localhost:9000")
    monkeypatch.setenv("AWS_REGION", "here")
    assert (
        locate("s3://b/a").spec | {"endpoint": "http://localhost:9000", "aws_region": "here"} == locate("s3://b/a").spec
    )


@pytest.mark.parametrize("location", ["ftp://a/b", "s3://", "gs:///", "", "memory://"])
def test_other_addresses_are_refused(location):
    with pytest.raises(ConfigError, match=r"location of a store|names no"):
        Place(location)


# ---- interruptions ---------------------------------------------------------------------------------------------------


def writer(location, acts, **options):
    options = {"storage": "int8", "shard_rows": 320, "rows": ROWS, **options}
    return store.write(location, lambda first: (acts[i : i + 100] for i in range(first, ROWS, 100)), **options)


def test_an_exception_leaves_a_store_that_continues_behind_its_last_shard(acts, memory):
    def failing():
        yield acts[:1000]
        raise KeyError

    with pytest.raises(KeyError):
        store.write(memory, failing(), storage="int8", shard_rows=320, rows=ROWS)
    with pytest.raises(store.IncompleteError, match=r"3 of 10 shards are complete.*--resume"):
        store.open(memory)
    firsts = []

    def recording(first):
        firsts.append(first)
        return (acts[i : i + 500] for i in range(first, ROWS, 500))

    resumed = store.write(memory, recording, storage="int8", shard_rows=320, rows=ROWS, resume=True)
    assert firsts == [0, 960]
    assert_equal(resumed, writer(f"{memory}-whole", acts))


def test_an_iterable_is_read_up_to_where_a_resumed_store_continues(acts, memory):
    unfinished = store.Writer(memory, {"acts": D}, shard_rows=320)
    unfinished.append({"acts": acts[:700]})
    unfinished.__exit__(KeyError, KeyError(), None)
    resumed = store.write(memory, (acts[i : i + 150] for i in range(0, ROWS, 150)), shard_rows=320, resume=True)
    assert np.array_equal(resumed.read("acts", 0, ROWS), acts.astype(ml_dtypes.bfloat16))


def test_a_complete_store_is_neither_overwritten_nor_written_again(acts, memory):
    first = writer(memory, acts)
    with pytest.raises(ConfigError, match="already holds this store, complete"):
        writer(memory, acts)

    def unused(first):
        yield acts[:10]
        pytest.fail("read although the store is complete")

    assert_equal(store.write(memory, unused, storage="int8", shard_rows=320, rows=ROWS, resume=True), first)
    with pytest.raises(ConfigError, match=r'storage "int8" \(now "float32"\)'):
        writer(memory, acts, storage="float32", resume=True)
    writer(f"{memory}2", acts, origin={"model": "a"})
    with pytest.raises(ConfigError, match=r'model "a" \(now "b"\)'):
        writer(f"{memory}2", acts, origin={"model": "b"}, resume=True)


def test_an_unfinished_store_is_continued_only_when_asked(acts, memory):
    with pytest.raises(KeyError), store.Writer(memory, {"acts": D}):
        raise KeyError
    with pytest.raises(ConfigError, match="unfinished: continue it with"):
        store.Writer(memory, {"acts": D})


def test_a_location_with_something_else_is_refused(acts, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match="already holds something else"):
        store.write(tmp_path, acts)
    with pytest.raises(ConfigError, match="is a file"):
        store.write(tmp_path / "notes.txt", acts)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["notes.txt"]


KILLED = """
    import sys, time
    import numpy as np
    from jsae import store
    location, source = sys.argv[1:3]
    acts = np.load(source)
    def batches(first):
        print("begun", first, flush=True)
        for i in range(first, len(acts), 200):
            time.sleep(0.002)
            yield acts[i : i + 200]
    store.write(location, batches, shard_rows=320, rows=len(acts), resume=True)
"""


def start(code, *arguments, env=None):
    command = [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=env or os.environ)


def test_a_store_that_is_killed_at_random_moments_ends_as_one_that_was_not(acts, tmp_path):
    many = np.concatenate([acts] * 4)
    np.save(tmp_path / "acts.npy", many)
    rng, complete = np.random.default_rng(3), []
    for _ in range(6):
        process = start(KILLED, tmp_path / "killed", tmp_path / "acts.npy")
        process.stdout.readline()
        time.sleep(rng.uniform(0.005, 0.08))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        complete.append(len(list((tmp_path / "killed/shards").glob("*.json"))))
    process = start(KILLED, tmp_path / "killed", tmp_path / "acts.npy")
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    assert any(0 < count < 38 for count in complete), f"no kill came between two shards: {complete}"
    whole = store.write(tmp_path / "whole", many, shard_rows=320)
    assert_equal(store.open(tmp_path / "killed"), whole)
    store.open(tmp_path / "killed").verify()


FULL = """
    import resource, signal, sys
    import numpy as np
    from jsae import store
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    acts = np.load(sys.argv[2])
    def batches(first):
        for i in range(first, len(acts), 160):
            if i >= 960:  # the disk is full from now on
                resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))
            yield acts[i : i + 160]
    try:
        store.write(sys.argv[1], batches, shard_rows=320, rows=len(acts), storage="float32")
    except OSError as error:
        print(type(error).__name__, error)
"""


def test_a_full_disk_is_one_error_and_the_store_continues_when_there_is_room(acts, tmp_path):
    np.save(tmp_path / "acts.npy", acts)
    process = start(FULL, tmp_path / "s", tmp_path / "acts.npy", env=file_limit.ENVIRONMENT)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    assert output.startswith("OSError"), output
    assert "File too large" in output
    assert "--resume" in output
    assert len(output.splitlines()) == 1
    with pytest.raises(store.IncompleteError, match="shards are complete"):
        store.open(tmp_path / "s")
    resumed = store.write(tmp_path / "s", acts, shard_rows=320, storage="float32", resume=True)
    assert np.array_equal(resumed.read("acts", 0, ROWS), acts)
    resumed.verify()


NOT_WHOLE = """
    import resource, signal, sys
    from jsae.store.backend import Place
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    place = Place(sys.argv[1])
    place.write("store.json", b"old")
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
    try:
        place.write("store.json", b"new" * 1000)
    except OSError as error:
        print(error.strerror, error.filename)
"""


def test_a_value_that_does_not_fit_leaves_the_old_one(tmp_path):
    output, errors = start(NOT_WHOLE, tmp_path / "s", env=file_limit.ENVIRONMENT).communicate(timeout=60)
    assert output.startswith(f"File too large {tmp_path / 's'}: store.json"), errors
    assert [path.name for path in (tmp_path / "s").iterdir()] == ["store.json"]
    assert (tmp_path / "s/store.json").read_bytes() == b"old"


def test_reading_and_writing_need_neither_jax_nor_torch():
    code = """
        import sys
        import numpy as np
        import jsae.store
        jsae.store.write("memory://a", np.ones((100, 4), np.float32)).verify()
        print(sorted({"jax", "torch"} & set(sys.modules)))
    """
    output, errors = start(code).communicate(timeout=60)
    assert output.strip() == "[]", errors
