"""What an operator's request asks for: JSON bodies read by the schema's own rules, and queries.

A fault is told as one of the configuration is: the path of the setting, what is wrong, the mend.
"""

from __future__ import annotations

from collections.abc import Iterable
from datetime import UTC, date, datetime
from typing import Any, TypeVar
from urllib.parse import parse_qsl

import msgspec

from router.api.exchange import Exchange
from router.config.locate import Lines
from router.config.reading import read_table, unknown
from router.config.report import Report
from router.errors import BadRequest, ConfigError
from router.types import Json

S = TypeVar("S", bound=msgspec.Struct)

_FAULTS_TOLD_MAX = 10
# Each that is not known is compared with those that are.
_SETTINGS_MAX = 100
_NAMES_MAX = 100


def new_report() -> Report:
    return Report("", Lines(""))


def read_struct(kind: type[S], body: object, report: Report | None = None) -> S:
    """The body as a value of the schema; `null` is left out. Raises BadRequest.

    With a `report`, what it holds already is told too.
    """
    if not isinstance(body, dict):
        raise BadRequest("the request body must be a JSON object", code="invalid_type")
    report = report or new_report()
    found = read_table(kind, _without_nulls(body), (), report, lambda *_: None)
    check(report)
    assert found is not None, "a value that cannot be made has a problem"
    return found


def check(report: Report) -> None:
    """Raises BadRequest with the first problems, if there are any."""
    try:
        report.raise_problems()
    except ConfigError as error:
        told = error.problems[:_FAULTS_TOLD_MAX]
        param = told[0].partition(": ")[0]
        raise BadRequest("; ".join(told), code="invalid_value", param=param) from error


class Query:
    """The query of a request: each value text, each name known, or BadRequest."""

    def __init__(self, exchange: Exchange, known: Iterable[str]) -> None:
        asked = exchange.request.target.partition("?")[2].partition("#")[0]
        # Of a name that stands twice, the first counts.
        query = dict(reversed(parse_qsl(asked, keep_blank_values=True)))
        known = list(known)
        for name in query:
            if name not in known:
                raise BadRequest(f"{name[:40]}: {unknown('parameter', name[:40], known)}")
        self._values = {name: query[name] for name in query}

    def text(self, name: str, default: str = "") -> str:
        return self._values.get(name, default)

    def number(self, name: str, default: int, low: int, high: int) -> int:
        value = self.text(name)
        if not value:
            return default
        # More digits than the bound has are not worth reading.
        if not (value.isascii() and value.isdigit() and len(value) <= len(str(high))):
            raise _wrong(name, f"a whole number from {low} to {high}")
        if not low <= int(value) <= high:
            raise _wrong(name, f"a whole number from {low} to {high}")
        return int(value)

    def choices(self, name: str, default: str, known: Iterable[str]) -> list[str]:
        """Some of these words, separated by commas, each once."""
        known = list(known)
        found = (self.text(name) or default).split(",", _NAMES_MAX)
        for one in found:
            if one not in known:
                raise BadRequest(f"{name}: {unknown('group', one[:40], known)}", param=name)
        if len(set(found)) != len(found):
            raise _wrong(name, "each of its words once")
        return found

    def day(self, name: str, default: int) -> int:
        """The start of a UTC day such as 2026-11-21, in unix seconds."""
        value = self.text(name)
        if not value:
            return default
        try:
            found = date.fromisoformat(value) if len(value) == len("2026-11-21") else None
        except ValueError:
            found = None
        if found is None or not 1970 <= found.year < 9999:
            raise _wrong(name, "a UTC day such as 2026-11-21")
        return int(datetime(found.year, found.month, found.day, tzinfo=UTC).timestamp())


def _wrong(name: str, wanted: str) -> BadRequest:
    return BadRequest(f"{name}: is not {wanted}", code="invalid_value", param=name)


def _without_nulls(body: Json) -> Json:
    """TOML has no null, and JSON's means what leaving out means."""
    if len(body) > _SETTINGS_MAX:
        raise BadRequest(f"an object has more than {_SETTINGS_MAX} settings", code="invalid_value")
    found: Json = {}
    for name, value in body.items():
        inner: Any = _without_nulls(value) if isinstance(value, dict) else value
        if inner is not None:
            found[name] = inner
    return found
