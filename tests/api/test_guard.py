"""Who may talk to us: names of this machine, listed origins, keys by their digest."""

from __future__ import annotations

import hashlib
import time
from collections.abc import AsyncIterator

import pytest

from router.api.guard import Guard, host_name
from router.errors import Forbidden, Unauthenticated
from router.flow.keys import KeyBook
from router.flow.tasks import Tasks
from router.store.sqlite import SqliteStore
from router.types import Key

ALICE = Key("alice")


@pytest.fixture
async def guard() -> AsyncIterator[Guard]:
    store, tasks = await SqliteStore.open(None), Tasks()
    keys = KeyBook(store, tasks, time.time)
    keys.configure({hashlib.sha256(b"secret").digest(): ALICE})
    yield Guard(keys, None, True, frozenset(), frozenset())
    await tasks.aclose()
    await store.aclose()


@pytest.mark.parametrize(
    ("host", "name"),
    [
        ("localhost:8484", "localhost"),
        ("LocalHost", "localhost"),
        ("127.0.0.1:1", "127.0.0.1"),
        ("[::1]:8484", "::1"),
        ("[::1]", "::1"),
        ("::1", "::1"),
        ("", ""),
    ],
)
def test_the_name_of_a_host_header(host: str, name: str) -> None:
    assert host_name(host) == name


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("localhost", True),
        ("localhost.:1", True),
        ("a.localhost", True),
        ("127.0.0.1", True),
        ("127.9.9.9", True),
        ("[::1]:1", True),
        ("localhost.evil.example", False),
        ("127.0.0.1.nip.io", False),
        ("0.0.0.0", False),
        ("10.0.0.1", False),
        ("2130706433", False),
        ("", False),
    ],
)
async def test_hosts_of_this_machine(guard: Guard, host: str, expected: bool) -> None:
    if expected:
        guard.check_browser(host, None)
        return
    with pytest.raises(Forbidden):
        guard.check_browser(host, None)


@pytest.mark.parametrize("value", ["Bearer secret", "bearer secret", "Bearer  secret "])
async def test_a_known_key(guard: Guard, value: str) -> None:
    assert await guard.authenticate(value) is ALICE


@pytest.mark.parametrize(
    "value",
    [
        None,
        "",
        "Bearer",
        "Bearer ",
        "secret",
        "Basic secret",
        "Bearer Secret",
        "Bearer \xff",
        "Bearer \udcff",
    ],
)
async def test_anything_else_is_refused_without_its_text(guard: Guard, value: str | None) -> None:
    with pytest.raises(Unauthenticated) as caught:
        await guard.authenticate(value)
    assert "ecret" not in caught.value.message
