"""The catalogue and the mappings, asked of a fake Hub on a real socket."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from router.config.secrets import Credential
from router.errors import RungRefused, UpstreamBroken, UpstreamError, UpstreamFailed
from router.hub.catalogue import Catalogue, is_one_site
from router.transport.http import HttpClient
from tests.fakes.hub import FakeHub, entry, offer, served
from tests.fakes.upstream import FakeUpstream, Reply, Request

TOKEN = "hf_test"


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


async def nowhere(request: Request, reply: Reply) -> None:
    await reply.json({"error": "no such route"}, 404)


@asynccontextmanager
async def up(
    hub: FakeHub, monkeypatch: pytest.MonkeyPatch, hub_url: str | None = None
) -> AsyncIterator[tuple[Catalogue, FakeUpstream, Clock]]:
    monkeypatch.setenv("TEST_TOKEN", TOKEN)
    clock, client = Clock(), HttpClient()
    try:
        async with FakeUpstream(hub.handle) as upstream:
            catalogue = Catalogue(
                upstream.url,
                (hub_url or upstream.url).replace("PORT", str(upstream.port)),
                client,
                credential=Credential("env:TEST_TOKEN"),
                clock=clock,
            )
            yield catalogue, upstream, clock
    finally:
        await client.aclose()


async def test_models_are_kept_for_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    hub = FakeHub(nowhere, catalogue=[entry("org/m", offer("a"))])
    async with up(hub, monkeypatch) as (catalogue, upstream, clock):
        assert catalogue.known == {}
        for _ in range(3):
            assert list(await catalogue.refresh()) == ["org/m"]
        assert len(upstream.requests) == 1
        clock.now += 301
        hub.catalogue.append(entry("org/new", offer("a")))
        assert list(await catalogue.refresh()) == ["org/m", "org/new"]


async def test_a_failure_keeps_the_old_models(monkeypatch: pytest.MonkeyPatch) -> None:
    hub = FakeHub(nowhere, catalogue=[entry("org/m", offer("a"))])
    async with up(hub, monkeypatch) as (catalogue, _, clock):
        await catalogue.refresh()
        clock.now += 301
        hub.catalogue_status = 503
        with pytest.raises(UpstreamFailed):
            await catalogue.refresh()
        assert list(catalogue.known) == ["org/m"]


async def test_what_is_no_catalogue_is_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    hub = FakeHub(nowhere, catalogue=[{"no": "id"}])
    async with up(hub, monkeypatch) as (catalogue, _, _clock):
        with pytest.raises(UpstreamBroken, match="catalogue cannot be read"):
            await catalogue.refresh()


async def test_a_mapping_is_asked_for_once_and_outlives_a_failure(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    hub = FakeHub(nowhere, mappings={"org/m": {"together": served("T/m")}})
    async with up(hub, monkeypatch) as (catalogue, upstream, clock):
        for _ in range(3):
            assert [one.provider_id for one in await catalogue.mapping("org/m")] == ["T/m"]
        assert len(upstream.requests) == 1
        assert "inferenceProviderMapping" in upstream.last.query
        assert "expand" in upstream.last.query
        clock.now += 601
        hub.mapping_status = 500
        assert [one.provider for one in await catalogue.mapping("org/m")] == ["together"]


async def test_an_unknown_model_moves_on(monkeypatch: pytest.MonkeyPatch) -> None:
    async with up(FakeHub(nowhere), monkeypatch) as (catalogue, _, _clock):
        with pytest.raises(RungRefused) as caught:
            await catalogue.mapping("org/none")
    assert "org/none" in caught.value.message


async def test_a_look_up_that_is_refused_is_not_the_callers_mistake(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    hub = FakeHub(nowhere, mapping_status=400)
    async with up(hub, monkeypatch) as (catalogue, _, _clock):
        with pytest.raises(UpstreamError) as caught:
            await catalogue.mapping("org/m")
    assert caught.value.moves_on


async def test_what_is_no_mapping_is_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    async def page(request: Request, reply: Reply) -> None:
        await reply.whole(b"<html>hello</html>")

    hub = FakeHub(nowhere)
    hub.answer_mappings = page
    async with up(hub, monkeypatch) as (catalogue, _, _clock):
        with pytest.raises(UpstreamBroken, match="page of org/m cannot be read"):
            await catalogue.mapping("org/m")


async def test_mappings_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    hub = FakeHub(nowhere, mappings={f"org/m{i}": {} for i in range(260)})
    async with up(hub, monkeypatch) as (catalogue, upstream, _):
        for i in range(260):
            await catalogue.mapping(f"org/m{i}")
        await catalogue.mapping("org/m259")
        assert len(upstream.requests) == 260
        await catalogue.mapping("org/m0")
        assert len(upstream.requests) == 261


@pytest.mark.parametrize(("hub_url", "sent"), [(None, True), ("http://localhost:PORT", False)])
async def test_the_token_goes_to_the_hub_only_on_the_routers_site(
    monkeypatch: pytest.MonkeyPatch, hub_url: str | None, sent: bool
) -> None:
    hub = FakeHub(nowhere, mappings={"org/m": {}}, catalogue=[entry("org/m")])
    async with up(hub, monkeypatch, hub_url) as (catalogue, upstream, _):
        await catalogue.mapping("org/m")
        assert ("authorization" in upstream.last.headers) is sent
        await catalogue.refresh()
        assert upstream.last.headers["authorization"] == f"Bearer {TOKEN}"


@pytest.mark.parametrize(
    ("url", "hub_url", "expected"),
    [
        ("https://router.huggingface.co", "https://huggingface.co", True),
        ("https://router.huggingface.co", "http://huggingface.co", False),
        ("https://nothuggingface.co", "https://huggingface.co", False),
        ("https://router.example", "https://huggingface.co", False),
        ("http://127.0.0.1:1", "http://127.0.0.1:2", True),
        ("", "", False),
    ],
)
def test_one_site(url: str, hub_url: str, expected: bool) -> None:
    assert is_one_site(url, hub_url) is expected
