"""Answers of the live explorer: bounded in bytes, work and time; refusals of invalid bodies name the field."""

import contextlib
import json
import threading
import time

import anyio
import httpx
import pytest
from explorer_load import MODEL, Server, health
from live_explorer import MLP, RESID, C, load, served, write_run
from toy_saes import export, toy_sae

from bridge.run import labels
from bridge.server import answers, bodies
from bridge.server.bodies import Limits, Refusal

RES = "2-res-256"
PUSH = {"hook": RESID, "index": 7, "mode": "additive", "strength": 40}
FEATURE = {"model": "m", "source": RES, "index": 7, "strength": 20}
STEER = {
    "prompt": "class A:",
    "model": "m",
    "types": ["STEERED"],
    "features": [FEATURE],
    "steerMethod": "SIMPLE_ADDITIVE",
    "nCompletionTokens": 2,
    "temperature": 0.5,
    "strengthMultiplier": 2,
    "freqPenalty": 0,
    "seed": 16,
    "nLogprobs": 0,
}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("runs") / "toy")


@pytest.fixture(scope="module")
def model(run):
    return load(run)


@pytest.fixture(scope="module")
def client(run, model):
    with served(run, *model) as client:
        yield client


def told(response: httpx.Response, status: int = 400) -> str:
    """Return the message of a refusal."""
    assert response.status_code == status, response.text
    return response.json()["error"]


@contextlib.contextmanager
def counted(im, seconds: float = 0.0):
    """The forward passes of a model, each of which takes so much longer."""
    forwards = []
    handle = im.model.transformer.wte.register_forward_hook(lambda *_: (forwards.append(1), time.sleep(seconds))[0])
    try:
        yield forwards
    finally:
        handle.remove()


# ---- bytes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "value",
    [
        {},
        [],
        {"a": [], "b": {}},
        {"é\n": [1.5, "x", None, True], "b": {"c": [[1, 2], [], [{}]]}, "d": 3},
        {"results": [{"rows": [{"index": i, "values": [0.5] * 50} for i in range(50)]}] * 40},
    ],
)
def test_pieces_are_the_json_of_the_whole(value):
    pieces = answers.encode(value, 2**24)
    assert json.loads(b"".join(pieces)) == value
    assert b"".join(pieces) == json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()
    assert all(len(piece) < 2 * answers._PIECE for piece in pieces)
    with pytest.raises(Refusal, match="more than 1 bytes, the limit"):
        answers.encode(value, 1)


def test_numbers_that_json_does_not_have_are_no_answer():
    with pytest.raises(ValueError, match="JSON compliant"):
        answers.encode({"a": [float("nan")]}, 2**24)


def test_the_oldest_answer_makes_room_for_a_new_one():
    outbox, ended = answers.Outbox(10), []

    async def send(size: int) -> None:
        with outbox.sending(size, 5):
            await anyio.sleep(0.3)
            ended.append(size)

    async def main() -> None:
        async with anyio.create_task_group() as tasks:
            for size in (6, 3, 2, 20, 1):
                tasks.start_soon(send, size)
                await anyio.sleep(0.01)

    anyio.run(main)
    assert ended == [1], "20 alone is more than all may have, and makes room too"
    assert not outbox._sending


def test_a_batch_that_would_be_too_large_is_refused_before_the_model_runs(run, model):
    im, _ = model
    text = "def mean(values): return sum(values)\n" * 20
    with served(run, *model) as client, counted(im) as forwards:
        for path, more in {
            "all-batch": {"sourceSet": "any", "numResults": 1000},
            "topk-by-token-batch": {"source": RES, "topK": 100},
        }.items():
            response = client.post(f"/v1/activation/{path}", json=MODEL | {"prompts": [text] * 32} | more)
            assert "at most 524,288 are allowed; ask for fewer features" in told(response, 422)
        prompts = [*["x"] * 31, "x " * 2000]
        response = client.post(
            "/v1/activation/single-batch", json=MODEL | {"prompts": prompts, "source": RES, "index": 1}
        )
        assert "at most 1,024 are read" in told(response)
        assert not forwards


def test_an_answer_that_became_too_large_is_refused(run, model):
    with served(run, *model, limits=Limits(answer_bytes=1000)) as client:
        response = client.post("/api/activations", json={"text": "import os\n" * 50, "hook": RESID})
        assert "the answer has more than 1,000 bytes" in told(response, 422)
        assert client.post("/api/activations", json={"text": "x", "hook": RESID, "top_k": 1}).status_code == 200


def test_a_text_that_is_too_long_is_not_cut_into_tokens(client, model, monkeypatch):
    im, _ = model
    monkeypatch.setattr(type(im.tokenizer), "encode", lambda *_: pytest.fail("it was"))
    for path, field in {"/api/activations": "text", "/v1/tokenize": "text", "/v1/steer/completion": "prompt"}.items():
        body = {"hook": RESID} if path.startswith("/api") else STEER
        known = {k: v for k, v in body.items() if k != field}
        assert "at most 1,024 tokens are read" in told(client.post(path, json=known | {field: "y" * 500_000})), path


def test_a_stream_leaves_frames_out_but_never_the_last(run, model):
    body = STEER | {"nCompletionTokens": 40, "types": ["STEERED", "DEFAULT"], "stream": True}

    def frames(client: httpx.Client) -> list[str]:
        with client.stream("POST", "/v1/steer/completion", json=body) as response:
            return response.read().decode().strip().split("\n\n")

    with served(run, *model) as client:
        every = frames(client)
    with served(run, *model, limits=Limits(answer_bytes=2000)) as client:
        some = frames(client)
    assert some[-1] == every[-1]
    assert some[:-1] == every[: len(some) - 1]
    assert 5 < len(some) < len(every)
    assert sum(map(len, some[:-1])) <= 2000


def test_the_largest_answer_needs_little_memory_and_keeps_nobody_waiting(tmp_path):
    run = tmp_path / "run"
    export(toy_sae("topk", C, 4096, hook_name=RESID, k=32), run / "sae" / RESID)
    text = "".join(f"def f{i}(x): return x ** {i} % {i * i}\n" for i in range(45))
    with Server(run) as server, server.client() as client:
        count = len(client.post("/v1/tokenize", json=MODEL | {"text": text}).json()["tokens"])
        assert 500 < count < 1024
        body = MODEL | {"sourceSet": "res", "prompts": [text]}
        client.post("/v1/activation/all-batch", json=body)  # what the first request alone needs
        before = server.memory("VmRSS")
        server.forget_peak()
        with health(server) as waits:
            response = client.post("/v1/activation/all-batch", json=body | {"numResults": 2**19 // count})
        assert response.status_code == 200, response.text
        values = sum(len(row["values"]) for row in response.json()["results"][0]["activations"])
        assert values > 0.5 * 2**19
        assert server.memory() - before < 150 * 2**20, f"{(server.memory() - before) / 2**20:.0f} MiB more"
        assert {status for _, status in waits} == {200}
        assert max(seconds for seconds, _ in waits) < 1
        told(client.post("/v1/activation/all-batch", json=body | {"prompts": [text] * 32, "numResults": 1000}), 422)


# ---- time ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/activation/single-batch", MODEL | {"prompts": ["x"] * 32, "source": RES, "index": "1"}),
        ("/api/activations", {"text": "x", "hook": RESID}),
    ],
)
def test_work_that_takes_too_long_ends_and_says_so(run, model, path, body):
    im, _ = model
    with served(run, *model, limits=Limits(seconds=0.3, readings=1)) as client:
        with counted(im, 0.4 if path == "/api/activations" else 0.05) as forwards:
            response = client.post(path, json=body)
            assert "took longer than 0.3 seconds" in told(response, 503)
            assert int(response.headers["retry-after"]) >= 1
            done = len(forwards)
            time.sleep(0.3)
            assert len(forwards) == done < 12
        assert client.post("/api/activations", json={"text": "x", "hook": RESID}).status_code == 200


def test_a_thread_ends_when_nobody_waits_for_it(run, model, monkeypatch):
    im, _ = model
    sae, parts = im.sae(RESID), []
    encode = type(sae).encode
    monkeypatch.setattr(type(sae), "encode", lambda *a: (parts.append(1), time.sleep(0.1), encode(*a))[2])
    with served(run, *model, limits=Limits(seconds=0.35)) as client:
        response = client.post("/v1/activation/all", json=MODEL | {"prompt": "x " * 900, "sourceSet": "res"})
        assert "took longer than" in told(response, 503)
        done = len(parts)
        time.sleep(0.3)
        assert len(parts) == done < 14, "the text has 15 parts, and each is read twice"


def test_long_work_and_others_do_not_wait_for_each_other(run, model):
    im, _ = model
    with served(run, *model) as client, counted(im, 0.5):
        asked = threading.Thread(
            target=client.post, args=("/api/activations",), kwargs={"json": {"text": "x", "hook": RESID}}
        )
        asked.start()
        with httpx.Client(base_url=client.base_url) as other:
            before = time.monotonic()
            assert other.get("/health").status_code == 200
            assert time.monotonic() - before < 0.4
        asked.join()


# ---- notes ---------------------------------------------------------------------------------------------------------

NOTE = {"hook": RESID, "latent": 3, "label": "x", "note": ""}


def test_notes_that_became_too_many_are_named(tmp_path, model):
    run = write_run(tmp_path / "toy")
    with served(run, *model, limits=Limits(notes_bytes=200)) as client:
        for _ in range(2):
            assert client.post("/api/notes", json=NOTE).status_code == 200
        before = labels.notes_file(run).read_bytes()
        assert "reads at most 200; move the file elsewhere" in told(client.post("/api/notes", json=NOTE), 507)
        assert "notes.jsonl has" in told(client.get("/api/notes"), 507)
        assert labels.notes_file(run).read_bytes() == before


def test_a_note_that_cannot_be_written_is_reported(client, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(labels, "append", full)
    assert told(client.post("/api/notes", json=NOTE), 507) == "the note was not saved: No space left on device"


def test_notes_that_are_not_text_are_reported(tmp_path, model):
    run = write_run(tmp_path / "toy")
    labels.notes_file(run).write_bytes(b"\xff\n")
    with served(run, *model) as client:
        assert "is not UTF-8" in told(client.get("/api/notes"), 500)


# ---- bodies --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "complaint"),
    [
        (b'{"text": "x", "hook": "a", "text": "y"}', '"text" appears twice'),
        (b'{"a": [{"b": 1, "c": {"d": 1, "d": 1}}]}', '"d" appears twice'),
        (b'{"steer": [{"strength": NaN}]}', "steer[0].strength is not finite"),
        (b'{"steer": [{"x": 1}, {"strength": 1e999}]}', "steer[1].strength is not finite"),
        (b'{"temperature": -Infinity}', "temperature is not finite"),
        (b'{"a": ["x", "\\ud800"]}', "a[1] holds half of a surrogate pair"),
        (b'{"a": {"\\udfff": 1}}', "a name in a holds half of a surrogate pair"),
        (b"[" * 10**5, "nested too deep"),
        (b'{"a": [' + b"[]," * 10**5 + b"1]}", "more than 100,000 brackets"),
        (b'{"a":' * 10**5 + b"1", "nested too deep"),
        (b'{"text": "\xff"}', "can't decode byte 0xff"),
    ],
)
def test_a_body_that_means_two_things_or_none_is_refused_by_name(client, body, complaint):
    for path in ("/api/activations", "/v1/tokenize"):
        response = client.post(path, content=body, headers={"content-type": "application/json"})
        assert complaint in told(response), path


def test_a_field_in_two_writings_is_refused(client):
    body = MODEL | {"prompt": "x", "sourceSet": "res", "source_set": "mlp"}
    assert "'sourceSet' appears twice" in told(client.post("/v1/activation/all", json=body))


def test_a_name_that_is_long_is_shown_short():
    with pytest.raises(Refusal) as refusal:
        bodies.parse(json.dumps({"n" * 10**5: float("nan")}).encode())
    assert len(refusal.value.message) < 300


# ---- numbers -------------------------------------------------------------------------------------------------------

COUNTS = {
    ("/api/activations", "top_k"): {"text": "x", "hook": RESID},
    ("/api/latent", "index"): {"text": "x", "hook": RESID},
    ("/api/steer", "max_tokens"): {"prompt": "x"},
    ("/api/steer", "seed"): {"prompt": "x"},
    ("/api/steer", "index"): {"prompt": "x", "steer": [PUSH]},
    ("/api/notes", "latent"): NOTE,
    ("/v1/activation/single", "index"): MODEL | {"prompt": "x", "source": RES},
    ("/v1/activation/all", "numResults"): MODEL | {"prompt": "x", "sourceSet": "res"},
    ("/v1/activation/all", "sortByTokenIndexes"): MODEL | {"prompt": "x", "sourceSet": "res"},
    ("/v1/activation/topk-by-token", "topK"): MODEL | {"prompt": "x", "source": RES},
    ("/v1/util/sae-vector", "index"): MODEL | {"source": RES},
    ("/v1/steer/completion", "nCompletionTokens"): STEER,
    ("/v1/steer/completion", "nLogprobs"): STEER,
    ("/v1/steer/completion", "index"): STEER,
}
SIZES = {
    ("/api/steer", "temperature"): {"prompt": "x"},
    ("/api/steer", "strength_multiplier"): {"prompt": "x"},
    ("/api/steer", "strength"): {"prompt": "x", "steer": [PUSH]},
    ("/v1/steer/completion", "temperature"): STEER,
    ("/v1/steer/completion", "seed"): STEER,
    ("/v1/steer/completion", "strengthMultiplier"): STEER,
    ("/v1/steer/completion", "freqPenalty"): STEER,
    ("/v1/steer/completion", "strength"): STEER,
    ("/v1/steer/completion", "steeringVector"): STEER,
    ("/v1/activation/single", "vector"): MODEL | {"prompt": "x", "hook": RESID},
}
NO_NUMBERS = [True, "x", [1], {}, 2**63, 10**30]


def with_field(body: dict, field: str, value: object) -> dict:
    """A body in which a field, also one of the first thing that is pushed, has a value."""
    if field == "steeringVector":
        vectors = [{"hook": RESID, "steeringVector": [value] + [1.0] * (C - 1), "strength": 1}]
        return {name: inner for name, inner in body.items() if name != "features"} | {"vectors": vectors}
    if field == "vector":
        return body | {"vector": [value] + [1.0] * (C - 1)}
    if field == "sortByTokenIndexes":
        return body | {field: [value]}
    for pushed in ("steer", "features"):
        if field in body.get(pushed, [{}])[0]:
            return body | {pushed: [body[pushed][0] | {field: value}]}
    return body | {field: value}


@pytest.mark.parametrize(("path", "field"), COUNTS)
def test_a_count_out_of_range_is_refused_by_its_name(client, path, field):
    for value in [*NO_NUMBERS, -1, 1.5, 1e300, 1e-320]:
        response = client.post(path, json=with_field(COUNTS[path, field], field, value))
        assert field in told(response), value


@pytest.mark.parametrize(("path", "field"), SIZES)
def test_a_number_out_of_range_is_refused_by_its_name(client, path, field):
    small = [] if field in ("vector", "steeringVector") else [1e-320, -1e-320]  # of others a 0 more does not matter
    for value in [*NO_NUMBERS, 1e300, -1e300, *small]:
        response = client.post(path, json=with_field(SIZES[path, field], field, value))
        assert field in told(response), value


def test_factors_and_lengths_are_refused_by_their_name(client):
    for mode, index in (("orthogonal", 0), ("scale", 1)):
        for strength in (1e6, -1e6):
            steer = [PUSH] * index + [PUSH | {"mode": mode, "strength": strength}]
            refused = told(client.post("/api/steer", json={"prompt": "x", "steer": steer}))
            assert f"steer[{index}].strength, which is a factor in the mode {mode}, is {strength}" in refused
    body = STEER | {"steerMethod": "ORTHOGONAL_DECOMP"}
    for strength in (1e6, -1e6):
        refused = told(
            client.post("/v1/steer/completion", json=body | {"features": [FEATURE | {"strength": strength}]})
        )
        assert "features[0].strength, which is a factor" in refused
    refused = told(client.post("/v1/steer/completion", json=body | {"strengthMultiplier": 1000}))
    assert "features[0].strength * strengthMultiplier" in refused
    many = [FEATURE | {"strength": 500}] * 16
    assert "product of the factors" in told(client.post("/v1/steer/completion", json=body | {"features": many}))


@pytest.mark.parametrize("size", [0.0, 1e-30])
@pytest.mark.parametrize("normalize", [True, False])
def test_a_direction_that_is_none_is_refused_by_its_name(client, size, normalize):
    vectors = [{"hook": MLP, "steeringVector": [size] * C, "strength": 1}]
    body = STEER | {"features": None, "vectors": vectors, "normalizeSteering": normalize}
    assert "vectors[0].steeringVector has norm 0" in told(client.post("/v1/steer/completion", json=body))


def test_a_seed_that_is_written_as_a_float_is_whole(client):
    outputs = [client.post("/v1/steer/completion", json=STEER | {"seed": seed}).json() for seed in (16, 16.0, -16)]
    assert outputs[0] == outputs[1]
    assert "whole number" in told(client.post("/v1/steer/completion", json=STEER | {"seed": 16.5}))


def test_logits_that_overflow_are_reported(run, model):
    im, nano = model
    with served(run, im, nano) as client:
        broken = im.model.lm_head.register_forward_hook(lambda *given: given[-1] * float("nan"))
        try:
            body = {"prompt": "x", "max_tokens": 2}
            with client.stream("POST", "/api/steer", json=body) as response:
                last = json.loads(list(response.iter_lines())[-1])
            assert "logits are not finite" in last["error"]
            assert "logits are not finite" in told(client.post("/v1/steer/completion", json=STEER), 422)
            with client.stream("POST", "/v1/steer/completion", json=STEER | {"stream": True}) as response:
                event = response.read().decode().strip().split("\n\n")[-1]
            assert "logits are not finite" in json.loads(event.removeprefix("data: "))["error"]
        finally:
            broken.remove()
        assert client.post("/v1/steer/completion", json=STEER).status_code == 200
