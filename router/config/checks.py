"""What follows from several settings together, and the values that the house is handed.

Each function reads one part of the file's values, reports what cannot be, and gives what can.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import replace
from typing import Any
from urllib.parse import urlsplit

from router.config import schema
from router.config.addresses import is_loopback, is_private, url_fault
from router.config.locate import Path, show
from router.config.model import OPEN_NEEDS_LOOPBACK
from router.config.reading import unknown
from router.config.report import Report
from router.config.schema import BackendConfig
from router.config.secrets import NoCredentials, SecretError, SecretUnset, read_secret
from router.types import (
    Abilities,
    Key,
    KeyLimits,
    Ladder,
    PhaseLimits,
    Policy,
    Price,
    Rung,
    Task,
    nanousd_of,
)

# A dollar for a million tokens is this many nano-dollars a token.
_FREE = Price(0, 0)
_SERVES = {"tgi": {Task.CHAT}, "tei": {Task.EMBEDDINGS}}
# Clients of Hugging Face send these for "whatever is served", which is the default ladder.
_MEANS_DEFAULT = ("dummy", "tgi")
# Of "example": the key of config/rungway.example.toml.
_EXAMPLE_DIGEST = "50d858e0985ecc7f60418aaf0cc5ab587f42c2570a884095a9e8ccacd0f6545c"
# What is sent there follows the address by itself.
_ROUTES = ("/chat/completions", "/completions", "/embeddings", "/v1/models")
_LADDER_FAULTS_MAX = 20
_REORDERING = (":cheapest", ":fastest", ":best")


def kind_of(backend: BackendConfig) -> str:
    tag = backend.__struct_config__.tag
    assert isinstance(tag, str)
    return tag


def check_server(server: schema.Server, report: Report) -> None:
    if server.auth == "open" and not is_loopback(server.host):
        report.problem(("server", "auth"), OPEN_NEEDS_LOOPBACK)
    for place, origin in enumerate(server.cors_origins):
        if (fault := _origin_fault(origin)) is not None:
            report.problem(("server", "cors_origins", place), fault)


def _origin_fault(origin: str) -> str | None:
    if origin == "*":
        return "lets every web page in; list the origins, such as https://app.example.org"
    if (fault := url_fault(origin)) is not None:
        return fault
    url = urlsplit(origin)
    if origin.lower() != origin or f"{url.scheme}://{url.netloc}" != origin:
        return "is not an origin; write scheme, host and port alone: https://app.example.org"
    return None


def check_state(
    state: schema.State, workers: int, environ: Mapping[str, str], report: Report
) -> schema.State:
    """The state with its default place filled in."""
    path: Path = ("state", "url")
    if not state.url:
        return schema.State(url=f"sqlite://{state_folder(environ)}/state.db")
    url, _, rest = state.url.partition("://")
    if state.url == "memory://":
        if workers > 1:
            report.problem(
                path, f"memory:// is for one process, and [server] workers is {workers}; use sqlite"
            )
    elif url == "sqlite":
        if not rest.startswith("/") or rest.endswith("/"):
            report.problem(path, "needs an absolute path to a file: sqlite:///var/lib/x/state.db")
    elif url in ("valkey", "valkeys", "redis", "rediss"):
        host = urlsplit(state.url).netloc
        if not host or "@" in host:
            report.problem(path, "needs a host and no password in it: valkey://host:6379/0")
        elif importlib.util.find_spec("valkey") is None:
            report.problem(path, "needs the package valkey: pip install 'rungway[valkey]'")
    else:
        report.problem(path, "must be sqlite:///path, valkey://host:6379/0 or memory://")
    return state


def state_folder(environ: Mapping[str, str]) -> str:
    # systemd gives several directories separated by colons; the first is ours.
    given = environ.get("STATE_DIRECTORY", "").partition(":")[0]
    if given:
        return given
    home = environ.get("XDG_STATE_HOME") or f"{environ.get('HOME', '/var/lib')}/.local/state"
    return f"{home}/rungway"


def check_backend(
    name: str, backend: BackendConfig, environ: Mapping[str, str], report: Report
) -> None:
    path: Path = ("backends", name)
    urls = [(setting, getattr(backend, setting, None)) for setting in ("url", "management_url")]
    sound = True
    for setting, url in urls:
        if url is not None and (fault := url_fault(url)) is not None:
            report.problem((*path, setting), fault)
            sound = False
    if sound and not isinstance(backend, schema.SpaceBackend):
        _check_route(backend.url, path, report)
    instead = "remove this backend and its rungs"
    check_token(backend.token, (*path, "token"), environ, report, instead)
    if sound and backend.token is not None and backend.url is not None:
        _warn_of_plain_token(backend.url, path, report)
    if isinstance(backend, schema.EndpointBackend):
        _check_endpoint(backend, path, report)
    elif isinstance(backend, schema.SpaceBackend):
        if (backend.space is None) == (backend.url is None):
            report.problem(path, 'needs one of space = "owner/name" and url, and not both')
    elif isinstance(backend, schema.ProvidersBackend) and backend.token is None:
        report.warning(
            path, 'has no token, and Inference Providers needs one; add token = "env:HF_TOKEN"'
        )


def _check_route(url: str | None, path: Path, report: Report) -> None:
    end = urlsplit(url or "").path.rstrip("/")
    route = next((one for one in _ROUTES if end.endswith(one)), None)
    if route is not None:
        report.problem((*path, "url"), f"ends in the route {route}; end it at the host or at /v1")


def _check_endpoint(backend: schema.EndpointBackend, path: Path, report: Report) -> None:
    if backend.endpoint is None and backend.url is None:
        report.problem(path, 'needs endpoint = "namespace/name", or url')
    if backend.endpoint is not None and backend.token is None:
        report.problem(
            path, 'needs a token to look its endpoint up; add token = "env:HF_TOKEN", or give url'
        )


def _warn_of_plain_token(url: str, path: Path, report: Report) -> None:
    parts = urlsplit(url)
    if parts.scheme == "http" and not is_private(parts.hostname or ""):
        report.warning((*path, "url"), "sends the token unencrypted; use https://")


def check_token(
    reference: str | None, path: Path, environ: Mapping[str, str], report: Report, instead: str
) -> str | None:
    """The token behind a reference; what is wrong is reported without the reference's text.

    `instead` is what to do for whom has no such token.
    """
    if reference is None:
        return None
    try:
        return read_secret(reference, environ)
    except SecretUnset as error:
        report.problem(path, f"{error}, or {instead}")
        return None
    except NoCredentials as error:
        if report.is_for_service:
            report.warning(path, "is not checked: only the service has its $CREDENTIALS_DIRECTORY")
        else:
            report.problem(path, str(error))
        return None
    except SecretError as error:
        report.problem(path, str(error))
        return None


def check_hub_secret(server: schema.Server, environ: Mapping[str, str], report: Report) -> None:
    path: Path = ("server", "hub_webhook_secret")
    check_token(server.hub_webhook_secret, path, environ, report, "remove this setting")


def check_references(name: str, table: Any, backends: Mapping[str, object], report: Report) -> None:
    """Each rung's backend exists. On the file's own table, so that no other fault hides it."""
    rungs = table.get("rungs") if isinstance(table, dict) else None
    for place, rung in enumerate(rungs if isinstance(rungs, list) else ()):
        backend = rung.get("backend") if isinstance(rung, dict) else None
        if isinstance(backend, str) and backend not in backends:
            path: Path = ("ladders", name, "rungs", place, "backend")
            report.problem(path, unknown("backend", backend, backends))


# Left out: an answer in words takes minutes, vectors that take half of one are lost.
_ANSWER_S = {Task.CHAT: 120.0, Task.EMBEDDINGS: 30.0}
_TOTAL_S = {Task.CHAT: 600.0, Task.EMBEDDINGS: 120.0}


def ladder(
    name: str,
    raw: schema.Ladder,
    backends: Mapping[str, BackendConfig | None],
    report: Report,
) -> Ladder:
    """`backends` has None for one whose own faults are reported already."""
    path: Path = ("ladders", name)
    task = Task(raw.task)
    rungs: list[Rung] = []
    for place, rung in enumerate(raw.rungs):
        _check_rung(rung, task, backends, (*path, "rungs", place), report)
        value = _rung(rung, backends.get(rung.backend))
        if any(value.name == earlier.name for earlier in rungs):
            report.problem(
                (*path, "rungs", place), f"{value.name} is a rung of this ladder already; remove it"
            )
        rungs.append(value)
    if len(set(raw.aliases)) < len(raw.aliases):
        report.problem((*path, "aliases"), "names an alias twice; remove one")
    return Ladder(
        name=name,
        task=task,
        rungs=tuple(rungs),
        aliases=raw.aliases,
        policy=Policy(raw.policy),
        limits=PhaseLimits(
            connect_s=raw.connect_s,
            first_token_s=raw.first_token_s,
            idle_s=raw.idle_s,
            answer_s=_ANSWER_S[task] if raw.answer_s is None else raw.answer_s,
            total_s=_TOTAL_S[task] if raw.total_s is None else raw.total_s,
            queue_s=raw.queue_s,
            queue_max=raw.queue_max,
            hedge_after_s=raw.hedge_after_s,
            hedge_max_share=raw.hedge_max_share,
        ),
        vector_space=_vector_space(raw, task, backends, path, report),
        token_ids=raw.token_ids,
        rescue=raw.rescue == "continue",
        commit_complete=raw.commit == "complete",
        escalate_on=frozenset(raw.escalate_on),
    )


def _check_rung(
    rung: schema.Rung,
    task: Task,
    backends: Mapping[str, BackendConfig | None],
    path: Path,
    report: Report,
) -> None:
    backend = backends.get(rung.backend)
    if backend is not None and task not in _SERVES.get(kind_of(backend), {task}):
        report.problem(
            (*path, "backend"),
            f'"{rung.backend}" is of kind {kind_of(backend)}, which does not serve {task.value}; '
            f"use another backend, or another ladder",
        )
    price = rung.usd_per_mtok
    if price is not None and price.output is None and task is Task.CHAT:
        report.problem(
            (*path, "usd_per_mtok"), "`output` is missing; a chat answer is paid by its output too"
        )


def _rung(rung: schema.Rung, backend: BackendConfig | None) -> Rung:
    return Rung(
        backend=rung.backend,
        model=rung.model,
        abilities=Abilities(
            context=rung.context,
            tools=rung.tools,
            vision=rung.vision,
            json_schema=rung.json_schema,
        ),
        max_in_flight=rung.max_in_flight,
        price=_price(rung, backend),
        tiers=frozenset(rung.tiers),
    )


def _price(rung: schema.Rung, backend: BackendConfig | None) -> Price | None:
    """The rung's own price, or nothing where a token costs nothing; None is not known here."""
    own = rung.usd_per_mtok
    if own is not None:
        return Price.per_mtok(own.input, own.output or 0.0)
    return _FREE if _is_free(backend) else None


def _is_free(backend: BackendConfig | None) -> bool:
    """Whether a token costs nothing there: it is our own machine, or paid by the hour."""
    if isinstance(backend, schema.OpenAiBackend):
        return is_private(_host(backend.url))
    return backend is not None and not isinstance(backend, schema.ProvidersBackend)


def _host(url: str) -> str:
    try:
        return urlsplit(url).hostname or ""
    except ValueError:  # such an address is a problem already
        return ""


def _vector_space(
    raw: schema.Ladder,
    task: Task,
    backends: Mapping[str, BackendConfig | None],
    path: Path,
    report: Report,
) -> str:
    """The one space of all rungs: vectors of different models cannot be compared.

    A rung's own setting goes before the ladder's, and that before the model's name.
    """
    set_on = [((*path, "vector_space"), raw.vector_space)] if raw.vector_space is not None else []
    set_on += [
        ((*path, "rungs", place, "vector_space"), rung.vector_space)
        for place, rung in enumerate(raw.rungs)
        if rung.vector_space is not None
    ]
    if task is not Task.EMBEDDINGS:
        for where, _ in set_on:
            report.problem(where, "belongs to embeddings ladders; remove it")
        return ""
    first = raw.vector_space or ""
    for place, rung in enumerate(raw.rungs):
        named = rung.vector_space or raw.vector_space
        space = named or model_without_suffix(rung.model, backends.get(rung.backend))
        first = first or space
        if space == first:
            continue
        where = (*path, "rungs", place, "model" if named is None else "vector_space")
        report.problem(where, _two_spaces(space, first, named is None, path))
    return first


def _two_spaces(space: str, first: str, is_model: bool, path: Path) -> str:
    if not is_model:
        return (
            f'"{space}" is another vector space than "{first}" before it, and the vectors of one '
            "ladder must not mix; put this rung into a ladder of its own"
        )
    return (
        f'"{space}" is another model than "{first}" before it, and vectors of different models '
        "must not mix; if they are one model under two names, say so with "
        f'vector_space = "{first}" below [{show(path)}]'
    )


def model_without_suffix(model: str, backend: BackendConfig | None) -> str:
    """A provider's suffix (`:cheapest`, `:groq`) is no part of the model; others have colons too,
    as in the tags of Ollama."""
    is_suffixed = isinstance(backend, schema.ProvidersBackend)
    return model.partition(":")[0] if is_suffixed else model


def check_ladder_names(
    made: Mapping[str, Ladder], ladders: Mapping[str, object], default_ladder: str, report: Report
) -> None:
    """`ladders` has the names of those too that could not be made, so that none seems missing."""
    owner: dict[str, str] = {}
    for name, value in made.items():
        for place, alias in enumerate(value.aliases):
            path: Path = ("ladders", name, "aliases", place)
            if alias in ladders:
                report.problem(path, f'"{alias}" is the name of a ladder; choose another alias')
            elif owner.setdefault(alias, name) != name:
                report.problem(
                    path, f'"{alias}" is an alias of the ladder "{owner[alias]}" already; remove it'
                )
            _warn_of_name(alias, path, ladders, report)
        _warn_of_name(name, ("ladders", name), ladders, report)
    if default_ladder and default_ladder not in ladders:
        text = unknown("ladder", default_ladder, ladders)
        if default_ladder in owner:
            text = f'is an alias; write the name of its ladder, "{owner[default_ladder]}"'
        report.problem(("server", "default_ladder"), text)


def _warn_of_name(name: str, path: Path, ladders: Mapping[str, object], report: Report) -> None:
    if name in _MEANS_DEFAULT or name.startswith(("http://", "https://")):
        report.warning(
            path,
            f'clients that send "{name}" for "whatever is served" now get this ladder, '
            "and not the default one",
        )
    for suffix in _REORDERING:
        base = name.removesuffix(suffix)
        if base != name and base in ladders:
            report.warning(path, f'hides the reordered ladder "{base}" of that name')


def key(
    name: str,
    raw: schema.Key,
    ladders: Mapping[str, object],
    environ: Mapping[str, str],
    report: Report,
) -> Key:
    path: Path = ("keys", name)
    check_key_ladders(raw, ladders, path, report)
    if not raw.ladders:
        report.warning((*path, "ladders"), 'is empty, so the key may call nothing; "*" is all')
    token = check_token(raw.token, (*path, "token"), environ, report, "remove this setting")
    return replace(key_of(name, raw), token=token)


def check_key_ladders(
    raw: schema.KeySettings, ladders: Mapping[str, object], path: Path, report: Report
) -> None:
    wrong = [
        (place, one) for place, one in enumerate(raw.ladders) if one != "*" and one not in ladders
    ]
    # Each is compared with all there are, and a list of a thousand faults has one cause.
    for place, one in wrong[:_LADDER_FAULTS_MAX]:
        report.problem((*path, "ladders", place), unknown("ladder", one, ladders))


def key_of(name: str, raw: schema.KeySettings) -> Key:
    """The key of these settings, which are sound by themselves; it has no token of its own."""
    limits = raw.limits
    return Key(
        name=name,
        ladders=None if "*" in raw.ladders else frozenset(raw.ladders),
        tier=raw.tier,
        admin=raw.admin,
        limits=KeyLimits(
            concurrent=limits.concurrent,
            max_output_tokens=limits.max_output_tokens,
            max_input_bytes=None if limits.max_input_kib is None else limits.max_input_kib << 10,
            requests_per_minute=limits.requests_per_minute,
            tokens_per_minute=limits.tokens_per_minute,
            tokens_per_day=limits.tokens_per_day,
            usd_per_day=None if limits.usd_per_day is None else nanousd_of(limits.usd_per_day),
            usd_per_month=(
                None if limits.usd_per_month is None else nanousd_of(limits.usd_per_month)
            ),
        ),
        priority=raw.priority,
        bill_to=raw.bill_to,
        allow_unpriced=raw.allow_unpriced,
        drains=raw.on_disconnect == "drain",
    )


def warn_of_nothing(
    server: schema.Server, ladders: Mapping[str, object], keys: Mapping[str, object], report: Report
) -> None:
    if server.auth == "keys" and not keys:
        report.warning(
            ("server", "auth"),
            'is "keys" and there are no [keys.NAME] tables, so nobody may call; '
            "`rungway keys create` makes one",
        )
    if not ladders:
        report.warning(
            (), "there are no ladders, so nothing can be answered; `rungway detect` prints some"
        )


def warn_of_shares(
    workers: int,
    ladders: Mapping[str, Ladder],
    report: Report,
) -> None:
    """Limits that several workers cannot keep together as they stand; see `share.py`."""
    for name, made in ladders.items():
        for place, rung in enumerate(made.rungs):
            if rung.max_in_flight is not None and rung.max_in_flight < workers:
                report.warning(
                    ("ladders", name, "rungs", place, "max_in_flight"),
                    f"is less than [server] workers, and each worker has at least one place: up to "
                    f"{workers} calls are in flight; use fewer workers where the limit is hard",
                )


def warn_of_unpriced(
    server: schema.Server,
    ladders: Mapping[str, Ladder],
    backends: Mapping[str, BackendConfig | None],
    keys: Mapping[str, schema.Key | None],
    report: Report,
) -> None:
    """Rungs that callers with a money limit never get, since no server of the kind says a price."""
    if server.auth == "open":
        who = "[server] open_usd_per_day limits what all may spend"
    else:
        limited = [name for name, raw in keys.items() if raw is not None and _needs_prices(raw)]
        if not limited:
            return
        who = f'the key "{limited[0]}" has a money limit'
    for name, made in ladders.items():
        for place, rung in enumerate(made.rungs):
            if rung.price is None and isinstance(backends.get(rung.backend), schema.OpenAiBackend):
                report.warning(
                    ("ladders", name, "rungs", place),
                    f"has no usd_per_mtok, so its price is unknown; {who}, and so this rung is "
                    "skipped; add usd_per_mtok = { input = …, output = … }",
                )


def _needs_prices(raw: schema.Key) -> bool:
    limits = raw.limits
    is_limited = limits.usd_per_day is not None or limits.usd_per_month is not None
    return is_limited and not raw.allow_unpriced


def check_digests(keys: Mapping[str, schema.Key | None], report: Report) -> None:
    first: dict[str, str] = {}
    for name, raw in keys.items():
        if raw is None:
            continue
        if raw.sha256 == _EXAMPLE_DIGEST:
            report.problem(
                ("keys", name, "sha256"),
                "is the example's, whose key everybody knows; make one with `rungway keys create`",
            )
        other = first.setdefault(raw.sha256, name)
        if other != name:
            report.problem(
                ("keys", name, "sha256"),
                f'is that of the key "{other}" too; make another key with `rungway keys create`',
            )
