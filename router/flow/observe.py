"""What is known of a call when it has ended: one JSON log line, and counters for the metrics.

Never a prompt, a key's secret or a token, and no label of a metric from a client's text: ladders
and rungs are the configuration's names, outcomes our own words. The counters are plain numbers; a
collector turns them into Prometheus samples when somebody scrapes (`api/metrics.py`), since a
client library's `labels().observe()` costs over a microsecond.

`Observer.record` never raises, and counts before it writes: no log line is worth an answer. Lines
are written some at a time and in order; who kills the process loses those of the last moments, and
no more than `_LINES_BYTES_MAX` of them.
"""

from __future__ import annotations

import json
import re
import select
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
# What one write puts into a pipe whole, so that no other worker's line comes between.
_LINES_BYTES_MAX = select.PIPE_BUF
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
    `goes_on`: its caller has left and its work has not ended; whoever that goes on for has its line
    written.
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
    goes_on: bool = False
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
        self.task = str(call.ladder.task)
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

    def add(self, other: Histogram) -> None:
        """`other` has the same bounds."""
        self.counts = [mine + more for mine, more in zip(self.counts, other.counts, strict=True)]
        self.total += other.total

    @property
    def count(self) -> int:
        return sum(self.counts)


class _Kind:
    """What calls that ended alike have in common, counted once; the metrics show it in many ways.

    `last` is the rung that answered, or the last one tried.
    """

    __slots__ = ("durations", "first_tokens", "input_tokens", "last", "output_tokens")

    def __init__(self, last: Rung | None) -> None:
        self.last = last
        self.durations = Histogram()
        self.first_tokens = Histogram()
        self.input_tokens = Histogram(TOKEN_BUCKETS)
        self.output_tokens = Histogram(TOKEN_BUCKETS)

    def count(self, record: Record) -> None:
        self.durations.observe(record.total_s)
        if record.first_token_s is not None:
            self.first_tokens.observe(record.first_token_s)
        usage = record.usage
        if usage is not None:
            self.input_tokens.observe(usage.input_tokens)
            self.output_tokens.observe(usage.output_tokens)


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

    def add(self, ladder: str, task: str, outcome: str, last: Rung, kind: _Kind) -> None:
        labels = (task, last.backend, ladder, last.model)
        self.durations[*labels, "" if outcome == "ok" else outcome].add(kind.durations)
        if kind.first_tokens.count:
            self.first_chunks[labels].add(kind.first_tokens)
        if kind.input_tokens.count:
            self.tokens[*labels, "input"].add(kind.input_tokens)
            if task == Task.CHAT.value:
                self.tokens[*labels, "output"].add(kind.output_tokens)


class Observer:
    """Takes a record of every call. `write_lines` gets whole lines of JSON.

    `later` is asked to call back when lines that wait have waited for long enough; without it none
    waits.
    """

    def __init__(
        self,
        write_lines: Callable[[bytes], None],
        wall_clock: Callable[[], float],
        later: Callable[[Callable[[], None]], object] | None = None,
    ) -> None:
        self._write_lines = write_lines
        self._wall_clock = wall_clock
        self._later = later
        self._lines: list[bytes] = []
        self._lines_bytes = 0
        self._is_due = False
        # By ladder, task, outcome, the rung that answered and the last one tried.
        self._kinds: dict[tuple[str, str, str, str, str], _Kind] = {}
        self.attempts: dict[tuple[str, str], int] = defaultdict(int)
        self.in_flight = 0
        self.lines_lost = 0

    def record(self, record: Record) -> None:
        """Count a call that has ended, then write its line. Never raises."""
        rung = record.rung.name if record.rung is not None else ""
        self._count(record, rung)
        self._put(self._line(record, rung))

    def flush(self) -> None:
        """Write the lines that wait. Never raises."""
        lines, self._lines, self._lines_bytes = self._lines, [], 0
        if not lines:
            return
        try:
            self._write_lines(b"".join(lines))
        except (OSError, ValueError):
            # The log's reader is gone, or its disk is full.
            self.lines_lost += len(lines)

    @property
    def calls(self) -> dict[tuple[str, str, str], int]:
        """Calls by ladder, rung and outcome."""
        found: dict[tuple[str, str, str], int] = defaultdict(int)
        for (ladder, _, outcome, rung, _), kind in self._kinds.items():
            found[ladder, rung, outcome] += kind.durations.count
        return found

    @property
    def tokens(self) -> dict[tuple[str, str, str], int]:
        """Tokens by ladder, rung, and whether they went in or out."""
        found: dict[tuple[str, str, str], int] = defaultdict(int)
        for (ladder, _, _, rung, _), kind in self._kinds.items():
            if kind.input_tokens.count:
                found[ladder, rung, "input"] += int(kind.input_tokens.total)
                found[ladder, rung, "output"] += int(kind.output_tokens.total)
        return found

    @property
    def durations(self) -> dict[tuple[str, str], Histogram]:
        """How long calls took, by ladder and task."""
        found: dict[tuple[str, str], Histogram] = defaultdict(Histogram)
        for (ladder, task, *_), kind in self._kinds.items():
            if ladder:
                found[ladder, task].add(kind.durations)
        return found

    @property
    def first_tokens(self) -> dict[tuple[str, str], Histogram]:
        """When streams said their first, by ladder and rung."""
        found: dict[tuple[str, str], Histogram] = defaultdict(Histogram)
        for (ladder, _, _, rung, _), kind in self._kinds.items():
            if kind.first_tokens.count:
                found[ladder, rung].add(kind.first_tokens)
        return found

    @property
    def gen_ai(self) -> GenAiCounts:
        counts = GenAiCounts()
        for (ladder, task, outcome, _, _), kind in self._kinds.items():
            if kind.last is not None:
                counts.add(ladder, task, outcome, kind.last, kind)
        return counts

    def _count(self, record: Record, rung: str) -> None:
        attempts = record.attempts
        for attempt in attempts:
            self.attempts[attempt.rung.name, attempt.cause or "ok"] += 1
        last = record.rung or (attempts[-1].rung if attempts else None)
        if not attempts and record.cache in _WITHOUT_MODEL:
            last = None
        tried = "" if last is None else last.name
        outcome = _outcome(record.error) if record.error else "ok"
        key = (record.ladder, record.task, outcome, rung, tried)
        kind = self._kinds.get(key)
        if kind is None:
            kind = self._kinds[key] = _Kind(last)
        kind.count(record)

    def _put(self, line: bytes) -> None:
        """Have a line written, soon and behind those before it."""
        size = len(line)
        if self._lines_bytes + size > _LINES_BYTES_MAX:
            self.flush()
        self._lines.append(line)
        self._lines_bytes += size
        if self._later is None:
            self.flush()
        elif not self._is_due:
            self._is_due = True
            self._later(self._when_due)

    def _when_due(self) -> None:
        self._is_due = False
        self.flush()

    def _line(self, record: Record, rung: str) -> bytes:
        usage = record.usage
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
        if usage is not None:
            line["input_tokens"] = usage.input_tokens
            line["output_tokens"] = usage.output_tokens
            line["estimated"] = usage.estimated
            line["cost_usd"] = to_usd(record.nanousd)
        if record.client_request_id:
            line["client_request_id"] = record.client_request_id
        return _json_line(line)


def _outcome(error: str) -> str:
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


def write_to_stderr(lines: bytes) -> None:
    sys.stderr.buffer.write(lines)
    sys.stderr.buffer.flush()
