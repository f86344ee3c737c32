"""Who may talk to us at all: the Host and Origin of browsers, and the key of everybody.

Any web page can reach a port on localhost, and by DNS rebinding even under a name of its own; the
tokens behind this port are money. So on loopback the Host must be one of ours, and an Origin that
is not listed is refused where no key protects the calls.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import lru_cache

from router.config.addresses import is_loopback
from router.errors import Forbidden, Unauthenticated
from router.flow.keys import KeyBook
from router.types import Key

_ALLOWED_HEADERS = "authorization, content-type, idempotency-key, x-client-request-id"
_EXPOSED_HEADERS = (
    "x-request-id, retry-after, retry-after-ms, x-should-retry, x-rungway-rung, "
    "x-rungway-attempts, x-rungway-cache, x-rungway-cost-usd, x-rungway-clamped, "
    "x-rungway-cached-inputs, x-rungway-origin, openai-processing-ms, "
    "x-ratelimit-limit-requests, x-ratelimit-remaining-requests, x-ratelimit-reset-requests, "
    "x-ratelimit-limit-tokens, x-ratelimit-remaining-tokens, x-ratelimit-reset-tokens"
)
# Clients write the Host in few ways, and an address is slow to read.
_HOSTS_KEPT = 64
_PREFLIGHT_AGE_S = "600"
_HEADER_NAME = frozenset("abcdefghijklmnopqrstuvwxyz0123456789-_, ")


@dataclass(frozen=True, slots=True)
class Guard:
    """The rules of one configuration, and the keys of all.

    `open_key` is the implicit key of open mode, None where keys are needed.
    """

    keys: KeyBook
    open_key: Key | None
    checks_host: bool
    hosts: frozenset[str]
    origins: frozenset[str]

    def check_browser(self, host: str | None, origin: str | None) -> None:
        """Raises Forbidden for a Host or Origin that is not ours."""
        if self.checks_host and host is not None and not self._is_ours(host):
            raise Forbidden(
                f"the Host {host[:100]!r} is not served here; list it in server.allowed_hosts",
                code="host_not_allowed",
            )
        if origin is None or origin in self.origins or self.open_key is None:
            return
        if host is not None and origin.partition("://")[2] == host:
            return
        raise Forbidden(
            f"the Origin {origin[:100]!r} may not call; list it in server.cors_origins",
            code="origin_not_allowed",
        )

    async def authenticate(self, authorization: str | None) -> Key:
        """The key of a call.

        Raises Unauthenticated, never with the key in its text, or StateUnavailable.
        """
        return self.known(authorization) or await self.keys.find(_digest(authorization))

    def known(self, authorization: str | None) -> Key | None:
        """As `authenticate`; None where the store has to be asked."""
        return self.open_key or self.keys.known(_digest(authorization))

    def cors(self, origin: str | None) -> dict[str, str]:
        """The headers that let a listed page read the answer."""
        if origin is None or origin not in self.origins:
            return {}
        return {
            "Access-Control-Allow-Origin": origin,
            "Access-Control-Expose-Headers": _EXPOSED_HEADERS,
            "Vary": "Origin",
        }

    def preflight(self, origin: str | None, wanted: str | None) -> dict[str, str]:
        """What answers OPTIONS beside `cors`. Raises Forbidden for an Origin that is not listed."""
        if origin is None or origin not in self.origins:
            raise Forbidden(
                "this Origin may not call; list it in server.cors_origins",
                code="origin_not_allowed",
            )
        wanted = (wanted or "").lower()
        reflected = wanted if wanted and set(wanted) <= _HEADER_NAME else _ALLOWED_HEADERS
        return {
            "Access-Control-Allow-Methods": "GET, POST, DELETE, OPTIONS",
            "Access-Control-Allow-Headers": reflected,
            "Access-Control-Max-Age": _PREFLIGHT_AGE_S,
        }

    def _is_ours(self, host: str) -> bool:
        return _is_of_this_machine(host) or host_name(host) in self.hosts


def _digest(authorization: str | None) -> bytes:
    scheme, _, secret = (authorization or "").strip().partition(" ")
    secret = secret.strip()
    if scheme.lower() != "bearer" or not secret:
        raise Unauthenticated(
            "no API key: send it as `Authorization: Bearer KEY`", code="missing_api_key"
        )
    return hashlib.sha256(secret.encode("utf-8", "surrogateescape")).digest()


@lru_cache(_HOSTS_KEPT)
def _is_of_this_machine(host: str) -> bool:
    name = host_name(host)
    return name.endswith(".localhost") or is_loopback(name)


def host_name(host: str) -> str:
    """The name of a Host header, without its port and brackets, lower case."""
    host = host.strip().lower()
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.rpartition(":")[0] if host.count(":") == 1 else host
