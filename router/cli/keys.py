"""`rungway keys create`: a new key, printed once, with its block for the configuration."""

from __future__ import annotations

import argparse
import hashlib
import re
import secrets
import sys

import orjson

from router.cli.main import DONE, WRONG_USE

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


def run(options: argparse.Namespace) -> int:
    if not _NAME.fullmatch(options.name):
        print(
            "rungway: a key's name has at most 64 letters, digits, dots, dashes and underscores",
            file=sys.stderr,
        )
        return WRONG_USE
    key = f"rk-{secrets.token_urlsafe(32)}"
    digest = hashlib.sha256(key.encode()).hexdigest()
    if options.json:
        made = {"name": options.name, "key": key, "sha256": digest, "admin": options.admin}
        print(orjson.dumps(made).decode())
        return DONE
    print(f"the key, shown only now:\n\n  {key}\n")
    print("paste this into the configuration, and have it read with `rungway reload`:\n")
    print(f'[keys."{options.name}"]\nsha256 = "{digest}"\nladders = ["*"]')
    if options.admin:
        print("admin = true")
    return DONE
