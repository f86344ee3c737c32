"""One connection fed by hand, so that a test decides where each read of the socket ends."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from router.errors import UpstreamError
from router.transport.connection import Connection
from router.transport.response import HttpResponse


class Transport(asyncio.Transport):
    """The system's side: it does what it was asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.was_aborted = False
        self.reads = True

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """It goes nowhere."""

    def get_write_buffer_size(self) -> int:
        return 0

    def pause_reading(self) -> None:
        self.reads = False

    def resume_reading(self) -> None:
        self.reads = True

    def abort(self) -> None:
        self.was_aborted = True


@dataclass(frozen=True)
class Outcome:
    """What became of an answer: its body or the words of its failure, and whether the connection
    may serve again."""

    status: int
    body: bytes
    error: str
    is_kept: bool


async def outcome(pieces: Iterable[bytes], *, method: str = "POST", ends: bool = False) -> Outcome:
    """Feed these reads to a connection that waits for an answer; `ends`: then the peer closes."""
    kept: list[Connection] = []
    loop = asyncio.get_running_loop()
    ours, theirs = socket.socketpair()
    with ours, theirs:
        connection = Connection(loop, kept.append, lambda gone: None)
        connection.sock = ours
        transport = Transport()
        connection.connection_made(transport)
        response = HttpResponse(loop, connection, method, "http://model.example/v1")
        connection.begin(response, b"POST / HTTP/1.1\r\n", None if method == "HEAD" else b"{}")
        for piece in pieces:
            if transport.was_aborted:
                break
            assert transport.reads or response.is_full
            connection.data_received(piece)
        is_kept = kept == [connection] and connection.is_open
        if ends and not transport.was_aborted:
            connection.eof_received()
        body, error = b"", ""
        try:
            async with asyncio.timeout(5):
                await response.arrive()
                while chunk := await response.read_chunk():
                    body += chunk
        except UpstreamError as failure:
            error = f"{type(failure).__name__}: {failure}"
        except TimeoutError:
            error = "still waiting"
        response.close()
        connection.connection_lost(None)
    return Outcome(response.status, body, error, is_kept)


def splits(data: bytes) -> Iterator[list[bytes]]:
    """Whole, byte by byte, and in two at every place."""
    yield [data]
    yield [data[at : at + 1] for at in range(len(data))]
    for at in range(1, len(data)):
        yield [data[:at], data[at:]]
