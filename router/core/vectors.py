"""Embedding vectors between their three forms: raw float32, base64 of it, and JSON numbers.

OpenAI's base64 is the standard alphabet, padded, of little-endian IEEE-754 float32 without a header
(both SDKs decode it so). Raw float32 is the form kept and counted; the others are made on the way.
"""

from __future__ import annotations

import binascii
import math
import sys
from array import array
from typing import Any

_SWAP = sys.byteorder == "big"
# The highest byte of what is infinite or no number, or beyond 1.7e38: seldom there, and quick to
# look for.
_HUGE, _HUGE_NEGATIVE = 0x7F, 0xFF


def pack(values: list[Any]) -> bytes:
    """Numbers to raw float32. Raises ValueError on anything but finite numbers."""
    try:
        packed = array("f", values)
    except (TypeError, OverflowError) as error:
        raise ValueError("a vector must be a list of numbers") from error
    if _SWAP:
        packed.byteswap()
    raw = packed.tobytes()
    _check_finite(raw)
    return raw


def unpack(raw: bytes) -> list[float]:
    values = array("f", raw)
    if _SWAP:
        values.byteswap()
    return values.tolist()


def from_base64(text: str) -> bytes:
    """Raises ValueError on a bad alphabet, padding or length."""
    try:
        raw = binascii.a2b_base64(text, strict_mode=True)
    except ValueError as error:
        raise ValueError("a vector is not valid base64") from error
    if not raw or len(raw) % 4:
        raise ValueError("a base64 vector is not a whole number of float32 values")
    _check_finite(raw)
    return raw


def to_base64(raw: bytes) -> str:
    return binascii.b2a_base64(raw, newline=False).decode("ascii")


def parse(value: Any) -> bytes:
    """A vector as any backend writes it: a list of numbers, or base64. Raises ValueError."""
    if isinstance(value, str):
        return from_base64(value)
    if isinstance(value, list) and value:
        return pack(value)
    raise ValueError("a vector must be a non-empty list of numbers or a base64 string")


def shorten(raw: bytes, dimensions: int) -> bytes:
    """The first `dimensions` values at unit length, as OpenAI's `dimensions` does.

    Raises ValueError when the vector has fewer.
    """
    if dimensions * 4 > len(raw):
        raise ValueError(f"the vector has {len(raw) // 4} dimensions, fewer than {dimensions}")
    if dimensions * 4 == len(raw):
        return raw
    values = unpack(raw[: dimensions * 4])
    norm = math.sqrt(math.fsum(value * value for value in values))
    return pack([value / norm for value in values]) if norm else raw[: dimensions * 4]


def cosine(one: list[float], other: list[float]) -> float:
    """The cosine of the angle between two vectors; 0 where one of them is nought."""
    norms = math.sqrt(math.fsum(value * value for value in one))
    norms *= math.sqrt(math.fsum(value * value for value in other))
    dot = math.fsum(a * b for a, b in zip(one, other, strict=True))
    return max(-1.0, min(1.0, dot / norms)) if norms else 0.0


def _check_finite(raw: bytes) -> None:
    highest = raw[3::4]
    if (_HUGE in highest or _HUGE_NEGATIVE in highest) and not math.isfinite(sum(unpack(raw))):
        raise ValueError("a vector has a value that is not a finite float32")
