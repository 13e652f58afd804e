"""The live explorer over real HTTP: its answers, its files, its refusals, and its robustness."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anyio
import httpx
import pytest
import torch
from live_explorer import MLP, RESID, lines, listening, load, raw, served, write_run

from bridge.hooks import capture
from bridge.nanochat.engine import chat_prompt
from bridge.ranges import FACTORS
from bridge.runtime import Steer
from bridge.server import server
from bridge.server.bodies import Limits
from bridge.server.session import Session
from bridge.steering import MODES, POSITIONS
from bridge.tracking import active_features, stream_tokens
from jsae import extras

ROOT = Path(__file__).resolve().parents[1]
TEXT = "def naïve(self, 漢字):\n    return '🙂'"
PUSH = {"hook": RESID, "index": 7, "mode": "additive", "strength": 40, "positions": "all"}


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


def told(response: httpx.Response, status: int) -> str:
    """Return the message of a refusal."""
    assert response.status_code == status, response.text
    assert list(response.json()) == ["error"]
    return response.json()["error"]


# ---- what there is -------------------------------------------------------------------------------------------------


def test_info_tells_model_saes_modes_and_limits(client):
    info = client.get("/api/info").json()
    assert info["live"] is True
    assert info["graphs"] is False
    sizes = {"n_layer": 6, "n_embd": 128, "vocab_size": 4096}
    assert info["model"] == {"name": "demo", **sizes, "chat": False, "trained_to_chat": False}
    assert info["saes"] == [
        {"hook": RESID, "architecture": "topk", "d_sae": 256},
        {"hook": MLP, "architecture": "jumprelu", "d_sae": 192},
    ]
    assert [mode["name"] for mode in info["modes"]] == list(MODES)
    assert {"name": "orthogonal", "needs_strength": True, "neutral": 1.0} in info["modes"]
    assert {"name": "ablate", "needs_strength": False, "neutral": None} in info["modes"]
    assert info["positions"] == list(POSITIONS)
    assert info["limits"] == {"prompt_tokens": 1024, "max_tokens": 256, "seconds": 60.0, "features": 16}


def test_every_neutral_strength_changes_nothing(client):
    for mode in client.get("/api/info").json()["modes"]:
        if mode["neutral"] is not None:
            push = PUSH | {"mode": mode["name"], "strength": mode["neutral"]}
            made = lines(client, prompt="def f(", steer=[push], max_tokens=5)
            ids = {w: [line["id"] for line in made if line.get("which") == w and "id" in line] for w in WHICH}
            assert ids["default"] == ids["steered"], mode


WHICH = ("default", "steered")


def test_only_the_page_is_served(client):
    assert client.get("/").text == client.get("/index.html").text == "<!doctype html><title>a page</title>"
    assert client.get("/core.js").headers["content-type"].startswith("text/javascript")
    there = ["records", "records/loose.js", "records/texts/texts.json", "notes.jsonl", ".hidden.js", "link.js"]
    for path in [
        *there,
        "%2ehidden.js",
        "missing.js",
        "api/nothing",
        "v1/nothing",
        "core.js/",
        "%00.js",
        "a" * 5000 + ".js",
    ]:
        assert "nothing at" in told(client.get("/" + path), 404), path


def test_a_run_without_transcoders_has_no_graphs_and_says_so(client):
    assert "no transcoders of all layers" in told(client.post("/api/graph", json={"prompt": "a"}), 404)


class Endless:
    """A tracer that computes until its client is gone."""

    def __init__(self):
        self.ended = threading.Event()

    def document(self, prompt: str, measure: str, limits: object, between: Callable[[], object]) -> dict[str, Any]:
        if prompt == "large":
            raise ValueError("the graph needs about 9.9 GiB, and 1.0 are free")
        try:
            while True:
                between()
                time.sleep(0.01)
        finally:
            self.ended.set()


def test_a_graph_that_takes_too_long_is_given_up_and_the_model_is_free_again(tmp_path, model):
    tracer = Endless()
    with served(write_run(tmp_path), *model, limits=Limits(seconds=0.5), tracer=tracer) as client:
        assert client.get("/api/info").json()["graphs"] is True
        told(client.post("/api/graph", json={"prompt": "a"}), 503)
        assert tracer.ended.wait(5)
        assert client.post("/api/activations", json={"text": "a", "hook": RESID}).status_code == 200
        assert "about 9.9 GiB" in told(client.post("/api/graph", json={"prompt": "large"}), 400)


def test_the_folder_of_the_page_is_served_and_no_other(tmp_path, model):
    explorer, named = tmp_path / "explorer", "page-0123456789abcdef"
    for folder in (named, "graphs", "page-short", "records", "page-0123456789abcdee"):
        (explorer / folder).mkdir(parents=True)
        (explorer / folder / "core.js").write_text(folder)
    (explorer / named / "inner").mkdir()
    (explorer / named / "inner" / "core.js").write_text("deep")
    (explorer / named / ".hidden.js").write_text("hidden")
    (explorer / named / "link.js").symlink_to(explorer / "records" / "core.js")
    (explorer / "page-0123456789abcdef0").symlink_to(explorer / named)
    (explorer / "page-aaaaaaaaaaaaaaaa").symlink_to(explorer / "records")
    with served(tmp_path, *model) as client:
        for folder in (named, "graphs"):
            assert client.get(f"/{folder}/core.js").text == folder
        for path in [
            "page-short/core.js",
            "records/core.js",
            f"{named}/inner/core.js",
            f"{named}/.hidden.js",
            f"{named}/link.js",
            "page-aaaaaaaaaaaaaaaa/core.js",
            f"{named}/../records/core.js",
            "graphs/../records/core.js",
            "graphs/.core.js",
            f"{named}/",
            named,
        ]:
            assert client.get("/" + path).status_code == 404, path


@pytest.mark.parametrize(
    "target", ["/../outside.js", "/%2e%2e/outside.js", "/..%2foutside.js", "//etc/passwd", "/x/../../outside.js"]
)
def test_no_path_leads_outside(client, target):
    answer = raw(client, f"GET {target} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
    assert answer.startswith("HTTP/1.1 404 "), answer


def test_a_run_without_a_page_says_how_to_make_one(tmp_path, model):
    with served(tmp_path, *model) as client:
        assert "experiments.explore" in told(client.get("/"), 404)
        assert client.get("/api/info").status_code == 200


def test_only_pages_of_chosen_origins_may_show_the_page_in_a_frame(run, model):
    with served(run, *model, embed=("https://blog.example", "http://localhost:3000")) as client:
        for path in ("/", "/api/info", "/missing"):
            headers = client.get(path).headers
            assert "frame-ancestors https://blog.example http://localhost:3000" in headers["content-security-policy"]
            assert "x-frame-options" not in headers
        assert client.get("/api/info", headers={"origin": "https://blog.example"}).status_code == 403
    for wrong in ("*", "blog.example", "https://a.b; script-src *", "https://a b", "https://a/b"):
        with pytest.raises(ValueError, match="is not an origin"):
            server.app(run, *model, embed=(wrong,))


def test_answers_carry_the_headers_that_browsers_obey(client):
    for path in ("/", "/api/info", "/missing", "/v1/capabilities"):
        headers = client.get(path).headers
        assert headers["content-security-policy"].startswith("default-src 'self'")
        assert "frame-ancestors 'none'" in headers["content-security-policy"]
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["referrer-policy"] == "no-referrer"
        assert headers["cache-control"] == ("no-cache" if path == "/" else "no-store")
        assert "server" not in headers
        assert "access-control-allow-origin" not in headers


# ---- features of a text --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("hook", [RESID, MLP])
def test_the_features_of_a_text_are_those_the_sae_finds(client, model, hook):
    im, _ = model
    body = client.post("/api/activations", json={"text": TEXT, "hook": hook, "top_k": 3}).json()
    ids = im.tokenizer.encode(TEXT, prepend_bos=True)
    with torch.no_grad(), capture(im.model, [hook]) as acts:
        im.model(torch.tensor([ids]))
    expected = active_features(im.sae(hook), acts[hook], 3)
    assert [token["id"] for token in body["tokens"]] == ids[1:]
    assert len(body["features"]) == len(ids) - 1
    for at, found in enumerate(body["features"], 1):
        kept = expected.values[0, at] > 0
        assert [each["index"] for each in found] == expected.indices[0, at][kept].tolist()
        values = torch.tensor([each["value"] for each in found])
        torch.testing.assert_close(values, expected.values[0, at][kept], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("hook", [RESID, MLP])
def test_a_latent_over_a_text_agrees_with_its_features(client, hook):
    everything = client.post("/api/activations", json={"text": TEXT, "hook": hook, "top_k": 32}).json()
    index = everything["features"][3][0]["index"]
    body = client.post("/api/latent", json={"text": TEXT, "hook": hook, "index": index}).json()
    assert body["tokens"] == everything["tokens"]
    assert max(body["values"]) > 0
    for value, found in zip(body["values"], everything["features"], strict=True):
        seen = {f["index"]: f["value"] for f in found}
        weakest = min(seen.values()) if len(seen) == 32 else 0.0
        assert value == pytest.approx(seen[index], abs=1e-4) if index in seen else value <= weakest + 1e-4


def test_a_character_that_tokens_share_comes_whole_with_the_last(client):
    tokens = client.post("/api/activations", json={"text": TEXT, "hook": RESID, "top_k": 1}).json()["tokens"]
    assert "".join(token["text"] for token in tokens) == TEXT
    assert any(token["text"] == "" for token in tokens)


# ---- steering ------------------------------------------------------------------------------------------------------


def test_a_continuation_comes_as_it_is_and_as_it_is_pushed_by_turns(client, model):
    im, _ = model
    made = lines(client, prompt="def f(", steer=[PUSH], max_tokens=6, temperature=0.7, seed=3)
    assert made[-1] == {"done": True}
    assert made[-3:-1] == [{"which": which, "end": "length"} for which in WHICH]
    assert [line["which"] for line in made[:12]] == list(WHICH) * 6
    for which, steers in zip(WHICH, ([], [Steer(RESID, 7, "additive", 40)]), strict=True):
        alone = list(im.generate("def f(", steers, max_tokens=6, temperature=0.7, seed=3, features=10))
        got = [line for line in made if line.get("which") == which and "id" in line]
        assert [line["id"] for line in got] == [token.id for token in alone]
        assert [line["text"] for line in got] == [token.text for token in alone]
        for line, token in zip(got, alone, strict=True):
            assert set(line["features"]) == {RESID, MLP}
            assert [f["index"] for f in line["features"][MLP]] == [i for i, _ in token.features[MLP]]
            assert all(len(found) <= 10 for found in line["features"].values())


def test_several_saes_and_modes_are_pushed_together(client, model):
    im, _ = model
    pushes = [PUSH, {"hook": MLP, "index": 3, "mode": "clamp", "strength": 9.5, "positions": "generated"}]
    made = lines(client, prompt="import ", steer=pushes, max_tokens=8, strength_multiplier=0.5, temperature=0)
    steers = [Steer(RESID, 7, "additive", 40), Steer(MLP, 3, "clamp", 9.5, "generated")]
    alone = im.generate("import ", steers, max_tokens=8, strength_multiplier=0.5, temperature=0)
    assert [line["id"] for line in made if line.get("which") == "steered" and "id" in line] == [t.id for t in alone]


def test_with_nothing_pushed_there_is_one_continuation(client):
    made = lines(client, prompt="def f(", steer=[], max_tokens=2)
    assert [line.get("which") for line in made] == ["default"] * 3 + [None]


def test_two_clients_at_once_do_not_see_each_others_steering(client):
    asked = {
        "plain": {"prompt": "class A:", "max_tokens": 40, "temperature": 0.8, "seed": 5},
        "pushed": {"prompt": "class A:", "max_tokens": 40, "temperature": 0.8, "seed": 5, "steer": [PUSH]},
    }
    alone = {name: lines(client, **body) for name, body in asked.items()}
    both, times, ready = {}, {}, threading.Barrier(2)

    def ask(name: str) -> None:
        with httpx.Client(base_url=client.base_url, timeout=30) as own:
            ready.wait()
            start = time.monotonic()
            both[name] = lines(own, **asked[name])
            times[name] = (start, time.monotonic())

    threads = [threading.Thread(target=ask, args=(name,)) for name in asked]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert max(start for start, _ in times.values()) < min(end for _, end in times.values()), "not at the same time"
    for name, made in alone.items():
        assert [line.get("id") for line in both[name]] == [line.get("id") for line in made]
    plain = [line["id"] for line in both["plain"] if "id" in line]
    default, steered = ([x["id"] for x in both["pushed"] if x.get("which") == w and "id" in x] for w in WHICH)
    assert plain == default != steered


def test_a_closed_connection_stops_its_generation(run, model):
    im, nano = model
    forwards = []
    handle = im.model.lm_head.register_forward_hook(lambda *_: forwards.append(1))
    with served(run, im, nano, limits=Limits(generations=1)) as client:
        body = {"prompt": "def f(", "steer": [PUSH], "max_tokens": 256}
        with client.stream("POST", "/api/steer", json=body) as response:
            incoming = response.iter_lines()
            for _ in range(4):
                next(incoming)
        closed = len(forwards)
        time.sleep(0.5)
        after = len(forwards)
        time.sleep(0.5)
        assert len(forwards) == after, "tokens are still made for nobody"
        assert after - closed < 60, f"{after - closed} tokens were made after the client had gone"
        handle.remove()
        # Its place is free again, and no hook stayed on the model.
        assert lines(client, prompt="def f(", max_tokens=1)[-1] == {"done": True}
        assert not im.model._forward_pre_hooks
        assert not any(block._forward_hooks for block in im.model.transformer.h)


def test_more_generations_than_are_allowed_are_sent_away(run, model, monkeypatch):
    im = model[0]
    generate = im.generate

    def slow(*args, **kwargs):
        for token in generate(*args, **kwargs):
            yield token
            time.sleep(0.05)  # or it might end before the others are asked for

    monkeypatch.setattr(im, "generate", slow)
    with served(run, *model, limits=Limits(generations=1)) as client:
        with client.stream("POST", "/api/steer", json={"prompt": "def", "max_tokens": 256}) as busy:
            next(busy.iter_lines())
            refused = client.post("/api/steer", json={"prompt": "def", "max_tokens": 1})
            assert "try again" in told(refused, 429)
            assert int(refused.headers["retry-after"]) >= 1
            assert client.get("/api/info").status_code == 200, "the server waits for the model"
            found = client.post("/api/activations", json={"text": "x", "hook": RESID})
            assert found.status_code == 200, "reading waits for writing"
        with served(run, *model, limits=Limits(readings=0)) as other:
            assert "try again" in told(other.post("/api/activations", json={"text": "x", "hook": RESID}), 429)


def test_a_generation_ends_when_its_time_is_over(run, model):
    with served(run, *model, limits=Limits(seconds=0.05)) as client:
        made = lines(client, prompt="def f(", steer=[PUSH], max_tokens=256)
    assert sorted(line["which"] for line in made if line.get("end") == "time") == list(WHICH)
    assert made[-1] == {"done": True}
    assert len(made) < 512


def test_a_stop_token_ends_one_side_and_the_other_goes_on(run, model):
    im, nano = model
    session = Session(im, nano, Limits())
    tokens = list(im.generate("def", max_tokens=3))

    async def collect():
        streams = {"default": iter(tokens[:1]), "steered": iter(tokens)}
        return [(which, made) async for which, made in session.interleave(streams, 3)]

    made = anyio.run(collect)
    assert [(which, m) for which, m in made if isinstance(m, str)] == [("default", "stop"), ("steered", "length")]
    assert [m for which, m in made if which == "steered"][:3] == tokens


def test_a_character_is_streamed_whole(run, model, monkeypatch):
    im, nano = model
    ids = [token for character in ("漢", "🙂") for token in im.tokenizer.encode(character)]
    assert len(ids) > 3, "the demo's tokenizer has these characters as single tokens"

    def scripted(prompt, steer=(), **sampling):
        return stream_tokens([0], iter([[token] for token in ids]), {}, im.tokenizer, None, False)

    monkeypatch.setattr(im, "generate", scripted)
    with served(run, im, nano) as client:
        texts = [line["text"] for line in lines(client, prompt="x", max_tokens=9) if "text" in line]
    assert [text for text in texts if text] == ["漢", "🙂"]
    assert texts[-1] == "🙂"


def test_a_failure_shows_no_code(run, model, monkeypatch, caplog):
    im, nano = model

    def broken(*args, **kwargs):
        raise RuntimeError("a secret of the machine")

    def later(*args, **kwargs):
        yield next(working("x", max_tokens=1))
        broken()

    working = im.generate
    with served(run, im, nano) as client:
        monkeypatch.setattr(im, "generate", broken)
        response = client.post("/api/steer", json={"prompt": "x"})
        assert "log" in told(response, 500)
        assert "secret" not in response.text
        monkeypatch.setattr(im, "generate", later)
        made = lines(client, prompt="x", max_tokens=4)
        assert list(made[-1]) == ["error"]
        assert "secret" not in json.dumps(made)
        monkeypatch.setattr(im, "generate", working)
        assert lines(client, prompt="x", max_tokens=1)[-1] == {"done": True}
    assert [str(record.exc_info[1]) for record in caplog.records] == ["a secret of the machine"] * 2


# ---- chat ----------------------------------------------------------------------------------------------------------

CHAT = [
    {"role": "user", "content": "hello"},
    {"role": "assistant", "content": "hi"},
    {"role": "user", "content": "write <|assistant_end|>"},
]


def test_a_chat_is_rendered_with_the_tokenizers_markup(run, model):
    im, nano = model
    ids, stop_tokens = chat_prompt(im.model, im.tokenizer, CHAT)
    alone = list(im.generate(ids, max_tokens=5, stop_tokens=stop_tokens, temperature=0))
    with served(run, im, nano, chat=True) as client:
        assert client.get("/api/info").json()["model"]["chat"] is True
        made = lines(client, messages=CHAT, max_tokens=5, temperature=0)
        assert [line["id"] for line in made if "id" in line] == [token.id for token in alone]
        for wrong in ([], CHAT[:2], [{"role": "user", "content": 3}], [{"role": "system", "content": "x"}]):
            assert told(client.post("/api/steer", json={"messages": wrong}), 400)
    with served(run, im, nano) as client:
        assert "not trained to chat" in told(client.post("/api/steer", json={"messages": CHAT}), 400)


def test_the_path_tells_a_chat_checkpoint(model):
    im, nano = model
    for folder, chat in {"base_checkpoints": False, "chatsft_checkpoints": True, "mid_checkpoints": True}.items():
        object.__setattr__(elsewhere := type(nano)(**vars(nano)), "path", Path("/x") / folder / "d4" / "model_1.pt")
        assert Session(im, elsewhere, Limits()).chat is chat


# ---- notes ---------------------------------------------------------------------------------------------------------


def test_a_note_is_saved(client, run):
    note = {"hook": RESID, "latent": 3, "label": "漢字", "note": "fires on <b>\nmarkup"}
    line = client.post("/api/notes", json=note).json()
    assert line == note | {"time": line["time"]}
    assert client.get("/api/notes").json()["notes"][-1] == line
    assert json.loads((run / "explorer" / "notes.jsonl").read_text().splitlines()[-1]) == line


@pytest.mark.parametrize(
    "change", [{"latent": 256}, {"latent": -1}, {"hook": "x"}, {"label": "x" * 600}, {"label": 3}, {"label": "a\nb"}]
)
def test_an_invalid_note_is_refused(client, run, change):
    before = (run / "explorer" / "notes.jsonl").read_text()
    note = {"hook": RESID, "latent": 3, "label": "x", "note": ""}
    assert told(client.post("/api/notes", json=note | change), 400)
    assert (run / "explorer" / "notes.jsonl").read_text() == before


# ---- bad input -----------------------------------------------------------------------------------------------------

ASKED = {
    "/api/activations": {"text": "x", "hook": RESID, "top_k": 2},
    "/api/latent": {"text": "x", "hook": RESID, "index": 1},
    "/api/steer": {"prompt": "x", "steer": [PUSH], "max_tokens": 1, "temperature": 1, "seed": 1},
    "/api/notes": {"hook": RESID, "latent": 1, "label": "x", "note": ""},
}
BROKEN = {
    "nothing": b"",
    "half": b'{"text": "x"',
    "words": b"text=x",
    "latin-1": '{"text": "é"}'.encode("latin-1"),
    "utf-16": '{"text": "x"}'.encode("utf-16"),
    "a list": b"[]",
    "null": b"null",
    "a number": b"3",
    "NaN": b'{"text": NaN}',
    "infinity": b'{"text": -Infinity}',
    "beyond floats": b'{"text": 1e999}',
    "too many digits": b'{"text": ' + b"9" * 5000 + b"}",
    "depth": b'{"text": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "half a surrogate pair": b'{"text": "\\ud800"}',
    "half a pair in a name": b'{"\\udfff": 1}',
    "an unknown field": b'{"txet": "x"}',
}


@pytest.mark.parametrize("path", ASKED)
@pytest.mark.parametrize("body", BROKEN.values(), ids=BROKEN)
def test_a_malformed_body_is_refused(client, path, body):
    assert told(client.post(path, content=body, headers={"content-type": "application/json"}), 400)


WRONG = [None, True, -1, 10**400, 1.5, "", "x" * 3000, [], {}, [[]], [{}], [PUSH] * 17, "\u0000", 0.1 + 2**53]


@pytest.mark.parametrize(("path", "field"), [(path, field) for path, body in ASKED.items() for field in body])
def test_a_field_of_the_wrong_kind_never_fails_the_server(client, path, field):
    for value in WRONG:
        response = client.post(path, json=ASKED[path] | {field: value})
        assert response.status_code == 200 or told(response, response.status_code), (value, response.text)
        assert response.status_code < 500, (value, response.text)
    assert client.post(path, json=ASKED[path]).status_code == 200


@pytest.mark.parametrize(
    "change",
    [
        {"steer": [PUSH | {"hook": "blocks.9.hook_resid_post"}]},
        {"steer": [PUSH | {"index": 256}]},
        {"steer": [PUSH | {"index": "7"}]},
        {"steer": [PUSH | {"mode": "push"}]},
        {"steer": [PUSH | {"positions": "some"}]},
        {"steer": [PUSH | {"strength": 1e7}]},
        {"steer": [PUSH | {"strength": "8"}]},
        {"steer": [PUSH | {"more": 1}]},
        {"steer": [{k: v for k, v in PUSH.items() if k != "strength"}]},
        {"steer": [PUSH] * 17},
        {"temperature": 2.1},
        {"temperature": -0.1},
        {"max_tokens": 0},
        {"max_tokens": 257},
        {"seed": -1},
        {"seed": 2**63},
        {"strength_multiplier": 11},
        {"prompt": ""},
        {"prompt": "x " * 3000},
        {"messages": CHAT},
        {"prompt": None},
    ],
)
def test_steering_that_cannot_be_is_refused_before_it_begins(client, change):
    assert told(client.post("/api/steer", json=ASKED["/api/steer"] | change), 400)


@pytest.mark.parametrize("mode", MODES)
def test_the_largest_strengths_still_leave_numbers(client, mode):
    largest = {"orthogonal": 100, "scale": 1000}.get(mode, 1e6)  # of factors; the others are lengths
    for sign in (1, -1):
        push = PUSH | {"mode": mode, "strength": sign * largest}
        made = lines(
            client, prompt="x", steer=[push] * (2 if mode in FACTORS else 16), max_tokens=2, strength_multiplier=10
        )
        assert made[-1] == {"done": True}, mode


def test_a_body_that_is_too_long_is_refused(client):
    long = json.dumps({"text": "x" * 2**20, "hook": RESID}).encode()
    headers = {"content-type": "application/json"}
    assert "shorter" in told(client.post("/api/activations", content=long, headers=headers), 413)
    chunks = (long[i : i + 65536] for i in range(0, len(long), 65536))
    assert "shorter" in told(client.post("/api/activations", content=chunks, headers=headers), 413)
    assert client.get("/api/info").status_code == 200


def test_a_body_that_does_not_come_is_not_waited_for(run, model):
    head = "POST /api/latent HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 9\r\n"
    with served(run, *model, limits=Limits(body_seconds=0.2)) as client:
        answer = raw(client, head + "Connection: close\r\n\r\n{")
    assert answer.startswith("HTTP/1.1 408 ")
    assert "send it at once" in answer


@pytest.mark.parametrize("kind", [None, "text/plain", "application/x-www-form-urlencoded", "multipart/form-data"])
def test_content_types_of_foreign_forms_are_refused(client, kind):
    headers = {"content-type": kind} if kind else {}
    body = json.dumps(ASKED["/api/notes"]).encode()
    assert "application/json" in told(client.post("/api/notes", content=body, headers=headers), 415)


def test_other_methods_are_refused(client):
    told(client.get("/api/steer"), 404)
    told(client.delete("/api/notes"), 405)
    told(client.post("/"), 405)
    assert raw(client, "nonsense\r\n\r\n").startswith("HTTP/1.1 400")


# ---- foreigners ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "host", ["evil.example", "localhost.evil.example", "127.0.0.1.evil.example", "192.168.1.2", "8.8.8.8:80", "", "[::"]
)
def test_a_foreign_host_is_refused(client, host):
    for path in ("/", "/api/info", "/v1/capabilities"):
        assert "not this server" in told(client.get(path, headers={"host": host}), 403)


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:9", "127.0.0.1:8000", "127.1.2.3", "[::1]:8000"])
def test_this_machines_names_are_known_at_any_port(client, host):
    assert client.get("/api/info", headers={"host": host}).status_code == 200


@pytest.mark.parametrize(
    "origin", ["https://evil.example", "null", "http://localhost:1", "file://", "http://[", "", "ftp://localhost:8000"]
)
def test_a_foreign_origin_is_refused(client, origin):
    headers = {"host": "localhost:8000", "origin": origin}
    assert "only this server's own" in told(client.post("/api/notes", json=ASKED["/api/notes"], headers=headers), 403)


def test_the_pages_own_origin_is_known(client):
    headers = {"host": "localhost:8000", "origin": "http://localhost:8000", "sec-fetch-site": "same-origin"}
    assert client.post("/api/latent", json=ASKED["/api/latent"], headers=headers).status_code == 200


@pytest.mark.parametrize("site", ["cross-site", "same-site"])
def test_a_foreign_page_may_link_here_but_not_ask(client, site):
    assert client.get("/", headers={"sec-fetch-site": site}).status_code == 200
    assert "another site" in told(client.get("/api/notes", headers={"sec-fetch-site": site}), 403)
    assert "another site" in told(client.get("/core.js", headers={"sec-fetch-site": site}), 403)


# ---- others on the network -----------------------------------------------------------------------------------------

TOKEN = "a-token-of-this-test"


@pytest.fixture(scope="module")
def exposed(run, model):
    with listening(server.app(run, *model, host="0.0.0.0", token=TOKEN)) as port:
        yield f"http://127.0.0.1:{port}"


def test_without_the_token_every_request_is_refused(exposed):
    with httpx.Client(base_url=exposed) as client:
        for path in ("/", "/core.js", "/api/info", "/api/notes", "/?token=wrong", "/v1/capabilities"):
            assert "token" in told(client.get(path), 401)
        for headers in ({"authorization": "Bearer wrong"}, {"authorization": "Bearer"}, {"x-secret-key": TOKEN}):
            assert "token" in told(client.get("/api/info", headers=headers), 401)
        assert "token" in told(client.get(f"/api/info?token={TOKEN}"), 401)
        assert "set-cookie" not in client.get("/?token=wrong").headers


def test_the_address_with_the_token_opens_the_page_and_all_it_asks(exposed):
    with httpx.Client(base_url=exposed) as client:
        opened = client.get(f"/?token={TOKEN}")
        assert "a page" in opened.text
        assert all(part in opened.headers["set-cookie"] for part in ("HttpOnly", "SameSite=Strict", "Path=/"))
        for path in ("/", "/core.js", "/api/info"):
            assert client.get(path).status_code == 200


def test_programs_bring_the_token_in_a_header(exposed):
    headers = {"authorization": f"Bearer {TOKEN}"}
    assert httpx.get(exposed + "/api/info", headers=headers).status_code == 200
    assert httpx.get(exposed + "/v1/capabilities", headers={"x-secret-key": TOKEN}).status_code == 200


def test_on_the_network_addresses_are_known_but_names_are_not(exposed):
    headers = {"authorization": f"Bearer {TOKEN}"}
    for host in ("192.168.1.2:8000", "[fe80::1]", socket.gethostname()):
        assert httpx.get(exposed + "/api/info", headers=headers | {"host": host}).status_code == 200
    told(httpx.get(exposed + "/api/info", headers=headers | {"host": "evil.example"}), 403)


def test_other_names_of_this_machine_are_accepted_if_given(run, model):
    with served(run, *model, names=["Host.docker.internal"]) as client:
        assert client.get("/api/info", headers={"host": "host.docker.internal:5002"}).status_code == 200
        told(client.get("/api/info", headers={"host": "docker.internal"}), 403)


def test_nobody_is_served_to_others_without_a_token(run, model):
    with pytest.raises(ValueError, match="give it a token"):
        server.app(run, *model, host="0.0.0.0")


# ---- the process ---------------------------------------------------------------------------------------------------

SERVE = """
import sys
sys.path.insert(0, "tests")
from live_explorer import load
from pathlib import Path
from bridge.server.server import serve
run = Path(sys.argv[1])
serve(run, lambda: load(run), host=sys.argv[2], port=0, say=lambda text: print(text, flush=True))
print("ended", "jax" in sys.modules)
"""


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0"])
def test_serve_tells_its_address_and_ends_when_interrupted(run, host):
    command = [sys.executable, "-W", "error", "-c", SERVE, str(run), host]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, env=environment) as process:
        try:
            told = httpx.URL(process.stdout.readline().split()[-1])
            assert told.host == (socket.gethostname() if host == "0.0.0.0" else host)
            assert ("token" in told.params) == (host == "0.0.0.0")
            with httpx.Client(base_url=f"http://127.0.0.1:{told.port}", timeout=10) as client:
                assert "a page" in client.get("/", params=told.params).text
                with client.stream("POST", "/api/steer", json=ASKED["/api/steer"] | {"max_tokens": 200}) as response:
                    assert response.status_code == 200
                    process.send_signal(signal.SIGINT)
                    assert process.stdout.read() == "ended False\n"
        finally:
            process.kill()
    assert process.returncode == 0


def test_a_port_in_use_is_reported_before_the_model_is_loaded(run):
    loaded = []
    with contextlib.closing(server.listen("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(OSError, match=rf"cannot listen at 127.0.0.1, port {port} .*give another"):
            server.serve(run, lambda: loaded.append(1), port=port)
    with pytest.raises(OSError, match="not an address of this machine"):
        server.serve(run, lambda: loaded.append(1), host="nowhere.invalid", port=0)
    with pytest.raises(OSError, match="port 70000"):
        server.serve(run, lambda: loaded.append(1), port=70000)
    with pytest.raises(FileNotFoundError, match="no run at"):
        server.serve(run / "missing", lambda: loaded.append(1))
    assert not loaded


def test_a_missing_extra_is_named():
    command = "import sys; sys.modules['uvicorn'] = None; import bridge.server.server"
    done = subprocess.run([sys.executable, "-c", command], cwd=ROOT, capture_output=True, text=True)
    assert extras.advice("web") in done.stderr.splitlines()[-1]
