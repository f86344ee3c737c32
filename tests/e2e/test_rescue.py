"""A real model server is killed in the middle of a stream, and the client does not notice."""

from __future__ import annotations

import os
import re
import signal
import subprocess
from typing import Any

import aiohttp
import orjson
import pytest

from tests.conftest import model_process
from tests.fakes.upstream import FakeUpstream, Reply, Request
from tests.house import House, open_house

MODEL = "SmolLM2-135M-Instruct"
ASK: dict[str, Any] = {
    "model": "chat",
    "messages": [{"role": "user", "content": "Tell me about the sea in three sentences."}],
    "temperature": 0,
    "max_tokens": 60,
    "stream": True,
    "stream_options": {"include_usage": True},
}


def config(*urls: str) -> str:
    backends = "".join(
        f'[backends.b{i}]\nkind = "openai"\nurl = "{url}"\n' for i, url in enumerate(urls)
    )
    rungs = "".join(
        f'[[ladders.chat.rungs]]\nbackend = "b{i}"\nmodel = "{MODEL}"\n' for i in range(len(urls))
    )
    return (
        f'[server]\nauth = "open"\n{backends}[ladders.chat]\nrescue = "continue"\n'
        f"first_token_s = 60\n{rungs}"
    )


async def prove(house: House) -> None:
    service = house.gateway.service
    await service.pipeline.continuity.prove_all(service.names.ladders["chat"].rungs)


class Stream:
    """What came of a stream: its text by event, and whether it looks like one."""

    def __init__(self, raw: bytes) -> None:
        payloads = re.findall(rb"data: (.*)\n\n", raw)
        chunks = [orjson.loads(one) for one in payloads if one != b"[DONE]"]
        choices = [choice for one in chunks for choice in one.get("choices") or [{}]]
        deltas = [choice.get("delta") or {} for choice in choices]
        self.pieces = [delta["content"] for delta in deltas if delta.get("content")]
        self.text = "".join(self.pieces)
        self.finishes = [one["finish_reason"] for one in choices if one.get("finish_reason")]
        self.is_one = (
            payloads[-1] == b"[DONE]"
            and len({(one.get("id"), one.get("model")) for one in chunks}) == 1
            and sum("role" in delta for delta in deltas) == 1
            and len(self.finishes) == 1
        )
        self.usage: Any = next((one["usage"] for one in chunks if one.get("usage")), None)

    def text_pieces(self, text: str) -> int:
        """How many of the pieces make up this beginning of the text."""
        count = 0
        while len("".join(self.pieces[:count])) < len(text):
            count += 1
        return count


async def hear(house: House, kill: subprocess.Popen[str] | None = None) -> Stream:
    """The stream to its end; the process is killed when some words have come."""
    async with house.client.post(f"{house.url}/v1/chat/completions", json=ASK) as answer:
        raw = b""
        async for data in answer.content.iter_any():
            raw += data
            if kill is not None and raw.count(b'"content":"') > 8:
                os.kill(kill.pid, signal.SIGKILL)
                kill = None
        return Stream(raw)


class Window:
    """Passes requests on to a real server, and shows what was asked and answered."""

    def __init__(self, url: str, client: aiohttp.ClientSession) -> None:
        self._url = url
        self._client = client
        self.asked: Any = None
        self.answered = b""

    async def handle(self, request: Request, reply: Reply) -> None:
        self.asked, self.answered = request.json, b""
        async with self._client.post(self._url + request.path, data=request.body) as answer:
            await reply.start()
            async for data in answer.content.iter_any():
                self.answered += data
                await reply.send(data)
            await reply.end()


async def test_a_model_server_killed_in_mid_stream_is_not_noticed(
    real_models: dict[str, str],
) -> None:
    async with aiohttp.ClientSession() as client:
        window = Window(real_models["chat"], client)
        with model_process() as (addresses, doomed):
            async with (
                FakeUpstream(window.handle) as second,
                open_house(config(addresses["chat"], second.url)) as house,
            ):
                await prove(house)
                heard = await hear(house, kill=doomed)
                [line] = house.lines
    assert doomed.returncode == -signal.SIGKILL
    assert [one["cause"] for one in line["attempts"]] == ["broken", "ok"]
    assert (line["status"], line["error"], line["rung"]) == (200, None, f"b1/{MODEL}")
    assert heard.is_one
    # At the seam nothing is lost and nothing comes twice: what the second server was shown, and
    # what it said to that, are all of the text.
    shown, said = window.asked["messages"][-1]["content"], Stream(window.answered).text
    assert shown.startswith("The sea")
    assert said
    assert heard.text == shown + said
    assert "".join(heard.pieces[: heard.text_pieces(shown)]) == shown
    assert window.asked["max_tokens"] == ASK["max_tokens"] - heard.text_pieces(shown)
    assert line["estimated"]
    assert heard.usage["completion_tokens"] == line["output_tokens"]


async def test_wherever_a_real_answer_breaks_its_text_is_continued(
    real_models: dict[str, str],
) -> None:
    """The real stream cut behind each of its events, by a server that plays it again."""
    async with open_house(config(real_models["chat"])) as house:
        url = f"{real_models['chat']}/v1/chat/completions"
        asked = {**ASK, "model": MODEL, "max_tokens": 24}
        async with house.client.post(url, json=asked) as answer:
            frames = re.findall(rb"data: .*\n\n", await answer.content.read())
    whole = Stream(b"".join(frames))

    async def play(request: Request, reply: Reply) -> None:
        if "user" not in request.json:
            await reply.json({"error": {"message": "no canaries here"}}, 400)
            return
        await reply.start()
        await reply.send(b"".join(frames[: int(request.json["user"])]))
        reply.close()

    same = 0
    async with FakeUpstream(play) as first:
        async with open_house(config(first.url, real_models["chat"])) as house:
            await prove(house)
            for count in range(len(frames)):
                body = {**ASK, "max_tokens": 24, "user": str(count)}
                url = f"{house.url}/v1/chat/completions"
                async with house.client.post(url, json=body) as answer:
                    try:
                        heard = Stream(await answer.content.read())
                    except aiohttp.ClientError:
                        pytest.fail(f"cut after {count}: {house.lines[-1]}")
                given = Stream(b"".join([*frames[:count], b"data: [DONE]\n\n"])).text
                assert heard.is_one, (count, heard.__dict__)
                assert heard.text.startswith(given)
                same += heard.text == whole.text
    print(f"{same} of {len(frames)} rescues gave the very text of the unbroken stream")
    # Where the seam falls inside a word, the prefix is cut into other tokens than the model's own.
    assert same >= len(frames) * 0.8
