"""A scripted model on the fake upstream: it knows one answer to each question, token by token.

Asked with a last message of the assistant's it goes on with it, or does what worse servers do.
"""

from __future__ import annotations

import asyncio
import re
from dataclasses import dataclass, field
from typing import Any

from tests.fakes.upstream import Reply, Request

CANARIES = {
    "Count": ", ".join(map(str, range(1, 21))),
    "Name the days": "Monday, Tuesday, Wednesday, Thursday, Friday, Saturday, Sunday",
}
PROMPT_TOKENS = 10


@dataclass
class Engine:
    """`answers` by how a question begins; "" is any other. `manner` is how it takes a prefix:
    "continues", "anew" (says all of its answer again), "loses space", "refuses", "calls a tool".

    After `cut_after` tokens it breaks off in the way that `end` says, once the client has `heard`
    what came before where it `waits` for that.
    """

    answers: dict[str, str]
    manner: str = "continues"
    name: str = "engine"
    cut_after: int | None = None
    end: str = "cut"
    waits: bool = False
    heard: asyncio.Event = field(default_factory=asyncio.Event)
    reports_usage: bool = True
    asked: list[Any] = field(default_factory=list)

    async def handle(self, request: Request, reply: Reply) -> None:
        body = request.json
        question = next(m["content"] for m in body["messages"] if m["role"] == "user")
        is_canary = any(question.startswith(one) for one in CANARIES)
        if not is_canary:
            self.asked.append(body)
        prefix = body["messages"][-1]["content"] if "continue_final_message" in body else ""
        if prefix and self.manner == "refuses":
            message = "Cannot set `continue_final_message`"
            await reply.json({"error": {"message": message, "code": 400}}, 400)
            return
        text = self._rest(question, prefix)
        tokens = re.findall(r"\s*\S+|\s+$", text) if text else []
        await reply.start()
        await reply.event(self.chunk({"role": "assistant", "content": ""}))
        if prefix and self.manner == "calls a tool":
            await reply.event(self.chunk({"tool_calls": [{"index": 0, "id": "a"}]}))
        limit = body.get("max_tokens") or len(tokens) + 1
        stops = [body["stop"]] if isinstance(body.get("stop"), str) else body.get("stop") or []
        said, finish = "", "stop"
        for count, token in enumerate(tokens):
            if count == limit:
                finish = "length"
                break
            if not is_canary and count == self.cut_after:
                await self._break_off(reply)
                return
            said += token
            if any(stop in said for stop in stops):
                break
            await reply.event(self.chunk({"content": token}))
        else:
            if len(tokens) == limit:
                finish = "length"
        await reply.event(self.chunk({}, finish))
        if self.reports_usage:
            used = len(re.findall(r"\s*\S+", said))
            usage = {"prompt_tokens": PROMPT_TOKENS, "completion_tokens": used, "total_tokens": 0}
            await reply.event({**self.chunk({}), "choices": [], "usage": usage})
        await reply.event(b"[DONE]")
        await reply.end()

    async def _break_off(self, reply: Reply) -> None:
        if self.waits:
            await self.heard.wait()
        if self.end == "cut":
            reply.cut()
        elif self.end == "clean":
            await reply.end()
        elif self.end == "silent":
            await reply.client_left()
            reply.close()
        elif self.end == "error":
            await reply.event({"error": {"message": "CUDA out of memory", "code": 500}})
            await reply.end()
        elif self.end == "malformed":
            await reply.event(b'{"choices": [{"index"')
            await reply.end()
        else:
            await reply.event(self.chunk({}, "abort"))
            await reply.end()

    def _rest(self, question: str, prefix: str) -> str:
        known = {**CANARIES, **self.answers}
        answer = next((a for q, a in known.items() if q and question.startswith(q)), "")
        answer = answer or known.get("", "")
        if not prefix or self.manner == "anew":
            return answer
        # As templates do, it takes no notice of white space at the prefix's ends.
        rest = answer.removeprefix(prefix.strip())
        return rest.lstrip() if self.manner == "loses space" else rest

    def chunk(self, delta: Any, finish: str | None = None) -> Any:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}
        head = {"id": f"chatcmpl-{self.name}", "object": "chat.completion.chunk"}
        return {**head, "created": len(self.name), "model": self.name, "choices": [choice]}
