"""TLS towards upstreams: who is trusted, what is said of who is not, and sessions resumed."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from router.errors import ConnectFailed, UpstreamTimeout
from router.transport.http import HttpClient
from tests.transport.authority import Authority

ANSWER = b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n%s\r\ngood"


@dataclass
class TlsUpstream:
    """Counts handshakes, and which of them resumed a session."""

    port: int = 0
    resumed: list[bool] = field(default_factory=list)
    requests: list[bytes] = field(default_factory=list)
    names: list[str | None] = field(default_factory=list)

    @property
    def url(self) -> str:
        return f"https://localhost:{self.port}/v1"


@asynccontextmanager
async def tls_upstream(
    certificate: Path, *, closes: bool = False, version: ssl.TLSVersion | None = None
) -> AsyncIterator[TlsUpstream]:
    upstream = TlsUpstream()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    context.set_alpn_protocols(["h2", "http/1.1"])
    if version is not None:
        context.maximum_version = version

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        tls = writer.get_extra_info("ssl_object")
        upstream.resumed.append(tls.session_reused)
        assert tls.selected_alpn_protocol() == "http/1.1"
        try:
            while True:
                upstream.requests.append(await reader.readuntil(b"\r\n\r\n"))
                writer.write(ANSWER % (b"Connection: close\r\n" if closes else b""))
                await writer.drain()
                if closes:
                    break
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=context)
    upstream.port = server.sockets[0].getsockname()[1]
    try:
        yield upstream
    finally:
        server.close()


async def get(client: HttpClient, url: str) -> bytes:
    return (await client.fetch("GET", url, headers={"Authorization": "Bearer t"}))[2]


@pytest.fixture
def trusted(authority: Authority, monkeypatch: pytest.MonkeyPatch) -> Authority:
    """As an operator trusts it: in the environment."""
    monkeypatch.setenv("SSL_CERT_FILE", str(authority.certificate))
    return authority


async def test_an_upstream_whose_authority_is_trusted_answers(
    client: HttpClient, trusted: Authority
) -> None:
    async with tls_upstream(trusted.issue("localhost")) as up:
        for _ in range(3):
            assert await get(client, up.url) == b"good"
        assert up.resumed == [False], "one connection for all of them"


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
async def test_sessions_are_resumed(
    client: HttpClient, trusted: Authority, version: ssl.TLSVersion
) -> None:
    async with tls_upstream(trusted.issue("localhost"), closes=True, version=version) as up:
        for _ in range(4):
            assert await get(client, up.url) == b"good"
        assert up.resumed == [False, True, True, True]
        # What one name was given is not shown to another.
        with pytest.raises(ConnectFailed):
            await get(client, f"https://127.0.0.1:{up.port}/")


@pytest.mark.parametrize(
    ("name", "days", "words"),
    [
        ("other.example", 30, r"certificate is not to be trusted: Hostname mismatch"),
        ("localhost", -1, r"certificate is not to be trusted: certificate has expired"),
    ],
)
async def test_a_wrong_certificate_is_refused(
    client: HttpClient, trusted: Authority, name: str, days: int, words: str
) -> None:
    async with tls_upstream(trusted.issue(name, days=days)) as up:
        with pytest.raises(ConnectFailed, match=rf"^cannot connect to localhost:\d+ \(its {words}"):
            await get(client, up.url)
        assert up.requests == [], "no token was shown to it"


async def test_a_self_made_certificate_is_refused(client: HttpClient, authority: Authority) -> None:
    async with tls_upstream(authority.issue("localhost")) as up:
        with pytest.raises(ConnectFailed, match="not to be trusted: unable to get local issuer"):
            await get(client, up.url)
        assert up.requests == []


async def test_an_upstream_without_tls_is_no_upstream_with_it(
    client: HttpClient, trusted: Authority
) -> None:
    async def plain(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(1)
        writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        writer.close()

    server = await asyncio.start_server(plain, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    with pytest.raises(ConnectFailed, match=rf"^cannot connect to localhost:{port} \(\S"):
        await get(client, f"https://localhost:{port}/")
    server.close()


async def test_a_handshake_that_does_not_end_is_not_waited_for(client: HttpClient) -> None:
    left = asyncio.Event()

    async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while await reader.read(1 << 16):
            pass
        left.set()
        writer.close()

    server = await asyncio.start_server(silent, "127.0.0.1", 0)
    url = f"https://localhost:{server.sockets[0].getsockname()[1]}/"
    with pytest.raises(UpstreamTimeout) as caught:
        await client.send("GET", url, headers={}, connect_s=0.05)
    assert caught.value.phase == "connect"
    async with asyncio.timeout(5):
        await left.wait()
    server.close()


async def test_a_caller_who_leaves_is_seen_through_tls(
    client: HttpClient, trusted: Authority
) -> None:
    left = asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nsome")
        with contextlib.suppress(ConnectionError):
            while await reader.read(1 << 16):
                pass
        writer.close()
        with contextlib.suppress(ConnectionError, ssl.SSLError):
            await writer.wait_closed()
        left.set()

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(trusted.issue("localhost"))
    server = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=context)
    url = f"https://localhost:{server.sockets[0].getsockname()[1]}/"
    response = await client.send("GET", url, headers={})
    assert await response.read_chunk() == b"some"
    response.close()
    async with asyncio.timeout(5):
        await left.wait()
    server.close()


async def test_large_bodies_pass_through_tls(client: HttpClient, trusted: Authority) -> None:
    body = bytes(range(256)) * (16 << 10)

    async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        data = await reader.readexactly(len(body))
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(data) + data)
        await writer.drain()
        writer.close()

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(trusted.issue("localhost"))
    server = await asyncio.start_server(echo, "127.0.0.1", 0, ssl=context)
    url = f"https://localhost:{server.sockets[0].getsockname()[1]}/"
    response = await client.send("POST", url, headers={}, body=body)
    assert await response.read_all(len(body)) == body
    server.close()
