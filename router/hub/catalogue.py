"""The catalogue of Inference Providers and the Hub's provider mappings, kept and bounded.

Nothing here is billed. The backend's token goes to the router that it was configured for, and to
the Hub only where both are one site: a private router's token is not Hugging Face's to see.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from urllib.parse import quote, urlsplit

from router.config.secrets import Credential
from router.core.providers import (
    CatalogueEntry,
    Served,
    read_catalogue,
    read_mapping,
)
from router.core.refusal import refusal
from router.errors import RungRefused, UpstreamBroken, UpstreamError
from router.hub.kept import Kept
from router.transport.http import HttpClient

# The Hub measures its providers about every hour; five minutes follow that closely enough.
_CATALOGUE_AGE_S_MAX = 300.0
_MAPPING_AGE_S_MAX = 600.0
_CATALOGUE_BYTES_MAX = 16 << 20
_MAPPING_BYTES_MAX = 1 << 20
_MAPPINGS_MAX = 256
_FETCH_S = 10.0
_NO_MODELS: Mapping[str, CatalogueEntry] = {}


class Catalogue:
    """`url` is the router's base without `/v1`, `hub_url` the Hub's."""

    def __init__(
        self,
        url: str,
        hub_url: str,
        client: HttpClient,
        *,
        credential: Credential,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._url = url
        self._hub_url = hub_url.rstrip("/")
        self._client = client
        self._credential = credential
        self._clock = clock
        self._models: Kept[dict[str, CatalogueEntry]] = Kept(clock)
        self._mappings: OrderedDict[str, Kept[tuple[Served, ...]]] = OrderedDict()
        self._hub_sees_token = is_one_site(url, self._hub_url)

    @property
    def known(self) -> Mapping[str, CatalogueEntry]:
        """The models as last fetched, however old; nothing is asked."""
        return _NO_MODELS if self._models.value is None else self._models.value

    async def refresh(self) -> Mapping[str, CatalogueEntry]:
        """The models, fetched where they are too old. Raises UpstreamError; `known` stays."""
        return await self._models.get(self._fetch_models, age_s_max=_CATALOGUE_AGE_S_MAX)

    async def mapping(self, hub_id: str) -> tuple[Served, ...]:
        """Who serves this model; an old answer where the Hub gives none. Raises UpstreamError."""
        kept = self._mappings.get(hub_id)
        if kept is None:
            kept = self._mappings[hub_id] = Kept(self._clock)
            while len(self._mappings) > _MAPPINGS_MAX:
                self._mappings.popitem(last=False)
        self._mappings.move_to_end(hub_id)
        try:
            return await kept.get(lambda: self._fetch_mapping(hub_id), age_s_max=_MAPPING_AGE_S_MAX)
        except UpstreamError:
            if kept.value is None:
                raise
            return kept.value

    async def _fetch_models(self) -> dict[str, CatalogueEntry]:
        body = await self._get(
            f"{self._url}/v1/models",
            self._credential.headers(),
            who="the providers' catalogue",
            bytes_max=_CATALOGUE_BYTES_MAX,
        )
        try:
            return read_catalogue(body)
        except ValueError as error:
            raise UpstreamBroken(f"the providers' catalogue cannot be read: {error}") from error

    async def _fetch_mapping(self, hub_id: str) -> tuple[Served, ...]:
        who = f"the Hub's page of {hub_id}"
        body = await self._get(
            f"{self._hub_url}/api/models/{quote(hub_id, safe='/')}"
            "?expand[]=inferenceProviderMapping",
            self._credential.headers() if self._hub_sees_token else {},
            who=who,
            bytes_max=_MAPPING_BYTES_MAX,
        )
        try:
            return read_mapping(body)
        except ValueError as error:
            raise UpstreamBroken(f"{who} cannot be read: {error}") from error

    async def _get(
        self, url: str, headers: Mapping[str, str], *, who: str, bytes_max: int
    ) -> bytes:
        status, answered, body = await self._client.fetch(
            "GET",
            url,
            headers={"Accept": "application/json", **headers},
            bytes_max=bytes_max,
            within_s=_FETCH_S,
        )
        if status != 200:
            raise _for_all_calls(refusal(who, status, answered, body))
        return body


def _for_all_calls(error: UpstreamError) -> UpstreamError:
    """A look-up's failure is never the caller's mistake: the next rung may answer."""
    return error if error.moves_on else RungRefused(error.message)


def is_one_site(url: str, hub_url: str) -> bool:
    """Whether the router's host is the Hub's or lies below it."""
    router, hub = urlsplit(url), urlsplit(hub_url)
    if not router.hostname or not hub.hostname or router.scheme != hub.scheme:
        return False
    return router.hostname == hub.hostname or router.hostname.endswith(f".{hub.hostname}")
