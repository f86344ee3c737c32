"""Hugging Face Inference Providers: what its catalogue and the Hub publish, read and combined.

One model is served by several providers, each with its own price and abilities; the suffix of a
rung's model (`org/name:cheapest`) says which of them may answer. What a provider does not publish
is unknown: a missing price is never zero and a missing ability never a refusal.

Facts: the Hub's documentation of Inference Providers (model suffixes, `GET /v1/models`,
`expand[]=inferenceProviderMapping`), and the routes that its two clients use for embeddings.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple
from urllib.parse import quote

import orjson

from router.core.embeddings import read_nested, read_openai
from router.types import Abilities, EmbedCall, Embeddings, Json, Price

_MODELS_MAX = 20_000
_PROVIDERS_MAX = 100
# A million dollars for a token: no price, and too large to count with.
_USD_PER_MTOK_MAX = 1e12

CHEAPEST = "cheapest"
# Suffixes by which the router chooses among the providers; any other one names a provider.
_POLICIES = frozenset({"", "fastest", CHEAPEST, "preferred"})


class ModelName(NamedTuple):
    """A rung's model: the Hub's id, and the suffix without its colon ("" where there is none)."""

    hub_id: str
    suffix: str

    @property
    def pinned(self) -> str | None:
        """The one provider that may answer, or None where the router chooses."""
        return None if self.suffix in _POLICIES else self.suffix


def split_model(model: str) -> ModelName:
    """`org/name:suffix` in its two parts. An id on the Hub has no colon."""
    hub_id, _, suffix = model.partition(":")
    return ModelName(hub_id, suffix)


# --- the catalogue ------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Offer:
    """One provider's offer of one model; None is not published."""

    provider: str
    is_live: bool
    context: int | None = None
    tools: bool | None = None
    json_schema: bool | None = None
    price: Price | None = None


@dataclass(frozen=True, slots=True)
class CatalogueEntry:
    """One model with all its offers. `vision` is the model's own, not a provider's."""

    hub_id: str
    offers: tuple[Offer, ...]
    vision: bool | None = None


def read_catalogue(body: bytes) -> dict[str, CatalogueEntry]:
    """`GET /v1/models`. Entries that cannot be read are left out; ValueError when none can be."""
    value = orjson.loads(body)
    data = value.get("data") if isinstance(value, dict) else value
    if not isinstance(data, list):
        raise ValueError("the catalogue is not a list of models")
    found = (_entry(item) for item in data[:_MODELS_MAX])
    entries = {entry.hub_id: entry for entry in found if entry is not None}
    if data and not entries:
        raise ValueError("the catalogue has no entry that can be read")
    return entries


def abilities_of(entry: CatalogueEntry, suffix: str) -> Abilities:
    """What may be expected of the model under this suffix.

    Where the router chooses, one provider that can is enough: it is told what the request needs.
    """
    offers = _eligible(entry, suffix)
    contexts = [offer.context for offer in offers if offer.context is not None]
    return Abilities(
        context=max(contexts, default=None),
        tools=_any_known([offer.tools for offer in offers]),
        vision=entry.vision,
        json_schema=_any_known([offer.json_schema for offer in offers]),
    )


def price_of(entry: CatalogueEntry, suffix: str) -> Price | None:
    """The price to count with; None is unknown.

    `:cheapest` has the lowest price for output. Where the router chooses otherwise, any live
    provider may answer: the dearest counts, so that what is held always covers what is spent, and
    one provider without a price leaves it unknown.
    """
    offers = _eligible(entry, suffix)
    prices = [offer.price for offer in offers if offer.price is not None]
    if not prices or (suffix != CHEAPEST and len(prices) < len(offers)):
        return None
    if suffix == CHEAPEST:
        return min(prices, key=lambda price: (price.output_picousd, price.input_picousd))
    return Price(
        max(price.input_picousd for price in prices), max(price.output_picousd for price in prices)
    )


class CatalogueAbilities(Mapping[str, Abilities]):
    """The abilities of every model of a catalogue, found with and without a suffix."""

    def __init__(self, entries: Mapping[str, CatalogueEntry]) -> None:
        self._entries = entries

    def __getitem__(self, model: str) -> Abilities:
        name = split_model(model)
        return abilities_of(self._entries[name.hub_id], name.suffix)

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)


class CataloguePrices(Mapping[str, Price]):
    """The published prices of a catalogue, found with and without a suffix.

    A model without a price is not in it: unknown is not free.
    """

    def __init__(self, entries: Mapping[str, CatalogueEntry]) -> None:
        self._entries = entries

    def __getitem__(self, model: str) -> Price:
        name = split_model(model)
        price = price_of(self._entries[name.hub_id], name.suffix)
        if price is None:
            raise KeyError(model)
        return price

    def __iter__(self) -> Iterator[str]:
        return (name for name, entry in self._entries.items() if price_of(entry, "") is not None)

    def __len__(self) -> int:
        return sum(1 for _ in self)


def _entry(item: Any) -> CatalogueEntry | None:
    hub_id = item.get("id") if isinstance(item, dict) else None
    if not isinstance(hub_id, str) or not hub_id:
        return None
    providers = item.get("providers")
    providers = providers[:_PROVIDERS_MAX] if isinstance(providers, list) else []
    offers = tuple(offer for one in providers if (offer := _offer(one)) is not None)
    return CatalogueEntry(hub_id, offers, _vision(item.get("architecture")))


def _offer(item: Any) -> Offer | None:
    provider = item.get("provider") if isinstance(item, dict) else None
    if not isinstance(provider, str) or not provider:
        return None
    context = item.get("context_length")
    return Offer(
        provider=provider,
        is_live=item.get("status") == "live",
        context=context if type(context) is int and context > 0 else None,
        tools=_flag(item.get("supports_tools")),
        json_schema=_flag(item.get("supports_structured_output")),
        price=_price(item),
    )


def _price(item: Json) -> Price | None:
    if item.get("is_free") is True:
        return Price(0, 0)
    pricing = item.get("pricing")
    if not isinstance(pricing, dict):
        return None
    asked, given = _usd(pricing.get("input")), _usd(pricing.get("output"))
    return None if asked is None or given is None else Price.per_mtok(asked, given)


def _usd(usd_per_mtok: Any) -> float | None:
    if isinstance(usd_per_mtok, bool) or not isinstance(usd_per_mtok, int | float):
        return None
    if not 0 <= usd_per_mtok <= _USD_PER_MTOK_MAX:
        return None
    return float(usd_per_mtok)


def _vision(architecture: Any) -> bool | None:
    modalities = architecture.get("input_modalities") if isinstance(architecture, dict) else None
    return "image" in modalities if isinstance(modalities, list) else None


def _flag(value: Any) -> bool | None:
    return value if isinstance(value, bool) else None


def _any_known(flags: Sequence[bool | None]) -> bool | None:
    if any(flags):
        return True
    return None if not flags or None in flags else False


def _eligible(entry: CatalogueEntry, suffix: str) -> Sequence[Offer]:
    """The offers that may answer. With none live, all of them: a status is hours old."""
    if suffix not in _POLICIES:
        return [offer for offer in entry.offers if offer.provider == suffix]
    live = [offer for offer in entry.offers if offer.is_live] or list(entry.offers)
    if suffix == CHEAPEST:
        priced = [offer for offer in live if offer.price is not None]
        lowest = min((_output_price(offer) for offer in priced), default=None)
        return [offer for offer in priced if _output_price(offer) == lowest] or live
    return live


def _output_price(offer: Offer) -> float:
    return math.inf if offer.price is None else offer.price.output_picousd


# --- the Hub's mapping --------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Served:
    """One provider that serves a model, with its own id for it."""

    provider: str
    provider_id: str
    task: str
    is_live: bool


def read_mapping(body: bytes) -> tuple[Served, ...]:
    """`inferenceProviderMapping` of a model's page on the Hub, in the Hub's order.

    The Hub writes it as an object by provider, or as a list; the absence of both is no provider.
    Raises ValueError when the body is not a model's page.
    """
    value = orjson.loads(body)
    if not isinstance(value, dict):
        raise ValueError("the Hub's answer is not an object")
    mapping = value.get("inferenceProviderMapping")
    pairs: list[tuple[Any, Any]] = []
    if isinstance(mapping, dict):
        pairs = list(mapping.items())
    elif isinstance(mapping, list):
        pairs = [(item.get("provider"), item) for item in mapping if isinstance(item, dict)]
    found = (_served(provider, item) for provider, item in pairs[:_PROVIDERS_MAX])
    return tuple(served for served in found if served is not None)


def _served(provider: Any, item: Any) -> Served | None:
    if not isinstance(provider, str) or not provider or not isinstance(item, dict):
        return None
    provider_id = item.get("providerId")
    if not isinstance(provider_id, str) or not provider_id:
        return None
    task = item.get("task")
    return Served(
        provider, provider_id, task if isinstance(task, str) else "", item.get("status") == "live"
    )


# --- embeddings ---------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class EmbeddingsRoute:
    """How one provider takes embeddings: `path` from the Hub's id, `body` with the provider's own.

    `batch_max` None: as many inputs at a time as there are.
    """

    path: Callable[[str], str]
    body: Callable[[EmbedCall, str, Sequence[str | list[int]]], Json]
    read: Callable[[bytes, int, str], Embeddings]
    takes_tokens: bool
    takes_dimensions: bool
    tasks: frozenset[str] = frozenset({"feature-extraction"})
    batch_max: int | None = None

    def lacks(self, call: EmbedCall) -> str | None:
        """What of this call the route cannot express, or None."""
        if call.is_tokens and not self.takes_tokens:
            return "takes text, not token ids"
        if call.dimensions is not None and not self.takes_dimensions:
            return "cannot shorten vectors (`dimensions`)"
        return None


def embeddings_unable(provider: str, call: EmbedCall) -> str | None:
    """Why this provider cannot take this call, in words, or None."""
    route = EMBEDDINGS_ROUTES.get(provider)
    if route is None:
        return f"no embeddings route is known for the provider {provider}"
    lack = route.lacks(call)
    return f"{provider} {lack}" if lack else None


def choose_served(
    served: Sequence[Served], name: ModelName, call: EmbedCall
) -> tuple[Served | None, str]:
    """The provider to ask for embeddings, or None and why there is none.

    A pinned provider is taken whatever its status. Else the first live one whose route can carry
    the call, hf-inference before the others: it serves the model as the Hub has it.
    """
    if name.pinned is not None:
        found = next((one for one in served if one.provider == name.pinned), None)
        if found is None:
            return None, f"{name.pinned} does not serve {name.hub_id}"
        reason = _not_for(found, call)
        return (None, reason) if reason else (found, "")
    reasons: list[str] = []
    for one in sorted(served, key=lambda one: one.provider != "hf-inference"):
        reason = _not_for(one, call) if one.is_live else f"{one.provider} is not live"
        if reason is None:
            return one, ""
        reasons.append(reason)
    return None, "; ".join(reasons) or f"no provider serves {name.hub_id}"


def _not_for(served: Served, call: EmbedCall) -> str | None:
    reason = embeddings_unable(served.provider, call)
    if reason is not None:
        return reason
    if served.task not in EMBEDDINGS_ROUTES[served.provider].tasks:
        return f"{served.provider} serves it for {served.task or 'no task'}, not for embeddings"
    return None


def _native_path(model: str) -> str:
    return f"/hf-inference/models/{quote(model, safe='/')}/pipeline/feature-extraction"


def _native_body(call: EmbedCall, _: str, inputs: Sequence[str | list[int]]) -> Json:
    return {**call.extra, "inputs": list(inputs)}


def _openai_body(call: EmbedCall, model: str, inputs: Sequence[str | list[int]]) -> Json:
    # No encoding_format: numbers are the default everywhere, base64 is not everywhere known.
    body: Json = {"model": model, "input": list(inputs), **call.extra}
    if call.dimensions is not None:
        body["dimensions"] = call.dimensions
    return body


def _openai_route(path: str) -> EmbeddingsRoute:
    return EmbeddingsRoute(
        path=lambda _: path,
        body=_openai_body,
        read=lambda body, count, who: read_openai(body, count, who=who),
        takes_tokens=True,
        takes_dimensions=True,
    )


# Under the router's address. For the Hub's own provider the model's id is the Hub's, part of the
# path, and its models come from text-embeddings-inference, which takes 32 inputs at a time unless
# told otherwise; a sentence-similarity model answers there as a feature-extraction one.
EMBEDDINGS_ROUTES: Mapping[str, EmbeddingsRoute] = {
    "hf-inference": EmbeddingsRoute(
        path=_native_path,
        body=_native_body,
        read=lambda body, count, who: read_nested(body, count, who=who),
        takes_tokens=False,
        takes_dimensions=False,
        tasks=frozenset({"feature-extraction", "sentence-similarity"}),
        batch_max=32,
    ),
    "together": _openai_route("/together/v1/embeddings"),
    "scaleway": _openai_route("/scaleway/v1/embeddings"),
    "deepinfra": _openai_route("/deepinfra/v1/openai/embeddings"),
}
