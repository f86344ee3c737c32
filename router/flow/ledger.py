"""The ledger: calls are admitted, attempts hold and settle, all against leases in memory.

`admit`, `room` and `hold` await only where a lease does not suffice, and then the store, not for
long (`flow/asking.py`); where it suffices, their forms `..._at_once` say so without awaiting.
`grow` and `settle` never await: nothing can cancel a call between what it used and its being
written down. Every hold is settled exactly once; what was used above it is charged whole.

Each step goes to the journal first, so that a process that is killed leaves nothing out
(`store/journal.py`); the store hears of it in the background (`flow/renewal.py`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from itertools import count, islice

from router.core import accounts
from router.core.leases import Lease
from router.errors import RouterError, StateUnavailable, TooLarge
from router.flow import shortfall
from router.flow.purse import Purse, Row
from router.flow.renewal import Books, Wants
from router.store.base import RowKey
from router.types import Key, Price, Rung, Usage

# How often a hold asks the store where others draw what it was granted.
_TRIES_MAX = 8
# Of a hundred thousand purses; so that the loop does not stand still for all of them.
_LOOKED_AT_MAX = 2_000


@dataclass(slots=True)
class Admission:
    """One call that was let in. `charged`: nano-dollars of its attempts so far; None of what it
    used is in it before they are settled. `heir`: who pays for its work since it has left."""

    key: Key
    purse: Purse
    concurrent: Lease | None
    charged: int = 0
    # Its caller, and whatever goes on for it when that has left.
    parts: int = 1
    is_counted: bool = False
    is_left: bool = False
    heir: Admission | None = None

    def payer(self) -> Admission:
        """Who pays for what is set aside from now on."""
        found = self
        while found.heir is not None:
            found = found.heir
        return found


@dataclass(slots=True)
class Hold:
    """What one attempt has set aside: money and tokens, each in every account that limits them."""

    id: int
    admission: Admission
    row: Row
    price: Price
    money: tuple[Lease, ...]
    tokens: tuple[Lease, ...]
    nanousd: int = 0
    token_count: int = 0
    is_journalled: bool = False
    is_settled: bool = False


class Ledger:
    """One process's accounts. `now_s` gives unix seconds: windows are UTC."""

    def __init__(self, books: Books, clock: Callable[[], float]) -> None:
        self._books = books
        self.now_s = clock
        self._ids = count(1)
        self._purses: dict[tuple[str, str], Purse] = {}
        self.open: dict[int, Hold] = {}
        books.open_holds = self._open_holds

    # --- admission ------------------------------------------------------------------------------

    async def admit(self, key: Key, body_bytes: int) -> Admission:
        """Let a call of this size in. Raises TooLarge, RateLimited or StateUnavailable."""
        admission = self.admit_at_once(key, body_bytes)
        if admission is not None:
            return admission
        purse = self.purse(key)
        # The next minute's purse may have others once the store has answered.
        requests, concurrent = purse.requests, purse.concurrent
        await self._secure(key, [(lease, 1) for lease in purse.gates])
        return self._admitted(key, purse, requests, concurrent)

    def admit_at_once(self, key: Key, body_bytes: int) -> Admission | None:
        """Let a call of this size in; None: `admit` has to ask the store. Raises TooLarge."""
        limits = key.limits
        if limits.max_input_bytes is not None and body_bytes > limits.max_input_bytes:
            raise TooLarge(
                f"the request has {body_bytes} bytes; the key {key.name!r} may send at most "
                f"{limits.max_input_bytes} (max_input_kib)"
            )
        purse = self.purse(key)
        if purse.gates and not self._books.draw_at_once(purse.gates, 1, (), 0):
            return None
        return self._admitted(key, purse, purse.requests, purse.concurrent)

    def _admitted(
        self, key: Key, purse: Purse, requests: Lease | None, concurrent: Lease | None
    ) -> Admission:
        if requests is not None:
            self._books.spend((requests,), 1, 1)
        purse.in_flight += 1
        return Admission(key, purse, concurrent)

    def leave(self, admission: Admission, ladder: str) -> None:
        """The call is over, or a part of it; one that no rung answered is counted here."""
        assert not admission.is_left, "a call leaves once"
        admission.parts -= 1
        if admission.parts:
            return
        admission.is_left = True
        admission.purse.in_flight -= 1
        if admission.concurrent is not None:
            self._books.spend((admission.concurrent,), 1, 0)
        if not admission.is_counted:
            self.count(admission, ladder, "")

    def count(self, admission: Admission, ladder: str, rung: str) -> None:
        """Count the call as a request of this rung; "" where none was asked."""
        admission.is_counted = True
        row = self._row(admission.purse, ladder, rung)
        row.requests += 1
        self._books.settled(0, row)

    # --- holds ----------------------------------------------------------------------------------

    async def room(self, admission: Admission) -> tuple[int | None, int | None]:
        """The nano-dollars and tokens that this call might still be granted; None: no limit."""
        purse = self.purse(admission.payer().key)
        unknown = [(one, 1) for one in (*purse.money, *purse.tokens) if not one.answered]
        if unknown:
            await self._books.ask(unknown)
        return _least(purse.money), _least(purse.tokens)

    def room_at_once(self, admission: Admission) -> tuple[int | None, int | None] | None:
        """The same; None: `room` has to ask the store."""
        if admission.heir is not None:
            admission = admission.payer()
        purse = self._purse_of(admission)
        for leases in (purse.money, purse.tokens):
            for lease in leases:
                if not lease.answered:
                    return None
        return _least(purse.money), _least(purse.tokens)

    async def hold(
        self,
        admission: Admission,
        ladder: str,
        rung: Rung,
        price: Price,
        *,
        input_tokens: int,
        output_tokens: int,
    ) -> Hold:
        """Set aside what an attempt may use. Raises QuotaUsedUp, RateLimited, StateUnavailable."""
        admission = admission.payer()
        hold = self.hold_at_once(admission, ladder, rung, price, input_tokens, output_tokens)
        if hold is not None:
            return hold
        purse = self.purse(admission.key)
        money, tokens = purse.money, purse.tokens
        nanousd = accounts.cost(price, input_tokens, output_tokens)
        token_count = input_tokens + output_tokens
        wants = [(lease, nanousd) for lease in money] if nanousd else []
        wants += [(lease, token_count) for lease in tokens]
        await self._secure(admission.key, wants)
        row = self._row(purse, ladder, rung.name)
        hold = Hold(next(self._ids), admission, row, price, money, tokens, nanousd, token_count)
        if admission.heir is None:
            return self._opened(hold)
        # Its caller has left while the store was asked.
        self._give_back(hold)
        return await self.hold(
            admission,
            ladder,
            rung,
            price,
            input_tokens=input_tokens,
            output_tokens=output_tokens,
        )

    def hold_at_once(
        self,
        admission: Admission,
        ladder: str,
        rung: Rung,
        price: Price,
        input_tokens: int,
        output_tokens: int,
    ) -> Hold | None:
        """The same; None: `hold` has to ask the store. Raises StateUnavailable."""
        if admission.heir is not None:
            admission = admission.payer()
        purse = self._purse_of(admission)
        money, tokens = purse.money, purse.tokens
        nanousd = accounts.cost(price, input_tokens, output_tokens)
        token_count = input_tokens + output_tokens
        drawn_on = money if nanousd else ()
        if (drawn_on or tokens) and not self._books.draw_at_once(
            drawn_on, nanousd, tokens, token_count
        ):
            return None
        row = self._row(purse, ladder, rung.name)
        return self._opened(
            Hold(next(self._ids), admission, row, price, money, tokens, nanousd, token_count)
        )

    def _opened(self, hold: Hold) -> Hold:
        """Write down what was drawn."""
        is_limited = bool(hold.tokens or (hold.money and hold.nanousd))
        if is_limited or not hold.price.is_free:
            # What is free and unlimited leaves nothing in doubt.
            hold.is_journalled = True
            try:
                self._books.opened(hold.id, hold.row, hold.nanousd, hold.token_count)
            except StateUnavailable:
                hold.is_journalled = False
                if is_limited:
                    self._give_back(hold)
                    raise
        self.open[hold.id] = hold
        return hold

    @staticmethod
    def _give_back(hold: Hold) -> None:
        for lease in hold.money:
            lease.settle(hold.nanousd, 0)
        for lease in hold.tokens:
            lease.settle(hold.token_count, 0)

    def grow(self, hold: Hold, *, input_tokens: int, output_tokens: int) -> bool:
        """Set aside that much in all; False, and nothing is changed, where a lease has no room.

        Raises StateUnavailable.
        """
        more = self._more(hold, input_tokens, output_tokens)
        if more and (self._refuses(more) is not None or not self._books.is_current()):
            return False
        self._grown(hold, more, input_tokens, output_tokens)
        return True

    async def grow_from_store(self, hold: Hold, *, input_tokens: int, output_tokens: int) -> None:
        """The same, asking the store where a lease has no room. Raises as `hold` does."""
        more = self._more(hold, input_tokens, output_tokens)
        await self._find_room(hold.admission.key, more)
        self._grown(hold, more, input_tokens, output_tokens)

    def settle(
        self, hold: Hold, usage: Usage | None, *, answered: bool, share: int | None = None
    ) -> int:
        """Close the hold with what was really used; the nano-dollars charged.

        `share`: its part of the cost of a request that several calls shared.
        """
        assert not hold.is_settled, "a hold is settled once"
        hold.is_settled = True
        del self.open[hold.id]
        row = hold.row
        nanousd = token_count = 0
        if usage is not None:
            input_tokens, output_tokens = usage.input_tokens, usage.output_tokens
            if share is None:
                nanousd = accounts.cost(hold.price, input_tokens, output_tokens)
            else:
                nanousd = share
            token_count = input_tokens + output_tokens
            row.input_tokens += input_tokens
            row.output_tokens += output_tokens
            row.settled += nanousd
            if nanousd > hold.nanousd:
                row.overrun += nanousd - hold.nanousd
            if usage.estimated:
                row.estimated += nanousd
        if answered and not hold.admission.is_counted:
            hold.admission.is_counted = True
            row.requests += 1
        self._books.settled(hold.id, row)
        if hold.money:
            self._books.spend(hold.money, hold.nanousd, nanousd)
        if hold.tokens:
            self._books.spend(hold.tokens, hold.token_count, token_count)
        hold.admission.charged += nanousd
        return nanousd

    def hand_over(self, old: Admission, new: Admission) -> bool:
        """Let `new` pay for what `old` has set aside and what its work will; False, and nothing is
        changed, where it cannot."""
        holds = [hold for hold in self.open.values() if hold.admission is old]
        purse = self.purse(new.key)
        if purse is not old.purse and any(hold.is_journalled for hold in holds):
            nanousd = sum(hold.nanousd for hold in holds)
            token_count = sum(hold.token_count for hold in holds)
            wants = [(lease, nanousd) for lease in purse.money]
            wants += [(lease, token_count) for lease in purse.tokens]
            if self._refuses(wants) is not None or not self._books.is_current():
                return False
            self._books.draw(wants)
        for hold in holds:
            if purse is not old.purse:
                self._move(hold, purse)
            hold.admission = new
        # Who drains leaves to itself, and may come to pay again when others have left.
        old.heir, new.heir = new, None
        return True

    def _move(self, hold: Hold, purse: Purse) -> None:
        """Put an open hold into another key's accounts, where room for it was taken already."""
        ladder, rung = hold.row.key.ladder, hold.row.key.rung
        self._give_back(hold)
        hold.money, hold.tokens = purse.money, purse.tokens
        hold.row = self._row(purse, ladder, rung)
        if hold.is_journalled:
            with contextlib.suppress(StateUnavailable):
                self._books.opened(hold.id, hold.row, hold.nanousd, hold.token_count)

    # --- what is seen ---------------------------------------------------------------------------

    def purse(self, key: Key) -> Purse:
        """The key's purse, with the leases of the windows that are open now."""
        owner = (key.name, key.session)
        purse = self._purses.get(owner)
        now_s = self.now_s()
        if purse is None:
            purse = self._purses[owner] = Purse(key)
            purse.open(key, now_s, self._books.lease)
        elif not purse.since <= now_s < purse.until or purse.key is not key:
            purse.open(key, now_s, self._books.lease)
        purse.used_at = now_s
        return purse

    def _purse_of(self, admission: Admission) -> Purse:
        purse = admission.purse
        if purse.key is admission.key and purse.since <= self.now_s() < purse.until:
            return purse
        return self.purse(admission.key)

    def held(self) -> dict[RowKey, int]:
        """The nano-dollars held now, by what usage is counted by."""
        found: dict[RowKey, int] = {}
        for hold in self.open.values():
            if hold.nanousd:
                found[hold.row.key] = found.get(hold.row.key, 0) + hold.nanousd
        return found

    def forget_idle(self, idle_s: float) -> None:
        """Drop the purses that nobody used for so long, of some that are looked at in turn: they
        are made again at the next call."""
        horizon = self.now_s() - idle_s
        for owner, purse in list(islice(self._purses.items(), _LOOKED_AT_MAX)):
            del self._purses[owner]
            if purse.in_flight or purse.used_at >= horizon:
                self._purses[owner] = purse
            else:
                purse.close()

    def refusal(self, key: Key, price: Price | None, input_tokens: int) -> RouterError | None:
        """Why this key cannot pay for such a prompt here, as far as is known; advice for plans."""
        purse = self.purse(key)
        if purse.money and price is not None:
            least = accounts.cost(price, input_tokens, 1)
            for lease in purse.money:
                if least and lease.is_known_to_lack(least):
                    return self._refused(key, lease, least)
        for lease in purse.tokens:
            if lease.is_known_to_lack(input_tokens + 1):
                return self._refused(key, lease, input_tokens + 1)
        return None

    # --- inside ---------------------------------------------------------------------------------

    async def _secure(self, key: Key, wants: Wants) -> None:
        """Hold all of it, or nothing and raise."""
        await self._find_room(key, wants)
        self._books.draw(wants)

    async def _find_room(self, key: Key, wants: Wants) -> None:
        """Return where the leases have room for all of it now, or raise."""
        lease = self._refuses(wants)
        tries = 0
        while lease is not None or not self._books.is_current():
            tries += 1
            await self._books.ask(wants)
            if not self._books.is_current():
                raise shortfall.unavailable(key, self._books.trouble)
            lease = self._refuses(wants)
            # Who came meanwhile may have drawn what was granted, while the store has more.
            if lease is not None and (tries == _TRIES_MAX or self._is_all(lease, wants)):
                raise self._refused(key, lease, _wanted(wants, lease))

    def _is_all(self, lease: Lease, wants: Wants) -> bool:
        """Whether to ask again is in vain."""
        return bool(self._books.trouble) or lease.room + lease.free < _wanted(wants, lease)

    @staticmethod
    def _refuses(wants: Wants) -> Lease | None:
        for lease, amount in wants:
            if not lease.has_room(amount):
                return lease
        return None

    def _more(self, hold: Hold, input_tokens: int, output_tokens: int) -> Wants:
        nanousd = accounts.cost(hold.price, input_tokens, output_tokens) - hold.nanousd
        token_count = input_tokens + output_tokens - hold.token_count
        return [
            *((lease, nanousd) for lease in hold.money),
            *((lease, token_count) for lease in hold.tokens),
        ]

    def _grown(self, hold: Hold, more: Wants, input_tokens: int, output_tokens: int) -> None:
        nanousd = accounts.cost(hold.price, input_tokens, output_tokens)
        token_count = input_tokens + output_tokens
        if hold.is_journalled:
            try:
                self._books.grown(hold.id, nanousd, token_count)
            except StateUnavailable:
                if more:
                    raise
        self._books.draw(more)
        hold.nanousd, hold.token_count = nanousd, token_count

    def _row(self, purse: Purse, ladder: str, rung: str) -> Row:
        row = purse.rows.get((ladder, rung))
        if row is None:
            row = self._books.row(purse.row_key(ladder, rung))
            purse.rows[ladder, rung] = row
        return row

    def _open_holds(self) -> list[tuple[int, Row, int, int]]:
        return [
            (hold.id, hold.row, hold.nanousd, hold.token_count)
            for hold in self.open.values()
            if hold.is_journalled
        ]

    def _refused(self, key: Key, lease: Lease, amount: int) -> RouterError:
        return shortfall.refused(key, lease, amount, self.now_s(), self._books.trouble)


def _least(leases: tuple[Lease, ...]) -> int | None:
    least = None
    for lease in leases:
        room = lease.granted - lease.spent - lease.held + lease.free
        if least is None or room < least:
            least = room
    return least


def _wanted(wants: Wants, lease: Lease) -> int:
    return next(amount for one, amount in wants if one is lease)
