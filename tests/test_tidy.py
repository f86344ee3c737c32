"""The style as a test: how the house hangs together, read from its source by `ast` alone.

Each rule is a plain function from modules to faults, shown first to find what it is for. Long files
and functions are printed, not failed: a story may be long, but nobody should write one unknowingly.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache, cached_property
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# Imports go to the same rank or a lower one.
RANKS: dict[str, int] = {
    **dict.fromkeys(("__main__", "cli", "demo"), 7),
    **dict.fromkeys(("app", "daemon", "workers"), 6),
    "api": 5,
    "flow": 4,
    "backends": 3,
    **dict.fromkeys(("transport", "store", "hub"), 2),
    "core": 1,
    **dict.fromkeys(("config", "types", "errors", ""), 0),
}
IMPURE = frozenset(
    {"aiohttp", "asyncio", "httpx", "logging", "multiprocessing", "os", "pathlib", "random"}
    | {"secrets", "select", "selectors", "shutil", "signal", "socket", "sqlite3", "ssl"}
    | {"subprocess", "tempfile", "threading", "time", "uuid", "uvloop"}
)
ENTRY_POINTS = {
    "router.__main__": "python -m router",
    "router.cli.main": "the command, named in pyproject.toml",
    "router.core.simulation": "python -m bench.simulate",
}
# Where everything is caught and not raised again, and why.
BROAD_EXCEPTS = {
    "router.api.gateway": "the edge of a request: logged with its trace, answered with 500",
    "router.api.server": "an import that fails: logged with its trace, who waits is answered 500",
    "router.flow.continuity": "the edge of a background task: logged, nothing was shown",
    "router.flow.probes": "the edge of a background task: logged with its trace, the rung is down",
    "router.flow.renewal": "the edge of a background task: logged, and a trouble of the store",
}
PRINTERS = ("router.cli.", "router.demo.")
FILE_LINES_NOTED, FUNCTION_LINES_NOTED = 400, 60


@dataclass
class Module:
    name: str
    source: str
    is_package: bool = False
    tree: ast.Module = field(init=False)

    def __post_init__(self) -> None:
        self.tree = ast.parse(self.source)

    @property
    def room(self) -> str:
        return [*self.name.split("."), ""][1]

    @cached_property
    def imports(self) -> set[str]:
        """Every dotted name that an import could mean, also inside functions."""
        found: set[str] = set()
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Import):
                found.update(alias.name for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                base = node.module or ""
                found.update({base}, (f"{base}.{alias.name}" for alias in node.names))
        return found

    def inner(self, modules: dict[str, Module]) -> set[str]:
        """The project's modules among its imports."""
        return {name for name in self.imports if name in modules and name != self.name}


House = dict[str, Module]


@cache
def read_house() -> House:
    found: House = {}
    for path in sorted((ROOT / "router").rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        is_package = parts[-1] == "__init__"
        name = ".".join(parts[:-1] if is_package else parts)
        found[name] = Module(name, path.read_text(), is_package)
    return found


def imports_up(house: House) -> Iterator[str]:
    for module in house.values():
        if module.room not in RANKS:
            yield f"{module.name}: the room {module.room!r} has no rank in RANKS"
            continue
        for name in module.inner(house):
            if RANKS.get(house[name].room, -1) > RANKS[module.room]:
                yield f"{module.name} imports {name}, which lies above it"


def cycles(house: House) -> Iterator[str]:
    # A package's own __init__ is imported by each of its modules; that alone is no cycle.
    graph = {
        name: {other for other in module.inner(house) if not name.startswith(f"{other}.")}
        for name, module in house.items()
    }
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        yield " → ".join(error.args[1])


def impurities(house: House) -> Iterator[str]:
    for module in house.values():
        if module.room != "core":
            continue
        for name in sorted({name.partition(".")[0] for name in module.imports} & IMPURE):
            yield f"{module.name} imports {name}: core is handed what it needs to know"
        for node in ast.walk(module.tree):
            if isinstance(node, ast.AsyncFunctionDef | ast.Await | ast.AsyncFor | ast.AsyncWith):
                yield f"{module.name}:{node.lineno} is async: core decides, others wait"


def undocumented(house: House) -> Iterator[str]:
    for module in house.values():
        if not ast.get_docstring(module.tree):
            yield f"{module.name} does not say what it is"


def swallowed(house: House) -> Iterator[str]:
    """Broad handlers that do not raise again at their end."""
    for module in house.values():
        for node in ast.walk(module.tree):
            if not isinstance(node, ast.ExceptHandler):
                continue
            kinds = {ast.unparse(node.type)} if node.type else {"BaseException"}
            if isinstance(node.type, ast.Tuple):
                kinds = {ast.unparse(kind) for kind in node.type.elts}
            last = node.body[-1]
            raises = isinstance(last, ast.Raise)
            if kinds & {"Exception", "BaseException"} and not raises:
                yield f"{module.name}:{node.lineno} swallows whatever comes"


def printing(house: House) -> Iterator[str]:
    for module in house.values():
        if module.name.startswith(PRINTERS):
            continue
        for node in ast.walk(module.tree):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "print":
                yield f"{module.name}:{node.lineno} prints: only the command talks to a terminal"


def dead(house: House) -> Iterator[str]:
    used = set().union(*(module.inner(house) for module in house.values()))
    used |= {*ENTRY_POINTS, *subcommands(house)}
    for module in house.values():
        if not module.is_package and module.name not in used:
            yield f"{module.name} is imported by nobody"


def subcommands(house: House) -> Iterator[str]:
    """`rungway x` imports router.cli.x when it is typed."""
    if (main := house.get("router.cli.main")) is not None:
        for node in ast.walk(main.tree):
            if isinstance(node, ast.Call) and ast.unparse(node.func).endswith(".add_parser"):
                yield f"router.cli.{ast.literal_eval(node.args[0])}"


def untested_core(house: House, test_files: set[str]) -> Iterator[str]:
    for module in house.values():
        wanted = f"test_{module.name.rpartition('.')[2]}.py"
        if module.room == "core" and not module.is_package and wanted not in test_files:
            yield f"{module.name} has no tests/core/{wanted}"


def small(**sources: str) -> House:
    """A house of a few lines: `core__x="import os"` is the module router.core.x."""
    names = {name.replace("__", "."): source for name, source in sources.items()}
    return {f"router.{name}": Module(f"router.{name}", text) for name, text in names.items()}


RULES = (imports_up, cycles, impurities, undocumented, printing, dead)


@pytest.mark.parametrize(
    ("rule", "bad"),
    [
        (imports_up, small(core__x="from router.flow import y", flow__y="")),
        (imports_up, small(attic__x="")),
        (
            cycles,
            small(flow__x="import router.flow.y", flow__y="def f():\n from router.flow.x import a"),
        ),
        (impurities, small(core__x="from os import path")),
        (impurities, small(core__x="async def f(): ...")),
        (undocumented, small(core__x="import re")),
        (swallowed, small(flow__x="try: ...\nexcept (KeyError, Exception): pass")),
        (swallowed, small(flow__x="try: ...\nexcept: pass")),
        (printing, small(flow__x="print(1)")),
        (dead, small(flow__x="")),
        (dead, small(cli__x="", cli__main="commands.add_parser('y')")),
    ],
)
def test_each_rule_finds_what_it_is_for(rule: object, bad: House) -> None:
    assert callable(rule)
    assert list(rule(bad))


@pytest.mark.parametrize("rule", RULES)
def test_the_house_keeps_the_rule(rule: object) -> None:
    assert callable(rule)
    assert not (faults := list(rule(read_house()))), "\n".join(faults)


def test_broad_excepts_are_the_named_ones() -> None:
    """No more of them, and none that is named without need."""
    found = {fault.partition(":")[0] for fault in swallowed(read_house())}
    assert found == set(BROAD_EXCEPTS)


def test_each_core_module_has_its_own_test_file() -> None:
    assert list(untested_core(small(core__x=""), set()))
    test_files = {path.name for path in (ROOT / "tests" / "core").iterdir()}
    assert not (faults := list(untested_core(read_house(), test_files))), "\n".join(faults)


def test_long_files_and_functions_are_noted(capsys: pytest.CaptureFixture[str]) -> None:
    with capsys.disabled():
        for note in long_ones(read_house()):
            print(f"\nnoted: {note}", end="")
    assert list(long_ones(small(x="\n" * (FILE_LINES_NOTED + 1))))


def long_ones(house: House) -> Iterator[str]:
    for module in house.values():
        if (lines := module.source.count("\n")) > FILE_LINES_NOTED:
            yield f"{module.name} has {lines} lines"
        for node in ast.walk(module.tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                length = (node.end_lineno or node.lineno) - node.lineno + 1
                if length > FUNCTION_LINES_NOTED:
                    yield f"{module.name}.{node.name} has {length} lines"
