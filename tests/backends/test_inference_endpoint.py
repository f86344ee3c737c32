"""Inference Endpoints beyond the contract: states, one wake, no polling, engines, own tokens.

What reached the endpoint itself is asserted on the fake's list of requests: each one would keep
it awake, and billed.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import pytest

from router.backends.base import State
from router.backends.inference_endpoint import InferenceEndpointBackend, engine_of, judge
from router.config.secrets import Credential
from router.errors import (
    CallerMistake,
    RungRefused,
    UpstreamAsleep,
    UpstreamBusy,
    UpstreamError,
    UpstreamFailed,
)
from router.hub.endpoints import EndpointStatus
from router.transport.http import HttpClient
from router.types import Key, Rung, Task
from tests.backends.contract import TEXT, chat_attempt, embed_attempt, read_to_end, text_of
from tests.backends.rigs.openai import OpenAiRig
from tests.backends.rigs.tei import TeiRig
from tests.backends.rigs.tgi import TgiRig
from tests.fakes.hub import DATA_PLANE, ENDPOINT, FakeHub, data_plane_requests
from tests.fakes.upstream import FakeUpstream, Reply, Request

RUNG = Rung("big", "org/m")


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


async def vllm(request: Request, reply: Reply) -> None:
    if request.path == "/info":
        await reply.json({"detail": "Not Found"}, 404)
    else:
        await OpenAiRig().handle(request, reply)


@asynccontextmanager
async def up(
    hub: FakeHub, monkeypatch: pytest.MonkeyPatch, clock: Clock | None = None, **settings: Any
) -> AsyncIterator[tuple[InferenceEndpointBackend, FakeUpstream]]:
    """With `url=True` the backend knows the endpoint's address only, and no management API."""
    monkeypatch.setenv("TEST_TOKEN", "hf_ours")
    client = HttpClient()
    try:
        async with FakeUpstream(hub.handle) as upstream:
            if settings.pop("url", False):
                settings["url"] = f"{upstream.url}{DATA_PLANE}/v1/"
            else:
                settings["endpoint"] = ENDPOINT
            backend = InferenceEndpointBackend(
                "big",
                management_url=f"{upstream.url}/v2",
                client=client,
                credential=Credential("env:TEST_TOKEN"),
                clock=clock or Clock(),
                **settings,
            )
            try:
                yield backend, upstream
            finally:
                await backend.aclose()
    finally:
        await client.aclose()


def paths(upstream: FakeUpstream) -> list[str]:
    return [r.path.removeprefix(DATA_PLANE) for r in data_plane_requests(upstream)]


async def refused(backend: InferenceEndpointBackend, key: Key | None = None) -> UpstreamError:
    attempt = chat_attempt(RUNG)
    if key is not None:
        attempt = replace(attempt, call=replace(attempt.call, key=key))
    with pytest.raises(UpstreamError) as caught:
        await backend.complete_chat(attempt)
    return caught.value


class TestStates:
    @pytest.mark.parametrize(
        ("status", "state", "words"),
        [
            (EndpointStatus("running", "u"), State.UP, ""),
            (EndpointStatus("running"), State.STARTING, "starting"),
            (EndpointStatus("pending"), State.STARTING, "pending"),
            (EndpointStatus("initializing", "u", message="pulling"), State.STARTING, "pulling"),
            (EndpointStatus("updating", "u"), State.STARTING, "updating"),
            (EndpointStatus("updating", "u", ready_replicas=1), State.UP, ""),
            (EndpointStatus("scaledToZero", "u"), State.ASLEEP, "scaled to zero"),
            (EndpointStatus("paused", "u"), State.DOWN, "only its owner can resume"),
            (EndpointStatus("failed", message="no GPU"), State.DOWN, "no GPU"),
            (EndpointStatus("updateFailed", "u", ready_replicas=1), State.DOWN, "updateFailed"),
            (EndpointStatus("newWord", "u", ready_replicas=1), State.UP, ""),
            (EndpointStatus("newWord", "u"), State.STARTING, "newWord"),
        ],
    )
    def test_judge(self, status: EndpointStatus, state: State, words: str) -> None:
        standing = judge(status)
        assert standing.state is state
        assert words in standing.reason

    @pytest.mark.parametrize("state", ["running", "scaledToZero", "paused", "initializing"])
    async def test_probes_never_touch_the_endpoint(
        self, monkeypatch: pytest.MonkeyPatch, state: str
    ) -> None:
        clock = Clock()
        hub = FakeHub(vllm, state=state, ready_replicas=0)
        async with up(hub, monkeypatch, clock) as (backend, upstream):
            for _ in range(5):
                await backend.probe()
                clock.now += 60
            assert data_plane_requests(upstream) == []
            assert len(upstream.requests) == 5
            assert upstream.last.headers["authorization"] == "Bearer hf_ours"
            assert not backend.is_waking

    @pytest.mark.parametrize(
        ("state", "kind", "cool_s_min"),
        [
            ("paused", UpstreamAsleep, 60),
            ("initializing", UpstreamAsleep, 5),
            ("failed", UpstreamFailed, 30),
        ],
    )
    async def test_an_endpoint_that_is_not_up_is_not_called_nor_woken(
        self,
        monkeypatch: pytest.MonkeyPatch,
        state: str,
        kind: type[UpstreamError],
        cool_s_min: float,
    ) -> None:
        hub = FakeHub(vllm, state=state, ready_replicas=0)
        async with up(hub, monkeypatch) as (backend, upstream):
            error = await refused(backend)
            assert type(error) is kind
            assert error.moves_on
            assert error.cool_s is not None
            assert error.cool_s >= cool_s_min
            assert data_plane_requests(upstream) == []
            assert not backend.is_waking
            assert all(request.method == "GET" for request in upstream.requests)

    async def test_a_running_endpoint_is_called_without_asking_each_time(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        async with up(FakeHub(vllm), monkeypatch) as (backend, upstream):
            for _ in range(3):
                await backend.complete_chat(chat_attempt(RUNG))
            assert paths(upstream) == ["/v1/chat/completions"] * 3
            assert len(upstream.requests) == 4
            sent = data_plane_requests(upstream)[-1]
            assert sent.json["model"] == "org/m"
            assert sent.headers["authorization"] == "Bearer hf_ours"
            assert "x-scale-up-timeout" not in sent.headers

    async def test_a_silent_management_api_does_not_stop_a_running_endpoint(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        clock, hub = Clock(), FakeHub(vllm)
        async with up(hub, monkeypatch, clock) as (backend, _):
            await backend.complete_chat(chat_attempt(RUNG))
            hub.management_status = 500
            clock.now += 3600
            await backend.complete_chat(chat_attempt(RUNG))

    async def test_a_hanging_management_api_holds_up_one_call_at_most(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        clock, hub = Clock(), FakeHub(vllm)
        async with up(hub, monkeypatch, clock) as (backend, _):
            await backend.complete_chat(chat_attempt(RUNG))
            hub.management_gate = asyncio.Event()
            hub.management_asked.clear()
            clock.now += 3600
            async with asyncio.TaskGroup() as group:
                first = group.create_task(backend.complete_chat(chat_attempt(RUNG)))
                await soon(hub.management_asked)
                await backend.complete_chat(chat_attempt(RUNG))
                assert not first.done()
                hub.management_gate.set()

    async def test_a_management_api_that_never_answered_refuses(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        hub = FakeHub(vllm, management_status=401)
        async with up(hub, monkeypatch) as (backend, upstream):
            error = await refused(backend)
            assert isinstance(error, RungRefused)
            assert "management API" in error.message
            assert data_plane_requests(upstream) == []
            assert (await backend.probe()).state is State.DOWN

    async def test_a_management_api_in_trouble_says_nothing_of_the_endpoint(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        async with up(FakeHub(vllm, management_status=503), monkeypatch) as (backend, _):
            assert (await backend.probe()).state is State.UNKNOWN


class TestWaking:
    async def test_one_wake_however_many_calls(self, monkeypatch: pytest.MonkeyPatch) -> None:
        hub = FakeHub(vllm, state="scaledToZero")
        async with up(hub, monkeypatch, scale_up_s=300) as (backend, upstream):
            errors = await asyncio.gather(*(refused(backend) for _ in range(8)))
            assert {type(error) for error in errors} == {UpstreamAsleep}
            assert all(error.cool_s and error.cool_s <= 10 for error in errors)
            await soon(hub.wake_came)
            await refused(backend)
            assert backend.is_waking
            assert paths(upstream) == ["/health"]
            wake = data_plane_requests(upstream)[0]
            assert wake.headers["x-scale-up-timeout"] == "300"
            assert wake.headers["authorization"] == "Bearer hf_ours"

    async def test_once_awake_it_answers(self, monkeypatch: pytest.MonkeyPatch) -> None:
        hub = FakeHub(vllm, state="scaledToZero")
        async with up(hub, monkeypatch) as (backend, upstream):
            await refused(backend)
            await soon(hub.wake_came)
            hub.woken.set()
            await backend.wake_ended()
            # Nothing of the old state is left, though no time has passed.
            answer = await backend.complete_chat(chat_attempt(RUNG))
            assert TEXT.encode() in answer.body
            assert paths(upstream) == ["/health", "/v1/chat/completions"]

    async def test_a_wake_that_fails_is_not_tried_again_at_once(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        clock, hub = Clock(), FakeHub(vllm, state="scaledToZero", may_scale_up=False)
        async with up(hub, monkeypatch, clock) as (backend, upstream):
            for _ in range(3):
                await refused(backend)
                await backend.wake_ended()
            assert paths(upstream) == ["/health"]
            clock.now += 31
            await refused(backend)
            await backend.wake_ended()
            assert paths(upstream) == ["/health"] * 2

    async def test_leaving_ends_the_wake(self, monkeypatch: pytest.MonkeyPatch) -> None:
        hub = FakeHub(vllm, state="scaledToZero")
        async with up(hub, monkeypatch) as (backend, _):
            await refused(backend)
            await soon(hub.wake_came)
            await backend.aclose()
            assert not backend.is_waking

    @pytest.mark.parametrize(("status", "body"), [(503, b""), (502, b"<html>bad</html>")])
    async def test_an_endpoint_that_fell_asleep_meanwhile(
        self, monkeypatch: pytest.MonkeyPatch, status: int, body: bytes
    ) -> None:
        """The known state is old by then: the failed call has the management API asked again."""
        clock = Clock()
        hub = FakeHub(vllm, asleep_status=status, asleep_body=body)
        async with up(hub, monkeypatch, clock) as (backend, _):
            await backend.complete_chat(chat_attempt(RUNG))
            hub.state = "scaledToZero"
            clock.now += 20
            error = await refused(backend)
            assert isinstance(error, UpstreamAsleep)
            await soon(hub.wake_came)

    async def test_an_endpoint_that_was_paused_meanwhile_is_left_alone(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        clock = Clock()
        hub = FakeHub(vllm, asleep_status=404)
        async with up(hub, monkeypatch, clock) as (backend, upstream):
            await backend.complete_chat(chat_attempt(RUNG))
            hub.state = "paused"
            clock.now += 20
            assert "only its owner" in (await refused(backend)).message
            assert not backend.is_waking
            await refused(backend)
            assert paths(upstream) == ["/v1/chat/completions"] * 2

    async def test_with_nobody_to_ask_the_failure_stays_what_it_was(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        clock, hub = Clock(), FakeHub(vllm)
        async with up(hub, monkeypatch, clock) as (backend, _):
            await backend.complete_chat(chat_attempt(RUNG))
            hub.state, hub.management_status = "scaledToZero", 500
            clock.now += 20
            assert isinstance(await refused(backend), UpstreamFailed)

    async def test_a_wake_that_is_cut_off_is_survived(
        self, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        hub = FakeHub(vllm, state="scaledToZero", cuts_wakes=True)
        async with up(hub, monkeypatch) as (backend, _):
            await refused(backend)
            await backend.wake_ended()
            assert "could not wake" in caplog.text
            assert "hf_ours" not in caplog.text
            assert isinstance(await refused(backend), UpstreamAsleep)

    async def test_an_endpoint_without_an_address_cannot_be_woken(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        hub = FakeHub(vllm, state="scaledToZero", is_deployed=False)
        async with up(hub, monkeypatch) as (backend, upstream):
            assert isinstance(await refused(backend), UpstreamAsleep)
            await backend.wake_ended()
            assert data_plane_requests(upstream) == []

    async def test_a_running_endpoints_own_failure_stays_what_it_is(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        async def overloaded(request: Request, reply: Reply) -> None:
            await reply.json({"error": "queue full"}, 503)

        async with up(FakeHub(overloaded), monkeypatch) as (backend, _):
            error = await refused(backend)
            assert isinstance(error, UpstreamFailed)
            assert not backend.is_waking


async def soon(event: asyncio.Event) -> None:
    async with asyncio.timeout(2):
        await event.wait()


class TestUrlOnly:
    async def test_a_probe_asks_nobody(self, monkeypatch: pytest.MonkeyPatch) -> None:
        async with up(FakeHub(vllm), monkeypatch, url=True) as (backend, upstream):
            probe = await backend.probe()
            assert probe.state is State.UNKNOWN
            assert "management API" in probe.reason
            assert upstream.requests == []

    async def test_the_engine_is_asked_once_and_only_for_a_call(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        async with up(FakeHub(vllm), monkeypatch, url=True) as (backend, upstream):
            assert backend.unable(embed_attempt(RUNG, ["a"]).call, RUNG) is None
            calls = (backend.complete_chat(chat_attempt(RUNG)) for _ in range(4))
            await asyncio.gather(*calls)
            assert paths(upstream).count("/info") == 1
            assert paths(upstream).count("/v1/chat/completions") == 4

    @pytest.mark.parametrize("body", [b"", b"<html>", b'{"error": "starting"}'])
    async def test_503_is_asleep_and_that_call_has_started_it(
        self, monkeypatch: pytest.MonkeyPatch, body: bytes
    ) -> None:
        hub = FakeHub(vllm, state="scaledToZero", asleep_body=body)
        async with up(hub, monkeypatch, url=True) as (backend, upstream):
            error = await refused(backend)
            assert isinstance(error, UpstreamAsleep)
            assert error.cool_s is not None
            assert paths(upstream) == ["/info"]
            assert not backend.is_waking

    async def test_503_that_says_when_to_come_back_is_busy(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        async def overloaded(request: Request, reply: Reply) -> None:
            await reply.json({"error": "queue full"}, 503, {"retry-after": "3"})

        async with up(FakeHub(overloaded), monkeypatch, url=True) as (backend, _):
            error = await refused(backend)
            assert isinstance(error, UpstreamBusy)
            assert error.retry_after_s == 3

    async def test_a_401_to_the_first_look_is_a_refusal(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        async def closed(request: Request, reply: Reply) -> None:
            await reply.whole(b"", 401)

        async with up(FakeHub(closed), monkeypatch, url=True) as (backend, _):
            assert isinstance(await refused(backend), RungRefused)

    async def test_a_500_is_a_failure_and_not_sleep(self, monkeypatch: pytest.MonkeyPatch) -> None:
        async def broken(request: Request, reply: Reply) -> None:
            await reply.json({"error": "it broke"}, 500)

        async with up(FakeHub(broken), monkeypatch, url=True) as (backend, _):
            assert isinstance(await refused(backend), UpstreamFailed)

    async def test_one_of_the_two_is_needed(self) -> None:
        client = HttpClient()
        with pytest.raises(ValueError, match="endpoint"):
            InferenceEndpointBackend("big", client=client, credential=Credential())
        await client.aclose()


class TestEngines:
    @pytest.mark.parametrize(
        ("body", "engine"),
        [
            (b'{"router":"text-generation-router"}', "tgi"),
            (b'{"model_type":{"embedding":{"pooling":"cls"}},"router":"x"}', "tei"),
            (b'{"version":"1"}', "openai"),
            (b"[]", "openai"),
            (b"<html>", "openai"),
        ],
    )
    def test_info(self, body: bytes, engine: str) -> None:
        assert engine_of(body) == engine

    @pytest.mark.parametrize("engine", ["tgi", "tgiNeuron", "custom", None])
    async def test_tgi_is_spoken_to_in_its_dialect(
        self, monkeypatch: pytest.MonkeyPatch, engine: str | None
    ) -> None:
        async with up(FakeHub(TgiRig().handle, engine=engine), monkeypatch) as (backend, upstream):
            stream = await backend.stream_chat(chat_attempt(RUNG, stream=True, top_p=1))
            assert text_of(await read_to_end(stream))[0] == TEXT
            assert "top_p" not in data_plane_requests(upstream)[-1].json
            call = embed_attempt(RUNG, ["a"]).call
            assert "TGI" in (backend.unable(call, RUNG) or "")

    async def test_tei_is_spoken_to_in_its_dialect(self, monkeypatch: pytest.MonkeyPatch) -> None:
        rig = TeiRig()
        async with up(FakeHub(rig.handle, engine="tei"), monkeypatch) as (backend, _):
            assert backend.unable(chat_attempt(RUNG).call, RUNG) is None
            answer = await backend.embed(embed_attempt(rig.rung(Task.EMBEDDINGS), ["a", "b"]))
            assert len(answer.vectors) == 2
            assert backend.unable(chat_attempt(RUNG).call, RUNG) is not None

    @pytest.mark.parametrize("engine", ["vLLM", "sGLang", "llamacpp", "hfServe", "anewone"])
    async def test_the_others_speak_openai(
        self, monkeypatch: pytest.MonkeyPatch, engine: str
    ) -> None:
        async with up(FakeHub(vllm, engine=engine), monkeypatch) as (backend, upstream):
            await backend.complete_chat(chat_attempt(RUNG))
            assert paths(upstream) == ["/v1/chat/completions"]


class TestOwnTokens:
    async def test_a_keys_own_token_is_sent_and_only_for_its_calls(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        async with up(FakeHub(vllm), monkeypatch) as (backend, upstream):
            attempt = chat_attempt(RUNG)
            own = replace(attempt, call=replace(attempt.call, key=Key("bob", token="hf_bobs")))
            for one in (own, attempt, own):
                await backend.complete_chat(one)
            sent = [r.headers["authorization"] for r in data_plane_requests(upstream)]
            assert sent == ["Bearer hf_bobs", "Bearer hf_ours", "Bearer hf_bobs"]
            assert upstream.requests[0].headers["authorization"] == "Bearer hf_ours"

    @pytest.mark.parametrize(
        ("key", "is_closed"), [(None, True), (Key("bob", token="hf_bobs"), False)]
    )
    async def test_its_refusal_closes_nothing_for_others(
        self, monkeypatch: pytest.MonkeyPatch, key: Key | None, is_closed: bool
    ) -> None:
        async def closed(request: Request, reply: Reply) -> None:
            await reply.json({"error": "Invalid token"}, 401)

        async with up(FakeHub(closed), monkeypatch) as (backend, _):
            error = await refused(backend, key)
            assert isinstance(error, RungRefused)
            assert (error.cool_s is not None) is is_closed


async def test_own_tokens_beyond_the_limit_are_still_served(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The backends kept for them are bounded; the oldest is made anew."""
    attempt = chat_attempt(RUNG)
    async with up(FakeHub(vllm), monkeypatch) as (backend, upstream):
        for number in [*range(70), 0]:
            key = Key("k", token=f"hf_{number}")
            await backend.complete_chat(replace(attempt, call=replace(attempt.call, key=key)))
        assert len(backend._inners) <= 64
        assert data_plane_requests(upstream)[-1].headers["authorization"] == "Bearer hf_0"


async def test_the_callers_mistake_costs_no_second_look(monkeypatch: pytest.MonkeyPatch) -> None:
    async def wrong(request: Request, reply: Reply) -> None:
        await reply.json({"error": {"message": "bad temperature"}}, 400)

    clock = Clock()
    async with up(FakeHub(wrong), monkeypatch, clock) as (backend, upstream):
        assert isinstance(await refused(backend), CallerMistake)
        clock.now += 20
        assert isinstance(await refused(backend), CallerMistake)
        assert len(upstream.requests) == 3
