"""HTTP to upstreams: a client of our own, on httptools, behind an interface that is narrow.

Request headers are built anew by the backends: nothing of a client's goes out. Redirects are never
followed, so a token goes only to the host that it was configured for. Upstreams are asked for
`identity` encoding, since a compressed stream cannot pass through event by event.

`send` makes no task and no timer where a kept connection is at hand: what a request costs besides
its bytes is what a router costs.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Mapping
from weakref import WeakValueDictionary

from router.errors import StaleConnection, UpstreamTimeout
from router.transport import failures
from router.transport.connection import Connection
from router.transport.dial import Dialer, Origin, Peer
from router.transport.pool import Pool
from router.transport.proxies import Proxies
from router.transport.response import HttpResponse
from router.transport.wire import Address, read_address, request_head

__all__ = ["HttpClient", "HttpResponse"]

_TARGETS_MAX = 1024
_HEADS_MAX = 64
_CLOSING_S = 1.0


class _Target:
    """One URL: what is known of it, its connections, and the heads of requests sent there."""

    __slots__ = ("_address", "_heads", "_proxy_authorization", "origin", "pool")

    def __init__(self, address: Address, origin: Origin, pool: Pool) -> None:
        self._address = address
        self.origin = origin
        self.pool = pool
        self._heads: dict[tuple[object, ...], bytes] = {}
        is_plain = origin.proxy is not None and address.scheme == "http"
        self._proxy_authorization = (
            origin.proxy.authorization if origin.proxy and is_plain else None
        )

    def head(self, method: str, headers: Mapping[str, str]) -> bytes:
        """Raises ValueError where a header cannot be sent."""
        key = (method, *headers.items())
        head = self._heads.get(key)
        if head is None:
            head = request_head(method, self._address, headers, self._proxy_authorization)
            while len(self._heads) >= _HEADS_MAX:
                del self._heads[next(iter(self._heads))]
            self._heads[key] = head
        return head


class HttpClient:
    """Keep-alive connections to any number of hosts. Make it inside the running loop."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._proxies = Proxies()
        self._dialer = Dialer(self._loop)
        self._targets: dict[str, _Target] = {}
        self._pools: WeakValueDictionary[Origin, Pool] = WeakValueDictionary()
        self._connections: set[Connection] = set()
        self._all_gone: asyncio.Future[None] | None = None

    async def send(
        self,
        method: str,
        url: str,
        *,
        headers: Mapping[str, str],
        body: bytes | None = None,
        connect_s: float = 5.0,
    ) -> HttpResponse:
        """Send a request and wait for its headers, without a limit but `connect_s` (seconds).

        The caller limits the wait and closes the response. Raises UpstreamError; StaleConnection
        where the request may be sent again as if it never had been.
        """
        target = self._targets.get(url) or self._learn(method, url)
        try:
            head = target.head(method, headers)
        except ValueError as error:
            raise failures.unsendable(error, _where(method, url)) from error
        connection = target.pool.take()
        if connection is None:
            connection = await self._connect(target, connect_s, method, url)
        response = HttpResponse(self._loop, connection, method, url)
        connection.begin(response, head, body)
        try:
            if body is not None and not connection.is_sent:
                await connection.send_body(response, body)
            await response.arrive()
        except StaleConnection:
            target.pool.drop()
            raise
        except BaseException:
            response.close()
            raise
        return response

    async def fetch(
        self,
        method: str,
        url: str,
        *,
        headers: Mapping[str, str],
        body: bytes | None = None,
        bytes_max: int = 4 << 20,
        within_s: float = 10.0,
    ) -> tuple[int, Mapping[str, str], bytes]:
        """A small whole exchange, for probes and control calls: status, headers, body."""
        try:
            async with asyncio.timeout(within_s):
                try:
                    response = await self.send(
                        method, url, headers=headers, body=body, connect_s=within_s
                    )
                except StaleConnection:
                    response = await self.send(
                        method, url, headers=headers, body=body, connect_s=within_s
                    )
                async with response:
                    return response.status, response.headers, await response.read_all(bytes_max)
        except TimeoutError as error:
            raise UpstreamTimeout(
                f"no answer within {within_s:g} s {_where(method, url)}", phase="total"
            ) from error

    async def aclose(self) -> None:
        """Close every connection, also those at work."""
        for pool in list(self._pools.values()):
            pool.drop()
        for connection in list(self._connections):
            connection.abort()
        if self._connections:
            self._all_gone = self._loop.create_future()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_CLOSING_S):
                    await self._all_gone

    def _forget(self, connection: Connection) -> None:
        self._connections.discard(connection)
        if self._all_gone is not None and not self._connections and not self._all_gone.done():
            self._all_gone.set_result(None)

    async def _connect(
        self, target: _Target, connect_s: float, method: str, url: str
    ) -> Connection:
        heard = self._dialer.remember if target.origin.peer.scheme == "https" else None
        connection = Connection(self._loop, target.pool.keep, self._forget, heard)
        try:
            async with asyncio.timeout(connect_s):
                await self._dialer.dial(target.origin, connection)
        except TimeoutError as error:
            raise failures.late(_where(method, url)) from error
        if connection.is_open:
            self._connections.add(connection)
        return connection

    def _learn(self, method: str, url: str) -> _Target:
        """Take a URL apart, once. Raises ConnectFailed."""
        try:
            address = read_address(url)
        except ValueError as error:
            raise failures.malformed("the address", _where(method, url)) from error
        try:
            proxy = self._proxy(url)
        except ValueError as error:
            raise failures.malformed("the proxy's address", _where(method, url)) from error
        origin = Origin(Peer(address.scheme, address.host, address.port), proxy)
        pool = self._pools.get(origin)
        if pool is None:
            pool = self._pools[origin] = Pool(self._loop)
        while len(self._targets) >= _TARGETS_MAX:
            del self._targets[next(iter(self._targets))]
        target = self._targets[url] = _Target(address, origin, pool)
        return target

    def _proxy(self, url: str) -> Peer | None:
        proxy = self._proxies.proxy_for(url)
        if proxy is None:
            return None
        address = read_address(proxy if "://" in proxy else f"http://{proxy}")
        return Peer(address.scheme, address.host, address.port, address.authorization)


def _where(method: str, url: str) -> str:
    return f"on {method} {failures.safe(url)}"
