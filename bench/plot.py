"""The CPU time of a call, drawn: one panel a kind of call, one bar a proxy, on a log scale."""

from __future__ import annotations

import math
from html import escape

from bench.figures import Figures, number

_PANELS = {
    "chat": "chat, not streamed",
    "stream": "a stream of one event",
    "events": "an event of a long stream",
    "embeddings": "embeddings, one input",
}
_WIDTH, _PANEL_WIDTH, _LABEL_WIDTH, _BAR_WIDTH = 860, 430, 110, 240
_TOP, _TITLE, _BAR, _GAP, _PANEL_GAP = 48, 26, 16, 5, 26
_OURS, _THEIRS, _INK = "#c2410c", "#94a3b8", "#1e293b"
_FONT = "font-family='system-ui, sans-serif'"


def plot(figures: Figures) -> str:
    panels = {row: _sorted(figures, row) for row in _PANELS}
    heights = [_TITLE + len(bars) * (_BAR + _GAP) + _PANEL_GAP for bars in panels.values()]
    upper, lower = max(heights[:2]), max(heights[2:])
    height = _TOP + upper + lower
    parts = [
        f"<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 {_WIDTH} {height}'"
        f" width='{_WIDTH}' height='{height}' {_FONT} font-size='12' fill='{_INK}'>",
        f"<rect width='{_WIDTH}' height='{height}' fill='#ffffff'/>",
        "<text x='16' y='26' font-size='16' font-weight='600'>CPU µs, the least is best"
        " (logarithmic)</text>",
    ]
    for place, (row, bars) in enumerate(panels.items()):
        x = 16 + place % 2 * _PANEL_WIDTH
        y = _TOP + place // 2 * upper
        parts += _panel(_PANELS[row], bars, x, y)
    return "\n".join([*parts, "</svg>", ""])


def _sorted(figures: Figures, row: str) -> list[tuple[str, float]]:
    found = [(name, figures.median(row, name)) for name in figures.columns(row)]
    return sorted(((n, v) for n, v in found if v is not None), key=lambda bar: bar[1])


def _panel(title: str, bars: list[tuple[str, float]], x: int, y: int) -> list[str]:
    parts = [f"<text x='{x}' y='{y + 14}' font-weight='600'>{escape(title)}</text>"]
    if not bars:
        return [*parts, f"<text x='{x}' y='{y + 34}'>not measured</text>"]
    least = math.log10(bars[0][1] / 2)
    scale = _BAR_WIDTH / max(0.1, math.log10(bars[-1][1]) - least)
    for place, (name, value) in enumerate(bars):
        top = y + _TITLE + place * (_BAR + _GAP)
        width = (math.log10(value) - least) * scale
        colour = _OURS if name.startswith("rungway") else _THEIRS
        left, base = x + _LABEL_WIDTH, top + 12
        parts += [
            f"<text x='{left - 6}' y='{base}' text-anchor='end'>{escape(name)}</text>",
            f"<rect x='{left}' y='{top}' width='{width:.1f}' height='{_BAR}' fill='{colour}'/>",
            f"<text x='{left + width + 5:.1f}' y='{base}'>{number(value)}</text>",
        ]
    return parts
