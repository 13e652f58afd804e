"""A v1 folder into a real Postgres with Neuronpedia's tables."""

import gzip
import itertools
import json
import logging
import re
import subprocess
import sys
from pathlib import Path

import psycopg
import pytest
from explorer_toy import HOOK, write_store
from postgres import CREATOR, TABLES, cluster

from bridge.neuronpedia import importer, sources, v1
from bridge.neuronpedia.importer import Counts, ImportRefusedError, import_folder
from bridge.run.labels import Names

ROOT = Path(__file__).resolve().parents[1]
WHO = {"creatorId": CREATOR, "createdAt": "2026-01-01T00:00:00.000Z"}
MODEL, SOURCE = "nanochat-d2-toy", "1-res-1k"
KEY = {"modelId": MODEL, "layer": SOURCE}
_numbers = itertools.count()


@pytest.fixture(scope="module")
def server():
    with cluster() as conninfo:
        yield conninfo


def new_database(server: str, *statements: str) -> str:
    """An empty database after some SQL."""
    name = f"np{next(_numbers)}"
    with psycopg.connect(server, autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name}")
    database = server.replace("/postgres?", f"/{name}?")
    with psycopg.connect(database) as connection:
        for statement in statements:
            connection.execute(statement)
    return database


@pytest.fixture
def database(server) -> str:
    """A Neuronpedia's database as it is after its set-up."""
    return new_database(server, TABLES, f"""INSERT INTO "User" VALUES ('{CREATOR}', 'bot')""")


def rows(database: str, query: str) -> list[tuple]:
    with psycopg.connect(database) as connection:
        return connection.execute(query).fetchall()


def neuron(index: int, **other) -> dict:
    told = {"index": str(index), "maxActApprox": 2.5, "hasVector": False, "vector": [0.25, -1.0], "frac_nonzero": 0.25}
    lists = {"pos_str": [" a", "<b>"], "pos_values": [2.0, 1.0], "topkCosSimIndices": [index, 3]}
    return KEY | told | lists | {"sourceSetName": "res-1k"} | WHO | other


def activation(name: str, index: int, **other) -> dict:
    told = {"tokens": [" the", " cat"], "values": [0.0, 2.5], "maxValue": 2.5, "maxValueTokenIndex": 1, "minValue": 0.0}
    bins = {
        "binMin": -1,
        "binMax": 2.5,
        "binContains": -1,
        "qualifyingTokenIndex": 1,
        "zIndices": None,
        "zValues": None,
    }
    return {"id": name, "index": str(index)} | KEY | told | bins | WHO | other


def explanation(name: str, index: int, text: str) -> dict:
    return {"id": name, "index": str(index), "description": text, "authorId": CREATOR, "typeName": None} | KEY


def metadata() -> dict[str, dict]:
    shown = {"visibility": "PUBLIC"} | WHO
    return {
        "release": {"name": "toy", "description": "t", "creatorName": "me", "urls": ["https://x.y"]} | shown,
        "model": {"id": MODEL, "layers": 2, "neuronsPerLayer": 0, "owner": "me", "dimension": 8} | shown,
        "sourceset": {
            "modelId": MODEL,
            "name": "res-1k",
            "description": "Residual Stream - 1k",
            "creatorName": "me",
            "releaseName": "toy",
        }
        | shown,
        "source": {
            "id": SOURCE,
            "modelId": MODEL,
            "setName": "res-1k",
            "inferenceHosts": [],
            "saelensConfig": {"d_in": 8, "metadata": {"neuronpedia_id": None}},
            "num_prompts": 40,
        }
        | shown,
    }


def lines(file: Path) -> list[bytes]:
    return gzip.decompress(file.read_bytes()).splitlines()


def write(folder: Path, file: str, *told: dict | str) -> Path:
    path = folder / file
    path.parent.mkdir(parents=True, exist_ok=True)
    data = "".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in told).encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


@pytest.fixture
def export(tmp_path) -> Path:
    """A source of four features in two batches."""
    folder = tmp_path / "v1" / MODEL / SOURCE
    for name, row in metadata().items():
        write(folder, f"{name}.jsonl", row)
    write(folder, "features/batch-0.jsonl.gz", neuron(0), neuron(1))
    write(folder, "features/batch-10.jsonl.gz", neuron(20))
    write(folder, "features/batch-2.jsonl.gz", neuron(2))
    texts = activation("a0", 0), activation("a1", 0, tokens=["<script>", "\n"]), activation("a2", 2)
    write(folder, "activations/batch-0.jsonl.gz", *texts)
    write(folder, "explanations/batch-0.jsonl.gz", explanation("e0", 0, "the word “cat”"))
    return folder


def test_every_row_is_there_as_the_folder_has_it(export, database):
    heard = []
    counts = import_folder(export.parents[1], database, report=lambda file, _: heard.append(file.name))
    assert {table: count.inserted for table, count in counts.items()} == {
        "SourceRelease": 1,
        "Model": 1,
        "SourceSet": 1,
        "Source": 1,
        "Neuron": 4,
        "Activation": 3,
        "Explanation": 1,
    }
    assert heard[1:4] == ["batch-0.jsonl.gz", "batch-2.jsonl.gz", "batch-10.jsonl.gz"]
    assert rows(database, """SELECT "dimension", "visibility"::text, "createdAt"::text FROM "Model" """) == [
        (8, "PUBLIC", "2026-01-01 00:00:00")
    ]
    assert rows(database, """SELECT "saelensConfig"->'d_in', "hasDashboards" FROM "Source" """) == [(8, True)]
    assert rows(
        database, """SELECT "pos_str", "vector", "topkCosSimIndices" FROM "Neuron" WHERE "index" = '20' """
    ) == [([" a", "<b>"], [0.25, -1.0], [20, 3])]
    assert rows(database, """SELECT "tokens", "values", "binMin" FROM "Activation" WHERE "id" = 'a1' """) == [
        (["<script>", "\n"], [0.0, 2.5], -1.0)
    ]
    assert rows(database, """SELECT "description", "scoreV1" FROM "Explanation" """) == [("the word “cat”", 0.0)]


def test_the_command_imports_what_a_run_exports(server, tmp_path):
    run = tmp_path / "run"
    write_store(run)
    (source,) = sources.of_run(run, sources.Wanted(layers=4))
    names = Names.read(run, HOOK)
    v1.write(source.store(), source.sae_dir, tmp_path / "v1", ids=source.ids, about=source.about, names=names)
    database = new_database(server, TABLES, f"""INSERT INTO "User" VALUES ('{CREATOR}', 'bot')""")

    def command() -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "experiments.publish", f"--import_to={database}", f"--folder={tmp_path / 'v1'}"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    done = command()
    assert (done.returncode, done.stderr) == (0, "")
    assert re.search(r"Neuron +8 new, 0 there before", done.stdout)
    assert re.search(r"Explanation +4 new, 0 there before", done.stdout)
    found = rows(database, """SELECT "index", "tokens", "values", "binMax" FROM "Activation" ORDER BY "id" """)
    exported = [
        (row["index"], row["tokens"], row["values"], row["binMax"])
        for file in tmp_path.rglob("activations/*.gz")
        for row in sorted(map(json.loads, lines(file)), key=lambda row: row["id"])
    ]
    assert found == exported
    assert len(found) > 8
    assert re.search(rf"Activation +0 new, {len(found)} there before", command().stdout)


def test_a_second_import_changes_nothing(export, database):
    import_folder(export, database)
    write(export, "features/batch-0.jsonl.gz", neuron(0, maxActApprox=99.0), neuron(1))
    counts = import_folder(export, database)
    assert counts["Neuron"] == Counts(inserted=0, existing=4)
    assert counts["Activation"] == Counts(inserted=0, existing=3)
    assert rows(database, """SELECT max("maxActApprox") FROM "Neuron" """) == [(2.5,)]


def test_nul_becomes_a_blank_and_an_escaped_backslash_stays(export, database):
    tokens = ["a\0b", "\\u0000", "\ud83d\ude00"]
    write(export, "activations/batch-0.jsonl.gz", activation("a0", 0, tokens=tokens, dataSource="\0"))
    import_folder(export, database)
    assert rows(database, """SELECT "tokens", "dataSource" FROM "Activation" """) == [(["a b", "\\u0000", "😀"], " ")]


def test_attention_indices_are_split_into_their_columns(export, database):
    write(
        export,
        "activations/batch-0.jsonl.gz",
        activation("a0", 0, zIndices=[[0, 1], [1, 1]], zValues=[0.5, 0.25]),
        activation("a1", 0),
    )
    import_folder(export, database)
    found = rows(database, """SELECT "zKIndices", "zQIndices", "zValues" FROM "Activation" ORDER BY "id" """)
    assert found == [([0, 1], [1, 1], [0.5, 0.25]), ([], [], None)]


def test_columns_are_those_that_first_line_and_table_share(export, database, caplog):
    first, second = neuron(0), neuron(1) | {"umap_x": 1.5}
    del first["vector"]
    write(export, "features/batch-0.jsonl.gz", first | {"colour": "red"}, second)
    with caplog.at_level(logging.WARNING):
        import_folder(export, database)
    assert "colour" in caplog.text
    found = rows(database, """SELECT "vector", "umap_x" FROM "Neuron" WHERE "index" IN ('0', '1')""")
    assert found == [([], None), ([], None)]


def test_a_file_of_many_chunks_is_one_transaction(export, database, monkeypatch):
    monkeypatch.setattr(importer, "CHUNK_ROWS", 7)
    many = [activation(f"b{i}", i % 3) for i in range(50)]
    write(export, "activations/batch-2.jsonl.gz", *many, activation("bad", 7))
    with pytest.raises(ImportRefusedError, match=r"activations/batch-2.*foreign key.*nothing of it was stored"):
        import_folder(export, database)
    assert rows(database, """SELECT count(*) FROM "Activation" """) == [(3,)]
    write(export, "activations/batch-2.jsonl.gz", *many)
    monkeypatch.setattr(importer, "CHUNK_BYTES", 2000)
    assert import_folder(export, database)["Activation"] == Counts(inserted=50, existing=3)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"id": "a9", "maxValue": NaN}', "line 2 is damaged .NaN"),
        ('{"id": "a9", ', "line 2 is damaged"),
        ("[1]", "line 2 is damaged .not a JSON object"),
        (json.dumps(activation("a9", 0, tokens=["\ud800"])), "line 2 cannot be stored .*surrogates"),
        (json.dumps(activation("a9", 0, zIndices=[1, 2, 3])), "line 2 cannot be stored"),
        (json.dumps(activation("a9", 0, maxValue=None)), "database refuses it.*maxValue"),
        (json.dumps(activation("a9", 0, maxValueTokenIndex=1.5)), "database refuses it.*integer"),
        (json.dumps(activation("a9", 0, creatorId="nobody")), "user nobody, whom the database does not have"),
    ],
)
def test_a_bad_line_is_named_and_nothing_of_its_file_kept(export, database, line, said):
    write(export, "activations/batch-0.jsonl.gz", activation("a0", 0), line)
    with pytest.raises(ImportRefusedError, match=f"batch-0.*{said}"):
        import_folder(export, database)
    assert rows(database, """SELECT count(*) FROM "Activation" """) == [(0,)]


def test_a_truncated_file_is_reported(export, database):
    path = export / "features" / "batch-0.jsonl.gz"
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ImportRefusedError, match=r"features/batch-0.* is damaged"):
        import_folder(export, database)


def test_an_unknown_creator_stops_before_any_row(export, database):
    write(export, "release.jsonl", metadata()["release"] | {"creatorId": "me"})
    with pytest.raises(ImportRefusedError, match=r"user me, whom the database does not have.*db-init"):
        import_folder(export, database)
    assert rows(database, """SELECT count(*) FROM "Model" """) == [(0,)]


def test_a_database_of_something_else_is_refused(export, server):
    with pytest.raises(ImportRefusedError, match=r"not a Neuronpedia's, missing tables: SourceRelease.*User"):
        import_folder(export, new_database(server))
    with pytest.raises(ImportRefusedError, match="missing tables: Explanation;"):
        import_folder(export, new_database(server, TABLES, 'DROP TABLE "Explanation"'))


def test_names_are_quoted_whatever_they_hold(export, server):
    odd = 'in"dex); DROP TABLE "User"; --'
    quoted = odd.replace('"', '""')
    database = new_database(
        server,
        TABLES,
        f"""INSERT INTO "User" VALUES ('{CREATOR}', 'bot')""",
        f'ALTER TABLE "Neuron" ADD COLUMN "{quoted}" text',
    )
    write(export, "features/batch-0.jsonl.gz", neuron(0, **{odd: "kept"}), neuron(1, **{odd: "'; --"}))
    import_folder(export, database)
    assert [row for (row,) in rows(database, f'SELECT "{quoted}" FROM "Neuron" ORDER BY "index"')][:2] == [
        "kept",
        "'; --",
    ]


@pytest.mark.parametrize("address", ["postgresql://me:hidden@/x?schema=public", "mysql://me:hidden@host/x", "hidden"])
def test_an_invalid_address_is_refused_without_repeating_it(export, address):
    with pytest.raises(ImportRefusedError, match="not the address of a database") as refused:
        import_folder(export, address)
    assert "hidden" not in str(refused.value)


def test_an_unreachable_server_is_reported_without_the_password(export, tmp_path):
    with pytest.raises(ImportRefusedError, match="cannot be opened") as refused:
        import_folder(export, f"postgresql://me:hidden@/x?host={tmp_path}")
    assert "hidden" not in str(refused.value)


def test_a_folder_without_an_export_is_refused(export, tmp_path):
    with pytest.raises(FileNotFoundError, match="no v1 export in"):
        import_folder(tmp_path / "elsewhere", "postgresql://nobody@/x")
    (export / "model.jsonl").unlink()
    with pytest.raises(FileNotFoundError, match=r"lacks model\.jsonl"):
        import_folder(export, "postgresql://nobody@/x")
