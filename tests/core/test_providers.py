"""What Inference Providers publish, and what Rungway makes of it."""

from __future__ import annotations

from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.core.providers import (
    EMBEDDINGS_ROUTES,
    CatalogueAbilities,
    CatalogueEntry,
    CataloguePrices,
    ModelName,
    Served,
    abilities_of,
    choose_served,
    embeddings_unable,
    price_of,
    read_catalogue,
    read_mapping,
    split_model,
)
from router.core.vectors import unpack
from router.types import Abilities, EmbedCall, Price, Rung
from tests.backends.contract import embed_attempt
from tests.fakes.hub import entry, offer, served


def call(inputs: Any = ("a",), **fields: Any) -> EmbedCall:
    return embed_attempt(Rung("hf", "org/m"), list(inputs), **fields).call


def read_one(*offers: Any, **fields: Any) -> CatalogueEntry:
    return read_catalogue(orjson.dumps({"data": [entry("org/m", *offers, **fields)]}))["org/m"]


def priced(provider: str, asked: float, given: float, **fields: Any) -> Any:
    return offer(provider, pricing={"input": asked, "output": given}, **fields)


class TestModelName:
    @pytest.mark.parametrize(
        ("model", "hub_id", "suffix", "pinned"),
        [
            ("org/m", "org/m", "", None),
            ("org/m:fastest", "org/m", "fastest", None),
            ("org/m:cheapest", "org/m", "cheapest", None),
            ("org/m:preferred", "org/m", "preferred", None),
            ("org/m:groq", "org/m", "groq", "groq"),
            ("org/m:a-new-one", "org/m", "a-new-one", "a-new-one"),
        ],
    )
    def test_suffix(self, model: str, hub_id: str, suffix: str, pinned: str | None) -> None:
        name = split_model(model)
        assert name == ModelName(hub_id, suffix)
        assert name.pinned == pinned


class TestCatalogue:
    def test_a_usd_a_million_tokens_is_a_million_picousd_a_token(self) -> None:
        assert price_of(read_one(priced("novita", 0.5, 1.5)), "") == Price(500_000, 1_500_000)

    def test_free_is_zero_and_a_missing_price_is_unknown(self) -> None:
        assert price_of(read_one(offer("a", is_free=True)), "") == Price(0, 0)
        assert price_of(read_one(offer("a")), "") is None
        assert price_of(read_one(offer("a", is_free=False)), "") is None

    @pytest.mark.parametrize(
        "pricing",
        [{}, {"input": 1}, {"input": -1, "output": 1}, {"input": "1", "output": "1"}, [], 3],
    )
    def test_a_price_that_cannot_be_read_is_unknown(self, pricing: Any) -> None:
        assert price_of(read_one(offer("a", pricing=pricing)), "") is None

    def test_cheapest_has_the_lowest_output_price_of_the_live(self) -> None:
        found = read_one(
            priced("dear", 0.1, 3.0, context_length=100),
            priced("cheap", 0.9, 1.0, context_length=50, supports_tools=True),
            priced("broken", 0.1, 0.1, status="error"),
            offer("unpriced", context_length=900),
        )
        assert price_of(found, "cheapest") == Price(900_000, 1_000_000)
        assert abilities_of(found, "cheapest") == Abilities(context=50, tools=True, vision=False)

    def test_where_the_router_chooses_the_dearest_live_price_counts(self) -> None:
        """A hold has to cover whichever provider answers."""
        found = read_one(
            priced("a", 0.1, 3.0), priced("b", 0.9, 1.0), priced("c", 9, 9, status="error")
        )
        for suffix in ("", "fastest", "preferred"):
            assert price_of(found, suffix) == Price(900_000, 3_000_000)

    def test_where_one_of_them_has_no_price_it_is_unknown(self) -> None:
        found = read_one(priced("a", 0.1, 3.0), offer("b"))
        assert price_of(found, "") is None
        assert price_of(found, "cheapest") == Price(100_000, 3_000_000)
        assert price_of(found, "a") == Price(100_000, 3_000_000)

    def test_a_pinned_provider_has_its_own_values(self) -> None:
        found = read_one(
            priced("a", 1, 2, context_length=10, supports_tools=False, status="error"),
            priced("b", 3, 4, context_length=20, supports_tools=True),
        )
        assert abilities_of(found, "a") == Abilities(context=10, tools=False, vision=False)
        assert price_of(found, "a") == Price(1_000_000, 2_000_000)
        assert abilities_of(found, "unheard-of") == Abilities(vision=False)
        assert price_of(found, "unheard-of") is None

    def test_one_live_provider_that_can_is_enough(self) -> None:
        found = read_one(
            offer("a", context_length=10, supports_tools=False, supports_structured_output=False),
            offer("b", context_length=20, supports_tools=True, supports_structured_output=False),
            offer("c", context_length=99, supports_structured_output=True, status="error"),
        )
        able = abilities_of(found, "fastest")
        assert able == Abilities(context=20, tools=True, vision=False, json_schema=False)

    def test_what_is_not_published_is_unknown(self) -> None:
        assert (
            abilities_of(read_one(offer("a"), offer("b", supports_tools=False)), "").tools is None
        )
        bare = read_catalogue(b'{"data":[{"id":"org/m"}]}')["org/m"]
        assert abilities_of(bare, "") == Abilities()
        assert price_of(bare, "") is None

    def test_with_none_live_all_count(self) -> None:
        assert abilities_of(read_one(offer("a", status="error", context_length=7)), "").context == 7

    def test_vision_is_the_models(self) -> None:
        seeing = read_one(offer("a"), architecture={"input_modalities": ["text", "image"]})
        assert abilities_of(seeing, "").vision is True
        assert abilities_of(read_one(offer("a"), architecture=None), "").vision is None

    def test_abilities_are_found_under_every_suffix(self) -> None:
        book = CatalogueAbilities({"org/m": read_one(offer("a", context_length=5), offer("b"))})
        assert list(book) == ["org/m"]
        assert len(book) == 1
        assert book["org/m"].context == book["org/m:a"].context == 5
        assert book["org/m:b"].context is None
        assert book.get("org/other:a") is None

    def test_the_book_of_prices_has_only_what_is_published(self) -> None:
        book = CataloguePrices(
            {
                "org/m": read_one(priced("a", 1, 2), priced("b", 3, 4)),
                "org/half": read_one(priced("a", 1, 2), offer("b")),
            }
        )
        assert list(book) == ["org/m"]
        assert len(book) == 1
        assert book["org/m"] == Price(3_000_000, 4_000_000)
        assert book["org/m:a"] == Price(1_000_000, 2_000_000)
        assert book["org/half:a"] == Price(1_000_000, 2_000_000)
        assert book.get("org/half:b") is None
        assert book.get("org/other") is None

    @pytest.mark.parametrize("body", [b"", b"<html>", b"{}", b'{"data": 3}', b'{"data": [1, {}]}'])
    def test_what_is_no_catalogue_is_refused(self, body: bytes) -> None:
        with pytest.raises(ValueError):
            read_catalogue(body)

    def test_unreadable_entries_are_left_out(self) -> None:
        body = orjson.dumps({"data": [7, {"id": 3}, entry("org/m", None, {"provider": 4})]})
        assert read_catalogue(body) == {"org/m": CatalogueEntry("org/m", (), False)}

    @given(
        st.recursive(
            st.none() | st.booleans() | st.integers(-9, 9) | st.floats(allow_nan=False) | st.text(),
            lambda inner: (
                st.lists(inner, max_size=3)
                | st.dictionaries(
                    st.sampled_from(
                        ["provider", "pricing", "input", "output", "context_length", "status"]
                    ),
                    inner,
                    max_size=4,
                )
            ),
            max_leaves=12,
        )
    )
    def test_any_json_in_the_providers_is_survived(self, value: Any) -> None:
        found = read_catalogue(orjson.dumps({"data": [{"id": "org/m", "providers": [value]}]}))
        for suffix in ("", "cheapest", "x"):
            abilities_of(found["org/m"], suffix)
            price_of(found["org/m"], suffix)


class TestMapping:
    def test_object_and_array_say_the_same(self) -> None:
        as_object = {"together": served("T/m"), "nscale": served("n", "conversational", "staging")}
        as_array = [{"provider": name, **one} for name, one in as_object.items()]
        expected = (
            Served("together", "T/m", "feature-extraction", True),
            Served("nscale", "n", "conversational", False),
        )
        for form in (as_object, as_array):
            body = orjson.dumps({"id": "org/m", "inferenceProviderMapping": form})
            assert read_mapping(body) == expected

    @pytest.mark.parametrize(
        "mapping", [None, {}, [], 3, {"a": 3}, [{"providerId": "x"}], [4], {"a": {}}]
    )
    def test_nothing_usable_is_no_provider(self, mapping: Any) -> None:
        assert read_mapping(orjson.dumps({"inferenceProviderMapping": mapping})) == ()

    def test_another_body_is_refused(self) -> None:
        with pytest.raises(ValueError, match="not an object"):
            read_mapping(b"[]")


HF = Served("hf-inference", "org/m", "sentence-similarity", True)
TOGETHER = Served("together", "T/m", "feature-extraction", True)
ROUTELESS = Served("novita", "n/m", "feature-extraction", True)


class TestChoice:
    def test_hf_inference_goes_before_the_others(self) -> None:
        assert choose_served([ROUTELESS, TOGETHER, HF], split_model("org/m"), call()) == (HF, "")

    def test_what_is_not_live_or_has_no_route_is_passed_over(self) -> None:
        gone = Served("hf-inference", "org/m", "feature-extraction", False)
        found, _ = choose_served([gone, ROUTELESS, TOGETHER], split_model("org/m:cheapest"), call())
        assert found == TOGETHER

    @pytest.mark.parametrize(
        "asked", [call(dimensions=64), call([[1, 2]])], ids=["dimensions", "tokens"]
    )
    def test_the_route_must_carry_the_call(self, asked: EmbedCall) -> None:
        assert choose_served([HF, TOGETHER], split_model("org/m"), asked) == (TOGETHER, "")
        found, reason = choose_served([HF], split_model("org/m"), asked)
        assert found is None
        assert reason.startswith("hf-inference ")

    def test_a_pinned_provider_is_the_only_one(self) -> None:
        assert choose_served([HF, TOGETHER], split_model("org/m:together"), call())[0] == TOGETHER
        assert choose_served([HF], split_model("org/m:together"), call()) == (
            None,
            "together does not serve org/m",
        )

    def test_a_provider_of_another_task_is_refused(self) -> None:
        chat = Served("together", "T/m", "conversational", True)
        found, reason = choose_served([chat], split_model("org/m:together"), call())
        assert found is None
        assert "conversational" in reason

    def test_nobody_at_all(self) -> None:
        assert choose_served([], split_model("org/m"), call()) == (
            None,
            "no provider serves org/m",
        )

    def test_a_provider_without_a_route_is_unable(self) -> None:
        assert embeddings_unable("novita", call()) == (
            "no embeddings route is known for the provider novita"
        )
        assert embeddings_unable("together", call()) is None


class TestRoutes:
    @pytest.mark.parametrize(
        ("provider", "path"),
        [
            ("hf-inference", "/hf-inference/models/org/m/pipeline/feature-extraction"),
            ("together", "/together/v1/embeddings"),
            ("scaleway", "/scaleway/v1/embeddings"),
            ("deepinfra", "/deepinfra/v1/openai/embeddings"),
        ],
    )
    def test_paths(self, provider: str, path: str) -> None:
        assert EMBEDDINGS_ROUTES[provider].path("org/m") == path

    def test_the_native_body_is_flat(self) -> None:
        body = EMBEDDINGS_ROUTES["hf-inference"].body(call(extra={"normalize": True}), "p", ["a"])
        assert body == {"inputs": ["a"], "normalize": True}

    def test_the_openai_body_has_the_providers_own_id(self) -> None:
        body = EMBEDDINGS_ROUTES["together"].body(call(dimensions=2), "T/m", ["a"])
        assert body == {"model": "T/m", "input": ["a"], "dimensions": 2}
        assert next(iter(body)) == "model"

    def test_the_openai_body_asks_for_nothing_more(self) -> None:
        body = EMBEDDINGS_ROUTES["deepinfra"].body(call(extra={"user": "u"}), "D/m", ["a", "b"])
        assert body == {"model": "D/m", "input": ["a", "b"], "user": "u"}

    @pytest.mark.parametrize("reply", [[0.5, 1.0], [[0.5, 1.0]], [[[0.5, 1.0]]]])
    def test_the_rank_of_a_native_reply_is_normalised(self, reply: Any) -> None:
        answer = EMBEDDINGS_ROUTES["hf-inference"].read(orjson.dumps(reply), 1, "hf")
        assert [unpack(raw) for raw in answer.vectors] == [[0.5, 1.0]]
