"""`python -m bench.budgets`: what a key's limits cost a call, in CPU time and without sockets.

A call is admitted, one attempt holds and settles, and the call leaves: what `flow/pipeline.py` does
with the ledger for each. The ledger has its journal and a store in memory, as the daemon does; the
store's own work goes on in its thread and is counted apart. Then the same with as many keys as a
large site has, used in turn.
"""

from __future__ import annotations

import asyncio
import gc
import tempfile
import time
from pathlib import Path

from router.flow.ledger import Ledger
from router.flow.opening import open_ledger
from router.flow.tasks import Tasks
from router.store.sqlite import SqliteStore
from router.types import Key, KeyLimits, Price, Rung, Usage

_RUNG = Rung("b", "m")
_PRICE = Price.per_mtok(0.1, 0.4)
_USAGE = Usage(100, 50)
_CALLS = 20_000
_ROUNDS = 7
_MANY = 100_000
_NO_LIMITS = KeyLimits()
_LIMITS = KeyLimits(
    usd_per_day=10**15, requests_per_minute=10**9, tokens_per_minute=10**12, concurrent=10_000
)


async def call(ledger: Ledger, key: Key) -> None:
    """One call of one attempt, as the pipeline does it."""
    admission = await ledger.admit(key, 1_000)
    hold = await ledger.hold(admission, "chat", _RUNG, _PRICE, input_tokens=150, output_tokens=64)
    ledger.settle(hold, _USAGE, answered=True)
    ledger.leave(admission, "chat")


async def microseconds(ledger: Ledger, keys: list[Key], calls: int) -> float:
    """CPU time of this thread for one call, the least of some rounds."""
    best = float("inf")
    for start in range(_ROUNDS):
        at = start * calls
        # What is renewed in the background is not a call's.
        await asyncio.sleep(0)
        began = time.thread_time_ns()
        for place in range(at, at + calls):
            await call(ledger, keys[place % len(keys)])
        best = min(best, (time.thread_time_ns() - began) / calls / 1000)
    return best


async def measure(folder: Path) -> None:
    store, tasks = await SqliteStore.open(None), Tasks()
    ledger, books = await open_ledger(store, folder, tasks)
    # What the collector takes grows with all objects of a process, whoever makes them.
    gc.disable()
    try:
        plain, limited = Key("plain"), Key("limited", limits=_LIMITS)
        for key in (plain, limited):
            await call(ledger, key)
        base = await microseconds(ledger, [plain], _CALLS)
        one = await microseconds(ledger, [limited], _CALLS)
        print(f"{'a key without limits':40}{base:8.2f} µs a call")
        print(f"{'with four limits':40}{one:8.2f} µs a call, {one - base:.2f} more")
        many = [Key(f"k{number}", limits=_LIMITS) for number in range(_MANY)]
        began = time.perf_counter()
        # A new key waits for its lease, as many do at once.
        for place in range(0, _MANY, 250):
            await asyncio.gather(*(call(ledger, key) for key in many[place : place + 250]))
        each_us = (time.perf_counter() - began) / _MANY * 1e6
        print(
            f"{f'{_MANY} keys, their first calls':40}{each_us:8.2f} µs a call, the store's wait too"
        )
        again = await microseconds(ledger, many, _MANY // 10)
        print(f"{f'{_MANY} keys in turn':40}{again:8.2f} µs a call")
    finally:
        await tasks.aclose()
        await books.end()
        await store.aclose()


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        asyncio.run(measure(Path(folder)))


if __name__ == "__main__":
    main()
