"""A rung continues answers only after it was seen to: canaries on real sockets."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest

from router.backends.base import Probe, State
from router.backends.openai import OpenAiBackend
from router.backends.tei import TeiBackend
from router.config.secrets import Credential
from router.flow.board import Board
from router.flow.continuity import Continuity, rungs_to_prove
from router.transport.http import HttpClient
from router.types import Ladder, Rung, Task
from tests.fakes.engine import Engine
from tests.fakes.upstream import FakeUpstream, Handler, Reply, Request

RUNG = Rung("gpu", "org/m")


class Rig:
    """Continuity before one upstream."""

    def __init__(self, url: str, client: HttpClient) -> None:
        self.board = Board(time.monotonic)
        backend = OpenAiBackend("gpu", url, client, credential=Credential())
        texts = TeiBackend("texts", url, client, credential=Credential())
        self.continuity = Continuity({"gpu": backend, "texts": texts}, self.board)

    async def prove(self) -> str | None:
        await self.continuity.prove_all([RUNG])
        return self.continuity.why_not(RUNG)


@pytest.fixture
async def client() -> Any:
    client = HttpClient()
    yield client
    await client.aclose()


async def shown(handler: Handler, client: HttpClient) -> str | None:
    async with FakeUpstream(handler) as up:
        return await Rig(up.url, client).prove()


async def test_a_rung_that_goes_on_may_continue_answers(client: HttpClient) -> None:
    assert await shown(Engine({}).handle, client) is None


@pytest.mark.parametrize("manner", ["anew", "loses space", "refuses"])
async def test_one_that_does_not_may_not(manner: str, client: HttpClient) -> None:
    why = await shown(Engine({}, manner=manner).handle, client)
    assert why is not None
    assert "does not go on" in why


async def broken(request: Request, reply: Reply) -> None:
    await reply.json({"error": {"message": "it broke"}}, 500)


async def odd(request: Request, reply: Reply) -> None:
    await reply.start()
    payloads: list[Any] = [b"hello", {"choices": []}, {"choices": [{"delta": {"content": 5}}]}]
    for payload in payloads:
        await reply.event(payload)
    await reply.end()


async def test_an_answer_that_shows_nothing_leaves_it_unknown(client: HttpClient) -> None:
    why = await shown(broken, client)
    assert why is not None
    assert "not yet" in why


async def test_an_answer_without_text_is_no_continuation(client: HttpClient) -> None:
    why = await shown(odd, client)
    assert why is not None
    assert "does not" in why


async def test_what_was_shown_holds_until_the_backend_was_down(client: HttpClient) -> None:
    engine = Engine({})
    async with FakeUpstream(engine.handle) as up:
        rig = Rig(up.url, client)
        assert await rig.prove() is None
        asked = len(up.requests)
        assert await rig.prove() is None
        assert len(up.requests) == asked, "what is known is not asked again"
        rig.board.probed("gpu", Probe(State.DOWN))
        assert await rig.prove() is not None
        assert len(up.requests) == asked, "a server that is down is not asked"
        engine.manner = "anew"
        rig.board.probed("gpu", Probe(State.UP))
        assert "does not" in (await rig.prove() or "")


async def test_a_rung_that_echoed_is_not_trusted_again(client: HttpClient) -> None:
    async with FakeUpstream(Engine({}).handle) as up:
        rig = Rig(up.url, client)
        assert await rig.prove() is None
        rig.continuity.refute(RUNG)
        assert "does not" in (await rig.prove() or "")


async def test_other_kinds_are_not_asked(client: HttpClient) -> None:
    async with FakeUpstream(Engine({}).handle) as up:
        rig, other = Rig(up.url, client), Rung("texts", "m")
        await rig.continuity.prove_all([other])
        assert up.requests == []
        assert "of its kind" in (rig.continuity.why_not(other) or "")


async def test_canaries_go_on_in_the_background(client: HttpClient) -> None:
    async with FakeUpstream(Engine({}).handle) as up:
        rig = Rig(up.url, client)
        ladder = Ladder("l", Task.CHAT, (RUNG, Rung("texts", "m")), rescue=True)
        proving = asyncio.ensure_future(rig.continuity.prove_forever([ladder], 60))
        async with asyncio.timeout(5):
            while rig.continuity.why_not(RUNG) is not None:
                await asyncio.sleep(0)
        assert not proving.done()
        proving.cancel()
        await asyncio.gather(proving, return_exceptions=True)
        await rig.continuity.prove_forever([], 60)


def test_only_rungs_that_could_be_asked_are_proven() -> None:
    rungs = (RUNG, Rung("texts", "m"))
    ladders = [
        Ladder("rescuing", Task.CHAT, rungs, rescue=True),
        Ladder("again", Task.CHAT, rungs, rescue=True),
        Ladder("off", Task.CHAT, (Rung("a", "m"), Rung("b", "m"))),
        Ladder("alone", Task.CHAT, (Rung("c", "m"),), rescue=True),
        Ladder("vectors", Task.EMBEDDINGS, (Rung("d", "m"), Rung("e", "m")), rescue=True),
    ]
    assert rungs_to_prove(ladders) == list(rungs)
