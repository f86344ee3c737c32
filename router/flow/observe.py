"""What is known of a call when it has ended: one JSON log line, and counters for the metrics.

Never a prompt, a key's secret or a token, and no label of a metric from a client's text: ladders
and rungs are the configuration's names, outcomes our own words. The counters are plain numbers; a
collector turns them into Prometheus samples when somebody scrapes (`api/metrics.py`), since a
client library's `labels().observe()` costs over a microsecond.

`Observer.record` never raises, and counts before it writes: no log line is worth an answer.
"""

from __future__ import annotations

import json
import re
import sys
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import orjson

from router.core.accounts import to_usd
from router.flow.ledger import Admission
from router.types import Call, ChatCall, Json, Rung, Task, Usage

# The OpenTelemetry GenAI conventions' buckets for client operations.
DURATION_BUCKETS_S = (
    0.01,
    0.02,
    0.04,
    0.08,
    0.16,
    0.32,
    0.64,
    1.28,
    2.56,
    5.12,
    10.24,
    20.48,
    40.96,
    81.92,
)
# The same conventions' buckets for tokens: 1, 4, 16, … 67108864.
TOKEN_BUCKETS = tuple(float(4**power) for power in range(14))

# How a call is answered for which no model was asked.
_WITHOUT_MODEL = frozenset({"hit", "joined"})
# A client may ask for a path of any length.
_ROUTE_CHARS_MAX = 200
# Outcomes are words of ours, but the code of an error may have come from further away.
_OUTCOME = re.compile(r"[a-z0-9_]{1,64}")


@dataclass(slots=True)
class AttemptRecord:
    """One try of one rung; `cause` "" where it answered."""

    rung: Rung
    cause: str = ""


@dataclass(slots=True)
class Record:
    """All that is noted of one call. Times are seconds since the call arrived.

    `usage` and `nanousd` are of all its attempts; `admission` is what they are charged to.
    """

    call_id: str
    route: str
    key: str = ""
    ladder: str = ""
    task: str = ""
    stream: bool = False
    client_request_id: str = ""
    attempts: list[AttemptRecord] = field(default_factory=list)
    rung: Rung | None = None
    usage: Usage | None = None
    nanousd: int = 0
    admission: Admission | None = None
    cache: str = "bypass"
    cached_inputs: int = 0
    inputs: int = 0
    first_token_s: float | None = None
    total_s: float = 0.0
    status: int = 0
    error: str = ""

    def absorb(self, work: Record) -> None:
        """Take over what the work for this call did, apart from it."""
        self.attempts += work.attempts
        self.cache = work.cache
        self.inputs, self.cached_inputs = work.inputs, work.cached_inputs
        self.rung = work.rung
        self.usage, self.nanousd = work.usage, work.nanousd
        if self.first_token_s is None:
            self.first_token_s = work.first_token_s

    def of_call(self, call: Call) -> None:
        self.key, self.ladder = call.key.name, call.ladder.name
        self.task = call.ladder.task.value
        self.stream = isinstance(call, ChatCall) and call.stream


class Histogram:
    """Counts by bucket, Prometheus-style; `observe` is one bisection."""

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: Sequence[float] = DURATION_BUCKETS_S) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def observe(self, value: float) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value


class GenAiCounts:
    """What OpenTelemetry's GenAI conventions define for a client of models, which a router is.

    Labels: operation, provider (our backend), model asked for (our ladder), model that answered
    (the rung's), and the error's type or the token's.
    """

    def __init__(self) -> None:
        self.durations: dict[tuple[str, str, str, str, str], Histogram] = defaultdict(Histogram)
        self.tokens: dict[tuple[str, str, str, str, str], Histogram] = defaultdict(
            lambda: Histogram(TOKEN_BUCKETS)
        )
        self.first_chunks: dict[tuple[str, str, str, str], Histogram] = defaultdict(Histogram)

    def count(self, record: Record, rung: Rung, outcome: str) -> None:
        """`rung` is the one that answered, or the last one tried."""
        labels = (record.task, rung.backend, record.ladder, rung.model)
        error = "" if outcome == "ok" else outcome
        self.durations[*labels, error].observe(record.total_s)
        if record.first_token_s is not None:
            self.first_chunks[labels].observe(record.first_token_s)
        if record.usage is not None:
            self.tokens[*labels, "input"].observe(record.usage.input_tokens)
            if record.task == Task.CHAT.value:
                self.tokens[*labels, "output"].observe(record.usage.output_tokens)


class Observer:
    """Takes a record of every call. `write_line` gets one line of JSON, newline included."""

    def __init__(
        self, write_line: Callable[[bytes], None], wall_clock: Callable[[], float]
    ) -> None:
        self._write_line = write_line
        self._wall_clock = wall_clock
        self.calls: dict[tuple[str, str, str], int] = defaultdict(int)
        self.attempts: dict[tuple[str, str], int] = defaultdict(int)
        self.tokens: dict[tuple[str, str, str], int] = defaultdict(int)
        self.durations: dict[tuple[str, str], Histogram] = defaultdict(Histogram)
        self.first_tokens: dict[tuple[str, str], Histogram] = defaultdict(Histogram)
        self.gen_ai = GenAiCounts()
        self.in_flight = 0
        self.lines_lost = 0

    def record(self, record: Record) -> None:
        """Count a call that has ended, then write its line. Never raises."""
        rung = record.rung.name if record.rung is not None else ""
        self._count(record, rung)
        try:
            self._write_line(self._line(record, rung))
        except (OSError, ValueError):
            # The log's reader is gone, or its disk is full.
            self.lines_lost += 1

    def _count(self, record: Record, rung: str) -> None:
        outcome = _outcome(record.error)
        self.calls[record.ladder, rung, outcome] += 1
        for attempt in record.attempts:
            self.attempts[attempt.rung.name, attempt.cause or "ok"] += 1
        if record.ladder:
            self.durations[record.ladder, record.task].observe(record.total_s)
        if record.first_token_s is not None:
            self.first_tokens[record.ladder, rung].observe(record.first_token_s)
        if record.usage is not None:
            self.tokens[record.ladder, rung, "input"] += record.usage.input_tokens
            self.tokens[record.ladder, rung, "output"] += record.usage.output_tokens
        last = record.rung or (record.attempts[-1].rung if record.attempts else None)
        if last is not None and (record.attempts or record.cache not in _WITHOUT_MODEL):
            self.gen_ai.count(record, last, outcome)

    def _line(self, record: Record, rung: str) -> bytes:
        line: Json = {
            "at": round(self._wall_clock(), 3),
            "event": "call",
            "id": record.call_id,
            "route": record.route[:_ROUTE_CHARS_MAX],
            "key": record.key,
            "ladder": record.ladder,
            "rung": rung,
            "attempts": [
                {"rung": attempt.rung.name, "cause": attempt.cause or "ok"}
                for attempt in record.attempts
            ],
            "stream": record.stream,
            "status": record.status,
            "error": record.error or None,
            "cache": record.cache,
            "total_ms": round(record.total_s * 1000, 3),
        }
        if record.inputs:
            line["inputs"], line["cached_inputs"] = record.inputs, record.cached_inputs
        if record.first_token_s is not None:
            line["first_token_ms"] = round(record.first_token_s * 1000, 3)
        if record.usage is not None:
            line["input_tokens"] = record.usage.input_tokens
            line["output_tokens"] = record.usage.output_tokens
            line["estimated"] = record.usage.estimated
            line["cost_usd"] = to_usd(record.nanousd)
        if record.client_request_id:
            line["client_request_id"] = record.client_request_id
        return _json_line(line)


def _outcome(error: str) -> str:
    if not error:
        return "ok"
    return error if _OUTCOME.fullmatch(error) else "other"


def _json_line(line: Json) -> bytes:
    try:
        return orjson.dumps(line, option=orjson.OPT_APPEND_NEWLINE)
    except orjson.JSONEncodeError:
        # Headers and paths may hold bytes that are no text; Python keeps them as lone surrogates.
        plain = {name: _plain(value) for name, value in line.items()}
        return json.dumps(plain, separators=(",", ":")).encode() + b"\n"


def _plain(value: Any) -> Any:
    return value.encode("utf-8", "replace").decode() if isinstance(value, str) else value


def write_to_stderr(line: bytes) -> None:
    sys.stderr.buffer.write(line)
    sys.stderr.buffer.flush()
