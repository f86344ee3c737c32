"""Server-sent events: an incremental parser of what upstreams send, and the one form we send.

Follows the WHATWG event-stream grammar (LF, CRLF and bare CR line ends, a BOM, `data` over several
lines, comments), and forgives a last event without its blank line, which `finish` hands out.
What we send is only ever `data: <one line>\\n\\n` and comments, because that is all that every
client parses: several SDKs fail on `id:`, `retry:`, data-less events, or raw U+2028, U+2029 and
U+0085 inside the JSON.
"""

from __future__ import annotations

from typing import NamedTuple

DONE = b"[DONE]"
DONE_FRAME = b"data: [DONE]\n\n"

_BOM = b"\xef\xbb\xbf"
# The escapes are only valid inside JSON strings, and JSON allows these characters nowhere else.
_SEPARATORS = (
    (b"\xe2\x80\xa8", b"\\u2028"),
    (b"\xe2\x80\xa9", b"\\u2029"),
    (b"\xc2\x85", b"\\u0085"),
)


class SseEvent(NamedTuple):
    """`event` is b"" where the stream names none; `data` has its lines joined by LF."""

    event: bytes
    data: bytes


class SseOverflow(ValueError):
    """One event is larger than the limit."""


class SseParser:
    """Bytes in, events out; feeding may split anywhere. Comments and empty events are dropped.

    `event_bytes_max` bounds what an unfinished event may hold, a single endless line included.
    """

    __slots__ = (
        "_after_cr",
        "_buffer",
        "_event",
        "_event_bytes_max",
        "_lines",
        "_size",
        "_started",
    )

    def __init__(self, event_bytes_max: int = 8 << 20) -> None:
        self._event_bytes_max = event_bytes_max
        self._buffer = bytearray()
        self._lines: list[bytes] = []
        self._size = 0
        self._event = b""
        self._started = False
        self._after_cr = False

    @property
    def is_between_events(self) -> bool:
        """What is fed next begins an event, and nothing of it has come yet."""
        return not (self._buffer or self._lines or self._event or self._after_cr)

    def feed(self, chunk: bytes) -> list[SseEvent]:
        """The events that `chunk` completes. Raises SseOverflow."""
        if self.is_between_events and (found := _of_one_line(chunk)):
            self._started = True
            return found
        if self._after_cr and chunk:
            self._after_cr = False
            if chunk[:1] == b"\n":
                chunk = chunk[1:]
        if not self._started:
            data = bytes(self._buffer) + chunk
            if len(data) < len(_BOM) and _BOM.startswith(data):
                self._buffer = bytearray(data)
                return []
            self._started = True
            self._buffer.clear()
            chunk = data.removeprefix(_BOM)
        if b"\n" not in chunk and b"\r" not in chunk:
            # Only what is new was looked at, or one long line in pieces would cost its square.
            self._buffer += chunk
            self._check_size()
            return []
        data = bytes(self._buffer) + chunk if self._buffer else chunk
        if b"\r" in data:
            self._after_cr = data.endswith(b"\r")
            data = data.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
        *lines, rest = data.split(b"\n")
        self._buffer = bytearray(rest)
        events: list[SseEvent] = []
        for line in lines:
            if line:
                self._take(line)
            elif (event := self._dispatch()) is not None:
                events.append(event)
        self._check_size()
        return events

    def finish(self) -> list[SseEvent]:
        """The event that the end of the stream left without its blank line, if any."""
        if self._buffer:
            self._take(bytes(self._buffer))
            self._buffer.clear()
        event = self._dispatch()
        return [] if event is None else [event]

    def _check_size(self) -> None:
        if len(self._buffer) + self._size > self._event_bytes_max:
            raise SseOverflow(f"an event is larger than {self._event_bytes_max} bytes")

    def _take(self, line: bytes) -> None:
        if line.startswith(b"data:"):
            value = line[6:] if line[5:6] == b" " else line[5:]
            self._lines.append(value)
            self._size += len(value) + 1
        elif line == b"data":
            self._lines.append(b"")
            self._size += 1
        elif line.startswith(b"event:"):
            self._event = line[6:].removeprefix(b" ")

    def _dispatch(self) -> SseEvent | None:
        lines, event = self._lines, self._event
        if lines:
            self._lines, self._size = [], 0
        self._event = b""
        if not any(lines):
            return None
        return SseEvent(event, lines[0] if len(lines) == 1 else b"\n".join(lines))


def _of_one_line(chunk: bytes) -> list[SseEvent] | None:
    """The events of a chunk that has whole ones alone, with one line each: the usual one."""
    if not chunk.endswith(b"\n\n") or b"\r" in chunk:
        return None
    events = []
    for line in chunk[:-2].split(b"\n\n"):
        if not line.startswith(b"data: ") or b"\n" in line or len(line) == len(b"data: "):
            return None
        events.append(SseEvent(b"", line[6:]))
    return events


def frame(payload: bytes) -> bytes:
    """One event as we send it: the payload is JSON text, and only its framing is touched."""
    if b"\n" in payload:
        payload = payload.replace(b"\n", b" ")
    if not payload.isascii():
        for raw, escaped in _SEPARATORS:
            if raw in payload:
                payload = payload.replace(raw, escaped)
    return b"data: " + payload + b"\n\n"


def comment(text: str) -> bytes:
    """A comment line, which every client ignores; what `text` holds of line ends is taken out."""
    # Some clients end a line wherever Unicode does.
    flat = " ".join(text.splitlines())
    return b": " + flat.encode("utf-8", "replace") + b"\n\n"
