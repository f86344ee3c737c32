"""Embeddings answers: read from the shapes that backends send, written in OpenAI's.

Positions matter more than anything else here: a vector at the wrong index is a wrong answer that
nobody notices. OpenAI-shaped data is put in order by its `index`, and each index must be there
exactly once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import orjson

from router.core import jsontext, vectors
from router.core.chunks import usage_in
from router.core.refusal import classify_in_stream, complaint_in
from router.errors import UpstreamBroken
from router.types import Embeddings, Json, Usage


def read_openai(body: bytes, count: int, *, who: str) -> Embeddings:
    """An OpenAI embeddings answer with exactly `count` vectors. Raises UpstreamError."""
    value = _load(body, who)
    data = value.get("data") if isinstance(value, dict) else None
    if not isinstance(data, list):
        complaint = complaint_in(value)
        if complaint is not None:
            raise classify_in_stream(who, complaint)
        raise UpstreamBroken(f"{who} answered with JSON that is not an embeddings list")
    found: list[bytes | None] = [None] * count
    for position, item in enumerate(data):
        index = item.get("index", position) if isinstance(item, dict) else None
        if type(index) is not int or not 0 <= index < count or found[index] is not None:
            raise UpstreamBroken(f"{who} answered with a wrong or repeated index at {position}")
        found[index] = _vector(item.get("embedding"), who, index)
    return _checked(found, usage_in(value.get("usage")), who)


def read_nested(body: bytes, count: int, *, who: str, usage: Usage | None = None) -> Embeddings:
    """A bare `[[float]]`, as TEI's and hf-inference's native routes answer. Raises UpstreamError.

    One text may come as a flat list of numbers, and one level more of nesting around each vector is
    taken off; vectors for each token of a text are refused, since pooling is not ours to guess.
    """
    value = _load(body, who)
    if not isinstance(value, list):
        complaint = complaint_in(value)
        if complaint is not None:
            raise classify_in_stream(who, complaint)
        raise UpstreamBroken(f"{who} answered with JSON that is not a list of vectors")
    if count == 1 and value and not isinstance(value[0], list | str):
        value = [value]
    if len(value) != count:
        raise UpstreamBroken(f"{who} answered with {len(value)} vectors for {count} inputs")
    found: list[bytes | None] = []
    for index, item in enumerate(value):
        nested = item
        while isinstance(nested, list) and len(nested) == 1 and isinstance(nested[0], list):
            nested = nested[0]
        found.append(_vector(nested, who, index))
    return _checked(found, usage, who)


def join(parts: Sequence[Embeddings]) -> Embeddings:
    """The answers of consecutive slices of one request, as one."""
    return Embeddings(
        [vector for part in parts for vector in part.vectors],
        Usage(
            sum(part.usage.input_tokens for part in parts),
            0,
            any(part.usage.estimated for part in parts),
        ),
    )


def fit(answer: Embeddings, dimensions: int | None, *, who: str) -> Embeddings:
    """The vectors at the length that was asked for. Raises UpstreamBroken where they are shorter.

    A backend that knows no `dimensions` sends its own length: the first values at unit length are
    what OpenAI's `dimensions` means.
    """
    if dimensions is None or all(len(raw) == dimensions * 4 for raw in answer.vectors):
        return answer
    try:
        return Embeddings(
            [vectors.shorten(raw, dimensions) for raw in answer.vectors], answer.usage
        )
    except ValueError as error:
        raise UpstreamBroken(f"{who}: {error}, as was asked for") from error


def write_openai(answer: Embeddings, *, model: str, base64: bool) -> bytes:
    """The OpenAI answer to send to the client."""
    encode: Any = vectors.to_base64 if base64 else vectors.unpack
    data = [
        {"object": "embedding", "index": index, "embedding": encode(raw)}
        for index, raw in enumerate(answer.vectors)
    ]
    tokens = answer.usage.input_tokens
    usage = {"prompt_tokens": tokens, "total_tokens": tokens}
    value: Json = {"object": "list", "data": data, "model": model, "usage": usage}
    return orjson.dumps(value)


def write_nested(answer: Embeddings) -> bytes:
    """The bare list of vectors that Hugging Face's clients expect of `{"inputs": ...}`."""
    return orjson.dumps([vectors.unpack(raw) for raw in answer.vectors])


def write_similarity(answer: Embeddings) -> bytes:
    """The cosines of the first vector with each other, as `sentence_similarity` expects them."""
    first, *others = [vectors.unpack(raw) for raw in answer.vectors]
    return orjson.dumps([vectors.cosine(first, other) for other in others])


def estimate_tokens(inputs: Sequence[str | list[int]]) -> int:
    """Tokens of inputs whose backend reports none: ids are counted, text at 4 bytes a token."""
    tokens = 0
    for item in inputs:
        if isinstance(item, str):
            size = len(item) if item.isascii() else len(item.encode("utf-8", "replace"))
            tokens += size // 4 or 1
        else:
            tokens += len(item)
    return tokens


def _load(body: bytes, who: str) -> Any:
    try:
        return jsontext.read(body)
    except ValueError as error:
        raise UpstreamBroken(f"{who} answered with a body that is not JSON") from error


def _vector(value: Any, who: str, index: int) -> bytes:
    try:
        return vectors.parse(value)
    except ValueError as error:
        raise UpstreamBroken(f"{who}: the vector at index {index}: {error}") from error


def _checked(found: Sequence[bytes | None], usage: Usage | None, who: str) -> Embeddings:
    complete = [raw for raw in found if raw is not None]
    if len(complete) != len(found):
        missing = [index for index, raw in enumerate(found) if raw is None]
        raise UpstreamBroken(f"{who} answered without the vectors {missing[:5]}")
    if len({len(raw) for raw in complete}) > 1:
        raise UpstreamBroken(f"{who} answered with vectors of different lengths")
    return Embeddings(complete, usage or Usage(estimated=True))
