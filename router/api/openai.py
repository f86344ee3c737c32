"""The OpenAI routes: chat completions, embeddings, models; and Hugging Face's `{"inputs": ...}`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from router.api.calls import chat_call, embed_call
from router.api.exchange import Exchange
from router.api.reply import Reply, json_reply
from router.api.sink import HttpSink
from router.core import embed_request, embeddings
from router.errors import BadRequest, UnknownModel
from router.types import Call, Embeddings, Json


async def chat_completions(exchange: Exchange) -> None:
    """POST /v1/chat/completions."""
    call = chat_call(exchange.service, exchange.id, exchange.key, await exchange.read_json())
    sink = _sink(exchange)
    if call.stream:
        sink.expect_stream()
    await _serve(exchange, call, sink)


async def create_embeddings(exchange: Exchange) -> None:
    """POST /v1/embeddings."""
    body = await exchange.read_json()
    wanted = embed_request.read(body)
    call = embed_call(exchange.service, exchange.id, exchange.key, body.get("model"), wanted)
    render = partial(embeddings.write_openai, model=call.ladder.name, base64=wanted.base64)
    await _serve(exchange, call, _sink(exchange, render))


async def hugging_face_inputs(exchange: Exchange) -> None:
    """POST / and /v1 with `{"inputs": ...}`, as Hugging Face's clients ask for embeddings.

    `{"inputs": {"source_sentence", "sentences"}}` is answered with the cosines of the first text
    with each other.
    """
    body = await exchange.read_json()
    inputs = body.get("inputs") if isinstance(body, dict) else None
    render = embeddings.write_nested
    if isinstance(inputs, dict):
        body = {**body, "inputs": _sentences(inputs)}
        body.pop("parameters", None)
        render = embeddings.write_similarity
    elif inputs is None or "parameters" in body:
        raise BadRequest(
            'this route takes {"inputs": text or texts} and answers with embeddings; '
            "for chat use /v1/chat/completions",
            param="inputs",
        )
    wanted = embed_request.read_inputs(body)
    call = embed_call(exchange.service, exchange.id, exchange.key, body.get("model"), wanted)
    await _serve(exchange, call, _sink(exchange, render))


async def list_models(exchange: Exchange) -> Reply:
    """GET /v1/models: the ladders that the key may use, and their aliases."""
    started_at = exchange.service.started_at
    data = [_model(name, started_at) for name in _visible_names(exchange)]
    return json_reply({"object": "list", "data": data})


async def get_model(exchange: Exchange) -> Reply:
    """GET /v1/models/{id}; the id may be percent-encoded and may hold slashes."""
    name = exchange.argument
    if exchange.service.names.find(name, exchange.key) is None:
        known = ", ".join(_visible_names(exchange)) or "none"
        raise UnknownModel(
            f"The model {name[:200]!r} does not exist; there are: {known}", param="model"
        )
    return json_reply(_model(name, exchange.service.started_at))


def _visible_names(exchange: Exchange) -> list[str]:
    ladders = exchange.service.names.visible(exchange.key)
    return [name for ladder in ladders for name in (ladder.name, *ladder.aliases)]


def _model(name: str, created: int) -> Json:
    return {"id": name, "object": "model", "created": created, "owned_by": "rungway"}


def _sentences(inputs: Json) -> list[str]:
    source, sentences = inputs.get("source_sentence"), inputs.get("sentences")
    if not isinstance(source, str) or not isinstance(sentences, list) or not sentences:
        raise BadRequest(
            "inputs must have a source_sentence (text) and sentences (texts)", param="inputs"
        )
    return [source, *sentences]


def _sink(exchange: Exchange, render: Callable[[Embeddings], bytes] | None = None) -> HttpSink:
    return HttpSink(
        exchange.request,
        exchange.lines,
        keepalive_s=exchange.service.limits.keepalive_s,
        tasks=exchange.shared.tasks,
        render=render,
    )


async def _serve(exchange: Exchange, call: Call, sink: HttpSink) -> None:
    try:
        await exchange.service.pipeline.serve(
            call, exchange.body_bytes, sink, exchange.record, exchange.wishes()
        )
    finally:
        sink.close()
