"""The catalogue of faults: each on the first rung, with a healthy second one, streamed and not.

Whatever the first rung does, its client gets the exact answer once or one clean error; never a
truncated answer as success, never text twice, never a wait beyond the limits. `test_chat.py` has
the plain faults one by one; here is the one rule that holds for all of them.
"""

from __future__ import annotations

import asyncio
import time
from typing import Any

import orjson
import pytest
from openai import APIError, AsyncOpenAI

from tests.api.test_chat import (
    FAULTS,
    GOOD,
    HI,
    STREAM,
    STREAM_FAULTS,
    answering,
    playing,
    streamed,
)
from tests.backends.contract import TEXT
from tests.backends.rigs.openai import HEAD, chunk, error
from tests.fakes.upstream import FakeUpstream, Handler, Reply, Request
from tests.house import ladder_of, open_house

LIMITS = "connect_s = 0.3\nfirst_token_s = 0.4\nidle_s = 0.3\nanswer_s = 0.4\ntotal_s = 3"
HELLO = [chunk({"role": "assistant", "content": ""}), chunk({"content": "First "})]
REST = [chunk({"content": "rung."}), chunk({}, "stop"), b"[DONE]"]
WHOLE = "First rung."


def raw(*parts: bytes, sse: bool = True) -> Handler:
    async def handle(request: Request, reply: Reply) -> None:
        await reply.start(sse=sse)
        for part in parts:
            await reply.send(part)
        await reply.end()

    return handle


def frames(*payloads: Any) -> bytes:
    return b"".join(
        b"data: " + (one if isinstance(one, bytes) else orjson.dumps(one)) + b"\n\n"
        for one in payloads
    )


async def hang(request: Request, reply: Reply) -> None:
    await reply.client_left()
    reply.close()


async def drip_comments(request: Request, reply: Reply) -> None:
    """A byte now and then keeps a connection alive, but no client served."""
    await reply.start()
    while True:
        await reply.send(b": still here\n\n")
        await asyncio.sleep(0.02)


async def drip_after_content(request: Request, reply: Reply) -> None:
    await reply.start()
    await reply.send(frames(*HELLO))
    while True:
        await reply.send(b": still here\n\n")
        await asyncio.sleep(0.02)


async def half_open(request: Request, reply: Reply) -> None:
    """Content-Length promises more than comes, and the connection stays open."""
    await reply.raw(
        b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 999\r\n\r\n{"
    )
    await hang(request, reply)


CATALOGUE: dict[str, Handler] = {
    **FAULTS,
    **STREAM_FAULTS,
    "hanging before headers": hang,
    "half-open": half_open,
    "comments for ever": drip_comments,
    "content, then comments for ever": drip_after_content,
    "stalled after content": playing(HELLO, end="silent"),
    "cut after content": playing(HELLO, end="cut"),
    "closed cleanly after content": playing(HELLO),
    "error after content": playing([*HELLO, error("broke")]),
    "malformed line in the middle": raw(frames(*HELLO, b"{oops", *REST)),
    "HTML in the middle": raw(frames(*HELLO), b"<html>oops</html>\n\n", frames(*REST)),
    "5 MB line": raw(frames(*HELLO, {**chunk({"content": ""}), "pad": "x" * 5_000_000}, *REST)),
    "wrong content type": raw(frames(*HELLO, *REST), sse=False),
    "absurd usage": raw(frames(*HELLO, REST[0], REST[1], {**HEAD, "choices": [], "usage": {
        "prompt_tokens": -5, "completion_tokens": 1 << 62}}, b"[DONE]")),
    "usage of another shape": raw(frames(*HELLO, *REST[:2], {**HEAD, "choices": [], "usage": []})),
    "content filter": raw(frames(*HELLO, chunk({}, "content_filter"), b"[DONE]")),
    "no [DONE]": raw(frames(*HELLO, *REST[:2])),
    "text after [DONE]": raw(frames(*HELLO, *REST), frames(chunk({"content": "again"}))),
    "the answer twice": raw(frames(*HELLO, *REST), frames(*HELLO, *REST)),
    "JSON for a stream": answering(200, {"choices": [{"index": 0, "message": {"content": "x"},
                                                      "finish_reason": "stop"}]}),
    "empty body": answering(200, b"", {"content-type": "text/event-stream"}),
    "an odd status": answering(299, b"?"),
}  # fmt: skip


@pytest.mark.parametrize("fault", CATALOGUE)
async def test_streamed(fault: str) -> None:
    async with FakeUpstream(CATALOGUE[fault]) as bad, FakeUpstream(GOOD) as good:
        async with open_house(ladder_of(bad.url, good.url, ladder=LIMITS)) as house:
            began = time.monotonic()
            found, wire, _ = await streamed(house)
            assert time.monotonic() - began < 3.5
            text = text_of(found)
            if found[-1] == b"[DONE]":
                assert found.count(b"[DONE]") == 1
                assert text in ((TEXT, WHOLE) if fault != "content filter" else ("First ",))
                assert b"error" not in b"".join(found)
            else:
                last = orjson.loads(found[-1])
                assert set(last["error"]) >= {"message", "type", "param", "code"}
                assert [b"error" in one for one in found].count(True) == 1
                assert text == "First "
                assert good.requests == [], "after the commit nobody else is asked"
                assert wire.endswith(b"Error>"), "the connection closes without the last chunk"
            await house.idle()
            assert not house.shared.ledger.open
            assert bad.open_connections <= 1


WHOLE_FAULTS = [*FAULTS, "hanging before headers", "half-open", "empty body", "an odd status"]


@pytest.mark.parametrize("fault", WHOLE_FAULTS)
async def test_whole(fault: str) -> None:
    async with FakeUpstream(CATALOGUE[fault]) as bad, FakeUpstream(GOOD) as good:
        async with open_house(ladder_of(bad.url, good.url, ladder=LIMITS)) as house:
            began = time.monotonic()
            status, body, headers = await house.post("/v1/chat/completions", HI)
            assert time.monotonic() - began < 3.5
            assert status == 200
            assert body["choices"][0]["message"]["content"] == TEXT
            assert headers["x-rungway-rung"] == "b1/org/m"


@pytest.mark.parametrize("fault", [*FAULTS, "hanging before headers", "half-open"])
@pytest.mark.parametrize("stream", [False, True])
async def test_when_the_same_storm_hits_every_rung(fault: str, stream: bool) -> None:
    """One clean error with every reason, and an answer as soon as the storm is over."""
    calm = False

    async def storm(request: Request, reply: Reply) -> None:
        await (GOOD if calm else CATALOGUE[fault])(request, reply)

    async with FakeUpstream(storm) as one, FakeUpstream(storm) as two:
        async with open_house(ladder_of(one.url, two.url, ladder=LIMITS)) as house:
            body: Any = STREAM if stream else HI
            status, found, headers = await house.post("/v1/chat/completions", body)
            assert status in (400, 413, 429, 502, 504)
            assert [rung["rung"] for rung in found["error"]["rungs"]] == ["b0/org/m", "b1/org/m"]
            assert headers["x-should-retry"] == ("true" if status == 429 else "false")
            calm = True
            house.shared.board.reopen()
            assert (await house.post("/v1/chat/completions", HI))[0] == 200


def text_of(found: list[bytes]) -> str:
    text = ""
    for payload in found:
        if payload != b"[DONE]" and "choices" in (value := orjson.loads(payload)):
            for choice in value["choices"]:
                text += choice["delta"].get("content") or ""
    return text


@pytest.mark.parametrize(
    "fault", ["cut after content", "closed cleanly after content", "stalled after content"]
)
async def test_the_real_sdk_raises_what_we_say(fault: str) -> None:
    async with FakeUpstream(CATALOGUE[fault]) as bad:
        async with open_house(ladder_of(bad.url, ladder=LIMITS)) as house:
            async with AsyncOpenAI(base_url=f"{house.url}/v1", api_key="x", max_retries=0) as sdk:
                text = ""
                with pytest.raises(APIError) as caught:
                    async for one in await sdk.chat.completions.create(
                        model="chat", messages=[{"role": "user", "content": "Hi?"}], stream=True
                    ):
                        text += one.choices[0].delta.content or ""
                assert text == "First "
                assert caught.value.code in ("upstream_broken", "upstream_timeout")
