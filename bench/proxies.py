"""What is measured: Rungway, and nginx as the limit of what passing through can cost.

nginx only relays: it checks no key, reads no JSON and has one upstream.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import router
from bench.load import KEY, is_alive
from bench.measure import memory_mib

ROOT = Path(__file__).parents[1]
OUT = ROOT / "bench" / "out"
_START_S = 30
_STOP_S = 10

_NGINX = """
daemon off; master_process off; worker_processes 1; pid {out}/nginx.pid;
error_log {out}/nginx.log warn;
events {{ worker_connections 4096; }}
http {{
  access_log off; keepalive_requests 1000000000; client_body_temp_path {out}/nginx-body;
  proxy_temp_path {out}/nginx-proxy; fastcgi_temp_path {out}/nginx-a; uwsgi_temp_path {out}/nginx-b;
  scgi_temp_path {out}/nginx-c;
  upstream fake {{
    server 127.0.0.1:{upstream}; keepalive 512; keepalive_requests 1000000000;
  }}
  server {{
    listen 127.0.0.1:{port};
    location = /health {{ return 200; }}
    location / {{
      proxy_pass http://fake; proxy_http_version 1.1; proxy_set_header Connection "";
      proxy_buffering off;
    }}
  }}
}}
"""

_RUNGWAY = """
[server]
port = {port}

[cache]
memory_mib = 0

[backends.fake]
kind = "openai"
url = "http://127.0.0.1:{upstream}"

[ladders.assistant]
task = "chat"
[[ladders.assistant.rungs]]
backend = "fake"
model = "bench"

[ladders.embed]
task = "embeddings"
[[ladders.embed.rungs]]
backend = "fake"
model = "bench"

[keys.bench]
sha256 = "{sha256}"
ladders = ["*"]
"""


@dataclass(frozen=True)
class Running:
    """A started process and what it took to start."""

    pid: int
    port: int
    start_s: float
    idle_mib: float


@dataclass(frozen=True)
class Proxy:
    """Something to measure: how it is called, of which version, and its configuration."""

    name: str
    version: str
    template: str
    command: tuple[str, ...]

    @contextlib.contextmanager
    def up(self, upstream_port: int) -> Iterator[Running]:
        """Start it on core 0, and end it whatever happens."""
        port = free_port()
        OUT.mkdir(exist_ok=True)
        config = OUT / f"{self.name}.conf"
        sha256 = hashlib.sha256(KEY.encode()).hexdigest()
        config.write_text(
            self.template.format(port=port, upstream=upstream_port, out=OUT, sha256=sha256)
        )
        started = time.monotonic()
        command = [part.format(config=config, out=OUT) for part in self.command]
        with pinned_process(command, core=0) as process:
            while not is_alive(port):
                if process.poll() is not None or time.monotonic() > started + _START_S:
                    raise SystemExit(f"✗ {self.name} did not start; see: {' '.join(command)}")
                time.sleep(0.01)
            start_s = time.monotonic() - started
            # What it does once after its start (probes, first collections) is not idling.
            time.sleep(1)
            yield Running(process.pid, port, start_s, memory_mib(process.pid))


def nginx() -> Proxy:
    program = shutil.which("nginx") or "/usr/sbin/nginx"
    said = subprocess.run([program, "-v"], capture_output=True, text=True, check=True).stderr
    command = (program, "-p", "{out}", "-e", "stderr", "-c", "{config}")
    return Proxy("nginx", said.strip().rpartition("/")[2], _NGINX, command)


def rungway() -> Proxy:
    packages = ", ".join(
        f"{name} {importlib.metadata.version(name)}" for name in ("aiohttp", "uvloop", "orjson")
    )
    python = ".".join(map(str, sys.version_info[:3]))
    version = f"{router.__version__} ({packages}, Python {python})"
    command = (sys.executable, "-m", "router", "serve", "--config", "{config}")
    return Proxy("rungway", version, _RUNGWAY, command)


@contextlib.contextmanager
def pinned_process(command: list[str], core: int) -> Iterator[subprocess.Popen[str]]:
    """A process on one core; its output is dropped but for what is piped. Always ended."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {core})
    try:
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
    finally:
        os.sched_setaffinity(0, before)
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.communicate(timeout=_STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
