"""The configuration as the house reads it: names resolved, defaults filled, nothing left to check.

Made by `load.py` alone, read by the composition root alone, which hands each part its slice.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import msgspec

from router.config.addresses import is_loopback
from router.config.schema import BackendConfig, Cache, Server, State
from router.errors import ConfigError
from router.types import Key, Ladder

OPEN_NEEDS_LOOPBACK = (
    'auth = "open" lets everyone who reaches the port spend your tokens, so it is refused unless '
    'the host is loopback; set host = "127.0.0.1", or auth = "keys" with [keys.NAME] tables'
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """One accepted file. `keys` is by the digest of the key.

    `digest` is the file's own, so that several processes know that they read the same.
    """

    server: Server
    state: State
    cache: Cache
    backends: dict[str, BackendConfig]
    ladders: dict[str, Ladder]
    keys: dict[bytes, Key]
    default_ladder: str | None
    source: Path | None
    warnings: tuple[str, ...]
    digest: str = ""

    def with_server(self, server: Server) -> Config:
        """The same with another [server], as the command line says. Raises ConfigError."""
        if server.auth == "open" and not is_loopback(server.host):
            raise ConfigError([f"{server.host}: {OPEN_NEEDS_LOOPBACK}"])
        try:
            # `replace` of a Struct checks nothing, and the command line is a user's too.
            msgspec.convert(msgspec.to_builtins(server), Server)
        except msgspec.ValidationError as error:
            raise ConfigError([f"[server] from the command line: {error}"]) from error
        return replace(self, server=server)
