"""The daemon as a process: start, reload, drain, crash; and the commands beside it."""

from __future__ import annotations

import hashlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.e2e.conftest import ROOT, Running, daemon

HI = {"model": "chat", "messages": [{"role": "user", "content": "Hi?"}]}
CHUNK = '{"id":"a","choices":[{"index":0,"delta":{"content":"Hi"},"finish_reason":%s}]}'


class Upstream(ThreadingHTTPServer):
    """A model server for another process; a streamed answer waits for `may_end`."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answering)
        self.may_end = threading.Event()
        self.arrived = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Answering(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Upstream

    def do_GET(self) -> None:
        self._json({"object": "list", "data": [{"id": "org/m"}]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        if not body.get("stream"):
            message = {"role": "assistant", "content": "Hi"}
            choice = {"index": 0, "message": message, "finish_reason": "stop"}
            return self._json({"id": "x", "object": "chat.completion", "choices": [choice]})
        self.send_response(200)
        self.send_header("content-type", "text/event-stream")
        self.send_header("connection", "close")
        self.end_headers()
        self.wfile.write(b"data: " + (CHUNK % "null").encode() + b"\n\n")
        self.wfile.flush()
        self.server.arrived.set()
        self.server.may_end.wait(20)
        self.wfile.write(b"data: " + (CHUNK % '"stop"').encode() + b"\n\ndata: [DONE]\n\n")
        self.close_connection = True

    def _json(self, value: Any) -> None:
        raw = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(raw)))
        self.end_headers()
        self.wfile.write(raw)

    def log_message(self, *_: Any) -> None:
        return


@pytest.fixture
def upstream() -> Iterator[Upstream]:
    with Upstream() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.may_end.set()
        server.shutdown()
        thread.join()


def write_config(folder: Path, url: str, *, ladder: str = "chat", extra: str = "") -> Path:
    path = folder / "rungway.toml"
    path.write_text(
        f'[server]\nauth = "open"\n[backends.b]\nkind = "openai"\nurl = "{url}"\n'
        f'[ladders.{ladder}]\n[[ladders.{ladder}.rungs]]\nbackend = "b"\nmodel = "org/m"\n{extra}'
    )
    return path


def until(condition: Callable[[], bool], within_s: float = 10) -> None:
    """Wait for another process, which tells nobody when it has done what it was asked to."""
    deadline = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline, "it did not come to pass in time"
        threading.Event().wait(0.02)


def rungway(*arguments: str, cwd: Path, stdin: str = "", **environ: str) -> tuple[int, str, str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "RUNGWAY_", "XDG_"))}
    done = subprocess.run(
        [sys.executable, "-m", "router", *arguments],
        capture_output=True,
        text=True,
        input=stdin,
        cwd=cwd,
        timeout=60,
        check=False,
        env={**kept, "PYTHONPATH": str(ROOT), "HOME": str(cwd), **environ},
    )
    return done.returncode, done.stdout, done.stderr


def test_sigterm_lets_calls_end_and_takes_no_more(tmp_path: Path, upstream: Upstream) -> None:
    config = write_config(tmp_path, upstream.url)
    with daemon("--config", str(config), log=tmp_path / "log") as running:
        body = {**HI, "stream": True}
        with httpx.stream("POST", f"{running.url}/v1/chat/completions", json=body) as answer:
            upstream.arrived.wait(5)
            running.process.send_signal(signal.SIGTERM)
            until(lambda: _is_refused(running.url))
            upstream.may_end.set()
            assert answer.read().endswith(b"data: [DONE]\n\n")
        assert running.process.wait(10) == 0
    line = json.loads((tmp_path / "log").read_text().strip().splitlines()[-1])
    assert line["status"] == 200


def _is_refused(url: str) -> bool:
    host, port = url.removeprefix("http://").split(":")
    with socket.socket() as probe:
        return probe.connect_ex((host, int(port))) != 0


def test_reload_is_all_or_nothing(tmp_path: Path, upstream: Upstream) -> None:
    config = write_config(tmp_path, upstream.url)
    log = tmp_path / "log"
    with daemon("--config", str(config), log=log) as running:

        def models() -> list[str]:
            return [m["id"] for m in httpx.get(f"{running.url}/v1/models").json()["data"]]

        assert models() == ["chat"]
        write_config(tmp_path, upstream.url, ladder="other", extra="[nonsense]\n")
        running.process.send_signal(signal.SIGHUP)
        until(lambda: "the reload is refused" in log.read_text())
        assert "nonsense" in log.read_text()
        assert models() == ["chat"]
        write_config(tmp_path, upstream.url, ladder="other")
        running.process.send_signal(signal.SIGHUP)
        until(lambda: models() == ["other"])
        write_config(tmp_path, upstream.url, ladder="third")
        code, out, _ = rungway("reload", "--url", running.url, cwd=tmp_path)
        assert (code, out) == (0, "reloaded\n")
        assert models() == ["third"]
        write_config(tmp_path, upstream.url, extra="[nonsense]\n")
        code, _, errors = rungway("reload", cwd=tmp_path, RUNGWAY_URL=running.url)
        assert code == 1
        assert errors.startswith("rungway: the file is refused, the old configuration stays:\n")
        assert "nonsense" in errors


def test_a_reload_warns_of_what_the_listener_does_not_use(
    tmp_path: Path, upstream: Upstream
) -> None:
    config = write_config(tmp_path, upstream.url)
    log = tmp_path / "log"
    as_started = config.read_text()
    changed = as_started.replace("[server]", "[server]\nstall_s = 7")
    warned = []
    with daemon("--config", str(config), log=log) as running:
        for text in (changed, changed, as_started):
            config.write_text(text)
            assert rungway("reload", "--url", running.url, cwd=tmp_path)[0] == 0
            warned.append(log.read_text().count("server.stall_s changed"))
    assert warned == [1, 2, 2]


def test_a_taken_port_is_a_clear_word(tmp_path: Path, upstream: Upstream) -> None:
    config = write_config(tmp_path, upstream.url)
    port = str(upstream.server_address[1])
    code, _, errors = rungway("serve", "--config", str(config), "--port", port, cwd=tmp_path)
    assert code == 1
    assert "is taken" in errors
    assert "--port" in errors
    assert "Traceback" not in errors


def test_wrong_use_and_wrong_configuration_exit_with_2(tmp_path: Path) -> None:
    assert rungway(cwd=tmp_path)[0] == 2
    assert rungway("serve", "--port", "x", cwd=tmp_path)[0] == 2
    assert rungway("serve", "--config", "nowhere.toml", cwd=tmp_path)[0] == 2
    (tmp_path / "rungway.toml").write_text("[server]\nport = 99999\n")
    for command in ("serve", "check"):
        code, _, errors = rungway(command, cwd=tmp_path)
        assert code == 2
        assert "rungway.toml:2" in errors
        assert "server.port" in errors
    code, out, _ = rungway("check", "--json", cwd=tmp_path)
    assert code == 2
    assert json.loads(out)["ok"] is False


def test_open_mode_cannot_leave_loopback_by_the_command_line(
    tmp_path: Path, upstream: Upstream
) -> None:
    write_config(tmp_path, upstream.url)
    code, _, errors = rungway("serve", "--host", "0.0.0.0", cwd=tmp_path)
    assert code == 2
    assert "open" in errors


def test_check_says_what_is_good_and_what_has_no_effect(tmp_path: Path, upstream: Upstream) -> None:
    endpoint = (
        '[backends.e]\nkind = "inference-endpoint"\nurl = "https://x.example"\nusd_per_hour = 5\n'
    )
    write_config(tmp_path, upstream.url, extra=endpoint)
    code, out, errors = rungway("check", cwd=tmp_path)
    assert code == 0
    assert "2 backends, 1 ladder, 0 keys; no server was asked" in out
    assert "usd_per_hour" in errors


def test_check_takes_what_only_the_service_has_and_serve_does_not(
    tmp_path: Path, upstream: Upstream
) -> None:
    write_config(tmp_path, upstream.url)
    path = tmp_path / "rungway.toml"
    path.write_text(path.read_text().replace('"openai"', '"openai"\ntoken = "credential:t"'))
    code, out, errors = rungway("check", cwd=tmp_path, CREDENTIALS_DIRECTORY="")
    assert (code, "is good: 1 backend" in out) == (0, True)
    assert "backends.b.token: is not checked: only the service has" in errors
    code, _, errors = rungway("serve", cwd=tmp_path, CREDENTIALS_DIRECTORY="")
    assert (code, "is LoadCredential= in the unit" in errors) == (2, True)


def test_check_of_an_empty_file_warns(tmp_path: Path) -> None:
    (tmp_path / "rungway.toml").write_text("")
    code, out, errors = rungway("check", cwd=tmp_path)
    assert (code, "0 backends, 0 ladders, 0 keys" in out) == (0, True)
    assert "there are no ladders, so nothing can be answered" in errors


def test_explain_asks_the_daemon_or_the_configuration(tmp_path: Path, upstream: Upstream) -> None:
    config = write_config(tmp_path, upstream.url)
    request = json.dumps(HI)
    code, out, _ = rungway("explain", "--offline", cwd=tmp_path, stdin=request)
    assert code == 0
    assert out == "ladder chat\n  take  b/org/m: may be tried\n"
    with daemon("--config", str(config), log=tmp_path / "log") as running:
        code, out, _ = rungway(
            "explain", "--json", "--url", running.url, cwd=tmp_path, stdin=request
        )
        assert json.loads(out)["rungs"][0]["take"] is True
        code, out, _ = rungway("status", cwd=tmp_path, RUNGWAY_URL=running.url)
        assert code == 0
        assert "b/org/m" in out
        code, _, errors = rungway(
            "explain", "--url", running.url, cwd=tmp_path, stdin='{"model": "x", "messages": [1]}'
        )
        assert code == 1
        assert "messages[0]" in errors
    code, _, errors = rungway("status", cwd=tmp_path, RUNGWAY_URL=running.url)
    assert code == 1
    assert "no daemon answers" in errors
    assert rungway("explain", cwd=tmp_path, stdin="[")[0] == 2


def test_the_commands_ask_where_the_configuration_puts_the_daemon(
    tmp_path: Path, upstream: Upstream
) -> None:
    config = write_config(tmp_path, upstream.url)
    asking = tmp_path / "asking"
    asking.mkdir()

    def asked(host: str, port: int) -> Path:
        path = asking / "rungway.toml"
        # The daemon has its token; whoever asks it need not.
        path.write_text(
            f'[server]\nhost = "{host}"\nport = {port}\n'
            f'[backends.b]\nkind = "tgi"\nurl = "{upstream.url}"\ntoken = "env:ABSENT"\n'
        )
        return path

    with daemon("--config", str(config), log=tmp_path / "log") as running:
        port = int(running.url.rpartition(":")[2])
        path = asked("0.0.0.0", port)
        for where, cwd in ((("--config", str(path)), tmp_path), ((), asking)):
            code, out, errors = rungway("status", *where, cwd=cwd)
            assert (code, errors) == (0, "")
            assert "b/org/m" in out
            code, out, errors = rungway("explain", *where, cwd=cwd, stdin=json.dumps(HI))
            assert (code, errors) == (0, "")
            assert "take  b/org/m" in out
            assert rungway("reload", *where, cwd=cwd)[:2] == (0, "reloaded\n")
        assert rungway("status", cwd=asking, RUNGWAY_URL="http://127.0.0.1:1")[0] == 1
    for host, shown in (("::", "[::1]"), ("::1", "[::1]"), ("localhost", "localhost")):
        code, _, errors = rungway("status", "--config", str(asked(host, port)), cwd=tmp_path)
        assert code == 1
        assert f"no daemon answers at http://{shown}:{port}" in errors
    code, _, errors = rungway("status", "--config", str(asked("::1", 0)), cwd=tmp_path)
    assert (code, "--url" in errors) == (1, True)
    path.write_text("[server]\nport = 99999\n")
    code, _, errors = rungway("status", "--config", str(path), cwd=tmp_path)
    assert (code, "rungway.toml:2" in errors) == (2, True)
    assert rungway("status", "--url", "http://[", cwd=tmp_path)[0] == 1


def test_a_created_key_works(tmp_path: Path, upstream: Upstream) -> None:
    code, out, _ = rungway("keys", "create", "alice", "--json", cwd=tmp_path)
    made = json.loads(out)
    assert code == 0
    assert hashlib.sha256(made["key"].encode()).hexdigest() == made["sha256"]
    code, out, _ = rungway("keys", "create", "alice", cwd=tmp_path)
    block = out[out.index("[keys") :]
    assert "paste this into the configuration" in out
    assert "`rungway reload`" in out
    assert "admin" not in out
    key = re.search(r"rk-\S+", out)
    assert key is not None
    _, out, _ = rungway("keys", "create", "root", "--admin", cwd=tmp_path)
    admin = re.search(r"rk-\S+", out)
    assert admin is not None
    block += out[out.index("[keys") :]
    config = write_config(tmp_path, upstream.url, extra=block)
    config.write_text(config.read_text().replace('auth = "open"', 'auth = "keys"'))
    with daemon("--config", str(config), log=tmp_path / "log") as running:
        url = f"{running.url}/v1/chat/completions"
        assert httpx.post(url, json=HI).status_code == 401
        headers = {"Authorization": f"Bearer {key[0]}"}
        assert httpx.post(url, json=HI, headers=headers).status_code == 200
        assert rungway("keys", "create", "no/good", cwd=tmp_path)[0] == 2
        codes = [
            rungway("reload", "--url", running.url, cwd=tmp_path, RUNGWAY_API_KEY=one)[0]
            for one in (key[0], admin[0])
        ]
        assert codes == [1, 0]
    assert key[0] not in (tmp_path / "log").read_text()


def test_systemd_is_told(tmp_path: Path, upstream: Upstream) -> None:
    config = write_config(tmp_path, upstream.url)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        path = str(tmp_path / "notify")
        manager.bind(path)
        manager.settimeout(10)
        with daemon("--config", str(config), log=tmp_path / "log", NOTIFY_SOCKET=path) as running:
            assert manager.recv(1000) == b"READY=1"
            running.process.send_signal(signal.SIGHUP)
            assert manager.recv(1000).startswith(b"RELOADING=1\nMONOTONIC_USEC=")
            assert manager.recv(1000) == b"READY=1"
            running.process.send_signal(signal.SIGTERM)
            assert manager.recv(1000) == b"STOPPING=1"


def test_the_demos_model_ends_with_a_killed_daemon(tmp_path: Path) -> None:
    with daemon("--demo", log=tmp_path / "log") as running:
        children = _children(running)
        assert children
        running.process.kill()
        until(lambda: not any(is_alive(pid) for pid in children))


def _children(running: Running) -> list[int]:
    task = Path(f"/proc/{running.process.pid}/task/{running.process.pid}/children")
    return [int(pid) for pid in task.read_text().split()]


def is_alive(pid: int) -> bool:
    try:
        return ") Z " not in Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_without_a_configuration_it_finds_what_there_is(tmp_path: Path) -> None:
    """Nothing runs on the usual ports here, or something does: either way it starts and says so."""
    with daemon(log=tmp_path / "log", HF_TOKEN="hf_test") as running:
        assert httpx.get(f"{running.url}/health").status_code == 200
        assert any("looking for model servers" in line for line in running.lines)
        assert any("hf/" in line for line in running.lines)


def test_without_a_ladder_it_is_not_ready_and_says_what_to_do(tmp_path: Path) -> None:
    config = tmp_path / "empty.toml"
    config.write_text('[server]\nauth = "open"\n')
    with daemon("--config", str(config), log=tmp_path / "log") as running:
        ready = httpx.get(f"{running.url}/ready")
        assert (ready.status_code, ready.json()["ready"]) == (503, False)
        assert httpx.get(f"{running.url}/health").status_code == 200
        said = "\n".join(running.lines)
    for words in ("no ladder", str(config), "HF_TOKEN", "--demo", "write a configuration"):
        assert words in said


def test_a_drain_that_cannot_wait_says_so_to_its_clients(
    tmp_path: Path, upstream: Upstream
) -> None:
    config = write_config(tmp_path, upstream.url)
    config.write_text(config.read_text().replace("[server]", "[server]\ndrain_s = 0.3"))
    with daemon("--config", str(config), log=tmp_path / "log") as running:
        body = {**HI, "stream": True}
        with httpx.stream("POST", f"{running.url}/v1/chat/completions", json=body) as answer:
            upstream.arrived.wait(5)
            asked = time.monotonic()
            running.process.send_signal(signal.SIGTERM)
            raw = b""
            with pytest.raises(httpx.RemoteProtocolError):
                for data in answer.iter_bytes():
                    raw += data
        assert b'"code":"draining"' in raw
        assert b"[DONE]" not in raw
        assert running.process.wait(10) == 0
        assert time.monotonic() - asked < 3
    line = json.loads((tmp_path / "log").read_text().strip().splitlines()[-1])
    assert line["error"] == "draining"


def test_a_second_signal_ends_the_calls_at_once(tmp_path: Path, upstream: Upstream) -> None:
    config = write_config(tmp_path, upstream.url)
    log = tmp_path / "log"
    with daemon("--config", str(config), log=log) as running:
        body = {**HI, "stream": True}
        with httpx.stream("POST", f"{running.url}/v1/chat/completions", json=body) as answer:
            upstream.arrived.wait(5)
            # The call belongs to the configuration before this one.
            assert rungway("reload", "--url", running.url, cwd=tmp_path)[0] == 0
            running.process.send_signal(signal.SIGINT)
            said = "stopping: waiting up to 30 s for 1 calls; again to stop at once"
            until(lambda: said in log.read_text())
            asked = time.monotonic()
            running.process.send_signal(signal.SIGINT)
            raw = b""
            with pytest.raises(httpx.RemoteProtocolError):
                for data in answer.iter_bytes():
                    raw += data
        assert b'"code":"draining"' in raw
        assert b"[DONE]" not in raw
        assert running.process.wait(10) == 0
        assert time.monotonic() - asked < 5
    lines = log.read_text().strip().splitlines()
    assert any("stopping at once: ending 1 calls" in line for line in lines)
    assert json.loads(lines[-1])["error"] == "draining"
