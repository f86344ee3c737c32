"""A charge holds what may come, follows what comes, and settles what came: exactly once."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import pytest

from router.core import chat_request
from router.core.estimate import Estimates
from router.errors import QuotaUsedUp, UpstreamBroken, UpstreamTimeout
from router.flow.charge import Charge
from router.types import (
    ChatCall,
    EmbedCall,
    Key,
    KeyLimits,
    Ladder,
    Needs,
    Policy,
    Price,
    Rung,
    Task,
    Usage,
)
from tests.fakes.clock import Clock
from tests.flow.test_ledger import A_TOKEN, PRICE, Desk, desk

RUNG = Rung("b", "m", price=PRICE)
CHAT = Ladder("chat", Task.CHAT, (RUNG,))
EMBED = Ladder("embed", Task.EMBEDDINGS, (RUNG,))
# What is set aside for a prompt of two characters.
PROMPT = 33


@dataclass
class Counter:
    """Makes charges of a key with so many tokens' worth, on one rung."""

    desk: Desk
    key: Key
    clock: Clock
    estimates: Estimates

    async def open(
        self, *, stream: bool = True, price: Price | None = PRICE, **body: Any
    ) -> Charge:
        body = {"messages": [{"role": "user", "content": "Hi"}], **body}
        call = ChatCall(
            id="c",
            key=self.key,
            ladder=CHAT,
            policy=Policy.ORDER,
            body=body,
            stream=stream,
            wants_usage=False,
            needs=chat_request.needs_of(body),
        )
        admission = await self.desk.admit(self.key)
        charge = Charge(self.desk.ledger, admission, call, RUNG, price, self.estimates, self.clock)
        await charge.open(None)
        return charge

    @property
    def held(self) -> int:
        return sum(hold.token_count for hold in self.desk.ledger.open.values())


@asynccontextmanager
async def counter(tokens: int | None) -> AsyncIterator[Counter]:
    async with desk() as d:
        limits = KeyLimits(usd_per_day=None if tokens is None else tokens * A_TOKEN)
        yield Counter(d, Key("k", limits=limits), Clock(), Estimates())
        assert not d.ledger.open


async def test_a_streams_hold_starts_small_and_stays_ahead() -> None:
    async with counter(10_000) as c:
        charge = await c.open(max_tokens=500)
        assert c.held == PROMPT + 64
        assert not charge.is_due(100, 31)
        assert charge.is_due(100, 32)
        for received in range(32, 500):
            if charge.is_due(received, received):
                assert await charge.keep_ahead(received, received)
            assert PROMPT + received + 16 <= c.held <= PROMPT + 500 or c.held == PROMPT + 500
        # It was told to end here: nothing more has to be set aside.
        assert not charge.is_due(500, 500)
        charge.used(Usage(5, 500))
        assert charge.close(None) == Usage(5, 500)
        assert charge.nanousd == 505 * A_TOKEN


async def test_a_stream_ends_where_its_hold_cannot_grow_and_costs_what_it_was_allowed() -> None:
    async with counter(PROMPT + 100) as c:
        charge = await c.open()
        assert charge.clamped_to == 100
        assert await charge.keep_ahead(40, 40)
        assert c.held == PROMPT + 100
        assert not charge.is_due(100, 100)
        assert charge.is_due(101, 101)
        assert not await charge.keep_ahead(101, 101)
        assert "usd_per_day" in charge.cut_reason
        # A little above is a mistake of counting; much is a rung that did not stop.
        assert charge.received(103, 103).output_tokens == 100
        assert charge.received(300, 300).output_tokens == 300
        charge.used(charge.received(101, 101))
        charge.close(None)
        assert charge.nanousd <= (PROMPT + 100) * A_TOKEN


async def test_a_rung_that_goes_on_after_its_end_is_paid_for_while_there_is_money() -> None:
    async with counter(10_000) as c:
        charge = await c.open(max_tokens=50)
        assert c.held == PROMPT + 50
        assert await charge.keep_ahead(51, 51)
        assert c.held == PROMPT + 51 + 64
        charge.used(charge.received(60, 60))
        charge.close(None)
        assert charge.usage == Usage(8, 60, estimated=True)


async def test_several_choices_hold_for_each() -> None:
    async with counter(10_000) as c:
        charge = await c.open(n=3, max_tokens=40)
        assert c.held == PROMPT + 120
        charge.close(UpstreamBroken("broke"))


async def test_a_whole_answer_and_hidden_reasoning_hold_all_that_may_come() -> None:
    async with counter(10_000) as c:
        whole = await c.open(stream=False, max_tokens=300)
        assert c.held == PROMPT + 300
        whole.close(UpstreamBroken("broke"))
        c.estimates.hides_reasoning = True
        hidden = await c.open(max_tokens=300)
        assert c.held == PROMPT + 300
        hidden.close(UpstreamBroken("broke"))


async def test_a_key_without_limits_holds_too_and_is_never_cut() -> None:
    async with counter(None) as c:
        charge = await c.open()
        assert charge.clamped_to is None
        for received in range(0, 5_000, 30):
            if charge.is_due(received, received):
                assert await charge.keep_ahead(received, received)
            assert c.held >= PROMPT + received
        charge.used(Usage(5, 4_999))
        charge.close(None)
        await c.desk.books.flush()
        (line,) = await c.desk.store.usage(["key"], key="k", since=0, until=2**40)
        assert (line.totals.settled, line.totals.overrun) == (5_004 * A_TOKEN, 0)


async def test_what_costs_nothing_holds_nothing() -> None:
    async with counter(1) as c:
        charge = await c.open(price=Price(0, 0))
        assert not charge.is_due(10**6, 10**6)
        charge.used(Usage(5, 1_000))
        charge.close(None)
        assert charge.nanousd == 0


async def test_what_cannot_be_paid_holds_nothing() -> None:
    async with counter(PROMPT) as c:
        with pytest.raises(QuotaUsedUp):
            await c.open()
        assert c.held == 0


@pytest.mark.parametrize(
    ("error", "stream", "usage"),
    [
        (asyncio.CancelledError(), True, Usage(8, 0, True)),
        (ConnectionResetError(), True, Usage(8, 0, True)),
        (UpstreamTimeout("slow", phase="first_token"), True, Usage(8, 0, True)),
        (UpstreamTimeout("slow", phase="connect"), True, None),
        (UpstreamBroken("broke"), True, None),
        # Two seconds at fifty tokens each.
        (asyncio.CancelledError(), False, Usage(8, 100, True)),
        (UpstreamBroken("broke"), False, None),
    ],
)
async def test_what_nothing_came_of_costs_what_was_made_of_it_unseen(
    error: BaseException, stream: bool, usage: Usage | None
) -> None:
    async with counter(10_000) as c:
        charge = await c.open(stream=stream, max_tokens=300)
        c.clock.now += 2
        assert charge.close(error) == usage


async def test_a_cancelled_whole_answer_never_costs_more_than_was_asked_for() -> None:
    async with counter(10_000) as c:
        charge = await c.open(stream=False, max_tokens=30)
        c.clock.now += 3_600
        assert charge.close(asyncio.CancelledError()) == Usage(8, 30, True)


async def test_what_was_received_stays_charged_when_we_cancel() -> None:
    async with counter(10_000) as c:
        charge = await c.open()
        charge.used(charge.received(20, 20))
        assert charge.close(asyncio.CancelledError()) == Usage(8, 20, True)


async def test_reports_teach_what_the_next_one_holds() -> None:
    async with counter(10_000) as c:
        charge = await c.open()
        c.clock.now += 2
        charge.learn(Usage(5, 400), 1_600, 400)
        assert c.estimates.tokens_per_s == 80
        charge.close(UpstreamBroken("broke"))
        again = await c.open()
        assert c.held == PROMPT + 80
        again.close(UpstreamBroken("broke"))


async def test_embeddings_hold_and_cost_their_inputs() -> None:
    async with counter(1_000) as c:
        call = EmbedCall(
            id="e", key=c.key, ladder=EMBED, policy=Policy.ORDER, inputs=["a" * 40], needs=Needs()
        )
        admission = await c.desk.admit(c.key)
        for error, cost in ((None, 9), (asyncio.CancelledError(), 10)):
            charge = Charge(c.desk.ledger, admission, call, RUNG, PRICE, c.estimates, c.clock)
            await charge.open(None)
            assert c.held == 21
            if error is None:
                charge.used(Usage(9))
            charge.close(error)
            assert charge.nanousd == cost * A_TOKEN
        assert charge.call_nanousd(None) == 19 * A_TOKEN
