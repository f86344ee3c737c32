"""The OpenAI wire as vLLM and its kin speak it."""

from __future__ import annotations

import base64
import struct
from typing import Any

from router.backends.base import Backend
from router.backends.openai import OpenAiBackend
from router.config.secrets import Credential
from router.transport.http import HttpClient
from router.types import Rung, Task
from tests.backends.contract import PIECES, TEXT, Rig, Scenario, vector_of
from tests.fakes.upstream import Reply, Request

HEAD: dict[str, Any] = {
    "id": "chatcmpl-upstream",
    "created": 1_800_000_000,
    "model": "org/m",
}
USAGE = {"prompt_tokens": 5, "completion_tokens": 7, "total_tokens": 12}


def error(message: str, code: int | str | None = None, kind: str = "BadRequestError") -> Any:
    return {"error": {"message": message, "type": kind, "param": None, "code": code}}


def chunk(delta: Any, finish: str | None = None) -> Any:
    choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}
    return {**HEAD, "object": "chat.completion.chunk", "choices": [choice]}


class OpenAiRig(Rig):
    kind = "openai"
    tasks = frozenset({Task.CHAT, Task.EMBEDDINGS})

    def backend(self, url: str, client: HttpClient) -> Backend:
        return OpenAiBackend("gpu", url, client, credential=Credential())

    def rung(self, task: Task) -> Rung:
        return Rung("gpu", "org/m")

    async def handle(self, request: Request, reply: Reply) -> None:
        if request.path == "/v1/models":
            entry = {"id": "org/m", "object": "model", "owned_by": "vllm", "max_model_len": 4096}
            await reply.json({"object": "list", "data": [entry]})
        elif await self.refuse(reply):
            return
        elif request.path == "/v1/embeddings":
            await self.embeddings(request, reply)
        elif request.json.get("stream"):
            await self.stream(request, reply)
        else:
            message = {"role": "assistant", "content": TEXT}
            choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": "stop"}
            answer = {**HEAD, "object": "chat.completion", "choices": [choice], "usage": USAGE}
            await reply.json(answer)

    async def refuse(self, reply: Reply) -> bool:
        """Play the scenarios that are a refusal; whether this was one."""
        match self.scenario:
            case Scenario.BUSY:
                await reply.json(error("slow down", 429), 429, {"retry-after": "7"})
            case Scenario.FAILED:
                await reply.json(error("it broke", 500), 500)
            case Scenario.HTML:
                await reply.whole(b"<html>bad gateway</html>", 502, {"content-type": "text/html"})
            case Scenario.REDIRECT:
                await reply.whole(b"", 302, {"location": "http://127.0.0.1:1/elsewhere"})
            case Scenario.UNAUTHORIZED:
                await reply.json(error("bad token", 401), 401)
            case Scenario.TOO_LONG:
                message = "This model's maximum context length is 4096 tokens."
                await reply.json(error(message, 400), 400)
            case Scenario.MISTAKE:
                await reply.json(error("temperature must be non-negative", 400), 400)
            case Scenario.NOT_JSON:
                await reply.whole(b"<html>hello</html>", 200, {"content-type": "text/html"})
            case _:
                return False
        return True

    async def stream(self, request: Request, reply: Reply) -> None:
        await reply.start()
        if self.scenario is Scenario.ERROR_FIRST:
            await reply.event(error("it broke", 500, "InternalServerError"))
            await reply.event(b"[DONE]")
            await reply.end()
            return
        await reply.event(chunk({"role": "assistant", "content": ""}))
        for piece in PIECES:
            await reply.event(chunk({"content": piece}))
            if self.scenario is Scenario.CUT:
                return reply.cut()
            if self.scenario is Scenario.ENDLESS:
                await reply.client_left()
                return reply.close()
        await reply.event(chunk({}, "stop"))
        if (request.json.get("stream_options") or {}).get("include_usage"):
            whole = {**HEAD, "object": "chat.completion.chunk", "choices": [], "usage": USAGE}
            await reply.event(whole)
        await reply.event(b"[DONE]")
        await reply.end()

    async def embeddings(self, request: Request, reply: Reply) -> None:
        inputs = request.json["input"]
        texts = [inputs] if isinstance(inputs, str) else inputs
        vectors = [vector_of(text) for text in texts]
        if self.scenario is Scenario.WRONG_COUNT:
            vectors.pop()
        as_text = request.json.get("encoding_format") == "base64"
        data = [
            {
                "object": "embedding",
                "index": index,
                "embedding": _base64(vector) if as_text else vector,
            }
            for index, vector in enumerate(vectors)
        ]
        usage = {"prompt_tokens": 3 * len(texts), "total_tokens": 3 * len(texts)}
        # Out of order on purpose: only `index` says which is which.
        answer = {"object": "list", "model": "org/m", "data": data[::-1], "usage": usage}
        await reply.json(answer)


def _base64(vector: list[float]) -> str:
    return base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()
