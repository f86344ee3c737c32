"""Connections on real sockets: reused as the upstream counts them, closed when a caller leaves,
never taken for another's, and read and written no faster than the other side does.
"""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import socket
import zlib
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import pytest

from router.errors import ConnectFailed, StaleConnection, UpstreamBroken, UpstreamTimeout
from router.transport import connection as connections
from router.transport import pool as pools
from router.transport.http import HttpClient
from router.transport.response import HELD_BYTES_MAX
from tests.fakes.upstream import FakeUpstream, Reply, Request

MIB = 1 << 20
Serve = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@asynccontextmanager
async def raw_upstream(serve: Serve) -> AsyncIterator[str]:
    """An upstream that is all the test's: its URL."""
    tasks: set[asyncio.Task[None]] = set()

    async def one(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        tasks.add(task)
        try:
            await serve(reader, writer)
        except (ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass
        finally:
            tasks.discard(task)
            writer.close()

    server = await asyncio.start_server(one, "127.0.0.1", 0)
    try:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/"
    finally:
        server.close()
        for task in list(tasks):
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def echo(request: Request, reply: Reply) -> None:
    await reply.whole(request.body or request.path.encode())


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(5):
        while not condition():
            await asyncio.sleep(0)


async def post(client: HttpClient, url: str, body: bytes = b"{}") -> bytes:
    response = await client.send("POST", url, headers={}, body=body)
    async with response:
        return await response.read_all(MIB)


# --- reuse --------------------------------------------------------------------------------------


async def test_one_connection_serves_calls_that_follow_one_another(client: HttpClient) -> None:
    async def each_way(request: Request, reply: Reply) -> None:
        if request.path == "/stream":
            await reply.start()
            await reply.send(b"data: [DONE]\n\n")
            await reply.end()
        else:
            await echo(request, reply)

    async with FakeUpstream(each_way) as up:
        for _ in range(5):
            assert await post(client, up.url + "/whole") == b"{}"
            assert await post(client, up.url + "/stream?a=b") == b"data: [DONE]\n\n"
            status, headers, body = await client.fetch("GET", up.url + "/get", headers={})
            assert (status, headers["Content-Length"], body) == (200, "4", b"/get")
        assert up.connections == 1
        assert "content-length" not in up.last.headers
        assert up.last.headers["accept-encoding"] == "identity"
        assert "user-agent" not in up.last.headers


async def test_an_address_of_numbers_needs_no_name(client: HttpClient) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\n\r\n" + head)
        writer.close()

    server = await asyncio.start_server(serve, "::1", 0)
    port = server.sockets[0].getsockname()[1]
    _, _, body = await client.fetch("GET", f"http://[::1]:{port}/a", headers={})
    assert body.startswith(b"GET /a HTTP/1.1\r\nHost: [::1]:%d\r\n" % port)
    server.close()
    with pytest.raises(ConnectFailed, match=rf"^cannot connect to \[::1\]:{port} \(connection ref"):
        await client.send("GET", f"http://[::1]:{port}/", headers={})


async def test_the_last_one_back_is_the_first_one_out(client: HttpClient) -> None:
    async with FakeUpstream(echo) as up:
        opened = [await client.send("POST", up.url, headers={}, body=b"{}") for _ in range(3)]
        for response in opened:
            assert await response.read_all(MIB) == b"{}"
        assert up.connections == 1, "each answer was whole, and its connection free for the next"
        await asyncio.gather(*(post(client, up.url) for _ in range(3)))
        assert up.connections == 3
        for _ in range(6):
            await post(client, up.url)
        assert up.connections == 3


async def test_a_peer_that_says_close_is_believed(client: HttpClient) -> None:
    async def last(request: Request, reply: Reply) -> None:
        await reply.whole(b"last", headers={"Connection": "close"})

    async with FakeUpstream(last) as up:
        for _ in range(3):
            assert await post(client, up.url) == b"last"
        assert up.connections == 3
        await until(lambda: up.open_connections == 0)


async def test_idle_connections_are_closed_in_time_and_bounded(
    client: HttpClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pools, "IDLE_CONNECTION_S", 0.05)
    monkeypatch.setattr(pools, "IDLE_CONNECTIONS_MAX", 2)
    gate = asyncio.Event()

    async def wait(request: Request, reply: Reply) -> None:
        await gate.wait()
        await echo(request, reply)

    async with FakeUpstream(wait) as up:
        calls = [asyncio.create_task(post(client, up.url)) for _ in range(4)]
        await until(lambda: len(up.requests) == 4)
        gate.set()
        await asyncio.gather(*calls)
        await until(lambda: up.open_connections <= 2)
        await until(lambda: up.open_connections == 0)


async def test_a_stream_that_ends_within_a_moment_keeps_its_connection(client: HttpClient) -> None:
    go = asyncio.Event()

    async def late_end(request: Request, reply: Reply) -> None:
        await reply.start()
        await reply.send(b"data: [DONE]\n\n")
        await go.wait()
        await reply.end()

    async with FakeUpstream(late_end) as up:
        response = await client.send("POST", up.url, headers={}, body=b"{}")
        assert await response.read_chunk() == b"data: [DONE]\n\n"
        response.close_when_ended()
        response.close()
        go.set()
        # The connection comes back when its last chunk has come: nobody here is told of that.
        await until(lambda: len(next(iter(client._targets.values())).pool) == 1)
        assert await post(client, up.url) == b"data: [DONE]\n\n"
        assert up.connections == 1


@pytest.mark.parametrize("more", [b"", b"data: more\n\n"])
async def test_a_stream_that_does_not_end_loses_its_connection(
    client: HttpClient, more: bytes
) -> None:
    async def endless(request: Request, reply: Reply) -> None:
        await reply.start()
        await reply.send(b"data: [DONE]\n\n")
        if more:
            await reply.send(more)
        await reply.client_left()
        reply.close()

    async with FakeUpstream(endless) as up:
        response = await client.send("POST", up.url, headers={}, body=b"{}")
        await response.read_chunk()
        response.close_when_ended()
        await until(lambda: up.open_connections == 0)


# --- never another's ----------------------------------------------------------------------------


async def test_what_comes_while_a_connection_is_idle_ends_it(client: HttpClient) -> None:
    """An answer that nobody asked for, in wait for the next caller."""
    poison = asyncio.Event()
    POISON = b"HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\npoison"

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while await reader.readuntil(b"{}"):
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\ngood")
            await writer.drain()
            if not poison.is_set():
                await poison.wait()
                writer.write(POISON)
                await writer.drain()

    async with raw_upstream(serve) as url:
        assert await post(client, url) == b"good"
        poison.set()
        await until(lambda: not client._connections)
        assert await post(client, url) == b"good"


# --- stale --------------------------------------------------------------------------------------


class Peer:
    """The upstream's side of one connection, without a loop: it does what the test does."""

    def __init__(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._listener.setblocking(False)
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}/"
        self.sock = socket.socket()

    def __enter__(self) -> Peer:
        return self

    def __exit__(self, *_: object) -> None:
        self.sock.close()
        self._listener.close()

    async def accept(self) -> None:
        loop = asyncio.get_running_loop()
        self.sock.close()
        self.sock, _ = await loop.sock_accept(self._listener)
        self.sock.setblocking(False)

    async def hear(self) -> bytes:
        return await asyncio.get_running_loop().sock_recv(self.sock, MIB)

    def say(self, data: bytes) -> None:
        self.sock.sendall(data)

    async def serve_one(self, client: HttpClient) -> None:
        """One good call, after which the client keeps the connection."""
        call = asyncio.create_task(post(client, self.url))
        await self.accept()
        await self.hear()
        self.say(ANSWER)
        assert await call == b"good"


ANSWER = b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\ngood"


@pytest.fixture
def unseen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The race that no look before the request can win, made certain by not looking."""
    monkeypatch.setattr(connections.Connection, "is_fit", lambda self: self.is_open)


async def test_an_end_that_the_system_knows_of_is_seen_before_anything_is_sent(
    client: HttpClient,
) -> None:
    with Peer() as peer:
        await peer.serve_one(client)
        # No step of the loop lies between this end and the next call.
        peer.sock.close()
        await peer.serve_one(client)


@pytest.mark.usefixtures("unseen")
async def test_a_connection_closed_before_the_request_reached_it_is_stale(
    client: HttpClient,
) -> None:
    with Peer() as peer:
        await peer.serve_one(client)
        peer.sock.close()
        with pytest.raises(StaleConnection, match="had closed the kept connection on POST"):
            await post(client, peer.url)
        await peer.serve_one(client)


@pytest.mark.usefixtures("unseen")
async def test_control_calls_go_out_again_by_themselves(client: HttpClient) -> None:
    with Peer() as peer:
        await peer.serve_one(client)
        peer.sock.close()
        call = asyncio.create_task(client.fetch("GET", peer.url, headers={}))
        await peer.accept()
        assert (await peer.hear()).startswith(b"GET / HTTP/1.1\r\n")
        peer.say(ANSWER)
        assert (await call)[2] == b"good"


@pytest.mark.parametrize("is_read", [True, False])
@pytest.mark.parametrize("is_kept", [True, False])
async def test_a_request_that_reached_its_machine_is_not_stale(
    client: HttpClient, is_read: bool, is_kept: bool
) -> None:
    """It may have been served, whoever closed and whatever was read of it."""
    with Peer() as peer:
        if is_kept:
            await peer.serve_one(client)
        call = asyncio.create_task(post(client, peer.url))
        if not is_kept:
            await peer.accept()
        await until(lambda: bool(client._connections))
        while not _has_bytes(peer.sock):
            await asyncio.sleep(0)
        if is_read:
            await peer.hear()
        peer.sock.close()
        with pytest.raises(UpstreamBroken) as caught:
            await call
        assert not isinstance(caught.value, StaleConnection)


def _has_bytes(sock: socket.socket) -> bool:
    try:
        return bool(sock.recv(1, socket.MSG_PEEK))
    except BlockingIOError:
        return False


@pytest.mark.usefixtures("unseen")
@pytest.mark.parametrize("said", [b"HTTP/1.1 100 Continue\r\n\r\n", b"HTTP/1.1 2", ANSWER[:-1]])
async def test_one_that_had_begun_to_answer_is_not_stale(client: HttpClient, said: bytes) -> None:
    with Peer() as peer:
        await peer.serve_one(client)
        call = asyncio.create_task(post(client, peer.url))
        await peer.hear()
        peer.say(said)
        peer.sock.close()
        with pytest.raises(UpstreamBroken) as caught:
            await call
        assert not isinstance(caught.value, StaleConnection)


# --- leaving ------------------------------------------------------------------------------------


@pytest.mark.parametrize("phase", ["body out", "head in", "body in", "read"])
async def test_who_leaves_closes_the_connection_at_once(client: HttpClient, phase: str) -> None:
    with Peer() as peer:

        async def call() -> None:
            body = b"x" * (16 * MIB) if phase == "body out" else b"{}"
            response = await client.send("POST", peer.url, headers={}, body=body)
            async with response:
                assert await response.read_chunk() == b"some"
                await response.read_chunk()

        task = asyncio.create_task(call())
        await peer.accept()
        await peer.hear()
        if phase in ("body in", "read"):
            peer.say(b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n")
            if phase == "read":
                peer.say(b"some")
        for _ in range(20):
            await asyncio.sleep(0)
        assert not task.done()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        async with asyncio.timeout(5):
            with contextlib.suppress(ConnectionError):
                while await peer.hear():
                    pass
        await until(lambda: not client._connections)


async def test_who_leaves_while_connecting_leaves_nothing(client: HttpClient) -> None:
    """A listener whose queue is full answers nobody."""
    with socket.create_server(("127.0.0.1", 0), backlog=0) as listener:
        port = listener.getsockname()[1]
        with socket.create_connection(("127.0.0.1", port)):
            url = f"http://127.0.0.1:{port}/a?token=secret"
            task = asyncio.create_task(post(client, url))
            await asyncio.sleep(0)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            with pytest.raises(UpstreamTimeout) as caught:
                await client.send("POST", url, headers={}, body=b"{}", connect_s=0.02)
            words = f"the connection was not made in time on POST http://127.0.0.1:{port}/a"
            assert (str(caught.value), caught.value.phase) == (words, "connect")
            assert not client._connections


async def test_closing_twice_and_reading_after_it(client: HttpClient) -> None:
    async with FakeUpstream(hang_after(b"some")) as up:
        response = await client.send("POST", up.url, headers={}, body=b"{}")
        reading = asyncio.create_task(response.read_all(MIB))
        await asyncio.sleep(0)
        response.close()
        response.close()
        response.close_when_ended()
        for _ in range(2):
            with pytest.raises(UpstreamBroken, match="closed before its end"):
                await reading
            reading = asyncio.create_task(response.read_all(MIB))
        await asyncio.gather(reading, return_exceptions=True)
        await until(lambda: up.open_connections == 0)


def hang_after(data: bytes) -> Callable[[Request, Reply], Awaitable[None]]:
    async def answer(request: Request, reply: Reply) -> None:
        await reply.start()
        await reply.send(data)
        await reply.client_left()
        reply.close()

    return answer


async def test_the_client_s_end_ends_what_is_under_way() -> None:
    client = HttpClient()
    async with FakeUpstream(hang_after(b"some")) as up:
        response = await client.send("POST", up.url, headers={}, body=b"{}")
        reading = asyncio.create_task(response.read_all(MIB))
        await asyncio.sleep(0)
        await client.aclose()
        with pytest.raises(UpstreamBroken):
            await reading
        await until(lambda: up.open_connections == 0)


# --- early answers, slow peers ------------------------------------------------------------------

REFUSED = b"HTTP/1.1 413 Too Large\r\nContent-Length: 7\r\n\r\ntoo big"


@pytest.mark.parametrize("closes", [True, False])
async def test_an_answer_before_all_is_sent_is_heard(client: HttpClient, closes: bool) -> None:
    connected = 0

    async def refuse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal connected
        connected += 1
        await reader.readuntil(b"\r\n\r\n")
        writer.write(REFUSED)
        await writer.drain()
        while not closes and await reader.read(MIB):
            pass

    async with raw_upstream(refuse) as url:
        for count in (1, 2):
            response = await client.send("POST", url, headers={}, body=b"x" * (16 * MIB))
            assert (response.status, await response.read_all(99)) == (413, b"too big")
            assert connected == count, "the rest was not sent, so the connection is of no use"
        await until(lambda: not client._connections)


async def test_an_answer_that_begins_early_does_not_stop_the_request(client: HttpClient) -> None:
    """200 before the body was read whole: the rest is still wanted."""
    size = 8 * MIB

    async def eager(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\n")
        await writer.drain()
        await reader.readexactly(size)
        writer.write(b"good")
        await writer.drain()

    async with raw_upstream(eager) as url:
        assert await post(client, url, b"x" * size) == b"good"


async def test_a_large_body_goes_out_as_it_is_taken_and_arrives_whole(client: HttpClient) -> None:
    body = bytes(range(256)) * (32 * 1024)
    async with FakeUpstream(echo) as up:
        for _ in range(2):
            response = await client.send("POST", up.url, headers={}, body=body)
            assert await response.read_all(len(body)) == body
        assert up.connections == 1


async def test_no_more_is_written_than_the_upstream_takes(client: HttpClient) -> None:
    with Peer() as peer:
        task = asyncio.create_task(post(client, peer.url, b"x" * (32 * MIB)))
        await peer.accept()
        for _ in range(200):
            await asyncio.sleep(0)
        connection = next(iter(client._connections))
        held = connection._transport.get_write_buffer_size()
        assert held <= 2 * connections._PIECE_BYTES
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def test_an_upstream_that_ends_while_it_is_written_to_is_left(client: HttpClient) -> None:
    """It will not read the rest, and nothing of ours waits for that."""
    with Peer() as peer:
        task = asyncio.create_task(post(client, peer.url, b"x" * (32 * MIB)))
        await peer.accept()
        for _ in range(50):
            await asyncio.sleep(0)
        peer.sock.shutdown(socket.SHUT_WR)
        with pytest.raises(UpstreamBroken, match="closed the connection without an answer"):
            await task
        await until(lambda: not client._connections)


async def test_no_more_is_read_than_the_caller_takes(client: HttpClient) -> None:
    sent = 0

    async def flood(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal sent
        await reader.readuntil(b"{}")
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % (256 * MIB))
        while sent < 256 * MIB:
            writer.write(bytes(MIB))
            await writer.drain()
            sent += MIB

    async with raw_upstream(flood) as url:
        response = await client.send("POST", url, headers={}, body=b"{}")
        before = -1
        while sent != before:
            before = sent
            for _ in range(50):
                await asyncio.sleep(0)
        assert sent < 32 * MIB, "what the system holds, and no more"
        held = response._held_bytes
        assert HELD_BYTES_MAX < held <= HELD_BYTES_MAX + MIB // 2
        assert len(await response.read_chunk()) == held
        while sent == before:
            assert await response.read_chunk(), "it goes on where it stood still"
        response.close()


async def test_a_body_beyond_the_limit_is_not_read_on(client: HttpClient) -> None:
    async def large(request: Request, reply: Reply) -> None:
        await reply.whole(bytes(MIB))

    async with FakeUpstream(large) as up:
        for limit in (0, 10, MIB - 1):
            response = await client.send("POST", up.url, headers={}, body=b"{}")
            with pytest.raises(UpstreamBroken, match=f"larger than {limit} bytes"):
                await response.read_all(limit)
        response = await client.send("POST", up.url, headers={}, body=b"{}")
        assert len(await response.read_all(MIB)) == MIB


async def test_a_small_body_beyond_the_limit_is_refused_too(client: HttpClient) -> None:
    async with FakeUpstream(echo) as up:
        response = await client.send("POST", up.url, headers={}, body=b"12345")
        with pytest.raises(UpstreamBroken, match="larger than 4 bytes"):
            await response.read_all(4)


# --- what else an answer may be -----------------------------------------------------------------


async def test_redirects_are_not_followed(client: HttpClient) -> None:
    async def away(request: Request, reply: Reply) -> None:
        await reply.whole(b"", 302, {"Location": "http://other.example/"})

    async with FakeUpstream(away) as up:
        status, headers, _ = await client.fetch("GET", up.url, headers={})
        assert (status, headers["location"]) == (302, "http://other.example/")
        assert len(up.requests) == 1


@pytest.mark.parametrize(
    ("body", "headers", "wanted"),
    [
        (gzip.compress(b"hello", mtime=0), {"Content-Encoding": "gzip"}, b"hello"),
        (zlib.compress(b"hello"), {"Content-Encoding": "Deflate"}, b"hello"),
        (gzip.compress(bytes(3 * MIB), mtime=0), {"Content-Encoding": "x-gzip"}, bytes(3 * MIB)),
        (b"hello", {"Content-Encoding": "identity"}, b"hello"),
        (gzip.compress(b"", mtime=0), {"Content-Encoding": "gzip"}, b""),
        (b"", {"Content-Encoding": "gzip"}, b""),
    ],
)
async def test_what_comes_packed_in_spite_of_us_is_read(
    client: HttpClient, body: bytes, headers: dict[str, str], wanted: bytes
) -> None:
    async def packed(request: Request, reply: Reply) -> None:
        await reply.whole(body, headers=headers)

    async with FakeUpstream(packed) as up:
        response = await client.send("POST", up.url, headers={}, body=b"{}")
        assert await response.read_all(4 * MIB) == wanted
        response = await client.send("POST", up.url, headers={}, body=b"{}")
        largest = 0
        while chunk := await response.read_chunk():
            largest = max(largest, len(chunk))
        assert largest <= 256 << 10, "a few bytes may stand for very many"


@pytest.mark.parametrize(
    ("body", "coding", "words"),
    [
        (b"hello", "br", r"compresses its answer \(br\) though told not to"),
        (b"hello", "gzip", "compressed answer is broken"),
        (gzip.compress(b"hello", mtime=0) + b"more", "gzip", "goes on after its end"),
        (gzip.compress(b"hello", mtime=0)[:-3], "gzip", "cut off"),
        (gzip.compress(bytes(8 * MIB), mtime=0), "gzip", "larger than 4194304 bytes"),
    ],
)
async def test_what_comes_packed_wrongly_is_refused(
    client: HttpClient, body: bytes, coding: str, words: str
) -> None:
    async def packed(request: Request, reply: Reply) -> None:
        await reply.whole(body, headers={"Content-Encoding": coding})

    async with FakeUpstream(packed) as up:
        with pytest.raises(UpstreamBroken, match=words):
            await client.fetch("POST", up.url, headers={}, body=b"{}")


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("http://", "the address is malformed on GET http://"),
        ("ftp://user:pass@m.example/a?b", "the address is malformed on GET ftp://m.example/a"),
        ("http://m.example:99999/", "the address is malformed on GET"),
    ],
)
async def test_a_malformed_address_is_told(client: HttpClient, url: str, words: str) -> None:
    with pytest.raises(ConnectFailed) as caught:
        await client.send("GET", url, headers={})
    assert str(caught.value).startswith(words)


async def test_a_header_that_cannot_be_sent_is_told_without_its_value(client: HttpClient) -> None:
    with pytest.raises(UpstreamBroken) as caught:
        await client.send("GET", "http://m.example/a", headers={"X-Token": "secret\r\nX: y"})
    words = "the request's header X-Token holds a control character on GET http://m.example/a"
    assert str(caught.value) == words


async def test_what_is_known_of_addresses_is_bounded(
    client: HttpClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("router.transport.http._TARGETS_MAX", 3)
    monkeypatch.setattr("router.transport.http._HEADS_MAX", 3)
    async with FakeUpstream(echo) as up:
        for at in range(9):
            path = f"/{at}?{at}"
            fetched = await client.fetch("GET", up.url + path, headers={"X-At": str(at)})
            assert (fetched[2].decode(), up.last.query) == (f"/{at}", str(at))
            await client.fetch("GET", up.url, headers={"X-At": str(at)})
            assert up.last.headers["x-at"] == str(at)
        assert len(client._targets) <= 3
        assert all(len(target._heads) <= 3 for target in client._targets.values())
        assert len(client._pools) == 1
        assert up.connections == 1
