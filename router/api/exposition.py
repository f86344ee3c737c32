"""Families of plain values (`core/samples.py`) in Prometheus' text format.

Imported at the first scrape: its library is a megabyte that a daemon may never need.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from router.core.samples import Families
from router.types import Json


def render(of_all: Families) -> bytes:
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Collector(of_all))
    return generate_latest(registry)


class _Collector(Collector):
    def __init__(self, of_all: Families) -> None:
        self._families = of_all

    def collect(self) -> Iterable[Metric]:
        return map(_metric, self._families)


def _metric(family: Json) -> Metric:
    name, words, labels = family["name"], family["help"], family["labels"]
    if family["type"] == "histogram":
        return _buckets(HistogramMetricFamily(name, words, labels=labels), family)
    made: CounterMetricFamily | GaugeMetricFamily
    if family["type"] == "counter":
        made = CounterMetricFamily(name, words, labels=labels)
    else:
        made = GaugeMetricFamily(name, words, labels=labels)
    for key, value in family["samples"]:
        made.add_metric(key, value)
    return made


def _buckets(made: HistogramMetricFamily, family: Json) -> Metric:
    bounds = (*family["bounds"], math.inf)
    for key, value in family["samples"]:
        running = 0
        buckets = []
        for bound, count in zip(bounds, value["counts"], strict=True):
            running += count
            buckets.append(("+Inf" if bound == math.inf else str(bound), float(running)))
        made.add_metric(key, buckets, value["total"])
    return made
