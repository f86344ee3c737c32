"""What only a server can do: die, forget, hang, evict, be old, run out of memory, ask who you are.

And what two languages need: the script's decision and `core.leases.grant` are the same.
"""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as some

from router.core.leases import Ask, Row, grant
from router.errors import StateUnavailable
from router.store import valkey_scripts
from router.store.base import AMOUNT_MAX, KeptAnswer, KeyRecord, StateLost, StateRefused, Totals
from router.store.open import open_store
from router.store.valkey import ValkeyStore
from tests.store.contract import DAY, NOW, ROW, USD, ask, left, say
from tests.store.server import ValkeyServer

Starter = Callable[..., ValkeyServer]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Starter]:
    """Servers of the test's own, with options."""
    servers: list[ValkeyServer] = []

    def start_one(*options: str) -> ValkeyServer:
        server = ValkeyServer(tmp_path, *options)
        server.start()
        servers.append(server)
        return server

    yield start_one
    for server in servers:
        server.kill()


@pytest.fixture
async def store(valkey_server: ValkeyServer) -> AsyncIterator[ValkeyStore]:
    found = await ValkeyStore.open(valkey_server.url)
    yield found
    await found.aclose()


# --- opening ------------------------------------------------------------------------------------


async def test_a_server_that_is_not_there_is_refused() -> None:
    with pytest.raises(StateRefused, match=r"valkey://127\.0\.0\.1:1/0 cannot be used"):
        await ValkeyStore.open("valkey://127.0.0.1:1/0")


async def test_an_address_that_is_none_is_refused() -> None:
    with pytest.raises(StateRefused, match="is wrong"):
        await ValkeyStore.open("valkey://127.0.0.1:many/0")


async def test_a_server_that_may_evict_is_refused(start: Starter) -> None:
    server = start("--maxmemory-policy", "volatile-ttl")
    with pytest.raises(StateRefused, match="its maxmemory-policy is volatile-ttl; set it to noevi"):
        await ValkeyStore.open(server.url)


async def test_a_server_that_hides_its_policy_is_used_with_a_warning(
    start: Starter, caplog: pytest.LogCaptureFixture
) -> None:
    server = start("--rename-command", "CONFIG", "")
    store = await ValkeyStore.open(server.url)
    assert "does not tell its maxmemory-policy" in caplog.text
    await store.sync("p1", [], {})
    await store.aclose()


async def test_a_password_is_asked_for_and_never_told(start: Starter) -> None:
    server = start("--requirepass", "sesame")
    with pytest.raises(StateRefused, match="it asks for a password"):
        await ValkeyStore.open(server.url)
    with pytest.raises(StateRefused, match="refuses the user or the one given") as error:
        await ValkeyStore.open(server.url.replace("//", "//default:open-wide@"))
    assert "open-wide" not in str(error.value)
    store = await open_store(server.url, username="default", password="sesame")
    assert store.is_shared
    await store.sync("p1", [], {})
    await store.aclose()


async def test_a_server_that_is_too_old_is_refused() -> None:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        about = b"# Server\r\nredis_version:5.0.7\r\n"
        while line := await reader.readline():
            words = [
                await reader.readexactly(int((await reader.readline())[1:]) + 2)
                for _ in range(int(line[1:]))
            ]
            is_info = words[0].upper().startswith(b"INFO")
            writer.write(b"$%d\r\n%s\r\n" % (len(about), about) if is_info else b"+OK\r\n")
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    with pytest.raises(StateRefused, match=r"too old \(5\.0\.7\)"):
        await ValkeyStore.open(f"redis://127.0.0.1:{port}/0")
    server.close()
    await server.wait_closed()


async def test_all_names_share_the_hash_tag_that_keeps_them_in_one_slot(
    store: ValkeyStore, valkey_server: ValkeyServer
) -> None:
    session = KeyRecord("session", {}, {"aa": None}, NOW, NOW + 9.0, parent="alice")
    await store.put_key(session, is_new=True)
    await store.put_entries([(b"a", b"1")], group="m", ttl_s=60)
    mine = KeptAnswer("f", "p1")
    await store.claim_answer("alice", "n", mine, ttl_s=60)
    await store.keep_answer("alice", "n", mine._replace(body=b"1"), ttl_s=60)
    for process in ("p1", "p2"):
        await say(store, process, ask(USD, 1, need=100), rows={ROW: Totals(settled=10)})
    await store.end("p1", {ROW: Totals(settled=10, in_doubt=1)})
    names = valkey_server.command("KEYS", "*")
    assert isinstance(names, list)
    assert len(names) > 20
    assert all(name.startswith(b"{rungway}:") for name in names)


# --- in use -------------------------------------------------------------------------------------


async def test_a_server_that_kept_its_data_is_gone_on_with(start: Starter) -> None:
    server = start("--appendonly", "yes", "--appendfsync", "always")
    store = await ValkeyStore.open(server.url)
    await say(store, "p1", ask(USD, 1, spent=70, need=100), rows={ROW: Totals(settled=70)})
    server.kill()
    for _ in range(2):
        with pytest.raises(StateUnavailable, match=r"valkey://127\.0\.0\.1"):
            await say(store, "p1", ask(USD, 2, spent=70))
    server.start()
    [grant] = await say(store, "p1", ask(USD, 3, spent=80, keep=False))
    assert (grant.granted, grant.settled) == (80, 80)
    assert not (await store.sync("p1", [], {})).is_behind
    await store.aclose()


async def test_a_server_that_lost_its_data_gives_no_fresh_budget(start: Starter) -> None:
    server = start()
    store = await ValkeyStore.open(server.url)
    await say(store, "p1", ask(USD, 1, spent=70), rows={ROW: Totals(settled=70)})
    server.kill()
    server.start()
    with pytest.raises(StateLost, match="books none, expected"):
        await say(store, "p1", ask(USD, 2, need=500))
    # Another daemon, new on the empty server, makes books of its own.
    newcomer = await ValkeyStore.open(server.url)
    assert (await left(newcomer, USD))[1] == 1_000
    with pytest.raises(StateLost):
        await store.find_key("aa")
    with pytest.raises(StateLost):
        await store.end("p1", {})
    assert await store.adopt_epoch() == await newcomer.epoch()
    assert (await say(store, "p1", ask(USD, 3, spent=70, keep=False)))[0].granted == 70
    await store.aclose()
    await newcomer.aclose()


async def test_emptied_books_are_lost_books(
    store: ValkeyStore, valkey_server: ValkeyServer
) -> None:
    epoch = await store.epoch()
    valkey_server.command("FLUSHALL")
    with pytest.raises(StateLost):
        await store.sync("p1", [], {})
    assert await store.epoch() != epoch
    with pytest.raises(StateLost):
        await store.sync("p1", [], {})
    await store.adopt_epoch()
    await store.sync("p1", [], {})


async def test_a_failover_that_forgot_what_was_said_is_told_once(
    store: ValkeyStore, valkey_server: ValkeyServer
) -> None:
    for _ in range(3):
        assert not (await store.sync("p1", [], {})).is_behind
    valkey_server.command("SET", "{rungway}:said:p1", 1)
    assert (await store.sync("p1", [], {})).is_behind
    assert not (await store.sync("p1", [], {})).is_behind


async def test_forgotten_scripts_are_sent_again(
    store: ValkeyStore, valkey_server: ValkeyServer
) -> None:
    await store.sync("p1", [], {})
    valkey_server.command("SCRIPT", "FLUSH")
    await store.sync("p1", [], {})


async def test_who_gives_up_waiting_leaves_the_next_its_own_answer(
    store: ValkeyStore, valkey_server: ValkeyServer
) -> None:
    await store.put_key(KeyRecord("alice", {}, {"aa": None}, NOW), is_new=True)
    valkey_server.command("CLIENT", "PAUSE", 150, "ALL")
    for _ in range(3):
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.01):
                await say(store, "p1", ask(USD, 1, need=100))
    record = await store.find_key("aa")
    assert record is not None
    assert record.name == "alice"
    assert (await say(store, "p1", ask(USD, 2, keep=False)))[0].granted == 0


async def test_a_server_that_hangs_is_unavailable(
    start: Starter, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = start()
    store = await ValkeyStore.open(server.url)
    monkeypatch.setattr("router.store.valkey_link._CALL_S", 0.1)
    os.kill(server.pid, signal.SIGSTOP)
    with pytest.raises(StateUnavailable, match="did not answer"):
        await store.sync("p1", [], {})
    monkeypatch.setattr("router.store.valkey_link._PENDING_MAX", 3)
    waiting = [asyncio.ensure_future(store.epoch()) for _ in range(3)]
    await asyncio.sleep(0)
    with pytest.raises(StateUnavailable, match="too slow: 3 others"):
        await store.epoch()
    answers = await asyncio.gather(*waiting, return_exceptions=True)
    assert {type(answer) for answer in answers} == {StateUnavailable}
    os.kill(server.pid, signal.SIGCONT)
    monkeypatch.undo()
    await store.sync("p1", [], {})
    await store.aclose()


async def test_a_server_without_memory_says_so_and_changes_nothing(start: Starter) -> None:
    server = start()
    store = await ValkeyStore.open(server.url)
    await say(store, "p1", ask(USD, 1, spent=10, keep=False))
    server.command("CONFIG", "SET", "maxmemory", 1)
    with pytest.raises(StateUnavailable, match="no memory left"):
        await say(store, "p1", ask(USD, 2, spent=20, keep=False))
    server.command("CONFIG", "SET", "maxmemory", 0)
    assert (await left(store, USD))[0] == 10
    await store.aclose()


async def test_a_replica_is_told_from_a_primary(start: Starter) -> None:
    server = start()
    store = await ValkeyStore.open(server.url)
    server.command("REPLICAOF", "127.0.0.1", 1)
    with pytest.raises(StateUnavailable, match="it is a replica"):
        await store.sync("p1", [], {})
    await store.aclose()


async def test_old_windows_end_by_themselves(
    store: ValkeyStore, valkey_server: ValkeyServer
) -> None:
    """Written by the server's own clock, every account of a window has an end."""
    await say(store, "p1", ask(USD, 1), rows={ROW: Totals(settled=1)})
    await store.end("p1", {ROW: Totals(settled=1)})
    with valkey_server.client() as client:
        accounts = list(client.keys("*:lease:*"))
        assert len(accounts) == 2
        assert {client.ttl(name) > 0 for name in [*accounts, f"{{rungway}}:used:{DAY}:alice"]} == {
            True
        }


# --- the same decision in two languages ---------------------------------------------------------

amounts = some.integers(0, AMOUNT_MAX) | some.integers(0, 1_000)


@settings(deadline=None)
@given(
    ask=some.builds(
        Ask,
        account=some.just(USD),
        number=some.integers(0, 5),
        limit=amounts,
        spent=amounts,
        floor=amounts,
        need=some.integers(0, 1_000) | some.just(0),
        keep=some.booleans(),
    ),
    row=some.builds(Row, granted=amounts, spent=amounts, number=some.integers(0, 5)),
    others=amounts,
    live=some.integers(0, 1_000),
)
def test_the_script_grants_what_the_core_grants(
    valkey_process: ValkeyServer, ask: Ask, row: Row, others: int, live: int
) -> None:
    fields = {name: value for name, value in ask._asdict().items() if name != "account"}
    arguments = {"ask": fields, "row": list(row), "others": others, "live": live}
    with valkey_process.client() as client:
        found = client.eval(
            valkey_scripts.GRANT_ALONE, 1, "{none}:epoch", "", orjson.dumps(arguments)
        )
    expected = grant(ask, row, others, live)
    assert found == list(expected)
