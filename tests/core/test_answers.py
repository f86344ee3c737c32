"""Whole answers: byte for byte when nothing is wrong, mended or refused otherwise."""

from __future__ import annotations

from typing import Any

import orjson
import pytest

from router.core import answers
from router.errors import UpstreamBroken, UpstreamBusy, UpstreamError, UpstreamFailed
from router.types import Usage

TOP = {"id": "chatcmpl-1", "object": "chat.completion", "created": 1, "model": "m"}
USAGE = {"prompt_tokens": 5, "completion_tokens": 7, "total_tokens": 12}
CALLS = [{"id": "0", "type": "function", "function": {"name": "f", "arguments": "{}"}}]


def choice(finish: Any = "stop", index: Any = 0, **message: Any) -> dict[str, Any]:
    told = {"role": "assistant", "content": "hello", **message}
    return {"index": index, "message": told, "logprobs": None, "finish_reason": finish}


def answer(*choices: Any, **fields: Any) -> bytes:
    return orjson.dumps({**TOP, "choices": list(choices), **fields})


def check(body: bytes) -> Any:
    return orjson.loads(answers.check(body, who="gpu/org/m", call_id="chatcmpl-ours").body)


UNTOUCHED = {
    "plain": answer(choice(), usage=USAGE),
    "layout": b' { "choices":[ {"message":{"content":"a\\u00e9"},"index":0} ],\n"id":"x"}',
    "unknown fields": answer(choice(annotations=[]), service_tier="flex", x={"y": 1.5}),
    "tools": answer(choice("tool_calls", content=None, tool_calls=CALLS)),
    "several": answer(choice(), choice("length", 1)),
    "no finish": answer(choice(None)),
    "both reasonings": answer(choice(reasoning="r", reasoning_content="r")),
    "an error that is none": answer(choice(), error=None),
}


@pytest.mark.parametrize("name", UNTOUCHED)
def test_nothing_wrong_passes_byte_for_byte(name: str) -> None:
    body = UNTOUCHED[name]
    assert answers.check(body, who="w", call_id="c").body == body


@pytest.mark.parametrize(
    ("told", "known"),
    [
        ("eos_token", "stop"),
        ("stop_sequence", "stop"),
        ("max_tokens", "length"),
        ("new word", "stop"),
        ({"a": 1}, "stop"),
        ("", None),
    ],
)
def test_finish_reasons(told: Any, known: str | None) -> None:
    assert check(answer(choice(told)))["choices"][0]["finish_reason"] == known


@pytest.mark.parametrize("told", ["stop", "eos_token"])
def test_tool_calls_finish_as_such(told: str) -> None:
    found = check(answer(choice(told, tool_calls=CALLS)))
    assert found["choices"][0]["finish_reason"] == "tool_calls"


def test_tool_calls_that_ran_out_of_room_stay_so() -> None:
    found = check(answer(choice("length", tool_calls=CALLS)))
    assert found["choices"][0]["finish_reason"] == "length"


@pytest.mark.parametrize("told", [{"id": ""}, {"id": None}])
def test_an_empty_id(told: Any) -> None:
    assert check(answer(choice(), **told))["id"] == "chatcmpl-ours"


def test_missing_indexes() -> None:
    found = check(answer(choice(index=None), choice(index="1")))
    assert [one["index"] for one in found["choices"]] == [0, 1]


@pytest.mark.parametrize("name", ["reasoning", "reasoning_content"])
def test_reasoning_gets_both_its_names(name: str) -> None:
    message = check(answer(choice(**{name: "hm"})))["choices"][0]["message"]
    assert message["reasoning"] == message["reasoning_content"] == "hm"


def test_every_choice_is_mended() -> None:
    found = check(answer(choice("eos_token"), choice("stop", 1, reasoning="r")))
    assert found["choices"][0]["finish_reason"] == "stop"
    assert found["choices"][1]["message"]["reasoning_content"] == "r"


def test_usage_is_read() -> None:
    for told, usage in ((USAGE, Usage(5, 7)), (None, None), ({"prompt_tokens": "x"}, None)):
        assert answers.check(answer(choice(), usage=told), who="w", call_id="c").usage == usage


ERRORS: dict[str, tuple[bytes, type[UpstreamError]]] = {
    "html": (b"<html>", UpstreamBroken),
    "nothing": (b"", UpstreamBroken),
    "a list": (b"[]", UpstreamBroken),
    "no choices": (b"{}", UpstreamBroken),
    "empty choices": (answer(), UpstreamBroken),
    "a choice of no object": (answer("x"), UpstreamBroken),
    "a choice without a message": (answer({"index": 0, "text": "a"}), UpstreamBroken),
    "an error": (orjson.dumps({"error": {"message": "it broke"}}), UpstreamFailed),
    "an error of tgi's": (orjson.dumps({"error": "Model is overloaded"}), UpstreamBusy),
    "an error beside choices": (
        answer(choice("error", content=""), error={"message": "it broke"}),
        UpstreamFailed,
    ),
    "given up": (answer(choice("abort")), UpstreamFailed),
}


@pytest.mark.parametrize("name", ERRORS)
def test_what_is_refused(name: str) -> None:
    body, kind = ERRORS[name]
    with pytest.raises(kind) as caught:
        answers.check(body, who="gpu/org/m", call_id="c")
    assert type(caught.value) is kind
    assert "gpu/org/m" in caught.value.message


class TestBuild:
    def test_an_answer_of_our_own_needs_no_mending(self) -> None:
        body = answers.build(
            call_id="chatcmpl-1", created=1, model="m", text="hello", usage=Usage(5, 7)
        )
        checked = answers.check(body, who="w", call_id="other")
        assert (checked.body, checked.usage) == (body, Usage(5, 7))
        assert orjson.loads(body)["usage"] == USAGE
        assert orjson.loads(body)["choices"] == [choice(refusal=None)]

    def test_without_counts_there_is_no_usage(self) -> None:
        body = answers.build(call_id="c", created=1, model="m", text="", usage=None)
        assert "usage" not in orjson.loads(body)

    def test_a_chunk_of_our_own(self) -> None:
        payload = answers.build_chunk(
            call_id="chatcmpl-1", created=1, model="m", delta={"content": "a"}, finish_reason="stop"
        )
        assert orjson.loads(payload) == {
            **TOP,
            "object": "chat.completion.chunk",
            "choices": [
                {"index": 0, "delta": {"content": "a"}, "logprobs": None, "finish_reason": "stop"}
            ],
        }
