"""What a start, and a command's wrong use, say to the person who gave it."""

from __future__ import annotations

import pytest

from router.cli.main import WRONG_USE, main
from router.cli.serve import announce
from router.config.load import parse
from router.hub.detect import usual_ports
from router.hub.zero_config import configuration_for


def test_a_start_that_found_nothing_says_where_it_looked_and_what_to_do(
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = parse(configuration_for([], has_token=False), "", {})
    announce("http://127.0.0.1:8484", config)
    said = capsys.readouterr().out
    assert "no ladder" in said
    assert all(str(port) in said for port in usual_ports())
    for words in ("HF_TOKEN", "start a model server", "--demo", "write a configuration"):
        assert words in said
    assert "try it" not in said


def test_a_start_with_a_token_shows_its_ladders(capsys: pytest.CaptureFixture[str]) -> None:
    found = configuration_for([], has_token=True)
    announce("http://127.0.0.1:8484", parse(found, "", {"HF_TOKEN": "hf_x"}))
    said = capsys.readouterr().out
    assert "ladder chat (chat): hf/" in said
    assert "no ladder" not in said


@pytest.mark.parametrize(
    ("url", "asked"),
    [
        ("http://0.0.0.0:8484", "http://127.0.0.1:8484/v1"),
        ("http://[::]:8484", "http://[::1]:8484/v1"),
        ("http://[::1]:1", "http://[::1]:1/v1"),
        ("http://10.0.0.7:1", "http://10.0.0.7:1/v1"),
    ],
)
def test_the_lines_to_paste_ask_an_address_that_answers(
    url: str, asked: str, capsys: pytest.CaptureFixture[str]
) -> None:
    found = configuration_for([], has_token=True)
    announce(url, parse(found, "", {"HF_TOKEN": "hf_x"}))
    said = capsys.readouterr().out
    assert f"Rungway listens on {url}\n" in said
    assert f"curl {asked}/chat/completions" in said
    assert f'base_url="{asked}"' in said


def test_the_demo_stays_on_this_machine(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["serve", "--demo", "--host", "0.0.0.0"])
    assert ended.value.code == WRONG_USE
    assert capsys.readouterr().err == "--demo serves this machine only: leave out --host\n"


@pytest.mark.parametrize("port", ["abc", "-1", "65536", "1.5", "", "9" * 5000])
def test_what_is_no_port_is_told_what_one_is(port: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["serve", f"--port={port}"])
    assert ended.value.code == WRONG_USE
    assert "argument --port: a port is a number from 0 to 65535\n" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["explain", "status", "reload"])
def test_the_commands_that_ask_the_daemon_say_how(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main([command, "--help"])
    said = capsys.readouterr().out
    assert "$RUNGWAY_URL" in said
    assert "$RUNGWAY_API_KEY" in said
