"""The command that traces a prompt, as its users run it, and the graph files that it writes."""

import copy
import json
import re
import shutil
import subprocess
import sys
import webbrowser
from pathlib import Path

import explorer_toy as toy
import pytest
from tiny_nanochat import tiny, write
from toy_saes import export, toy_sae, toy_transcoder

import bridge.graphs
import bridge.nanochat
from bridge.circuits import graph_check
from bridge.circuits.graph_check import ERROR, FEATURE, LOGIT, TOKEN
from bridge.explorer import graphs, page
from bridge.graph_names import pairing, unpairing
from bridge.nanochat import tokenizer as tokenizers
from bridge.run import Run, commands
from bridge.run import directory as rundir
from bridge.training.config import RunConfig
from experiments import flags, trace
from jsae.records.store import digest

ROOT = Path(__file__).resolve().parents[1]
PROMPT = 'def "é\n'
LAYERS = 4


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """A tiny nanochat that reads and writes bytes."""
    folder = tmp_path_factory.mktemp("nanochat")
    tokenizer = tokenizers.Tokenizer({bytes([i]): i for i in range(256)})
    tokenizers.save(tokenizer, folder / "tokenizer")
    return write(folder / "d4", tiny("G7", vocab_size=tokenizer.vocab_size, sequence_len=40), "G7", step=5)


@pytest.fixture(scope="module")
def fingerprint(checkpoint) -> str:
    return bridge.nanochat.load(checkpoint).fingerprint


def make_run(checkpoint: Path, folder: Path, *saes) -> Path:
    for sae in saes:
        export(sae, folder / "sae" / sae.metadata["hook_name"])
    config = RunConfig(
        checkpoint=str(checkpoint), step=5, layer=("all",), hook_type="mlp_in", target_hook="mlp", skip=True
    )
    rundir.record(folder, config, {"model": bridge.nanochat.load(checkpoint).fingerprint})
    return folder


def replacement(fingerprint: str, *layers: int) -> list:
    return [toy_transcoder(layer, 32, 64, model_fingerprint=fingerprint) for layer in layers or range(LAYERS)]


@pytest.fixture(scope="module")
def run(checkpoint, fingerprint, tmp_path_factory) -> Path:
    return make_run(checkpoint, tmp_path_factory.mktemp("runs") / "one", *replacement(fingerprint))


def called(capfd, run: Path, **settings: object) -> tuple[int, str, str]:
    settings = {"run_dir": run, "prompt": PROMPT} | settings
    line = ["trace", *(f"--{name}={value}" for name, value in settings.items())]
    with pytest.raises(SystemExit) as stop:
        flags.run(trace.TraceConfig, trace.main, argv=line, after=trace.next_commands)
    out, err = capfd.readouterr()
    return stop.value.code or 0, out, err


@pytest.fixture(scope="module")
def done(run) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own."""
    words = [
        f"--run_dir={run}",
        f"--prompt={PROMPT}",
        "--slug=first",
        "--ablations=5",
        "--intervene=1_-1_2",
        "--factor=2",
    ]
    return subprocess.run(
        [sys.executable, "-W", "error", "-m", "experiments.trace", *words],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def document(run: Path, site: str, slug: str = "first") -> dict:
    return json.loads((run / "graphs" / site / f"{slug}.json").read_text(encoding="utf-8"))


# ---- the command ----------------------------------------------------------------------------------------------------


def test_a_prompt_is_traced_from_a_shell(done):
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    for words in ("strongest paths", "replacement 0.", "completeness 0.", "ablations       5 features"):
        assert words in done.stdout
    assert "1_-1_2 error on 'e' times 2" in done.stdout
    assert f"{'graph':<15} " in done.stdout


def test_both_files_are_what_the_pages_read(done, run):
    here, site = document(run, "circuit_tracer"), document(run, "neuronpedia")
    for graph in (here, site):
        graph_check.check(graph)
    assert {key: here[key] for key in ("nodes", "links", "qParams")} == {
        key: site[key] for key in ("nodes", "links", "qParams")
    }
    assert here["metadata"]["transcoder_list"] == [f"./data/blocks.{i}.ln2.hook_normalized" for i in range(LAYERS)]
    assert site["metadata"]["scan"].startswith("nanochat-d4-")
    assert here["metadata"]["scan"] == f"custom-{site['metadata']['scan']}"
    details = site["metadata"]["feature_details"]["neuronpedia_source_set"]
    assert details == site["metadata"]["info"]["neuronpedia_source_set"]
    assert details.startswith("transcoder-64-")
    assert "create_time_ms" not in site["metadata"]["info"]
    assert site["metadata"]["prompt"] == PROMPT


def test_nodes_have_the_ids_and_types_of_the_format(done, run):
    graph = document(run, "neuronpedia")
    kinds = {kind: [n for n in graph["nodes"] if n["feature_type"] == kind] for kind in (FEATURE, ERROR, TOKEN, LOGIT)}
    assert sum(map(len, kinds.values())) == len(graph["nodes"])
    assert [n["clerp"] for n in kinds[TOKEN]][:2] == ['Emb: "<|bos|>"', 'Emb: "d"']
    assert graph["metadata"]["prompt_tokens"][-3:] == ["\\xc3", "\\xa9", "⏎"]
    for n in kinds[FEATURE]:
        layer, latent = unpairing(n["feature"])
        assert n["node_id"] == f"{layer}_{latent}_{n['ctx_idx']}"
        assert n["jsNodeId"] == f"{layer}_{latent}-0"
        assert n["activation"] > 0
        assert n["ctx_idx"] > 0, "BOS, on which transcoders are not trained, has no features"
    for n in kinds[ERROR]:
        assert (n["feature"], n["jsNodeId"]) == (-1, f"{n['layer']}_-1-0")
    first = kinds[LOGIT][0]
    assert all(n["layer"] == str(LAYERS + 1) for n in kinds[LOGIT])
    assert first["node_id"] == f"{LAYERS + 1}_{first['feature']}_{first['ctx_idx']}"
    assert sum(n["is_target_logit"] for n in kinds[LOGIT]) == 1


def test_the_same_prompt_gives_the_same_bytes_and_one_entry_in_the_index(run, capfd):
    files = [run / "graphs" / site / "again.json" for site in ("circuit_tracer", "neuronpedia")]
    before = None
    for _ in range(2):
        code, out, err = called(capfd, run, slug="again")
        assert code == 0, err
        assert "--ablations=80" in out, "what to do next"
        contents = [file.read_bytes() for file in files]
        assert before in (None, contents)
        before = contents
    index = json.loads((run / "graphs" / "circuit_tracer" / "graph-metadata.json").read_text(encoding="utf-8"))
    slugs = [entry["slug"] for entry in index["graphs"]]
    assert slugs.count("again") == 1
    assert index["graphs"][slugs.index("again")] == document(run, "circuit_tracer", "again")["metadata"]


def test_a_folder_of_exports_is_traced_with_a_checkpoint_and_a_measure(run, checkpoint, tmp_path, capfd):
    code, out, err = called(
        capfd, run / "sae", checkpoint=checkpoint, out=tmp_path / "graphs", measure="logprob", max_features=20, paths=2
    )
    assert code == 0, err
    assert ", 20 of them nodes" in out
    assert len(list((tmp_path / "graphs").glob("*/*.json"))) == 3


def test_the_graph_is_put_beside_the_explorers_page(done, run):
    address = re.search(r"explorer +(file:\S+)", done.stdout)[1]
    assert address == f"{run.as_uri()}/explorer/index.html#view=graph&graph=first"
    entry = next(entry for entry in graphs.listed(Run(run)) if entry["slug"] == "first")
    pruned = document(run, "neuronpedia")
    assert entry["prompt"] == PROMPT
    assert entry["nodes"] > len(pruned["nodes"])  # the page prunes by sliders, which begin where the file is pruned
    script = (run / "explorer" / "graphs" / "first.graph.js").read_text()
    shown = json.loads(script.removeprefix('jsae.put("../graphs/first.graph",').removesuffix(");\n"))
    graph_check.check(shown)
    assert {node["node_id"] for node in pruned["nodes"]} <= {node["node_id"] for node in shown["nodes"]}
    assert shown["metadata"]["pruning_settings"] == pruned["metadata"]["pruning_settings"]
    assert shown["metadata"]["sae_sha256"] == [digest(path) for path in sorted((run / "sae").iterdir())]


def test_a_graph_with_too_many_edges_is_shown_as_its_file_is_pruned(run, capfd, monkeypatch):
    monkeypatch.setattr(bridge.graphs, "MOST_SHOWN", 0)
    assert called(capfd, run, slug="narrow")[0] == 0
    (entry,) = [entry for entry in graphs.listed(Run(run)) if entry["slug"] == "narrow"]
    pruned = document(run, "neuronpedia", "narrow")
    assert (entry["nodes"], entry["links"]) == (len(pruned["nodes"]), len(pruned["links"]))


def test_the_explorer_is_opened_if_that_is_asked_for(run, tmp_path, capfd, monkeypatch):
    opened = []
    monkeypatch.setattr(webbrowser, "open", lambda address: bool(opened.append(address)))
    code, out, err = called(capfd, run, slug="opened", open=True)
    assert code == 0, err
    assert opened == [f"{run.as_uri()}/explorer/index.html#view=graph&graph=opened"]
    assert "no browser was found here: open the address by hand" in out
    refused(capfd, run, "--open shows the graph in the run's explorer", code=2, open=True, out=tmp_path)
    called(capfd, run, slug="elsewhere", out=tmp_path)
    assert "elsewhere" not in {entry["slug"] for entry in graphs.listed(Run(run))}
    assert not (tmp_path / "explorer").exists()


def test_records_of_other_transcoders_leave_a_page_of_graphs(run, checkpoint, fingerprint, tmp_path, capfd):
    other = make_run(checkpoint, tmp_path / "other", *replacement(fingerprint))
    shutil.copytree(toy.write_store(tmp_path / "toy").parent, other / "explorer" / "records")
    (other / "explorer" / "records" / toy.HOOK).rename(other / "explorer/records/blocks.0.ln2.hook_normalized")
    code, _, err = called(capfd, other, slug="alone")
    assert code == 0, err
    assert page.is_current(Run(other))


def test_labels_of_latents_are_in_the_graph(done, run, capfd):
    feature = next(n for n in document(run, "neuronpedia")["nodes"] if n["feature_type"] == FEATURE)
    layer, latent = unpairing(feature["feature"])
    line = {"hook": f"blocks.{layer}.ln2.hook_normalized", "latent": latent, "label": "my name", "note": "", "time": ""}
    notes = run / "explorer" / "notes.jsonl"
    notes.parent.mkdir(exist_ok=True)
    notes.write_text(json.dumps(line | {"time": "2026-01-01T00:00:00Z"}) + "\n")
    code, _, err = called(capfd, run, slug="labelled")
    assert code == 0, err
    named = {n["node_id"]: n["clerp"] for n in document(run, "neuronpedia", "labelled")["nodes"]}
    assert named[feature["node_id"]] == "my name"


def test_training_transcoders_suggests_to_trace(run, checkpoint, tmp_path):
    trace_line, explore_line = commands.after_training(run)
    assert "experiments.trace" in trace_line
    assert "experiments.explore" in explore_line
    assert "experiments.trace" in commands.after_exploring(run, True)[0]
    rundir.record(tmp_path, RunConfig(checkpoint=str(checkpoint), hook_type="mlp_in", target_hook="mlp"), {})
    assert len(commands.after_training(tmp_path)) == 1
    assert commands.after_exploring(tmp_path, True) == []
    assert Run(run).transcoders().keys() == {f"blocks.{i}.ln2.hook_normalized" for i in range(LAYERS)}


# ---- bad input ------------------------------------------------------------------------------------------------------


def refused(capfd, run: Path, *words: str, code: int = 1, **settings: object) -> None:
    ended, out, err = called(capfd, run, **settings)
    assert (ended, out) == (code, "")
    assert err.startswith("FATAL ")
    assert err.count("\n") == 2
    for word in words:
        assert word in err


def test_a_prompt_that_is_too_short_or_too_long_is_refused(run, capfd):
    refused(capfd, run, "the prompt is empty", code=2, prompt="")
    refused(capfd, run, "the prompt has 61 tokens", "to 40, the model's context", prompt="x" * 60)


def test_runs_that_are_no_replacement_model_are_refused(checkpoint, fingerprint, tmp_path, capfd):
    lacking = make_run(checkpoint, tmp_path / "lacking", *replacement(fingerprint, 1, 3))
    refused(capfd, lacking, "layers 0 to 3 and lacks those of 0, 2: train them with --layer=all")
    other = make_run(checkpoint, tmp_path / "other", *replacement("0" * 64))
    refused(capfd, other, "the transcoder of blocks.0.ln2.hook_normalized was trained on the checkpoint with", "000")
    sae = toy_sae("topk", 32, 64, hook_name="blocks.0.ln2.hook_normalized", model_fingerprint=fingerprint)
    plain = make_run(checkpoint, tmp_path / "plain", sae)
    refused(capfd, plain, "is a topk SAE, which reconstructs its input", "need transcoders of all layers")
    refused(capfd, tmp_path / "none", "none is not a run", "Give the output_dir of a training")


def test_nodes_and_names_that_cannot_be_are_refused(run, capfd):
    refused(capfd, run, "'5 of layer 2' is no feature or error", code=2, intervene="5 of layer 2")
    refused(capfd, run, "layer 9, position 0 is outside 4 layers", intervene="9_0_0")
    refused(capfd, run, "is not a node at position 0", intervene="1_5_0")
    refused(capfd, run, "slug is '../x'", code=2, slug="../x")
    refused(capfd, run, "the source set 'A B' would be refused", code=2, source_set="A B")
    refused(capfd, run, "--factor=2 is for --intervene", code=2, factor=2)
    refused(capfd, run, "--ablations=1 gives no correlation", code=2, ablations=1)
    refused(capfd, run, "logit_probability is 0", code=2, logit_probability=0)


def test_a_broken_index_is_not_replaced(run, tmp_path, capfd):
    index = tmp_path / "circuit_tracer" / "graph-metadata.json"
    index.parent.mkdir()
    index.write_text("[1]")
    refused(capfd, run, "is no list of graphs: move it away", out=tmp_path)
    assert [path.name for path in tmp_path.rglob("*.json")] == [index.name]


# ---- the check of graph files ---------------------------------------------------------------------------------------


def test_layers_and_latents_are_paired_and_unpaired():
    for layer, latent in ((0, 0), (3, 12), (127, 2**20), (0, 7)):
        assert unpairing(pairing(layer, latent)) == (layer, latent)


def changed(graph: dict, *path: object, value: object = ...) -> dict:
    graph = copy.deepcopy(graph)
    place = graph
    for key in path[:-1]:
        place = place[key]
    if value is ...:
        del place[path[-1]]
    else:
        place[path[-1]] = value
    return graph


def place(graph: dict, kind: str) -> int:
    return next(i for i, node in enumerate(graph["nodes"]) if node["feature_type"] == kind)


def test_faults_of_graph_files_are_named(done, run):
    graph = document(run, "neuronpedia")
    feature, logit, token = (place(graph, kind) for kind in (FEATURE, LOGIT, TOKEN))
    faults = {
        "links is missing": changed(graph, "links"),
        "scan is missing": changed(graph, "metadata", "scan"),
        "scan 'a/b'": changed(graph, "metadata", "scan", value="a/b"),
        "fewer than two tokens": changed(graph, "metadata", "prompt_tokens", value=["x"]),
        "schema_version is not 1": changed(graph, "metadata", "schema_version", value=2),
        "outside the prompt": changed(graph, "nodes", feature, "ctx_idx", value=99),
        "contradicts": changed(graph, "nodes", feature, "layer", value="7"),
        "is above node_threshold": changed(graph, "metadata", "node_threshold", value=0.001),
        "the label of a logit": changed(graph, "nodes", logit, "clerp", value="no probability"),
        "(token_prob) sum to": changed(graph, "nodes", logit, "token_prob", value=1.5),
        "one node per token": changed(graph, "nodes", token),
        "is there twice": changed(graph, "links", value=[graph["links"][0]] * 2),
        "no such node": changed(graph, "links", 0, "source", value="nothing"),
        "does not lead upwards": changed(graph, "links", 0, value=backwards(graph["links"][0])),
        "weight is not finite": changed(graph, "links", 0, "weight", value=float("nan")),
        "pinnedIds and supernodes": changed(graph, "qParams", "pinnedIds", value="1_2_3"),
        "qParams name": changed(graph, "qParams", "supernodes", value=[["a", "nothing"]]),
        "is unknown to the pages": changed(graph, "nodes", feature, "feature_type", value="bias"),
        "no feature or error above layer 0": changed(
            graph, "nodes", value=[graph["nodes"][token], graph["nodes"][logit]]
        ),
    }
    assert list(graph_check.problems(graph)) == []
    for words, fault in faults.items():
        assert any(words in problem for problem in graph_check.problems(fault)), words
        with pytest.raises(ValueError, match="the graph cannot be shown: "):
            graph_check.check(fault)


def backwards(link: dict) -> dict:
    return link | {"source": link["target"], "target": link["source"]}


@pytest.mark.parametrize(
    "value",
    [
        None,
        [],
        "text",
        {},
        {"metadata": [], "nodes": {}, "links": 0, "qParams": None},
        {"metadata": {"prompt_tokens": [1]}, "nodes": [None, {}], "links": [3], "qParams": {}},
        {"metadata": {}, "nodes": [{"node_id": {}, "ctx_idx": True, "feature": 10**400}], "links": [], "qParams": {}},
    ],
)
def test_hostile_json_is_a_problem_and_no_exception(value):
    assert list(graph_check.problems(value))
