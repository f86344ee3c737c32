"""`rungway explain`: which rungs a request would try, and why not the others.

Asks the running daemon, whose board knows what is closed now; without one, or with `--offline`, the
configuration alone tells.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

import orjson

from router.cli.main import DONE, FAILED, WRONG_USE
from router.cli.remote import DaemonRefused, DaemonUnreachable, ask
from router.config.load import find, load
from router.errors import RouterError
from router.types import Json

_REQUEST_BYTES_MAX = 64 << 20


def run(options: argparse.Namespace) -> int:
    try:
        request = _read(options.file)
    except (OSError, ValueError) as error:
        print(f"rungway: cannot read the request from {options.file}: {error}", file=sys.stderr)
        return WRONG_USE
    try:
        plan = _plan(request, options)
    except (DaemonRefused, RouterError) as error:
        print(f"rungway: {error}", file=sys.stderr)
        return FAILED
    if options.json:
        print(orjson.dumps(plan).decode())
        return DONE
    print(f"ladder {plan['ladder']}")
    for rung in plan["rungs"]:
        print(f"  {'take' if rung['take'] else 'skip'}  {rung['rung']}: {rung['reason']}")
    return DONE


def _read(name: str) -> Json:
    if name == "-":
        raw = sys.stdin.buffer.read(_REQUEST_BYTES_MAX)
    else:
        with Path(name).open("rb") as file:
            raw = file.read(_REQUEST_BYTES_MAX)
    value = orjson.loads(raw)
    if not isinstance(value, dict):
        raise ValueError("the request must be a JSON object")
    return value


def _plan(request: Json, options: argparse.Namespace) -> Any:
    if not options.offline:
        try:
            return ask("POST", "/router/v1/explain", options.url, options.config, request)
        except DaemonUnreachable as error:
            if options.url or not (options.config or find(None, os.environ, Path.cwd())):
                raise DaemonRefused(str(error)) from error
            print(f"{error}; from the configuration alone:", file=sys.stderr)
    path = find(options.config, os.environ, Path.cwd())
    if path is None:
        raise DaemonRefused("there is no configuration file; name one with --config")
    from router.cli.offline import explain  # noqa: PLC0415 - builds a whole service

    return explain(load(path, os.environ), request)
