"""Finds, reads and checks the configuration; a wrong file is refused whole, with all its faults.

The order of the search: `--config`, $RUNGWAY_CONFIG, ./rungway.toml,
$XDG_CONFIG_HOME/rungway/rungway.toml, /etc/rungway/rungway.toml. A file that was named must exist.
"""

from __future__ import annotations

import difflib
import hashlib
import os
import re
import stat
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import tomli
from msgspec import inspect

from router.config import checks, locate, schema
from router.config.locate import Lines
from router.config.model import Config
from router.config.pending import why_pending
from router.config.reading import read_table, unknown, words
from router.config.report import Report, listed
from router.config.secrets import open_without_waiting
from router.errors import ConfigError

S = TypeVar("S", bound=schema.Section)

_FILE_BYTES_MAX = 1 << 20
_SECTIONS = ("server", "state", "backends", "ladders", "keys", "cache")
_WORD = re.compile(r"[^\W\d]\w*")
_TABLE = re.compile(r"\[\[?([^\[\]]+)\]")
_BARE_ADDRESS = re.compile(r"[^=]+=\s*\d+\.\d+\.\S+$")
_NAMES_MAX = 10_000  # of each of backends, ladders and keys


def find(explicit: str | None, environ: Mapping[str, str], cwd: Path) -> Path | None:
    """The file to read, or None when there is none at all. A named one need not exist yet."""
    named = explicit or environ.get("RUNGWAY_CONFIG")
    if named:
        return cwd / named
    home = environ.get("XDG_CONFIG_HOME") or str(Path(environ.get("HOME", "/root")) / ".config")
    usual = (
        cwd / "rungway.toml",
        Path(home) / "rungway" / "rungway.toml",
        Path("/etc/rungway/rungway.toml"),
    )
    # One that is there but cannot be read must be an error, not passed over.
    return next((path for path in usual if _exists(path)), None)


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:
        return False


def load(path: Path, environ: Mapping[str, str], *, is_for_service: bool = False) -> Config:
    """The configuration in a file. Raises ConfigError.

    `is_for_service`: it is for a service whose credentials are not here, and that is no problem.
    """
    text = _read(path)
    document = _toml(text, str(path))
    report = Report(str(path), Lines(text), is_for_service=is_for_service)
    digest = hashlib.sha256(text.encode()).hexdigest()
    return replace(_parse(document, environ, path, report), digest=digest)


def parse(text: str, source: str, environ: Mapping[str, str]) -> Config:
    """The configuration in a text; `source` names it in messages. Raises ConfigError."""
    return _parse(_toml(text, source), environ, None, Report(source, Lines(text)))


def load_server(path: Path) -> schema.Server:
    """[server] alone, for a command that asks the daemon. Raises ConfigError.

    The rest is the daemon's to judge: its tokens need not be in the environment of a command.
    """
    text = _read(path)
    report = Report(str(path), Lines(text))
    table = _toml(text, str(path)).get("server", {})
    server = read_table(schema.Server, table, ("server",), report, lambda *_: None)
    report.raise_problems()
    return server or schema.Server()


def _read(path: Path) -> str:
    try:
        with open(path, "rb", opener=open_without_waiting) as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise ConfigError([f"{path}: is not a regular file; name a TOML file"])
            data = file.read(_FILE_BYTES_MAX + 1)
    except OSError as error:
        raise ConfigError([f"{path}: cannot be read: {error.strerror or error}"]) from error
    if len(data) > _FILE_BYTES_MAX:
        raise ConfigError([f"{path}: is larger than 1 MiB; is it the right file?"])
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ConfigError(
            [f"{path}:{line}: is not UTF-8 text; save the file in that encoding"]
        ) from error


def _parse(
    document: dict[str, Any], environ: Mapping[str, str], path: Path | None, report: Report
) -> Config:
    config = _Reader(document, environ, report).read(path)
    report.raise_problems()
    return config


def _toml(text: str, source: str) -> dict[str, Any]:
    try:
        return tomli.loads(text)
    except tomli.TOMLDecodeError as error:
        what = _mended(error).replace("\n", "\\n")
        raise ConfigError(
            [f"{source}:{error.lineno}: is not TOML at column {error.colno}: {what}"]
        ) from error
    except RecursionError as error:
        raise ConfigError([f"{source}: nests lists or tables far too deep"]) from error
    except ValueError as error:  # Python's own bound on the digits of a number
        raise ConfigError([f"{source}: has a number of far too many digits"]) from error


def _mended(error: tomli.TOMLDecodeError) -> str:
    """What the TOML reader says, with the mend of the usual slips. Never repeats a value."""
    start = error.doc.rfind("\n", 0, error.pos) + 1
    line = error.doc[start:].partition("\n")[0].strip()
    if error.msg.startswith("Invalid value") and (word := _WORD.match(error.doc, error.pos)):
        if word[0].lower() in ("true", "false"):
            return f"{error.msg}; write {word[0].lower()}"
        return f"{error.msg}; text needs quotes"
    if error.msg.startswith("Expected newline") and _BARE_ADDRESS.match(line):
        return f"{error.msg}; text needs quotes"
    if error.msg.startswith("Cannot") and (header := _TABLE.match(line)):
        name = "".join(header[1].split())
        if name.startswith("ladders.") and name.endswith(".rungs"):
            return f"{error.msg}; write [[{name}]] before each rung"
        for at, earlier in enumerate(error.doc[:start].split("\n"), start=1):
            same = _TABLE.match(earlier.strip())
            if same and "".join(same[1].split()) == name:
                return f"{error.msg}; it stands on line {at} already"
    return error.msg


class _Reader:
    """One reading of one document."""

    def __init__(
        self, document: dict[str, Any], environ: Mapping[str, str], report: Report
    ) -> None:
        self._document = document
        self._environ = environ
        self._report = report

    def read(self, path: Path | None) -> Config:
        """A value that holds only if the report has no problems."""
        report = self._report
        for name in self._document:
            if name not in _SECTIONS:
                report.problem((name,), self._stray(name))
        server = self._table(schema.Server, ("server",)) or schema.Server()
        state = self._table(schema.State, ("state",)) or schema.State()
        cache = self._table(schema.Cache, ("cache",)) or schema.Cache()
        backends = {
            name: self._backend(name, raw)
            for name, raw in self._named("backends", schema.BackendName).items()
        }
        ladders = {
            name: self._table(schema.Ladder, ("ladders", name))
            for name in self._named("ladders", schema.LadderName)
        }
        keys = {
            name: self._table(schema.Key, ("keys", name))
            for name in self._named("keys", schema.KeyName)
        }
        checks.check_server(server, report)
        checks.check_hub_secret(server, self._environ, report)
        state = checks.check_state(state, server.workers, self._environ, report)
        for name, backend in backends.items():
            if backend is not None:
                checks.check_backend(name, backend, self._environ, report)
        made = {}
        backend_names = {**backends, **self._misplaced("backends")}
        ladder_names = {**ladders, **self._misplaced("ladders")}
        for name, raw in ladders.items():
            checks.check_references(name, self._document["ladders"][name], backend_names, report)
            if raw is not None:
                made[name] = checks.ladder(name, raw, backends, report)
        checks.check_ladder_names(made, ladder_names, server.default_ladder, report)
        checks.check_digests(keys, report)
        checks.warn_of_nothing(server, ladders, keys, report)
        checks.warn_of_shares(server.workers, made, report)
        checks.warn_of_unpriced(server, made, backends, keys, report)
        by_digest = {
            bytes.fromhex(raw.sha256): checks.key(name, raw, ladder_names, self._environ, report)
            for name, raw in keys.items()
            if raw is not None
        }
        return Config(
            server=server,
            state=state,
            cache=cache,
            backends={name: one for name, one in backends.items() if one is not None},
            ladders=made,
            keys=by_digest,
            default_ladder=server.default_ladder or None,
            source=path,
            warnings=report.warnings,
        )

    def _table(self, kind: type[S], path: locate.Path, *, ignore: str = "") -> S | None:
        table: Any = self._document
        for part in path:
            table = table.get(part, {})
        return read_table(kind, table, path, self._report, self._note, ignore=ignore)

    def _named(self, section: str, kind: Any) -> dict[str, Any]:
        """The tables of a section by their names, the names checked."""
        tables = self._document.get(section, {})
        if not isinstance(tables, dict):
            self._report.problem((section,), f"must be tables: [{section}.NAME]")
            return {}
        if len(tables) > _NAMES_MAX:
            self._report.problem((section,), f"has more than {_NAMES_MAX} tables")
            return {}
        for name in tables:
            try:
                msgspec.convert(name, kind)
            except msgspec.ValidationError:
                told = words(inspect.type_info(kind))
                self._report.problem((section, name), f"is not a name; give it {told}")
        return tables

    def _misplaced(self, section: str) -> dict[str, object]:
        """What stands in a section whose name is misspelt: that is told, and not that it lacks."""
        found: dict[str, object] = {}
        for name, tables in self._document.items():
            if name in _SECTIONS or not isinstance(tables, dict):
                continue
            if difflib.get_close_matches(name, _SECTIONS, n=1) == [section]:
                found |= tables
        return found

    def _backend(self, name: str, raw: Any) -> schema.BackendConfig | None:
        path: locate.Path = ("backends", name)
        kinds = schema.BACKEND_KINDS
        if not isinstance(raw, dict) or "kind" not in raw:
            what = f"`kind` is missing; add kind = … (one of {listed(kinds)})"
            self._report.problem(path, what if isinstance(raw, dict) else "must be a table")
            return None
        kind = raw["kind"]
        if not isinstance(kind, str) or kind not in kinds:
            shown = kind if isinstance(kind, str) else ""
            self._report.problem((*path, "kind"), unknown("kind of backend", shown, kinds))
            return None
        before = self._report.problem_count
        backend = self._table(kinds[kind], path, ignore="kind")
        # With a default in place of a wrong address, the checks would speak of the default.
        return backend if self._report.problem_count == before else None

    def _stray(self, name: str) -> str:
        """What to say of an unknown name at the top: often a setting without its header."""
        settings = {field.name for field in msgspec.structs.fields(schema.Server)}
        if name in settings and not isinstance(self._document[name], dict):
            return "stands outside of its table; put it below [server]"
        return unknown("section", name, _SECTIONS)

    def _note(self, path: locate.Path, _value: object) -> None:
        why = why_pending(path)
        if why is not None:
            self._report.warning(path, f"has no effect: {why}")
