"""Whether two rungs embed into the same space: the vectors of a few fixed texts, compared.

Rungs of one embeddings ladder answer for each other, and a vector of another space is a wrong
answer that nobody notices. Names prove nothing: the same model is served with another pooling,
precision, prefix or revision.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from router.core import vectors

# Short and long, plain and odd, so that pooling, prefixes, casing and truncation show.
TEXTS = (
    "The cat sat on the mat.",
    "Wie viel kostet eine Fahrkarte nach Zürich?",
    "def add(a, b): return a + b",
    "In 1969 two people walked on the Moon while a third one circled it, waiting, "
    "and a great many others watched from far away.",
)
COSINE_MIN = 0.999
NORM_SHARE_MAX = 0.01


def difference(reference: Sequence[bytes], found: Sequence[bytes]) -> str | None:
    """How the found vectors differ from the reference's, in words; None where they agree."""
    for text, one, other in zip(TEXTS, reference, found, strict=True):
        if len(one) != len(other):
            return f"{len(other) // 4} dimensions where {len(one) // 4} are expected"
        a, b = vectors.unpack(one), vectors.unpack(other)
        cosine = vectors.cosine(a, b)
        if cosine < COSINE_MIN:
            return f"cosine {cosine:.4f} for {text[:24]!r}, below {COSINE_MIN}"
        norm_a, norm_b = math.hypot(*a), math.hypot(*b)
        if abs(norm_a - norm_b) > NORM_SHARE_MAX * norm_a:
            return f"norm {norm_b:.4g} for {text[:24]!r} where {norm_a:.4g} is expected"
    return None
