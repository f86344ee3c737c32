"""The management API's client, against a fake of it on a real socket."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from router.errors import RungRefused, UpstreamBroken, UpstreamError, UpstreamFailed
from router.hub.endpoints import MANAGEMENT_URL, EndpointsApi, EndpointStatus
from router.transport.http import HttpClient
from tests.fakes.hub import DATA_PLANE, MANAGEMENT_PATH, FakeHub
from tests.fakes.upstream import FakeUpstream, Handler, Reply, Request

HEADERS = {"Authorization": "Bearer hf_test"}


async def nowhere(request: Request, reply: Reply) -> None:
    await reply.json({"error": "no such route"}, 404)


@asynccontextmanager
async def up(
    handler: Handler, suffix: str = ""
) -> AsyncIterator[tuple[EndpointsApi, FakeUpstream]]:
    client = HttpClient()
    try:
        async with FakeUpstream(handler) as upstream:
            yield EndpointsApi(client, upstream.url + suffix), upstream
    finally:
        await client.aclose()


@pytest.mark.parametrize("suffix", ["", "/", "/v2", "/v2/"])
async def test_a_status(suffix: str) -> None:
    hub = FakeHub(nowhere, engine="tgi")
    async with up(hub.handle, suffix) as (api, upstream):
        status = await api.state("acme", "llama", HEADERS)
        assert status == EndpointStatus(
            state="running",
            url=f"{upstream.url}{DATA_PLANE}",
            engine="tgi",
            message="as it is",
            ready_replicas=1,
            health_route="/health",
        )
        assert upstream.last.path == MANAGEMENT_PATH
        assert upstream.last.headers["authorization"] == "Bearer hf_test"


async def test_an_endpoint_that_was_never_deployed_has_no_address() -> None:
    hub = FakeHub(nowhere, state="pending", engine=None, is_deployed=False)
    async with up(hub.handle) as (api, _):
        status = await api.state("acme", "llama", HEADERS)
    assert (status.state, status.url, status.engine) == ("pending", None, "")


async def test_an_endpoint_that_does_not_exist() -> None:
    async with up(FakeHub(nowhere).handle) as (api, _):
        with pytest.raises(RungRefused, match="acme/none answered 404"):
            await api.state("acme", "none", HEADERS)


@pytest.mark.parametrize(
    ("status", "kind"), [(401, RungRefused), (400, RungRefused), (500, UpstreamFailed)]
)
async def test_refusals_move_on(status: int, kind: type[UpstreamError]) -> None:
    async with up(FakeHub(nowhere, management_status=status).handle) as (api, _):
        with pytest.raises(kind) as caught:
            await api.state("acme", "llama", HEADERS)
    assert caught.value.moves_on


@pytest.mark.parametrize(
    "value",
    [
        [],
        {},
        {"status": None},
        {"status": {}},
        {"status": {"state": 3}},
        {"status": {"state": "running", "message": 4}},
        {"status": {"state": "running", "url": "file:///etc/passwd"}},
    ],
)
async def test_an_answer_that_cannot_be_read_is_broken(value: Any) -> None:
    async def answer(request: Request, reply: Reply) -> None:
        await reply.json(value)

    async with up(answer) as (api, _):
        with pytest.raises(UpstreamBroken, match="cannot be read"):
            await api.state("acme", "llama", HEADERS)


async def test_names_cannot_leave_their_place_in_the_path() -> None:
    async with up(FakeHub(nowhere).handle) as (api, upstream):
        with pytest.raises(UpstreamError):
            await api.state("acme", "a/../../b?x", HEADERS)
        assert upstream.last.path.startswith("/v2/endpoint/acme/a%2F")
        assert upstream.last.query == ""


async def test_resume_and_resume_again() -> None:
    hub = FakeHub(nowhere, state="paused")
    async with up(hub.handle) as (api, upstream):
        await api.resume("acme", "llama", HEADERS)
        assert hub.state == "initializing"
        hub.state = "running"
        await api.resume("acme", "llama", HEADERS)
        assert [request.method for request in upstream.requests] == ["POST", "POST"]
        hub.management_status = 403
        with pytest.raises(RungRefused):
            await api.resume("acme", "llama", HEADERS)


def test_the_default_address_is_hugging_faces() -> None:
    assert MANAGEMENT_URL == "https://api.endpoints.huggingface.cloud"
