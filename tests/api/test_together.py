"""Each feature is shown by a test of its own; here all of them are in one call together.

What one of them does in between (a sink, a flight, a record of its own) must not surprise another.
"""

from __future__ import annotations

import asyncio
from itertools import product
from typing import Any

import pytest

from tests.api.test_cache import auth, config, embed, text_of, usage_of
from tests.fakes.counting import Counting, floats_of, words_of
from tests.fakes.upstream import FakeUpstream
from tests.house import open_house

LADDERS = ["", "hedge_after_s = 5", 'rescue = "continue"', 'commit = "complete"']
ESCALATING = 'escalate_on = ["empty"]'
CACHES = ['chat = "off"', "", 'scope = "shared"']
LIMITS = ["", "usd_per_day = 1\ntokens_per_minute = 100000\nconcurrent = 90"]


@pytest.mark.parametrize("ladder", [*LADDERS, ESCALATING])
@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("drains", [False, True])
async def test_a_call_is_answered_and_paid_for_once_whatever_it_goes_through(
    ladder: str, cache: str, drains: bool
) -> None:
    for limits, stream, is_named, callers in product(LIMITS, (False, True), (False, True), (1, 3)):
        model = Counting()
        model.turns = 5
        key = 'on_disconnect = "drain"' if drains else ""
        body: dict[str, Any] = {
            "model": "chat",
            "messages": [{"role": "user", "content": "Hi?"}],
            "temperature": 0,
            "stream": stream,
        }
        headers = {**auth("alice"), **({"Idempotency-Key": "one"} if is_named else {})}
        async with (
            FakeUpstream(model) as up,
            open_house(
                config(up.url, up.url, ladder=ladder, cache=cache, key=key, limits=limits)
            ) as house,
            asyncio.timeout(10),
        ):
            answers = await asyncio.gather(
                *(house.post("/v1/chat/completions", body, headers) for _ in range(callers))
            )
            again = await house.post("/v1/chat/completions", body, headers)
            what = (limits, stream, is_named, callers)
            for status, answer, _ in (*answers, again):
                assert status == 200, (what, answer)
                assert text_of(answer) == words_of(body), what
            is_once = is_named or 'chat = "off"' not in cache
            asked = 1 if is_once else callers + 1
            assert len(model.chats) == asked, what
            usage = await usage_of(house)
            assert usage["nano_usd"] == 12_000 * asked, what
            assert not house.shared.ledger.open, what


@pytest.mark.parametrize("drains", [False, True])
async def test_so_are_embeddings(drains: bool) -> None:
    for limits, is_named, callers in product(LIMITS, (False, True), (1, 3)):
        model = Counting()
        key = 'on_disconnect = "drain"' if drains else ""
        named = {"Idempotency-Key": "one"} if is_named else {}
        async with (
            FakeUpstream(model) as up,
            open_house(config(up.url, key=key, limits=limits)) as house,
            asyncio.timeout(10),
        ):
            answers = await asyncio.gather(
                *(embed(house, ["a", "b"], **named) for _ in range(callers))
            )
            again = await embed(house, ["a", "b"], **named)
            for status, answer, _ in (*answers, again):
                assert status == 200, answer
                found = [one["embedding"] for one in answer["data"]]
                assert found == [floats_of("a"), floats_of("b")]
            usage = await usage_of(house)
            assert usage["tokens"] == sum(3 * len(texts) for texts in model.embeds)
            assert not house.shared.ledger.open
