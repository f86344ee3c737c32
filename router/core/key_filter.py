"""Which cache_keys a store may have, in ten bits each: a Bloom filter.

What was added is always found. Of the rest one in a hundred is taken for known once the filter is
full, and fewer before. The keys are SHA-256 digests, so that slices of them are hashes already.
Nothing can be taken out: the filter is made anew when it is full.
"""

from __future__ import annotations

from struct import Struct

# Seven slices would be the best for ten bits: 0.8 in a hundred strangers pass, of four 1.2.
_SLICES = Struct("<4I")
_BITS_EACH = 10
_DIGEST_BYTES = 32


class KeyFilter:
    """`len` is how many different keys it was told of, about."""

    __slots__ = ("_bits", "_count", "_length", "keys_max")

    def __init__(self, keys_max: int) -> None:
        self.keys_max = keys_max
        self._length = keys_max * _BITS_EACH
        self._bits = bytearray(self._length // 8 + 1)
        self._count = 0

    def __len__(self) -> int:
        return self._count

    @property
    def is_full(self) -> bool:
        return self._count >= self.keys_max

    def add(self, cache_key: bytes) -> None:
        """What is not a digest is nobody's question, and is passed over."""
        if len(cache_key) != _DIGEST_BYTES:
            return
        is_new = False
        bits, length = self._bits, self._length
        for number in _SLICES.unpack_from(cache_key):
            place = number % length
            bit = 1 << (place & 7)
            if not bits[place >> 3] & bit:
                bits[place >> 3] |= bit
                is_new = True
        self._count += is_new

    def may_have(self, cache_key: bytes) -> bool:
        """False: it was never added."""
        bits, length = self._bits, self._length
        for number in _SLICES.unpack_from(cache_key):
            place = number % length
            if not bits[place >> 3] >> (place & 7) & 1:
                return False
        return True
