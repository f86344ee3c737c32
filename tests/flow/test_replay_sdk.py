"""To the real SDK a replayed stream says the same as the live one that it was kept from."""

from __future__ import annotations

from typing import Any

import orjson
import pytest
from openai import AsyncOpenAI

from router.core import sse
from router.core.replay import payloads_of, whole_of
from tests.fakes.upstream import FakeUpstream, Reply, Request

HEAD = {"id": "chatcmpl-7", "object": "chat.completion.chunk", "created": 1, "model": "org/m"}
LOGPROB = {"token": "Hel", "logprob": -0.1, "bytes": [72], "top_logprobs": []}
USAGE = {"prompt_tokens": 9, "completion_tokens": 4, "total_tokens": 13}


def chunk(delta: Any, finish: str | None = None, logprobs: Any = None, index: int = 0) -> Any:
    choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish}
    return {**HEAD, "choices": [choice], "usage": None}


def call(index: int, **fields: Any) -> Any:
    return chunk({"tool_calls": [{"index": index, **fields}]})


ROLE = chunk({"role": "assistant", "content": "", "refusal": None})
LIVE = {
    "text, reasoning and logprobs": [
        ROLE,
        chunk({"reasoning_content": "hm", "reasoning": "hm"}),
        chunk({"content": "Hel"}, logprobs={"content": [LOGPROB], "refusal": None}),
        chunk({"content": "lo 🎈 " * 60}),
        chunk({}, "stop"),
    ],
    "two tools": [
        chunk({"role": "assistant", "content": None}),
        call(0, id="a", type="function", function={"name": "f", "arguments": ""}),
        call(0, function={"arguments": '{"x":'}),
        call(0, function={"arguments": "1}"}),
        call(1, id="b", type="function", function={"name": "g", "arguments": ""}),
        call(1, function={"arguments": "{}"}),
        chunk({}, "tool_calls"),
    ],
    "a refusal": [ROLE, chunk({"refusal": "I can"}), chunk({"refusal": "not."}), chunk({}, "stop")],
    "two choices": [
        ROLE,
        chunk({"role": "assistant", "content": "b"}, index=1),
        chunk({"content": "a"}),
        chunk({}, "stop", index=1),
        chunk({}, "stop"),
    ],
}


async def sdk_gathers(payloads: list[bytes]) -> Any:
    """What `.stream()` makes of these events, from a server on a real socket."""

    async def serve(_: Request, reply: Reply) -> None:
        await reply.start()
        await reply.send(b"".join(map(sse.frame, payloads)) + sse.DONE_FRAME)
        await reply.end()

    async with (
        FakeUpstream(serve) as server,
        AsyncOpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0) as client,
        client.chat.completions.stream(
            model="m", messages=[], stream_options={"include_usage": True}
        ) as stream,
    ):
        async for event in stream:
            assert event.type
        return (await stream.get_final_completion()).to_dict()


@pytest.mark.parametrize("name", LIVE)
async def test_live_and_replayed_are_one_to_the_sdk(name: str) -> None:
    live = [orjson.dumps(one) for one in [*LIVE[name], {**HEAD, "choices": [], "usage": USAGE}]]
    kept = whole_of(live)
    assert kept is not None
    replayed = payloads_of(kept, include_usage=True)
    assert replayed != live, "the pieces are ours"
    assert await sdk_gathers(replayed) == await sdk_gathers(live)
