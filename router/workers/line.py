"""A worker's line to its parent, on the loop: commands come, events and questions go both ways.

Every message is a frame of `core/frames.py` with its kind under "is". The parent passes events on
to the other workers, and questions and their answers; who asks hears from it how many were asked.
A line that ends, or that the parent does not read, is the parent's end.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from router.core.frames import FrameError, FrameReader, frame
from router.flow.events import Events, Gathered
from router.types import Json

_log = logging.getLogger("rungway")
# More is unsent only when the parent reads no more.
UNSENT_BYTES_MAX = 32 << 20
# Who asks beyond this hears of this worker alone.
_ASKING_MAX = 64
# The parent keeps the last answers to these, for when their worker is late or has ended.
KEPT_KINDS = frozenset({"metrics"})


@dataclass(slots=True, eq=False)
class _Asking:
    """One question under way. `others` None: not yet known who was asked.

    `answers` is by the worker's number; `kept` has pairs of one and what stands in for its answer.
    """

    done: asyncio.Future[None]
    answers: dict[int, Json] = field(default_factory=dict)
    others: set[int] | None = None
    kept: list[tuple[int, Json]] = field(default_factory=list)

    def look(self) -> None:
        if self.others is not None and self.others <= set(self.answers) and not self.done.done():
            self.done.set_result(None)


class Line(asyncio.Protocol):
    """`command` gets what is for this worker alone; `lost` is called once, when the line ends."""

    def __init__(
        self,
        events: Events,
        workers: int,
        command: Callable[[Json], None],
        lost: Callable[[], None],
    ) -> None:
        self._events = events
        self._workers = workers
        self._command = command
        self._lost = lost
        self._reader = FrameReader()
        self._transport: asyncio.WriteTransport | None = None
        self._asking: dict[int, _Asking] = {}
        self._asked = 0

    def connection_made(self, transport: Any) -> None:
        self._transport = transport

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        self._lost()

    def data_received(self, data: bytes) -> None:
        for message in self._reader.feed(data):
            self._take(message)

    def send(self, message: Json) -> None:
        transport = self._transport
        if transport is None:
            return
        try:
            data = frame(message)
        except FrameError as error:
            _log.error("a worker's message (%s) is not sent: %s", message["is"], error)
            return
        transport.write(data)
        if transport.get_write_buffer_size() > UNSENT_BYTES_MAX:
            transport.abort()

    def publish(self, kind: str, payload: Json) -> None:
        self.send({"is": "event", "kind": kind, "payload": payload})

    async def gather(self, kind: str, payload: Json, own: Json, limit_s: float) -> Gathered:
        if self._transport is None or len(self._asking) >= _ASKING_MAX:
            return Gathered([own], self._workers)
        self._asked += 1
        number = self._asked
        asking = _Asking(asyncio.get_running_loop().create_future())
        self._asking[number] = asking
        mine = {"own": own} if kind in KEPT_KINDS else {}
        self.send({"is": "ask", "id": number, "kind": kind, "payload": payload, **mine})
        try:
            async with asyncio.timeout(limit_s):
                await asking.done
        except TimeoutError:
            pass
        finally:
            del self._asking[number]
        kept = [payload for number, payload in asking.kept if number not in asking.answers]
        return Gathered([own, *asking.answers.values()], self._workers, kept)

    def _take(self, message: Json) -> None:
        match message["is"]:
            case "event":
                self._events.heard(message["kind"], message["payload"])
            case "ask":
                answer = self._events.answer(message["kind"], message["payload"])
                where = {"to": message["from"], "id": message["id"], "kind": message["kind"]}
                self.send({"is": "answer", **where, "payload": answer})
            case "asked":
                if (asking := self._asking.get(message["id"])) is not None:
                    asking.others, asking.kept = set(message["others"]), message["kept"]
                    asking.look()
            case "answer":
                if (asking := self._asking.get(message["id"])) is not None:
                    asking.answers[message["from"]] = message["payload"]
                    asking.look()
            case _:
                self._command(message)
