"""What a start says to the person who started it."""

from __future__ import annotations

import pytest

from router.cli.serve import announce
from router.config.load import parse
from router.hub.detect import usual_ports
from router.hub.zero_config import configuration_for


def test_a_start_that_found_nothing_says_where_it_looked_and_what_to_do(
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = parse(configuration_for([], has_token=False), "what was found here", {})
    announce("http://127.0.0.1:8484", config)
    said = capsys.readouterr().out
    assert "no ladder" in said
    assert all(str(port) in said for port in usual_ports())
    for words in ("HF_TOKEN", "start a model server", "--demo", "write a configuration"):
        assert words in said
    assert "try it" not in said


def test_a_start_with_a_token_shows_its_ladders(capsys: pytest.CaptureFixture[str]) -> None:
    found = configuration_for([], has_token=True)
    announce("http://127.0.0.1:8484", parse(found, "what was found here", {"HF_TOKEN": "hf_x"}))
    said = capsys.readouterr().out
    assert "ladder chat (chat): hf/" in said
    assert "no ladder" not in said
