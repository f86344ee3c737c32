"""Routes for operators: is it alive, can it answer, what does it count, why would it go where."""

from __future__ import annotations

from aiohttp import web

from router import __version__
from router.api.calls import any_call
from router.api.exchange import Exchange
from router.api.metrics import RouterCollector, render
from router.api.reply import json_reply
from router.core import ladder as ladder_plans
from router.errors import Forbidden
from router.types import Key

_METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"


def require_admin(key: Key) -> None:
    if not key.admin:
        raise Forbidden(
            "this needs a key with admin = true; `rungway keys create NAME --admin` makes one"
        )


def front(exchange: Exchange) -> web.StreamResponse:
    """GET /: what this is, for a person with a browser or curl."""
    return json_reply(
        {
            "name": "rungway",
            "version": __version__,
            "openai_base": "/v1",
            "see": ["/v1/models", "/health", "/ready", "/metrics"],
        },
        headers=exchange.headers(),
    )


def health(exchange: Exchange) -> web.StreamResponse:
    """GET /health: the process lives."""
    return json_reply({"status": "ok", "version": __version__}, headers=exchange.headers())


def ready(exchange: Exchange) -> web.StreamResponse:
    """GET /ready: there is a ladder, some rung of every one can answer, and nothing is ending."""
    shared = exchange.shared
    ladders = {
        name: shared.board.is_ready(ladder)
        for name, ladder in exchange.service.names.ladders.items()
    }
    is_ready = bool(ladders) and all(ladders.values()) and not shared.is_draining
    body = {"ready": is_ready, "draining": shared.is_draining, "ladders": ladders}
    return json_reply(body, 200 if is_ready else 503, exchange.headers())


def metrics(exchange: Exchange, collector: RouterCollector) -> web.StreamResponse:
    """GET /metrics."""
    collector.ladders = exchange.service.names.ladders
    return web.Response(
        body=render(collector), headers={**exchange.headers(), "Content-Type": _METRICS_TYPE}
    )


def status(exchange: Exchange) -> web.StreamResponse:
    """GET /router/v1/status: the board as it is now."""
    board = exchange.shared.board
    found = {
        name: {"rungs": board.snapshot(ladder)}
        for name, ladder in exchange.service.names.ladders.items()
    }
    return json_reply({"ladders": found}, headers=exchange.headers())


async def explain(exchange: Exchange) -> web.StreamResponse:
    """POST /router/v1/explain: which rungs this request would try now, and why not the others."""
    call = any_call(exchange.service, exchange.id, exchange.key, await exchange.read_json())
    steps = exchange.service.pipeline.plan(call)
    return json_reply(ladder_plans.explain(call.ladder.name, steps), headers=exchange.headers())
