"""Neuronpedia's inference wire, so that a local Neuronpedia can drive a nanochat: what fires on a text, and tokens.

Names and shapes are those of the inference server of github.com/hijohnnylin/neuronpedia (apps/inference/openapi.json);
steering is in `wire_steer`. A Neuronpedia whose USE_LOCALHOST_INFERENCE is true asks at port 5002.
"""

from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import torch
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from bridge.explorer.bodies import Fields, Refusal, refusing
from bridge.explorer.session import Session, dense, while_there
from bridge.explorer.sources import Sources
from bridge.explorer.wire_steer import BOS, LARGEST, Steering
from bridge.hooks import find

MOST_RESULTS = 1000
"""Features that /v1/activation/all gives at most."""
_PROMPTS = 32  # of a batch
_FEATURES_PER_TOKEN = 100


def routes(session: Session, model_id: str | None = None) -> list[Route]:
    """Where Neuronpedia asks.

    Args:
      session: the model.
      model_id: its name there; requests for another are refused. None takes any.
    """
    sources = Sources(session, model_id)
    wire, steering = Wire(session, sources), Steering(session, sources)
    asked: dict[str, Callable[[Request], Awaitable[Response]]] = {
        "activation/single": wire.one(wire.single),
        "activation/single-batch": wire.batch(wire.single),
        "activation/all": wire.one(wire.all),
        "activation/all-batch": wire.batch(wire.all),
        "activation/topk-by-token": wire.one(wire.topk_by_token),
        "activation/topk-by-token-batch": wire.batch(wire.topk_by_token),
        "tokenize": wire.tokenize,
        "util/sae-vector": wire.sae_vector,
        "steer/completion": steering.completion,
        "steer/completion-chat": steering.completion_chat,
    }
    told = {"v1/capabilities": wire.capabilities, "capabilities": wire.capabilities, "health": wire.health}
    return [
        *(Route(f"/v1/{path}", endpoint, methods=["POST"]) for path, endpoint in asked.items()),
        *(Route(f"/{path}", endpoint) for path, endpoint in told.items()),
    ]


Answer = Callable[[Fields, Sequence[int]], Callable[[], dict[str, Any]]]
"""Of the fields of a request and the tokens of a prompt: what makes the answer when the model is free."""


class Wire:
    """The endpoints that read. A prompt gets a BOS; what the SAE makes of it is not shown, as Neuronpedia does."""

    def __init__(self, session: Session, sources: Sources):
        self._session, self._sources = session, sources

    def one(self, answer: Answer) -> Callable[[Request], Awaitable[Response]]:
        """An endpoint for one prompt."""

        async def endpoint(request: Request) -> Response:
            fields = await self._sources.fields(request)
            prompt = fields.text("prompt")
            with self._session.readings.take():
                return JSONResponse(await while_there(request, lambda: self._answer(answer, fields, prompt)))

        return endpoint

    def batch(self, answer: Answer) -> Callable[[Request], Awaitable[Response]]:
        """An endpoint for several prompts; its results are those of each."""

        async def endpoint(request: Request) -> Response:
            fields = await self._sources.fields(request)
            prompts = fields.texts("prompts", _PROMPTS)

            async def every() -> list[dict[str, Any]]:
                return [await self._answer(answer, fields, prompt) for prompt in prompts]

            with self._session.readings.take():
                return JSONResponse({"results": await while_there(request, every)})

        return endpoint

    async def _answer(self, answer: Answer, fields: Fields, prompt: str) -> dict[str, Any]:
        ids = await self._session.ids(prompt.removeprefix(BOS))
        return await self._session.run(answer(fields, ids))

    def single(self, fields: Fields, ids: Sequence[int]) -> Callable[[], dict[str, Any]]:
        """One feature, or one direction at a hook, over a text."""
        of_feature = fields.has("source") and fields.has("index")
        if of_feature == (fields.has("vector") and fields.has("hook")):
            raise Refusal(400, "give exactly one of source and index, or vector and hook")
        values = self._of_feature(fields, ids) if of_feature else self._of_vector(fields, ids)

        def make() -> dict[str, Any]:
            told = values()[1:]
            return {
                "activation": {"values": told, "maxValue": max(told), "maxValueIndex": told.index(max(told))},
                "tokens": self._session.spell(ids)[1:],
                "tokensIsSpecial": [False] * len(told),
            }

        return make

    def _of_feature(self, fields: Fields, ids: Sequence[int]) -> Callable[[], list[float]]:
        hook = self._sources.hook(fields.text("source"))
        index = fields.index("index", self._session.im.sae(hook).d_sae)
        return lambda: self._session.activation(ids, hook, index)

    def _of_vector(self, fields: Fields, ids: Sequence[int]) -> Callable[[], list[float]]:
        hook, width = fields.text("hook"), self._session.nano.config.n_embd
        vector = torch.tensor(fields.numbers("vector", width, LARGEST))
        with refusing():
            find(self._session.im.model, hook)

        def along() -> list[float]:
            acts = self._session.acts(ids, [hook])[hook][0].float()
            return (acts @ vector.to(acts.device)).tolist()

        return along

    def all(self, fields: Fields, ids: Sequence[int]) -> Callable[[], dict[str, Any]]:
        """The features that fire most on a text, of all SAEs of a set or some of them. What is silent is left out."""
        hooks = self._sources.of_set(fields.text("sourceSet"))
        chosen = fields.texts("selectedSources", len(hooks), [])
        if chosen:
            hooks = {source: self._sources.hook(source) for source in chosen}
        sort = [
            Fields({"i": i}, "sortByTokenIndexes.").index("i", len(ids))
            for i in fields.items("sortByTokenIndexes", len(ids), [])
        ]
        most = fields.whole("numResults", 1, 2**31, 25)
        ignore_bos = fields.flag("ignoreBos", True)

        def make() -> dict[str, Any]:
            acts = self._session.acts(ids, sorted(set(hooks.values())))
            rows = []
            for source, hook in hooks.items():
                latents = dense(self._session.im.sae(hook), acts[hook])
                if ignore_bos:
                    latents[0] = 0
                rows += _strongest(source, latents, sort, min(most, MOST_RESULTS))
            rows.sort(key=lambda row: -(row["sumValues"] if sort else row["maxValue"]))
            return {"activations": rows[: min(most, MOST_RESULTS)], "tokens": self._session.spell(ids)}

        return make

    def topk_by_token(self, fields: Fields, ids: Sequence[int]) -> Callable[[], dict[str, Any]]:
        """The features that fire most at each token. Positions count the BOS, also where it is left out."""
        hook = self._sources.hook(fields.text("source"))
        top_k = min(fields.whole("topK", 1, 2**31, 5), _FEATURES_PER_TOKEN)
        first = 1 if fields.flag("ignoreBos", True) else 0

        def make() -> dict[str, Any]:
            found, tokens = self._session.strongest(ids, hook, top_k), self._session.spell(ids)
            results = [
                {
                    "tokenPosition": i,
                    "token": tokens[i],
                    "isSpecial": i == 0,
                    "topFeatures": [{"featureIndex": f, "activationValue": value} for f, value in found[i]],
                }
                for i in range(first, len(ids))
            ]
            return {"results": results, "tokens": tokens[first:]}

        return make

    async def tokenize(self, request: Request) -> Response:
        """The tokens of a text."""
        fields = await self._sources.fields(request)
        text, bos = fields.text("text"), fields.flag("prependBos", True)
        ids = await self._session.ids(text, bos) if text else [self._session.im.tokenizer.bos_token_id] * bos
        return JSONResponse({"tokens": ids, "tokenStrings": self._session.spell(ids), "prependBos": bos})

    async def sae_vector(self, request: Request) -> Response:
        """The decoder row of a feature, and its hook."""
        fields = await self._sources.fields(request)
        hook = self._sources.hook(fields.text("source"))
        sae = self._session.im.sae(hook)
        return JSONResponse({"vector": sae.W_dec[fields.index("index", sae.d_sae)].tolist(), "hookName": hook})

    async def capabilities(self, request: Request) -> Response:
        """What this server can do; names in snake case, as Neuronpedia's has them here."""
        session, limits = self._session, self._session.limits
        endpoints = ("tokenize", "activation_single", "activation_all", "activation_topk_by_token", "steer_completion")
        others = ("activation_source", "activation_raw", "activation_attention", "dfa", "lens_logit", "lens_jacobian")
        return JSONResponse(
            {
                "model": self._sources.model_id or session.nano.name,
                "backend": "eager",
                "device": str(session.im.model.lm_head.weight.device),
                "max_concurrent_requests": limits.generations,
                "max_tokens": session.longest_prompt + limits.max_tokens,
                "token_limit": session.longest_prompt,
                "activation_token_limit": session.longest_prompt,
                "max_num_results": MOST_RESULTS,
                "capture_points": ["attn_out", "mlp_out", "resid_post"],
                "hooks_available": True,
                "num_layers": session.nano.config.n_layer,
                "sae_sets": self._sources.sets,
                "endpoints": dict.fromkeys(endpoints, True)
                | {"steer_completion_chat": session.chat}
                | dict.fromkeys((*others, "neurons"), False),
            }
        )

    async def health(self, request: Request) -> Response:
        """That it is there."""
        return JSONResponse({"status": "healthy"})


def _strongest(source: str, latents: torch.Tensor, sort: list[int], most: int) -> list[dict[str, Any]]:
    """The latents (T, f) with the largest maximum, or the largest sum at some tokens; the lower index first."""
    sums = latents[sort].sum(0) if sort else torch.zeros_like(latents[0])
    maxima, where = latents.max(dim=0)
    order = torch.argsort(sums if sort else maxima, descending=True, stable=True)[:most]
    keys = (sums if sort else maxima)[order]
    return [
        {
            "source": source,
            "index": i,
            "values": latents[:, i].tolist(),
            "sumValues": float(sums[i]),
            "maxValue": float(maxima[i]),
            "maxValueIndex": int(where[i]),
        }
        for i in order[keys > 0].tolist()
    ]
