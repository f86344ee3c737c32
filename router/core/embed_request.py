"""A client's embeddings request in every form: OpenAI's four inputs, and Hugging Face's `inputs`.

The order of the checks decides what a list means: `[1, 2, 3]` is one input of token ids,
`[[1, 2], [3]]` are two, a list of strings is a list of texts.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from router.errors import BadRequest
from router.types import Json, Needs

INPUTS_MAX = 2048
_CHARS_PER_TOKEN_MAX = 6
_OWN_FIELDS = frozenset({"model", "input", "inputs", "encoding_format", "dimensions"})


class EmbedRequest(NamedTuple):
    """`base64`: how the client wants its vectors. `extra`: fields to relay untouched."""

    inputs: list[str] | list[list[int]]
    base64: bool
    dimensions: int | None
    extra: Json


def read(body: Any) -> EmbedRequest:
    """OpenAI's request. Raises BadRequest."""
    if not isinstance(body, dict):
        raise BadRequest("the request body must be a JSON object", code="invalid_type")
    if body.get("input") is None:
        raise BadRequest(
            "the required field input is missing", code="missing_required_parameter", param="input"
        )
    encoding = body.get("encoding_format")
    if encoding not in (None, "float", "base64"):
        raise BadRequest(
            'encoding_format must be "float" or "base64"',
            code="invalid_value",
            param="encoding_format",
        )
    return EmbedRequest(
        _inputs(body["input"], "input"), encoding == "base64", _dimensions(body), _extra(body)
    )


def read_inputs(body: Json) -> EmbedRequest:
    """Hugging Face's `{"inputs": text or texts}`; its answers are always plain numbers."""
    return EmbedRequest(_inputs(body["inputs"], "inputs"), False, _dimensions(body), _extra(body))


def needs_of(inputs: list[str] | list[list[int]]) -> Needs:
    """The longest input is what a rung's context must hold."""
    longest = max(
        [len(one) if isinstance(one, list) else len(one) // _CHARS_PER_TOKEN_MAX for one in inputs]
    )
    return Needs(prompt_tokens_min=longest)


def _inputs(value: Any, name: str) -> list[str] | list[list[int]]:
    if isinstance(value, str):
        value = [value]
    if not isinstance(value, list) or not value:
        raise _wrong(name)
    if type(value[0]) is int:
        value = [value]
    if len(value) > INPUTS_MAX:
        raise BadRequest(
            f"{name} has {len(value)} entries, at most {INPUTS_MAX} are allowed",
            code="array_above_max_length",
            param=name,
        )
    if isinstance(value[0], str):
        return [_text(one, name) for one in value]
    return [_tokens(one, name) for one in value]


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise _wrong(name)
    if not value:
        raise BadRequest(f"{name} must not hold an empty string", code="invalid_value", param=name)
    return value


def _tokens(value: Any, name: str) -> list[int]:
    if not isinstance(value, list) or not value:
        raise _wrong(name)
    if not all(type(one) is int and one >= 0 for one in value):
        raise _wrong(name)
    return value


def _dimensions(body: Json) -> int | None:
    value = body.get("dimensions")
    if value is None:
        return None
    if type(value) is not int or value < 1:
        raise BadRequest(
            "dimensions must be an integer of at least 1", code="invalid_value", param="dimensions"
        )
    return value


def _extra(body: Json) -> Json:
    return {
        name: value for name, value in body.items() if name not in _OWN_FIELDS and value is not None
    }


def _wrong(name: str) -> BadRequest:
    return BadRequest(
        f"{name} must be a string, an array of strings, an array of token ids, "
        "or an array of arrays of token ids",
        code="invalid_type",
        param=name,
    )
