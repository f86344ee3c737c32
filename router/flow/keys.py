"""Who a secret belongs to: the keys of the file, and those of the store as this process knows them.

A secret is known by its SHA-256 alone. What is known is answered from memory, without awaiting; a
digest that is not known is one question to the store, bounded in time and number, asked once for
all who wait for it. A change of keys reaches this process by a look at the store every `POLL_S`.

- Revoked wins: the tombstone of a file's key is looked up before that key is first let in.
- The store's silence is never a wrong key: what only the store can tell is then 503, and what is
  known already goes on.
- An answer that a change overtook is used once and not remembered.

Ends of secrets and sessions are unix seconds, compared at each use.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import logging
import math
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import msgspec

from router.config import schema
from router.config.checks import key_of
from router.errors import StateUnavailable, Unauthenticated
from router.flow.asking import is_answered
from router.flow.tasks import Tasks
from router.store.base import KeyRecord, KeyStore
from router.types import Key, nanousd_of

_log = logging.getLogger("rungway")

POLL_S = 0.5
_POLL_LIMIT_S = 5.0
# What the store says after the call has given up is known from then on.
_LOOK_UP_S = 2.0
_ASKS_AT_ONCE = 16
_ASKS_WAITING_MAX = 1024
# At about a kilobyte each.
_KNOWN_MAX = 10_000
_UNKNOWN_MAX = 10_000
# Only a bound: a change of keys forgets them at once.
_UNKNOWN_S = 10.0
# Behind every version that there will be, and exact as a float too.
_NOTHING_SINCE = 2**53 - 1
_FORGET_EVERY_S = 3600.0

_STRANGER = (
    "the API key is not known here; make one with `rungway keys create`, and reload where it "
    "stands in the configuration"
)


@dataclass(frozen=True, slots=True)
class Entry:
    """What is known of one digest. `key` None: it is refused, for `why`.

    `record` None: it is the file's. `until`: unix seconds.
    """

    digest: bytes
    key: Key | None
    record: KeyRecord | None = None
    until: float = math.inf
    why: str = ""


class KeyBook:
    """One process's knowledge of keys. `clock` gives unix seconds."""

    def __init__(self, store: KeyStore, tasks: Tasks, clock: Callable[[], float]) -> None:
        self._store = store
        self._tasks = tasks
        self._clock = clock
        # All of the file's keys; and those of them that the store was asked about.
        self._of_file: Mapping[bytes, Key] = {}
        self._file_digests: dict[str, bytes] = {}
        self._file: dict[bytes, Entry] = {}
        self._known: OrderedDict[bytes, Entry] = OrderedDict()
        # By the name of a key: what is known of its secrets and of its sessions'.
        self._families: dict[str, set[bytes]] = {}
        self._unknown: dict[bytes, float] = {}
        self._asking: dict[bytes, asyncio.Task[Entry | StateUnavailable | None]] = {}
        # How many callers still wait for each.
        self._hoping: Counter[bytes] = Counter()
        self._places = asyncio.Semaphore(_ASKS_AT_ONCE)
        self._version: int | None = None
        # Grows with whatever makes an answer that is under way an old one.
        self._changes = 0
        self._is_silent = False

    def configure(self, keys: Mapping[bytes, Key]) -> None:
        """Take the keys of a configuration, by their digests, in place of the last one's."""
        self._changes += 1
        # Their sessions have the rights of the file before.
        for name in {*self._file_digests, *(key.name for key in keys.values())}:
            self._forget(name)
        self._of_file = keys
        self._file_digests = {key.name: digest for digest, key in keys.items()}
        self._file = {
            digest: replace(entry, key=keys[digest] if entry.key is not None else None)
            for digest, entry in self._file.items()
            if digest in keys
        }
        for digest in keys:
            self._unknown.pop(digest, None)

    def file_keys(self) -> Mapping[bytes, Key]:
        """The file's keys by their digests, revoked ones too."""
        return self._of_file

    def file_key(self, name: str) -> tuple[bytes, Key] | None:
        digest = self._file_digests.get(name)
        return None if digest is None else (digest, self._of_file[digest])

    # --- whose is it? ---------------------------------------------------------------------------

    def known(self, digest: bytes) -> Key | None:
        """The key with this digest, or None where the store has to be asked (`find`).

        Raises Unauthenticated where it is known that nobody may come in with it.
        """
        entry = self._file.get(digest)
        if entry is None:
            entry = self._known.get(digest)
            if entry is None:
                self._refuse_stranger(digest)
                return None
            self._known.move_to_end(digest)
        return self._let_in(entry, digest)

    async def find(self, digest: bytes) -> Key:
        """As `known`, asking the store. Raises Unauthenticated or StateUnavailable."""
        asking = self._asking.get(digest)
        if asking is None:
            if len(self._asking) >= _ASKS_WAITING_MAX:
                raise StateUnavailable(
                    "too many keys that are not known here are being looked up; ask again in a "
                    "moment",
                    retry_after_s=1.0,
                )
            asking = self._tasks.spawn(self._look_up(digest), "look a key up")
            self._asking[digest] = asking
            asking.add_done_callback(lambda _: self._asking.pop(digest, None))
        # Others may wait for the same answer, so one who leaves does not end the question.
        self._hoping[digest] += 1
        try:
            is_known = await is_answered(asking) and not asking.cancelled()
        finally:
            self._hoping[digest] -= 1
            if not self._hoping[digest]:
                del self._hoping[digest]
        found = asking.result() if is_known else _silence()
        if isinstance(found, StateUnavailable):
            raise found
        if found is None:
            raise Unauthenticated(_STRANGER)
        return self._let_in(found, digest)

    def _let_in(self, entry: Entry, digest: bytes) -> Key:
        # A look-up by digest tells nothing by its time: nobody chooses what a digest begins with.
        # The comparison that decides takes the same time for every digest.
        if not hmac.compare_digest(entry.digest, digest):
            raise Unauthenticated(_STRANGER)
        if entry.key is None:
            raise Unauthenticated(entry.why)
        if entry.until <= self._clock():
            raise Unauthenticated("the API key has expired; ask for a new one")
        return entry.key

    def _refuse_stranger(self, digest: bytes) -> None:
        since = self._unknown.get(digest)
        if since is None:
            return
        if 0 <= self._clock() - since < _UNKNOWN_S:
            raise Unauthenticated(_STRANGER)
        del self._unknown[digest]

    async def _look_up(self, digest: bytes) -> Entry | StateUnavailable | None:
        before = self._changes
        try:
            async with self._places, asyncio.timeout(_LOOK_UP_S):
                if digest in self._asking and digest not in self._hoping:
                    # Nobody waits for this one any more, and others wait for the place.
                    return _silence()
                record, parent = await self._ask(digest)
        except (StateUnavailable, TimeoutError):
            # Its own words name files and hosts, which a stranger need not know.
            return _silence()
        try:
            found = self._understood(digest, record, parent)
        except StateUnavailable as error:
            return error
        if before == self._changes:
            self._remember(digest, found)
        return found

    async def _ask(self, digest: bytes) -> tuple[KeyRecord | None, KeyRecord | None]:
        """The record of a digest, and of a session what ends it or its key's."""
        record = await self._store.find_key(digest.hex())
        if record is None or not record.parent:
            return record, None
        in_file = self.file_key(record.parent)
        if in_file is not None:
            # The tombstone of its secret may be of another name.
            tombstone = await self._store.find_key(in_file[0].hex())
            if tombstone is not None and tombstone.revoked_at is not None:
                return record, tombstone
        return record, await self._store.get_key(record.parent)

    def _understood(
        self, digest: bytes, record: KeyRecord | None, parent: KeyRecord | None
    ) -> Entry | None:
        if digest in self._of_file:
            return self._file_entry(digest, record)
        if record is None:
            return None
        if record.revoked_at is not None or not record.parent:
            return _entry(digest, record)
        return self._session_entry(digest, record, parent)

    def _file_entry(self, digest: bytes, record: KeyRecord | None) -> Entry:
        if record is not None and record.revoked_at is not None:
            return _revoked(digest, record)
        return Entry(digest, self._of_file[digest])

    def _session_entry(self, digest: bytes, record: KeyRecord, parent: KeyRecord | None) -> Entry:
        """A session has its parent's rights as they are now, and ends with it."""
        in_file = self.file_key(record.parent)
        revoked_at = None if parent is None else parent.revoked_at
        if parent is not None and revoked_at is not None:
            # Behind a tombstone the file may have another secret, with sessions of its own.
            is_later = in_file is not None and in_file[0].hex() not in parent.digests
            if not is_later or record.created_at <= revoked_at:
                return _orphan(digest, record)
        if in_file is not None:
            key = in_file[1]
        elif parent is not None:
            key = rights_of(parent)
        else:
            return _orphan(digest, record)
        usd = record.settings.get("usd")
        share = None if usd is None else nanousd_of(float(usd))
        own = replace(key, admin=False, session=record.name, session_usd=share)
        return Entry(digest, own, record, _end(record, digest))

    # --- what is known --------------------------------------------------------------------------

    def _remember(self, digest: bytes, found: Entry | None) -> None:
        if found is None:
            self._unknown[digest] = self._clock()
            if len(self._unknown) > _UNKNOWN_MAX:
                del self._unknown[next(iter(self._unknown))]
        elif digest in self._of_file:
            self._file[digest] = found
        elif found.record is not None:
            self._known[digest] = found
            self._families.setdefault(_family(found.record), set()).add(digest)
            if len(self._known) > _KNOWN_MAX:
                self._drop(next(iter(self._known)))

    def _forget(self, name: str) -> set[bytes]:
        """Forget a key's secrets and its sessions'; those that were known."""
        family = set(self._families.get(name, ()))
        for digest in family:
            self._drop(digest)
        return family

    def _drop(self, digest: bytes) -> None:
        entry = self._known.pop(digest, None)
        if entry is None or entry.record is None:
            return
        name = _family(entry.record)
        self._families[name].discard(digest)
        if not self._families[name]:
            del self._families[name]

    def apply(self, record: KeyRecord) -> None:
        """Take a change of a key: one made here, or one that another process made."""
        self._changes += 1
        digests = {bytes.fromhex(one) for one in record.digests}
        for digest in digests:
            self._unknown.pop(digest, None)
        if record.parent:
            was_known = digests & self._known.keys()
            for digest in was_known:
                self._drop(digest)
        else:
            was_known = self._forget(record.name)
        if record.revoked_at is not None:
            for digest in digests:
                if digest in self._of_file:
                    self._file[digest] = _revoked(digest, record)
                    self._forget(self._of_file[digest].name)
                elif was_known:
                    self._remember(digest, _revoked(digest, record))
        elif was_known and not record.parent:
            # Its secrets are in use here, so they are known on even if the store falls silent.
            with contextlib.suppress(StateUnavailable):
                for digest in digests - self._of_file.keys():
                    self._remember(digest, _entry(digest, record))

    # --- the store's changes --------------------------------------------------------------------

    async def watch_forever(self) -> None:
        """Look for changes of keys again and again, until cancelled."""
        forgotten_at = -math.inf
        while True:
            if await self.refresh() and self._clock() - forgotten_at >= _FORGET_EVERY_S:
                forgotten_at = self._clock()
                await self._forget_expired()
            await asyncio.sleep(POLL_S)

    async def refresh(self) -> bool:
        """One look at what has changed since the last; whether the store answered.

        The file's keys that are new are looked up too, so that their first call need not wait.
        """
        try:
            async with asyncio.timeout(_POLL_LIMIT_S):
                await self._take_changes()
                for digest in list(self._of_file.keys() - self._file.keys()):
                    if isinstance(await self._look_up(digest), StateUnavailable):
                        break
        except (StateUnavailable, TimeoutError) as error:
            # From now on "not known" might only mean "not heard of".
            self._unknown.clear()
            if not self._is_silent:
                _log.warning(
                    "the store tells nothing of keys: %s", str(error) or "no answer in time"
                )
            self._is_silent = True
            return False
        if self._is_silent:
            _log.info("the store tells of keys again")
        self._is_silent = False
        return True

    async def _take_changes(self) -> None:
        since = _NOTHING_SINCE if self._version is None else self._version
        version, records = await self._store.changed_keys(since)
        if self._version is None or version < self._version:
            # The first look, or other books than before: what is known may have changed since.
            self._forget_all()
        while version != self._version:
            self._changes += 1
            self._unknown.clear()
            for record in records:
                self.apply(record)
            self._version = version
            if records:
                # They come in batches.
                version, records = await self._store.changed_keys(version)

    def _forget_all(self) -> None:
        self._changes += 1
        self._known.clear()
        self._families.clear()
        self._unknown.clear()
        self._file.clear()

    async def _forget_expired(self) -> None:
        try:
            async with asyncio.timeout(_POLL_LIMIT_S):
                while await self._store.forget_expired(self._clock()):
                    pass
        except (StateUnavailable, TimeoutError) as error:
            _log.warning("ended sessions stay in the store: %s", _why(error))


def _entry(digest: bytes, record: KeyRecord) -> Entry:
    """Of a key's own record. Raises StateUnavailable where it cannot be understood."""
    if record.revoked_at is not None:
        return _revoked(digest, record)
    return Entry(digest, rights_of(record), record, _end(record, digest))


def _revoked(digest: bytes, record: KeyRecord) -> Entry:
    return Entry(digest, None, record, why="the API key was revoked")


def _orphan(digest: bytes, record: KeyRecord) -> Entry:
    return Entry(digest, None, record, why="the key of this session was revoked or removed")


def rights_of(record: KeyRecord) -> Key:
    """The key of a record. Raises StateUnavailable where its settings are not understood."""
    try:
        return key_of(record.name, msgspec.convert(record.settings, schema.KeySettings))
    except msgspec.ValidationError as error:
        raise StateUnavailable(
            f"the store's settings of the key {record.name!r} are not understood: {error}; was it "
            "made by another version of Rungway?"
        ) from error


def _end(record: KeyRecord, digest: bytes) -> float:
    ends = (record.digests.get(digest.hex()), record.expires_at)
    return min((end for end in ends if end is not None), default=math.inf)


def _family(record: KeyRecord) -> str:
    return record.parent or record.name


def _why(error: Exception) -> str:
    return str(error) or "no answer in time"


def _silence() -> StateUnavailable:
    return StateUnavailable(
        "the store of keys does not answer, so nobody can tell whether this key is good; ask again "
        "in a moment",
        retry_after_s=1.0,
    )
