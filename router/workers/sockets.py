"""The listening sockets of several workers on one port, which nobody else can join.

SO_REUSEPORT alone lets any process of the same user share the port, a second daemon too. So one
socket first claims it without that option: the kernel lets only one listen so, and nobody beside
one that listens already, with the option or without. Then it is given the option, the workers'
sockets join, and it goes. While it goes the others listen, so at no moment is the port free.

Each socket keeps its own backlog, also while its worker is being started again. Which one gets a
connection is told by the client's port, its blocks of 16 going round: Linux gives a client's
connections ports that rise by 2 to 16, so 64 of them fall evenly, where the kernel's own choice, a
hash, leaves one of two workers with less than 40 % once in ten times. (`SO_ATTACH_REUSEPORT_CBPF`
in socket(7); a system that refuses it keeps the hash.)
"""

from __future__ import annotations

import contextlib
import errno
import socket
import struct
from array import array
from typing import Any

from router.config.schema import Server as ServerSettings
from router.daemon import BACKLOG, cannot_listen

# With port 0 the system chooses one for the host's first address, which its next one may not have.
_PORT_TRIES = 8
# <asm-generic/socket.h>; Python has no name for it.
_SO_ATTACH_REUSEPORT_CBPF = 51
# <linux/filter.h>: offsets from here on count from the packet's network header.
_NETWORK_HEADER = -0x100000
_NETWORK_HEADER_BYTES = {socket.AF_INET: 20, socket.AF_INET6: 40}
_PORT_BLOCK_BITS = 4


def open_sockets(settings: ServerSettings, workers: int) -> list[list[socket.socket]]:
    """For each worker the sockets that listen, one for each address. Raises StartError."""
    for left in reversed(range(_PORT_TRIES)):
        with contextlib.ExitStack() as opened:
            try:
                found = _open_all(settings, workers, opened)
            except OSError as error:
                if settings.port or error.errno != errno.EADDRINUSE or not left:
                    raise cannot_listen(settings, error) from error
                continue
            opened.pop_all()
            return found
    raise AssertionError("the last try ends in one or the other")


def _open_all(
    settings: ServerSettings, workers: int, opened: contextlib.ExitStack
) -> list[list[socket.socket]]:
    of_worker: list[list[socket.socket]] = [[] for _ in range(workers)]
    port = settings.port
    for family, address in _addresses(settings):
        with _listening(family, (address[0], port, *address[2:]), may_share=False) as claim:
            where = claim.getsockname()
            port = where[1]
            claim.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            for mine in of_worker:
                mine.append(opened.enter_context(_listening(family, where, may_share=True)))
            _spread_by_port(of_worker[0][-1], family, workers)
    return of_worker


def _spread_by_port(one: socket.socket, family: int, workers: int) -> None:
    """Of a group of sockets, numbered as they began to listen, choose by the client's port."""
    port_at = _NETWORK_HEADER + _NETWORK_HEADER_BYTES[socket.AddressFamily(family)]
    # Load the half-word there, shift it right, take the remainder, return it.
    steps = ((0x28, port_at & 0xFFFFFFFF), (0x74, _PORT_BLOCK_BITS), (0x94, workers), (0x16, 0))
    program = array("B", b"".join(struct.pack("HBBI", code, 0, 0, k) for code, k in steps))
    address, _ = program.buffer_info()
    with contextlib.suppress(OSError):
        one.setsockopt(
            socket.SOL_SOCKET,
            _SO_ATTACH_REUSEPORT_CBPF,
            struct.pack("HP", len(steps), address),
        )


def _addresses(settings: ServerSettings) -> list[tuple[int, Any]]:
    """Of the host's name, as a server takes them. Raises OSError."""
    found = socket.getaddrinfo(
        settings.host, settings.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )
    return list(dict.fromkeys((family, address) for family, _, _, _, address in found))


def _listening(family: int, address: Any, *, may_share: bool) -> socket.socket:
    made = socket.socket(family, socket.SOCK_STREAM)
    try:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            made.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        if may_share:
            made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        made.bind(address)
        made.listen(BACKLOG)
        made.setblocking(False)
    except OSError:
        made.close()
        raise
    return made
