"""The workloads, and `wrk` to put them on: it counts whole answers, streamed ones too."""

from __future__ import annotations

import contextlib
import http.client
import json
import math
import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

KEY = "rungway-bench-key"
_PROMPT = "Say in one sentence what a ladder of models is good for, and then say it again. " * 8
_MESSAGES = [{"role": "user", "content": _PROMPT}]
_WRK_FAULTS = re.compile(r"Non-2xx or 3xx responses: \d+|Socket errors: .*")


@dataclass(frozen=True)
class Workload:
    """One kind of call. `unit` is what CPU time is divided by: answers, or events of streams."""

    name: str
    path: str
    body: dict[str, Any]
    connections: int = 32
    unit: str = "answers"
    contains: bytes = field(default=b"", repr=False)


def _streamed(events: int, pause_ms: int) -> dict[str, Any]:
    form = f"events={events} pause_ms={pause_ms}"
    return {"model": "assistant", "messages": _MESSAGES, "stream": True, "user": form}


CHAT = "/v1/chat/completions"
WORKLOADS = (
    Workload(
        "chat, not streamed",
        CHAT,
        {"model": "assistant", "messages": _MESSAGES},
        contains=b'"finish_reason":"stop"',
    ),
    Workload("chat, a stream of one event", CHAT, _streamed(1, 0), contains=b"data: [DONE]"),
    Workload(
        "an event of a long stream, 200 streams at 50 events/s",
        CHAT,
        _streamed(100, 20),
        connections=200,
        unit="events",
        contains=b"data: [DONE]",
    ),
    Workload(
        "embeddings, one input, 384 dimensions",
        "/v1/embeddings",
        {"model": "embed", "input": "one rung higher", "encoding_format": "base64"},
        contains=b'"embedding":"',
    ),
)


class LoadError(Exception):
    """What was measured was not the workload."""


def get_json(port: int, path: str) -> Any:
    status, body = _ask(port, "GET", path)
    if status != 200:
        raise LoadError(f"GET {path} on port {port} answered {status}")
    return json.loads(body)


def check_once(port: int, workload: Workload) -> None:
    """One call, whose answer is looked at: wrk itself sees only the status."""
    status, body = _ask(port, "POST", workload.path, json.dumps(workload.body).encode())
    if status != 200 or workload.contains not in body:
        raise LoadError(f"{workload.name}: answered {status}: {body[:300]!r}")


def is_alive(port: int) -> bool:
    try:
        return _ask(port, "GET", "/health")[0] == 200
    except OSError:
        return False


def _ask(port: int, method: str, path: str, body: bytes | None = None) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    try:
        connection.request(method, path, body, _headers())
        response = connection.getresponse()
        return response.status, response.read()
    finally:
        connection.close()


def _headers() -> dict[str, str]:
    return {"authorization": f"Bearer {KEY}", "content-type": "application/json"}


@contextlib.contextmanager
def loaded(port: int, workload: Workload, for_s: float) -> Iterator[None]:
    """Run wrk for so long while the body of the `with` measures. Raises LoadError on failures."""
    with tempfile.NamedTemporaryFile("w", suffix=".lua") as script:
        script.write(_lua(workload))
        script.flush()
        url = f"http://127.0.0.1:{port}{workload.path}"
        process = subprocess.Popen(
            f"wrk -t1 -c{workload.connections} -d{math.ceil(for_s)}s --timeout 30s"
            f" -s {script.name} {url}".split(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        try:
            yield
            said, _ = process.communicate(timeout=for_s + 30)
        finally:
            if process.poll() is None:
                process.kill()
                process.communicate()
    if process.returncode != 0 or (faults := _WRK_FAULTS.findall(said)):
        raise LoadError(f"{workload.name}: {' '.join(faults) if not process.returncode else said}")


def _lua(workload: Workload) -> str:
    headers = "".join(f'wrk.headers["{name}"] = "{text}"\n' for name, text in _headers().items())
    return f'wrk.method = "POST"\n{headers}wrk.body = [==[{json.dumps(workload.body)}]==]\n'
