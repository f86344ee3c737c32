"""Answers as they come off the wire: cut anywhere they read the same, and what cannot be framed for
certain is refused, however it is cut."""

from __future__ import annotations

import pytest

from router.transport.connection import BARREN_BYTES_MAX, HEADERS_MAX, INFORMATIONAL_MAX
from tests.transport.feeding import Outcome, outcome, splits

OK = b"HTTP/1.1 200 OK\r\n"
CHUNKED = OK + b"Transfer-Encoding: chunked\r\n\r\n"
SIZED = OK + b"Content-Length: 5\r\n\r\nhello"
EARLY = b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n"
HELLO = Outcome(200, b"hello", "", True)
LAST_HELLO = Outcome(200, b"hello", "", False)


@pytest.mark.parametrize(
    ("data", "wanted"),
    [
        (SIZED, HELLO),
        (OK + b"content-length:5\r\nX-Empty:\r\n\r\nhello", HELLO),
        (b"\r\n" + SIZED, HELLO),
        (OK + b"Content-Length: 0\r\n\r\n", Outcome(200, b"", "", True)),
        (CHUNKED + b"2\r\nhe\r\n3\r\nllo\r\n0\r\n\r\n", HELLO),
        (CHUNKED + b"0005\r\nhello\r\n000\r\n\r\n", HELLO),
        (CHUNKED + b'5;name="a;b";other\r\nhello\r\n0;last\r\n\r\n', HELLO),
        (CHUNKED + b"5\r\nhello\r\n0\r\nX-Sum: abc\r\nX-More: d\r\n\r\n", HELLO),
        (CHUNKED + b"0\r\n\r\n", Outcome(200, b"", "", True)),
        (OK + b"Transfer-Encoding: Chunked \r\n\r\n5\r\nhello\r\n0\r\n\r\n", HELLO),
        (EARLY + SIZED, HELLO),
        (b"HTTP/1.1 204 No Content\r\n\r\n", Outcome(204, b"", "", True)),
        (b"HTTP/1.1 304 Not Modified\r\nContent-Length: 5\r\n\r\n", Outcome(304, b"", "", True)),
        (b"HTTP/1.1 429 \r\nContent-Length: 5\r\n\r\nhello", Outcome(429, b"hello", "", True)),
        (OK + b"Connection: close\r\nContent-Length: 5\r\n\r\nhello", LAST_HELLO),
        (OK + b"Connection: x, Close\r\nContent-Length: 5\r\n\r\nhello", LAST_HELLO),
        (b"HTTP/1.0 200 OK\r\nContent-Length: 5\r\n\r\nhello", LAST_HELLO),
        (b"HTTP/1.0 200 OK\r\nConnection: keep-alive\r\nContent-Length: 5\r\n\r\nhello", HELLO),
    ],
)
async def test_an_answer_is_the_same_however_it_is_cut(data: bytes, wanted: Outcome) -> None:
    for pieces in splits(data):
        assert await outcome(pieces) == wanted, pieces


@pytest.mark.parametrize("head", [OK, b"HTTP/1.0 200 OK\r\n", OK + b"Connection: keep-alive\r\n"])
async def test_a_body_without_a_length_ends_with_the_connection(head: bytes) -> None:
    for pieces in splits(head + b"\r\nhello"):
        assert await outcome(pieces, ends=True) == LAST_HELLO


async def test_the_answer_to_a_head_has_no_body_and_is_the_last_of_its_connection() -> None:
    for pieces in splits(OK + b"Content-Length: 5\r\n\r\n"):
        assert await outcome(pieces, method="HEAD") == Outcome(200, b"", "", False)


@pytest.mark.parametrize("excess", [SIZED, b"HTTP/1.1 200", b"H", b"\x00", b"0\r\n\r\n"])
async def test_what_comes_behind_an_answer_is_never_the_next_ones(excess: bytes) -> None:
    """In the same read: the answer is good, its connection is not."""
    for answer in (SIZED, CHUNKED + b"5\r\nhello\r\n0\r\n\r\n"):
        assert await outcome([answer + excess]) == LAST_HELLO
        assert await outcome([answer[:-1], answer[-1:] + excess]) == LAST_HELLO


UNFRAMED = {
    "two lengths": OK + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\nhello!",
    "the same length twice": OK + b"Content-Length: 5\r\nContent-Length: 5\r\n\r\nhello",
    "two lengths in one": OK + b"Content-Length: 5, 5\r\n\r\nhello",
    "a length that is no number": OK + b"Content-Length: five\r\n\r\nhello",
    "a negative length": OK + b"Content-Length: -5\r\n\r\nhello",
    "a length with a sign": OK + b"Content-Length: +5\r\n\r\nhello",
    "a hexadecimal length": OK + b"Content-Length: 0x5\r\n\r\nhello",
    "a length that overflows": OK + b"Content-Length: 18446744073709551621\r\n\r\nhello",
    "an empty length": OK + b"Content-Length:\r\n\r\nhello",
    "a length and chunks": OK
    + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\nhello",
    "chunks and a length": OK
    + b"Transfer-Encoding: chunked\r\nContent-Length: 5\r\n\r\n0\r\n\r\nhello",
    "identity": OK + b"Transfer-Encoding: identity\r\n\r\nhello",
    "gzip, chunked": OK + b"Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
    "chunked twice": OK + b"Transfer-Encoding: chunked, chunked\r\n\r\n0\r\n\r\n",
    "two codings": OK
    + b"Transfer-Encoding: chunked\r\nTransfer-Encoding: identity\r\n\r\n0\r\n\r\n",
    "a coding in disguise": OK + b"Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n",
    "a tab before the coding's end": OK + b"Transfer-Encoding: chunked\x0b\r\n\r\n0\r\n\r\n",
    "chunks in HTTP/1.0": b"HTTP/1.0 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "a negative chunk": CHUNKED + b"-5\r\nhello\r\n0\r\n\r\n",
    "a chunk of 0x5": CHUNKED + b"0x5\r\nhello\r\n0\r\n\r\n",
    "a chunk size of many digits": CHUNKED + b"10000000000000005\r\nhello\r\n0\r\n\r\n",
    "no chunk size": CHUNKED + b"\r\nhello\r\n0\r\n\r\n",
    "a space in the size": CHUNKED + b"5 \r\nhello\r\n0\r\n\r\n",
    "a bare LF after the size": CHUNKED + b"5\nhello\r\n0\r\n\r\n",
    "a bare CR after the size": CHUNKED + b"5\rhello\r\n0\r\n\r\n",
    "a chunk longer than its size": CHUNKED + b"5\r\nhello!\r\n0\r\n\r\n",
    "a bare LF after a chunk": CHUNKED + b"5\r\nhello\n0\r\n\r\n",
    "a NUL in an extension": CHUNKED + b"5;a\x00\r\nhello\r\n0\r\n\r\n",
    "a LF in an extension": CHUNKED + b"5;a\nb\r\nhello\r\n0\r\n\r\n",
    "a folded trailer": CHUNKED + b"5\r\nhello\r\n0\r\nX: a\r\n b\r\n\r\n",
    "a trailer of length": CHUNKED + b"5\r\nhello\r\n0\r\nContent-Length: 9\r\n\r\n",
    "a folded header": OK + b"X: a\r\n b\r\nContent-Length: 5\r\n\r\nhello",
    "a header that begins folded": OK + b" X: a\r\nContent-Length: 5\r\n\r\nhello",
    "a bare LF in the head": OK + b"X: a\nContent-Length: 5\r\n\r\nhello",
    "a bare CR in the head": OK + b"X: a\rContent-Length: 5\r\n\r\nhello",
    "bare LFs only": b"HTTP/1.1 200 OK\nContent-Length: 5\n\nhello",
    "a NUL in a value": OK + b"X: a\x00b\r\nContent-Length: 5\r\n\r\nhello",
    "a NUL in a name": OK + b"X\x00: a\r\nContent-Length: 5\r\n\r\nhello",
    "a space before the colon": OK + b"Content-Length : 5\r\n\r\nhello",
    "a header without a name": OK + b": a\r\nContent-Length: 5\r\n\r\nhello",
    "a header without a colon": OK + b"nonsense\r\nContent-Length: 5\r\n\r\nhello",
    "no HTTP": b"SSH-2.0-OpenSSH_9.6\r\n\r\n",
    "a status of two digits": b"HTTP/1.1 20 OK\r\n\r\n",
    "a status of four digits": b"HTTP/1.1 2000 OK\r\n\r\n",
    "the status 000": b"HTTP/1.1 000 \r\nContent-Length: 5\r\n\r\nhello",
    "another protocol": b"HTTP/1.1 101 Switching\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\nhello",
    "101 without a word": b"HTTP/1.1 101 Switching\r\n\r\nhello",
    "informational without end": b"HTTP/1.1 100 Continue\r\n\r\n" * (INFORMATIONAL_MAX + 1) + SIZED,
    # Found by `make fuzz`: a good answer behind a bad one, in the same read, was taken for it.
    "a good answer behind a bad coding": OK
    + b"Transfer-Encoding: chunked, chunked\r\n\r\n0\r\n\r\n"
    + SIZED,
    "a good answer behind a bad status": b"HTTP/1.1 000 \r\nContent-Length: 5\r\n\r\nhello" + SIZED,
    "a good answer behind too many headers": OK
    + b"X: a\r\n" * (HEADERS_MAX + 1)
    + b"Content-Length: 0\r\n\r\n"
    + SIZED,
    "too many headers": OK + b"X: a\r\n" * (HEADERS_MAX + 1) + b"\r\n",
    "an endless header": OK + b"X: " + b"a" * (BARREN_BYTES_MAX + 9) + b"\r\n\r\n",
    "an endless name": OK + b"X" * (BARREN_BYTES_MAX + 9),
    "an endless reason": b"HTTP/1.1 200 " + b"O" * (BARREN_BYTES_MAX + 9),
    "an endless extension": CHUNKED + b"5;" + b"a" * (2 * BARREN_BYTES_MAX),
    "an endless trailer": CHUNKED + b"5\r\nhello\r\n0\r\nX: " + b"a" * (2 * BARREN_BYTES_MAX),
    "trailers without end": CHUNKED + b"0\r\n" + b"X: abc\r\n" * (BARREN_BYTES_MAX // 4),
    "zeros without end": CHUNKED + b"0" * (2 * BARREN_BYTES_MAX),
}


@pytest.mark.parametrize("name", UNFRAMED)
async def test_what_cannot_be_framed_is_refused(name: str) -> None:
    data = UNFRAMED[name]
    # Byte by byte, or where it is long in some hundred reads; and in reads as a system makes them.
    for step in (max(1, len(data) // 700), 64 << 10):
        found = await outcome(data[at : at + step] for at in range(0, len(data), step))
        assert found.error.startswith("UpstreamBroken: the upstream's answer is no HTTP"), found
        assert not found.is_kept
        assert found.body in (b"", b"hello"), "what is given must have been framed"


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "the upstream closed the connection without an answer on POST http://model.example"),
        (b"HTTP/1.1 2", "closed the connection without an answer"),
        (EARLY, "closed the connection without an answer"),
        (SIZED[:-1], "the upstream's answer was cut off while reading the answer"),
        (CHUNKED, "cut off"),
        (CHUNKED + b"5\r\nhello\r\n", "cut off"),
        (CHUNKED + b"5\r\nhello\r\n0\r\n", "cut off"),
        (CHUNKED + b"5\r\nhello\r\n0\r\nX: y\r\n", "cut off"),
    ],
)
async def test_what_ends_too_soon_is_told(data: bytes, words: str) -> None:
    found = await outcome([data] if data else [], ends=True)
    assert found.error.startswith("UpstreamBroken")
    assert words in found.error
    assert found.body in (b"", b"hell", b"hello"), "what came is read before it is told"


async def test_headers_within_the_limits_pass() -> None:
    many = b"".join(b"X-%d: a\r\n" % at for at in range(HEADERS_MAX - 1))
    long = b"X: " + b"a" * (BARREN_BYTES_MAX // 2) + b"\r\n"
    for headers in (many, long):
        answer = OK + headers + b"Content-Length: 5\r\n\r\nhello"
        assert await outcome([answer]) == HELLO
        assert await outcome([answer[:9], answer[9:-5], answer[-5:]]) == HELLO
