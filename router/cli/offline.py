"""A plan from the configuration alone: the same service as the daemon's, with nobody listening."""

from __future__ import annotations

import asyncio
import os
import time

from router.api.calls import any_call
from router.api.service import Shared
from router.app import make_service
from router.config.model import Config
from router.core import ladder
from router.flow.board import Board
from router.flow.ledger import Ledger
from router.flow.observe import Observer
from router.flow.tasks import Tasks
from router.transport.http import HttpClient
from router.types import Json, Key

_ANY_KEY = Key("explain", admin=True)


def explain(config: Config, request: Json) -> Json:
    """The plan of a key without limits. Raises CallerError."""
    return asyncio.run(_explain(config, request))


async def _explain(config: Config, request: Json) -> Json:
    shared = Shared(
        board=Board(time.monotonic),
        ledger=Ledger(),
        observer=Observer(lambda line: None, time.time),
        tasks=Tasks(),
        clock=time.monotonic,
    )
    client = HttpClient()
    try:
        service = make_service(config, shared, client, os.environ)
        call = any_call(service, "explain", _ANY_KEY, request)
        steps = service.pipeline.plan(call)
        return ladder.explain(call.ladder.name, steps)
    finally:
        await client.aclose()
