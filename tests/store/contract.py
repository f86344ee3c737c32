"""What every store must do, whatever its engine: the rigs, which open stores on the same books.

`test_contract.py` runs every scenario against every rig. A rig's clock goes only where a test moves
it; `open` gives another process's view of the same books.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path

from router.core.accounts import Account, Meter
from router.core.leases import Ask, Grant
from router.store.base import RowKey, Store, Totals
from router.store.sqlite import SqliteStore
from router.store.terms import LEASE_S, MARGIN_S, Bounds
from router.store.valkey import ValkeyStore
from tests.fakes.clock import Clock
from tests.store.server import ValkeyServer

# Far ahead, so that no server of today lets anything of it end: 2096-10-02, a Tuesday at noon.
NOW = 4_000_017_600
DAY = NOW - NOW % 86_400
MONTH = 3_999_888_000  # 2096-10-01
MINUTE = NOW
SILENCE_S = LEASE_S + MARGIN_S + 1

USD = Account("alice", Meter.USD_DAY, DAY)
USD_MONTH = Account("alice", Meter.USD_MONTH, MONTH)
TOKENS = Account("alice", Meter.TOKENS_DAY, DAY)
REQUESTS = Account("alice", Meter.REQUESTS_MINUTE, MINUTE)
PLACES = Account("alice", Meter.CONCURRENT, 0)
SHARE = Account("session-1", Meter.USD_TOTAL, 0)

ROW = RowKey(DAY, "alice", "", "assistant", "gpu/llama")
SESSION_ROW = RowKey(DAY, "alice", "session-1", "assistant", "gpu/llama")


class Rig(ABC):
    """Books of one engine. `bounds` are those of every store that it opens."""

    kind: str

    def __init__(self) -> None:
        self.clock = Clock()
        self.clock.now = NOW
        self.bounds = Bounds()
        self.opened: list[Store] = []

    @abstractmethod
    async def start(self) -> Store: ...

    async def open(self) -> Store:
        store = await self.start()
        self.opened.append(store)
        return store

    async def aclose(self) -> None:
        for store in self.opened:
            await store.aclose()


class MemoryRig(Rig):
    kind = "memory"

    async def start(self) -> Store:
        # Nobody else can open it: the one store is every process's.
        if self.opened:
            return self.opened[0]
        return await SqliteStore.open(
            None, wall_s=self.clock, alive_s=self.clock, bounds=self.bounds
        )


class SqliteRig(Rig):
    kind = "sqlite"

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.path = folder / "state" / "state.db"

    async def start(self) -> Store:
        return await SqliteStore.open(
            self.path, wall_s=self.clock, alive_s=self.clock, bounds=self.bounds
        )


class ValkeyRig(Rig):
    kind = "valkey"

    def __init__(self, server: ValkeyServer) -> None:
        super().__init__()
        self.server = server

    async def start(self) -> Store:
        return await ValkeyStore.open(self.server.url, now=self.clock, bounds=self.bounds)


def ask(
    account: Account,
    number: int,
    *,
    limit: int = 1_000,
    spent: int = 0,
    held: int = 0,
    need: int = 0,
    keep: bool = True,
) -> Ask:
    return Ask(account, number, limit, spent, spent + held, need, keep)


async def say(
    store: Store, process: str, *asks: Ask, rows: Mapping[RowKey, Totals] | None = None
) -> list[Grant]:
    """Sync, and what was granted."""
    return (await store.sync(process, asks, rows or {})).grants


async def left(store: Store, account: Account, *, limit: int = 1_000) -> tuple[int, int]:
    """What is settled and free of an account, as a process that takes nothing sees it."""
    number = int(account.window) + 1
    [grant] = await say(store, "onlooker", ask(account, number, limit=limit, keep=False))
    return grant.settled, grant.free
