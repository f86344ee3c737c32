"""Who may talk to us: names of this machine, listed origins, keys by their digest."""

from __future__ import annotations

import hashlib

import pytest

from router.api.guard import Guard, host_name
from router.errors import Forbidden, Unauthenticated
from router.types import Key

ALICE = Key("alice")
DIGEST = hashlib.sha256(b"secret").digest()
GUARD = Guard({DIGEST: (DIGEST, ALICE)}, None, True, frozenset(), frozenset())


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
def test_hosts_of_this_machine(host: str, expected: bool) -> None:
    if expected:
        GUARD.check_browser(host, None)
        return
    with pytest.raises(Forbidden):
        GUARD.check_browser(host, None)


@pytest.mark.parametrize("value", ["Bearer secret", "bearer secret", "Bearer  secret "])
def test_a_known_key(value: str) -> None:
    assert GUARD.authenticate(value) is ALICE


@pytest.mark.parametrize(
    "value",
    [None, "", "Bearer", "Bearer ", "secret", "Basic secret", "Bearer Secret", "Bearer \xff"],
)
def test_anything_else_is_refused_without_its_text(value: str | None) -> None:
    with pytest.raises(Unauthenticated) as caught:
        GUARD.authenticate(value)
    assert "ecret" not in caught.value.message
