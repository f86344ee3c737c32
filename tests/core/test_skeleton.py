"""Chunks that are passed without being read are such as would have passed as they came."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import orjson
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from router.core import jsontext
from router.core.chunks import ChunkWatch
from router.core.skeleton import Skeleton
from router.core.sse import SseParser, frame
from router.errors import UpstreamError

HEAD = '{"id":"chatcmpl-1","object":"chat.completion.chunk","created":1,"model":"m",'


def payload(inside: str, before: str = "", after: str = "") -> bytes:
    choice = f'{{"index":0,"delta":{{{before}"content":"{inside}"}},"finish_reason":null}}'
    return f'{HEAD}"choices":[{choice}]{after}}}'.encode("utf-8", "surrogatepass")


def skeleton_of(raw: bytes) -> Skeleton | None:
    return Skeleton.of(raw, jsontext.read(raw))


PLAIN = payload("Hello")


class TestWhatVouches:
    @pytest.mark.parametrize(
        "raw",
        [
            PLAIN,
            payload(""),
            payload("a", before='"role":"assistant",'),
            payload("a", before='"reasoning":null,"tool_calls":[],'),
            payload("a", after=',"usage":null,"error":null'),
            payload("a").replace(b'"content":"', b'"content": "'),
            payload("a").replace(b'"index"', b'"x":{"content":null},"index"'),
            payload("a").replace(b'"m"', '"mödel"'.encode()),
            payload("a", before='"content":null,'),
        ],
    )
    def test_a_chunk_with_a_text_alone(self, raw: bytes) -> None:
        found = skeleton_of(raw)
        assert found is not None
        text = jsontext.read(raw)["choices"][0]["delta"]["content"]
        assert found.read(frame(raw)) == (text, 1 if text else 0)

    @pytest.mark.parametrize(
        "raw",
        [
            payload("a", after=',"usage":{"prompt_tokens":1,"completion_tokens":1}'),
            payload("a", after=',"error":{"message":"no"}'),
            payload("a", before='"reasoning":"hm","reasoning_content":"hm",'),
            payload("a", before='"tool_calls":[{"index":0}],'),
            payload("a", before='"content":"first",'),
            payload("a", before='"refusal":{"content":"x"},'),
            payload("a").replace(b"null", b'"stop"'),
            payload("a").replace(b'"content":"a"', b'"content":null'),
            payload("a").replace(b'"content":"a"', b'"content":7,"note":"content"'),
            payload("a").replace(b'"content"', b'"content" '),
            payload("a").replace(b'"content"', b'"\\u0063ontent"'),
            payload("a").replace(b'"index"', b'"x":{"content":"a"},"index"'),
            payload('a\\"b'),
            payload("a\\nb"),
            payload("ä"),
            payload("a").replace(b",", b",\n", 1),
            payload("a").replace(b",", b",\r", 1),
            payload("a").replace(b'"m"', '"m\u2028"'.encode()),
            payload("a").replace(b'"m"', b'"\\ud800"'),
            payload("a").replace(b'"m"', b'"content","content":"a","object":"a"'),
            HEAD.encode() + b'"choices":[]}',
            HEAD.encode() + b'"choices":[{"index":0,"content":"a"}]}',
            b'{"id":"1","choices":[{"index":0,"delta":{"content":"a"}},{"index":1,"delta":{}}]}',
        ],
    )
    def test_nothing_else(self, raw: bytes) -> None:
        assert skeleton_of(raw) is None


class TestWhatIsVouchedFor:
    @pytest.mark.parametrize(
        ("inside", "text"),
        [
            ("", ""),
            ("a b", "a b"),
            ("ü\\n\\u00e9\\ud83d\\ude00", "ü\né😀"),
            ('\\"},\\"x\\":{\\"', '"},"x":{"'),
            ("\\\\", "\\"),
            ("\\u2028", "\u2028"),
            ("\x7f", "\x7f"),
        ],
    )
    def test_any_text_that_is_one_json_string(self, inside: str, text: str) -> None:
        found = skeleton_of(PLAIN)
        assert found is not None
        assert found.read(frame(payload(inside))) == (text, 1 if text else 0)

    @pytest.mark.parametrize(
        "inside",
        ["\\", '"', '","role":"x', "\\x", "\\ud800", "\u2028", "\u0085", "\t", "\n", "\r", "\x00"],
    )
    def test_nothing_that_would_not_pass_as_it_is(self, inside: str) -> None:
        found = skeleton_of(PLAIN)
        assert found is not None
        assert found.read(b"data: " + payload(inside) + b"\n\n") is None

    def test_no_broken_text(self) -> None:
        found = skeleton_of(PLAIN)
        assert found is not None
        assert found.read(frame(PLAIN).replace(b"Hello", b"\xff")) is None
        assert found.read(frame(PLAIN).replace(b"Hello", b"\xed\xa0\x80")) is None

    def test_nothing_that_is_framed_otherwise_or_not_whole(self) -> None:
        found = skeleton_of(PLAIN)
        assert found is not None
        one = frame(PLAIN)
        assert found.read(one + one + one) == ("HelloHelloHello", 3)
        assert found.read(one + frame(payload("")) + frame(payload("\\n"))) == ("Hello\n", 2)
        others = [one[:-1], one[1:], b"", b"\n" + one, one + b"\n", one + b": x\n\n" + one]
        others += [one + b"\n\n" + one, one.replace(b"\n", b"\r\n"), one + b"event: x\n" + one]
        others += [one.replace(b"data: ", b"data:"), one + b"data: [DONE]\n\n", one[:60] + one]
        others += [one.replace(b'"Hello"', b'"'), one + one.replace(b'"Hello"', b'"')]
        for other in others:
            assert found.read(other) is None


# --- passing at a glance and reading each chunk come to the same --------------------------------


class Passage:
    """One stream as the relay passes it on, with skeletons or without."""

    def __init__(self, *, glances: bool) -> None:
        self.glances = glances
        self.parser = SseParser()
        self.watch = ChunkWatch(who="gpu/m", call_id="ours", wants_usage=False)
        self.out = b""
        self.text = ""
        self.error: type[UpstreamError] | None = None
        self.glanced = 0

    def feed(self, data: bytes) -> None:
        watch, parser = self.watch, self.parser
        if self.glances and watch.skeleton is not None and parser.is_between_events:
            found = watch.skeleton.read(data)
            if found is not None and not watch.is_complete:
                watch.took(len(found[0]), found[1])
                self.text += found[0]
                self.out += data
                self.glanced += 1
                return
        unmended = None
        for event in parser.feed(data):
            try:
                passed = watch.see(event.data).payload
            except UpstreamError as error:
                self.error = type(error)
                return
            unmended = passed if passed is event.data else None
            if passed is not None:
                self.out += frame(passed)
                for choice in watch.last["choices"]:
                    delta = choice.get("delta")
                    content = delta.get("content") if isinstance(delta, dict) else None
                    self.text += content if isinstance(content, str) else ""
        if unmended is not None:
            watch.learn(unmended)

    @property
    def outcome(self) -> Any:
        watch = self.watch
        counts = (watch.content_chars, watch.content_chunks)
        unreported = (watch.unreported_chars, watch.unreported_chunks)
        states = (watch.usage, watch.is_complete, watch.has_choices, self.error)
        return self.out, self.text, counts, unreported, states, watch.closing_payloads()


def passed(reads: list[bytes], *, glances: bool) -> Passage:
    passage = Passage(glances=glances)
    for data in reads:
        if passage.error is None:
            passage.feed(data)
    return passage


TEXTS = st.one_of(
    st.sampled_from(
        ["", " word", "x", "\u2028", "ü", "😀", '"', "\\", "\n", '"},"finish_reason":"']
    ),
    st.text(max_size=12),
)
FIELDS = st.dictionaries(
    st.sampled_from(["role", "content", "reasoning", "reasoning_content", "refusal", "tool_calls"]),
    st.one_of(TEXTS, st.none(), st.just([]), st.just([{"function": {"arguments": "{"}}])),
    max_size=3,
)
USAGE = {"prompt_tokens": 3, "completion_tokens": 5}


@st.composite
def shapes(draw: st.DrawFn) -> Callable[[str, int], bytes]:
    """What the chunks of one server look like: a function from a text to an event's bytes.

    Most have a skeleton, or there would be little to compare.
    """
    pretty = draw(st.booleans())
    escapes = draw(st.booleans())
    head: dict[str, Any] = draw(
        st.sampled_from([{"id": "c"}] * 4 + [{"id": "c", "model": "ö", "usage": None}, {"id": ""}])
    )
    extra = draw(st.one_of(st.just({}), st.just({}), st.just({"role": "assistant"}), FIELDS))
    nested: dict[str, Any] = draw(
        st.sampled_from([{}, {}, {}, {}, {"x": {"content": "a"}}, {"note": '"content":"a"'}])
    )
    twice = draw(st.integers(0, 7)) == 0
    framing = draw(
        st.sampled_from(
            ["data: {}\n\n"] * 6 + ["data:{}\n\n", "data: {}\r\n\r\n", ": c\ndata: {}\n\n"]
        )
    )
    raw_breaks = draw(st.integers(0, 9)) == 0

    def event(text: str, how: int) -> bytes:
        delta = {**extra, "content": text}
        choice: dict[str, Any] = {"index": 0, **nested, "delta": delta, "finish_reason": None}
        chunk: dict[str, Any] = {**head, "choices": [choice]}
        if how == 1:
            choice["finish_reason"] = "eos"
        elif how == 2:
            chunk["usage"] = USAGE
        elif how == 3:
            chunk["choices"] = [choice, {"index": 1, "delta": {"content": text}}]
        elif how == 4:
            chunk = {**head, "choices": [], "usage": USAGE}
        elif how == 5:
            chunk = {"error": {"message": "broken", "code": 500}}
        separators = None if pretty else (",", ":")
        told = json.dumps(chunk, ensure_ascii=escapes, separators=separators)
        if twice:
            told = told.replace('"content":', '"content":"twice","content":', 1)
        if raw_breaks:
            told = told.replace("\\n", "\n")
        return framing.replace("{}", told).encode("utf-8", "surrogatepass")

    return event


@st.composite
def streams(draw: st.DrawFn) -> list[bytes]:
    """The reads of one stream: mostly an event each, some with several, some cut anywhere."""
    shape = draw(shapes())
    hows = st.sampled_from([0] * 40 + [1, 2, 3, 4, 5])
    events: list[tuple[str, int]] = draw(st.lists(st.tuples(TEXTS, hows), min_size=4, max_size=10))
    others = st.sampled_from([b"\n", b": ping\n\n", b"event: x\n", b"\xef\xbb\xbf", b"data: [DO"])
    reads: list[bytes] = []
    for text, how in events:
        data = shape(text, how)
        cut = draw(st.one_of(st.none(), st.none(), st.none(), st.integers(0, len(data))))
        is_joined = draw(st.booleans())
        if cut is not None:
            reads += [data[:cut], data[cut:]]
        elif reads and is_joined:
            reads[-1] += data
        else:
            reads.append(data)
        if draw(st.integers(0, 15)) == 0:
            reads.append(draw(others))
    return [data for data in reads if data]


@settings(max_examples=300)
@given(streams())
@example([frame(PLAIN), frame(PLAIN)[:-1], b"\n" + frame(PLAIN), frame(PLAIN)])
@example([frame(PLAIN), frame(payload("\\ud83d")), frame(payload("\\ude00"))])
def test_a_glance_and_a_look_come_to_the_same(reads: list[bytes]) -> None:
    assert passed(reads, glances=True).outcome == passed(reads, glances=False).outcome


@given(st.lists(TEXTS, min_size=3, max_size=12))
def test_most_of_an_ordinary_stream_needs_only_a_glance(texts: list[str]) -> None:
    ordinary = [payload(json.dumps(text)[1:-1]) for text in ["Once", *texts]]
    reads = [frame(raw) for raw in ordinary]
    fast = passed(reads, glances=True)
    assert fast.outcome == passed(reads, glances=False).outcome
    surrogates = sum("\\ud" in json.dumps(text) for text in texts)
    assert fast.glanced >= len(texts) - surrogates


@given(st.binary(max_size=24), st.integers(0, 200))
def test_no_bytes_within_an_event_are_misjudged(foreign: bytes, at: int) -> None:
    whole = frame(PLAIN)
    spoilt = whole[:at] + foreign + whole[at:]
    reads = [whole, spoilt, whole]
    assert passed(reads, glances=True).outcome == passed(reads, glances=False).outcome


def test_a_server_whose_chunks_are_never_alike_is_soon_given_up() -> None:
    watch = ChunkWatch(who="gpu/m", call_id="ours", wants_usage=False)
    for number in range(20):
        raw = orjson.dumps(
            {"id": f"{number}", "choices": [{"index": 0, "delta": {"content": "a"}}]}
        )
        watch.see(raw)
        watch.learn(raw)
    assert watch.skeleton is None
