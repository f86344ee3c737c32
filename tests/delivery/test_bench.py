"""The bench's own parts: its upstream says what the workloads look for, and CPU time is counted."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest

from bench.clients import latencies
from bench.figures import Figures
from bench.load import WORKLOADS, Dialect, LoadError, Workload, check_once, get_json
from bench.measure import connections, cpu_ns, files_open, memory_mib, tree
from bench.micro import CASES, compare
from bench.plot import plot
from bench.report import verdicts
from bench.soak import slope, surprises

ROOT = Path(__file__).parents[2]
# The long stream takes seconds by design.
QUICK = [workload for workload in WORKLOADS.values() if workload.unit == "answers"]
DIALECT = Dialect()


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
    check_once(port, workload, DIALECT)
    assert get_json(port, "/count")["answers"] == before + 1


def test_another_answer_than_the_workloads_is_noticed(port: int) -> None:
    wrong = replace(WORKLOADS["chat"], name="wrong", contains=b"[DONE]")
    with pytest.raises(LoadError, match="wrong: answered 200"):
        check_once(port, wrong, DIALECT)


def test_no_two_calls_have_one_prompt_unless_they_are_to() -> None:
    def bodies(name: str) -> set[bytes]:
        return {WORKLOADS[name].one_body(DIALECT) for _ in range(3)}

    assert len(bodies("chat")) == len(bodies("embeddings")) == 3
    assert len(bodies("hit")) == 1
    assert {len(body) for body in bodies("chat")} == {len(next(iter(bodies("chat"))))}


def test_calls_at_a_pace_are_timed_both_ways(port: int) -> None:
    to = (port, DIALECT)
    direct, through = latencies(to, to, WORKLOADS["chat"], per_s=100, for_s=0.2)
    assert 10 <= len(direct) <= 20
    assert 10 <= len(through) <= 20
    assert min(direct + through) > 0


def test_cpu_time_and_memory_of_a_tree_are_read(port: int) -> None:
    assert len(tree(os.getpid())) > 1
    before = cpu_ns(os.getpid())
    for _ in range(20):
        get_json(port, "/count")
    assert cpu_ns(os.getpid()) > before
    assert memory_mib(os.getpid()) > 1
    assert files_open(os.getpid()) > 3


def test_whose_connections_are_whose() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with socket.create_connection(("127.0.0.1", port)), server.accept()[0]:
            assert connections(port, [os.getpid(), os.getppid()])[os.getpid()] == 1
        assert connections(port, [os.getpid()]) == {os.getpid(): 0}


# --- the tables -----------------------------------------------------------------------------------


def figures(ours: float, theirs: float) -> Figures:
    found = Figures()
    for value in (ours, ours + 1, ours - 1):
        found.add("chat", "rungway", value)
        found.add("chat", "vllm-router", theirs)
    return found


def test_an_aim_is_met_missed_or_not_measured() -> None:
    assert verdicts(figures(41, 42))[0].is_met is True
    assert verdicts(figures(43, 42))[0].is_met is False
    assert {verdict.is_met for verdict in verdicts(Figures())} == {None}


def test_the_drawing_has_every_proxy() -> None:
    root = ElementTree.fromstring(plot(figures(41, 42)))
    said = [text.text for text in root.iter("{http://www.w3.org/2000/svg}text")]
    assert said.index("rungway") < said.index("vllm-router")


# --- micro, soak ----------------------------------------------------------------------------------


def test_every_hot_function_runs_and_creep_is_told() -> None:
    for case in CASES.values():
        case()()
    known = dict.fromkeys(CASES, 1.0)
    assert compare(known, known) == []
    name = next(iter(CASES))
    assert compare({**known, name: 1.5}, known) == [f"{name}: 1.50, was 1.00"]
    assert compare(known, {}) == [f"{name}: 1.00, and no baseline" for name in CASES]


def test_an_answer_that_should_not_be_is_a_surprise() -> None:
    assert surprises({("plain", 200): 5, ("no JSON", 400): 5, ("leaves", 0): 5}) == []
    assert surprises({("plain", 0): 1}) == ["plain was answered nothing, 1 times"]
    assert surprises({("unknown key", 503): 2}) == ["unknown key was answered 503, 2 times"]


def test_a_slope_is_told_from_noise() -> None:
    times = [float(second) for second in range(100)]
    noise = [(-1) ** (place // 2) * 0.5 for place in range(100)]
    flat = slope(times, noise)
    assert flat.low < 0 < flat.high
    rising = slope(times, [0.1 * time + wobble for time, wobble in zip(times, noise, strict=True)])
    assert 0.05 < rising.low < 0.1 < rising.high < 0.15
