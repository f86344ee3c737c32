"""What is wrong with one file: every problem, each with its line, so that one look mends it all.

A problem refuses the file, a warning does not. Each reads `FILE:LINE: setting: what; how to mend`.
Values that may be secret are never shown.
"""

from __future__ import annotations

from collections.abc import Iterable

from router.config.locate import Lines, Path, show
from router.errors import ConfigError

# What is shown is read by a person: a file of a thousand faults has one cause.
_PROBLEMS_MAX = 100


class Report:
    """Gathers problems and warnings while a file is read.

    A text without a `source` is no file of the user's, so no line of it is told. `is_for_service`:
    the file is for a service elsewhere, and what only that has is not missed.
    """

    def __init__(self, source: str, lines: Lines, *, is_for_service: bool = False) -> None:
        self._source = source
        self._lines = lines
        self.is_for_service = is_for_service
        self._problems: list[tuple[int, str]] = []
        self._warnings: list[tuple[int, str]] = []

    def problem(self, path: Path, text: str) -> None:
        self._problems.append(self._entry(path, text))

    def warning(self, path: Path, text: str) -> None:
        self._warnings.append(self._entry(path, text))

    @property
    def problem_count(self) -> int:
        return len(self._problems)

    @property
    def warnings(self) -> tuple[str, ...]:
        return tuple(text for _, text in sorted(self._warnings, key=_line))

    def raise_problems(self) -> None:
        """Raises ConfigError with all problems in the order of the file, if there are any."""
        if self._problems:
            texts = [text for _, text in sorted(self._problems, key=_line)]
            more = len(texts) - _PROBLEMS_MAX
            if more > 0:
                texts[_PROBLEMS_MAX:] = [f"{self._source}: and {more} more problems"]
            raise ConfigError(texts)

    def _entry(self, path: Path, text: str) -> tuple[int, str]:
        line = self._lines.line(path)
        where = f"{show(path)}: " if path else ""
        place = f"{self._source}:{line}: " if self._source else ""
        return line, f"{place}{where}{text}"


def _line(entry: tuple[int, str]) -> int:
    return entry[0]


def listed(names: Iterable[str]) -> str:
    """Names for a sentence: `"a", "b"`."""
    return ", ".join(f'"{name}"' for name in names)
