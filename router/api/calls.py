"""From a request's JSON to a call: which ladder, what it needs, within the key's limits."""

from __future__ import annotations

from typing import Any

from router.api.service import DecodeTokens, Service
from router.core import chat_request, embed_request
from router.core.embed_request import EmbedRequest
from router.errors import BadRequest
from router.types import Call, ChatCall, EmbedCall, Key, Task

_TOKENS_HINT = (
    "input holds token ids, which only mean something to the tokenizer that made them. "
    "Send text instead: with LangChain's OpenAIEmbeddings set check_embedding_ctx_length=False. "
    "Or install rungway[tokens] to have OpenAI's cl100k_base ids turned back into text, or set "
    'token_ids = "model" on the ladder if they are its model\'s own ids.'
)


def chat_call(service: Service, call_id: str, key: Key, body: Any) -> ChatCall:
    """Raises CallerError."""
    body = chat_request.read(body)
    ladder, policy = service.names.choose(body.get("model"), key, Task.CHAT)
    needs = chat_request.needs_of(body)
    if needs.images:
        chat_request.check_images(body, service.limits.images)
    clamped_to = None
    if key.limits.max_output_tokens is not None:
        body, clamped_to = chat_request.clamp(body, key.limits.max_output_tokens)
    options = body.get("stream_options")
    wants_usage = bool(options) and options.get("include_usage") is True
    stream = body.get("stream") is True
    # By position, in the order of its fields: names cost as much again as the object.
    return ChatCall(call_id, key, ladder, policy, body, stream, wants_usage, needs, clamped_to)


def embed_call(
    service: Service, call_id: str, key: Key, model: Any, wanted: EmbedRequest
) -> EmbedCall:
    """Raises CallerError."""
    ladder, policy = service.names.choose(model, key, Task.EMBEDDINGS)
    inputs = wanted.inputs
    if isinstance(inputs[0], list) and ladder.token_ids != "model":
        inputs = _decoded(service.decode_tokens, inputs)
    needs = embed_request.needs_of(inputs)
    return EmbedCall(call_id, key, ladder, policy, inputs, needs, wanted.dimensions, wanted.extra)


def any_call(service: Service, call_id: str, key: Key, body: Any) -> Call:
    """The call that a request asks for, whichever route it is meant for. Raises CallerError."""
    if not isinstance(body, dict):
        raise BadRequest("the request body must be a JSON object", code="invalid_type")
    model = body.get("model")
    if not body.keys() & {"messages", "input", "inputs"}:
        named = service.names.find(model, key) if isinstance(model, str) else None
        if named is None:
            raise BadRequest(
                "the request has neither messages, as chat has, nor input, as embeddings have",
                code="missing_required_parameter",
            )
        is_chat = named.task is Task.CHAT
    else:
        is_chat = "messages" in body
    if is_chat:
        return chat_call(service, call_id, key, body)
    read = embed_request.read_inputs if "inputs" in body else embed_request.read
    return embed_call(service, call_id, key, model, read(body))


def _decoded(decode: DecodeTokens | None, inputs: list[Any]) -> list[str]:
    if decode is None:
        raise BadRequest(_TOKENS_HINT, code="invalid_value", param="input")
    try:
        texts = [decode(ids) for ids in inputs]
    except ValueError as error:
        raise BadRequest(
            "input holds ids that cl100k_base does not have", code="invalid_value", param="input"
        ) from error
    if not all(texts):
        raise BadRequest("input must not hold an empty text", code="invalid_value", param="input")
    return texts
