"""`rungway reload`: have the running daemon read its configuration again; needs an admin key."""

from __future__ import annotations

import argparse
import sys

from router.cli.main import DONE, FAILED
from router.cli.remote import DaemonRefused, DaemonUnreachable, ask


def run(options: argparse.Namespace) -> int:
    try:
        ask("POST", "/router/v1/reload", options.url, options.config)
    except DaemonRefused as error:
        was_read = error.code == "configuration_refused"
        print(f"rungway: {error.words if was_read else error}", file=sys.stderr)
        return FAILED
    except DaemonUnreachable as error:
        print(f"rungway: {error}", file=sys.stderr)
        return FAILED
    print("reloaded")
    return DONE
