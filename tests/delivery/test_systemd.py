"""The unit is accepted by systemd's own verifier without a word, and is well locked in."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from router.config.schema import Server

UNIT = Path(__file__).parents[2] / "systemd" / "rungway.service"


def analyze(*arguments: str) -> subprocess.CompletedProcess[str]:
    program = shutil.which("systemd-analyze")
    assert program, "systemd-analyze is not on this machine: apt install systemd"
    return subprocess.run([program, *arguments], capture_output=True, text=True, check=False)


@pytest.fixture
def unit(tmp_path: Path) -> Path:
    """The unit with a command that exists here, which the verifier asks for."""
    copy = tmp_path / UNIT.name
    command = tmp_path / "rungway"
    command.write_text("#!/bin/sh\n")
    command.chmod(0o755)
    copy.write_text(UNIT.read_text().replace("/opt/rungway/bin/rungway", str(command)))
    return copy


def verify(unit: Path) -> str:
    assert Path("/bin/kill").exists(), "/bin/kill is not on this machine: apt install procps"
    # The exit code is 0 even for unknown settings: only silence is consent.
    done = analyze("verify", "--man=no", "--recursive-errors=no", str(unit))
    return done.stdout + done.stderr


def test_the_unit_verifies_without_a_word(unit: Path) -> None:
    assert verify(unit) == ""


def test_the_verifier_would_have_found_a_slip(unit: Path) -> None:
    unit.write_text(unit.read_text().replace("DynamicUser=", "DynamicUsr="))
    assert "DynamicUsr" in verify(unit)


def test_the_unit_is_well_locked_in(unit: Path) -> None:
    done = analyze("security", "--offline=true", "--threshold=20", str(unit))
    assert done.returncode == 0, done.stdout
    assert "Overall exposure level" in done.stdout


def setting(name: str) -> str:
    found = re.search(rf"^{name}=(.+)$", UNIT.read_text(), re.MULTILINE)
    assert found, f"{name} is not set in {UNIT.name}"
    return found[1]


def test_a_drain_has_time_to_end() -> None:
    assert int(setting("TimeoutStopSec")) > Server().drain_s


def test_the_service_says_when_it_is_ready_and_reloads_on_hangup() -> None:
    assert setting("Type") == "notify"
    assert setting("ExecReload") == "/bin/kill -HUP $MAINPID"
    assert setting("RestartPreventExitStatus") == "2"


def test_each_connection_may_have_its_two_descriptors() -> None:
    assert int(setting("LimitNOFILE")) > 2 * Server().max_connections
