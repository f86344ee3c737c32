"""Messages on a stream of bytes: four bytes of length, then as many of JSON. Pure.

What the workers of one daemon say to each other goes this way (`workers/`). Both ends are of the
same version, so there is no negotiation; the limit is for a fault, which must not take the memory.
"""

from __future__ import annotations

import orjson

from router.types import Json

FRAME_BYTES_MAX = 8 << 20
_LENGTH_BYTES = 4


class FrameError(ValueError):
    """What came is no message; nothing after it can be read."""


def frame(message: Json) -> bytes:
    """One message as bytes. Raises FrameError for one that is too large."""
    body = orjson.dumps(message)
    if len(body) > FRAME_BYTES_MAX:
        raise FrameError(f"a message of {len(body)} bytes; at most {FRAME_BYTES_MAX} are sent")
    return len(body).to_bytes(_LENGTH_BYTES, "big") + body


class FrameReader:
    """Finds the messages in what arrives, wherever it is split."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> list[Json]:
        """The messages that are whole now. Raises FrameError."""
        self._buffer += data
        found: list[Json] = []
        while len(self._buffer) >= _LENGTH_BYTES:
            length = int.from_bytes(self._buffer[:_LENGTH_BYTES], "big")
            if length > FRAME_BYTES_MAX:
                raise FrameError(f"a message of {length} bytes; at most {FRAME_BYTES_MAX} are read")
            end = _LENGTH_BYTES + length
            if len(self._buffer) < end:
                break
            found.append(_message(bytes(self._buffer[_LENGTH_BYTES:end])))
            del self._buffer[:end]
        return found


def _message(body: bytes) -> Json:
    try:
        message = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise FrameError("a message that is not JSON") from error
    if not isinstance(message, dict):
        raise FrameError("a message that is not an object")
    return message
