"""What outlives a process: budgets, usage, keys, kept answers. Each in a small interface.

One engine implements all of them: SQLite in one file for one host (and in memory for none), Valkey
for several hosts. `tests/store/contract.py` holds both to the same behaviour.

Every method may raise `StateUnavailable`: the engine is slow, locked, full or gone. A method that
raised may have happened or not; each of them can be said again without harm. No method is on the
path of a call but where a lease does not suffice, a key is seen for the first time, or the client
sent an Idempotency-Key.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from router.core.leases import Ask, Grant
from router.errors import StateUnavailable
from router.types import Json

# Amounts beyond it lose their last digits in Valkey's scripts; nine million dollars are enough.
AMOUNT_MAX = 2**53 - 1


class StateRefused(Exception):
    """The state cannot be opened: the message names the place, what is wrong and how to mend it."""


class StateLost(StateUnavailable):
    """The books are not the ones that this store opened: the data was lost or replaced.

    Nothing was changed. It passes only when somebody says `adopt_epoch`, since with empty books
    every limit would start from nothing.
    """

    code = "state_lost"


class RowKey(NamedTuple):
    """What usage is counted by. `day`: the start of the UTC day of the call's hold, unix seconds.

    `session`: the id of the session whose key was used, "" for the key itself; it is not shown but
    budgets are counted by it. `rung` "": no rung answered.
    """

    day: int
    key: str
    session: str
    ladder: str
    rung: str


class Totals(NamedTuple):
    """What one process counted in one row, ever; amounts of money in nano-dollars.

    `settled` includes `overrun` (charged beyond its hold) and `estimated` (not reported by the
    upstream); `in_doubt` is apart: holds of a process that died, which may or may not be spent.
    """

    requests: int = 0
    input_tokens: int = 0
    output_tokens: int = 0
    settled: int = 0
    overrun: int = 0
    estimated: int = 0
    in_doubt: int = 0


class Sync(NamedTuple):
    """The answer to one exchange. `lease_s`: for how long the process may go on without another,
    counted from before it asked. `version` grows with every change of a key. `is_behind`: the
    engine forgot something that this process had said (a failover), so that it should say all of
    its rows and leases again.
    """

    grants: list[Grant]
    live: int
    lease_s: float
    version: int
    is_behind: bool = False


class UsageLine(NamedTuple):
    """`group` has the values of what was asked to be grouped by, in that order."""

    group: tuple[str, ...]
    totals: Totals


class LedgerStore(Protocol):
    """Budgets and usage. A process is known by an id that no other ever has.

    What processes report is absolute: `rows` are their totals ever (of the rows that are named; the
    others stay as they were), and a smaller number than is known already changes nothing.

    Rows count in their accounts whether there is a limit or not, so that a limit that is new in
    mid-window knows what was spent before: money and tokens of a day and a month by key, money by
    session. In the account of its own process a row is the same money as `Ask.spent`, and the
    larger of both counts.
    """

    async def sync(self, process: str, asks: Sequence[Ask], rows: Mapping[RowKey, Totals]) -> Sync:
        """Report, renew and ask (`core.leases.grant`); the first of a process makes it known.

        Grants come in the order of the asks. Places (`Meter.CONCURRENT`) of a process that was not
        heard of for longer than its lease are free for others, and it asks for them anew. Of a
        process that was ended, it raises `StateUnavailable`: its id is used up.
        """
        ...

    async def end(self, process: str, rows: Mapping[RowKey, Totals]) -> None:
        """A process ended, well or not, and this is all that it ever counted, `in_doubt` included.

        Its leases end: what was spent (by its rows) and in doubt stays counted in every account,
        the rest is free again. Of a minute's account, which no row tells of, all that it was
        granted counts as spent; it should give back first. Said of a process that was ended
        already it changes nothing; one that was never heard of (the store was gone all its life)
        is counted. A long history is moved in parts: where it raises, some may have happened, and
        said again it goes on from there.
        """
        ...

    async def silent(self) -> Mapping[str, int]:
        """By key, the nano-dollars in the hands of processes that were not heard of for longer
        than their leases: neither spent nor free until they end or somebody resolves them."""
        ...

    async def usage(
        self, group: Sequence[str], *, key: str | None, since: int, until: int
    ) -> list[UsageLine]:
        """Totals of all processes by some of "key", "ladder", "rung", "day" (ISO date), sorted.

        `key`: of this one only. `since` and `until`: days, the second exclusive, in unix seconds.
        """
        ...

    async def resolve(self, key: str | None, *, charge: bool) -> int:
        """Clear what is in doubt of this key, or of all: charge it as settled, or let it go.

        What silent processes hold beyond what they reported is free again, whichever is said; one
        that comes back after all goes on from there. Returns the nano-dollars that were in doubt.
        """
        ...

    async def epoch(self) -> str:
        """The id of the books that are there, made when they were empty."""
        ...

    def expect_epoch(self, epoch: str) -> None:
        """Take no other books than these, from before this process (its journal knows them). From
        now on all but `epoch` and `adopt_epoch` raise `StateLost` where others are found; without
        it, the first that are found are expected."""
        ...

    async def adopt_epoch(self) -> str:
        """Go on with the books that are there, empty ones made where there are none; their id."""
        ...


@dataclass(frozen=True, slots=True)
class KeyRecord:
    """A key made at run time, or the tombstone of one of the file's.

    `settings` are those of a [keys.NAME] table, `sha256` left out. `digests` maps the hexadecimal
    SHA-256 of a secret to the unix second at which it ends (None: never); after a rotation there
    are two for a while. A session is a record with a `parent` and an `expires_at`.
    """

    name: str
    settings: Json
    digests: Mapping[str, float | None]
    created_at: float
    expires_at: float | None = None
    parent: str = ""
    revoked_at: float | None = None


class KeyStore(Protocol):
    async def find_key(self, digest: str) -> KeyRecord | None:
        """The record that has this digest, revoked and expired ones too."""
        ...

    async def get_key(self, name: str) -> KeyRecord | None: ...

    async def put_key(self, record: KeyRecord, *, is_new: bool) -> bool:
        """Write it whole. False, and nothing is changed, where `is_new` and the name is taken (by
        another record than this), or where the one there is revoked and this one is not: revoked is
        for good."""
        ...

    async def list_keys(self, *, after: str, limit: int, sessions: bool) -> list[KeyRecord]:
        """In the order of their names, those behind `after`; sessions or the others."""
        ...

    async def changed_keys(self, since: int) -> tuple[int, list[KeyRecord]]:
        """The version now, and the records that changed after that version, oldest first. At most
        a batch: then the version is the last one's, and is below `Sync.version`."""
        ...

    async def forget_expired(self, now: float) -> int:
        """Delete the records of sessions that ended more than a day before, and their budgets: how
        many. At most a batch, so that it is said again while it returns something."""
        ...


class KeptAnswer(NamedTuple):
    """An answer under an Idempotency-Key. `body` None: it is still being made by `process`."""

    fingerprint: str
    process: str
    body: bytes | None = None
    status: int = 0
    headers: Mapping[str, str] = {}


class AnswerStore(Protocol):
    """Answers by Idempotency-Key: bounded in size and kept for a limited time."""

    async def claim_answer(
        self, key: str, name: str, mine: KeptAnswer, *, ttl_s: float
    ) -> KeptAnswer | None:
        """Claim the name for `mine.process`; None where it is this process's now, else what is
        there. A claim of a process that is not alive any more (ended; or silent, and claimed longer
        ago than a lease lasts) is taken over."""
        ...

    async def keep_answer(self, key: str, name: str, answer: KeptAnswer, *, ttl_s: float) -> None:
        """Put the answer in the place of the claim of the same process. One that is too large is
        dropped with its claim; the oldest go where the key's share or the whole is full."""
        ...

    async def get_answer(self, key: str, name: str) -> KeptAnswer | None: ...

    async def drop_answer(self, key: str, name: str, process: str) -> None:
        """Give up the claim, so that a repeat runs anew."""
        ...


class EntryKeys(NamedTuple):
    """Some of the cache's keys. `place`: where the next ones begin; `is_all`: there are no more at
    the moment. `entries`: about how many there are in all."""

    keys: list[bytes]
    place: str
    is_all: bool
    entries: int


class CacheStore(Protocol):
    """The second tier of the cache: bytes by key, with an end, bounded by the engine's limit.

    The oldest go first; an entry that is too large for a share of it is not kept.
    """

    async def entry_keys(self, place: str, limit: int) -> EntryKeys:
        """The keys of all entries, in parts: first (with "" as the place) of those that are there,
        in no order, then of what is written later. Some may come twice, and some of entries that
        are gone. At a place that is of other books it begins anew."""
        ...

    async def get_entries(self, cache_keys: Sequence[bytes]) -> list[bytes | None]: ...

    async def put_entries(
        self, entries: Sequence[tuple[bytes, bytes]], *, group: str, ttl_s: float
    ) -> None: ...

    async def drop_entries(self, group: str) -> int:
        """Drop all of a group; how many."""
        ...


class Store(LedgerStore, KeyStore, AnswerStore, CacheStore, Protocol):
    """One engine. `is_shared`: whether other hosts may use it too."""

    is_shared: bool

    async def aclose(self) -> None: ...
