"""Budgets and usage in SQLite: `core.leases.grant` decides, this keeps what it decides on."""

from __future__ import annotations

import asyncio
import sqlite3
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial

from router.core.accounts import Account, Meter
from router.core.leases import Ask, Grant, Row, grant
from router.errors import StateUnavailable
from router.store import terms
from router.store.base import RowKey, Sync, Totals, UsageLine
from router.store.sqlite_file import SqliteFile

_TOTALS = ", ".join(Totals._fields)
_SUMS = ", ".join(f"sum({name})" for name in Totals._fields)
_COLUMNS = {"key": "key", "ladder": "ladder", "rung": "rung", "day": "date(day, 'unixepoch')"}

_FIND_USAGE = f"""SELECT {_TOTALS} FROM usage
  WHERE process = ? AND day = ? AND key = ? AND session = ? AND ladder = ? AND rung = ?"""
_PUT_USAGE = "INSERT OR REPLACE INTO usage VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)"
# The session is of use only while its doubts may have to be taken back from its budget.
_ARCHIVE = f"""INSERT INTO usage
  SELECT '', day, key, CASE WHEN in_doubt > 0 THEN session ELSE '' END, ladder, rung, {_TOTALS}
    FROM usage
    WHERE process = ? AND day = ? AND key = ? AND session = ? AND ladder = ? AND rung = ?
  ON CONFLICT DO UPDATE SET {", ".join(f"{n} = {n} + excluded.{n}" for n in Totals._fields)}"""
_COUNT = """INSERT INTO leases VALUES
  (:owner, :meter, :window, :process, :amount, :amount, :amount, 0, :forgotten_at)
  ON CONFLICT DO UPDATE SET counted = counted + :amount, spent = max(spent, counted + :amount),
    granted = max(granted, spent, counted + :amount)"""
_FIND_LEASES = """SELECT process, granted, spent, number FROM leases
  WHERE owner = ? AND meter = ? AND window = ?"""
_PUT_LEASE = """INSERT INTO leases VALUES (?, ?, ?, ?, ?, ?, 0, ?, ?)
  ON CONFLICT DO UPDATE SET granted = excluded.granted, spent = excluded.spent,
    number = excluded.number"""


class SqliteLedger:
    """The `LedgerStore` part. `wall_s`: unix seconds; `alive_s`: seconds that never jump."""

    def __init__(
        self,
        file: SqliteFile,
        *,
        wall_s: Callable[[], float] = time.time,
        alive_s: Callable[[], float] = terms.alive_s,
        lease_s: float = terms.LEASE_S,
    ) -> None:
        self._file = file
        self._wall_s = wall_s
        self._alive_s = alive_s
        self._lease_s = lease_s
        self._prune_at = 0.0

    async def sync(self, process: str, asks: Sequence[Ask], rows: Mapping[RowKey, Totals]) -> Sync:
        def work(database: sqlite3.Connection) -> Sync:
            now = self._alive_s()
            known = _find_process(database, process)
            if known is not None and known[1] is not None:
                raise StateUnavailable(
                    f"the process {process} was ended by another in {self._file}"
                )
            database.execute(
                "INSERT INTO processes VALUES (?, ?, NULL) "
                "ON CONFLICT DO UPDATE SET heard_at = excluded.heard_at",
                (process, now),
            )
            if known is not None and terms.is_silent(known[0], now, self._lease_s):
                # Others may have its places by now.
                database.execute(
                    "UPDATE leases SET granted = 0 WHERE process = ? AND meter = ?",
                    (process, Meter.CONCURRENT),
                )
            for key, totals in rows.items():
                _report(database, process, key, totals)
            live = self._live(database, now)
            grants = [_grant(database, process, ask, live) for ask in asks]
            if now >= self._prune_at:
                self._prune_at = now + terms.PRUNE_EVERY_S
                _prune(database, self._wall_s())
            version = database.execute(
                "SELECT value FROM meta WHERE name = 'key_version'"
            ).fetchone()[0]
            return Sync(grants, len(live), self._lease_s, version)

        return await self._file.run(work)

    async def end(self, process: str, rows: Mapping[RowKey, Totals]) -> None:
        """In parts, each a transaction, so that a process with a long history locks nobody out."""
        reports = list(rows.items())
        batches = list(range(0, len(reports), terms.END_BATCH)) or [0]

        def report(database: sqlite3.Connection, start: int) -> None:
            known = _find_process(database, process)
            if known is not None and known[1] is not None:
                return
            for key, totals in reports[start : start + terms.END_BATCH]:
                _report(database, process, key, totals)
            if start == batches[-1]:
                # From now on its id is used up, whatever becomes of the rest of this.
                database.execute(
                    "INSERT OR REPLACE INTO processes VALUES (?, ?, ?)",
                    (process, self._alive_s(), self._wall_s()),
                )

        for start in batches:
            await self._file.run(partial(report, start=start))
        for move in (_move_leases, _move_usage):
            started = time.monotonic()
            while await self._file.run(partial(move, process=process)) == terms.END_BATCH:
                # SQLite's lock is not fair: whoever waits for it only looks now and then.
                await asyncio.sleep(time.monotonic() - started)
                started = time.monotonic()

    async def silent(self) -> Mapping[str, int]:
        def work(database: sqlite3.Connection) -> dict[str, int]:
            lines: list[tuple[str, str, str, int]] = []
            for process in self._silent(database):
                lines += database.execute(
                    "SELECT process, coalesce(nullif(parent, ''), owner), meter, granted - spent "
                    "FROM leases LEFT JOIN keys ON name = owner "
                    "WHERE process = ? AND granted > spent",
                    (process,),
                )
            return terms.in_hands(lines)

        return await self._file.run(work, writes=False)

    async def usage(
        self, group: Sequence[str], *, key: str | None, since: int, until: int
    ) -> list[UsageLine]:
        terms.check_group(group)
        columns = ", ".join(_COLUMNS[name] for name in group)
        places = ", ".join(str(place) for place in range(1, len(group) + 1))
        order = f"GROUP BY {places} ORDER BY {places}" if group else "HAVING count(*) > 0"
        where = "day >= ? AND day < ?" + ("" if key is None else " AND key = ?")
        text = f"SELECT {columns or 0}, {_SUMS} FROM usage WHERE {where} {order}"
        width = max(1, len(group))

        def work(database: sqlite3.Connection) -> list[UsageLine]:
            arguments = (since, until) if key is None else (since, until, key)
            return [
                UsageLine(tuple(line[: len(group)]), Totals(*line[width:]))
                for line in database.execute(text, arguments)
            ]

        return await self._file.run(work, writes=False)

    async def resolve(self, key: str | None, *, charge: bool) -> int:
        def work(database: sqlite3.Connection) -> int:
            for process in self._silent(database):
                database.execute(
                    "UPDATE leases SET granted = spent WHERE process = :process AND (:key IS NULL "
                    "OR owner = :key OR owner IN (SELECT name FROM keys WHERE parent = :key))",
                    {"process": process, "key": key},
                )
            cleared = 0
            for *place, doubt in database.execute(
                "SELECT day, key, session, ladder, rung, in_doubt FROM usage "
                "WHERE process = '' AND in_doubt > 0 AND (? IS NULL OR key = ?)",
                (key, key),
            ).fetchall():
                cleared += doubt
                charged = doubt if charge else 0
                database.execute(
                    "UPDATE usage SET in_doubt = 0, settled = settled + ?, "
                    "estimated = estimated + ? WHERE process = '' AND day = ? AND key = ? "
                    "AND session = ? AND ladder = ? AND rung = ?",
                    (charged, charged, *place),
                )
                change = Totals(settled=charged, in_doubt=-doubt)
                for account, amount in terms.counted_in(RowKey(*place), change):
                    _uncount(database, account, -amount)
            return cleared

        return await self._file.run(work)

    # --- of all processes -----------------------------------------------------------------------

    def _live(self, database: sqlite3.Connection, now: float) -> set[str]:
        return {
            process
            for process, heard_at in _running(database)
            if not terms.is_silent(heard_at, now, self._lease_s)
        }

    def _silent(self, database: sqlite3.Connection) -> list[str]:
        live = self._live(database, self._alive_s())
        return [process for process, _ in _running(database) if process not in live]


def _running(database: sqlite3.Connection) -> list[tuple[str, float]]:
    return database.execute(
        "SELECT process, heard_at FROM processes WHERE ended_at IS NULL"
    ).fetchall()


def _find_process(database: sqlite3.Connection, process: str) -> tuple[float, float | None] | None:
    row: tuple[float, float | None] | None = database.execute(
        "SELECT heard_at, ended_at FROM processes WHERE process = ?", (process,)
    ).fetchone()
    return row


def _report(database: sqlite3.Connection, process: str, key: RowKey, totals: Totals) -> None:
    found = database.execute(_FIND_USAGE, (process, *key)).fetchone()
    known = Totals(*found) if found else Totals()
    newer = Totals(*(max(old, terms.within(new)) for old, new in zip(known, totals, strict=True)))
    if found and newer == known:
        return
    database.execute(_PUT_USAGE, (process, *key, *newer))
    delta = Totals(*(new - old for old, new in zip(known, newer, strict=True)))
    for account, amount in terms.counted_in(key, delta):
        _count(database, process, account, amount)


def _count(database: sqlite3.Connection, process: str, account: Account, amount: int) -> None:
    database.execute(
        _COUNT,
        {
            **account._asdict(),
            "process": process,
            "amount": amount,
            "forgotten_at": terms.forgotten_at(account),
        },
    )


def _move_leases(database: sqlite3.Connection, process: str) -> int:
    """Leave what an ended process spent to the process ""; how many leases there were."""
    leases = database.execute(
        "SELECT owner, meter, window, granted, counted FROM leases WHERE process = ? LIMIT ?",
        (process, terms.END_BATCH),
    ).fetchall()
    for owner, meter, window, granted, counted in leases:
        left = terms.left_by(meter, granted, counted)
        if left:
            _count(database, "", Account(owner, Meter(meter), window), left)
        database.execute(
            "DELETE FROM leases WHERE owner = ? AND meter = ? AND window = ? AND process = ?",
            (owner, meter, window, process),
        )
    return len(leases)


def _move_usage(database: sqlite3.Connection, process: str) -> int:
    rows = database.execute(
        "SELECT day, key, session, ladder, rung FROM usage WHERE process = ? LIMIT ?",
        (process, terms.END_BATCH),
    ).fetchall()
    for row in rows:
        database.execute(_ARCHIVE, (process, *row))
        database.execute(
            "DELETE FROM usage WHERE process = ? AND day = ? AND key = ? AND session = ? "
            "AND ladder = ? AND rung = ?",
            (process, *row),
        )
    return len(rows)


def _uncount(database: sqlite3.Connection, account: Account, amount: int) -> None:
    """Take back what an ended process left."""
    database.execute(
        "UPDATE leases SET granted = max(0, granted - :amount), spent = max(0, spent - :amount), "
        "counted = max(0, counted - :amount) "
        "WHERE owner = :owner AND meter = :meter AND window = :window AND process = ''",
        {**account._asdict(), "amount": amount},
    )


def _grant(database: sqlite3.Connection, process: str, ask: Ask, live: set[str]) -> Grant:
    account = ask.account
    ask = terms.bounded(ask)
    mine = Row()
    granted = settled = 0
    for other, *lease in database.execute(_FIND_LEASES, account):
        row = Row(*lease)
        if other == process:
            mine = row
            continue
        settled += row.spent
        if account.meter is not Meter.CONCURRENT or other in live:
            granted += row.granted
    row = grant(ask, mine, granted, len(live))
    if row != mine:
        database.execute(_PUT_LEASE, (*account, process, *row, terms.forgotten_at(account)))
    free = max(0, ask.limit - granted - row.granted)
    return Grant(account, ask.number, row.granted, settled + row.spent, free)


def _prune(database: sqlite3.Connection, now: float) -> None:
    """A bounded share of what is of no use any more; the rest comes the next time."""
    most = terms.PRUNE_ROWS_MAX
    leases = database.execute(
        "SELECT owner, meter, window, process FROM leases "
        "WHERE forgotten_at > 0 AND forgotten_at < ? LIMIT ?",
        (now, most),
    ).fetchall()
    database.executemany(
        "DELETE FROM leases WHERE owner = ? AND meter = ? AND window = ? AND process = ?", leases
    )
    rows = database.execute(
        "SELECT day, key, session, ladder, rung FROM usage WHERE process = '' AND day < ? LIMIT ?",
        (now - terms.USAGE_KEPT_S, most),
    ).fetchall()
    database.executemany(
        "DELETE FROM usage WHERE process = '' AND day = ? AND key = ? AND session = ? "
        "AND ladder = ? AND rung = ?",
        rows,
    )
    database.execute("DELETE FROM processes WHERE ended_at < ?", (now - terms.USAGE_KEPT_S,))
    for table in ("answers", "cache"):
        database.execute(
            f"DELETE FROM {table} WHERE id IN (SELECT id FROM {table} WHERE ends_at < ? LIMIT ?)",
            (now, most),
        )
