"""One request as its server has read it, and the way back to its client.

The seam between the two servers (`front`, `server`) and all else: whoever answers does not know
which of them it was.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from router.api.reply import Reply
from router.errors import RouterError

# Makes and records the answer to what could not be read as a request.
Refuse = Callable[[RouterError], Reply]


class Request(Protocol):
    """`target` is what the client asked for, as it wrote it; `peer` its address.

    `waited_s`: how long its body was waited for before anybody was told of it.
    """

    @property
    def method(self) -> str: ...

    @property
    def target(self) -> str: ...

    @property
    def is_http_1_1(self) -> bool:
        """The client reads chunks, and keeps its connection where nothing else is said."""
        ...

    @property
    def peer(self) -> object: ...

    @property
    def waited_s(self) -> float: ...

    def header(self, name: str) -> str | None:
        """The first header of this name, which is in lower case."""
        ...

    # --- its body ---

    @property
    def body_bytes(self) -> int | None:
        """The body's length as its head tells it."""
        ...

    def take_body(self) -> bytes | None:
        """The body, if all of it has come."""
        ...

    async def read(self) -> bytes:
        """Some more of the body as it comes; nothing at its end. Raises BadRequest."""
        ...

    # --- its answer ---

    @property
    def is_kept(self) -> bool:
        """The connection will serve another request."""
        ...

    @property
    def is_begun(self) -> bool:
        """Some of an answer was written."""
        ...

    @property
    def is_full(self) -> bool:
        """The client does not read: who writes on waits first (`drain`)."""
        ...

    def part(self) -> None:
        """The connection closes after this request's answer."""
        ...

    def write(self, data: bytes) -> None:
        """Raises ConnectionError where the client has left."""
        ...

    def write_now(self, data: bytes) -> bool:
        """More of an answer that has begun, to a client that reads. False, and nothing was sent:
        it does not, or has left."""
        ...

    async def drain(self) -> None: ...

    def close(self) -> None:
        """Close the connection when what was written has gone out."""
        ...

    def abort(self) -> None:
        """Close the connection; what has not gone out is dropped."""
        ...

    def when_left(self, act: Callable[[], None] | None) -> None:
        """As a sink's (`flow/sink.py`)."""
        ...
