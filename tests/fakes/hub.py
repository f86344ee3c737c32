"""Hugging Face on one address: the router, the Hub, the management API and one endpoint.

The shapes are those of Hugging Face's documentation and of its own clients. A test sets what is
published and how the endpoint is; chat and embeddings are answered by the handler it gives.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field, replace
from typing import Any

from tests.fakes.upstream import FakeUpstream, Handler, Reply, Request

ENDPOINT = "acme/llama"
DATA_PLANE = "/data-plane"
MANAGEMENT_PATH = f"/v2/endpoint/{ENDPOINT}"


def offer(provider: str, **fields: Any) -> Any:
    """One provider of a catalogue's entry, with no more than what is always there."""
    return {"provider": provider, "status": "live", "is_model_author": False, **fields}


def entry(hub_id: str, *offers: Any, **fields: Any) -> Any:
    """One entry of the catalogue."""
    return {
        "id": hub_id,
        "object": "model",
        "created": 1_776_837_885,
        "owned_by": hub_id.partition("/")[0],
        "architecture": {"input_modalities": ["text"], "output_modalities": ["text"]},
        "providers": list(offers),
        **fields,
    }


def served(provider_id: str, task: str = "feature-extraction", status: str = "live") -> Any:
    """One provider of a model's mapping on the Hub."""
    return {"status": status, "providerId": provider_id, "task": task, "isModelAuthor": False}


@dataclass
class FakeHub:
    """`handle` is a FakeUpstream's handler. `answer` has what the router and the endpoint serve."""

    answer: Handler
    catalogue: list[Any] = field(default_factory=list)
    mappings: dict[str, Any] = field(default_factory=dict)
    answer_mappings: Handler | None = None
    catalogue_status: int = 200
    mapping_status: int = 200
    management_status: int = 200
    # While this is set and not open, the management API hangs; `management_asked` says it does.
    management_gate: asyncio.Event | None = None
    management_asked: asyncio.Event = field(default_factory=asyncio.Event)
    state: str = "running"
    engine: str | None = "vLLM"
    ready_replicas: int = 1
    is_deployed: bool = True
    # What the endpoint's proxy answers while there is no replica; its body is not documented.
    asleep_status: int = 503
    asleep_body: bytes = b""
    # A held request has come; the endpoint is ready when the test sets `woken`.
    wake_came: asyncio.Event = field(default_factory=asyncio.Event)
    woken: asyncio.Event = field(default_factory=asyncio.Event)
    may_scale_up: bool = True
    cuts_wakes: bool = False

    async def handle(self, request: Request, reply: Reply) -> None:
        path = request.path
        if path == "/v1/models":
            await reply.json({"object": "list", "data": self.catalogue}, self.catalogue_status)
        elif path.startswith("/api/models/") and self.answer_mappings is not None:
            await self.answer_mappings(request, reply)
        elif path.startswith("/api/models/"):
            await self._mapping(path.removeprefix("/api/models/"), reply)
        elif path.startswith("/v2/endpoint/"):
            await self._management(request, reply)
        elif path.startswith(DATA_PLANE):
            await self._endpoint(replace(request, path=path.removeprefix(DATA_PLANE)), reply)
        else:
            await self.answer(request, reply)

    async def _mapping(self, hub_id: str, reply: Reply) -> None:
        if self.mapping_status != 200:
            await reply.json({"error": "try later"}, self.mapping_status)
        elif hub_id not in self.mappings:
            await reply.json({"error": "Repository not found"}, 404)
        else:
            mapping = self.mappings[hub_id]
            await reply.json({"_id": "1", "id": hub_id, "inferenceProviderMapping": mapping})

    async def _management(self, request: Request, reply: Reply) -> None:
        self.management_asked.set()
        if self.management_gate is not None:
            await self.management_gate.wait()
        if self.management_status != 200:
            await reply.json({"error": "no"}, self.management_status)
        elif request.path == f"{MANAGEMENT_PATH}/resume":
            if self.state == "running":
                await reply.json({"error": "Endpoint is already running"}, 400)
            else:
                self.state = "initializing"
                await reply.json(self._object(request), 202)
        elif request.path == MANAGEMENT_PATH:
            await reply.json(self._object(request))
        else:
            await reply.json({"error": "Endpoint not found"}, 404)

    def _object(self, request: Request) -> Any:
        image = {} if self.engine is None else {self.engine: {"url": "registry/image:1"}}
        status: Any = {
            "state": self.state,
            "message": "as it is",
            "createdAt": "2026-11-01T10:00:00.123456789Z",
            "readyReplica": self.ready_replicas if self.state != "scaledToZero" else 0,
            "targetReplica": 1,
        }
        if self.is_deployed:
            status["url"] = f"http://{request.headers['host']}{DATA_PLANE}"
        return {
            "name": ENDPOINT.partition("/")[2],
            "type": "protected",
            "healthRoute": "/health",
            "model": {"repository": "org/m", "task": "text-generation", "image": image},
            "status": status,
        }

    async def _endpoint(self, request: Request, reply: Reply) -> None:
        if self.state == "running":
            await self.answer(request, reply)
        elif "x-scale-up-timeout" in request.headers and self.may_scale_up:
            self.wake_came.set()
            if self.cuts_wakes:
                return reply.cut()
            await self.woken.wait()
            self.state = "running"
            await reply.whole(b"")
        else:
            await reply.whole(self.asleep_body, self.asleep_status)


def data_plane_requests(upstream: FakeUpstream) -> list[Request]:
    """What reached the endpoint itself, which keeps it awake and billed."""
    return [request for request in upstream.requests if request.path.startswith(DATA_PLANE)]
