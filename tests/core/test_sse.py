"""The parser gives the same events however its bytes are cut; the writer only what all can read."""

from __future__ import annotations

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.core.sse import SseEvent, SseOverflow, SseParser, comment, frame


def data(*payloads: bytes) -> list[SseEvent]:
    return [SseEvent(b"", payload) for payload in payloads]


# name: the stream, its events while it is open, and the one that its end adds.
STREAMS: dict[str, tuple[bytes, list[SseEvent], list[SseEvent]]] = {
    "lf": (b"data: a\n\ndata: b\n\n", data(b"a", b"b"), []),
    "crlf": (b"data: a\r\n\r\ndata: b\r\n\r\n", data(b"a", b"b"), []),
    "bare cr": (b"data: a\r\rdata: b\r\r", data(b"a", b"b"), []),
    "mixed ends": (b"data: a\r\n\ndata: b\r\rdata: c\n\r\n", data(b"a", b"b", b"c"), []),
    "bom": (b"\xef\xbb\xbfdata: a\n\n", data(b"a"), []),
    "a bom later is no bom": (b"data: a\n\n\xef\xbb\xbfdata: b\n\n", data(b"a"), []),
    "the beginning of a bom only": (b"\xef\xbb", [], []),
    "no space": (b"data:a\n\ndata:  b\n\n", data(b"a", b" b"), []),
    "comments": (b": hello\n\n:\n\ndata: a\n: in between\n\n", data(b"a"), []),
    "several data lines": (b"data: a\ndata: b\ndata:\ndata: c\n\n", data(b"a\nb\n\nc"), []),
    "a field without a colon": (b"data\ndata: a\n\n", data(b"\na"), []),
    "event name": (
        b"event: error\ndata: a\n\ndata: b\n\n",
        [SseEvent(b"error", b"a"), SseEvent(b"", b"b")],
        [],
    ),
    "ping without data": (b"event: ping\n\ndata: a\n\n", data(b"a"), []),
    "empty data": (b"data:\n\ndata: \n\ndata\n\ndata: a\n\n", data(b"a"), []),
    "id and retry": (b"id: 1\nretry: 10\n\nid: 2\ndata: a\nretry: 5\n\n", data(b"a"), []),
    "unknown fields": (b"datax: 1\nfoo: bar\ndata: a\n\n", data(b"a"), []),
    "other line ends are text": (
        "data: \u2028\u2029\x85\x0b\x0c\n\n".encode(),
        data("\u2028\u2029\x85\x0b\x0c".encode()),
        [],
    ),
    "several bytes a character": (
        "data: wörld \U0001f600\n\n".encode(),
        data("wörld 😀".encode()),
        [],
    ),
    "no blank line at the end": (b"data: a\n\ndata: b\n", data(b"a"), data(b"b")),
    "no line end at the end": (b"data: a\n\ndata: [DONE]", data(b"a"), data(b"[DONE]")),
    "cut in a field name": (b"data: a\n\ndat", data(b"a"), []),
    "nothing": (b"", [], []),
}


def read(pieces: list[bytes]) -> tuple[list[SseEvent], list[SseEvent]]:
    parser = SseParser()
    return [event for piece in pieces for event in parser.feed(piece)], parser.finish()


@pytest.mark.parametrize("name", STREAMS)
class TestSplits:
    def test_whole(self, name: str) -> None:
        stream, events, last = STREAMS[name]
        assert read([stream]) == (events, last)

    def test_byte_by_byte(self, name: str) -> None:
        stream, events, last = STREAMS[name]
        assert read([stream[i : i + 1] for i in range(len(stream))]) == (events, last)

    def test_at_every_split(self, name: str) -> None:
        stream, events, last = STREAMS[name]
        for i in range(len(stream) + 1):
            assert read([stream[:i], b"", stream[i:]]) == (events, last), i


ALPHABET = [
    b"\n",
    b"\r",
    b"\r\n",
    b"data: ",
    b"data",
    b":",
    b" ",
    b"event: x",
    b"a",
    b"\xef\xbb\xbf",
]


@given(st.lists(st.sampled_from(ALPHABET)).map(b"".join), st.data())
def test_any_stream_reads_the_same_however_it_is_cut(stream: bytes, draw: st.DataObject) -> None:
    cuts = sorted(draw.draw(st.sets(st.integers(0, len(stream)))))
    pieces = [stream[a:b] for a, b in zip([0, *cuts], [*cuts, len(stream)], strict=True)]
    assert read(pieces) == read([stream])


@given(st.lists(st.text(min_size=1).map(lambda text: text.replace("\r", "").replace("\n", ""))))
def test_what_is_written_is_read_again(texts: list[str]) -> None:
    payloads = [text.encode("utf-8", "surrogatepass") for text in texts if text]
    wire = b"".join(b"data: " + payload + b"\n\n" for payload in payloads)
    assert read([wire]) == (data(*payloads), [])


class TestOverflow:
    @pytest.mark.parametrize(
        "piece",
        [b"data: xxxxxxxx", b"data: xxxxxxx\n", b"data:\n", b"data\n", b"x" * 8, b": xxxxx"],
        ids=["line", "lines", "empty lines", "bare lines", "no field", "comment"],
    )
    def test_one_event_cannot_grow_without_end(self, piece: bytes) -> None:
        parser = SseParser(event_bytes_max=100)

        def feed_for_ever() -> None:
            for _ in range(200):
                parser.feed(piece)

        with pytest.raises(SseOverflow, match="larger than 100 bytes"):
            feed_for_ever()

    def test_many_events_within_it_pass(self) -> None:
        parser = SseParser(event_bytes_max=100)
        for _ in range(50):
            assert parser.feed(b"data: " + b"x" * 60 + b"\n\n") == data(b"x" * 60)

    def test_a_long_line_in_many_pieces_is_whole(self) -> None:
        parser = SseParser()
        assert parser.feed(b"data: ") == []
        for _ in range(1000):
            assert parser.feed(b"x" * 1000) == []
        assert parser.feed(b"\n\n") == data(b"x" * 1_000_000)


class TestFrame:
    @pytest.mark.parametrize(
        ("payload", "wire"),
        [
            (b'{"a": 1}', b'data: {"a": 1}\n\n'),
            (b'{"a":\n1}', b'data: {"a": 1}\n\n'),
            ('{"a": "wörld"}'.encode(), 'data: {"a": "wörld"}\n\n'.encode()),
            ('"\u2028\u2029\x85é"'.encode(), 'data: "\\u2028\\u2029\\u0085é"\n\n'.encode()),
        ],
    )
    def test_only_the_framing_is_touched(self, payload: bytes, wire: bytes) -> None:
        assert frame(payload) == wire

    @given(st.text())
    def test_no_client_sees_a_line_end_inside(self, text: str) -> None:
        payload = orjson.dumps(text.encode("utf-8", "replace").decode())
        lines = frame(payload).decode().splitlines()
        assert lines[1:] == [""]
        assert orjson.loads(lines[0].removeprefix("data: ")) == orjson.loads(payload)


@pytest.mark.parametrize(
    "text", ["queue 3 of 5", "a\nb", "a\r\n\r\ndata: b", "a\u2028data: b", "", "wörld"]
)
def test_a_comment_is_one_line_whatever_it_says(text: str) -> None:
    wire = comment(text)
    assert wire.endswith(b"\n\n")
    assert len(wire.decode().splitlines()) == 2
    assert read([wire]) == ([], [])
