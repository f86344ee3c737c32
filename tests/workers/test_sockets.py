"""The port belongs to one daemon, and each of its workers has a socket of its own there."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator

import pytest

from router.config.schema import Server
from router.daemon import StartError
from router.workers.sockets import open_sockets


@contextlib.contextmanager
def opened(host: str, port: int, workers: int = 2) -> Iterator[list[list[socket.socket]]]:
    found = open_sockets(Server(host=host, port=port), workers)
    try:
        yield found
    finally:
        for sockets in found:
            for one in sockets:
                one.close()


def port_of(found: list[list[socket.socket]]) -> int:
    (port,) = {one.getsockname()[1] for sockets in found for one in sockets}
    return int(port)


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "localhost", "0.0.0.0", "::"])
def test_all_sockets_have_the_one_port_that_was_free(host: str) -> None:
    with opened(host, 0, workers=3) as found:
        assert port_of(found) > 0
        assert len(found) == 3
        addresses = {one.getsockname()[0] for one in found[0]}
        assert len(addresses) == len(found[0])
        assert {one.getsockname()[0] for sockets in found for one in sockets} == addresses


@pytest.mark.parametrize("second", ["127.0.0.1", "0.0.0.0", "localhost"])
def test_a_second_daemon_is_told_that_it_is_taken(second: str) -> None:
    with opened("127.0.0.1", 0) as found:
        port = port_of(found)
        with pytest.raises(StartError, match=f"{second}:{port} is taken"):
            open_sockets(Server(host=second, port=port), 2)
        with contextlib.closing(socket.socket()) as plain:
            plain.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            with pytest.raises(OSError, match="in use"):
                plain.bind(("127.0.0.1", port))
    with opened("127.0.0.1", port):
        pass


def test_another_address_of_the_same_port_is_another_daemon() -> None:
    with opened("127.0.0.1", 0) as found, opened("127.0.0.2", port_of(found)):
        pass


@pytest.mark.parametrize(("host", "workers"), [("127.0.0.1", 2), ("::1", 2), ("127.0.0.1", 5)])
def test_connections_wait_at_each_socket_whoever_serves_it(host: str, workers: int) -> None:
    with opened(host, 0, workers) as found, contextlib.ExitStack() as clients:
        for _ in range(128):
            client = socket.create_connection((host, port_of(found)), timeout=5)
            clients.enter_context(client)
        ports = [_accepted(one) for (one,) in found]
    assert sum(map(len, ports)) == 128
    blocks = [{(port >> 4) % workers for port in mine} for mine in ports]
    assert sorted(map(tuple, blocks)) == [(index,) for index in range(workers)]


def _accepted(listener: socket.socket) -> list[int]:
    """The ports of the clients whose connections waited there."""
    ports: list[int] = []
    while True:
        try:
            made, address = listener.accept()
        except BlockingIOError:
            return ports
        made.close()
        ports.append(address[1])


@pytest.mark.parametrize("host", ["192.0.2.1", "no-such-host.invalid"])
def test_an_address_that_is_not_ours_is_a_clear_word(host: str) -> None:
    with pytest.raises(StartError, match=f"cannot listen on {host}:0"):
        open_sockets(Server(host=host, port=0), 2)
