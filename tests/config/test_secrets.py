"""A token is found by its reference alone, and no message or repr ever holds it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from router.config.secrets import Credential, SecretError, read_secret

SECRET = "hf_very-secret"


def test_a_variable_of_the_environment() -> None:
    assert read_secret("env:TOKEN", {"TOKEN": f" {SECRET}\n"}) == SECRET


def test_a_file_without_its_line_break(tmp_path: Path) -> None:
    (tmp_path / "token").write_text(f"{SECRET}\n")
    assert read_secret(f"file:{tmp_path}/token", {}) == SECRET


def test_a_credential_of_systemd(tmp_path: Path) -> None:
    (tmp_path / "hf").write_text(SECRET)
    environ = {"CREDENTIALS_DIRECTORY": str(tmp_path)}
    assert read_secret("credential:hf", environ) == SECRET


@pytest.mark.parametrize(
    ("reference", "words"),
    [
        (SECRET, "given by reference"),
        ("env:", "given by reference"),
        ("file:relative", "given by reference"),
        ("credential:../hf", "given by reference"),
        ("", "given by reference"),
        ("env:ABSENT", "ABSENT is not set"),
        ("env:EMPTY", "EMPTY is not set"),
        ("env:TWO_LINES", "characters that no token has"),
        ("env:NOT_ASCII", "characters that no token has"),
        ("credential:hf", r"\$CREDENTIALS_DIRECTORY"),
        ("file:/nowhere/at/all", "No such file"),
        ("file:/", "cannot read /: Is a directory"),
    ],
)
def test_what_leads_to_nothing_is_said_without_the_secret(reference: str, words: str) -> None:
    environ = {"EMPTY": " ", "TWO_LINES": f"{SECRET}\r\nX: y", "NOT_ASCII": f"{SECRET}ü"}
    with pytest.raises(SecretError, match=words) as caught:
        read_secret(reference, environ)
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "is empty"),
        (b" \n", "is empty"),
        (b"\xff\xfe", "not UTF-8"),
        (b"x" * (16 << 10) + b"y", "longer than any token"),
        (SECRET.encode() + b"\0", "characters that no token has"),
    ],
)
def test_a_file_that_holds_no_token(tmp_path: Path, content: bytes, words: str) -> None:
    (tmp_path / "token").write_bytes(content)
    with pytest.raises(SecretError, match=words) as caught:
        read_secret(f"file:{tmp_path}/token", {})
    assert SECRET not in str(caught.value)


def test_a_pipe_without_a_writer_does_not_hang(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(SecretError, match="is empty"):
        read_secret(f"file:{tmp_path}/pipe", {})


def test_a_credential_is_sent_and_a_keys_own_goes_first() -> None:
    credential = Credential("env:TOKEN", {"TOKEN": SECRET})
    assert credential.headers() == {"Authorization": f"Bearer {SECRET}"}
    assert credential.headers("hf_own") == {"Authorization": "Bearer hf_own"}
    assert Credential().headers() == {}
    assert SECRET not in repr(credential)


def test_a_changed_file_is_read_again_and_a_lost_one_changes_nothing(tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.write_text("hf_old")
    credential = Credential(f"file:{file}")
    assert not credential.reload()
    file.write_text("hf_new")
    assert credential.reload()
    assert credential.headers() == {"Authorization": "Bearer hf_new"}
    file.unlink()
    assert not credential.reload()
    assert credential.headers() == {"Authorization": "Bearer hf_new"}


def test_without_a_reference_there_is_nothing_to_reload() -> None:
    assert not Credential().reload()
