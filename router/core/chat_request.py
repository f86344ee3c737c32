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

_NUMBER = (int, float)
_TYPES: dict[str, tuple[tuple[type, ...], str]] = {
    "stream": ((bool,), "a boolean"),
    "stream_options": ((dict,), "an object"),
    "max_tokens": ((int,), "an integer"),
    "max_completion_tokens": ((int,), "an integer"),
    "n": ((int,), "an integer"),
    "temperature": (_NUMBER, "a number"),
    "top_p": (_NUMBER, "a number"),
    "presence_penalty": (_NUMBER, "a number"),
    "frequency_penalty": (_NUMBER, "a number"),
    "seed": ((int,), "an integer"),
    "stop": ((str, list), "a string or an array of strings"),
    "tools": ((list,), "an array"),
    "tool_choice": ((str, dict), "a string or an object"),
    "response_format": ((dict,), "an object"),
    "logit_bias": ((dict, list), "an object"),
    "logprobs": ((bool,), "a boolean"),
    "top_logprobs": ((int,), "an integer"),
    "user": ((str,), "a string"),
}
# Servers take a part for what its fields say, whatever its type says.
_MEDIA_URLS = ("image_url", "video_url", "audio_url", "input_image")
# OpenAI's two names, and llama.cpp's own, which it reads first and where -1 is without end.
OUTPUT_LIMITS = ("max_completion_tokens", "max_tokens", "n_predict")
_AT_LEAST_ONE = ("max_tokens", "max_completion_tokens", "n")


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
    for name, (types, wanted) in _TYPES.items():
        value = body.get(name)
        if value is None:
            continue
        if not isinstance(value, types) or (isinstance(value, bool) and bool not in types):
            raise _wrong(name, wanted)
    for name in _AT_LEAST_ONE:
        value = body.get(name)
        if value is not None and value < 1:
            raise BadRequest(
                f"{name} must be at least 1", code="integer_below_min_value", param=name
            )
    _check_stop(body.get("stop"))
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
    form = body.get("response_format") or {}
    for name in ("tools", "functions", "response_format"):
        if body.get(name):
            schema_chars += _json_chars(body[name])
    return Needs(
        prompt_tokens_min=size // _CHARS_PER_TOKEN_MAX,
        prompt_chars=size,
        schema_chars=schema_chars,
        images=images,
        tools=bool(body.get("tools") or body.get("functions")),
        vision=images > 0,
        json_schema=form.get("type") == "json_schema",
    )


def _json_chars(value: Any) -> int:
    try:
        return len(jsontext.write(value))
    except ValueError:
        # It cannot be sent on either: the backend will say so.
        return 0


def output_limit(body: Json) -> int | None:
    """The most output tokens that the request asks for, for each choice; None: it does not say."""
    asked = [value for name in OUTPUT_LIMITS if type(value := body.get(name)) is int and value > 0]
    return min(asked, default=None)


def clamp(body: Json, output_tokens_max: int | None) -> tuple[Json, int | None]:
    """The request with no more output than the key may have, and that limit where it changed it.

    The client's own field is used; a request without one gets `max_tokens`, which every backend
    knows.
    """
    if output_tokens_max is None:
        return body, None
    asked = {name: body[name] for name in OUTPUT_LIMITS if body.get(name) is not None}
    if not asked.keys() & {"max_completion_tokens", "max_tokens"}:
        asked["max_tokens"] = None
    changed = {
        name: output_tokens_max
        for name, value in asked.items()
        if type(value) is not int or not 0 < value <= output_tokens_max
    }
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
    where = f"messages[{index}]"
    if not isinstance(message, dict):
        raise _wrong(where, "an object")
    if not isinstance(message.get("role"), str):
        raise _wrong(f"{where}.role", "a string")
    content = message.get("content")
    if content is None or isinstance(content, str):
        return
    if not isinstance(content, list):
        raise _wrong(f"{where}.content", "a string or an array of parts")
    if not all(isinstance(part, dict) for part in content):
        raise _wrong(f"{where}.content", "an array of objects")


def _check_stop(stop: Any) -> None:
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
