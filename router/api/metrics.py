"""GET /metrics: the plain counters of `flow/observe.py` as families of plain values.

They add up over workers (`core/samples.py`); `exposition` makes of the sum what a scraper reads.
A new metric is one more family in `families`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from router import __version__
from router.api.service import Shared
from router.core import samples
from router.core.accounts import to_usd
from router.core.samples import Families, counter, gauge
from router.flow.batcher import Counts
from router.flow.cache import Cache
from router.flow.events import Gathered
from router.flow.observe import DURATION_BUCKETS_S, TOKEN_BUCKETS, GenAiCounts, Histogram
from router.types import Json, Ladder

# Request model: the ladder. Provider: the backend. Response model: the rung's.
_GEN_AI_LABELS = (
    "gen_ai_operation_name",
    "gen_ai_provider_name",
    "gen_ai_request_model",
    "gen_ai_response_model",
)


def families(shared: Shared, ladders: Mapping[str, Ladder]) -> Families:
    """One process's counters. Labels are ladders, rungs and outcomes: few values each."""
    observer, board = shared.observer, shared.board
    return [
        gauge("rungway_build_info", "The version that runs.", ("version",), _version(), "max"),
        counter(
            "rungway_calls", "Calls by outcome.", ("ladder", "rung", "outcome"), observer.calls
        ),
        counter("rungway_attempts", "Attempts by outcome.", ("rung", "outcome"), observer.attempts),
        counter("rungway_tokens", "Tokens used.", ("ladder", "rung", "type"), observer.tokens),
        _histogram(
            "rungway_call_duration_seconds",
            "From a call's arrival to its end.",
            ("ladder", "task"),
            observer.durations,
        ),
        _histogram(
            "rungway_first_token_seconds",
            "From a call's arrival to its stream's first content.",
            ("ladder", "rung"),
            observer.first_tokens,
        ),
        *_gen_ai(observer.gen_ai),
        counter(
            "rungway_log_lines_lost",
            "Calls whose line could not be written.",
            (),
            {(): observer.lines_lost},
        ),
        gauge(
            "rungway_calls_in_flight",
            "Calls that are being served.",
            (),
            {(): observer.in_flight},
        ),
        counter(
            "rungway_alarms",
            "Rungs that closed for a reason to be mended: a token, credit, a model.",
            ("rung",),
            {(name,): count for name, count in board.alarms.items()},
        ),
        counter(
            "rungway_hedges",
            "Calls for which a second rung was asked beside a slow first one.",
            ("ladder",),
            {(name,): count for name, count in board.hedges.items()},
        ),
        gauge(
            "rungway_rung_open",
            "1 where the rung may be tried now.",
            ("rung",),
            {
                (name,): 0.0 if view.closed else 1.0
                for ladder in ladders.values()
                for name, view in board.views(ladder).items()
            },
            "min",
        ),
        *_cache(shared.reuse.cache),
        *_batches(shared.batches.counts),
    ]


def of_all(gathered: Gathered) -> Families:
    """What every worker counted, and how many were heard now.

    Of one that is late, or has ended, what it last counted stands in: a counter never falls.
    """
    parts: list[Families] = [one["families"] for one in gathered.answers]
    parts += [samples.lasting(one["families"]) for one in gathered.kept]
    heard = gauge(
        "rungway_workers",
        "Worker processes: those there are, and those that this scrape heard.",
        ("which",),
        {("all",): gathered.workers, ("heard",): len(gathered.answers)},
    )
    return [*samples.merged(parts), heard]


def _cache(cache: Cache) -> Families:
    """What the cache did, by kind of entry, and where: in memory, or in the state's store."""
    lookups, removed, saved = {}, {}, {}
    for kind, one in cache.counts().items():
        behind = cache.tier_counts()[kind]
        lookups[kind, "memory", "hit"], lookups[kind, "memory", "miss"] = one.hits, one.misses
        lookups[kind, "store", "hit"], lookups[kind, "store", "miss"] = behind.hits, behind.misses
        removed[kind, "evicted"], removed[kind, "expired"] = one.evictions, one.expired
        removed[kind, "dropped"] = one.dropped
        saved[(kind,)] = to_usd(one.saved_nanousd + behind.saved_nanousd)
    held = {(kind,): one for kind, one in cache.counts().items()}
    return [
        counter(
            "rungway_cache_lookups",
            "Chat answers and single embeddings inputs that were looked for.",
            ("kind", "tier", "result"),
            lookups,
        ),
        gauge(
            "rungway_cache_entries",
            "Entries in memory.",
            ("kind",),
            {kind: one.entries for kind, one in held.items()},
        ),
        gauge(
            "rungway_cache_bytes",
            "What the entries in memory take.",
            ("kind",),
            {kind: one.bytes for kind, one in held.items()},
        ),
        counter(
            "rungway_cache_removed",
            "Entries that left memory: for want of room, of age, or as another model answers now.",
            ("kind", "why"),
            removed,
        ),
        counter(
            "rungway_cache_saved_usd",
            "What the answers cost when they were made that were used again.",
            ("kind",),
            saved,
        ),
        counter(
            "rungway_cache_writes_lost",
            "Entries that could not be written to the store.",
            (),
            {(): cache.tier.writes_lost if cache.tier is not None else 0},
        ),
    ]


def _batches(counts: Counts) -> Families:
    """How well embeddings were put together: inputs for each request, and how many went at all."""
    return [
        counter(
            "rungway_embeddings_inputs",
            "Inputs that no cache had: asked for by callers, and sent upstream.",
            ("which",),
            {("asked",): counts.inputs, ("sent",): counts.sent},
        ),
        counter(
            "rungway_embeddings_requests",
            "Requests upstream that the inputs went in, for how many calls' sake.",
            ("which",),
            {("calls",): counts.calls, ("requests",): counts.requests},
        ),
    ]


def _gen_ai(counts: GenAiCounts) -> Families:
    """The names that OpenTelemetry's GenAI conventions define, in Prometheus' spelling."""
    return [
        _histogram(
            "gen_ai_client_operation_duration_seconds",
            "From a call's arrival to its end, by the last rung tried.",
            (*_GEN_AI_LABELS, "error_type"),
            counts.durations,
        ),
        _histogram(
            "gen_ai_client_operation_time_to_first_chunk_seconds",
            "From a call's arrival to its stream's first content.",
            _GEN_AI_LABELS,
            counts.first_chunks,
        ),
        _histogram(
            "gen_ai_client_token_usage",
            "Tokens of one call.",
            (*_GEN_AI_LABELS, "gen_ai_token_type"),
            counts.tokens,
            TOKEN_BUCKETS,
        ),
    ]


def _version() -> dict[tuple[str], float]:
    return {(__version__,): 1.0}


def _histogram(
    name: str,
    words: str,
    labels: tuple[str, ...],
    values: Mapping[Any, Histogram],
    bounds: tuple[float, ...] = DURATION_BUCKETS_S,
) -> Json:
    counted = ((key, one.counts, one.total) for key, one in values.items())
    return samples.histogram(name, words, labels, counted, bounds)
