"""JSON text in and out, where orjson alone would refuse what is legal.

Lone surrogate escapes are legal JSON, and JavaScript clients and gateways send them when they cut a
string inside an emoji. orjson also reads 1,024 levels of nesting but writes 254. In both cases the
standard library steps in, which keeps such escapes as they are; NaN and Infinity stay refused.
"""

from __future__ import annotations

import json
from typing import Any, NoReturn

import orjson


def read(raw: bytes) -> Any:
    """The value in JSON text. Raises ValueError."""
    try:
        return orjson.loads(raw)
    except orjson.JSONDecodeError as error:
        if b"\\ud" not in raw and b"\\uD" not in raw:
            raise
        try:
            return json.loads(raw, parse_constant=_refuse)
        except (ValueError, RecursionError):
            raise error from None


def write(value: Any) -> bytes:
    """JSON text of a value that came from `read`. Raises ValueError where there is none."""
    try:
        return orjson.dumps(value)
    except orjson.JSONEncodeError as error:
        try:
            return json.dumps(value, separators=(",", ":"), allow_nan=False).encode("ascii")
        except (ValueError, TypeError, RecursionError):
            raise ValueError(f"this JSON cannot be written: {error}") from None


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not JSON")
