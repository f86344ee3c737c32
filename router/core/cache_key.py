"""What makes two calls the same: the cache_key of a chat call and of each embeddings input.

Two calls share a cache_key only if nothing that could change the answer differs: the request less
the few fields that OpenAI defines as having no part in the answer, the ladder with what its rungs
are, and whose answer it is. Fields that Rungway does not know stay in, and so do differences that
may mean nothing (`1` and `1.0`, null and left out): to merge them would be a gain, to be wrong an
answer to another question. Only the order of the top-level fields is not told apart; deeper down
it is, since templates write tools and schemas into the prompt as they come.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import orjson

from router.core import jsontext
from router.types import Json, Key, Ladder, Policy

# What OpenAI's reference says is for its caller's books, for abuse checks or for the reuse of
# prompts. `model` is here because the ladder stands in its place.
_WITHOUT_PART = frozenset(
    {"model", "stream", "stream_options", "user", "metadata", "store", "safety_identifier"}
    | {"prompt_cache_key", "prompt_cache_options", "prompt_cache_retention"}
)
# These shape the stream only, and so does vLLM's third.
_STREAM_OPTIONS = frozenset({"include_usage", "include_obfuscation", "continuous_usage_stats"})
_CONTROL_CHARS_MAX = 1024
# A longer time than anything is kept.
_MAX_AGE_DIGITS_MAX = 9


class CacheControl(NamedTuple):
    """A request's wishes. `max_age_s`: nothing older than this, None is any age."""

    no_store: bool = False
    no_cache: bool = False
    max_age_s: float | None = None


def read_control(header: str | None) -> CacheControl:
    """A `Cache-Control` header; what cannot be understood in it is passed over."""
    no_store = no_cache = False
    max_age_s: float | None = None
    for directive in (header or "")[:_CONTROL_CHARS_MAX].lower().split(","):
        name, _, value = directive.partition("=")
        name = name.strip()
        if name == "no-store":
            no_store = True
        elif name == "no-cache":
            no_cache = True
        elif name == "max-age":
            digits = value.strip().strip('"')
            if digits.isascii() and digits.isdigit():
                told = float(digits[:_MAX_AGE_DIGITS_MAX])
                max_age_s = told if max_age_s is None else min(max_age_s, told)
    return CacheControl(no_store, no_cache, max_age_s)


def may_cache(body: Json, mode: str) -> bool:
    """Whether a chat answer may be kept: `mode` is "off", "always" or "deterministic".

    Deterministic is what says that it wants no chance, and asks for nothing that changes by itself.
    """
    if mode != "deterministic":
        return mode == "always"
    temperature, n = body.get("temperature"), body.get("n")
    fixed = type(temperature) in (int, float) and temperature == 0
    if not fixed and type(body.get("seed")) is not int:
        return False
    return (n is None or n == 1) and body.get("web_search_options") is None


def scope_of(key: Key, *, shared: bool) -> bytes:
    """Whose answers these are, as bytes for the other functions here. A session is for a person
    whom the key's other sessions do not know, so it has its own.

    Shared among keys, what a key brings of its own still separates: its tier, since that opens
    rungs, and its own token and account, since a gated model answers to them alone.
    """
    own = [key.tier, key.bill_to, None if key.token is None else _digest(key.token)]
    return _written([None if shared else [key.name, key.session], *own])


def ladder_of(ladder: Ladder, policy: Policy, backends: Mapping[str, str]) -> bytes:
    """Which models may have answered, as bytes. `backends` says of each name what it stands for:
    a backend that is configured to be another server is another one.
    """
    rungs = [
        [rung.backend, backends.get(rung.backend), rung.model, sorted(rung.tiers)]
        for rung in ladder.rungs
    ]
    space = [ladder.vector_space, ladder.token_ids]
    return _written([ladder.name, policy, rungs, sorted(ladder.escalate_on), *space])


def of_chat(body: Json, *, ladder: bytes, scope: bytes) -> bytes | None:
    """The cache_key of a chat request; None where the request has no JSON text at all.

    `body` is as it goes upstream: a key's limit of output has changed it already.
    """
    said = [[name, body[name]] for name in sorted(body) if name not in _WITHOUT_PART]
    options = body.get("stream_options")
    if isinstance(options, dict):
        unknown = {name: options[name] for name in options if name not in _STREAM_OPTIONS}
        if unknown:
            said.append(["stream_options", unknown])
    try:
        text = jsontext.write(said)
    except ValueError:
        return None
    return hashlib.sha256(b"\n".join((b"chat 1", scope, ladder, text))).digest()


def of_inputs(
    inputs: Sequence[str] | Sequence[list[int]],
    *,
    space: bytes,
    scope: bytes,
    dimensions: int | None,
    extra: Json,
) -> list[bytes] | None:
    """The cache_key of each embeddings input, in order; None where `extra` has no JSON text.

    `space` says which vectors these are: the ladder (`ladder_of`), and the revision where known.
    """
    is_tokens = bool(inputs) and isinstance(inputs[0], list)
    try:
        said = jsontext.write(
            [dimensions, is_tokens, [[name, extra[name]] for name in sorted(extra)]]
        )
        texts = map(_token_bytes if is_tokens else _text_bytes, inputs)  # type: ignore[arg-type]
        # What all inputs share is hashed once.
        prefix = hashlib.sha256(b"\n".join((b"input 1", scope, space, said, b"")))
        found = []
        for text in texts:
            state = prefix.copy()
            state.update(text)
            found.append(state.digest())
    except ValueError:
        return None
    return found


def _text_bytes(text: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-8", "surrogatepass")


def _token_bytes(ids: list[int]) -> bytes:
    return jsontext.write(ids)


def _digest(secret: str) -> str:
    return hashlib.sha256(secret.encode("utf-8", "surrogatepass")).hexdigest()


def _written(value: list[Any]) -> bytes:
    """Text of our own configuration: one line, and no two values have the same."""
    return orjson.dumps(value)
