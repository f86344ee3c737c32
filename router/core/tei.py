"""TEI's terms: how a request is cut to what one server takes, and what `/info` says of it.

One upstream request holds at most `max_client_batch_size` inputs, and a body of at most 2 MB
(`--payload-limit`, which `/info` does not tell). Each input takes one of `max_concurrent_requests`
permits, and one input without a permit fails its whole request. Follows TEI 1.9
(`router/src/http/server.rs`, `router/src/main.rs`).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import orjson

from router.types import Abilities, Json

# Under the server's default of 2,000,000 by more than the fields around the inputs take.
BODY_BYTES_MAX = 1_900_000
_BATCH_MAX = 32
_PERMITS = 512
# Whatever a server says: below this nothing could be asked of it.
_LIMIT_MIN = 1
_BATCH_LIMIT = re.compile(r"batch size \d+ > maximum allowed batch size (\d+)")

# What `/v1/embeddings` ignores and the native route obeys. Their defaults need no other route.
_NATIVE = {"normalize": True, "truncate": None, "truncation_direction": None, "prompt_name": None}


@dataclass(frozen=True, slots=True)
class Limits:
    """What one server takes; the defaults are TEI's own."""

    batch_max: int = _BATCH_MAX
    permits: int = _PERMITS

    @property
    def slice_max(self) -> int:
        """Inputs of one request: never more than there are permits."""
        return min(self.batch_max, self.permits)


@dataclass(frozen=True, slots=True)
class Info:
    """`/info`. `task` is "embedding", "classifier" or "reranker"."""

    task: str
    models: tuple[str, ...]
    limits: Limits
    abilities: Abilities
    revision: str = ""

    @property
    def complaint(self) -> str | None:
        """Why it serves no embeddings, or None if it does."""
        if self.task == "embedding":
            return None
        return f"TEI serves {self.models[0]} there, a {self.task}: it makes no embeddings"


def info_in(value: Any) -> Info | None:
    """What `/info` says; None if it is no TEI's, which `model_type` tells it by."""
    if not isinstance(value, dict) or not isinstance(value.get("model_id"), str):
        return None
    task = _task_in(value.get("model_type"))
    if not task:
        return None
    served = value.get("served_model_name")
    names = [value["model_id"], served] if isinstance(served, str) else [value["model_id"]]
    limits = Limits(
        _count(value.get("max_client_batch_size"), _BATCH_MAX),
        _count(value.get("max_concurrent_requests"), _PERMITS),
    )
    context = _count(value.get("max_input_length"), 0) or None
    sha = value.get("model_sha")
    revision = sha if isinstance(sha, str) else ""
    return Info(task.lower(), tuple(names), limits, Abilities(context=context), revision)


def batch_limit_in(message: str) -> int | None:
    """The batch limit that a refusal names, or None."""
    found = _BATCH_LIMIT.search(message)
    return max(_LIMIT_MIN, int(found[1])) if found else None


def slices(inputs: Sequence[str | list[int]], count_max: int, bytes_max: int) -> list[slice]:
    """Consecutive slices that cover the inputs, each within both limits.

    An input that is too large by itself goes alone: its refusal is the server's to word.
    """
    found: list[slice] = []
    start = size = 0
    for position, item in enumerate(inputs):
        item_bytes = len(orjson.dumps(item)) + 1
        if position > start and (position - start == count_max or size + item_bytes > bytes_max):
            found.append(slice(start, position))
            start, size = position, 0
        size += item_bytes
    if start < len(inputs):
        found.append(slice(start, len(inputs)))
    return found


def native_body(inputs: Sequence[Any], extra: Json, dimensions: int | None) -> Json | None:
    """The body for `/embed`, where the request says what `/v1/embeddings` would ignore.

    None: it says nothing of the kind.
    """
    told = {name: extra[name] for name in _NATIVE if extra.get(name) is not None}
    if all(told[name] == _NATIVE[name] for name in told):
        return None
    body: Json = {"inputs": inputs, **told}
    if dimensions is not None:
        body["dimensions"] = dimensions
    return body


def _task_in(kind: Any) -> str:
    """A type without fields is a bare word, one with fields an object of one key."""
    if isinstance(kind, dict) and len(kind) == 1:
        return str(next(iter(kind)))
    return kind if isinstance(kind, str) else ""


def _count(value: Any, default: int) -> int:
    return value if type(value) is int and value >= _LIMIT_MIN else default
