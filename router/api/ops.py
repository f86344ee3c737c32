"""Routes for operators: is it alive, can it answer, what does it count, why would it go where."""

from __future__ import annotations

from collections.abc import Callable

from router import __version__
from router.api import metrics as counted
from router.api.calls import any_call
from router.api.exchange import Exchange
from router.api.reply import Reply, json_reply
from router.api.service import Service, Shared
from router.core import ladder as ladder_plans
from router.core import rung_rows
from router.errors import Forbidden
from router.flow.events import Gathered
from router.types import Json, Key

_METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"


def require_admin(key: Key) -> None:
    if not key.admin:
        raise Forbidden(
            "this needs a key with admin = true; `rungway keys create NAME --admin` makes one"
        )


def front(exchange: Exchange) -> Reply:
    """GET /: what this is, for a person with a browser or curl."""
    return json_reply(
        {
            "name": "rungway",
            "version": __version__,
            "openai_base": "/v1",
            "see": ["/v1/models", "/health", "/ready", "/metrics"],
        }
    )


async def health(exchange: Exchange) -> Reply:
    """GET /health: the process lives; of several workers, how many say so."""
    gathered = await exchange.shared.events.gather("health", {})
    body = {"status": "ok", "version": __version__, **_heard(gathered)}
    return json_reply(body)


def ready(exchange: Exchange) -> Reply:
    """GET /ready: there is a ladder, some rung of every one can answer, and nothing is ending."""
    shared = exchange.shared
    ladders = {
        name: shared.board.is_ready(ladder)
        for name, ladder in exchange.service.names.ladders.items()
    }
    is_ready = bool(ladders) and all(ladders.values()) and not shared.is_draining
    body = {"ready": is_ready, "draining": shared.is_draining, "ladders": ladders}
    return json_reply(body, 200 if is_ready else 503)


async def metrics(exchange: Exchange) -> Reply:
    """GET /metrics: what all workers counted."""
    from router.api.exposition import render  # noqa: PLC0415

    gathered = await exchange.shared.events.gather("metrics", {})
    return Reply(200, render(counted.of_all(gathered)), _METRICS_TYPE)


async def status(exchange: Exchange) -> Reply:
    """GET /router/v1/status: the board as it is now, of all workers."""
    gathered = await exchange.shared.events.gather("status", {})
    body = {"ladders": rung_rows.ladders(gathered.answers), **_heard(gathered)}
    return json_reply(body)


def answer_other_workers(shared: Shared, service: Callable[[], Service]) -> None:
    """Have this worker's part ready for whichever worker is asked by a client.

    `service` gives the configuration of the moment.
    """
    shared.events.answers("health", lambda _: {})
    shared.events.answers(
        "held", lambda _: {"held": [[list(row), usd] for row, usd in shared.ledger.held().items()]}
    )
    shared.events.answers(
        "metrics", lambda _: {"families": counted.families(shared, service().names.ladders)}
    )
    shared.events.answers(
        "status",
        lambda _: {
            name: shared.board.rows(ladder) for name, ladder in service().names.ladders.items()
        },
    )
    shared.events.on("board", shared.board.hear)


async def explain(exchange: Exchange) -> Reply:
    """POST /router/v1/explain: which rungs this request would try now, and why not the others."""
    call = any_call(exchange.service, exchange.id, exchange.key, await exchange.read_json())
    steps = exchange.service.pipeline.plan(call)
    return json_reply(ladder_plans.explain(call.ladder.name, steps))


def _heard(gathered: Gathered) -> Json:
    """How many of several workers an answer is of."""
    if gathered.workers == 1:
        return {}
    return {"workers": {"heard": len(gathered.answers), "all": gathered.workers}}
