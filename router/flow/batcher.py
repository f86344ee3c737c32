"""Embeddings of many callers in few upstream requests: what gathers while some are under way.

A lane is what may share a request: same rung, credential and parameters. A call that finds room in
its lane is sent at once, by its own task; while `batches_in_flight` requests are under way the rest
gathers, and goes as one, in a task of its own, when the first of them is back. So batches grow with
the load, and an idle daemon adds no wait and no task.

Every caller gets its own vectors, in its own order, or an error that is its own: of a request that
is refused for its content, the bad input is searched by halving, and only its callers hear of it.
A caller that leaves takes out what was not sent; a request that nobody waits for is cancelled, and
one whose own caller leaves is asked again for those who had joined it. Each request is paid for by
those who shared it, to the last token.

No clock of its own: each caller limits its waiting, and a request lives while one of them waits.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from router.core import embeddings
from router.core.batch import (
    Item,
    Limits,
    Queue,
    Suspects,
    callers_of,
    halves,
    is_searched,
    shares_of,
    split_exactly,
)
from router.errors import (
    Draining,
    RouterError,
    UpstreamBroken,
    UpstreamBusy,
    UpstreamError,
    UpstreamTooLarge,
)
from router.flow.gate import NotLetIn
from router.flow.tasks import Tasks
from router.types import Embeddings, Usage

BATCHES_IN_FLIGHT = 2
# Inputs of one lane: sixteen of the largest requests.
WAITING_MAX = 32_768

Inputs = Sequence[str | list[int]]
Send = Callable[[Any], Awaitable[Embeddings]]


@dataclass(slots=True)
class Counts:
    """`inputs` that callers asked for, those that were `sent`, and the `requests` they went in."""

    calls: int = 0
    inputs: int = 0
    sent: int = 0
    requests: int = 0


@dataclass(slots=True)
class Tab:
    """What one call has to pay for so far; also right after it was cancelled, or has failed."""

    tokens: int = 0
    nanousd: int = 0
    estimated: bool = False

    @property
    def usage(self) -> Usage:
        return Usage(self.tokens, 0, self.estimated)


class _Caller:
    """One call that waits for its vectors."""

    __slots__ = ("_turn", "error", "items", "missing", "send", "tab", "vectors")

    def __init__(self, count: int, send: Send, tab: Tab) -> None:
        self._turn: asyncio.Future[None] | None = None
        self.error: BaseException | None = None
        self.vectors: list[bytes] = [b""] * count
        self.missing = count
        self.items: dict[Item[_Caller], None] = {}
        self.send = send
        self.tab = tab

    @property
    def is_served(self) -> bool:
        return not self.missing or self.error is not None

    async def served(self) -> None:
        """Returns once it has its vectors or an error."""
        self._turn = asyncio.get_running_loop().create_future()
        await self._turn

    def take(self, index: int, vector: bytes) -> None:
        self.vectors[index] = vector
        self.missing -= 1
        if not self.missing:
            self._wake()

    def fail(self, error: BaseException) -> None:
        if not self.is_served:
            self.error = error
            self._wake()

    def _wake(self) -> None:
        if self._turn is not None and not self._turn.done():
            self._turn.set_result(None)


class _Batch:
    """Items on their way: `open` are those without an answer yet, `asked` those of the request that
    is under way (a search asks for one part after another). Without a `task` its caller's runs it.
    """

    __slots__ = ("asked", "items", "open", "task")

    def __init__(self, items: list[Item[_Caller]]) -> None:
        self.items = items
        self.open = dict.fromkeys(items)
        self.asked: set[Item[_Caller]] = set()
        self.task: asyncio.Task[None] | None = None


class _Lane:
    """What shares requests."""

    def __init__(self, key: Hashable, limits: Limits, cost: Callable[[Usage], int]) -> None:
        self.key = key
        self.limits = limits
        self.cost = cost
        self.queue: Queue[_Caller] = Queue()
        self.batches = 0
        self.inputs = 0
        self.batch_of: dict[Item[_Caller], _Batch] = {}
        # What those who left were charged for items that are still on their way.
        self.prepaid: dict[Item[_Caller], tuple[int, int]] = {}


def _free(_: Usage) -> int:
    return 0


class Batcher:
    """`clock` gives monotonic seconds."""

    def __init__(
        self,
        tasks: Tasks,
        clock: Callable[[], float],
        *,
        batches_in_flight: int = BATCHES_IN_FLIGHT,
        waiting_max: int = WAITING_MAX,
    ) -> None:
        self._tasks = tasks
        self._clock = clock
        self._batches_in_flight = batches_in_flight
        self._waiting_max = waiting_max
        self._lanes: dict[Hashable, _Lane] = {}
        self._suspects = Suspects()
        self.counts = Counts()

    def __len__(self) -> int:
        """How many lanes have something waiting or under way."""
        return len(self._lanes)

    async def embed(
        self,
        lane_key: Hashable,
        key_name: str,
        inputs: Inputs,
        limits: Limits,
        send: Send,
        *,
        owner: Hashable = None,
        cost: Callable[[Usage], int] = _free,
        tab: Tab | None = None,
    ) -> Embeddings:
        """One vector for each input, in order, with this call's share of the usage.

        `lane_key` names all that must be equal for inputs to share a request; `send` puts one such
        request upstream, `cost` is its price in nano-dollars. Equal inputs of one `owner` (left
        out: the key) travel once. Raises what `send` raised, or
        UpstreamBusy where too much waits already.
        """
        lane = self._lanes.get(lane_key)
        if lane is None:
            lane = self._lanes[lane_key] = _Lane(lane_key, limits, cost)
        lane.limits, lane.cost = limits, cost
        if lane.queue.waiting:
            self._check_room(lane, key_name, len(inputs))
        is_free = not lane.queue.waiting and lane.batches < self._batches_in_flight
        self.counts.calls += 1
        self.counts.inputs += len(inputs)
        caller = _Caller(len(inputs), send, tab if tab is not None else Tab())
        owner = key_name if owner is None else owner
        for index, value in enumerate(inputs):
            identity = (owner, value if isinstance(value, str) else tuple(value))
            tokens = embeddings.estimate_tokens((value,))
            item = lane.queue.add(identity, value, tokens, key_name, caller, index)
            caller.items[item] = None
        try:
            if is_free and lane.queue.waiting == len(caller.items):
                await self._lead(lane, caller)
            else:
                self._pump(lane)
            if not caller.is_served:
                await caller.served()
        finally:
            if caller.items:
                self._leave(lane, caller)
        if caller.error is not None:
            raise caller.error
        if len(inputs) > 1 and len({len(vector) for vector in caller.vectors}) > 1:
            raise UpstreamBroken("the rung answered with vectors of different lengths")
        return Embeddings(caller.vectors, caller.tab.usage)

    def _check_room(self, lane: _Lane, key_name: str, count: int) -> None:
        """Raises UpstreamBusy. One key may fill half of the lane, so that others find room; and
        what is alone in its lane may be of any size."""
        waiting, own = lane.queue.waiting, lane.queue.waiting_of(key_name)
        if waiting + count > self._waiting_max and waiting:
            raise UpstreamBusy(f"{waiting} inputs wait for this rung already")
        if own + count > self._waiting_max // 2 and own:
            raise UpstreamBusy(f"{own} inputs of this key wait for this rung already")

    def _pump(self, lane: _Lane) -> None:
        """Send what may be sent."""
        while lane.queue.waiting and lane.batches < self._batches_in_flight:
            batch = self._next(lane)
            if batch is None:
                break
            self._spawn(lane, batch)
        if not lane.batches and not lane.queue.waiting and self._lanes.get(lane.key) is lane:
            del self._lanes[lane.key]

    def _next(self, lane: _Lane) -> _Batch | None:
        """What is to be sent now, which counts as under way; None: there is no room for it."""
        is_suspect = partial(self._is_suspect, lane, self._clock()) if self._suspects else None
        # One request must always be possible, or nothing would ever move.
        room = max(lane.limits.in_flight_max - lane.inputs, 0 if lane.batches else 1)
        items = lane.queue.take(lane.limits, room, is_suspect)
        if not items:
            return None
        batch = _Batch(items)
        lane.batches += 1
        lane.inputs += len(items)
        for item in items:
            lane.batch_of[item] = batch
        return batch

    def _is_suspect(self, lane: _Lane, now_s: float, identity: Hashable) -> bool:
        return self._suspects.has((lane.key, identity), now_s)

    async def _lead(self, lane: _Lane, caller: _Caller) -> None:
        """All that waits is this caller's: where it goes in one request, its own task sends it."""
        batch = self._next(lane)
        if batch is not None and len(batch.items) < len(caller.items):
            self._spawn(lane, batch)
            batch = None
        if batch is None:
            self._pump(lane)
            return
        try:
            await self._run(lane, batch)
        except asyncio.CancelledError:
            self._forsaken(lane, batch, caller)
            raise
        except BaseException as fault:
            self._failed(lane, batch, list(batch.open), fault)
            raise
        finally:
            self._over(lane, batch)

    def _spawn(self, lane: _Lane, batch: _Batch) -> None:
        batch.task = self._tasks.spawn(self._run(lane, batch), "embeddings batch")
        # Not in the task's own finally: cancelled before its first step, it never runs at all.
        batch.task.add_done_callback(partial(self._ended, lane, batch))

    async def _run(self, lane: _Lane, batch: _Batch) -> None:
        """Bring the batch to its end: each of its items is answered, failed, or not wanted."""
        try:
            parts = [batch.items]
            while parts:
                items = self._wanted(lane, batch, parts.pop())
                if not items:
                    continue
                batch.asked = set(items)
                self.counts.requests += 1
                self.counts.sent += len(items)
                try:
                    answer = await items[0].wants[0][0].send([item.input for item in items])
                    if len(answer.vectors) != len(items):
                        words = f"{len(answer.vectors)} vectors for {len(items)} inputs"
                        raise UpstreamBroken(f"the rung answered with {words}")
                except UpstreamError as error:
                    parts += self._refused(lane, batch, items, error)
                else:
                    self._answered(lane, batch, items, answer)
        except (RouterError, NotLetIn) as error:
            self._failed(lane, batch, list(batch.open), error)

    def _ended(self, lane: _Lane, batch: _Batch, task: asyncio.Task[None]) -> None:
        fault: BaseException | None = None
        if task.cancelled():
            fault = Draining("Rungway is going down and could not wait for these embeddings")
        fault = fault or task.exception()
        if fault is not None:
            self._failed(lane, batch, list(batch.open), fault)
        self._over(lane, batch)

    def _over(self, lane: _Lane, batch: _Batch) -> None:
        """The batch has ended: others have room."""
        lane.batches -= 1
        lane.inputs -= len(batch.items)
        self._pump(lane)

    def _wanted(
        self, lane: _Lane, batch: _Batch, items: list[Item[_Caller]]
    ) -> list[Item[_Caller]]:
        """Those that somebody waits for; nobody may join the others any more."""
        wanted = [item for item in items if item.wants]
        if len(wanted) < len(items):
            self._close(lane, batch, [item for item in items if not item.wants])
        return wanted

    def _answered(
        self, lane: _Lane, batch: _Batch, items: list[Item[_Caller]], answer: Embeddings
    ) -> None:
        """To each caller its vectors and its share of the bill."""
        usage = answer.usage
        if not usage.input_tokens and usage.estimated:
            usage = Usage(sum(item.tokens for item in items), estimated=True)
        tokens, nanousd = usage.input_tokens, lane.cost(usage)
        if lane.prepaid:
            before = [lane.prepaid.pop(item, (0, 0)) for item in items]
            tokens = max(0, tokens - sum(paid[0] for paid in before))
            nanousd = max(0, nanousd - sum(paid[1] for paid in before))
        wanted = [item for item in items if item.wants]
        for caller, share in shares_of(tokens, wanted):
            caller.tab.tokens += share
            caller.tab.estimated |= usage.estimated
        if nanousd:
            for caller, share in shares_of(nanousd, wanted):
                caller.tab.nanousd += share
        self._close(lane, batch, items)
        for item, vector in zip(items, answer.vectors, strict=True):
            for caller, index in item.wants:
                caller.items.pop(item, None)
                caller.take(index, vector)

    def _refused(
        self, lane: _Lane, batch: _Batch, items: list[Item[_Caller]], error: UpstreamError
    ) -> list[list[Item[_Caller]]]:
        """What is still to be asked after a failure; else its callers have heard of it."""
        items = self._wanted(lane, batch, items)
        # One caller's mistake is all of its call's; a size may be that of all inputs together.
        is_size = isinstance(error, UpstreamTooLarge)
        guilty = len(items) == 1 or (len(callers_of(items)) <= 1 and not is_size)
        if is_searched(error) and not guilty:
            first, second = halves(items)
            return [second, first]
        if is_searched(error) and (len(items) == 1 or len(items) < len(batch.items)):
            now_s = self._clock()
            for item in items:
                self._suspects.mark((lane.key, item.identity), now_s)
        if len({item.key_name for item in items}) > 1:
            # What an upstream says of a failure may quote one key's text to another.
            words = f"a request with inputs of several keys failed ({error.cause})"
            error.message, error.args = words, (words,)
        self._failed(lane, batch, items, error)
        return []

    def _failed(
        self, lane: _Lane, batch: _Batch, items: list[Item[_Caller]], error: BaseException
    ) -> None:
        callers = callers_of(items)
        self._close(lane, batch, items)
        for caller in callers:
            caller.fail(error)
            self._leave(lane, caller)

    def _close(self, lane: _Lane, batch: _Batch, items: list[Item[_Caller]]) -> None:
        """These items are over."""
        for item in items:
            batch.open.pop(item, None)
            lane.batch_of.pop(item, None)
            lane.prepaid.pop(item, None)
            lane.queue.forget(item)

    def _leave(self, lane: _Lane, caller: _Caller) -> None:
        """The caller wants nothing more: it pays for what is on its way, the rest is not sent."""
        batches: dict[_Batch, None] = {}
        for item in caller.items:
            batch = lane.batch_of.get(item)
            if batch is not None:
                batches[batch] = None
                if item in batch.asked:
                    self._charge_leaver(lane, item, caller)
            lane.queue.leave(item, caller)
        caller.items.clear()
        for batch in batches:
            if not any(item.wants for item in batch.open):
                # At once, so that nobody joins what is about to end.
                self._close(lane, batch, list(batch.open))
                if batch.task is not None and batch.task is not asyncio.current_task():
                    batch.task.cancel()
        self._pump(lane)

    def _forsaken(self, lane: _Lane, batch: _Batch, caller: _Caller) -> None:
        """The caller leaves whose task runs the batch, which ends with it: it pays for what is on
        its way, and what others want of it is sent again."""
        left = list(batch.open)
        for item in left:
            if item in batch.asked:
                paid_tokens, _ = lane.prepaid.get(item, (0, 0))
                self._charge_estimate(lane, caller, max(0, item.tokens - paid_tokens))
        self._close(lane, batch, left)
        for item in left:
            lane.queue.leave(item, caller)
            if item.wants:
                lane.queue.put_back(item)
        caller.items.clear()

    def _charge_leaver(self, lane: _Lane, item: Item[_Caller], caller: _Caller) -> None:
        """An estimate of the caller's part, which the others need not pay any more."""
        paid_tokens, paid_nanousd = lane.prepaid.get(item, (0, 0))
        parts = split_exactly(max(0, item.tokens - paid_tokens), [1] * len(item.wants))
        tokens = sum(
            part for part, want in zip(parts, item.wants, strict=True) if want[0] is caller
        )
        nanousd = self._charge_estimate(lane, caller, tokens)
        lane.prepaid[item] = (paid_tokens + tokens, paid_nanousd + nanousd)

    @staticmethod
    def _charge_estimate(lane: _Lane, caller: _Caller, tokens: int) -> int:
        """Put so many tokens on the caller's tab; what they cost."""
        nanousd = lane.cost(Usage(tokens, estimated=True))
        caller.tab.tokens += tokens
        caller.tab.nanousd += nanousd
        caller.tab.estimated = True
        return nanousd
