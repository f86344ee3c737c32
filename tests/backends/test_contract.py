"""Every backend, every scenario: the shared contract suite."""

from __future__ import annotations

import asyncio

import orjson
import pytest

from router.backends.base import Backend, State
from router.core.vectors import unpack
from router.errors import (
    CallerMistake,
    PromptTooLong,
    RungRefused,
    UpstreamBroken,
    UpstreamBusy,
    UpstreamError,
    UpstreamFailed,
)
from router.types import Task
from tests.backends.contract import (
    TEXT,
    Rig,
    Scenario,
    chat_attempt,
    embed_attempt,
    read_to_end,
    text_of,
    vector_of,
)
from tests.backends.rigs import ALL

REFUSALS: dict[Scenario, type[UpstreamError]] = {
    Scenario.BUSY: UpstreamBusy,
    Scenario.FAILED: UpstreamFailed,
    Scenario.HTML: UpstreamError,
    Scenario.REDIRECT: UpstreamBroken,
    Scenario.UNAUTHORIZED: RungRefused,
    Scenario.TOO_LONG: PromptTooLong,
    Scenario.MISTAKE: CallerMistake,
    Scenario.NOT_JSON: UpstreamBroken,
}


def rigs(task: Task, *scenarios: Scenario) -> list[object]:
    return [
        pytest.param(make, scenario, id=f"{make.kind}-{scenario.name.lower()}")
        for make in ALL
        for scenario in scenarios
        if task in make.tasks and scenario in make.plays
    ]


def playing(make: type[Rig], scenario: Scenario) -> Rig:
    rig = make()
    rig.scenario = scenario
    return rig


@pytest.mark.parametrize(("make", "scenario"), rigs(Task.CHAT, Scenario.GOOD))
class TestChat:
    async def test_whole_answer_has_the_text_and_openai_shape(
        self, make: type[Rig], scenario: Scenario
    ) -> None:
        rig = playing(make, scenario)
        async with rig.up() as (backend, _):
            answer = await backend.complete_chat(chat_attempt(rig.rung(Task.CHAT)))
        value = orjson.loads(answer.body)
        assert value["object"] == "chat.completion"
        assert value["id"]
        assert isinstance(value["created"], int)
        assert [choice["message"]["content"] for choice in value["choices"]] == [TEXT]
        assert value["choices"][0]["finish_reason"] == "stop"
        assert answer.usage is not None or not rig.reports_usage

    async def test_stream_adds_up_to_the_text_and_is_complete(
        self, make: type[Rig], scenario: Scenario
    ) -> None:
        rig = playing(make, scenario)
        async with rig.up() as (backend, _):
            stream = await backend.stream_chat(chat_attempt(rig.rung(Task.CHAT), stream=True))
            text, watch = text_of(await read_to_end(stream))
            stream.close()
        assert text == TEXT
        assert watch.is_complete
        assert watch.usage is not None or not rig.reports_usage

    async def test_the_body_of_the_call_is_left_as_it_was(
        self, make: type[Rig], scenario: Scenario
    ) -> None:
        rig = playing(make, scenario)
        attempt = chat_attempt(rig.rung(Task.CHAT), temperature=0.5, stop="x", extra={"a": [1]})
        before = orjson.dumps(attempt.call.body)
        async with rig.up() as (backend, _):
            await backend.complete_chat(attempt)
        assert orjson.dumps(attempt.call.body) == before

    async def test_a_probe_finds_it_up(self, make: type[Rig], scenario: Scenario) -> None:
        rig = playing(make, scenario)
        async with rig.up() as (backend, _):
            assert (await backend.probe()).state is State.UP


@pytest.mark.parametrize(("make", "scenario"), rigs(Task.CHAT, *REFUSALS))
class TestChatRefusals:
    async def test_whole(self, make: type[Rig], scenario: Scenario) -> None:
        rig = playing(make, scenario)
        async with rig.up() as (backend, _):
            with pytest.raises(REFUSALS[scenario]) as caught:
                await backend.complete_chat(chat_attempt(rig.rung(Task.CHAT)))
        check_refusal(scenario, caught.value, rig)

    async def test_streamed(self, make: type[Rig], scenario: Scenario) -> None:
        """Before or inside the stream: what a wire says only in its first event counts as well."""
        rig = playing(make, scenario)
        async with rig.up() as (backend, _):
            with pytest.raises(REFUSALS[scenario]) as caught:
                await streamed_text(backend, rig)
        check_refusal(scenario, caught.value, rig)


async def streamed_text(backend: Backend, rig: Rig) -> str:
    stream = await backend.stream_chat(chat_attempt(rig.rung(Task.CHAT), stream=True))
    try:
        return text_of(await read_to_end(stream))[0]
    finally:
        stream.close()


def check_refusal(scenario: Scenario, error: UpstreamError, rig: Rig) -> None:
    assert error.origin == "upstream"
    assert error.moves_on is (scenario is not Scenario.MISTAKE)
    if scenario is Scenario.BUSY and rig.kind == "openai":
        assert error.retry_after_s == 7
    if scenario is Scenario.TOO_LONG:
        assert error.code == "context_length_exceeded"


@pytest.mark.parametrize(("make", "scenario"), rigs(Task.CHAT, Scenario.ERROR_FIRST, Scenario.CUT))
async def test_a_stream_that_fails_raises(make: type[Rig], scenario: Scenario) -> None:
    rig = playing(make, scenario)
    async with rig.up() as (backend, _):
        stream = await backend.stream_chat(chat_attempt(rig.rung(Task.CHAT), stream=True))
        with pytest.raises(UpstreamError):
            text_of(await read_to_end(stream))
        stream.close()


@pytest.mark.parametrize(("make", "scenario"), rigs(Task.CHAT, Scenario.ENDLESS))
async def test_closing_a_stream_cancels_the_upstream(make: type[Rig], scenario: Scenario) -> None:
    rig = playing(make, scenario)
    async with rig.up() as (backend, upstream):
        stream = await backend.stream_chat(chat_attempt(rig.rung(Task.CHAT), stream=True))
        await stream.read()
        upstream.left.clear()
        stream.close()
        async with asyncio.timeout(2):
            await upstream.left.wait()


@pytest.mark.parametrize(("make", "scenario"), rigs(Task.EMBEDDINGS, Scenario.GOOD))
@pytest.mark.parametrize("count", [1, 2, 70])
async def test_vectors_come_back_at_their_own_index(
    make: type[Rig], scenario: Scenario, count: int
) -> None:
    rig = playing(make, scenario)
    texts = [f"text number {i} " + "x" * i for i in range(count)]
    async with rig.up() as (backend, _):
        answer = await backend.embed(embed_attempt(rig.rung(Task.EMBEDDINGS), texts))
    assert len(answer.vectors) == count
    for text, raw in zip(texts, answer.vectors, strict=True):
        assert unpack(raw) == pytest.approx(vector_of(text), abs=1e-6)
    assert answer.usage.input_tokens > 0


@pytest.mark.parametrize(
    ("make", "scenario"),
    rigs(Task.EMBEDDINGS, Scenario.WRONG_COUNT, *REFUSALS),
)
async def test_embeddings_refusals(make: type[Rig], scenario: Scenario) -> None:
    rig = playing(make, scenario)
    async with rig.up() as (backend, _):
        with pytest.raises(REFUSALS.get(scenario, UpstreamBroken)):
            await backend.embed(embed_attempt(rig.rung(Task.EMBEDDINGS), ["a", "b"]))
