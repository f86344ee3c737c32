"""The ledger's dealings with its journal and its store: leases renewed, usage reported.

One exchange with the store is under way at a time. It goes every second while something changed,
at once where a hold waits for it, and every few seconds otherwise, so that the store knows that
this process lives. Each says all there is to say in absolute numbers, so that one that got lost, or
came twice, does no harm.

While the store cannot be reached, calls go on within the leases, for `lease_s` of the last answer.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import islice

from router.core.accounts import Account, Meter, window_end, window_start
from router.core.leases import Ask, Lease
from router.errors import StateUnavailable
from router.flow.asking import ASK_S, is_answered
from router.flow.purse import Row
from router.store.base import LedgerStore, RowKey, StateLost, Totals
from router.store.journal import Journal, JournalFull

_log = logging.getLogger("rungway")

_REPORT_EVERY_S = 1.0
_HEARTBEAT_S = 5.0
_AFTER_TROUBLE_S = 0.5
# A block that nobody drew on for so long goes back, for other processes to use.
_IDLE_S = 5.0
# In one exchange, so that nobody who comes meanwhile waits for long; the rest goes with the next.
_AT_ONCE_MAX = 1_000
# Of what can wait: where nobody waits, and where somebody does.
_ALONE_MAX, _BESIDE_MAX = 300, 100
# Leases that are looked at in each round, or as many that all had their turn after some rounds.
_TIDIED_AT_ONCE, _TIDY_EVERY_S = 1_000, 0.1
_TIDY_ROUNDS = 30
# A refusal of the store is not questioned again for so long.
_SURE_S = 1.0
# Rows that the store knows, in case a call's hold or the clock reaches back to their day.
_ROWS_KEPT_S = 2 * 86_400
_REWRITE_AGAIN_S = 10.0
_TROUBLE_CHARS_MAX = 200
Wants = Sequence[tuple[Lease, int]]


class Books:
    """`boot_clock` gives seconds that no change of the wall clock moves, sleep included."""

    def __init__(
        self,
        store: LedgerStore,
        process: str,
        boot_clock: Callable[[], float],
        wall_clock: Callable[[], float],
        *,
        ask_s: float = ASK_S,
    ) -> None:
        self._ask_s = ask_s
        self._store = store
        self._journal: Journal | None = None
        self._wall_clock = wall_clock
        self.process = process
        self.boot_s = boot_clock
        self.open_holds: Callable[[], list[tuple[int, Row, int, int]]] = list
        self.trouble = ""
        self._is_lost = False
        self.version = 0
        self.live = 1
        self._leases: dict[Account, Lease] = {}
        # In the order in which they came: a plain dict looks through all that went before.
        self._due: OrderedDict[Account, Lease] = OrderedDict()
        self._rows: dict[RowKey, Row] = {}
        self._unreported: OrderedDict[RowKey, Row] = OrderedDict()
        self._number = 0
        self._current_until = 0.0
        self._rewrite_after = 0.0
        self._ask_after = 0.0
        self._waiting: deque[tuple[asyncio.Future[None], Wants]] = deque()
        self._wake = asyncio.Event()
        self._has_more = False
        self._returning: set[Account] = set()
        # To what limits, until the store knows.
        self._lowered: dict[Account, int] = {}
        self._order: deque[Lease] = deque()
        self._row_order: deque[Row] = deque()
        self._rows_of: dict[str, list[Row]] = {}
        self._before: dict[tuple[str, int], int] = {}

    # --- what the ledger tells ------------------------------------------------------------------

    def lease(self, account: Account, limit: int) -> Lease:
        lease = self._leases.get(account)
        if lease is None:
            lease = self._leases[account] = Lease(account, limit, spent=self._spent(account))
            self._order.append(lease)
        elif limit < lease.limit:
            self._lower(lease, limit)
        lease.limit = limit
        return lease

    def _lower(self, lease: Lease, limit: int) -> None:
        """Nothing more is drawn on what a larger limit allowed; the store hears of that first."""
        used = lease.spent + lease.held
        lease.granted = min(lease.granted, used)
        lease.free = max(0, min(lease.free, limit - used))
        if lease.asked:
            # What is on its way was granted under the larger one.
            self._number += 1
            lease.asked = lease.answered = self._number
        self._lowered[lease.account] = limit
        self._due[lease.account] = lease

    def row(self, key: RowKey) -> Row:
        row = self._rows.get(key)
        if row is None:
            row = self._rows[key] = Row(key)
            self._row_order.append(row)
            self._rows_of.setdefault(key.key, []).append(row)
        return row

    def spend(self, leases: Iterable[Lease], held: int, spent: int) -> None:
        """Turn what was held of each of these into what was used."""
        for lease in leases:
            lease.settle(held, spent)
            self._due[lease.account] = lease

    def draw_at_once(
        self, money: Iterable[Lease], nanousd: int, tokens: Iterable[Lease], token_count: int
    ) -> bool:
        """Hold these amounts, where the leases have room for all of it and may still be spent;
        else nothing."""
        now = self.boot_s()
        if now >= self._current_until:
            return False
        for lease in money:
            if not lease.has_room(nanousd):
                return False
        for lease in tokens:
            if not lease.has_room(token_count):
                return False
        for lease in money:
            if lease.draw(nanousd, now):
                self._renew(lease)
        for lease in tokens:
            if lease.draw(token_count, now):
                self._renew(lease)
        return True

    def draw(self, wants: Wants) -> None:
        """Hold what there is known to be room for."""
        now = self.boot_s()
        for lease, amount in wants:
            if lease.draw(amount, now):
                self._renew(lease)

    def _renew(self, lease: Lease) -> None:
        """Ask for the next block before this one is used up."""
        lease.low = 0
        self._due[lease.account] = lease
        self._wake.set()

    def totals_of(self, key: RowKey) -> Totals | None:
        """What is counted in a row so far; None: nothing."""
        row = self._rows.get(key)
        return row.totals() if row is not None and any(row.amounts()) else None

    def opened(self, hold: int, row: Row, nanousd: int, tokens: int) -> None:
        """Raises StateUnavailable where the journal takes no more: then nothing may be held."""
        if self._journal is not None:
            try:
                self._journal.opened(hold, row.key, nanousd, tokens)
            except JournalFull as error:
                raise StateUnavailable(str(error)) from error

    def grown(self, hold: int, nanousd: int, tokens: int) -> None:
        """Raises StateUnavailable as `opened` does."""
        if self._journal is not None:
            try:
                self._journal.grown(hold, nanousd, tokens)
            except JournalFull as error:
                raise StateUnavailable(str(error)) from error

    def settled(self, hold: int, row: Row) -> None:
        """A hold is closed (0: there was none), or the row has changed."""
        self._unreported[row.key] = row
        journal = self._journal
        if journal is not None:
            journal.settled(hold, row.key, row.amounts())
            if journal.is_nearly_full and self.boot_s() > self._rewrite_after:
                self._rewrite(journal)

    def is_current(self) -> bool:
        """Whether the leases may still be spent: the store was heard of not long ago."""
        return self.boot_s() < self._current_until

    async def ask(self, wants: Wants) -> None:
        """Ask the store for what these leases lack; returns when it answered, or has not in time.

        What the leases then grant is for the caller to see. What the store said a moment ago that
        it cannot give is not asked for again.
        """
        if self.is_current() and self._is_hopeless(wants):
            return
        if self.boot_s() < self._ask_after:
            return
        for lease, _ in wants:
            self._due[lease.account] = lease
        answered = asyncio.get_running_loop().create_future()
        self._waiting.append((answered, wants))
        self._wake.set()
        try:
            await is_answered(answered, self._ask_s)
        finally:
            is_late = answered.cancel()
        if is_late:
            self.trouble = self.trouble or f"the store did not answer within {self._ask_s:g} s"

    def _is_hopeless(self, wants: Wants) -> bool:
        fresh = self.boot_s() - _SURE_S
        return any(
            lease.answered_at > fresh and lease.room + lease.free < amount
            for lease, amount in wants
        )

    # --- the exchange ---------------------------------------------------------------------------

    async def run(self) -> None:
        """Report and renew until cancelled: the one place that talks to the store of budgets."""
        heard_at = self.boot_s()
        while True:
            wait_s = _AFTER_TROUBLE_S if self.trouble else _REPORT_EVERY_S
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(wait_s):
                    await self._wake.wait()
            self._wake.clear()
            self._tidy()
            is_due = self._due or self._unreported or self._waiting or self.trouble
            if is_due or self.boot_s() - heard_at >= _HEARTBEAT_S:
                await self._sync()
                heard_at = self.boot_s()

    async def start(self, journal: Journal | None) -> None:
        """The first exchange, which makes this process known. Raises StateUnavailable."""
        self._journal = journal
        await self._sync()
        if self.trouble:
            raise StateUnavailable(self.trouble)

    async def flush(self) -> None:
        """Report all that is known now; in vain where the store does not answer."""
        await self.ask(())

    async def end(self) -> None:
        """The process ends well: its leases go back, and its journal is not needed any more."""
        rows = {key: row.totals() for key, row in self._rows.items()}
        try:
            await self._store.end(self.process, rows)
        except StateUnavailable as error:
            kept = "is lost" if self._journal is None else "stays in the journal for the next start"
            _log.error("the last usage %s: %s", kept, error)
            if self._journal is not None:
                self._journal.close(delete=False)
            return
        if self._journal is not None:
            self._journal.close(delete=True)

    async def _sync(self) -> None:
        served, needs = self._next_waiting()
        try:
            await self._exchange(needs)
        finally:
            now = self.boot_s()
            for answered, wants in served:
                self._note_answer(wants, now)
                if not answered.done():
                    answered.set_result(None)
        if self._waiting or (self._has_more and not self.trouble):
            # More than one exchange carries: the next goes at once.
            self._wake.set()

    def _note_answer(self, wants: Wants, now: float) -> None:
        """What suffices is not given back before who waits for it has drawn on it; what does not,
        and idles, goes back whoever asks for more of it: others may have the rest."""
        suffices = all(lease.room >= amount for lease, amount in wants)
        for lease, _ in wants:
            if suffices:
                lease.used_at = now
            elif lease.room > 0 and lease.used_at + _IDLE_S <= now:
                self._returning.add(lease.account)
                self._due[lease.account] = lease

    def _next_waiting(self) -> tuple[list[tuple[asyncio.Future[None], Wants]], dict[Account, int]]:
        """Who is served by the next exchange, the longest waiting first, and what they need."""
        served: list[tuple[asyncio.Future[None], Wants]] = []
        needs: dict[Account, int] = {}
        while self._waiting and len(needs) < _AT_ONCE_MAX:
            answered, wants = self._waiting.popleft()
            if answered.done():
                continue
            served.append((answered, wants))
            for lease, amount in wants:
                needs[lease.account] = needs.get(lease.account, 0) + amount
        return served, needs

    async def _exchange(self, needs: Mapping[Account, int]) -> None:
        beside = _BESIDE_MAX if needs else _ALONE_MAX
        self._has_more = len(self._due) > len(needs) + beside or len(self._unreported) > beside
        asks, rows = self._asks(needs, beside), self._reports(beside)
        asked_at = self.boot_s()
        try:
            answer = await self._store.sync(self.process, asks, rows)
        except StateUnavailable as error:
            self._failed(error)
            return
        except Exception as error:
            # The edge of a background task: without it every limited key would end with its lease.
            _log.exception("an exchange with the store failed in a way nobody foresaw")
            self._failed(StateUnavailable(f"the store failed ({type(error).__name__})"))
            return
        if self.trouble:
            _log.info("the store of budgets answers again")
            self.trouble, self._is_lost = "", False
        self.version, self.live = answer.version, answer.live
        self._current_until = asked_at + answer.lease_s
        now = self.boot_s()
        for grant in answer.grants:
            lease = self._leases.get(grant.account)
            if lease is not None:
                lease.take(grant)
                lease.low, lease.answered_at = lease.room // 2, now
        for ask in asks:
            if self._lowered.get(ask.account) == ask.limit:
                del self._lowered[ask.account]
        if answer.is_behind:
            _log.error("ALARM: the store had forgotten what this process said; saying it again")
            self._unreported.update(self._rows)
            self._due.update(self._leases)
            return
        for key, totals in rows.items():
            row = self._unreported.get(key)
            if row is not None and row.totals() == totals:
                del self._unreported[key]

    def _asks(self, needs: Mapping[Account, int], beside: int) -> list[Ask]:
        """What somebody waits for goes first."""
        rest = (account for account in self._due if account not in needs)
        chosen = [*needs, *islice(rest, beside)]
        for account in chosen:
            self._due.pop(account, None)
        returning = self._returning.intersection(chosen)
        self._returning -= returning
        asks = []
        for account in chosen:
            lease = self._leases.get(account)
            if lease is None:
                self._lowered.pop(account, None)
                continue
            if account in self._lowered:
                asks.append(self._ask(lease, 0, gives_back=True))
            asks.append(self._ask(lease, 0 if account in returning else needs.get(account, 0)))
        return asks

    def _ask(self, lease: Lease, need: int, *, gives_back: bool = False) -> Ask:
        self._number += 1
        lease.asked = self._number
        keep = self._is_open(lease) and (need > 0 or lease.used_at + _IDLE_S > self.boot_s())
        keep = keep and not gives_back
        floor = lease.spent + lease.held
        if not keep:
            # At once: nothing may be drawn on what the store is just told to have back.
            lease.granted = floor
        return Ask(lease.account, self._number, lease.limit, lease.spent, floor, need, keep)

    def _failed(self, error: StateUnavailable) -> None:
        is_lost = isinstance(error, StateLost)
        if is_lost and not self._is_lost:
            _log.error(
                "ALARM: %s. Restore the state, or start again with --adopt-state to go on with "
                "what is there",
                error,
            )
        elif not self.trouble:
            _log.error("ALARM: the store of budgets fails, calls go on within leases: %s", error)
        self._is_lost = is_lost
        self.trouble = error.message[:_TROUBLE_CHARS_MAX]
        self._ask_after = self.boot_s() + _AFTER_TROUBLE_S / 2
        # What was said may not have arrived.
        for lease in self._leases.values():
            if lease.asked > lease.answered:
                self._due[lease.account] = lease

    def _reports(self, most: int) -> dict[RowKey, Totals]:
        keys = list(islice(self._unreported, most))
        return {key: self._unreported[key].totals() for key in keys}

    def _is_open(self, lease: Lease) -> bool:
        _, meter, start = lease.account
        end = window_end(meter, start)
        return end is None or self._wall_clock() < end

    def _tidy(self) -> None:
        """Look at some of the leases and rows: give back what idles, forget what is over."""
        now = self.boot_s()
        count = len(self._order)
        for _ in range(min(count, max(_TIDIED_AT_ONCE, count // _TIDY_ROUNDS))):
            lease = self._order.popleft()
            if lease.used_at < now - _IDLE_S and lease.asked == lease.answered:
                if lease.room > 0:
                    self._due[lease.account] = lease
                elif self._is_over(lease, now):
                    del self._leases[lease.account]
                    continue
            self._order.append(lease)
        horizon = self._wall_clock() - _ROWS_KEPT_S
        while self._row_order and self._row_order[0].key.day < horizon:
            row = self._row_order.popleft()
            if row.key in self._unreported:
                self._row_order.append(row)
                break
            self._forget(row)

    def _is_over(self, lease: Lease, now: float) -> bool:
        """Nothing can come of it any more that the store does not know."""
        if lease.users or lease.held or lease.account in self._due:
            return False
        if lease.account.window:
            return not self._is_open(lease)
        return not lease.spent or lease.used_at < now - _ROWS_KEPT_S

    def _forget(self, row: Row) -> None:
        """Not what was spent: a month's limit that is set later counts it."""
        del self._rows[row.key]
        key = row.key.key
        self._rows_of[key].remove(row)
        month = window_start(Meter.USD_MONTH, row.key.day)
        self._before[key, month] = self._before.get((key, month), 0) + row.settled

    def _spent(self, account: Account) -> int:
        """What this process spent of an account before it had a lease of it."""
        owner, meter, start = account
        end = window_end(meter, start)
        rows = [
            row
            for row in self._rows_of.get(owner, ())
            if start <= row.key.day and (end is None or row.key.day < end)
        ]
        if meter in (Meter.USD_DAY, Meter.USD_MONTH):
            before = self._before.get((owner, start), 0) if meter is Meter.USD_MONTH else 0
            return before + sum(row.settled for row in rows)
        if meter is Meter.TOKENS_DAY:
            return sum(row.input_tokens + row.output_tokens for row in rows)
        return 0

    def _rewrite(self, journal: Journal) -> None:
        """Keep only what the store does not know yet."""
        rows = {key: row.totals() for key, row in self._unreported.items()}
        holds = [(hold, row.key, usd, tokens) for hold, row, usd, tokens in self.open_holds()]
        rows.update((row.key, row.totals()) for _, row, _, _ in self.open_holds())
        try:
            journal.rewrite(rows, holds)
        except OSError as error:
            # It goes on in the old one, which grows as long as it can.
            self._rewrite_after = self.boot_s() + _REWRITE_AGAIN_S
            _log.error("the journal cannot be written anew: %s", error.strerror)
