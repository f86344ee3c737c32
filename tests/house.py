"""A whole Rungway in this process, on a real port, between fake upstreams and a client."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import aiohttp
import orjson

from router.api.gateway import Gateway
from router.api.server import Server
from router.api.service import Shared
from router.app import close_shared, make_service, open_shared
from router.config.load import parse
from router.config.schema import State
from router.flow.tasks import Tasks
from router.transport.http import HttpClient


@dataclass
class House:
    """`lines` are the log lines of the calls so far."""

    url: str
    client: aiohttp.ClientSession
    shared: Shared
    gateway: Gateway
    server: Server
    lines: list[Any] = field(default_factory=list)

    async def post(
        self, path: str, body: Any, headers: dict[str, str] | None = None
    ) -> tuple[int, Any, dict[str, str]]:
        """Status, parsed body and lower-case headers of one POST; bytes go as they are."""
        data = body if isinstance(body, bytes) else orjson.dumps(body)
        async with self.client.post(self.url + path, data=data, headers=headers) as answer:
            raw = await answer.read()
            found = {name.lower(): value for name, value in answer.headers.items()}
            return answer.status, _parsed(raw), found

    async def get(
        self, path: str, headers: dict[str, str] | None = None
    ) -> tuple[int, Any, dict[str, str]]:
        async with self.client.get(self.url + path, headers=headers) as answer:
            raw = await answer.read()
            found = {name.lower(): value for name, value in answer.headers.items()}
            return answer.status, _parsed(raw), found

    async def idle(self) -> None:
        """Wait until no call is in flight."""
        async with asyncio.timeout(5):
            while self.shared.observer.in_flight or len(self.lines) == 0:
                await asyncio.sleep(0)


@asynccontextmanager
async def open_house(config_text: str, **environ: str) -> AsyncIterator[House]:
    """Serve this configuration in this environment. Raises ConfigError."""
    lines: list[Any] = []
    tasks = Tasks()
    config = parse(config_text, "test.toml", environ)
    if "[state]" not in config_text:
        config = replace(config, state=State(url="memory://"))
    shared = await open_shared(
        config, environ, lambda line: lines.append(orjson.loads(line)), tasks
    )
    upstream = HttpClient()
    service = make_service(config, shared, upstream, environ)
    gateway = Gateway(service, shared, _no_reload)
    server = Server(
        gateway.handle,
        refuse=gateway.refuse,
        hot=gateway.hot_routes(),
        header_s=config.server.header_s,
        stall_s=config.server.stall_s,
        idle_connection_s=config.server.idle_connection_s,
        connections_max=config.server.max_connections,
    )
    loop = asyncio.get_running_loop()
    listener = await loop.create_server(server, "127.0.0.1", 0)
    port = listener.sockets[0].getsockname()[1]
    try:
        async with aiohttp.ClientSession(auto_decompress=True) as client:
            yield House(f"http://127.0.0.1:{port}", client, shared, gateway, server, lines)
    finally:
        listener.close()
        await server.shutdown(1)
        for backend in service.backends.values():
            await backend.aclose()
        await close_shared(shared)
        await upstream.aclose()


async def _no_reload() -> None:
    return None


def ladder_of(
    *urls: str, server: str = "", ladder: str = "", keys: str = "", cache: str = "memory_mib = 0"
) -> str:
    """A configuration with a chat ladder `chat` and an embeddings ladder `embed` over servers.

    The backends are `b0`, `b1`, …, all of kind openai with the model `org/m`. Without `cache`
    nothing is kept, so that each call reaches a server.
    """
    backends = "".join(
        f'[backends.b{i}]\nkind = "openai"\nurl = "{url}"\n' for i, url in enumerate(urls)
    )
    chat = "".join(
        f'[[ladders.chat.rungs]]\nbackend = "b{i}"\nmodel = "org/m"\n' for i in range(len(urls))
    )
    embed = chat.replace("ladders.chat", "ladders.embed")
    auth = "" if keys else 'auth = "open"\n'
    return (
        f"[server]\n{auth}{server}\n{backends}\n"
        f'[ladders.chat]\naliases = ["gpt-4o-mini"]\n{ladder}\n{chat}\n'
        f'[ladders.embed]\ntask = "embeddings"\n{embed}\n[cache]\n{cache}\n{keys}'
    )


def _parsed(raw: bytes) -> Any:
    try:
        return orjson.loads(raw)
    except orjson.JSONDecodeError:
        return raw
