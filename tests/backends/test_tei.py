"""TEI beyond the contract: cutting to its limits, counting its permits, its other route."""

from __future__ import annotations

import asyncio
from typing import Any

import orjson
import pytest

from router.backends.base import State
from router.backends.tei import Permits, TeiBackend
from router.config.secrets import Credential
from router.core.vectors import unpack
from router.errors import CallerMistake, PromptTooLong, RungRefused, UpstreamBusy, UpstreamFailed
from router.transport.http import HttpClient
from router.types import Abilities, Rung
from tests.backends.contract import Scenario, chat_attempt, embed_attempt, vector_of
from tests.backends.rigs.tei import MODEL, TOKENS_EACH, TeiRig
from tests.fakes.upstream import FakeUpstream, Reply, Request

RUNG = Rung("cpu", MODEL)
TEXTS = [f"text number {i}" for i in range(70)]


def expect(texts: list[str], vectors: list[bytes]) -> None:
    for text, raw in zip(texts, vectors, strict=True):
        assert unpack(raw) == pytest.approx(vector_of(text), abs=1e-6)


async def test_seventy_inputs_go_as_32_and_32_and_6_and_come_back_in_order() -> None:
    rig = TeiRig()
    async with rig.up() as (backend, upstream):
        answer = await backend.embed(embed_attempt(RUNG, TEXTS))
    assert sorted(rig.slices) == [6, 32, 32]
    expect(TEXTS, answer.vectors)
    assert answer.usage.input_tokens == TOKENS_EACH * 70
    assert not answer.usage.estimated
    sizes = {len(request.json["input"]) for request in upstream.requests}
    assert sizes == {32, 6}


async def test_what_is_sent() -> None:
    rig = TeiRig()
    async with rig.up() as (backend, upstream):
        await backend.embed(embed_attempt(RUNG, ["a"], dimensions=4, extra={"user": "u"}))
    assert upstream.last.json == {
        "model": MODEL,
        "input": ["a"],
        "user": "u",
        "encoding_format": "base64",
        "dimensions": 4,
    }


async def test_token_ids_are_cut_like_texts() -> None:
    rig = TeiRig()
    ids = [[i, i + 1] for i in range(33)]
    async with rig.up() as (backend, _):
        answer = await backend.embed(embed_attempt(RUNG, ids))
    assert sorted(rig.slices) == [1, 32]
    expect([str(one) for one in ids], answer.vectors)


async def test_a_probe_learns_the_batch_limit() -> None:
    rig = TeiRig()
    rig.info["max_client_batch_size"] = 50
    async with rig.up() as (backend, _):
        await backend.probe()
        await backend.embed(embed_attempt(RUNG, TEXTS))
    assert sorted(rig.slices) == [20, 50]


async def test_a_smaller_limit_than_known_is_learned_from_the_refusal() -> None:
    rig = TeiRig()
    rig.info["max_client_batch_size"] = 30
    async with rig.up() as (backend, upstream):
        answer = await backend.embed(embed_attempt(RUNG, TEXTS))
        expect(TEXTS, answer.vectors)
        upstream.requests.clear()
        rig.slices.clear()
        await backend.embed(embed_attempt(RUNG, TEXTS))
    assert sorted(rig.slices) == [10, 30, 30]
    assert len(upstream.requests) == 3


async def test_a_server_that_names_no_smaller_limit_is_not_asked_again() -> None:
    asked = 0

    async def handle(request: Request, reply: Reply) -> None:
        nonlocal asked
        asked += 1
        text = "batch size 2 > maximum allowed batch size 32"
        await TeiRig.complain(reply, 422, "Validation", text)

    async with upstream_of(handle) as backend:
        with pytest.raises(CallerMistake, match="maximum allowed batch size"):
            await backend.embed(embed_attempt(RUNG, ["a", "b"]))
    assert asked == 1


async def test_calls_of_this_process_never_ask_for_more_permits_than_there_are() -> None:
    """Forty inputs at a time fit a server of 40; three calls of 70 inputs go through it."""
    rig = TeiRig()
    rig.info["max_concurrent_requests"] = rig.free = 40
    lowest = rig.free

    async def work(inputs: list[Any]) -> None:
        nonlocal lowest
        lowest = min(lowest, rig.free)
        await settle()

    rig.work = work  # type: ignore[method-assign]
    async with rig.up() as (backend, _):
        await backend.probe()
        calls = [backend.embed(embed_attempt(RUNG, TEXTS)) for _ in range(3)]
        for answer in await asyncio.gather(*calls):
            expect(TEXTS, answer.vectors)
    assert sorted(rig.slices) == sorted([32, 32, 6] * 3)
    assert 0 <= lowest < 40


async def test_a_failed_slice_is_the_calls_failure_and_gives_its_permits_back() -> None:
    rig = TeiRig()
    rig.info["max_concurrent_requests"] = 70
    rig.scenario = Scenario.BUSY
    async with rig.up() as (backend, _):
        await backend.probe()
        for _ in range(3):
            with pytest.raises(UpstreamBusy):
                await backend.embed(embed_attempt(RUNG, TEXTS))
        rig.scenario = Scenario.GOOD
        async with asyncio.timeout(2):
            expect(TEXTS, (await backend.embed(embed_attempt(RUNG, TEXTS))).vectors)


async def test_a_body_over_the_servers_payload_limit_is_cut_further() -> None:
    rig = TeiRig()
    texts = ["x" * 900_000] * 3
    async with rig.up() as (backend, _):
        expect(texts, (await backend.embed(embed_attempt(RUNG, texts))).vectors)
    assert sorted(rig.slices) == [1, 2]


@pytest.mark.parametrize(
    ("extra", "path"),
    [
        ({"normalize": False}, "/embed"),
        ({"prompt_name": "query"}, "/embed"),
        ({"truncate": False}, "/embed"),
        ({"normalize": True, "prompt_name": None}, "/v1/embeddings"),
        ({"user": "u"}, "/v1/embeddings"),
    ],
)
async def test_what_the_openai_route_ignores_goes_to_the_native_one(
    extra: dict[str, Any], path: str
) -> None:
    rig = TeiRig()
    async with rig.up() as (backend, upstream):
        answer = await backend.embed(embed_attempt(RUNG, TEXTS[:40], extra=extra))
    assert {request.path for request in upstream.requests} == {path}
    expect(TEXTS[:40], answer.vectors)
    assert answer.usage.input_tokens == TOKENS_EACH * 40
    if path == "/embed":
        sent = upstream.last.json
        assert sent.pop("inputs")
        assert sent == extra


async def test_tokens_that_the_server_does_not_count_are_estimated() -> None:
    async def handle(request: Request, reply: Reply) -> None:
        await reply.json({"object": "list", "data": [{"index": 0, "embedding": [1.0]}]})

    async with upstream_of(handle) as backend:
        answer = await backend.embed(embed_attempt(RUNG, ["x" * 40]))
    assert answer.usage.estimated
    assert answer.usage.input_tokens == 10


@pytest.mark.parametrize("told", ["many", "-1", "²", "9" * 5000])
async def test_a_count_that_cannot_be_is_not_taken(told: str) -> None:
    async def handle(_: Request, reply: Reply) -> None:
        await reply.json([[1.0]], headers={"x-compute-tokens": told})

    async with upstream_of(handle) as backend:
        attempt = embed_attempt(RUNG, ["x" * 40], extra={"truncate": False})
        answer = await backend.embed(attempt)
    assert answer.usage.estimated
    assert answer.usage.input_tokens == 10


async def test_an_overlong_input_is_named_as_what_the_client_sent() -> None:
    rig = TeiRig()
    rig.scenario = Scenario.TOO_LONG
    async with rig.up() as (backend, _):
        with pytest.raises(PromptTooLong) as caught:
            await backend.embed(embed_attempt(RUNG, ["a"]))
    assert caught.value.param == "input"


async def test_it_serves_no_chat() -> None:
    rig = TeiRig()
    async with rig.up() as (backend, upstream):
        attempt = chat_attempt(RUNG)
        assert backend.unable(attempt.call, RUNG) == "TEI serves no chat"
        with pytest.raises(RungRefused, match="TEI serves no chat"):
            await backend.complete_chat(attempt)
        with pytest.raises(RungRefused, match="TEI serves no chat"):
            await backend.stream_chat(attempt)
        assert backend.unable(embed_attempt(RUNG, ["a"]).call, RUNG) is None
    assert upstream.requests == []


class upstream_of:
    """A TEI backend before a handler of the test's own."""

    def __init__(self, handler: Any) -> None:
        self._upstream = FakeUpstream(handler)

    async def __aenter__(self) -> TeiBackend:
        upstream = await self._upstream.__aenter__()
        self._client = HttpClient()
        return TeiBackend("cpu", upstream.url + "/v1", self._client, credential=Credential())

    async def __aexit__(self, *_: object) -> None:
        await self._client.aclose()
        await self._upstream.__aexit__()


class TestProbe:
    async def test_the_context_is_learned_under_both_names(self) -> None:
        rig = TeiRig()
        async with rig.up() as (backend, _):
            probe = await backend.probe()
        assert probe.state is State.UP
        assert probe.models == dict.fromkeys((MODEL, "embedder"), Abilities(context=512))

    async def test_a_reranker_is_up_but_says_that_it_embeds_nothing(self) -> None:
        rig = TeiRig()
        rig.info["model_type"] = {"reranker": {"id2label": {}, "label2id": {}}}
        async with rig.up() as (backend, upstream):
            probe = await backend.probe()
            upstream.requests.clear()
            with pytest.raises(RungRefused, match="a reranker: it makes no embeddings") as caught:
                await backend.embed(embed_attempt(RUNG, ["a"]))
            assert caught.value.cool_s
            assert upstream.requests == []
            rig.info["model_type"] = {"embedding": {"pooling": "mean"}}
            assert (await backend.probe()).reason == ""
            await backend.embed(embed_attempt(RUNG, ["a"]))
        assert probe.state is State.UP
        assert "a reranker" in probe.reason

    async def test_a_reranker_that_was_never_probed_refuses_for_itself(self) -> None:
        async def handle(request: Request, reply: Reply) -> None:
            await TeiRig.complain(reply, 424, "Backend", "model is not an embedding model")

        async with upstream_of(handle) as backend:
            with pytest.raises(RungRefused):
                await backend.embed(embed_attempt(RUNG, ["a"]))

    @pytest.mark.parametrize(
        ("status", "body", "words"),
        [
            (401, b"", "is the token right?"),
            (404, b"", "is this a TEI server?"),
            (200, b"<html>", "is this another kind of server?"),
            (
                200,
                orjson.dumps({"router": "text-generation-router", "model_id": "m"}),
                "is this another kind of server?",
            ),
        ],
    )
    async def test_what_else_is_there(self, status: int, body: bytes, words: str) -> None:
        async def handle(request: Request, reply: Reply) -> None:
            await reply.whole(body, status)

        async with upstream_of(handle) as backend:
            probe = await backend.probe()
        assert probe.state is State.DOWN
        assert words in probe.reason

    async def test_unhealthy_is_down(self) -> None:
        rig = TeiRig()
        rig.health = 503
        async with rig.up() as (backend, _):
            probe = await backend.probe()
        assert (probe.state, probe.reason) == (State.DOWN, "/health answered 503")

    async def test_nobody_there(self) -> None:
        client = HttpClient()
        backend = TeiBackend("cpu", "http://127.0.0.1:1", client, credential=Credential())
        assert (await backend.probe()).state is State.DOWN
        await client.aclose()


@pytest.mark.parametrize("status", [500, 503])
async def test_unhealthy_fails_the_attempt(status: int) -> None:
    async def handle(request: Request, reply: Reply) -> None:
        await TeiRig.complain(reply, status, "Unhealthy", "unhealthy")

    async with upstream_of(handle) as backend:
        with pytest.raises(UpstreamFailed):
            await backend.embed(embed_attempt(RUNG, ["a"]))


class TestPermits:
    """Scripted by hand: each task runs until it waits before the next step is taken."""

    def setup_method(self) -> None:
        self.permits = Permits(10)
        self.entered: list[str] = []

    async def start(
        self, group: asyncio.TaskGroup, name: str, count: int
    ) -> tuple[asyncio.Task[None], asyncio.Event]:
        leave = asyncio.Event()

        async def hold() -> None:
            async with self.permits.held(count):
                self.entered.append(name)
                await leave.wait()

        task = group.create_task(hold())
        await settle()
        return task, leave

    async def test_turns_come_in_order_and_a_large_one_is_not_overtaken(self) -> None:
        async with asyncio.TaskGroup() as group:
            _, leave_a = await self.start(group, "a", 6)
            _, leave_b = await self.start(group, "b", 8)
            _, leave_c = await self.start(group, "c", 1)
            assert self.entered == ["a"]
            leave_a.set()
            await settle()
            assert self.entered == ["a", "b", "c"]
            leave_b.set()
            leave_c.set()

    async def test_more_than_there_are_waits_for_all_of_them(self) -> None:
        async with asyncio.TaskGroup() as group:
            _, leave_a = await self.start(group, "a", 1)
            _, leave_b = await self.start(group, "b", 99)
            assert self.entered == ["a"]
            leave_a.set()
            await settle()
            assert self.entered == ["a", "b"]
            leave_b.set()

    async def test_who_leaves_the_queue_lets_the_next_one_in(self) -> None:
        async with asyncio.TaskGroup() as group:
            _, leave_a = await self.start(group, "a", 6)
            task_b, _ = await self.start(group, "b", 8)
            _, leave_c = await self.start(group, "c", 4)
            task_b.cancel()
            await settle()
            assert self.entered == ["a", "c"]
            leave_a.set()
            leave_c.set()

    async def test_who_is_cancelled_as_its_turn_comes_gives_the_permits_back(self) -> None:
        async with asyncio.TaskGroup() as group:
            _, leave_a = await self.start(group, "a", 10)
            task_b, _ = await self.start(group, "b", 10)
            self.permits.resize(20)
            task_b.cancel()
            _, leave_c = await self.start(group, "c", 10)
            assert self.entered == ["a", "c"]
            leave_a.set()
            leave_c.set()

    async def test_more_permits_let_waiting_ones_in(self) -> None:
        async with asyncio.TaskGroup() as group:
            _, leave_a = await self.start(group, "a", 10)
            _, leave_b = await self.start(group, "b", 10)
            self.permits.resize(20)
            await settle()
            assert self.entered == ["a", "b"]
            leave_a.set()
            leave_b.set()


async def settle() -> None:
    """Let every task that can run do so."""
    for _ in range(5):
        await asyncio.sleep(0)
