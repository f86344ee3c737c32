"""OpenAI's chat in TGI's words, and TGI's chunks in OpenAI's."""

from __future__ import annotations

import copy
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.core import tgi
from router.core.chunks import ChunkWatch
from router.types import Abilities

HI = [{"role": "user", "content": "Hi?"}]
SCHEMA = {"type": "object", "properties": {"a": {"enum": ["x", None], "default": None}}}
FUNCTION = {"name": "f", "parameters": SCHEMA}
TOOL = {"type": "function", "function": FUNCTION}
CALL = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}


def translated(**fields: Any) -> Any:
    """What is sent for these fields, without the ones that every request has."""
    body = {"model": "org/m", "messages": HI, "stream": False, **fields}
    before = copy.deepcopy(body)
    out = tgi.chat_body(body, model="org/m")
    assert body == before
    assert out.pop("model") == "tgi"
    assert out.pop("stream") is False
    if out["messages"] == HI:
        del out["messages"]
    return out


@pytest.mark.parametrize(
    ("fields", "sent"),
    [
        # Nulls
        ({"stop": None, "seed": None, "tools": None, "user": None, "x": None}, {}),
        (
            {"stream_options": {"include_usage": True, "include_obfuscation": None}},
            {"stream_options": {"include_usage": True}},
        ),
        # Sampling
        ({"top_p": 1}, {}),
        ({"top_p": 1.0}, {}),
        ({"top_p": 0.9}, {"top_p": 0.9}),
        ({"top_p": 0, "temperature": 0.7}, {"temperature": 0}),
        ({"top_p": 1.5}, {"top_p": 1.5}),
        ({"temperature": 0}, {"temperature": 0}),
        ({"presence_penalty": 0, "frequency_penalty": 0.0}, {}),
        (
            {"presence_penalty": 0.5, "frequency_penalty": -0.5},
            {"presence_penalty": 0.5, "frequency_penalty": -0.5},
        ),
        ({"seed": 7}, {"seed": 7}),
        ({"seed": 0}, {"seed": 0}),
        ({"seed": -1}, {"seed": 2**64 - 1}),
        (
            {"n": 1, "logprobs": True, "top_logprobs": 5},
            {"n": 1, "logprobs": True, "top_logprobs": 5},
        ),
        ({"logit_bias": {}}, {}),
        # Output
        ({"max_tokens": 5}, {"max_tokens": 5}),
        ({"max_completion_tokens": 5}, {"max_tokens": 5}),
        ({"max_tokens": 9, "max_completion_tokens": 5}, {"max_tokens": 5}),
        ({"max_tokens": 9, "max_completion_tokens": None}, {"max_tokens": 9}),
        # Stop
        ({"stop": "END"}, {"stop": ["END"]}),
        ({"stop": ["a", "b"]}, {"stop": ["a", "b"]}),
        ({"stop": []}, {}),
        # The answer's form
        ({"response_format": {"type": "text"}}, {}),
        (
            {"response_format": {"type": "json_object"}},
            {"response_format": {"type": "json_object", "value": {"type": "object"}}},
        ),
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "n", "schema": SCHEMA},
                }
            },
            {"response_format": {"type": "json_object", "value": SCHEMA}},
        ),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "n"}}},
            {"response_format": {"type": "json_object", "value": {"type": "object"}}},
        ),
        *(
            ({"response_format": form}, {"response_format": form})
            for form in (
                {"type": "regex", "value": "a+"},
                {"type": "json", "value": SCHEMA},
                {"type": "json_object", "value": SCHEMA},
                {"type": "json_schema", "value": {"name": "n", "schema": SCHEMA}},
            )
        ),
        # Tools
        ({"tools": [], "tool_choice": "auto"}, {}),
        ({"tool_choice": "none"}, {}),
        (
            {"tools": [TOOL], "tool_choice": "required"},
            {"tools": [TOOL], "tool_choice": "required"},
        ),
        (
            {"tools": [{"type": "function", "function": {**FUNCTION, "strict": None}}]},
            {"tools": [TOOL]},
        ),
        ({"tools": [TOOL], "response_format": {"type": "text"}}, {"tools": [TOOL]}),
        # What it has no opinion of
        ({"user": "u", "metadata": {"a": None}}, {"user": "u", "metadata": {"a": None}}),
    ],
)
def test_fields(fields: dict[str, Any], sent: dict[str, Any]) -> None:
    assert translated(**fields) == sent


@pytest.mark.parametrize(
    ("message", "sent"),
    [
        ({"role": "user", "content": "a", "name": None}, {"role": "user", "content": "a"}),
        ({"role": "developer", "content": "a"}, {"role": "system", "content": "a"}),
        ({"role": "assistant", "content": None}, {"role": "assistant", "content": ""}),
        (
            {"role": "assistant", "content": "a", "tool_calls": []},
            {"role": "assistant", "content": "a"},
        ),
        (
            {"role": "assistant", "content": None, "tool_calls": [CALL], "refusal": None},
            {"role": "assistant", "tool_calls": [CALL]},
        ),
        (
            {"role": "assistant", "content": "", "tool_calls": [{**CALL, "index": None}]},
            {"role": "assistant", "tool_calls": [CALL]},
        ),
        (
            {"role": "assistant", "content": [{"type": "text", "text": " "}], "tool_calls": [CALL]},
            {"role": "assistant", "tool_calls": [CALL]},
        ),
        (
            {"role": "tool", "tool_call_id": "c", "content": "42"},
            {"role": "tool", "tool_call_id": "c", "content": "42"},
        ),
        (
            {
                "role": "user",
                "content": [
                    {"type": "text", "text": "a"},
                    {"type": "image_url", "image_url": {"url": "data:x", "detail": None}},
                ],
            },
            {
                "role": "user",
                "content": [
                    {"type": "text", "text": "a"},
                    {"type": "image_url", "image_url": {"url": "data:x"}},
                ],
            },
        ),
    ],
)
def test_messages(message: dict[str, Any], sent: dict[str, Any]) -> None:
    assert translated(messages=[message])["messages"] == [sent]
    assert tgi.unable({"messages": [message]}) is None


@pytest.mark.parametrize(
    ("model", "sent"),
    [
        ("org/m", "tgi"),
        ("tgi", "tgi"),
        ("adapter:org/lora", "org/lora"),
        ("org/adapter:x", "tgi"),
    ],
)
def test_the_models_name(model: str, sent: str) -> None:
    assert tgi.chat_body({"messages": HI}, model=model)["model"] == sent


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"n": 2}, "one choice only"),
        ({"logit_bias": {"5": 1}}, "logit_bias"),
        ({"logit_bias": [1.0]}, "logit_bias"),
        ({"functions": [FUNCTION]}, "functions"),
        ({"audio": {"voice": "x"}}, "audio"),
        ({"web_search_options": {"a": 1}}, "web_search_options"),
        ({"modalities": ["text", "audio"]}, "text only"),
        ({"top_logprobs": 6}, "5 top_logprobs"),
        ({"stop": list("abcde")}, "4 stop sequences"),
        ({"presence_penalty": -2}, "presence_penalty"),
        ({"tools": [TOOL], "response_format": {"type": "json_object"}}, "not both"),
        ({"tools": [{"type": "custom", "custom": {}}]}, "'custom'"),
        (
            {"tools": [TOOL], "tool_choice": {"type": "allowed_tools", "allowed_tools": {}}},
            "'allowed_tools'",
        ),
        (
            {"messages": [{"role": "assistant", "content": "I look.", "tool_calls": [CALL]}]},
            "loses the text",
        ),
        (
            {
                "messages": [
                    {
                        "role": "assistant",
                        "content": [{"type": "text", "text": "I look."}],
                        "tool_calls": [CALL],
                    }
                ]
            },
            "loses the text",
        ),
        (
            {"messages": [{"role": "assistant", "function_call": {"name": "f"}}]},
            "function_call",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "input_audio"}]}]},
            "'input_audio'",
        ),
        ({"messages": [{"role": "user", "content": [{"type": ["x" * 999]}]}]}, "parts of the type"),
    ],
)
def test_what_tgi_is_unable_to_do(fields: dict[str, Any], words: str) -> None:
    reason = tgi.unable({"messages": HI, **fields})
    assert reason is not None
    assert words in reason
    assert len(reason) < 150


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"n": 1, "top_logprobs": 5, "stop": list("abcd"), "modalities": ["text"]},
        {"n": None, "top_logprobs": None, "logit_bias": {}, "functions": []},
        {"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "f"}}},
        {"tools": [TOOL], "tool_choice": "f", "response_format": {"type": "text"}},
        {"tools": [], "response_format": {"type": "json_object"}},
        {"modalities": 5},
    ],
)
def test_what_it_is_able_to_do(fields: dict[str, Any]) -> None:
    assert tgi.unable({"messages": HI, **fields}) is None


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 5) | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=8,
)


@given(
    st.fixed_dictionaries(
        {},
        optional={
            "tools": st.lists(JSON),
            "tool_choice": st.text() | st.dictionaries(st.text(), JSON),
            "response_format": st.dictionaries(
                st.sampled_from(["type", "value", "json_schema"]), JSON
            ),
            "modalities": JSON,
            "functions": JSON,
        },
    ),
    JSON,
    st.lists(st.dictionaries(st.sampled_from(["type", "text", "image_url"]), JSON)),
)
def test_nothing_that_a_client_nests_makes_it_fail(
    fields: dict[str, Any], calls: Any, parts: list[Any]
) -> None:
    message = {"role": "assistant", "content": parts, "tool_calls": calls}
    body = {"messages": [message], **fields}
    reason = tgi.unable(body)
    assert reason is None or isinstance(reason, str)
    orjson.dumps(tgi.chat_body(body, model="m"))


def chunk(delta: Any, finish: Any = None, created: int = 1) -> bytes:
    choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}
    return orjson.dumps(
        {
            "object": "chat.completion.chunk",
            "id": "",
            "created": created,
            "model": "m",
            "system_fingerprint": "f",
            "choices": [choice],
            "usage": None,
        }
    )


USAGE = orjson.dumps({"id": "", "created": 9, "model": "m", "choices": [], "usage": {"x": 1}})


def mended(*payloads: bytes) -> list[Any]:
    mender = tgi.ChunkMender("chatcmpl-ours")
    return [orjson.loads(out) for payload in payloads for out in mender.mend(payload)]


def fragment(arguments: Any, name: str | None = None, id: str | None = "0", **more: Any) -> Any:
    call = {"index": 0, "id": id, "type": "function"}
    return {**call, "function": {"name": name, "arguments": arguments}, **more}


class TestChunks:
    def test_the_role_comes_once_and_id_and_time_stay(self) -> None:
        found = mended(
            chunk({"role": "assistant", "content": "a"}, created=1),
            chunk({"role": "assistant", "content": "b"}, created=2),
            chunk({"role": "assistant", "content": ""}, "eos_token", created=3),
        )
        assert [one["choices"][0]["delta"] for one in found] == [
            {"role": "assistant", "content": "a"},
            {"content": "b"},
            {"content": ""},
        ]
        assert {(one["id"], one["created"]) for one in found} == {("chatcmpl-ours", 1)}
        assert found[2]["choices"][0]["finish_reason"] == "eos_token"
        assert all(one["system_fingerprint"] == "f" for one in found)

    def test_a_tool_calls_head_comes_once_and_it_gets_an_end_before_the_usage(self) -> None:
        found = mended(
            chunk({"role": "assistant", "tool_calls": [fragment("{", "f")]}),
            chunk({"role": "assistant", "tool_calls": [fragment("}")]}),
            USAGE,
        )
        first, second, end, usage = found
        assert first["choices"][0]["delta"]["tool_calls"] == [fragment("{", "f")]
        assert second["choices"][0]["delta"] == {
            "tool_calls": [{"index": 0, "function": {"arguments": "}"}}]
        }
        assert end["choices"] == [
            {"index": 0, "delta": {}, "logprobs": None, "finish_reason": "tool_calls"}
        ]
        assert end["id"] == usage["id"] == "chatcmpl-ours"
        assert end["usage"] is None
        assert usage["usage"] == {"x": 1}

    @pytest.mark.parametrize(
        ("told", "known"),
        [("stop", "tool_calls"), ("eos_token", "tool_calls"), ("length", "length")],
    )
    def test_a_tool_call_with_an_end_of_its_own_gets_no_other(self, told: str, known: str) -> None:
        found = mended(
            chunk({"role": "assistant", "tool_calls": [fragment("{", "f")]}, told), USAGE
        )
        assert len(found) == 2
        assert found[0]["choices"][0]["finish_reason"] == known

    def test_the_older_object_becomes_a_list(self) -> None:
        (found,) = mended(chunk({"role": "assistant", "tool_calls": fragment("{", "f")}))
        assert found["choices"][0]["delta"]["tool_calls"] == [fragment("{", "f")]

    def test_arguments_are_text(self) -> None:
        (found,) = mended(chunk({"tool_calls": [fragment({"a": 1}, "f")]}))
        call = found["choices"][0]["delta"]["tool_calls"][0]
        assert call["function"]["arguments"] == '{"a":1}'

    def test_another_call_keeps_its_head(self) -> None:
        other = fragment("{", "g", id="1", index=1)
        found = mended(chunk({"tool_calls": [fragment("{}", "f")]}), chunk({"tool_calls": [other]}))
        assert found[1]["choices"][0]["delta"]["tool_calls"] == [other]

    def test_another_id_at_the_same_place_is_kept(self) -> None:
        found = mended(
            chunk({"tool_calls": [fragment("{}", "f")]}),
            chunk({"tool_calls": [fragment("{}", "g", id="1")]}),
        )
        assert found[1]["choices"][0]["delta"]["tool_calls"] == [fragment("{}", "g", id="1")]

    def test_a_call_without_an_index_gets_its_position(self) -> None:
        calls = [{"id": "0"}, {"id": "1"}]
        (found,) = mended(chunk({"tool_calls": calls}))
        assert [c["index"] for c in found["choices"][0]["delta"]["tool_calls"]] == [0, 1]

    def test_only_so_many_calls_are_followed(self) -> None:
        calls = [{"index": i, "id": str(i)} for i in range(1025)]
        found = mended(chunk({"tool_calls": calls}), chunk({"tool_calls": calls}))
        again = found[1]["choices"][0]["delta"]["tool_calls"]
        assert [call["index"] for call in again if "id" in call] == [1024]

    @pytest.mark.parametrize(
        "payload",
        [
            b"not json",
            b"[1]",
            b'{"error":{"message":"Model is overloaded","http_status_code":422}}',
            b'{"choices":5}',
        ],
    )
    def test_what_is_no_chunk_goes_on_as_it_is(self, payload: bytes) -> None:
        assert tgi.ChunkMender("c").mend(payload) == [payload]

    def test_malformed_choices_are_left_to_be_judged(self) -> None:
        payload = b'{"id":"x","choices":[{"index":"0","delta":{"role":"a"}},{"index":0},"x"]}'
        assert tgi.ChunkMender("c").mend(payload) == [payload]

    def test_a_mended_chunk_needs_no_second_mending(self) -> None:
        mender = tgi.ChunkMender("chatcmpl-ours")
        watch = ChunkWatch(who="w", call_id="other", wants_usage=True)
        for payload in (
            chunk({"role": "assistant", "content": "a"}),
            chunk({"content": "b"}),
            USAGE,
        ):
            (out,) = mender.mend(payload)
            assert watch.see(out).payload is out


class TestAnswers:
    def body(self, **message: Any) -> bytes:
        return orjson.dumps(
            {"choices": [{"index": 0, "message": message, "finish_reason": "stop"}]}
        )

    def test_arguments_are_text(self) -> None:
        function = {"name": "f", "description": None, "arguments": {"a": 1}}
        body = self.body(tool_calls=[{"id": "0", "function": function}])
        call = orjson.loads(tgi.mend_answer(body))["choices"][0]["message"]["tool_calls"][0]
        assert call == {"id": "0", "function": {**function, "arguments": '{"a":1}'}}

    def test_the_older_object_becomes_a_list(self) -> None:
        found = orjson.loads(tgi.mend_answer(self.body(tool_calls=CALL)))
        assert found["choices"][0]["message"]["tool_calls"] == [CALL]

    @pytest.mark.parametrize(
        "body",
        [
            b'{"choices": [{"message": {"content": "hi"}}]}',
            b'{"choices":[{"message":{"tool_calls":[{"function":{"arguments":"{}"}}]}}]}',
            b'{"choices":[{"message":"\\"tool_calls\\""}],"tool_calls":1}',
            b'{"choices":[{"message":null}],"tool_calls":1}',
            b'["tool_calls"]',
            b'"tool_calls" <html>',
        ],
    )
    def test_anything_else_keeps_its_bytes(self, body: bytes) -> None:
        assert tgi.mend_answer(body) == body


class TestInfo:
    @pytest.mark.parametrize(
        ("told", "context"),
        [
            ({"max_total_tokens": 4096, "max_input_tokens": 4095}, 4096),
            ({"max_input_tokens": 4095}, 4095),
            ({"max_input_length": 1024}, 1024),
            ({"max_total_tokens": None, "max_input_length": 0}, None),
            ({}, None),
        ],
    )
    def test_the_context(self, told: dict[str, Any], context: int | None) -> None:
        info = {"model_id": "org/m", "router": "text-generation-router", **told}
        able = Abilities(context=context)
        assert tgi.abilities_in(info) == {"org/m": able, "tgi": able}

    def test_an_early_one_names_no_router(self) -> None:
        assert tgi.abilities_in({"model_id": "org/m", "max_total_tokens": 2048})

    @pytest.mark.parametrize(
        "info",
        [
            None,
            [],
            {},
            {"router": "text-generation-router"},
            {"model_id": 5, "router": "text-generation-router"},
            {"model_id": "m", "model_type": {"embedding": {}}, "max_input_length": 512},
        ],
    )
    def test_what_is_no_tgi(self, info: Any) -> None:
        assert tgi.abilities_in(info) is None
