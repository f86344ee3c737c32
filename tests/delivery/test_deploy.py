"""The deployment examples: their configurations are ones that Rungway takes."""

from __future__ import annotations

import re
import textwrap
from pathlib import Path

from router.config.load import parse

ROOT = Path(__file__).parents[2]
SIDECAR = (ROOT / "config" / "kubernetes-sidecar.yaml").read_text()


def found(pattern: str, text: str) -> str:
    match = re.search(pattern, text, re.MULTILINE)
    assert match, pattern
    return match[1]


def test_the_sidecars_configuration_is_taken_and_leaves_time_to_drain(tmp_path: Path) -> None:
    token = tmp_path / "hf_token"
    token.write_text("hf_example")
    text = textwrap.dedent(found(r"rungway\.toml: \|\n((?:    .*\n|\n)+)", SIDECAR))
    text = text.replace("/run/secrets/rungway/hf_token", str(token))
    config = parse(text, "rungway.toml", {})
    assert list(config.ladders) == ["assistant"]
    grace_s = int(found(r"terminationGracePeriodSeconds: (\d+)", SIDECAR))
    assert grace_s > config.server.drain_s


def test_the_sidecar_runs_as_the_images_user() -> None:
    user = found(r"^USER (\d+)", (ROOT / "Dockerfile").read_text())
    assert found(r"runAsUser: (\d+)", SIDECAR) == user
    assert found(r"fsGroup: (\d+)", SIDECAR) == user


def test_each_toml_block_of_the_text_is_of_known_settings() -> None:
    text = (ROOT / "docs" / "deploy.md").read_text()
    blocks = re.findall(r"```toml\n(.*?)```", text, re.DOTALL)
    assert blocks
    for block in blocks:
        rung = 'ladders = { a = { rungs = [{ backend = "hf", model = "m" }] } }\n'
        text = rung + block.replace("credential:hf_token", "env:TOKEN")
        assert parse(text, "deploy.md", {"TOKEN": "hf_example"}).backends


def test_the_files_that_the_text_names_exist() -> None:
    text = (ROOT / "docs" / "deploy.md").read_text()
    named = re.findall(r"(?<![\w/])(?:config|systemd)/[\w.-]+\.\w+", text)
    assert len(named) > 2
    assert [name for name in named if not (ROOT / name).exists()] == []
