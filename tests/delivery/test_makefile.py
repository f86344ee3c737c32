"""The Makefile installs what is missing once, and says what a machine lacks. No network is used:
`make --dry-run` in a copy shows what would be done."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
STAMPS = (".venv/.made", ".venv/.run", ".venv/.test", ".venv/.check", ".venv-openai2/.made")


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path / name)
        os.utime(tmp_path / name, (1_000, 1_000))
    return tmp_path


def stamp_all(tree: Path) -> None:
    for at, name in enumerate(STAMPS, start=2_000):
        (tree / name).parent.mkdir(exist_ok=True)
        (tree / name).touch()
        os.utime(tree / name, (at, at))


def make(tree: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    # A make that runs the tests must not hand its own flags to this one.
    environ = {name: value for name, value in os.environ.items() if "MAKE" not in name}
    return subprocess.run(
        ["make", *arguments], cwd=tree, env=environ, capture_output=True, text=True, check=False
    )


def test_make_alone_lists_every_target(tree: Path) -> None:
    text = make(tree).stdout
    targets = re.findall(r"^\.PHONY: (\w+)$", (tree / "Makefile").read_text(), re.MULTILINE)
    assert {"run", "test", "check", "bench", "image"} <= set(targets)
    assert [name for name in targets if f"make {name} " not in text] == []


def test_the_first_run_installs_and_the_second_does_not(tree: Path) -> None:
    assert "pip install" in make(tree, "--dry-run", "run").stdout
    stamp_all(tree)
    for target in ("run", "test", "check"):
        assert "pip install" not in make(tree, "--dry-run", target).stdout


@pytest.mark.parametrize("changed", ["pyproject.toml", "constraints.txt"])
def test_a_changed_requirement_is_installed(tree: Path, changed: str) -> None:
    stamp_all(tree)
    os.utime(tree / changed, (3_000, 3_000))
    assert "pip install" in make(tree, "--dry-run", "test").stdout


def test_check_is_lint_types_and_test(tree: Path) -> None:
    stamp_all(tree)
    text = make(tree, "--dry-run", "check").stdout
    for command in ("ruff check", "ruff format --check", "mypy", "pytest"):
        assert command in text


@pytest.mark.parametrize(
    ("fails_on", "advice"),
    [("ensurepip", "apt install python3-venv"), ("version_info", "3.11 or newer")],
)
def test_an_unfit_python_is_explained(tree: Path, fails_on: str, advice: str) -> None:
    python = tree / "python-stub"
    python.write_text(f'#!/bin/sh\ncase "$*" in *{fails_on}*) exit 1;; esac\n')
    python.chmod(0o755)
    done = make(tree, "run", f"PYTHON={python}")
    assert done.returncode != 0
    assert advice in done.stderr
    assert not (tree / STAMPS[0]).exists()


def test_no_python_is_explained(tree: Path) -> None:
    done = make(tree, "run", "PYTHON=python-that-is-not-here")
    assert done.returncode != 0
    assert "apt install python3 python3-venv" in done.stderr


def test_constraints_pin_every_direct_requirement_and_name_no_place(tree: Path) -> None:
    text = (tree / "constraints.txt").read_text()
    pinned = {name.lower().replace("_", "-") for name in re.findall(r"^([\w.-]+)==", text, re.M)}
    wanted = re.findall(r'^  "([\w-]+)[=>]', (tree / "pyproject.toml").read_text(), re.MULTILINE)
    assert len(wanted) > 10
    assert [name for name in wanted if name.lower().replace("_", "-") not in pinned] == []
    assert "://" not in text
    assert "--" not in text
