"""The figures as RESULTS.md: what was aimed at and met or missed, then all that was measured."""

from __future__ import annotations

import contextlib
import os
import platform
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.figures import Figures, number, told
from bench.proxies import Proxy

OURS = "rungway"

COST_TITLES = {
    "chat": "chat, not streamed",
    "chat-uncached": "… without a look into the cache",
    "hit": "… from the cache",
    "stream": "a stream of one event",
    "stream-uncached": "… without a look into the cache",
    "events": "an event of a long stream (200 streams, 50 events/s each)",
    "events-uncached": "… without a look into the cache",
    "embeddings": "embeddings, one input of 384 dimensions",
}
OTHER_TITLES = {
    "latency-p50": "added latency at 200/s, p50, µs",
    "latency-p99": "added latency at 200/s, p99, µs",
    "idle": "memory, idle, MB",
    "open-stream": "memory of an open stream, KB",
    "start": "start to first answer, s",
}
GROWTH_TITLES = {
    "keys": "keys in the state",
    "rungs": "rungs in the ladders",
    "streams": "streams open beside it",
    "entries": "entries in the cache",
    "workers": "workers (64 connections)",
}
# What flat is: the growth rows are ratios of two readings, each with its noise.
_FLAT = 1.10
_NOISY = 0.05


@dataclass(frozen=True)
class Verdict:
    """One aim: what was found, what was to be, and whether it is."""

    what: str
    found: str
    aim: str
    is_met: bool | None

    def row(self) -> str:
        told_met = {True: "met", False: "**missed**", None: "not measured"}[self.is_met]
        return f"| {self.what} | {self.found} | {self.aim} | {told_met} |"


def report(figures: Figures, proxies: Sequence[Proxy], runs: int) -> str:
    names = [proxy.name for proxy in proxies]
    parts = [
        "# What a call costs",
        "",
        f"Written by `make bench`: medians of {runs} runs, the lowest and the highest in brackets."
        " Rungway has everything on: a limited key, prices, a ladder, a look into the cache,"
        " metrics, the log. README.md here says how each figure is taken.",
        "",
        "![CPU time of a call](results.svg)",
        "",
        "## Aims",
        "",
        "| figure | Rungway | aim | |",
        "|---|---|---|---|",
        *(verdict.row() for verdict in verdicts(figures)),
        "",
        "## CPU time, µs",
        "",
        *_table(figures, COST_TITLES, names),
        "",
        "## Latency, memory, start",
        "",
        *_table(figures, OTHER_TITLES, names),
        "",
        "## Growth: CPU µs of a chat call",
        "",
        *_growth(figures),
        "",
        "## How far to trust this",
        "",
        *_trust(figures),
        "",
        "## Not measured",
        "",
        *(f"- {line}" for line in (*figures.not_measured, *_NEVER_MEASURED)),
        "",
        "## Versions",
        "",
        *(f"- {proxy.name} {proxy.version}" for proxy in proxies if "," not in proxy.name),
        f"- {machine()}",
        "",
    ]
    return "\n".join(parts)


_NEVER_MEASURED = (
    "TLS, HTTP/2, a network: all is plain HTTP/1.1 over loopback",
    "what routers decide: every proxy has one upstream that never fails",
    "Envoy, Traefik, Caddy, which only pass bytes through like nginx and haproxy; Portkey",
)


# --- aims -----------------------------------------------------------------------------------------


def verdicts(figures: Figures) -> list[Verdict]:
    found = [
        _against(figures, "chat", "vllm-router", 1.0),
        _against(figures, "chat", "smg", 0.5),
        _against(figures, "chat", "tensorzero", 0.5),
        _against(figures, "chat", "litellm", 0.01),
        _against(figures, "stream", "vllm-router", 0.6),
        _against(figures, "events", "vllm-router", 1.1),
        _against(figures, "embeddings", "vllm-router", 1.1),
        _below(
            "cache hit, chat, against a miss",
            _ratio(figures.median("hit", OURS), figures.median("chat", OURS)),
            0.7,
            "× the miss",
        ),
        _below("added latency at 200/s, p50", figures.median("latency-p50", OURS), 300, "µs"),
        _below("added latency at 200/s, p99", figures.median("latency-p99", OURS), 1_000, "µs"),
        _below("memory, idle", figures.median("idle", OURS), 45, "MB"),
        _below("memory of an open stream", figures.median("open-stream", OURS), 20, "KB"),
        _below("start to first answer", figures.median("start", OURS), 0.5, "s"),
    ]
    for row in ("keys", "rungs", "streams", "entries"):
        sizes = figures.columns(row)
        what = f"a call with {sizes[-1] if sizes else 'many'} {GROWTH_TITLES[row]}"
        found.append(_below(what, growth(figures, row), _FLAT, "× the call with 1"))
    found.append(_below("two workers, a call", growth(figures, "workers"), 1.15, "× one worker's"))
    for row, what in (("split-connections", "connections"), ("split-cpu", "load")):
        share = figures.median(row, "2")
        text = "–" if share is None else f"{share:.0%}"
        is_met = None if share is None else share >= 0.4
        found.append(Verdict(f"two workers, the smaller part of the {what}", text, "≥ 40%", is_met))
    return found


def growth(figures: Figures, row: str) -> float | None:
    """The median of the runs' own ratios: the two readings of a run are minutes apart at most."""
    columns = figures.columns(row)
    if len(columns) < 2:
        return None
    pairs = zip(figures.of(row, columns[0]), figures.of(row, columns[-1]), strict=False)
    return statistics.median(large / small for small, large in pairs)


def _against(figures: Figures, row: str, peer: str, factor: float) -> Verdict:
    ours, theirs = figures.median(row, OURS), figures.median(row, peer)
    ratio = _ratio(ours, theirs)
    title = f"{COST_TITLES[row].partition(' (')[0]}, against {peer}"
    aim = f"≤ {factor:g} ×" if theirs is None else f"≤ {factor:g} × {number(theirs)} µs"
    if ratio is None:
        return Verdict(title, "–", aim, None)
    assert ours is not None
    return Verdict(title, f"{number(ours)} µs, {ratio:.2g} ×", aim, ratio <= factor)


def _below(what: str, value: float | None, most: float, unit: str) -> Verdict:
    aim = f"≤ {most:g} {unit}"
    if value is None:
        return Verdict(what, "–", aim, None)
    return Verdict(what, f"{number(value)} {unit}", aim, value <= most)


def _ratio(value: float | None, base: float | None) -> float | None:
    return None if value is None or base is None else value / base


# --- tables ---------------------------------------------------------------------------------------


def _table(figures: Figures, titles: dict[str, str], names: Sequence[str]) -> list[str]:
    """One row a proxy: the proxies are many, the figures few."""
    rows = [row for row in titles if figures.columns(row)]
    if not rows:
        return ["(not asked for)"]
    lines = [
        "| | " + " | ".join(titles[row] for row in rows) + " |",
        "|---" * (len(rows) + 1) + "|",
    ]
    for name in names:
        cells = " | ".join(told(figures.of(row, name)) for row in rows)
        lines.append(f"| {name} | {cells} |")
    return lines


def _growth(figures: Figures) -> list[str]:
    rows = [row for row in GROWTH_TITLES if figures.columns(row)]
    lines = [
        "| | from | to | µs at the first | µs at the last | factor |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        first, last = figures.columns(row)[0], figures.columns(row)[-1]
        cells = f"{told(figures.of(row, first))} | {told(figures.of(row, last))}"
        factor = growth(figures, row)
        lines.append(
            f"| {GROWTH_TITLES[row]} | {first} | {last} | {cells}"
            f" | {'–' if factor is None else f'{factor:.2f}'} |"
        )
    return lines if rows else ["(not asked for)"]


def _trust(figures: Figures) -> Iterable[str]:
    foreign = figures.foreign or [0.0]
    noisy = sum(share > _NOISY for share in foreign)
    yield (
        f"Other processes had {statistics.median(foreign):.1%} of the measured core (median),"
        f" {max(foreign):.1%} at most; {noisy} of {len(foreign)} readings had more than"
        f" {_NOISY:.0%}" + (": **measure again on a quiet machine.**" if noisy else ".")
    )
    idle = {
        f"{row}, {name}": statistics.median(shares)
        for row, columns in figures.busy.items()
        for name, shares in columns.items()
        if statistics.median(shares) < 0.9 and not row.startswith("events")
    }
    if idle:
        told_idle = "; ".join(f"{what} {share:.0%}" for what, share in idle.items())
        yield ""
        yield (
            "The load could not fill the core everywhere, which makes a call a little dearer"
            f" there (how much of the core was used): {told_idle}."
        )


def machine() -> str:
    model = platform.machine()
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                model = line.partition(":")[2].strip()
                break
    load = os.getloadavg()[1]
    return (
        f"{model}, {os.cpu_count()} cores, Linux {platform.release().partition('-')[0]};"
        f" load average over five minutes at the end: {load:.1f}"
    )
