"""Which proxy the environment names for an upstream: http_proxy, https_proxy, no_proxy.

Read once, at the start. A machine's own addresses never go through a proxy. `.netrc` is not read: a
token goes only where the configuration sends it.
"""

from __future__ import annotations

import ipaddress
import os
from collections.abc import Mapping
from urllib.parse import urlsplit


class Proxies:
    """The answer for each origin, worked out once. Origins come from the configuration: few."""

    def __init__(self, environment: Mapping[str, str] | None = None) -> None:
        self._environment = dict(_of_this_process() if environment is None else environment)
        self._known: dict[str, str | None] = {}

    def proxy_for(self, url: str) -> str | None:
        """The proxy's address for this address, or None to go there directly."""
        if not self._environment:
            return None
        origin = url.split("/", 3)[2] if url.count("/") > 1 else url
        if origin not in self._known:
            self._known[origin] = self._look_up(url)
        return self._known[origin]

    def _look_up(self, url: str) -> str | None:
        from urllib.request import proxy_bypass  # noqa: PLC0415

        parts = urlsplit(url)
        host = parts.hostname or ""
        if _is_own(host) or proxy_bypass(host, self._environment):
            return None
        return self._environment.get(parts.scheme)


def _of_this_process() -> dict[str, str]:
    if not any(name.lower().endswith("_proxy") for name in os.environ):
        # urllib.request brings http.client and email along, for who has a proxy and nobody else.
        return {}
    from urllib.request import getproxies_environment  # noqa: PLC0415

    return getproxies_environment()


def _is_own(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")
