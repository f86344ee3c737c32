"""Hugging Face's router: OpenAI's chat, its own errors in two shapes, hf-inference's embeddings."""

from __future__ import annotations

from router.backends.base import Backend
from router.backends.inference_providers import InferenceProvidersBackend
from router.config.secrets import Credential
from router.transport.http import HttpClient
from router.types import Rung, Task
from tests.backends.contract import Rig, Scenario, vector_of
from tests.backends.rigs.openai import OpenAiRig
from tests.fakes.hub import FakeHub, entry, offer, served
from tests.fakes.upstream import Reply, Request

CHAT_MODEL = "org/m:fastest"
EMBED_MODEL = "org/embedder"
_BATCH_MAX = 32


class InferenceProvidersRig(Rig):
    kind = "inference-providers"
    tasks = frozenset({Task.CHAT, Task.EMBEDDINGS})

    def __init__(self) -> None:
        super().__init__()
        self.openai = OpenAiRig()
        self.hub = FakeHub(
            self.answer,
            catalogue=[entry("org/m", offer("novita", context_length=4096))],
            mappings={EMBED_MODEL: {"hf-inference": served(EMBED_MODEL)}},
        )

    def backend(self, url: str, client: HttpClient) -> Backend:
        return InferenceProvidersBackend(
            "hf", url=url, hub_url=url, client=client, credential=Credential()
        )

    def rung(self, task: Task) -> Rung:
        return Rung("hf", CHAT_MODEL if task is Task.CHAT else EMBED_MODEL)

    async def handle(self, request: Request, reply: Reply) -> None:
        await self.hub.handle(request, reply)

    async def answer(self, request: Request, reply: Reply) -> None:
        self.openai.scenario = self.scenario
        if self.scenario is Scenario.UNAUTHORIZED:
            await reply.json({"error": "Invalid username or password."}, 401)
        elif request.path == f"/hf-inference/models/{EMBED_MODEL}/pipeline/feature-extraction":
            await self.features(request, reply)
        elif request.path == "/v1/chat/completions":
            await self.openai.handle(request, reply)
        else:
            await reply.json({"error": f"no route {request.path}"}, 404)

    async def features(self, request: Request, reply: Reply) -> None:
        """hf-inference's own wire: bare nested numbers, text-embeddings-inference's limits."""
        if await self.openai.refuse(reply):
            return
        texts = request.json["inputs"]
        if len(texts) > _BATCH_MAX:
            message = f"batch size {len(texts)} > maximum allowed batch size {_BATCH_MAX}"
            await reply.json({"error": message, "error_type": "Validation"}, 422)
            return
        vectors = [vector_of(text) for text in texts]
        if self.scenario is Scenario.WRONG_COUNT:
            vectors.pop()
        await reply.json(vectors)
