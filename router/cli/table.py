"""Tables for a terminal: columns as wide as their widest cell, numbers to the right."""

from __future__ import annotations

from collections.abc import Iterator, Sequence


def table(head: Sequence[str], rows: Sequence[Sequence[str]], numbers: int = 0) -> Iterator[str]:
    """The lines of a table; its last `numbers` columns are numbers."""
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    first_number = len(head) - numbers
    for row in (head, *rows):
        cells = [
            cell.rjust(width) if place >= first_number else cell.ljust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        yield "  ".join(cells).rstrip()
