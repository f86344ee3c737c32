"""Keys made, rotated and revoked in running daemons, by the command and across processes."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

from tests.e2e.conftest import Running, daemon
from tests.e2e.test_daemon import HI, Upstream, rungway, until, upstream

__all__ = ["upstream"]
_SOON_S = 1.0


@contextmanager
def daemons(folder: Path, url: str, names: str) -> Iterator[tuple[str, list[Running]]]:
    """An admin's secret, and a daemon for each letter, all on one state."""
    _, out, _ = rungway("keys", "create", "root", "--admin", "--json", cwd=folder)
    admin = json.loads(out)
    path = folder / "rungway.toml"
    path.write_text(
        f'[state]\nurl = "sqlite://{folder}/state.db"\n'
        f'[backends.b]\nkind = "openai"\nurl = "{url}"\n'
        '[ladders.chat]\n[[ladders.chat.rungs]]\nbackend = "b"\nmodel = "org/m"\n'
        f'[keys.root]\nsha256 = "{admin["sha256"]}"\nadmin = true\n'
    )
    with contextmanager(_all)(path, names) as running:
        yield admin["key"], running


def _all(path: Path, names: str) -> Iterator[list[Running]]:
    if not names:
        yield []
        return
    with daemon("--config", str(path), log=path.parent / f"log-{names[0]}") as first:
        with contextmanager(_all)(path, names[1:]) as others:
            yield [first, *others]


def chat(one: Running, secret: str) -> int:
    headers = {"Authorization": f"Bearer {secret}"}
    return httpx.post(f"{one.url}/v1/chat/completions", json=HI, headers=headers).status_code


def test_a_key_of_one_daemon_works_in_the_other_until_it_is_revoked(
    tmp_path: Path, upstream: Upstream
) -> None:
    with daemons(tmp_path, upstream.url, "ab") as (admin, (one, other)):
        headers = {"Authorization": f"Bearer {admin}"}
        keys = f"{one.url}/router/v1/keys"
        made = httpx.post(keys, json={"name": "alice"}, headers=headers).json()
        assert [chat(one, made["key"]), chat(other, made["key"])] == [200, 200]
        rotated = httpx.post(f"{keys}/alice/rotate", headers=headers).json()
        assert chat(other, rotated["key"]) == 200
        until(lambda: chat(other, made["key"]) == 401, _SOON_S)
        began = time.monotonic()
        assert httpx.delete(f"{keys}/alice", headers=headers).status_code == 200
        assert chat(one, rotated["key"]) == 401
        until(lambda: chat(other, rotated["key"]) == 401, _SOON_S)
        assert time.monotonic() - began < _SOON_S
        assert httpx.delete(f"{keys}/root", headers=headers).status_code == 200
        assert chat(one, admin) == 401
        until(lambda: chat(other, admin) == 401, _SOON_S)
    # Of its start on, too; and no secret was written anywhere.
    with daemon("--config", str(tmp_path / "rungway.toml"), log=tmp_path / "log-c") as later:
        assert chat(later, admin) == 401
    secrets = (admin, made["key"], rotated["key"])
    for path in tmp_path.iterdir():
        if path.is_file():
            written = path.read_bytes()
            assert not any(secret.encode() in written for secret in secrets), path


def test_the_command_makes_shows_and_ends_keys_of_the_daemon(
    tmp_path: Path, upstream: Upstream
) -> None:
    with daemons(tmp_path, upstream.url, "a") as (admin, (one,)):
        environ = {"RUNGWAY_URL": one.url, "RUNGWAY_API_KEY": admin}

        def run(*arguments: str, **changes: str) -> tuple[int, str, str]:
            return rungway(*arguments, cwd=tmp_path, **{**environ, **changes})

        def told(*arguments: str) -> Any:
            code, out, errors = run(*arguments, "--json")
            assert (code, errors) == (0, "")
            return json.loads(out)

        code, out, _ = run(
            "keys", "create", "alice", "--ladder", "chat", "--limit", "usd_per_day=0.5"
        )
        assert code == 0
        assert "alice may call at once" in out
        secret = next(word for word in out.split() if word.startswith("rk-"))
        assert chat(one, secret) == 200
        made = told("keys", "create", "bob", "--tier", "gold", "--limit", "concurrent=2")
        assert chat(one, made["key"]) == 200
        assert [key["name"] for key in told("keys", "list")["data"]] == ["alice", "bob", "root"]
        _, out, _ = run("keys", "list")
        assert [line.split()[0] for line in out.splitlines()] == ["NAME", "alice", "bob", "root"]
        assert "usd_per_day=0.5" in out
        assert told("keys", "show", "bob")["limits"] == {"concurrent": 2}
        assert "limits          usd_per_day=0.5\n" in run("keys", "show", "alice")[1]

        rotated = told("keys", "rotate", "bob", "--overlap-s", "60")["key"]
        assert [chat(one, made["key"]), chat(one, rotated)] == [200, 200]
        assert "every older one has ended" in run("keys", "rotate", "bob")[1]
        assert chat(one, rotated) == 401
        assert run("keys", "revoke", "alice")[:2] == (
            0,
            "alice is revoked, and its sessions with it\n",
        )
        assert chat(one, secret) == 401
        assert "revoked 2" in run("keys", "list")[1]

        usage = told("usage", "--group", "key,ladder")
        assert [(line["key"], line["requests"]) for line in usage["data"]] == [
            ("alice", 1),
            ("bob", 3),
        ]
        _, out, _ = run("usage")
        assert out.splitlines()[0].split()[:3] == ["KEY", "REQUESTS", "INPUT_TOKENS"]
        assert told("usage", "resolve", "alice", "--release")["resolved_usd"] == 0
        assert run("usage", "resolve", "--charge")[1] == "0 USD that were in doubt are charged\n"

        for code, arguments in (
            (1, ("keys", "show", "nobody")),
            (1, ("keys", "create", "bob")),
            (1, ("keys", "rotate", "root")),
            (2, ("keys", "create", "no/good")),
            (2, ("keys", "revoke", "no/good")),
            (2, ("keys", "create", "carol", "--limit", "usd_per_dya=1")),
            (2, ("keys", "create", "carol", "--limit", "concurrent=many")),
            (2, ("keys", "create", "carol", "--ladder", "chta")),
            (2, ("keys", "create", "carol", "--offline", "--limit", "concurrent=0")),
            (2, ("usage", "--group", "colour")),
            (2, ("usage", "--since", "yesterday")),
            (2, ("usage", "resolve")),
        ):
            found, out, errors = run(*arguments)
            assert (found, out, errors != "") == (code, "", True), arguments
        assert run("keys", "list", RUNGWAY_API_KEY=rotated)[0] == 1
        assert run("keys", "list", RUNGWAY_URL="http://127.0.0.1:1")[0] == 1


def test_an_offline_key_is_printed_with_all_its_settings(tmp_path: Path) -> None:
    arguments = ("keys", "create", "al.ice", "--ladder", 'a"b', "--tier", "gold", "--admin")
    limits = ("--limit", "usd_per_day=0.25", "--limit", "tokens_per_day=2000000")
    code, out, _ = rungway(
        *arguments, *limits, "--offline", cwd=tmp_path, RUNGWAY_API_KEY="any", RUNGWAY_URL="x"
    )
    assert code == 0
    path = tmp_path / "rungway.toml"
    ladder = '[ladders.\'a"b\']\n[[ladders.\'a"b\'.rungs]]\nbackend = "b"\nmodel = "m"\n'
    backend = '[backends.b]\nkind = "openai"\nurl = "http://127.0.0.1:9"\n'
    path.write_text(backend + ladder + out[out.index("[keys") :])
    code, out, _ = rungway("check", "--config", str(path), cwd=tmp_path)
    assert (code, "1 key;" in out) == (0, True), out
    assert "usd_per_day = 0.25\ntokens_per_day = 2000000\n" in path.read_text()
