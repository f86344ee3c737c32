"""The OpenAI wire, as the backends that speak it share it: requests out, streams and answers in.

Request bodies are the client's with the model put first (Hugging Face's router reads it from a
small prefix) and, for a stream, a usage chunk asked for: settlement needs the counts.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from router.backends.base import ChatAttempt, EmbedAttempt, Event, EventKind, EventStream, Take
from router.core import answers, embeddings, jsontext
from router.core.refusal import refusal
from router.core.sse import DONE, SseOverflow, SseParser
from router.errors import CallerMistake, UpstreamBroken
from router.transport.http import HttpClient, HttpResponse
from router.types import Embeddings, Json

_ERROR_BODY_BYTES_MAX = 64 << 10
_JSON_TYPES = frozenset({"application/json", "text/plain", ""})
_DONE = Event(EventKind.DONE, b"")
JSON_HEADERS = {"Content-Type": "application/json", "Accept": "application/json"}
STREAM_HEADERS = {"Content-Type": "application/json", "Accept": "text/event-stream"}


def chat_body(body: Json, *, model: str, stream: bool) -> Json:
    """The upstream's chat request: the client's fields, ours in place of model and streaming."""
    out: Json = {"model": model}
    for name, value in body.items():
        if name not in ("model", "stream", "stream_options"):
            out[name] = value
    out["stream"] = stream
    if stream:
        options = body.get("stream_options")
        out["stream_options"] = {**(options or {}), "include_usage": True}
    return out


def embed_body(attempt: EmbedAttempt, *, encoding_format: str | None = "base64") -> Json:
    """The upstream's embeddings request. base64 is a third of the bytes and of the parsing."""
    call = attempt.call
    out: Json = {"model": attempt.rung.model, "input": call.inputs, **call.extra}
    if encoding_format is not None:
        out["encoding_format"] = encoding_format
    if call.dimensions is not None:
        out["dimensions"] = call.dimensions
    return out


def encode(body: Any) -> bytes:
    """JSON for the wire. Raises CallerMistake where the client nested deeper than can be sent."""
    try:
        return jsontext.write(body)
    except ValueError as error:
        raise CallerMistake(f"the request body cannot be relayed: {error}") from error


async def open_stream(
    client: HttpClient, url: str, headers: Mapping[str, str], body: Json, attempt: ChatAttempt
) -> EventStream:
    """Post a streamed chat request; returns when its headers are good. Raises UpstreamError."""
    who = attempt.rung.name
    response = await client.send(
        "POST",
        url,
        headers={**STREAM_HEADERS, **headers},
        body=encode(body),
        connect_s=attempt.connect_s,
    )
    try:
        if not 200 <= response.status < 300:
            await require_ok(response, who)
        if response.content_type not in ("text/event-stream", ""):
            await _refuse_other_content(response, who, attempt)
    except BaseException:
        response.close()
        raise
    response.forget_headers()
    return OpenAiStream(response, who, attempt.answer_bytes_max)


async def embed(
    client: HttpClient, url: str, headers: Mapping[str, str], body: Json, attempt: EmbedAttempt
) -> Embeddings:
    """Post an OpenAI embeddings request. Raises UpstreamError."""
    raw = await post_json(client, url, headers, body, attempt)
    return embeddings.read_openai(raw, len(attempt.call.inputs), who=attempt.rung.name)


async def post_json(
    client: HttpClient,
    url: str,
    headers: Mapping[str, str],
    body: Any,
    attempt: ChatAttempt | EmbedAttempt,
) -> bytes:
    """Post JSON and return the body of a 2xx JSON answer. Raises UpstreamError for any other."""
    who = attempt.rung.name
    response = await client.send(
        "POST",
        url,
        headers={**JSON_HEADERS, **headers},
        body=encode(body),
        connect_s=attempt.connect_s,
    )
    try:
        if not 200 <= response.status < 300:
            await require_ok(response, who)
        kind = response.content_type
        # Some local servers label their JSON text/plain; a page of HTML is never an answer.
        if kind not in _JSON_TYPES and not kind.endswith("+json"):
            raise UpstreamBroken(f"{who} answered with {kind} where JSON was asked for")
        whole = response.whole(attempt.answer_bytes_max)
        return await response.read_all(attempt.answer_bytes_max) if whole is None else whole
    finally:
        response.close()


async def require_ok(response: HttpResponse, who: str) -> None:
    """Raises the refusal's UpstreamError unless the status is 2xx."""
    if not 200 <= response.status < 300:
        body = await _some(response, _ERROR_BODY_BYTES_MAX)
        raise refusal(who, response.status, response.headers, body)


async def _refuse_other_content(response: HttpResponse, who: str, attempt: ChatAttempt) -> None:
    """A stream was asked for and something else came: an error in a 200, or no stream at all."""
    kind = response.content_type
    if kind == "application/json" or kind.endswith("+json"):
        answers.check(
            await _some(response, _ERROR_BODY_BYTES_MAX), who=who, call_id=attempt.call.id
        )
    raise UpstreamBroken(f"{who} answered with {kind} where an event stream was asked for")


async def _some(response: HttpResponse, bytes_max: int) -> bytes:
    """The body's beginning; what is longer than an error needs to be is left unread."""
    parts: list[bytes] = []
    size = 0
    while size < bytes_max and (chunk := await response.read_chunk()):
        parts.append(chunk)
        size += len(chunk)
    return b"".join(parts)[:bytes_max]


class OpenAiStream:
    """An open stream of OpenAI chunks; their content is the relay's to judge."""

    __slots__ = ("_ended", "_is_done", "_parser", "_response", "_who")

    def __init__(self, response: HttpResponse, who: str, event_bytes_max: int) -> None:
        self._response = response
        self._who = who
        self._parser = SseParser(event_bytes_max)
        self._ended = False
        self._is_done = False

    async def read(self, take: Take | None = None) -> list[Event]:
        response, parser = self._response, self._parser
        while not self._ended:
            while (data := response.read_now()) is None:
                await response.more(take if parser.is_between_events else None)
            try:
                found = parser.feed(data) if data else parser.finish()
            except SseOverflow as error:
                self.close()
                raise UpstreamBroken(f"{self._who}: {error}") from error
            self._ended = not data
            if found:
                events = [
                    _DONE if one.data.startswith(DONE) else Event(EventKind.CHUNK, one.data)
                    for one in found
                ]
                self._is_done = events[-1].kind is EventKind.DONE
                return events
        return []

    def close(self) -> None:
        self._ended = True
        if self._is_done:
            self._response.close_when_ended()
        else:
            self._response.close()
