"""A plan from the configuration alone: the same service as the daemon's, with nobody listening."""

from __future__ import annotations

import asyncio
import os
from dataclasses import replace

from router.api.calls import any_call
from router.app import close_shared, make_service, open_shared
from router.config.model import Config
from router.config.schema import State
from router.core import ladder
from router.flow.tasks import Tasks
from router.transport.http import HttpClient
from router.types import Json, Key

_ANY_KEY = Key("explain", admin=True)


def explain(config: Config, request: Json) -> Json:
    """The plan of a key without limits. Raises CallerError."""
    return asyncio.run(_explain(config, request))


async def _explain(config: Config, request: Json) -> Json:
    # What is only explained touches no state.
    config = replace(config, state=State(url="memory://"))
    shared = await open_shared(config, os.environ, lambda line: None, Tasks())
    client = HttpClient()
    try:
        service = make_service(config, shared, client, os.environ)
        call = any_call(service, "explain", _ANY_KEY, request)
        steps = service.pipeline.plan(call)
        return ladder.explain(call.ladder.name, steps)
    finally:
        await client.aclose()
        await close_shared(shared)
