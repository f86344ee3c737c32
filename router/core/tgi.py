"""TGI's dialect of OpenAI's chat: requests into it, its chunks and answers out of it.

What TGI refuses or reads otherwise is put into words that mean the same there; what it would
ignore without a word is a reason not to ask it (`unable`). Streams and answers are only mended
here where the shape is TGI's own; ids, finish reasons and the rest are `core/chunks.py`'s and
`core/answers.py`'s. Follows TGI 3.3 (`router/src/lib.rs`, `chat.rs`) and, where it costs nothing,
the 2.x that is still about.
"""

from __future__ import annotations

from typing import Any

import orjson

from router.types import Abilities, Json

# Any other name is taken for a LoRA adapter, and an unknown adapter silently for the base model.
BASE_MODEL = "tgi"
ADAPTER_PREFIX = "adapter:"

_STOP_MAX = 4
_TOP_LOGPROBS_MAX = 5
# Tool calls of one answer that are followed; those beyond pass as they are.
_CALLS_MAX = 1024
_NO_SCHEMA: Json = {"type": "object"}
# These would change what is answered, and TGI reads none of them.
_IGNORED = ("functions", "function_call", "logit_bias", "audio", "web_search_options")


def unable(body: Json) -> str | None:
    """Why TGI cannot answer this request as it was meant, or None."""
    for name in _IGNORED:
        if body.get(name):
            return f"TGI ignores {name}"
    if (body.get("n") or 1) > 1:
        return "TGI gives one choice only, whatever n says"
    if (body.get("top_logprobs") or 0) > _TOP_LOGPROBS_MAX:
        return f"TGI gives at most {_TOP_LOGPROBS_MAX} top_logprobs"
    stop = body.get("stop")
    if isinstance(stop, list) and len(stop) > _STOP_MAX:
        return f"TGI takes at most {_STOP_MAX} stop sequences"
    if (body.get("presence_penalty") or 0) <= -2:
        return "TGI takes no presence_penalty of -2"
    modalities = body.get("modalities")
    if isinstance(modalities, list) and any(kind != "text" for kind in modalities):
        return "TGI answers in text only"
    if body.get("tools") and _response_format(body) is not None:
        return "TGI takes tools or a response_format, not both"
    return _unable_tools(body) or _unable_messages(body["messages"])


def chat_body(body: Json, *, model: str) -> Json:
    """The request as TGI takes it. `body` is as `backends/openai_wire.chat_body` makes it.

    Nulls go, since TGI's typed fields refuse some of them; inside a JSON schema they have a
    meaning and stay.
    """
    out = {name: value for name, value in body.items() if value is not None}
    out["model"] = model_name(model)
    out["messages"] = [_message(message) for message in body["messages"]]
    _limit_output(out)
    _sampling(out)
    if isinstance(out.get("stop"), str):
        out["stop"] = [out["stop"]]
    if out.get("stop") == []:
        del out["stop"]
    # A map of token biases is refused even when it is empty.
    out.pop("logit_bias", None)
    form = _response_format(out)
    out.pop("response_format", None)
    if form is not None:
        out["response_format"] = form
    if out.get("tools"):
        out["tools"] = [_tool(tool) for tool in out["tools"]]
    else:
        # `tools: []` counts as tools: beside a response_format it is refused.
        out.pop("tools", None)
        out.pop("tool_choice", None)
    if "stream_options" in out:
        out["stream_options"] = _without_nulls(out["stream_options"])
    return out


def model_name(model: str) -> str:
    """What to send as `model` for a rung's model: an adapter's name only where one is meant."""
    if model.startswith(ADAPTER_PREFIX):
        return model.removeprefix(ADAPTER_PREFIX)
    return BASE_MODEL


def mend_answer(body: bytes) -> bytes:
    """A whole answer with tool calls as OpenAI writes them: before 3.3.5 `arguments` is an object.

    Anything that is not such an answer is left for `core/answers.check` to judge.
    """
    if b'"tool_calls"' not in body:
        return body
    try:
        value = orjson.loads(body)
    except orjson.JSONDecodeError:
        return body
    changed = False
    for choice in _dicts(value.get("choices") if isinstance(value, dict) else None):
        message = choice.get("message")
        if not isinstance(message, dict):
            continue
        calls = message.get("tool_calls")
        if isinstance(calls, dict):
            message["tool_calls"] = calls = [calls]
            changed = True
        for call in _dicts(calls):
            changed |= _arguments_to_text(call)
    return orjson.dumps(value) if changed else body


class ChunkMender:
    """Mends one stream's chunks where their shape is TGI's own.

    TGI repeats `role` in every delta, and a tool call's id, type and null name in every fragment:
    clients that add deltas up (OpenAI's own SDK) would get `assistantassistant` and `000`. Every id
    is empty and `created` moves on, where OpenAI's stay the same. Before 3.2 a delta's `tool_calls`
    is one object instead of a list. A stream of tool calls has no finish reason at all: one is put
    before the usage chunk, where clients look for it.
    """

    def __init__(self, call_id: str) -> None:
        self._call_id = call_id
        self._created: Any = None
        self._begun: set[int] = set()
        self._calls: dict[tuple[int, int], Any] = {}
        self._unfinished: dict[int, None] = {}

    def mend(self, payload: bytes) -> list[bytes]:
        """What is to go on in this payload's place; errors and the like go on as they are."""
        try:
            chunk = orjson.loads(payload)
        except orjson.JSONDecodeError:
            return [payload]
        if not isinstance(chunk, dict) or not isinstance(chunk.get("choices"), list):
            return [payload]
        chunk["id"] = chunk.get("id") or self._call_id
        if self._created is None:
            self._created = chunk.get("created")
        if "created" in chunk:
            chunk["created"] = self._created
        closing = self._close(chunk) if not chunk["choices"] else []
        for choice in _dicts(chunk["choices"]):
            self._mend_choice(choice)
        return [*closing, orjson.dumps(chunk)]

    def _mend_choice(self, choice: Json) -> None:
        index = choice.get("index")
        delta = choice.get("delta")
        if type(index) is not int or not isinstance(delta, dict):
            return
        if index in self._begun:
            delta.pop("role", None)
        self._begun.add(index)
        calls = delta.get("tool_calls")
        if isinstance(calls, dict):
            delta["tool_calls"] = calls = [calls]
        for position, call in enumerate(_dicts(calls)):
            self._unfinished[index] = None
            self._mend_call(index, call, position)
        if choice.get("finish_reason"):
            if index in self._unfinished and choice["finish_reason"] != "length":
                choice["finish_reason"] = "tool_calls"
            self._unfinished.pop(index, None)

    def _mend_call(self, index: int, call: Json, position: int) -> None:
        place = call.get("index")
        if type(place) is not int:
            call["index"] = place = position
        _arguments_to_text(call)
        function = call.get("function")
        if isinstance(function, dict) and not function.get("name"):
            function.pop("name", None)
        seen = (index, place)
        if seen not in self._calls:
            if len(self._calls) < _CALLS_MAX:
                self._calls[seen] = call.get("id")
        elif self._calls[seen] == call.get("id"):
            call.pop("id", None)
            call.pop("type", None)

    def _close(self, last: Json) -> list[bytes]:
        """Finish chunks for the tool calls that the usage chunk finds without one."""
        payloads = []
        for index in self._unfinished:
            choice = {"index": index, "delta": {}, "logprobs": None, "finish_reason": "tool_calls"}
            payloads.append(orjson.dumps({**last, "choices": [choice], "usage": None}))
        self._unfinished.clear()
        return payloads


def abilities_in(info: Any) -> dict[str, Abilities] | None:
    """What `/info` says of the one model, by its id; None if this is no TGI's `/info`.

    1.x and 2.x call the limit of the prompt `max_input_length`, and early ones name no `router`.
    """
    if not isinstance(info, dict) or not isinstance(info.get("model_id"), str):
        return None
    if info.get("router") != "text-generation-router" and "max_total_tokens" not in info:
        return None
    names = ("max_total_tokens", "max_input_tokens", "max_input_length")
    told = (value for name in names if type(value := info.get(name)) is int and value > 0)
    able = Abilities(context=next(told, None))
    return {info["model_id"]: able, BASE_MODEL: able}


def revision_in(info: Any) -> str:
    """The revision of the model, "" where `/info` names none: of a folder, for one."""
    sha = info.get("model_sha") if isinstance(info, dict) else None
    return sha if isinstance(sha, str) else ""


def _unable_tools(body: Json) -> str | None:
    tools = body.get("tools") or ()
    for tool in _dicts(tools):
        if tool.get("type", "function") != "function":
            return f"TGI knows no tools of the type {_shown(tool['type'])}"
    choice = body.get("tool_choice")
    if tools and isinstance(choice, dict) and choice.get("type", "function") != "function":
        return f"TGI knows no tool_choice of the type {_shown(choice['type'])}"
    return None


def _unable_messages(messages: list[Json]) -> str | None:
    for message in messages:
        if message.get("function_call"):
            return "TGI ignores function_call"
        content = message.get("content")
        if message.get("tool_calls") and _has_text(content):
            return "TGI loses the text of an assistant's message that has tool_calls"
        for part in content if isinstance(content, list) else ():
            if part.get("type") not in ("text", "image_url"):
                return f"TGI takes no message parts of the type {_shown(part.get('type'))}"
    return None


def _has_text(content: Any) -> bool:
    if isinstance(content, list):
        return any(part.get("type") != "text" or _has_text(part.get("text")) for part in content)
    return isinstance(content, str) and bool(content.strip())


def _message(message: Json) -> Json:
    out = {name: value for name, value in message.items() if value is not None}
    if out.get("role") == "developer":
        # OpenAI's newer word for it; chat templates know only this one.
        out["role"] = "system"
    if calls := _dicts(out.pop("tool_calls", None)):
        # With any content beside them TGI takes the message for text and drops the calls.
        out.pop("content", None)
        out["tool_calls"] = [_without_nulls(call) for call in calls]
        return out
    content = out.setdefault("content", "")
    if isinstance(content, list):
        out["content"] = [_part(part) for part in content]
    return out


def _part(part: Json) -> Json:
    return {name: _without_nulls(value) for name, value in part.items() if value is not None}


def _tool(tool: Any) -> Any:
    if not isinstance(tool, dict):
        return tool
    return {name: _without_nulls(value) for name, value in tool.items() if value is not None}


def _limit_output(out: Json) -> None:
    """TGI's two names are aliases of one field, and both at once a mistake."""
    newer = out.pop("max_completion_tokens", None)
    if newer is not None:
        out["max_tokens"] = newer


def _sampling(out: Json) -> None:
    """TGI takes `top_p` between 0 and 1 without the ends, and `presence_penalty: 0` as one of 2."""
    if out.get("top_p") in (0, 1) and out.pop("top_p") == 0:
        # The smallest nucleus is the likeliest token alone, which is greedy decoding.
        out["temperature"] = 0
    for name in ("presence_penalty", "frequency_penalty"):
        if out.get(name) == 0:
            del out[name]
    seed = out.get("seed")
    if type(seed) is int and seed < 0:
        # OpenAI's seed is signed, TGI's is not: the same 64 bits, so still one seed for one.
        out["seed"] = seed % (1 << 64)


def _response_format(body: Json) -> Json | None:
    """TGI's form of it; None where it asks for plain text.

    `json_object` with a schema for its `value` is the form that every TGI with grammars takes;
    `json_schema` came to it late.
    """
    form = body.get("response_format")
    if not isinstance(form, dict) or form.get("type") in (None, "text"):
        return None
    if form.get("value") is not None:
        return form
    if form["type"] == "json_schema":
        wrapped = form.get("json_schema")
        schema = wrapped.get("schema") if isinstance(wrapped, dict) else None
        return {"type": "json_object", "value": _NO_SCHEMA if schema is None else schema}
    if form["type"] in ("json_object", "json"):
        return {"type": "json_object", "value": _NO_SCHEMA}
    return form


def _arguments_to_text(call: Json) -> bool:
    function = call.get("function")
    if not isinstance(function, dict) or not isinstance(function.get("arguments"), dict | list):
        return False
    function["arguments"] = orjson.dumps(function["arguments"]).decode()
    return True


def _shown(value: Any) -> str:
    """A client's word for our message: no longer than a word need be."""
    return repr(str(value)[:60])


def _without_nulls(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    return {name: inner for name, inner in value.items() if inner is not None}


def _dicts(value: Any) -> list[Json]:
    return [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []
