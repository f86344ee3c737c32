"""Messages between workers: found at every split, and what is no message is refused."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.core.frames import FRAME_BYTES_MAX, FrameError, FrameReader, frame
from router.types import Json

MESSAGES: list[Json] = [
    {"is": "event"},
    {"is": "ask", "id": 3, "payload": {"a": [1, None, "ä"]}},
    {},
]


@given(
    messages=st.lists(st.dictionaries(st.text(max_size=5), st.integers(-9, 9)), max_size=5),
    cuts=st.lists(st.integers(0, 300), max_size=8),
)
def test_messages_are_found_wherever_the_bytes_are_split(
    messages: list[dict[str, int]], cuts: list[int]
) -> None:
    data = b"".join(frame(message) for message in messages)
    edges = [0, *sorted(min(cut, len(data)) for cut in cuts), len(data)]
    reader, found = FrameReader(), []
    for start, end in pairwise(edges):
        found += reader.feed(data[start:end])
    assert found == messages


def test_byte_by_byte() -> None:
    reader, found = FrameReader(), []
    for byte in b"".join(frame(message) for message in MESSAGES):
        found += reader.feed(bytes([byte]))
    assert found == MESSAGES


@pytest.mark.parametrize(
    "data",
    [
        pytest.param((FRAME_BYTES_MAX + 1).to_bytes(4, "big"), id="too large, told by its length"),
        pytest.param(b"\x00\x00\x00\x01{", id="not JSON"),
        pytest.param(b"\x00\x00\x00\x02[]", id="not an object"),
        pytest.param(b"\x00\x00\x00\x00", id="nothing"),
    ],
)
def test_what_is_no_message_is_refused(data: bytes) -> None:
    with pytest.raises(FrameError):
        FrameReader().feed(data)


def test_what_nobody_would_read_is_not_sent() -> None:
    with pytest.raises(FrameError, match="at most"):
        frame({"x": "y" * FRAME_BYTES_MAX})
