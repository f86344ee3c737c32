"""The Dockerfile keeps what it promises, as far as its text can show; docs/deploy.md runs it."""

from __future__ import annotations

import re
from pathlib import Path

from router.config.schema import Server

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "Dockerfile").read_text()
STAGES = TEXT.split("\nFROM ")[1:]
FINAL = STAGES[-1]


def test_both_stages_are_of_one_python() -> None:
    bases = {stage.split()[0] for stage in STAGES}
    assert len(STAGES) == 2
    assert len(bases) == 1


def test_the_final_stage_installs_nothing_and_is_nobody() -> None:
    for tool in ("pip install", "apt-get", "curl", "COPY ."):
        assert tool not in FINAL
    assert re.search(r"^USER [1-9]\d+:[1-9]\d+$", FINAL, re.MULTILINE)


def test_versions_are_the_tested_ones() -> None:
    assert "--constraint constraints.txt" in STAGES[0]


def test_the_port_is_the_default_one_and_its_health_is_checked() -> None:
    port = str(Server().port)
    assert f"EXPOSE {port}" in FINAL
    assert f"'127.0.0.1', {port}" in FINAL
    assert "'/health'" in FINAL


def test_only_what_is_copied_goes_to_the_builder() -> None:
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    assert "*" in ignored
    for line in re.findall(r"^COPY (?!--from)(.+)$", TEXT, re.MULTILINE):
        for name in line.split()[:-1]:
            assert f"!{name}" in ignored
            assert (ROOT / name).exists()
