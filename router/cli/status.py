"""`rungway status`: the board of the running daemon."""

from __future__ import annotations

import argparse
import sys

import orjson

from router.cli.main import DONE, FAILED
from router.cli.remote import DaemonRefused, DaemonUnreachable, ask


def run(options: argparse.Namespace) -> int:
    try:
        status = ask("GET", "/router/v1/status", options.url, options.config)
    except (DaemonRefused, DaemonUnreachable) as error:
        print(f"rungway: {error}", file=sys.stderr)
        return FAILED
    if options.json:
        print(orjson.dumps(status).decode())
        return DONE
    for name, ladder in status["ladders"].items():
        print(f"ladder {name}")
        for rung in ladder["rungs"]:
            limit = "" if rung["limit"] is None else f" of {rung['limit']}"
            reason = "" if rung["reason"] is None else f"  {rung['reason']}"
            print(
                f"  {rung['rung']}  {rung['state']}  {rung['in_flight']}{limit} in flight{reason}"
            )
    return DONE
