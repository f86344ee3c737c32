"""A client's chat request: checked as far as Rungway depends on it, and what it needs of a rung.

Unknown fields are relayed, never refused. Known ones are checked for their type only: ranges are
the model's business. TGI's form of `response_format`, which huggingface_hub sends to every server,
is turned back into OpenAI's; TGI's `regex` has no OpenAI form and stays.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from router.core import jsontext
from router.errors import BadRequest, TooLarge
from router.types import Json, Needs

# Prompts seldom have more characters to a token than this, so a prompt is only refused for a rung
# that it cannot fit; one that might not fit is for the rung itself to judge.
_CHARS_PER_TOKEN_MAX = 6

_NUMBER = frozenset({int, float})
_BOOLEAN = frozenset({bool})
_INTEGER = frozenset({int})
_OBJECT = frozenset({dict})
# The very types that JSON is read into: a boolean is no integer here.
_TYPES: dict[str, tuple[frozenset[type], str]] = {
    "stream": (_BOOLEAN, "a boolean"),
    "stream_options": (_OBJECT, "an object"),
    "max_tokens": (_INTEGER, "an integer"),
    "max_completion_tokens": (_INTEGER, "an integer"),
    "n": (_INTEGER, "an integer"),
    "temperature": (_NUMBER, "a number"),
    "top_p": (_NUMBER, "a number"),
    "presence_penalty": (_NUMBER, "a number"),
    "frequency_penalty": (_NUMBER, "a number"),
    "seed": (_INTEGER, "an integer"),
    "stop": (frozenset({str, list}), "a string or an array of strings"),
    "tools": (frozenset({list}), "an array"),
    "tool_choice": (frozenset({str, dict}), "a string or an object"),
    "response_format": (_OBJECT, "an object"),
    "logit_bias": (frozenset({dict, list}), "an object"),
    "logprobs": (_BOOLEAN, "a boolean"),
    "top_logprobs": (_INTEGER, "an integer"),
    "user": (frozenset({str}), "a string"),
}
# Servers take a part for what its fields say, whatever its type says.
_MEDIA_URLS = ("image_url", "video_url", "audio_url", "input_image")
# OpenAI's two names, and llama.cpp's own, which it reads first and where -1 is without end.
OUTPUT_LIMITS = ("max_completion_tokens", "max_tokens", "n_predict")
_AT_LEAST_ONE = frozenset({"max_tokens", "max_completion_tokens", "n"})


def read(body: Any) -> Json:
    """The checked request, as a new object where anything had to be changed. Raises BadRequest."""
    if not isinstance(body, dict):
        raise BadRequest("the request body must be a JSON object", code="invalid_type")
    messages = body.get("messages")
    if messages is None:
        raise _missing("messages")
    if not isinstance(messages, list) or not messages:
        raise _wrong("messages", "a non-empty array of messages")
    for index, message in enumerate(messages):
        _check_message(message, index)
    for name, value in body.items():
        known = _TYPES.get(name)
        if known is None or value is None:
            continue
        types, wanted = known
        if type(value) not in types:
            raise _wrong(name, wanted)
        if name in _AT_LEAST_ONE and value < 1:
            raise BadRequest(
                f"{name} must be at least 1", code="integer_below_min_value", param=name
            )
        if name == "stop":
            _check_stop(value)
    form = body.get("response_format")
    if form is not None:
        translated = _openai_response_format(form)
        if translated is not form:
            return {**body, "response_format": translated}
    return body


def needs_of(body: Json) -> Needs:
    """What a rung must be able to do for this request."""
    size = schema_chars = images = 0
    for message in body["messages"]:
        if message.get("tool_calls"):
            schema_chars += _json_chars(message["tool_calls"])
        content = message.get("content")
        if isinstance(content, str):
            size += len(content)
        elif isinstance(content, list):
            for part in content:
                if isinstance(part.get("text"), str):
                    size += len(part["text"])
                images += any(name in part for name in _MEDIA_URLS)
    tools, functions = body.get("tools"), body.get("functions")
    form = body.get("response_format")
    if tools or functions or form:
        schema_chars += sum(_json_chars(one) for one in (tools, functions, form) if one)
    # By position, in the order of its fields: names cost as much again as the object.
    return Needs(
        size // _CHARS_PER_TOKEN_MAX,
        size,
        schema_chars,
        images,
        bool(tools or functions),
        images > 0,
        form is not None and form.get("type") == "json_schema",
    )


def _json_chars(value: Any) -> int:
    try:
        return len(jsontext.write(value))
    except ValueError:
        # It cannot be sent on either: the backend will say so.
        return 0


def output_limit(body: Json) -> int | None:
    """The most output tokens that the request asks for, for each choice; None: it does not say."""
    least = None
    for name in OUTPUT_LIMITS:
        asked = body.get(name)
        if type(asked) is int and asked > 0 and (least is None or asked < least):
            least = asked
    return least


def clamp(body: Json, output_tokens_max: int | None) -> tuple[Json, int | None]:
    """The request with no more output than the key may have, and that limit where it changed it.

    The client's own field is used; a request without one gets `max_tokens`, which every backend
    knows.
    """
    if output_tokens_max is None:
        return body, None
    changed = {}
    for name in OUTPUT_LIMITS:
        asked = body.get(name)
        if asked is not None and (type(asked) is not int or not 0 < asked <= output_tokens_max):
            changed[name] = output_tokens_max
    if body.get("max_tokens") is None and body.get("max_completion_tokens") is None:
        changed["max_tokens"] = output_tokens_max
    return ({**body, **changed}, output_tokens_max) if changed else (body, None)


class ImageRules(NamedTuple):
    """Which images may pass. A remote one would make a local server fetch an inside address."""

    remote: bool
    bytes_max: int
    types: frozenset[str]


def check_images(body: Json, rules: ImageRules) -> None:
    """Raises BadRequest or TooLarge on an image that may not pass."""
    for url in _image_urls(body):
        scheme, _, rest = url.partition(":")
        if scheme in ("http", "https"):
            if not rules.remote:
                raise BadRequest(
                    "images by address are not fetched here: send a data: URL, "
                    "or set server.remote_images",
                    code="invalid_image_url",
                    param="messages",
                )
            continue
        media, _, data = rest.partition(",")
        if scheme != "data" or not media.endswith(";base64"):
            raise BadRequest(
                "an image must be a data: URL in base64", code="invalid_image_url", param="messages"
            )
        kind = media.partition(";")[0].lower()
        if kind not in rules.types:
            raise BadRequest(
                f"images of the type {kind[:60]!r} are not taken, only {', '.join(rules.types)}",
                code="invalid_image_format",
                param="messages",
            )
        if len(data) * 3 // 4 > rules.bytes_max:
            raise TooLarge(f"an image is larger than {rules.bytes_max} bytes", param="messages")


def _image_urls(body: Json) -> list[str]:
    urls = []
    for index, message in enumerate(body["messages"]):
        content = message.get("content")
        if not isinstance(content, list):
            continue
        for part in content:
            for name in _MEDIA_URLS:
                if name not in part:
                    continue
                media = part[name]
                url = media.get("url") if isinstance(media, dict) else media
                if not isinstance(url, str):
                    raise _wrong(f"messages[{index}].content", f"parts whose {name} has a url")
                urls.append(url)
    return urls


def _check_message(message: Any, index: int) -> None:
    if not isinstance(message, dict):
        raise _wrong(f"messages[{index}]", "an object")
    if not isinstance(message.get("role"), str):
        raise _wrong(f"messages[{index}].role", "a string")
    content = message.get("content")
    if content is None or isinstance(content, str):
        return
    if not isinstance(content, list):
        raise _wrong(f"messages[{index}].content", "a string or an array of parts")
    if not all(isinstance(part, dict) for part in content):
        raise _wrong(f"messages[{index}].content", "an array of objects")


def _check_stop(stop: str | list[Any]) -> None:
    if isinstance(stop, list) and not all(isinstance(one, str) for one in stop):
        raise _wrong("stop", "a string or an array of strings")


def _openai_response_format(form: Json) -> Json:
    """OpenAI's form of TGI's `{"type": "json_object" | "json" | "json_schema", "value": ...}`."""
    value = form.get("value")
    if form.get("type") not in ("json_object", "json", "json_schema") or value is None:
        return form
    if not isinstance(value, dict):
        raise _wrong("response_format.value", "an object")
    schema = value
    name = "response"
    if form["type"] == "json_schema":
        schema = value.get("schema", value)
        name = value.get("name") or name
    return {"type": "json_schema", "json_schema": {"name": name, "schema": schema}}


def _missing(name: str) -> BadRequest:
    return BadRequest(
        f"the required field {name} is missing", code="missing_required_parameter", param=name
    )


def _wrong(name: str, wanted: str) -> BadRequest:
    return BadRequest(f"{name} must be {wanted}", code="invalid_type", param=name)
