"""What may be forgotten, in SQLite: answers under an Idempotency-Key, and the cache's second tier.

Both are bounded in bytes (`terms.Bounds`), by sums that the file's triggers keep.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Sequence

import orjson

from router.store import terms
from router.store.base import EntryKeys, KeptAnswer
from router.store.sqlite_file import SqliteFile

# What an entry takes beside its bytes.
_ENTRY_BYTES = 128
_DROP_ROWS = 1_000
_PUT_ROWS = 64
# No cache_key is as short.
_BEFORE_ALL = b"\0"


class SqliteAnswers:
    """The `AnswerStore` part."""

    _file: SqliteFile
    _bounds: terms.Bounds
    _wall_s: Callable[[], float]
    _alive_s: Callable[[], float]
    _lease_s: float

    async def claim_answer(
        self, key: str, name: str, mine: KeptAnswer, *, ttl_s: float
    ) -> KeptAnswer | None:
        def work(database: sqlite3.Connection) -> KeptAnswer | None:
            now = self._alive_s()
            found = _find_answer(database, key, name, self._wall_s())
            if found is not None:
                answer, claimed_at = found
                if answer.body is not None:
                    return answer
                if answer.process == mine.process:
                    return None if answer.fingerprint == mine.fingerprint else answer
                if self._is_alive(database, answer.process, claimed_at, now):
                    return answer
            database.execute("DELETE FROM answers WHERE key = ? AND name = ?", (key, name))
            database.execute(
                "INSERT INTO answers (key, name, fingerprint, process, claimed_at, ends_at) "
                "VALUES (?, ?, ?, ?, ?, ?)",
                (key, name, mine.fingerprint, mine.process, now, self._wall_s() + ttl_s),
            )
            self._evict_answers(database, key)
            return None

        return await self._file.run(work)

    async def keep_answer(self, key: str, name: str, answer: KeptAnswer, *, ttl_s: float) -> None:
        size = terms.answer_bytes(answer)

        def work(database: sqlite3.Connection) -> None:
            mine = (key, name, answer.process)
            if size > self._bounds.answer_bytes_max:
                database.execute(
                    "DELETE FROM answers WHERE key = ? AND name = ? AND process = ?", mine
                )
                return
            database.execute(
                "UPDATE answers SET body = ?, status = ?, headers = ?, size = ?, ends_at = ? "
                "WHERE key = ? AND name = ? AND process = ?",
                (
                    answer.body,
                    answer.status,
                    orjson.dumps(dict(answer.headers)).decode(),
                    size,
                    self._wall_s() + ttl_s,
                    *mine,
                ),
            )
            self._evict_answers(database, key)

        await self._file.run(work)

    async def get_answer(self, key: str, name: str) -> KeptAnswer | None:
        def work(database: sqlite3.Connection) -> KeptAnswer | None:
            found = _find_answer(database, key, name, self._wall_s())
            return found[0] if found else None

        return await self._file.run(work, writes=False)

    async def drop_answer(self, key: str, name: str, process: str) -> None:
        def work(database: sqlite3.Connection) -> None:
            database.execute(
                "DELETE FROM answers WHERE key = ? AND name = ? AND process = ? AND body IS NULL",
                (key, name, process),
            )

        await self._file.run(work)

    def _is_alive(
        self, database: sqlite3.Connection, process: str, claimed_at: float, now: float
    ) -> bool:
        row = database.execute(
            "SELECT heard_at, ended_at FROM processes WHERE process = ?", (process,)
        ).fetchone()
        if row is not None and row[1] is not None:
            return False
        heard_at = max(claimed_at, row[0]) if row else claimed_at
        return not terms.is_silent(heard_at, now, self._lease_s)

    def _evict_answers(self, database: sqlite3.Connection, key: str) -> None:
        """The oldest that are finished go; a claim stays, for its call is under way."""
        bounds = self._bounds
        of_key = f"answers:{key}"
        while _is_over(database, of_key, bounds.key_answers_bytes_max, bounds.key_answers_max):
            if not database.execute(
                "DELETE FROM answers WHERE id = "
                "(SELECT min(id) FROM answers WHERE key = ? AND body IS NOT NULL)",
                (key,),
            ).rowcount:
                break
        while _is_over(database, "answers", bounds.answers_bytes_max, None):
            if not database.execute(
                "DELETE FROM answers WHERE id = "
                "(SELECT id FROM answers WHERE body IS NOT NULL ORDER BY id LIMIT 1)"
            ).rowcount:
                break


class SqliteCache:
    """The `CacheStore` part."""

    _file: SqliteFile
    _bounds: terms.Bounds
    _wall_s: Callable[[], float]

    async def get_entries(self, cache_keys: Sequence[bytes]) -> list[bytes | None]:
        def work(database: sqlite3.Connection) -> list[bytes | None]:
            now = self._wall_s()
            found: list[bytes | None] = []
            for cache_key in cache_keys:
                row = database.execute(
                    "SELECT body FROM cache WHERE cache_key = ? AND ends_at > ?", (cache_key, now)
                ).fetchone()
                found.append(row[0] if row else None)
            return found

        return await self._file.run(work, writes=False)

    async def entry_keys(self, place: str, limit: int) -> EntryKeys:
        """A place is the newest row of the beginning and, while what was there then is read in the
        order of the keys, the last one: their index is a fiftieth of the table."""

        def work(database: sqlite3.Connection) -> EntryKeys:
            entries = _sums(database, "cache")[1]
            newest = _newest_entry(database)
            row, _, last = place.partition(":")
            if not place or int(row) > newest:
                row, last = str(newest), _BEFORE_ALL.hex()
            if last:
                found = database.execute(
                    "SELECT id, cache_key FROM cache WHERE cache_key > ? "
                    "ORDER BY cache_key LIMIT ?",
                    (bytes.fromhex(last), limit),
                ).fetchall()
                last = found[-1][1].hex() if len(found) == limit else ""
                is_all = False
            else:
                found = database.execute(
                    "SELECT id, cache_key FROM cache WHERE id > ? ORDER BY id LIMIT ?",
                    (int(row), limit),
                ).fetchall()
                row = str(found[-1][0]) if found else row
                is_all = len(found) < limit
            keys = [cache_key for _, cache_key in found]
            return EntryKeys(keys, f"{row}:{last}", is_all, entries)

        return await self._file.run(work, writes=False)

    async def put_entries(
        self, entries: Sequence[tuple[bytes, bytes]], *, group: str, ttl_s: float
    ) -> None:
        kept = [
            (cache_key, body, len(body) + _ENTRY_BYTES)
            for cache_key, body in dict(entries).items()
            if len(body) + _ENTRY_BYTES <= self._bounds.entry_bytes_max
        ]

        ends_at = self._wall_s() + ttl_s
        # Others of this file wait for a part of them, not for all.
        for start in range(0, len(kept), _PUT_ROWS):
            await self._put(kept[start : start + _PUT_ROWS], group, ends_at)

    async def _put(self, rows: list[tuple[bytes, bytes, int]], group: str, ends_at: float) -> None:
        def work(database: sqlite3.Connection) -> None:
            # Row by row, the loop and this thread would take turns several times for each.
            marks = ",".join("?" * len(rows))
            values = ",".join(["(?, ?, ?, ?, ?)"] * len(rows))
            # A replacing INSERT would not run the trigger of what it deletes.
            database.execute(
                f"DELETE FROM cache WHERE cache_key IN ({marks})", [row[0] for row in rows]
            )
            database.execute(
                f"INSERT INTO cache (cache_key, dropped_with, body, size, ends_at) VALUES {values}",
                [cell for key, body, size in rows for cell in (key, group, body, size, ends_at)],
            )
            while _is_over(database, "cache", self._bounds.cache_bytes_max, None):
                database.execute("DELETE FROM cache WHERE id = (SELECT min(id) FROM cache)")

        await self._file.run(work)

    async def drop_entries(self, group: str) -> int:
        def work(database: sqlite3.Connection) -> int:
            return database.execute(
                "DELETE FROM cache WHERE id IN "
                "(SELECT id FROM cache WHERE dropped_with = ? LIMIT ?)",
                (group, _DROP_ROWS),
            ).rowcount

        dropped = 0
        while some := await self._file.run(work):
            dropped += some
        return dropped


def _is_over(
    database: sqlite3.Connection, name: str, bytes_max: int, entries_max: int | None
) -> bool:
    size, entries = _sums(database, name)
    return size > bytes_max or (entries_max is not None and entries > entries_max)


def _sums(database: sqlite3.Connection, name: str) -> tuple[int, int]:
    """Bytes and entries of what has this name."""
    row = database.execute("SELECT bytes, entries FROM sums WHERE name = ?", (name,)).fetchone()
    return (row[0], row[1]) if row else (0, 0)


def _newest_entry(database: sqlite3.Connection) -> int:
    """The row of the cache that was written last, be it still there or not."""
    row = database.execute("SELECT seq FROM sqlite_sequence WHERE name = 'cache'").fetchone()
    return row[0] if row else 0


def _find_answer(
    database: sqlite3.Connection, key: str, name: str, now: float
) -> tuple[KeptAnswer, float] | None:
    row = database.execute(
        "SELECT fingerprint, process, body, status, headers, claimed_at FROM answers "
        "WHERE key = ? AND name = ? AND ends_at > ?",
        (key, name, now),
    ).fetchone()
    if row is None:
        return None
    fingerprint, process, body, status, headers, claimed_at = row
    return KeptAnswer(fingerprint, process, body, status, orjson.loads(headers)), claimed_at
