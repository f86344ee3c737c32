"""Nobody believes that a budget holds which does not: what has no effect is said aloud."""

from __future__ import annotations

import msgspec
import pytest

from router.config import schema
from router.config.load import parse
from router.config.pending import PENDING, why_pending

KEY = f'[keys.k]\nsha256 = "{"a" * 64}"\n'
CHAT = """
[backends.b]
kind = "openai"
url = "http://127.0.0.1:1"
[ladders.l]
rungs = [{ backend = "b", model = "m" }]
"""
ENDPOINT = '[backends.b]\nkind = "inference-endpoint"\nurl = "https://x.example"\n'

SET = {
    "backends.*.usd_per_hour": f"{ENDPOINT}usd_per_hour = 1",
}


def test_every_pending_setting_has_a_text_below() -> None:
    assert set(SET) == set(PENDING)


@pytest.mark.parametrize("pattern", PENDING)
def test_a_pending_setting_is_warned_of_at_its_line(pattern: str) -> None:
    text = SET[pattern]
    line = text.count("\n") + 1
    told = [one for one in parse(text, "f", {}).warnings if "has no effect" in one]
    assert len(told) == 1
    *_, setting = pattern.split(".")
    assert told[0].startswith(f"f:{line}: ")
    assert f"{setting}: has no effect: {PENDING[pattern]}" in told[0]


@pytest.mark.parametrize("pattern", PENDING)
def test_every_pattern_names_a_setting_of_the_schema(pattern: str) -> None:
    section, *_, name = pattern.split(".")
    kinds: dict[str, list[type[schema.Section]]] = {
        "server": [schema.Server],
        "state": [schema.State],
        "backends": [schema.EndpointBackend],
        "ladders": [schema.Ladder],
        "keys": [schema.Key, schema.Limits],
    }
    known = {field.name for kind in kinds[section] for field in msgspec.structs.fields(kind)}
    assert name in known


def test_a_default_that_is_written_out_is_not_warned_of() -> None:
    text = f'{CHAT}rescue = "off"\nqueue_max = 64\n{KEY}priority = 0\n[cache]\nttl_s = 86400'
    assert not [one for one in parse(text, "f", {}).warnings if "no effect" in one]


@pytest.mark.parametrize(
    "path",
    [
        ("server", "port"),
        ("ladders", "l", "rungs", 0, "tiers"),
        ("keys", "k", "limits", "concurrent"),
        ("ladders", "queue_max"),
        (),
    ],
)
def test_what_has_an_effect_is_not_pending(path: tuple[str | int, ...]) -> None:
    assert why_pending(path) is None
