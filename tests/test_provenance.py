"""The origin of a latent: what was read between checkpoints, and the tables of documents and tokens."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import stage_files
import torch
from tiny_nanochat import write

from bridge.evaluate.text import Text
from bridge.hooks import hook_name
from bridge.nanochat import tokenizer as tokenizers
from bridge.nanochat.corpus import Corpus
from bridge.nanochat.reading_order import between
from bridge.run import Run
from bridge.stages import origin_tables, provenance
from bridge.stages.provenance import Firings, growth
from bridge.training import train
from experiments import diff
from experiments import provenance as command
from jsae.settings import ConfigError

HOOK = hook_name(1, "resid_post")
TOKENIZER = tokenizers.load(stage_files.TOKENIZER)


# ---- what was read --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    """Three shards of nanochat, of four row groups of two documents each; the last shard is held out."""
    folder = tmp_path_factory.mktemp("nanochat") / "base_data"
    folder.mkdir()
    for shard in range(3):
        texts = [f"shard {shard} group {i // 2} document {i % 2}" for i in range(8)]
        table = pyarrow.table({"text": texts})
        pyarrow.parquet.write_table(table, folder / f"shard_{shard:05d}.parquet", row_group_size=2)
    return folder


def at(shard: int, group: int, epoch: int | None = None) -> dict:
    state = {"pq_idx": shard, "rg_idx": group}
    return {"step": 1, "dataloader_state_dict": state if epoch is None else state | {"epoch": epoch}}


def parts(shards: Path, *metas: dict) -> list[tuple[str, str]]:
    reading = between(str(shards), "train", *metas, TOKENIZER)
    assert reading.order == "shards"
    return [(part.unit.source[0], part.unit.where) for part in reading.parts]


def test_row_groups_between_two_checkpoints_are_those_that_upstream_read(shards):
    found = parts(shards, at(0, 2), at(1, 1))
    assert found == [
        ("shard_00000.parquet", "row group 2"),
        ("shard_00000.parquet", "row group 3"),
        ("shard_00001.parquet", "row group 0"),
        ("shard_00001.parquet", "row group 1"),
    ]
    reading = between(str(shards), "train", at(1, 3), at(1, 3), TOKENIZER)
    texts = [document for part in reading.parts for document in part.documents()]
    assert texts == [(0, "shard 1 group 3 document 0"), (1, "shard 1 group 3 document 1")]


def test_the_text_begins_anew_with_every_epoch(shards):
    wrapped = parts(shards, at(1, 2, 1), at(0, 0, 2))
    assert [where for _, where in wrapped] == ["row group 0", "row group 2", "row group 3"]
    assert len(parts(shards, at(1, 2, 1), at(0, 0, 3))) == 8


def test_places_that_the_text_does_not_have_or_that_go_back_are_refused(shards):
    with pytest.raises(ConfigError, match=r"trained up to shard 7, counted from 0, and the folder has 2 to train on"):
        between(str(shards), "train", at(0, 0), at(7, 0), TOKENIZER)
    with pytest.raises(ConfigError, match="trained further into the text than the later one: swap them"):
        between(str(shards), "train", at(1, 0), at(0, 2), TOKENIZER)


@pytest.mark.parametrize("meta", [{}, {"dataloader_state_dict": {"pq_idx": "x", "rg_idx": -1}}, {"user_config": {}}])
def test_where_nothing_is_known_the_whole_text_is_searched(shards, meta):
    reading = between(str(shards), "train", meta, meta, TOKENIZER)
    assert reading.order == "unknown"
    assert len(reading.parts) == 8
    assert "do not say how far" in reading.note


def test_text_that_is_not_the_folder_of_shards_is_searched_as_a_whole(tmp_path):
    (tmp_path / "a.txt").write_text("one")
    (tmp_path / "b.jsonl").write_text('{"text": "two"}\n')
    reading = between(f"{tmp_path}/a.txt,{tmp_path}/b.jsonl", "all", at(0, 0), at(1, 1), TOKENIZER)
    assert [part.unit.source[0] for part in reading.parts] == ["a.txt", "b.jsonl"]
    assert "is not the folder of shards" in reading.note


def test_a_pretraining_of_this_project_is_replayed(tmp_path):
    for number in range(40):
        (tmp_path / f"{number}.txt").write_text(f"text {number} " * (5 + number))
    spec = f"{tmp_path}/*.txt"
    settings = {"seed": 3, "sequence_len": 31, "batch_rows": 4, "heldout_fraction": 0.1, "data": spec}
    corpus = Corpus(spec, TOKENIZER, split="train", row_len=32, seed=3, heldout_fraction=0.1)
    corpus.next_rows(4 * 5)
    rows = corpus.next_rows(4 * 2)
    reading = between(spec, "train", *({"step": step, "user_config": settings} for step in (5, 7)), TOKENIZER)
    assert reading.order == "replayed"
    read = {document for part in reading.parts for _, document in part.documents()}
    names = {f"text {number}" for number in range(40) if any(f"text {number} " in d for d in read)}
    seen = TOKENIZER.decode([int(i) for i in rows.ravel()])
    assert {name for name in names if f"{name} " in seen} == names
    assert len(names) < 40
    for name, value in {"batch_rows": 2**40, "sequence_len": 0, "seed": -1, "heldout_fraction": 7.0}.items():
        metas = ({"step": step, "user_config": settings | {name: value}} for step in (5, 7))
        assert between(spec, "train", *metas, TOKENIZER).order == "unknown", name
    other = between(spec, "train", *({"step": s, "user_config": settings | {"data": "x"}} for s in (5, 7)), TOKENIZER)
    assert other.order == "unknown"
    assert "trained on 'x': give it with --data" in other.note


# ---- when it grew ---------------------------------------------------------------------------------------------------

TABLE = {
    "checkpoints": [{"name": name} for name in ("a", "b", "c")],
    "kinds": ["exclusive", "shared", "dead"],
    "latents": {
        "strength": [[0.0, 0.1, 1.0], [1.0, 0.9, 0.8], [0, 0, 0]],
        "present": [[0.0, -0.4, 1.0], [1.0, 0.9, 0.8], [0, 0, 0]],
    },
}


def test_a_latent_grew_where_its_level_rises_most():
    found = growth(TABLE, 0)
    assert found[:2] == (1, 2)
    assert found.levels == [0.0, 0.4, 1.0]


@pytest.mark.parametrize(
    ("latent", "problem"),
    [
        (1, r"--latent=1 does not grow between any two checkpoints \(1\.00 at a, 0\.90 at b, 0\.80 at c\)"),
        (2, "--latent=2 is dead"),
        (3, "--latent=3: the crosscoder has the latents 0 to 2"),
    ],
)
def test_latents_without_growth_are_refused(latent, problem):
    with pytest.raises(ConfigError, match=problem):
        growth(TABLE, latent)


# ---- the tables -----------------------------------------------------------------------------------------------------


def test_tables_are_what_the_sums_say():
    first_word, second_word, end = (TOKENIZER.encode(word)[0] for word in (" self", " name", "."))
    bos = TOKENIZER.bos_token_id
    tokens = np.array(
        [
            [bos, first_word, second_word, first_word, second_word, end],
            [bos, second_word, first_word, end, bos, first_word],
        ],
        np.int32,
    )
    document = np.array([[-1, 0, 0, 0, 0, 0], [-1, 1, 1, 1, -1, 2]], np.int32)
    values = np.array([[[0, 2, 0, 1, 0, 0], [0, 0, 4, 0, 0, 9]]], np.float32)
    counts = np.ones((2, 6), bool)
    counts[1, 5] = False  # a token that does not count
    before = np.array([[1, 5, 1, 4, 1, np.nan], [1, 1, 3, np.nan, 1, np.nan]], np.float32)
    after = np.array([[1, 1, 1, 1, 1, np.nan], [1, 1, 2, np.nan, 1, np.nan]], np.float32)
    rows = Text(tokens, document, np.zeros_like(tokens), [b"", b"", b""])
    sources = [("a.txt", "", 0), ("b.parquet", "row group 1", 3), ("b.parquet", "row group 1", 4)]
    firings = Firings(rows, sources, values, counts, before, after)
    origin_tables_least, origin_tables.LEAST = origin_tables.LEAST, 2
    try:
        found = origin_tables.of_latent(firings, 0, 10, TOKENIZER)
    finally:
        origin_tables.LEAST = origin_tables_least
    first, second = found["documents"]
    assert (first["file"], first["part"], first["document"]) == ("b.parquet", "row group 1", 3)
    assert (first["total"], first["fired"], first["tokens"], first["largest"], first["at"]) == (4, 1, 3, 4, " self")
    assert (second["file"], second["total"], second["fired"]) == ("a.txt", 3, 2)
    assert [(row["file"], row["total"], row["tokens"]) for row in found["files"]] == [
        ("b.parquet row group 1", 4, 4),
        ("a.txt", 3, 5),
    ]
    assert found["loss"]["where_it_fires"] == {"tokens": 3, "before": 4.0, "after": pytest.approx(4 / 3)}
    assert found["loss"]["elsewhere"]["before"] == found["loss"]["elsewhere"]["after"] == 1
    (token,) = found["tokens"]
    assert (token["token"], token["occurrences"], token["total_fall"], token["mean_fall"]) == (" name", 2, 7, 3.5)
    assert [(row["predicted"], row["before"], row["after"]) for row in found["occurrences"]] == [
        (" name", 5, 1),
        (" name", 4, 1),
        (".", 3, 2),
    ]
    assert found["occurrences"][0]["text_before"] == ""  # BOS is not of the document


# ---- a run ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Run:
    """A run over two checkpoints that say where in the shards they were, compared by `diff`."""
    root = tmp_path_factory.mktemp("series")
    data = root / "base_data"
    data.mkdir()
    sources = sorted(Path(json.__file__).parents[1].glob("*.py"))[:24]
    for shard in range(3):
        texts = [file.read_text(errors="replace")[:6000] for file in sources[8 * shard : 8 * shard + 8]]
        pyarrow.parquet.write_table(
            pyarrow.table({"text": texts}), data / f"shard_{shard:05d}.parquet", row_group_size=2
        )
    checkpoints = root / "base_checkpoints" / "d4"
    for step, place, change in ((100, (0, 1), 0.3), (200, (1, 0), 0.0)):
        write(checkpoints, stage_files.model(change, step), "G7", step)
        meta = checkpoints / f"meta_{step:06d}.json"
        state = {"dataloader_state_dict": {"pq_idx": place[0], "rg_idx": place[1]}}
        meta.write_text(json.dumps(json.loads(meta.read_text()) | {"step": step} | state))
    shutil.copytree(stage_files.TOKENIZER, root / "tokenizer")
    made = train(
        checkpoints=(f"{checkpoints}@100", "200"),
        layer="1",
        activation="batchtopk",
        k=6,
        expansion_factor=2,
        exclusive_latents=8,
        num_activations=16_384,
        batch_size=512,
        block_size=4096,
        context_size=32,
        heldout_tokens=2000,
        learning_rate=0.01,
        data=str(data),
        output_dir=str(root / "run"),
    )
    diff.main(diff.DiffConfig(run_dir=str(made.path), heldout_tokens=2000))
    return made


@pytest.fixture(scope="module")
def grown(run) -> list[int]:
    """Latents that grew, those that fire most first."""
    table = json.loads(run.table_file("stages").read_text())[HOOK]
    levels = np.maximum(np.abs(table["latents"]["strength"]), np.abs(table["latents"]["present"]))
    alive = np.array(table["latents"]["density"]) * (levels[:, 1] > levels[:, 0]) * (np.array(table["kinds"]) != "dead")
    return [int(i) for i in np.argsort(-alive)[:2]]


def test_the_command_writes_where_latents_come_from(run, grown, capsys):
    command.main(command.ProvenanceConfig(run_dir=str(run.path), latent=tuple(grown)))
    shown = capsys.readouterr().out
    for latent in grown:
        found = json.loads(run.provenance_file(HOOK, latent).read_text())
        assert found["text"]["order"] == "shards"
        assert found["grew"] == {"from": "d4-100", "to": "d4-200"}
        assert {row["file"] for row in found["documents"]} <= {"shard_00000.parquet", "shard_00001.parquet"}
        assert {row["part"] for row in found["documents"]} <= {f"row group {i}" for i in range(4)}
        assert sum(row["fired"] for row in found["files"]) == found["fired"] > 0
        assert found["documents"][0]["total"] >= found["documents"][-1]["total"] > 0
        assert f"latent {latent} of {HOOK}" in shown
    assert "row group 1 of shard_00000.parquet to row group 0 of shard_00001.parquet" in shown


def test_values_and_losses_are_those_of_the_models(run, grown):
    extent = provenance.Extent(num_tokens=2000, show=5)
    one = provenance.trace(run, grown[:1], extent=extent)[grown[0]]
    again = provenance.trace(run, grown[:1], extent=extent, in_memory="one")[grown[0]]
    assert one == again
    nanos = [provenance.measuring.open_subject(run, HOOK).nanos[i] for i in range(2)]
    occurrence = one["occurrences"][0]
    ids = TOKENIZER.encode(occurrence["text_before"] + occurrence["at"], prepend_bos=True)
    if len(ids) < 20:  # the whole row up to there is shown: losses can be computed from it
        target = TOKENIZER.encode(occurrence["predicted"])[0]
        for nano, name in zip(nanos, ("before", "after"), strict=True):
            with torch.no_grad():
                loss = -nano.model(torch.tensor([ids]))[0, -1].float().log_softmax(-1)[target]
            assert float(loss) == pytest.approx(occurrence[name], abs=1e-3)


def test_a_run_that_was_not_compared_is_told_to(run, grown, tmp_path):
    other = Path(shutil.copytree(run.path, tmp_path / "run"))
    (other / "stages.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"stages\.json does not exist: `python -m experiments\.diff --run_dir"):
        command.main(command.ProvenanceConfig(run_dir=str(other), latent=(grown[0],)))
    (other / "stages.json").write_text(json.dumps({HOOK: {"kinds": 3}}))
    with pytest.raises(ValueError, match=r"stages\.json is broken at blocks"):
        command.main(command.ProvenanceConfig(run_dir=str(other), latent=(grown[0],)))


def test_flags_are_checked_before_anything_is_read():
    assert dataclasses.is_dataclass(command.ProvenanceConfig)
    with pytest.raises(ConfigError, match="give --run_dir"):
        command.ProvenanceConfig(latent=(1,))
    with pytest.raises(ConfigError, match="give --latent, such as"):
        command.ProvenanceConfig(run_dir="runs/x")
    with pytest.raises(ConfigError, match="names a latent twice"):
        command.ProvenanceConfig(run_dir="runs/x", latent=(1, 1))
