"""Collecting activations: what the store holds, by how many processes, after kills, and what is refused before."""

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
import numpy as np
import pytest
import python_text
import torch

import bridge.nanochat
from bridge import activations, collecting
from bridge.nanochat.corpus import Corpus
from bridge.selection import kept
from experiments.collect import CollectConfig
from jsae import store
from jsae.settings import ConfigError

ROOT = Path(__file__).resolve().parents[1]
T = 64
HOOKS = ["blocks.1.hook_resid_post", "blocks.2.ln2.hook_normalized"]


@pytest.fixture(scope="module")
def nano():
    return bridge.nanochat.load("demo")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Forty files of Python."""
    return python_text.copied(tmp_path_factory.mktemp("text"), 80)


def text(data, **settings):
    settings = {"num_tokens": 40 * T, "context_size": T, "tokens_per_forward": 4 * T, "shard_rows": 160, **settings}
    return collecting.Text(data, **settings)


def memory():
    return f"memory://{uuid.uuid4().hex}"


@pytest.fixture(scope="module")
def whole(nano, data):
    location = memory()
    collecting.collect(nano, HOOKS, location, text(data))
    return store.open(location)


def assert_equal(one, other):
    assert one.manifest.digest == other.manifest.digest
    for form in one.layout.forms():
        arrays = [opened.array(form.name).read(0, opened.rows) for opened in (one, other)]
        assert np.array_equal(*(array.view(np.uint8) for array in arrays)), form.name


# ---- what it holds ---------------------------------------------------------------------------------------------------


def test_activations_are_those_of_the_model_on_the_stored_tokens(nano, data):
    location = memory()
    settings = text(data, storage="float32", exclude_tokens="special")
    collecting.collect(nano, HOOKS, location, settings)
    opened = store.open(location)
    assert opened.rows == 40 * T
    excluded = tuple(opened.manifest.origin["excluded"])
    shard = opened.layout.shard_rows
    tokens = opened.tokens(shard, 2 * shard).reshape(-1, T)
    for first in range(0, len(tokens), 4):  # passes of four rows, from the beginning of each shard
        ids = tokens[first : first + 4]
        passed = activations.forward(nano.model, HOOKS, ids, excluded=excluded, drop_sinks=True)
        start, stop = shard + first * T, shard + (first + len(ids)) * T
        for hook in HOOKS:
            assert np.array_equal(opened.read(hook, start, stop), passed.acts[hook].flatten(0, 1).numpy())
            mask = kept(passed.acts[hook], torch.from_numpy(ids).long(), excluded, True)
            assert np.array_equal(opened.kept(hook, start, stop), mask.flatten().numpy())


def test_bos_is_stored_and_does_not_count(whole, nano):
    bos = whole.tokens(0, whole.rows) == nano.tokenizer.bos_token_id
    assert bos.reshape(-1, T)[:, 0].all()
    assert not whole.kept(HOOKS[0], 0, whole.rows)[bos].any()
    assert whole.statistics(HOOKS[0]).kept == whole.kept(HOOKS[0], 0, whole.rows).sum() > 0.9 * whole.rows * (1 - 1 / T)


def test_tokens_of_a_document_in_the_order_of_their_positions_are_the_document(whole, nano, data):
    corpus = Corpus(data, nano.tokenizer, split="train", row_len=T)
    documents = {tuple(nano.tokenizer.encode(text)[:100]): nano.tokenizer.encode(text) for text in corpus.documents()}
    tokens, numbers, position = (read(0, whole.rows) for read in (whole.tokens, whole.text, whole.position))
    assert len(set(numbers)) > 8
    complete = 0
    for number in set(numbers):
        mine = (numbers == number) & (position > 0)
        order = np.argsort(position[mine])
        assert np.array_equal(position[mine][order], np.arange(1, mine.sum() + 1))
        ids = tokens[mine][order].tolist()
        document = documents.get(tuple(ids[:100]))
        if document is not None:
            assert ids == document[: len(ids)]
            complete += 1
    assert complete > 5


def test_documents_that_begin_within_a_row_are_numbered(nano, tmp_path):
    (tmp_path / "short.jsonl").write_text("".join(json.dumps({"text": "ab " * n}) + "\n" for n in range(1, 60)))
    corpus = Corpus(str(tmp_path / "short.jsonl"), nano.tokenizer, split="all", row_len=T)
    rows = collecting.TextRows(corpus, nano.tokenizer.bos_token_id)
    read = rows.next_rows(12)
    starts = (read["tokens"] == nano.tokenizer.bos_token_id) & (read["position"] == 0)
    inside = starts[:, 1:]  # in the first column it may be the BOS of a row
    assert inside.sum() > 5
    assert (np.diff(read["text"], axis=1)[inside] != 0).all()
    assert (np.diff(read["text"], axis=1)[~inside] == 0).all()
    position = rows.position()
    following = rows.next_rows(5)
    resumed = collecting.TextRows(corpus, nano.tokenizer.bos_token_id)
    resumed.seek(json.loads(json.dumps(position)))
    assert all(
        np.array_equal(column, resumed_column)
        for column, resumed_column in zip(following.values(), resumed.next_rows(5).values(), strict=True)
    )


def test_several_hooks_in_one_pass_are_those_of_each_alone(whole, nano, data):
    location = memory()
    collecting.collect(nano, HOOKS[1:], location, text(data))
    alone = store.open(location)
    assert np.array_equal(alone.read(HOOKS[1], 0, alone.rows), whole.read(HOOKS[1], 0, whole.rows))


def test_the_manifest_says_where_the_activations_are_from(whole, nano):
    origin = whole.manifest.origin
    assert origin["model"] == nano.fingerprint
    assert origin["tokenizer"] == nano.tokenizer.fingerprint
    assert origin["streams"] == 8
    assert {"jsae", "torch", "tensorstore", "numpy"} <= set(whole.manifest.versions)
    whole.verify()


# ---- processes and interruptions -------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [2, 3, 8])
def test_any_number_of_processes_writes_the_same_store(whole, nano, data, count):
    location = memory()
    manifests = [collecting.collect(nano, HOOKS, location, text(data), process=(i, count)) for i in range(count)]
    assert all(manifest is None for manifest in manifests[:-1])
    assert_equal(store.open(location), whole)


PROCESSES = """
    import os, sys, time
    import numpy as np
    import torch
    torch.set_num_threads(1)
    import bridge.nanochat
    from bridge import collecting
    out, data, seed, kills, count, *hooks = sys.argv[1:]
    nano = bridge.nanochat.load("demo")
    T = 64
    text = collecting.Text(data, num_tokens=40 * T, context_size=T, tokens_per_forward=4 * T, shard_rows=160)
    rng = np.random.default_rng(int(seed))

    def begin(index, resume):
        child = os.fork()
        if child == 0:
            try:
                collecting.collect(nano, hooks, out, text, resume=resume, process=(index, int(count)))
                os._exit(0)
            except BaseException as error:
                print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
                os._exit(1)
        return child

    def complete():
        return len(os.listdir(out + "/shards")) if os.path.isdir(out + "/shards") else 0

    for attempt in range(int(kills)):
        wanted, deadline = complete() + rng.integers(0, 3), time.monotonic() + 20
        children = [begin(index, True) for index in range(int(count))]
        while complete() < min(wanted, 13) and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.03))
        for child in children:
            os.kill(child, 9)
            os.waitpid(child, 0)
        print(complete(), flush=True)
    children = [begin(index, True) for index in range(int(count))]
    print("ends", *(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children), flush=True)
"""


@pytest.mark.parametrize(("kills", "count"), [(8, 1), (0, 3), (4, 2)])
def test_processes_that_are_killed_at_random_moments_end_with_the_same_store(whole, data, tmp_path, kills, count):
    command = [sys.executable, "-c", textwrap.dedent(PROCESSES), tmp_path / "s", data, 5, kills, count, *HOOKS]
    done = subprocess.run([*map(str, command)], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    *complete, ends = done.stdout.splitlines()
    assert ends.split() == ["ends", *["0"] * count], done.stderr
    assert not kills or any(0 < int(number) < 14 for number in complete), complete
    opened = store.open(tmp_path / "s")
    assert_equal(opened, whole)
    opened.verify()


def command(*words):
    return subprocess.Popen(
        [sys.executable, "-m", "experiments.collect", *map(str, words)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


def test_a_command_that_is_stopped_continues_to_the_same_store(data, tmp_path):
    words = [f"--data={data}", "--layer=1,2", "--num_tokens=64_000", "--context_size=64"]
    words += ["--tokens_per_forward=2048", "--shard_rows=2048", "--hook_type=mlp_in"]
    process = command(*words, f"--out={tmp_path / 's'}")
    deadline = time.monotonic() + 60
    while not list((tmp_path / "s").glob("shards/*.json")) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 75, errors
    assert f"--out={tmp_path / 's'} --resume" in output
    with pytest.raises(store.IncompleteError):
        store.open(tmp_path / "s")
    before = len(list((tmp_path / "s/shards").glob("*.json")))
    output, errors = command(*words, f"--out={tmp_path / 's'}", "--resume").communicate(timeout=120)
    assert f"written to {tmp_path / 's'}: 64,000 tokens" in output, errors
    opened = store.open(tmp_path / "s")
    assert 0 < before < opened.layout.shards(opened.rows)
    opened.verify()


FULL = """
import resource, runpy, signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
runpy.run_module("experiments.collect", run_name="__main__", alter_sys=True)
"""


def test_a_full_disk_is_one_line(data, tmp_path):
    words = [f"--data={data}", f"--out={tmp_path / 's'}", "--num_tokens=2560", "--context_size=64", "--storage=float32"]
    done = subprocess.run(
        [sys.executable, "-c", FULL, *words],
        cwd=ROOT,
        env=file_limit.ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 1
    fatal = [line for line in done.stderr.splitlines() if line.startswith("FATAL")]
    assert len(fatal) == 1, done.stderr
    assert "shard 0 cannot be written" in fatal[0]
    assert "File too large" in fatal[0]
    assert "--resume" in fatal[0]
    assert "Traceback" not in done.stderr


# ---- what is refused -------------------------------------------------------------------------------------------------


def test_another_model_or_text_does_not_continue_a_store(nano, data, tmp_path, monkeypatch):
    location = memory()
    collecting.collect(nano, HOOKS, location, text(data), process=(0, 2))
    with pytest.raises(ConfigError, match="already holds this store, unfinished"):
        collecting.collect(nano, HOOKS, location, text(data))
    with pytest.raises(ConfigError, match=r"drop_sinks true \(now false\)"):
        collecting.collect(nano, HOOKS, location, text(data, drop_sinks=False), resume=True)
    with pytest.raises(ConfigError, match=r"rows 2560 \(now 1280\)"):
        collecting.collect(nano, HOOKS, location, text(data, num_tokens=20 * T), resume=True)
    monkeypatch.setitem(vars(nano), "fingerprint", "another")
    with pytest.raises(ConfigError, match=r'holds another store, with model ".*" \(now "another"\)'):
        collecting.collect(nano, HOOKS, location, text(data), resume=True)


def test_a_store_that_does_not_fit_on_the_disk_is_refused_with_the_figure(nano, data, tmp_path):
    with pytest.raises(ConfigError, match=r"need [0-9,.]+ GiB .* bytes a token.*are free: lower --num_tokens"):
        collecting.collect(nano, HOOKS, tmp_path / "s", text(data, num_tokens=2**45, shard_rows=None))
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize("name", ["store.json", "config.json"])
def test_a_place_within_a_store_or_a_run_is_refused(nano, data, tmp_path, name):
    (tmp_path / name).write_text("{}")
    with pytest.raises(ConfigError, match=r"lies within the (store|run)"):
        collecting.collect(nano, HOOKS, tmp_path / "s", text(data))


def test_what_the_model_does_not_have_is_refused(nano, data):
    with pytest.raises(ValueError, match="the model has 6 layers"):
        collecting.collect(nano, ["blocks.6.hook_resid_post"], memory(), text(data))
    with pytest.raises(ConfigError, match="context_size is 100000: this model takes"):
        collecting.collect(nano, HOOKS, memory(), text(data, context_size=100_000))
    with pytest.raises(ConfigError, match="hooks must be named once"):
        collecting.collect(nano, HOOKS + HOOKS, memory(), text(data))
    with pytest.raises(ConfigError, match="8 streams, by at most as many processes, and this is process 0 of 9"):
        collecting.collect(nano, HOOKS, memory(), text(data), process=(0, 9))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({}, "nowhere to write"),
        ({"out": "a", "layer": ("x",)}, "--layer has 'x'"),
        ({"out": "a", "hook_type": ()}, "nothing to read"),
        ({"out": "a", "hook_type": ("resid_mid",)}, "hook_type is 'resid_mid': choose one of"),
        ({"out": "a", "num_tokens": 0}, "num_tokens is 0"),
    ],
)
def test_wrong_flags_are_refused_before_anything_is_loaded(flags, message):
    with pytest.raises(ConfigError, match=message):
        CollectConfig(**flags)


def test_an_address_of_another_kind_is_refused_in_one_line(data):
    process = command(f"--data={data}", "--out=ftp://a/b")
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    assert errors.startswith("FATAL ftp://a/b is not a location of a store")
