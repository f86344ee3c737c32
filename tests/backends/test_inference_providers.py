"""Inference Providers beyond the contract: suffixes, billing, tokens, both error shapes, routes."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import pytest

from router.backends.base import ChatAttempt, EmbedAttempt, State
from router.backends.inference_providers import InferenceProvidersBackend
from router.config.secrets import Credential
from router.core.vectors import unpack
from router.errors import CallerMistake, RungRefused, UpstreamError, UpstreamFailed
from router.transport.http import HttpClient
from router.types import Abilities, Key, Price, Rung, Usage
from tests.backends.contract import TEXT, chat_attempt, embed_attempt, read_to_end, text_of
from tests.backends.rigs.openai import OpenAiRig
from tests.fakes.hub import FakeHub, entry, offer, served
from tests.fakes.upstream import FakeUpstream, Handler, Reply, Request

CHAT = Rung("hf", "org/m:cheapest")
OWN_TOKEN = Key("bob", token="hf_bobs")


async def good(request: Request, reply: Reply) -> None:
    await OpenAiRig().handle(request, reply)


def refusing(status: int, body: Any) -> Handler:
    async def answer(request: Request, reply: Reply) -> None:
        if isinstance(body, bytes):
            await reply.whole(body, status, {"content-type": "text/html"})
        else:
            await reply.json(body, status)

    return answer


@asynccontextmanager
async def up(
    hub: FakeHub, monkeypatch: pytest.MonkeyPatch, **settings: Any
) -> AsyncIterator[tuple[InferenceProvidersBackend, FakeUpstream]]:
    monkeypatch.setenv("TEST_TOKEN", "hf_ours")
    client = HttpClient()
    try:
        async with FakeUpstream(hub.handle) as upstream:
            backend = InferenceProvidersBackend(
                "hf",
                url=f"{upstream.url}/v1",
                hub_url=upstream.url,
                client=client,
                credential=Credential("env:TEST_TOKEN"),
                **settings,
            )
            yield backend, upstream
    finally:
        await client.aclose()


def of_key(attempt: ChatAttempt, key: Key) -> ChatAttempt:
    return replace(attempt, call=replace(attempt.call, key=key))


def embed_of_key(attempt: EmbedAttempt, key: Key) -> EmbedAttempt:
    return replace(attempt, call=replace(attempt.call, key=key))


class TestChatRequest:
    async def test_the_suffix_stays_and_the_model_is_the_first_key(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        async with up(FakeHub(good), monkeypatch) as (backend, upstream):
            await backend.complete_chat(chat_attempt(CHAT))
            assert upstream.last.path == "/v1/chat/completions"
            assert upstream.last.body.startswith(b'{"model":"org/m:cheapest"')
            stream = await backend.stream_chat(chat_attempt(CHAT, stream=True))
            assert text_of(await read_to_end(stream))[0] == TEXT
            assert upstream.last.json["stream_options"] == {"include_usage": True}

    async def test_fields_that_the_router_does_not_know_are_translated(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        attempt = chat_attempt(
            CHAT, max_completion_tokens=7, max_tokens=9, stop="x", n=1, top_k=3, seed=1
        )
        async with up(FakeHub(good), monkeypatch) as (backend, upstream):
            await backend.complete_chat(attempt)
            sent = upstream.last.json
        assert sent["max_tokens"] == 7
        assert "max_completion_tokens" not in sent
        assert "n" not in sent
        assert sent["stop"] == ["x"]
        assert (sent["top_k"], sent["seed"]) == (3, 1)

    @pytest.mark.parametrize(
        ("fields", "expected"),
        [
            ({"stop": ["a", "b"]}, ["a", "b"]),
            ({"stop": None, "max_completion_tokens": None, "max_tokens": 9}, None),
        ],
    )
    async def test_what_is_right_already_passes(
        self, monkeypatch: pytest.MonkeyPatch, fields: Any, expected: Any
    ) -> None:
        async with up(FakeHub(good), monkeypatch) as (backend, upstream):
            await backend.complete_chat(chat_attempt(CHAT, **fields))
            assert upstream.last.json["stop"] == expected
            assert upstream.last.json.get("max_tokens") == fields.get("max_tokens")

    @pytest.mark.parametrize(
        ("key", "settings", "token", "bill_to"),
        [
            (Key("a"), {}, "hf_ours", None),
            (Key("a"), {"bill_to": "acme"}, "hf_ours", "acme"),
            (Key("a", bill_to="bobs"), {"bill_to": "acme"}, "hf_ours", "bobs"),
            (OWN_TOKEN, {"bill_to": "acme"}, "hf_bobs", "acme"),
        ],
    )
    async def test_who_pays(
        self,
        monkeypatch: pytest.MonkeyPatch,
        key: Key,
        settings: Any,
        token: str,
        bill_to: str | None,
    ) -> None:
        async with up(FakeHub(good), monkeypatch, **settings) as (backend, upstream):
            await backend.complete_chat(of_key(chat_attempt(CHAT), key))
            headers = upstream.last.headers
        assert headers["authorization"] == f"Bearer {token}"
        assert headers.get("x-hf-bill-to") == bill_to

    @pytest.mark.parametrize(
        ("fields", "is_able"),
        [
            ({}, True),
            ({"n": 1}, True),
            ({"n": None}, True),
            ({"n": 2}, False),
            ({"response_format": {"type": "json_object"}}, True),
            ({"response_format": {"type": "regex", "value": "a+"}}, False),
        ],
    )
    async def test_what_cannot_be_put_to_it(
        self, monkeypatch: pytest.MonkeyPatch, fields: Any, is_able: bool
    ) -> None:
        async with up(FakeHub(good), monkeypatch) as (backend, _):
            reason = backend.unable(chat_attempt(CHAT, **fields).call, CHAT)
        assert (reason is None) is is_able


NOT_SUPPORTED = {
    "error": {
        "message": "The requested model 'org/m' is not supported by any provider you have enabled.",
        "type": "invalid_request_error",
        "param": "model",
        "code": "model_not_supported",
    }
}
CREDITS = {"error": "You have depleted your monthly included credits."}


class TestRefusals:
    @pytest.mark.parametrize(
        ("status", "body", "kind", "code"),
        [
            (400, NOT_SUPPORTED, RungRefused, "upstream_model"),
            (
                400,
                {"error": "Model not supported by provider together"},
                RungRefused,
                "upstream_model",
            ),
            (401, {"error": "Invalid username or password."}, RungRefused, "upstream_auth"),
            (402, CREDITS, RungRefused, "upstream_credit"),
            (403, {"error": "insufficient permissions"}, RungRefused, "upstream_auth"),
            (422, {"error": "bad temperature"}, CallerMistake, None),
            (503, b"", UpstreamFailed, "upstream_error"),
            (504, b"<!DOCTYPE html><html>504</html>", UpstreamFailed, "upstream_error"),
        ],
    )
    async def test_both_shapes(
        self,
        monkeypatch: pytest.MonkeyPatch,
        status: int,
        body: Any,
        kind: type[UpstreamError],
        code: str | None,
    ) -> None:
        async with up(FakeHub(refusing(status, body)), monkeypatch) as (backend, _):
            for ask in (backend.complete_chat, backend.stream_chat):
                with pytest.raises(kind) as caught:
                    await ask(chat_attempt(CHAT))
                assert caught.value.code == code
                assert caught.value.upstream_status == status

    async def test_used_up_credit_closes_the_backend(self, monkeypatch: pytest.MonkeyPatch) -> None:
        async with up(FakeHub(refusing(402, CREDITS)), monkeypatch) as (backend, _):
            with pytest.raises(RungRefused) as caught:
                await backend.complete_chat(chat_attempt(CHAT))
        assert caught.value.closes == "backend"
        assert caught.value.cool_s is not None

    @pytest.mark.parametrize(
        ("status", "key"),
        [
            (401, OWN_TOKEN),
            (402, OWN_TOKEN),
            (403, OWN_TOKEN),
            (402, Key("carol", bill_to="carols")),
            (403, Key("carol", bill_to="carols")),
        ],
    )
    async def test_a_keys_own_account_closes_nothing_for_others(
        self, monkeypatch: pytest.MonkeyPatch, status: int, key: Key
    ) -> None:
        hub = FakeHub(
            refusing(status, CREDITS), mappings={"org/e": {"hf-inference": served("org/e")}}
        )
        async with up(hub, monkeypatch) as (backend, _):
            embedding = embed_of_key(embed_attempt(Rung("hf", "org/e"), ["a"]), key)
            for work in (
                backend.complete_chat(of_key(chat_attempt(CHAT), key)),
                backend.stream_chat(of_key(chat_attempt(CHAT, stream=True), key)),
                backend.embed(embedding),
            ):
                with pytest.raises(RungRefused) as caught:
                    await work
                assert caught.value.cool_s is None
                assert caught.value.closes == "rung"

    async def test_our_token_refused_closes_the_rung_whoever_pays(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        async with up(FakeHub(refusing(401, CREDITS)), monkeypatch) as (backend, _):
            carols = of_key(chat_attempt(CHAT), Key("carol", bill_to="carols"))
            with pytest.raises(RungRefused) as caught:
                await backend.complete_chat(carols)
        assert caught.value.cool_s is not None

    async def test_a_model_that_is_not_served_stays_closed_for_own_tokens_too(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        async with up(FakeHub(refusing(400, NOT_SUPPORTED)), monkeypatch) as (backend, _):
            with pytest.raises(RungRefused) as caught:
                await backend.complete_chat(of_key(chat_attempt(CHAT), OWN_TOKEN))
        assert caught.value.cool_s is not None


class TestCatalogue:
    async def test_a_probe_learns_abilities_and_prices_with_every_suffix(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        offers = [
            offer("a", context_length=10, pricing={"input": 1, "output": 2}, supports_tools=True),
            offer("b", context_length=20, pricing={"input": 3, "output": 4}),
        ]
        hub = FakeHub(good, catalogue=[entry("org/m", *offers)])
        async with up(hub, monkeypatch) as (backend, upstream):
            assert backend.abilities_of("org/m") is None
            assert backend.price_of("org/m") is None
            probe = await backend.probe()
            assert [request.path for request in upstream.requests] == ["/v1/models"]
        assert probe.state is State.UP
        assert probe.models["org/m"] == Abilities(context=20, tools=True, vision=False)
        assert probe.models["org/m:b"] == Abilities(context=20, vision=False)
        assert backend.abilities_of("org/m:a") == Abilities(context=10, tools=True, vision=False)
        assert backend.price_of("org/m:cheapest") == Price(1_000_000, 2_000_000)
        assert backend.price_of("org/other") is None
        assert probe.prices["org/m:cheapest"] == Price(1_000_000, 2_000_000)
        assert "org/other" not in probe.prices

    async def test_a_failed_probe_is_down_and_keeps_what_is_known(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        clock = [0.0]
        hub = FakeHub(good, catalogue=[entry("org/m", offer("a", context_length=10))])
        async with up(hub, monkeypatch, clock=lambda: clock[0]) as (backend, _):
            await backend.probe()
            hub.catalogue_status = 500
            clock[0] = 1000.0
            probe = await backend.probe()
        assert probe.state is State.DOWN
        assert "catalogue answered 500" in probe.reason
        assert probe.models["org/m"].context == 10


def openai_embeddings(request: Request) -> Any:
    data = [
        {"object": "embedding", "index": i, "embedding": [float(i), 1.0]}
        for i in range(len(request.json["input"]))
    ]
    return {"object": "list", "data": data, "usage": {"prompt_tokens": 9, "total_tokens": 9}}


async def any_route(request: Request, reply: Reply) -> None:
    if "inputs" in request.json:
        await reply.json([[float(i), 1.0] for i in range(len(request.json["inputs"]))])
    else:
        await reply.json(openai_embeddings(request))


class TestEmbeddings:
    @pytest.mark.parametrize("as_array", [False, True])
    async def test_a_pinned_provider_gets_its_own_id(
        self, monkeypatch: pytest.MonkeyPatch, as_array: bool
    ) -> None:
        mapping: Any = {"hf-inference": served("org/e"), "together": served("Together/E")}
        if as_array:
            mapping = [{"provider": name, **one} for name, one in mapping.items()]
        rung = Rung("hf", "org/e:together")
        async with up(FakeHub(any_route, mappings={"org/e": mapping}), monkeypatch) as (
            backend,
            upstream,
        ):
            answer = await backend.embed(embed_attempt(rung, ["a", "b"], dimensions=2))
            paths = [request.path for request in upstream.requests]
            assert paths == ["/api/models/org/e", "/together/v1/embeddings"]
            assert upstream.last.json == {
                "model": "Together/E",
                "input": ["a", "b"],
                "dimensions": 2,
            }
        assert [unpack(raw) for raw in answer.vectors] == [[0.0, 1.0], [1.0, 1.0]]
        assert answer.usage == Usage(9)

    async def test_hf_inference_by_default_with_counted_usage(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        mapping = {"together": served("T/E"), "hf-inference": served("org/e")}
        rung = Rung("hf", "org/e")
        async with up(
            FakeHub(any_route, mappings={"org/e": mapping}), monkeypatch, bill_to="acme"
        ) as (backend, upstream):
            answer = await backend.embed(embed_attempt(rung, ["abcdefgh"]))
            path = "/hf-inference/models/org/e/pipeline/feature-extraction"
            assert upstream.last.path == path
            assert upstream.last.headers["x-hf-bill-to"] == "acme"
            assert upstream.last.headers["authorization"] == "Bearer hf_ours"
        assert answer.usage == Usage(2, estimated=True)

    async def test_many_inputs_go_in_batches(self, monkeypatch: pytest.MonkeyPatch) -> None:
        hub = FakeHub(any_route, mappings={"org/e": {"hf-inference": served("org/e")}})
        async with up(hub, monkeypatch) as (backend, upstream):
            attempt = embed_attempt(Rung("hf", "org/e"), [str(i) for i in range(70)])
            answer = await backend.embed(attempt)
            sizes = [len(r.json["inputs"]) for r in upstream.requests if r.method == "POST"]
        assert sizes == [32, 32, 6]
        assert len(answer.vectors) == 70

    async def test_dimensions_choose_a_provider_that_can(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        mapping = {"hf-inference": served("org/e"), "scaleway": served("e-large")}
        async with up(FakeHub(any_route, mappings={"org/e": mapping}), monkeypatch) as (
            backend,
            upstream,
        ):
            await backend.embed(embed_attempt(Rung("hf", "org/e"), ["a"], dimensions=2))
            assert upstream.last.path == "/scaleway/v1/embeddings"

    @pytest.mark.parametrize(
        ("mapping", "words", "is_cooled"),
        [
            ({}, "no provider serves org/e", True),
            ({"hf-inference": served("org/e")}, "dimensions", False),
        ],
    )
    async def test_nobody_can(
        self, monkeypatch: pytest.MonkeyPatch, mapping: Any, words: str, is_cooled: bool
    ) -> None:
        hub = FakeHub(any_route, mappings={"org/e": mapping})
        async with up(hub, monkeypatch) as (backend, upstream):
            with pytest.raises(RungRefused, match=words) as caught:
                await backend.embed(embed_attempt(Rung("hf", "org/e"), ["a"], dimensions=2))
            assert [request.method for request in upstream.requests] == ["GET"]
        assert (caught.value.cool_s is not None) is is_cooled

    @pytest.mark.parametrize(
        ("model", "inputs", "dimensions", "is_able"),
        [
            ("org/e:hf-inference", ["a"], None, True),
            ("org/e:hf-inference", ["a"], 2, False),
            ("org/e:hf-inference", [[1, 2]], None, False),
            ("org/e:together", [[1, 2]], 2, True),
            ("org/e:novita", ["a"], None, False),
            ("org/e", [[1, 2]], 2, True),
        ],
    )
    async def test_what_a_plan_is_told(
        self,
        monkeypatch: pytest.MonkeyPatch,
        model: str,
        inputs: Any,
        dimensions: int | None,
        is_able: bool,
    ) -> None:
        rung = Rung("hf", model)
        async with up(FakeHub(any_route), monkeypatch) as (backend, _):
            call = embed_attempt(rung, inputs, dimensions=dimensions).call
            assert (backend.unable(call, rung) is None) is is_able
