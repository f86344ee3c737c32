"""Promises of the README and docs/api.md that no other test holds."""

from __future__ import annotations

import asyncio
import gzip
import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import orjson
import pytest

from tests.api.test_chat import GOOD, HI, STREAM, answering, streamed
from tests.backends.rigs.openai import chunk, error
from tests.fakes.upstream import FakeUpstream, Reply, Request
from tests.house import ladder_of, open_house


def key(name: str, extra: str = "") -> str:
    digest = hashlib.sha256(name.encode()).hexdigest()
    return f'[keys.{name}]\nsha256 = "{digest}"\n{extra}\n'


def bearer(name: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {name}"}


async def test_every_answer_has_its_headers() -> None:
    async with FakeUpstream(GOOD) as up, open_house(ladder_of(up.url)) as house:
        answers = [
            await house.post("/v1/chat/completions", HI, {"X-Client-Request-Id": "mine"}),
            await house.post("/v1/chat/completions", {}),
            await house.get("/v1/models"),
            await house.get("/v1/nothing"),
        ]
        for _, _, headers in answers:
            assert headers["x-request-id"].startswith("req_")
            assert headers["openai-processing-ms"].isdigit()
            assert headers["server"] == "rungway"
        assert answers[0][2]["x-rungway-cache"] == "bypass"
        assert len({headers["x-request-id"] for _, _, headers in answers}) == 4
        assert house.lines[0]["client_request_id"] == "mine"
        assert house.lines[0]["id"] == answers[0][2]["x-request-id"]


@pytest.mark.parametrize("encoding", ["gzip", "deflate"])
async def test_a_compressed_body_is_read_within_the_limit_of_what_it_holds(encoding: str) -> None:
    import zlib

    pack = gzip.compress if encoding == "gzip" else zlib.compress
    headers = {"Content-Encoding": encoding}
    async with FakeUpstream(GOOD) as up:
        async with open_house(ladder_of(up.url, server="max_body_mib = 1")) as house:
            path = "/v1/chat/completions"
            assert (await house.post(path, pack(orjson.dumps(HI)), headers))[0] == 200
            status, body, _ = await house.post(path, pack(b" " * (40 << 20)), headers)
            assert status == 413
            assert body["error"]["code"] == "request_too_large"
            assert (await house.post(path, b"\x1f\x8bnonsense", headers))[0] == 400
            assert (await house.get("/health"))[0] == 200


async def test_a_stream_that_an_upstream_compresses_in_spite_of_us_is_read() -> None:
    frames = b"".join(
        b"data: " + (one if isinstance(one, bytes) else orjson.dumps(one)) + b"\n\n"
        for one in (chunk({"content": "Hi"}, "stop"), b"[DONE]")
    )

    async def packed(request: Request, reply: Reply) -> None:
        kinds = {"content-type": "text/event-stream", "content-encoding": "gzip"}
        await reply.whole(gzip.compress(frames), 200, kinds)

    async with FakeUpstream(packed) as up, open_house(ladder_of(up.url)) as house:
        found, _, _ = await streamed(house)
        assert found[-1] == b"[DONE]"


@pytest.mark.parametrize("body", [HI, STREAM])
async def test_the_total_limit_ends_a_call_whatever_it_does(body: Any) -> None:
    async def hang(request: Request, reply: Reply) -> None:
        await reply.client_left()
        reply.close()

    async with FakeUpstream(hang) as up:
        async with open_house(ladder_of(up.url, ladder="total_s = 0.2")) as house:
            status, found, headers = await house.post("/v1/chat/completions", body)
            assert status == 504
            assert "total_s" in found["error"]["message"]
            assert headers["x-rungway-attempts"] == "1"
            async with asyncio.timeout(2):
                while up.open_connections:
                    await asyncio.sleep(0)


async def test_a_full_rung_is_429_with_a_time_to_come_back() -> None:
    go = asyncio.Event()

    async def wait(request: Request, reply: Reply) -> None:
        await go.wait()
        await GOOD(request, reply)

    async with FakeUpstream(wait) as up:
        text = ladder_of(up.url, ladder="queue_max = 0").replace(
            'model = "org/m"\n', 'model = "org/m"\nmax_in_flight = 1\n', 1
        )
        async with open_house(text) as house:
            first = asyncio.create_task(house.post("/v1/chat/completions", HI))
            async with asyncio.timeout(2):
                while not up.requests:
                    await asyncio.sleep(0)
            status, body, headers = await house.post("/v1/chat/completions", HI)
            assert status == 429
            assert headers["retry-after"] == "1"
            assert headers["x-should-retry"] == "true"
            assert "in flight" in body["error"]["rungs"][0]["reason"]
            go.set()
            assert (await first)[0] == 200


async def test_tiers_orders_and_the_default_ladder() -> None:
    async with FakeUpstream(GOOD) as one, FakeUpstream(GOOD) as two:
        text = ladder_of(
            one.url,
            two.url,
            server='default_ladder = "paid"',
            keys=key("plain") + key("gold", 'tier = "premium"'),
        ) + (
            '[ladders.paid]\n[[ladders.paid.rungs]]\nbackend = "b1"\nmodel = "org/m"\n'
            'tiers = ["premium"]\n'
        )  # fmt: skip
        async with open_house(text) as house:

            async def rung(model: str, name: str = "gold") -> str:
                body = {**HI, "model": model}
                status, _, headers = await house.post("/v1/chat/completions", body, bearer(name))
                return headers.get("x-rungway-rung", str(status))

            assert await rung("chat") == "b0/org/m"
            assert await rung("chat:best") == "b1/org/m"
            assert await rung("gpt-4o-mini:best") == "b1/org/m"
            assert await rung("dummy") == "b1/org/m"
            assert await rung("paid") == "b1/org/m"
            assert await rung("paid", "plain") == "403"


async def test_stream_options_without_a_stream_do_no_harm() -> None:
    async with FakeUpstream(GOOD) as up, open_house(ladder_of(up.url)) as house:
        body = {**HI, "stream": False, "stream_options": {"include_usage": True}}
        assert (await house.post("/v1/chat/completions", body))[0] == 200
        assert "stream_options" not in up.last.json


async def test_reload_and_status_are_for_admins() -> None:
    keys = key("plain") + key("root", "admin = true")
    async with FakeUpstream(GOOD) as up, open_house(ladder_of(up.url, keys=keys)) as house:
        for headers, status in (({}, 401), (bearer("plain"), 403), (bearer("root"), 200)):
            assert (await house.post("/router/v1/reload", {}, headers))[0] == status
            assert (await house.get("/router/v1/status", headers))[0] == status


async def test_a_token_that_was_changed_is_read_again_when_the_old_one_is_refused(
    tmp_path: Path,
) -> None:
    file = tmp_path / "token"
    file.write_text("old")

    async def picky(request: Request, reply: Reply) -> None:
        if request.headers.get("authorization") == "Bearer new":
            await GOOD(request, reply)
        else:
            await reply.json(error("who are you?"), 401)

    async with FakeUpstream(picky) as up:
        text = ladder_of(up.url).replace(
            f'url = "{up.url}"\n', f'url = "{up.url}"\ntoken = "file:{file}"\n'
        )
        async with open_house(text) as house:
            file.write_text("new")
            assert (await house.post("/v1/chat/completions", HI))[0] == 502
            assert (await house.post("/v1/chat/completions", HI))[0] == 200


async def test_ops_routes_need_no_key_from_this_machine() -> None:
    """As in a container that listens everywhere and checks itself."""
    async with FakeUpstream(GOOD) as up:
        async with open_house(ladder_of(up.url, keys=key("plain"))) as house:
            house.gateway.service = replace(house.gateway.service, ops_need_key=True)
            for path in ("/health", "/ready", "/metrics"):
                assert (await house.get(path))[0] == 200


async def test_metrics_tell_of_attempts_tokens_and_times() -> None:
    async with FakeUpstream(answering(500, error("broke"))) as bad, FakeUpstream(GOOD) as good:
        async with open_house(ladder_of(bad.url, good.url)) as house:
            await streamed(house)
            text = (await house.get("/metrics"))[1].decode()
    for sample in (
        'rungway_attempts_total{outcome="failed",rung="b0/org/m"} 1.0',
        'rungway_attempts_total{outcome="ok",rung="b1/org/m"} 1.0',
        'rungway_tokens_total{ladder="chat",rung="b1/org/m",type="output"} 7.0',
        'rungway_first_token_seconds_count{ladder="chat",rung="b1/org/m"} 1.0',
        'rungway_call_duration_seconds_count{ladder="chat",task="chat"} 1.0',
        'rungway_rung_open{rung="b0/org/m"} 1.0',
        "rungway_calls_in_flight 0.0",
    ):
        assert sample in text, sample
