"""The parent's ends of the workers' lines: frames in and out, without a loop of its own.

The parent has no event loop, since a process that has one is not to be forked. Nothing here blocks:
what a worker does not read yet is kept, up to a limit beyond which the worker hangs and its line is
cut, for the parent to start it anew.
"""

from __future__ import annotations

import contextlib
import logging
import selectors
import socket
from dataclasses import dataclass, field

from router.core.frames import FrameError, FrameReader, frame
from router.types import Json
from router.workers.line import UNSENT_BYTES_MAX

_log = logging.getLogger("rungway")
_READ_BYTES = 1 << 18
_READ = selectors.EVENT_READ
_READ_AND_WRITE = selectors.EVENT_READ | selectors.EVENT_WRITE


@dataclass(slots=True, eq=False)
class Channel:
    """One line. `number` is the worker's."""

    number: int
    end: socket.socket
    reader: FrameReader = field(default_factory=FrameReader)
    unsent: bytearray = field(default_factory=bytearray)
    is_open: bool = True


class Channels:
    """All lines, by the worker's number."""

    def __init__(self, selector: selectors.BaseSelector) -> None:
        self._selector = selector
        self._channels: dict[int, Channel] = {}

    def open(self, number: int) -> socket.socket:
        """A new line for this worker; the end that it is to have. Raises OSError."""
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        theirs.setblocking(False)
        channel = self._channels[number] = Channel(number, ours)
        self._selector.register(ours, _READ, channel)
        return theirs

    def forget(self, number: int) -> None:
        """The worker has ended, and what it sent was read."""
        channel = self._channels.pop(number)
        self._cut(channel)
        channel.end.close()

    def numbers(self) -> set[int]:
        """The workers that there are."""
        return set(self._channels)

    def close_ours(self) -> None:
        """In a new worker: the others' lines are none of its business."""
        for channel in self._channels.values():
            channel.end.close()

    def send(self, number: int, message: Json) -> None:
        channel = self._channels.get(number)
        if channel is None or not channel.is_open:
            return
        try:
            channel.unsent += frame(message)
        except FrameError as error:
            _log.error(
                "a message to worker %d (%s) is not sent: %s", number + 1, message["is"], error
            )
            return
        self.write(channel)
        if len(channel.unsent) > UNSENT_BYTES_MAX:
            self._cut(channel)

    def write(self, channel: Channel) -> None:
        """Send what the line takes now, and wait for it to take the rest."""
        try:
            while channel.unsent:
                del channel.unsent[: channel.end.send(channel.unsent)]
        except BlockingIOError:
            pass
        except OSError:
            self._cut(channel)
            return
        wanted = _READ_AND_WRITE if channel.unsent else _READ
        if channel.is_open and self._selector.get_key(channel.end).events != wanted:
            self._selector.modify(channel.end, wanted, channel)

    def read(self, channel: Channel) -> list[Json]:
        """What came on the line; one that has ended is cut."""
        if not channel.is_open:
            return []
        try:
            data = channel.end.recv(_READ_BYTES)
            if data:
                return channel.reader.feed(data)
        except BlockingIOError:
            return []
        except (OSError, FrameError):
            pass
        self._cut(channel)
        return []

    def read_out(self, number: int) -> list[Json]:
        """All that a worker sent which has ended."""
        channel, found = self._channels[number], []
        while messages := self.read(channel):
            found += messages
        return found

    def _cut(self, channel: Channel) -> None:
        """No more goes either way; the worker sees the end of its line and ends."""
        if channel.is_open:
            channel.is_open = False
            self._selector.unregister(channel.end)
            with contextlib.suppress(OSError):
                channel.end.shutdown(socket.SHUT_RDWR)
