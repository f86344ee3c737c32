"""Routes for what was used: one's own for every key, everybody's for an admin; doubts resolved.

Money is shown twice: as numbers of dollars for people, and exactly in nano-dollars, of which
`nano_usd` is what is settled. What processes hold that are not heard of any more is in
`silent_nano_usd`, by key: nobody knows of which rung.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, date, datetime
from typing import NamedTuple

from router.api.asked import Query, read_struct
from router.api.exchange import Exchange
from router.api.reply import Reply, json_reply
from router.config import schema
from router.errors import BadRequest, Forbidden, UnknownKey
from router.store.base import RowKey, Totals
from router.types import NANO_USD, Json

GROUPS = ("key", "ladder", "rung", "day")
_LINES_MAX = 100_000
# The last day that has a date.
_FOREVER = int((date.max - date(1970, 1, 1)).total_seconds())


class Resolution(schema.Section, frozen=True, kw_only=True):
    """The body of POST /router/v1/usage/resolve. Without a `key`: everybody's doubts."""

    key: schema.KeyName | None = None
    charge: bool


class Line(NamedTuple):
    """One line of usage; `held`: nano-dollars of calls under way."""

    group: tuple[str, ...]
    totals: Totals
    held: int = 0


async def show_usage(exchange: Exchange) -> Reply:
    """GET /router/v1/usage?group=key,ladder,rung,day&key=NAME&since=DAY&until=DAY."""
    caller, query = exchange.key, Query(exchange, ("group", "key", "since", "until"))
    if caller.session:
        raise Forbidden("a session may not read what its key has used; ask with the key itself")
    group = query.choices("group", "key", GROUPS)
    key = query.text("key") or (None if caller.admin else caller.name)
    if key != caller.name and not caller.admin:
        raise Forbidden("only a key with admin = true may read what other keys have used")
    since, until = query.day("since", 0), query.day("until", _FOREVER)
    if until <= since:
        raise BadRequest(
            "until: must be a later day than since; it is not shown itself",
            code="invalid_value",
            param="until",
        )
    lines = await _lines(exchange, group, key, since, until)
    if len(lines) > _LINES_MAX:
        raise BadRequest(
            f"there are more than {_LINES_MAX} lines; ask for less with key, since and until, or "
            "for fewer groups",
            code="too_many_lines",
        )
    silent = await exchange.shared.store.silent()
    body = {
        "object": "list",
        "group": group,
        "data": [_row(group, line) for line in lines],
        "silent_nano_usd": {name: nano for name, nano in silent.items() if key in (None, name)},
    }
    return json_reply(body)


async def resolve(exchange: Exchange) -> Reply:
    """POST /router/v1/usage/resolve: charge what is in doubt, or let it go."""
    wanted = read_struct(Resolution, await exchange.read_json())
    if wanted.key is not None:
        await _require_known(exchange, wanted.key)
    resolved = await exchange.shared.store.resolve(wanted.key, charge=wanted.charge)
    body = {
        "object": "resolution",
        "key": wanted.key,
        "charged": wanted.charge,
        "resolved_usd": resolved / NANO_USD,
        "nano_usd": resolved,
    }
    return json_reply(body)


async def _require_known(exchange: Exchange, key: str) -> None:
    """A slip in a name must not look like a doubt that is cleared."""
    shared = exchange.shared
    if shared.keys.file_key(key) is not None or await shared.store.get_key(key) is not None:
        return
    # A key that is gone may have left doubts.
    if not await shared.store.usage(("key",), key=key, since=0, until=_FOREVER):
        raise UnknownKey(f"no key is named {key!r}, and none of that name was ever used")


async def _lines(
    exchange: Exchange, group: Sequence[str], key: str | None, since: int, until: int
) -> list[Line]:
    """What all processes reported, and what the calls of this daemon hold beside it."""
    shared = exchange.shared
    # So that what has just been used is in it.
    await shared.books.flush()
    found = {
        line.group: Line(line.group, line.totals)
        for line in await shared.store.usage(group, key=key, since=since, until=until)
    }
    gathered = await shared.events.gather("held", {})
    for answer in gathered.answers:
        for row, held in answer["held"]:
            named = dict(zip(RowKey._fields, row, strict=True))
            if key in (None, named["key"]) and since <= named["day"] < until:
                values = tuple(
                    _date(named["day"]) if name == "day" else named[name] for name in group
                )
                line = found.get(values, Line(values, Totals()))
                found[values] = line._replace(held=line.held + held)
    return [found[values] for values in sorted(found)]


def _row(group: Sequence[str], line: Line) -> Json:
    totals = line.totals
    nano = {
        "settled": totals.settled,
        "held": line.held,
        "in_doubt": totals.in_doubt,
        "overrun": totals.overrun,
        "estimated": totals.estimated,
    }
    return {
        **dict(zip(group, line.group, strict=True)),
        "requests": totals.requests,
        "input_tokens": totals.input_tokens,
        "output_tokens": totals.output_tokens,
        **{f"{name}_usd": amount / NANO_USD for name, amount in nano.items()},
        "nano_usd": totals.settled,
        **{f"{name}_nano_usd": amount for name, amount in nano.items() if name != "settled"},
    }


def _date(day: int) -> str:
    return datetime.fromtimestamp(day, UTC).date().isoformat()
