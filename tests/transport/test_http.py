"""The words for what goes wrong on the way to an upstream."""

from __future__ import annotations

import socket

import pytest

from router.errors import ConnectFailed
from router.transport.http import HttpClient


async def test_a_refused_connection_names_the_address_alone() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # it does not listen
        port = taken.getsockname()[1]
        client = HttpClient()
        try:
            with pytest.raises(ConnectFailed) as caught:
                await client.send("POST", f"http://127.0.0.1:{port}/v1/secret", headers={})
        finally:
            await client.aclose()
    assert str(caught.value) == f"cannot connect to 127.0.0.1:{port} (connection refused)"


async def test_a_name_that_nobody_has_is_told_as_such() -> None:
    client = HttpClient()
    try:
        with pytest.raises(ConnectFailed, match=r"^cannot connect to nobody\.invalid:80 \(\S.+\)$"):
            await client.send("GET", "http://nobody.invalid/", headers={})
    finally:
        await client.aclose()
