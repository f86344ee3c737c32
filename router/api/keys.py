"""Routes for keys, which an admin makes, rotates and revokes, and for everybody's own sessions.

A secret is in one answer only, the one to its making; nothing else ever tells it.
"""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta

from router.api.asked import Query, check, new_report, read_struct
from router.api.exchange import Exchange
from router.api.reply import Reply, json_reply
from router.config import schema
from router.config.checks import check_key_ladders
from router.errors import BadRequest, Forbidden
from router.flow.issuing import Shown
from router.store.base import KeyRecord
from router.types import NANO_USD, Json, KeyLimits

_PAGE_MAX = 1000
_PAGE = 100
# Enough of a digest to tell two apart.
_DIGEST_SHOWN_CHARS = 12


class NewKey(schema.KeySettings, frozen=True, kw_only=True):
    """The body of POST /router/v1/keys: a key's settings, and its name."""

    name: schema.KeyName


class Rotation(schema.Section, frozen=True, kw_only=True):
    """The body of POST /router/v1/keys/NAME/rotate."""

    overlap_s: Annotated[float, Meta(ge=0, le=2_592_000)] = 0.0


class NewSession(schema.Section, frozen=True, kw_only=True):
    """The body of POST /router/v1/sessions."""

    ttl_s: Annotated[float, Meta(ge=1, le=86_400)] = 3600.0
    usd: Annotated[float, Meta(gt=0, le=1e9)] | None = None


async def create_key(exchange: Exchange) -> Reply:
    """POST /router/v1/keys."""
    body = await exchange.read_json()
    report = new_report()
    wanted = read_struct(NewKey, body, report)
    check_key_ladders(wanted, exchange.service.names.ladders, (), report)
    check(report)
    settings = msgspec.to_builtins(wanted)
    shown, secret = await exchange.shared.issuer.create(settings.pop("name"), settings)
    return _reply({**_shown(shown), "key": secret})


async def list_keys(exchange: Exchange) -> Reply:
    """GET /router/v1/keys?after=NAME&limit=N: by name, revoked ones too."""
    query = Query(exchange, ("after", "limit"))
    limit = query.number("limit", _PAGE, 1, _PAGE_MAX)
    page, has_more = await exchange.shared.issuer.page(query.text("after"), limit)
    return _list([_shown(one) for one in page], has_more)


async def show_key(exchange: Exchange) -> Reply:
    """GET /router/v1/keys/NAME."""
    return _reply(_shown(await exchange.shared.issuer.show(exchange.argument)))


async def revoke_key(exchange: Exchange) -> Reply:
    """DELETE /router/v1/keys/NAME."""
    return _reply(_shown(await exchange.shared.issuer.revoke(exchange.argument)))


async def rotate_key(exchange: Exchange) -> Reply:
    """POST /router/v1/keys/NAME/rotate."""
    wanted = read_struct(Rotation, await exchange.read_json(may_be_empty=True))
    issuer = exchange.shared.issuer
    shown, secret = await issuer.rotate(exchange.argument, wanted.overlap_s)
    return _reply({**_shown(shown), "key": secret})


async def create_session(exchange: Exchange) -> Reply:
    """POST /router/v1/sessions."""
    if exchange.service.guard.open_key is not None:
        raise BadRequest('this daemon asks for no key (auth = "open"), so it has no sessions')
    wanted = read_struct(NewSession, await exchange.read_json(may_be_empty=True))
    issuer = exchange.shared.issuer
    record, secret = await issuer.mint(exchange.key, wanted.ttl_s, wanted.usd)
    return _reply({**_shown_session(record), "key": secret})


async def list_sessions(exchange: Exchange) -> Reply:
    """GET /router/v1/sessions: the caller's own; of an admin's ?key=NAME, that key's."""
    key, query = exchange.key, Query(exchange, ("after", "limit", "key"))
    name = query.text("key", key.name)
    if key.session or (name != key.name and not key.admin):
        raise Forbidden("only a key itself, or one with admin = true, may list its sessions")
    limit = query.number("limit", _PAGE, 1, _PAGE_MAX)
    page, has_more = await exchange.shared.issuer.sessions(name, query.text("after"), limit)
    return _list([_shown_session(one) for one in page], has_more)


async def end_session(exchange: Exchange) -> Reply:
    """DELETE /router/v1/sessions/ID."""
    ended = await exchange.shared.issuer.end_session(exchange.key, exchange.argument)
    return _reply(_shown_session(ended))


def _shown(shown: Shown) -> Json:
    key = shown.key
    return {
        "object": "key",
        "name": key.name,
        "source": "file" if shown.in_file else "state",
        "created_at": _second(shown.created_at),
        "revoked_at": _second(shown.revoked_at),
        "ladders": ["*"] if key.ladders is None else sorted(key.ladders),
        "tier": key.tier,
        "admin": key.admin,
        "priority": key.priority,
        "allow_unpriced": key.allow_unpriced,
        "on_disconnect": "drain" if key.drains else "cancel",
        "bill_to": key.bill_to,
        "limits": _limits(key.limits),
        "secrets": [
            {"sha256_begins": digest[:_DIGEST_SHOWN_CHARS], "ends_at": _second(end)}
            for digest, end in shown.digests.items()
        ],
    }


def _limits(limits: KeyLimits) -> Json:
    """Under the names of the configuration; no limit is left out."""
    found: Json = {
        "usd_per_day": _usd(limits.usd_per_day),
        "usd_per_month": _usd(limits.usd_per_month),
        "tokens_per_minute": limits.tokens_per_minute,
        "tokens_per_day": limits.tokens_per_day,
        "requests_per_minute": limits.requests_per_minute,
        "concurrent": limits.concurrent,
        "max_output_tokens": limits.max_output_tokens,
        "max_input_kib": None if limits.max_input_bytes is None else limits.max_input_bytes >> 10,
    }
    return {name: value for name, value in found.items() if value is not None}


def _shown_session(record: KeyRecord) -> Json:
    return {
        "object": "session",
        "id": record.name,
        "parent": record.parent,
        "usd": record.settings.get("usd"),
        "created_at": _second(record.created_at),
        "expires_at": _second(record.expires_at),
        "revoked_at": _second(record.revoked_at),
    }


def _usd(nanousd: int | None) -> float | None:
    return None if nanousd is None else nanousd / NANO_USD


def _second(at: float | None) -> int | None:
    return None if at is None else int(at)


def _reply(value: Json) -> Reply:
    # Some of these hold a secret, and no cache on the way needs any of them.
    return json_reply(value, headers={"Cache-Control": "no-store"})


def _list(data: list[Json], has_more: bool) -> Reply:
    return _reply({"object": "list", "data": data, "has_more": has_more})
