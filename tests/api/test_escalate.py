"""`escalate_on` asks for a better answer, and takes the last one for want of it.

`commit = "complete"` sends a stream when it is whole, so every failure before that moves on.
"""

from __future__ import annotations

import asyncio
import re
from typing import Any

import orjson
import pytest

from tests.api.test_chat import HI, STREAM, answering, playing, streamed
from tests.backends.rigs.openai import HEAD, OpenAiRig, chunk, error
from tests.fakes.upstream import FakeUpstream, Handler, Reply, Request
from tests.house import ladder_of, open_house

GOOD = OpenAiRig().handle
JSON = {"response_format": {"type": "json_object"}}
ALL = 'escalate_on = ["invalid_json", "empty", "refusal", "content_filter"]'
COMPLETE = f'commit = "complete"\n{ALL}'
BAD = {
    "empty": ("", "stop"),
    "refusal": ("I'm sorry, but I can't help with that.", "stop"),
    "invalid_json": ("Sure! {", "stop"),
    "content_filter": ("So", "content_filter"),
}


def saying(text: str, finish: str = "stop", name: str = "chatcmpl-said") -> Handler:
    """A model that gives this answer, whole or streamed word by word."""

    async def handle(request: Request, reply: Reply) -> None:
        if not request.json.get("stream"):
            message = {"role": "assistant", "content": text}
            choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": finish}
            usage = {"prompt_tokens": 5, "completion_tokens": 2, "total_tokens": 7}
            await reply.json({**HEAD, "id": name, "choices": [choice], "usage": usage})
            return
        words = re.findall(r"\s*\S+", text)
        payloads = [chunk({"role": "assistant"}), *(chunk({"content": word}) for word in words)]
        payloads += [chunk({}, finish), b"[DONE]"]
        await playing([one if one == b"[DONE]" else {**one, "id": name} for one in payloads])(
            request, reply
        )

    return handle


@pytest.mark.parametrize("why", BAD)
@pytest.mark.parametrize("stream", [False, True])
async def test_an_answer_that_is_none_goes_on_to_the_next_rung(why: str, stream: bool) -> None:
    extra = JSON if why == "invalid_json" else {}
    better = saying('{"a":1}')
    async with FakeUpstream(saying(*BAD[why])) as bad, FakeUpstream(better) as good:
        async with open_house(ladder_of(bad.url, good.url, ladder=COMPLETE)) as house:
            if stream:
                found, _, headers = await streamed(house, {**STREAM, **extra})
                assert found[-1] == b"[DONE]"
                assert b'{\\"a\\":1}' in b"".join(found)
                assert headers["x-rungway-rung"] == "b1/org/m"
            else:
                status, body, plain = await house.post("/v1/chat/completions", {**HI, **extra})
                assert (status, plain["x-rungway-rung"]) == (200, "b1/org/m")
                assert body["choices"][0]["message"]["content"] == '{"a":1}'
                assert house.lines[0]["output_tokens"] == 4, "both answers were made"
            [line] = house.lines
            causes = [attempt["cause"] for attempt in line["attempts"]]
            assert causes == [f"escalated_{why}", "ok"]
            await streamed(house, STREAM)
            assert len(bad.requests) == 2, "a rung that answers is not kept away from"


@pytest.mark.parametrize("stream", [False, True])
async def test_the_last_such_answer_is_better_than_none(stream: bool) -> None:
    first, last = saying("", name="chatcmpl-first"), saying("", name="chatcmpl-last")
    broken = answering(500, error("it broke"))
    async with FakeUpstream(first) as a, FakeUpstream(last) as b, FakeUpstream(broken) as c:
        async with open_house(ladder_of(a.url, b.url, c.url, ladder=COMPLETE)) as house:
            if stream:
                found, _, headers = await streamed(house)
                assert found[-1] == b"[DONE]"
                assert {orjson.loads(one)["id"] for one in found[:-1]} == {"chatcmpl-last"}
                assert headers["x-rungway-rung"] == "b1/org/m"
            else:
                status, body, plain = await house.post("/v1/chat/completions", HI)
                assert (status, body["id"]) == (200, "chatcmpl-last")
                assert plain["x-rungway-rung"] == "b1/org/m"
            [line] = house.lines
            assert (line["status"], line["error"], line["rung"]) == (200, None, "b1/org/m")


async def test_without_escalation_an_empty_answer_is_an_answer() -> None:
    async with FakeUpstream(saying("")) as up, FakeUpstream(GOOD) as other:
        async with open_house(ladder_of(up.url, other.url)) as house:
            status, body, _ = await house.post("/v1/chat/completions", HI)
            assert (status, body["choices"][0]["message"]["content"]) == (200, "")
            assert other.requests == []


async def test_a_stream_that_is_whole_at_its_first_content_is_judged_without_waiting() -> None:
    async with FakeUpstream(saying("")) as bad, FakeUpstream(GOOD) as good:
        async with open_house(ladder_of(bad.url, good.url, ladder=ALL)) as house:
            found, _, headers = await streamed(house)
            assert headers["x-rungway-rung"] == "b1/org/m"
            assert found[-1] == b"[DONE]"


async def test_a_stream_already_going_out_is_not_judged() -> None:
    heard = asyncio.Event()

    async def slow(request: Request, reply: Reply) -> None:
        await reply.start()
        await reply.event(chunk({"role": "assistant", "content": "I'm sorry, but I can't."}))
        await heard.wait()
        await reply.event(chunk({}, "stop"))
        await reply.event(b"[DONE]")
        await reply.end()

    async with FakeUpstream(slow) as up, FakeUpstream(GOOD) as other:
        async with open_house(ladder_of(up.url, other.url, ladder=ALL)) as house:
            url = f"{house.url}/v1/chat/completions"
            async with house.client.post(url, json=STREAM) as answer:
                first = await answer.content.readany()
                heard.set()
                raw = first + await answer.content.read()
            assert raw.endswith(b"data: [DONE]\n\n")
            assert other.requests == []


class TestCommitComplete:
    ENDS = ("cut", "silent", "clean")

    @pytest.mark.parametrize("end", ENDS)
    async def test_a_break_anywhere_moves_to_the_next_rung(self, end: str) -> None:
        text = [chunk({"role": "assistant"}), chunk({"content": "Hel"}), chunk({"content": "lo"})]
        ladder = 'commit = "complete"\nidle_s = 0.2'
        async with FakeUpstream(playing(text, end=end)) as bad, FakeUpstream(GOOD) as good:
            async with open_house(ladder_of(bad.url, good.url, ladder=ladder)) as house:
                found, raw, headers = await streamed(house)
                assert found[-1] == b"[DONE]"
                assert b'"Hel"' not in raw
                assert headers["x-rungway-rung"] == "b1/org/m"

    async def test_the_stream_is_the_one_that_was_sent(self) -> None:
        async with FakeUpstream(GOOD) as up, open_house(ladder_of(up.url)) as house:
            plain, _, _ = await streamed(house)
        async with FakeUpstream(GOOD) as up:
            text = ladder_of(up.url, ladder='commit = "complete"')
            async with open_house(text) as house:
                kept, _, _ = await streamed(house)
        assert kept == plain

    async def test_comments_keep_the_client_waiting(self) -> None:
        async def slow(request: Request, reply: Reply) -> None:
            await reply.start()
            for word in ("It", "is", "slow"):
                await reply.event(chunk({"content": word}))
                await asyncio.sleep(0.15)
            await reply.event(chunk({}, "stop"))
            await reply.event(b"[DONE]")
            await reply.end()

        text = ladder_of("URL", server="keepalive_s = 0.1", ladder='commit = "complete"')
        async with FakeUpstream(slow) as up:
            async with open_house(text.replace("URL", up.url)) as house:
                found, raw, _ = await streamed(house)
        assert raw.startswith(b": keep-alive\n\n")
        assert len(found) == 5

    async def test_what_is_kept_has_a_limit(self) -> None:
        big: list[Any] = [chunk({"content": "x" * 300_000}) for _ in range(5)]
        text = ladder_of("URL", server="max_answer_mib = 1", ladder='commit = "complete"')
        async with FakeUpstream(playing([*big, chunk({}, "stop"), b"[DONE]"])) as up:
            async with open_house(text.replace("URL", up.url)) as house:
                status, body, _ = await house.post("/v1/chat/completions", STREAM)
                assert status == 502
                assert "more than 1048576 bytes" in body["error"]["message"]
