"""A state with many keys in it, for the rows that ask what a call costs among them."""

from __future__ import annotations

import asyncio
import hashlib
from pathlib import Path

from bench.proxies import LIMITS
from router.store.base import KeyRecord
from router.store.open import open_store

# The last of them: the one that calls.
STORED_KEY = "rungway-bench-stored-key"


def make_state(path: Path, keys: int) -> Path:
    """Made once for a run of the bench: a hundred thousand keys take half a minute."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        fresh = path.with_suffix(".new")
        fresh.unlink(missing_ok=True)
        asyncio.run(_fill(fresh, keys))
        fresh.rename(path)
    return path


async def _fill(path: Path, keys: int) -> None:
    store = await open_store(f"sqlite://{path}")
    settings = {"ladders": ["*"], "limits": LIMITS}
    for number in range(keys):
        secret = STORED_KEY if number == keys - 1 else f"another-key-{number}"
        digest = hashlib.sha256(secret.encode()).hexdigest()
        record = KeyRecord(f"stored-{number}", settings, {digest: None}, created_at=0.0)
        await store.put_key(record, is_new=True)
    await store.aclose()
