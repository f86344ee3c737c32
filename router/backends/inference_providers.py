"""kind = "inference-providers": many providers behind Hugging Face's router and its billing.

Chat goes to the router's one OpenAI route with the model's suffix left on; embeddings, which that
route does not have, to the routes of the providers themselves with the provider's own model id.
The documented request is narrower than OpenAI's: `max_completion_tokens` and a bare `stop` are
translated, several choices (`n`) are not to be had.

A refusal that follows from a key's own token or account closes nothing for the other keys.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence

from router.backends import openai_wire
from router.backends.base import EMBED_LIMITS, ChatAttempt, EmbedAttempt, EventStream, Probe, State
from router.config.secrets import Credential
from router.core import answers, embeddings, providers
from router.core.providers import CatalogueAbilities, CatalogueEntry, CataloguePrices, Served
from router.errors import RungRefused, UpstreamError
from router.hub.catalogue import Catalogue
from router.transport.http import HttpClient
from router.types import (
    Abilities,
    Answer,
    Call,
    ChatCall,
    Embeddings,
    Json,
    Key,
    Price,
    Rung,
    Usage,
)

ROUTER_URL = "https://router.huggingface.co"
HUB_URL = "https://huggingface.co"
# The mapping changes seldom; a rung whose model nobody serves need not be tried at every call.
_UNSERVED_COOL_S = 60.0


class InferenceProvidersBackend:
    """The router at `url` (with or without `/v1`), with the Hub at `hub_url` for look-ups."""

    kind = "inference-providers"
    takes_key_tokens = True
    may_repeat = True
    can_continue = False
    embed_limits = EMBED_LIMITS

    def __init__(
        self,
        name: str,
        *,
        url: str = ROUTER_URL,
        hub_url: str = HUB_URL,
        client: HttpClient,
        credential: Credential,
        bill_to: str | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.name = name
        self.credential = credential
        self._base = url.rstrip("/").removesuffix("/v1")
        self._client = client
        self._bill_to = bill_to
        self._catalogue = Catalogue(self._base, hub_url, client, credential=credential, clock=clock)

    def abilities_of(self, model: str) -> Abilities | None:
        """What the catalogue, as last fetched, says of a model with its suffix."""
        return CatalogueAbilities(self._catalogue.known).get(model)

    def price_of(self, model: str) -> Price | None:
        """The published price of a model with its suffix; None is unknown, not free."""
        return CataloguePrices(self._catalogue.known).get(model)

    def unable(self, call: Call, rung: Rung) -> str | None:
        if isinstance(call, ChatCall):
            return _chat_unable(call.body)
        pinned = providers.split_model(rung.model).pinned
        return None if pinned is None else providers.embeddings_unable(pinned, call)

    async def stream_chat(self, attempt: ChatAttempt) -> EventStream:
        try:
            return await openai_wire.open_stream(
                self._client,
                f"{self._base}/v1/chat/completions",
                self._headers(attempt.call.key),
                _chat_body(attempt, stream=True),
                attempt,
            )
        except RungRefused as error:
            spare_others(error, attempt.call.key)
            raise

    async def complete_chat(self, attempt: ChatAttempt) -> Answer:
        try:
            raw = await openai_wire.post_json(
                self._client,
                f"{self._base}/v1/chat/completions",
                self._headers(attempt.call.key),
                _chat_body(attempt, stream=False),
                attempt,
            )
            return answers.check(raw, who=attempt.rung.name, call_id=attempt.call.id)
        except RungRefused as error:
            spare_others(error, attempt.call.key)
            raise

    async def embed(self, attempt: EmbedAttempt) -> Embeddings:
        """Asked of one provider, in batches where its route has a limit."""
        call = attempt.call
        served = await self._served(attempt)
        inputs: Sequence[str | list[int]] = call.inputs
        step = providers.EMBEDDINGS_ROUTES[served.provider].batch_max or len(inputs)
        parts = [
            await self._embed_batch(attempt, served, inputs[start : start + step])
            for start in range(0, len(inputs), step)
        ]
        answer = embeddings.join(parts)
        if answer.usage.estimated:
            counted = Usage(embeddings.estimate_tokens(call.inputs), estimated=True)
            return Embeddings(answer.vectors, counted)
        return answer

    async def probe(self) -> Probe:
        """The catalogue only: it is public and bills nothing. It finds models by suffix as well."""
        try:
            models = await self._catalogue.refresh()
        except UpstreamError as error:
            return _probe(State.DOWN, error.message, self._catalogue.known)
        return _probe(State.UP, "", models)

    async def aclose(self) -> None:
        """The client belongs to the composition root."""

    async def _served(self, attempt: EmbedAttempt) -> Served:
        name = providers.split_model(attempt.rung.model)
        served = await self._catalogue.mapping(name.hub_id)
        found, reason = providers.choose_served(served, name, attempt.call)
        if found is None:
            # Only a model that nobody serves is the same for the next call.
            cool_s = None if served else _UNSERVED_COOL_S
            raise RungRefused(f"{attempt.rung.name}: {reason}", cool_s=cool_s)
        return found

    async def _embed_batch(
        self, attempt: EmbedAttempt, served: Served, inputs: Sequence[str | list[int]]
    ) -> Embeddings:
        call, who = attempt.call, attempt.rung.name
        route = providers.EMBEDDINGS_ROUTES[served.provider]
        hub_id = providers.split_model(attempt.rung.model).hub_id
        try:
            raw = await openai_wire.post_json(
                self._client,
                self._base + route.path(hub_id),
                self._headers(call.key),
                route.body(call, served.provider_id, inputs),
                attempt,
            )
        except RungRefused as error:
            spare_others(error, call.key)
            raise
        return route.read(raw, len(inputs), who)

    def _headers(self, key: Key) -> dict[str, str]:
        headers = self.credential.headers(key.token)
        bill_to = key.bill_to or self._bill_to
        if bill_to:
            headers["X-HF-Bill-To"] = bill_to
        return headers


def _probe(state: State, reason: str, models: Mapping[str, CatalogueEntry]) -> Probe:
    return Probe(state, reason, CatalogueAbilities(models), CataloguePrices(models))


def _chat_unable(body: Json) -> str | None:
    form = body.get("response_format")
    if isinstance(form, dict) and form.get("type") == "regex":
        return "response_format regex is TGI's own"
    choices = body.get("n")
    if choices is not None and choices != 1:
        return "Inference Providers give one choice, not n of them"
    return None


def _chat_body(attempt: ChatAttempt, *, stream: bool) -> Json:
    """The request in the fields that the router documents; those it does not know pass as well."""
    body = openai_wire.chat_body(attempt.call.body, model=attempt.rung.model, stream=stream)
    body.pop("n", None)
    wanted = body.pop("max_completion_tokens", None)
    if wanted is not None:
        body["max_tokens"] = wanted
    if isinstance(body.get("stop"), str):
        body["stop"] = [body["stop"]]
    return body


def spare_others(error: RungRefused, key: Key) -> None:
    """Let the refusal close nothing where it speaks of this key's own token or account."""
    own = (401, 402, 403) if key.token else (402, 403) if key.bill_to else ()
    if error.upstream_status in own:
        error.cool_s = None
        error.closes = "rung"
