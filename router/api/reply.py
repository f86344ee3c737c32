"""Answers that are not a model's: JSON, and every error in OpenAI's envelope.

The one place that renders a `RouterError`. `x-should-retry` overrides what the SDKs would do by the
status alone; a 503 is never the answer to overload, since one SDK repeats it without end.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import orjson

from router.core import sse
from router.errors import MethodNotAllowed, RouterError
from router.types import Json

JSON_TYPE = "application/json"
# It tells no versions.
SERVER_NAME = "rungway"


@dataclass(frozen=True, slots=True)
class Reply:
    """A whole answer, for whichever server writes it. `body` None: its status has none.

    `headers` are its own, beside those of every answer.
    """

    status: int
    body: bytes | None
    content_type: str = JSON_TYPE
    headers: Mapping[str, str] = field(default_factory=dict)


def json_reply(value: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Reply:
    return Reply(status, orjson.dumps(value), headers=headers or {})


def envelope(error: RouterError) -> Json:
    """OpenAI's error object; `rungs` is ours and tells why each rung was not taken."""
    inner: Json = {
        "message": error.message,
        "type": error.kind,
        "param": error.param,
        "code": error.code,
    }
    if error.rungs:
        inner["rungs"] = error.rungs
    return {"error": inner}


def error_headers(error: RouterError) -> dict[str, str]:
    headers = {
        "x-rungway-origin": error.origin,
        "x-should-retry": "true" if error.should_retry else "false",
    }
    if error.retry_after_s is not None:
        headers["Retry-After"] = str(max(1, math.ceil(error.retry_after_s)))
    if isinstance(error, MethodNotAllowed):
        headers["Allow"] = error.allow
    return headers


def error_reply(error: RouterError, headers: Mapping[str, str] | None = None) -> Reply:
    return json_reply(envelope(error), error.status, {**error_headers(error), **(headers or {})})


def error_frame(error: RouterError) -> bytes:
    """The event that ends a stream that cannot be finished."""
    return sse.frame(orjson.dumps(envelope(error)))
