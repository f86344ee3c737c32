"""What is known of a call when it has ended: one JSON log line, and counters for the metrics.

Never a prompt, a key's secret or a token. The counters are plain numbers; a collector turns them
into Prometheus samples when somebody scrapes (`api/metrics.py`), since a client library's
`labels().observe()` costs over a microsecond.
"""

from __future__ import annotations

import sys
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field

import orjson

from router.types import Call, ChatCall, Json, Rung, Usage

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


@dataclass(slots=True)
class AttemptRecord:
    """One try of one rung; `cause` "" where it answered."""

    rung: Rung
    cause: str = ""


@dataclass(slots=True)
class Record:
    """All that is noted of one call. Times are seconds since the call arrived."""

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
    first_token_s: float | None = None
    total_s: float = 0.0
    status: int = 0
    error: str = ""

    def of_call(self, call: Call) -> None:
        self.key, self.ladder = call.key.name, call.ladder.name
        self.task = call.ladder.task.value
        self.stream = isinstance(call, ChatCall) and call.stream


class Histogram:
    """Counts by bucket, Prometheus-style; `observe` is one bisection."""

    __slots__ = ("counts", "total")

    def __init__(self) -> None:
        self.counts = [0] * (len(DURATION_BUCKETS_S) + 1)
        self.total = 0.0

    def observe(self, seconds: float) -> None:
        self.counts[bisect_left(DURATION_BUCKETS_S, seconds)] += 1
        self.total += seconds


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
        self.in_flight = 0

    def record(self, record: Record) -> None:
        rung = record.rung.name if record.rung is not None else ""
        outcome = record.error or "ok"
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
        self._write_line(self._line(record, rung))

    def _line(self, record: Record, rung: str) -> bytes:
        line: Json = {
            "at": round(self._wall_clock(), 3),
            "event": "call",
            "id": record.call_id,
            "route": record.route,
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
            "cache": "bypass",
            "total_ms": round(record.total_s * 1000, 3),
        }
        if record.first_token_s is not None:
            line["first_token_ms"] = round(record.first_token_s * 1000, 3)
        if record.usage is not None:
            line["input_tokens"] = record.usage.input_tokens
            line["output_tokens"] = record.usage.output_tokens
            line["estimated"] = record.usage.estimated
        if record.client_request_id:
            line["client_request_id"] = record.client_request_id
        return orjson.dumps(line, option=orjson.OPT_APPEND_NEWLINE)


def write_to_stderr(line: bytes) -> None:
    sys.stderr.buffer.write(line)
    sys.stderr.buffer.flush()
