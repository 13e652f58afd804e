"""Neuronpedia's inference API, so that a local Neuronpedia can use a nanochat: activations of a text, and tokens.

Names and formats are those of the inference server of github.com/hijohnnylin/neuronpedia (apps/inference/openapi.json);
steering is in `wire_steer`, lenses in `wire_lens`, other endpoints in `wire_util`. A Neuronpedia whose
USE_LOCALHOST_INFERENCE is true connects to port 5002.
"""

import dataclasses
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import torch
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from bridge.hooks import find
from bridge.server.bodies import Fields, Refusal, refusing
from bridge.server.ranking import Strongest, strongest
from bridge.server.session import Session
from bridge.server.source_ids import Sources
from bridge.server.wire_lens import Lenses
from bridge.server.wire_steer import BOS, LARGEST, Steering
from bridge.server.wire_util import Utilities

MOST_RESULTS = 1000
"""The maximal number of features in an answer of /v1/activation/all."""
MOST_PER_TOKEN = 100
"""The maximal number of features per token in an answer of /v1/activation/topk-by-token."""
_PROMPTS = 32  # in a batch


def routes(session: Session, model_id: str | None = None) -> list[Route]:
    """Return the routes of Neuronpedia's API.

    Args:
      session: the model.
      model_id: Neuronpedia's name for the model; requests for another are refused. None accepts any.
    """
    sources = Sources(session, model_id)
    lenses, steering, utilities = Lenses(session, sources), Steering(session, sources), Utilities(session, sources)
    wire = Wire(session, sources, lenses.token_limit)
    posted: dict[str, Callable[[Request], Awaitable[Response]]] = {
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
        "lens/prompt": lenses.prompt,
        "apply-chat-template": utilities.apply_chat_template,
        "util/sae-topk-by-decoder-cossim": utilities.similar,
        "util/similarity-matrix-pred": utilities.similarity_matrix,
    }
    read_only = {
        "v1/capabilities": wire.capabilities,
        "capabilities": wire.capabilities,
        "health": wire.health,
        "v1/steer/health": utilities.steer_health,
    }
    return [
        *(Route(f"/v1/{path}", endpoint, methods=["POST"]) for path, endpoint in posted.items()),
        Route("/initialize", utilities.initialize, methods=["POST"]),
        *(Route(f"/{path}", endpoint) for path, endpoint in read_only.items()),
    ]


@dataclasses.dataclass(frozen=True)
class Reading:
    """A request to read features on one prompt.

    The answer has `features` features at each token, with `numbers` numbers each; `make` computes it with the model.
    """

    features: int
    make: Callable[[], dict[str, Any]]
    numbers: int = 1


Read = Callable[[Fields, Sequence[int]], Reading]
"""Checks the fields of a request and returns what to read on a prompt of token ids."""


class Wire:
    """The endpoints that read activations. A prompt gets a BOS, whose activations are left out, as in Neuronpedia."""

    def __init__(self, session: Session, sources: Sources, lens_token_limit: int):
        self._session, self._sources, self._lens_token_limit = session, sources, lens_token_limit

    def one(self, read: Read) -> Callable[[Request], Awaitable[Response]]:
        """Return an endpoint for one prompt."""

        async def endpoint(request: Request) -> Response:
            fields = await self._sources.fields(request)
            prompt = fields.text("prompt")

            async def make() -> dict[str, Any]:
                (reading,) = await self._readings(read, fields, [prompt])
                return await self._session.run(reading.make)

            return await self._session.answer(request, make)

        return endpoint

    def batch(self, read: Read) -> Callable[[Request], Awaitable[Response]]:
        """Return an endpoint for several prompts; it answers with the result of each."""

        async def endpoint(request: Request) -> Response:
            fields = await self._sources.fields(request)
            prompts = fields.texts("prompts", _PROMPTS)

            async def make() -> dict[str, Any]:
                readings = await self._readings(read, fields, prompts)
                return {"results": [await self._session.run(reading.make) for reading in readings]}

            return await self._session.answer(request, make)

        return endpoint

    async def _readings(self, read: Read, fields: Fields, prompts: Sequence[str]) -> list[Reading]:
        """Return what to read on prompts; all are checked before the model runs.

        Raises:
          Refusal: a prompt or a field is invalid, or the answer may be too large.
        """
        ids = [await self._session.ids(prompt.removeprefix(BOS)) for prompt in prompts]
        readings = [read(fields, prompt_ids) for prompt_ids in ids]
        if readings:
            largest = max(readings, key=lambda reading: reading.features)
            self._session.check_size(largest.features, sum(map(len, ids)), largest.numbers)
        return readings

    def single(self, fields: Fields, ids: Sequence[int]) -> Reading:
        """Read one feature, or one direction at a hook, over a text."""
        of_feature = fields.has("source") and fields.has("index")
        if of_feature == (fields.has("vector") and fields.has("hook")):
            raise Refusal(400, "give exactly one of source and index, or vector and hook")
        values = self._feature_activations(fields, ids) if of_feature else self._projections(fields, ids)

        def make() -> dict[str, Any]:
            activations = values()[1:]
            return {
                "activation": {
                    "values": activations,
                    "maxValue": max(activations),
                    "maxValueIndex": activations.index(max(activations)),
                },
                "tokens": self._session.spell(ids)[1:],
                "tokensIsSpecial": [False] * len(activations),
            }

        return Reading(1, make)

    def _feature_activations(self, fields: Fields, ids: Sequence[int]) -> Callable[[], list[float]]:
        hook = self._sources.hook(fields.text("source"))
        index = fields.index("index", self._session.im.sae(hook).d_sae)
        return lambda: self._session.activation(ids, hook, index)

    def _projections(self, fields: Fields, ids: Sequence[int]) -> Callable[[], list[float]]:
        hook, width = fields.text("hook"), self._session.nano.config.n_embd
        vector = torch.tensor(fields.numbers("vector", width, LARGEST))
        with refusing():
            find(self._session.im.model, hook)

        def project() -> list[float]:
            acts = self._session.acts(ids, [hook])[hook][0].float()
            return (acts @ vector.to(acts.device)).tolist()

        return project

    def all(self, fields: Fields, ids: Sequence[int]) -> Reading:
        """Read the features that fire most, of all or some SAEs of a set; features that do not fire are left out."""
        hooks = self._sources.sources_in_set(fields.text("sourceSet"))
        chosen = fields.texts("selectedSources", len(hooks), [])
        if chosen:
            hooks = {source: self._sources.hook(source) for source in chosen}
        sort = [
            Fields({"i": i}, "sortByTokenIndexes.").index("i", len(ids))
            for i in fields.items("sortByTokenIndexes", len(ids), [])
        ]
        most = min(fields.whole("numResults", 1, MOST_RESULTS, 25), sum(map(self._latents, hooks.values())))
        ignore_bos = fields.flag("ignoreBos", True)

        def make() -> dict[str, Any]:
            acts = self._session.acts(ids, sorted(set(hooks.values())))
            rankings = [Strongest(self._session.im.sae(hook), acts[hook], sort, ignore_bos) for hook in hooks.values()]
            rows = strongest(list(hooks), rankings, most)
            return {"activations": rows, "tokens": self._session.spell(ids)}

        return Reading(most, make)

    def _latents(self, hook: str) -> int:
        return self._session.im.sae(hook).d_sae

    def topk_by_token(self, fields: Fields, ids: Sequence[int]) -> Reading:
        """Read the features that fire most at each token. Positions count the BOS even if it is left out."""
        hook = self._sources.hook(fields.text("source"))
        top_k = fields.whole("topK", 1, MOST_PER_TOKEN, 5)
        first = 1 if fields.flag("ignoreBos", True) else 0

        def make() -> dict[str, Any]:
            features, tokens = self._session.strongest(ids, hook, top_k), self._session.spell(ids)
            results = [
                {
                    "tokenPosition": i,
                    "token": tokens[i],
                    "isSpecial": i == 0,
                    "topFeatures": [{"featureIndex": index, "activationValue": value} for index, value in features[i]],
                }
                for i in range(first, len(ids))
            ]
            return {"results": results, "tokens": tokens[first:]}

        return Reading(min(top_k, self._latents(hook)), make, numbers=2)

    async def tokenize(self, request: Request) -> Response:
        """Return the tokens of a text."""
        fields = await self._sources.fields(request)
        text, bos = fields.text("text"), fields.flag("prependBos", True)

        async def make() -> dict[str, Any]:
            ids = await self._session.ids(text, bos) if text else [self._session.im.tokenizer.bos_token_id] * bos
            return {"tokens": ids, "tokenStrings": self._session.spell(ids), "prependBos": bos}

        return await self._session.answer(request, make)

    async def sae_vector(self, request: Request) -> Response:
        """Return the decoder row of a feature, and its hook."""
        fields = await self._sources.fields(request)
        hook = self._sources.hook(fields.text("source"))
        sae = self._session.im.sae(hook)
        return JSONResponse({"vector": sae.W_dec[fields.index("index", sae.d_sae)].tolist(), "hookName": hook})

    async def capabilities(self, request: Request) -> Response:
        """Describe this server; field names are in snake case, as in Neuronpedia's own server."""
        session, limits = self._session, self._session.limits
        endpoints = ("tokenize", "activation_single", "activation_all", "activation_topk_by_token", "steer_completion")
        others = ("activation_source", "activation_raw", "activation_attention", "dfa", "neurons")
        return JSONResponse(
            {
                "model": self._sources.model_id or session.nano.name,
                "backend": "eager",
                "device": str(session.im.model.lm_head.weight.device),
                "max_concurrent_requests": limits.generations,
                "max_tokens": session.longest_prompt + limits.max_tokens,
                "token_limit": session.longest_prompt,
                "activation_token_limit": session.longest_prompt,
                "lens_token_limit": self._lens_token_limit,
                "max_num_results": MOST_RESULTS,
                "capture_points": ["attn_out", "mlp_out", "resid_post"],
                "hooks_available": True,
                "num_layers": session.nano.config.n_layer,
                "sae_sets": self._sources.sets,
                "endpoints": dict.fromkeys(endpoints, True)
                | {"steer_completion_chat": session.chat}
                | {"lens_logit": True, "lens_jacobian": "jacobian" in session.lenses}
                | dict.fromkeys(others, False),
            }
        )

    async def health(self, request: Request) -> Response:
        """Report that the server is running."""
        return JSONResponse({"status": "healthy"})
