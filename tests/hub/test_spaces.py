"""What the Hub says of a Space, on a real socket, and what is made of it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import pytest

from router.errors import ConnectFailed, RungRefused, UpstreamBroken
from router.hub.spaces import Runtime, Spaces, Standing
from router.transport.http import HttpClient
from tests.fakes.upstream import FakeUpstream, Reply, Request


@pytest.fixture
async def client() -> AsyncIterator[HttpClient]:
    client = HttpClient()
    yield client
    await client.aclose()


def telling(answers: dict[str, Any]) -> FakeUpstream:
    async def handle(request: Request, reply: Reply) -> None:
        known = answers.get(request.path)
        await reply.json(known or {"error": "not found"}, 200 if known else 404)

    return FakeUpstream(handle)


@pytest.mark.parametrize("path", ["/api/spaces/o/app/host", "/api/spaces/o/app"])
async def test_the_host_is_told_by_either_route(client: HttpClient, path: str) -> None:
    async with telling({path: {"host": "https://o-app.hf.space/"}}) as hub:
        found = await Spaces(client, hub.url + "/").host("o/app", {"Authorization": "Bearer t"})
        assert hub.last.headers["authorization"] == "Bearer t"
    assert found == "https://o-app.hf.space"


@pytest.mark.parametrize(
    "host", ["ftp://a", "https://a@evil.example", "https://a/b", "https://a?b", "a", "", None, 3]
)
async def test_a_host_that_is_no_plain_address_is_refused(client: HttpClient, host: Any) -> None:
    async with telling({"/api/spaces/o/app/host": {"host": host}}) as hub:
        with pytest.raises(UpstreamBroken, match="no usable host"):
            await Spaces(client, hub.url).host("o/app", {})


async def test_a_hub_with_https_names_no_host_without_it(client: HttpClient) -> None:
    """Else the token would go over the wire in the clear."""

    class Told(Spaces):
        async def _ask(self, path: str, space: str, headers: Any) -> dict[str, Any]:
            return {"host": "http://plain.example"}

    with pytest.raises(UpstreamBroken, match="without https"):
        await Told(client).host("o/app", {})


async def test_a_space_that_the_hub_does_not_know(client: HttpClient) -> None:
    async with telling({}) as hub:
        with pytest.raises(RungRefused, match="knows no Space o/app"):
            await Spaces(client, hub.url).host("o/app", {})


@pytest.mark.parametrize(
    ("told", "stage", "standing", "words"),
    [
        ({"stage": "RUNNING"}, "RUNNING", Standing.CALLABLE, "RUNNING"),
        ({"stage": "SLEEPING", "errorMessage": None}, "SLEEPING", Standing.ASLEEP, "SLEEPING"),
        (
            {"stage": "BUILD_ERROR", "errorMessage": "no\n disk"},
            "BUILD_ERROR",
            Standing.DEAD,
            "BUILD_ERROR: no disk",
        ),
        ({"stage": "NEW"}, "NEW", Standing.UNKNOWN, "NEW"),
    ],
)
async def test_the_stage(
    client: HttpClient, told: Any, stage: str, standing: Standing, words: str
) -> None:
    async with telling({"/api/spaces/o/app/runtime": told}) as hub:
        runtime = await Spaces(client, hub.url).runtime("o/app", {})
    assert (runtime.stage, runtime.standing, runtime.words) == (stage, standing, words)


async def test_a_runtime_without_a_stage_is_broken(client: HttpClient) -> None:
    async with telling({"/api/spaces/o/app/runtime": {"hardware": {}}}) as hub:
        with pytest.raises(UpstreamBroken, match="no stage"):
            await Spaces(client, hub.url).runtime("o/app", {})


async def test_waking_is_one_request_whose_answer_does_not_matter(client: HttpClient) -> None:
    async with telling({}) as space:
        await Spaces(client).wake(space.url, {})
        assert [(one.method, one.path) for one in space.requests] == [("GET", "/")]
        url = space.url
    with pytest.raises(ConnectFailed):
        await client.fetch("GET", url, headers={})
    await Spaces(client).wake(url, {})


def test_words_without_a_reason() -> None:
    assert Runtime("PAUSED").words == "PAUSED"
