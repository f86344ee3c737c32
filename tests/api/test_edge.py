"""The edge: bad input, strangers, limits. Each is a clear error, and the daemon goes on serving."""

from __future__ import annotations

import asyncio
import hashlib
from io import BytesIO
from typing import Any

import orjson
import pytest

from tests.backends.rigs.openai import OpenAiRig
from tests.fakes.upstream import FakeUpstream, Reply, Request
from tests.house import House, ladder_of, open_house

HI = {"model": "chat", "messages": [{"role": "user", "content": "Hi?"}]}
GOOD = OpenAiRig().handle
KEYS = f"""
[keys.alice]
sha256 = "{hashlib.sha256(b"alice-key").hexdigest()}"
ladders = ["chat"]
[keys.alice.limits]
concurrent = 1
max_input_kib = 1
max_output_tokens = 5
[keys.root]
sha256 = "{hashlib.sha256(b"root-key").hexdigest()}"
admin = true
"""
ALICE = {"Authorization": "Bearer alice-key"}
ROOT = {"Authorization": "Bearer root-key"}


def is_envelope(body: Any) -> bool:
    inner = body["error"]
    return isinstance(inner["message"], str) and {"type", "param", "code"} <= set(inner)


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "code"),
    [
        ("POST", "/v1/chat/completions", b"{", 400, "invalid_json"),
        ("POST", "/v1/chat/completions", b"", 400, "invalid_json"),
        ("POST", "/v1/chat/completions", b"\xff\xfe", 400, "invalid_json"),
        ("POST", "/v1/chat/completions", b'{"a": NaN}', 400, "invalid_json"),
        ("POST", "/v1/chat/completions", b"[" * 1_000_000, 400, "invalid_json"),
        ("POST", "/v1/chat/completions", b'{"a":' * 100_000, 400, "invalid_json"),
        ("POST", "/v1/chat/completions", b"[1]", 400, "invalid_type"),
        ("POST", "/v1/chat/completions", b"{}", 400, "missing_required_parameter"),
        ("POST", "/v1/embeddings", b"{}", 400, "missing_required_parameter"),
        ("POST", "/v1/embeddings", b'{"input": ""}', 400, "invalid_value"),
        ("POST", "/", b'{"inputs": "a", "parameters": {}}', 400, None),
        ("POST", "/v1", b"[]", 400, None),
        ("GET", "/v1/chat/completions", b"", 405, "method_not_allowed"),
        ("DELETE", "/v1/models", b"", 405, "method_not_allowed"),
        ("PATCH", "/", b"", 405, "method_not_allowed"),
        ("GET", "/v1/nothing", b"", 404, "unknown_url"),
        ("GET", "/v1/models/nothing", b"", 404, "model_not_found"),
        ("GET", "/../../etc/passwd", b"", 404, "unknown_url"),
        ("POST", "/v1/chat/completions", b"x" * (2 << 20), 413, "request_too_large"),
    ],
)
async def test_bad_requests_get_the_envelope(
    method: str, path: str, body: bytes, status: int, code: str | None
) -> None:
    async with FakeUpstream(GOOD) as up:
        async with open_house(ladder_of(up.url, server="max_body_mib = 1")) as house:
            async with house.client.request(method, house.url + path, data=BytesIO(body)) as answer:
                found = orjson.loads(await answer.read())
                assert answer.status == status
                assert answer.content_type == "application/json"
                assert answer.headers["x-request-id"]
            if code is not None:
                assert found["error"]["code"] == code
            assert is_envelope(found)
            assert (await house.post("/v1/chat/completions", HI))[0] == 200


async def test_errors_say_what_there_is_and_what_to_do() -> None:
    async with FakeUpstream(GOOD) as up:
        async with open_house(ladder_of(up.url, keys=KEYS)) as house:

            async def told(path: str, headers: dict[str, str], method: str = "GET") -> str:
                call = house.client.request(method, house.url + path, headers=headers)
                async with call as answer:
                    message = orjson.loads(await answer.read())["error"]["message"]
                    assert isinstance(message, str)
                    return message

            assert await told("/v1/nothing/?a=1", ALICE) == (
                "there is no /v1/nothing/ here; docs/api.md lists the routes"
            )
            assert await told("/v1/models", ALICE, "PUT") == "/v1/models takes GET, not PUT"
            assert len(await told("/" + "x" * 5000, ALICE)) < 300
            assert "does not exist; there are: chat" in await told("/v1/models/x", ALICE)
            for path, method in (("/router/v1/status", "GET"), ("/router/v1/reload", "POST")):
                assert "`rungway keys create NAME --admin`" in await told(path, ALICE, method)
            stranger = {"Authorization": "Bearer other"}
            assert "rungway keys create" in await told("/v1/models", stranger)


@pytest.mark.parametrize(
    ("body", "missing"),
    [
        ({"model": "chat"}, "messages"),
        ({"model": "embed"}, "input"),
        ({"model": "unknown"}, "neither messages"),
        ({}, "neither messages"),
        ({"model": 3}, "neither messages"),
    ],
)
async def test_explain_says_what_a_request_lacks(body: Any, missing: str) -> None:
    async with FakeUpstream(GOOD) as up, open_house(ladder_of(up.url)) as house:
        status, answer, _ = await house.post("/router/v1/explain", body)
        assert (status, answer["error"]["code"]) == (400, "missing_required_parameter")
        assert missing in answer["error"]["message"]


async def test_token_ids_are_refused_with_the_hint_where_nothing_can_read_them() -> None:
    async with FakeUpstream(GOOD) as up, open_house(ladder_of(up.url)) as house:
        from dataclasses import replace

        house.gateway.service = replace(house.gateway.service, decode_tokens=None)
        _, body, _ = await house.post("/v1/embeddings", {"model": "embed", "input": [1, 2]})
        assert "check_embedding_ctx_length=False" in body["error"]["message"]
        assert up.requests == []


async def test_what_is_deep_or_odd_but_legal_is_relayed_as_it_is() -> None:
    deep = b'{"a":' * 600 + b"1" + b"}" * 600
    head = b'{"messages":[{"role":"user","content":"cut \\ud83d"}],"deep":'
    async with FakeUpstream(GOOD) as up, open_house(ladder_of(up.url)) as house:
        status, _, _ = await house.post("/v1/chat/completions", head + deep + b"}")
        assert status == 200
        assert rb"cut \ud83d" in up.last.body
        assert deep in up.last.body
        assert house.lines[0]["status"] == 200


async def raw(house: House, data: bytes, *, wait: bool = True) -> bytes:
    """What the server answers to these bytes, until it closes."""
    reader, writer = await asyncio.open_connection(*house.url[7:].split(":"))
    writer.write(data)
    try:
        async with asyncio.timeout(5):
            return await reader.read() if wait else await reader.readuntil(b"\r\n\r\n")
    finally:
        writer.transport.abort()


@pytest.mark.parametrize(
    "data",
    [
        b"GARBAGE\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"GET / HTTP/1.1\r\nbad header\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: localhost\r\nx: " + b"a" * 200_000 + b"\r\n\r\n",
        b"GET /" + b"a" * 200_000 + b" HTTP/1.1\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: -5\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5\r\n"
        b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"POST / HTTP/1.1\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nhello!",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
    ],
)
async def test_what_is_no_http_is_answered_in_the_envelope_or_closed(data: bytes) -> None:
    async with FakeUpstream(GOOD) as up:
        async with open_house(ladder_of(up.url, server="header_s = 0.5")) as house:
            answer = await raw(house, data)
            if answer:
                head, _, body = answer.partition(b"\r\n\r\n")
                assert head.split()[1] == b"400"
                assert b"aiohttp" not in head
                found = orjson.loads(body)
                assert is_envelope(found)
                assert found["error"]["code"] == "unreadable_request"
                assert "\n" not in found["error"]["message"]
            assert (await house.get("/health"))[0] == 200


@pytest.mark.parametrize(
    "data", [b"", b"GET / HT", b"GET / HTTP/1.1\r\nHost: localhost\r\nx-slow: "]
)
async def test_a_head_that_does_not_come_is_not_waited_for(data: bytes) -> None:
    async with FakeUpstream(GOOD) as up:
        async with open_house(ladder_of(up.url, server="header_s = 0.2")) as house:
            assert await raw(house, data) == b""
            assert (await house.get("/health"))[0] == 200


async def test_a_body_that_does_not_come_is_not_waited_for() -> None:
    async with FakeUpstream(GOOD) as up:
        async with open_house(ladder_of(up.url, server="body_s = 0.2")) as house:
            head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n"
            answer = await raw(house, head + b"Content-Length: 50\r\n\r\n{", wait=False)
            assert answer.startswith(b"HTTP/1.1 408")
            chunked = await raw(house, head + b"Transfer-Encoding: chunked\r\n\r\n", wait=False)
            assert chunked.startswith(b"HTTP/1.1 408")


async def test_a_body_without_end_is_cut_at_the_limit() -> None:
    async with FakeUpstream(GOOD) as up:
        async with open_house(ladder_of(up.url, server="max_body_mib = 1")) as house:

            async def endless() -> Any:
                for _ in range(100):
                    yield b"x" * (1 << 20)

            head = {"Content-Type": "application/json"}
            try:
                async with house.client.post(
                    f"{house.url}/v1/chat/completions", data=endless(), headers=head
                ) as answer:
                    assert answer.status == 413
            except OSError:
                pass  # the server closed before the client had sent all: as good an end
            assert (await house.get("/health"))[0] == 200
            assert house.lines[0]["status"] == 413


async def test_keys() -> None:
    async with FakeUpstream(GOOD) as up, open_house(ladder_of(up.url, keys=KEYS)) as house:
        for headers in (
            {},
            {"Authorization": "Bearer wrong"},
            {"Authorization": "Basic alice-key"},
            {"Authorization": "Bearer"},
            {"Authorization": "Bearer \udcff\udcfe".encode("utf-8", "surrogateescape").decode(
                "latin-1"
            )},
        ):  # fmt: skip
            status, body, _ = await house.post("/v1/chat/completions", HI, headers)
            assert status == 401
            assert is_envelope(body)
            assert "wrong" not in body["error"]["message"]
        assert (await house.post("/v1/chat/completions", HI, ALICE))[0] == 200
        assert up.last.json["max_tokens"] == 5
        embed = {"model": "embed", "input": "a"}
        assert (await house.post("/v1/embeddings", embed, ALICE))[0] == 404
        assert (await house.post("/v1/embeddings", embed, ROOT))[0] == 200
        models = (await house.get("/v1/models", ALICE))[1]["data"]
        assert [model["id"] for model in models] == ["chat", "gpt-4o-mini"]
        assert (await house.get("/v1/models"))[0] == 401
        assert (await house.get("/health"))[0] == 200
        assert "alice-key" not in orjson.dumps(house.lines).decode()


async def test_a_keys_limits_of_size_and_concurrency() -> None:
    gate = asyncio.Event()
    arrived = asyncio.Event()

    async def wait(request: Request, reply: Reply) -> None:
        arrived.set()
        await gate.wait()
        await GOOD(request, reply)

    async with FakeUpstream(wait) as up, open_house(ladder_of(up.url, keys=KEYS)) as house:
        long = {**HI, "messages": [{"role": "user", "content": "x" * 2000}]}
        assert (await house.post("/v1/chat/completions", long, ALICE))[0] == 413
        first = asyncio.ensure_future(house.post("/v1/chat/completions", HI, ALICE))
        await arrived.wait()
        status, body, headers = await house.post("/v1/chat/completions", HI, ALICE)
        assert status == 429
        assert body["error"]["code"] == "rate_limit_exceeded"
        assert headers["retry-after"] == "1"
        gate.set()
        assert (await first)[0] == 200
        assert (await first)[2]["x-rungway-clamped"] == "5"
        assert (await house.post("/v1/chat/completions", HI, ALICE))[0] == 200


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Host": "localhost:8484"}, 200),
        ({"Host": "127.0.0.1"}, 200),
        ({"Host": "[::1]:8484"}, 200),
        ({"Host": "app.localhost"}, 200),
        ({"Host": "proxy.internal"}, 200),
        ({"Host": "evil.example"}, 403),
        ({"Host": "127.0.0.1.evil.example"}, 403),
        ({"Host": "localhost", "Origin": "https://evil.example"}, 403),
        ({"Host": "localhost", "Origin": "null"}, 403),
        ({"Host": "localhost", "Origin": "https://app.example"}, 200),
        ({"Host": "localhost:1", "Origin": "http://localhost:1"}, 200),
    ],
)
async def test_open_mode_checks_host_and_origin(headers: dict[str, str], status: int) -> None:
    server = 'cors_origins = ["https://app.example"]\nallowed_hosts = ["proxy.internal"]'
    async with FakeUpstream(GOOD) as up, open_house(ladder_of(up.url, server=server)) as house:
        found, body, answer = await house.post("/v1/chat/completions", HI, headers)
        assert found == status
        assert found == 200 or is_envelope(body)
        allowed = answer.get("access-control-allow-origin")
        assert allowed == ("https://app.example" if "app.example" in str(headers) else None)
        assert len(up.requests) == (status == 200)


async def test_preflight() -> None:
    server = 'cors_origins = ["https://app.example"]'
    async with FakeUpstream(GOOD) as up:
        async with open_house(ladder_of(up.url, server=server, keys=KEYS)) as house:
            for origin, status in (("https://app.example", 204), ("https://evil.example", 403)):
                headers = {
                    "Origin": origin,
                    "Access-Control-Request-Method": "POST",
                    "Access-Control-Request-Headers": "authorization,x-stainless-os",
                }
                async with house.client.options(
                    f"{house.url}/v1/chat/completions", headers=headers
                ) as answer:
                    assert answer.status == status
                    told = answer.headers.get("Access-Control-Allow-Headers", "")
                    assert ("x-stainless-os" in told) is (status == 204)


async def test_more_connections_than_allowed_are_closed_at_once() -> None:
    async with FakeUpstream(GOOD) as up:
        async with open_house(ladder_of(up.url, server="max_connections = 3")) as house:
            address = house.url[7:].split(":")
            writers = [(await asyncio.open_connection(*address))[1] for _ in range(3)]
            await asyncio.sleep(0)
            reader, writer = await asyncio.open_connection(*address)
            async with asyncio.timeout(2):
                assert await reader.read() == b""
            for one in (*writers, writer):
                one.transport.abort()
            async with asyncio.timeout(2):
                while house.server.connections:
                    await asyncio.sleep(0)
            assert (await house.get("/health"))[0] == 200


async def test_ops_routes() -> None:
    async with FakeUpstream(GOOD) as up, open_house(ladder_of(up.url)) as house:
        await house.post("/v1/chat/completions", {**HI, "messages": [
            {"role": "user", "content": "a very private prompt"}]})  # fmt: skip
        assert (await house.get("/health"))[1]["status"] == "ok"
        assert (await house.get("/ready"))[0] == 200
        assert (await house.get("/"))[1]["name"] == "rungway"
        status, text, _ = await house.get("/metrics")
        assert status == 200
        assert b'rungway_calls_total{ladder="chat",outcome="ok",rung="b0/org/m"} 1.0' in text
        assert (await house.get("/router/v1/status"))[1]["ladders"]["chat"]["rungs"][0][
            "rung"
        ] == "b0/org/m"
        status, plan, _ = await house.post("/router/v1/explain", HI)
        assert plan == {
            "ladder": "chat",
            "rungs": [{"rung": "b0/org/m", "take": True, "reason": "may be tried"}],
        }
        for seen in (orjson.dumps(house.lines), text):
            assert b"private" not in seen
        line = house.lines[0]
        assert line["key"] == "open"
        assert line["status"] == 200
        assert line["input_tokens"] == 5
        async with house.client.head(f"{house.url}/health") as answer:
            assert answer.status == 200


async def test_models_are_found_by_encoded_and_plain_ids() -> None:
    async with FakeUpstream(GOOD) as up:
        text = ladder_of(up.url).replace("ladders.chat", 'ladders."org/chat:v1"')
        async with open_house(text) as house:
            for path in ("org%2Fchat:v1", "org/chat:v1", "org/chat%3Av1/"):
                status, model, _ = await house.get(f"/v1/models/{path}")
                assert status == 200
                assert model["id"] == "org/chat:v1"
                assert model["object"] == "model"
