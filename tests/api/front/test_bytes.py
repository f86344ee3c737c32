"""The front answers as aiohttp would, for any bytes in any pieces, and hands over what is not its.

Here without sockets and behind a handler that tells what it was asked; test_sockets has both.
"""

from __future__ import annotations

import asyncio
import random
import re
import time
import tracemalloc
from collections.abc import AsyncIterator, Iterator
from email.utils import formatdate
from itertools import pairwise, product
from typing import Any

import orjson
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from router.api.aiohttp_server import Connection
from router.api.answer import send
from router.api.front import Front
from router.api.reply import Reply, error_reply, json_reply
from router.api.request import Request
from router.api.server import Server
from router.errors import RouterError
from tests.fakes.wire import Wire

HOT = [("POST", "/chat"), ("POST", "/v1/chat")]
NAMES = ("host", "authorization", "content-type", "content-length", "x-a", "cookie", "connection")


async def tell(request: Request) -> None:
    """Answer with what was asked."""
    body = request.take_body()
    if body is None:
        body = b""
        while part := await request.read():
            body += part
    headers = {name: ascii(request.header(name)) for name in NAMES}
    told = {"is": f"{request.method} {request.target}", "headers": headers, "body": ascii(body)}
    await send(request, json_reply(told), "")


def refuse(error: RouterError) -> Reply:
    return error_reply(error)


def server_of(handle: Any = tell, **changed: Any) -> Server:
    limits = {"header_s": 5, "stall_s": 5, "idle_connection_s": 5, "connections_max": 100_000}
    return Server(handle, refuse=refuse, hot=HOT, **{**limits, **changed})


async def settled() -> None:
    for _ in range(30):
        await asyncio.sleep(0)


@pytest.fixture
async def server() -> AsyncIterator[Server]:
    one = server_of()
    await one.open_behind()
    yield one
    one.pre_shutdown()
    await one.shutdown(1)


def opened(server: Server, *, is_front: bool = True) -> Wire:
    if is_front:
        return Wire(server())
    made: list[Wire] = []

    class Behind(asyncio.Protocol):
        """Hands over before anything has come."""

        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            assert isinstance(transport, Wire)
            assert server._behind is not None
            server._behind.take_over(transport, b"")
            made.append(transport)

    return Wire(Behind())


# What no reader of an answer takes notice of.
PASSING = re.compile(rb"(Date|Connection): [^\r]*\r\n")


async def answer(server: Server, pieces: list[bytes], *, is_front: bool = True) -> bytes:
    """What these pieces are answered, with a word of whether the connection stays open."""
    wire = opened(server, is_front=is_front)
    for piece in pieces:
        wire.feed(piece)
        await settled()
    is_open = not wire.is_closing()
    sent = wire.sent
    wire.leave()
    await settled()
    told = b"".join(sorted(PASSING.sub(b"", sent).splitlines(keepends=True)))
    return told + (b"open" if is_open else b"closed")


def request(*lines: bytes, body: bytes = b"hello", start: bytes = b"POST /chat HTTP/1.1") -> bytes:
    length = b"Content-Length: %d" % len(body)
    return b"\r\n".join([start, b"Host: localhost", *lines, length, b"", body])


PLAIN = request(b"Authorization: Bearer k", b"Connection: keep-alive", b"x-A:  b c\t")
GET = b"GET /other?a=%20b&c=d/e? HTTP/1.1\r\nHost: localhost\r\n\r\n"
CHUNKED = (
    b"POST /chat HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nhi\r\n0\r\n\r\n"
)
ALL_PLAIN = [
    PLAIN,
    GET,
    b"HEAD / HTTP/1.1\r\nHost: localhost\r\nUser-Agent: curl/8\r\nAccept: */*\r\n\r\n",
    b"DELETE /keys/a%2Fb HTTP/1.1\r\nHost: localhost\r\nContent-Length: 0\r\n\r\n",
    request(start=b"PATCH /keys/a HTTP/1.1"),
]


@pytest.mark.parametrize("data", ALL_PLAIN)
async def test_what_is_plain_is_the_fronts_and_answered_as_aiohttp_would(
    data: bytes, server: Server
) -> None:
    wire = opened(server)
    for _ in range(3):
        wire.feed(data)
        await settled()
    assert wire.sent.count(b"200 OK") == 3
    assert isinstance(wire.get_protocol(), Front)
    assert await answer(server, [data]) == await answer(server, [data], is_front=False)


async def test_each_answer_has_its_date_as_http_writes_it(server: Server) -> None:
    before = int(time.time())
    wire = opened(server)
    wire.feed(PLAIN)
    await settled()
    found = re.search(rb"\r\nDate: ([^\r]*)\r\n", wire.sent)
    assert found is not None
    usual = [formatdate(at, usegmt=True) for at in range(before, int(time.time()) + 1)]
    assert found[1].decode() in usual


async def test_any_two_pieces_are_answered_as_the_whole(server: Server) -> None:
    whole = await answer(server, [PLAIN])
    assert b"200 OK" in whole
    for at in range(1, len(PLAIN)):
        assert await answer(server, [PLAIN[:at], PLAIN[at:]]) == whole


async def test_byte_by_byte_is_answered_as_the_whole(server: Server) -> None:
    single = [PLAIN[at : at + 1] for at in range(len(PLAIN))]
    assert await answer(server, single) == await answer(server, [PLAIN])


async def test_a_body_in_pieces_stays_with_the_front(server: Server) -> None:
    wire = opened(server)
    for _ in range(3):
        head = PLAIN.removesuffix(b"hello")
        for piece in (head + b"he", b"l", b"lo"):
            wire.feed(piece)
        await settled()
    assert wire.sent.count(b"200 OK") == 3
    assert isinstance(wire.get_protocol(), Front)


ODD = {
    "two lengths": request(b"Content-Length: 5"),
    "two other lengths": request(b"Content-Length: 6"),
    "a list of lengths": request().replace(b"Length: 5", b"Length: 5, 5"),
    "a signed length": request().replace(b"Length: 5", b"Length: +5"),
    "a negative length": request().replace(b"Length: 5", b"Length: -5"),
    "a length in hex": request().replace(b"Length: 5", b"Length: 0x5"),
    "a length with a gap": request().replace(b"Length: 5", b"Length: 0 5"),
    "a huge length": request().replace(b"Length: 5", b"Length: 9" + b"9" * 30),
    "an empty length": request().replace(b"Length: 5", b"Length: "),
    "no length": b"POST /chat HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "length and chunks": request(b"Transfer-Encoding: chunked", body=b"0\r\n\r\n"),
    "chunks": b"POST /chat HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n",
    "odd chunks": request(b"Transfer-Encoding: xchunked"),
    "hidden chunks": request(b"Transfer-Encoding : chunked", body=b"0\r\n\r\n"),
    "tabbed chunks": request(b"Transfer-Encoding:\tchunked", body=b"0\r\n\r\n"),
    "bare line feeds": request().replace(b"\r\n", b"\n"),
    "one bare line feed": request(b"x-a: b\nx-b: c"),
    "bare carriage return": request(b"x-a: b\rx-b: c"),
    "a folded line": request(b"x-a: b\r\n  c"),
    "a first line folded": request(start=b"POST /chat HTTP/1.1\r\n x: y"),
    "a space before the colon": request(b"x-a : b"),
    "a space in the name": request(b"x a: b"),
    "no name": request(b": b"),
    "no colon": request(b"x-a"),
    "a byte in the name": request(b"x-\xff: b"),
    "a NUL in the name": request(b"x-\0: b"),
    "a NUL in the value": request(b"x-a: \0"),
    "a DEL in the value": request(b"x-a: \x7f"),
    "an escape in the value": request(b"x-a: \x1b"),
    "bytes in the value": request(b"x-a: \xff\xc3\xa9"),
    "two hosts": request(b"Host: other"),
    "two of another": request(b"x-a: b", b"X-A: c"),
    "no host": b"POST /chat HTTP/1.1\r\nContent-Length: 2\r\n\r\nhi",
    "many headers": request(*(b"x-%d: y" % i for i in range(120))),
    "too many headers": request(*(b"x-%d: y" % i for i in range(500))),
    "a long header": request(b"x-a: " + b"b" * 12_000),
    "too long a header": request(b"x-a: " + b"b" * 40_000),
    "too long a target": request(start=b"POST /chat?" + b"b" * 40_000 + b" HTTP/1.1"),
    "old HTTP": request(start=b"POST /chat HTTP/1.0"),
    "new HTTP": request(start=b"POST /chat HTTP/2.0"),
    "another path": request(start=b"POST /other HTTP/1.1"),
    "a query": request(start=b"POST /chat?a=b HTTP/1.1"),
    "a whole address": request(start=b"POST http://localhost/chat HTTP/1.1"),
    "two spaces": request(start=b"POST  /chat HTTP/1.1"),
    "a space at the end": request(start=b"POST /chat HTTP/1.1 "),
    "small letters": request(start=b"post /chat HTTP/1.1"),
    "an empty line before": b"\r\n" + request(),
    "a space before": b" " + request(),
    "leaving": request(b"Connection: close"),
    "leaving, in capitals": request(b"CONNECTION: CLOSE"),
    "some other connection": request(b"Connection: te, close"),
    "an upgrade": request(b"Connection: upgrade", b"Upgrade: h2c"),
    "an upgrade alone": request(b"Upgrade: h2c"),
    "expecting": request(b"Expect: 100-continue"),
    "expecting else": request(b"Expect: the unexpected"),
    "coded": request(b"Content-Encoding: identity"),
    "badly coded": request(b"Content-Encoding: gzip"),
    "two at once": request() + request(body=b"again"),
    "one and garbage": request() + b"\0\0\0",
    "one and half": request() + request()[:20],
    "no body": request(body=b""),
    "blanks around the length": request().replace(b"Length: 5", b"Length:\t 5 \t"),
    "a get": b"GET /chat HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "a get with a body": request(start=b"GET /chat HTTP/1.1"),
    "a get with chunks": CHUNKED.replace(b"POST", b"GET"),
    "a get without a host": b"GET /chat HTTP/1.1\r\n\r\n",
    "a get of old HTTP": b"GET /chat HTTP/1.0\r\n\r\n",
    "a get of oldest HTTP": b"GET /chat\r\n\r\n",
    "two gets at once": GET + GET,
    "a get and garbage": GET + b"\0\0\0",
    "a get of some bytes": b"GET /\xc3\xa9\xff HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "a get of a fragment": b"GET /chat#a HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "a get of odd escapes": b"GET /%zz%?%00%0d%0a HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "a get of two slashes": b"GET //other/../a;b@c:1 HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "a get of no path": b"GET chat HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "a get of a star": b"GET * HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "options of a star": b"OPTIONS * HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "options": b"OPTIONS /chat HTTP/1.1\r\nHost: localhost\r\nOrigin: http://a\r\n\r\n",
    "a head": b"HEAD /chat HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "a connect": b"CONNECT localhost:1 HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "a connect with a path": b"CONNECT /chat HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "a trace": b"TRACE /chat HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "another method": b"PROPFIND /chat HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "no method": b"XYZ /chat HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "a websocket": b"GET /chat HTTP/1.1\r\nHost: localhost\r\nConnection: Upgrade\r\n"
    b"Upgrade: websocket\r\n\r\n",
    "garbage": b"GARBAGE\r\n\r\n",
    "nothing but ends": b"\r\n\r\n\r\n\r\n",
    "a hello of TLS": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
    "a preface of HTTP/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
}


@pytest.mark.parametrize("odd", ODD)
async def test_what_is_odd_means_to_the_front_what_it_means_to_aiohttp(
    odd: str, server: Server
) -> None:
    data = ODD[odd]
    assert await answer(server, [data]) == await answer(server, [data], is_front=False)
    middle = len(data) // 2
    pieces = [data[:middle], data[middle:]]
    assert await answer(server, pieces) == await answer(server, pieces, is_front=False)


SPICE = [b"\r", b"\n", b"\r\n", b"\r\n\r\n", b" ", b"\t", b":", b"\0", b"\x7f", b"\x80", b",", b"5"]
SPICE += [b"Content-Length: 3\r\n", b"Transfer-Encoding: chunked\r\n", b"Connection: close\r\n"]
SPICE += [b"x", b"HTTP/1.1", b"POST /chat HTTP/1.1\r\n", b"Expect: 100-continue\r\n", b"\xc3\xa9"]
SPICE += [
    b"GET",
    b"HEAD ",
    b"OPTIONS",
    b"CONNECT ",
    b"/",
    b"//",
    b"?",
    b"#",
    b"%",
    b"%0d",
    b"\\",
    b"*",
]
SPICE += [
    b"http://localhost",
    b"HTTP/1.0",
    b"Upgrade: h2c\r\n",
    b"TE: trailers\r\n",
    b'"',
    b"{",
    b"|",
]


@st.composite
def spoilt(draw: Any) -> list[bytes]:
    """A plain request with a few changes, in a few pieces."""
    data = draw(st.sampled_from(ALL_PLAIN)) + draw(st.sampled_from([b"", *ALL_PLAIN]))
    for _ in range(draw(st.integers(0, 3))):
        at = draw(st.integers(0, len(data)))
        end = at + draw(st.sampled_from([0, 0, 1, 2, 10]))
        data = data[:at] + draw(st.sampled_from([*SPICE, b""])) + data[end:]
    cuts = sorted(draw(st.lists(st.integers(0, len(data)), max_size=3)))
    edges = [0, *cuts, len(data)]
    return [data[a:b] for a, b in pairwise(edges) if a < b]


def joined(pieces: list[bytes]) -> Iterator[list[bytes]]:
    """These pieces, and each way to join some neighbours."""
    for cuts in product([True, False], repeat=len(pieces) - 1):
        found = [pieces[0]]
        for is_cut, piece in zip(cuts, pieces[1:], strict=True):
            if is_cut:
                found.append(piece)
            else:
                found[-1] += piece
        yield found


@settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(pieces=spoilt())
def test_no_change_and_no_cut_has_the_front_answer_otherwise_than_aiohttp(
    pieces: list[bytes],
) -> None:
    async def both() -> None:
        server = server_of()
        await server.open_behind()
        ours = await answer(server, pieces)
        # Of garbage behind a request aiohttp says other things when it comes in the same read, and
        # the front gives it in one read what it has kept of several.
        theirs = {await answer(server, one, is_front=False) for one in joined(pieces)}
        await server.shutdown(1)
        assert ours in theirs

    asyncio.run(both())


async def test_what_is_handed_over_stays_so(server: Server) -> None:
    wire = opened(server)
    for data in (PLAIN, GET, CHUNKED, PLAIN):
        before = wire.sent.count(b"200 OK")
        wire.feed(data)
        await settled()
        assert wire.sent.count(b"200 OK") == before + 1
        is_behind = isinstance(wire.get_protocol(), Connection)
        assert is_behind == (wire.sent.count(b"200 OK") > 2)
        assert server.connections == [wire.get_protocol()]


async def test_of_two_requests_at_once_the_first_is_answered_and_it_closes() -> None:
    served = 0
    go = asyncio.Event()

    async def slow(request: Request) -> None:
        nonlocal served
        served += 1
        await go.wait()
        await tell(request)

    server = server_of(slow)
    for pieces in ([PLAIN + PLAIN], [PLAIN, PLAIN]):
        go.clear()
        wire = opened(server)
        for piece in pieces:
            wire.feed(piece)
            await settled()
        go.set()
        await settled()
        assert wire.sent.count(b"200 OK") == 1
        assert wire.is_closing()
    assert served == 2
    assert server.connections == []


async def test_a_large_body_is_read_as_it_is_asked_for() -> None:
    go = asyncio.Event()

    async def slow(request: Request) -> None:
        assert request.take_body() is None
        await go.wait()
        await tell(request)

    server = server_of(slow)
    body = random.Random(1).randbytes(300_000)
    data = request(body=body)
    wire = opened(server)
    at = 0
    while wire.is_reading():
        wire.feed(data[at : at + 20_000])
        at += 20_000
        await settled()
    assert at < 120_000, "nobody asked for more yet"
    go.set()
    await settled()
    assert wire.is_reading()
    wire.feed(data[at:])
    await settled()
    assert orjson.loads(wire.sent.partition(b"\r\n\r\n")[2])["body"] == ascii(body)
    wire.leave()
    await settled()
    assert server.connections == []


async def test_a_refused_body_is_taken_off_the_wire_for_the_answers_sake() -> None:
    async def refusing(request: Request) -> None:
        await send(request, Reply(401, b"{}"), "")

    server = server_of(refusing)
    wire = opened(server)
    data = request(body=b"x" * 100_000)
    wire.feed(data[:50_000])
    await settled()
    assert b" 401 " in wire.sent
    assert not wire.is_closing()
    wire.feed(data[50_000:])
    await settled()
    assert not wire.is_closing()
    wire.feed(data)
    await settled()
    assert wire.sent.count(b" 401 ") == 2
    await server.shutdown(1)
    await settled()
    assert wire.is_closing()


async def test_a_refused_body_that_came_whole_ahead_of_the_answer_stops_no_reading() -> None:
    go = asyncio.Event()

    async def refusing(request: Request) -> None:
        await go.wait()
        await send(request, Reply(401, b"{}"), "")

    server = server_of(refusing)
    wire = opened(server)
    data = request(body=b"x" * 100_000)
    for piece in (data[:1_000], data[1_000:]):
        wire.feed(piece)
        await settled()
    assert not wire.is_reading()
    go.set()
    await settled()
    assert wire.is_reading()
    wire.feed(data)
    await settled()
    assert wire.sent.count(b" 401 ") == 2
    await server.shutdown(1)


async def test_what_never_comes_is_not_waited_for_for_ever() -> None:
    async def never(request: Request) -> None:
        request.part()
        await send(request, Reply(408, b"{}"), "")

    server = server_of(never, header_s=0.05, idle_connection_s=0.05)
    silent, late, left_over = (opened(server) for _ in range(3))
    late.feed(PLAIN[:-2])
    left_over.feed(request(body=b"x" * 100_000)[:-2])
    async with asyncio.timeout(10):
        while not silent.is_closing() or not late.is_closing():
            await asyncio.sleep(0)
        assert silent.sent == b""
        assert b" 408 " in late.sent
        assert b" 408 " in left_over.sent
        while server.connections:
            await asyncio.sleep(0)
        # Nobody is looked at any more.
        while server._fronts._timer is not None:
            await asyncio.sleep(0)


async def test_who_leaves_ends_his_task_or_what_was_agreed_happens() -> None:
    begun, go = asyncio.Event(), asyncio.Event()
    ends: list[str] = []

    async def waits(request: Request) -> None:
        if request.header("x-goes-on"):
            request.when_left(lambda: ends.append("left"))
        begun.set()
        try:
            await go.wait()
            ends.append("ended")
        except asyncio.CancelledError:
            ends.append("cancelled")
            raise
        with pytest.raises(ConnectionError):
            request.write(b"x")

    server = server_of(waits)
    for data in (PLAIN, request(b"x-goes-on: 1")):
        begun.clear()
        wire = opened(server)
        wire.feed(data)
        await begun.wait()
        wire.leave()
        await settled()
        assert server.connections == []
    assert ends == ["cancelled", "left"]
    go.set()
    await settled()
    assert ends == ["cancelled", "left", "ended"]
    await server.shutdown(1)


async def test_who_leaves_in_the_middle_of_a_body_is_told_of() -> None:
    told: list[str] = []

    async def notes(request: Request) -> None:
        try:
            await tell(request)
        except ConnectionError as error:
            told.append(str(error))
            raise

    server = server_of(notes)
    wire = opened(server)
    wire.feed(PLAIN[:-2])
    await settled()
    wire.leave()
    await settled()
    assert told == ["the client has left"]
    assert server.connections == []


async def asked(server: Server) -> tuple[Wire, Front]:
    """A connection on which one request has come."""
    wire = opened(server)
    wire.feed(PLAIN)
    await settled()
    front = wire.get_protocol()
    assert isinstance(front, Front)
    return wire, front


async def test_who_does_not_read_is_waited_for_and_then_given_up() -> None:
    written = 0

    async def pours(request: Request) -> None:
        nonlocal written
        while True:
            request.write(b"x")
            written += 1
            if request.is_full:
                await request.drain()
            await asyncio.sleep(0)

    server = server_of(pours, stall_s=0.05)
    wire, front = await asked(server)
    front.pause_writing()
    await settled()
    before = written
    await settled()
    assert written == before
    front.resume_writing()
    await settled()
    assert written > before
    front.pause_writing()
    async with asyncio.timeout(10):
        while server.connections:
            await asyncio.sleep(0)
    await settled()
    assert wire.is_closing()


async def test_who_reads_late_and_asks_no_more_is_not_kept_for_ever() -> None:
    server = server_of(idle_connection_s=0.05, stall_s=0.05)
    _, front = await asked(server)
    front.pause_writing()
    front.resume_writing()
    async with asyncio.timeout(10):
        while server.connections:
            await asyncio.sleep(0)


async def test_an_answer_without_its_end_is_the_connections_last() -> None:
    async def breaks(request: Request) -> None:
        request.write(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhe")
        raise ConnectionError("half")

    async def says_nothing(request: Request) -> None:
        return

    for handle in (breaks, says_nothing):
        wire = opened(server_of(handle))
        wire.feed(PLAIN)
        await settled()
        assert wire.is_closing()


async def test_the_last_request_is_served_to_its_end() -> None:
    go = asyncio.Event()

    async def slow(request: Request) -> None:
        await go.wait()
        await tell(request)

    server = server_of(slow)
    idle, busy, late = (opened(server) for _ in range(3))
    busy.feed(PLAIN)
    late.feed(PLAIN[:-2])
    await settled()
    server.pre_shutdown()
    assert idle.is_closing()
    late.feed(PLAIN[-2:])
    go.set()
    await settled()
    for wire in (busy, late):
        assert b"200 OK" in wire.sent
        assert b"Connection: close" in wire.sent
        assert wire.is_closing()
    assert server.connections == []
    go.clear()
    stuck = opened(server)
    stuck.feed(PLAIN)
    await settled()
    await server.shutdown(0.01)
    assert stuck.is_closing()


async def test_more_connections_than_allowed_are_closed_at_once() -> None:
    server = server_of(connections_max=2)
    first, second, third = (opened(server) for _ in range(3))
    await settled()
    assert [one.is_closing() for one in (first, second, third)] == [False, False, True]
    await server.open_behind()
    for wire, data in ((first, CHUNKED), (second, GET)):
        wire.feed(data)
        await settled()
        assert b"200 OK" in wire.sent
    assert len(server.connections) == 2
    late = opened(server)
    await settled()
    assert late.is_closing()
    server.pre_shutdown()
    await server.shutdown(1)


async def test_ten_thousand_idle_connections_are_cheap() -> None:
    server = server_of()
    wires = [opened(server) for _ in range(10_000)]
    assert len(server.connections) == 10_000
    fronts = [Front(server._fronts) for _ in range(10)]
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    fronts += [Front(server._fronts) for _ in range(1000)]
    taken = tracemalloc.get_traced_memory()[0] - before
    tracemalloc.stop()
    assert taken < 1000 * 500
    for wire in wires:
        wire.leave()
    await settled()
    assert server.connections == []
