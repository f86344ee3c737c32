"""The example loads, shows every setting, and tells each one's default and range as they are."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import tomli
from msgspec import inspect

from router.config import schema
from router.config.load import load, parse
from router.config.pending import PENDING
from router.config.reading import words
from router.errors import ConfigError

EXAMPLE = Path(__file__).parents[2] / "config" / "rungway.example.toml"
TEXT = EXAMPLE.read_text()
OWN_DIGEST = "ab" * 32
# With each setting that has no default brought in, and a key that is not the example's.
WHOLE = re.sub(r"(?m)^#(?=[a-z0-9_]+ = |\[)", "", TEXT)
WHOLE = re.sub(r'(?m)^(sha256 = )"\w{64}"', rf'\1"{OWN_DIGEST}"', WHOLE)

TABLES: list[tuple[type[schema.Section], tuple[str, ...]]] = [
    (schema.Server, ("server",)),
    (schema.State, ("state",)),
    (schema.Cache, ("cache",)),
    (schema.TgiBackend, ("backends", "gpu")),
    (schema.TeiBackend, ("backends", "vectors")),
    (schema.OpenAiBackend, ("backends", "local")),
    (schema.ProvidersBackend, ("backends", "hf")),
    (schema.EndpointBackend, ("backends", "big")),
    (schema.SpaceBackend, ("backends", "space")),
    (schema.Ladder, ("ladders", "assistant")),
    (schema.Key, ("keys", "alice")),
    (schema.Limits, ("keys", "alice", "limits")),
]


def fields() -> Iterator[tuple[str, msgspec.structs.FieldInfo, tuple[str, ...]]]:
    for kind, path in TABLES:
        for field in msgspec.structs.fields(kind):
            yield f"{'.'.join(path)}.{field.name}", field, path


FIELDS = list(fields())
NAMES = [name for name, _, _ in FIELDS]


def table(document: dict[str, Any], path: tuple[str, ...]) -> dict[str, Any]:
    for part in path:
        document = document[part]
    return document


def test_it_loads_and_warns_only_of_the_token_and_the_keys_that_it_leaves_out() -> None:
    config = load(EXAMPLE, {})
    assert set(config.ladders) == {"assistant", "embed"}
    nobody, no_token = config.warnings
    assert "nobody may call; `rungway keys create`" in nobody
    assert "backends.hf: has no token" in no_token


def test_it_lets_nobody_in_and_the_key_that_it_shows_is_refused() -> None:
    assert load(EXAMPLE, {}).keys == {}
    known = hashlib.sha256(b"example").hexdigest()
    assert f'#sha256 = "{known}"' in TEXT
    with pytest.raises(ConfigError, match="whose key everybody knows; make one with"):
        parse(f'[keys.k]\nsha256 = "{known}"\n', "f", {})


def test_it_loads_with_every_setting_brought_in(tmp_path: Path) -> None:
    token = tmp_path / "local.token"
    token.write_text("t")
    text = WHOLE.replace("/etc/rungway/local.token", str(token))
    names = ("HF_TOKEN", "TGI_API_KEY", "TEI_API_KEY", "ALICE_HF_TOKEN", "HUB_WEBHOOK_SECRET")
    config = parse(text, "example", dict.fromkeys(names, "t"))
    (key,) = config.keys.values()
    assert key.limits.concurrent == 8
    assert config.ladders["embed"].vector_space == "BAAI/bge-m3"


def test_every_kind_of_backend_has_its_table() -> None:
    shown = {backend["kind"] for backend in tomli.loads(TEXT)["backends"].values()}
    assert shown == set(schema.BACKEND_KINDS)


@pytest.mark.parametrize(("name", "field", "path"), FIELDS, ids=NAMES)
def test_every_setting_is_there_with_its_default(
    name: str, field: msgspec.structs.FieldInfo, path: tuple[str, ...]
) -> None:
    optional = field.required or field.default in (None, msgspec.NODEFAULT)
    ladder = "embed" if field.name in ("vector_space", "token_ids") else path[-1]
    path = ("ladders", ladder) if path[0] == "ladders" else path
    whole = table(tomli.loads(WHOLE), path)
    if field.name == "url" and path == ("backends", "space"):
        whole = table(tomli.loads(WHOLE), ("backends", "app"))
    assert field.name in whole, f"{name} is not in the example"
    if optional or field.name in ("inputs", "limits"):
        return
    shown = WHOLE if path[0] == "keys" else TEXT
    assert msgspec.convert(table(tomli.loads(shown), path)[field.name], field.type) == field.default


def test_every_setting_of_a_rung_is_there() -> None:
    document = tomli.loads(WHOLE)
    rungs = [rung for ladder in document["ladders"].values() for rung in ladder["rungs"]]
    shown = {name for rung in rungs for name in rung}
    assert shown == {field.name for field in msgspec.structs.fields(schema.Rung)}
    prices = {name for rung in rungs for name in rung.get("usd_per_mtok", {})}
    assert prices == {field.name for field in msgspec.structs.fields(schema.UsdPerMtok)}


RUNG_FIELDS = [
    (f"rungs.{field.name}", field, ("ladders", "assistant", "rungs"))
    for field in msgspec.structs.fields(schema.Rung)
]


@pytest.mark.parametrize(
    ("name", "field", "path"),
    [*FIELDS, *RUNG_FIELDS],
    ids=[*NAMES, *(name for name, _, _ in RUNG_FIELDS)],
)
def test_every_range_is_told_as_it_is(
    name: str, field: msgspec.structs.FieldInfo, path: tuple[str, ...]
) -> None:
    told = words(inspect.type_info(field.type))
    match = re.search(r"from (\S+ to \S+)|above 0 and (up to \S+)", told)
    lines = [line for line in TEXT.split("\n") if re.match(rf"#?{field.name} = ", line)]
    assert lines or field.name in ("rungs", "limits"), f"{name} is not in the example"
    if match is not None:
        span = match[1] or match[2]
        assert any(re.search(rf"(?<![\d-]){span}(?!\d)", line) for line in lines), span


@pytest.mark.parametrize("pattern", PENDING)
def test_what_has_no_effect_yet_says_so(pattern: str) -> None:
    section, *_, name = pattern.split(".")
    if section == "cache":
        assert "[cache]                  # no effect yet" in TEXT
        return
    lines = TEXT.split("\n")
    at = [i for i, line in enumerate(lines) if re.match(rf"#?{name} = ", line)][-1]
    if pattern == "state.url":
        at = next(i for i, line in enumerate(lines) if line == "[state]") + 1
    near = "\n".join(lines[max(0, at - 2) : at + 1])
    assert "(no effect yet)" in near, pattern
