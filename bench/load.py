"""The workloads, and `wrk` to put them on: it counts whole answers, streamed ones too.

Each call has a prompt of its own, so that a cache finds nothing and no two calls are one, unless
the workload says that all are the same.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import math
import re
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

KEY = "rungway-bench-key"
_PROMPT = "Say in one sentence what a ladder of models is good for, and then say it again. " * 8
# Where each call's number goes; twelve digits, so that all bodies are of one length.
_NUMBER = "#number#####"
_WRK_FAULTS = re.compile(r"Non-2xx or 3xx responses: \d+|Socket errors: .*")
_WRK_ANSWERS = re.compile(r"(\d+) requests in ")
_ANSWER_S = 60


@dataclass(frozen=True)
class Dialect:
    """How one proxy wants to be called: what differs between them, and nothing else."""

    prefix: str = "/v1"
    chat_model: str = "assistant"
    embed_model: str = "embed"
    headers: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Workload:
    """One kind of call. `unit` is what CPU time is divided by: answers, or events of streams."""

    name: str
    route: str
    settings: Mapping[str, Any]
    prompt: str = f"call {_NUMBER}: {_PROMPT}"
    connections: int = 32
    unit: str = "answers"
    contains: bytes = field(default=b"", repr=False)

    @property
    def is_distinct(self) -> bool:
        return _NUMBER in self.prompt

    def path(self, dialect: Dialect) -> str:
        return dialect.prefix + self.route

    def body(self, dialect: Dialect) -> str:
        """With the place of the call's number still in it."""
        body: dict[str, Any] = {}
        if self.route == CHAT:
            body["model"] = dialect.chat_model
            body["messages"] = [{"role": "user", "content": self.prompt}]
        else:
            body["model"] = dialect.embed_model
            body["input"] = self.prompt
        return json.dumps({**body, **self.settings}, separators=(",", ":"))

    def one_body(self, dialect: Dialect) -> bytes:
        return self.body(dialect).replace(_NUMBER, f"{_first_number():012d}").encode()


CHAT, EMBEDDINGS = "/chat/completions", "/embeddings"
# A key with a money limit has what is not limited cut short, and then it is not kept.
_LIMITED = {"max_tokens": 256}
_KEPT = {**_LIMITED, "temperature": 0}
_STREAMED = {**_LIMITED, "stream": True}


def _of_form(events: int, pause_ms: int) -> str:
    return f"call {_NUMBER}, events={events} pause_ms={pause_ms}: {_PROMPT}"


_ONE = Workload("chat", CHAT, _KEPT, contains=b'"finish_reason":"stop"')
_STREAM = Workload(
    "stream", CHAT, {**_KEPT, **_STREAMED}, prompt=_of_form(1, 0), contains=b"data: [DONE]"
)
_EVENTS = replace(_STREAM, name="events", prompt=_of_form(100, 20), connections=200, unit="events")
_EMBEDDINGS = Workload(
    "embeddings",
    EMBEDDINGS,
    {"encoding_format": "base64"},
    prompt=f"one rung higher, call {_NUMBER}",
    contains=b'"embedding":"',
)
# What is asked without `temperature` is not deterministic: nothing is looked up or kept.
WORKLOADS = {
    workload.name: workload
    for workload in (
        _ONE,
        replace(_ONE, name="chat-uncached", settings=_LIMITED),
        replace(_ONE, name="hit", prompt=f"the same call: {_PROMPT}"),
        _STREAM,
        replace(_STREAM, name="stream-uncached", settings=_STREAMED),
        _EVENTS,
        replace(_EVENTS, name="events-uncached", settings=_STREAMED),
        _EMBEDDINGS,
    )
}
# A stream that is open and says nothing: its second event is two minutes away.
QUIET_STREAM = replace(_EVENTS, name="quiet", settings=_STREAMED, prompt=_of_form(2, 120_000))


class LoadError(Exception):
    """What was measured was not the workload."""


def get_json(port: int, path: str) -> Any:
    status, body = ask(port, "GET", path, Dialect())
    if status != 200:
        raise LoadError(f"GET {path} on port {port} answered {status}")
    return json.loads(body)


def check_once(port: int, workload: Workload, dialect: Dialect) -> None:
    """One call, whose answer is looked at: wrk itself sees only the status."""
    path, body = workload.path(dialect), workload.one_body(dialect)
    status, answer = ask(port, "POST", path, dialect, body)
    if status != 200 or workload.contains not in answer:
        raise LoadError(f"{workload.name}: answered {status}: {answer[:300]!r}")


def answers(port: int, dialect: Dialect) -> bool:
    """Whether a chat call is answered yet."""
    try:
        check_once(port, WORKLOADS["chat"], dialect)
    except (OSError, http.client.HTTPException, LoadError):
        return False
    return True


def ask(
    port: int, method: str, path: str, dialect: Dialect, body: bytes | None = None
) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=_ANSWER_S)
    try:
        connection.request(method, path, body, headers_for(dialect))
        response = connection.getresponse()
        return response.status, response.read()
    finally:
        connection.close()


def headers_for(dialect: Dialect) -> dict[str, str]:
    return {
        "authorization": f"Bearer {KEY}",
        "content-type": "application/json",
        **dialect.headers,
    }


class Load:
    """A run of wrk. `answers` is how many it had in all, once it has ended."""

    answers = 0


@contextlib.contextmanager
def loaded(
    port: int,
    workload: Workload,
    dialect: Dialect,
    for_s: float,
    *,
    may_fail: bool = False,
) -> Iterator[Load]:
    """Run wrk for so long while the body of the `with` measures. Raises LoadError on failures."""
    load = Load()
    with tempfile.NamedTemporaryFile("w", suffix=".lua") as script:
        script.write(_lua(workload, dialect))
        script.flush()
        url = f"http://127.0.0.1:{port}{workload.path(dialect)}"
        process = subprocess.Popen(
            f"wrk -t1 -c{workload.connections} -d{math.ceil(for_s)}s --timeout 30s"
            f" -s {script.name} {url}".split(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        try:
            yield load
            said, _ = process.communicate(timeout=for_s + 60)
        finally:
            if process.poll() is None:
                process.kill()
                process.communicate()
    faults = _WRK_FAULTS.findall(said)
    counted = _WRK_ANSWERS.search(said)
    if process.returncode != 0 or counted is None or (faults and not may_fail):
        raise LoadError(f"{workload.name}: {' '.join(faults) or said}")
    load.answers = int(counted[1])


def _first_number() -> int:
    """No two runs of the load give a call the same number: it goes up by less than the clock."""
    return time.time_ns() // 1000 % 10**12


def _lua(workload: Workload, dialect: Dialect) -> str:
    headers = headers_for(dialect).items()
    lines = ['wrk.method = "POST"']
    lines += [f'wrk.headers["{name}"] = "{text}"' for name, text in headers]
    before, number, after = workload.body(dialect).partition(_NUMBER)
    if number:
        lines += [
            f"local number = {_first_number()}",
            f"local before, after = [==[{before}]==], [==[{after}]==]",
            "request = function()",
            "  number = number + 1",
            '  local body = before .. string.format("%012d", number) .. after',
            "  return wrk.format(nil, nil, nil, body)",
            "end",
        ]
    else:
        lines.append(f"wrk.body = [==[{before}]==]")
    return "\n".join(lines) + "\n"
