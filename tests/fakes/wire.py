"""A transport without a socket: what comes is fed in the pieces that a test wants."""

from __future__ import annotations

import asyncio
from typing import Any


class Wire(asyncio.Transport):
    """One connection's transport. `sent` is what was written to it."""

    def __init__(self, protocol: asyncio.Protocol) -> None:
        super().__init__()
        self.sent = b""
        self._is_reading = True
        self._protocol = protocol
        self._is_closing = False
        protocol.connection_made(self)

    def feed(self, data: bytes) -> None:
        if not self._is_closing:
            self._protocol.data_received(data)

    def leave(self) -> None:
        """As when the client closes."""
        self.close()

    def write(self, data: Any) -> None:
        self.sent += bytes(data)

    def close(self) -> None:
        if not self._is_closing:
            self._is_closing = True
            asyncio.get_running_loop().call_soon(self._protocol.connection_lost, None)

    def abort(self) -> None:
        self.close()

    def is_closing(self) -> bool:
        return self._is_closing

    def get_protocol(self) -> asyncio.BaseProtocol:
        return self._protocol

    def set_protocol(self, protocol: asyncio.BaseProtocol) -> None:
        assert isinstance(protocol, asyncio.Protocol)
        self._protocol = protocol

    def pause_reading(self) -> None:
        self._is_reading = False

    def resume_reading(self) -> None:
        self._is_reading = True

    def is_reading(self) -> bool:
        return self._is_reading

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return default
