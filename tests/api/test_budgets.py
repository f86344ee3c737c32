"""Budgets through the whole house: what is spent, what is refused and why, and where it ends."""

from __future__ import annotations

import asyncio
import hashlib
import os
import random
import re
import sqlite3
from pathlib import Path
from typing import Any

import openai
import orjson
import pytest

from router.flow.probes import probe_all
from router.types import Price
from tests.fakes.metered import Metered
from tests.fakes.upstream import FakeUpstream
from tests.house import House, open_house

# How many clients leave: RUNGWAY_LEAVERS=1000 plays what the promise speaks of.
LEAVERS = int(os.environ.get("RUNGWAY_LEAVERS", "120"))
LEAVERS_SHARE = 0.01
POLICIES = ("cancel", "drain")
# 10,000 nano-dollars a token: what tokens are worth is easy to read.
USD_PER_MTOK = 10
PRICE = Price.per_mtok(USD_PER_MTOK, USD_PER_MTOK)
A_TOKEN = 10_000
SECRET = "sk-alice"
ALICE = {"Authorization": f"Bearer {SECRET}"}
PRICED = f"usd_per_mtok = {{ input = {USD_PER_MTOK}, output = {USD_PER_MTOK} }}"
FREE = "usd_per_mtok = { input = 0, output = 0 }"
HI = {"model": "chat", "messages": [{"role": "user", "content": "Hi?"}]}


def usd(tokens: float) -> str:
    """A limit of so many tokens' worth."""
    return f"{tokens * A_TOKEN / 1e9:.9f}"


def config(
    *rungs: tuple[str, str],
    limits: str = "",
    key: str = "",
    ladder: str = "",
    state: str = "",
) -> str:
    """A chat ladder over these servers, each with more lines of its rung, for the key alice."""
    digest = hashlib.sha256(SECRET.encode()).hexdigest()
    parts = ["[server]", state]
    for place, (url, _) in enumerate(rungs):
        parts.append(f'[backends.b{place}]\nkind = "openai"\nurl = "{url}"')
    parts.append(f"[ladders.chat]\nqueue_max = 1000\n{ladder}")
    for place, (_, more) in enumerate(rungs):
        parts.append(
            f'[[ladders.chat.rungs]]\nbackend = "b{place}"\nmodel = "org/m"\n'
            f"max_in_flight = 256\n{more}"
        )
    parts.append(f'[keys.alice]\nsha256 = "{digest}"\n{key}\n[keys.alice.limits]\n{limits}')
    return "\n".join(parts)


async def usage_of(house: House) -> dict[str, Any]:
    """Alice's line of usage."""
    status, body, _ = await house.get("/router/v1/usage", ALICE)
    assert status == 200
    if not body["data"]:
        return {"requests": 0, "settled": 0, "held": 0, "in_doubt": 0}
    (line,) = body["data"]
    exact = {name.removesuffix("_nano_usd"): line[name] for name in line if "_nano_usd" in name}
    return {**line, **exact, "settled": line["nano_usd"]}


async def ask(house: House, body: Any) -> tuple[int, Any, dict[str, str]]:
    return await house.post("/v1/chat/completions", body, ALICE)


async def stream(house: House, **more: Any) -> tuple[int, list[Any], bytes, dict[str, str]]:
    """Status, the parsed chunks without [DONE], the raw bytes, and the headers."""
    body = {**HI, "stream": True, **more}
    url = f"{house.url}/v1/chat/completions"
    async with house.client.post(url, json=body, headers=ALICE) as answer:
        raw = await answer.read()
        chunks = [orjson.loads(one) for one in re.findall(rb"data: (\{.*)\n\n", raw)]
        return answer.status, chunks, raw, dict(answer.headers)


def sdk(house: House, **more: Any) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=f"{house.url}/v1", api_key=SECRET, **more)


def log_agrees(house: House, settled: int) -> None:
    """The log's lines add up to what was settled."""
    costs = [line.get("cost_usd", 0.0) for line in house.lines if line["event"] == "call"]
    assert round(sum(costs) * 1e9) == settled


# --- a burst ------------------------------------------------------------------------------------


@pytest.mark.parametrize("streamed", [False, True])
async def test_a_burst_spends_what_the_upstream_bills_and_never_more_than_the_limit(
    streamed: bool,
) -> None:
    meter = Metered(tokens=40, pace=400)
    limit = 50 * 51 * A_TOKEN
    async with FakeUpstream(meter) as upstream:
        text = config((upstream.url, PRICED), limits=f"usd_per_day = {usd(50 * 51)}")
        async with open_house(text) as house:
            body = {**HI, "stream": streamed, "max_tokens": 40}
            answers = await asyncio.gather(*(ask(house, body) for _ in range(200)))
            served = [one for one in answers if one[0] == 200]
            refused = [one for one in answers if one[0] != 200]
            assert 20 < len(served) <= 50
            assert {status for status, _, _ in refused} == {429}
            for _, error, headers in refused:
                if error["error"]["code"] == "insufficient_quota":
                    assert headers["x-should-retry"] == "false"
                else:
                    assert error["error"]["code"] == "budget_in_use"
                    assert headers["x-should-retry"] == "true"
                    assert headers["retry-after"] == "1"
            found = await usage_of(house)
            assert found["settled"] == meter.bill(PRICE) <= limit
            assert found["held"] == found["overrun"] == 0
            assert found["requests"] == 200
            log_agrees(house, found["settled"])


@pytest.mark.parametrize("streamed", [False, True])
async def test_callers_that_retry_as_they_are_told_use_nearly_all_of_a_budget(
    streamed: bool,
) -> None:
    meter = Metered(tokens=40, pace=1_000)
    limit = 5_000 * A_TOKEN
    async with FakeUpstream(meter) as upstream:
        text = config((upstream.url, PRICED), limits=f"usd_per_day = {usd(5_000)}")
        async with open_house(text) as house, sdk(house, max_retries=8) as client:

            async def spend() -> None:
                while True:
                    try:
                        answer = await client.chat.completions.create(
                            model="chat",
                            messages=[{"role": "user", "content": "Hi?"}],
                            max_tokens=40,
                            stream=streamed,
                        )
                        if isinstance(answer, openai.AsyncStream):
                            async for _ in answer:
                                pass
                    except openai.RateLimitError as error:
                        assert error.code == "insufficient_quota", error
                        return

            await asyncio.gather(*(spend() for _ in range(30)))
            found = await usage_of(house)
            assert 0.95 * limit <= found["settled"] <= limit
            assert abs(found["settled"] - meter.bill(PRICE)) <= 0.01 * limit


# --- the hard stop ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("meter", "more"),
    [
        (Metered(10_000, pace=2_000, obeys=False), {}),
        (Metered(10_000, pace=2_000, obeys=False), {"n": 2}),
        (Metered(10_000, pace=2_000, obeys=False, tools=True), {}),
        (Metered(10_000, pace=2_000, obeys=False, joined=8), {}),
        (Metered(10_000, pace=2_000, obeys=False), {"max_tokens": 20_000}),
        (Metered(10_000, pace=2_000, obeys=False, reports=False), {"max_completion_tokens": 9_000}),
    ],
    ids=["plain", "two choices", "tools", "joined tokens", "max_tokens", "max_completion_tokens"],
)
async def test_a_stream_that_a_budget_ends_looks_finished_and_spends_at_most_its_limit(
    meter: Metered, more: Any
) -> None:
    async with FakeUpstream(meter) as upstream:
        text = config((upstream.url, PRICED), limits="usd_per_day = 0.01")
        async with open_house(text) as house:
            wants = {"stream_options": {"include_usage": True}}
            status, chunks, raw, headers = await stream(house, **more, **wants)
            assert status == 200
            assert int(headers["x-rungway-clamped"]) <= 1_000
            assert raw.endswith(b"data: [DONE]\n\n")
            *_, last, used = chunks
            assert last["choices"][0]["finish_reason"] == "length"
            ends = [one["choices"][0]["finish_reason"] for one in chunks[:-1]]
            assert ends.count("length") == more.get("n", 1)
            assert used["choices"] == []
            assert b": rungway ends the answer: the key 'alice' has" in raw
            found = await usage_of(house)
            assert used["usage"]["completion_tokens"] == found["output_tokens"]
            cost = re.search(rb": rungway cost_usd=(\S+)\n", raw)
            assert cost is not None
            assert round(float(cost[1]) * 1e9) == found["settled"]
            assert 0.9 * 10**7 < found["settled"] <= 10**7
            assert found["overrun"] == 0
            async with asyncio.timeout(2):
                while not meter.cut:
                    await asyncio.sleep(0)
            # What nobody reported and came several tokens a chunk is known by its length alone.
            share = 0.02 if meter.joined == 1 else 0.25
            assert abs(meter.bill(PRICE) - found["settled"]) < share * 10**7


async def test_the_openai_sdk_takes_a_stream_that_a_budget_ends_for_a_whole_one() -> None:
    meter = Metered(10_000, pace=2_000, obeys=False)
    async with FakeUpstream(meter) as upstream:
        text = config((upstream.url, PRICED), limits="usd_per_day = 0.01")
        async with open_house(text) as house, sdk(house) as client:
            answer = await client.chat.completions.create(
                model="chat",
                messages=[{"role": "user", "content": "Hi?"}],
                stream_options={"include_usage": True},
                stream=True,
            )
            *_, last, used = [one async for one in answer]
            assert last.choices[0].finish_reason == "length"
            assert used.usage is not None
            assert 900 < used.usage.completion_tokens < 1_000


async def test_usage_that_comes_at_the_end_and_above_what_was_held_is_charged_and_shown() -> None:
    meter = Metered(tokens=40, lies=500)
    async with FakeUpstream(meter) as upstream:
        text = config((upstream.url, PRICED), limits=f"usd_per_day = {usd(200)}")
        async with open_house(text) as house:
            status, chunks, raw, _ = await stream(house, max_tokens=40)
            assert (status, chunks[-1]["choices"][0]["finish_reason"]) == (200, "stop")
            found = await usage_of(house)
            assert found["settled"] == (11 + 540) * A_TOKEN
            assert found["overrun"] > 400 * A_TOKEN
            assert b"cost_usd=0.00551" in raw
            status, error, headers = await ask(house, HI)
            assert (status, error["error"]["code"]) == (429, "insufficient_quota")
            assert headers["x-should-retry"] == "false"
            assert 0 < int(headers["retry-after"]) <= 86_400


# --- clients that leave -------------------------------------------------------------------------


async def leave(
    house: House,
    body: Any,
    *,
    after_events: int,
    after_s: float,
    heard: asyncio.Semaphore | None = None,
) -> None:
    """Ask on a connection of one's own, and close it at some point of the answer."""
    reader, writer = await asyncio.open_connection("127.0.0.1", int(house.url.rsplit(":", 1)[1]))
    data = orjson.dumps(body)
    head = (
        "POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\n"
        f"Authorization: Bearer {SECRET}\r\nContent-Length: {len(data)}\r\n\r\n"
    )
    writer.write(head.encode() + data)
    try:
        async with asyncio.timeout(after_s):
            seen = 0
            while seen < after_events and (line := await reader.readline()):
                if line.startswith(b"data: "):
                    seen += 1
                    if heard is not None:
                        heard.release()
    except TimeoutError:
        pass
    writer.transport.abort()


def _whole_s(meter: Metered) -> float:
    return meter.tokens / (meter.pace or 1e5)


async def leavers(
    house: House, meter: Metered, *, streams: bool, in_step: bool = False
) -> tuple[int, int]:
    """So many clients leave at random points; what the ledger has of it, and the bill. `in_step`:
    the upstream makes a token when its client has read the one before."""
    for _ in range(3):
        # The rung has reported some answers, as any rung in use has.
        assert (await ask(house, {**HI, "stream": streams}))[0] == 200
    await house.idle()
    before, billed = (await usage_of(house))["settled"], meter.bill(PRICE)
    chance = random.Random(4)
    places = asyncio.Semaphore(80)

    async def come_and_go(user: str) -> None:
        async with places:
            heard = meter.heard.get(user)
            await leave(
                house,
                {**HI, "stream": streams, "user": user},
                after_events=chance.randint(1, meter.tokens + 3),
                after_s=60 if heard else chance.uniform(0.02, 1.5 * _whole_s(meter)),
                heard=heard,
            )
            if heard is not None:
                # What is drained is not read any more.
                for _ in range(meter.tokens):
                    heard.release()

    users = [f"u{number}" for number in range(LEAVERS)]
    if in_step:
        meter.heard = {user: asyncio.Semaphore(0) for user in users}
    await asyncio.gather(*map(come_and_go, users))
    async with asyncio.timeout(20):
        # What is drained goes on when its caller has left.
        while meter.busy or house.shared.ledger.open:
            await asyncio.sleep(0.01)
    found = await usage_of(house)
    assert found["held"] == 0
    return found["settled"] - before, meter.bill(PRICE) - billed


@pytest.mark.parametrize("policy", POLICIES)
async def test_streams_that_clients_leave_are_charged_what_the_upstream_produced(
    policy: str,
) -> None:
    meter = Metered(tokens=240)
    async with FakeUpstream(meter) as upstream:
        text = config(
            (upstream.url, PRICED), key=f'on_disconnect = "{policy}"', limits="usd_per_day = 1000"
        )
        async with open_house(text) as house:
            charged, billed = await leavers(house, meter, streams=True, in_step=True)
            print(f"{policy}: {LEAVERS} left, charged {charged}, billed {billed}")
            assert abs(charged - billed) <= LEAVERS_SHARE * billed
            if policy == "cancel":
                assert meter.cut > LEAVERS / 3


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("streams", [False, True], ids=["whole", "at full speed"])
async def test_what_nobody_can_know_of_those_who_leave_is_held_to_what_they_asked_for(
    policy: str, streams: bool
) -> None:
    """Whole answers say nothing before they are there, and an upstream at full speed is ahead of
    what is read: the estimate may err, and says so."""
    meter = Metered(tokens=40, pace=0 if streams else 200)
    async with FakeUpstream(meter) as upstream:
        text = config(
            (upstream.url, PRICED), key=f'on_disconnect = "{policy}"', limits="usd_per_day = 1000"
        )
        async with open_house(text) as house:
            charged, billed = await leavers(house, meter, streams=streams)
            print(f"{policy}: {LEAVERS} left, charged {charged}, billed {billed}")
            assert 0 < charged <= LEAVERS * (40 + 11) * A_TOKEN
            if policy == "drain":
                assert charged == billed


# --- what is sent -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("asked", "field"),
    [
        ({"max_tokens": 500}, "max_tokens"),
        ({"max_completion_tokens": 500}, "max_completion_tokens"),
        ({}, "max_tokens"),
    ],
)
async def test_what_a_budget_affords_is_sent_in_the_clients_own_field(
    asked: Any, field: str
) -> None:
    meter = Metered(tokens=1_000)
    async with FakeUpstream(meter) as upstream:
        text = config((upstream.url, PRICED), limits=f"usd_per_day = {usd(233)}")
        async with open_house(text) as house:
            status, answer, headers = await ask(house, {**HI, **asked})
            assert status == 200
            # 33 are set aside for the prompt.
            assert headers["x-rungway-clamped"] == "200"
            assert {name: meter.bodies[-1].get(name) for name in asked | {field: 0}} == {field: 200}
            assert answer["usage"]["completion_tokens"] == 200
            assert float(headers["x-rungway-cost-usd"]) * 1e9 == pytest.approx(211 * A_TOKEN)
            assert (await usage_of(house))["overrun"] == 0


async def test_no_more_is_asked_for_than_the_context_has_room_for() -> None:
    meter = Metered(tokens=10)
    async with FakeUpstream(meter) as upstream:
        text = config((upstream.url, f"context = 300\n{PRICED}"))
        async with open_house(text) as house:
            _, _, headers = await ask(house, {**HI, "max_tokens": 5_000})
            assert (headers["x-rungway-clamped"], meter.bodies[-1]["max_tokens"]) == ("300", 300)
            _, _, headers = await ask(house, HI)
            assert "x-rungway-clamped" not in headers
            assert "max_tokens" not in meter.bodies[-1]


# --- plans --------------------------------------------------------------------------------------


async def test_a_key_that_is_used_up_still_has_the_rungs_that_cost_nothing() -> None:
    paid, free = Metered(tokens=40, lies=100), Metered(tokens=40)
    async with FakeUpstream(paid) as one, FakeUpstream(free) as two:
        text = config((one.url, PRICED), (two.url, FREE), limits=f"usd_per_day = {usd(100)}")
        async with open_house(text) as house:
            rungs = [(await ask(house, {**HI, "max_tokens": 40}))[2] for _ in range(5)]
            assert [one["x-rungway-rung"][:2] for one in rungs] == ["b0", "b1", "b1", "b1", "b1"]
            _, explained, _ = await house.post("/router/v1/explain", HI, ALICE)
            first, second = explained["rungs"]
            assert second["take"]
            assert not first["take"]
            assert "usd_per_day" in first["reason"]
            found = await usage_of(house)
            assert found["settled"] == 151 * A_TOKEN
            assert found["requests"] == 5


async def test_an_unknown_price_is_skipped_under_a_money_limit_unless_the_key_may() -> None:
    meter = Metered(tokens=4)
    async with FakeUpstream(meter) as upstream:
        # A name that is no private address: nobody knows what it costs.
        url = upstream.url.replace("127.0.0.1", "localtest.invalid")
        limits = "usd_per_day = 1"
        async with open_house(config((url, ""), limits=limits)) as house:
            # Before it was looked at, nobody knows whether it has a price.
            status, error, _ = await ask(house, HI)
            assert (status, error["error"]["code"]) == (503, "state_unavailable")
            await probe_all(house.gateway.service.backends.values(), house.shared.board)
            status, error, headers = await ask(house, HI)
            assert (status, error["error"]["code"]) == (403, "price_unknown")
            assert headers["x-should-retry"] == "false"
            _, explained, _ = await house.post("/router/v1/explain", HI, ALICE)
            assert "allow_unpriced" in explained["rungs"][0]["reason"]
        async with open_house(
            config((url, ""), limits=limits, key="allow_unpriced = true")
        ) as house:
            # It is tried, and is not there.
            assert (await ask(house, HI))[0] == 502


async def test_what_is_held_is_asked_again_for_each_rung_of_a_failover() -> None:
    async def breaks(request: Any, reply: Any) -> None:
        await reply.json({"error": {"message": "broke"}}, 500)

    meter = Metered(tokens=40)
    dear = "usd_per_mtok = { input = 1000, output = 1000 }"
    async with FakeUpstream(breaks) as one, FakeUpstream(meter) as two:
        limits = f"usd_per_day = {usd(200)}"
        for rungs in (
            [(one.url, PRICED), (two.url, dear)],
            [(one.url, FREE), (two.url, dear)],
        ):
            async with open_house(config(*rungs, limits=limits)) as house:
                status, error, _ = await ask(house, {**HI, "max_tokens": 40})
                assert status == 502
                assert "usd_per_day" in error["error"]["rungs"][1]["reason"]
                found = await usage_of(house)
                assert (found["settled"], found["held"]) == (0, 0)
        assert meter.calls == 0


# --- rates --------------------------------------------------------------------------------------


async def test_rates_hold_on_rungs_that_cost_nothing_and_headers_say_what_is_left() -> None:
    meter = Metered(tokens=40)
    async with FakeUpstream(meter) as upstream:
        text = config(
            (upstream.url, FREE), limits="requests_per_minute = 3\ntokens_per_minute = 250"
        )
        async with open_house(text) as house:
            answers = [await ask(house, {**HI, "max_tokens": 40}) for _ in range(5)]
            statuses = [status for status, _, _ in answers]
            # Unless a minute ends just now.
            assert statuses in ([200, 200, 200, 429, 429], [200] * 5)
            headers = answers[0][2]
            assert headers["x-ratelimit-limit-requests"] == "3"
            assert headers["x-ratelimit-remaining-requests"] == "2"
            assert headers["x-ratelimit-limit-tokens"] == "250"
            assert re.fullmatch(r"1m0s|\d+(\.\d+)?s", headers["x-ratelimit-reset-tokens"])
            _, error, refused = answers[-1]
            if statuses[-1] == 429:
                assert error["error"]["code"] == "rate_limit_exceeded"
                assert refused["x-should-retry"] == "true"
                assert 1 <= int(refused["retry-after"]) <= 60


async def test_keys_in_other_encodings_are_wrong_keys_and_nothing_worse() -> None:
    async with FakeUpstream(Metered()) as upstream:
        async with open_house(config((upstream.url, FREE))) as house:
            port = int(house.url.rsplit(":", 1)[1])
            for secret in ("sk-ключ".encode(), "sk-鍵".encode("utf-16"), b"\xff\xfe\x80", b"\xe9"):
                reader, writer = await asyncio.open_connection("127.0.0.1", port)
                writer.write(
                    b"GET /v1/models HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n"
                    b"Authorization: Bearer " + secret.replace(b"\0", b"") + b"\r\n\r\n"
                )
                answer = await reader.read()
                writer.close()
                assert answer.split()[1] in (b"401", b"400")
                assert b'"error"' in answer


# --- a store in trouble -------------------------------------------------------------------------


async def test_what_only_a_call_under_way_holds_is_worth_a_retry_by_its_code() -> None:
    meter = Metered(tokens=40, pace=200)
    async with FakeUpstream(meter) as upstream:
        text = config((upstream.url, PRICED), limits=f"usd_per_day = {usd(60)}")
        async with open_house(text) as house:
            body = {**HI, "max_tokens": 40}
            under_way = asyncio.create_task(ask(house, body))
            while not meter.calls:
                await asyncio.sleep(0)
            status, error, headers = await ask(house, body)
            assert (status, error["error"]["code"]) == (429, "budget_in_use")
            assert (headers["x-should-retry"], headers["retry-after"]) == ("true", "1")
            assert "try again" in error["error"]["message"]
            assert (await under_way)[0] == 200


async def test_a_deleted_state_refuses_who_is_limited_and_nobody_else(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    meter = Metered(tokens=40)
    path = tmp_path / "state.db"
    state = f'[state]\nurl = "sqlite://{path}"'
    bob = hashlib.sha256(b"sk-bob").hexdigest()
    async with FakeUpstream(meter) as upstream:
        text = config((upstream.url, PRICED), limits=f"usd_per_day = {usd(1_000)}", state=state)
        text += f'\n[keys.bob]\nsha256 = "{bob}"\n'
        async with open_house(text) as house:
            assert (await ask(house, {**HI, "max_tokens": 40}))[0] == 200
            free = {"Authorization": "Bearer sk-bob"}
            body = {**HI, "max_tokens": 40}
            assert (await house.post("/v1/chat/completions", body, free))[0] == 200
            path.unlink()
            # What was leased may be spent, and then the state is to blame.
            found = [await ask(house, body) for _ in range(30)]
            spent = [one for one in found if one[0] == 200]
            assert len(spent) <= 19
            status, error, headers = found[-1]
            assert status == 503
            assert headers["retry-after"] == "1"
            assert "the key itself is in order" in error["error"]["message"]
            assert "deleted or replaced" in error["error"]["message"]
            status, _, _ = await house.post("/v1/chat/completions", body, free)
            assert status == 200
            assert not path.exists()
            alarms = [line for line in caplog.messages if "deleted or replaced" in line]
            assert ["--adopt-state" in line for line in alarms if "ALARM" in line] == [True]


async def test_a_locked_state_is_waited_for_within_the_lease_and_nothing_is_charged_twice(
    tmp_path: Path,
) -> None:
    meter = Metered(tokens=40)
    path = tmp_path / "state.db"
    state = f'[state]\nurl = "sqlite://{path}"'
    async with FakeUpstream(meter) as upstream:
        text = config((upstream.url, PRICED), limits=f"usd_per_day = {usd(1_000)}", state=state)
        async with open_house(text) as house:
            body = {**HI, "max_tokens": 40}
            assert (await ask(house, body))[0] == 200
            other = sqlite3.connect(path, isolation_level=None)
            other.execute("BEGIN IMMEDIATE")
            found = [await ask(house, body) for _ in range(12)]
            assert {status for status, _, _ in found} == {200, 503}
            assert "another process" in found[-1][1]["error"]["message"] or (
                "did not answer" in found[-1][1]["error"]["message"]
            )
            other.execute("ROLLBACK")
            other.close()
            async with asyncio.timeout(10):
                while (await ask(house, body))[0] != 200:
                    await asyncio.sleep(0.1)
            async with asyncio.timeout(10):
                while (await usage_of(house))["settled"] != meter.bill(PRICE):
                    await asyncio.sleep(0.1)
