"""From a table of the file to a value of the schema, with every fault put into words.

msgspec converts and checks each value by itself, and the words come from the schema's own types, so
that what is told and what is checked cannot differ. One wrong value does not hide the next.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Iterable
from types import NoneType, UnionType
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin

import msgspec
from msgspec import inspect

from router.config.locate import Path, show
from router.config.report import Report, listed

S = TypeVar("S", bound=msgspec.Struct)
Set = Callable[[Path, Any], None]

_SHOWN_CHARACTERS_MAX = 40
_ENTRIES_MAX = 1000  # of a list
# A secret may stand here by mistake, so the value is not repeated.
_NEVER_SHOWN = frozenset({"token", "sha256", "url", "management_url"})
_MISSING = object()


def read_table(
    kind: type[S], table: object, path: Path, report: Report, on_set: Set, *, ignore: str = ""
) -> S | None:
    """The table as a value, with the defaults in place of what is wrong: the report says what.

    So one look finds also what is wrong between settings. None when a setting without a default is
    wrong. `on_set` is told of each setting that differs from its default; `ignore` names one that
    the caller has read already.
    """
    if not isinstance(table, dict):
        report.problem(path, f"is {_a(table)}, where a table of settings is expected")
        return None
    fields = {field.name: field for field in msgspec.structs.fields(kind)}
    known = [name for name in (*fields, ignore) if name]
    for name in table:
        if name not in known:
            report.problem((*path, name), unknown("setting", name, known))
    is_whole = True
    values: dict[str, Any] = {}
    for name, field in fields.items():
        here = (*path, name)
        if name not in table:
            if field.required:
                told = words(inspect.type_info(field.type))
                report.problem(path, f"`{name}` is missing; add {name} = … ({told})")
                is_whole = False
            continue
        value = _read_value(field.type, table[name], here, report, on_set)
        if value is _MISSING:
            is_whole = is_whole and not field.required
            continue
        values[name] = value
        if value != field.default:
            on_set(here, value)
    return kind(**values) if is_whole else None


def unknown(what: str, name: str, known: Iterable[str]) -> str:
    """`there is no such setting`, with the nearest known name or all of them."""
    known = list(known)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    if close:
        return f'there is no such {what}; did you mean "{close[0]}"?'
    if not known:
        return f"there is no such {what}"
    return f"there is no such {what}; known are {listed(known)}"


def words(kind: inspect.Type) -> str:
    """What a setting takes, for people: `a whole number from 1 to 256`."""
    match kind:
        case inspect.Metadata(type=inner, extra_json_schema=extra):
            return (extra or {}).get("description") or words(inner)
        case inspect.UnionType(types=types):
            kinds = [words(one) for one in types if not isinstance(one, inspect.NoneType)]
            return " or ".join(kinds)
        case inspect.BoolType():
            return "true or false"
        case inspect.IntType():
            return f"a whole number{_range(kind)}"
        case inspect.FloatType():
            return f"a number{_range(kind)}"
        case inspect.StrType(max_length=length):
            return "text" if length is None else f"text of at most {length} characters"
        case inspect.LiteralType(values=values):
            return f"one of {listed(str(value) for value in values)}"
        case inspect.VarTupleType(item_type=item):
            return f"a list; each of its entries {words(item)}"
        case inspect.DictType(value_type=value):
            return f"a table; each of its values {words(value)}"
        case inspect.StructType(cls=cls):
            names = (field.name for field in msgspec.structs.fields(cls))
            return f"a table with {listed(names)}"
    raise AssertionError(f"the schema has a type without words: {kind!r}")


def _range(kind: inspect.IntType | inspect.FloatType) -> str:
    if kind.gt is not None:
        return f" above {_number(kind.gt)} and up to {_number(kind.le)}"
    if kind.ge is not None:
        return f" from {_number(kind.ge)} to {_number(kind.le)}"
    return ""


def _number(value: float | None) -> str:
    assert value is not None, "a bound of the schema has no other end"
    return f"{value:.0f}" if value == int(value) else f"{value:g}"


def _read_value(kind: Any, value: object, path: Path, report: Report, on_set: Set) -> Any:
    """`kind` is the setting's annotation in the schema. _MISSING where something was wrong."""
    bare = _bare(kind)
    if isinstance(bare, type) and issubclass(bare, msgspec.Struct):
        found = read_table(bare, value, path, report, on_set)
        return _MISSING if found is None else found
    if get_origin(bare) is tuple and isinstance(value, list):
        return _read_list(kind, value, path, report, on_set)
    if get_origin(bare) is dict and isinstance(value, dict):
        item = get_args(bare)[1]
        read = {
            name: _read_value(item, one, (*path, name), report, on_set)
            for name, one in value.items()
        }
        return _MISSING if any(one is _MISSING for one in read.values()) else read
    try:
        if isinstance(value, float) and not math.isfinite(value):
            raise msgspec.ValidationError("not finite")
        if value is None:
            raise msgspec.ValidationError("TOML has no null")
        return msgspec.convert(value, kind)
    except msgspec.ValidationError:
        report.problem(path, _fault(inspect.type_info(kind), value, path))
        return _MISSING


def _read_list(kind: Any, value: list[Any], path: Path, report: Report, on_set: Set) -> Any:
    info, item = _bare_info(inspect.type_info(kind)), get_args(_bare(kind))[0]
    assert isinstance(info, inspect.VarTupleType)
    size_min, size_max = info.min_length or 0, info.max_length or _ENTRIES_MAX
    if not size_min <= len(value) <= size_max:
        wanted = "at least one" if not value else f"at most {size_max}"
        report.problem(path, f"has {len(value)} entries, where {wanted} may stand")
        return _MISSING
    read = [
        _read_value(item, one, (*path, place), report, on_set) for place, one in enumerate(value)
    ]
    return _MISSING if any(one is _MISSING for one in read) else tuple(read)


def _bare(kind: Any) -> Any:
    """An annotation without its bounds, and without the None of what may be left out."""
    if get_origin(kind) is Annotated:
        return _bare(get_args(kind)[0])
    if get_origin(kind) in (Union, UnionType):
        kinds = [one for one in get_args(kind) if one is not NoneType]
        return _bare(kinds[0]) if len(kinds) == 1 else kind
    return kind


def _bare_info(kind: inspect.Type) -> inspect.Type:
    """As `_bare`, but with the bounds: they are part of msgspec's description of a type."""
    if isinstance(kind, inspect.Metadata):
        return _bare_info(kind.type)
    if isinstance(kind, inspect.UnionType):
        kinds = [one for one in kind.types if not isinstance(one, inspect.NoneType)]
        return _bare_info(kinds[0]) if len(kinds) == 1 else kind
    return kind


def _fault(kind: inspect.Type, value: object, path: Path) -> str:
    wanted, bare = words(kind), _bare_info(kind)
    if isinstance(bare, inspect.BoolType) and isinstance(value, str):
        return "is text; write true or false"
    if isinstance(bare, inspect.VarTupleType):
        if isinstance(value, dict) and isinstance(bare.item_type, inspect.StructType):
            return f"is a table, not a list of tables; write [[{show(path)}]]"
        if isinstance(value, str):
            return f"is text, not a list; write [{_shown(value, path)}]"
    takes_text = isinstance(bare, inspect.StrType | inspect.LiteralType)
    if isinstance(value, str) and isinstance(bare, inspect.LiteralType):
        names = [str(one) for one in bare.values]
        close = difflib.get_close_matches(value, names, n=1, cutoff=0.6)
        hint = f'; did you mean "{close[0]}"?' if close else ""
        return f"{_shown(value, path)} is not {wanted}{hint}"
    if isinstance(value, str) and isinstance(bare, inspect.IntType | inspect.FloatType):
        return f"is text, not {wanted}; write it without quotes"
    if isinstance(value, int | float) and takes_text:
        return f"is {_a(value)}, not {wanted}; write it in quotes"
    if isinstance(value, str | int | float) and not isinstance(value, bool):
        return f"{_shown(value, path)} is not {wanted}"
    return f"is {_a(value)}, not {wanted}"


def _shown(value: str | int | float, path: Path) -> str:
    """A value for a message, cut short; never one that may be a secret."""
    if any(part in _NEVER_SHOWN for part in path):
        return "what stands here"
    if not isinstance(value, str):
        text = f"{value:.6g}" if isinstance(value, float) else str(value)
        return text if len(text) <= _SHOWN_CHARACTERS_MAX else "a number of that size"
    short = value[:_SHOWN_CHARACTERS_MAX]
    mark = "…" if len(value) > len(short) else ""
    return '"' + "".join(c if c.isprintable() else "\\?" for c in short) + mark + '"'


def _a(value: object) -> str:
    """The kind of a TOML value, in its own words."""
    match value:
        case bool():
            return "true or false"
        case str():
            return "text"
        case int() | float():
            return "a number"
        case list():
            return "a list"
        case dict():
            return "a table"
    return "a date or time"
