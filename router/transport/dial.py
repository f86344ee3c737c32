"""How a connection is made: the name, the socket, a proxy's tunnel, TLS. All off the hot path.

Certificates are always checked, against the system's authorities or those of SSL_CERT_FILE. A TLS
session is resumed where the server has given a ticket for its name.
"""

from __future__ import annotations

import asyncio
import ipaddress
import socket
import ssl
from functools import cached_property
from typing import Any, NamedTuple, cast

import aiohappyeyeballs
import uvloop

from router.transport import failures
from router.transport.connection import Connection

# What other HTTP clients wait before they try the next address (RFC 8305 section 8).
_NEXT_ADDRESS_S = 0.25
_NAME_S = 10.0
_NAMES_MAX = 256
_SESSIONS_MAX = 256
_TUNNEL_HEAD_BYTES_MAX = 16 << 10


class Peer(NamedTuple):
    """Where a connection goes: an upstream or a proxy. `authorization` is what a proxy is told."""

    scheme: str
    host: str
    port: int
    authorization: str = ""


class Origin(NamedTuple):
    """Whose connections are alike. One trust in certificates serves all, so none is named here."""

    peer: Peer
    proxy: Peer | None


class Dialer:
    """Makes connections. Raises ConnectFailed; the caller limits the time."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._names: dict[tuple[str, int], tuple[float, list[Any]]] = {}

    @cached_property
    def _tls(self) -> _Tls:
        # Reading the authorities takes some 20 ms: not where nothing speaks TLS.
        return _Tls.make()

    def remember(self, connection: Connection) -> None:
        """Keep what a later handshake may resume; asked once the server has said something."""
        found = connection.tls_session
        if found is not None:
            self._tls.remember(*found)

    async def dial(self, origin: Origin, connection: Connection) -> None:
        """Connect it."""
        peer, proxy = origin
        first = proxy or peer
        try:
            sock = await self._socket(first.host, first.port)
            if proxy is None or peer.scheme == "http":
                connection.sock = sock
                await self._wrap(first, connection, sock)
                return
            tunnel = _Tunnel(self._loop, proxy, peer)
            await self._wrap(first, tunnel, sock)
        except (OSError, ValueError) as error:
            words = failures.unreachable(first.host, first.port, error, is_proxy=proxy is not None)
            raise words from error
        try:
            await tunnel.opened
            transport = await self._loop.start_tls(
                tunnel.transport, connection, self._tls, server_hostname=peer.host
            )
            assert transport is not None
            connection.sock = sock
            connection.connection_made(transport)
        except (OSError, ValueError) as error:
            tunnel.transport.abort()
            raise failures.unreachable(peer.host, peer.port, error, is_proxy=False) from error
        except BaseException:
            tunnel.transport.abort()
            raise

    async def _wrap(self, peer: Peer, protocol: asyncio.Protocol, sock: socket.socket) -> None:
        is_tls = peer.scheme == "https"
        try:
            await self._loop.create_connection(
                lambda: protocol,
                sock=sock,
                ssl=self._tls if is_tls else None,
                server_hostname=peer.host if is_tls else None,
            )
        except BaseException:
            if isinstance(self._loop, uvloop.Loop):
                # uvloop has closed the descriptor, and before 0.23 leaves it to the socket as well,
                # which would close it again: by then it may be another's (its issues 645 and 738).
                sock.detach()
            raise

    async def _socket(self, host: str, port: int) -> socket.socket:
        addresses = await self._addresses(host, port)
        try:
            sock = await aiohappyeyeballs.start_connection(
                addresses, loop=self._loop, happy_eyeballs_delay=_NEXT_ADDRESS_S, interleave=1
            )
        except OSError:
            # They may have moved.
            self._names.pop((host, port), None)
            raise
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return sock

    async def _addresses(self, host: str, port: int) -> list[Any]:
        try:
            number = ipaddress.ip_address(host)
        except ValueError:
            pass
        else:
            if isinstance(number, ipaddress.IPv4Address):
                return [(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP, "", (host, port))]
        known = self._names.get((host, port))
        if known is not None and self._loop.time() < known[0]:
            return known[1]
        found = await self._loop.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_ADDRCONFIG
        )
        while len(self._names) >= _NAMES_MAX:
            del self._names[next(iter(self._names))]
        self._names[host, port] = self._loop.time() + _NAME_S, list(found)
        return list(found)


class _Tls(ssl.SSLContext):
    """The one trust for all upstreams; it offers each host the session that it gave last."""

    _sessions: dict[str, ssl.SSLSession]

    @classmethod
    def make(cls) -> _Tls:
        context = cls(ssl.PROTOCOL_TLS_CLIENT)
        context._sessions = {}
        context.load_default_certs()
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.set_alpn_protocols(["http/1.1"])
        return context

    def remember(self, host: str, session: Any) -> None:
        self._sessions.pop(host, None)
        while len(self._sessions) >= _SESSIONS_MAX:
            del self._sessions[next(iter(self._sessions))]
        self._sessions[host] = session

    def wrap_bio(self, *args: Any, **named: Any) -> ssl.SSLObject:
        """As the event loops call it: they hand on no session themselves."""
        named.setdefault("session", self._sessions.get(named.get("server_hostname") or ""))
        return super().wrap_bio(*args, **named)


class _Tunnel(asyncio.Protocol):
    """Asks a proxy for a connection to the upstream; `opened` when it is there."""

    transport: asyncio.Transport

    def __init__(self, loop: asyncio.AbstractEventLoop, proxy: Peer, peer: Peer) -> None:
        self._proxy = proxy
        self._target = (
            f"[{peer.host}]:{peer.port}" if ":" in peer.host else f"{peer.host}:{peer.port}"
        )
        self._answer = b""
        self.opened: asyncio.Future[None] = loop.create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        lines = [f"CONNECT {self._target} HTTP/1.1", f"Host: {self._target}"]
        if self._proxy.authorization:
            lines.append(f"Proxy-Authorization: {self._proxy.authorization}")
        self.transport.write("\r\n".join([*lines, "", ""]).encode())

    def data_received(self, data: bytes) -> None:
        self._answer += data
        head, end, rest = self._answer.partition(b"\r\n\r\n")
        if self.opened.done() or (not end and len(self._answer) <= _TUNNEL_HEAD_BYTES_MAX):
            return
        said = head.partition(b"\r\n")[0].decode("latin-1")
        # In TLS it is the client who speaks first: what came behind is not the upstream's.
        if end and not rest and said[:9] in ("HTTP/1.1 ", "HTTP/1.0 ") and said[9:10] == "2":
            self.opened.set_result(None)
        else:
            self._refuse(said)

    def eof_received(self) -> None:
        self._refuse("the connection's end")

    def connection_lost(self, error: Exception | None) -> None:
        self._refuse("the connection's end")

    def _refuse(self, said: str) -> None:
        if not self.opened.done():
            words = failures.refused_by_proxy(
                self._proxy.host, self._proxy.port, said, self._target
            )
            self.opened.set_exception(words)
