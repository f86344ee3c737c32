"""An upstream whose answers are a function of what it was asked, and that counts how often it was.

Vectors depend on the text, the dimensions and the `generation`, so that a wrong one shows.
"""

from __future__ import annotations

import asyncio
import hashlib
from typing import Any

from router.core import vectors
from tests.fakes.upstream import Reply, Request

WIDTH = 8


def floats_of(text: str, width: int = WIDTH, generation: int = 0) -> list[float]:
    """The vector that only this text has; each value is exact in float32."""
    digest = hashlib.sha256(f"{generation} {text}".encode()).digest()
    return vectors.unpack(vectors.pack([byte / 256 for byte in digest[:width]]))


def words_of(body: Any) -> str:
    """What is answered: only the same question has the same words."""
    asked = {name: body.get(name) for name in ("messages", "seed", "temperature", "tools")}
    return "It is " + hashlib.sha256(repr(asked).encode()).hexdigest() + ", I think."


class Counting:
    """`may_answer` is waited for; `status` other than 200 is a failure; `turns` of the loop lie
    between a stream's events, which else arrive together."""

    def __init__(self) -> None:
        self.chats: list[Any] = []
        self.embeds: list[list[str]] = []
        self.may_answer = asyncio.Event()
        self.may_answer.set()
        self.arrived = asyncio.Event()
        self.left = 0
        self.status = 200
        self.width = WIDTH
        self.generation = 0
        self.finish = "stop"
        self.cuts = False
        self.turns = 0
        self.reports = True
        self.revision: str | None = None
        self.repository = "org/m"

    @property
    def inputs(self) -> list[str]:
        return [text for request in self.embeds for text in request]

    async def __call__(self, request: Request, reply: Reply) -> None:
        if request.path == "/info":
            await reply.json(
                {
                    "model_id": self.repository,
                    "model_sha": self.revision,
                    "model_type": {"embedding": {"pooling": "cls"}},
                    "max_concurrent_requests": 512,
                    "max_client_batch_size": 32,
                }
            )
            return
        if request.method == "GET":
            await reply.json({"object": "list", "data": [{"id": "org/m", "object": "model"}]})
            return
        body = request.json
        is_chat = request.path.endswith("/chat/completions")
        if is_chat:
            self.chats.append(body)
        else:
            self.embeds.append(body["input"])
        self.arrived.set()
        if not self.may_answer.is_set() and await self._left(reply):
            return
        if self.status != 200:
            await reply.json({"error": {"message": "no", "code": self.status}}, self.status)
        elif not is_chat:
            await self._embed(body, reply)
        elif body.get("stream"):
            await self._stream(body, reply)
        else:
            await self._whole(body, reply)

    async def _left(self, reply: Reply) -> bool:
        """Whether the caller left before the answer was allowed."""
        leaving = asyncio.create_task(reply.client_left())
        allowed = asyncio.create_task(self.may_answer.wait())
        await asyncio.wait({leaving, allowed}, return_when=asyncio.FIRST_COMPLETED)
        has_left = leaving.done()
        for task in (leaving, allowed):
            task.cancel()
        await asyncio.gather(leaving, allowed, return_exceptions=True)
        if has_left:
            self.left += 1
            reply.close()
        return has_left

    async def _embed(self, body: Any, reply: Reply) -> None:
        width = body.get("dimensions") or self.width
        data = [
            {
                "object": "embedding",
                "index": index,
                "embedding": floats_of(text, width, self.generation),
            }
            for index, text in enumerate(body["input"])
        ]
        tokens = 3 * len(data)
        usage = {"prompt_tokens": tokens, "total_tokens": tokens}
        await reply.json({"object": "list", "data": data, "model": "m", "usage": usage})

    async def _whole(self, body: Any, reply: Reply) -> None:
        message = {"role": "assistant", "content": words_of(body), "reasoning": "Hm."}
        choices = [
            {"index": index, "message": message, "logprobs": None, "finish_reason": self.finish}
            for index in range(body.get("n") or 1)
        ]
        answer = {**_HEAD, "object": "chat.completion", "choices": choices}
        await reply.json({**answer, "usage": _USAGE} if self.reports else answer)

    async def _stream(self, body: Any, reply: Reply) -> None:
        words = words_of(body)
        deltas: list[Any] = [{"role": "assistant", "content": ""}, {"reasoning": "Hm."}]
        deltas += [{"content": words[at : at + 20]} for at in range(0, len(words), 20)]
        await reply.start()
        for delta in deltas:
            await reply.event(_chunk(delta, None))
            for _ in range(self.turns):
                await asyncio.sleep(0)
        if self.cuts:
            reply.cut()
            return
        await reply.event(_chunk({}, self.finish))
        options = body.get("stream_options") or {}
        if options.get("include_usage") and self.reports:
            await reply.event({**_CHUNK, "choices": [], "usage": _USAGE})
        await reply.event(b"[DONE]")
        await reply.end()


_HEAD: dict[str, Any] = {"id": "chatcmpl-up", "created": 1_800_000_000, "model": "org/m"}
_CHUNK = {**_HEAD, "object": "chat.completion.chunk"}
_USAGE = {"prompt_tokens": 5, "completion_tokens": 7, "total_tokens": 12}


def _chunk(delta: Any, finish: str | None) -> Any:
    choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}
    return {**_CHUNK, "choices": [choice]}
