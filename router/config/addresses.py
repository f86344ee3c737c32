"""Addresses: which are well-formed, and which stay on this machine or in this network."""

from __future__ import annotations

import ipaddress
from urllib.parse import urlsplit


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches a listener there. A name other than localhost: no."""
    if host.lower().rstrip(".") == "localhost":
        return True
    address = _address(host)
    return address is not None and address.is_loopback


def is_private(host: str) -> bool:
    """Whether an upstream there is on this machine or in a private network.

    A name without a dot, or under a suffix that no public name has, is private too: such are the
    names of containers and services.
    """
    address = _address(host)
    if address is not None:
        return address.is_private
    name = host.lower().rstrip(".")
    return "." not in name or name.endswith((".local", ".internal", ".lan", ".localhost"))


def address_to_ask(host: str) -> str:
    """How a URL names what listens at `host`: "every address" is no address to ask."""
    address = _address(host)
    if address is None:
        return host
    if address.is_unspecified:
        return "127.0.0.1" if address.version == 4 else "[::1]"
    return f"[{address}]" if address.version == 6 else str(address)


def url_fault(text: str) -> str | None:
    """What is wrong with an upstream's address, or None. Never repeats the address."""
    try:
        url = urlsplit(text)
        port = url.port
    except ValueError:
        return "is not an address; write it as http://host:port"
    if url.scheme not in ("http", "https"):
        return "must begin with http:// or https://"
    if not url.hostname:
        return "has no host; write it as http://host:port"
    if port == 0:
        return "has the port 0, on which nothing listens"
    if url.username is not None or url.password is not None:
        return 'must not hold a user or a password; give a token with token = "env:NAME"'
    if "?" in text or "#" in text:
        return "must not have a query or a fragment: leave out what follows ? or #"
    if not text.isascii() or not text.isprintable() or " " in text:
        return "has a character that no address has; percent-encode it"
    return None


def _address(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        address = ipaddress.ip_address(host.strip("[]"))
    except ValueError:
        return None
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped is not None:
        return address.ipv4_mapped
    return address
