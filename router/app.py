"""The composition root: from a configuration to a service. Only here are concrete kinds named.

A new kind of backend is one line in `_MAKERS`. Each imports its module late: most daemons have one
or two, and all together are a tenth of a start.
"""

from __future__ import annotations

import importlib
import importlib.util
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import msgspec

from router.api.guard import Guard
from router.api.service import DecodeTokens, ServerLimits, Service, Shared
from router.backends.base import Backend
from router.config import schema
from router.config.addresses import is_loopback
from router.config.checks import state_folder
from router.config.model import Config
from router.config.secrets import Credential, read_secret
from router.core.chat_request import ImageRules
from router.core.model_name import LadderNames
from router.flow.attempts import Attempts
from router.flow.batcher import Batcher
from router.flow.board import Board
from router.flow.cache import Cache, CacheRules
from router.flow.embedding import Batches
from router.flow.events import Events
from router.flow.idempotency import Once
from router.flow.issuing import Issuer
from router.flow.keys import KeyBook
from router.flow.observe import Observer
from router.flow.opening import know_books, open_ledger
from router.flow.pipeline import Pipeline
from router.flow.reuse import Reuse
from router.flow.second_tier import SecondTier
from router.flow.tasks import Tasks
from router.store.open import open_store
from router.transport.http import HttpClient
from router.types import Key, KeyLimits, nanousd_of

# Set by `rungway serve --adopt-state`, for every process that it starts.
ADOPT_STATE = "RUNGWAY_ADOPT_STATE"
_HUB_URL = "https://huggingface.co"
# What waits to be written to the cache's second tier has so long at the end.
_FLUSH_S = 2.0

Maker = Callable[[str, Any, HttpClient, Mapping[str, str]], Backend]


async def open_shared(
    config: Config,
    environ: Mapping[str, str],
    write_lines: Callable[[bytes], None],
    tasks: Tasks,
    events: Events | None = None,
    later: Callable[[Callable[[], None]], object] | None = None,
) -> Shared:
    """What outlives every configuration, its state opened. Raises StateRefused.

    `later` is the log lines' (`flow/observe.py`).
    """
    events = events or Events()
    state = config.state
    password = read_secret(state.password, environ) if state.password else None
    store = await open_store(state.url, username=state.username or None, password=password)
    folder = _journals(state.url, environ)
    try:
        if folder is not None:
            adopts = bool(environ.get(ADOPT_STATE))
            await know_books(store, state.url, folder, adopts=adopts)
        ledger, books = await open_ledger(store, folder, tasks)
        keys = KeyBook(store, tasks, time.time)
        keys.configure(config.keys)
        await keys.refresh()
        tasks.spawn(keys.watch_forever(), "watch the keys")
    except BaseException:
        await store.aclose()
        raise
    tier = None
    if folder is not None:
        tier = SecondTier(store, tasks, time.time, is_shared=store.is_shared)
        tasks.spawn(tier.contents.follow_forever(), "know what the cache's store has")
    cache = Cache(
        config.cache.memory_mib << 20,
        config.cache.ttl_s,
        tier,
        tell=lambda event: events.publish("cache_drop", event),
    )
    events.on("cache_drop", cache.hear)
    if tier is not None and tier.is_shared:
        tasks.spawn(tier.watch_forever(cache.groups, cache.drop_from_memory), "watch the cache")
    observer = Observer(write_lines, time.time, later)
    once = Once(store, ledger, tasks, observer, books.process)
    return Shared(
        board=Board(time.monotonic, tell=lambda event: events.publish("board", event)),
        store=store,
        books=books,
        ledger=ledger,
        keys=keys,
        issuer=Issuer(store, keys, time.time),
        reuse=Reuse(cache, once, ledger, tasks, observer),
        batches=Batches(Batcher(tasks, time.monotonic)),
        observer=observer,
        tasks=tasks,
        clock=time.monotonic,
        events=events,
    )


def _journals(url: str, environ: Mapping[str, str]) -> Path | None:
    """Where this host's journals are: beside its file, else in its own folder; None: nowhere."""
    scheme, _, place = url.partition("://")
    if scheme == "memory":
        return None
    return Path(unquote(place)).parent if scheme == "sqlite" else Path(state_folder(environ))


async def close_shared(shared: Shared) -> None:
    """Book what is left, once no call is under way."""
    try:
        if (tier := shared.reuse.cache.tier) is not None:
            await tier.flush(_FLUSH_S)
        await shared.tasks.aclose()
        await shared.books.end()
        await shared.store.aclose()
    finally:
        shared.observer.flush()


def make_service(
    config: Config, shared: Shared, client: HttpClient, environ: Mapping[str, str]
) -> Service:
    """A service of this configuration, in use at once. Raises SecretError."""
    service = prepare_service(config, shared, client, environ)
    take_up(config, shared)
    return service


def take_up(config: Config, shared: Shared) -> None:
    """Have what outlives a configuration keep this one from now on."""
    shared.board.configure(config.ladders.values())
    shared.keys.configure(config.keys)
    shared.reuse.cache.resize(config.cache.memory_mib << 20, config.cache.ttl_s)


def prepare_service(
    config: Config, shared: Shared, client: HttpClient, environ: Mapping[str, str]
) -> Service:
    """A service of this configuration, which changes nothing until `take_up`. Raises SecretError
    when a token cannot be read.
    """
    backends = {
        name: make_backend(name, settings, client, environ)
        for name, settings in config.backends.items()
    }
    server = config.server
    rules = _cache_rules(config)
    attempts = Attempts(
        backends,
        shared.board,
        shared.ledger,
        shared.clock,
        server.max_answer_mib << 20,
        shared.batches,
        shared.reuse.cache.drop,
        shares_texts=rules.is_shared,
    )
    pipeline = Pipeline(
        backends,
        shared.board,
        shared.ledger,
        shared.observer,
        shared.clock,
        attempts,
        shared.reuse,
        rules,
    )
    images = ImageRules(
        server.remote_images, server.max_image_mib << 20, frozenset(server.image_types)
    )
    return Service(
        names=LadderNames(config.ladders, config.default_ladder),
        guard=make_guard(config, shared.keys),
        pipeline=pipeline,
        backends=backends,
        limits=ServerLimits(server.max_body_mib << 20, server.body_s, server.keepalive_s, images),
        hub_secret=_hub_secret(server, environ),
        ops_need_key=not (is_loopback(server.host) or server.public_ops),
        decode_tokens=token_decoder(),
        started_at=int(time.time()),
        cache=shared.reuse.cache,
    )


def _hub_secret(server: schema.Server, environ: Mapping[str, str]) -> str | None:
    reference = server.hub_webhook_secret
    return None if reference is None else read_secret(reference, environ)


def _cache_rules(config: Config) -> CacheRules:
    """A backend that is configured to be another server is another one to the cache."""
    stands_for = {
        name: msgspec.json.encode(settings).decode() for name, settings in config.backends.items()
    }
    return CacheRules(config.cache.chat, config.cache.scope == "shared", stands_for)


def make_guard(config: Config, keys: KeyBook) -> Guard:
    """Who may talk to this configuration."""
    server = config.server
    return Guard(
        keys=keys,
        open_key=_open_key(server) if server.auth == "open" else None,
        checks_host=is_loopback(server.host) or bool(server.allowed_hosts),
        hosts=frozenset(name.lower() for name in server.allowed_hosts),
        origins=frozenset(server.cors_origins),
    )


def _open_key(server: schema.Server) -> Key:
    """The key of everybody in open mode: a page that finds a way in cannot spend without end."""
    limits = KeyLimits(usd_per_day=nanousd_of(server.open_usd_per_day))
    return Key("open", admin=True, limits=limits)


def make_backend(
    name: str, settings: schema.BackendConfig, client: HttpClient, environ: Mapping[str, str]
) -> Backend:
    return _MAKERS[type(settings)](name, settings, client, environ)


def token_decoder() -> DecodeTokens | None:
    """Turns cl100k_base ids back into text, where the extra `tokens` is installed."""
    if importlib.util.find_spec("bpe_openai") is None:
        return None
    kept: list[Any] = []

    def decode(ids: list[int]) -> str:
        # Loaded at the first use: its table takes tens of megabytes, and most never need it.
        if not kept:
            kept.append(importlib.import_module("bpe_openai").get_encoding("cl100k_base"))
        try:
            return str(kept[0].decode(ids))
        except (KeyError, OverflowError) as error:
            raise ValueError("these are not all ids of cl100k_base") from error

    return decode


def _openai(name: str, settings: Any, client: HttpClient, environ: Mapping[str, str]) -> Backend:
    from router.backends.openai import OpenAiBackend  # noqa: PLC0415

    return OpenAiBackend(name, settings.url, client, credential=Credential(settings.token, environ))


def _tgi(name: str, settings: Any, client: HttpClient, environ: Mapping[str, str]) -> Backend:
    from router.backends.tgi import TgiBackend  # noqa: PLC0415

    return TgiBackend(name, settings.url, client, credential=Credential(settings.token, environ))


def _tei(name: str, settings: Any, client: HttpClient, environ: Mapping[str, str]) -> Backend:
    from router.backends.tei import TeiBackend  # noqa: PLC0415

    return TeiBackend(name, settings.url, client, credential=Credential(settings.token, environ))


def _providers(name: str, settings: Any, client: HttpClient, environ: Mapping[str, str]) -> Backend:
    from router.backends.inference_providers import InferenceProvidersBackend  # noqa: PLC0415

    return InferenceProvidersBackend(
        name,
        url=settings.url,
        hub_url=_hub_url(environ),
        client=client,
        credential=Credential(settings.token, environ),
        bill_to=settings.bill_to,
    )


def _endpoint(name: str, settings: Any, client: HttpClient, environ: Mapping[str, str]) -> Backend:
    from router.backends.inference_endpoint import InferenceEndpointBackend  # noqa: PLC0415

    return InferenceEndpointBackend(
        name,
        endpoint=settings.endpoint,
        url=settings.url,
        management_url=settings.management_url,
        client=client,
        credential=Credential(settings.token, environ),
    )


def _space(name: str, settings: Any, client: HttpClient, environ: Mapping[str, str]) -> Backend:
    from router.backends.gradio_space import GradioSpaceBackend  # noqa: PLC0415
    from router.hub.spaces import Spaces  # noqa: PLC0415

    return GradioSpaceBackend(
        name,
        url=settings.url,
        space=settings.space,
        api_name=settings.api_name,
        inputs=settings.inputs or None,
        client=client,
        credential=Credential(settings.token, environ),
        spaces=Spaces(client, _hub_url(environ)),
    )


def _hub_url(environ: Mapping[str, str]) -> str:
    return environ.get("HF_ENDPOINT", "").strip().rstrip("/") or _HUB_URL


_MAKERS: dict[type[Any], Maker] = {
    schema.OpenAiBackend: _openai,
    schema.TgiBackend: _tgi,
    schema.TeiBackend: _tei,
    schema.ProvidersBackend: _providers,
    schema.EndpointBackend: _endpoint,
    schema.SpaceBackend: _space,
}
