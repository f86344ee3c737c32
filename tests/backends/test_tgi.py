"""TGI beyond the contract: what is really sent, and its traps in what comes back."""

from __future__ import annotations

from typing import Any

import orjson
import pytest

from router.backends.base import EventKind, State
from router.backends.tgi import TgiBackend
from router.config.secrets import Credential
from router.core.chunks import ChunkWatch
from router.errors import CallerMistake, RungRefused, UpstreamFailed
from router.transport.http import HttpClient
from router.types import Abilities, Rung, Task
from tests.backends.contract import PIECES, chat_attempt, embed_attempt, read_to_end
from tests.backends.rigs.tgi import INFO, USAGE, TgiRig
from tests.fakes.upstream import FakeUpstream, Reply, Request

TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}


async def sent(stream: bool = False, model: str = "org/m", **fields: Any) -> Any:
    """The body that the upstream got for a call with these fields."""
    rig = TgiRig()
    async with rig.up() as (backend, upstream):
        attempt = chat_attempt(Rung("gpu", model), stream=stream, **fields)
        if stream:
            opened = await backend.stream_chat(attempt)
            await read_to_end(opened)
            opened.close()
        else:
            await backend.complete_chat(attempt)
    return upstream.last.json


async def chunks_of(rig: TgiRig, **fields: Any) -> list[Any]:
    """The chunks that a client would get, and the stream's whole shape with them."""
    async with rig.up() as (backend, _):
        attempt = chat_attempt(rig.rung(Task.CHAT), stream=True, **fields)
        opened = await backend.stream_chat(attempt)
        events = await read_to_end(opened)
    assert events[-1].kind is EventKind.DONE
    watch = ChunkWatch(who="gpu/org/m", call_id=attempt.call.id, wants_usage=True)
    seen = [watch.see(event.data).payload for event in events[:-1]]
    assert watch.closing_payloads() == []
    return [orjson.loads(payload) for payload in seen if payload is not None]


async def test_everything_that_tgi_refuses_is_translated_on_the_wire() -> None:
    body = await sent(
        stream=True,
        stop="END",
        top_p=1,
        presence_penalty=0,
        frequency_penalty=0.0,
        max_tokens=10,
        max_completion_tokens=20,
        stream_options=None,
        logit_bias={},
        user=None,
        seed=7,
        response_format={"type": "json_object"},
        tools=[],
    )
    assert body == {
        "model": "tgi",
        "messages": [{"role": "user", "content": "Hi?"}],
        "stream": True,
        "stream_options": {"include_usage": True},
        "stop": ["END"],
        "max_tokens": 20,
        "seed": 7,
        "response_format": {"type": "json_object", "value": {"type": "object"}},
    }


async def test_only_an_adapter_is_sent_by_name() -> None:
    assert (await sent())["model"] == "tgi"
    assert (await sent(model="adapter:org/lora"))["model"] == "org/lora"


async def test_no_key_is_sent_without_one_and_the_configured_one_as_bearer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TGI_KEY", "sesame")
    rig = TgiRig()
    async with rig.up() as (backend, upstream):
        await backend.complete_chat(chat_attempt(rig.rung(Task.CHAT)))
        assert "authorization" not in upstream.last.headers
        backend.credential = Credential("env:TGI_KEY")
        await backend.complete_chat(chat_attempt(rig.rung(Task.CHAT)))
        assert upstream.last.headers["authorization"] == "Bearer sesame"


async def test_a_url_with_v1_is_the_same_server() -> None:
    rig = TgiRig()
    async with rig.up() as (_, upstream):
        client = HttpClient()
        backend = TgiBackend("gpu", upstream.url + "/v1/", client, credential=Credential())
        await backend.complete_chat(chat_attempt(rig.rung(Task.CHAT)))
        await client.aclose()
        assert upstream.last.path == "/v1/chat/completions"


async def test_a_stream_has_openais_shape() -> None:
    chunks = await chunks_of(TgiRig())
    assert {chunk["id"] for chunk in chunks} == {"chatcmpl-test"}
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks if chunk["choices"]]
    assert deltas[0] == {"role": "assistant", "content": PIECES[0]}
    assert deltas[1:] == [{"content": piece} for piece in [*PIECES[1:], ""]]
    assert [c["choices"][0]["finish_reason"] for c in chunks if c["choices"]][-1] == "stop"
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"] == USAGE


async def test_a_streamed_tool_call_has_openais_shape_and_an_end() -> None:
    rig = TgiRig()
    rig.calls_tool = True
    chunks = await chunks_of(rig, tools=[TOOL])
    first, *others = [chunk["choices"][0] for chunk in chunks[:3]]
    assert first["delta"] == {
        "role": "assistant",
        "tool_calls": [
            {
                "index": 0,
                "id": "0",
                "type": "function",
                "function": {"name": "weather", "arguments": '{"city"'},
            }
        ],
    }
    for choice, text in zip(others, [': "Paris"', "}"], strict=True):
        assert choice["delta"] == {"tool_calls": [{"index": 0, "function": {"arguments": text}}]}
    assert chunks[3]["choices"][0] | {"logprobs": None} == {
        "index": 0,
        "delta": {},
        "logprobs": None,
        "finish_reason": "tool_calls",
    }
    assert chunks[4]["choices"] == []
    assert len(chunks) == 5


async def test_a_whole_tool_call_finishes_as_one() -> None:
    rig = TgiRig()
    rig.calls_tool = True
    async with rig.up() as (backend, _):
        answer = await backend.complete_chat(chat_attempt(rig.rung(Task.CHAT), tools=[TOOL]))
    choice = orjson.loads(answer.body)["choices"][0]
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"]["tool_calls"][0]["function"]["arguments"] == '{"city": "Paris"}'


async def test_a_body_that_tgi_cannot_read_is_the_callers_mistake_and_400() -> None:
    """Its 422 is text/plain; a negative temperature is one of what is not ours to mend."""
    with pytest.raises(CallerMistake, match="top_p: invalid value 2") as caught:
        await sent(top_p=2)
    assert caught.value.status == 400


async def test_a_tool_call_that_the_model_garbled_is_not_the_callers_mistake() -> None:
    async def handle(request: Request, reply: Reply) -> None:
        text = 'Tool error: Failed to parse generated text: expected value "nope"'
        await reply.json({"error": text, "error_type": "tool_error"}, 422)

    async with upstream_of(handle) as backend:
        with pytest.raises(UpstreamFailed):
            await backend.complete_chat(chat_attempt(Rung("gpu", "m")))


async def test_it_makes_no_embeddings() -> None:
    rig = TgiRig()
    async with rig.up() as (backend, upstream):
        attempt = embed_attempt(rig.rung(Task.CHAT), ["a"])
        assert backend.unable(attempt.call, attempt.rung) == "TGI makes no embeddings"
        with pytest.raises(RungRefused, match="TGI makes no embeddings"):
            await backend.embed(attempt)
    assert upstream.requests == []


async def test_unable_asks_about_the_calls_body() -> None:
    rig = TgiRig()
    async with rig.up() as (backend, _):
        rung = rig.rung(Task.CHAT)
        assert backend.unable(chat_attempt(rung).call, rung) is None
        assert "one choice" in (backend.unable(chat_attempt(rung, n=2).call, rung) or "")


class upstream_of:
    """A TGI backend before a handler of the test's own."""

    def __init__(self, handler: Any) -> None:
        self._upstream = FakeUpstream(handler)

    async def __aenter__(self) -> TgiBackend:
        upstream = await self._upstream.__aenter__()
        self._client = HttpClient()
        return TgiBackend("gpu", upstream.url, self._client, credential=Credential())

    async def __aexit__(self, *_: object) -> None:
        await self._client.aclose()
        await self._upstream.__aexit__()


class TestProbe:
    async def test_the_context_is_learned_under_both_names(self) -> None:
        rig = TgiRig()
        async with rig.up() as (backend, upstream):
            probe = await backend.probe()
        assert probe.models == dict.fromkeys(("org/m", "tgi"), Abilities(context=4096))
        assert [request.path for request in upstream.requests] == ["/info", "/health"]

    @pytest.mark.parametrize(
        ("info", "info_status", "health_status", "state", "words"),
        [
            (INFO, 200, 503, State.DOWN, "/health answered 503"),
            (INFO, 500, 200, State.DOWN, "/info answered 500"),
            ({"model_type": {"reranker": {}}, "model_id": "m"}, 200, 200, State.DOWN, "not TGI's"),
            ("no object", 200, 200, State.DOWN, "not TGI's"),
        ],
    )
    async def test_what_else_is_there(
        self, info: Any, info_status: int, health_status: int, state: State, words: str
    ) -> None:
        async def handle(request: Request, reply: Reply) -> None:
            if request.path == "/info":
                await reply.json(info, info_status)
            else:
                await reply.json({"error": "unhealthy"}, health_status)

        async with upstream_of(handle) as backend:
            probe = await backend.probe()
        assert probe.state is state
        assert words in probe.reason

    async def test_a_page_of_html_is_no_tgi(self) -> None:
        async def handle(request: Request, reply: Reply) -> None:
            await reply.whole(b"<html>welcome</html>")

        async with upstream_of(handle) as backend:
            assert "not TGI's" in (await backend.probe()).reason

    async def test_nobody_there(self) -> None:
        client = HttpClient()
        backend = TgiBackend("gpu", "http://127.0.0.1:1", client, credential=Credential())
        probe = await backend.probe()
        await client.aclose()
        assert probe.state is State.DOWN
        assert "127.0.0.1:1" in probe.reason
