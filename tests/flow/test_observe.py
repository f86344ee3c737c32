"""A record counts whatever happens to its line, and no text of a client's becomes a label."""

from __future__ import annotations

import select
from collections.abc import Callable
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.flow.observe import TOKEN_BUCKETS, AttemptRecord, Observer, Record
from router.types import Rung, Usage

RUNG = Rung("gpu", "org/m")
# Lone surrogates among them: what Python makes of bytes in a header that are no text.
ANY_TEXT = st.text(st.characters(codec=None), max_size=300)


def observer(lines: list[bytes]) -> Observer:
    return Observer(lines.append, lambda: 1.5)


def answered(**settings: Any) -> Record:
    values: dict[str, Any] = {
        "key": "alice",
        "ladder": "chat",
        "task": "chat",
        "attempts": [AttemptRecord(Rung("hf", "x"), "busy"), AttemptRecord(RUNG)],
        "rung": RUNG,
        "usage": Usage(5, 70),
        "first_token_s": 0.03,
        "total_s": 0.5,
        "status": 200,
    }
    return Record("id", "/v1/chat/completions", **{**values, **settings})


@given(ANY_TEXT, ANY_TEXT, ANY_TEXT)
def test_no_text_from_outside_keeps_a_call_from_being_counted(
    route: str, client_request_id: str, error: str
) -> None:
    lines: list[bytes] = []
    watching = observer(lines)
    record = answered(client_request_id=client_request_id, error=error)
    record.route = route
    watching.record(record)
    (line,) = lines
    assert line.endswith(b"\n")
    assert line.count(b"\n") == 1
    read = orjson.loads(line)
    assert read["status"] == 200
    assert len(read["route"]) <= 200
    assert len(watching.calls) == 1


def test_a_plain_line_keeps_its_text() -> None:
    lines: list[bytes] = []
    observer(lines).record(answered(client_request_id="grüße-\ud800-1"))
    assert orjson.loads(lines[0])["client_request_id"] == "grüße-?-1"
    observer(lines).record(answered(client_request_id="grüße"))
    assert orjson.loads(lines[1])["client_request_id"] == "grüße"


@pytest.mark.parametrize("error", [BrokenPipeError("gone"), ValueError("closed file")])
def test_a_line_that_cannot_be_written_is_counted_as_lost(error: Exception) -> None:
    def fail(_: bytes) -> None:
        raise error

    watching = Observer(fail, lambda: 0.0)
    watching.record(answered())
    assert watching.calls == {("chat", "gpu/org/m", "ok"): 1}
    assert watching.lines_lost == 1


def test_an_outcome_that_is_no_word_of_ours_is_another() -> None:
    watching = observer([])
    for error in ("upstream_busy", "what a client wrote", "x" * 65, "é"):
        watching.record(answered(error=error))
    assert {outcome for _, _, outcome in watching.calls} == {"upstream_busy", "other"}
    assert watching.calls["chat", "gpu/org/m", "other"] == 3


def test_the_gen_ai_counts_are_of_the_last_rung_tried() -> None:
    watching = observer([])
    watching.record(answered())
    watching.record(answered(rung=None, usage=None, first_token_s=None, error="no_rung_left"))
    labels = ("chat", "gpu", "chat", "org/m")
    counts = watching.gen_ai
    assert set(counts.durations) == {(*labels, ""), (*labels, "no_rung_left")}
    assert counts.durations[*labels, ""].total == 0.5
    assert sum(counts.first_chunks[labels].counts) == 1
    assert counts.tokens[*labels, "output"].total == 70
    assert counts.tokens[*labels, "output"].counts[TOKEN_BUCKETS.index(256)] == 1


def test_embeddings_put_no_tokens_out_and_what_was_not_tried_is_no_operation() -> None:
    watching = observer([])
    watching.record(answered(task="embeddings", ladder="embed", usage=Usage(9)))
    assert [labels[-1] for labels in watching.gen_ai.tokens] == ["input"]
    watching.record(Record("id", "/nowhere", status=404, error="unknown_url"))
    assert len(watching.gen_ai.durations) == 1


class Later:
    """What was asked to be called back, until it is."""

    def __init__(self) -> None:
        self.asked: list[Callable[[], None]] = []

    def __call__(self, callback: Callable[[], None]) -> None:
        self.asked.append(callback)

    def comes(self) -> None:
        asked, self.asked = self.asked, []
        for callback in asked:
            callback()


def ids(written: list[bytes]) -> list[str]:
    return [orjson.loads(line)["id"] for line in b"".join(written).splitlines()]


def test_lines_wait_for_each_other_and_keep_their_order() -> None:
    written: list[bytes] = []
    later = Later()
    watching = Observer(written.append, lambda: 0.0, later)
    for number in range(3):
        watching.record(Record(f"call {number}", "/"))
    assert not written
    assert len(later.asked) == 1
    later.comes()
    assert len(written) == 1
    assert ids(written) == ["call 0", "call 1", "call 2"]
    later.comes()
    watching.record(Record("call 3", "/"))
    later.comes()
    assert ids(written)[3:] == ["call 3"]


def test_no_more_waits_than_a_pipe_takes_whole() -> None:
    """Which is also all that a kill may lose, and one worker's lines stay apart from another's."""
    written: list[bytes] = []
    later = Later()
    watching = Observer(written.append, lambda: 0.0, later)
    wanted = [f"call {number}" for number in range(100)]
    for call_id in wanted:
        watching.record(Record(call_id, "/"))
    assert all(len(lines) <= select.PIPE_BUF and lines.endswith(b"\n") for lines in written)
    assert len(later.asked) == 1
    assert ids(written) == wanted[: len(ids(written))]
    line_bytes = len(written[0].splitlines(keepends=True)[0])
    assert (len(wanted) - len(ids(written))) * line_bytes <= select.PIPE_BUF
    watching.flush()
    assert ids(written) == wanted
    watching.flush()
    assert all(written)


def test_a_line_longer_than_a_pipe_takes_goes_alone() -> None:
    written: list[bytes] = []
    watching = Observer(written.append, lambda: 0.0, Later())
    attempts = [AttemptRecord(Rung("gpu", f"model-{number}")) for number in range(200)]
    watching.record(Record("short", "/"))
    watching.record(answered(attempts=attempts))
    watching.record(Record("short", "/"))
    watching.flush()
    assert [len(lines.splitlines()) for lines in written] == [1, 1, 1]


def test_lines_that_are_lost_together_are_counted_one_by_one() -> None:
    def fail(_: bytes) -> None:
        raise BrokenPipeError("gone")

    watching = Observer(fail, lambda: 0.0, Later())
    for _ in range(3):
        watching.record(answered())
    watching.flush()
    assert watching.lines_lost == 3


def test_one_count_of_a_call_shows_in_every_metric() -> None:
    watching = observer([])
    watching.record(answered())
    watching.record(answered(rung=None, usage=None, first_token_s=None, error="no_rung_left"))
    watching.record(answered(attempts=[AttemptRecord(RUNG)], usage=Usage(1, 2)))
    watching.record(Record("id", "/nowhere", status=404, error="unknown_url"))
    rung = RUNG.name
    assert watching.calls == {
        ("chat", rung, "ok"): 2,
        ("chat", "", "no_rung_left"): 1,
        ("", "", "unknown_url"): 1,
    }
    assert watching.tokens == {("chat", rung, "input"): 6, ("chat", rung, "output"): 72}
    assert watching.attempts == {("hf/x", "busy"): 2, (rung, "ok"): 3}
    assert {key: one.count for key, one in watching.durations.items()} == {("chat", "chat"): 3}
    assert {key: one.count for key, one in watching.first_tokens.items()} == {("chat", rung): 2}
    assert watching.durations["chat", "chat"].total == 1.5
