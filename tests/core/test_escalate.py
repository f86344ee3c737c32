"""Only what is surely no answer is escalated: empty, filtered, refused, or broken JSON."""

from __future__ import annotations

from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.core import escalate, sse
from router.core.escalate import Said, satisfies

ALL = frozenset(escalate.WORDS)
OBJECT = {"response_format": {"type": "json_object"}}


def schema_form(schema: Any) -> dict[str, Any]:
    wrapped = {"name": "x", "schema": schema}
    return {"response_format": {"type": "json_schema", "json_schema": wrapped}}


def answer(*messages: Any, finish: str = "stop") -> bytes:
    choices = [{"index": 0, "message": one, "finish_reason": finish} for one in messages]
    return orjson.dumps({"id": "x", "choices": choices})


def why(text: str, body: Any = None, **said: Any) -> str | None:
    return escalate.why(body or {}, [Said(text, **said)], ALL)


@pytest.mark.parametrize(
    ("message", "finish", "word"),
    [
        ({"content": "Hello"}, "stop", None),
        ({"content": "Hello"}, "content_filter", "content_filter"),
        ({"content": None}, "content_filter", "content_filter"),
        ({"content": None}, "stop", "empty"),
        ({"content": " \n"}, "stop", "empty"),
        ({"content": "", "reasoning": "hm"}, "length", "empty"),
        ({"content": None, "tool_calls": [{"id": "a"}]}, "tool_calls", None),
        ({"content": None, "function_call": {"name": "f"}}, "function_call", None),
        ({"content": None, "refusal": "No."}, "stop", "refusal"),
        ({"content": [{"type": "text", "text": "Hello"}, 5]}, "stop", None),
        ({"content": [{"type": "x"}]}, "stop", "empty"),
    ],
)
def test_whole_answers(message: Any, finish: str, word: str | None) -> None:
    assert escalate.why({}, escalate.of_answer(answer(message, finish=finish)), ALL) == word


def test_only_what_the_ladder_names_is_escalated() -> None:
    said = [Said("")]
    assert escalate.why({}, said, frozenset({"refusal", "invalid_json"})) is None
    assert escalate.why({}, said, frozenset({"empty"})) == "empty"
    assert escalate.why({}, [], ALL) is None


def test_one_bad_choice_is_enough() -> None:
    said = escalate.of_answer(answer({"content": "Hello"}, {"content": ""}))
    assert escalate.why({}, said, ALL) == "empty"


def test_streams_are_read_by_choice() -> None:
    def chunk(index: int, delta: Any, finish: str | None = None) -> bytes:
        choice = {"index": index, "delta": delta, "finish_reason": finish}
        return sse.frame(orjson.dumps({"id": "x", "choices": [choice]}))

    frames = b"".join(
        [
            chunk(0, {"role": "assistant"}),
            chunk(1, {"content": "Hel"}),
            chunk(1, {"content": "lo"}, "stop"),
            chunk(0, {"tool_calls": [{"index": 0}]}),
            chunk(0, None, "tool_calls"),
            b'data: {"choices":[]}\n\n',
            sse.DONE_FRAME,
        ]
    )
    assert escalate.of_stream(frames) == [
        Said(calls=True, finish="tool_calls"),
        Said("Hello", finish="stop"),
    ]


REFUSALS = [
    "I'm sorry, but I can't assist with that request.",
    "I’m sorry, but I can’t help with that.",
    "Sorry, I cannot comply.",
    "I apologize, but I am unable to provide that.",
    "As an AI language model, I cannot have opinions.",
    "I can't help with that.",
    "I'm unable to assist with this.",
    "Es tut mir leid, aber ich kann Ihnen dabei nicht helfen.",
    "Tut mir leid, dabei kann ich nicht helfen.",
    "Ich kann dir dabei leider nicht helfen.",
    "Je suis désolé, mais je ne peux pas répondre.",
    "Je ne peux pas vous aider.",
    "Lo siento, pero no puedo ayudar con eso.",
    "Desculpe, mas não posso ajudar.",
    "Mi dispiace, ma non posso aiutarti.",
    "抱歉，我不能帮助你。",
    "申し訳ありませんが、そのご質問にはお答えできません。",
]
ANSWERS = [
    "I can help with that.",
    "I'm sorry, but I think you are wrong: it is 4.",
    "I'm sorry to hear that. Let us see what can be done.",
    "Es tut mir leid, ich kann verstehen, dass das schwer ist.",
    "I cannot say it better than Keats: a thing of beauty is a joy for ever.",
    "The phrase 'I'm sorry, but I can't' is a refusal.",
    "I'm sorry, but I can't open files here. " + "Paste it, and do this instead. " * 20,
    "申し訳ありませんが、少し長くなります。",
]


@pytest.mark.parametrize("text", REFUSALS)
def test_refusals(text: str) -> None:
    assert why(text) == "refusal"
    assert why(f"\n {text}", calls=True) is None


@pytest.mark.parametrize("text", ANSWERS)
def test_answers_that_are_no_refusals(text: str) -> None:
    assert why(text) is None


PERSON = {
    "type": "object",
    "required": ["name", "age"],
    "additionalProperties": False,
    "properties": {
        "name": {"type": "string"},
        "age": {"type": ["integer", "null"]},
        "tags": {"type": "array", "items": {"enum": ["a", 1, None]}},
        "kind": {"const": True},
    },
}


@pytest.mark.parametrize(
    ("text", "body", "word"),
    [
        ("not JSON", {}, None),
        ("not JSON", {"response_format": {"type": "text"}}, None),
        ("not JSON", OBJECT, "invalid_json"),
        ("```json\n{}\n```", OBJECT, "invalid_json"),
        ('{"a": 1', OBJECT, "invalid_json"),
        ("[1]", OBJECT, "invalid_json"),
        ("\ud800", OBJECT, "invalid_json"),
        (' {"a": 1}\n', OBJECT, None),
        ("[1]", schema_form({"type": "array"}), None),
        ("{}", schema_form(PERSON), "invalid_json"),
        ('{"name": "Ann", "age": null}', schema_form(PERSON), None),
        ("[1]", {"response_format": {"type": "json_schema"}}, None),
        ("[1", {"response_format": {"type": "json_schema"}}, "invalid_json"),
    ],
)
def test_json_that_was_asked_for(text: str, body: Any, word: str | None) -> None:
    assert why(text, body) == word
    assert why(text, body, calls=True) is None


ANN = {"name": "Ann", "age": 3}


@pytest.mark.parametrize(
    ("value", "schema", "good"),
    [
        (ANN, PERSON, True),
        ({**ANN, "age": 3.0}, PERSON, True),
        ({**ANN, "age": 3.5}, PERSON, False),
        ({**ANN, "age": True}, PERSON, False),
        ({**ANN, "more": 1}, PERSON, False),
        ({**ANN, "tags": ["a", 1, None]}, PERSON, True),
        ({**ANN, "tags": [True]}, PERSON, False),
        ({**ANN, "tags": "a"}, PERSON, False),
        ({**ANN, "kind": True}, PERSON, True),
        ({**ANN, "kind": 1}, PERSON, False),
        (1.5, {"type": "number"}, True),
        (True, {"type": "number"}, False),
        (False, {"type": "boolean"}, True),
        ("x", {"type": "boolean"}, False),
        (None, {"type": ["string", "null"]}, True),
        (5, {"type": "no such type"}, True),
        ([1, "a"], {"items": {"type": "integer"}}, False),
        ([1, "a"], {"type": "array"}, True),
        ({"a": 1}, {"additionalProperties": {"type": "string"}}, False),
        ({"a": 1}, {"additionalProperties": False, "patternProperties": {"a": {}}}, True),
        ({"a": 1}, {"properties": [], "required": "a", "enum": "b"}, True),
        ({"a": 1}, {"required": [5, "a"]}, True),
        (1, False, False),
        (1, True, True),
        (1, None, True),
        (1, {"$ref": "#/x", "anyOf": [{"type": "string"}]}, True),
    ],
)
def test_the_schema_words_that_are_understood(value: Any, schema: Any, good: bool) -> None:
    assert satisfies(value, schema) is good


def test_a_check_has_an_end() -> None:
    deep: Any = "a"
    schema: Any = {"type": "integer"}
    for _ in range(70):
        deep, schema = [deep], {"items": schema}
    assert satisfies(deep, schema), "too deep to be looked at"
    many = {"items": {"enum": list(range(1000))}}
    assert satisfies([5] * 300 + [-1], many), "too much to be looked at"
    assert not satisfies([5] * 30 + [-1], many)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=8,
)
WORDS = st.sampled_from(
    ["type", "enum", "const", "required", "properties", "items", "additionalProperties", "x"]
)


@given(VALUES, st.dictionaries(WORDS, VALUES, max_size=4) | VALUES)
def test_no_schema_of_a_client_breaks_the_check(value: Any, schema: Any) -> None:
    assert satisfies(value, schema) in (True, False)


@given(VALUES)
def test_every_value_is_its_own_constant(value: Any) -> None:
    assert satisfies(value, {"const": value, "enum": [value]})
