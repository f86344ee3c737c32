"""A stream that breaks is continued elsewhere with every character once, or ends in one error."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import orjson
import pytest

from tests.fakes.engine import PROMPT_TOKENS, Engine
from tests.fakes.upstream import FakeUpstream, Handler, Reply, Request
from tests.house import House, ladder_of, open_house

TEXT = "The sea is vast and old.\n\nNo one has ever seen all of it, and no one will."
ASK: dict[str, Any] = {
    "model": "chat",
    "messages": [{"role": "user", "content": "Tell me of the sea."}],
    "stream": True,
}
RESCUE = 'rescue = "continue"\nidle_s = 0.3'


class Heard:
    """What a client heard of one stream."""

    def __init__(self, raw: bytes, is_cut: bool, headers: dict[str, str]) -> None:
        self.payloads = re.findall(rb"data: (.*)\n\n", raw)
        self.is_cut = is_cut
        self.headers = headers
        self.is_done = self.payloads[-1:] == [b"[DONE]"]
        values = [orjson.loads(one) for one in self.payloads if one != b"[DONE]"]
        self.errors = [one for one in values if "error" in one]
        self.chunks = [one for one in values if "error" not in one]
        choices = [choice for one in self.chunks for choice in one["choices"]]
        self.text = "".join(choice["delta"].get("content") or "" for choice in choices)
        self.roles = [c["delta"]["role"] for c in choices if c["delta"].get("role")]
        self.finishes = [c["finish_reason"] for c in choices if c["finish_reason"]]
        self.heads = {(one["id"], one["created"], one["model"]) for one in self.chunks}
        self.usage: Any = next((one["usage"] for one in self.chunks if one.get("usage")), None)

    def is_one_whole_stream(self, text: str = TEXT) -> bool:
        is_whole = self.is_done and not self.is_cut and not self.errors
        is_one = len(self.heads) == len(self.roles) == len(self.finishes) == 1
        return is_whole and is_one and self.text == text

    def is_clean_error(self, text: str = TEXT) -> bool:
        is_honest = len(self.errors) == 1 and not self.is_done and not self.finishes
        return is_honest and self.is_cut and text.startswith(self.text)


async def hear(house: House, first: Engine | None = None, **extra: Any) -> Heard:
    """Ask, and tell the first engine when some of its text has come."""
    body = {**ASK, **extra}
    async with house.client.post(f"{house.url}/v1/chat/completions", json=body) as answer:
        raw, is_cut = b"", False
        try:
            async for data in answer.content.iter_any():
                raw += data
                if first is not None and b'"content":"' in raw:
                    first.heard.set()
        except Exception:
            is_cut = True
        return Heard(raw, is_cut, dict(answer.headers))


@asynccontextmanager
async def house_of(*handlers: Handler, ladder: str = RESCUE) -> AsyncIterator[House]:
    """A house before these upstreams, its canaries flown."""
    async with AsyncExitStack() as stack:
        ups = [await stack.enter_async_context(FakeUpstream(handler)) for handler in handlers]
        text = ladder_of(*(up.url for up in ups), ladder=ladder)
        house = await stack.enter_async_context(open_house(text))
        pipeline = house.gateway.service.pipeline
        ladders = house.gateway.service.names
        await pipeline.continuity.prove_all(ladders.ladders["chat"].rungs)
        yield house


def engine(**settings: Any) -> Engine:
    return Engine({"": TEXT}, **settings)


ENDS = ["cut", "clean", "silent", "error", "malformed", "given up"]


@pytest.mark.parametrize("end", ENDS)
async def test_a_broken_stream_is_continued_by_the_next_rung(end: str) -> None:
    first = engine(name="first", cut_after=7, end=end, waits=True)
    second = engine(name="second")
    async with house_of(first.handle, second.handle) as house:
        heard = await hear(house, first)
        assert heard.is_one_whole_stream()
        assert heard.heads == {("chatcmpl-first", 5, "first")}
        [asked] = second.asked
        assert asked["messages"][-1]["role"] == "assistant"
        assert TEXT.startswith(asked["messages"][-1]["content"])
        [line] = house.lines
        causes = [attempt["cause"] for attempt in line["attempts"]]
        assert causes[1:] == ["ok"]
        assert causes[0] in ("broken", "timeout_idle", "failed")
        assert (line["rung"], line["status"], line["error"]) == ("b1/org/m", 200, None)


@pytest.mark.parametrize("at", range(1, 17))
async def test_wherever_it_breaks_the_text_comes_once(at: int) -> None:
    first = engine(cut_after=at)
    async with house_of(first.handle, engine().handle) as house:
        assert (await hear(house)).is_one_whole_stream()


@pytest.mark.parametrize("end", ["cut", "clean"])
async def test_a_second_break_is_continued_by_a_third_rung(end: str) -> None:
    engines = [engine(cut_after=3), engine(cut_after=4, end=end), engine()]
    async with house_of(*(one.handle for one in engines)) as house:
        assert (await hear(house)).is_one_whole_stream()
        assert engines[2].asked[0]["messages"][-1]["content"] == "The sea is vast and old.\n\nNo"


async def test_without_another_rung_that_continues_there_is_one_clean_error() -> None:
    for second in ("anew", "loses space", "refuses"):
        engines = [engine(cut_after=7), engine(manner=second)]
        async with house_of(*(one.handle for one in engines)) as house:
            heard = await hear(house)
            assert heard.is_clean_error(), second
            assert len(engines[1].asked) == 0, "it was not even asked"
            assert house.lines[0]["error"] == "broken"


async def test_off_is_off() -> None:
    second = engine()
    async with house_of(engine(cut_after=7).handle, second.handle, ladder="idle_s = 1") as house:
        assert (await hear(house)).is_clean_error()
        assert second.asked == []


@pytest.mark.parametrize(
    "extra",
    [
        {"tools": [{"type": "function", "function": {"name": "f"}}]},
        {"logprobs": True},
        {"response_format": {"type": "json_object"}},
    ],
)
async def test_what_is_more_than_plain_text_ends_in_the_clean_error(extra: Any) -> None:
    second = engine()
    async with house_of(engine(cut_after=7).handle, second.handle) as house:
        assert (await hear(house, **extra)).is_clean_error()
        assert second.asked == []


async def test_an_echo_that_the_canaries_did_not_show_is_a_clean_error_and_the_last() -> None:
    second = engine()
    async with house_of(engine(cut_after=7).handle, second.handle) as house:
        second.manner = "anew"
        assert (await hear(house)).is_clean_error()
        assert house.lines[0]["attempts"][1]["cause"] == "echoed"
        assert (await hear(house)).is_clean_error()
        assert len(second.asked) == 1, "it is not asked again"


async def test_a_rung_that_goes_on_with_something_else_is_a_clean_error() -> None:
    second = engine()
    async with house_of(engine(cut_after=7).handle, second.handle) as house:
        second.manner = "calls a tool"
        heard = await hear(house)
        assert heard.is_clean_error()
        assert b"tool_calls" not in b"".join(heard.payloads)


async def test_a_rescuer_that_refuses_leaves_the_clean_error() -> None:
    second = engine()
    async with house_of(engine(cut_after=7).handle, second.handle) as house:
        second.manner = "refuses"
        assert (await hear(house)).is_clean_error()


class TestTokens:
    async def test_no_more_tokens_are_asked_for_than_are_left(self) -> None:
        second = engine()
        async with house_of(engine(cut_after=4).handle, second.handle) as house:
            heard = await hear(house, max_tokens=10)
            assert second.asked[0]["max_tokens"] == 6
            assert heard.text == " ".join(TEXT.split(" ")[:9])
            assert heard.finishes == ["length"]

    async def test_an_answer_that_only_lacks_its_end_needs_no_second_rung(self) -> None:
        second = engine()
        async with house_of(engine(cut_after=4).handle, second.handle) as house:
            asked: dict[str, Any] = {"max_tokens": 4, "stream_options": {"include_usage": True}}
            heard = await hear(house, **asked)
            assert heard.is_one_whole_stream("The sea is vast")
            assert heard.finishes == ["length"]
            assert heard.usage is not None
            assert second.asked == []
            assert house.lines[0]["status"] == 200
            assert house.lines[0]["rung"] == "b0/org/m"

    async def test_usage_is_that_of_both_attempts(self) -> None:
        first, second = engine(cut_after=7, waits=True), engine()
        async with house_of(first.handle, second.handle) as house:
            heard = await hear(house, first, stream_options={"include_usage": True})
            assert heard.is_one_whole_stream()
            [line] = house.lines
            assert line["estimated"]
            assert heard.usage["prompt_tokens"] == line["input_tokens"] > PROMPT_TOKENS
            assert heard.usage["completion_tokens"] == line["output_tokens"]
            second.reports_usage = False
            guessed = await hear(house, stream_options={"include_usage": True})
            assert guessed.usage["completion_tokens"] == house.lines[1]["output_tokens"] > 10


class TestStops:
    # The second rung alone would see only the "will" of "one will".
    TEXT = "First, one is.\nThen, one will not be.\nLast."

    @pytest.mark.parametrize("at", range(1, 9))
    @pytest.mark.parametrize("stop", ["one will", ["Last", "\nThen, one"], "zzz", " "])
    async def test_a_stop_string_across_the_seam_is_seen(self, at: int, stop: Any) -> None:
        whole, first, second = (Engine({"": self.TEXT}) for _ in range(3))
        first.cut_after = at
        async with house_of(whole.handle) as house:
            wanted = (await hear(house, stop=stop)).text
        async with house_of(first.handle, second.handle) as house:
            heard = await hear(house, stop=stop)
            assert heard.is_one_whole_stream(wanted), (heard.text, heard.errors)

    async def test_no_more_is_held_for_a_stop_string_than_has_room(self) -> None:
        heard = asyncio.Event()

        async def large(request: Request, reply: Reply) -> None:
            model = Engine({})
            await reply.start()
            await reply.event({**model.chunk({"content": "It is E"}), "x": "y" * (1 << 20)})
            await heard.wait()
            reply.cut()

        second = engine()
        async with house_of(large, second.handle) as house:
            url = f"{house.url}/v1/chat/completions"
            async with house.client.post(url, json={**ASK, "stop": "END"}) as answer:
                raw = b""
                while b"\n\n" not in raw:
                    raw += await answer.content.readany()
                heard.set()
                with pytest.raises(aiohttp.ClientError):
                    while data := await answer.content.readany():
                        raw += data
            assert b"It is E" in raw
            assert b'"error"' in raw
            assert second.asked == [], "what was not followed is not continued"

    async def test_a_second_rung_that_is_slow_to_begin_is_not_the_faster_for_it(self) -> None:
        first, second = engine(cut_after=7), engine()
        async with house_of(first.handle, second.handle) as house:
            await hear(house)
            views = house.shared.board.views(house.gateway.service.names.ladders["chat"])
            assert views["b1/org/m"].first_token_s() is None

    async def test_text_held_for_a_stop_string_keeps_the_stream_alive(self) -> None:
        async def slow(request: Request, reply: Reply) -> None:
            await reply.start()
            pieces = Engine({})
            for text in ("It is", " E", "N", "d."):
                await reply.event(pieces.chunk({"content": text}))
                await asyncio.sleep(0.2)
            await reply.event(pieces.chunk({}, "stop"))
            await reply.end()

        async with house_of(slow) as house:
            heard = await hear(house, stop="END!")
            assert heard.text == "It is ENd."


RECORDING = Path(__file__).parents[1] / "recordings" / "openai" / "llama-cpp-stream.sse"


@pytest.mark.parametrize("end", ["cut", "clean"])
@pytest.mark.parametrize("rescue", ["off", "continue"])
async def test_the_stream_cut_at_every_byte_offset_is_never_a_lie(rescue: str, end: str) -> None:
    recorded = RECORDING.read_bytes()
    whole = Heard(recorded, False, {})
    second = Engine({"": whole.text})

    async def cut_short(request: Request, reply: Reply) -> None:
        offset = int(request.json["user"])
        await reply.start()
        if offset:
            await reply.send(recorded[:offset])
        if end == "clean":
            await reply.end()
        else:
            reply.close()

    ladder = f'rescue = "{rescue}"'
    seen = {"whole": 0, "error": 0}
    async with house_of(cut_short, second.handle, ladder=ladder) as house:
        # Fewer at once than failures in a row open a breaker, which is not what is tried here.
        room = asyncio.Semaphore(4)

        async def one(offset: int) -> None:
            async with room:
                house.shared.board.reopen()
                heard = await hear(house, user=str(offset), max_tokens=8)
            if heard.is_one_whole_stream(whole.text):
                seen["whole"] += 1
                assert heard.finishes == ["length"]
            else:
                seen["error"] += 1
                assert heard.is_clean_error(whole.text), (offset, heard.__dict__)
                assert heard.text, "before the first text another rung answers"

        await asyncio.gather(*(one(offset) for offset in range(len(recorded) + 1)))
    assert sum(seen.values()) == len(recorded) + 1
    assert (seen["error"] == 0) == (rescue == "continue")
    assert seen["whole"] > 400
