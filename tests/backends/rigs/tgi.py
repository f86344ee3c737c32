"""TGI's wire with its traps: refusals inside a 200, empty ids, its own finish reasons.

It refuses with a 422 what a real TGI cannot deserialise, so a translation that forgets something
fails every scenario.
"""

from __future__ import annotations

from typing import Any

import orjson

from router.backends.base import Backend
from router.backends.tgi import TgiBackend
from router.config.secrets import Credential
from router.transport.http import HttpClient
from router.types import Rung, Task
from tests.backends.contract import PIECES, TEXT, Rig, Scenario
from tests.fakes.upstream import Reply, Request

MODEL = "org/m"
USAGE = {"prompt_tokens": 5, "completion_tokens": 7, "total_tokens": 12}
INFO = {
    "model_id": MODEL,
    "model_sha": None,
    "max_concurrent_requests": 128,
    "max_stop_sequences": 4,
    "max_input_tokens": 4095,
    "max_total_tokens": 4096,
    "max_client_batch_size": 4,
    "router": "text-generation-router",
    "version": "3.3.6-dev0",
}
TOO_LONG = (
    "Input validation error: `inputs` tokens + `max_new_tokens` must be <= 4096. "
    "Given: 5000 `inputs` tokens and 100 `max_new_tokens`"
)
# Scenario: status, error_type and text of an answer; in a stream only the text is there.
COMPLAINTS = {
    Scenario.BUSY: (429, "overloaded", "Model is overloaded"),
    Scenario.FAILED: (424, "generation", "Request failed during generation: CUDA out of memory"),
    Scenario.ERROR_FIRST: (424, "generation", "Request failed during generation: it broke"),
    Scenario.TOO_LONG: (422, "validation", TOO_LONG),
    Scenario.MISTAKE: (
        422,
        "validation",
        "Input validation error: `temperature` must be strictly positive",
    ),
}
TOOL_FRAGMENTS = ['{"city"', ': "Paris"', "}"]


class TgiRig(Rig):
    kind = "tgi"
    # No embeddings; and every scenario of a chat has its words here.
    plays = frozenset(Scenario) - {Scenario.WRONG_COUNT}

    def __init__(self) -> None:
        super().__init__()
        self.calls_tool = False

    def backend(self, url: str, client: HttpClient) -> Backend:
        return TgiBackend("gpu", url, client, credential=Credential())

    def rung(self, task: Task) -> Rung:
        return Rung("gpu", MODEL)

    async def handle(self, request: Request, reply: Reply) -> None:
        if request.path == "/info":
            await reply.json(INFO)
        elif request.path == "/health":
            await reply.whole(b"")
        elif request.path != "/v1/chat/completions":
            await reply.whole(b"", 404)
        elif not await self.refuse(reply):
            if (fault := fault_in(request.json)) is not None:
                await reply.whole(fault.encode(), 422, {"content-type": "text/plain"})
            elif request.json.get("stream"):
                await self.stream(request, reply)
            else:
                await self.whole(reply)

    async def refuse(self, reply: Reply) -> bool:
        """What a proxy before it, its key or a wrong server there answers; whether it did."""
        match self.scenario:
            case Scenario.HTML:
                await reply.whole(b"<html>bad gateway</html>", 502, {"content-type": "text/html"})
            case Scenario.REDIRECT:
                await reply.whole(b"", 302, {"location": "http://127.0.0.1:1/elsewhere"})
            case Scenario.UNAUTHORIZED:
                await reply.whole(b"", 401)
            case Scenario.NOT_JSON:
                await reply.whole(b"<html>hello</html>", 200, {"content-type": "text/html"})
            case _:
                return False
        return True

    async def whole(self, reply: Reply) -> None:
        if self.scenario in COMPLAINTS:
            status, kind, text = COMPLAINTS[self.scenario]
            return await reply.json({"error": text, "error_type": kind}, status)
        message: dict[str, Any] = {"role": "assistant", "content": TEXT}
        if self.calls_tool:
            arguments = "".join(TOOL_FRAGMENTS)
            function = {"description": None, "name": "weather", "arguments": arguments}
            call = {"id": "0", "type": "function", "function": function}
            message = {"role": "assistant", "tool_calls": [call]}
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": "stop"}
        headers = {"x-compute-type": "gpu+optimized", "x-total-time": "12"}
        await reply.json({**top("chat.completion", [choice]), "usage": USAGE}, headers=headers)

    async def stream(self, request: Request, reply: Reply) -> None:
        """The 200 goes out before the permit is asked for and the lengths are looked at."""
        await reply.start(headers={"x-accel-buffering": "no"})
        if self.scenario in COMPLAINTS:
            text = COMPLAINTS[self.scenario][2]
            await reply.event({"error": {"message": text, "http_status_code": 422}})
            await reply.event(b"[DONE]")
            return await reply.end()
        pieces = TOOL_FRAGMENTS if self.calls_tool else PIECES
        for position, piece in enumerate(pieces):
            delta = self.tool_delta(piece, position) if self.calls_tool else text_delta(piece)
            await reply.event(chunk(delta))
            if self.scenario is Scenario.CUT:
                return reply.cut()
            if self.scenario is Scenario.ENDLESS:
                await reply.client_left()
                return reply.close()
        if not self.calls_tool:
            await reply.event(chunk(text_delta(""), "stop_sequence"))
        await reply.send(b":\n\n")
        if (request.json.get("stream_options") or {}).get("include_usage"):
            await reply.event({**top("chat.completion.chunk", []), "usage": USAGE})
        await reply.event(b"[DONE]")
        await reply.end()

    @staticmethod
    def tool_delta(arguments: str, position: int) -> Any:
        function = {"name": None if position else "weather", "arguments": arguments}
        call = {"index": 0, "id": "0", "type": "function", "function": function}
        return {"role": "assistant", "tool_calls": [call]}


def top(kind: str, choices: list[Any]) -> dict[str, Any]:
    return {
        "object": kind,
        "id": "",
        "created": 1_800_000_000,
        "model": MODEL,
        "system_fingerprint": "3.3.6-dev0-native",
        "choices": choices,
    }


def text_delta(piece: str) -> Any:
    return {"role": "assistant", "content": piece}


def chunk(delta: Any, finish: str | None = None) -> Any:
    choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}
    return {**top("chat.completion.chunk", [choice]), "usage": None}


def fault_in(body: Any) -> str | None:
    """What TGI's typed fields refuse, as far as OpenAI's clients send it."""
    form = body.get("response_format")
    faults = {
        "stream_options": "stream_options" in body and body["stream_options"] is None,
        "stop": isinstance(body.get("stop"), str),
        "logit_bias": isinstance(body.get("logit_bias"), dict),
        "max_tokens": "max_tokens" in body and "max_completion_tokens" in body,
        "top_p": body.get("top_p") is not None and not 0 < body["top_p"] < 1,
        "seed": (body.get("seed") or 0) < 0,
        "response_format": form is not None and "value" not in form,
        "tools": body.get("tools") is not None and form is not None,
        "messages": any(
            message.get("content") is None and not message.get("tool_calls")
            for message in body["messages"]
        ),
    }
    for name, is_wrong in faults.items():
        if is_wrong:
            given = orjson.dumps(body.get(name)).decode()
            return f"Failed to deserialize the JSON body: {name}: invalid value {given}"
    return None
