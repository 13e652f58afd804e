"""Neuronpedia's inference API over real HTTP: its names and formats, the runtime's numbers, its refusals."""

import itertools
import json
import re
import time
from pathlib import Path

import httpx
import jsonschema
import pytest
import torch
from live_explorer import MLP, RESID, C, load, served, write_run
from toy_saes import toy_sae

from bridge.hooks import capture
from bridge.nanochat.engine import chat_prompt
from bridge.runtime import InterpretableModel, Steer
from bridge.server import wire
from bridge.server.bodies import Limits, Refusal
from bridge.server.session import Session
from bridge.server.source_ids import Sources

MODEL, SECRET = "nanochat-d6-toy", "localhost-secret"
RES, MLPS = "2-res-256", "4-mlp-192"
PROMPT = "def naïve(self, 漢字):"
STEER = {
    "prompt": "class A:",
    "model": MODEL,
    "types": ["STEERED", "DEFAULT"],
    "features": [{"model": MODEL, "source": RES, "index": 7, "strength": 20}],
    "steerMethod": "SIMPLE_ADDITIVE",
    "normalizeSteering": False,
    "nCompletionTokens": 8,
    "temperature": 0.5,
    "strengthMultiplier": 2,
    "freqPenalty": 0,
    "seed": 16,
    "stream": False,
    "nLogprobs": 0,
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    run = write_run(tmp_path_factory.mktemp("runs") / "toy")
    return (run, *load(run))


@pytest.fixture(scope="module")
def im(model):
    return model[1]


@pytest.fixture(scope="module")
def client(model):
    with served(*model, secret=SECRET, model_id=MODEL) as client:
        client.headers["X-SECRET-KEY"] = SECRET
        yield client


def ask(client: httpx.Client, path: str, **body) -> dict:
    """Return the answer to a request for the test's model."""
    response = client.post(f"/v1/{path}", json={"model": MODEL} | body)
    assert response.status_code == 200, response.text
    jsonschema.validate(response.json(), ANSWERS[path.removesuffix("-batch")] if "batch" not in path else BATCH)
    return response.json()


def told(response: httpx.Response, status: int = 400) -> str:
    """Return the message of a refusal, where Neuronpedia expects it."""
    assert response.status_code == status, response.text
    return response.json()["error"]


def latents(im, text: str, hook: str) -> torch.Tensor:
    """Return all latents at all tokens of a text, BOS first."""
    with torch.no_grad(), capture(im.model, [hook]) as acts:
        im.model(torch.tensor([im.tokenizer.encode(text, prepend_bos=True)]))
        return im.sae(hook).encode(acts[hook][0])


# ---- the shapes that Neuronpedia's server has ----------------------------------------------------------------------


def shape(**properties) -> dict:
    """An object of just these fields; those whose names end in _ may be left out."""
    required = [name for name in properties if not name.endswith("_")]
    fields = {name.removesuffix("_"): value for name, value in properties.items()}
    return {"type": "object", "properties": fields, "required": required, "additionalProperties": False}


def many(items: dict) -> dict:
    return {"type": "array", "items": items}


TEXT, NUMBER, WHOLE, FLAG = ({"type": kind} for kind in ("string", "number", "integer", "boolean"))
NUMBERS, TEXTS = many(NUMBER), many(TEXT)
MESSAGES = many(shape(role=TEXT, content=TEXT))
KIND = {"enum": ["STEERED", "DEFAULT"]}
BATCH = shape(results={"type": "array"})
ANSWERS = {
    "activation/single": shape(
        activation=shape(values=NUMBERS, maxValue=NUMBER, maxValueIndex=WHOLE), tokens=TEXTS, tokensIsSpecial=many(FLAG)
    ),
    "activation/all": shape(
        activations=many(
            shape(source=TEXT, index=WHOLE, values=NUMBERS, sumValues=NUMBER, maxValue=NUMBER, maxValueIndex=WHOLE)
        ),
        tokens=TEXTS,
    ),
    "activation/topk-by-token": shape(
        results=many(
            shape(
                tokenPosition=WHOLE,
                token=TEXT,
                isSpecial=FLAG,
                topFeatures=many(shape(featureIndex=WHOLE, activationValue=NUMBER)),
            )
        ),
        tokens=TEXTS,
    ),
    "tokenize": shape(tokens=many(WHOLE), tokenStrings=TEXTS, prependBos=FLAG),
    "util/sae-vector": shape(vector=NUMBERS, hookName=TEXT),
    "steer/completion": shape(outputs=many(shape(type=KIND, output=TEXT))),
    "steer/completion-chat": shape(
        outputs=many(shape(chatTemplate=MESSAGES, raw=TEXT, type=KIND)), input=shape(chatTemplate=MESSAGES, raw=TEXT)
    ),
}


# ---- what fires ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("source", "hook"), [(RES, RESID), (MLPS, MLP)])
def test_single_gives_one_feature_over_the_prompt_without_bos(client, im, source, hook):
    expected = latents(im, PROMPT, hook)[1:]
    index = int(expected.max(0).values.argmax())
    for asked in (str(index), index):
        answer = ask(client, "activation/single", prompt=PROMPT, source=source, index=asked)
        assert answer["activation"]["values"] == pytest.approx(expected[:, index].tolist(), abs=1e-4)
        assert answer["activation"]["maxValue"] == max(answer["activation"]["values"]) > 0
        assert answer["activation"]["maxValueIndex"] == int(expected[:, index].argmax())
        assert "".join(answer["tokens"]) == PROMPT
        assert answer["tokensIsSpecial"] == [False] * len(expected)


def test_a_prompt_that_comes_with_a_bos_gets_no_second_one(client):
    plain, with_bos = (
        ask(client, "activation/single", prompt=prompt, source=RES, index="3")
        for prompt in (PROMPT, "<|bos|>" + PROMPT)
    )
    assert plain == with_bos


def test_single_takes_a_direction_at_any_hook(client, im):
    vector, hook = torch.linspace(-1, 1, C), "blocks.1.hook_attn_out"
    with torch.no_grad(), capture(im.model, [hook]) as acts:
        im.model(torch.tensor([im.tokenizer.encode(PROMPT, prepend_bos=True)]))
    answer = ask(client, "activation/single", prompt=PROMPT, vector=vector.tolist(), hook=hook)
    assert answer["activation"]["values"] == pytest.approx((acts[hook][0] @ vector)[1:].tolist(), abs=1e-4)


@pytest.mark.parametrize(
    "style", [str, lambda name: {"sourceSet": "source_set", "ignoreBos": "ignore_bos"}.get(name, name)]
)
def test_all_gives_the_strongest_features_of_a_set(client, im, style):
    body = {
        "prompt": PROMPT,
        "sourceSet": "res-256",
        "selectedSources": [],
        "sortByTokenIndexes": [],
        "ignoreBos": True,
    }
    answer = ask(client, "activation/all", **{style(name): value for name, value in body.items()})
    expected = latents(im, PROMPT, RESID)
    expected[0] = 0
    order = expected.max(0).values.argsort(descending=True, stable=True)[:25].tolist()
    assert [row["index"] for row in answer["activations"]] == order
    assert {row["source"] for row in answer["activations"]} == {RES}
    for row in answer["activations"]:
        assert row["values"] == pytest.approx(expected[:, row["index"]].tolist(), abs=1e-4)
        assert row["maxValue"] == row["values"][row["maxValueIndex"]] == max(row["values"])
    assert answer["tokens"][0] == "<|bos|>"
    assert len(answer["tokens"]) == len(expected)


def test_all_sorts_by_the_given_tokens(client, im):
    body = {"selectedSources": [], "ignoreBos": False, "numResults": 7}
    answer = ask(client, "activation/all", prompt=PROMPT, sourceSet="mlp", sortByTokenIndexes=[2, 4], **body)
    sums = latents(im, PROMPT, MLP)[[2, 4]].sum(0)
    assert [row["index"] for row in answer["activations"]] == sums.argsort(descending=True)[:7].tolist()
    assert [row["sumValues"] for row in answer["activations"]] == pytest.approx(sums.topk(7).values.tolist(), abs=1e-4)


def test_all_searches_every_layer_of_a_set_or_those_that_are_selected(client):
    body = {"prompt": PROMPT, "sourceSet": "mine", "sortByTokenIndexes": [], "ignoreBos": True, "numResults": 1000}
    both = ask(client, "activation/all", selectedSources=[], **body)["activations"]
    assert {row["source"] for row in both} == {"2-mine", "4-mine"}
    maxima = [row["maxValue"] for row in both]
    assert maxima == sorted(maxima, reverse=True)
    assert min(maxima) > 0
    one = ask(client, "activation/all", selectedSources=["4-mine"], **body)["activations"]
    assert one == [row for row in both if row["source"] == "4-mine"]


@pytest.mark.parametrize("ignore_bos", [True, False])
def test_topk_by_token_counts_positions_from_bos(client, im, ignore_bos):
    answer = ask(client, "activation/topk-by-token", prompt=PROMPT, source=RES, topK=3, ignoreBos=ignore_bos)
    expected = latents(im, PROMPT, RESID)
    first = int(ignore_bos)
    assert [row["tokenPosition"] for row in answer["results"]] == list(range(first, len(expected)))
    assert [row["token"] for row in answer["results"]] == answer["tokens"]
    assert [row["isSpecial"] for row in answer["results"]] == [i == 0 for i in range(first, len(expected))]
    for row in answer["results"]:
        found = expected[row["tokenPosition"]].topk(3)
        assert [f["featureIndex"] for f in row["topFeatures"]] == found.indices.tolist()
        assert [f["activationValue"] for f in row["topFeatures"]] == pytest.approx(found.values.tolist(), abs=1e-4)


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("activation/single", {"source": RES, "index": "3"}),
        ("activation/all", {"sourceSet": "res", "selectedSources": [], "sortByTokenIndexes": [], "ignoreBos": True}),
        ("activation/topk-by-token", {"source": RES, "topK": 2, "ignoreBos": True}),
    ],
)
def test_a_batch_is_its_prompts_one_by_one(client, path, body):
    prompts = [PROMPT, "import os"]
    batch = ask(client, f"{path}-batch", prompts=prompts, **body)
    assert batch["results"] == [ask(client, path, prompt=prompt, **body) for prompt in prompts]


@pytest.mark.parametrize("bos", [None, True, False])
def test_tokenize_gives_ids_and_texts(client, im, bos):
    answer = ask(client, "tokenize", text=PROMPT, prependBos=bos)
    assert answer["prependBos"] is (bos is not False)
    assert answer["tokens"] == im.tokenizer.encode(PROMPT, prepend_bos=bos is not False)
    assert "".join(answer["tokenStrings"]).removeprefix("<|bos|>") == PROMPT
    empty = ask(client, "tokenize", text="", prependBos=bos)
    assert len(empty["tokens"]) == (bos is not False)


def test_a_vector_is_a_decoder_row(client, im):
    answer = ask(client, "util/sae-vector", source=MLPS, index=5)
    assert answer["hookName"] == MLP
    assert answer["vector"] == pytest.approx(im.sae(MLP).W_dec[5].tolist())


def test_capabilities_and_health(client):
    for path in ("/v1/capabilities", "/capabilities"):
        answer = client.get(path).json()
        assert answer["model"] == MODEL
        assert answer["num_layers"] == 6
        assert answer["sae_sets"] == ["mlp", "res"]
        assert answer["endpoints"]["steer_completion"] is True
        assert answer["endpoints"]["steer_completion_chat"] is False
    assert client.get("/health").json() == {"status": "healthy"}


def test_the_guide_lists_the_endpoints_that_are_served(client, model):
    _, im, nano = model
    guide = (Path(__file__).resolve().parents[1] / "docs" / "guides" / "explore.md").read_text(encoding="utf-8")
    table = guide.partition("| endpoint | here |")[2].partition("\n\n")[0]
    listed, absent = set(), set()
    for row in table.splitlines():
        names, _, told = row.strip("|").partition("|")
        (absent if told.strip().startswith("not served") else listed).update(re.findall("`(/[^`]+)`", names))
    assert listed == {route.path for route in wire.routes(Session(im, nano, Limits()))}
    assert {client.post(path, json={}).status_code for path in absent} == {405}
    served = client.get("/v1/capabilities").json()["endpoints"]
    assert {served[path.removeprefix("/v1/").replace("/", "_")] for path in absent} == {False}


# ---- steering ------------------------------------------------------------------------------------------------------


def written(im, steers, **settings) -> str:
    """Return the continuation of the runtime."""
    sampling = {"max_tokens": 8, "temperature": 0.5, "seed": 16, "strength_multiplier": 2} | settings
    return "".join(token.text for token in im.generate("class A:", steers, **sampling))


@pytest.mark.parametrize(
    ("method", "mode"),
    [("SIMPLE_ADDITIVE", "additive"), ("ORTHOGONAL_DECOMP", "orthogonal"), ("PROJECTION_CAP", "projection_cap")],
)
@pytest.mark.parametrize(("source", "hook"), [(RES, RESID), (MLPS, MLP)])
def test_a_steered_completion_is_the_runtimes(client, im, method, mode, source, hook):
    features = [{"model": MODEL, "source": source, "index": 7, "strength": 20}]
    answer = ask(client, "steer/completion", **STEER | {"features": features, "steerMethod": method})
    assert answer["outputs"] == [
        {"type": "STEERED", "output": written(im, [Steer(hook, 7, mode, 20)])},
        {"type": "DEFAULT", "output": written(im, [])},
    ]


def test_a_vector_steers_as_the_feature_it_is_the_row_of(client, im):
    by_feature = ask(client, "steer/completion", **STEER)
    row = im.sae(RESID).W_dec[7]
    for scale, normalize in ((1, False), (4, True)):
        vectors = [{"hook": RESID, "steeringVector": (scale * row).tolist(), "strength": 20}]
        body = {name: value for name, value in STEER.items() if name != "features"}
        answer = ask(client, "steer/completion", **body | {"vectors": vectors, "normalizeSteering": normalize})
        assert answer == by_feature
    longer = [{"hook": RESID, "steeringVector": (2 * row).tolist(), "strength": 10}]
    assert ask(client, "steer/completion", **body | {"vectors": longer}) == by_feature


def test_several_features_are_pushed_in_order(client, im):
    features = [
        {"model": MODEL, "source": RES, "index": index, "strength": strength} for index, strength in ((7, 20), (9, -8))
    ] + [{"model": MODEL, "source": MLPS, "index": 1, "strength": 5}]
    answer = ask(client, "steer/completion", **STEER | {"features": features, "types": ["STEERED"]})
    steers = [Steer(RESID, 7, "additive", 20), Steer(RESID, 9, "additive", -8), Steer(MLP, 1, "additive", 5)]
    assert answer["outputs"] == [{"type": "STEERED", "output": written(im, steers)}]


def test_a_streamed_completion_grows_to_the_whole_one(client):
    whole = ask(client, "steer/completion", **STEER)
    with client.stream("POST", "/v1/steer/completion", json=STEER | {"stream": True}) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        text = response.read().decode()
    assert text.endswith("\n\n")
    frames = [json.loads(event.removeprefix("data: ")) for event in text.strip().split("\n\n")]
    assert frames[-1] == whole
    assert len(frames) >= 16
    for before, after in itertools.pairwise(frames):
        jsonschema.validate(after, ANSWERS["steer/completion"])
        for a, b in zip(before["outputs"], after["outputs"], strict=True):
            assert b["output"].startswith(a["output"])


def test_a_chat_comes_back_as_messages_and_as_the_model_read_it(model, im):
    messages = [{"role": "user", "content": "hello"}]
    body = {name: value for name, value in STEER.items() if name != "prompt"}
    with served(*model, chat=True) as client:
        for special, positions in ((True, "all"), (False, "not_special")):
            answer = ask(client, "steer/completion-chat", prompt=messages, steerSpecialTokens=special, **body)
            ids, stop_tokens = chat_prompt(im.model, im.tokenizer, messages)
            steers = [Steer(RESID, 7, "additive", 20, positions)]
            sampling = {"max_tokens": 8, "temperature": 0.5, "seed": 16, "strength_multiplier": 2}
            said = "".join(t.text for t in im.generate(ids, steers, stop_tokens=stop_tokens, **sampling))
            raw = im.tokenizer.decode(ids)
            assert answer["input"] == {"chatTemplate": messages, "raw": raw}
            assert answer["outputs"][0] == {
                "type": "STEERED",
                "raw": raw + said,
                "chatTemplate": [*messages, {"role": "assistant", "content": said}],
            }
        unsteered = ask(
            client,
            "steer/completion-chat",
            prompt=messages,
            steerSpecialTokens=True,
            **body | {"features": None, "types": ["DEFAULT"]},
        )
        assert unsteered["outputs"] == [answer["outputs"][1]]
        system = [{"role": "system", "content": "be brief"}, *messages]
        ask(client, "steer/completion-chat", prompt=system, steerSpecialTokens=True, **body)
    with served(*model) as client:
        response = client.post(
            "/v1/steer/completion-chat", json={"prompt": messages, "steerSpecialTokens": True, **body}
        )
        assert "not trained to chat" in told(response)


LONG = {
    "activation/single-batch": {"prompts": ["x " * 900] * 32, "model": MODEL, "source": RES, "index": "1"},
    "steer/completion": STEER | {"nCompletionTokens": 256, "stream": False},
}


@pytest.mark.parametrize("path", LONG)
def test_a_closed_connection_stops_what_is_made_for_it(model, im, path):
    forwards = []

    def slowly(*_) -> None:
        forwards.append(1)
        time.sleep(0.03)

    handle = im.model.transformer.wte.register_forward_hook(slowly)
    with served(*model, limits=Limits(generations=1, readings=1)) as client:
        with pytest.raises(httpx.ReadTimeout):
            client.post(f"/v1/{path}", json=LONG[path], timeout=0.4)
        time.sleep(0.3)
        after = len(forwards)
        time.sleep(0.3)
        handle.remove()
        assert 0 < after < 32, "all was made"
        assert len(forwards) == after, "it goes on for nobody"
        ask(client, "steer/completion", **STEER | {"nCompletionTokens": 1})
        ask(client, "activation/single", prompt="x", source=RES, index="1")


def test_a_closed_connection_stops_a_stream(model, im):
    forwards = []
    handle = im.model.transformer.wte.register_forward_hook(lambda *_: forwards.append(1))
    with served(*model, limits=Limits(generations=1)) as client:
        body = LONG["steer/completion"] | {"stream": True}
        with client.stream("POST", "/v1/steer/completion", json=body) as response:
            next(response.iter_lines())
        time.sleep(0.3)
        after = len(forwards)
        time.sleep(0.4)
        handle.remove()
        assert len(forwards) == after < 500


# ---- refusals ------------------------------------------------------------------------------------------------------


def test_the_secret_is_asked_for_on_the_wire_only(client):
    body = {"model": MODEL, "text": "x"}
    for headers in ({}, {"X-SECRET-KEY": "wrong"}, {"X-SECRET-KEY": ""}):
        with httpx.Client(base_url=client.base_url, headers=headers) as stranger:
            told(stranger.post("/v1/tokenize", json=body), 401)
            assert stranger.get("/api/info").status_code == 200


def test_another_model_is_refused(client, model):
    for body in ({"model": "gpt2-small", "text": "x"}, {"text": "x"}, {"model": 3, "text": "x"}):
        assert told(client.post("/v1/tokenize", json=body))
    features = [STEER["features"][0] | {"model": "gpt2-small"}]
    assert "Unsupported model" in told(client.post("/v1/steer/completion", json=STEER | {"features": features}))
    with served(*model) as any_name:
        assert any_name.post("/v1/tokenize", json={"model": "gpt2-small", "text": "x"}).status_code == 200


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("activation/single", {"prompt": "x"}),
        ("activation/single", {"prompt": "x", "source": RES}),
        ("activation/single", {"prompt": "x", "source": RES, "index": "1", "vector": [0.0] * C, "hook": RESID}),
        ("activation/single", {"prompt": "x", "source": RES, "index": "256"}),
        ("activation/single", {"prompt": "x", "source": RES, "index": "²"}),
        ("activation/single", {"prompt": "x", "source": "3-res-256", "index": "1"}),
        ("activation/single", {"prompt": "x", "source": "res", "index": "1"}),
        ("activation/single", {"prompt": "x", "source": "2-mlp-256", "index": "1"}),
        ("activation/single", {"prompt": "x", "vector": [0.0] * 3, "hook": RESID}),
        ("activation/single", {"prompt": "x", "vector": ["a"] * C, "hook": RESID}),
        ("activation/single", {"prompt": "x", "vector": [0.0] * C, "hook": "blocks.2.hook_resid_pre"}),
        ("activation/single", {"prompt": "", "source": RES, "index": "1"}),
        ("activation/single", {"prompt": "x " * 2000, "source": RES, "index": "1"}),
        ("activation/single-batch", {"prompts": "x", "source": RES, "index": "1"}),
        ("activation/single-batch", {"prompts": ["x"] * 33, "source": RES, "index": "1"}),
        ("activation/all", {"prompt": "x", "sourceSet": "att-256"}),
        ("activation/all", {"prompt": "x", "sourceSet": "res", "selectedSources": ["9-res"]}),
        ("activation/all", {"prompt": "x", "sourceSet": "res", "sortByTokenIndexes": [2]}),
        ("activation/all", {"prompt": "x", "sourceSet": "res", "sortByTokenIndexes": [-1]}),
        ("activation/all", {"prompt": "x", "sourceSet": "res", "numResults": 0}),
        ("activation/topk-by-token", {"prompt": "x", "source": RES, "topK": 0}),
        ("activation/topk-by-token", {"prompt": "x", "source": RES, "ignoreBos": "yes"}),
        ("tokenize", {"text": 3}),
        ("util/sae-vector", {"source": RES, "index": -1}),
        ("steer/completion", STEER | {"features": None}),
        ("steer/completion", STEER | {"vectors": [{"hook": RESID, "steeringVector": [1.0] * C, "strength": 1}]}),
        ("steer/completion", STEER | {"types": []}),
        ("steer/completion", STEER | {"types": ["OTHER"]}),
        ("steer/completion", STEER | {"types": [["STEERED"]]}),
        ("steer/completion", STEER | {"steerMethod": "OTHER"}),
        ("steer/completion", STEER | {"nCompletionTokens": 0}),
        ("steer/completion", STEER | {"temperature": -1}),
        ("steer/completion", STEER | {"temperature": 10**400}),
        ("steer/completion", STEER | {"seed": "16"}),
        ("steer/completion", STEER | {"features": [STEER["features"][0] | {"index": 256}]}),
        ("steer/completion", STEER | {"features": STEER["features"] * 17}),
        ("steer/completion", STEER | {"features": ["7"]}),
        ("steer/completion-chat", STEER | {"steerSpecialTokens": True}),
        ("steer/completion-chat", STEER | {"prompt": [{"role": "bot", "content": "x"}], "steerSpecialTokens": True}),
    ],
)
def test_a_malformed_request_is_refused(client, path, body):
    assert told(client.post(f"/v1/{path}", json={"model": MODEL} | body))


@pytest.mark.parametrize("vector", [[0.0] * C, [1.0] * (C - 1)])
@pytest.mark.parametrize("normalize", [True, False])
def test_a_vector_without_direction_is_refused(client, vector, normalize):
    vectors = [{"hook": RESID, "steeringVector": vector, "strength": 1}]
    body = STEER | {"features": None, "vectors": vectors, "normalizeSteering": normalize}
    assert told(client.post("/v1/steer/completion", json=body))


def test_where_a_layer_has_several_saes_the_set_says_which(model):
    _, im, nano = model
    hooks = {name: f"blocks.2.hook_{name}" for name in ("resid_post", "mlp_out", "attn_out")}
    saes = {hook: toy_sae("topk", C, 256) for hook in hooks.values()}
    sources = Sources(Session(InterpretableModel(im.model, saes, im.tokenizer), nano, Limits()))
    for source, name in {
        "2-res-1k-41fe07": "resid_post",
        "2-mlp-1k__l0-40": "mlp_out",
        "2-my-att-x": "attn_out",
    }.items():
        assert sources.hook(source) == hooks[name]
    for unclear in ("2-mine", "2-res-mlp", "3-res-1k", "-res", "2-", "٢-res"):
        with pytest.raises(Refusal, match="2-att, 2-mlp, 2-res"):
            sources.hook(unclear)
    assert sources.sources_in_set("att-1k") == {"2-att-1k": hooks["attn_out"]}
