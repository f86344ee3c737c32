"""Where the state is: an engine and its place, by the address in [state] `url`.

Left out it is `state.db` in `$STATE_DIRECTORY` (systemd's), else in `$XDG_STATE_HOME/rungway`, else
in `~/.local/state/rungway`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from router.store.base import StateRefused, Store
from router.store.sqlite import SqliteStore

_SQLITE = "sqlite://"
_MEMORY = "memory://"


async def open_store(url: str, environ: Mapping[str, str]) -> tuple[Store, Path | None]:
    """The store, and the folder for journals; None: nothing is to outlive the process.

    Raises StateRefused.
    """
    if url == _MEMORY:
        return await SqliteStore.open(None), None
    if url.startswith(_SQLITE):
        path = Path(url.removeprefix(_SQLITE))
        return await SqliteStore.open(path), path.parent
    if url:
        raise StateRefused(f"no state can be kept at {url.partition('://')[0]}://")
    folder = state_folder(environ)
    return await SqliteStore.open(folder / "state.db"), folder


def state_folder(environ: Mapping[str, str]) -> Path:
    """The folder of this host's own state."""
    if given := environ.get("STATE_DIRECTORY", "").split(":")[0]:
        return Path(given)
    home = environ.get("XDG_STATE_HOME", "")
    if Path(home).is_absolute():
        return Path(home) / "rungway"
    return Path(environ.get("HOME") or Path.home()) / ".local" / "state" / "rungway"
