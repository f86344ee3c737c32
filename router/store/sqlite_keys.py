"""Keys made at run time, and their sessions, in SQLite."""

from __future__ import annotations

import sqlite3

from router.store import terms
from router.store.base import KeyRecord
from router.store.sqlite_file import SqliteFile


class SqliteKeys:
    """The `KeyStore` part."""

    _file: SqliteFile

    async def find_key(self, digest: str) -> KeyRecord | None:
        def work(database: sqlite3.Connection) -> KeyRecord | None:
            return _one(
                database,
                "SELECT record FROM digests JOIN keys USING (name) WHERE digest = ?",
                digest,
            )

        return await self._file.run(work, writes=False)

    async def get_key(self, name: str) -> KeyRecord | None:
        def work(database: sqlite3.Connection) -> KeyRecord | None:
            return _one(database, "SELECT record FROM keys WHERE name = ?", name)

        return await self._file.run(work, writes=False)

    async def put_key(self, record: KeyRecord, *, is_new: bool) -> bool:
        def work(database: sqlite3.Connection) -> bool:
            present = _one(database, "SELECT record FROM keys WHERE name = ?", record.name)
            if present is not None and is_new:
                return present == record
            if present is not None and present.revoked_at and record.revoked_at is None:
                return False
            [version] = database.execute(
                "UPDATE meta SET value = value + 1 WHERE name = 'key_version' RETURNING value"
            ).fetchone()
            database.execute(
                "INSERT OR REPLACE INTO keys VALUES (?, ?, ?, ?, ?)",
                (
                    record.name,
                    terms.dump_record(record).decode(),
                    record.parent,
                    terms.ends_at(record),
                    version,
                ),
            )
            database.execute("DELETE FROM digests WHERE name = ?", (record.name,))
            database.executemany(
                "INSERT OR REPLACE INTO digests VALUES (?, ?)",
                [(digest, record.name) for digest in record.digests],
            )
            return True

        return await self._file.run(work)

    async def list_keys(self, *, after: str, limit: int, sessions: bool) -> list[KeyRecord]:
        which = "parent <> ''" if sessions else "parent = ''"

        def work(database: sqlite3.Connection) -> list[KeyRecord]:
            lines = database.execute(
                f"SELECT record FROM keys WHERE name > ? AND {which} ORDER BY name LIMIT ?",
                (after, limit),
            )
            return [terms.load_record(text) for (text,) in lines]

        return await self._file.run(work, writes=False)

    async def changed_keys(self, since: int) -> tuple[int, list[KeyRecord]]:
        def work(database: sqlite3.Connection) -> tuple[int, list[KeyRecord]]:
            lines = database.execute(
                "SELECT version, record FROM keys WHERE version > ? ORDER BY version LIMIT ?",
                (since, terms.CHANGED_KEYS_MAX),
            ).fetchall()
            if len(lines) == terms.CHANGED_KEYS_MAX:
                version = lines[-1][0]
            else:
                [version] = database.execute(
                    "SELECT value FROM meta WHERE name = 'key_version'"
                ).fetchone()
            return version, [terms.load_record(text) for _, text in lines]

        return await self._file.run(work, writes=False)

    async def forget_expired(self, now: float) -> int:
        def work(database: sqlite3.Connection) -> int:
            names = database.execute(
                "SELECT name FROM keys WHERE parent <> '' AND ends_at > 0 AND ends_at < ? LIMIT ?",
                (now - terms.EXPIRED_KEPT_S, terms.FORGET_KEYS_MAX),
            ).fetchall()
            for statement in (
                "DELETE FROM digests WHERE name = ?",
                "DELETE FROM keys WHERE name = ?",
                "DELETE FROM leases WHERE owner = ?",
            ):
                database.executemany(statement, names)
            return len(names)

        return await self._file.run(work)


def _one(database: sqlite3.Connection, text: str, value: str) -> KeyRecord | None:
    row = database.execute(text, (value,)).fetchone()
    return terms.load_record(row[0]) if row else None
