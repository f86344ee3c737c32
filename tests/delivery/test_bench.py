"""The bench's own parts: its upstream says what the workloads look for, and CPU time is counted."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from bench.load import WORKLOADS, LoadError, Workload, check_once, get_json
from bench.measure import cpu_ns, memory_mib, tree

ROOT = Path(__file__).parents[2]
# The long stream takes seconds by design.
QUICK = [workload for workload in WORKLOADS if workload.unit == "answers"]


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    command = [sys.executable, "-m", "bench.upstream", "0"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield int(process.stdout.readline())
        finally:
            process.kill()


@pytest.mark.parametrize("workload", QUICK, ids=lambda workload: workload.name)
def test_the_upstream_answers_each_workload_and_counts_it(port: int, workload: Workload) -> None:
    before = get_json(port, "/count")["answers"]
    check_once(port, workload)
    assert get_json(port, "/count")["answers"] == before + 1


def test_another_answer_than_the_workloads_is_noticed(port: int) -> None:
    wrong = Workload("wrong", WORKLOADS[0].path, WORKLOADS[0].body, contains=b"[DONE]")
    with pytest.raises(LoadError, match="wrong: answered 200"):
        check_once(port, wrong)


def test_cpu_time_and_memory_of_a_tree_are_read(port: int) -> None:
    assert len(tree(os.getpid())) > 1
    before = cpu_ns(os.getpid())
    for _ in range(20):
        get_json(port, "/count")
    assert cpu_ns(os.getpid()) > before
    assert memory_mib(os.getpid()) > 1
