"""Leases: how processes share a budget without asking anybody for each call. Pure, both sides.

A process takes blocks of an account from the store (`grant`) and spends them in memory (`Lease`).
What keeps it exact:

- What a process says is absolute: all that it ever spent of the account, and the least that its
  grant must be. A message that comes twice, or late, changes nothing that a newer one said.
- The sum of all grants never passes the limit, and a grant is given back only by its owner: a
  process that is not heard of any more keeps what it had until somebody knows what it spent.
- A block is at most 1/(4 x live processes) of what is left, so that no process starves the others,
  and as large as one hold needs where that is more.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from router.core.accounts import Account

_BLOCK_DIVISOR = 4


class Ask(NamedTuple):
    """What a process tells of one lease and wants. `number` grows with each ask of the process.

    `limit`: the account's. `spent`: settled by this process, ever. `floor`: spent + held, below
    which the grant may not fall. `need`: what a hold waits for beyond the floor, 0 where nobody
    waits. `keep`: whether to hold a block beyond that; False gives all back that is not held.
    """

    account: Account
    number: int
    limit: int
    spent: int
    floor: int
    need: int
    keep: bool


class Row(NamedTuple):
    """The store's side of one lease. `granted` includes what was spent."""

    granted: int = 0
    spent: int = 0
    number: int = 0


class Grant(NamedTuple):
    """The answer to one ask. `granted` includes what this process has spent.

    `settled` is what all processes have said to have spent, doubts included; `free` what nobody
    holds. What is neither is in the hands of processes, and may come back.
    """

    account: Account
    number: int
    granted: int
    settled: int
    free: int


def grant(ask: Ask, row: Row, others_granted: int, live: int) -> Row:
    """The lease's new row. `others_granted`: grants of all other leases, what ended ones spent,
    and doubts. `live`: how many processes there are, this one included.
    """
    if ask.number <= row.number:
        return row
    spent = max(row.spent, ask.spent)
    floor = max(ask.floor, spent)
    granted = max(row.granted, floor)
    if not ask.keep and not ask.need:
        # Given back, even what a larger limit once allowed.
        return Row(floor, spent, ask.number)
    free = max(0, ask.limit - others_granted - granted)
    block = free // (_BLOCK_DIVISOR * max(1, live))
    wanted = max(0, floor + ask.need - granted)
    return Row(granted + min(free, max(wanted, block)), spent, ask.number)


@dataclass(slots=True)
class Lease:
    """A process's side of one account: what it may still spend is `granted - spent - held`.

    Only the ledger changes it, by synchronous calls. `free` and `settled` are as the store said
    last; `asked` is the number of the last ask sent, `answered` of the last answer taken. With less
    room than `low` it is time to ask for the next block. `users`: how many hold on to this
    object, since an account may have only one.
    """

    account: Account
    limit: int
    granted: int = 0
    spent: int = 0
    held: int = 0
    free: int = 0
    settled: int = 0
    asked: int = 0
    answered: int = 0
    low: int = 0
    used_at: float = 0.0
    answered_at: float = 0.0
    users: int = 0

    @property
    def room(self) -> int:
        return self.granted - self.spent - self.held

    def has_room(self, amount: int) -> bool:
        """Whether this can be set aside. Nothing always can."""
        return amount <= 0 or amount <= self.granted - self.spent - self.held

    def is_known_to_lack(self, amount: int) -> bool:
        """Whether so much is not left of the limit, whoever holds it, as far as the store said."""
        used = self.settled if self.settled > self.spent else self.spent
        return self.answered > 0 and self.limit - used < amount

    def draw(self, amount: int, now: float) -> bool:
        """Set aside what there is room for; whether it is time to ask for the next block."""
        self.held += amount
        self.used_at = now
        return self.free > 0 and self.granted - self.spent - self.held < self.low

    def settle(self, held: int, spent: int) -> None:
        """Turn a hold into what was really used, which may be more."""
        self.held -= held
        self.spent += spent

    def take(self, answer: Grant) -> None:
        """An answer of the store. An older one than was taken already says nothing."""
        if answer.number < self.answered:
            return
        self.answered = answer.number
        self.granted = answer.granted
        self.free = answer.free
        self.settled = answer.settled
