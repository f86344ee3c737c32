"""One SQLite file, opened with care and used by one thread of its own: the loop never waits.

Several processes use the same file at once. A piece of work is one transaction; it runs within
`_CALL_S` of being asked for, or not at all. What the file cannot do at opening is `StateRefused`,
later `StateUnavailable`: both name the file and what to do. What was written to the log ahead of
the file is carried into it by a second thread, so that nobody waits for the disk meanwhile.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import secrets
import sqlite3
import stat
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from router.errors import StateUnavailable
from router.store.base import StateLost, StateRefused
from router.store.sqlite_schema import APPLICATION_ID, CHECKED_TABLES, STEPS

Result = TypeVar("Result")

_log = logging.getLogger(__name__)

# For one piece of work, its wait for others of this process and for other processes included.
_CALL_S = 2.0
_LOCK_S = 1.0
_OPEN_LOCK_S = 5.0
_PENDING_MAX = 256
# 16 MB: pages that are written again and again, as an index of digests has them, go to the file
# less often than with SQLite's own 1,000: a third of what an entry of the cache costs. A log that
# begins anew is cut to this, so a longer one is one that has passed it since.
_LOG_BYTES = 16 << 20
# 64 MB, of pages of 4 KiB: where the second thread does not get on, who writes does it in passing.
_LOG_PAGES_MAX = 16_000
# Upserts with a WHERE-less SELECT, partial indexes and RETURNING all work from here on.
_VERSION_MIN = (3, 37, 0)

_WORDS = {
    sqlite3.SQLITE_BUSY: "another process holds its lock for too long",
    sqlite3.SQLITE_LOCKED: "another process holds its lock for too long",
    sqlite3.SQLITE_FULL: "there is no space left for it; make room on its disk",
    sqlite3.SQLITE_READONLY: "it or its folder cannot be written; check their modes and owners",
    sqlite3.SQLITE_IOERR: "reading or writing it failed; check its disk",
    sqlite3.SQLITE_CANTOPEN: "it cannot be opened; check its folder's mode and owner",
    sqlite3.SQLITE_CORRUPT: "it is damaged; stop the daemon and restore it from a backup",
    sqlite3.SQLITE_NOTADB: "it is damaged; stop the daemon and restore it from a backup",
    sqlite3.SQLITE_INTERRUPT: f"the answer took longer than {_CALL_S:g} s",
}


class SqliteFile:
    """`path` None: in memory. Made by `open_file`; `run` is the one way in."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="state")
        self._log_thread = ThreadPoolExecutor(1, thread_name_prefix="state-log")
        self._log_path = Path()
        self._is_emptying = False
        self._pending = 0
        self._database: sqlite3.Connection | None = None
        self._identity: tuple[int, int] | None = None
        self._expected = ""
        self._is_closed = False

    async def open(self) -> None:
        """Raises StateRefused."""
        loop = asyncio.get_running_loop()
        try:
            await loop.run_in_executor(self._thread, self._open)
        except BaseException:
            await self.aclose()
            raise

    async def aclose(self) -> None:
        if self._is_closed:
            return
        self._is_closed = True
        await asyncio.get_running_loop().run_in_executor(self._thread, self._end)
        self._thread.shutdown(wait=False)

    def expect_epoch(self, epoch: str) -> None:
        self._expected = epoch

    async def epoch(self, *, adopt: bool) -> str:
        """The id of the books in the file that is at the path now."""

        def work(database: sqlite3.Connection) -> str:
            return _epoch_of(database)

        if self._is_replaced():
            loop = asyncio.get_running_loop()
            try:
                await loop.run_in_executor(self._thread, self._reopen)
            except StateRefused as error:
                raise StateUnavailable(str(error)) from error
        epoch = await self.run(work, writes=False, checks_epoch=False)
        if adopt:
            self._expected = epoch
        return epoch

    async def run(
        self,
        work: Callable[[sqlite3.Connection], Result],
        *,
        writes: bool = True,
        checks_epoch: bool = True,
    ) -> Result:
        """Do it in one transaction: all of it, or nothing and StateUnavailable."""
        if self._is_closed:
            raise StateUnavailable(f"the state in {self} is closed")
        if self._pending >= _PENDING_MAX:
            raise StateUnavailable(
                f"the state in {self} is too slow: {self._pending} others wait for it"
            )
        deadline = time.monotonic() + _CALL_S
        job = self._thread.submit(self._transact, work, writes, checks_epoch, deadline)
        self._pending += 1
        try:
            async with asyncio.timeout(_CALL_S):
                return await asyncio.wrap_future(job)
        except TimeoutError:
            # Waiting in line it was cancelled; where it runs already, this ends it.
            if job.running() and self._database is not None:
                self._database.interrupt()
            raise StateUnavailable(f"the state in {self} did not answer in {_CALL_S:g} s") from None
        finally:
            self._pending -= 1

    def __str__(self) -> str:
        return str(self.path) if self.path else "memory"

    # --- in its thread --------------------------------------------------------------------------

    def _transact(
        self,
        work: Callable[[sqlite3.Connection], Result],
        writes: bool,
        checks_epoch: bool,
        deadline: float,
    ) -> Result:
        database = self._database
        if database is None or time.monotonic() > deadline:
            raise StateUnavailable(f"the state in {self} is busy")
        try:
            if checks_epoch and self._is_replaced():
                raise StateLost(f"the state in {self} was deleted or replaced while it was in use")
            database.execute("BEGIN IMMEDIATE" if writes else "BEGIN")
            try:
                if checks_epoch:
                    self._check_epoch(database)
                result = work(database)
                database.execute("COMMIT")
            except BaseException:
                if database.in_transaction:
                    database.execute("ROLLBACK")
                raise
        except sqlite3.Error as error:
            raise StateUnavailable(f"the state in {self}: {_in_words(error)}") from error
        if writes:
            self._watch_log()
        return result

    def _watch_log(self) -> None:
        if self.path is None or self._is_emptying:
            return
        try:
            if os.stat(self._log_path).st_size > _LOG_BYTES:
                self._is_emptying = True
                self._log_thread.submit(self._empty_log, self.path)
        except (OSError, RuntimeError):
            # No file, or no thread to be had: the log can wait, and the work is done.
            self._is_emptying = False

    def _check_epoch(self, database: sqlite3.Connection) -> None:
        found = _epoch_of(database)
        if found != self._expected:
            raise StateLost(
                f"the state in {self} is not the one that was in use (books {found}, expected "
                f"{self._expected}): budgets would start anew"
            )

    def _is_replaced(self) -> bool:
        if self.path is None:
            return False
        try:
            found = os.stat(self.path)
        except OSError:
            return True
        return (found.st_dev, found.st_ino) != self._identity

    def _open(self) -> None:
        try:
            if self.path is not None:
                _make_place(self.path)
            self._database = _connect(self.path)
            if self.path is not None:
                found = os.stat(self.path)
                self._identity = (found.st_dev, found.st_ino)
                # SQLite puts it beside the file that a link leads to.
                self._log_path = Path(f"{self.path.resolve()}-wal")
        except OSError as error:
            raise StateRefused(
                f"the state cannot be kept in {self}: {error.strerror or error}; give the daemon "
                "a folder that it may write, or set [state] url"
            ) from error
        except sqlite3.Error as error:
            raise StateRefused(f"the state in {self} cannot be used: {_in_words(error)}") from error
        self._expected = self._expected or _epoch_of(self._database)

    def _reopen(self) -> None:
        self._close()
        self._open()

    def _end(self) -> None:
        self._log_thread.shutdown()
        self._close()

    def _close(self) -> None:
        if self._database is not None:
            self._database.close()
            self._database = None

    # --- in the thread of the log ---------------------------------------------------------------

    def _empty_log(self, path: Path) -> None:
        """Neither those who write nor those who read wait for this one. What fails here, as where
        another process is at it, is tried again after the next piece of work."""
        try:
            if self._is_replaced():
                return
            # A file that is gone is not made anew.
            database = sqlite3.connect(f"{path.absolute().as_uri()}?mode=rw", uri=True)
            with contextlib.closing(database):
                database.execute("PRAGMA synchronous=NORMAL")
                database.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchone()
        except sqlite3.Error as error:
            _log.debug("the log of the state in %s stays as it is: %s", self, _in_words(error))
        finally:
            self._is_emptying = False


def _epoch_of(database: sqlite3.Connection) -> str:
    row = database.execute("SELECT value FROM meta WHERE name = 'epoch'").fetchone()
    return str(row[0]) if row else ""


def _in_words(error: sqlite3.Error) -> str:
    # The upper bits tell the kinds of one code apart.
    code = getattr(error, "sqlite_errorcode", 0) & 0xFF
    return _WORDS.get(code, str(error))


def _make_place(path: Path) -> None:
    """A file that nobody else reads, in a folder that nobody else enters."""
    if not path.parent.exists():
        path.parent.parent.mkdir(parents=True, exist_ok=True)
        path.parent.mkdir(mode=0o700, exist_ok=True)
    with contextlib.suppress(FileExistsError):
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
    found = os.stat(path)
    if not stat.S_ISREG(found.st_mode):
        kind = "a folder" if stat.S_ISDIR(found.st_mode) else "not a plain file"
        raise StateRefused(f"the state cannot be kept in {path}: it is {kind}; name a file in it")
    os.close(os.open(path, os.O_RDWR | os.O_CLOEXEC))


def _connect(path: Path | None) -> sqlite3.Connection:
    if sqlite3.sqlite_version_info < _VERSION_MIN:
        raise StateRefused(
            f"SQLite {sqlite3.sqlite_version} is too old for the state: it takes "
            f"{'.'.join(map(str, _VERSION_MIN))} or newer"
        )
    database = sqlite3.connect(
        str(path) if path else ":memory:",
        timeout=_OPEN_LOCK_S,
        isolation_level=None,
        check_same_thread=False,
    )
    try:
        _check_whose(database, path)
        _switch_to_log(database, path)
        database.execute("PRAGMA synchronous=NORMAL")
        database.execute(f"PRAGMA journal_size_limit={_LOG_BYTES}")
        database.execute(f"PRAGMA wal_autocheckpoint={_LOG_PAGES_MAX}")
        _migrate(database)
        _check_sound(database, path)
        database.execute(f"PRAGMA busy_timeout={int(_LOCK_S * 1000)}")
    except BaseException:
        database.close()
        raise
    return database


def _check_whose(database: sqlite3.Connection, path: Path | None) -> None:
    """Before anything is written: another program's file, or a newer Rungway's, stays as it is."""
    # At one moment: another process may be making the tables just now.
    database.execute("BEGIN")
    try:
        [tables] = database.execute("SELECT count(*) FROM sqlite_master").fetchone()
        [application] = database.execute("PRAGMA application_id").fetchone()
        [version] = database.execute("PRAGMA user_version").fetchone()
    finally:
        database.execute("ROLLBACK")
    if application != APPLICATION_ID and tables:
        raise StateRefused(
            f"{path} is the database of another program; name another file in [state] url"
        )
    if version > len(STEPS):
        raise StateRefused(
            f"the state in {path} was written by a newer Rungway (its version is {version}, this "
            f"one knows {len(STEPS)}): run that one, or name another file in [state] url"
        )


def _switch_to_log(database: sqlite3.Connection, path: Path | None) -> None:
    """SQLite does not wait for a lock here by itself when two processes switch at once."""
    if path is None:
        return
    deadline = time.monotonic() + _OPEN_LOCK_S
    while True:
        try:
            [mode] = database.execute("PRAGMA journal_mode=WAL").fetchone()
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or time.monotonic() > deadline:
                raise
            time.sleep(0.02)
            continue
        if mode != "wal":
            raise StateRefused(
                f"the file system of {path} cannot hold a database that several processes share; "
                "name a file on a local disk in [state] url"
            )
        return


def _migrate(database: sqlite3.Connection) -> None:
    [version] = database.execute("PRAGMA user_version").fetchone()
    if version == len(STEPS):
        return
    database.execute("BEGIN IMMEDIATE")
    try:
        # Another process may have done it while this one waited.
        [version] = database.execute("PRAGMA user_version").fetchone()
        for step in STEPS[version:]:
            for statement in _statements(step):
                database.execute(statement)
        if version == 0:
            database.execute("INSERT INTO meta VALUES ('epoch', ?)", (secrets.token_hex(8),))
            database.execute(f"PRAGMA application_id={APPLICATION_ID}")
        database.execute(f"PRAGMA user_version={len(STEPS)}")
        database.execute("COMMIT")
    except BaseException:
        if database.in_transaction:
            database.execute("ROLLBACK")
        raise


def _statements(step: str) -> list[str]:
    """One by one: `executescript` would commit first."""
    found: list[str] = []
    text = ""
    for line in step.splitlines(keepends=True):
        text += line
        if sqlite3.complete_statement(text):
            found.append(text)
            text = ""
    return found


def _check_sound(database: sqlite3.Connection, path: Path | None) -> None:
    for table in CHECKED_TABLES:
        [found] = database.execute(f"PRAGMA quick_check({table})").fetchone()
        if found != "ok":
            raise StateRefused(
                f"the state in {path} is damaged ({table}: {found}); restore it from a backup, or "
                "move it away and start with empty budgets"
            )
