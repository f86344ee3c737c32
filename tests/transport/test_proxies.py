"""Which upstreams go through a proxy."""

from __future__ import annotations

import pytest

from router.transport.proxies import Proxies

ENVIRONMENT = {
    "http": "http://proxy:3128",
    "https": "http://secure:3128",
    "no": "inside.example,10.0.0.5",
}


@pytest.mark.parametrize(
    ("url", "proxy"),
    [
        ("http://model.example/v1", "http://proxy:3128"),
        ("https://router.example/v1/chat", "http://secure:3128"),
        ("https://gpu.inside.example/", None),
        ("http://10.0.0.5:8080/v1", None),
        ("http://127.0.0.1:8080/v1", None),
        ("http://localhost:8080", None),
        ("http://[::1]:8080/", None),
    ],
)
def test_proxies(url: str, proxy: str | None) -> None:
    proxies = Proxies(ENVIRONMENT)
    assert proxies.proxy_for(url) == proxy
    assert proxies.proxy_for(url) == proxy
    assert Proxies({}).proxy_for(url) is None
