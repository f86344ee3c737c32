"""`rungway keys`: make, list, show, revoke and rotate the keys of clients.

A key is made by the running daemon where the command is told of one, and otherwise printed with its
block for the configuration. Either way its secret is shown once.
"""

from __future__ import annotations

import argparse
import hashlib
import math
import os
import re
import secrets
import sys
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from urllib.parse import urlencode

import orjson

from router.cli.main import DONE, WRONG_USE
from router.cli.remote import DaemonRefused, DaemonUnreachable, ask, told
from router.cli.table import table
from router.config import schema
from router.config.locate import Lines
from router.config.reading import read_table
from router.config.report import Report
from router.types import Json

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_PATH = "/router/v1/keys"
_PAGE = 1000
_ONCE = "the key, shown only now:\n\n  {}\n"


def run(options: argparse.Namespace) -> int:
    if options.verb != "list" and not _NAME.fullmatch(options.name):
        print(
            "rungway: a key's name has at most 64 letters, digits, dots, dashes and underscores",
            file=sys.stderr,
        )
        return WRONG_USE
    verbs: dict[str, Callable[[argparse.Namespace], int]] = {
        "create": _create,
        "list": _list,
        "show": _show,
        "revoke": _revoke,
        "rotate": _rotate,
    }
    try:
        return verbs[options.verb](options)
    except (DaemonRefused, DaemonUnreachable) as error:
        return told(error)


def _create(options: argparse.Namespace) -> int:
    settings = _settings(options)
    told_of_daemon = options.url or {"RUNGWAY_URL", "RUNGWAY_API_KEY"} & os.environ.keys()
    if options.offline or not told_of_daemon:
        return _print_for_file(options, settings)
    made = _ask(options, "POST", _PATH, {"name": options.name, **settings})
    if options.json:
        print(orjson.dumps(made).decode())
        return DONE
    print(_ONCE.format(made["key"]))
    print(f"{options.name} may call at once; `rungway keys revoke {options.name}` ends it")
    return DONE


def _print_for_file(options: argparse.Namespace, settings: Json) -> int:
    key = f"rk-{secrets.token_urlsafe(32)}"
    digest = hashlib.sha256(key.encode()).hexdigest()
    report = Report("", Lines(""))
    read_table(schema.KeySettings, settings, (), report, lambda *_: None)
    report.raise_problems()
    if options.json:
        made = {"name": options.name, "key": key, "sha256": digest, "admin": False, **settings}
        print(orjson.dumps(made).decode())
        return DONE
    print(_ONCE.format(key))
    print("paste this into the configuration, and have it read with `rungway reload`:\n")
    print(f'[keys."{options.name}"]\nsha256 = "{digest}"')
    limits = settings.pop("limits", {})
    for name, value in {"ladders": ["*"], **settings}.items():
        print(f"{name} = {_toml(value)}")
    if limits:
        print(f'[keys."{options.name}".limits]')
    for name, value in limits.items():
        print(f"{name} = {_toml(value)}")
    return DONE


def _settings(options: argparse.Namespace) -> Json:
    """What the command line says of the key; what it leaves out is left out."""
    settings: Json = {}
    if options.ladders:
        settings["ladders"] = options.ladders
    if options.tier:
        settings["tier"] = options.tier
    if options.admin:
        settings["admin"] = True
    if options.limits:
        settings["limits"] = dict(map(_limit, options.limits))
    return settings


def _limit(text: str) -> tuple[str, int | float | str]:
    """One `--limit`; what is no number is for the check of the settings to refuse."""
    name, _, value = text.partition("=")
    try:
        number = float(value)
    except ValueError:
        return name, value
    return name, int(value) if value.isdecimal() else number if math.isfinite(number) else value


def _list(options: argparse.Namespace) -> int:
    keys = list(_all_keys(options))
    if options.json:
        print(orjson.dumps({"object": "list", "data": keys}).decode())
        return DONE
    rows = [
        [key["name"], _state(key), ",".join(key["ladders"]), key["tier"], _limits(key)]
        for key in keys
    ]
    for line in table(["NAME", "STATE", "LADDERS", "TIER", "LIMITS"], rows):
        print(line)
    return DONE


def _all_keys(options: argparse.Namespace) -> Iterator[Json]:
    after, has_more = "", True
    while has_more:
        query = urlencode({"after": after, "limit": _PAGE})
        page = _ask(options, "GET", f"{_PATH}?{query}")
        yield from page["data"]
        has_more = page["has_more"]
        after = page["data"][-1]["name"] if page["data"] else ""


def _show(options: argparse.Namespace) -> int:
    key = _ask(options, "GET", f"{_PATH}/{options.name}")
    if options.json:
        print(orjson.dumps(key).decode())
        return DONE
    rows = [
        ["name", key["name"]],
        ["state", _state(key)],
        ["ladders", ",".join(key["ladders"])],
        ["tier", key["tier"]],
        ["admin", "yes" if key["admin"] else "no"],
        ["priority", str(key["priority"])],
        ["allow unpriced", "yes" if key["allow_unpriced"] else "no"],
        ["on disconnect", key["on_disconnect"]],
        ["bill to", key["bill_to"] or ""],
        ["limits", _limits(key)],
        *(["secret", f"{one['sha256_begins']}… {_end(one)}"] for one in key["secrets"]),
    ]
    for name, value in rows:
        print(f"{name:16}{value}".rstrip())
    return DONE


def _revoke(options: argparse.Namespace) -> int:
    key = _ask(options, "DELETE", f"{_PATH}/{options.name}")
    if options.json:
        print(orjson.dumps(key).decode())
    else:
        print(f"{options.name} is revoked, and its sessions with it")
    return DONE


def _rotate(options: argparse.Namespace) -> int:
    body = {"overlap_s": options.overlap_s}
    made = _ask(options, "POST", f"{_PATH}/{options.name}/rotate", body)
    if options.json:
        print(orjson.dumps(made).decode())
        return DONE
    print(_ONCE.format(made["key"]))
    ends = [one for one in made["secrets"] if one["ends_at"] is not None]
    print("\n".join(f"an older one {_end(one)}" for one in ends) or "every older one has ended")
    return DONE


def _ask(options: argparse.Namespace, method: str, path: str, body: Json | None = None) -> Json:
    found: Json = ask(method, path, options.url, options.config, body)
    return found


def _state(key: Json) -> str:
    if key["revoked_at"] is not None:
        return f"revoked {_time(key['revoked_at'])}"
    where = "in the file" if key["source"] == "file" else f"made {_time(key['created_at'])}"
    return f"{where}, admin" if key["admin"] else where


def _limits(key: Json) -> str:
    return " ".join(f"{name}={value:.15g}" for name, value in key["limits"].items())


def _end(one: Json) -> str:
    return "does not end" if one["ends_at"] is None else f"ends {_time(one['ends_at'])}"


def _time(at: float) -> str:
    return datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%d %H:%M:%SZ")


def _toml(value: object) -> str:
    """Of names, numbers and lists of names JSON is TOML."""
    return orjson.dumps(value).decode().replace('","', '", "')
