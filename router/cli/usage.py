"""`rungway usage`: what keys have used, and what is in doubt after a crash."""

from __future__ import annotations

import argparse
from urllib.parse import urlencode

import orjson

from router.cli.main import DONE
from router.cli.remote import DaemonRefused, DaemonUnreachable, ask, told
from router.cli.table import table
from router.core.accounts import shown_usd
from router.types import Json

_COUNTS = ("requests", "input_tokens", "output_tokens")
# The columns of money, and where their exact amounts stand.
_MONEY = {
    "settled": "nano_usd",
    "held": "held_nano_usd",
    "in_doubt": "in_doubt_nano_usd",
    "overrun": "overrun_nano_usd",
    "estimated": "estimated_nano_usd",
}


def run(options: argparse.Namespace) -> int:
    try:
        return _resolve(options) if options.verb == "resolve" else _show(options)
    except (DaemonRefused, DaemonUnreachable) as error:
        return told(error)


def _show(options: argparse.Namespace) -> int:
    wanted = {name: getattr(options, name) for name in ("group", "key", "since", "until")}
    query = urlencode({name: value for name, value in wanted.items() if value})
    usage = ask("GET", f"/router/v1/usage?{query}", options.url, options.config)
    if options.json:
        print(orjson.dumps(usage).decode())
        return DONE
    head = [*usage["group"], *_COUNTS, *(f"{name}_usd" for name in _MONEY)]
    rows = [_cells(usage["group"], line) for line in usage["data"]]
    for line in table([name.upper() for name in head], rows, len(_COUNTS) + len(_MONEY)):
        print(line)
    for name, nano in usage["silent_nano_usd"].items():
        print(
            f"{name}: {shown_usd(nano)} USD more are with processes that are not heard of; they "
            "come back when these start again, or by `rungway usage resolve`"
        )
    return DONE


def _cells(group: list[str], line: Json) -> list[str]:
    return [
        *(line[name] or "-" for name in group),
        *(str(line[name]) for name in _COUNTS),
        *(shown_usd(line[exact]) for exact in _MONEY.values()),
    ]


def _resolve(options: argparse.Namespace) -> int:
    body = {"charge": options.charge, **({"key": options.name} if options.name else {})}
    done = ask("POST", "/router/v1/usage/resolve", options.url, options.config, body)
    if options.json:
        print(orjson.dumps(done).decode())
    else:
        how = "charged" if options.charge else "let go"
        print(f"{shown_usd(done['nano_usd'])} USD that were in doubt are {how}")
    return DONE
