"""The queue of a Gradio app, as its versions 4, 5 and 6 speak it."""

from __future__ import annotations

from router.backends.base import Backend
from router.backends.gradio_space import GradioSpaceBackend
from router.config.secrets import Credential
from router.hub.spaces import Spaces
from router.transport.http import HttpClient
from router.types import Rung, Task
from tests.backends.contract import PIECES, TEXT, Rig, Scenario, vector_of
from tests.fakes.gradio import FakeSpace, Posted, Teller
from tests.fakes.upstream import Reply, Request

INVALID = {"__type__": "validate", "is_valid": False, "message": "too short", "parameter_name": "x"}


class GradioSpaceRig(Rig):
    """Abstract: a version of Gradio."""

    version: int
    tasks = frozenset({Task.CHAT, Task.EMBEDDINGS})
    # A Space tells no token counts; what it seems to have used is an estimate.
    reports_usage = False

    def __init__(self) -> None:
        super().__init__()
        self.space = FakeSpace(self.version, self.play)

    def backend(self, url: str, client: HttpClient) -> Backend:
        return GradioSpaceBackend(
            "space",
            url=url,
            space=None,
            api_name=None,
            inputs=None,
            client=client,
            credential=Credential(),
            spaces=Spaces(client),
        )

    def rung(self, task: Task) -> Rung:
        return Rung("space", "app")

    async def handle(self, request: Request, reply: Reply) -> None:
        if self.scenario is Scenario.UNAUTHORIZED:
            detail = {"error": "Not authenticated", "auth_message": None}
            await reply.json({"detail": detail}, 401)
        elif not (request.path.endswith("/queue/join") and await self.refuse(reply)):
            await self.space.handle(request, reply)

    async def refuse(self, reply: Reply) -> bool:
        """Play the scenarios that refuse the post; whether this was one."""
        match self.scenario:
            case Scenario.BUSY:
                await reply.json({"detail": "Queue is full. Max size is 3 and size is 3."}, 503)
            case Scenario.HTML:
                await reply.whole(b"<html>bad gateway</html>", 502, {"content-type": "text/html"})
            case Scenario.REDIRECT:
                await reply.whole(b"", 302, {"location": "http://127.0.0.1:1/elsewhere"})
            case Scenario.MISTAKE:
                await reply.json({"detail": [INVALID]}, 422)
            case Scenario.NOT_JSON:
                await reply.whole(b"<html>hello</html>", 200, {"content-type": "text/html"})
            case _:
                return False
        return True

    async def play(self, job: Posted, say: Teller) -> None:
        await say.place(1, 2)
        await say.place(0, 1, 0.3)
        await say.message("process_starts", eta=0.3)
        match self.scenario:
            case Scenario.FAILED:
                await say.failed(None)
            case Scenario.TOO_LONG:
                await say.failed("This model's maximum context length is 4096 tokens.")
            case Scenario.ERROR_FIRST:
                await say.failed("Model exploded")
            case _ if job.api_name == "/embed":
                await self.embed(job, say)
            case _:
                await self.chat(say)

    async def chat(self, say: Teller) -> None:
        for count in range(1, len(PIECES) + 1):
            await say.generating("".join(PIECES[:count]), None)
            if self.scenario is Scenario.CUT:
                return say.reply.cut()
            if self.scenario is Scenario.ENDLESS:
                await say.reply.client_left()
                return say.reply.close()
        await say.completed(TEXT, None)

    async def embed(self, job: Posted, say: Teller) -> None:
        vectors = [vector_of(text) for text in job.data[0]]
        if self.scenario is Scenario.WRONG_COUNT:
            vectors.pop()
        await say.completed(vectors)


class Gradio6Rig(GradioSpaceRig):
    kind = "gradio-space-6"
    version = 6


class Gradio5Rig(GradioSpaceRig):
    """`gr.validate`, the one way to blame the request, came with Gradio 6."""

    kind = "gradio-space-5"
    version = 5
    plays = frozenset(Scenario) - {Scenario.MISTAKE}


class Gradio4Rig(GradioSpaceRig):
    kind = "gradio-space-4"
    version = 4
    plays = frozenset(Scenario) - {Scenario.MISTAKE}
