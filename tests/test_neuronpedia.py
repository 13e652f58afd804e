"""Files for Neuronpedia, as its importer, its converter and its upload expect them."""

import json
import shutil
from pathlib import Path
from typing import Any

import explorer_toy as toy
import jsonschema
import numpy as np
import pytest
import torch
from neuronpedia_schema import SCHEMAS, SHARED, hold, read
from safetensors.numpy import load_file

import bridge.neuronpedia
from bridge import torch_sae
from bridge.neuronpedia import api, dashboard, ids, rows, sources, strict, text, v1
from bridge.neuronpedia.about import About
from bridge.neuronpedia.ids import Ids
from bridge.run import labels
from bridge.run.labels import Names
from jsae.architectures import sae_config
from jsae.records.store import VERSION, Store, StoreError, Texts
from jsae.settings import ConfigError

METADATA = ("release", "model", "sourceset", "source")
TABLES = ("features", "activations", "explanations")
NEVER_NULL = {
    "features": ("createdAt", "frac_nonzero", "hasVector", "maxActApprox", "sourceSetName", "hookName"),
    "activations": ("id", "maxValue", "maxValueTokenIndex", "minValue", "creatorId", "createdAt"),
    "explanations": ("id", "description", "authorId", "createdAt"),
}


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A run with records, automatic labels and the note of a person."""
    folder = tmp_path_factory.mktemp("run")
    toy.write_store(folder)
    labels.append(folder, toy.HOOK, toy.SPLIT, "halves of é, said by a person", "a note\nin two lines")
    return folder


@pytest.fixture(scope="module")
def source(run) -> sources.Source:
    return sources.of_run(run, sources.Wanted(layers=6))[0]


def write_v1(run: Path, source: sources.Source, out: Path, **more: Any) -> list[Path]:
    names = Names.read(run, toy.HOOK)
    return v1.write(source.store(), source.sae_dir, out, ids=source.ids, about=source.about, names=names, **more)


def write_dashboard(source: sources.Source, out: Path, **more: Any) -> list[Path]:
    return dashboard.write(source.store(), source.sae_dir, out, ids=source.ids, about=source.about, **more)


def tables(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """All rows of a v1 folder by kind, files in the order of their numbers."""
    found: dict[str, list] = {kind: [] for kind in TABLES}
    for kind in TABLES:
        for file in sorted((folder / kind).glob("*"), key=lambda f: int(f.name.split("-")[1].split(".")[0])):
            found[kind] += read(file)
    return found


@pytest.fixture(scope="module")
def folder(run, source, tmp_path_factory) -> Path:
    """The source's folder of a v1 export."""
    files = write_v1(run, source, tmp_path_factory.mktemp("v1"))
    return next(file.parent for file in files if file.name == "source.jsonl")


@pytest.fixture(scope="module")
def exported(folder) -> dict[str, list[dict[str, Any]]]:
    return tables(folder)


@pytest.fixture(scope="module")
def batch(source, tmp_path_factory) -> dict[str, Any]:
    """The only batch of the SAEDashboard export."""
    files = write_dashboard(source, tmp_path_factory.mktemp("dashboard"))
    return json.loads(next(file for file in files if file.name == "batch-0.json").read_text())


def of(rows: list[dict[str, Any]], latent: int) -> list[dict[str, Any]]:
    return [row for row in rows if row["index"] == str(latent)]


# ---- the contract -------------------------------------------------------------------------------------------------


def test_every_file_is_what_the_formats_ask_for(folder, batch, source):
    hold(folder)
    jsonschema.validate(batch, SCHEMAS["dashboard"])
    jsonschema.validate(dashboard.skipped(source.ids), SCHEMAS["skipped"])


def test_every_file_is_what_the_reference_asks_for(folder, exported, batch, source, neuronpedia_reference):
    for name in METADATA:
        jsonschema.validate(read(folder / f"{name}.jsonl")[0], neuronpedia_reference[SHARED[name]])
    for kind, lines in exported.items():
        for row in lines:
            jsonschema.validate(row, neuronpedia_reference[SHARED[kind]])
    jsonschema.validate(batch, neuronpedia_reference[SHARED["dashboard"]])
    jsonschema.validate(dashboard.skipped(source.ids), neuronpedia_reference[SHARED["skipped"]])


def test_an_importer_that_reads_the_columns_of_the_first_line_gets_every_value(folder):
    for kind in TABLES:
        for file in (folder / kind).iterdir():
            lines = read(file)
            columns = list(lines[0])
            assert [[row[column] for column in columns] for row in lines] == [list(row.values()) for row in lines]
            assert all(row[column] is not None for row in lines for column in NEVER_NULL[kind])


def test_a_text_has_a_value_per_token_and_says_its_largest(exported):
    for row in exported["activations"]:
        assert len(row["tokens"]) == len(row["values"])
        assert row["maxValue"] == max(row["values"]) > 0
        assert row["maxValueTokenIndex"] == row["values"].index(row["maxValue"])
        assert row["minValue"] == min(row["values"])
        assert row["values"][row["qualifyingTokenIndex"]] == row["maxValue"]
    for row in exported["features"]:
        own = [text["maxValue"] for text in exported["activations"] if text["index"] == row["index"]]
        assert row["maxActApprox"] == row["vectorDefaultSteerStrength"] == max(own, default=0)


def test_histograms_count_what_fired_and_the_vocabulary(exported, source):
    tokens = source.store().header.tokens
    counts = source.store()["count"]
    for row in exported["features"]:
        for kind, total in (("freq", int(counts[int(row["index"])])), ("logits", len(toy.VOCABULARY))):
            heights, middles = (row[f"{kind}_hist_data_bar_{what}"] for what in ("heights", "values"))
            assert len(heights) == len(middles) == (50 if total else 0)
            assert sum(heights) == total
            assert middles == sorted(middles)
        assert round(row["frac_nonzero"] * tokens) == counts[int(row["index"])]


def test_logit_tables_begin_with_the_strongest(exported):
    for row in exported["features"]:
        assert row["pos_values"] == sorted(row["pos_values"], reverse=True)
        assert row["neg_values"] == sorted(row["neg_values"])
        assert len(row["pos_str"]) == len(row["pos_values"]) == toy.LOGITS
        assert len(row["neg_str"]) == len(row["neg_values"]) == toy.LOGITS


def test_files_of_one_number_hold_the_same_latents_and_keys_are_never_shared(run, source, tmp_path, monkeypatch):
    monkeypatch.setattr(v1, "PER_FILE", 3)
    folder = write_v1(run, source, tmp_path)[0].parent
    found = {kind: {f.name: {r["index"] for r in read(f)} for f in (folder / kind).iterdir()} for kind in TABLES}
    assert [sorted(found["features"][f"batch-{n}.jsonl.gz"]) for n in range(3)] == [
        ["0", "1", "2"],
        ["3", "4", "5"],
        ["6", "7"],
    ]
    for kind in ("activations", "explanations"):
        assert all(indices <= found["features"][name] for name, indices in found[kind].items())
    lines = tables(folder)
    keys = [row["id"] for kind in ("activations", "explanations") for row in lines[kind]]
    assert len(set(keys)) == len(keys)


def test_no_folder_has_more_files_than_the_importer_lists(run, source, tmp_path, monkeypatch):
    monkeypatch.setattr(v1, "PER_FILE", 1)
    monkeypatch.setattr(v1, "MAX_FILES", 3)
    folder = write_v1(run, source, tmp_path)[0].parent
    assert len(list((folder / "features").iterdir())) <= 3
    assert len(tables(folder)["features"]) == toy.D_SAE


def test_latents_that_are_all_dead_leave_no_empty_file(run, source, tmp_path, monkeypatch):
    monkeypatch.setattr(v1, "PER_FILE", 1)
    folder = write_v1(run, source, tmp_path)[0].parent
    assert (folder / "features" / f"batch-{toy.DEAD}.jsonl.gz").is_file()
    assert not (folder / "activations" / f"batch-{toy.DEAD}.jsonl.gz").exists()
    assert all(read(file) for kind in TABLES for file in (folder / kind).iterdir())


def test_everything_points_to_the_one_source(folder, exported, source):
    release, model, source_set, found = (read(folder / f"{name}.jsonl")[0] for name in METADATA)
    assert found["id"] == folder.name == f"2-{source_set['name']}" == source.ids.source
    assert model["id"] == folder.parent.name == source_set["modelId"] == found["modelId"]
    assert (found["setName"], source_set["releaseName"]) == (source_set["name"], release["name"])
    assert (model["dimension"], model["layers"], model["neuronsPerLayer"]) == (8, 6, 32)
    assert {row["layer"] for lines in exported.values() for row in lines} == {found["id"]}
    assert {row["sourceSetName"] for row in exported["features"]} == {source_set["name"]}
    assert {row["hookName"] for row in exported["features"]} == {toy.HOOK}


def test_ids_say_which_model_and_which_saes(run, source, tmp_path):
    toy.write_store(tmp_path, seed=1)
    other = sources.of_run(tmp_path, sources.Wanted(layers=6))[0]
    assert source.ids.model == other.ids.model == "nanochat-d6-abababab"
    assert source.ids.source_set != other.ids.source_set
    assert source.ids.release != other.ids.release
    assert source.ids.source_set.startswith("res-8-")


def test_ids_are_stable_across_versions():
    stable = Ids("nanochat-d6-abababab", "res-8", "r", toy.HOOK)
    assert stable.activation(3, 1) == "c805c51ebabee31926104c063"
    assert stable.explanation(3) == "c12ec599eea974869a97bb7cf"


# ---- the same bytes -----------------------------------------------------------------------------------------------


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_the_same_run_gives_the_same_bytes_wherever_it_lies(run, source, tmp_path):
    moved = tmp_path / "elsewhere" / "copy"
    shutil.copytree(run, moved)
    again = sources.of_run(moved, sources.Wanted(layers=6))[0]
    for name, place, found in (("a", run, source), ("b", moved, again)):
        write_v1(place, found, tmp_path / name / "v1", vectors=True)
        write_dashboard(found, tmp_path / name / "dashboard", vectors=True)
    first = contents(tmp_path / "a")
    assert first == contents(tmp_path / "b")
    assert len(first) == 7 + 4


def test_writing_again_replaces_what_stood_there(run, source, tmp_path):
    folder = write_v1(run, source, tmp_path)[0].parent
    before = contents(tmp_path)
    (folder / "features" / "batch-7.jsonl.gz").write_bytes(b"of an earlier, wider SAE")
    write_v1(run, source, tmp_path)
    assert contents(tmp_path) == before


def test_an_export_that_fails_leaves_the_earlier_one(run, source, tmp_path, monkeypatch):
    folder = write_v1(run, source, tmp_path)[0].parent
    before = contents(tmp_path)
    monkeypatch.setattr(v1, "explanation", lambda *_: {"id": "c", "notes": float("nan")})
    with pytest.raises(strict.NotStorableError, match="'notes'"):
        write_v1(run, source, tmp_path)
    assert contents(tmp_path) == before
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


# ---- what is shown ------------------------------------------------------------------------------------------------


def test_a_dead_latent_is_there_without_texts(exported):
    (row,) = of(exported["features"], toy.DEAD)
    assert (row["frac_nonzero"], row["maxActApprox"]) == (0, 0)
    assert row["freq_hist_data_bar_heights"] == row["freq_hist_data_bar_values"] == []
    assert not of(exported["activations"], toy.DEAD)


def test_a_dense_latent_fires_on_every_token_but_bos(exported):
    (row,) = of(exported["features"], toy.DENSE)
    assert row["frac_nonzero"] == 1
    for example in of(exported["activations"], toy.DENSE):
        assert all(
            value > 0 or token == "<|bos|>" for token, value in zip(example["tokens"], example["values"], strict=True)
        )


def test_bos_at_the_beginning_is_not_shown_and_other_special_tokens_are(exported):
    texts = [row["tokens"] for row in exported["activations"]]
    assert {len(tokens) for tokens in texts} == {toy.LENGTH - 1}
    assert any("<|user_start|>" in tokens for tokens in texts)


def test_a_character_split_over_tokens_is_whole_on_the_last(exported):
    spelled = of(exported["activations"], toy.SPLIT)[0]
    at = spelled["tokens"].index("é")
    assert spelled["tokens"][at - 1] == text.EMPTY
    assert spelled["values"][at] > 0 or spelled["values"][at - 1] > 0


def test_empty_tokens_nuls_and_line_breaks_stay_visible(exported):
    shown = {token for row in exported["activations"] for token in row["tokens"]}
    assert {text.EMPTY, text.NUL, "\n", "\t", "<script>alert(1)</script>", " 語"} <= shown
    (row,) = of(exported["features"], toy.ORDINARY)
    assert "\ufffd\ufffd\ufffd" in row["pos_str"]  # the bytes of a surrogate


def test_the_strongest_texts_come_first_and_intervals_from_the_highest_down(exported, source):
    top = float(source.store()["max"][toy.DENSE])
    found = of(exported["activations"], toy.DENSE)
    strongest = [row for row in found if row["binMin"] == -1]
    rest = found[len(strongest) :]
    assert found[: len(strongest)] == strongest
    assert [row["maxValue"] for row in strongest] == sorted((row["maxValue"] for row in strongest), reverse=True)
    assert {(row["binMax"], row["binContains"]) for row in strongest} == {(round(top, 3), -1)}
    assert rest
    assert [row["binMax"] for row in rest] == sorted((row["binMax"] for row in rest), reverse=True)
    for row in rest:
        assert row["binMin"] - 1e-3 <= row["maxValue"] <= row["binMax"] + 1e-3
        assert row["binMax"] - row["binMin"] == pytest.approx(top / 5, abs=2e-3)
        assert 0 < row["binContains"] < 1


def test_texts_that_repeat_or_do_not_fire_are_left_out(run, source, monkeypatch):
    store = source.store()
    mine = store.examples(toy.ORDINARY)
    twin = np.array(store["example_row"])
    twin[mine[1]] = twin[mine[0]]
    monkeypatch.setitem(store._cache, "example_row", twin)
    found = rows.Latents(store, source.sae_dir)[toy.ORDINARY].contexts
    keys = [tuple(sorted(context.tokens)) for context in found]
    firing = [e for e in mine if store["example_group"][e] != 6]
    assert len(set(keys)) == len(keys) == len(firing) - 1
    assert all(context.max > 0 for context in found)


def test_long_texts_are_cut_around_the_token_that_counts(source):
    whole, cut = (rows.Latents(source.store(), source.sae_dir, shown=shown)[toy.DENSE] for shown in (127, 5))
    for long, short in zip(whole.contexts, cut.contexts, strict=True):
        assert len(short.tokens) == len(short.values) == 5
        start = long.qualifying - short.qualifying
        assert short.tokens == long.tokens[start : start + 5]
        assert short.values[short.qualifying] == long.values[long.qualifying] == short.max


def test_a_row_that_does_not_begin_with_bos_is_shown_from_its_first_token(tmp_path):
    store = Store(toy.write_store(tmp_path))
    tokens = np.array(store.texts.tokens)
    tokens[:, 0] = toy.ID[" the"]
    Texts.write(store.path.parent / "texts", store.texts.header, tokens, toy.VOCABULARY)
    context = rows.Latents(Store(store.path), tmp_path / "sae" / toy.HOOK)[toy.ORDINARY].contexts[0]
    assert (len(context.tokens), context.tokens[0]) == (toy.LENGTH, " the")


def test_small_activations_keep_their_digits(source, monkeypatch):
    store = source.store()
    for name in ("activation_value", "example_value", "max"):
        monkeypatch.setitem(store._cache, name, np.array(store[name]) * np.float32(1e-6))
    contexts = rows.Latents(store, source.sae_dir)[toy.ORDINARY].contexts
    assert contexts[0].max == pytest.approx(9.75e-6, rel=1e-3)
    assert contexts[0].high == pytest.approx(9.75e-6, rel=1e-3)
    assert contexts[-1].max > 0


def test_the_nearest_latent_is_itself(exported):
    for row in exported["features"]:
        assert row["topkCosSimIndices"][0] == int(row["index"])
        assert row["topkCosSimValues"][0] == 1
        assert row["topkCosSimValues"] == sorted(row["topkCosSimValues"], reverse=True)
        assert int(row["index"]) not in row["topkCosSimIndices"][1:]


def test_padding_of_short_lists_is_not_shown(source, monkeypatch):
    store = source.store()
    values = np.array(store["top_logit_values"])
    values[toy.ORDINARY, 4:] = np.nan
    monkeypatch.setitem(store._cache, "top_logit_values", values)
    found = rows.Latents(store, source.sae_dir)[toy.ORDINARY].tables
    assert len(found["pos_str"]) == len(found["pos_values"]) == 4


def test_vectors_go_along_only_when_asked_for(run, source, exported, tmp_path):
    W_dec = load_file(source.sae_dir / "sae_weights.safetensors")["W_dec"]
    assert not any(row["hasVector"] or row["vector"] for row in exported["features"])
    wanted = tables(write_v1(run, source, tmp_path, vectors=True)[0].parent)["features"]
    assert all(row["hasVector"] for row in wanted)
    np.testing.assert_array_equal(np.array([row["vector"] for row in wanted], np.float32), W_dec)


def test_labels_become_explanations_and_people_come_first(exported):
    found = {row["index"]: row for row in exported["explanations"]}
    assert found[str(toy.SPLIT)]["description"] == "halves of é, said by a person"
    assert found[str(toy.SPLIT)]["notes"] == "a note\nin two lines"
    assert found[str(toy.ORDINARY)]["description"] == "token ' cat'"
    assert found[str(toy.ORDINARY)]["notes"] == "found automatically, F1 0.50"
    assert str(toy.DEAD) not in found


# ---- SAEDashboard -------------------------------------------------------------------------------------------------


def convert(batch: dict[str, Any], made: str, hook_point: str) -> tuple[list[dict], list[dict]]:
    """The rows that SAEDashboard's converter makes of a batch, by its rules, keys and times aside."""
    suffix = f"__{batch['sae_id_suffix']}" if batch["sae_id_suffix"] else ""
    place = {"modelId": batch["model_id"], "layer": f"{batch['layer']}-{batch['sae_set']}{suffix}"}
    features, activations = [], []
    for found in batch["features"]:
        index = {"index": str(found["feature_index"])}
        largest = 0
        for told in found["activations"]:
            most = max(told["values"])
            largest = max(largest, most)
            row = {
                "tokens": told["tokens"],
                "values": told["values"],
                "maxValue": most,
                "maxValueTokenIndex": told["values"].index(most),
                "minValue": min(told["values"]),
                "binMin": told["bin_min"],
                "binMax": told["bin_max"],
                "binContains": told["bin_contains"],
                "qualifyingTokenIndex": told["qualifying_token_index"],
                "dfaValues": told.get("dfa_values", []),
                "dfaTargetIndex": told.get("dfa_targetIndex"),
                "dfaMaxValue": told.get("dfa_maxValue"),
                "lossValues": told.get("loss_values", []),
                "logitContributions": told.get("logit_contributions"),
                "dataIndex": None,
                "dataSource": None,
                "creatorId": ids.CREATOR,
                "createdAt": made,
            }
            activations.append(place | index | row)
        kept = ("neuron_alignment", "correlated_", "neg_", "pos_", "frac_", "freq_", "logits_", "decoder_")
        row = {key: value for key, value in found.items() if key.startswith(kept)}
        steering = {
            "vector": found.get("vector", []),
            "hasVector": bool(found.get("vector")),
            "vectorLabel": None,
            "hookName": f"blocks.{batch['layer']}.{hook_point}" if "vector" in found else None,
            "vectorDefaultSteerStrength": largest if "vector" in found else 10,
        }
        made_of = {"maxActApprox": largest, "creatorId": ids.CREATOR, "createdAt": made}
        features.append(place | index | row | steering | made_of)
    return features, activations


@pytest.mark.parametrize("vectors", [False, True])
def test_the_converter_makes_of_our_batches_the_rows_of_our_bulk_export(run, source, tmp_path, vectors, monkeypatch):
    monkeypatch.setattr(dashboard, "PER_BATCH", 3)
    ours = tables(write_v1(run, source, tmp_path / "v1", vectors=vectors)[0].parent)
    files = write_dashboard(source, tmp_path / "dashboard", vectors=vectors)
    batches = [json.loads(file.read_text()) for file in files if file.name.startswith("batch-")]
    assert [[f["feature_index"] for f in b["features"]] for b in batches] == [[0, 1, 2], [3, 4, 5], [6, 7]]
    features, activations = (
        [row for converted in found for row in converted]
        for found in zip(*(convert(b, source.about.time, "hook_resid_post") for b in batches), strict=True)
    )
    beyond = {"id", "topkCosSimIndices", "topkCosSimValues", "sourceSetName"}  # which the converter cannot know
    assert [{k: v for k, v in row.items() if k not in beyond} for row in ours["features"]] == features
    assert [{k: v for k, v in row.items() if k not in beyond} for row in ours["activations"]] == activations


def test_the_dashboards_folder_is_named_and_filled_as_the_runner_does(source, tmp_path):
    files = write_dashboard(source, tmp_path)
    (folder,) = tmp_path.iterdir()
    assert folder.name == f"{source.ids.model}_{source.ids.source_set}_{toy.HOOK}_{toy.D_SAE}"
    assert [file.name for file in files] == [
        "batch-0.json",
        "run_settings.json",
        "skipped_indexes.json",
        "tokens_40.pt",
    ]
    prompts = torch.load(folder / "tokens_40.pt", weights_only=True)
    assert prompts.dtype == torch.int64
    np.testing.assert_array_equal(prompts.numpy(), toy.tokens())
    told = json.loads((folder / "run_settings.json").read_text())
    assert (told["n_prompts_total"], told["n_tokens_in_prompt"]) == (toy.ROWS, toy.LENGTH)
    assert (told["n_quantiles"], told["top_acts_group_size"], told["quantile_group_size"]) == (5, toy.EACH, toy.EACH)
    assert {"sae_path", "sparsity_threshold", "hf_model_path", "neuronpedia_exports_dir"} <= set(told)


# ---- the upload's features ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def uploaded(run, source) -> list[dict[str, Any]]:
    return list(api.api_features(source.store(), source.sae_dir, Names.read(run, toy.HOOK)))


def test_the_upload_has_the_living_latents_in_its_own_form(uploaded, source, neuronpedia_reference):
    assert [feature["index"] for feature in uploaded] == [0, 2, 3, 4, 5, 6, 7]
    for feature in uploaded:
        jsonschema.validate(feature, SCHEMAS["api"])
    body = {"modelId": source.ids.model, "source": source.ids.source, "features": uploaded}
    jsonschema.validate(body, neuronpedia_reference["api_feature_upload_batch"])


def test_the_upload_sends_no_interval_for_the_strongest_and_four_digits(uploaded):
    for feature in uploaded:
        for activation in feature["activations"]:
            interval = [activation[f"quantile{name}"] for name in ("Max", "Min", "Fraction")]
            assert all(x is None for x in interval) or interval[0] > interval[1] >= 0
        assert feature["activations"][0]["quantileFraction"] is None
        numbers = [x["value"] for x in feature["topLogits"]] + [v for a in feature["activations"] for v in a["values"]]
        assert all(number == float(f"{number:.4g}") for number in [*numbers, feature["density"]])


def test_an_explanation_of_the_upload_is_cut_at_what_the_server_takes(source):
    names = Names({toy.ORDINARY: labels.Name("𝄞" * 500), toy.DENSE: labels.Name("short")}, {})
    told = {f["index"]: f["explanations"] for f in api.api_features(source.store(), source.sae_dir, names)}
    (long,) = told[toy.ORDINARY]
    assert len(long["text"].encode("utf-16-le")) // 2 == 511  # the next character has two
    assert set(long["text"]) == {"𝄞", "…"}
    assert told[toy.DENSE] == [{"text": "short"}]
    assert told[toy.HOSTILE] == []


# ---- bad input ----------------------------------------------------------------------------------------------------

GOOD = {"model": "nanochat-d6", "source_set": "res-8", "release": "r", "hook": toy.HOOK}
BAD = {
    "model": [
        "",
        "x",
        "6d",
        "Nanochat",
        "nano_chat",
        "nano--chat",
        "nano-",
        "nano.chat",
        "a/b",
        "a" * 33,
        "ab\n",
        "né",
    ],
    "source_set": ["", "Res", "res--8", "-res", "res-", "neurons", "a" * 32, "8k", "res_8", "res/8"],
    "release": ["", "my release", "-r", "r-", "r" * 129, "../r"],
    "hook": [
        "",
        "blocks.2",
        "blocks.2.hook_z",
        "blocks.128.hook_resid_post",
        "blocks.02.hook_resid_post",
        "x.2.hook_z",
    ],
    "suffix": ["", "-a", "a b", "../a"],
}


@pytest.mark.parametrize(("field", "value"), [(field, value) for field, values in BAD.items() for value in values])
def test_a_name_that_neuronpedia_would_refuse_is_refused(field, value):
    with pytest.raises(ConfigError, match=r"would be refused|Neuronpedia does not show"):
        Ids(**GOOD | {field: value})


@pytest.mark.parametrize(
    "changed",
    [
        {"n_layer": 0},
        {"n_layer": 128},
        {"title": " "},
        {"title": "a\nb"},
        {"creator": "\ud800"},
        {"description": "d" * 129},
        {"url": "example.org"},
        {"url": "https://a b"},
        {"created_at": "yesterday"},
        {"hub_repo": "owner"},
    ],
)
def test_what_an_export_says_of_itself_is_checked(changed):
    good = {"n_layer": 6, "title": "t", "description": "d"}
    About(**good)
    with pytest.raises(ConfigError, match=r"expected|not allowed|accepts"):
        About(**good | changed)


def test_times_are_written_in_utc():
    times = ("2026-03-01", "2026-03-01T02:03:04+02:00", "2026-03-01T00:03:04.5678Z")
    assert [About(6, "t", "d", created_at=time).time for time in times] == [
        "2026-03-01T00:00:00.000Z",
        "2026-03-01T00:03:04.000Z",
        "2026-03-01T00:03:04.567Z",
    ]


@pytest.mark.parametrize(
    ("value", "told"),
    [
        (float("nan"), "not finite"),
        ([1.0, float("-inf")], "not finite"),
        ("a\ud800b", r"lone surrogate U\+D800"),
        (["a", "\udfff"], r"lone surrogate U\+DFFF"),
        ("a\0b", "a NUL"),
        ("\\\0", "a NUL"),
        ({"\0": 1}, "a NUL"),
    ],
)
def test_what_postgres_cannot_hold_is_refused_with_its_place(value, told):
    with pytest.raises(strict.NotStorableError, match=f"'bad' of index 7 cannot be stored: .*{told}"):
        strict.line({"index": "7", "good": 1, "bad": value})


@pytest.mark.parametrize("written", ["\\u0000", "\\\\u0000", "a\\u0000\\u0000b", "\\", "\u2028", "plain"])
def test_a_text_that_only_looks_like_a_nul_survives_the_importer(written):
    line = strict.line({"description": written}).replace("\\u0000", " ")  # what the importer does to every file
    assert json.loads(line) == {"description": written}


def test_rows_with_other_keys_than_the_first_are_refused(tmp_path):
    with strict.Lines(tmp_path / "x.jsonl.gz") as lines:
        lines.add({"a": 1, "b": 2})
        with pytest.raises(ValueError, match=r"has the keys \['a'\], the first one \['a', 'b'\]"):
            lines.add({"a": 1})


@pytest.mark.parametrize(
    ("column", "error", "told"),
    [
        ("activation_value", StoreError, "is nan: gather the records again"),
        ("logit_range", strict.NotStorableError, "'logits_hist_data_bar_values' of index 0 cannot be stored"),
        ("max", strict.NotStorableError, "'binMax' of index 0 cannot be stored"),
    ],
)
def test_a_store_with_nan_is_refused(tmp_path, column, error, told):
    place = toy.write_store(tmp_path)
    values = np.load(place / f"{column}.npy")
    values[:] = np.nan
    np.save(place / f"{column}.npy", values)
    broken = sources.of_run(tmp_path, sources.Wanted(layers=6))[0]
    with pytest.raises(error, match=told):
        write_v1(tmp_path, broken, tmp_path / "out")
    assert not list((tmp_path / "out").rglob("*.*"))


def test_records_of_another_sae_or_version_are_refused(tmp_path):
    place = toy.write_store(tmp_path)
    toy.write_store(tmp_path / "other", seed=1)
    store = Store(place)
    with pytest.raises(StoreError, match=r"are of the SAE .* gather the records again"):
        rows.Latents(store, tmp_path / "other" / "sae" / toy.HOOK)
    with pytest.raises(FileNotFoundError, match="no exported SAE"):
        rows.Latents(store, tmp_path / "nowhere")
    told = json.loads((place / "records.json").read_text())
    (place / "records.json").write_text(json.dumps(told | {"version": VERSION - 1}))
    with pytest.raises(StoreError, match="gather the records again"):
        sources.of_run(tmp_path, sources.Wanted(layers=6))[0].store()


# ---- beside it ----------------------------------------------------------------------------------------------------


def test_paths_of_this_machine_are_not_published(source, tmp_path, monkeypatch):
    store = source.store()
    told = store.texts.header
    monkeypatch.setattr(store.texts, "header", type(told)(**told.to_json() | {"dataset": "/home/me/a.txt,~/b, stdlib"}))
    assert v1.metadata(store, source.ids, source.about)["source"]["dataset"] == "a.txt,b,stdlib"
    assert dashboard.settings(store, source.ids, source.about)["huggingface_dataset_path"] == "a.txt,b,stdlib"


def test_the_names_of_nanochat_sae_are_there(source):
    sae = torch_sae.load(source.sae_dir)
    told = bridge.neuronpedia.create_neuronpedia_metadata(
        sae, sae_config("topk", 8, 8, k=2), {"tokens": 5}, {"l0": 2.0}
    )
    assert told == {
        "architecture": {"type": "topk", "d_in": 8, "d_sae": 8, "expansion_factor": 1.0, "normalize_decoder": True},
        "sparsity_config": {"k": 2, "l1_coefficient": None},
        "training": {"tokens": 5},
        "evaluation": {"l0": 2.0},
    }
    assert "training" not in bridge.neuronpedia.create_neuronpedia_metadata(sae)
    with pytest.raises(AttributeError, match="no attribute 'Uploader'"):
        bridge.neuronpedia.Uploader  # noqa: B018
