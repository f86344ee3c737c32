"""Where a setting stands: the line of each key of a TOML text.

The TOML reader tells lines for faults of syntax only, so this walks the same text again and notes
where each key is written. It expects a text that the reader accepts; on any other it is merely
imprecise. A path is the keys and list indexes that lead to a value, as in ("ladders", "a",
"rungs", 0, "model"); what has no line of its own is on its nearest ancestor's.
"""

from __future__ import annotations

import re

Path = tuple[str | int, ...]

_BLANK = re.compile(r"(?:[ \t\r\n]+|#[^\n]*)*")
_BARE = re.compile(r"[A-Za-z0-9_-]+")
_SCALAR = re.compile(r"[^,\]}#\n]*")
# Longest first: three quotes open a text of many lines, two are an empty one.
_STRINGS = (
    re.compile(r'"""(?:[^"\\]|\\[\s\S]|"(?!""))*"{3,5}'),
    re.compile(r"'''(?:[^']|'(?!''))*'{3,5}"),
    re.compile(r'"(?:[^"\\\n]|\\.)*"'),
    re.compile(r"'[^'\n]*'"),
)
_ESCAPES = {"b": "\b", "t": "\t", "n": "\n", "f": "\f", "r": "\r", "e": "\x1b"}
_ESCAPE = re.compile(r"\\(?:u([0-9A-Fa-f]{4})|U([0-9A-Fa-f]{8})|x([0-9A-Fa-f]{2})|(.))", re.DOTALL)


class Lines:
    """The lines of a text's settings, counted from 1."""

    def __init__(self, text: str) -> None:
        self._lines = _Walk(text).run()

    def line(self, path: Path) -> int:
        """The line of a path, or of its nearest ancestor that has one."""
        for end in range(len(path), 0, -1):
            found = self._lines.get(path[:end])
            if found is not None:
                return found
        return 1


def show(path: Path) -> str:
    """A path as a user would write it: `ladders."gpt 4".rungs[0].model`."""
    text = ""
    for part in path:
        if isinstance(part, int):
            text += f"[{part}]"
        else:
            text += ("." if text else "") + (part if _BARE.fullmatch(part) else _quoted(part))
    return text


def _quoted(key: str) -> str:
    shown = key if len(key) <= 60 else key[:60] + "…"
    return '"' + "".join(c if c.isprintable() else f"\\u{ord(c):04x}" for c in shown) + '"'


class _Walk:
    def __init__(self, text: str) -> None:
        self._text = text
        self._at = 0
        self._line = 1
        self._counted_to = 0
        self._found: dict[Path, int] = {}
        self._array_lengths: dict[Path, int] = {}

    def run(self) -> dict[Path, int]:
        table: Path = ()
        self._skip_blank()
        while self._at < len(self._text):
            before = self._at
            if self._text.startswith("[[", self._at):
                table = self._array_header()
            elif self._text.startswith("[", self._at):
                table = self._table_header()
            else:
                self._pair(table)
            self._skip_blank()
            if self._at == before:  # not TOML: go on behind it
                self._at += 1
        return self._found

    def _table_header(self) -> Path:
        self._at += 1
        path = self._resolve(self._keys())
        self._take("]")
        return path

    def _array_header(self) -> Path:
        self._at += 2
        path = self._resolve(self._keys(), is_array=True)
        self._take("]")
        self._take("]")
        return path

    def _resolve(self, keys: list[str], *, is_array: bool = False) -> Path:
        """A header's path; a name on the way that is an array of tables means its last one."""
        line = self._here()
        path: Path = ()
        for place, key in enumerate(keys):
            path = (*path, key)
            self._found.setdefault(path, line)
            is_last = place == len(keys) - 1
            if is_last and is_array:
                length = self._array_lengths.get(path, 0)
                self._array_lengths[path] = length + 1
                path = (*path, length)
            elif is_last:
                self._found[path] = line
            elif path in self._array_lengths:
                path = (*path, self._array_lengths[path] - 1)
        self._found[path] = line
        return path

    def _pair(self, table: Path) -> None:
        path = self._note_keys(table)
        self._skip_blank()
        self._take("=")
        self._value(path)

    def _note_keys(self, table: Path) -> Path:
        line = self._here()
        for key in self._keys():
            table = (*table, key)
            self._found.setdefault(table, line)
        return table

    def _value(self, path: Path) -> None:
        """One value with all that is in it. `around` holds the open brackets, outermost first."""
        around: list[tuple[Path, bool]] = []
        counts: list[int] = []
        while True:
            self._skip_blank()
            mark = self._text[self._at : self._at + 1]
            if mark == "":
                return
            if around and mark in "]}":
                self._at += 1
                around.pop()
                counts.pop()
                if not around:
                    return
                continue
            if around and mark == ",":
                self._at += 1
                counts[-1] += 1
                continue
            here = path
            if around:
                base, is_array = around[-1]
                if is_array:
                    here = (*base, counts[-1])
                    self._found[here] = self._here()
                else:
                    here = self._note_keys(base)
                    self._skip_blank()
                    self._take("=")
                    self._skip_blank()
                    mark = self._text[self._at : self._at + 1]
            if mark and mark in "[{":
                self._at += 1
                around.append((here, mark == "["))
                counts.append(0)
                continue
            before = self._at
            self._scalar()
            if not around:
                return
            if self._at == before:  # not TOML: go on behind it
                self._at += 1

    def _scalar(self) -> None:
        if self._string() is None:
            match = _SCALAR.match(self._text, self._at)
            assert match is not None
            self._at = match.end()

    def _keys(self) -> list[str]:
        keys: list[str] = []
        while True:
            self._skip_inline()
            raw = self._string()
            if raw is not None:
                keys.append(_unescaped(raw[1:-1]) if raw[0] == '"' else raw[1:-1])
            elif (match := _BARE.match(self._text, self._at)) is not None:
                keys.append(match[0])
                self._at = match.end()
            else:
                return keys
            self._skip_inline()
            if not self._take("."):
                return keys

    def _string(self) -> str | None:
        if self._text[self._at : self._at + 1] not in ('"', "'"):
            return None
        for form in _STRINGS:
            if (match := form.match(self._text, self._at)) is not None:
                self._at = match.end()
                return match[0]
        return None

    def _skip_blank(self) -> None:
        match = _BLANK.match(self._text, self._at)
        assert match is not None
        self._at = match.end()

    def _skip_inline(self) -> None:
        while self._text[self._at : self._at + 1] in (" ", "\t"):
            self._at += 1

    def _take(self, mark: str) -> bool:
        self._skip_inline()
        if self._text[self._at : self._at + 1] != mark:
            return False
        self._at += 1
        return True

    def _here(self) -> int:
        """The line of the current place; places only go forward."""
        self._line += self._text.count("\n", self._counted_to, self._at)
        self._counted_to = self._at
        return self._line


def _unescaped(raw: str) -> str:
    def plain(match: re.Match[str]) -> str:
        digits = match[1] or match[2] or match[3]
        if digits:
            return chr(int(digits, 16))
        return _ESCAPES.get(match[4], match[4])

    return _ESCAPE.sub(plain, raw)
