"""`rungway status`: the board of the running daemon."""

from __future__ import annotations

import argparse
import sys

import orjson

from router.cli.main import DONE, FAILED
from router.cli.remote import DaemonRefused, DaemonUnreachable, ask
from router.types import Json


def run(options: argparse.Namespace) -> int:
    try:
        status = ask("GET", "/router/v1/status", options.url, options.config)
    except (DaemonRefused, DaemonUnreachable) as error:
        print(f"rungway: {error}", file=sys.stderr)
        return FAILED
    if options.json:
        print(orjson.dumps(status).decode())
        return DONE
    workers = status.get("workers")
    if workers is not None and workers["heard"] < workers["all"]:
        print(f"{workers['heard']} of {workers['all']} workers answered in time")
    for name, ladder in status["ladders"].items():
        print(f"ladder {name}")
        for rung in ladder["rungs"]:
            print(f"  {rung['rung']}  {rung['state']}  {', '.join(_facts(rung))}")
    return DONE


def _facts(rung: Json) -> list[str]:
    limit = "" if rung["limit"] is None else f" of {rung['limit']}"
    facts = [f"{rung['in_flight']}{limit} in flight"]
    if "states" in rung:
        facts.append(
            "workers: "
            + ", ".join(f"{state} in {count}" for state, count in rung["states"].items())
        )
    if rung["queued"]:
        facts.append(f"{rung['queued']} waiting")
    for name, words in (("first_token_ms", "first token"), ("total_ms", "whole")):
        times = rung[name]
        if times["p50"] is not None:
            facts.append(f"{words} p50 {times['p50']:g} ms, p95 {times['p95']:g} ms")
    if rung["error_share"] is not None:
        facts.append(f"errors {rung['error_share']:.0%}")
    if rung["until"] is not None:
        facts.append(f"for {rung['until']:g} s more")
    if rung["reason"] is not None:
        facts.append(rung["reason"])
    return facts
