"""A process that has too many files open is told that, and not that its files are broken."""

import json
import subprocess
import sys
import textwrap
from pathlib import Path

import explorer_toy as toy
import pytest

ROOT = Path(__file__).resolve().parents[1]

READERS = {
    "records": "store.Store(run / 'explorer' / 'records' / HOOK)",
    "a column of records": "records._mapped('count')",
    "an exported SAE": "torch_sae.load(run / 'sae' / HOOK)",
    "an export for the hub": "hub.plan(run, 'owner/name', license='mit')",
    "a v1 export": "list(importer._lines(run / 'batch.jsonl.gz'))",
    "a tokenizer": "tokenizer.load(demo / 'tokenizer')",
    "the bytes of tokens": "tokenizer_file.read_token_bytes(demo / 'tokenizer' / 'token_bytes.pt')",
    "a model": "weights.read(next(demo.glob('model_*.pt')))",
    "a save of pretraining": "pretraining.last_state(run)",
    "a parquet shard": "shards.units(run / 'shard.parquet', [run / 'shard.parquet'], 0)",
    "a row group": "list(units.documents(shard))",
    "compressed JSON lines": "units.all_units(str(run / 'batch.jsonl.gz'))",
    "a module of the standard library": "library._read_source(Path(json.__file__))",
    "a table of an evaluation": "tables.kept(run / 'labels.json')",
}

SCRIPT = """
    import gzip, json, os, resource, sys
    from pathlib import Path
    import pyarrow, pyarrow.parquet, torch
    from bridge import hub, torch_sae
    from bridge.nanochat import checkpoint, library, pretraining, shards, tokenizer, tokenizer_file, units, weights
    from bridge.neuronpedia import importer
    from bridge.run import tables
    from jsae.records import store
    run, HOOK, readers = Path(sys.argv[1]), sys.argv[2], json.loads(sys.argv[3])
    demo = Path(checkpoint.__file__).parent / "demo"
    with gzip.open(run / "batch.jsonl.gz", "wt") as file:
        file.write('{"text": "a"}\\n')
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a", "b"]}), run / "shard.parquet")
    torch.save({"step": 1}, run / "optim_000001_rank0.pt")
    (shard,) = units.all_units(str(run / "shard.parquet"))
    def tried(code):
        try:
            eval(code)
        except Exception as error:
            return type(error).__name__, getattr(error, "errno", None), str(error)
        return "read", None, ""
    records = store.Store(run / "explorer" / "records" / HOOK)
    resource.setrlimit(resource.RLIMIT_NOFILE, (100, 100))
    said = {}
    for name, code in readers.items():
        assert tried(code)[0] == "read", (name, tried(code))
        opened = []
        try:
            while True:
                opened.append(os.open("/dev/null", os.O_RDONLY))
        except OSError:
            said[name] = tried(code)
        for descriptor in opened:
            os.close(descriptor)
    print(json.dumps(said))
"""


@pytest.fixture(scope="module")
def said(tmp_path_factory) -> dict[str, list]:
    """Errors of every reader when no file can be opened; before that, it read."""
    run = tmp_path_factory.mktemp("runs") / "toy"
    toy.write_store(run)
    arguments = [str(run), toy.HOOK, json.dumps(READERS)]
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(SCRIPT), *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("reader", READERS)
def test_too_many_open_files_are_told_as_that(said, reader):
    kind, number, text = said[reader]
    assert (kind, number) == ("OSError", 24), (kind, number, text)
    assert "Too many open files" in text
    assert "broken" not in text


def test_records_say_what_to_do_about_too_many_open_files(said):
    assert "ulimit -n" in said["a column of records"][2]
