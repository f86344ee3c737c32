"""Gradio Spaces beyond the contract: what is posted and called off, the queue, and the Hub's word.

Each test has a fake Space on a real socket; where the Hub is asked, it is a second fake upstream.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import orjson
import pytest

from router.backends import gradio_space
from router.backends.base import Event, EventKind, State
from router.backends.gradio_space import GradioSpaceBackend
from router.config.secrets import Credential
from router.core.vectors import unpack
from router.errors import (
    RungRefused,
    UpstreamAsleep,
    UpstreamBroken,
    UpstreamError,
    UpstreamFailed,
    UpstreamTimeout,
)
from router.hub.spaces import Spaces
from router.transport.http import HttpClient
from router.types import Key, Rung
from tests.backends.contract import chat_attempt, embed_attempt, read_to_end, text_of
from tests.fakes.gradio import FakeSpace, Play, Posted, Teller
from tests.fakes.upstream import FakeUpstream, Reply, Request

RUNG = Rung("space", "app")
WAIT_S = 2.0


async def answer(job: Posted, say: Teller) -> None:
    await say.completed("fine", None)


@asynccontextmanager
async def serving(
    space: FakeSpace, hub: FakeHub | None = None, **settings: Any
) -> AsyncIterator[tuple[GradioSpaceBackend, FakeUpstream]]:
    """A backend for the fake Space: by its address, or by its name on the fake Hub."""
    client = HttpClient()
    async with FakeUpstream(space.handle) as upstream, FakeUpstream(_handler(hub)) as at_hub:
        if hub is not None:
            hub.host = upstream.url
        backend = GradioSpaceBackend(
            "space",
            url=None if hub else upstream.url,
            space="owner/app" if hub else None,
            api_name=settings.get("api_name"),
            inputs=settings.get("inputs"),
            client=client,
            credential=settings.get("credential") or Credential(),
            spaces=Spaces(client, at_hub.url),
        )
        try:
            yield backend, upstream
        finally:
            await backend.aclose()
            await client.aclose()


class FakeHub:
    """The Hub's word about one Space."""

    def __init__(self, stage: str, *, has_host_route: bool = True) -> None:
        self.stage = stage
        self.host = ""
        self.asked: list[str] = []
        self._has_host_route = has_host_route

    async def handle(self, request: Request, reply: Reply) -> None:
        self.asked.append(request.path)
        match request.path:
            case "/api/spaces/owner/app/runtime":
                await reply.json({"stage": self.stage, "errorMessage": "a\nb"})
            case "/api/spaces/owner/app/host" if self._has_host_route:
                await reply.json({"host": self.host})
            case "/api/spaces/owner/app":
                await reply.json({"id": "owner/app", "host": self.host})
            case _:
                await reply.json({"error": "Repository not found"}, 404)


def _handler(hub: FakeHub | None) -> Any:
    return hub.handle if hub else FakeHub("").handle


def content_of(body: bytes) -> str:
    content: str = orjson.loads(body)["choices"][0]["message"]["content"]
    return content


# --- what is posted -----------------------------------------------------------------------------


@pytest.mark.parametrize("version", [4, 5, 6])
async def test_state_is_null_in_second_position_and_the_answer_comes(version: int) -> None:
    space = FakeSpace(version, answer)
    messages = [{"role": "system", "content": "S"}, {"role": "user", "content": "hi"}]
    async with serving(space) as (backend, upstream):
        whole = await backend.complete_chat(chat_attempt(RUNG, messages=messages, max_tokens=9))
    assert space.posted[0].data == ["hi", None, "S", 9]
    assert content_of(whole.body) == "fine"
    assert whole.usage is not None
    assert whole.usage.estimated
    join = next(one for one in upstream.requests if one.path.endswith("/queue/join"))
    assert join.json["event_data"] is None
    assert join.json["trigger_id"] is None


async def test_the_inputs_template_says_what_goes_where() -> None:
    space = FakeSpace(6, answer)
    inputs = {"message": "{transcript}", "system_prompt": "Be short. {system}", "max_tokens": 5}
    messages = [
        {"role": "system", "content": "S"},
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"},
    ]
    async with serving(space, inputs=inputs) as (backend, _):
        await backend.complete_chat(chat_attempt(RUNG, messages=messages))
    talk = "User: a\n\nAssistant: b\n\nUser: c\n\nAssistant:"
    assert space.posted[0].data == [talk, None, "Be short. S", 5]


async def test_each_call_has_a_session_of_its_own_and_one_look_at_the_documents() -> None:
    space = FakeSpace(6, answer)
    async with serving(space) as (backend, upstream):
        for _ in range(3):
            await backend.complete_chat(chat_attempt(RUNG))
    assert len({job.session for job in space.posted}) == 3
    assert sum(one.path == "/config" for one in upstream.requests) == 1


async def test_an_endpoint_that_is_not_published_is_told_with_those_that_are() -> None:
    space = FakeSpace(6, answer)
    async with serving(space, api_name="/nosuch") as (backend, _):
        with pytest.raises(
            RungRefused, match=r"no endpoint /nosuch: it publishes /chat, /embed, /shout"
        ):
            await backend.complete_chat(chat_attempt(RUNG))
    assert space.posted == []


async def test_text_boxes_are_embedded_one_by_one_and_in_order() -> None:
    async def measure(job: Posted, say: Teller) -> None:
        await say.completed(orjson.dumps([len(job.data[0]), 1]).decode())

    space = FakeSpace(6, measure)
    async with serving(space, api_name="/shout") as (backend, _):
        texts = ["x" * count for count in range(1, 10)]
        found = await backend.embed(embed_attempt(RUNG, texts))
        with pytest.raises(RungRefused, match="65 texts are more than the 64"):
            await backend.embed(embed_attempt(RUNG, ["x"] * 65))
    assert [unpack(raw)[0] for raw in found.vectors] == list(range(1, 10))
    assert len(space.posted) == 9


async def test_one_failed_text_fails_the_call_with_its_own_error() -> None:
    async def second_fails(job: Posted, say: Teller) -> None:
        if job.data[0] == "b":
            await say.failed("cannot embed b")
        else:
            await say.reply.client_left()
            say.reply.close()

    space = FakeSpace(6, second_fails)
    async with serving(space, api_name="/shout") as (backend, _):
        with pytest.raises(UpstreamFailed, match="cannot embed b"):
            await backend.embed(embed_attempt(RUNG, ["a", "b", "c"]))
    called_off = {one["event_id"] for one in space.called_off}
    assert called_off == {job.event_id for job in space.posted if job.data[0] != "b"}


@pytest.mark.parametrize(
    ("fields", "words"), [({"tools": [{}]}, "tools"), ({"n": 2}, "one answer"), ({}, None)]
)
async def test_what_a_chat_may_not_ask(fields: Any, words: str | None) -> None:
    async with serving(FakeSpace(6, answer)) as (backend, _):
        reason = backend.unable(chat_attempt(RUNG, **fields).call, RUNG)
    assert (reason is None) if words is None else (words in str(reason))


async def test_what_embeddings_may_not_ask() -> None:
    async with serving(FakeSpace(6, answer)) as (backend, _):
        assert backend.unable(embed_attempt(RUNG, ["a"]).call, RUNG) is None
        assert "token ids" in str(backend.unable(embed_attempt(RUNG, [[1, 2]]).call, RUNG))
        cut = embed_attempt(RUNG, ["a"], dimensions=4)
        assert "dimensions" in str(backend.unable(cut.call, RUNG))
        with pytest.raises(RungRefused, match="token ids"):
            await backend.embed(embed_attempt(RUNG, [[1, 2]]))


# --- the stream ---------------------------------------------------------------------------------


async def test_waiting_is_told_in_comments_before_the_text() -> None:
    async def busy(job: Posted, say: Teller) -> None:
        await say.place(2, 3, 12.0)
        await say.message("progress", progress_data=[{"progress": 0.5, "desc": "loading"}])
        await say.message("log", log="warming\nup", level="info", title="Info")
        await say.generating("fine", None)
        await say.completed("fine", None)

    async with serving(FakeSpace(6, busy)) as (backend, _):
        stream = await backend.stream_chat(chat_attempt(RUNG, stream=True))
        events = await read_to_end(stream)
    comments = [event.data.decode() for event in events if event.kind is EventKind.COMMENT]
    assert comments == [
        "queue position 3 of 3, about 12 s",
        "progress: loading 50%",
        "warming up",
    ]
    assert events.index(_first(events, EventKind.CHUNK)) == 3
    first = orjson.loads(_first(events, EventKind.CHUNK).data)
    assert first["choices"][0]["delta"] == {"role": "assistant", "content": "fine"}
    assert first["model"] == "app"
    assert events[-1].kind is EventKind.DONE


async def test_an_empty_answer_is_still_a_whole_one() -> None:
    async def say_nothing(job: Posted, say: Teller) -> None:
        await say.completed("", None)

    async with serving(FakeSpace(6, say_nothing)) as (backend, _):
        stream = await backend.stream_chat(chat_attempt(RUNG, stream=True))
        text, watch = text_of(await read_to_end(stream))
    assert text == ""
    assert watch.is_complete


async def test_text_before_an_error_is_given_before_the_error() -> None:
    async def break_off(job: Posted, say: Teller) -> None:
        output = {"data": ["partial", None]}
        texts = {"msg": "process_generating", "event_id": job.event_id, "output": output}
        error = {
            "msg": "process_completed",
            "event_id": job.event_id,
            "output": {"error": "broke"},
            "success": False,
        }
        both = b"".join(b"data: " + orjson.dumps(one) + b"\n\n" for one in (texts, error))
        await say.reply.send(both)
        await say.reply.end()

    async with serving(FakeSpace(6, break_off)) as (backend, _):
        stream = await backend.stream_chat(chat_attempt(RUNG, stream=True))
        assert text_of(await stream.read())[0] == "partial"
        with pytest.raises(UpstreamFailed, match="broke"):
            await stream.read()
        stream.close()


async def test_rewritten_text_ends_the_stream_and_calls_the_job_off() -> None:
    was_read = asyncio.Event()

    async def rewrite(job: Posted, say: Teller) -> None:
        await say.generating("Thinking", None)
        await was_read.wait()
        await say.generating("Hello", None)
        await say.reply.client_left()
        say.reply.close()

    space = FakeSpace(6, rewrite)
    async with serving(space) as (backend, _):
        stream = await backend.stream_chat(chat_attempt(RUNG, stream=True))
        assert text_of(await stream.read())[0] == "Thinking"
        was_read.set()
        with pytest.raises(UpstreamBroken, match="rewrote"):
            await stream.read()
        stream.close()
        await called_off(space)


async def test_an_event_without_end_is_cut_off() -> None:
    async def flood(job: Posted, say: Teller) -> None:
        await say.reply.send(b"data: " + b"x" * 5000)
        await say.reply.client_left()
        say.reply.close()

    space = FakeSpace(6, flood)
    attempt = chat_attempt(RUNG, stream=True)
    small = type(attempt)(attempt.call, RUNG, 2.0, answer_bytes_max=4000)
    async with serving(space) as (backend, _):
        stream = await backend.stream_chat(small)
        with pytest.raises(UpstreamBroken, match="larger than 4000 bytes"):
            await stream.read()
        stream.close()


# --- calling off --------------------------------------------------------------------------------


async def called_off(space: FakeSpace) -> None:
    async with asyncio.timeout(WAIT_S):
        await space.was_called_off.wait()


def never(begun: asyncio.Event) -> Play:
    async def wait(job: Posted, say: Teller) -> None:
        await say.place(0, 1)
        begun.set()
        await say.reply.client_left()
        say.reply.close()

    return wait


@pytest.mark.parametrize("version", [4, 6])
async def test_leaving_a_stream_calls_its_job_off_once(version: int) -> None:
    space = FakeSpace(version, never(asyncio.Event()))
    async with serving(space) as (backend, _):
        stream = await backend.stream_chat(chat_attempt(RUNG, stream=True))
        await stream.read()
        stream.close()
        stream.close()
        await called_off(space)
        assert await stream.read() == []
    job = space.posted[0]
    fn_index = next(one["id"] for one in space.config["dependencies"] if one["api_name"] == "chat")
    assert space.called_off == [
        {"session_hash": job.session, "fn_index": fn_index, "event_id": job.event_id}
    ]


async def test_a_cancelled_answer_calls_its_job_off() -> None:
    begun = asyncio.Event()
    space = FakeSpace(6, never(begun))
    async with serving(space) as (backend, _), asyncio.timeout(WAIT_S):
        call = asyncio.get_running_loop().create_task(backend.complete_chat(chat_attempt(RUNG)))
        await begun.wait()
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        await called_off(space)
    assert space.called_off[0]["event_id"] == space.posted[0].event_id


async def test_a_call_cancelled_while_it_posts_calls_off_what_it_may_have_posted() -> None:
    arrived, answered = asyncio.Event(), asyncio.Event()

    class SlowToQueue(FakeSpace):
        async def join(self, request: Request, reply: Reply) -> None:
            arrived.set()
            await answered.wait()
            await super().join(request, reply)

    space = SlowToQueue(6, answer)
    async with serving(space) as (backend, _), asyncio.timeout(WAIT_S):
        call = asyncio.get_running_loop().create_task(backend.complete_chat(chat_attempt(RUNG)))
        await arrived.wait()
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        answered.set()
        await called_off(space)
    assert space.called_off[0]["event_id"] == space.posted[0].event_id


async def test_a_finished_job_is_not_called_off() -> None:
    space = FakeSpace(6, answer)
    async with serving(space) as (backend, _):
        stream = await backend.stream_chat(chat_attempt(RUNG, stream=True))
        await read_to_end(stream)
        stream.close()
        await backend.complete_chat(chat_attempt(RUNG))
    assert space.called_off == []


# --- failures, and nothing twice ----------------------------------------------------------------


async def fail_plainly(job: Posted, say: Teller) -> None:
    await say.failed("it broke")


async def cut_off(job: Posted, say: Teller) -> None:
    say.reply.cut()


async def stop_short(job: Posted, say: Teller) -> None:
    await say.generating("half", None)
    await say.reply.end()


@pytest.mark.parametrize("play", [fail_plainly, cut_off, stop_short])
async def test_whatever_happens_after_the_post_there_is_no_second_one(play: Play) -> None:
    space = FakeSpace(6, play)
    async with serving(space) as (backend, _):
        with pytest.raises(UpstreamError) as caught:
            await backend.complete_chat(chat_attempt(RUNG))
    assert caught.value.moves_on
    assert len(space.posted) == 1


class NoStream(FakeSpace):
    """Takes jobs, and then does not tell of them."""

    def __init__(self, status: int, kind: str) -> None:
        super().__init__(6, answer)
        self._status, self._kind = status, kind

    async def tell(self, request: Request, reply: Reply) -> None:
        await reply.whole(b"oh", self._status, {"content-type": self._kind})


@pytest.mark.parametrize(("status", "kind"), [(200, "text/html"), (502, "text/html"), (404, "x/y")])
async def test_a_job_whose_stream_does_not_open_is_called_off(status: int, kind: str) -> None:
    space = NoStream(status, kind)
    async with serving(space) as (backend, _):
        with pytest.raises(UpstreamError):
            await backend.complete_chat(chat_attempt(RUNG))
        await called_off(space)
    assert len(space.posted) == 1


async def test_a_used_up_quota_closes_the_rung_until_it_opens() -> None:
    async def refuse(job: Posted, say: Teller) -> None:
        text = "You have exceeded your GPU quota (60s requested vs. 0s left). Try again in 0:10:00"
        await say.failed(text, "ZeroGPU quota exceeded")

    async with serving(FakeSpace(5, refuse)) as (backend, _):
        with pytest.raises(RungRefused) as caught:
            await backend.complete_chat(chat_attempt(RUNG))
    assert caught.value.cool_s == 600
    assert caught.value.code == "upstream_quota"


async def test_a_redeployed_space_is_looked_at_anew() -> None:
    """Function numbers change with a redeployment: the old ones are refused, not guessed."""
    space = FakeSpace(6, answer)
    async with serving(space) as (backend, _):
        await backend.complete_chat(chat_attempt(RUNG))
        for function in space.config["dependencies"]:
            function["id"] += 100
        with pytest.raises(RungRefused, match="does not know the function"):
            await backend.complete_chat(chat_attempt(RUNG))
        whole = await backend.complete_chat(chat_attempt(RUNG))
    assert content_of(whole.body) == "fine"


@pytest.mark.parametrize(
    ("status", "body", "words"),
    [
        (404, b'{"detail":"Not Found"}', "has no Gradio app"),
        (200, b"<html>hello</html>", "has no Gradio app"),
        (401, b'{"detail":{"error":"Not authenticated"}}', "auth="),
        (502, b"<html>bad gateway</html>", "502"),
    ],
)
async def test_an_address_without_a_gradio_app(status: int, body: bytes, words: str) -> None:
    class Other(FakeSpace):
        async def handle(self, request: Request, reply: Reply) -> None:
            await reply.whole(body, status, {"content-type": "text/html"})

    async with serving(Other(6, answer)) as (backend, _):
        with pytest.raises(UpstreamError, match=words):
            await backend.complete_chat(chat_attempt(RUNG))
        assert (await backend.probe()).state is State.DOWN


async def test_without_info_the_config_serves() -> None:
    class NoInfo(FakeSpace):
        async def handle(self, request: Request, reply: Reply) -> None:
            if request.path.endswith("/info"):
                return await reply.json({"detail": "Not Found"}, 404)
            await super().handle(request, reply)

    space = NoInfo(6, answer)
    async with serving(space) as (backend, _):
        await backend.complete_chat(chat_attempt(RUNG))
    assert space.posted[0].data == ["Hi?", None, "be nice", 64]


# --- tokens -------------------------------------------------------------------------------------


async def test_a_token_goes_out_only_where_the_configuration_has_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("SPACE_TOKEN", "hf_backend")
    attempt = chat_attempt(RUNG)
    key = Key("k", token="hf_key")
    owned = type(attempt)(_with_key(attempt.call, key), RUNG, 2.0)
    async with serving(FakeSpace(6, answer)) as (backend, upstream):
        await backend.complete_chat(owned)
        assert all("authorization" not in one.headers for one in upstream.requests)
    credential = Credential("env:SPACE_TOKEN")
    async with serving(FakeSpace(6, answer), credential=credential) as (backend, upstream):
        await backend.complete_chat(owned)
        await backend.complete_chat(attempt)
        sent = [one.headers["authorization"] for one in upstream.requests]
    assert set(sent) == {"Bearer hf_key", "Bearer hf_backend"}


def _with_key(call: Any, key: Key) -> Any:
    return type(call)(
        call.id,
        key,
        call.ladder,
        call.policy,
        call.body,
        call.stream,
        call.wants_usage,
        call.needs,
    )


# --- by its name on the Hub ---------------------------------------------------------------------


@pytest.mark.parametrize("has_host_route", [True, False])
async def test_a_running_space_is_found_by_name(has_host_route: bool) -> None:
    space, hub = FakeSpace(6, answer), FakeHub("RUNNING", has_host_route=has_host_route)
    async with serving(space, hub) as (backend, _):
        whole = await backend.complete_chat(chat_attempt(RUNG))
        await backend.complete_chat(chat_attempt(RUNG))
    assert content_of(whole.body) == "fine"
    assert hub.asked.count("/api/spaces/owner/app/runtime") == 1


@pytest.mark.parametrize(
    ("stage", "error", "words", "is_woken"),
    [
        ("SLEEPING", UpstreamAsleep, "is being woken", True),
        ("STOPPED", UpstreamAsleep, "is being woken", True),
        ("BUILDING", UpstreamAsleep, "is starting", False),
        ("PAUSED", UpstreamAsleep, "only its owner", False),
        ("RUNTIME_ERROR", UpstreamFailed, "out of order: RUNTIME_ERROR: a b", False),
    ],
)
async def test_a_stage_that_takes_no_calls(
    stage: str, error: type[UpstreamError], words: str, is_woken: bool
) -> None:
    space, hub = FakeSpace(6, answer), FakeHub(stage)
    async with serving(space, hub) as (backend, upstream):
        with pytest.raises(error, match=words) as caught:
            await backend.complete_chat(chat_attempt(RUNG))
        await backend.aclose()
        assert [one.path for one in upstream.requests] == (["/"] if is_woken else [])
    assert caught.value.cool_s is not None
    assert space.posted == []


async def test_a_space_that_fell_asleep_meanwhile_is_woken() -> None:
    hub = FakeHub("RUNNING")

    class FallsAsleep(FakeSpace):
        async def join(self, request: Request, reply: Reply) -> None:
            hub.stage = "SLEEPING"
            await reply.whole(b"<html>503</html>", 503, {"content-type": "text/html"})

    async with serving(FallsAsleep(6, answer), hub) as (backend, upstream):
        with pytest.raises(UpstreamAsleep, match="SLEEPING"):
            await backend.complete_chat(chat_attempt(RUNG))
        await backend.aclose()
        assert upstream.last.path == "/"


async def test_a_mistake_is_no_question_to_the_hub() -> None:
    hub = FakeHub("RUNNING")

    class TooMany(FakeSpace):
        async def join(self, request: Request, reply: Reply) -> None:
            await reply.json({"detail": [{"__type__": "validate", "is_valid": False}]}, 422)

    async with serving(TooMany(6, answer), hub) as (backend, _):
        with pytest.raises(UpstreamError, match="invalid"):
            await backend.complete_chat(chat_attempt(RUNG))
    assert hub.asked.count("/api/spaces/owner/app/runtime") == 1


@pytest.mark.parametrize(
    ("stage", "state"),
    [
        ("RUNNING", State.UP),
        ("RUNNING_BUILDING", State.UP),
        ("APP_STARTING", State.STARTING),
        ("SLEEPING", State.ASLEEP),
        ("PAUSED", State.ASLEEP),
        ("CONFIG_ERROR", State.DOWN),
        ("SOMETHING_NEW", State.UNKNOWN),
    ],
)
async def test_a_probe_asks_the_hub_and_never_the_space(stage: str, state: State) -> None:
    async with serving(FakeSpace(6, answer), FakeHub(stage)) as (backend, upstream):
        assert (await backend.probe()).state is state
        assert upstream.requests == []


async def test_an_unknown_stage_is_tried() -> None:
    async with serving(FakeSpace(6, answer), FakeHub("SOMETHING_NEW")) as (backend, _):
        assert content_of((await backend.complete_chat(chat_attempt(RUNG))).body) == "fine"


@pytest.mark.parametrize(
    ("status", "body", "words"),
    [
        (404, b"{}", "knows no Space owner/app"),
        (200, b'{"host": "https://evil.example/path?x=1"}', "no usable host"),
        (200, b'{"stage": 3}', "no usable host"),
        (200, b"[]", "no object"),
        (200, b"<html>", "no JSON"),
        (500, b"{}", "the Hub answered 500"),
    ],
)
async def test_a_hub_that_does_not_help(status: int, body: bytes, words: str) -> None:
    class Odd(FakeHub):
        async def handle(self, request: Request, reply: Reply) -> None:
            await reply.whole(body, status, {"content-type": "application/json"})

    async with serving(FakeSpace(6, answer), Odd("")) as (backend, _):
        with pytest.raises(UpstreamError, match=words):
            await backend.complete_chat(chat_attempt(RUNG))


async def test_a_silent_hub_stops_nobody() -> None:
    """What is known of the Space's host goes on being used while the Hub has its troubles."""

    class Failing(FakeHub):
        async def handle(self, request: Request, reply: Reply) -> None:
            if request.path.endswith("/runtime"):
                return await reply.json({"error": "down"}, 500)
            await super().handle(request, reply)

    class FullOfErrors(FakeSpace):
        async def join(self, request: Request, reply: Reply) -> None:
            if self.posted:
                return await reply.whole(b"<html>502</html>", 502, {"content-type": "text/html"})
            await super().join(request, reply)

    async with serving(FullOfErrors(6, answer), Failing("")) as (backend, _):
        assert content_of((await backend.complete_chat(chat_attempt(RUNG))).body) == "fine"
        with pytest.raises(UpstreamFailed, match="answered 502"):
            await backend.complete_chat(chat_attempt(RUNG))


async def test_a_space_that_hangs_on_its_small_answers_is_given_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Hanging(FakeSpace):
        async def handle(self, request: Request, reply: Reply) -> None:
            await reply.client_left()
            reply.close()

    monkeypatch.setattr(gradio_space, "_CONTROL_S", 0.05)
    async with serving(Hanging(6, answer)) as (backend, _):
        with pytest.raises(UpstreamTimeout, match="/config"):
            await backend.complete_chat(chat_attempt(RUNG))
        assert (await backend.probe()).state is State.DOWN


async def test_farewells_have_a_limit_and_may_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    class Unwilling(FakeSpace):
        async def handle(self, request: Request, reply: Reply) -> None:
            if request.path.endswith("/cancel"):
                self.was_called_off.set()
                return reply.cut()
            await super().handle(request, reply)

    space = Unwilling(6, never(asyncio.Event()))
    async with serving(space) as (backend, upstream):
        first = await backend.stream_chat(chat_attempt(RUNG, stream=True))
        second = await backend.stream_chat(chat_attempt(RUNG, stream=True))
        first.close()
        await called_off(space)
        monkeypatch.setattr(gradio_space, "_FAREWELLS_MAX", 0)
        second.close()
        await backend.aclose()
        assert sum(one.path.endswith("/cancel") for one in upstream.requests) == 1


async def test_a_backend_without_a_place_cannot_be_made() -> None:
    client = HttpClient()
    with pytest.raises(ValueError, match="url or a space"):
        GradioSpaceBackend(
            "space",
            url=None,
            space=None,
            api_name=None,
            inputs=None,
            client=client,
            credential=Credential(),
            spaces=Spaces(client),
        )
    await client.aclose()


async def test_a_space_that_does_not_answer_a_cancel_holds_nobody_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(gradio_space, "_FAREWELLS_S", 0.05)

    class Deaf(FakeSpace):
        async def handle(self, request: Request, reply: Reply) -> None:
            if request.path.endswith("/cancel"):
                self.was_called_off.set()
                await reply.client_left()
                return reply.close()
            await super().handle(request, reply)

    space = Deaf(6, never(asyncio.Event()))
    async with serving(space) as (backend, _):
        stream = await backend.stream_chat(chat_attempt(RUNG, stream=True))
        stream.close()
        await called_off(space)
        async with asyncio.timeout(WAIT_S):
            await backend.aclose()


def _first(events: list[Event], kind: EventKind) -> Event:
    return next(event for event in events if event.kind is kind)
