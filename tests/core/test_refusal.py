"""Every backend's words for a refusal, and what they mean to the pipeline."""

from __future__ import annotations

from typing import Any

import orjson
import pytest

from router.core.refusal import (
    Complaint,
    classify_in_stream,
    complaint_in,
    complaint_of,
    refusal,
    retry_after,
)
from router.errors import (
    CallerMistake,
    PromptTooLong,
    RungRefused,
    UpstreamBroken,
    UpstreamBusy,
    UpstreamError,
    UpstreamFailed,
    UpstreamTooLarge,
)

WHO = "gpu/org/m"
TOO_LONG_TGI = (
    "Input validation error: `inputs` tokens + `max_new_tokens` must be <= 4096. Given: 5000"
)
TOO_LONG_TEI = "Input validation error: `inputs` must have less than 512 tokens. Given: 600"


def native(text: str, kind: str) -> bytes:
    """TGI's and TEI's own shape."""
    return orjson.dumps({"error": text, "error_type": kind})


def flat(text: str, code: int, kind: str) -> bytes:
    """TEI's OpenAI route."""
    return orjson.dumps({"message": text, "code": code, "type": kind})


def nested(text: str, kind: str = "", code: Any = None, param: Any = None) -> bytes:
    """OpenAI's envelope, with vLLM's int for a code as well."""
    return orjson.dumps({"error": {"message": text, "type": kind, "param": param, "code": code}})


ANSWERS: dict[str, tuple[int, bytes, type[UpstreamError]]] = {
    # TGI
    "tgi no permit": (429, native("Model is overloaded", "overloaded"), UpstreamBusy),
    "tgi failed": (
        424,
        native("Request failed during generation: x", "generation"),
        UpstreamFailed,
    ),
    "tgi incomplete": (
        500,
        native("Incomplete generation", "incomplete_generation"),
        UpstreamFailed,
    ),
    "tgi too long": (422, native(TOO_LONG_TGI, "validation"), PromptTooLong),
    "tgi input too long": (422, native(TOO_LONG_TEI, "validation"), PromptTooLong),
    "tgi validation": (
        422,
        native("Input validation error: `top_p` must be > 0.0", "validation"),
        CallerMistake,
    ),
    "tgi template": (422, native("Template error: roles", "template_error"), CallerMistake),
    "tgi variable": (
        422,
        native("Missing template vatiable: x", "missing_template_variable"),
        CallerMistake,
    ),
    "tgi tools": (422, native("Tool error: both", "tool_error"), CallerMistake),
    "tgi garbled tool call": (
        422,
        native("Tool error: Failed to parse generated text: x", "tool_error"),
        UpstreamFailed,
    ),
    "tgi cannot read it": (422, b"Failed to deserialize the JSON body: stop: ...", CallerMistake),
    "tgi bad json": (400, b"Failed to parse the request body as JSON", CallerMistake),
    "tgi wrong key": (401, b"", RungRefused),
    "tgi unhealthy": (503, native("unhealthy", "healthcheck"), UpstreamFailed),
    "tgi body too large": (413, b"length limit exceeded", UpstreamTooLarge),
    # TEI
    "tei no permit": (429, flat("Model is overloaded", 429, "Overloaded"), UpstreamBusy),
    "tei too long": (422, flat(TOO_LONG_TEI, 422, "Tokenizer"), PromptTooLong),
    "tei validation": (
        422,
        flat("batch size 33 > maximum allowed batch size 32", 422, "Validation"),
        CallerMistake,
    ),
    "tei empty": (400, flat("`inputs` cannot be empty", 400, "Empty"), CallerMistake),
    "tei backend": (424, flat("CUDA error", 424, "Backend"), UpstreamFailed),
    "tei wrong model": (424, flat("Model is not an embedding model", 424, "backend"), RungRefused),
    "tei unhealthy": (503, flat("unhealthy", 503, "Unhealthy"), UpstreamFailed),
    "tei native": (429, native("Model is overloaded", "Overloaded"), UpstreamBusy),
    # vLLM
    "vllm too long": (
        400,
        nested("This model's maximum context length is 4096 tokens.", "BadRequestError", 400),
        PromptTooLong,
    ),
    "vllm mistake": (400, nested("top_p must be in (0, 1]", "BadRequestError", 400), CallerMistake),
    "vllm no model": (404, nested("The model `x` does not exist.", "NotFoundError"), RungRefused),
    "vllm old": (
        400,
        orjson.dumps({"object": "error", "message": "bad", "type": "BadRequestError", "code": 400}),
        CallerMistake,
    ),
    # SGLang
    "sglang too long": (
        400,
        orjson.dumps(
            {
                "object": "error",
                "message": "The input (9000 tokens) is longer than the model's context length",
                "type": "BadRequest",
                "param": None,
                "code": 400,
            }
        ),
        PromptTooLong,
    ),
    "sglang starting": (503, b"", UpstreamFailed),
    # llama.cpp
    "llama.cpp too long": (
        400,
        orjson.dumps({"error": {"code": 400, "message": "x", "type": "exceed_context_size_error"}}),
        PromptTooLong,
    ),
    "llama.cpp too long by words": (
        400,
        nested("the request exceeds the available context size, try increasing it"),
        PromptTooLong,
    ),
    "llama.cpp embeddings": (
        500,
        nested("input (2549 tokens) is too large to process. increase the physical batch size"),
        PromptTooLong,
    ),
    "llama.cpp loading": (
        503,
        orjson.dumps(
            {"error": {"code": 503, "message": "Loading model", "type": "unavailable_error"}}
        ),
        UpstreamFailed,
    ),
    # Ollama
    "ollama no model": (
        404,
        nested('model "x" not found, try pulling it first', "api_error"),
        RungRefused,
    ),
    "ollama busy": (503, nested("server busy, please try again.", "api_error"), UpstreamFailed),
    # The Hub and its providers
    "hub token": (401, orjson.dumps({"error": "Invalid username or password."}), RungRefused),
    "hub forbidden": (403, orjson.dumps({"error": ["no", "rights"]}), RungRefused),
    "hub credit": (402, orjson.dumps({"error": "You have exceeded your credits"}), RungRefused),
    "hub no such model": (
        400,
        nested("The requested model 'x' is not a chat model", code="model_not_supported"),
        RungRefused,
    ),
    "hub no such model by words": (
        400,
        orjson.dumps({"error": "Model x is not supported by provider y"}),
        RungRefused,
    ),
    "openai too long": (
        400,
        nested("too long", "invalid_request_error", "context_length_exceeded"),
        PromptTooLong,
    ),
    "transformers": (500, orjson.dumps({"error": "it broke"}), UpstreamFailed),
    # Frameworks and what stands before them
    "fastapi": (404, orjson.dumps({"detail": "Not Found"}), RungRefused),
    "fastapi fields": (
        422,
        orjson.dumps({"detail": [{"loc": ["body", "top_p"], "msg": "not a number"}]}),
        CallerMistake,
    ),
    "html": (502, b"<!DOCTYPE html><html><body>Bad gateway", UpstreamFailed),
    "nothing": (500, b"", UpstreamFailed),
    "a timeout": (408, b"", UpstreamFailed),
    "a redirect": (302, b"", UpstreamBroken),
    "wrong method": (405, b"", RungRefused),
    "a wrong content type": (415, b"", RungRefused),
    "odd": (102, b"", UpstreamBroken),
    "json that is no object": (500, b"[1]", UpstreamFailed),
    "not utf-8": (500, b"\xff\xfe", UpstreamFailed),
}


@pytest.mark.parametrize("name", ANSWERS)
def test_answers(name: str) -> None:
    status, body, kind = ANSWERS[name]
    error = refusal(WHO, status, {}, body)
    assert type(error) is kind
    assert WHO in error.message
    assert error.moves_on is (kind is not CallerMistake)
    assert error.upstream_status == status


class TestDetails:
    def test_a_mistake_keeps_its_words_param_and_code(self) -> None:
        body = nested("wrong", "invalid_request_error", "invalid_value", "top_p")
        error = refusal(WHO, 400, {}, body)
        assert (error.message, error.param, error.code) == (
            f"{WHO}: wrong",
            "top_p",
            "invalid_value",
        )

    @pytest.mark.parametrize(("status", "kept"), [(422, 400), (400, 400), (409, 409)])
    def test_a_mistakes_status(self, status: int, kept: int) -> None:
        assert refusal(WHO, status, {}, b"x").status == kept

    def test_a_number_is_no_code(self) -> None:
        assert refusal(WHO, 400, {}, nested("wrong", code=400)).code is None

    def test_a_wrong_token_closes_the_rung_and_spent_credit_the_backend(self) -> None:
        token, credit = refusal(WHO, 401, {}, b""), refusal(WHO, 402, {}, b"")
        assert (token.code, token.closes) == ("upstream_auth", "rung")
        assert (credit.code, credit.closes) == ("upstream_credit", "backend")
        assert token.cool_s
        assert credit.cool_s
        assert credit.cool_s > token.cool_s

    def test_an_overlong_prompt_has_openais_code(self) -> None:
        error = refusal(WHO, 422, {}, native(TOO_LONG_TGI, "validation"))
        assert (error.status, error.code) == (400, "context_length_exceeded")

    def test_busy_says_when_to_come_back(self) -> None:
        assert refusal(WHO, 429, {"retry-after": "7"}, b"").retry_after_s == 7

    def test_a_503_that_says_when_is_only_busy(self) -> None:
        error = refusal(WHO, 503, {"retry-after": "7"}, b"")
        assert isinstance(error, UpstreamBusy)
        assert error.retry_after_s == 7

    def test_long_words_are_cut_and_lines_joined(self) -> None:
        for body in (nested("x \n" * 5000), b"x \n" * 5000):
            message = refusal(WHO, 500, {}, body).message
            assert len(message) < 700
            assert "\n" not in message


class TestShapes:
    @pytest.mark.parametrize(
        ("value", "found"),
        [
            (
                {"error": {"message": "m", "type": "T", "code": "C", "param": "p"}},
                ("m", "t", "c", "p"),
            ),
            ({"error": {"message": "m", "code": 400, "param": 5}}, ("m", "", "400", None)),
            ({"error": {"reason": "odd"}}, ('{"reason":"odd"}', "", "", None)),
            ({"error": "m", "error_type": "Overloaded"}, ("m", "overloaded", "", None)),
            ({"error": ["a", "b"]}, ('["a","b"]', "", "", None)),
            ({"message": "m", "code": 429, "type": "Empty"}, ("m", "empty", "429", None)),
            ({"object": "error", "message": "m"}, ("m", "", "", None)),
            ({"detail": "m"}, ("m", "", "", None)),
            ({"detail": [{"msg": "m"}]}, ('[{"msg":"m"}]', "", "", None)),
        ],
    )
    def test_errors(self, value: Any, found: tuple[str, str, str, str | None]) -> None:
        assert complaint_in(value) == Complaint(*found)

    @pytest.mark.parametrize(
        "value",
        [
            {"choices": []},
            {"choices": [], "message": "m"},
            {"choices": [], "error": None},
            {"data": [], "detail": "x"},
            {},
            {"error": None},
            {"error": []},
            [],
            "error",
            None,
        ],
    )
    def test_no_errors(self, value: Any) -> None:
        assert complaint_in(value) is None

    @pytest.mark.parametrize(
        ("body", "message"),
        [
            (b"", "(no body)"),
            (b"  \n", "(no body)"),
            (b"<html><p>secret page", "(an HTML page)"),
            (b"\n <!doctype html>", "(an HTML page)"),
            (b"plain words", "plain words"),
            (b'{"unknown": 1}', '{"unknown": 1}'),
        ],
    )
    def test_bodies_without_one(self, body: bytes, message: str) -> None:
        assert complaint_of(body).message == message


IN_STREAM: dict[str, tuple[Any, type[UpstreamError]]] = {
    "tgi busy": ({"message": "Model is overloaded", "http_status_code": 422}, UpstreamBusy),
    "tgi too long": ({"message": TOO_LONG_TGI, "http_status_code": 422}, PromptTooLong),
    "tgi validation": (
        {"message": "Input validation error: x", "http_status_code": 422},
        CallerMistake,
    ),
    "tgi failed": (
        {"message": "Request failed during generation: CUDA", "http_status_code": 422},
        UpstreamFailed,
    ),
    "tgi incomplete": (
        {"message": "Incomplete generation", "http_status_code": 422},
        UpstreamFailed,
    ),
    "tgi template": ({"message": "Template error: x", "http_status_code": 422}, CallerMistake),
    "tgi tool": ({"message": "Tool error: unknown tool", "http_status_code": 422}, CallerMistake),
    "tgi garbled tool call": (
        {"message": "Tool error: Failed to parse generated text: x", "http_status_code": 422},
        UpstreamFailed,
    ),
    "vllm mistake": ({"message": "bad", "type": "BadRequestError", "code": 400}, CallerMistake),
    "vllm failed": (
        {"message": "EngineCore died", "type": "InternalServerError", "code": 500},
        UpstreamFailed,
    ),
    "openai rate": ({"message": "slow down", "type": "rate_limit_error"}, UpstreamBusy),
    "openai mistake": ({"message": "bad", "type": "invalid_request_error"}, CallerMistake),
    "no such model": ({"message": "x", "code": "model_not_supported"}, RungRefused),
    "ollama": ({"message": "server busy, please try again"}, UpstreamBusy),
    "no words": ({}, UpstreamFailed),
}


@pytest.mark.parametrize("name", IN_STREAM)
def test_in_stream(name: str) -> None:
    error, kind = IN_STREAM[name]
    complaint = complaint_in({"error": error})
    assert complaint is not None
    found = classify_in_stream(WHO, complaint)
    assert type(found) is kind
    assert WHO in found.message


def test_native_stream_errors_by_their_type() -> None:
    for kind, expected in (("overloaded", UpstreamBusy), ("validation", CallerMistake)):
        complaint = complaint_in({"error": "x", "error_type": kind})
        assert complaint is not None
        assert type(classify_in_stream(WHO, complaint)) is expected


def test_a_streams_words_are_cut_too() -> None:
    assert len(classify_in_stream(WHO, Complaint("x" * 100_000)).message) < 700


DATE = "Fri, 21 Nov 2025 10:00:00 GMT"


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({}, None),
        ({"retry-after": "7"}, 7),
        ({"retry-after": " 1.5 "}, 1.5),
        ({"retry-after": "0"}, 0),
        ({"retry-after-ms": "250", "retry-after": "7"}, 0.25),
        ({"retry-after-ms": "soon", "retry-after": "7"}, 7),
        ({"retry-after": "Fri, 21 Nov 2025 10:01:30 GMT", "date": DATE}, 90),
        ({"retry-after": "Fri, 21 Nov 2025 09:00:00 GMT", "date": DATE}, 0),
        ({"retry-after": "Fri, 21 Nov 2025 10:01:30 GMT"}, None),
        ({"retry-after": "Fri, 21 Nov 9999 10:01:30 GMT", "date": DATE}, None),
        ({"retry-after": "Fri, 21 Nov 2025 10:01:30 GMT", "date": "21 Nov 2025 10:00:00"}, None),
        ({"retry-after": "-5"}, None),
        ({"retry-after": "nan"}, None),
        ({"retry-after": "inf"}, None),
        ({"retry-after": "1e9"}, None),
        ({"retry-after": "later"}, None),
    ],
)
def test_retry_after(headers: dict[str, str], seconds: float | None) -> None:
    assert retry_after(headers) == seconds


SECRET = "Bearer hf_secret"


@pytest.mark.parametrize("status", [401, 402, 403])
def test_what_is_said_to_our_token_is_not_repeated(status: int) -> None:
    error = refusal(WHO, status, {}, orjson.dumps({"error": f"bad {SECRET}"}))
    assert SECRET not in error.message
    assert isinstance(error, RungRefused)
    assert error.cool_s


def test_words_that_may_be_a_callers_close_no_rung() -> None:
    echo = {"error": {"message": "input: 'the model x is not supported by provider y'"}}
    error = refusal(WHO, 400, {}, orjson.dumps(echo))
    assert isinstance(error, UpstreamError)
    assert error.cool_s is None


def test_an_error_nested_beyond_writing_is_still_an_error() -> None:
    deep = b'{"error":{"message":' + b"[" * 600 + b"]" * 600 + b"}}"
    assert isinstance(refusal(WHO, 500, {}, deep), UpstreamFailed)
