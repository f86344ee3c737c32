"""Metrics add up: counters and histograms by their sums, gauges as each one says."""

from __future__ import annotations

from typing import Any

import orjson
import pytest

from router.core.samples import counter, gauge, histogram, lasting, merged
from router.types import Json


def samples(family: Json) -> dict[tuple[str, ...], Any]:
    return {tuple(labels): value for labels, value in family["samples"]}


def calls(**values: int) -> Json:
    return counter("calls", "Calls.", ("rung",), {(name,): n for name, n in values.items()})


def times(counts: list[int], total: float) -> Json:
    return histogram("times", "Times.", ("rung",), [(("a",), counts, total)], (0.1, 1.0))


def test_counters_are_summed_by_their_labels() -> None:
    (found,) = merged([[calls(a=1, b=2)], [calls(b=3, c=4)], [calls()]])
    assert samples(found) == {("a",): 1, ("b",): 5, ("c",): 4}
    assert (found["type"], found["help"], found["labels"]) == ("counter", "Calls.", ["rung"])


def test_histograms_are_summed_by_bucket() -> None:
    (found,) = merged([[times([1, 2, 3], 4.5)], [times([0, 1, 0], 0.5)]])
    assert samples(found) == {("a",): {"counts": [1, 3, 3], "total": 5.0}}
    assert found["bounds"] == [0.1, 1.0]


def test_histograms_of_other_buckets_are_not_mixed() -> None:
    (found,) = merged([[times([1, 2, 3], 4.5)], [times([1, 1], 1.0)]])
    assert samples(found) == {("a",): {"counts": [1, 2, 3], "total": 4.5}}


@pytest.mark.parametrize(("add", "value"), [("sum", 5.0), ("min", 1.0), ("max", 3.0)])
def test_gauges_say_how_they_add_up(add: str, value: float) -> None:
    parts = [[gauge("g", "", (), {(): one}, add)] for one in (1.0, 3.0, 1.0)]
    (found,) = merged(parts)
    assert samples(found) == {(): value}


def test_one_process_is_itself_and_nothing_is_changed() -> None:
    first, second = [calls(a=1), times([1, 0, 0], 0.1)], [calls(a=2)]
    before = orjson.dumps([first, second])
    assert merged([first]) is first
    assert [family["name"] for family in merged([second, first])] == ["calls", "times"]
    assert orjson.dumps([first, second]) == before


def test_it_survives_the_way_between_processes() -> None:
    families = [calls(a=1), times([1, 0, 0], 0.1), gauge("g", "", ("x",), {("y",): 1.0}, "min")]
    assert orjson.loads(orjson.dumps(families)) == families


def test_of_a_process_that_ended_only_counts_stay() -> None:
    families = [calls(a=1), gauge("g", "", (), {(): 1.0}), times([1, 0, 0], 0.1)]
    assert [family["name"] for family in lasting(families)] == ["calls", "times"]
