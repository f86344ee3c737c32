"""What an upstream's refusal means: every known error shape in, one of our errors out.

Shapes: OpenAI's `{"error": {"message", "type", "param", "code"}}` (vLLM puts an int in `code`);
TGI's, TEI's and the Hub's `{"error": "text", "error_type"}`; TEI's OpenAI route
`{"message", "code", "type"}`; SGLang's and old vLLM's `{"object": "error", "message", ...}`;
FastAPI's `{"detail": ...}`; plain text and HTML. The status alone is never enough: TGI says 422 to
everything inside a stream, and a provider says 400 to a model that it does not serve.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import orjson

from router.core import jsontext
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

_MESSAGE_CHARS_MAX = 600
# What asks for more than this many seconds (four months) asks for nothing sensible.
_RETRY_AFTER_S_MAX = 1e7

# How each backend says that the prompt does not fit; a later rung may have a larger context.
_TOO_LONG = re.compile(
    r"`inputs` tokens \+ `max_new_tokens` must be <="  # TGI
    r"|`inputs` must have less than"  # TGI, TEI
    r"|maximum context length"  # OpenAI, vLLM
    r"|exceeds? the available context size"  # llama.cpp
    r"|input (?:\(\d+ tokens\) )?is too large to process"  # llama.cpp, embeddings: with a 500
    r"|longer than the model'?s context length"  # SGLang
    r"|(?:exceeds?|greater than|larger than) the (?:maximum )?context (?:length|window|size)"
    r"|maximum (?:input|prompt) length",
    re.IGNORECASE,
)
_TOO_LONG_CODES = frozenset(
    {"context_length_exceeded", "exceed_context_size_error", "string_above_max_length"}
)
_MODEL_CODES = frozenset({"model_not_supported", "model_not_found", "unsupported_model"})
# Hugging Face's router has no code for it on its providers' own routes, only these words.
_MODEL_WORDS = re.compile(r"\bmodel\b.* not supported by (?:any )?provider", re.IGNORECASE)
_BUSY = re.compile(r"overloaded|too many requests|rate limit|server busy|queue is full", re.I)
# TGI blames the request for these: a prompt that its model's template cannot put into words.
_TEMPLATE = re.compile(r"^(?:Template error|Missing template va[rt]iable|Tool error):")
# ...and for this one too, though it is the model that wrote a tool call which is none.
_UNPARSED = "Failed to parse generated text"
# TEI calls it a failure of its backend (424), but no second try will mend it.
_WRONG_TASK = re.compile(r"model is not an? \w+ model", re.IGNORECASE)
_HTML = re.compile(rb"^\s*<(?:!doctype|html)", re.IGNORECASE)

# How long a rung that refuses our token, credit or model stays closed. The configuration has to
# change for it to work again, so it is only asked now and then.
_TOKEN_COOL_S = 60.0
_CREDIT_COOL_S = 600.0
_MODEL_COOL_S = 60.0


class Complaint(NamedTuple):
    """An error body, whatever its shape. `kind` is the upstream's own word for it, lower case."""

    message: str
    kind: str = ""
    code: str = ""
    param: str | None = None


def complaint_in(value: Any) -> Complaint | None:
    """The error that a parsed JSON body or stream event reports, or None if it reports none."""
    if not isinstance(value, dict):
        return None
    error = value.get("error")
    if isinstance(error, dict):
        return Complaint(
            _text(error.get("message")) or _text(error),
            _text(error.get("type")).lower(),
            _text(error.get("code")).lower(),
            error.get("param") if isinstance(error.get("param"), str) else None,
        )
    if isinstance(error, str):
        return Complaint(error, _text(value.get("error_type")).lower())
    if isinstance(error, list) and error:
        return Complaint(_text(error), _text(value.get("error_type")).lower())
    if value.get("object") == "error" or ("message" in value and "choices" not in value):
        return Complaint(
            _text(value.get("message")),
            _text(value.get("type")).lower(),
            _text(value.get("code")).lower(),
            value.get("param") if isinstance(value.get("param"), str) else None,
        )
    if "detail" in value and "choices" not in value and "data" not in value:
        return Complaint(_text(value["detail"]))
    return None


def complaint_of(body: bytes) -> Complaint:
    """The complaint of an error answer's body, JSON or not."""
    try:
        found = complaint_in(jsontext.read(body))
    except ValueError:
        found = None
    if found is not None:
        return found._replace(message=_shorten(found.message))
    if not body.strip():
        return Complaint("(no body)")
    if _HTML.match(body):
        return Complaint("(an HTML page)")
    return Complaint(_shorten(body.decode("utf-8", "replace")))


def refusal(who: str, status: int, headers: Mapping[str, str], body: bytes) -> UpstreamError:
    """The error for an answer that is not a success. `who` names the rung for people to read."""
    complaint = complaint_of(body)
    error = classify(who, status, complaint, retry_after(headers))
    error.upstream_status = status
    return error


def classify(
    who: str, status: int, complaint: Complaint, retry_after_s: float | None = None
) -> UpstreamError:
    """What a complaint with this status means."""
    message = f"{who} answered {status}: {complaint.message}"
    if 300 <= status < 400:
        return UpstreamBroken(f"{who} answered with a redirect ({status}), which is not followed")
    # What an upstream says to our token may repeat it, so these are told in our own words.
    if status in (401, 403):
        return RungRefused(
            f"{who} refused our token ({status}): see its configuration",
            code="upstream_auth",
            cool_s=_TOKEN_COOL_S,
        )
    if status == 402:
        return RungRefused(
            f"{who} refused us for want of credit (402)",
            code="upstream_credit",
            cool_s=_CREDIT_COOL_S,
            closes="backend",
        )
    if status == 429:
        return UpstreamBusy(message, retry_after_s=retry_after_s)
    if is_too_long(complaint):
        return PromptTooLong(f"{who}: {complaint.message}", param="messages")
    if (refused := _model_refusal(message, complaint)) is not None:
        return refused
    if status in (404, 405, 410, 415):
        return RungRefused(message, code="upstream_model", cool_s=_MODEL_COOL_S)
    if status == 413:
        return UpstreamTooLarge(message)
    if status in (408, 424) or status >= 500 or _UNPARSED in complaint.message:
        if status == 503 and retry_after_s is not None:
            return UpstreamBusy(message, retry_after_s=retry_after_s)
        return UpstreamFailed(message, retry_after_s=retry_after_s)
    if 400 <= status < 500:
        kept = 400 if status == 422 else status
        return CallerMistake(
            f"{who}: {complaint.message}",
            status=kept,
            code=complaint.code or None if not complaint.code.isdigit() else None,
            param=complaint.param,
        )
    return UpstreamBroken(f"{who} answered with the unexpected status {status}")


def classify_in_stream(who: str, complaint: Complaint) -> UpstreamError:
    """What an error event inside a 200 stream means; it has words but no trustworthy status."""
    complaint = complaint._replace(message=_shorten(complaint.message))
    message = f"{who} reported in its stream: {complaint.message}"
    if is_too_long(complaint):
        return PromptTooLong(f"{who}: {complaint.message}", param="messages")
    if complaint.kind in ("overloaded", "rate_limit_error") or _BUSY.search(complaint.message):
        return UpstreamBusy(message)
    if _UNPARSED in complaint.message:
        return UpstreamFailed(message)
    if complaint.kind == "validation" or "Input validation error" in complaint.message:
        return CallerMistake(f"{who}: {complaint.message}")
    if _TEMPLATE.match(complaint.message):
        return CallerMistake(f"{who}: {complaint.message}", param="messages")
    if (refused := _model_refusal(message, complaint)) is not None:
        return refused
    if complaint.kind == "invalid_request_error" or complaint.code == "400":
        return CallerMistake(f"{who}: {complaint.message}", param=complaint.param)
    return UpstreamFailed(message)


def is_too_long(complaint: Complaint) -> bool:
    return (
        complaint.code in _TOO_LONG_CODES
        or complaint.kind in _TOO_LONG_CODES
        or _TOO_LONG.search(complaint.message) is not None
    )


def _model_refusal(message: str, complaint: Complaint) -> RungRefused | None:
    """The refusal of the rung's model. A code closes the rung; words, which may only repeat what a
    caller wrote, move this one call on.
    """
    if complaint.code in _MODEL_CODES:
        return RungRefused(message, code="upstream_model", cool_s=_MODEL_COOL_S)
    words = complaint.message[:_MESSAGE_CHARS_MAX]
    if _MODEL_WORDS.search(words) is not None or _WRONG_TASK.search(words) is not None:
        return RungRefused(message, code="upstream_model")
    return None


def retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds from `retry-after-ms` or `Retry-After` (a number, or a date measured by `Date`)."""
    for name, unit in (("retry-after-ms", 1000.0), ("retry-after", 1.0)):
        text = headers.get(name, "").strip()
        try:
            seconds = float(text) / unit
        except ValueError:
            continue
        return seconds if 0 <= seconds < _RETRY_AFTER_S_MAX else None
    until, now = headers.get("retry-after"), headers.get("date")
    if not until or not now:
        return None
    # Few servers tell a date, and email is half a megabyte.
    from email.utils import parsedate_to_datetime  # noqa: PLC0415

    try:
        seconds = (parsedate_to_datetime(until) - parsedate_to_datetime(now)).total_seconds()
    except (ValueError, TypeError, OverflowError):
        return None
    return max(0.0, seconds) if seconds < _RETRY_AFTER_S_MAX else None


def _text(value: Any) -> str:
    if isinstance(value, str):
        return value
    if value is None:
        return ""
    try:
        return orjson.dumps(value, default=str).decode()
    except orjson.JSONEncodeError:
        return "(an error nested too deep to be shown)"


def _shorten(text: str) -> str:
    flat = " ".join(text.split())
    return flat if len(flat) <= _MESSAGE_CHARS_MAX else flat[:_MESSAGE_CHARS_MAX] + "…"
