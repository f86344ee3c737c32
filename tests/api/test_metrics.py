"""The metrics as a scraper reads them: well-formed, complete, and free of what clients send."""

from __future__ import annotations

from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families

from tests.api.test_edge import GOOD, HI
from tests.fakes.upstream import FakeUpstream
from tests.house import House, ladder_of, open_house

GEN_AI = {
    "gen_ai_operation_name": "chat",
    "gen_ai_provider_name": "b0",
    "gen_ai_request_model": "chat",
    "gen_ai_response_model": "org/m",
}


async def scraped(house: House) -> dict[str, Metric]:
    status, text, _ = await house.get("/metrics")
    assert status == 200
    return {family.name: family for family in text_string_to_metric_families(text.decode())}


def value(family: Metric, name: str, **labels: str) -> float:
    (found,) = [one.value for one in family.samples if one.name == name and one.labels == labels]
    return found


async def test_the_gen_ai_names_are_read_as_histograms() -> None:
    async with FakeUpstream(GOOD) as up, open_house(ladder_of(up.url)) as house:
        await house.post("/v1/chat/completions", HI)
        await house.post("/v1/chat/completions", {**HI, "stream": True})
        found = await scraped(house)
    duration = found["gen_ai_client_operation_duration_seconds"]
    first = found["gen_ai_client_operation_time_to_first_chunk_seconds"]
    tokens = found["gen_ai_client_token_usage"]
    assert {duration.type, first.type, tokens.type} == {"histogram"}
    labels = {**GEN_AI, "error_type": ""}
    assert value(duration, f"{duration.name}_count", **labels) == 2
    assert 0 < value(duration, f"{duration.name}_sum", **labels) < 60
    assert value(duration, f"{duration.name}_bucket", **labels, le="+Inf") == 2
    assert value(first, f"{first.name}_count", **GEN_AI) == 1
    spent = {**GEN_AI, "gen_ai_token_type": "input"}
    assert value(tokens, f"{tokens.name}_sum", **spent) == 10
    assert value(tokens, f"{tokens.name}_bucket", **spent, le="4.0") == 0
    assert value(tokens, f"{tokens.name}_bucket", **spent, le="16.0") == 2
    bounds = [one.labels["le"] for one in tokens.samples if one.name.endswith("_bucket")]
    assert [float(bound) for bound in bounds[:15]] == [*(4.0**i for i in range(14)), float("inf")]
    assert value(found["rungway_log_lines_lost"], "rungway_log_lines_lost_total") == 0


async def test_no_label_is_what_a_client_sent() -> None:
    mark = "clients-own-text"
    headers = {"X-Client-Request-Id": mark, "Authorization": f"Bearer {mark}", "Origin": mark}
    async with FakeUpstream(GOOD) as up, open_house(ladder_of(up.url)) as house:
        for model in ("chat", mark, f"chat:{mark}"):
            for body in ({**HI, "model": model}, {**HI, "model": model, mark: mark}):
                await house.post("/v1/chat/completions", body, {"X-Client-Request-Id": mark})
        await house.post("/v1/chat/completions", {**HI, "messages": [{"role": mark}]})
        await house.post("/v1/embeddings", {"model": mark, "input": mark})
        await house.post(f"/{mark}", HI, headers)
        await house.get(f"/v1/models/{mark}", headers)
        found = await scraped(house)
        assert any(mark in str(line) for line in house.lines)
    labels = {
        label
        for family in found.values()
        for sample in family.samples
        for label in sample.labels.values()
    }
    assert "unknown_url" in labels or "origin_not_allowed" in labels
    assert not [label for label in labels if mark in label]
