"""`rungway`: reads the arguments and hands over. Exit codes: 0 done, 1 failed, 2 wrong use.

The subcommands' modules are imported late, so that each starts as fast as it can.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from typing import NoReturn

from router import __version__
from router.errors import ConfigError

DONE, FAILED, WRONG_USE = 0, 1, 2


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command and exit with its code."""
    options = parser().parse_args(arguments)
    command = importlib.import_module(f"router.cli.{options.command}")
    try:
        code: int = command.run(options)
    except ConfigError as error:
        for problem in error.problems:
            print(problem, file=sys.stderr)
        code = WRONG_USE
    except KeyboardInterrupt:
        code = FAILED
    except BrokenPipeError:
        # The reader of our output has seen enough.
        sys.stderr.close()
        code = DONE
    sys.exit(code)


def parser() -> argparse.ArgumentParser:
    root = argparse.ArgumentParser(
        prog="rungway",
        description="A local daemon that speaks the OpenAI API and answers from a model ladder.",
    )
    root.add_argument("--version", action="version", version=f"rungway {__version__}")
    commands = root.add_subparsers(dest="command", required=True, metavar="COMMAND")

    serve = commands.add_parser("serve", help="run the daemon")
    _config_option(serve)
    serve.add_argument("--host", help="address to listen on, instead of server.host")
    serve.add_argument("--port", type=_port, help="port to listen on, instead of server.port")
    serve.add_argument("--demo", action="store_true", help="serve a small model on this machine")

    check = commands.add_parser("check", help="check a configuration without starting")
    _config_option(check)
    _json_option(check)

    detect = commands.add_parser("detect", help="find model servers on this machine")
    detect.add_argument(
        "--port",
        type=_port,
        action="append",
        default=[],
        dest="ports",
        help="look at this port as well (may be given again)",
    )
    _json_option(detect)

    explain = commands.add_parser("explain", help="which rungs a request would try, and why")
    explain.add_argument("file", nargs="?", default="-", help="the request's JSON; - is stdin")
    explain.add_argument(
        "--offline", action="store_true", help="from the configuration alone, not the daemon"
    )
    _config_option(explain)
    _daemon_options(explain)
    _json_option(explain)

    status = commands.add_parser("status", help="the state of every rung")
    _config_option(status)
    _daemon_options(status)
    _json_option(status)

    reload = commands.add_parser("reload", help="have the daemon read its configuration again")
    _config_option(reload)
    _daemon_options(reload)

    _keys(commands.add_parser("keys", help="make, list, rotate and revoke keys for clients"))
    _usage(commands.add_parser("usage", help="what keys have used, by key, ladder, rung and day"))
    return root


def _keys(keys: argparse.ArgumentParser) -> None:
    verbs = keys.add_subparsers(dest="verb", required=True, metavar="VERB")
    create = verbs.add_parser(
        "create", help="make a key in the daemon, or print one with its block for the configuration"
    )
    create.add_argument("name", help="the key's name, for logs and budgets")
    create.add_argument(
        "--admin", action="store_true", help="it may do what the routes for operators do"
    )
    create.add_argument(
        "--ladder",
        action="append",
        default=[],
        dest="ladders",
        help="a ladder it may use, instead of all (may be given again)",
    )
    create.add_argument("--tier", default="", help="for rungs that are kept for some tiers")
    create.add_argument(
        "--limit",
        action="append",
        default=[],
        dest="limits",
        metavar="NAME=NUMBER",
        help="a setting of [keys.NAME.limits], such as usd_per_day=5 (may be given again)",
    )
    create.add_argument(
        "--offline", action="store_true", help="print it for the configuration; ask no daemon"
    )
    listing = verbs.add_parser("list", help="all keys, of the configuration and of the daemon")
    show = verbs.add_parser("show", help="one key's rights, limits and secrets' ends")
    revoke = verbs.add_parser("revoke", help="end a key and its sessions, at once and for good")
    rotate = verbs.add_parser("rotate", help="give a key a new secret")
    rotate.add_argument(
        "--overlap-s",
        type=float,
        default=0.0,
        metavar="SECONDS",
        help="for so long the old secret works too (left out: it ends now)",
    )
    for verb in (show, revoke, rotate):
        verb.add_argument("name", help="the key's name")
    for verb in (create, listing, show, revoke, rotate):
        _config_option(verb)
        _daemon_options(verb)
        _json_option(verb)
    create.epilog = (
        "The running daemon makes the key, and it works at once, where --url, $RUNGWAY_URL or "
        "$RUNGWAY_API_KEY (a key with admin = true) tells of one. Otherwise, and with --offline, "
        "it is printed with its block for the configuration."
    )


def _usage(usage: argparse.ArgumentParser) -> None:
    usage.add_argument(
        "--group", default="key", help="some of key,ladder,rung,day, separated by commas"
    )
    usage.add_argument("--key", default="", help="of this key only")
    usage.add_argument("--since", default="", help="the first UTC day, such as 2026-11-01")
    usage.add_argument("--until", default="", help="the UTC day after the last one")
    verbs = usage.add_subparsers(dest="verb", metavar="VERB")
    resolve = verbs.add_parser("resolve", help="clear what is in doubt after a crash")
    resolve.add_argument("name", nargs="?", help="the key's name; left out: of all keys")
    how = resolve.add_mutually_exclusive_group(required=True)
    how.add_argument("--charge", action="store_true", help="count it as spent")
    how.add_argument("--release", action="store_true", help="let it go: it was not spent")
    for command in (usage, resolve):
        _config_option(command)
        _daemon_options(command)
        _json_option(command)


def _config_option(command: argparse.ArgumentParser) -> None:
    command.add_argument("--config", help="the configuration file, instead of the first found")


def _json_option(command: argparse.ArgumentParser) -> None:
    command.add_argument("--json", action="store_true", help="print JSON")


def _daemon_options(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--url", help="the daemon, instead of $RUNGWAY_URL or where the configuration puts it"
    )
    command.epilog = (
        "The daemon is asked at --url, else at $RUNGWAY_URL, with the key in $RUNGWAY_API_KEY; "
        "status, reload, keys and usage of others need a key with admin = true where there are "
        "keys."
    )


def _port(text: str) -> int:
    # More digits than a port has are not worth reading.
    port = int(text) if text.isdecimal() and len(text) <= 5 else -1
    if not 0 <= port <= 65535:
        raise argparse.ArgumentTypeError("a port is a number from 0 to 65535")
    return port
