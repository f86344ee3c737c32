"""Addresses and heads as HTTP/1.1 writes them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.transport.wire import (
    Address,
    Headers,
    basic,
    collected,
    media_type,
    read_address,
    request_head,
)


@pytest.mark.parametrize(
    ("url", "scheme", "host", "port", "authority", "target"),
    [
        ("http://m.example", "http", "m.example", 80, "m.example", "/"),
        ("HTTP://M.Example:80/a", "http", "m.example", 80, "m.example", "/a"),
        ("https://m.example/a?b=c", "https", "m.example", 443, "m.example", "/a?b=c"),
        ("https://m.example:8443", "https", "m.example", 8443, "m.example:8443", "/"),
        ("http://[::1]:8080/v1", "http", "::1", 8080, "[::1]:8080", "/v1"),
        ("http://[fe80::1%25eth0]/", "http", "fe80::1%25eth0", 80, "[fe80::1]", "/"),
        ("http://m.example./a", "http", "m.example", 80, "m.example", "/a"),
        ("http://bücher.example/", "http", "xn--bcher-kva.example", 80, None, "/"),
        ("http://m.example/a%2Fb%20c;d=e", "http", "m.example", 80, "m.example", "/a%2Fb%20c;d=e"),
        ("http://m.example/ö?q=ü", "http", "m.example", 80, "m.example", "/%C3%B6?q=%C3%BC"),
        ("http://m.example/?a=b?c&d=/e#f", "http", "m.example", 80, "m.example", "/?a=b?c&d=/e"),
        ('http://m.example/"<a>{b}', "http", "m.example", 80, "m.example", "/%22%3Ca%3E%7Bb%7D"),
        ("http://my_host:1/", "http", "my_host", 1, "my_host:1", "/"),
    ],
)
def test_addresses(
    url: str, scheme: str, host: str, port: int, authority: str | None, target: str
) -> None:
    assert read_address(url) == Address(scheme, host, port, authority or host, target, "")


@pytest.mark.parametrize(
    "url",
    [
        "",
        "m.example/a",
        "ftp://m.example/",
        "http://",
        "http:///a",
        "http://m.example:0/",
        "http://m.example:65536/",
        "http://m.example:x/",
        "http://[::1/",
        "http://m example/",
        "http://m.example/a b",
        "http://m.example/a\r\nX: y",
        "http://m.example/\x00",
        "http://m.example\\@other.example/",
        "http://a..b.ü/",
        "http://a,b/",
    ],
)
def test_what_is_no_address_is_refused(url: str) -> None:
    with pytest.raises(ValueError):
        read_address(url)


@given(st.text(max_size=60))
def test_no_address_writes_lines_of_its_own(text: str) -> None:
    for url in (text, f"http://{text}/", f"http://m.example/{text}", f"http://{text}@m.example/"):
        try:
            address = read_address(url)
        except ValueError:
            continue
        head = request_head("GET", address, {}, None)
        lines = head.split(b"\r\n")
        assert lines[0].count(b" ") == 2
        assert len(lines) == (5 if address.authorization else 4)
        assert not any(byte < 32 or byte > 126 for line in lines for byte in line)


def test_a_user_in_the_address_becomes_an_authorization() -> None:
    address = read_address("http://user%40home:pass%3A@m.example/a")
    assert (address.authority, address.authorization) == ("m.example", basic("user@home", "pass:"))
    assert address.authorization == "Basic dXNlckBob21lOnBhc3M6"
    assert b"Authorization: Basic dXNl" in request_head("GET", address, {}, None)
    own = request_head("GET", address, {"authorization": "Bearer t"}, None)
    assert own.count(b"uthorization") == 1


def test_a_head_is_built_anew() -> None:
    address = read_address("http://m.example:8080/v1?a=b")
    assert request_head("POST", address, {"Content-Type": "application/json"}, None) == (
        b"POST /v1?a=b HTTP/1.1\r\nHost: m.example:8080\r\nAccept-Encoding: identity\r\n"
        b"Content-Type: application/json\r\n"
    )
    assert request_head("GET", address, {}, "Basic eA==") == (
        b"GET http://m.example:8080/v1?a=b HTTP/1.1\r\nHost: m.example:8080\r\n"
        b"Accept-Encoding: identity\r\nProxy-Authorization: Basic eA==\r\n"
    )
    assert b"Proxy-Auth" not in request_head("GET", address, {}, "")


@pytest.mark.parametrize(
    ("headers", "words"),
    [
        ({"X-A": "b\r\nX-C: d"}, "X-A holds a control character"),
        ({"X-A": "b\n"}, "X-A holds"),
        ({"X-A": "b\r"}, "X-A holds"),
        ({"X-A": "b\x00"}, "X-A holds"),
        ({"X-A": "b\x7f"}, "X-A holds"),
        ({"X A": "b"}, "'X A' is not for a caller"),
        ({"X-A:": "b"}, "'X-A:' is not"),
        ({"X-A\r\nX": "b"}, r"'X-A\\r\\nX' is not"),
        ({"": "b"}, "'' is not"),
        ({"Host": "other.example"}, "'Host' is not"),
        ({"content-length": "5"}, "'content-length' is not"),
        ({"Transfer-Encoding": "chunked"}, "'Transfer-Encoding' is not"),
        ({"Expect": "100-continue"}, "'Expect' is not"),
    ],
)
def test_headers_that_would_write_lines_are_refused(headers: dict[str, str], words: str) -> None:
    address = read_address("http://m.example/")
    with pytest.raises(ValueError, match=words):
        request_head("POST", address, headers, None)


@pytest.mark.parametrize("method", ["", "GET /", "GET\r\n", "GÉT"])
def test_a_method_is_one_word(method: str) -> None:
    with pytest.raises(ValueError, match="method"):
        request_head(method, read_address("http://m.example/"), {}, None)


def test_headers_are_found_whatever_their_case() -> None:
    pairs = [(b"retry-after", b"7"), (b"x-a", b"1"), (b"x-a", b"2"), (b"x-b", "ü".encode())]
    headers = Headers(collected(pairs))
    assert headers.get("Retry-After") == headers["RETRY-AFTER"] == "7"
    assert headers["X-A"] == "1", "the first of equal names"
    assert headers["x-b"] == "ü"
    assert headers.get("x-c") is None
    assert "X-b" in headers
    assert "x-c" not in headers
    assert dict(headers) == {"retry-after": "7", "x-a": "1", "x-b": "ü"}
    assert len(headers) == 3
    assert Headers({b"x": b"\xff"})["x"] == "\udcff", "what is no text is kept as it is"


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        (b"", ""),
        (b"application/json", "application/json"),
        (b"Text/Event-Stream ; charset=utf-8", "text/event-stream"),
        (b"a" * 500, "a" * 100),
    ],
)
def test_media_types(value: bytes, kind: str) -> None:
    assert media_type(value) == kind
