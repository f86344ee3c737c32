"""Nothing that could change an answer is left out of its cache_key."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.core import cache_key, jsontext
from router.core.cache_key import CacheControl, may_cache, of_chat, of_inputs, read_control
from router.types import Json, Key, Ladder, Policy, Rung, Task

BODY: Json = {"model": "m", "messages": [{"role": "user", "content": "hi"}], "temperature": 0}
LADDER = Ladder("chat", Task.CHAT, (Rung("gpu", "org/m", tiers=frozenset({"b", "a"})),))
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 3) | st.floats(-2, 2) | st.text(max_size=3),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3)
    ),
    max_leaves=6,
)


def key_of(body: Json, **fields: bytes) -> bytes:
    found = of_chat(body, **{"ladder": b"l", "scope": b"s", **fields})
    assert found is not None
    return found


class TestChat:
    @pytest.mark.parametrize(
        "fields",
        [
            {"model": "alias"},
            {"stream": True, "stream_options": {"include_usage": True}},
            {"stream_options": None},
            {"user": "u", "metadata": {"a": "b"}, "store": True, "safety_identifier": "x"},
            {"prompt_cache_key": "k", "prompt_cache_options": {}, "prompt_cache_retention": "24h"},
        ],
    )
    def test_what_has_no_part_in_the_answer(self, fields: Json) -> None:
        assert key_of({**BODY, **fields}) == key_of(BODY)

    def test_the_order_of_the_fields_is_no_difference_but_deeper_down_it_is(self) -> None:
        assert key_of(dict(reversed(BODY.items()))) == key_of(BODY)
        schema: Json = {"a": 1, "b": 2}
        turned = dict(reversed(schema.items()))
        assert key_of({**BODY, "response_format": schema}) != key_of(
            {**BODY, "response_format": turned}
        )

    @pytest.mark.parametrize(
        "fields",
        [
            {"temperature": 0.0},
            {"temperature": False},
            {"temperature": None},
            {"temperature": "0"},
            {"seed": 1},
            {"n": 1},
            {"max_tokens": 5},
            {"service_tier": "flex"},
            {"stream_options": {"include_usage": True, "unknown": 1}},
            {"cache_salt": "x"},
            {"unknown": None},
            {"messages": [{"role": "user", "content": "hi "}]},
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "hi"}]}]},
        ],
    )
    def test_what_could_have_a_part(self, fields: Json) -> None:
        assert key_of({**BODY, **fields}) != key_of(BODY)

    @given(JSON, JSON)
    def test_two_values_of_an_unknown_field_are_the_same_only_as_json(
        self, one: Any, other: Any
    ) -> None:
        same = jsontext.write(one) == jsontext.write(other)
        assert (key_of({**BODY, "x": one}) == key_of({**BODY, "x": other})) is same

    @given(st.text(max_size=4), st.text(max_size=4), st.text(max_size=4), st.text(max_size=4))
    def test_fields_do_not_run_into_one_another(self, a: str, b: str, c: str, d: str) -> None:
        assert (key_of({a: b}) == key_of({c: d})) is (
            (a, b) == (c, d) or {a, c} <= cache_key._WITHOUT_PART
        )

    def test_ladder_and_scope_are_in_it(self) -> None:
        assert len({key_of(BODY), key_of(BODY, ladder=b"2"), key_of(BODY, scope=b"2")}) == 3

    def test_half_a_character_is_a_text_like_others(self) -> None:
        half = {**BODY, "x": "\ud83d"}
        assert key_of(half) != key_of({**BODY, "x": "\\ud83d"})

    def test_what_is_no_json_has_none(self) -> None:
        assert of_chat({"x": float, **BODY}, ladder=b"", scope=b"") is None


class TestScope:
    alice = Key("alice", tier="premium", token="hf_secret", bill_to="acme")

    def test_a_key_of_its_own_unless_shared(self) -> None:
        bob = replace(self.alice, name="bob")
        assert cache_key.scope_of(bob, shared=False) != cache_key.scope_of(self.alice, shared=False)
        assert cache_key.scope_of(bob, shared=True) == cache_key.scope_of(self.alice, shared=True)

    @pytest.mark.parametrize("fields", [{"tier": ""}, {"token": None}, {"bill_to": None}])
    def test_what_opens_other_rungs_separates_even_then(self, fields: Any) -> None:
        other = replace(self.alice, **fields)
        assert cache_key.scope_of(other, shared=True) != cache_key.scope_of(self.alice, shared=True)

    def test_no_secret_is_in_it(self) -> None:
        assert b"hf_secret" not in cache_key.scope_of(self.alice, shared=False)


class TestLadder:
    def text(self, ladder: Ladder = LADDER, policy: Policy = Policy.ORDER) -> bytes:
        return cache_key.ladder_of(ladder, policy, {"gpu": "tgi http://gpu"})

    def test_it_says_what_may_have_answered(self) -> None:
        rungs = (Rung("gpu", "org/other"),)
        others = [
            self.text(policy=Policy.BEST),
            self.text(replace(LADDER, name="x")),
            self.text(replace(LADDER, rungs=rungs)),
            self.text(replace(LADDER, escalate_on=frozenset({"empty"}))),
            self.text(replace(LADDER, vector_space="v")),
            self.text(replace(LADDER, token_ids="model")),
            cache_key.ladder_of(LADDER, Policy.ORDER, {"gpu": "tgi http://elsewhere"}),
        ]
        assert len({self.text(), *others}) == len(others) + 1
        assert b'["a","b"]' in self.text(), "the same in every process"


@pytest.mark.parametrize(
    ("fields", "mode", "may"),
    [
        ({"temperature": 0}, "deterministic", True),
        ({"temperature": 0.0}, "deterministic", True),
        ({"temperature": False}, "deterministic", False),
        ({"temperature": 0.1}, "deterministic", False),
        ({}, "deterministic", False),
        ({"seed": 7}, "deterministic", True),
        ({"seed": True}, "deterministic", False),
        ({"seed": 7, "n": 1}, "deterministic", True),
        ({"seed": 7, "n": 2}, "deterministic", False),
        ({"seed": 7, "web_search_options": {}}, "deterministic", False),
        ({}, "always", True),
        ({"temperature": 0}, "off", False),
    ],
)
def test_who_may_be_cached(fields: Json, mode: str, may: bool) -> None:
    assert may_cache(fields, mode) is may


@pytest.mark.parametrize(
    ("header", "control"),
    [
        (None, CacheControl()),
        ("", CacheControl()),
        ("no-store", CacheControl(no_store=True)),
        ("No-Cache", CacheControl(no_cache=True)),
        (" no-store , max-age = 60", CacheControl(no_store=True, max_age_s=60.0)),
        ('max-age="5"', CacheControl(max_age_s=5.0)),
        ("max-age=9, max-age=3", CacheControl(max_age_s=3.0)),
        ("max-age=0", CacheControl(max_age_s=0.0)),
        ("max-age=" + "9" * 500, CacheControl(max_age_s=999_999_999.0)),
        ("max-age=-1, max-age=x, max-age=\u0661, max-age", CacheControl()),
        ("private, stale-if-error=5, no-stored", CacheControl()),
        ("," * 5_000 + "no-store", CacheControl()),
    ],
)
def test_cache_control(header: str | None, control: CacheControl) -> None:
    assert read_control(header) == control


class TestInputs:
    def keys(self, inputs: Any, **fields: Any) -> list[bytes]:
        given = {"space": b"v", "scope": b"s", "dimensions": None, "extra": {}, **fields}
        found = of_inputs(inputs, **given)
        assert found is not None
        return found

    def test_the_text_and_not_its_company_makes_the_key(self) -> None:
        one, other = self.keys(["a"])[0], self.keys(["b"])[0]
        assert self.keys(["a", "b", "a"]) == [one, other, one]

    @pytest.mark.parametrize(
        "fields",
        [
            {"space": b"other"},
            {"scope": b"other"},
            {"dimensions": 64},
            {"extra": {"normalize": False}},
            {"extra": {"normalize": None}},
        ],
    )
    def test_parameters_make_others(self, fields: Any) -> None:
        assert self.keys(["a"], **fields) != self.keys(["a"])

    def test_extra_fields_in_any_order(self) -> None:
        one, other = {"a": 1, "b": 2}, {"b": 2, "a": 1}
        assert self.keys(["a"], extra=one) == self.keys(["a"], extra=other)

    def test_token_ids_are_no_text(self) -> None:
        assert self.keys([[1, 2]]) != self.keys(["[1,2]"])
        assert len(set(self.keys([[1, 2], [12], [1 << 70]]))) == 3

    @given(st.lists(st.text() | st.sampled_from(["\ud83d", "\ude00", "\\ud83d"]), unique=True))
    def test_every_text_has_its_own(self, texts: list[str]) -> None:
        assert len(set(self.keys(texts))) == len(texts)

    def test_what_is_no_json_has_none(self) -> None:
        given: Any = {"space": b"", "scope": b"", "dimensions": None}
        assert of_inputs(["a"], extra={"x": float}, **given) is None
