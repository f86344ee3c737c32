"""kind = "openai": vLLM, SGLang, llama.cpp, Ollama, LM Studio, transformers serve, other gateways.

Requests pass as they are. `reasoning` and `reasoning_content` are both given, on the way in here
and on the way out in `core/chunks.py`: vLLM renamed the one to the other, and clients read either.
"""

from __future__ import annotations

from collections.abc import Coroutine
from typing import Any

import orjson

from router.backends import openai_wire
from router.backends.base import (
    EMBED_LIMITS,
    ChatAttempt,
    EmbedAttempt,
    EventStream,
    Probe,
    State,
)
from router.config.secrets import Credential
from router.core import answers
from router.core.chunks import twin_reasoning
from router.core.embeddings import estimate_tokens
from router.errors import UpstreamError
from router.transport.http import HttpClient
from router.types import Abilities, Answer, Call, ChatCall, Embeddings, Json, Rung, Usage


class OpenAiBackend:
    """One OpenAI-speaking server. `url` is its base, with or without `/v1`."""

    kind = "openai"
    takes_key_tokens = False
    may_repeat = True
    can_continue = True
    embed_limits = EMBED_LIMITS

    def __init__(self, name: str, url: str, client: HttpClient, *, credential: Credential) -> None:
        self.name = name
        self._base = url.rstrip("/").removesuffix("/v1")
        self._chat_url = f"{self._base}/v1/chat/completions"
        self._client = client
        self.credential = credential

    def unable(self, call: Call, rung: Rung) -> str | None:
        if isinstance(call, ChatCall):
            form = call.body.get("response_format")
            if isinstance(form, dict) and form.get("type") == "regex":
                return "response_format regex is TGI's own"
        return None

    def stream_chat(self, attempt: ChatAttempt) -> Coroutine[Any, Any, EventStream]:
        return openai_wire.open_stream(
            self._client,
            self._chat_url,
            self.credential.headers(),
            self._body(attempt, stream=True),
            attempt,
        )

    async def complete_chat(self, attempt: ChatAttempt) -> Answer:
        raw = await openai_wire.post_json(
            self._client,
            self._chat_url,
            self.credential.headers(),
            self._body(attempt, stream=False),
            attempt,
        )
        return answers.check(raw, who=attempt.rung.name, call_id=attempt.call.id)

    async def embed(self, attempt: EmbedAttempt) -> Embeddings:
        answer = await openai_wire.embed(
            self._client,
            f"{self._base}/v1/embeddings",
            self.credential.headers(),
            openai_wire.embed_body(attempt),
            attempt,
        )
        if answer.usage.estimated:
            counted = Usage(estimate_tokens(attempt.call.inputs), estimated=True)
            return Embeddings(answer.vectors, counted)
        return answer

    async def probe(self) -> Probe:
        """`/v1/models` only: SGLang's `/health` runs a generation, others have none."""
        try:
            status, _, body = await self._client.fetch(
                "GET", f"{self._base}/v1/models", headers=self.credential.headers()
            )
        except UpstreamError as error:
            return Probe(State.DOWN, error.message)
        if status in (401, 403):
            return Probe(State.DOWN, f"/v1/models answered {status}: is the token right?")
        if status == 503:
            return Probe(State.STARTING, "the server is loading its model")
        if status >= 500:
            return Probe(State.DOWN, f"/v1/models answered {status}")
        return Probe(State.UP, models=_models(body))

    async def aclose(self) -> None:
        """The client belongs to the composition root."""

    @staticmethod
    def _body(attempt: ChatAttempt, *, stream: bool) -> Json:
        body = openai_wire.chat_body(attempt.call.body, model=attempt.rung.model, stream=stream)
        body["messages"] = [_both_names(message) for message in body["messages"]]
        return body


def _both_names(message: Any) -> Any:
    if "reasoning" in message or "reasoning_content" in message:
        message = dict(message)
        twin_reasoning(message)
    return message


def _models(body: bytes) -> dict[str, Abilities]:
    """What `/v1/models` says: vLLM and SGLang `max_model_len`, llama.cpp `meta.n_ctx`."""
    try:
        data = orjson.loads(body)["data"]
        return {entry["id"]: Abilities(context=_context(entry)) for entry in data}
    except (orjson.JSONDecodeError, KeyError, TypeError):
        return {}


def _context(entry: Json) -> int | None:
    meta = entry.get("meta")
    told = entry.get("max_model_len")
    if told is None and isinstance(meta, dict):
        told = meta.get("n_ctx")
    return told if type(told) is int and told > 0 else None
