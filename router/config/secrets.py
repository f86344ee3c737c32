"""Tokens by reference: `env:NAME`, `file:/path` or `credential:NAME` (systemd's LoadCredential).

A token written into the configuration itself is refused: files of configuration are copied, shown
and committed. The value is kept out of every `repr`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

_TOKEN_BYTES_MAX = 16 << 10


class SecretError(ValueError):
    """A reference that is malformed, or that leads to nothing usable; the text says how to mend."""


class SecretUnset(SecretError):
    """A variable of the environment that is not set."""


class NoCredentials(SecretError):
    """No directory of credentials: only a service of systemd has one."""


def read_secret(reference: str, environ: Mapping[str, str] | None = None) -> str:
    """The secret behind a reference. Raises SecretError, never with the secret in its text."""
    environ = os.environ if environ is None else environ
    scheme, _, rest = reference.partition(":")
    if scheme == "env" and rest:
        value = environ.get(rest, "").strip()
        if not value:
            raise SecretUnset(f"the environment variable {rest} is not set; `export {rest}=…`")
        return _usable(value, f"the environment variable {rest}")
    if scheme == "file" and rest.startswith("/"):
        return _read_file(Path(rest))
    if scheme == "credential" and rest and "/" not in rest:
        folder = environ.get("CREDENTIALS_DIRECTORY")
        if not folder:
            raise NoCredentials(
                "there is no $CREDENTIALS_DIRECTORY: is LoadCredential= in the unit?"
            )
        return _read_file(Path(folder) / rest)
    raise SecretError(
        "a token is given by reference, never in the file itself: "
        'write "env:NAME", "file:/absolute/path" or "credential:NAME"'
    )


def open_without_waiting(path: str, flags: int) -> int:
    """An opener that does not wait for a writer, should the path be a pipe."""
    return os.open(path, flags | os.O_NONBLOCK)


def _read_file(path: Path) -> str:
    try:
        with open(path, "rb", opener=open_without_waiting) as file:
            data = file.read(_TOKEN_BYTES_MAX + 1) or b""
        if len(data) > _TOKEN_BYTES_MAX:
            raise SecretError(f"{path} is longer than any token: is it the right file?")
        value = data.decode("utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise SecretError(f"cannot read {path}: {reason}") from error
    if not value:
        raise SecretError(f"{path} is empty")
    return _usable(value, str(path))


def _usable(value: str, where: str) -> str:
    # A line break or control character would let a token write headers of its own.
    if not value.isascii() or not value.isprintable() or " " in value:
        raise SecretError(f"{where} holds characters that no token has (spaces, line breaks, …)")
    return value


class Credential:
    """A backend's token, which may change while the daemon runs. Without a reference: none."""

    def __init__(
        self, reference: str | None = None, environ: Mapping[str, str] | None = None
    ) -> None:
        self.reference = reference
        self._environ = environ
        self._value = read_secret(reference, environ) if reference else None

    def __repr__(self) -> str:
        return f"Credential({self.reference!r})"

    def headers(self, own: str | None = None) -> dict[str, str]:
        """The Authorization header; `own` is a key's own token, which goes before the backend's."""
        value = own or self._value
        return {"Authorization": f"Bearer {value}"} if value else {}

    def hide(self, text: str) -> str:
        """The text without the token, should an upstream have repeated it."""
        return text.replace(self._value, "[token]") if self._value else text

    def reload(self) -> bool:
        """Read the token again; whether it changed. A failure keeps the old one."""
        if self.reference is None:
            return False
        try:
            value = read_secret(self.reference, self._environ)
        except SecretError:
            return False
        changed, self._value = value != self._value, value
        return changed
