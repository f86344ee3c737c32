"""POST /hooks/hub: the Hub says that a model changed, so what its old revision answered is dropped.

The Hub sends the webhook's secret itself (`X-Webhook-Secret`), and nothing is read before that is
compared. It does not try again, so a model server's own revision is looked at as well
(`flow/probes.py`).
"""

from __future__ import annotations

import logging
import secrets

from router.api.exchange import Exchange
from router.api.reply import Reply, json_reply
from router.core import hub_event
from router.errors import BadRequest, Forbidden, UnknownUrl

_log = logging.getLogger("rungway")
# Backends whose server has one model; of these the probe knows the repository.
_ONE_MODEL = frozenset({"tgi", "tei"})


async def hub(exchange: Exchange) -> Reply:
    """Drop what the rungs of the changed model have in the cache; answers with their names."""
    expected = exchange.service.hub_secret
    if expected is None:
        raise UnknownUrl(
            "this daemon expects no webhooks: set hub_webhook_secret in [server] to take them"
        )
    given = exchange.request.header("x-webhook-secret") or ""
    if not secrets.compare_digest(_bytes(given), _bytes(expected)):
        raise Forbidden(
            "X-Webhook-Secret is not the secret of hub_webhook_secret in [server]",
            code="wrong_webhook_secret",
        )
    try:
        models = hub_event.changed_models(await exchange.read_json())
    except ValueError as error:
        raise BadRequest(f"this is no event of the Hub's webhooks: {error}") from error
    dropped = [name for name in _rungs(exchange) if _is_of_one(exchange, name, models)]
    exchange.shared.reuse.cache.drop(*dropped)
    if dropped:
        _log.info("%s changed on the Hub: dropped what %s answered", models[0], ", ".join(dropped))
    return json_reply({"dropped": dropped})


def _rungs(exchange: Exchange) -> list[str]:
    ladders = exchange.service.names.ladders.values()
    return list(dict.fromkeys(rung.name for ladder in ladders for rung in ladder.rungs))


def _is_of_one(exchange: Exchange, rung: str, models: list[str]) -> bool:
    name, _, model = rung.partition("/")
    served = [model]
    if exchange.service.backends[name].kind in _ONE_MODEL:
        served += exchange.shared.board.probe_of(name).models
    return any(hub_event.is_of(one, changed) for one in served for changed in models)


def _bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape")
