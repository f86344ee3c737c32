"""How long a call waits for the store to answer what it has to know."""

from __future__ import annotations

import asyncio
from typing import Any

ASK_S = 0.25
# A loop that comes to its timers later than this was held up.
_LATE_S = 0.02


async def is_answered(asked: asyncio.Future[Any], limit_s: float = ASK_S) -> bool:
    """Whether it is done within the limit. It goes on in any case.

    While the loop was busy elsewhere no answer could be heard, so as long again is waited, once.
    """
    loop = asyncio.get_running_loop()
    until = loop.time() + limit_s
    await asyncio.wait((asked,), timeout=limit_s)
    late_s = loop.time() - until
    if late_s > _LATE_S and not asked.done():
        await asyncio.wait((asked,), timeout=min(late_s, limit_s))
    return asked.done()
