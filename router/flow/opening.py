"""The state of a process: opened before the first call, closed after the last.

What killed processes of this host left in their journals is booked first, and looked for again now
and then: a worker that died is not there to do it itself.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
import time
import uuid
from collections.abc import Callable
from functools import partial
from pathlib import Path

from router.errors import StateUnavailable
from router.flow.ledger import Ledger
from router.flow.renewal import Books
from router.flow.tasks import Tasks
from router.store.base import LedgerStore, StateRefused, Store
from router.store.journal import Journal, recover

_log = logging.getLogger("rungway")
_LOOK_EVERY_S = 5.0
_AFTER_TROUBLE_S = 60.0
_IDLE_PURSE_S = 900.0


# Seconds that go on while the machine sleeps, and that no setting of the clock moves.
boot_s: Callable[[], float] = partial(time.clock_gettime, time.CLOCK_BOOTTIME)


async def open_ledger(
    store: LedgerStore,
    folder: Path | None,
    tasks: Tasks,
    *,
    wall_clock: Callable[[], float] = time.time,
    boot_clock: Callable[[], float] = boot_s,
) -> tuple[Ledger, Books]:
    """A ledger whose journal is in this folder; None: there is none, and a crash loses what the
    last second counted. Raises StateRefused.
    """
    process = uuid.uuid4().hex
    books = Books(store, process, boot_clock, wall_clock)
    journal = None
    if folder is not None:
        try:
            await asyncio.to_thread(os.makedirs, folder, 0o700, exist_ok=True)
            await book_the_dead(store, folder)
            journal = Journal.create(folder, process, totals_of=books.totals_of)
        except OSError as error:
            raise StateRefused(
                f"cannot make a journal in {folder}: {error.strerror or error}; "
                "give the daemon a folder that it may write to (state.url)"
            ) from error
    ledger = Ledger(books, wall_clock)
    try:
        await books.start(journal)
    except StateUnavailable as error:
        if journal is not None:
            journal.close(delete=True)
        raise StateRefused(f"the state cannot be used: {error.message}") from error
    tasks.spawn(books.run(), "renew leases and report usage")
    tasks.spawn(_look_after(ledger, store, folder), "look after the ledger")
    return ledger, books


async def know_books(store: Store, place: str, folder: Path, *, adopts: bool) -> None:
    """Take no other books than those that this host knows from `place`, the state's address.

    Books that were lost would let every limit start from nothing. `adopts`: somebody says that
    those which are there are the right ones. Raises StateRefused.
    """
    note = folder / f"epoch-{hashlib.sha256(place.encode()).hexdigest()[:12]}"
    try:
        known = note.read_text().strip() if note.exists() else ""
        found = await (store.adopt_epoch() if adopts else store.epoch())
        if known and known != found and not adopts:
            raise StateRefused(
                "the state is not the one that this host knows: its data was lost or replaced, and "
                "every budget would start from nothing. Restore it, or start once with "
                f"--adopt-state to go on with what is there ({note} remembers the old one)"
            )
        store.expect_epoch(found)
        _write(note, found)
    except (OSError, StateUnavailable) as error:
        words = error.strerror if isinstance(error, OSError) else error
        raise StateRefused(f"the state's id in {note} cannot be checked: {words}") from error


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    path.touch(mode=0o600)
    path.write_text(text)


async def book_the_dead(store: LedgerStore, folder: Path) -> bool:
    """Take what dead processes journalled into the books; False where the store does not answer."""
    found = await asyncio.to_thread(lambda: list(recover(folder)))
    for one in found:
        try:
            await store.end(one.process, one.rows)
        except StateUnavailable as error:
            _log.error("a journal waits for the store to answer: %s", error.message)
            return False
        if not one.discard():
            # Two that were started at once book the same journal, which counts once.
            continue
        if not one.open_holds:
            _log.warning("a process ended without a word: its journal is booked, nothing is open")
            continue
        doubt = sum(totals.in_doubt for totals in one.rows.values())
        _log.warning(
            "a process ended without a word: its journal is booked, with %d open holds "
            "($%.9f in doubt; `rungway usage resolve` clears that)",
            one.open_holds,
            doubt / 1e9,
        )
    return True


async def _look_after(ledger: Ledger, store: LedgerStore, folder: Path | None) -> None:
    wait_s = _LOOK_EVERY_S
    while True:
        await asyncio.sleep(wait_s)
        ledger.forget_idle(_IDLE_PURSE_S)
        if folder is not None:
            try:
                answers = await book_the_dead(store, folder)
                wait_s = _LOOK_EVERY_S if answers else _AFTER_TROUBLE_S
            except OSError as error:
                _log.error("the journals in %s cannot be looked at: %s", folder, error)
