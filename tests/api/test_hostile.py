"""What a hostile or broken client or upstream tried once, and must not get away with again."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import orjson
import pytest

from tests.api.test_chat import GOOD, HI, STREAM, answering, playing, streamed
from tests.backends.rigs.openai import chunk, error
from tests.fakes.upstream import FakeUpstream, Handler, Reply, Request
from tests.house import House, ladder_of, open_house

DEEP = b"[" * 600 + b"]" * 600


async def wire(house: House, data: bytes, *, until: bytes = b"") -> bytes:
    """What comes back on a raw connection: up to `until`, else to the server's close."""
    reader, writer = await asyncio.open_connection(*house.url[7:].split(":"))
    writer.write(data)
    try:
        async with asyncio.timeout(10):
            return await (reader.readuntil(until) if until else reader.read())
    finally:
        writer.transport.abort()


def request(body: Any, *headers: bytes, version: bytes = b"1.1") -> bytes:
    raw = body if isinstance(body, bytes) else orjson.dumps(body)
    lines = b"".join(header + b"\r\n" for header in headers)
    start = b"POST /v1/chat/completions HTTP/" + version + b"\r\nHost: localhost\r\n"
    return start + lines + b"Content-Length: %d\r\n\r\n" % len(raw) + raw


@pytest.mark.parametrize("body", [HI, STREAM])
async def test_no_header_hides_a_call_from_the_log(body: Any) -> None:
    async with FakeUpstream(GOOD) as up, open_house(ladder_of(up.url)) as house:
        odd = (b"X-Client-Request-Id: \xff\xfe" + b"a" * 500, b"Connection: close")
        answer = await wire(house, request(body, *odd))
        assert answer.startswith(b"HTTP/1.1 200")
        await house.idle()
        assert house.lines[0]["status"] == 200
        assert house.lines[0]["client_request_id"].startswith("??aaa")
        assert len(house.lines[0]["client_request_id"]) == 128


ODD_ANSWERS: dict[str, Handler] = {
    "deep error": answering(500, b'{"error":{"message":' + DEEP + b"}}"),
    "deep answer to be mended": answering(
        200,
        b'{"choices":[{"index":0,"message":{"content":"x"},"finish_reason":"eos"}],"deep":'
        + b"[" * 3000
        + b"]" * 3000
        + b"}",
        {"content-type": "application/json"},
    ),
    "odd content type": answering(200, b"x", {"content-type": "text/\xff"}),
    "bad status line": answering(999, b"x"),
}


@pytest.mark.parametrize("odd", ODD_ANSWERS)
@pytest.mark.parametrize("stream", [False, True])
async def test_no_answer_of_an_upstream_is_our_crash(odd: str, stream: bool) -> None:
    body = STREAM if stream else HI
    async with FakeUpstream(ODD_ANSWERS[odd]) as bad, FakeUpstream(GOOD) as good:
        async with open_house(ladder_of(bad.url)) as house:
            status, found, _ = await house.post("/v1/chat/completions", body)
            assert status == 502
            assert found["error"]["code"] == "no_rung_left"
            assert "127.0.0.1" not in found["error"]["message"]
        async with open_house(ladder_of(bad.url, good.url)) as house:
            assert (await house.post("/v1/chat/completions", body))[0] == 200


async def test_a_fault_of_ours_inside_a_stream_is_one_error_event(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Nothing is known to cause one; if something does, the client is not lied to."""

    async def slow(request: Request, reply: Reply) -> None:
        await reply.start()
        await reply.event(chunk({"content": "Hel"}))
        await reply.event(chunk({"content": "lo"}, "stop"))
        await reply.end()

    async with FakeUpstream(slow) as up, open_house(ladder_of(up.url)) as house:
        backend = house.gateway.service.backends["b0"]
        open_stream = backend.stream_chat

        class Breaks:
            def __init__(self, opened: Any) -> None:
                self.opened, self.count = opened, 0
                self.close = opened.close

            async def read(self, take: Any = None) -> Any:
                self.count += 1
                if self.count > 1:
                    raise KeyError("a fault of ours")
                return (await self.opened.read())[:1]

        async def breaks(attempt: Any) -> Any:
            return Breaks(await open_stream(attempt))

        backend.stream_chat = breaks  # type: ignore[method-assign]
        with caplog.at_level(logging.ERROR):
            found, raw, _ = await streamed(house)
        assert orjson.loads(found[-1])["error"]["code"] == "internal_error"
        assert b"HTTP/1.1" not in raw
        assert b"[DONE]" not in raw
        assert "a fault of ours" in caplog.text
        await house.idle()
        assert house.lines[0]["error"] == "internal_error"
        assert house.lines[0]["attempts"][0]["cause"] == "failed"


async def test_an_answer_that_nobody_asked_for_goes_to_nobody() -> None:
    count = 0

    async def twice(request: Request, reply: Reply) -> None:
        nonlocal count
        count += 1
        choice = {"index": 0, "message": {"content": str(count)}, "finish_reason": "stop"}
        await reply.json({"id": "x", "choices": [choice]})
        if count == 1:
            choice["message"] = {"content": "SOMEBODY ELSE'S"}
            await reply.json({"id": "x", "choices": [choice]})

    async with FakeUpstream(twice) as up, open_house(ladder_of(up.url)) as house:
        texts = []
        for _ in range(3):
            _, body, _ = await house.post("/v1/chat/completions", HI)
            texts.append(body["choices"][0]["message"]["content"])
        assert texts == ["1", "2", "3"]


async def test_a_client_that_reads_nothing_is_cut_off_in_time() -> None:
    big = {"index": 0, "message": {"content": "x" * (24 << 20)}, "finish_reason": "stop"}
    async with FakeUpstream(answering(200, {"id": "x", "choices": [big]})) as up:
        async with open_house(ladder_of(up.url, server="stall_s = 0.3")) as house:
            _, writer = await asyncio.open_connection(*house.url[7:].split(":"), limit=1024)
            writer.write(request(HI))
            async with asyncio.timeout(5):
                while not house.lines:
                    await asyncio.sleep(0)
                while house.server.connections:
                    await asyncio.sleep(0)
            writer.transport.abort()


async def test_a_rungs_limit_holds_for_calls_that_fail_over_to_it() -> None:
    inside = most = 0
    go = asyncio.Event()

    async def fails_together(request: Request, reply: Reply) -> None:
        await go.wait()
        await reply.json(error("broke"), 500)

    async def counts(request: Request, reply: Reply) -> None:
        nonlocal inside, most
        inside += 1
        most = max(most, inside)
        await asyncio.sleep(0.05)
        await GOOD(request, reply)
        inside -= 1

    async with FakeUpstream(fails_together) as bad, FakeUpstream(counts) as good:
        rung = 'backend = "b1"\nmodel = "org/m"\n'
        text = ladder_of(bad.url, good.url, ladder="queue_max = 0")
        text = text.replace(rung, rung + "max_in_flight = 1\n")
        async with open_house(text) as house:
            calls = [asyncio.create_task(house.post("/v1/chat/completions", HI)) for _ in range(6)]
            async with asyncio.timeout(5):
                while len(bad.requests) < 6:
                    await asyncio.sleep(0)
            go.set()
            statuses = sorted(status for status, _, _ in await asyncio.gather(*calls))
    assert most == 1
    assert set(statuses) == {200, 429}


async def test_chunks_without_content_are_not_kept_without_end() -> None:
    async def endless(request: Request, reply: Reply) -> None:
        await reply.start()
        while True:
            await reply.event(chunk({"role": "assistant", "content": ""}))

    async with FakeUpstream(endless) as bad, FakeUpstream(GOOD) as good:
        async with open_house(ladder_of(bad.url, good.url)) as house:
            found, _, headers = await streamed(house)
            assert found[-1] == b"[DONE]"
            assert headers["x-rungway-attempts"] == "2"
            assert house.lines[0]["attempts"][0]["cause"] == "broken"


async def test_expect_100_continue_is_answered() -> None:
    async with FakeUpstream(GOOD) as up, open_house(ladder_of(up.url)) as house:
        reader, writer = await asyncio.open_connection(*house.url[7:].split(":"))
        body = orjson.dumps(HI)
        head = request(body, b"Expect: 100-continue").removesuffix(body)
        writer.write(head)
        async with asyncio.timeout(5):
            assert await reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
            writer.write(body)
            assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 200")
        writer.transport.abort()


@pytest.mark.parametrize("name", ["image_url", "video_url", "audio_url", "input_image"])
@pytest.mark.parametrize("form", ["http://169.254.169.254/", {"url": "http://169.254.169.254/"}])
async def test_no_part_makes_a_server_fetch(name: str, form: Any) -> None:
    async with FakeUpstream(GOOD) as up, open_house(ladder_of(up.url)) as house:
        for part in ({name: form}, {"type": name, name: form}, {"type": "text", name: form}):
            body = {"messages": [{"role": "user", "content": [part]}]}
            status, found, _ = await house.post("/v1/chat/completions", body)
            assert status == 400
            assert found["error"]["code"] == "invalid_image_url"
        assert up.requests == []


async def test_a_client_that_leaves_with_a_second_request_behind_is_noticed() -> None:
    arrived = asyncio.Event()

    async def hang(request: Request, reply: Reply) -> None:
        arrived.set()
        await reply.client_left()
        reply.close()

    async with FakeUpstream(hang) as up, open_house(ladder_of(up.url)) as house:
        _, writer = await asyncio.open_connection(*house.url[7:].split(":"))
        writer.write(request(HI) + request(HI)[:-5])
        await arrived.wait()
        up.left.clear()
        writer.write(b"x" * 300_000)
        writer.transport.abort()
        async with asyncio.timeout(3):
            await up.left.wait()
        await house.idle()
        assert len(up.requests) == 1


async def test_a_streams_missing_choice_is_not_passed_off_as_whole() -> None:
    one_of_two = [chunk({"content": "a"}), chunk({}, "stop")]
    async with FakeUpstream(playing(one_of_two)) as up, open_house(ladder_of(up.url)) as house:
        found, raw, _ = await streamed(house, {**STREAM, "n": 2})
        assert b"[DONE]" not in raw
        assert "error" in orjson.loads(found[-1])


@pytest.mark.parametrize("end", ["cut", "silent"])
async def test_a_stream_that_is_whole_and_then_breaks_is_whole(end: str) -> None:
    whole = [chunk({"content": "a"}), chunk({}, "stop")]
    async with FakeUpstream(playing(whole, end=end)) as up:
        async with open_house(ladder_of(up.url, ladder="idle_s = 0.2")) as house:
            found, _, _ = await streamed(house)
            assert found[-1] == b"[DONE]"
            assert house.lines[0]["error"] is None


async def test_http_1_0_streams_end_by_closing() -> None:
    async with FakeUpstream(GOOD) as up, open_house(ladder_of(up.url)) as house:
        asked = request(STREAM, b"Connection: keep-alive", version=b"1.0")
        answer = await wire(house, asked)
        assert answer.endswith(b"data: [DONE]\n\n")


async def test_our_token_is_not_told_to_a_caller() -> None:
    async def echo(request: Request, reply: Reply) -> None:
        text = request.headers.get("authorization", "")
        await reply.json({"error": {"message": f"failed with {text}"}}, 500)

    async with FakeUpstream(echo) as up:
        text = ladder_of(up.url).replace(
            f'url = "{up.url}"\n', f'url = "{up.url}"\ntoken = "env:TOKEN"\n'
        )
        async with open_house(text, TOKEN="hf_very_secret") as house:
            _, body, _ = await house.post("/v1/chat/completions", HI)
            assert up.last.headers["authorization"] == "Bearer hf_very_secret"
            assert "hf_very_secret" not in str(body) + str(house.lines)
            assert "[token]" in body["error"]["message"]


async def test_a_refused_token_closes_the_rung_with_an_alarm(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with FakeUpstream(answering(401, error("no"))) as up:
        async with open_house(ladder_of(up.url)) as house:
            with caplog.at_level(logging.ERROR):
                assert (await house.post("/v1/chat/completions", HI))[0] == 502
            assert "ALARM" in caplog.text
            assert (await house.post("/v1/chat/completions", HI))[0] == 502
            assert len(up.requests) == 1
            assert b"rungway_alarms_total" in (await house.get("/metrics"))[1]


async def test_errors_tell_what_was_tried() -> None:
    async with FakeUpstream(answering(400, error("temperature is wrong"))) as up:
        async with open_house(ladder_of("http://127.0.0.1:1", up.url)) as house:
            _, _, headers = await house.post("/v1/chat/completions", HI)
            assert headers["x-rungway-attempts"] == "2"
            assert headers["x-rungway-rung"] == "b1/org/m"
            assert headers["x-should-retry"] == "false"


async def test_streams_share_connections_upstream() -> None:
    """Also where the last chunk comes a moment after `[DONE]`, as most servers send it."""

    async def ends_late(request: Request, reply: Reply) -> None:
        await reply.start()
        await reply.event(chunk({"content": "Hi"}, "stop"))
        await reply.event(b"[DONE]")
        await asyncio.sleep(0.01)
        await reply.end()

    async with FakeUpstream(ends_late) as up, open_house(ladder_of(up.url)) as house:
        for _ in range(6):
            found, _, _ = await streamed(house)
            assert found[-1] == b"[DONE]"
            await asyncio.sleep(0.03)
        assert up.connections == 1
