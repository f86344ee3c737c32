"""What the chunks of one stream have in common, so that the most of them need not be read. Pure.

Nearly all chunks of an answer differ in nothing but the text of their only choice. One that was
read, and passed as it came, vouches for every other whose bytes before the text and behind it are
the same, if what stands between is the inside of one JSON string: it says the same but for the
text, so nothing in it is to be mended, nothing but the text is to be counted, and its bytes may go
out as they came, framing included.

That the bytes between are the text, and not some other string of a chunk with odd or double keys,
is proved once: with one letter more there, the chunk has one letter more in its text.
"""

from __future__ import annotations

import re
from typing import Self

import orjson

from router.core.sse import frame
from router.types import Json

_EVENT_END = b"\n\n"
_CONTENT = re.compile(rb'"content": ?"')
# What is the same inside a JSON string and outside.
_is_plain = re.compile(rb"[ !#-\[\]-~]*").fullmatch


class Skeleton:
    """The bytes of an event before its text and behind it, to its very end."""

    __slots__ = ("_after", "_before")

    def __init__(self, before: bytes, after: bytes) -> None:
        self._before = before
        self._after = after

    @classmethod
    def of(cls, payload: bytes, chunk: Json) -> Self | None:
        """That of a chunk which passed unmended, and its payload; None where it is of no use."""
        content = _only_text(chunk)
        found = _CONTENT.search(payload)
        if content is None or found is None:
            return None
        start = found.end()
        end = payload.find(b'"', start)
        inside = payload[start:end]
        if not _is_plain(inside) or b"\r" in payload:
            return None
        before, after = b"data: " + payload[:start], payload[end:] + _EVENT_END
        if before + inside + after != frame(payload):
            return None
        try:
            longer = orjson.loads(payload[:start] + inside + b"x" + payload[end:])
            is_proved = longer["choices"][0]["delta"]["content"] == content + "x"
        except (ValueError, LookupError, TypeError):
            return None
        return cls(before, after) if is_proved else None

    def read(self, data: bytes) -> tuple[str, int] | None:
        """All the text, and how many events have some, if `data` is nothing but whole events of
        this skeleton and may be passed on as it is."""
        before, after = self._before, self._after
        if not data.startswith(before) or not data.endswith(after):
            return None
        inside = data[len(before) : -len(after)]
        if _is_plain(inside) and len(data) >= len(before) + len(after):
            # One event, as nearly every read is.
            return inside.decode("ascii"), 1 if inside else 0
        texts = []
        for event in data[: -len(_EVENT_END)].split(_EVENT_END):
            text = self.text_of(event + _EVENT_END)
            if text is None:
                return None
            texts.append(text)
        return "".join(texts), sum(map(bool, texts))

    def text_of(self, event: bytes) -> str | None:
        """The text of one whole event, if it is of this skeleton."""
        before, after = self._before, self._after
        if len(event) < len(before) + len(after):
            return None
        if not event.startswith(before) or not event.endswith(after):
            return None
        return _text(event[len(before) : -len(after)])


def _only_text(chunk: Json) -> str | None:
    """The text of a chunk that brings one choice's text and nothing else."""
    choices = chunk["choices"]
    if len(choices) != 1 or chunk.get("usage") is not None or chunk.get("error"):
        return None
    choice = choices[0]
    delta = choice.get("delta")
    if choice.get("finish_reason") or type(delta) is not dict:
        return None
    content = delta.get("content")
    if type(content) is not str:
        return None
    for name, value in delta.items():
        if value and name not in ("content", "role"):
            return None
    return content


def _text(inside: bytes) -> str | None:
    """What a JSON string with this inside says; None where there is none, or its event would not
    pass as it is."""
    if _is_plain(inside):
        return inside.decode("ascii")
    quoted = b'"' + inside + b'"'
    try:
        text: str = orjson.loads(quoted)
    except orjson.JSONDecodeError:
        return None
    return text if frame(quoted) == b"data: " + quoted + _EVENT_END else None
