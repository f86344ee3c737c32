"""An answer told as a stream and gathered again is the same; what is unsure is no answer."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from openai.lib.streaming.chat import ChatCompletionStreamState
from openai.types.chat import ChatCompletionChunk

from router.core import replay
from router.core.replay import Whole, payloads_of, whole_of

WORDS = st.sampled_from(["", "no", "a word " * 50, "x" * 300, "\u2028\U0001f600é " * 40])
CLEAN = st.text(st.characters(exclude_categories=["Cs"]), max_size=9) | WORDS
TEXT = CLEAN | st.sampled_from(["\ud83d", "\ude00 half", "x" * 127 + "\ud800"])
AUDIO = {"id": "a", "data": "x", "expires_at": 1, "transcript": "t"}
VALUE = st.none() | st.integers(-5, 5) | st.lists(st.text(max_size=3), max_size=2)


def token(text: str) -> Any:
    return {"token": text, "logprob": -0.5, "bytes": None, "top_logprobs": []}


@st.composite
def messages(draw: st.DrawFn, text: st.SearchStrategy[str]) -> Any:
    message: Any = {"role": "assistant", "content": draw(st.none() | text)}
    for name in ("refusal", "reasoning", "reasoning_content"):
        if draw(st.booleans()):
            message[name] = draw(st.none() | text)
    if draw(st.booleans()):
        message["annotations"] = draw(st.just([]) | st.just(None))
    if draw(st.booleans()):
        message["audio"] = draw(st.none() | st.just(AUDIO))
    kind = draw(st.sampled_from(["", "tools", "no tools", "legacy", "no legacy"]))
    if kind == "tools":
        message["tool_calls"] = [
            {"id": f"c{i}", "type": "function", "function": {"name": "f", "arguments": arguments}}
            for i, arguments in enumerate(draw(st.lists(text, min_size=1, max_size=3)))
        ]
    elif kind == "no tools":
        message["tool_calls"] = draw(st.none() | st.just([]))
    elif kind:
        legacy = {"name": "f", "arguments": draw(text)}
        message["function_call"] = None if kind == "no legacy" else legacy
    return message


@st.composite
def answers(draw: st.DrawFn, text: st.SearchStrategy[str] = TEXT) -> Any:
    choices = []
    for index in range(draw(st.integers(1, 3))):
        message = draw(messages(text))
        logprobs = None
        if draw(st.booleans()):
            content = message["content"] or ""
            spelt = [content[:1], content[1:150], content[150:]]
            if draw(st.booleans()):
                spelt.append("more")
            logprobs = {"content": [token(one) for one in spelt], "refusal": None}
            if draw(st.booleans()):
                logprobs["refusal"] = [token("no")]
        choices.append(
            {
                "index": index,
                "message": message,
                "logprobs": logprobs,
                "finish_reason": draw(st.sampled_from(["stop", "length", "tool_calls"])),
                **draw(st.dictionaries(st.sampled_from(["stop_reason", "x"]), VALUE)),
            }
        )
    return {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "created": 1,
        "model": "m",
        "choices": choices,
        **draw(st.dictionaries(st.sampled_from(["service_tier", "system_fingerprint"]), CLEAN)),
        **draw(st.dictionaries(st.sampled_from(["timings", "provider"]), VALUE)),
        "usage": {"prompt_tokens": 3, "completion_tokens": 5, "total_tokens": 8},
    }


@given(answers())
def test_told_and_gathered_it_is_the_same_answer(answer: Any) -> None:
    assert whole_of(payloads_of(answer, include_usage=True)) == answer


@given(answers())
def test_usage_is_told_only_where_it_was_asked_for(answer: Any) -> None:
    without = [json.loads(raw) for raw in payloads_of(answer, include_usage=False)]
    assert all(chunk["choices"] and "usage" not in chunk for chunk in without)
    *chunks, last = [json.loads(raw) for raw in payloads_of(answer, include_usage=True)]
    assert all(chunk["choices"] and chunk["usage"] is None for chunk in chunks)
    assert (last["choices"], last["usage"]) == ([], answer["usage"])


@given(answers(CLEAN))
def test_the_sdk_gathers_the_same_message(answer: Any) -> None:
    state: ChatCompletionStreamState[Any] = ChatCompletionStreamState()
    for raw in payloads_of(answer, include_usage=True):
        state.handle_chunk(ChatCompletionChunk.construct(**json.loads(raw)))
    found = state.current_completion_snapshot.to_dict()
    assert found["usage"] == answer["usage"]
    for choice, told in zip(found["choices"], answer["choices"], strict=True):  # type: ignore[call-overload]
        message = told_of(choice["message"])
        for call in message.get("tool_calls", ()):
            call.pop("index")
            call["function"].pop("parsed_arguments", None)
        assert message == told_of(told["message"])
        assert choice["finish_reason"] == told["finish_reason"]
        wanted = told["logprobs"]
        assert (choice.get("logprobs") or None) == wanted


def told_of(message: Any) -> Any:
    """The SDK's own fields, and those it fills in with None, say nothing."""
    return {name: value for name, value in message.items() if value is not None}


def whole(**fields: Any) -> Any:
    message = {"role": "assistant", "content": "hi", **fields}
    choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": "stop"}
    return {"id": "1", "object": "chat.completion", "choices": [choice]}


class TestTelling:
    def test_long_texts_come_in_pieces_cut_at_spaces(self) -> None:
        text = "word " * 100 + "x" * 300
        pieces = [
            json.loads(raw)["choices"][0]["delta"].get("content")
            for raw in payloads_of(whole(content=text), include_usage=False)
        ]
        parts = [piece for piece in pieces if piece]
        assert "".join(parts) == text
        assert max(map(len, parts)) <= 128
        assert all(part.endswith(" ") for part in parts[:3])

    def test_without_usage_none_is_made_up(self) -> None:
        assert b"[]" not in payloads_of(whole(), include_usage=True)[-1]

    def test_a_custom_call_and_one_of_an_unknown_kind(self) -> None:
        custom = {"id": "1", "type": "custom", "custom": {"name": "f", "input": "print(1)"}}
        odd = {"id": "2", "type": "odd", "odd": {"a": [1]}}
        answer = whole(tool_calls=[custom, odd])
        assert whole_of(payloads_of(answer, include_usage=False)) == answer

    @pytest.mark.parametrize(
        "answer",
        [
            {},
            {"choices": []},
            {"choices": 5},
            {"choices": ["x"]},
            {"choices": [{"index": 1, "message": {}, "finish_reason": "stop"}]},
            {"choices": [{"index": 0, "message": {}, "finish_reason": None}]},
            {"choices": [{"index": 0, "message": 5, "finish_reason": "stop"}]},
            {"choices": [{"index": 0, "finish_reason": "stop"}]},
            whole(function_call="f"),
            whole(function_call={"name": "f"}),
            whole(tool_calls=["f"]),
        ],
    )
    def test_what_no_stream_can_say(self, answer: Any) -> None:
        with pytest.raises(ValueError, match="answer"):
            payloads_of(answer, include_usage=True)


def chunk(delta: Any = None, finish: str | None = None, index: int = 0, **fields: Any) -> Any:
    choice = {"index": index, "delta": delta or {}, "finish_reason": finish}
    return {"id": "1", "object": "chat.completion.chunk", "choices": [choice], **fields}


def gathered(*chunks: Any) -> Any:
    found = Whole()
    for one in chunks:
        found.take(one)
    return found.answer()


END = chunk(finish="stop")


class TestGathering:
    def test_fragments_of_two_calls_that_interleave(self) -> None:
        def call(index: int, **fields: Any) -> Any:
            return chunk({"tool_calls": [{"index": index, **fields}]})

        found = gathered(
            call(1, id="b", type="function", function={"name": "g", "arguments": ""}),
            call(0, id="a", type="function", function={"name": "f", "arguments": None}),
            call(1, id="b", function={"name": "", "arguments": "{"}),
            call(0, id=None, function=None),
            call(1, function={"arguments": "}"}),
            END,
        )
        assert found["choices"][0]["message"]["tool_calls"] == [
            {"id": "a", "type": "function", "function": {"name": "f", "arguments": ""}},
            {"id": "b", "type": "function", "function": {"name": "g", "arguments": "{}"}},
        ]

    def test_what_servers_repeat_does_no_harm(self) -> None:
        found = gathered(
            chunk({"role": "assistant", "content": "a", "tool_calls": []}, provider="p", created=1),
            chunk({"role": "assistant", "content": "b", "tool_calls": []}, provider="p", created=2),
            chunk({"role": None, "content": None, "obfuscation": "xyz"}, finish="stop"),
            chunk(finish="stop", usage=None, system_fingerprint="f", obfuscation="x"),
            chunk(system_fingerprint=None),
            {"object": "chat.completion.chunk", "choices": [], "usage": {"prompt_tokens": 1}},
        )
        assert found["choices"][0]["message"] == {
            "role": "assistant",
            "content": "ab",
            "tool_calls": [],
        }
        assert found["created"] == 1
        assert found["system_fingerprint"] == "f"
        assert found["usage"] == {"prompt_tokens": 1}

    def test_halves_of_a_character_are_one_again(self) -> None:
        found = gathered(chunk({"content": "\ud83d"}), chunk({"content": "\ude00"}), END)
        assert found["choices"][0]["message"]["content"] == "\U0001f600"

    def test_a_null_delta_and_a_null_error_are_nothing(self) -> None:
        odd = chunk(error=None)
        odd["choices"][0]["delta"] = None
        assert gathered(odd, END) is not None

    @pytest.mark.parametrize(
        "chunks",
        [
            (),
            (chunk({"content": "a"}),),
            (END, chunk({"content": "b"}, index=1)),
            (chunk(finish="stop", index=1),),
            (END, chunk(finish="length")),
            (chunk({"content": 5}), END),
            (chunk({"content": [{"type": "text"}]}), END),
            (chunk({"role": "assistant"}), chunk({"role": "tool"}), END),
            (chunk({"reasoning_details": [1]}), chunk({"reasoning_details": [2]}), END),
            (chunk({"tool_calls": [{"id": "a"}]}), END),
            (chunk({"tool_calls": ["a"]}), END),
            (chunk({"tool_calls": {"index": 0}}), END),
            (chunk({"tool_calls": [{"index": 0, "function": "f"}]}), END),
            (chunk({"tool_calls": [{"index": 0, "function": {"arguments": {}}}]}), END),
            (
                chunk({"tool_calls": [{"index": 0, "id": "a"}]}),
                chunk({"tool_calls": [{"index": 0, "id": "b"}]}),
                END,
            ),
            (chunk({"function_call": {"arguments": 5}}), END),
            (chunk(timings=1), chunk(timings=1), END),
            (END, {"object": "chat.completion.chunk", "choices": [], "error": {"message": "x"}}),
            (END, {"object": "other", "choices": []}),
            (END, {"object": "chat.completion.chunk"}),
            (END, {"choices": [{"delta": {}}]}),
            (END, "text"),
            ({**END, "choices": [{**END["choices"][0], "logprobs": {"content": 5}}]},),
            ({**END, "choices": [{**END["choices"][0], "logprobs": 5}]},),
            ({**END, "choices": [{**END["choices"][0], "delta": "x"}]},),
        ],
    )
    def test_what_is_cut_off_or_unsure_is_no_answer(self, chunks: Any) -> None:
        assert gathered(*chunks) is None

    def test_nothing_is_kept_once_it_is_unsure(self) -> None:
        found = Whole()
        found.take("text")
        found.take(END)
        assert found.answer() is None

    def test_unknown_logprobs_come_once(self) -> None:
        def with_logprobs(value: Any) -> Any:
            told = chunk({"content": "a"})
            told["choices"][0]["logprobs"] = value
            return told

        one = with_logprobs({"content": None, "refusal": [token("a")], "text_offset": 1})
        two = with_logprobs({"content": [token("b")], "refusal": [token("c")]})
        found = gathered(one, two, END)["choices"][0]["logprobs"]
        assert found["refusal"] == [token("a"), token("c")]
        assert gathered(one, one, END) is None


@pytest.mark.parametrize(
    ("answer", "is_cut"),
    [
        (b'{"choices": [{"finish_reason": "stop"}]}', False),
        (b'{"choices": [{"finish_reason": "stop"}, {"finish_reason": "length"}]}', True),
        (b'{"choices": []}', False),
        (b"{}", True),
        (b"[]", True),
        (b"no JSON", True),
        (b'{"choices": [1]}', True),
    ],
)
def test_what_could_not_be_longer_says_so(answer: bytes, *, is_cut: bool) -> None:
    assert replay.is_cut(answer) is is_cut


def gathered_each(payloads: list[bytes]) -> Any:
    """What the chunks say, each read by itself."""
    found = Whole()
    for payload in payloads:
        found.take(json.loads(payload))
    return found.answer()


@given(
    st.lists(
        st.tuples(
            st.sampled_from(
                ["", "a", 'say "', "\\", "\xe9", "\ud83d", "\ude00", "\u2028", "\n", "\x7f"]
            ),
            st.sampled_from(
                [
                    {},
                    {},
                    {},
                    {"created": 2},
                    {"provider": "p"},
                    {"timings": [1]},
                    {"usage": {"prompt_tokens": 1}},
                ]
            ),
            st.sampled_from([None, None, None, {"content": [{"token": "a"}]}]),
            st.sampled_from([0, 0, 0, 1]),
            st.sampled_from([None, None, None, "x"]),
        )
    ),
    st.booleans(),
)
def test_chunks_that_are_alike_say_together_what_they_say_each(
    said: list[tuple[str, Any, Any, int, Any]], spaced: bool
) -> None:
    payloads = []
    for text, fields, logprobs, index, extra in said:
        delta = {"content": text} if extra is None else {"content": text, "extra": extra}
        one = chunk(delta, index=index, **fields)
        one["choices"][0]["logprobs"] = logprobs
        payloads.append(json.dumps(one, separators=(", ", ": ") if spaced else (",", ":")).encode())
    for index in {0, *(index for _, _, _, index, _ in said)}:
        payloads.append(json.dumps(chunk(finish="stop", index=index)).encode())
    assert whole_of(payloads) == gathered_each(payloads)


def test_a_run_of_chunks_is_read_as_one() -> None:
    payloads = [json.dumps(chunk({"content": f"{number} "})).encode() for number in range(1000)]
    payloads.append(json.dumps(END).encode())
    found: Any = whole_of(payloads)
    assert found["choices"][0]["message"]["content"].split() == [str(one) for one in range(1000)]
    assert found == gathered_each(payloads)


def test_what_must_come_once_may_not_come_with_each_chunk_of_a_run() -> None:
    payloads = [json.dumps(chunk({"content": "a"}, timings=[1])).encode()] * 3
    assert whole_of([*payloads, json.dumps(END).encode()]) is None
    assert whole_of([payloads[0], json.dumps(END).encode()]) is not None
