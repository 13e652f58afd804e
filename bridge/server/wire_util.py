"""Small endpoints of Neuronpedia's inference API: similar features, chat templates, the state of the server."""

import os
import resource
import threading
import time
from typing import Any

import torch
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from bridge.circuits.tracing import free_memory
from bridge.server.bodies import Fields, Refusal
from bridge.server.chats import MESSAGES, spans
from bridge.server.session import Session
from bridge.server.source_ids import Sources, camel
from bridge.server.wire_steer import LARGEST

MOST_SIMILAR = 128
"""Most features in an answer of /v1/util/sae-topk-by-decoder-cossim; more are cut to these, as in Neuronpedia."""
_MEGABYTE = 2**20


class Utilities:
    """The endpoints that compute nothing with the model, or little."""

    def __init__(self, session: Session, sources: Sources):
        self._session, self._sources = session, sources

    async def similar(self, request: Request) -> Response:
        """Return the features of a source whose decoder rows are nearest to a feature or a vector, by cosine."""
        fields = await self._sources.fields(request)
        if fields.has("feature") == fields.has("vector"):
            raise Refusal(400, "exactly one of feature or vector must be provided")
        source, count = fields.text("source"), fields.whole("numResults", 1, 2**31)
        sae = self._session.im.sae(self._sources.hook(source))
        query, echo = self._direction(fields)
        most = min(count, MOST_SIMILAR, sae.d_sae)

        def find() -> list[dict[str, Any]]:
            lengths = torch.linalg.vector_norm(sae.W_dec, dim=1, dtype=torch.float32)  # without a copy of W_dec
            direction = query.to(sae.W_dec)
            products = (sae.W_dec @ direction).float()
            best = (products / (lengths * direction.float().norm()).clamp(min=1e-8)).nan_to_num(0.0).topk(most)
            return [
                {"feature": {"model": fields.text("model"), "source": source, "index": i}, "cosineSimilarity": value}
                for i, value in zip(best.indices.tolist(), best.values.tolist(), strict=True)
            ]

        async def make() -> dict[str, Any]:
            return {"feature": echo, "topkDecoderCossimFeatures": await self._session.run(find)}

        return await self._session.answer(request, make)

    def _direction(self, fields: Fields) -> tuple[torch.Tensor, dict[str, Any] | None]:
        """Return the direction to compare with, and the feature that it is of."""
        if fields.has("vector"):
            return torch.tensor(fields.numbers("vector", self._session.nano.config.n_embd, LARGEST)), None
        feature = fields.object("feature")
        self._sources.check_model(feature)
        source = feature.text("source")
        sae = self._session.im.sae(self._sources.hook(source))
        index = feature.index("index", sae.d_sae)
        return sae.W_dec[index], {"model": feature.text("model"), "source": source, "index": index}

    async def similarity_matrix(self, request: Request) -> Response:
        """Refuse, as Neuronpedia's server does for every SAE that is not temporal; this project has none that is."""
        fields = Fields(camel(await self._session.body(request)))
        hook = self._sources.hook(fields.text("sourceId"))
        fields.text("text")
        kind = self._session.im.sae(hook).architecture
        raise Refusal(
            400, f"SAE architecture is not temporal: it is {kind}, which predicts nothing from earlier tokens"
        )

    async def apply_chat_template(self, request: Request) -> Response:
        """Return a chat as nanochat renders it, with the message of every token."""
        fields = Fields(camel(await self._session.body(request)))
        messages = fields.objects("messages", MESSAGES)
        if not messages:
            raise fields.refusal("messages", "is empty: expected a list of objects with role and content")
        chat = await spans(self._session, messages, fields.flag("addGenerationPrompt", True), continues=False)
        tokenizer = self._session.im.tokenizer
        return JSONResponse(
            {
                "prompt": tokenizer.decode([span.token for span in chat]),
                "tokens": [span.token for span in chat],
                "spans": [
                    {
                        "position": position,
                        "tokenId": span.token,
                        "tokenStr": tokenizer.token_text(span.token),
                        "messageIndex": span.message,
                        "role": span.role,
                        "channel": None,
                        "section": span.section,
                    }
                    for position, span in enumerate(chat)
                ],
            }
        )

    async def initialize(self, request: Request) -> Response:
        """Report that the model is loaded, which it is from the start; another model cannot be."""
        if other := request.query_params.get("custom_hf_model_id"):
            raise Refusal(400, f"this server has {self._name} and cannot load {other[:100]!r}: start another server")
        return JSONResponse({"status": "initialized", "model": self._name})

    @property
    def _name(self) -> str:
        return self._sources.model_id or self._session.nano.name

    async def steer_health(self, request: Request) -> Response:
        """Report requests, memory and threads, with the fields of Neuronpedia's monitor."""
        session = self._session
        used, total = _system_memory()
        gpus = _gpus()
        threads = threading.enumerate()
        stats = {
            "timestamp": time.time(),
            "num_running_requests": session.generations.taken + session.readings.taken,
            "num_waiting_requests": 0,
            "num_swapped_requests": 0,
            "gpu_cache_usage_percent": 0.0,
            "cpu_cache_usage_percent": 0.0,
            "system_ram_used_mb": used / _MEGABYTE,
            "system_ram_total_mb": total / _MEGABYTE,
            "system_ram_percent": 100 * used / total if total else 0.0,
            "process_ram_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,  # kilobytes on Linux
            "gpu_stats": gpus or None,
            "active_threads": len(threads),
            "thread_names": [thread.name for thread in threads],
            "pending_tasks": 0,
            "engine_initialized": True,
            "model_name": self._name,
        }
        summary = (
            f"{self._name}: {stats['num_running_requests']} requests, {stats['process_ram_mb']:.0f} MB here, "
            f"{used / _MEGABYTE:.0f} of {total / _MEGABYTE:.0f} MB of the system, {len(threads)} threads"
        )
        return JSONResponse({"stats": stats, "summary": summary})


def _system_memory() -> tuple[int, int]:
    """Return the bytes of memory in use and in all; zeros where the system does not say."""
    available = free_memory(torch.device("cpu"))
    if available is None:
        return 0, 0
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return total - available, total


def _gpus() -> list[dict[str, Any]]:
    if not torch.cuda.is_available():
        return []
    found = []
    for number in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(number)
        found.append(
            {
                "id": number,
                "name": torch.cuda.get_device_name(number),
                "memory_used_mb": (total - free) / _MEGABYTE,
                "memory_total_mb": total / _MEGABYTE,
                "memory_percent": 100 * (total - free) / total,
                "gpu_utilization": None,
            }
        )
    return found
