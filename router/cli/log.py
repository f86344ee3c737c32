"""What the daemon says beside its calls, as JSON lines like theirs: one parser reads all."""

from __future__ import annotations

import logging
import sys

import orjson

from router.types import Json


class JsonLines(logging.Formatter):
    """One line a message; a trace is a field of it."""

    def format(self, record: logging.LogRecord) -> str:
        line: Json = {
            "at": round(record.created, 3),
            "event": "log",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info is not None:
            line["trace"] = self.formatException(record.exc_info)
        return orjson.dumps(line).decode()


def set_up() -> None:
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines())
    logging.basicConfig(level=logging.INFO, handlers=[handler])
