"""One real Valkey a session; each test finds it empty."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from tests.store.contract import MemoryRig, Rig, SqliteRig, ValkeyRig
from tests.store.server import ValkeyServer


@pytest.fixture(scope="session")
def valkey_process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ValkeyServer]:
    server = ValkeyServer(tmp_path_factory.mktemp("valkey"))
    server.start()
    yield server
    server.kill()


@pytest.fixture
def valkey_server(valkey_process: ValkeyServer) -> ValkeyServer:
    valkey_process.command("FLUSHALL")
    return valkey_process


@pytest.fixture(params=["memory", "sqlite", "valkey"])
async def rig(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Rig]:
    rig: Rig
    if request.param == "memory":
        rig = MemoryRig()
    elif request.param == "sqlite":
        rig = SqliteRig(tmp_path)
    else:
        rig = ValkeyRig(request.getfixturevalue("valkey_server"))
    yield rig
    await rig.aclose()
