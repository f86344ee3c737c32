"""Metrics as plain values that add up: what several workers counted becomes one set. Pure.

A family is `{"name", "type", "help", "labels", "samples", "bounds", "add"}`, JSON from end to end.
Its samples are pairs of label values and a number; a histogram's numbers are
`{"counts": [one a bucket, the last beyond all bounds], "total": sum}`. Counters and histograms are
always summed; `add` says what becomes of a gauge: "sum", "min" or "max".
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from router.types import Json

Families = list[Json]


def counter(name: str, words: str, labels: Sequence[str], values: Mapping[Any, float]) -> Json:
    """`values` is by the tuple of label values."""
    return _family("counter", name, words, labels, values.items())


def gauge(
    name: str, words: str, labels: Sequence[str], values: Mapping[Any, float], add: str = "sum"
) -> Json:
    return {**_family("gauge", name, words, labels, values.items()), "add": add}


def histogram(
    name: str,
    words: str,
    labels: Sequence[str],
    values: Iterable[tuple[Any, Sequence[int], float]],
    bounds: Sequence[float],
) -> Json:
    """`values` are label values, counts by bucket, and the sum of what was observed."""
    samples = [(key, {"counts": list(counts), "total": total}) for key, counts, total in values]
    return {**_family("histogram", name, words, labels, samples), "bounds": list(bounds)}


def merged(parts: Sequence[Families]) -> Families:
    """The families of several processes as one; the order is that of their first appearance."""
    if len(parts) == 1:
        return parts[0]
    found: dict[str, Json] = {}
    values: dict[str, dict[tuple[str, ...], Any]] = {}
    for families in parts:
        for family in families:
            name = family["name"]
            found.setdefault(name, family)
            mine = values.setdefault(name, {})
            for labels, value in family["samples"]:
                key = tuple(labels)
                mine[key] = _together(family, mine[key], value) if key in mine else value
    return [
        {**family, "samples": [[list(key), value] for key, value in values[name].items()]}
        for name, family in found.items()
    ]


def lasting(families: Families) -> Families:
    """What stays true of a process that has ended: all but the gauges."""
    return [family for family in families if family["type"] != "gauge"]


def _together(family: Json, one: Any, other: Any) -> Any:
    if family["type"] == "histogram":
        if len(one["counts"]) != len(other["counts"]):
            return one
        counts = [a + b for a, b in zip(one["counts"], other["counts"], strict=True)]
        return {"counts": counts, "total": one["total"] + other["total"]}
    add = family.get("add", "sum")
    if add == "sum":
        return one + other
    return min(one, other) if add == "min" else max(one, other)


def _family(
    kind: str, name: str, words: str, labels: Sequence[str], samples: Iterable[tuple[Any, Any]]
) -> Json:
    return {
        "name": name,
        "type": kind,
        "help": words,
        "labels": list(labels),
        "samples": [[list(key), value] for key, value in samples],
    }
