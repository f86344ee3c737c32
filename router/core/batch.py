"""Which inputs of many callers travel together in one embeddings request, and who pays what of it.

A queue belongs to one lane: inputs that may share a request. Keys take turns by what they were
served, in tokens, so a key with thousands of inputs waits for itself and not the others for it.
Equal inputs (of one `identity`, which the caller of this module chooses to reach over keys or not)
travel once; whoever asks for one that is already under way waits for that one.

No clock: `Suspects` is told the time.
"""

from __future__ import annotations

import heapq
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from router.errors import CallerMistake, PromptTooLong, UpstreamError, UpstreamTooLarge

Caller = TypeVar("Caller", bound=Hashable)

_SUSPECTS_MAX = 4096
_SUSPECT_S = 300.0
_SEARCHED = frozenset({400, 413, 422})


@dataclass(frozen=True, slots=True)
class Limits:
    """What a backend takes: inputs and (estimated) tokens of one request, and inputs that are there
    at one time over all requests of the lane (TEI's permits)."""

    count_max: int = 32
    tokens_max: int = 1 << 30
    in_flight_max: int = 1 << 30


class Item(Generic[Caller]):
    """One input; `wants` are the callers and the index that it has for each."""

    __slots__ = ("identity", "input", "is_sent", "key_name", "tokens", "wants")

    def __init__(
        self, identity: Hashable, value: str | list[int], tokens: int, key_name: str
    ) -> None:
        self.identity = identity
        self.input = value
        self.tokens = tokens
        self.key_name = key_name
        self.wants: list[tuple[Caller, int]] = []
        self.is_sent = False


class _Row(Generic[Caller]):
    """What one key has waiting, and how much it has been served."""

    __slots__ = ("items", "key_name", "served")

    def __init__(self, key_name: str, served: int) -> None:
        self.key_name = key_name
        self.served = served
        self.items: OrderedDict[Item[Caller], None] = OrderedDict()


class Queue(Generic[Caller]):
    """What waits in one lane. `waiting` counts the inputs that are wanted and not sent."""

    def __init__(self) -> None:
        self._known: dict[Hashable, Item[Caller]] = {}
        self._rows: dict[str, _Row[Caller]] = {}
        self._turns: list[tuple[int, int, _Row[Caller]]] = []
        self._turn = 0
        self._served = 0
        self.waiting = 0

    def add(
        self,
        identity: Hashable,
        value: str | list[int],
        tokens: int,
        key_name: str,
        caller: Caller,
        index: int,
    ) -> Item[Caller]:
        """The item that this input travels as, now wanted by this caller too."""
        item = self._known.get(identity)
        if item is None:
            item = self._known[identity] = Item(identity, value, tokens, key_name)
            self._row(key_name).items[item] = None
            self.waiting += 1
        item.wants.append((caller, index))
        return item

    def put_back(self, item: Item[Caller]) -> None:
        """What was sent and forgotten is to be sent again, before what else waits of its key."""
        item.is_sent = False
        self._known[item.identity] = item
        items = self._row(item.key_name).items
        items[item] = None
        items.move_to_end(item, last=False)
        self.waiting += 1

    def waiting_of(self, key_name: str) -> int:
        """How many of what waits are this key's."""
        row = self._rows.get(key_name)
        return 0 if row is None else len(row.items)

    def take(
        self, limits: Limits, room: int, is_suspect: Callable[[Hashable], bool] | None
    ) -> list[Item[Caller]]:
        """The next request's items, at most `room`; [] where nothing waits or there is no room.

        A suspect travels with nothing but other suspects of its key.
        """
        taken: list[Item[Caller]] = []
        aside: list[_Row[Caller]] = []
        tokens, of_suspects = 0, False
        count_max = min(limits.count_max, room)
        row: _Row[Caller] | None = None
        while len(taken) < count_max:
            if row is None:
                if not self._turns:
                    break
                _, _, row = heapq.heappop(self._turns)
            if not row.items:
                del self._rows[row.key_name]
                row = None
                continue
            item = next(iter(row.items))
            suspect = is_suspect is not None and is_suspect(item.identity)
            if taken and (
                tokens + item.tokens > limits.tokens_max
                or suspect != of_suspects
                or (suspect and item.key_name != taken[0].key_name)
            ):
                aside.append(row)
                row = None
                continue
            of_suspects = suspect
            del row.items[item]
            item.is_sent = True
            taken.append(item)
            tokens += item.tokens
            self._served = row.served
            row.served += item.tokens
            if self._turns:
                self._give_turn(row)
                row = None
        if row is not None:
            # Who is alone has every turn.
            self._give_turn(row)
        for row in aside:
            self._give_turn(row)
        self.waiting -= len(taken)
        return taken

    def leave(self, item: Item[Caller], caller: Caller) -> None:
        """The caller does not want the item any more; what nobody wants is not sent."""
        item.wants = [want for want in item.wants if want[0] is not caller]
        if not item.wants and not item.is_sent:
            del self._rows[item.key_name].items[item]
            self.waiting -= 1
            self.forget(item)

    def forget(self, item: Item[Caller]) -> None:
        """The item is answered, failed or not wanted: whoever asks for its input next asks anew."""
        if self._known.get(item.identity) is item:
            del self._known[item.identity]

    def _row(self, key_name: str) -> _Row[Caller]:
        """The row in which what this key has waiting stands."""
        row = self._rows.get(key_name)
        if row is None:
            # Who was away gathered no claim meanwhile.
            row = self._rows[key_name] = _Row(key_name, self._served)
            self._give_turn(row)
        elif not row.items:
            row.served = max(row.served, self._served)
        return row

    def _give_turn(self, row: _Row[Caller]) -> None:
        self._turn += 1
        heapq.heappush(self._turns, (row.served, self._turn, row))


class Suspects:
    """Inputs that were found to spoil requests: kept by hash, for a while, and only so many."""

    def __init__(self, entries_max: int = _SUSPECTS_MAX, keep_s: float = _SUSPECT_S) -> None:
        self._entries_max = entries_max
        self._keep_s = keep_s
        self._until_s: OrderedDict[int, float] = OrderedDict()

    def __len__(self) -> int:
        return len(self._until_s)

    def mark(self, identity: Hashable, now_s: float) -> None:
        code = hash(identity)
        self._until_s[code] = now_s + self._keep_s
        self._until_s.move_to_end(code)
        while len(self._until_s) > self._entries_max:
            self._until_s.popitem(last=False)

    def has(self, identity: Hashable, now_s: float) -> bool:
        until_s = self._until_s.get(hash(identity))
        return until_s is not None and now_s < until_s


def is_searched(error: UpstreamError) -> bool:
    """Whether one bad input may have failed all that travelled with it."""
    blames = isinstance(error, CallerMistake | PromptTooLong | UpstreamTooLarge)
    return blames and error.status in _SEARCHED


def callers_of(items: Sequence[Item[Caller]]) -> list[Caller]:
    """Everyone who wants one of them, each once, in order of their first."""
    return list(dict.fromkeys(caller for item in items for caller, _ in item.wants))


def halves(items: Sequence[Item[Caller]]) -> tuple[list[Item[Caller]], list[Item[Caller]]]:
    """Two parts, with the inputs of one caller side by side: the search ends at a caller."""
    place = {caller: at for at, caller in enumerate(callers_of(items))}
    ordered = sorted(items, key=lambda item: place[item.wants[0][0]])
    return ordered[: len(ordered) // 2], ordered[len(ordered) // 2 :]


def split_exactly(total: int, weights: Sequence[int]) -> list[int]:
    """Whole shares of `total` in proportion to the weights, adding up exactly.

    What rounding leaves goes to the largest remainders. Without any weight all weigh the same.
    """
    whole = sum(weights)
    if not whole:
        weights = [1] * len(weights)
        whole = len(weights)
    shares = [total * weight // whole for weight in weights]
    rest = total - sum(shares)
    if rest:
        order = sorted(range(len(weights)), key=lambda at: -(total * weights[at] % whole))
        for at in order[:rest]:
            shares[at] += 1
    return shares


def shares_of(total: int, items: Sequence[Item[Caller]]) -> Iterator[tuple[Caller, int]]:
    """Who bears how much of a request's tokens or cost: by each input's estimate, and in equal
    parts where several want the same one."""
    if len(items) == 1 and len(items[0].wants) == 1:
        yield items[0].wants[0][0], total
        return
    parts = split_exactly(total, [item.tokens for item in items])
    for item, part in zip(items, parts, strict=True):
        if len(item.wants) == 1:
            yield item.wants[0][0], part
            continue
        shares = split_exactly(part, [1] * len(item.wants))
        yield from zip((caller for caller, _ in item.wants), shares, strict=True)
