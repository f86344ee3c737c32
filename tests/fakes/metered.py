"""An upstream that bills: it counts every token that it read and produced, as a provider would.

It produces until it is done or sees that its caller left, and what it sent by then is on its bill.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import Any

from router.core import accounts
from router.types import Price
from tests.backends.rigs.openai import HEAD, chunk
from tests.fakes.upstream import Reply, Request

# Words of one token each, of several lengths.
WORDS = (" the", " a", " ladder", " of", " models", " is", " climbed", " from", " below")


@dataclass
class Metered:
    """`tokens`: what an answer has, unless `max_tokens` is obeyed and less. `pace`: tokens in a
    second; 0: as fast as they can be written. `joined`: tokens in one chunk. `reports`: whether it
    says what was used; `lies` is added to what it says. `heard`: by the `user` of a request, how
    many events its client has read; a token is made only once the one before was read, which is a
    pace that no busy machine changes.
    """

    tokens: int = 40
    pace: float = 0.0
    joined: int = 1
    obeys: bool = True
    reports: bool = True
    lies: int = 0
    tools: bool = False
    input_tokens: int = 0
    output_tokens: int = 0
    calls: int = 0
    cut: int = 0
    busy: int = 0
    bodies: list[Any] = field(default_factory=list)
    heard: dict[str, asyncio.Semaphore] = field(default_factory=dict)

    def bill(self, price: Price) -> int:
        """Nano-dollars so far; each call is rounded up by itself."""
        return accounts.cost(price, self.input_tokens, self.output_tokens)

    async def __call__(self, request: Request, reply: Reply) -> None:
        if request.path == "/v1/models":
            await reply.json({"object": "list", "data": [{"id": "org/m", "object": "model"}]})
            return
        body = request.json
        self.calls += 1
        self.bodies.append(body)
        prompt = prompt_tokens(body)
        self.input_tokens += prompt
        size = self.tokens
        asked = body.get("max_tokens") or body.get("max_completion_tokens")
        if self.obeys and asked is not None:
            size = min(size, asked)
        size *= body.get("n") or 1
        self.busy += 1
        try:
            if body.get("stream"):
                await self._stream(body, reply, prompt, size)
            else:
                await self._whole(reply, prompt, size)
        finally:
            self.busy -= 1

    async def _whole(self, reply: Reply, prompt: int, size: int) -> None:
        left = asyncio.create_task(reply.client_left())
        if self.pace:
            await asyncio.wait({left}, timeout=size / self.pace)
        self.cut += left.done()
        await _stop(left)
        # Whether anybody waits or not: most servers see to the end what is not streamed.
        self.output_tokens += size
        message = {"role": "assistant", "content": text_of(0, size)}
        choice = {"index": 0, "message": message, "finish_reason": "stop"}
        answer = {**HEAD, "object": "chat.completion", "choices": [choice]}
        if self.reports:
            answer["usage"] = self._usage(prompt, size)
        await reply.json(answer)

    async def _stream(self, body: Any, reply: Reply, prompt: int, size: int) -> None:
        choices = body.get("n") or 1
        left = asyncio.create_task(reply.client_left())
        made = 0
        try:
            await reply.start()
            await reply.event(chunk({"role": "assistant", "content": ""}))
            while made < size and not left.done():
                count = min(self.joined, size - made)
                payload = chunk(self._delta(made, count))
                payload["choices"][0]["index"] = made % choices
                await reply.event(payload)
                made += count
                await self._wait(left, count, self.heard.get(body.get("user", "")))
            if left.done():
                self.cut += 1
                reply.close()
                return
            for index in range(choices):
                payload = chunk({}, "stop")
                payload["choices"][0]["index"] = index
                await reply.event(payload)
            if self.reports and (body.get("stream_options") or {}).get("include_usage"):
                usage = self._usage(prompt, made)
                await reply.event({**chunk({}), "choices": [], "usage": usage})
            await reply.event(b"[DONE]")
            await reply.end()
        except ConnectionError:
            self.cut += 1
            raise
        finally:
            self.output_tokens += made
            await _stop(left)

    async def _wait(
        self, left: asyncio.Task[None], count: int, heard: asyncio.Semaphore | None
    ) -> None:
        if heard is not None:
            reading = asyncio.create_task(heard.acquire())
            await asyncio.wait({left, reading}, return_when=asyncio.FIRST_COMPLETED)
            reading.cancel()
        elif self.pace:
            await asyncio.wait({left}, timeout=count / self.pace)
        else:
            await asyncio.sleep(0)

    def _delta(self, made: int, count: int) -> Any:
        text = text_of(made, count)
        if not self.tools:
            return {"content": text}
        call = {"index": 0, "function": {"arguments": text}}
        if made == 0:
            call |= {"id": "call_1", "type": "function"}
            call["function"] = {"name": "note", "arguments": text}
        return {"tool_calls": [call]}

    def _usage(self, prompt: int, made: int) -> Any:
        made += self.lies
        return {
            "prompt_tokens": prompt,
            "completion_tokens": made,
            "total_tokens": prompt + made,
        }


async def _stop(left: asyncio.Task[None]) -> None:
    """Before the next request can be read."""
    left.cancel()
    await asyncio.wait({left})


def prompt_tokens(body: Any) -> int:
    """As this upstream's tokenizer has it: a template's words, and four characters a token."""
    return 11 + sum(len(str(one.get("content"))) // 4 for one in body["messages"])


def text_of(start: int, count: int) -> str:
    return "".join(WORDS[place % len(WORDS)] for place in range(start, start + count))
