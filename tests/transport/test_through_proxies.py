"""Through a proxy that the environment names, on real sockets: plain, by a tunnel, refused."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import pytest

from router.errors import ConnectFailed, UpstreamTimeout
from router.transport.http import HttpClient
from tests.transport.authority import Authority

GOOD = b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\ngood"


@dataclass
class FakeProxy:
    """Answers plain requests itself; `tunnel` is what it says to CONNECT before it passes all on to
    the upstream's port, whatever the name that it was asked for."""

    tunnel: bytes = b"HTTP/1.1 200 Connection established\r\nVia: x\r\n\r\n"
    upstream_port: int = 0
    port: int = 0
    heads: list[list[str]] = field(default_factory=list)
    connections: int = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                self.heads.append(head.decode().split("\r\n")[:-2])
                if not head.startswith(b"CONNECT "):
                    writer.write(GOOD)
                    continue
                writer.write(self.tunnel)
                if b" 200 " in self.tunnel[:13]:
                    await self._pass_on(reader, writer)
                break
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    async def _pass_on(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, back = await asyncio.open_connection("127.0.0.1", self.upstream_port)
        await asyncio.gather(_pump(reader, back), _pump(there, writer))


async def _pump(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
    try:
        while data := await source.read(1 << 16):
            sink.write(data)
            await sink.drain()
    except ConnectionError:
        pass
    finally:
        sink.close()


@asynccontextmanager
async def fake_proxy(proxy: FakeProxy, tls: ssl.SSLContext | None = None) -> AsyncIterator[None]:
    server = await asyncio.start_server(proxy.serve, "127.0.0.1", 0, ssl=tls)
    proxy.port = server.sockets[0].getsockname()[1]
    try:
        yield
    finally:
        server.close()


@asynccontextmanager
async def tls_upstream(authority: Authority, name: str) -> AsyncIterator[tuple[int, list[bytes]]]:
    """An upstream's port, and the requests it got."""
    requests: list[bytes] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                requests.append(await reader.readuntil(b"\r\n\r\n"))
                writer.write(GOOD)
        except (asyncio.IncompleteReadError, ConnectionError):
            writer.close()

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(authority.issue(name))
    server = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=context)
    try:
        yield server.sockets[0].getsockname()[1], requests
    finally:
        server.close()


@asynccontextmanager
async def client_behind(
    monkeypatch: pytest.MonkeyPatch, **environment: str
) -> AsyncIterator[HttpClient]:
    for name in ("http_proxy", "https_proxy", "no_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    client = HttpClient()
    try:
        yield client
    finally:
        await client.aclose()


async def get(client: HttpClient, url: str) -> bytes:
    return (await client.fetch("GET", url, headers={"Authorization": "Bearer t"}))[2]


async def test_plain_requests_name_the_whole_address(monkeypatch: pytest.MonkeyPatch) -> None:
    proxy = FakeProxy()
    async with fake_proxy(proxy):
        address = f"http://user:p%40ss@127.0.0.1:{proxy.port}"
        async with client_behind(monkeypatch, http_proxy=address) as client:
            for url in ("http://model.example/v1?a=b", "http://model.example/v2"):
                assert await get(client, url) == b"good"
            assert await get(client, "http://other.example:8080/") == b"good"
    assert proxy.heads[0] == [
        "GET http://model.example/v1?a=b HTTP/1.1",
        "Host: model.example",
        "Accept-Encoding: identity",
        "Proxy-Authorization: Basic dXNlcjpwQHNz",
        "Authorization: Bearer t",
    ]
    assert proxy.heads[2][:2] == [
        "GET http://other.example:8080/ HTTP/1.1",
        "Host: other.example:8080",
    ]
    assert proxy.connections == 2, "one for each upstream"


async def test_https_goes_through_a_tunnel(
    monkeypatch: pytest.MonkeyPatch, authority: Authority
) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(authority.certificate))
    async with tls_upstream(authority, "model.example") as (port, requests):
        proxy = FakeProxy(upstream_port=port)
        async with fake_proxy(proxy):
            address = f"http://user:pass@127.0.0.1:{proxy.port}"
            async with client_behind(monkeypatch, https_proxy=address) as client:
                for _ in range(2):
                    assert await get(client, "https://model.example/v1") == b"good"
    assert proxy.heads == [
        [
            "CONNECT model.example:443 HTTP/1.1",
            "Host: model.example:443",
            "Proxy-Authorization: Basic dXNlcjpwYXNz",
        ]
    ], "one tunnel, and no token of ours outside it"
    assert len(requests) == 2
    assert requests[0].startswith(b"GET /v1 HTTP/1.1\r\nHost: model.example\r\n")
    assert b"Proxy-Authorization" not in requests[0]


async def test_a_proxy_may_be_asked_in_tls_itself(
    monkeypatch: pytest.MonkeyPatch, authority: Authority
) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(authority.certificate))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(authority.issue("localhost"))
    async with tls_upstream(authority, "model.example") as (port, requests):
        proxy = FakeProxy(upstream_port=port)
        async with fake_proxy(proxy, context):
            address = f"https://localhost:{proxy.port}"
            async with client_behind(
                monkeypatch, https_proxy=address, http_proxy=address
            ) as client:
                assert await get(client, "https://model.example/v1") == b"good"
                assert await get(client, "http://model.example/v1") == b"good"
        assert len(requests) == 1


async def test_the_tunnel_s_end_must_prove_who_it_is(
    monkeypatch: pytest.MonkeyPatch, authority: Authority
) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(authority.certificate))
    async with tls_upstream(authority, "other.example") as (port, requests):
        proxy = FakeProxy(upstream_port=port)
        async with fake_proxy(proxy):
            address = f"http://127.0.0.1:{proxy.port}"
            async with client_behind(monkeypatch, https_proxy=address) as client:
                words = r"^cannot connect to model\.example:443 \(its certificate is not"
                with pytest.raises(ConnectFailed, match=words):
                    await get(client, "https://model.example/v1")
        assert requests == []


@pytest.mark.parametrize(
    ("said", "words"),
    [
        (b"HTTP/1.1 407 Who are you?\r\n\r\n", "it says: HTTP/1.1 407 Who are you?"),
        (b"HTTP/1.1 502 Bad Gateway\r\nContent-Length: 0\r\n\r\n", "it says: HTTP/1.1 502"),
        (b"HTTP/1.1 200 OK\r\n\r\nwhat is this", "it says: HTTP/1.1 200 OK"),
        (b"HTTP/1.1 500 " + b"x" * 20_000, "it says: HTTP/1.1 500 xxx"),
        (b"SSH-2.0-OpenSSH\r\n\r\n", "it says: SSH-2.0-OpenSSH"),
        (b"HTTP/1.1 5", "it says: the connection's end"),
    ],
)
async def test_a_proxy_that_makes_no_connection_is_told(
    monkeypatch: pytest.MonkeyPatch, said: bytes, words: str
) -> None:
    proxy = FakeProxy(tunnel=said)
    if b" 200 " in said:
        proxy.upstream_port = 1
    async with fake_proxy(proxy):
        address = f"http://user:secret@127.0.0.1:{proxy.port}"
        async with client_behind(monkeypatch, https_proxy=address) as client:
            with pytest.raises(ConnectFailed) as caught:
                await get(client, "https://model.example/v1")
    who = f"the proxy 127.0.0.1:{proxy.port} makes no connection to model.example:443"
    assert str(caught.value).startswith(f"{who} ({words}")
    assert "secret" not in str(caught.value)


async def test_a_proxy_that_is_not_there_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    proxy = FakeProxy()
    async with fake_proxy(proxy):
        pass
    async with client_behind(monkeypatch, http_proxy=f"127.0.0.1:{proxy.port}") as client:
        words = rf"cannot connect to the proxy 127\.0\.0\.1:{proxy.port} \(connection refused\)"
        with pytest.raises(ConnectFailed, match=words):
            await get(client, "http://model.example/")
    for address in ("socks5://127.0.0.1:1080", "http://", "http://a:b:c/"):
        async with client_behind(monkeypatch, http_proxy=address) as client:
            with pytest.raises(ConnectFailed, match="the proxy's address is malformed"):
                await get(client, "http://model.example/")


async def test_a_silent_proxy_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    left = asyncio.Event()

    async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()
        writer.close()
        left.set()

    server = await asyncio.start_server(silent, "127.0.0.1", 0)
    address = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    async with client_behind(monkeypatch, https_proxy=address) as client:
        with pytest.raises(UpstreamTimeout) as caught:
            await client.send("GET", "https://model.example/", headers={}, connect_s=0.05)
        assert caught.value.phase == "connect"
        async with asyncio.timeout(5):
            await left.wait()
    server.close()


async def test_no_proxy_is_obeyed(monkeypatch: pytest.MonkeyPatch) -> None:
    proxy = FakeProxy()
    async with fake_proxy(proxy):
        address = f"http://127.0.0.1:{proxy.port}"
        async with client_behind(
            monkeypatch, http_proxy=address, no_proxy="nobody.invalid"
        ) as client:
            with pytest.raises(ConnectFailed, match=r"^cannot connect to nobody\.invalid:80"):
                await get(client, "http://nobody.invalid/")
            assert await get(client, f"http://127.0.0.1:{proxy.port}/own") == b"good"
    assert proxy.heads[0][0] == "GET /own HTTP/1.1", "our own machine needs no proxy"
