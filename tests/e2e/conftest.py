"""The real daemon as a process, started as its users start it."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


class Running:
    """A daemon process; `lines` is what it said before it listened."""

    def __init__(self, process: subprocess.Popen[str], url: str, lines: list[str]) -> None:
        self.process = process
        self.url = url
        self.lines = lines

    def stop(self, number: int = signal.SIGTERM, within_s: float = 20) -> int:
        self.process.send_signal(number)
        return self.process.wait(within_s)


@contextmanager
def daemon(*arguments: str, log: Path, **environ: str) -> Iterator[Running]:
    """`rungway serve` with these arguments on a free port; its stderr goes to `log`."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "RUNGWAY_", "XDG_"))}
    with log.open("w") as errors:
        process = subprocess.Popen(
            [sys.executable, "-m", "router", "serve", "--port", "0", *arguments],
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            cwd=log.parent,
            env={**kept, "PYTHONPATH": str(ROOT), "HOME": str(log.parent), **environ},
        )
        try:
            yield Running(process, *_until_listening(process, log))
        finally:
            if process.poll() is None:
                process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            assert process.stdout is not None
            process.stdout.close()


def _until_listening(process: subprocess.Popen[str], log: Path) -> tuple[str, list[str]]:
    assert process.stdout is not None
    lines: list[str] = []
    url = ""
    for line in process.stdout:
        lines.append(line.rstrip("\n"))
        if found := re.match(r"Rungway listens on (\S+)", line):
            url = found[1]
        # Its last words: how to try it, or what to do where there is nothing to try.
        if url and ("print(" in line or "write a configuration" in line):
            return url, lines
    raise AssertionError(f"the daemon did not start: {lines} {log.read_text()}")


@pytest.fixture(scope="session")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """`rungway serve --demo`: real models behind the real daemon."""
    log = tmp_path_factory.mktemp("demo") / "log"
    with daemon("--demo", log=log) as running:
        yield running
