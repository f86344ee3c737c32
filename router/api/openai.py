"""The OpenAI routes: chat completions, embeddings, models; and Hugging Face's `{"inputs": ...}`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any
from urllib.parse import unquote

from aiohttp import web

from router.api.exchange import Exchange
from router.api.reply import json_reply
from router.api.sink import HttpSink
from router.core import chat_request, embed_request, embeddings
from router.core.embed_request import EmbedRequest
from router.errors import BadRequest, UnknownModel
from router.types import Call, ChatCall, EmbedCall, Embeddings, Json, Key, Task

_LANGCHAIN_HINT = (
    "input holds token ids, which only mean something to the tokenizer that made them. "
    "Send text instead: with LangChain's OpenAIEmbeddings set check_embedding_ctx_length=False. "
    "Or install rungway[tokens] to have OpenAI's cl100k_base ids turned back into text, or set "
    'token_ids = "model" on the ladder if they are its model\'s own ids.'
)


async def chat_completions(exchange: Exchange) -> web.StreamResponse:
    """POST /v1/chat/completions."""
    key = exchange.authenticate()
    call = chat_call(exchange, key, await exchange.read_json())
    sink = _sink(exchange)
    if call.stream:
        sink.expect_stream()
    return await _serve(exchange, call, sink)


def chat_call(exchange: Exchange, key: Key, body: Any) -> ChatCall:
    """The call that a chat request's JSON asks for. Raises CallerError."""
    body = chat_request.read(body)
    ladder, policy = exchange.service.names.choose(body.get("model"), key, Task.CHAT)
    chat_request.check_images(body, exchange.service.limits.images)
    body, clamped_to = chat_request.clamp(body, key.limits.max_output_tokens)
    options = body.get("stream_options") or {}
    return ChatCall(
        id=exchange.id,
        key=key,
        ladder=ladder,
        policy=policy,
        body=body,
        stream=body.get("stream") is True,
        wants_usage=options.get("include_usage") is True,
        needs=chat_request.needs_of(body),
        clamped_to=clamped_to,
    )


async def create_embeddings(exchange: Exchange) -> web.StreamResponse:
    """POST /v1/embeddings."""
    key = exchange.authenticate()
    body = await exchange.read_json()
    wanted = embed_request.read(body)
    call = embed_call(exchange, key, body.get("model"), wanted)
    render = partial(embeddings.write_openai, model=call.ladder.name, base64=wanted.base64)
    return await _serve(exchange, call, _sink(exchange, render))


def embed_call(exchange: Exchange, key: Key, model: Any, wanted: EmbedRequest) -> EmbedCall:
    """The call that an embeddings request asks for. Raises CallerError."""
    ladder, policy = exchange.service.names.choose(model, key, Task.EMBEDDINGS)
    inputs = wanted.inputs
    if isinstance(inputs[0], list) and ladder.token_ids != "model":
        inputs = _decoded(exchange, inputs)
    return EmbedCall(
        id=exchange.id,
        key=key,
        ladder=ladder,
        policy=policy,
        inputs=inputs,
        needs=embed_request.needs_of(inputs),
        dimensions=wanted.dimensions,
        extra=wanted.extra,
    )


async def hugging_face_inputs(exchange: Exchange) -> web.StreamResponse:
    """POST / and /v1 with `{"inputs": ...}`, as Hugging Face's clients ask for embeddings."""
    key = exchange.authenticate()
    body = await exchange.read_json()
    inputs = body.get("inputs") if isinstance(body, dict) else None
    if isinstance(inputs, dict):
        return await _similarity(exchange, key, body, inputs)
    if inputs is None or "parameters" in body:
        raise BadRequest(
            'this route takes {"inputs": text or texts} and answers with embeddings; '
            "for chat use /v1/chat/completions",
            param="inputs",
        )
    call = embed_call(exchange, key, body.get("model"), embed_request.read_inputs(body))
    return await _serve(exchange, call, _sink(exchange, embeddings.write_nested))


async def _similarity(exchange: Exchange, key: Key, body: Json, inputs: Json) -> web.StreamResponse:
    """`{"inputs": {"source_sentence", "sentences"}}`: cosines of the first with the others."""
    source, sentences = inputs.get("source_sentence"), inputs.get("sentences")
    if not isinstance(source, str) or not isinstance(sentences, list):
        raise BadRequest(
            "inputs must have a source_sentence (text) and sentences (texts)", param="inputs"
        )
    wanted = embed_request.read_inputs({"inputs": [source, *sentences]})
    call = embed_call(exchange, key, body.get("model"), wanted)
    return await _serve(exchange, call, _sink(exchange, embeddings.write_similarity))


async def list_models(exchange: Exchange) -> web.StreamResponse:
    """GET /v1/models: the ladders that the key may use, and their aliases."""
    key = exchange.authenticate()
    service = exchange.service
    names = [
        name for ladder in service.names.visible(key) for name in (ladder.name, *ladder.aliases)
    ]
    data = [_model(name, service.started_at) for name in names]
    return json_reply({"object": "list", "data": data}, headers=exchange.headers())


async def get_model(exchange: Exchange, raw_id: str) -> web.StreamResponse:
    """GET /v1/models/{id}; the id may be percent-encoded and may hold slashes."""
    key = exchange.authenticate()
    name = unquote(raw_id)
    if exchange.service.names.find(name, key) is None:
        raise UnknownModel(f"The model {name[:200]!r} does not exist", param="model")
    return json_reply(_model(name, exchange.service.started_at), headers=exchange.headers())


def _model(name: str, created: int) -> Json:
    return {"id": name, "object": "model", "created": created, "owned_by": "rungway"}


def _sink(exchange: Exchange, render: Callable[[Embeddings], bytes] | None = None) -> HttpSink:
    return HttpSink(
        exchange.request,
        exchange.headers,
        keepalive_s=exchange.service.limits.keepalive_s,
        tasks=exchange.shared.tasks,
        render=render,
    )


async def _serve(exchange: Exchange, call: Call, sink: HttpSink) -> web.StreamResponse:
    try:
        await exchange.service.pipeline.serve(call, exchange.body_bytes, sink, exchange.record)
    finally:
        sink.close()
    assert sink.response is not None
    return sink.response


def _decoded(exchange: Exchange, inputs: list[Any]) -> list[str]:
    decode = exchange.service.decode_tokens
    if decode is None:
        raise BadRequest(_LANGCHAIN_HINT, code="invalid_value", param="input")
    try:
        texts = [decode(ids) for ids in inputs]
    except (ValueError, OverflowError) as error:
        raise BadRequest(
            "input holds ids that cl100k_base does not have", code="invalid_value", param="input"
        ) from error
    if not all(texts):
        raise BadRequest("input must not hold an empty text", code="invalid_value", param="input")
    return texts
