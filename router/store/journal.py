"""The journal: what one process's ledger did since the store knew of it, in a mapped file.

A record is a few stores to memory that belongs to the kernel: it outlives `kill -9`, though not a
loss of power since the last `sync`. Nothing here waits for a disk but `sync` and `close`.

- A file has its name only when it is whole, and is locked (`flock`) from birth until its process
  is gone: a journal that can be locked is a dead process's. A process that forks must not share it.
- Space is allocated before it is mapped: a full disk is an error of `create`, `rewrite` or the
  record that needs more room, and never a SIGBUS.
- What cannot be read is set aside and never taken for all that its process did: until somebody
  resolves it, the store keeps counted what that process had in its hands.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import mmap
import os
import stat
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import lru_cache
from itertools import count
from pathlib import Path
from struct import error as StructError
from typing import NamedTuple

from router.core import journal as form
from router.core.journal import GROWN, GROWN_RECORD, OPENED, OPENED_RECORD, SETTLED, SETTLED_RECORD
from router.store.base import RowKey, Totals

BYTES_MIN, BYTES_MAX = 8 << 20, 256 << 20
_SUFFIX = ".journal"
_NEW_SUFFIX = ".journal.new"
_DAMAGED_SUFFIX = ".damaged"
_LOCK_TRIES = 100

_OPENED_BYTES, _GROWN_BYTES, _SETTLED_BYTES = (
    OPENED_RECORD.size,
    GROWN_RECORD.size,
    SETTLED_RECORD.size,
)
_pack_opened = OPENED_RECORD.pack_into
_pack_grown = GROWN_RECORD.pack_into
_pack_settled = SETTLED_RECORD.pack_into

TotalsOf = Callable[[RowKey], Totals | None]

_log = logging.getLogger("rungway")


class JournalFull(Exception):
    """The journal can take no more until it was rewritten; the text says why it cannot grow."""


class Journal:
    """One process's journal. Not for several threads, but for `sync`.

    Once it is full it takes nothing until `rewrite`: a later record without an earlier one could
    charge a hold twice.
    """

    def __init__(
        self, path: Path, process: str, bytes_min: int, bytes_max: int, totals_of: TotalsOf
    ) -> None:
        """Use `create`."""
        data = form.encode_header(process)
        self._path = path
        self._process = process
        self._bytes_min = bytes_min
        self._bytes_max = bytes_max
        self._totals_of = totals_of
        self._descriptor_lock = threading.Lock()
        self._numbers: dict[tuple[int, str, str, str, str], int] = {}
        self._at = len(data)
        self._full: str | None = None
        self._descriptor, self._map = self._place(data)

    @classmethod
    def create(
        cls,
        folder: Path,
        process: str,
        *,
        totals_of: TotalsOf = lambda row: None,
        bytes_min: int = BYTES_MIN,
        bytes_max: int = BYTES_MAX,
    ) -> Journal:
        """`totals_of` tells what the process has counted in a row so far.

        It is asked when a row's first hold is opened. Recovered tokens are the row's totals and
        what is held; without the totals a store that knows them already would not see what is held.

        Raises OSError: no space, not writable, or the process has one already.
        """
        path = folder / f"{process}{_SUFFIX}"
        if path.exists():
            raise FileExistsError(errno.EEXIST, "each process needs an id of its own", str(path))
        return cls(path, process, bytes_min, bytes_max, totals_of)

    def opened(self, hold: int, row: RowKey, nanousd: int, tokens: int) -> None:
        """A hold of this much in this row; said again, it moves there. Raises JournalFull."""
        try:
            number = self._numbers[row]
        except KeyError:
            number = self._intern(row)
            if (totals := self._totals_of(row)) is not None:
                self._append(SETTLED, _settled_record(0, number, totals))
        at = self._at
        try:
            _pack_opened(self._map, at, hold, nanousd, tokens, number, OPENED)
        except StructError:
            nanousd, tokens = form.clamp(nanousd), form.clamp(tokens)
            self._append(OPENED, OPENED_RECORD.pack(hold, nanousd, tokens, number, OPENED))
            return
        self._map[at] = OPENED
        self._at = at + _OPENED_BYTES

    def grown(self, hold: int, nanousd: int, tokens: int) -> None:
        """The new totals of an open hold. Raises JournalFull: then it must not grow."""
        at = self._at
        try:
            _pack_grown(self._map, at, hold, nanousd, tokens, GROWN)
        except StructError:
            nanousd, tokens = form.clamp(nanousd), form.clamp(tokens)
            self._append(GROWN, GROWN_RECORD.pack(hold, nanousd, tokens, GROWN))
            return
        self._map[at] = GROWN
        self._at = at + _GROWN_BYTES

    def settled(self, hold: int, row: RowKey, totals: form.Amounts) -> None:
        """Close the hold (0: there was none); these are the row's absolute totals after it, as
        Totals or, a fifth quicker, as a plain tuple of the same.

        Never fails: without room the hold stays open here, and would be in doubt after a crash.
        """
        at = self._at
        # A call with *totals would cost a quarter more.
        a, b, c, d, e, f, g = totals
        try:
            _pack_settled(self._map, at, hold, self._numbers[row], a, b, c, d, e, f, g, SETTLED)
        except (KeyError, StructError):
            self._settle_slowly(hold, row, totals)
            return
        self._map[at] = SETTLED
        self._at = at + _SETTLED_BYTES

    @property
    def is_nearly_full(self) -> bool:
        """Time for `rewrite`; without it the file doubles, up to `BYTES_MAX`."""
        return self._at * 4 > len(self._map) * 3

    def rewrite(
        self, rows: Mapping[RowKey, Totals], holds: Iterable[tuple[int, RowKey, int, int]]
    ) -> None:
        """Begin again with only what still matters: the totals of rows that the store does not
        know yet, and all open holds.

        Raises OSError; then the journal is as it was before.
        """
        holds = list(holds)
        said = dict(rows)
        for _, row, _, _ in holds:
            if row not in said and (totals := self._totals_of(row)) is not None:
                said[row] = totals
        data, numbers = form.encode(self._process, said, holds)
        descriptor, mapped = self._place(data)
        with self._descriptor_lock:
            old, self._descriptor = self._descriptor, descriptor
        os.close(old)
        self._map.close()
        self._map, self._at, self._numbers, self._full = mapped, len(data), numbers, None

    def sync(self) -> None:
        """Wait until what was written so far is on the disk; from a thread, as it may take long."""
        # Not mmap.flush, which keeps the interpreter's lock while it waits.
        with self._descriptor_lock:
            descriptor = os.dup(self._descriptor)
        try:
            os.fdatasync(descriptor)
        finally:
            os.close(descriptor)

    def close(self, *, delete: bool) -> None:
        """`delete`: the store knows all of it. Otherwise it is recovered by the next process."""
        if self._map.closed:
            return
        if delete:
            self._path.unlink(missing_ok=True)
        else:
            self.sync()
        self._map.close()
        with self._descriptor_lock:
            os.close(self._descriptor)

    def _place(self, data: bytes) -> tuple[int, mmap.mmap]:
        """Put a new, locked and mapped file in the place of the old one, at once or not at all."""
        # As much room again, or it would be nearly full at once.
        wanted = max(self._bytes_min, 2 * len(data))
        size = max(len(data), min(wanted, self._bytes_max))
        descriptor, new = _new_locked(self._path.parent, self._process)
        try:
            mapped = _mapped(descriptor, size, self._bytes_max)
            mapped[: len(data)] = data
            new.rename(self._path)
        except OSError:
            # A map that was made is freed with its last reference, and with it the lock.
            new.unlink(missing_ok=True)
            os.close(descriptor)
            raise
        return descriptor, mapped

    def _intern(self, row: RowKey) -> int:
        number = len(self._numbers)
        self._append(form.ROW, form.encode_row(row))
        self._numbers[row] = number
        return number

    def _settle_slowly(self, hold: int, row: RowKey, totals: form.Amounts) -> None:
        try:
            number = self._numbers[row] if row in self._numbers else self._intern(row)
            self._append(SETTLED, _settled_record(hold, number, totals))
        except JournalFull:
            return  # It was logged when it became full.

    def _append(self, kind: int, record: bytes) -> None:
        while self._at + len(record) > len(self._map):
            self._grow()
        end = self._at + len(record)
        self._map[self._at + 1 : end] = record[1:]
        self._map[self._at] = kind
        self._at = end

    def _grow(self) -> None:
        if self._full is not None:
            raise JournalFull(self._full)
        try:
            grown = _mapped(self._descriptor, 2 * len(self._map), self._bytes_max)
        except OSError as error:
            self._full = f"the journal {self._path} cannot grow: {error.strerror}"
            self._at = len(self._map)
            _log.error(
                "%s. What is settled from now on would be in doubt after a crash", self._full
            )
            raise JournalFull(self._full) from error
        self._map.close()
        self._map = grown


def _settled_record(hold: int, number: int, totals: form.Amounts) -> bytes:
    return SETTLED_RECORD.pack(hold, number, *map(form.clamp, totals), SETTLED)


class Recovered(NamedTuple):
    """What a dead process left. `rows` has the last totals of each row that its journal speaks of,
    and its open holds: money as `in_doubt`, tokens among `output_tokens`, no requests.
    """

    process: str
    rows: dict[RowKey, Totals]
    open_holds: int
    path: Path

    def discard(self) -> bool:
        """Forget it, once the store knows; False: another process did so meanwhile.

        A process id never comes back, so no lock is needed.
        """
        try:
            self.path.unlink()
        except FileNotFoundError:
            return False
        return True


def recover(folder: Path, *, bytes_max: int = BYTES_MAX) -> Iterator[Recovered]:
    """The journals of dead processes, each until it is discarded. Waits for the disk.

    One that is damaged is set aside under another name; one that cannot be opened, or that a newer
    version wrote, stays where it is. Both are logged with what to do. Raises OSError for a folder
    that cannot be listed.
    """
    try:
        names = sorted(os.listdir(folder))
    except FileNotFoundError:
        return
    for name in names:
        path = folder / name
        try:
            if name.endswith(_NEW_SUFFIX):
                _clear_abandoned(path)
            elif name.endswith(_SUFFIX) and (found := _recover_one(path, bytes_max)) is not None:
                yield found
        except FileNotFoundError:
            continue  # Another process recovered it meanwhile.
        except OSError as error:
            _log_once(f"cannot recover the journal {path}, which stays there: {error.strerror}")


@lru_cache(1_000)
def _log_once(text: str) -> None:
    """The same folder is looked through again and again."""
    _log.error(text)


def _recover_one(path: Path, bytes_max: int) -> Recovered | None:
    """None: its process lives, or it cannot be read."""
    if (descriptor := _open_dead(path)) is None:
        return None
    with open(descriptor, "rb") as file:
        data = file.read(bytes_max + 1)
    try:
        if len(data) > bytes_max:
            raise form.Damaged("it is larger than any journal")
        said = form.replay(data)
        if path.name != f"{said.process}{_SUFFIX}":
            raise form.Damaged(f"it is a copy of another, {said.process}{_SUFFIX}")
    except form.FromNewer as error:
        _log_once(f"the journal {path} stays unread: {error}. Start that version once")
        return None
    except form.Damaged as error:
        _log.error(
            "the journal %s cannot be read: %s. It is kept as %s; what its process had in its "
            "hands stays counted until `rungway usage resolve`",
            *(path, error, _set_aside(path).name),
        )
        return None
    rows = {RowKey(*row): Totals(*amounts) for row, amounts in said.rows.items()}
    return Recovered(said.process, rows, said.open_holds, path)


def _clear_abandoned(path: Path) -> None:
    """A new file that never got its name says nothing that the old one does not."""
    if (descriptor := _open_dead(path)) is not None:
        path.unlink()
        os.close(descriptor)


def _open_dead(path: Path) -> int | None:
    """Open a file whose process is gone, and hold its lock; None where it lives."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    # A live process may have put a new file in its place between the opening and the lock.
    if stat.S_ISREG(os.fstat(descriptor).st_mode) and _locks(descriptor, path):
        return descriptor
    os.close(descriptor)
    return None


def _set_aside(path: Path) -> Path:
    for number in count(1):
        aside = path.with_name(f"{path.name}{_DAMAGED_SUFFIX}{number}")
        if not aside.exists():
            break
    return path.rename(aside)


def _new_locked(folder: Path, process: str) -> tuple[int, Path]:
    """A new file of this process, its lock, and its path.

    Whoever clears up may take it for abandoned before it is locked, and will remove it by its name:
    so that name is left to them. Only who has a file's lock removes or renames it.
    """
    for number in range(_LOCK_TRIES):
        path = folder / f"{process}.{number}{_NEW_SUFFIX}"
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        except FileExistsError:
            continue
        if _locks(descriptor, path):
            return descriptor, path
        os.close(descriptor)
    raise OSError(errno.EBUSY, "others remove each new file before it is locked", str(folder))


def _locks(descriptor: int, path: Path) -> bool:
    """Whether the lock was free, and the file is still the one of that name."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return os.path.samestat(os.fstat(descriptor), os.lstat(path))
    except (BlockingIOError, FileNotFoundError):
        return False


def _mapped(descriptor: int, size: int, bytes_max: int) -> mmap.mmap:
    if size > bytes_max:
        raise OSError(errno.EFBIG, f"it would be larger than {bytes_max} bytes")
    os.posix_fallocate(descriptor, 0, size)
    return mmap.mmap(descriptor, size)
