"""Many callers, few requests: every vector at its own index, every fault with its own caller.

`python -m tests.flow.test_batcher 100000` runs the fuzz over so many requests.
"""

from __future__ import annotations

import asyncio
import hashlib
import random
import sys
from collections.abc import AsyncIterator
from typing import Any

import pytest

from router.core import vectors
from router.core.batch import Limits
from router.errors import (
    CallerMistake,
    Draining,
    PromptTooLong,
    UpstreamBroken,
    UpstreamBusy,
    UpstreamError,
    UpstreamFailed,
    UpstreamTooLarge,
)
from router.flow.batcher import Batcher, Tab
from router.flow.gate import NotLetIn
from router.flow.tasks import Tasks
from router.types import Embeddings, Usage
from tests.fakes.clock import Clock

LANE = ("rung", "token", None, "")
WIDTH = 8


def vector_of(value: str | list[int]) -> bytes:
    """A vector that only this input has."""
    digest = hashlib.sha256(repr(value).encode()).digest()
    return vectors.pack([byte / 256 for byte in digest[:WIDTH]])


class Upstream:
    """A backend whose requests wait until the test lets them go."""

    def __init__(self) -> None:
        self.requests: list[list[str]] = []
        self.waiting: list[asyncio.Future[None]] = []
        self.cancelled: list[list[str]] = []
        self.bad: dict[str, UpstreamError] = {}
        self.is_open = False
        self.tokens = 7

    async def send(self, inputs: list[str]) -> Embeddings:
        self.requests.append(inputs)
        if not self.is_open:
            turn = asyncio.get_running_loop().create_future()
            self.waiting.append(turn)
            try:
                await turn
            except asyncio.CancelledError:
                self.cancelled.append(inputs)
                raise
        for text, error in self.bad.items():
            if text in inputs:
                raise error
        return Embeddings([vector_of(text) for text in inputs], Usage(self.tokens * len(inputs)))

    async def let_go(self, count: int = 1) -> None:
        for turn in self.waiting[:count]:
            if not turn.done():
                turn.set_result(None)
        del self.waiting[:count]
        await settle()


class House:
    def __init__(self, **settings: Any) -> None:
        self.tasks = Tasks()
        self.clock = Clock()
        self.batcher = Batcher(self.tasks, self.clock, **settings)
        self.upstream = Upstream()

    def call(
        self,
        *texts: str,
        key: str = "one",
        owner: str | None = None,
        tab: Tab | None = None,
        **limits: int,
    ) -> asyncio.Task[Embeddings]:
        send, held = self.upstream.send, Limits(**limits)
        return asyncio.create_task(
            self.batcher.embed(LANE, key, texts, held, send, owner=owner, cost=cost_of, tab=tab)
        )


def cost_of(usage: Usage) -> int:
    return usage.input_tokens * 20


async def settle() -> None:
    """Let everything run that can."""
    for _ in range(20):
        await asyncio.sleep(0)


@pytest.fixture
async def house() -> AsyncIterator[House]:
    found = House()
    yield found
    await found.tasks.aclose()
    await settle()
    assert not len(found.batcher), "no lane is left behind"


async def test_a_lone_call_goes_at_once(house: House) -> None:
    house.upstream.is_open = True
    found = await house.call("a", "b")
    assert found.vectors == [vector_of("a"), vector_of("b")]
    assert found.usage == Usage(14)
    assert house.upstream.requests == [["a", "b"]]


async def test_what_gathers_goes_as_one(house: House) -> None:
    calls = []
    for number in range(10):
        calls.append(house.call(str(number), key=f"key {number}"))
        await settle()
    assert house.upstream.requests == [["0"], ["1"]]
    await house.upstream.let_go()
    assert house.upstream.requests[2:] == [[str(number) for number in range(2, 10)]]
    await house.upstream.let_go(2)
    for number, call in enumerate(calls):
        assert (await call).vectors == [vector_of(str(number))]
    assert house.batcher.counts.requests == 3
    assert house.batcher.counts.inputs == house.batcher.counts.sent == 10


async def test_an_oversized_request_is_cut_and_put_together(house: House) -> None:
    house.upstream.is_open = True
    texts = [f"text {number}" for number in range(70)]
    found = await house.call(*texts, count_max=32)
    assert [len(request) for request in house.upstream.requests] == [32, 32, 6]
    assert found.vectors == [vector_of(text) for text in texts]
    assert found.usage == Usage(490)


async def test_permits_hold_over_requests(house: House) -> None:
    call = house.call(*"abcdefgh", count_max=4, in_flight_max=6)
    await settle()
    assert [len(request) for request in house.upstream.requests] == [4, 2]
    house.upstream.is_open = True
    await house.upstream.let_go(2)
    await call
    lone = house.call("x", in_flight_max=0)
    assert (await lone).vectors == [vector_of("x")], "one request is always possible"


async def test_equal_texts_of_a_key_travel_once_and_are_paid_in_halves(house: House) -> None:
    tabs = [Tab(), Tab(), Tab()]
    calls = [
        house.call("a", "a", "b", tab=tabs[0]),
        house.call("a", tab=tabs[1]),
        house.call("a", key="two", tab=tabs[2]),
    ]
    await settle()
    assert house.upstream.requests == [["a", "b"], ["a"]]
    await house.upstream.let_go(2)
    found = await asyncio.gather(*calls)
    assert found[0].vectors == [vector_of("a"), vector_of("a"), vector_of("b")]
    assert found[1].vectors == found[2].vectors == [vector_of("a")]
    assert [tab.tokens for tab in tabs] == [12, 2, 7]
    assert sum(tab.nanousd for tab in tabs) == 21 * 20
    assert found[0].usage == Usage(12)


async def test_over_keys_only_where_one_owner_is_named(house: House) -> None:
    calls = [house.call("a", key=key, owner="all") for key in ("one", "two")]
    calls.append(house.call("a", key="one"))
    await settle()
    assert house.upstream.requests == [["a"], ["a"]]
    await house.upstream.let_go(2)
    assert [(await call).usage.input_tokens for call in calls] == [4, 3, 7]


async def test_a_lane_of_its_own_for_each_set_of_parameters(house: House) -> None:
    house.upstream.is_open = True
    for lane in ("one", "two"):
        await house.batcher.embed(lane, "key", ["a"], Limits(), house.upstream.send)
    await house.batcher.embed("ids", "key", [[1, 2], [1, 2], [3]], Limits(), house.upstream.send)
    assert house.upstream.requests == [["a"], ["a"], [[1, 2], [3]]]


async def test_a_caller_that_leaves_takes_out_what_was_not_sent(house: House) -> None:
    tab = Tab()
    first, second = house.call("a", tab=tab), house.call("b")
    await settle()
    gone, stays = house.call("c", "d"), house.call("d", "e")
    await settle()
    gone.cancel()
    await settle()
    await house.upstream.let_go()
    assert house.upstream.requests[2:] == [["d", "e"]]
    await house.upstream.let_go(2)
    assert (await stays).vectors == [vector_of("d"), vector_of("e")]
    assert (await stays).usage == Usage(14)
    await asyncio.gather(first, second)
    assert (tab.tokens, tab.estimated) == (7, False)


async def test_a_request_that_nobody_waits_for_is_cancelled(house: House) -> None:
    tab = Tab()
    call = house.call("a" * 40, tab=tab)
    await settle()
    call.cancel()
    await settle()
    assert house.upstream.cancelled == [["a" * 40]]
    assert (tab.tokens, tab.nanousd, tab.estimated) == (10, 200, True)
    again = house.call("a" * 40)
    await settle()
    await house.upstream.let_go(2)
    assert (await again).vectors == [vector_of("a" * 40)]


async def test_a_call_cancelled_before_anything_ran_blocks_nothing(house: House) -> None:
    for _ in range(4):
        call = house.call("a")
        await asyncio.sleep(0)
        call.cancel()
        await settle()
    house.upstream.is_open = True
    assert (await house.call("a")).vectors == [vector_of("a")]


async def test_who_leaves_a_shared_request_pays_its_part(house: House) -> None:
    blockers = [house.call(name) for name in "xy"]
    await settle()
    tabs = [Tab(), Tab()]
    gone = house.call("a" * 40, key="one", tab=tabs[0])
    stays = house.call("b" * 40, key="two", tab=tabs[1])
    await settle()
    await house.upstream.let_go(2)
    gone.cancel()
    await settle()
    house.upstream.tokens = 11
    await house.upstream.let_go(1)
    assert (await stays).usage == Usage(12)
    assert tabs[0].usage == Usage(10, estimated=True)
    assert sum(tab.nanousd for tab in tabs) == 22 * 20
    await asyncio.gather(*blockers)


async def test_what_others_joined_is_asked_again_when_its_own_caller_leaves(house: House) -> None:
    tabs = [Tab(), Tab(), Tab()]
    gone = house.call("a" * 40, "b" * 40, tab=tabs[0])
    await settle()
    stays, other = house.call("a" * 40, tab=tabs[1]), house.call("a" * 40, tab=tabs[2])
    await settle()
    assert len(house.upstream.requests) == 1
    gone.cancel()
    await settle()
    assert house.upstream.cancelled == [["a" * 40, "b" * 40]]
    assert house.upstream.requests[1:] == [["a" * 40]]
    assert (tabs[0].tokens, tabs[0].nanousd, tabs[0].estimated) == (20, 400, True)
    house.upstream.is_open = True
    await house.upstream.let_go(2)
    assert (await stays).vectors == (await other).vectors == [vector_of("a" * 40)]
    assert [tab.tokens for tab in tabs[1:]] == [4, 3], "the second request is theirs alone"
    assert sum(tab.nanousd for tab in tabs[1:]) == 7 * 20


async def test_who_had_left_before_its_own_caller_has_paid_its_part(house: House) -> None:
    tabs = [Tab(), Tab()]
    first = house.call("a" * 40, tab=tabs[0])
    await settle()
    joined = house.call("a" * 40, tab=tabs[1])
    await settle()
    joined.cancel()
    await settle()
    first.cancel()
    await settle()
    assert house.upstream.cancelled == house.upstream.requests == [["a" * 40]]
    assert [tab.tokens for tab in tabs] == [5, 5]


async def gathered(house: House, *calls: tuple[str, ...]) -> list[asyncio.Task[Embeddings]]:
    """Calls of one key each that travel in one request, which is the third."""
    blockers = [house.call(name, key="blocker") for name in ("x", "y")]
    await settle()
    found = [house.call(*texts, key=f"key {at}") for at, texts in enumerate(calls)]
    await settle()
    house.upstream.is_open = True
    await house.upstream.let_go(2)
    await asyncio.gather(*blockers)
    return found


async def test_one_bad_input_is_found_and_only_its_caller_hears(house: House) -> None:
    house.upstream.bad["bad"] = CallerMistake("empty")
    texts = [(f"text {number}", f"more {number}") for number in range(15)]
    calls = await gathered(house, *texts, ("fine", "bad"))
    *good, bad = await asyncio.gather(*calls, return_exceptions=True)
    for pair, found in zip(texts, good, strict=True):
        assert isinstance(found, Embeddings)
        assert found.vectors == [vector_of(text) for text in pair]
    assert isinstance(bad, CallerMistake)
    assert len(house.upstream.requests) <= 2 + 2 * 5, "by halving"

    house.upstream.is_open = False
    house.upstream.requests.clear()
    calls = await gathered(house, ("a",), ("b",), ("c",), ("d", "bad"))
    # Another key's text is another's; what travels alone is the one that was found.
    await asyncio.gather(*calls, return_exceptions=True)
    before = len(house.upstream.requests)
    house.upstream.is_open = False
    blockers = [house.call(name, key="blocker") for name in ("x", "y")]
    await settle()
    tasks = [house.call("e"), house.call("bad", key="key 3"), house.call("f")]
    await settle()
    house.upstream.is_open = True
    await house.upstream.let_go(2)
    await asyncio.gather(*tasks, *blockers, return_exceptions=True)
    assert house.upstream.requests[before + 2 :] == [["e", "f"], ["bad"]]


async def test_a_lone_caller_s_mistake_is_not_searched(house: House) -> None:
    house.upstream.is_open = True
    house.upstream.bad["b"] = PromptTooLong("too long")
    with pytest.raises(PromptTooLong):
        await house.call("a", "b", "c")
    assert len(house.upstream.requests) == 1


async def test_what_is_too_large_as_a_whole_is_halved_for_a_lone_caller_too(house: House) -> None:
    house.upstream.is_open = True
    house.upstream.bad["b"] = UpstreamTooLarge("at most one")
    with pytest.raises(UpstreamTooLarge):
        await house.call("a", "b", "c")
    assert house.upstream.requests == [["a", "b", "c"], ["a"], ["b", "c"], ["b"]]


async def test_a_bad_input_of_two_callers_is_both_s(house: House) -> None:
    house.upstream.bad["bad"] = CallerMistake("empty")
    house.upstream.is_open = True
    calls = [house.call("bad"), house.call("bad", "good")]
    found = await asyncio.gather(*calls, return_exceptions=True)
    assert all(isinstance(one, CallerMistake) for one in found)


async def test_other_failures_are_everybody_s(house: House) -> None:
    house.upstream.bad["bad"] = UpstreamFailed("500: cannot embed 'bad'")
    calls = await gathered(house, ("a",), ("bad",))
    found = await asyncio.gather(*calls, return_exceptions=True)
    assert all(isinstance(one, UpstreamFailed) for one in found)
    assert "bad" not in repr(found), "one key does not hear another's text"
    assert len(house.upstream.requests) == 3


async def test_the_first_error_ends_a_call_that_was_cut(house: House) -> None:
    house.upstream.bad["a"] = UpstreamFailed("500")
    tab = Tab()
    call = house.call(*"abcdef", count_max=2, tab=tab)
    await settle()
    await house.upstream.let_go()
    with pytest.raises(UpstreamFailed):
        await call
    await settle()
    assert house.upstream.requests == [["a", "b"], ["c", "d"]]
    assert house.upstream.cancelled == [["c", "d"]]
    assert tab.tokens == 2, "what was under way is paid for, what failed is not"


async def test_who_leaves_during_a_search_is_not_asked_for_and_may_come_again(house: House) -> None:
    house.upstream.bad["bad"] = CallerMistake("empty")
    blockers = [house.call(name, key="blocker") for name in ("x", "y")]
    await settle()
    guilty, leaves = house.call("bad", "a", "b"), house.call("c", key="other")
    await settle()
    await house.upstream.let_go(2)
    await house.upstream.let_go()
    assert house.upstream.requests[2:] == [["bad", "c", "a", "b"], ["bad", "a"]]
    leaves.cancel()
    await settle()
    await house.upstream.let_go()
    with pytest.raises(CallerMistake):
        await guilty
    assert len(house.upstream.requests) == 4, "nobody waits for the other half"
    house.upstream.is_open = True
    assert (await house.call("c", "b", key="other")).vectors == [vector_of("c"), vector_of("b")]
    await asyncio.gather(*blockers)


async def test_a_failure_and_a_cancellation_in_one_turn_of_the_loop(house: House) -> None:
    house.upstream.bad["a"] = UpstreamFailed("500")
    call = house.call("a")
    await settle()
    house.upstream.waiting[0].set_result(None)
    call.cancel()
    await settle()
    assert call.cancelled()
    house.upstream.bad.clear()
    other = house.call("a")
    await settle()
    await house.upstream.let_go(2)
    house.upstream.bad["a"] = UpstreamFailed("500")
    call = house.call("a")
    await settle()
    house.upstream.waiting[-1].set_result(None)
    await asyncio.sleep(0)
    call.cancel()
    await asyncio.gather(other, call, return_exceptions=True)


async def test_what_waits_is_bounded() -> None:
    house = House(waiting_max=6)
    calls = [house.call(name) for name in "abcde"]
    await settle()
    with pytest.raises(UpstreamBusy, match="3 inputs of this key"):
        await house.call("f")
    calls.append(house.call(*"xyz", key="other"))
    await settle()
    with pytest.raises(UpstreamBusy, match="6 inputs wait"):
        await house.call("f", key="third")
    house.upstream.is_open = True
    await house.upstream.let_go(2)
    await asyncio.gather(*calls)
    assert (await house.call(*"abcdefgh")).vectors[7] == vector_of("h"), "alone it may be larger"


@pytest.mark.parametrize("error", [KeyError("ours"), NotLetIn("full", "busy")])
async def test_what_is_no_upstream_s_error_reaches_the_callers(
    house: House, error: Exception
) -> None:
    async def fails(_: object) -> Embeddings:
        raise error

    with pytest.raises(type(error)):
        await house.batcher.embed(LANE, "key", ["a"], Limits(), fails)


async def test_wrong_counts_and_lengths_are_refused(house: House) -> None:
    async def too_few(inputs: list[str]) -> Embeddings:
        return Embeddings([vector_of("a")], Usage(1))

    async def ragged(inputs: list[str]) -> Embeddings:
        return Embeddings([b"1234" * len(text) for text in inputs], Usage(1))

    for send, words in ((too_few, "1 vectors for 2"), (ragged, "different lengths")):
        with pytest.raises(UpstreamBroken, match=words):
            await house.batcher.embed(LANE, "key", ["a", "bb"], Limits(), send)


async def test_usage_that_is_not_reported_is_estimated(house: House) -> None:
    async def silent(inputs: list[str]) -> Embeddings:
        return Embeddings([vector_of(text) for text in inputs], Usage(estimated=True))

    found = await house.batcher.embed(LANE, "key", ["a" * 40], Limits(), silent)
    assert found.usage == Usage(10, 0, estimated=True)


@pytest.mark.parametrize("steps", [1, 20])
async def test_at_the_end_of_the_house_all_hear_of_it(house: House, steps: int) -> None:
    """What a task of the house sends; who sends its own is ended by who serves it."""
    call = house.call("a", "b", count_max=1)
    for _ in range(steps):
        await asyncio.sleep(0)
    await house.tasks.aclose()
    with pytest.raises(Draining):
        await call


# --- the fuzz -----------------------------------------------------------------------------------


class Fuzz:
    """Callers with overlapping texts, a backend with faults, and a check of every answer.

    `known` stands for the cache: a request asks only for those of its inputs that are not there.
    """

    def __init__(self, seed: int) -> None:
        self.dice = random.Random(seed)
        self.tasks = Tasks()
        self.clock = Clock()
        self.batcher = Batcher(self.tasks, self.clock, waiting_max=600)
        self.known: dict[tuple[str, str], bytes] = {}
        self.in_flight = 0
        self.reported = 0
        self.charged = 0
        self.outcomes: dict[str, int] = {}

    async def send(self, inputs: list[str]) -> Embeddings:
        self.in_flight += 1
        try:
            assert len(inputs) <= 16
            for _ in range(self.dice.randrange(12)):
                await asyncio.sleep(0)
            chance = self.dice.random()
            if chance < 0.02:
                raise UpstreamFailed("500")
            if chance < 0.03:
                raise UpstreamBusy("429")
            if chance < 0.035:
                return Embeddings([vector_of("wrong")] * (len(inputs) + 1), Usage(1))
            if any(text.startswith("bad") for text in inputs):
                raise self.dice.choice([CallerMistake("bad"), PromptTooLong("bad")])
            tokens = self.dice.randrange(1, 20 * len(inputs))
            self.reported += tokens
            return Embeddings([vector_of(text) for text in inputs], Usage(tokens))
        finally:
            self.in_flight -= 1

    def texts(self) -> list[str]:
        dice = self.dice
        count = dice.choice([1, 1, 1, 2, 5, 20, 40])
        texts = [f"text {dice.randrange(500)}" for _ in range(count)]
        if dice.random() < 0.04:
            texts[dice.randrange(count)] = f"bad {dice.randrange(10)}"
        return texts

    async def request(self) -> None:
        key, texts = f"key {self.dice.randrange(6)}", self.texts()
        found = [self.known.get((key, text)) for text in texts]
        missing = [text for text, vector in zip(texts, found, strict=True) if vector is None]
        tab = Tab()
        try:
            if missing:
                async with asyncio.timeout(None) as limit:
                    if self.dice.random() < 0.06:
                        soon = asyncio.get_running_loop().time()
                        limit.reschedule(soon)
                    answer = await self.batcher.embed(
                        "lane", key, missing, Limits(16, 400), self.send, tab=tab
                    )
                assert len(answer.vectors) == len(missing)
                fresh = iter(answer.vectors)
                for at, vector in enumerate(found):
                    if vector is None:
                        found[at] = next(fresh)
            assert found == [vector_of(text) for text in texts]
            for text in texts:
                if self.dice.random() < 0.2:
                    self.known[key, text] = vector_of(text)
            self.count("answered")
        except UpstreamError as error:
            if isinstance(error, CallerMistake | PromptTooLong):
                assert any(text.startswith("bad") for text in texts), "another's mistake"
            self.count(type(error).__name__)
        except TimeoutError:
            self.count("left")
        finally:
            self.charged += tab.tokens
        while len(self.known) > 600:
            del self.known[next(iter(self.known))]

    def count(self, outcome: str) -> None:
        self.outcomes[outcome] = self.outcomes.get(outcome, 0) + 1

    async def run(self, requests: int, callers: int = 48) -> None:
        left = iter(range(requests))

        async def caller() -> None:
            for number in left:
                if number % 100 == 0:
                    self.clock.now += 1.0
                await self.request()

        await asyncio.gather(*(caller() for _ in range(callers)))
        while self.in_flight or len(self.batcher):
            await asyncio.sleep(0)
        await self.tasks.aclose()


async def test_no_vector_index_count_or_dimension_is_ever_wrong() -> None:
    fuzz = Fuzz(seed=5)
    await fuzz.run(4_000)
    assert fuzz.outcomes["answered"] > 3_000
    assert {"left", "CallerMistake", "UpstreamFailed", "UpstreamBroken"} <= fuzz.outcomes.keys()
    assert fuzz.batcher.counts.sent < fuzz.batcher.counts.inputs, "equal ones travel once"


if __name__ == "__main__":
    fuzz = Fuzz(seed=1)
    asyncio.run(fuzz.run(int(sys.argv[1])))
    print(fuzz.outcomes, fuzz.batcher.counts, fuzz.reported, fuzz.charged)
