"""A running endpoint with vLLM in it: state from the management API, OpenAI's wire behind it."""

from __future__ import annotations

from router.backends.base import Backend
from router.backends.inference_endpoint import InferenceEndpointBackend
from router.config.secrets import Credential
from router.transport.http import HttpClient
from router.types import Rung, Task
from tests.backends.contract import Rig
from tests.backends.rigs.openai import OpenAiRig
from tests.fakes.hub import ENDPOINT, FakeHub
from tests.fakes.upstream import Reply, Request


class InferenceEndpointRig(Rig):
    kind = "inference-endpoint"
    tasks = frozenset({Task.CHAT, Task.EMBEDDINGS})

    def __init__(self) -> None:
        super().__init__()
        self.openai = OpenAiRig()
        self.hub = FakeHub(self.answer)

    def backend(self, url: str, client: HttpClient) -> Backend:
        return InferenceEndpointBackend(
            "big", endpoint=ENDPOINT, management_url=url, client=client, credential=Credential()
        )

    def rung(self, task: Task) -> Rung:
        return Rung("big", "org/m")

    async def handle(self, request: Request, reply: Reply) -> None:
        await self.hub.handle(request, reply)

    async def answer(self, request: Request, reply: Reply) -> None:
        self.openai.scenario = self.scenario
        await self.openai.handle(request, reply)
