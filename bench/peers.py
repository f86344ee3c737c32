"""What Rungway is compared with: two proxies that only pass bytes through, and routers for models.

Each is given its cheapest sensible form: one worker, one upstream, round robin, no logs of calls.
The routers come from PyPI into `.venv-bench`, in the versions of `peers.txt`; nginx and haproxy are
the system's. What is not there is named with the reason, and left out.
"""

from __future__ import annotations

import importlib.metadata
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from bench.load import Dialect
from bench.proxies import ROOT, Proxy

VENV = ROOT / ".venv-bench"


@dataclass(frozen=True)
class Missing:
    """A peer that cannot be measured here."""

    name: str
    reason: str


_NGINX = """
daemon off; master_process off; worker_processes 1; pid {out}/nginx.pid;
worker_rlimit_nofile 20000; error_log stderr error;
events { worker_connections 16384; }
http {
  access_log off; keepalive_requests 1000000000; client_body_temp_path {out}/nginx-body;
  proxy_temp_path {out}/nginx-proxy; fastcgi_temp_path {out}/nginx-a; uwsgi_temp_path {out}/nginx-b;
  scgi_temp_path {out}/nginx-c;
  upstream fake {
    server 127.0.0.1:{upstream}; keepalive 512; keepalive_requests 1000000000;
  }
  server {
    listen 127.0.0.1:{port} backlog=4096;
    location / {
      proxy_pass http://fake; proxy_http_version 1.1; proxy_set_header Connection "";
      proxy_buffering off; proxy_read_timeout 300s;
    }
  }
}
"""

_HAPROXY = """
global
  nbthread 1
  maxconn 8192
defaults
  mode http
  timeout connect 5s
  timeout client 300s
  timeout server 300s
  option http-keep-alive
  http-reuse always
listen fake
  bind 127.0.0.1:{port} backlog 4096
  server fake 127.0.0.1:{upstream} pool-max-conn 512
"""

_TENSORZERO = """
[gateway]
observability.enabled = false

[models.bench]
routing = ["fake"]
[models.bench.providers.fake]
type = "openai"
model_name = "bench"
api_base = "http://127.0.0.1:{upstream}/v1/"
api_key_location = "none"

[embedding_models.bench]
routing = ["fake"]
[embedding_models.bench.providers.fake]
type = "openai"
model_name = "bench"
api_base = "http://127.0.0.1:{upstream}/v1/"
api_key_location = "none"
"""

# The gateway that its Python package has inside; the binary itself is published as an image only.
_TENSORZERO_SERVE = """
import sys, time, urllib.parse
from tensorzero import _start_http_gateway
gateway = _start_http_gateway(config_file=sys.argv[1], clickhouse_url=None, postgres_url=None,
                              valkey_url=None, async_setup=False)
print(urllib.parse.urlsplit(gateway.base_url).port, flush=True)
time.sleep(1 << 20)
"""

_LITELLM = """
model_list:
  - model_name: assistant
    litellm_params: {model: openai/bench, api_base: "http://127.0.0.1:{upstream}/v1", api_key: none}
  - model_name: embed
    litellm_params: {model: openai/bench, api_base: "http://127.0.0.1:{upstream}/v1", api_key: none}
general_settings: {master_key: sk-bench}
"""

_ROUTER = (
    *("--host", "127.0.0.1", "--port", "{port}"),
    *("--worker-urls", "http://127.0.0.1:{upstream}", "--policy", "round_robin"),
    *("--prometheus-host", "127.0.0.1", "--prometheus-port", "{side_port}"),
)


def nginx() -> Proxy | Missing:
    program = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin")
    if program is None:
        return Missing("nginx", "not on this machine: apt install nginx-light")
    said = subprocess.run([program, "-v"], capture_output=True, text=True, check=True).stderr
    version = said.strip().rpartition("/")[2]
    command = (program, "-p", "{out}", "-e", "stderr", "-c", "{out}/nginx.conf")
    return Proxy("nginx", version, command, {"nginx.conf": _NGINX})


def haproxy() -> Proxy | Missing:
    program = shutil.which("haproxy") or shutil.which("haproxy", path="/usr/sbin")
    if program is None:
        return Missing("haproxy", "not on this machine: apt install haproxy")
    said = subprocess.run([program, "-v"], capture_output=True, text=True, check=True).stdout
    version = said.split()[2].partition("-")[0]
    command = (program, "-db", "-f", "{out}/haproxy.cfg")
    return Proxy("haproxy", version, command, {"haproxy.cfg": _HAPROXY})


def vllm_router() -> Proxy | Missing:
    command = (_bin("vllm-router"), *_ROUTER, "--log-level", "error")
    return _installed("vllm-router", lambda version: Proxy("vllm-router", version, command))


def sglang_router() -> Proxy | Missing:
    command = (_bin("sglang-router"), "launch", *_ROUTER, "--log-level", "error")
    return _installed("sglang-router", lambda version: Proxy("sglang-router", version, command))


def smg() -> Proxy | Missing:
    command = (_bin("smg"), "launch", *_ROUTER, "--log-level", "error")
    # It serves no model but those that its worker names.
    dialect = Dialect(chat_model="bench", embed_model="bench")
    return _installed("smg", lambda version: Proxy("smg", version, command, dialect=dialect))


def tensorzero() -> Proxy | Missing:
    dialect = Dialect(
        prefix="/openai/v1",
        chat_model="tensorzero::model_name::bench",
        embed_model="tensorzero::embedding_model_name::bench",
    )
    files = {"tensorzero.toml": _TENSORZERO, "serve": _TENSORZERO_SERVE}
    command = (_bin("python"), "{out}/serve", "{out}/tensorzero.toml")
    return _installed(
        "tensorzero",
        lambda version: Proxy(
            "tensorzero", version, command, files, dialect=dialect, prints_port=True
        ),
    )


def litellm() -> Proxy | Missing:
    command = (
        *(_bin("litellm"), "--config", "{out}/litellm.yaml", "--host", "127.0.0.1"),
        *("--port", "{port}", "--num_workers", "1"),
    )
    # Without these it asks the network for prices and counts its users.
    environ = {"LITELLM_LOCAL_MODEL_COST_MAP": "True", "LITELLM_LOG": "ERROR"}
    return _installed(
        "litellm",
        lambda version: Proxy(
            "litellm",
            version,
            command,
            {"litellm.yaml": _LITELLM},
            environ,
            Dialect(headers={"authorization": "Bearer sk-bench"}),
            # A stream costs it some ten milliseconds.
            streams_max=500,
        ),
    )


PEERS: dict[str, Callable[[], Proxy | Missing]] = {
    "nginx": nginx,
    "haproxy": haproxy,
    "vllm-router": vllm_router,
    "sglang-router": sglang_router,
    "smg": smg,
    "tensorzero": tensorzero,
    "litellm": litellm,
}


def _bin(name: str) -> str:
    return str(VENV / "bin" / name)


def _installed(package: str, make: Callable[[str], Proxy]) -> Proxy | Missing:
    places = [str(place) for place in VENV.glob("lib/python*/site-packages")]
    for distribution in importlib.metadata.distributions(name=package, path=places):
        return make(distribution.version)
    return Missing(package, f"not in {VENV.name}: make bench installs it from {_PINS.name}")


_PINS = Path(__file__).with_name("peers.txt")
