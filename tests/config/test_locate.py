"""Every setting is found at the line where it is written, in whatever form TOML allows for it.

Documents are generated in all forms (headers, dotted and quoted keys, inline tables, arrays of
tables, texts of many lines) and read by tomli: what it finds, the locator must find too. Each
value is a mark that occurs once, so that the right line cannot be hit by chance.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
import tomli
from hypothesis import given
from hypothesis import strategies as st

from router.config.locate import Lines, Path, show

KEYS = st.sampled_from(["a", "b-1", "c_d", "7", "with blank", "dot.ted", 'quo"te', "ü", "#", "=["])


class Writer:
    """Writes one document, drawing the form of each part."""

    def __init__(self, draw: st.DrawFn) -> None:
        self.draw = draw
        self.marks = 0

    def mark(self) -> str:
        self.marks += 1
        return f"mark{self.marks}x"

    def key(self, name: str) -> str:
        is_bare = name.isascii() and name.replace("-", "").replace("_", "").isalnum()
        forms = [json.dumps(name)] if '"' in name else [json.dumps(name), f"'{name}'"]
        return str(self.draw(st.sampled_from([*forms, name] if is_bare else forms)))

    def scalar(self) -> str:
        mark = self.mark()
        return str(
            self.draw(
                st.sampled_from(
                    [
                        f'"{mark}"',
                        f"'{mark} # no comment'",
                        f'"{mark} \\" ] }} ,"',
                        f'"""{mark} "" \n\\"""[not]\nkey = 1""""',
                        f"'''{mark}\n[no.table]\n''''",
                    ]
                )
            )
        )

    def value(self, depth: int) -> str:
        form = self.draw(st.sampled_from(["scalar", "array", "table"] if depth else ["scalar"]))
        if form == "scalar":
            return self.scalar()
        if form == "array":
            gap = self.draw(st.sampled_from(["", " ", "\n", " # ] note\n  "]))
            items = [self.value(depth - 1) for _ in range(self.draw(st.integers(0, 3)))]
            return "[" + gap + f",{gap}".join(items) + gap + "]"
        names = self.draw(st.lists(KEYS, max_size=3, unique=True))
        pairs = [f"{self.key(name)} = {self.value(depth - 1)}" for name in names]
        return "{ " + ", ".join(pairs) + " }"

    def pairs(self) -> str:
        lines = []
        for name in self.draw(st.lists(KEYS, max_size=3, unique=True)):
            path = [name, *self.draw(st.lists(KEYS, max_size=2))]
            dot = self.draw(st.sampled_from([".", " . "]))
            note = self.draw(st.sampled_from(["", "  # a = 1"]))
            blank = self.draw(st.sampled_from(["", "\n", "# [note]\n", "\t"]))
            lines.append(f"{blank}{dot.join(map(self.key, path))} = {self.value(2)}{note}\n")
        return "".join(lines)

    def document(self) -> str:
        text = self.pairs()
        for name in self.draw(st.lists(KEYS, max_size=3, unique=True)):
            # A name of its own, so that no table is given twice.
            head = self.key(f"t{name}")
            sub = self.key(self.draw(KEYS))
            form = self.draw(st.sampled_from(["table", "deep", "array"]))
            if form == "table":
                text += f"[ {head} ]\n{self.pairs()}"
            elif form == "deep":
                text += f"[{head}.deep.{sub}] # note\n{self.pairs()}[{head}]\n"
            else:
                for _ in range(self.draw(st.integers(1, 3))):
                    text += f"[[{head}]]\n{self.pairs()}[{head}.deeper.{sub}]\n{self.pairs()}"
                    text += f"[[{head}.more]]\n" * self.draw(st.integers(0, 2))
        return text


@st.composite
def documents(draw: st.DrawFn) -> str:
    text = Writer(draw).document()
    return text.replace("\n", "\r\n") if draw(st.booleans()) else text


def every_path(value: Any, path: Path = ()) -> Iterator[tuple[Path, Any]]:
    if path:
        yield path, value
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from every_path(inner, (*path, name))
    elif isinstance(value, list):
        for place, inner in enumerate(value):
            yield from every_path(inner, (*path, place))


@given(documents())
def test_every_path_that_the_reader_yields_is_at_a_line_with_its_key(text: str) -> None:
    read = tomli.loads(text)
    lines = Lines(text)
    written = text.split("\n")
    for path, value in every_path(read):
        line = written[lines.line(path) - 1]
        last = path[-1]
        if isinstance(last, str):
            assert last in line or json.dumps(last)[1:-1] in line, (path, line)
        if isinstance(value, str):
            assert value.split()[0] in line, (path, line)


@given(documents(), st.text(alphabet="[]{}\"'=.,#\\\n a1", max_size=40), st.integers(0, 400))
def test_a_broken_text_ends_too(text: str, noise: str, at: int) -> None:
    lines = Lines(text[:at] + noise + text[at:])
    assert lines.line(("nowhere",)) >= 1


TEXT = """\
# first
a.b = 1

[ladders."gpt 4"]
aliases = [
  "x",  # one
  "y",
]
[[ladders."gpt 4".rungs]]
model = "m"
[[ladders."gpt 4".rungs]]
usd_per_mtok = { input = 1, output = 2 }
[ladders."gpt 4".rungs.sub]
deep = 1
"""


@pytest.mark.parametrize(
    ("path", "line"),
    [
        (("a",), 2),
        (("a", "b"), 2),
        (("ladders",), 4),
        (("ladders", "gpt 4", "aliases"), 5),
        (("ladders", "gpt 4", "aliases", 0), 6),
        (("ladders", "gpt 4", "aliases", 1), 7),
        (("ladders", "gpt 4", "rungs"), 9),
        (("ladders", "gpt 4", "rungs", 0), 9),
        (("ladders", "gpt 4", "rungs", 0, "model"), 10),
        (("ladders", "gpt 4", "rungs", 0, "missing"), 9),
        (("ladders", "gpt 4", "rungs", 1), 11),
        (("ladders", "gpt 4", "rungs", 1, "usd_per_mtok", "output"), 12),
        (("ladders", "gpt 4", "rungs", 1, "sub", "deep"), 14),
        (("ladders", "gpt 4", "rungs", 7, "model"), 9),
        (("ladders", "other", "task"), 4),
        (("missing",), 1),
        ((), 1),
    ],
)
def test_a_setting_or_its_nearest_ancestor(path: Path, line: int) -> None:
    assert Lines(TEXT).line(path) == line


def test_escapes_in_keys_are_read() -> None:
    text = '"a\\tb\\u00fc\\U0001F600\\"" = 1\n'
    (key,) = tomli.loads(text)
    assert Lines("\n" + text).line((key,)) == 2


def test_deep_nesting_is_walked_without_recursion() -> None:
    assert Lines("a = " + "[" * 1_000).line(("a", 0, 0)) == 1


@pytest.mark.parametrize(
    ("path", "text"),
    [
        (("server", "port"), "server.port"),
        (("ladders", "gpt 4", "rungs", 0, "model"), 'ladders."gpt 4".rungs[0].model'),
        (("line\nbreak",), '"line\\u000abreak"'),
        (("k" * 100,), "k" * 100),
        (("k " * 100,), '"' + ("k " * 100)[:60] + '…"'),
    ],
)
def test_a_path_is_shown_as_it_would_be_written(path: Path, text: str) -> None:
    assert show(path) == text
