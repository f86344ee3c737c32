"""The real model servers that several tests share: llama.cpp with SmolLM2, for chat and vectors."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@contextmanager
def model_process() -> Iterator[tuple[Mapping[str, str], subprocess.Popen[str]]]:
    """`{"chat": URL, "embed": URL}` of real llama.cpp servers on odd ports, and their process."""
    process = subprocess.Popen(
        [sys.executable, "-m", "router.demo.models"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        cwd=ROOT,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        yield json.loads(process.stdout.readline()), process
    finally:
        process.kill()
        process.wait(10)
        process.stdin.close()
        process.stdout.close()


@pytest.fixture(scope="session")
def real_models() -> Iterator[Mapping[str, str]]:
    """The addresses of real models that tests share."""
    with model_process() as (addresses, _):
        yield addresses
