"""The words for what goes wrong between us and an upstream, and the class of each.

The one table from the network's failures to ours. `where` is what was being done: "on POST URL", or
"while reading the answer".
"""

from __future__ import annotations

import os
import socket
import ssl

from router.errors import ConnectFailed, StaleConnection, UpstreamBroken, UpstreamTimeout

READING = "while reading the answer"
_SHOWN_CHARS_MAX = 100


def safe(url: str) -> str:
    """The address without its query, which may hold a secret, nor a user and a password."""
    scheme, separator, rest = url.partition("?")[0].partition("://")
    host, slash, path = rest.partition("/")
    return f"{scheme}{separator}{host.rpartition('@')[2]}{slash}{path}"


def malformed(what: str, where: str) -> ConnectFailed:
    return ConnectFailed(f"{what} is malformed {where}")


def unsendable(error: ValueError, where: str) -> UpstreamBroken:
    return UpstreamBroken(f"{error} {where}")


def late(where: str) -> UpstreamTimeout:
    return UpstreamTimeout(f"the connection was not made in time {where}", phase="connect")


def unreachable(host: str, port: int, error: Exception, *, is_proxy: bool) -> ConnectFailed:
    """Nobody answered there, or not as agreed. The address says all, the call's path nothing."""
    place = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    who = f"the proxy {place}" if is_proxy else place
    return ConnectFailed(f"cannot connect to {who} ({_reason(error)})")


def refused_by_proxy(host: str, port: int, said: str, target: str) -> ConnectFailed:
    words = f"the proxy {host}:{port} makes no connection to {target}"
    return ConnectFailed(f"{words} (it says: {said[:_SHOWN_CHARS_MAX]})")


def stale(where: str) -> StaleConnection:
    return StaleConnection(f"the upstream had closed the kept connection {where}")


def gone(error: Exception | None, where: str) -> UpstreamBroken:
    """The connection ended; `error` None: as the upstream wished."""
    if error is not None and where is not READING:
        return UpstreamBroken(f"the connection broke ({type(error).__name__}) {where}")
    if where is READING:
        return UpstreamBroken(f"the upstream's answer was cut off {where}")
    return UpstreamBroken(f"the upstream closed the connection without an answer {where}")


def closed() -> UpstreamBroken:
    """By us, before the answer's end."""
    return UpstreamBroken("the answer was closed before its end")


def unreadable(reason: str, where: str) -> UpstreamBroken:
    words = f"the upstream's answer is no HTTP that can be read ({reason[:_SHOWN_CHARS_MAX]})"
    return UpstreamBroken(f"{words} {where}")


def _reason(error: Exception) -> str:
    if isinstance(error, ssl.SSLCertVerificationError) and error.verify_message:
        return f"its certificate is not to be trusted: {error.verify_message}"
    if not isinstance(error, OSError):
        return str(error)
    if isinstance(error, ssl.SSLError | socket.gaierror) or not error.errno or error.errno < 0:
        return error.strerror or str(error) or type(error).__name__
    # The loop's own text repeats the address.
    return os.strerror(error.errno).lower()
