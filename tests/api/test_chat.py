"""Chat through the whole house: bytes kept, rungs changed before the commit, honest ends after."""

from __future__ import annotations

import asyncio
import re
from typing import Any

import orjson
import pytest

from tests.backends.rigs.openai import HEAD, USAGE, OpenAiRig, chunk, error
from tests.fakes.upstream import FakeUpstream, Handler, Reply, Request
from tests.house import House, ladder_of, open_house

HI = {"model": "chat", "messages": [{"role": "user", "content": "Hi?"}]}
STREAM = {**HI, "stream": True}
TOOL = {"tool_calls": [{"index": 0, "function": {"arguments": '{"a'}}]}


async def streamed(house: House, body: Any = STREAM) -> tuple[list[bytes], bytes, dict[str, str]]:
    """The payloads of a streamed answer, its raw bytes and its headers."""
    async with house.client.post(f"{house.url}/v1/chat/completions", json=body) as answer:
        raw = b""
        try:
            async for data in answer.content.iter_any():
                raw += data
        except Exception as cut:
            raw += f"<{type(cut).__name__}>".encode()
        return re.findall(rb"data: (.*)\n\n", raw), raw, dict(answer.headers)


def playing(payloads: list[Any], *, end: str = "clean") -> Handler:
    """An upstream that streams these payloads, then ends cleanly, is cut, or stays silent."""

    async def handle(request: Request, reply: Reply) -> None:
        await reply.start()
        for payload in payloads:
            await reply.event(payload)
        if end == "cut":
            reply.cut()
        elif end == "silent":
            await reply.client_left()
            reply.close()
        else:
            await reply.end()

    return handle


def answering(status: int, body: Any, headers: dict[str, str] | None = None) -> Handler:
    async def handle(request: Request, reply: Reply) -> None:
        if isinstance(body, bytes):
            await reply.whole(body, status, headers)
        else:
            await reply.json(body, status, headers)

    return handle


GOOD = OpenAiRig().handle


async def test_a_whole_answer_keeps_its_bytes() -> None:
    raw = (
        b'{"id":"x", "object":"chat.completion","created":1,"model":"m","odd":[1.0, 1e2],'
        b'"choices":[{"index":0,"message":{"role":"assistant","content":"\xc3\xb6"},'
        b'"finish_reason":"stop"}]}'
    )
    async with (
        FakeUpstream(answering(200, raw, {"content-type": "application/json"})) as up,
        open_house(ladder_of(up.url)) as house,
    ):
        async with house.client.post(f"{house.url}/v1/chat/completions", json=HI) as answer:
            assert await answer.read() == raw
            assert answer.headers["x-rungway-rung"] == "b0/org/m"
            assert answer.headers["x-rungway-attempts"] == "1"
            assert answer.headers["content-type"] == "application/json"


async def test_every_payload_of_a_stream_keeps_its_bytes() -> None:
    payloads = [
        b'{"id":"a","choices":[{"index":0,"delta":{"role":"assistant"},"finish_reason":null}]}',
        b'{"id":"a", "x":1.0,"choices":[{"index":0,"delta":{"content":"\xc3\xb6 \\u00f6"}}]}',
        orjson.dumps({**chunk(TOOL), "unknown": {"deep": [1]}}),
        orjson.dumps(chunk({}, "tool_calls")),
    ]
    async with FakeUpstream(playing([*payloads, b"[DONE]"])) as up:
        async with open_house(ladder_of(up.url)) as house:
            found, raw, headers = await streamed(house)
    assert found == [*payloads, b"[DONE]"]
    assert raw.endswith(b"data: [DONE]\n\n")
    assert headers["Content-Type"] == "text/event-stream"
    assert "Content-Length" not in headers


async def test_usage_asked_for_on_our_own_account_is_taken_out_again() -> None:
    async with FakeUpstream(GOOD) as up, open_house(ladder_of(up.url)) as house:
        without, _, _ = await streamed(house)
        asked = {**STREAM, "stream_options": {"include_usage": True}}
        wanted, _, _ = await streamed(house, asked)
        assert up.last.json["stream_options"] == {"include_usage": True}
        assert [line["output_tokens"] for line in house.lines] == [USAGE["completion_tokens"]] * 2
    assert not any(b'"choices":[]' in payload for payload in without)
    assert b'"choices":[]' in wanted[-2]
    assert len(wanted) == len(without) + 1


FAULTS: dict[str, Handler] = {
    "429": answering(429, error("slow down"), {"retry-after": "7"}),
    "429 plain": answering(429, {"error": "Model is overloaded", "error_type": "overloaded"}),
    "500": answering(500, error("broke")),
    "502 HTML": answering(502, b"<html>bad</html>", {"content-type": "text/html"}),
    "503 empty": answering(503, b""),
    "401 of our token": answering(401, error("bad token")),
    "402": answering(402, {"error": "You have exceeded your monthly included credits"}),
    "403": answering(403, {"error": "insufficient permissions"}),
    "404": answering(404, error("no such model")),
    "413": answering(413, error("too large")),
    "424": answering(424, {"error": "Request failed", "error_type": "generation"}),
    "302": answering(302, b"", {"location": "http://127.0.0.1:1/"}),
    "too long": answering(400, error("This model's maximum context length is 4 tokens")),
    "model_not_supported": answering(
        400, {"error": {"message": "not supported", "code": "model_not_supported"}}
    ),
    "200 HTML": answering(200, b"<html>hello</html>", {"content-type": "text/html"}),
    "200 error": answering(200, error("broke")),
}
STREAM_FAULTS: dict[str, Handler] = {
    "error first": playing([error("broke")]),
    "error after a role chunk": playing([chunk({"role": "assistant"}), error("broke")]),
    "empty stream": playing([]),
    "only DONE": playing([b"[DONE]"]),
    "only a role chunk": playing([chunk({"role": "assistant", "content": ""})]),
    "cut before content": playing([chunk({"role": "assistant"})], end="cut"),
    "not JSON": playing([b"hello"]),
    "not a chunk": playing([{"hello": 1}]),
    "old vLLM error": playing([{"object": "error", "message": "broke", "code": 500}]),
    "overloaded TGI": playing([{"error": {"message": "Model is overloaded"}}, b"[DONE]"]),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("stream", [False, True])
async def test_a_fault_before_the_commit_moves_to_the_next_rung(fault: str, stream: bool) -> None:
    async with FakeUpstream(FAULTS[fault]) as bad, FakeUpstream(GOOD) as good:
        async with open_house(ladder_of(bad.url, good.url)) as house:
            if stream:
                found, _, headers = await streamed(house)
                assert found[-1] == b"[DONE]"
                assert headers["x-rungway-rung"] == "b1/org/m"
            else:
                status, body, plain = await house.post("/v1/chat/completions", HI)
                assert status == 200
                assert body["id"] == HEAD["id"]
                assert plain["x-rungway-attempts"] == "2"
            assert len(bad.requests) == 1
            assert [a["cause"] == "ok" for a in house.lines[0]["attempts"]] == [False, True]


@pytest.mark.parametrize("fault", STREAM_FAULTS)
async def test_a_fault_inside_a_stream_before_content_moves_on(fault: str) -> None:
    async with FakeUpstream(STREAM_FAULTS[fault]) as bad, FakeUpstream(GOOD) as good:
        async with open_house(ladder_of(bad.url, good.url)) as house:
            found, raw, _ = await streamed(house)
            assert found[-1] == b"[DONE]"
            assert raw.count(b'"role"') == 1, "the failed rung's role chunk was withheld"


async def test_refused_connections_and_time_limits_move_on() -> None:
    async with FakeUpstream(playing([], end="silent")) as silent, FakeUpstream(GOOD) as good:
        text = ladder_of(
            "http://127.0.0.1:1", silent.url, good.url, ladder="first_token_s = 0.2\nanswer_s = 0.2"
        )
        async with open_house(text) as house:
            found, _, headers = await streamed(house)
            assert found[-1] == b"[DONE]"
            assert headers["x-rungway-attempts"] == "3"
            causes = [attempt["cause"] for attempt in house.lines[0]["attempts"]]
            assert causes == ["connect", "timeout_first_token", "ok"]
            assert (await house.post("/v1/chat/completions", HI))[2]["x-rungway-attempts"] == "3"


@pytest.mark.parametrize(
    ("end", "cause"), [("cut", "broken"), ("clean", "broken"), ("silent", "timeout_idle")]
)
async def test_after_the_commit_a_broken_stream_ends_in_one_error_and_no_done(
    end: str, cause: str
) -> None:
    text = [chunk({"role": "assistant"}), chunk({"content": "Hel"})]
    async with FakeUpstream(playing(text, end=end)) as bad, FakeUpstream(GOOD) as good:
        async with open_house(ladder_of(bad.url, good.url, ladder="idle_s = 0.2")) as house:
            found, raw, _ = await streamed(house)
            assert len(good.requests) == 0, "no other rung after the commit"
            assert b'"content":"Hel"' in found[1]
            assert "error" in orjson.loads(found[2])
            assert len(found) == 3
            assert b"[DONE]" not in raw
            assert raw.endswith(b"Error>"), "the connection closes without the last chunk"
            await house.idle()
            assert house.lines[0]["error"] == cause
            assert house.lines[0]["output_tokens"] == 1
            assert house.lines[0]["estimated"]


async def test_an_error_in_the_same_read_as_the_first_content_still_moves_on() -> None:
    async def both(request: Request, reply: Reply) -> None:
        await reply.start()
        frames = [chunk({"content": "Hel"}), error("broke")]
        await reply.send(b"".join(b"data: " + orjson.dumps(one) + b"\n\n" for one in frames))
        await reply.end()

    async with FakeUpstream(both) as bad, FakeUpstream(GOOD) as good:
        async with open_house(ladder_of(bad.url, good.url)) as house:
            found, raw, _ = await streamed(house)
            assert found[-1] == b"[DONE]"
            assert b'"Hel"' not in raw


async def test_complete_without_done_is_complete() -> None:
    payloads = [chunk({"content": "Hi"}), chunk({}, "stop")]
    async with FakeUpstream(playing(payloads)) as up, open_house(ladder_of(up.url)) as house:
        found, _, _ = await streamed(house)
        assert found[-1] == b"[DONE]"
        assert house.lines[0]["error"] is None


async def test_usage_that_no_upstream_reports_is_estimated_for_who_asked() -> None:
    payloads = [chunk({"content": "Hi there you"}), chunk({}, "stop"), b"[DONE]"]
    asked = {**STREAM, "stream_options": {"include_usage": True}}
    async with FakeUpstream(playing(payloads)) as up, open_house(ladder_of(up.url)) as house:
        found, _, _ = await streamed(house, asked)
        last = orjson.loads(found[-2])
        assert last["choices"] == []
        assert last["usage"]["completion_tokens"] == 3
        assert last["id"] == HEAD["id"]
        assert len((await streamed(house))[0]) == 3


async def test_a_callers_mistake_keeps_its_status_and_tries_no_other_rung() -> None:
    async with FakeUpstream(answering(400, error("temperature must be >= 0"))) as bad:
        async with FakeUpstream(GOOD) as good, open_house(ladder_of(bad.url, good.url)) as house:
            status, body, headers = await house.post("/v1/chat/completions", HI)
            assert status == 400
            assert "temperature must be >= 0" in body["error"]["message"]
            assert headers["x-rungway-origin"] == "upstream"
            assert headers["x-should-retry"] == "false"
            assert good.requests == []


async def test_when_no_rung_is_left_each_reason_is_told() -> None:
    busy = answering(429, error("slow down"), {"retry-after": "7"})
    async with FakeUpstream(busy) as up:
        text = ladder_of("http://127.0.0.1:1", up.url)
        async with open_house(text) as house:
            status, body, headers = await house.post("/v1/chat/completions", HI)
            assert status == 429
            assert headers["retry-after"] == "7"
            assert [rung["rung"] for rung in body["error"]["rungs"]] == ["b0/org/m", "b1/org/m"]
            assert "slow down" in body["error"]["rungs"][1]["reason"]
            again, _, _ = await house.post("/v1/chat/completions", HI)
            assert again == 429
            assert len(up.requests) == 1, "Retry-After is obeyed"


async def test_a_client_that_leaves_cancels_the_upstream() -> None:
    text = [chunk({"role": "assistant"}), chunk({"content": "Hel"})]
    async with FakeUpstream(playing(text, end="silent")) as up:
        async with open_house(ladder_of(up.url)) as house:
            answer = await house.client.post(f"{house.url}/v1/chat/completions", json=STREAM)
            await answer.content.readany()
            up.left.clear()
            answer.close()
            async with asyncio.timeout(2):
                await up.left.wait()
            await house.idle()
            assert house.lines[0]["error"] == "client_left"
            assert not house.shared.ledger.open


async def test_a_client_that_leaves_a_whole_call_cancels_the_upstream() -> None:
    arrived = asyncio.Event()

    async def hang(request: Request, reply: Reply) -> None:
        arrived.set()
        await reply.client_left()
        reply.close()

    async with FakeUpstream(hang) as up, open_house(ladder_of(up.url)) as house:
        call = asyncio.ensure_future(house.post("/v1/chat/completions", HI))
        await arrived.wait()
        up.left.clear()
        call.cancel()
        async with asyncio.timeout(2):
            await up.left.wait()
        await house.idle()
        assert house.lines[0]["status"] == 499


async def test_a_client_that_does_not_read_stops_the_upstream() -> None:
    """Backpressure: a slow client makes neither us nor the upstream buffer without bound."""
    sent = 0
    big = orjson.dumps(chunk({"content": "x" * 60_000}))

    async def flood(request: Request, reply: Reply) -> None:
        nonlocal sent
        await reply.start()
        while True:
            await reply.event(big)
            sent += len(big)

    async with FakeUpstream(flood) as up, open_house(ladder_of(up.url)) as house:
        reader, writer = await asyncio.open_connection(*house.url[7:].split(":"), limit=1024)
        body = orjson.dumps(STREAM)
        head = (
            f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\ncontent-length: {len(body)}"
        )
        writer.write(head.encode() + b"\r\n\r\n" + body)
        before = -1
        async with asyncio.timeout(20):
            while sent != before:
                before = sent
                await asyncio.sleep(0.3)
        assert 0 < sent < 40 << 20
        writer.transport.abort()


async def test_a_waiting_stream_gets_comments() -> None:
    async def slow(request: Request, reply: Reply) -> None:
        await reply.start()
        await asyncio.sleep(0.5)
        await reply.event(chunk({"content": "Hi"}, "stop"))
        await reply.event(b"[DONE]")
        await reply.end()

    async with FakeUpstream(slow) as up:
        async with open_house(ladder_of(up.url, server="keepalive_s = 0.1")) as house:
            found, raw, _ = await streamed(house)
    assert raw.startswith(b": keep-alive\n\n")
    assert len(found) == 2


async def test_a_failure_after_comments_is_an_event_of_the_stream() -> None:
    async def slow(request: Request, reply: Reply) -> None:
        await asyncio.sleep(0.3)
        await reply.json(error("broke"), 500)

    async with FakeUpstream(slow) as up:
        async with open_house(ladder_of(up.url, server="keepalive_s = 0.1")) as house:
            found, raw, _ = await streamed(house)
    assert raw.startswith(b": keep-alive\n\n")
    assert orjson.loads(found[-1])["error"]["code"] == "no_rung_left"
    assert b"[DONE]" not in raw


@pytest.mark.parametrize("model", ["chat", "gpt-4o-mini", "dummy", "tgi", None, "http://h/v1"])
async def test_the_upstream_is_told_its_own_model(model: str | None) -> None:
    async with FakeUpstream(GOOD) as up, open_house(ladder_of(up.url)) as house:
        await house.post("/chat/completions/", {**HI, "model": model})
        assert up.last.json["model"] == "org/m"
        assert next(iter(up.last.json)) == "model"
        assert "authorization" not in up.last.headers


async def test_nothing_of_the_clients_headers_goes_upstream() -> None:
    async with FakeUpstream(GOOD) as up, open_house(ladder_of(up.url)) as house:
        headers = {"Authorization": "Bearer secret", "X-Odd": "1", "Cookie": "a=b"}
        await house.post("/v1/chat/completions", HI, headers)
        assert set(up.last.headers) <= {
            "host", "accept", "accept-encoding", "content-type", "content-length",
        }  # fmt: skip
        assert up.last.headers["accept-encoding"] == "identity"


async def test_unknown_fields_and_nulls_reach_the_upstream() -> None:
    async with FakeUpstream(GOOD) as up, open_house(ladder_of(up.url)) as house:
        extra = {"top_k": 7, "chat_template_kwargs": {"a": None}, "seed": None}
        await house.post("/v1/chat/completions", {**HI, **extra})
        sent = up.last.json
        assert {name: sent[name] for name in extra} == extra
