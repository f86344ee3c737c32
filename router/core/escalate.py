"""Whether an answer is one that its ladder asks a better rung to replace. Pure.

Judged are whole answers, and streams that were kept until they were whole. Four words, as in a
ladder's `escalate_on`:

- `content_filter`: the answer was cut by a filter.
- `empty`: neither text nor tool calls; reasoning alone is no answer.
- `refusal`: the message's own `refusal`, or a short text that begins as refusals do, in the
  languages of `_REFUSALS`. This errs on the side of an answer: a refusal in other words is one.
- `invalid_json`: JSON was asked for, by `json_object` or `json_schema`, and the text is none or
  breaks the schema. Of JSON Schema it knows type, enum, const, required, properties,
  additionalProperties and items; what else a schema says (`$ref`, `anyOf`, `pattern`, ranges, …)
  counts as satisfied, so no good answer is thrown away over a word that is not understood here.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from router.core import jsontext
from router.types import Json

WORDS = ("content_filter", "empty", "refusal", "invalid_json")

# A refusal is short; a long text that begins with a regret goes on to be of use.
_REFUSAL_CHARS_MAX = 400
_CANNOT = r"(?:can't|cannot|can not|won't|am not able to|'m not able to|am unable to|'m unable to)"
_REFUSALS = re.compile(
    "|".join(
        (
            # English
            rf"(?:i'm |i am )?(?:very |so |really )?sorry,? (?:but )?(?:as an ai\b.{{0,30}}, )?i"
            rf" ?{_CANNOT}",
            rf"i apologi[sz]e,? (?:but )?i ?{_CANNOT}",
            rf"as an ai(?: language)?(?: model)?,? i ?{_CANNOT}",
            rf"i ?{_CANNOT} (?:help|assist|comply|provide|fulfil|create|generate|do that)",
            # German
            r"(?:es )?tut mir (?:sehr )?leid,? (?:aber )?(?:ich kann|dabei kann ich|das kann ich)"
            r"(?: ihnen| dir)?(?: dabei| damit| das)?(?: leider)? nicht",
            r"ich kann (?:ihnen |dir )?(?:dabei |damit )?(?:leider )?nicht (?:weiter)?helfen",
            # French
            r"(?:je suis )?désolée?,? (?:mais )?je ne (?:peux|puis) pas\b",
            r"je ne (?:peux|puis) pas (?:vous |t')?(?:aider|assister)",
            # Spanish, Portuguese, Italian
            r"lo siento,? (?:pero )?no puedo\b",
            r"(?:sinto muito|desculpe|lamento),? (?:mas )?não posso\b",
            r"mi dispiace,? (?:ma )?non posso\b",
            # Chinese, Japanese
            r"很?(?:抱歉|对不起)[\uff0c,]?\s*我(?:不能|无法)",
            r"申し訳(?:ありません|ございません)が[、,].{0,120}(?:できません|できかねます)",
        )
    ),
    re.IGNORECASE,
)

# What one answer's check may cost, whatever schema and answer are.
_STEPS_MAX = 50_000
_DEPTH_MAX = 64


@dataclass(slots=True)
class Said:
    """One choice of an answer, as far as it is judged."""

    text: str = ""
    refusal: str = ""
    calls: bool = False
    finish: str | None = None


def of_answer(answer: bytes) -> list[Said]:
    """The choices of a whole answer that `core/answers.py` has checked."""
    said = []
    for choice in jsontext.read(answer)["choices"]:
        message = choice["message"]
        one = Said(finish=choice.get("finish_reason"))
        _add(one, message)
        said.append(one)
    return said


def of_stream(frames: bytes) -> list[Said]:
    """The choices of a stream, from the frames as `core/sse.frame` makes them."""
    said: dict[int, Said] = {}
    for frame in frames.split(b"\n\n"):
        payload = frame.removeprefix(b"data: ")
        if not payload.startswith(b"{"):
            continue
        for choice in jsontext.read(payload)["choices"]:
            one = said.setdefault(choice["index"], Said())
            one.finish = choice.get("finish_reason") or one.finish
            delta = choice.get("delta")
            if type(delta) is dict:
                _add(one, delta)
    return list(said.values())


def why(body: Json, said: Iterable[Said], wanted: frozenset[str]) -> str | None:
    """The first of the wanted words that is true of any choice, or None. `body` is the request."""
    for one in said:
        for word in WORDS:
            if word in wanted and _is(word, body, one):
                return word
    return None


def _is(word: str, body: Json, said: Said) -> bool:
    if word == "content_filter":
        return said.finish == "content_filter"
    if said.calls:
        return False
    if word == "empty":
        return not said.text.strip() and not said.refusal
    if word == "refusal":
        text = said.text.strip().replace("\u2019", "'")
        return bool(said.refusal) or (
            len(text) <= _REFUSAL_CHARS_MAX and _REFUSALS.match(text) is not None
        )
    return _breaks_json(body.get("response_format"), said.text)


def _breaks_json(form: Any, text: str) -> bool:
    kind = form.get("type") if isinstance(form, dict) else None
    if kind not in ("json_object", "json_schema"):
        return False
    try:
        value = jsontext.read(text.encode())
    except ValueError:
        return True
    if kind == "json_object":
        return not isinstance(value, dict)
    wrapped = form.get("json_schema")
    schema = wrapped.get("schema") if isinstance(wrapped, dict) else None
    return not satisfies(value, schema)


def satisfies(value: Any, schema: Any) -> bool:
    """Whether the value keeps to what is understood here of a JSON schema."""
    return _Check().holds(value, schema, 0)


class _Check:
    """One check within its steps and depth; beyond them a value counts as good."""

    def __init__(self) -> None:
        self._steps = 0

    def holds(self, value: Any, schema: Any, depth: int) -> bool:
        if schema is False:
            return False
        self._steps += 1
        if not isinstance(schema, dict) or depth > _DEPTH_MAX or self._steps > _STEPS_MAX:
            return True
        types = schema.get("type")
        if types is not None and not _has_type(value, types):
            return False
        if "const" in schema and not _same(value, schema["const"]):
            return False
        enum = schema.get("enum")
        if isinstance(enum, list):
            self._steps += len(enum)
            if not any(_same(value, one) for one in enum):
                return False
        if isinstance(value, dict):
            return self._object_holds(value, schema, depth)
        if isinstance(value, list) and "items" in schema:
            return all(self.holds(item, schema["items"], depth + 1) for item in value)
        return True

    def _object_holds(self, value: Json, schema: Json, depth: int) -> bool:
        required = schema.get("required")
        if isinstance(required, list):
            self._steps += len(required)
            if any(isinstance(name, str) and name not in value for name in required):
                return False
        properties = schema.get("properties")
        known = properties if isinstance(properties, dict) else {}
        # A pattern may allow what is not named.
        others = True if "patternProperties" in schema else schema.get("additionalProperties", True)
        return all(
            self.holds(inner, known.get(name, others), depth + 1) for name, inner in value.items()
        )


def _has_type(value: Any, types: Any) -> bool:
    wanted = types if isinstance(types, list) else [types]
    return any(_is_of(value, one) for one in wanted)


def _is_of(value: Any, kind: Any) -> bool:
    match kind:
        case "object":
            return isinstance(value, dict)
        case "array":
            return isinstance(value, list)
        case "string":
            return isinstance(value, str)
        case "boolean":
            return isinstance(value, bool)
        case "null":
            return value is None
        case "integer":
            is_whole = isinstance(value, float) and value.is_integer()
            return (isinstance(value, int) and not isinstance(value, bool)) or is_whole
        case "number":
            return isinstance(value, int | float) and not isinstance(value, bool)
    return True


def _same(value: Any, other: Any) -> bool:
    """Equal as JSON: Python holds True to be 1."""
    return isinstance(value, bool) == isinstance(other, bool) and bool(value == other)


def _add(said: Said, message: Json) -> None:
    text, refusal = message.get("content"), message.get("refusal")
    if type(text) is str:
        said.text += text
    elif type(text) is list:
        said.text += "".join(str(part.get("text") or "") for part in text if type(part) is dict)
    if type(refusal) is str:
        said.refusal += refusal
    said.calls |= bool(message.get("tool_calls") or message.get("function_call"))
