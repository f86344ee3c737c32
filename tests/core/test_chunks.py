"""A stream's chunks pass as they came unless a client would read them wrongly."""

from __future__ import annotations

from typing import Any

import orjson
import pytest

from router.core.chunks import ChunkWatch, produced_chars, usage_in
from router.errors import (
    CallerMistake,
    PromptTooLong,
    UpstreamBroken,
    UpstreamBusy,
    UpstreamError,
    UpstreamFailed,
)
from router.types import Usage

TOP = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1, "model": "m"}
USAGE = {"prompt_tokens": 5, "completion_tokens": 7, "total_tokens": 12}


def watch(*, wants_usage: bool = False) -> ChunkWatch:
    return ChunkWatch(who="gpu/org/m", call_id="chatcmpl-ours", wants_usage=wants_usage)


def choice(delta: Any, finish: Any = None, index: int = 0) -> dict[str, Any]:
    return {"index": index, "delta": delta, "logprobs": None, "finish_reason": finish}


def chunk(*choices: Any, **fields: Any) -> bytes:
    return orjson.dumps({**TOP, "choices": list(choices), **fields})


def seen(payload: bytes) -> Any:
    passed = watch().see(payload).payload
    assert passed is not None
    return orjson.loads(passed)


UNTOUCHED = {
    "role": chunk(choice({"role": "assistant", "content": "", "refusal": None})),
    "content": chunk(choice({"content": "hello"})),
    "white space and key order": b'{ "choices" : [ {"delta":{"content":"a"},"index":0} ],"id":"x"}',
    "escapes": b'{"id":"x","choices":[{"index":0,"delta":{"content":"\\u00e9\\/"}}]}',
    "numbers": b'{"id":"x","choices":[{"index":0,"delta":{"content":"a"},"t":1.0e-05}]}',
    "unknown fields": chunk(choice({"content": "a"}, index=0), timings={"x": [1]}, obfuscation="z"),
    "usage null": chunk(choice({"content": "a"}), usage=None),
    "finish": chunk(choice({}, "stop")),
    "tool call": chunk(
        choice({"tool_calls": [{"index": 0, "id": "c", "function": {"arguments": "{"}}]})
    ),
    "no choices and no usage": chunk(prompt_filter_results=[]),
    "both reasonings": chunk(choice({"reasoning": "r", "reasoning_content": "r"})),
    "reasoning null": chunk(choice({"content": "a", "reasoning_content": None})),
    "a choice without a delta": b'{"id":"x","choices":[{"index":0}]}',
    "an error that is none": chunk(choice({"content": "a"}), error=None),
    "a key twice": b'{"id":"x","id":"y","choices":[{"index":0,"delta":{"content":"a"}}]}',
}


@pytest.mark.parametrize("name", UNTOUCHED)
def test_nothing_wrong_passes_byte_for_byte(name: str) -> None:
    assert watch().see(UNTOUCHED[name]).payload == UNTOUCHED[name]


class TestRepairs:
    @pytest.mark.parametrize("told", [{"id": ""}, {"id": None}])
    def test_an_empty_id(self, told: Any) -> None:
        assert seen(chunk(choice({"content": "a"}), **told))["id"] == "chatcmpl-ours"

    def test_a_missing_id(self) -> None:
        assert seen(b'{"choices":[{"index":0,"delta":{}}]}')["id"] == "chatcmpl-ours"

    @pytest.mark.parametrize(
        ("told", "known"),
        [
            ("eos_token", "stop"),
            ("stop_sequence", "stop"),
            ("end_turn", "stop"),
            ("max_tokens", "length"),
            ("model_length", "length"),
            ("tool_use", "tool_calls"),
            ("something new", "stop"),
            (["stop"], "stop"),
            ({"a": 1}, "stop"),
            (7, "stop"),
            ("", None),
            (0, None),
        ],
    )
    def test_finish_reasons(self, told: Any, known: str | None) -> None:
        assert seen(chunk(choice({}, told)))["choices"][0]["finish_reason"] == known

    @pytest.mark.parametrize("known", ["stop", "length", "tool_calls", "content_filter"])
    def test_openais_own_finish_reasons_stay(self, known: str) -> None:
        assert seen(chunk(choice({}, known)))["choices"][0]["finish_reason"] == known

    def test_a_missing_choice_index(self) -> None:
        assert seen(b'{"id":"x","choices":[{"delta":{"content":"a"}}]}')["choices"][0]["index"] == 0

    def test_missing_tool_indexes(self) -> None:
        calls = [{"id": "a"}, {"id": "b", "index": None}, {"id": "c", "index": 7}]
        found = seen(chunk(choice({"tool_calls": calls})))["choices"][0]["delta"]["tool_calls"]
        assert [call["index"] for call in found] == [0, 1, 7]

    @pytest.mark.parametrize("name", ["reasoning", "reasoning_content"])
    def test_reasoning_gets_both_its_names(self, name: str) -> None:
        delta = seen(chunk(choice({name: "hm", "content": None})))["choices"][0]["delta"]
        assert delta == {"content": None, "reasoning": "hm", "reasoning_content": "hm"}

    def test_a_repair_leaves_every_other_field(self) -> None:
        before = {**TOP, "id": "", "choices": [choice({"content": "wörld"})], "x": {"y": [1, None]}}
        assert seen(orjson.dumps(before)) == {**before, "id": "chatcmpl-ours"}


class TestUsage:
    def test_a_chunk_that_only_we_asked_for_is_taken_out(self) -> None:
        following = watch()
        assert following.see(chunk(usage=USAGE)) == (None, False)
        assert following.usage == Usage(5, 7)

    def test_one_that_the_client_asked_for_stays(self) -> None:
        payload = chunk(usage=USAGE)
        assert watch(wants_usage=True).see(payload) == (payload, False)

    def test_usage_beside_content_stays(self) -> None:
        following, payload = watch(), chunk(choice({"content": "a"}, "stop"), usage=USAGE)
        assert following.see(payload) == (payload, True)
        assert following.usage == Usage(5, 7)

    def test_the_last_believable_one_counts(self) -> None:
        following = watch()
        for tokens in (1, 2, -3):
            following.see(chunk(usage={"prompt_tokens": 5, "completion_tokens": tokens}))
        assert following.usage == Usage(5, 2)

    @pytest.mark.parametrize(
        ("value", "usage"),
        [
            (USAGE, Usage(5, 7)),
            ({"prompt_tokens": 5}, Usage(5, 0)),
            ({"completion_tokens": 5}, None),
            ({"prompt_tokens": True, "completion_tokens": 1}, None),
            ({"prompt_tokens": 5, "completion_tokens": 1.5}, None),
            ({"prompt_tokens": -1, "completion_tokens": 1}, None),
            ([], None),
            (None, None),
        ],
    )
    def test_what_is_believed(self, value: Any, usage: Usage | None) -> None:
        assert usage_in(value) == usage


@pytest.mark.parametrize(
    ("delta", "finish", "commits"),
    [
        ({"role": "assistant"}, None, False),
        ({"role": "assistant", "content": ""}, None, False),
        ({"role": "assistant", "content": "", "refusal": None, "tool_calls": []}, None, False),
        ({}, None, False),
        (None, None, False),
        ({"role": "assistant", "content": "a"}, None, True),
        ({"content": " "}, None, True),
        ({"reasoning": "a"}, None, True),
        ({"reasoning_content": "a"}, None, True),
        ({"refusal": "no"}, None, True),
        ({"tool_calls": [{"index": 0, "function": {"name": "f"}}]}, None, True),
        ({"function_call": {"name": "f"}}, None, True),
        ({"audio": {"id": "a"}}, None, True),
        ({}, "stop", True),
        (None, "length", True),
        ({}, "", False),
    ],
)
def test_what_commits(delta: Any, finish: Any, commits: bool) -> None:
    assert watch().see(chunk(choice(delta, finish))).commits is commits


class TestCompleteness:
    def test_a_plain_answer(self) -> None:
        following = watch()
        states = [(following.has_choices, following.is_complete)]
        for delta, finish in (
            ({"role": "assistant"}, None),
            ({"content": "héllo"}, None),
            ({}, "stop"),
        ):
            following.see(chunk(choice(delta, finish)))
            states.append((following.has_choices, following.is_complete))
        assert states == [(False, False), (True, False), (True, False), (True, True)]
        assert following.closing_payloads() == []
        assert (following.content_chars, following.content_chunks) == (5, 1)

    def test_several_choices_each_need_their_end(self) -> None:
        following = watch()
        following.see(chunk(choice({"content": "a"}), choice({"content": "b"}, index=1)))
        following.see(chunk(choice({}, "stop", index=1)))
        assert not following.is_complete
        following.see(chunk(choice({}, "length")))
        assert following.is_complete

    def test_content_after_the_end_does_not_undo_it(self) -> None:
        following = watch()
        following.see(chunk(choice({}, "stop")))
        following.see(chunk(choice({})))
        assert following.is_complete

    def test_done_without_an_end_closes_each_open_choice(self) -> None:
        following = watch()
        following.see(chunk(choice({"content": "a"}), choice({}, "stop", index=1)))
        following.see(chunk(choice({"tool_calls": [{"index": 0}]}, index=2), id="chatcmpl-1"))
        closing = [orjson.loads(payload) for payload in following.closing_payloads()]
        assert closing == [
            {**TOP, "choices": [choice({}, "stop")]},
            {**TOP, "choices": [choice({}, "tool_calls", index=2)]},
        ]
        assert following.is_complete
        assert following.closing_payloads() == []

    def test_the_closing_chunk_has_the_id_that_was_mended(self) -> None:
        following = watch()
        following.see(chunk(choice({"content": "a"}), id=""))
        (payload,) = following.closing_payloads()
        assert orjson.loads(payload)["id"] == "chatcmpl-ours"

    def test_nothing_begun_has_nothing_to_close(self) -> None:
        following = watch()
        following.see(chunk(usage=USAGE))
        assert following.closing_payloads() == []
        assert not following.has_choices

    def test_choices_are_bounded(self) -> None:
        following = watch()
        following.see(chunk(*(choice({"content": "a"}, index=i) for i in range(128))))
        following.see(chunk(choice({}, "stop", index=5)))
        with pytest.raises(UpstreamBroken, match="more than 128 choices"):
            following.see(chunk(choice({}, index=128)))


ERRORS: dict[str, tuple[Any, type[UpstreamError]]] = {
    "openai": ({"error": {"message": "it broke", "type": "server_error"}}, UpstreamFailed),
    "tgi": ({"error": {"message": "Model is overloaded", "http_status_code": 422}}, UpstreamBusy),
    "tgi native": ({"error": "x", "error_type": "overloaded"}, UpstreamBusy),
    "old vllm": ({"object": "error", "message": "bad", "code": 400}, CallerMistake),
    "flat": ({"message": "x", "type": "Overloaded"}, UpstreamBusy),
    "too long": (
        {"error": {"message": "x", "code": "context_length_exceeded"}},
        PromptTooLong,
    ),
    "fastapi": ({"detail": "oh no"}, UpstreamFailed),
    "beside choices": (
        {**TOP, "choices": [choice({"content": ""}, "error")], "error": {"message": "it broke"}},
        UpstreamFailed,
    ),
    "beside no choices": ({**TOP, "choices": [], "error": "it broke"}, UpstreamFailed),
    "given up": ({**TOP, "choices": [choice({}, "abort")]}, UpstreamFailed),
    "given up with an error": ({**TOP, "choices": [choice({}, "error")]}, UpstreamFailed),
    "something else": ({"hello": 1}, UpstreamBroken),
    "a list": ([1], UpstreamBroken),
    "a number": (5, UpstreamBroken),
    "choices of no list": ({"choices": {}}, UpstreamBroken),
    "a choice of no object": ({"choices": ["a"]}, UpstreamBroken),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors(name: str) -> None:
    value, kind = ERRORS[name]
    with pytest.raises(kind) as caught:
        watch().see(orjson.dumps(value))
    assert type(caught.value) is kind
    assert "gpu/org/m" in caught.value.message


@pytest.mark.parametrize("payload", [b"", b"hello", b'{"choices":', b"\xff", b"[" * 5000])
def test_what_is_not_json(payload: bytes) -> None:
    with pytest.raises(UpstreamBroken, match="not JSON"):
        watch().see(payload)


@pytest.mark.parametrize(
    ("message", "chars"),
    [
        ({"role": "assistant", "content": "hello", "refusal": None}, 5),
        ({"content": "", "reasoning": "why", "reasoning_content": "why"}, 3),
        ({"reasoning": "", "reasoning_content": "why"}, 3),
        ({"tool_calls": [{"function": {"name": "f", "arguments": "{}"}}, 7]}, 3),
        ({"function_call": {"name": "f", "arguments": "{}"}}, 3),
        ({"content": [{"type": "thinking", "thinking": [{"text": "why", "at": 0}]}]}, 3),
        ({"reasoning": "why", "reasoning_details": [{"text": "why", "index": 0}]}, 3),
    ],
)
def test_all_that_was_produced_is_counted_once(message: Any, chars: int) -> None:
    assert produced_chars(message) == chars


def test_what_comes_after_the_newest_usage_is_known_to_be_missing_in_it() -> None:
    following = watch()
    following.see(chunk(choice({"role": "assistant"}), usage=USAGE))
    following.see(chunk(choice({"content": "abc"})))
    assert (following.unreported_chars, following.unreported_chunks) == (3, 1)
    following.see(chunk(choice({"content": "de"}), usage={"prompt_tokens": -1}))
    assert (following.unreported_chars, following.unreported_chunks) == (5, 2)
    following.see(chunk(choice({"content": "f"}), usage=USAGE))
    assert (following.unreported_chars, following.unreported_chunks) == (0, 0)
    following.see(chunk(choice({"content": "g"})))
    following.see(chunk(usage=USAGE))
    assert (following.unreported_chars, following.content_chars) == (0, 7)
