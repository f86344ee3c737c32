"""A whole chat answer told as a stream, and a stream gathered into the whole answer.

Both follow what the `openai` package's own accumulator does with a stream
(`openai/lib/streaming/chat`): text fields are joined, tool calls merged by `index`, choices come
in the order of their index, and all else must come once. What cannot be merged without a guess
makes a stream no whole answer: `Whole.answer` is None then, and nothing is kept. So does whatever
was cut off: a whole answer has a finish reason for every choice.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from router.core import jsontext
from router.core.skeleton import Skeleton
from router.types import Json

_PIECE_CHARS_MAX = 128
# Said in each chunk; the rest of an answer's own fields is said once, at the end.
_HEAD = ("id", "created", "model", "service_tier", "system_fingerprint")
# The first word stands: servers that stamp each chunk anew mean the same answer.
_FIRST_STANDS = frozenset({"id", "created", "model"})
_LAST_STANDS = frozenset({"service_tier", "system_fingerprint", "usage"})
# Random filling that OpenAI adds against onlookers.
_FILLING = frozenset({"obfuscation"})
_TEXTS = ("reasoning", "reasoning_content", "content", "refusal")
# Where a call's own text is, by the kind of call.
_CALL_TEXTS = {"function": "arguments", "custom": "input"}
# So many skeletons that no chunk was like show a stream whose chunks are never alike.
_VAIN_MAX = 16


class _Unmergeable(Exception):
    """Joining this would be a guess."""


def payloads_of(answer: Json, *, include_usage: bool) -> list[bytes]:
    """The chunks of a stream that says this answer. Raises ValueError where none can."""
    try:
        return [jsontext.write(chunk) for chunk in _chunks_of(answer, include_usage)]
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"the answer has not the shape of a chat completion: {error!r}") from error


def _chunks_of(answer: Json, include_usage: bool) -> list[Json]:
    choices = answer["choices"]
    if not choices or sorted(choice["index"] for choice in choices) != list(range(len(choices))):
        raise ValueError("the answer's choices are not numbered from 0 on")
    if any(choice["finish_reason"] is None for choice in choices):
        raise ValueError("the answer has a choice without a finish reason")
    head: Json = {"object": "chat.completion.chunk"}
    head.update((name, answer[name]) for name in _HEAD if name in answer)
    if include_usage:
        head["usage"] = None
    said = {*head, "choices", "usage"}
    tail = {name: value for name, value in answer.items() if name not in said}
    chunks = [
        {**head, "choices": [piece]}
        for choice in sorted(choices, key=lambda one: int(one["index"]))
        for piece in _pieces_of(choice)
    ]
    chunks[-1].update(tail)
    if include_usage and answer.get("usage") is not None:
        chunks.append({**head, "choices": [], "usage": answer["usage"]})
    return chunks


def _pieces_of(choice: Json) -> Iterator[Json]:
    """One choice as the `choices` entries of its chunks."""
    message = choice["message"]
    said = {"index", "message", "finish_reason", "logprobs"}
    last = {name: value for name, value in choice.items() if name not in said}
    logprobs = choice.get("logprobs")

    def piece(delta: Json, about: Any = None) -> Json:
        return {
            "index": choice["index"],
            "delta": delta,
            "logprobs": about,
            "finish_reason": None,
        }

    yield piece(_opening(message))
    for name in _TEXTS:
        text = message.get(name)
        if name == "content" and logprobs is not None and isinstance(text, str):
            for part, about in _with_logprobs(text, logprobs):
                yield piece({name: part}, about)
            logprobs = None
        elif isinstance(text, str):
            for part in _parts(text):
                yield piece({name: part})
    for position, call in enumerate(message.get("tool_calls") or ()):
        opened, where, text = _opened_call(call)
        yield piece({"tool_calls": [{**opened, "index": position}]})
        for part in _parts(text):
            yield piece({"tool_calls": [{"index": position, **_call_text(where, part)}]})
    legacy: Json | None = message.get("function_call")
    if legacy is not None:
        for part in _parts(legacy["arguments"]):
            yield piece({"function_call": {"arguments": part}})
    yield {**piece({}, logprobs), **last, "finish_reason": choice["finish_reason"]}


def _opening(message: Json) -> Json:
    """The first delta: the role, texts that begin empty, and what comes in one piece."""
    opening: Json = {}
    for name, value in message.items():
        if name == "tool_calls" and value:
            continue
        if name == "function_call" and value is not None:
            opening[name] = {**value, "arguments": ""}
        elif name in _TEXTS and isinstance(value, str):
            opening[name] = ""
        else:
            opening[name] = value
    return opening


def _opened_call(call: Json) -> tuple[Json, str, str]:
    """A tool call without its text, the name of the text's place, and the text."""
    for where, name in _CALL_TEXTS.items():
        inner = call.get(where)
        if isinstance(inner, dict) and isinstance(inner.get(name), str):
            return {**call, where: {**inner, name: ""}}, where, inner[name]
    return call, "function", ""


def _call_text(where: str, part: str) -> Json:
    # The SDK builds a delta's type from what it accumulated, so the type is not said again.
    return {where: {_CALL_TEXTS[where]: part}}


def _with_logprobs(text: str, logprobs: Json) -> Iterator[tuple[str, Json | None]]:
    """Pieces of the text with the tokens of each, where the tokens spell the text; else all of
    the logprobs beside the first piece."""
    found = logprobs.get("content")
    tokens: list[Json] = found if isinstance(found, list) else []
    spelt = [token["token"] for token in tokens]
    plain = not logprobs.keys() - {"content", "refusal"} and not logprobs.get("refusal")
    if not plain or not text or "".join(spelt) != text:
        about: Json | None = logprobs
        for part in _parts(text) if text else [""]:
            yield part, about
            about = None
        return
    start, part = 0, ""
    for end, token in enumerate(spelt, start=1):
        part += token
        if len(part) >= _PIECE_CHARS_MAX or end == len(spelt):
            yield part, {**logprobs, "content": tokens[start:end]}
            start, part = end, ""


def _parts(text: str) -> Iterator[str]:
    """The text in pieces, cut behind white space where there is any."""
    start = 0
    while start < len(text):
        end = start + _PIECE_CHARS_MAX
        if end < len(text):
            space = text.rfind(" ", start + _PIECE_CHARS_MAX // 2, end)
            if space >= 0:
                end = space + 1
        yield text[start:end]
        start = end


class Whole:
    """Gathers one stream's chunks; memory is bounded by whoever feeds it."""

    def __init__(self) -> None:
        self._fields: Json = {}
        self._choices: dict[int, _Choice] = {}
        self._is_mergeable = True

    def take(self, chunk: Any) -> None:
        """One chunk as it was passed on; it is not changed, and may not be changed later."""
        if not self._is_mergeable:
            return
        try:
            self._merge(chunk)
        except _Unmergeable:
            self._is_mergeable = False
            self._fields, self._choices = {}, {}

    def may_be_told_at_once(self, chunk: Json) -> bool:
        """Whether chunks that differ from this one, taken last, in their text alone may be one."""
        # Logprobs add up from chunk to chunk, as texts do.
        return self._is_mergeable and not any(one.get("logprobs") for one in chunk["choices"])

    def answer(self) -> Json | None:
        """The whole answer, or None where it is not complete or cannot be put together."""
        if not self._choices or sorted(self._choices) != list(range(len(self._choices))):
            return None
        if any(choice.finish_reason is None for choice in self._choices.values()):
            return None
        choices = [choice.answer(index) for index, choice in sorted(self._choices.items())]
        return {**self._fields, "object": "chat.completion", "choices": choices}

    def _merge(self, chunk: Json) -> None:
        for name, value in _dict(chunk).items():
            if name == "choices":
                continue
            if name == "object":
                if value != "chat.completion.chunk":
                    raise _Unmergeable
            elif name == "error" and value is not None:
                raise _Unmergeable
            elif name in _LAST_STANDS:
                if value is not None:
                    self._fields[name] = value
                elif name != "usage":
                    self._fields.setdefault(name, None)
            elif name in _FIRST_STANDS:
                self._fields.setdefault(name, value)
            elif name not in _FILLING and not (
                isinstance(value, str) and self._fields.get(name) == value
            ):
                _once(self._fields, name, value)
        for choice in _dicts(chunk.get("choices")):
            index = choice.get("index")
            if type(index) is not int:
                raise _Unmergeable
            found = self._choices.get(index)
            if found is None:
                found = self._choices[index] = _Choice()
            found.merge(choice)


class _Choice:
    """One choice as far as it has come."""

    def __init__(self) -> None:
        self.finish_reason: str | None = None
        self._fields: Json = {}
        self._logprobs: Json | None = None
        self._message: Json = {}
        self._texts: dict[str, list[str]] = {}
        self._calls: dict[int, _ToolCall] = {}
        self._legacy: _Named | None = None

    def merge(self, choice: Json) -> None:
        for name, value in choice.items():
            if name == "delta":
                if value is not None:
                    self._merge_delta(_dict(value))
            elif name == "finish_reason":
                if value is not None and self.finish_reason not in (None, value):
                    raise _Unmergeable
                self.finish_reason = value if value is not None else self.finish_reason
            elif name == "logprobs":
                if value is not None:
                    self._merge_logprobs(_dict(value))
            elif name != "index":
                _once(self._fields, name, value)

    def answer(self, index: int) -> Json:
        message: Json = {"role": "assistant", "content": None, **self._message}
        for name, parts in self._texts.items():
            message[name] = _joined(parts)
        if self._calls:
            message["tool_calls"] = [call.answer() for _, call in sorted(self._calls.items())]
        if self._legacy is not None:
            message["function_call"] = self._legacy.answer()
        return {
            "index": index,
            "message": message,
            "logprobs": self._logprobs,
            "finish_reason": self.finish_reason,
            **self._fields,
        }

    def _merge_delta(self, delta: Json) -> None:
        for name, value in delta.items():
            if name in _TEXTS:
                if isinstance(value, str):
                    self._texts.setdefault(name, []).append(value)
                elif value is not None:
                    raise _Unmergeable
                else:
                    self._message.setdefault(name, None)
            elif name == "role":
                if value is not None and self._message.get(name, value) != value:
                    raise _Unmergeable
                self._message[name] = value or self._message.get(name) or "assistant"
            elif name == "tool_calls":
                if not value:
                    self._message.setdefault(name, value)
                for call in _dicts(value or []):
                    index = call.get("index")
                    if type(index) is not int:
                        raise _Unmergeable
                    self._calls.setdefault(index, _ToolCall()).merge(call)
            elif name == "function_call" and value is not None:
                if self._legacy is None:
                    self._legacy = _Named("arguments")
                self._legacy.merge(_dict(value))
            elif name not in _FILLING:
                _once(self._message, name, value)

    def _merge_logprobs(self, logprobs: Json) -> None:
        if self._logprobs is None:
            self._logprobs = {}
        for name, value in logprobs.items():
            if name not in ("content", "refusal"):
                _once(self._logprobs, name, value)
            elif value is None:
                self._logprobs.setdefault(name, None)
            elif isinstance(value, list):
                if self._logprobs.get(name) is None:
                    self._logprobs[name] = []
                self._logprobs[name].extend(value)
            else:
                raise _Unmergeable


class _Named:
    """What has a name and a text: the inner part of a call."""

    def __init__(self, text_name: str) -> None:
        self._text_name = text_name
        self._fields: Json = {}
        self._parts: list[str] = []

    def merge(self, inner: Json) -> None:
        for name, value in inner.items():
            if name != self._text_name:
                _repeated(self._fields, name, value)
            elif isinstance(value, str):
                self._parts.append(value)
            elif value is not None:
                raise _Unmergeable

    def answer(self) -> Json:
        return {**self._fields, self._text_name: _joined(self._parts)}


class _ToolCall:
    """One tool call as far as it has come."""

    def __init__(self) -> None:
        self._fields: Json = {}
        self._inner: dict[str, _Named] = {}

    def merge(self, call: Json) -> None:
        for name, value in call.items():
            if name in _CALL_TEXTS:
                if value is not None:
                    inner = self._inner.setdefault(name, _Named(_CALL_TEXTS[name]))
                    inner.merge(_dict(value))
            elif name != "index":
                _repeated(self._fields, name, value)

    def answer(self) -> Json:
        return {**self._fields, **{name: inner.answer() for name, inner in self._inner.items()}}


def is_cut(answer: bytes) -> bool:
    """Whether a choice of this whole answer ended because it could not be longer."""
    if b'"finish_reason"' in answer and b'"length"' not in answer and b"\\u" not in answer:
        # Nearly all: what no text says cannot be found by a parse either.
        return False
    try:
        choices = jsontext.read(answer)["choices"]
        return any(choice.get("finish_reason") == "length" for choice in choices)
    except (ValueError, TypeError, KeyError, AttributeError):
        return True


def whole_of(payloads: Iterable[bytes]) -> Json | None:
    """The whole answer that these chunks' payloads say, or None. Raises ValueError on no JSON."""
    whole = Whole()
    skeleton: Skeleton | None = None
    vain = 0
    chunk: Any = None
    texts: list[str] = []
    for payload in payloads:
        text = None if skeleton is None else skeleton.text_of(b"data: %b\n\n" % payload)
        if text is not None:
            texts.append(text)
            vain = 0
            continue
        if texts:
            whole.take(_with_text(chunk, texts))
            texts = []
        chunk = jsontext.read(payload)
        whole.take(chunk)
        skeleton = None
        if vain < _VAIN_MAX and whole.may_be_told_at_once(chunk):
            skeleton = Skeleton.of(payload, chunk)
            vain += 1
    if texts:
        whole.take(_with_text(chunk, texts))
    return whole.answer()


def _with_text(chunk: Json, texts: list[str]) -> Json:
    """What chunks say together that differ from this one in nothing but their text. All else of
    it is merged a second time, as it would be with each of them."""
    (choice,) = chunk["choices"]
    delta = {**choice["delta"], "content": "".join(texts)}
    return {**chunk, "choices": [{**choice, "delta": delta}]}


def _once(fields: Json, name: str, value: Any) -> None:
    """A value that comes in one piece. A second one could be meant to be added, or to replace."""
    if value is None:
        fields.setdefault(name, None)
    elif fields.get(name) is None:
        fields[name] = value
    else:
        raise _Unmergeable


def _repeated(fields: Json, name: str, value: Any) -> None:
    """A name or id, which some servers leave empty in, and others repeat with, each fragment."""
    before = fields.get(name)
    if before is None or before == "":
        fields[name] = value
    elif value not in (None, "", before):
        raise _Unmergeable


def _dict(value: Any) -> Json:
    if not isinstance(value, dict):
        raise _Unmergeable
    return value


def _dicts(value: Any) -> list[Json]:
    if not isinstance(value, list):
        raise _Unmergeable
    return [_dict(one) for one in value]


def _joined(parts: list[str]) -> str:
    """The whole text; halves of one character that came in two fragments are one again."""
    text = "".join(parts)
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "surrogatepass")
    return text
