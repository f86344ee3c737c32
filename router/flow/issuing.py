"""Keys made, shown, rotated and revoked while the daemon runs, and the sessions of keys.

Only the SHA-256 of a secret is kept: the secret itself is handed out once, by whoever made it. The
file's keys are read-only; revoking one writes a tombstone with its digest. A revoked key stays
revoked, and its name stays taken, since what it used is counted under it.

A session is a secret that ends by itself, with its key's rights and budget but never `admin`. Its
id begins with its key's name, so that the sessions of one key stand together in the store.
"""

from __future__ import annotations

import asyncio
import hashlib
import secrets
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace

from router.errors import Conflict, Forbidden, RateLimited, StateUnavailable, UnknownKey
from router.flow.keys import KeyBook, rights_of
from router.store.base import KeyRecord, KeyStore
from router.types import Json, Key

SESSION_MARK = "~"  # no key's name has one
_SECRET_BYTES = 32
_LIMIT_S = 5.0
# Secrets of one key that still end: more of them are a mistake.
_SECRETS_MAX = 8
# A key's sessions: so many at once, and then one each so many seconds.
_SESSIONS_AT_ONCE = 1000
_SESSION_EVERY_S = 1.0
_MINTERS_MAX = 10_000


@dataclass(frozen=True, slots=True)
class Shown:
    """A key as it may be shown. `digests`: of its secrets, in hexadecimal, each with its end."""

    key: Key
    in_file: bool
    digests: Mapping[str, float | None]
    created_at: float | None
    revoked_at: float | None


class Issuer:
    """`clock` gives unix seconds. Every method may raise StateUnavailable."""

    def __init__(self, store: KeyStore, book: KeyBook, clock: Callable[[], float]) -> None:
        self._store = store
        self._book = book
        self._clock = clock
        # A record is read, changed and written whole, so one at a time.
        self._writing = asyncio.Lock()
        self._minted: dict[str, float] = {}

    # --- keys -----------------------------------------------------------------------------------

    async def create(self, name: str, settings: Json) -> tuple[Shown, str]:
        """A new key of these settings, which are sound, and its secret. Raises Conflict."""
        secret, digest = _new_secret("rk")
        record = KeyRecord(name, settings, {digest: None}, self._clock())
        async with self._bounded(
            f"whether {name!r} was made is not known: ask again, and if the name is taken by then, "
            "rotate it"
        ):
            taken = self._book.file_key(name) is not None
            if taken or not await self._store.put_key(record, is_new=True):
                raise Conflict(
                    f"there is a key {name!r} already, or there was one; choose another name",
                    code="name_taken",
                    param="name",
                )
        self._book.apply(record)
        return _of_record(record), secret

    async def show(self, name: str) -> Shown:
        """Raises UnknownKey."""
        async with self._bounded():
            record = await self._record(name)
        shown = self._merged(name, record)
        if shown is None:
            raise _unknown(name)
        return shown

    async def page(self, after: str, limit: int) -> tuple[list[Shown], bool]:
        """Keys by name, those behind `after`; and whether there are more."""
        async with self._bounded():
            records = await self._store.list_keys(after=after, limit=limit + 1, sessions=False)
        found = {record.name: record for record in records}
        in_file = sorted(key.name for key in self._book.file_keys().values() if key.name > after)
        names = sorted({*found, *in_file[: limit + 1]})[: limit + 1]
        page = [self._merged(name, found.get(name)) for name in names[:limit]]
        return [one for one in page if one is not None], len(names) > limit

    async def revoke(self, name: str) -> Shown:
        """End a key and its sessions, for good. Raises UnknownKey."""
        async with self._bounded(), self._writing:
            record, in_file = await self._record(name), self._book.file_key(name)
            digests = dict(record.digests) if record is not None else {}
            if in_file is not None:
                digests.setdefault(in_file[0].hex(), None)
            if not digests:
                raise _unknown(name)
            now = self._clock()
            if record is None:
                record = KeyRecord(name, {}, digests, now, revoked_at=now)
            if record.revoked_at is None or digests.keys() != record.digests.keys():
                record = replace(record, digests=digests, revoked_at=now)
            # Also where it stands so already: another process may have been told to rotate it.
            await self._store.put_key(record, is_new=False)
        self._book.apply(record)
        shown = self._merged(name, record)
        assert shown is not None
        return shown

    async def rotate(self, name: str, overlap_s: float) -> tuple[Shown, str]:
        """A new secret; all others end after `overlap_s` at the latest.

        Raises UnknownKey, and Conflict where the key is the file's or revoked.
        """
        secret, digest = _new_secret("rk")
        async with self._bounded("rotate it again"), self._writing:
            if self._book.file_key(name) is not None:
                raise Conflict(
                    f"the key {name!r} stands in the configuration: put a new sha256 there "
                    f"(`rungway keys create {name} --offline` prints one) and reload",
                    code="key_in_file",
                )
            record = await self._record(name)
            if record is None:
                raise _unknown(name)
            now = self._clock()
            digests = _ending(record.digests, now, now + overlap_s)
            if len(digests) >= _SECRETS_MAX:
                raise Conflict(
                    f"the key {name!r} has {len(digests)} secrets that have not ended yet; rotate "
                    "it with a shorter overlap_s",
                    code="too_many_secrets",
                    param="overlap_s",
                )
            rotated = replace(record, digests={**digests, digest: None})
            # Another process may have revoked it since it was read.
            if record.revoked_at or not await self._store.put_key(rotated, is_new=False):
                raise Conflict(
                    f"the key {name!r} was revoked, for good; make one of another name",
                    code="key_revoked",
                )
            record = rotated
        self._book.apply(record)
        return _of_record(record), secret

    # --- sessions -------------------------------------------------------------------------------

    async def mint(self, parent: Key, ttl_s: float, usd: float | None) -> tuple[KeyRecord, str]:
        """A session of this key, and its secret. Raises Forbidden or RateLimited."""
        if parent.session:
            raise Forbidden("a session cannot make sessions; use its key")
        now = self._clock()
        self._pace(parent.name, now)
        secret, digest = _new_secret("rs")
        record = KeyRecord(
            f"{parent.name}{SESSION_MARK}{secrets.token_hex(12)}",
            {} if usd is None else {"usd": usd},
            {digest: None},
            now,
            expires_at=now + ttl_s,
            parent=parent.name,
        )
        async with self._bounded():
            await self._store.put_key(record, is_new=True)
        self._book.apply(record)
        return record, secret

    async def sessions(self, parent: str, after: str, limit: int) -> tuple[list[KeyRecord], bool]:
        """A key's sessions in the order of their ids, those behind `after`; whether more follow."""
        start = parent + SESSION_MARK
        async with self._bounded():
            found = await self._store.list_keys(
                after=max(start, after), limit=limit + 1, sessions=True
            )
        own = [record for record in found if record.name.startswith(start)]
        return own[:limit], len(own) > limit

    async def end_session(self, caller: Key, id: str) -> KeyRecord:
        """End a session of one's own, or as an admin any. Raises UnknownKey."""
        async with self._bounded(), self._writing:
            record = await self._store.get_key(id)
            if record is None or not record.parent or not _may_end(caller, record):
                raise UnknownKey("there is no such session of this key", code="session_not_found")
            if record.revoked_at is None:
                record = replace(record, revoked_at=self._clock())
                await self._store.put_key(record, is_new=False)
        self._book.apply(record)
        return record

    def _pace(self, name: str, now: float) -> None:
        """Each session stays in the store for a while, so a key may not make them without end."""
        due = max(self._minted.pop(name, now), now) + _SESSION_EVERY_S
        wait_s = due - now - _SESSIONS_AT_ONCE * _SESSION_EVERY_S
        if wait_s > 0:
            self._minted[name] = due - _SESSION_EVERY_S
            raise RateLimited(
                f"the key {name!r} makes sessions too fast; one each {_SESSION_EVERY_S:g} s",
                retry_after_s=wait_s,
            )
        self._minted[name] = due
        if len(self._minted) > _MINTERS_MAX:
            del self._minted[next(iter(self._minted))]

    # --- both -----------------------------------------------------------------------------------

    async def _record(self, name: str) -> KeyRecord | None:
        """A key's record, and not a session's."""
        record = await self._store.get_key(name)
        return None if record is None or record.parent else record

    def _merged(self, name: str, record: KeyRecord | None) -> Shown | None:
        """The file goes before the store; a tombstone is of both."""
        in_file = self._book.file_key(name)
        if in_file is None:
            return None if record is None else _of_record(record)
        digest, key = in_file[0].hex(), in_file[1]
        if record is None:
            return Shown(key, True, {digest: None}, None, None)
        is_revoked = record.revoked_at is not None and digest in record.digests
        digests = (
            {digest: None} if record.revoked_at is not None else {**record.digests, digest: None}
        )
        return Shown(key, True, digests, None, record.revoked_at if is_revoked else None)

    @asynccontextmanager
    async def _bounded(self, hint: str = "ask again in a moment") -> AsyncIterator[None]:
        try:
            async with asyncio.timeout(_LIMIT_S):
                yield
        except TimeoutError as error:
            raise StateUnavailable(
                f"the store of keys did not answer within {_LIMIT_S:g} s; {hint}",
                retry_after_s=_LIMIT_S,
            ) from error


def _of_record(record: KeyRecord) -> Shown:
    # A tombstone has no settings: the file that had them is another one now.
    return Shown(rights_of(record), False, record.digests, record.created_at, record.revoked_at)


def _ending(
    digests: Mapping[str, float | None], now: float, latest: float
) -> dict[str, float | None]:
    """Those that have not ended, each of them by `latest`."""
    ends = {one: latest if end is None else min(end, latest) for one, end in digests.items()}
    return {one: end for one, end in ends.items() if end > now}


def _may_end(caller: Key, record: KeyRecord) -> bool:
    if caller.session:
        return caller.session == record.name
    return caller.admin or caller.name == record.parent


def _new_secret(prefix: str) -> tuple[str, str]:
    secret = f"{prefix}-{secrets.token_urlsafe(_SECRET_BYTES)}"
    return secret, hashlib.sha256(secret.encode()).hexdigest()


def _unknown(name: str) -> UnknownKey:
    return UnknownKey(f"there is no key {name[:64]!r}")
