"""`python -m bench.budgets`: what a key's limits cost a call, in CPU time and without sockets.

A call is admitted, one attempt holds and settles, and the call leaves: what `flow/pipeline.py` does
with the ledger for each. The ledger has its journal, as in the daemon, and a store in memory; the
store's own work goes on in its thread and is counted apart. Then the same with as many keys as a
large site has.
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
_SHARE = 10_000
_AT_ONCE = 100
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


async def first_calls(ledger: Ledger, keys: list[Key]) -> float:
    """CPU time of this thread for the first call of each key, as many of them come at once."""
    began = time.thread_time_ns()
    for place in range(0, len(keys), _AT_ONCE):
        await asyncio.gather(*(call(ledger, key) for key in keys[place : place + _AT_ONCE]))
    return (time.thread_time_ns() - began) / len(keys) / 1000


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
        early = await first_calls(ledger, many[:_SHARE])
        await first_calls(ledger, many[_SHARE:-_SHARE])
        late = await first_calls(ledger, many[-_SHARE:])
        print(
            f"{'the first calls of new keys':40}{early:8.2f} µs a call, waits for the store apart"
        )
        print(f"{f'the same after {_MANY} of them':40}{late:8.2f} µs a call")
        one = await microseconds(ledger, [limited], _CALLS)
        base = await microseconds(ledger, [plain], _CALLS)
        print(f"{f'with four limits, beside {_MANY} keys':40}{one:8.2f} µs a call")
        print(f"{f'without limits, beside {_MANY} keys':40}{base:8.2f} µs a call")
    finally:
        await tasks.aclose()
        await books.end()
        await store.aclose()


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        asyncio.run(measure(Path(folder)))


if __name__ == "__main__":
    main()
