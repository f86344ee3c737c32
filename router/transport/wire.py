"""Requests and answers as HTTP/1.1 writes them: addresses, heads out, what a head says. Pure.

Not the framing itself, which is httptools' (llhttp, strict): here is what it lets pass and we do
not (RFC 9112 section 6.3, RFC 9110 section 5.5).
"""

from __future__ import annotations

import base64
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from urllib.parse import quote, unquote, urlsplit

_PORTS = {"http": 80, "https": 443}
_TOKEN = re.compile(r"[!#$%&'*+\-.^_`|~0-9A-Za-z]+")
# Of a backslash, half the world says that it ends the host, and half that it does not.
_CONTROL = re.compile(r"[\x00-\x20\x7f\\]")
_BREAKING = re.compile(r"[\x00-\x08\x0a-\x1f\x7f]")
# RFC 3986's reserved and unreserved characters, and what is percent-encoded already.
_SAFE_IN_TARGET = "!#$%&'()*+,-./:;=?@[]_~"
# The transport writes these itself: two of them would be two requests to somebody.
_OURS = frozenset(
    {"accept-encoding", "connection", "content-length", "expect", "host", "proxy-authorization"}
    | {"te", "trailer", "transfer-encoding", "upgrade"}
)
_SHOWN_CHARS_MAX = 100


@dataclass(frozen=True, slots=True)
class Address:
    """A URL taken apart. `authority` is the Host header; `target` the path with its query;
    `authorization` what a user and a password in the URL come to, or "".
    """

    scheme: str
    host: str
    port: int
    authority: str
    target: str
    authorization: str


def read_address(url: str) -> Address:
    """Raises ValueError where it is no http or https URL. Never repeats the URL."""
    if _CONTROL.search(url):
        raise ValueError("a space, a backslash or a control character in the address")
    parts = urlsplit(url)
    host = (parts.hostname or "").rstrip(".")
    if parts.scheme not in _PORTS or not host:
        raise ValueError("no http:// or https:// address")
    if not host.isascii():
        host = host.encode("idna").decode("ascii")
    if re.search(r"[^0-9a-z.:_\-%~]", host):
        raise ValueError("a character in the host that no host has")
    usual = _PORTS[parts.scheme]
    port = usual if parts.port is None else parts.port
    if port == 0:
        raise ValueError("nothing listens on the port 0")
    shown = f"[{host.partition('%')[0]}]" if ":" in host else host
    target = quote(parts.path or "/", safe=_SAFE_IN_TARGET)
    if parts.query:
        target += "?" + quote(parts.query, safe=_SAFE_IN_TARGET)
    return Address(
        scheme=parts.scheme,
        host=host,
        port=port,
        authority=shown if port == usual else f"{shown}:{port}",
        target=target,
        authorization=basic(parts.username, parts.password),
    )


def basic(user: str | None, password: str | None) -> str:
    """The Basic authorization of a user and a password as a URL writes them; "" without either."""
    if user is None and password is None:
        return ""
    pair = f"{unquote(user or '')}:{unquote(password or '')}"
    return "Basic " + base64.b64encode(pair.encode()).decode("ascii")


def request_head(
    method: str, address: Address, headers: Mapping[str, str], proxy_authorization: str | None
) -> bytes:
    """A request's head without its length and its last line. Raises ValueError, naming the header.

    `proxy_authorization` is None where no proxy is asked; a proxy is told the whole address.
    """
    if not _TOKEN.fullmatch(method):
        raise ValueError("the method is no word")
    target = address.target
    if proxy_authorization is not None:
        target = f"{address.scheme}://{address.authority}{target}"
    lines = [f"{method} {target} HTTP/1.1", f"Host: {address.authority}"]
    lines.append("Accept-Encoding: identity")
    if proxy_authorization:
        lines.append(f"Proxy-Authorization: {proxy_authorization}")
    has_authorization = False
    for name, value in headers.items():
        if not _TOKEN.fullmatch(name) or name.lower() in _OURS:
            shown = ascii(name[:_SHOWN_CHARS_MAX])
            raise ValueError(f"the request's header {shown} is not for a caller to send")
        if _BREAKING.search(value):
            raise ValueError(f"the request's header {name} holds a control character")
        has_authorization |= name.lower() == "authorization"
        lines.append(f"{name}: {value}")
    if address.authorization and not has_authorization:
        lines.append(f"Authorization: {address.authorization}")
    return "\r\n".join([*lines, ""]).encode()


class Headers(Mapping[str, str]):
    """An answer's headers by their names, whatever the case; of equal names the first counts."""

    __slots__ = ("_raw",)

    def __init__(self, raw: Mapping[bytes, bytes]) -> None:
        """`raw` has lower-case names."""
        self._raw = raw

    def __getitem__(self, name: str) -> str:
        return _text(self._raw[name.lower().encode()])

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and name.lower().encode() in self._raw

    def __iter__(self) -> Iterator[str]:
        return map(_text, self._raw)

    def __len__(self) -> int:
        return len(self._raw)

    def __repr__(self) -> str:
        return f"Headers({dict(self)!r})"


def collected(pairs: Sequence[tuple[bytes, bytes]]) -> dict[bytes, bytes]:
    """The first value of each name."""
    found = dict(pairs)
    if len(found) < len(pairs):
        for name, value in reversed(pairs):
            found[name] = value
    return found


def framing_fault(pairs: Sequence[tuple[bytes, bytes]], version: str) -> str | None:
    """Why the end of a body with a transfer-encoding cannot be known for sure, or None."""
    codings = [value for name, value in pairs if name == b"transfer-encoding"]
    if len(codings) > 1 or codings[0].strip().lower() != b"chunked":
        return "a transfer-encoding other than chunked"
    return None if version == "1.1" else f"chunks in HTTP/{version}"


@lru_cache(256)
def media_type(value: bytes) -> str:
    """The media type without parameters, lower case."""
    return _text(value[:_SHOWN_CHARS_MAX]).partition(";")[0].strip().lower()


def _text(value: bytes) -> str:
    return value.decode("utf-8", "surrogateescape")
