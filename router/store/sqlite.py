"""The state in one SQLite file, for the processes of one host; or in memory, for one process.

Its parts are `sqlite_ledger`, `sqlite_keys` and `sqlite_kept`; `sqlite_file` opens the file and
runs each method as one transaction in a thread of its own.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from router.store import terms
from router.store.sqlite_file import SqliteFile
from router.store.sqlite_kept import SqliteAnswers, SqliteCache
from router.store.sqlite_keys import SqliteKeys
from router.store.sqlite_ledger import SqliteLedger


class SqliteStore(SqliteLedger, SqliteKeys, SqliteAnswers, SqliteCache):
    """A `Store`; made by `open`."""

    is_shared = False

    def __init__(
        self,
        file: SqliteFile,
        *,
        wall_s: Callable[[], float] = time.time,
        alive_s: Callable[[], float] = terms.alive_s,
        lease_s: float = terms.LEASE_S,
        bounds: terms.Bounds | None = None,
    ) -> None:
        super().__init__(file, wall_s=wall_s, alive_s=alive_s, lease_s=lease_s)
        self._bounds = bounds or terms.Bounds()

    @classmethod
    async def open(
        cls,
        path: Path | None,
        *,
        wall_s: Callable[[], float] = time.time,
        alive_s: Callable[[], float] = terms.alive_s,
        lease_s: float = terms.LEASE_S,
        bounds: terms.Bounds | None = None,
    ) -> SqliteStore:
        """Open or make the file; None: in memory. Raises StateRefused."""
        file = SqliteFile(path)
        await file.open()
        return cls(file, wall_s=wall_s, alive_s=alive_s, lease_s=lease_s, bounds=bounds)

    async def epoch(self) -> str:
        return await self._file.epoch(adopt=False)

    def expect_epoch(self, epoch: str) -> None:
        self._file.expect_epoch(epoch)

    async def adopt_epoch(self) -> str:
        return await self._file.epoch(adopt=True)

    async def aclose(self) -> None:
        await self._file.aclose()
