"""GET /metrics: the plain counters of `flow/observe.py` as Prometheus samples, made at scrape."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from router import __version__
from router.api.service import Shared
from router.flow.observe import GenAiCounts, Histogram
from router.types import Ladder

# Request model: the ladder. Provider: the backend. Response model: the rung's.
_GEN_AI_LABELS = (
    "gen_ai_operation_name",
    "gen_ai_provider_name",
    "gen_ai_request_model",
    "gen_ai_response_model",
)


class RouterCollector(Collector):
    """Reads one process's counters. Labels are ladders, rungs and outcomes: few values each."""

    def __init__(self, shared: Shared) -> None:
        self._shared = shared
        self.ladders: Mapping[str, Ladder] = {}

    def collect(self) -> Iterable[Metric]:
        observer = self._shared.observer
        yield _build_info()
        yield _counter(
            "rungway_calls", "Calls by outcome.", ("ladder", "rung", "outcome"), observer.calls
        )
        yield _counter(
            "rungway_attempts", "Attempts by outcome.", ("rung", "outcome"), observer.attempts
        )
        yield _counter(
            "rungway_tokens", "Tokens used.", ("ladder", "rung", "type"), observer.tokens
        )
        yield _histogram(
            "rungway_call_duration_seconds",
            "From a call's arrival to its end.",
            ("ladder", "task"),
            observer.durations,
        )
        yield _histogram(
            "rungway_first_token_seconds",
            "From a call's arrival to its stream's first content.",
            ("ladder", "rung"),
            observer.first_tokens,
        )
        yield from _gen_ai(observer.gen_ai)
        yield CounterMetricFamily(
            "rungway_log_lines_lost", "Calls whose line could not be written.", observer.lines_lost
        )
        yield GaugeMetricFamily(
            "rungway_calls_in_flight", "Calls that are being served.", observer.in_flight
        )
        yield _counter(
            "rungway_alarms",
            "Rungs that closed for a reason to be mended: a token, credit, a model.",
            ("rung",),
            {(name,): count for name, count in self._shared.board.alarms.items()},
        )
        yield _counter(
            "rungway_hedges",
            "Calls for which a second rung was asked beside a slow first one.",
            ("ladder",),
            {(name,): count for name, count in self._shared.board.hedges.items()},
        )
        yield self._rungs()

    def _rungs(self) -> Metric:
        family = GaugeMetricFamily(
            "rungway_rung_open", "1 where the rung may be tried now.", labels=("rung",)
        )
        views = {
            name: view
            for ladder in self.ladders.values()
            for name, view in self._shared.board.views(ladder).items()
        }
        for name, view in views.items():
            family.add_metric((name,), 0.0 if view.closed else 1.0)
        return family


def render(collector: RouterCollector) -> bytes:
    registry = CollectorRegistry(auto_describe=False)
    registry.register(collector)
    return generate_latest(registry)


def _gen_ai(counts: GenAiCounts) -> Iterable[Metric]:
    """The names that OpenTelemetry's GenAI conventions define, in Prometheus' spelling."""
    yield _histogram(
        "gen_ai_client_operation_duration_seconds",
        "From a call's arrival to its end, by the last rung tried.",
        (*_GEN_AI_LABELS, "error_type"),
        counts.durations,
    )
    yield _histogram(
        "gen_ai_client_operation_time_to_first_chunk_seconds",
        "From a call's arrival to its stream's first content.",
        _GEN_AI_LABELS,
        counts.first_chunks,
    )
    yield _histogram(
        "gen_ai_client_token_usage",
        "Tokens of one call.",
        (*_GEN_AI_LABELS, "gen_ai_token_type"),
        counts.tokens,
    )


def _build_info() -> Metric:
    family = GaugeMetricFamily("rungway_build_info", "The version that runs.", labels=("version",))
    family.add_metric((__version__,), 1.0)
    return family


def _counter(name: str, words: str, labels: tuple[str, ...], values: Mapping[Any, int]) -> Metric:
    family = CounterMetricFamily(name, words, labels=labels)
    for key, value in values.items():
        family.add_metric(key, value)
    return family


def _histogram(
    name: str, words: str, labels: tuple[str, ...], values: Mapping[Any, Histogram]
) -> Metric:
    family = HistogramMetricFamily(name, words, labels=labels)
    for key, histogram in values.items():
        running = 0
        buckets = []
        bounds = (*histogram.bounds, math.inf)
        for bound, count in zip(bounds, histogram.counts, strict=True):
            running += count
            buckets.append(("+Inf" if bound == math.inf else str(bound), float(running)))
        family.add_metric(key, buckets, histogram.total)
    return family
