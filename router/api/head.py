"""The heads of requests that the front serves by itself: a strict part of HTTP/1.1, and pure.

What is let through has one meaning to everybody (RFC 9112): its first line asks for a path of this
server, each header stands once and in one line, and the body has the length that is told, or there
is none. All else, also what is legal and only rare, is None here and goes to aiohttp, which reads
it from its start.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple

HEAD_BYTES_MAX = 8 << 10
_HEADERS_MAX = 64
# RFC 9110, section 5.6.2 (token) and 5.5 (field-value, with obs-text).
_TOKEN = re.compile(rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]+")
_VISIBLE = bytes([*b"\t", *range(0x20, 0x7F), *range(0x80, 0x100)])
_LENGTH = re.compile(rb"[0-9]{1,15}")
# RFC 9112, section 3.2.1 (origin-form), with the characters of RFC 3986 and no others.
_FIRST_LINE = re.compile(
    rb"(DELETE|GET|HEAD|OPTIONS|PATCH|POST|PUT) (/[!$%&'()*+,\-./0-9:;=?@A-Z_a-z~]*) HTTP/1\.1"
)
# They change how the body is framed or coded, when it is sent, or what the connection is.
_NOT_PLAIN = frozenset({"", "content-encoding", "expect", "transfer-encoding", "upgrade"})
_NAMES_KEPT = 512
_NAME_BYTES_KEPT = 64


class Head(NamedTuple):
    """`headers` have names in lower case, and their values with the blanks around them."""

    method: str
    target: str
    headers: Mapping[str, bytes]
    body_bytes: int
    is_kept: bool


# The first line of what most ask for, with its method and target: it is not taken apart each time.
Starts = Mapping[bytes, tuple[str, str]]


def starts_of(hot: list[tuple[str, str]]) -> Starts:
    return {f"{method} {target} HTTP/1.1".encode(): (method, target) for method, target in hot}


def read_head(data: bytes, starts: Starts) -> Head | None:
    """The plain head of these bytes, which end before the empty line; else None."""
    first, *rest = data.split(b"\r\n")
    start = starts.get(first) or _start_of(first)
    if start is None or len(rest) > _HEADERS_MAX:
        return None
    if len(data.translate(None, _VISIBLE)) != 2 * len(rest):
        # A control character beside the line ends.
        return None
    try:
        headers = {_names[name]: value for name, value in [line.split(b":", 1) for line in rest]}
    except ValueError:
        # A line without a colon.
        return None
    if len(headers) != len(rest) or "host" not in headers or not _NOT_PLAIN.isdisjoint(headers):
        return None
    # Without a length, and without chunks, there is no body (RFC 9112, section 6.3).
    length = headers.get("content-length", b"0").strip(b" \t")
    if not _LENGTH.fullmatch(length):
        return None
    connection = headers.get("connection", b"").strip(b" \t").lower()
    if connection not in (b"", b"keep-alive", b"close"):
        return None
    return Head(*start, headers, int(length), connection != b"close")


def _start_of(first: bytes) -> tuple[str, str] | None:
    found = _FIRST_LINE.fullmatch(first)
    return None if found is None else (found[1].decode(), found[2].decode())


class _Names(dict[bytes, str]):
    """Names of headers in lower case, "" for what is none: clients write few, and always so."""

    def __missing__(self, name: bytes) -> str:
        if not _TOKEN.fullmatch(name):
            return ""
        found = name.lower().decode()
        if len(self) < _NAMES_KEPT and len(name) <= _NAME_BYTES_KEPT:
            self[name] = found
        return found


_names = _Names()
