"""The state on a Valkey or Redis server, for processes of several hosts.

Each method is one script (`valkey_scripts`), run by `valkey_link`. Time is the server's, so that
hosts whose clocks differ agree on who is alive.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

import orjson

from router.core.accounts import Account, Meter, day_of, window_start
from router.core.leases import Ask, Grant
from router.errors import StateUnavailable
from router.store import terms, valkey_scripts
from router.store.base import EntryKeys, KeptAnswer, KeyRecord, RowKey, Sync, Totals, UsageLine
from router.store.valkey_link import PREFIX, ValkeyLink

_ENTRY_BYTES = 128
_DROP_ENTRIES = 1_000
_USAGE_BATCH = 500
_SCAN_BATCH = 2_000
_USAGE_TRIES = 3
_DAY_S = 86_400


class ValkeyStore:
    """A `Store`; made by `open`."""

    is_shared = True

    def __init__(
        self,
        link: ValkeyLink,
        *,
        now: Callable[[], float] | None = None,
        lease_s: float = terms.LEASE_S,
        bounds: terms.Bounds | None = None,
    ) -> None:
        self._link = link
        self._now = now
        self._lease_s = lease_s
        self._bounds = bounds or terms.Bounds()
        # By process: the number of its last exchange that was answered, and of the last one sent.
        self._answered: dict[str, int] = {}
        self._turns: dict[str, int] = {}

    @classmethod
    async def open(
        cls,
        url: str,
        *,
        username: str | None = None,
        password: str | None = None,
        now: Callable[[], float] | None = None,
        lease_s: float = terms.LEASE_S,
        bounds: terms.Bounds | None = None,
    ) -> ValkeyStore:
        """Reach the server and look whether it will do. Raises StateRefused."""
        link = ValkeyLink(url, username=username, password=password, now=now)
        await link.open()
        return cls(link, now=now, lease_s=lease_s, bounds=bounds)

    async def aclose(self) -> None:
        await self._link.aclose()

    async def epoch(self) -> str:
        return await self._link.epoch(adopt=False)

    def expect_epoch(self, epoch: str) -> None:
        self._link.expect_epoch(epoch)

    async def adopt_epoch(self) -> str:
        return await self._link.epoch(adopt=True)

    # --- budgets and usage ----------------------------------------------------------------------

    async def sync(self, process: str, asks: Sequence[Ask], rows: Mapping[RowKey, Totals]) -> Sync:
        """In parts where it is long: while a script runs, no other host is answered."""
        reports = [_row(key, totals) for key, totals in rows.items()]
        size = terms.SCRIPT_BATCH
        answers = []
        # Rows first: an account knows then what its process spent before it asks.
        for start in range(0, max(1, len(reports)), size):
            is_last = start + size >= len(reports)
            some = asks[:size] if is_last else ()
            answers.append(await self._exchange(process, some, reports[start : start + size]))
        for start in range(size, len(asks), size):
            answers.append(await self._exchange(process, asks[start : start + size], []))
        return answers[-1]._replace(
            grants=[grant for answer in answers for grant in answer.grants],
            is_behind=any(answer.is_behind for answer in answers),
        )

    async def _exchange(
        self, process: str, asks: Sequence[Ask], reports: Sequence[list[Any]]
    ) -> Sync:
        turn = self._turns.get(process, 0) + 1
        self._turns[process] = turn
        answered = self._answered.get(process, 0)
        asks = [terms.bounded(ask) for ask in asks]
        try:
            found = await self._link.run(
                valkey_scripts.SYNC,
                {
                    "process": process,
                    "lease_s": self._lease_s,
                    "turn": turn,
                    "rows": reports,
                    "asks": [_ask(ask) for ask in asks],
                },
            )
        except StateUnavailable as error:
            if "STATEENDED" in error.message:
                raise StateUnavailable(
                    f"the process {process} was ended by another in {self._link.place}"
                ) from error
            raise
        live, version, said, *amounts = found
        self._answered[process] = max(turn, self._answered.get(process, 0))
        grants = [
            Grant(ask.account, ask.number, *amounts[place * 3 : place * 3 + 3])
            for place, ask in enumerate(asks)
        ]
        return Sync(grants, live, self._lease_s, version, is_behind=said < answered)

    async def end(self, process: str, rows: Mapping[RowKey, Totals]) -> None:
        reports = [_row(key, totals) for key, totals in rows.items()]
        size = terms.SCRIPT_BATCH
        whose = {"process": process, "lease_s": self._lease_s, "limit": size}
        for start in range(0, max(1, len(reports)), size):
            is_last = start + size >= len(reports)
            part = {**whose, "rows": reports[start : start + size], "is_last": is_last}
            await self._link.run(valkey_scripts.END_REPORT, part)
        for script in (valkey_scripts.END_LEASES, valkey_scripts.END_USAGE):
            while await self._link.run(script, whose):
                pass
        self._turns.pop(process, None)
        self._answered.pop(process, None)

    async def silent(self) -> Mapping[str, int]:
        found = await self._link.run(valkey_scripts.SILENT, {"lease_s": self._lease_s})
        return terms.in_hands(
            (process.decode(), owner.decode(), meter.decode(), amount)
            for process, owner, meter, amount in found
        )

    async def usage(
        self, group: Sequence[str], *, key: str | None, since: int, until: int
    ) -> list[UsageLine]:
        terms.check_group(group)
        today = day_of((self._now or time.time)())
        since = max(since, today - terms.USAGE_KEPT_S)
        # A host whose clock is ahead counts tomorrow already.
        until = min(until, today + 2 * _DAY_S)
        for _ in range(_USAGE_TRIES):
            sums: dict[tuple[str, ...], Totals] = {}
            before = await self._moves()
            for row, totals in await self._rows(key, range(day_of(since), until, _DAY_S)):
                if since <= row.day < until and key in (None, row.key):
                    place = tuple(_shown(row, name) for name in group)
                    sums[place] = _sum(sums.get(place, Totals()), totals)
            if await self._moves() == before:
                return [UsageLine(place, sums[place]) for place in sorted(sums)]
        raise StateUnavailable(f"the usage in {self._link.place} changed while it was read")

    async def _moves(self) -> bytes | None:
        """It changes when rows go from a process to what ended ones left."""
        [found] = await self._link.read_all([("GET", f"{PREFIX}moves")])
        return found  # type: ignore[no-any-return]

    async def _rows(self, key: str | None, days: Iterable[int]) -> list[tuple[RowKey, Totals]]:
        found: list[tuple[RowKey, Totals]] = []
        [running] = await self._link.read_all([("ZRANGE", f"{PREFIX}heard", "0", "-1")])
        # Of one that was ended, rows may be on their way.
        [ended] = await self._link.read_all([("ZREVRANGE", f"{PREFIX}ended", "0", "99")])
        for process in {*running, *ended}:
            for field, text in (await self._scan(f"{PREFIX}rows:{process.decode()}", key)).items():
                day, owner, session, ladder, rung, _ = orjson.loads(field)
                found.append((RowKey(day, owner, session, ladder, rung), _totals(text)))
        places: list[tuple[int, str]] = [(day, key) for day in days if key is not None]
        if key is None:
            days = list(days)
            members = await self._link.read_all(
                [("SMEMBERS", f"{PREFIX}keysof:{day}") for day in days]
            )
            places = [
                (day, owner.decode())
                for day, owners in zip(days, members, strict=True)
                for owner in owners
            ]
        names = [f"{PREFIX}used:{day}:{owner}" for day, owner in places]
        hashes = await self._read_hashes(names)
        for (day, owner), fields in zip(places, hashes, strict=True):
            for field, text in fields:
                session, ladder, rung, _ = orjson.loads(field)
                found.append((RowKey(day, owner, session, ladder, rung), _totals(text)))
        return found

    async def _read_hashes(self, names: Sequence[str]) -> list[list[tuple[bytes, bytes]]]:
        found: list[list[tuple[bytes, bytes]]] = []
        for start in range(0, len(names), _USAGE_BATCH):
            batch = names[start : start + _USAGE_BATCH]
            for fields in await self._link.read_all([("HGETALL", name) for name in batch]):
                # The client makes a dict of what the server sends as a list.
                found.append(list(fields.items()))
        return found

    async def _scan(self, name: str, key: str | None) -> dict[bytes, bytes]:
        """A large hash, in parts between which others have their turn."""
        matching = () if key is None else ("MATCH", f"*,{_as_glob(orjson.dumps(key).decode())},*")
        found: dict[bytes, bytes] = {}
        cursor = "0"
        while True:
            command = ("HSCAN", name, cursor, *matching, "COUNT", str(_SCAN_BATCH))
            [(following, fields)] = await self._link.read_all([command])
            found.update(fields)
            cursor = str(int(following))
            if cursor == "0":
                return found

    async def resolve(self, key: str | None, *, charge: bool) -> int:
        arguments: dict[str, Any] = {"lease_s": self._lease_s, "charge": charge}
        if key is not None:
            arguments["key"] = key
        return int(await self._link.run(valkey_scripts.RESOLVE, arguments))

    # --- keys -----------------------------------------------------------------------------------

    async def find_key(self, digest: str) -> KeyRecord | None:
        found = await self._link.run(valkey_scripts.FIND_KEY, {"digest": digest})
        return terms.load_record(found) if found else None

    async def get_key(self, name: str) -> KeyRecord | None:
        found = await self._link.run(valkey_scripts.FIND_KEY, {"name": name})
        return terms.load_record(found) if found else None

    async def put_key(self, record: KeyRecord, *, is_new: bool) -> bool:
        found = await self._link.run(
            valkey_scripts.PUT_KEY,
            {
                "name": record.name,
                "record": terms.dump_record(record).decode(),
                "digests": list(record.digests),
                "parent": record.parent,
                "ends_at": terms.ends_at(record),
                "is_new": is_new,
                "is_revoked": record.revoked_at is not None,
            },
        )
        return bool(found)

    async def list_keys(self, *, after: str, limit: int, sessions: bool) -> list[KeyRecord]:
        found = await self._link.run(
            valkey_scripts.LIST_KEYS, {"after": after, "limit": limit, "sessions": sessions}
        )
        return [terms.load_record(text) for text in found]

    async def changed_keys(self, since: int) -> tuple[int, list[KeyRecord]]:
        version, *records = await self._link.run(
            valkey_scripts.CHANGED_KEYS, {"since": since, "limit": terms.CHANGED_KEYS_MAX}
        )
        return version, [terms.load_record(text) for text in records]

    async def forget_expired(self, now: float) -> int:
        arguments = {"before": now - terms.EXPIRED_KEPT_S, "limit": terms.FORGET_KEYS_MAX}
        return int(await self._link.run(valkey_scripts.FORGET_EXPIRED, arguments))

    # --- answers under an Idempotency-Key -------------------------------------------------------

    async def claim_answer(
        self, key: str, name: str, mine: KeptAnswer, *, ttl_s: float
    ) -> KeptAnswer | None:
        found = await self._link.run(
            valkey_scripts.CLAIM_ANSWER,
            {
                "id": _answer_id(key, name),
                "fingerprint": mine.fingerprint,
                "process": mine.process,
                "ttl_s": ttl_s,
                "lease_s": self._lease_s,
            },
        )
        return _answer(found)

    async def keep_answer(self, key: str, name: str, answer: KeptAnswer, *, ttl_s: float) -> None:
        size = terms.answer_bytes(answer)
        is_kept = size <= self._bounds.answer_bytes_max
        await self._link.run(
            valkey_scripts.KEEP_ANSWER,
            {
                **self._bounds._asdict(),
                "id": _answer_id(key, name),
                "key": key,
                "process": answer.process,
                "status": answer.status,
                "headers": orjson.dumps(dict(answer.headers)).decode(),
                "size": size,
                "ttl_s": ttl_s,
            },
            (answer.body or b"") if is_kept else b"",
        )

    async def get_answer(self, key: str, name: str) -> KeptAnswer | None:
        arguments = {"id": _answer_id(key, name)}
        return _answer(await self._link.run(valkey_scripts.GET_ANSWER, arguments))

    async def drop_answer(self, key: str, name: str, process: str) -> None:
        arguments = {"id": _answer_id(key, name), "process": process}
        await self._link.run(valkey_scripts.DROP_ANSWER, arguments)

    # --- the cache's second tier ----------------------------------------------------------------

    async def get_entries(self, cache_keys: Sequence[bytes]) -> list[bytes | None]:
        if not cache_keys:
            return []
        names = [cache_key.hex() for cache_key in cache_keys]
        found = await self._link.run(valkey_scripts.GET_ENTRIES, {"names": names})
        return [body or None for body in found]

    async def entry_keys(self, place: str, limit: int) -> EntryKeys:
        """A place is the turn of the last entry that was seen."""
        asked = {"seen": int(place or 0), "limit": limit}
        found, entries, seen = await self._link.run(valkey_scripts.ENTRY_KEYS, asked)
        keys = [bytes.fromhex(name.decode()) for name in found[::2]]
        place = (found[-1] if found else seen).decode()
        return EntryKeys(keys, place, len(keys) < limit, entries)

    async def put_entries(
        self, entries: Sequence[tuple[bytes, bytes]], *, group: str, ttl_s: float
    ) -> None:
        kept = [
            (cache_key.hex(), body)
            for cache_key, body in entries
            if len(body) + _ENTRY_BYTES <= self._bounds.entry_bytes_max
        ]
        await self._link.run(
            valkey_scripts.PUT_ENTRIES,
            {
                "names": [name for name, _ in kept],
                "group": group,
                "ttl_s": ttl_s,
                "entry_bytes": _ENTRY_BYTES,
                "cache_bytes_max": self._bounds.cache_bytes_max,
            },
            *(body for _, body in kept),
        )

    async def drop_entries(self, group: str) -> int:
        dropped = 0
        arguments = {"group": group, "limit": _DROP_ENTRIES}
        while True:
            seen: int
            some: int
            seen, some = await self._link.run(valkey_scripts.DROP_ENTRIES, arguments)
            dropped += some
            if not seen:
                return dropped


def _lease_id(account: Account) -> str:
    return f"{account.meter.value}:{account.window}:{account.owner}"


def _row(key: RowKey, totals: Totals) -> list[Any]:
    """As the script `report` reads it."""
    month = window_start(Meter.USD_MONTH, key.day)
    one_of_each = Totals(input_tokens=1, settled=1)
    accounts = [
        (
            _lease_id(account),
            terms.forgotten_at(account),
            "tokens" if account.meter is Meter.TOKENS_DAY else "money",
        )
        for account, _ in terms.counted_in(key, one_of_each)
    ]
    name = orjson.dumps([*key, month]).decode()
    return [name, [terms.within(amount) for amount in totals], accounts]


def _ask(ask: Ask) -> dict[str, Any]:
    return {
        "id": _lease_id(ask.account),
        "places": ask.account.meter is Meter.CONCURRENT,
        "forgotten_at": terms.forgotten_at(ask.account),
        "number": ask.number,
        "limit": ask.limit,
        "spent": ask.spent,
        "floor": ask.floor,
        "need": ask.need,
        "keep": ask.keep,
    }


def _totals(text: bytes) -> Totals:
    return Totals(*map(int, text.split(b",")))


def _sum(one: Totals, other: Totals) -> Totals:
    return Totals(*(first + second for first, second in zip(one, other, strict=True)))


def _as_glob(text: str) -> str:
    return "".join(f"\\{letter}" if letter in "\\*?[]^" else letter for letter in text)


def _shown(row: RowKey, name: str) -> str:
    if name == "day":
        return datetime.fromtimestamp(row.day, UTC).date().isoformat()
    return str(getattr(row, name))


def _answer_id(key: str, name: str) -> str:
    """No two pairs have the same; the scripts read the key back from it."""
    return f"{len(key.encode())}:{key}{name}"


def _answer(found: list[bytes | None] | None) -> KeptAnswer | None:
    if found is None:
        return None
    fingerprint, process, body, status, headers, *_ = found
    assert fingerprint is not None
    assert process is not None
    return KeptAnswer(
        fingerprint.decode(),
        process.decode(),
        body,
        int(status or 0),
        orjson.loads(headers) if headers else {},
    )
