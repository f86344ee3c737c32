"""Whole chat answers: checked and mended when they come from upstream, built when we translate.

The same repairs as in `core/chunks.py`, for the same reasons. An answer that needs none keeps its
bytes.
"""

from __future__ import annotations

import orjson

from router.core import jsontext
from router.core.chunks import known_finish, twin_reasoning, usage_in, usage_object
from router.core.refusal import classify_in_stream, complaint_in
from router.errors import UpstreamBroken
from router.types import Answer, Json, Usage


def check(body: bytes, *, who: str, call_id: str) -> Answer:
    """The answer in `body`. Raises UpstreamError when it is an error or no chat completion."""
    try:
        value = jsontext.read(body)
    except ValueError as error:
        raise UpstreamBroken(f"{who} answered with a body that is not JSON") from error
    choices = value.get("choices") if isinstance(value, dict) else None
    if not isinstance(choices, list) or not choices or value.get("error"):
        complaint = complaint_in(value)
        if complaint is not None:
            raise classify_in_stream(who, complaint)
    if not isinstance(choices, list) or not choices:
        raise UpstreamBroken(f"{who} answered with JSON that is not a chat completion")
    changed = False
    for position, choice in enumerate(choices):
        if not isinstance(choice, dict) or not isinstance(choice.get("message"), dict):
            raise UpstreamBroken(f"{who} answered with a malformed choice")
        changed |= _mend(choice, position, who)
    if not value.get("id"):
        value["id"] = call_id
        changed = True
    if changed:
        try:
            body = jsontext.write(value)
        except ValueError as error:
            raise UpstreamBroken(f"{who} answered with JSON that cannot be passed on") from error
    return Answer(body, usage_in(value.get("usage")))


def _mend(choice: Json, position: int, who: str) -> bool:
    changed = False
    if type(choice.get("index")) is not int:
        choice["index"] = position
        changed = True
    message = choice["message"]
    finish = choice.get("finish_reason")
    wanted = known_finish(finish, who)
    if wanted == "stop" and message.get("tool_calls"):
        wanted = "tool_calls"
    if wanted != finish:
        choice["finish_reason"] = wanted
        changed = True
    return twin_reasoning(message) or changed


def build(*, call_id: str, created: int, model: str, text: str, usage: Usage | None) -> bytes:
    """A chat completion of our own making, for backends that do not speak OpenAI."""
    message = {"role": "assistant", "content": text, "refusal": None}
    choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": "stop"}
    value: Json = {
        "id": call_id,
        "object": "chat.completion",
        "created": created,
        "model": model,
        "choices": [choice],
    }
    if usage is not None:
        value["usage"] = usage_object(usage)
    return orjson.dumps(value)


def build_chunk(
    *,
    call_id: str,
    created: int,
    model: str,
    delta: Json,
    finish_reason: str | None = None,
) -> bytes:
    """One chunk of our own making."""
    choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
    return orjson.dumps(
        {
            "id": call_id,
            "object": "chat.completion.chunk",
            "created": created,
            "model": model,
            "choices": [choice],
        }
    )
