"""Connections that are given up while they are made leave nothing open, and close nothing twice."""

from __future__ import annotations

import asyncio
import socket

import pytest

from router.transport.connection import Connection
from router.transport.dial import Dialer, Origin, Peer


def nothing(_: Connection) -> None:
    return


@pytest.mark.parametrize("turns", range(8))
async def test_a_dial_given_up_at_any_turn_leaves_its_descriptor_to_nobody(turns: int) -> None:
    loop = asyncio.get_running_loop()
    with socket.create_server(("127.0.0.1", 0)) as server:
        dialer = Dialer(loop)
        connection = Connection(loop, nothing, nothing)
        origin = Origin(Peer("http", *server.getsockname()), None)
        dial = asyncio.create_task(dialer.dial(origin, connection))
        for _ in range(turns):
            await asyncio.sleep(0)
        dial.cancel()
        await asyncio.wait((dial,))
        connection.abort()
        async with asyncio.timeout(5):
            # Else whoever closes it last may close what others have opened under its number.
            while (sock := getattr(connection, "sock", None)) and sock.fileno() != -1:
                await asyncio.sleep(0)
