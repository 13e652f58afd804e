"""Formats of Neuronpedia and SAEDashboard as JSON Schemas, stricter than theirs: every key is required."""

import gzip
import json
from pathlib import Path
from typing import Any

import jsonschema

STRING, INTEGER, NUMBER, BOOLEAN = ({"type": kind} for kind in ("string", "integer", "number", "boolean"))
NOTHING: dict[str, Any] = {"type": "null"}
TIME = {"type": "string", "pattern": r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z$"}
MODEL = {"type": "string", "pattern": "^[a-z](-?[a-z0-9])+$", "maxLength": 32}
SET = {"type": "string", "pattern": "^[a-z](-?[a-z0-9])*$", "maxLength": 31, "not": {"const": "neurons"}}
SOURCE = {"type": "string", "pattern": r"^[0-9]+-[a-z](-?[a-z0-9])*(__[A-Za-z0-9._-]+)?$"}
RELEASE = {"type": "string", "pattern": "^[A-Za-z0-9]+(-+[A-Za-z0-9]+)*$"}
DIGITS = {"type": "string", "pattern": "^[0-9]+$"}
KEY = {"type": "string", "pattern": "^c[0-9a-f]{24}$"}
BOT = {"const": "clkht01d40000jv08hvalcvly"}
SHARE = {"type": "number", "minimum": 0, "maximum": 1}


def each(kind: dict[str, Any], least: int = 0, most: int | None = None) -> dict[str, Any]:
    return {"type": "array", "items": kind, "minItems": least} | ({} if most is None else {"maxItems": most})


def maybe(kind: dict[str, Any]) -> dict[str, Any]:
    return {"anyOf": [kind, NOTHING]}


def table(optional: dict[str, Any] | None = None, /, **fields: Any) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": fields | (optional or {}),
        "required": list(fields),
        "additionalProperties": False,
    }


INTEGERS, NUMBERS, STRINGS = each(INTEGER), each(NUMBER), each(STRING)
MADE = {"creatorId": BOT, "createdAt": TIME}
SHOWN = MADE | {"visibility": {"const": "PUBLIC"}}

TABLES = {
    "neuron_alignment_indices": INTEGERS,
    "neuron_alignment_values": NUMBERS,
    "neuron_alignment_l1": NUMBERS,
    "correlated_neurons_indices": INTEGERS,
    "correlated_neurons_pearson": NUMBERS,
    "correlated_neurons_l1": NUMBERS,
    "correlated_features_indices": INTEGERS,
    "correlated_features_pearson": NUMBERS,
    "correlated_features_l1": NUMBERS,
    "neg_str": each({"type": "string", "minLength": 1}, 0, 10),
    "neg_values": NUMBERS,
    "pos_str": each({"type": "string", "minLength": 1}, 0, 10),
    "pos_values": NUMBERS,
    "frac_nonzero": SHARE,
    "freq_hist_data_bar_heights": each({"type": "integer", "minimum": 0}),
    "freq_hist_data_bar_values": NUMBERS,
    "logits_hist_data_bar_heights": each({"type": "integer", "minimum": 0}),
    "logits_hist_data_bar_values": NUMBERS,
    "decoder_weights_dist": NUMBERS,
}

SCHEMAS: dict[str, dict[str, Any]] = {
    "release": table(
        name=RELEASE,
        description=STRING,
        descriptionShort=STRING,
        creatorName=STRING,
        creatorNameShort=STRING,
        creatorEmail=NOTHING,
        isNewUi=BOOLEAN,
        featured=BOOLEAN,
        urls=STRINGS,
        defaultSourceSetName=NOTHING,
        defaultSourceId=NOTHING,
        defaultUmapSourceIds=each(STRING, 0, 0),
        **SHOWN,
    ),
    "model": table(
        id=MODEL,
        instruct=BOOLEAN,
        displayNameShort=STRING,
        displayName=STRING,
        tlensId=NOTHING,
        dimension={"type": "integer", "minimum": 1},
        defaultSourceSetName=NOTHING,
        defaultSourceId=NOTHING,
        inferenceEnabled={"const": False},
        layers={"type": "integer", "minimum": 1, "maximum": 127},
        neuronsPerLayer={"type": "integer", "minimum": 1},
        owner=STRING,
        updatedAt=TIME,
        website=NOTHING,
        **SHOWN,
    ),
    "sourceset": table(
        modelId=MODEL,
        name=SET,
        hasDashboards={"const": True},
        description={"type": "string", "maxLength": 128},
        type=STRING,
        creatorName=STRING,
        urls=STRINGS,
        creatorEmail=NOTHING,
        releaseName=RELEASE,
        defaultOfModelId=NOTHING,
        defaultRange={"enum": [0, 1, 2]},
        defaultShowBreaks=BOOLEAN,
        showDfa={"const": False},
        showCorrelated={"const": False},
        showHeadAttribution={"const": False},
        showUmap={"const": False},
        **SHOWN,
    ),
    "source": table(
        id=SOURCE,
        modelId=MODEL,
        setName=SET,
        hasDashboards={"const": True},
        inferenceEnabled={"const": False},
        inferenceHosts=each(STRING, 0, 0),
        saelensRelease=NOTHING,
        saelensSaeId=NOTHING,
        hfRepoId=maybe(STRING),
        hfFolderId=maybe(STRING),
        defaultOfModelId=NOTHING,
        hasUmap={"const": False},
        hasUmapLogSparsity={"const": False},
        hasUmapClusters={"const": False},
        num_prompts={"type": "integer", "minimum": 1},
        num_tokens_in_prompt={"type": "integer", "minimum": 2},
        dataset=STRING,
        notes=NOTHING,
        **SHOWN,
    ),
    "features": table(
        modelId=MODEL,
        layer=SOURCE,
        index=DIGITS,
        maxActApprox={"type": "number", "minimum": 0},
        hasVector=BOOLEAN,
        vector=NUMBERS,
        vectorLabel=NOTHING,
        vectorDefaultSteerStrength=NUMBER,
        hookName={"type": "string", "pattern": r"^blocks\.\d+\.hook_(resid_post|attn_out|mlp_out)$"},
        topkCosSimIndices=each(INTEGER, 1),
        topkCosSimValues=each(NUMBER, 1),
        sourceSetName=SET,
        **TABLES,
        **MADE,
    ),
    "activations": table(
        id=KEY,
        tokens=each({"type": "string", "minLength": 1}, 1, 127),
        index=DIGITS,
        layer=SOURCE,
        modelId=MODEL,
        maxValue={"type": "number", "exclusiveMinimum": 0},
        maxValueTokenIndex={"type": "integer", "minimum": 0},
        minValue=NUMBER,
        values=each(NUMBER, 1, 127),
        dataSource=NOTHING,
        dataIndex=NOTHING,
        dfaValues=each(NUMBER, 0, 0),
        dfaTargetIndex=NOTHING,
        dfaMaxValue=NOTHING,
        lossValues=each(NUMBER, 0, 0),
        logitContributions=NOTHING,
        binMin=NUMBER,
        binMax=NUMBER,
        binContains={"anyOf": [SHARE, {"const": -1}]},
        qualifyingTokenIndex={"type": "integer", "minimum": 0},
        **MADE,
    ),
    "explanations": table(
        id=KEY,
        modelId=MODEL,
        layer=SOURCE,
        index=DIGITS,
        description={"type": "string", "minLength": 1},
        authorId=BOT,
        typeName=NOTHING,
        explanationModelName=NOTHING,
        notes=maybe(STRING),
        createdAt=TIME,
    ),
    "dashboard": table(
        model_id=MODEL,
        layer=INTEGER,
        sae_set=SET,
        sae_id_suffix=maybe(STRING),
        features=each(
            table(
                feature_index={"type": "integer", "minimum": 0},
                n_prompts_total=INTEGER,
                n_tokens_in_prompt=INTEGER,
                dataset=STRING,
                vector=NUMBERS,
                activations=each(
                    table(
                        bin_min=NUMBER,
                        bin_max=NUMBER,
                        bin_contains={"type": "number", "minimum": -1, "maximum": 1},
                        tokens=each({"type": "string", "minLength": 1}, 1),
                        values=each(NUMBER, 1),
                        qualifying_token_index={"type": "integer", "minimum": -1},
                    )
                ),
                **TABLES,
            ),
            1,
            128,
        ),
    ),
    "skipped": table(
        model_id=MODEL, layer=DIGITS, sae_set=SET, log_sparsity=NUMBER, skipped_indexes=each(INTEGER, 0, 0)
    ),
    "api": table(
        index={"type": "integer", "minimum": 0, "maximum": 10_000_000},
        density=SHARE,
        **dict.fromkeys(
            ("topLogits", "bottomLogits"), each(table(token={"type": "string", "minLength": 1}, value=NUMBER), 0, 20)
        ),
        explanations=each(table(text={"type": "string", "minLength": 1, "maxLength": 512})),
        activations=each(
            table(
                tokens=each({"type": "string", "minLength": 1}, 1, 64),
                values=each(NUMBER, 1, 64),
                quantileMax=maybe(NUMBER),
                quantileMin=maybe(NUMBER),
                quantileFraction=maybe(SHARE),
            ),
            1,
        ),
    ),
}

SHARED = {
    "release": "release.jsonl",
    "model": "model.jsonl",
    "sourceset": "sourceset.jsonl",
    "source": "source.jsonl",
    "features": "features/batch-N.jsonl.gz line",
    "activations": "activations/batch-N.jsonl.gz line",
    "explanations": "explanations/batch-N.jsonl.gz line",
    "dashboard": "saedashboard_batch",
    "skipped": "skipped_indexes",
}
"""The names of the same schemas in the reference beside a clone."""


def read(file: Path) -> list[dict[str, Any]]:
    """Return the lines of a .jsonl or .jsonl.gz."""
    data = file.read_bytes()
    data = gzip.decompress(data) if file.suffix == ".gz" else data
    assert data.endswith(b"\n")
    return [json.loads(line) for line in data.decode().split("\n")[:-1]]


def hold(folder: Path, every: int = 1) -> None:
    """Assert that a v1 folder keeps the contract; check schemas, which are slow, on one line in `every`."""
    for name in ("release", "model", "sourceset", "source"):
        (row,) = read(folder / f"{name}.jsonl")
        jsonschema.validate(row, SCHEMAS[name])
    keys: set[str] = set()
    for features in (folder / "features").iterdir():
        largest = {row["index"]: row["maxActApprox"] for row in read(features)}
        found: dict[str, float] = {}
        for row in read(folder / "activations" / features.name):
            assert len(row["tokens"]) == len(row["values"])
            assert row["maxValue"] == max(row["values"]) == row["values"][row["qualifyingTokenIndex"]]
            assert row["binMin"] == -1 or row["binMin"] - 1e-3 <= row["maxValue"] <= row["binMax"] + 1e-3
            assert row["id"] not in keys
            keys.add(row["id"])
            found[row["index"]] = max(row["maxValue"], found.get(row["index"], 0))
        assert found == {index: most for index, most in largest.items() if most > 0}
    for kind in ("features", "activations", "explanations"):
        for file in (folder / kind).glob("*"):
            lines = read(file)
            assert lines
            assert all(list(row) == list(lines[0]) for row in lines)
            for row in lines[::every]:
                jsonschema.validate(row, SCHEMAS[kind])
