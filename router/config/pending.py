"""Settings that are read and checked but have no effect in this version, each with why.

The one such list: a line goes when its setting comes alive. Nobody may believe that a budget holds
which does not, so the daemon says these at its start and `rungway check` prints them. The pattern
is a setting's path, with `*` for any one part of it.
"""

from __future__ import annotations

from router.config.locate import Path

PENDING: dict[str, str] = {
    "backends.*.usd_per_hour": "this version does not weigh an endpoint's price by the hour",
}

_PATTERNS = {tuple(pattern.split(".")): why for pattern, why in PENDING.items()}


def why_pending(path: Path) -> str | None:
    """Why the setting at a path has no effect yet, or None when it has one."""
    for pattern, why in _PATTERNS.items():
        if len(pattern) == len(path) and all(
            want in ("*", part) for want, part in zip(pattern, path, strict=True)
        ):
            return why
    return None
