"""`rungway check`: read the configuration as the daemon would, and say what is wrong with it."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

import orjson

from router.cli.main import DONE, WRONG_USE
from router.config.load import find, load
from router.errors import ConfigError


def run(options: argparse.Namespace) -> int:
    path = find(options.config, os.environ, Path.cwd())
    if path is None:
        print("there is no configuration file; name one with --config", file=sys.stderr)
        return WRONG_USE
    try:
        config = load(path, os.environ, is_for_service=True)
    except ConfigError as error:
        if options.json:
            print(orjson.dumps({"ok": False, "problems": error.problems}).decode())
            return WRONG_USE
        raise
    if options.json:
        found = {"ok": True, "file": str(path), "warnings": list(config.warnings)}
        print(orjson.dumps(found).decode())
        return DONE
    for warning in config.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    counts = (
        _counted(len(config.backends), "backend"),
        _counted(len(config.ladders), "ladder"),
        _counted(len(config.keys), "key"),
    )
    print(f"{path} is good: {', '.join(counts)}; no server was asked whether it is there")
    return DONE


def _counted(count: int, what: str) -> str:
    return f"{count} {what}" if count == 1 else f"{count} {what}s"
