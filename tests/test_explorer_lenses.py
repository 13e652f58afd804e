"""Lenses over real HTTP, on Neuronpedia's wire and below /api: names, formats, the model's own numbers, refusals."""

import json
import threading
from collections.abc import Iterator

import httpx
import pytest
import torch
from live_explorer import MLP, RESID, C, load, served, write_run
from toy_saes import toy_sae

from bridge import lenses
from bridge.hooks import edit
from bridge.lenses import JacobianLens, LogitLens
from bridge.nanochat.engine import chat_prompt
from bridge.run import Run
from bridge.runtime import InterpretableModel
from bridge.server import lens_steering, server
from bridge.server.bodies import Limits
from bridge.server.chats import render
from bridge.server.words import display, is_word

MODEL, RES, MLPS = "nanochat-d6-toy", "2-res-256", "4-mlp-192"
DEPTH = 6
PROMPT = "def naïve(self, 漢字):"
BASE = {"model": MODEL, "type": ["LOGIT_LENS"], "prompt": PROMPT, "stream": False}
FRAMES = {
    "meta": "kind model types layers_by_type top_n prompt_len num_completion_tokens temperature prepend_bos reuse_len",
    "prompt": "kind tokens",
    "token": "kind position token id is_generated is_char_continuation message_index role channel section results",
    "done": "kind seq_len prompt_len vocab_size completion",
}
SHOWN = "position token id is_generated is_char_continuation message_index role channel section"


def matrices() -> dict[int, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {i: torch.eye(C) + 0.05 * torch.randn(C, C, generator=generator) for i in range(DEPTH)}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    run = write_run(tmp_path_factory.mktemp("runs") / "toy")
    lenses.save(JacobianLens(matrices(), 20), Run(run).lens_file("jacobian"))
    return (run, *load(run))


@pytest.fixture(scope="module")
def client(model) -> Iterator[httpx.Client]:
    with served(*model, model_id=MODEL) as client:
        yield client


@pytest.fixture(scope="module")
def jacobian(model) -> JacobianLens:
    return lenses.load(Run(model[0]).lens_file("jacobian"))


def ask(client: httpx.Client, status: int = 200, path: str = "lens/prompt", **body) -> dict:
    response = client.post(f"/v1/{path}", json=BASE | body if path == "lens/prompt" else {"model": MODEL} | body)
    assert response.status_code == status, response.text
    return response.json()


def streamed(client: httpx.Client, **body) -> list[dict]:
    with client.stream("POST", "/v1/lens/prompt", json=BASE | {"stream": True} | body) as response:
        assert response.headers["content-type"].startswith("application/x-ndjson")
        return [json.loads(line) for line in response.iter_lines()]


def ids_of(model, text: str) -> list[int]:
    return model[1].tokenizer.encode(text, prepend_bos=True)


# ---- the wire -------------------------------------------------------------------------------------------------------


def test_frames_come_in_order_with_exactly_their_keys(client, model):
    frames = streamed(client, numCompletionTokens=3, temperature=0, topN=4)
    count = len(ids_of(model, PROMPT))
    assert [frame["kind"] for frame in frames] == ["meta", "prompt", *["token"] * (count + 3), "done"]
    for frame in frames:
        assert set(frame) == set(FRAMES[frame["kind"]].split())
    meta, prompt, *tokens, done = frames
    assert meta["layers_by_type"] == {"LOGIT_LENS": list(range(DEPTH))}
    assert (meta["prompt_len"], meta["num_completion_tokens"], meta["top_n"]) == (count, 3, 4)
    assert all(set(token) == set(SHOWN.split()) for token in prompt["tokens"])
    assert [token["id"] for token in prompt["tokens"]] == ids_of(model, PROMPT)
    assert [token["is_generated"] for token in tokens] == [False] * count + [True] * 3
    assert [token["position"] for token in tokens] == list(range(count + 3))
    assert (done["seq_len"], done["prompt_len"]) == (count + 3, count)
    assert done["completion"] == model[1].tokenizer.decode([token["id"] for token in tokens[count:]])
    whole = ask(client, numCompletionTokens=3, temperature=0, topN=4)
    assert whole == {"meta": meta, "tokens": tokens, "done": done}


@pytest.mark.parametrize("words", [True, False])
def test_read_outs_are_the_lenses_and_the_last_row_is_the_models_softmax(client, model, jacobian, words):
    _, im, _ = model
    ids = torch.tensor([ids_of(model, PROMPT)])
    answer = ask(client, type=["LOGIT_LENS", "JACOBIAN_LENS", "LOGIT_LENS"], topN=5, filterNonWordTokens=words)
    read = lenses.read(im.model, ids)
    for place, (kind, lens) in enumerate({"LOGIT_LENS": LogitLens(im.model), "JACOBIAN_LENS": jacobian}.items()):
        for layer in range(DEPTH):
            last = layer == DEPTH - 1
            p = (im.model(ids) if last else lenses.unembed(im.model, lens.stream(read, layer)))[0].softmax(-1)
            for position, token in enumerate(answer["tokens"]):
                result = token["results"][place]
                assert result["type"] == kind
                order = p[position].argsort(descending=True).tolist()
                texts = [im.tokenizer.token_text(i) for i in order]
                shown = [
                    (text, float(p[position, i]))
                    for rank, (i, text) in enumerate(zip(order, texts, strict=True))
                    if not words or is_word(text) or (last and rank == 0)
                ][:5]
                assert result["top_probs"][layer] == pytest.approx([one for _, one in shown], abs=1.1e-4)
                assert sum(result["top_probs"][layer]) < 1.001
                if len({round(one, 4) for _, one in shown}) == 5:
                    assert result["top_tokens"][layer] == [text for text, _ in shown]


def test_ids_that_are_given_are_read_and_nothing_is_generated(client, model):
    by_text = ask(client)
    by_ids = ask(client, prompt=None, inputTokenIds=ids_of(model, PROMPT), numCompletionTokens=7)
    assert by_ids == by_text


def test_what_the_client_has_is_not_read_again(client, model):
    ids = ids_of(model, PROMPT)
    whole = ask(client)
    rest = ask(client, cachedTokenIds=[*ids[:3], 5, 6])
    assert rest["meta"]["reuse_len"] == 3
    assert rest["tokens"] == whole["tokens"][3:]
    assert ask(client, cachedTokenIds=ids)["tokens"] == []


def test_layers_may_be_chosen_and_the_last_is_always_there(client):
    answer = ask(client, layers=[3, 1], topN=2)
    assert answer["meta"]["layers_by_type"] == {"LOGIT_LENS": [1, 3, DEPTH - 1]}
    whole = ask(client, topN=2)
    for some, every in zip(answer["tokens"], whole["tokens"], strict=True):
        assert some["results"][0]["top_probs"] == [every["results"][0]["top_probs"][i] for i in (1, 3, DEPTH - 1)]


def test_older_clients_write_in_snake_case(client):
    body = {"model": MODEL, "type": ["LOGIT_LENS"], "prompt": PROMPT, "stream": False, "top_n": 3}
    assert client.post("/v1/lens/prompt", json=body).json() == ask(client, topN=3)


def test_a_text_may_be_cut_and_go_without_bos(client, model):
    ids = ids_of(model, PROMPT)
    assert [token["id"] for token in ask(client, maxSeqLen=4)["tokens"]] == ids[:4]
    assert [token["id"] for token in ask(client, prependBos=False)["tokens"]] == ids[1:]


def test_a_split_character_is_whole_at_each_of_its_tokens(client, model):
    tokens = ask(client, prompt="a 🙂 é")["tokens"]
    parts = [token for token in tokens if token["token"] == "🙂"]
    assert len(parts) > 1
    assert [part["is_char_continuation"] for part in parts] == [False, *[True] * (len(parts) - 1)]
    assert "".join(token["token"] for token in tokens[1:] if not token["is_char_continuation"]) == "a 🙂 é"


# ---- interventions --------------------------------------------------------------------------------------------------


def test_steering_by_nothing_changes_nothing(client):
    steer = {"steerTokens": [{"token": " self", "type": "LOGIT_LENS"}], "steerLayers": [1, 2]}
    plain = ask(client)
    assert ask(client, **steer) == plain
    assert ask(client, **steer | {"steerStrength": 0.5, "steerLayers": []}) == plain
    assert ask(client, steerTokens=[], steerStrength=0.5, steerLayers=[1]) == plain


@pytest.mark.parametrize("kind", ["LOGIT_LENS", "JACOBIAN_LENS"])
def test_steering_pushes_the_token_at_its_layer_but_not_at_bos(client, kind):
    token = " return"
    steer = {"steerTokens": [{"token": token, "type": kind}], "steerLayers": [4], "steerStrength": 0.9}
    found = ask(client, type=[kind], filterNonWordTokens=False, topN=1, **steer)
    plain = ask(client, type=[kind], filterNonWordTokens=False, topN=1)
    assert {one["results"][0]["top_tokens"][4][0] for one in found["tokens"][1:]} == {token}
    assert found["tokens"][0] == plain["tokens"][0]


def test_ablation_removes_the_direction_and_a_swap_moves_it(client, model, jacobian):
    _, im, _ = model
    self_token, return_token = im.tokenizer.encode(" self")[0], im.tokenizer.encode(" return")[0]
    W_U = im.model.lm_head.weight
    unit = {
        t: torch.nn.functional.normalize(jacobian.matrices[3].T @ W_U[t], dim=0) for t in (self_token, return_token)
    }
    h = torch.randn(1, 4, C, generator=torch.Generator().manual_seed(0))
    away = lens_steering.ablated(h, 3 * unit[self_token])
    torch.testing.assert_close(away @ unit[self_token], torch.zeros(1, 4), atol=1e-5, rtol=0)
    moved = lens_steering.swapped(h, unit[self_token], unit[return_token])
    along = (h @ unit[self_token])[..., None]
    torch.testing.assert_close(moved, h + along * (unit[return_token] - unit[self_token]), atol=1e-5, rtol=0)
    long = lens_steering.steered(h, unit[self_token], 1e3)
    torch.testing.assert_close((long - h).norm(dim=-1), h.norm(dim=-1), atol=1e-4, rtol=0)
    torch.testing.assert_close(
        lens_steering.steered(h, unit[self_token], -0.5) - h, -0.5 * h.norm(dim=-1, keepdim=True) * unit[self_token]
    )

    ids = torch.tensor([ids_of(model, PROMPT)])
    steer = {"steerTokens": [{"token": " self", "type": "JACOBIAN_LENS"}], "steerLayers": [3]}
    changes = {
        "ablate": ({"steerAblate": True}, lambda x: lens_steering.ablated(x, unit[self_token])),
        "swap": (
            {"swapToken": {"token": " return", "type": "JACOBIAN_LENS"}},
            lambda x: lens_steering.swapped(x, unit[self_token], unit[return_token]),
        ),
    }
    for body, change in changes.values():
        answer = ask(client, filterNonWordTokens=False, topN=1, **steer, **body)
        keep = torch.arange(ids.shape[1])[None, :, None] == 0
        with edit(im.model, {"blocks.3.hook_resid_post": lambda x: torch.where(keep, x, change(x))}):  # noqa: B023
            p = im.model(ids)[0].softmax(-1)
        last = [token["results"][0]["top_probs"][-1][0] for token in answer["tokens"]]
        assert last == pytest.approx(p.max(-1).values.tolist(), abs=1.1e-4)
        assert answer["meta"]["reuse_len"] == 0


def test_new_tokens_are_steered_only_on_request(client):
    steer = {"steerTokens": [{"token": " return", "type": "LOGIT_LENS"}], "steerLayers": [4], "steerStrength": 0.9}
    body = {"numCompletionTokens": 4, "temperature": 0, "topN": 1, "filterNonWordTokens": False} | steer
    on_text, on_all = ask(client, **body), ask(client, steerGeneratedTokens=True, **body)

    def new(answer: dict) -> list[str]:
        return [one["results"][0]["top_tokens"][4][0] for one in answer["tokens"] if one["is_generated"]]

    assert set(new(on_all)) == {" return"}
    assert new(on_text) != new(on_all)


# ---- chats ----------------------------------------------------------------------------------------------------------

CHAT = [
    {"role": "system", "content": "be brief 🙂"},
    {"role": "user", "content": "hello"},
    {"role": "assistant", "content": "hi there"},
    {"role": "user", "content": "again"},
]


def test_a_chat_is_rendered_as_nanochat_does_with_the_message_of_every_token(model):
    _, im, _ = model
    ids, _ = chat_prompt(im.model, im.tokenizer, CHAT)
    with served(*model, chat=True) as client:
        answer = ask(client, path="apply-chat-template", messages=CHAT)
        assert answer["tokens"] == ids == [span["tokenId"] for span in answer["spans"]]
        assert answer["prompt"] == im.tokenizer.decode(ids)
        keys = {"position", "tokenId", "tokenStr", "messageIndex", "role", "channel", "section"}
        assert all(set(span) == keys for span in answer["spans"])
        for index, message in enumerate(CHAT):
            own = [s for s in answer["spans"] if s["messageIndex"] == index]
            assert {s["role"] for s in own} == {message["role"]}
            content = im.tokenizer.decode(s["tokenId"] for s in own if s["section"] == "content")
            assert content.strip() == message["content"]
        assert (answer["spans"][-1]["messageIndex"], answer["spans"][-1]["section"]) == (None, "header")
        assert "messages is empty" in ask(client, 400, path="apply-chat-template", messages=[])["error"]
        assert "messages is empty" in ask(client, 400, path="apply-chat-template")["error"]
        closed = ask(client, path="apply-chat-template", messages=CHAT, addGenerationPrompt=False)
        assert closed["tokens"] == ids[:-1]

        read = ask(client, prompt=None, chat=CHAT, topN=1, numCompletionTokens=2, temperature=0)
        spans = [{name: span[name] for name in ("messageIndex", "role", "section")} for span in answer["spans"]]
        names = ("message_index", "role", "section")
        assert [dict(zip(spans[0], (t[n] for n in names), strict=True)) for t in read["tokens"][: len(ids)]] == spans
        assert all(t["role"] == "assistant" for t in read["tokens"][len(ids) :])
        begun = [*CHAT, {"role": "assistant", "content": "yes"}]
        opened = ask(client, prompt=None, chat=begun, topN=1, numCompletionTokens=1, temperature=0)
        first = next(i for i, t in enumerate(opened["tokens"]) if t["is_generated"])
        assert im.tokenizer.decode(t["id"] for t in opened["tokens"][:first]).endswith("<|assistant_start|>yes")
        assert opened["tokens"][first]["message_index"] == 4


def test_a_base_model_has_no_chat_template(client):
    assert "no chat template" in ask(client, 400, path="apply-chat-template", messages=CHAT)["error"]
    assert "no chat template" in ask(client, 400, prompt=None, chat=CHAT)["error"]


def test_chats_that_do_not_alternate_are_refused(model):
    for messages in ([("assistant", "x")], [("system", "x")], [("user", "x"), ("user", "y")]):
        with pytest.raises(ValueError, match=r"turn|system"):
            render(model[1].tokenizer, messages)


# ---- other endpoints ------------------------------------------------------------------------------------------------


def test_similar_features_are_those_of_largest_cosine(client, model):
    W = torch.nn.functional.normalize(model[1].sae(RESID).W_dec, dim=1)
    feature = {"model": MODEL, "source": RES, "index": 7}
    path = "util/sae-topk-by-decoder-cossim"
    answer = ask(client, path=path, source=RES, feature=feature, numResults=4)
    best = (W @ W[7]).topk(4)
    assert answer["feature"] == feature
    found = answer["topkDecoderCossimFeatures"]
    assert [one["feature"]["index"] for one in found] == best.indices.tolist()
    assert [one["cosineSimilarity"] for one in found] == pytest.approx(best.values.tolist(), abs=1e-5)
    other = ask(client, path=path, source=MLPS, vector=W[7].tolist(), numResults=1000)
    assert other["feature"] is None
    assert len(other["topkDecoderCossimFeatures"]) == 128
    for body in (
        {},
        {"feature": feature, "vector": W[7].tolist()},
        {"vector": [1.0]},
        {"feature": feature | {"index": 256}},
    ):
        assert ask(client, 400, path=path, source=RES, numResults=4, **body)["error"]


def test_a_similarity_matrix_needs_a_temporal_sae(client):
    body = {"modelId": MODEL, "sourceId": RES, "index": 0, "text": "x"}
    assert "SAE architecture is not temporal" in ask(client, 400, path="util/similarity-matrix-pred", **body)["error"]


def test_the_server_reports_its_state(client):
    assert client.post("/initialize").json() == {"status": "initialized", "model": MODEL}
    assert "start another server" in client.post("/initialize?custom_hf_model_id=x").json()["error"]
    health = client.get("/v1/steer/health").json()
    assert set(health) == {"stats", "summary"}
    assert health["stats"]["engine_initialized"] is True
    assert health["stats"]["num_running_requests"] == 0
    assert 0 < health["stats"]["process_ram_mb"] < health["stats"]["system_ram_total_mb"]
    capabilities = client.get("/v1/capabilities").json()
    assert capabilities["endpoints"]["lens_logit"] is capabilities["endpoints"]["lens_jacobian"] is True
    assert capabilities["lens_token_limit"] == 1024


def test_a_busy_server_says_so_at_once_if_asked(model):
    asked = threading.Event()
    handle = model[1].model.transformer.wte.register_forward_hook(lambda *_: asked.wait(60) and None)
    try:
        with (
            served(*model, model_id=MODEL, limits=Limits(generations=1)) as client,
            client.stream("POST", "/v1/lens/prompt", json=BASE | {"stream": True}) as response,
        ):
            lines = response.iter_lines()
            next(lines)
            busy = ask(client, 429, failIfBusy=True)
            assert busy["busy"] is True
            assert set(busy) == {"error", "busy"}
            assert "try again" in ask(client, 429)["error"]
            asked.set()
            assert list(lines)
    finally:
        asked.set()
        handle.remove()


@pytest.mark.parametrize(
    "body",
    [
        {"type": []},
        {"type": ["TUNED_LENS"]},
        {"type": None},
        {"prompt": None},
        {"chat": CHAT},
        {"prompt": ""},
        {"prompt": "x " * 3000},
        {"topN": 0},
        {"topN": 101},
        {"layers": [DEPTH]},
        {"layers": ["1"]},
        {"temperature": -1},
        {"numCompletionTokens": -1},
        {"inputTokenIds": [-1]},
        {"inputTokenIds": [10**6]},
        {"cachedTokenIds": ["x"]},
        {"steerTokens": [{"token": "no such token", "type": "LOGIT_LENS"}], "steerLayers": [1], "steerStrength": 1},
        {"steerTokens": [{"token": " self", "type": "OTHER"}], "steerLayers": [1], "steerStrength": 1},
        {"steerTokens": [{"token": " self", "type": "LOGIT_LENS"}], "steerLayers": [9], "steerStrength": 1},
        {"steerStrength": 1e9},
        {"swapToken": "x"},
        {"model": "gpt2"},
        {"stream": "yes"},
    ],
)
def test_a_malformed_request_is_refused_before_the_stream(client, body):
    response = client.post("/v1/lens/prompt", json=BASE | {"stream": True} | body)
    assert response.status_code == 400, response.text
    assert response.json()["error"]


def test_without_a_fit_there_is_no_jacobian_lens(model, tmp_path):
    run = write_run(tmp_path / "bare")
    with served(run, *model[1:], model_id=MODEL) as client:
        assert client.get("/v1/capabilities").json()["endpoints"]["lens_jacobian"] is False
        assert "no Jacobian lens" in ask(client, 400, type=["JACOBIAN_LENS"])["error"]
        steer = {"steerTokens": [{"token": " self", "type": "JACOBIAN_LENS"}], "steerLayers": [1], "steerStrength": 1}
        assert "no Jacobian lens" in ask(client, 400, **steer)["error"]
        assert client.get("/api/info").json()["lenses"] == ["logit", "direct"]


def test_a_lens_of_another_model_stops_the_server_from_starting(model, tmp_path):
    run = write_run(tmp_path / "wrong")
    lenses.save(JacobianLens({0: torch.eye(C)}, 1, {"model_fingerprint": "0" * 64}), Run(run).lens_file("jacobian"))
    with pytest.raises(ValueError, match=r"jacobian\.pt: the jacobian lens was fitted on a model with the weights"):
        server.app(run, *model[1:])


def test_words_and_characters():
    assert [
        text for text in (" the", "don't", "x2", "é", "-", "a-", "<|bos|>", " ", "", "):", "<a>") if is_word(text)
    ] == [
        " the",
        "don't",
        "x2",
        "é",
    ]
    smile = "🙂".encode()
    assert display([b"a", smile[:1], smile[1:], b"\xff", b"\xc3"]) == [
        ("a", False),
        ("🙂", False),
        ("🙂", True),
        ("\ufffd", False),
        ("\ufffd", False),
    ]


# ---- the page's own requests ----------------------------------------------------------------------------------------


def test_the_page_gets_a_table_of_layers_by_tokens(client, model, jacobian):
    _, im, _ = model
    ids = ids_of(model, PROMPT)
    assert client.get("/api/info").json()["lenses"] == ["logit", "direct", "jacobian"]
    for name, lens in {"direct": lenses.DirectLens(im.model), "jacobian": jacobian}.items():
        answer = client.post("/api/lens", json={"text": PROMPT, "lens": name, "top": 2}).json()
        tokens = torch.tensor(ids)
        found = lenses.table(im.model, lens, lenses.read(im.model, tokens[None]), tokens, top=2)
        assert set(answer) == {"tokens", "layers", "ids", "probabilities", "ranks", "entropy"}
        assert [token["id"] for token in answer["tokens"]] == ids
        assert answer["layers"] == list(range(DEPTH))
        assert answer["ranks"] == found.ranks.tolist()
        torch.testing.assert_close(torch.tensor(answer["probabilities"]), found.probabilities, atol=1e-4, rtol=0)
    for body in ({}, {"text": ""}, {"text": "x", "lens": "tuned"}, {"text": "x", "top": 11}, {"text": "x", "more": 1}):
        assert client.post("/api/lens", json=body).status_code == 400


def test_the_page_gets_what_a_latent_writes(client, model, jacobian):
    _, im, _ = model
    for hook in (RESID, MLP):
        answer = client.post("/api/lens/latent", json={"hook": hook, "index": 5}).json()
        layer = int(hook.split(".")[1])
        found = lenses.written(im.model, im.sae(hook).W_dec[5], layer, jacobian)
        assert [one["name"] for one in answer["lenses"]] == ["direct", "jacobian"]
        assert answer["lenses"][1]["top"] == found[1].top.tolist()
        assert answer["lenses"][1]["bottom_values"] == pytest.approx(found[1].bottom_values.tolist(), abs=1e-4)
        assert (answer["layer"], answer["n_prompts"], answer["skips_mlp"]) == (layer, 20, False)
        assert answer["overlap"] == found[0].overlap(found[1])
        assert answer["factor"] == pytest.approx(lenses.direct_paths(im.model)[layer].own)
    assert client.post("/api/lens/latent", json={"hook": RESID, "index": 256}).status_code == 400
    other = InterpretableModel(im.model, {"blocks.2.ln2.hook_normalized": toy_sae("topk", C, 64)}, im.tokenizer)
    with served(model[0], other, model[2]) as one:
        told = one.post("/api/lens/latent", json={"index": 1}).json()["error"]
        assert "not in the residual stream" in told
