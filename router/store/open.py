"""Which engine a `[state] url` names. The configuration has filled in the default place by then."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import unquote

from router.store.base import StateRefused, Store
from router.store.sqlite import SqliteStore

_SERVER_SCHEMES = frozenset({"valkey", "valkeys", "redis", "rediss"})


async def open_store(
    url: str, *, username: str | None = None, password: str | None = None
) -> Store:
    """Open `sqlite:///path`, `valkey://host:port/db` (valkeys:// over TLS; redis:// and rediss://
    are the same), or `memory://`. Raises StateRefused.
    """
    scheme, _, rest = url.partition("://")
    if scheme == "memory":
        return await SqliteStore.open(None)
    if scheme == "sqlite":
        return await SqliteStore.open(Path(unquote(rest)))
    if scheme in _SERVER_SCHEMES:
        try:
            from router.store.valkey import ValkeyStore  # noqa: PLC0415 - an extra, slow to import
        except ModuleNotFoundError as error:
            raise StateRefused(
                f"the state at {scheme}:// needs the package valkey: pip install 'rungway[valkey]'"
            ) from error
        return await ValkeyStore.open(url, username=username, password=password)
    raise StateRefused(
        f"the state's address {scheme}:// is of no kind that is known: it must be sqlite:///path, "
        "valkey://host:6379/0 or memory://"
    )
