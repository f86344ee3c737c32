"""What of a chat request is checked, translated, clamped, and asked of a rung."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.core import chat_request
from router.core.chat_request import ImageRules
from router.errors import BadRequest, CallerError, TooLarge

HI = [{"role": "user", "content": "Hi"}]
RULES = ImageRules(remote=False, bytes_max=30, types=frozenset({"image/png"}))


def test_a_request_with_unknown_fields_passes_as_it_is() -> None:
    body = {"messages": HI, "top_k": 3, "chat_template_kwargs": {"a": None}, "seed": None}
    assert chat_request.read(body) is body


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ([], None),
        ("text", None),
        ({}, "messages"),
        ({"messages": None}, "messages"),
        ({"messages": []}, "messages"),
        ({"messages": "Hi"}, "messages"),
        ({"messages": ["Hi"]}, "messages[0]"),
        ({"messages": [{"content": "Hi"}]}, "messages[0].role"),
        ({"messages": [*HI, {"role": "user", "content": 3}]}, "messages[1].content"),
        ({"messages": [{"role": "user", "content": ["Hi"]}]}, "messages[0].content"),
        ({"messages": HI, "stream": "yes"}, "stream"),
        ({"messages": HI, "stream": 1}, "stream"),
        ({"messages": HI, "stream_options": True}, "stream_options"),
        ({"messages": HI, "max_tokens": "9"}, "max_tokens"),
        ({"messages": HI, "max_tokens": True}, "max_tokens"),
        ({"messages": HI, "max_tokens": 0}, "max_tokens"),
        ({"messages": HI, "max_completion_tokens": -1}, "max_completion_tokens"),
        ({"messages": HI, "n": 0}, "n"),
        ({"messages": HI, "temperature": "hot"}, "temperature"),
        ({"messages": HI, "stop": 3}, "stop"),
        ({"messages": HI, "stop": ["a", 3]}, "stop"),
        ({"messages": HI, "tools": {}}, "tools"),
        ({"messages": HI, "response_format": "json"}, "response_format"),
        (
            {"messages": HI, "response_format": {"type": "json_object", "value": "s"}},
            "response_format.value",
        ),
    ],
)
def test_wrong_requests_name_the_field(body: Any, param: str | None) -> None:
    with pytest.raises(BadRequest) as caught:
        chat_request.read(body)
    assert caught.value.param == param
    assert caught.value.status == 400


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(
        st.sampled_from(
            ["messages", "role", "content", "type", "text", "image_url", "url", "stop", "tools",
             "n", "response_format", "value", "schema", "stream", "max_tokens"]
        ),
        inner,
        max_size=4,
    ),
    max_leaves=20,
)  # fmt: skip


@given(JSON)
def test_any_json_is_read_or_refused_as_the_callers_mistake(body: Any) -> None:
    """Nothing that a client can send fails in another way."""
    try:
        read = chat_request.read(body)
        chat_request.needs_of(read)
        chat_request.check_images(read, RULES)
        chat_request.clamp(read, 5)
    except CallerError:
        return


SCHEMA = {"type": "object", "properties": {"a": {"type": "string"}}}


@pytest.mark.parametrize(
    ("form", "expected"),
    [
        pytest.param(
            {"type": "json_object", "value": SCHEMA},
            {"type": "json_schema", "json_schema": {"name": "response", "schema": SCHEMA}},
            id="huggingface_hub",
        ),
        pytest.param(
            {"type": "json", "value": SCHEMA},
            {"type": "json_schema", "json_schema": {"name": "response", "schema": SCHEMA}},
            id="old TGI",
        ),
        pytest.param(
            {"type": "json_schema", "value": {"name": "answer", "schema": SCHEMA}},
            {"type": "json_schema", "json_schema": {"name": "answer", "schema": SCHEMA}},
            id="TGI 3",
        ),
        ({"type": "json_object"}, {"type": "json_object"}),
        ({"type": "text"}, {"type": "text"}),
        ({"type": "regex", "value": "a+"}, {"type": "regex", "value": "a+"}),
        (
            {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}},
            {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}},
        ),
    ],
)
def test_tgis_response_format_becomes_openais(form: Any, expected: Any) -> None:
    body = {"messages": HI, "response_format": form}
    assert chat_request.read(body)["response_format"] == expected
    assert body["response_format"] is form


def test_needs_are_found() -> None:
    parts = [{"type": "text", "text": "x" * 60}, {"type": "image_url", "image_url": {"url": "u"}}]
    body = {
        "messages": [{"role": "user", "content": parts}, {"role": "user", "content": "y" * 60}],
        "tools": [{"type": "function"}],
        "response_format": {"type": "json_schema", "json_schema": {}},
    }
    needs = chat_request.needs_of(body)
    assert needs.tools
    assert needs.vision
    assert needs.json_schema
    assert needs.prompt_tokens_min == 20
    assert chat_request.needs_of({"messages": HI, "tools": []}).tools is False


@pytest.mark.parametrize(
    ("fields", "limit", "expected", "clamped"),
    [
        ({}, None, {}, None),
        ({}, 50, {"max_tokens": 50}, 50),
        ({"max_tokens": 40}, 50, {"max_tokens": 40}, None),
        ({"max_tokens": 60}, 50, {"max_tokens": 50}, 50),
        ({"n_predict": -1}, 50, {"n_predict": 50, "max_tokens": 50}, 50),
        ({"n_predict": "x", "max_tokens": 5}, 50, {"n_predict": 50, "max_tokens": 5}, 50),
        ({"n_predict": 7, "max_tokens": 5}, 50, {"n_predict": 7, "max_tokens": 5}, None),
        ({"max_completion_tokens": 60}, 50, {"max_completion_tokens": 50}, 50),
        (
            {"max_completion_tokens": None},
            50,
            {"max_completion_tokens": None, "max_tokens": 50},
            50,
        ),
        (
            {"max_completion_tokens": 60, "max_tokens": 10},
            50,
            {"max_completion_tokens": 50, "max_tokens": 10},
            50,
        ),
    ],
)
def test_output_is_clamped_in_the_clients_own_field(
    fields: Any, limit: int | None, expected: Any, clamped: int | None
) -> None:
    body, clamped_to = chat_request.clamp(fields, limit)
    assert body == expected
    assert clamped_to == clamped


def image(url: Any) -> Any:
    return {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": url}]}]}


@pytest.mark.parametrize(
    ("url", "error"),
    [
        ({"url": "http://169.254.169.254/latest"}, BadRequest),
        ({"url": "https://example.org/a.png"}, BadRequest),
        ({"url": "file:///etc/passwd"}, BadRequest),
        ({"url": "data:image/png,plain"}, BadRequest),
        ({"url": "data:image/svg+xml;base64,AAAA"}, BadRequest),
        ({"url": "data:image/png;base64," + "A" * 80}, TooLarge),
        ({"url": 3}, BadRequest),
        ({}, BadRequest),
    ],
)
def test_images_that_may_not_pass(url: Any, error: type[CallerError]) -> None:
    with pytest.raises(error):
        chat_request.check_images(image(url), RULES)


def test_images_that_may_pass() -> None:
    chat_request.check_images(image({"url": "data:image/png;base64,AAAA"}), RULES)
    chat_request.check_images(image("data:image/PNG;base64,AAAA"), RULES)
    chat_request.check_images(image({"url": "https://e.org/a"}), RULES._replace(remote=True))
