"""The messages of a Gradio queue: recordings of three versions fed in, edits, text, failures."""

from __future__ import annotations

import copy
from itertools import pairwise
from pathlib import Path
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.core import gradio
from router.core.gradio import JobWatch, Step, TextSent, apply_edits, failure, text_of
from router.core.sse import SseParser
from router.core.vectors import unpack
from router.errors import (
    CallerMistake,
    PromptTooLong,
    RungRefused,
    UpstreamBroken,
    UpstreamBusy,
    UpstreamError,
    UpstreamFailed,
)
from router.types import Usage

RECORDINGS = Path(__file__).parent.parent / "recordings" / "gradio"
ID = "e" * 32


def watch(*, event_id: str = ID, index: int = 0, bytes_max: int = 1 << 20) -> JobWatch:
    return JobWatch(who="space/m", event_id=event_id, output_index=index, bytes_max=bytes_max)


def message(msg: str, event_id: str | None = ID, **fields: Any) -> bytes:
    return orjson.dumps({"msg": msg, "event_id": event_id, **fields})


def generating(*data: Any, event_id: str | None = ID) -> bytes:
    output = {"data": list(data), "is_generating": True}
    return message("process_generating", event_id, output=output, success=True)


def completed(*data: Any) -> bytes:
    return message("process_completed", output={"data": list(data)}, success=True)


# --- recordings ---------------------------------------------------------------------------------


def recorded(name: str) -> list[list[bytes]]:
    """The jobs of a recording, each the messages of its stream."""
    parser = SseParser()
    text = (RECORDINGS / f"{name}.txt").read_bytes()
    jobs: list[list[bytes]] = [[]]
    for sse in [*parser.feed(text), *parser.finish()]:
        jobs[-1].append(sse.data)
        if b'"close_stream"' in sse.data:
            jobs.append([])
    return [job for job in jobs if job]


def follow(messages: list[bytes]) -> tuple[list[str], list[str], Any]:
    """The comments, the text after each value, and the final value of one job."""
    event_id = orjson.loads(messages[0])["event_id"]
    job = watch(event_id=event_id)
    comments, texts = [], []
    for payload in messages:
        step = job.see(payload)
        if step.comment:
            comments.append(step.comment)
        if step.has_value:
            texts.append(text_of(job.value, who="space/m"))
        if step.is_completed:
            break
    assert job.is_over
    return comments, texts, job.value


@pytest.mark.parametrize(
    ("name", "text", "place"),
    [
        ("31_queue_join_chat", "You said: streaming here (history=0)", "queue position 1 of 1"),
        ("85F_queue", "You said: hi (history=0)", "queue position 2 of 2"),
        ("84F_queue", "You said: hi (history=0)", "queue position 2 of 2"),
    ],
)
def test_recorded_chats_grow_to_their_final_text(name: str, text: str, place: str) -> None:
    comments, texts, value = follow(recorded(name)[0])
    assert value == text
    assert comments[0].startswith(place)
    sent = TextSent("space/m")
    assert "".join(sent.take(one) for one in texts) == text
    assert len(set(texts)) > 3


def test_recorded_progress_becomes_comments() -> None:
    comments, texts, _ = follow(recorded("32_queue_progress")[0])
    assert comments[1:] == [f"progress: working {index}/3" for index in range(3)]
    assert texts == ["ok"]


@pytest.mark.parametrize(
    ("name", "job", "words"),
    [
        ("33_queue_error_mid", 0, "mid-stream failure"),
        ("34_queue_plain_error", 0, "without saying why"),
        ("85G_queue_boom", 0, ": Model exploded"),
        ("85G_queue_boom", 1, "without saying why"),
        ("84G_queue_boom", 0, ": Model exploded"),  # in quotes on this version's wire
        ("84G_queue_boom", 1, "without saying why"),
        ("36_data_unknown_session", 0, "lost the job: 404: Not Found"),
    ],
)
def test_recorded_failures_say_what_they_can(name: str, job: int, words: str) -> None:
    with pytest.raises(UpstreamFailed, match=words):
        follow(recorded(name)[job])


# --- messages -----------------------------------------------------------------------------------


def test_other_jobs_of_the_stream_are_passed_over() -> None:
    job = watch()
    other = "f" * 32
    assert job.see(generating("theirs", event_id=other)) == Step()
    assert job.see(message("process_completed", other, output={"error": "x"}, success=False)) == (
        Step()
    )
    job.see(generating("ours"))
    assert job.value == "ours"


@pytest.mark.parametrize("msg", ["heartbeat", "process_starts", "something_new", ""])
def test_messages_without_a_meaning_for_us_bring_nothing(msg: str) -> None:
    assert watch().see(message(msg, None)) == Step()


@pytest.mark.parametrize(
    ("fields", "comment"),
    [
        ({"rank": 0, "queue_size": 1, "rank_eta": None}, "queue position 1 of 1"),
        ({"rank": 2, "queue_size": 9, "rank_eta": 7.6}, "queue position 3 of 9, about 8 s"),
        ({"rank": 2}, "queue position 3"),
        ({"rank": None, "queue_size": 2}, ""),
    ],
)
def test_the_place_in_the_queue(fields: Any, comment: str) -> None:
    assert watch().see(message("estimation", **fields)).comment == comment


@pytest.mark.parametrize(
    ("units", "comment"),
    [
        ([{"progress": 0.25, "desc": "loading"}], "progress: loading 25%"),
        ([{"index": 1, "length": 3}, {"index": 2, "length": 5}], "progress: 2/5"),
        ([{}], "progress:"),
        ([], ""),
        ("?", ""),
    ],
)
def test_progress(units: Any, comment: str) -> None:
    assert watch().see(message("progress", progress_data=units)).comment == comment


def test_a_log_cannot_break_out_of_its_comment() -> None:
    said = watch().see(message("log", log="a\r\n\ndata: [DONE]\u2028\x85\x00b" + "x" * 900)).comment
    assert said.startswith("a data: [DONE] b")
    assert said.isprintable()
    assert len(said) <= 201


@pytest.mark.parametrize(
    ("payload", "error"),
    [
        (b"{", UpstreamBroken),
        (b"[]", UpstreamBroken),
        (message("close_stream", None), UpstreamBroken),
        (message("queue_full"), UpstreamBusy),
        (message("server_stopped", None, message="Server stopped unexpectedly."), UpstreamFailed),
        (message("process_completed", output={}, success=True), UpstreamFailed),  # called off
        (message("process_completed", output=None, success=True), UpstreamFailed),
        (message("process_completed", output={"data": None}, success=True), UpstreamFailed),
        (message("process_completed", output={"data": []}, success=True), UpstreamBroken),
        (message("process_completed", success=False), UpstreamFailed),
        (message("process_completed", output={"error": "x"}, success=True), UpstreamFailed),
        (message("process_generating", output={"error": "x"}, success=False), UpstreamFailed),
        (message("process_generating", output={"data": "x"}, success=True), UpstreamBroken),
        (message("process_generating", success=True), UpstreamBroken),
    ],
)
def test_what_fails_or_breaks(payload: bytes, error: type[UpstreamError]) -> None:
    with pytest.raises(error, match="space/m"):
        watch().see(payload)


def test_an_update_stands_for_its_value() -> None:
    job = watch(index=1)
    job.see(generating("box", {"__type__": "update", "value": "text"}))
    assert job.value == "text"
    job.see(completed("", {"__type__": "update", "visible": False}))
    assert job.value is None


def test_unchanged_outputs_bring_no_value() -> None:
    job = watch()
    job.see(generating("a", None))
    assert job.see(generating([], [])) == Step()


def test_a_value_that_grows_without_end_is_cut_off() -> None:
    job = watch(bytes_max=1000)
    job.see(generating("a"))
    edit = generating([["append", [], "x" * 500]])
    job.see(edit)
    with pytest.raises(UpstreamBroken, match="larger than 1000 bytes"):
        job.see(edit)


# --- edits --------------------------------------------------------------------------------------

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=4)
    ),
    max_leaves=12,
)


def edits_between(before: Any, now: Any, path: tuple[Any, ...] = ()) -> list[Any]:
    """Edits as Gradio makes them; the inverse of what is tested, by its own description."""
    where = list(path)
    if type(before) is not type(now):
        return [["replace", where, now]]
    if isinstance(before, str) and now.startswith(before):
        return [["append", where, now[len(before) :]]] if before != now else []
    if isinstance(before, list):
        edits = []
        common = min(len(before), len(now))
        for index in range(common):
            edits += edits_between(before[index], now[index], (*path, index))
        edits += [["add", [*path, index], now[index]] for index in range(common, len(now))]
        edits += [
            ["delete", [*path, index], None] for index in reversed(range(common, len(before)))
        ]
        return edits
    if isinstance(before, dict):
        edits = [["delete", [*path, name], None] for name in before if name not in now]
        for name, value in now.items():
            if name in before:
                edits += edits_between(before[name], value, (*path, name))
            else:
                edits.append(["add", [*path, name], value])
        return edits
    return [] if before == now else [["replace", where, now]]


@given(st.lists(VALUES, min_size=1, max_size=5))
def test_edits_lead_from_value_to_value(values: list[Any]) -> None:
    job = watch()
    job.see(generating(values[0]))
    for before, now in pairwise(values):
        job.see(generating(edits_between(before, now)))
        assert job.value == now


@given(st.lists(VALUES, max_size=3) | VALUES, VALUES)
def test_edits_that_do_not_fit_are_an_error_and_never_a_crash(edits: Any, value: Any) -> None:
    job = watch()
    job.see(generating(copy.deepcopy(value)))
    try:
        job.see(generating(edits))
    except UpstreamBroken:
        return
    assert edits == []


@pytest.mark.parametrize(
    ("value", "edit"),
    [
        ("a", ["add", [], "b"]),
        (None, ["append", [], "b"]),
        ("a", ["append", [], 1]),
        (["a"], ["replace", [-1], "b"]),
        (["a"], ["replace", [1], "b"]),
        (["a"], ["replace", [True], "b"]),
        (["a"], ["add", [3], "b"]),
        (["a"], ["delete", [1], None]),
        ({"a": "b"}, ["append", ["b"], "c"]),
        ({"a": "b"}, ["replace", [["a"]], "c"]),
        ({"a": "b"}, ["replace", ["a", 0], "c"]),
        ({"a": []}, ["explode", ["a"], "c"]),
        ("a", ["append", []]),
        ("a", ["append", "", "b"]),
        ("a", "append"),
    ],
)
def test_edits_that_do_not_fit(value: Any, edit: Any) -> None:
    with pytest.raises((ValueError, TypeError, LookupError)):
        apply_edits(value, [edit])


def test_lists_are_appended_to() -> None:
    assert apply_edits({"a": [1]}, [["append", ["a"], [2, 3]]]) == {"a": [1, 2, 3]}


# --- text ---------------------------------------------------------------------------------------


@given(st.lists(st.text(max_size=5), max_size=12))
def test_growing_text_is_sent_exactly_once(pieces: list[str]) -> None:
    sent = TextSent("space/m")
    deltas = [sent.take("".join(pieces[:count])) for count in range(1, len(pieces) + 1)]
    assert "".join(deltas) + sent.take("".join(pieces), is_final=True) == "".join(pieces)


@given(st.lists(st.text("ab ", max_size=4), max_size=8))
def test_what_was_sent_is_always_the_beginning_of_what_is_said(texts: list[str]) -> None:
    sent, told = TextSent("space/m"), ""
    for text in texts:
        try:
            told += sent.take(text)
        except UpstreamBroken:
            return
        assert told.startswith(text) or text == told


def test_a_rewrite_before_anything_was_said_is_just_the_text() -> None:
    sent = TextSent("space/m")
    assert sent.take("") == ""
    assert sent.take("Hello") == "Hello"


def test_a_rewrite_of_what_was_said_fails() -> None:
    sent = TextSent("space/m")
    sent.take("Thinking…")
    with pytest.raises(UpstreamBroken, match="rewrote"):
        sent.take("Hello")


def test_text_that_was_cut_short_may_grow_back() -> None:
    sent = TextSent("space/m")
    sent.take("Hello ")
    assert sent.take("") == ""
    assert sent.take("Hello there", is_final=True) == "there"


@pytest.mark.parametrize(("final", "is_good"), [("Hello", True), ("Hel", False), ("", False)])
def test_a_final_text_may_lack_only_white_space(final: str, is_good: bool) -> None:
    sent = TextSent("space/m")
    sent.take("Hello \n")
    if is_good:
        assert sent.take(final, is_final=True) == ""
    else:
        with pytest.raises(UpstreamBroken, match="rewrote"):
            sent.take(final, is_final=True)


SAID = {"role": "assistant", "content": "said"}


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, ""),
        ("said", "said"),
        (SAID, "said"),
        ({"role": "assistant", "content": [{"type": "text", "text": "said"}]}, "said"),
        ([{"role": "user", "content": "asked"}, SAID], "said"),
        ([SAID, {"role": "user", "content": "asked"}], ""),
        ([SAID, {"role": "assistant", "content": "more"}], "said\n\nmore"),
        ([{**SAID, "content": "hm", "metadata": {"title": "Thinking"}}, SAID], "said"),
        ([{**SAID, "metadata": {"title": None}}], "said"),
        ([["asked", "old"], ["asked", "said"]], "said"),
        ([["asked", None]], ""),
        ({"text": "said", "files": []}, "said"),
        ({"component": "markdown", "value": "said", "props": {}}, "said"),
        (["sa", "id"], "said"),
        ([], ""),
    ],
)
def test_text_in_every_form_of_value(value: Any, text: str) -> None:
    assert text_of(value, who="space/m") == text


DEEP: Any = "x"
for _ in range(100):
    DEEP = [DEEP]


@pytest.mark.parametrize("value", [3, True, {"path": "/a.png"}, ["a", 3], [[1, 2]], {}, DEEP])
def test_a_value_without_text_is_not_an_answer(value: Any) -> None:
    with pytest.raises(UpstreamBroken, match="no text"):
        text_of(value, who="space/m")


# --- vectors ------------------------------------------------------------------------------------

VECTORS = [[0.5, 1.0], [2.0, 0.25]]
OPENAI = [{"index": i, "embedding": VECTORS[i]} for i in (1, 0)]


@pytest.mark.parametrize(
    "value",
    [
        VECTORS,
        orjson.dumps(VECTORS).decode(),
        {"embeddings": VECTORS},
        {"headers": ["1", "2"], "data": VECTORS},
        {"object": "list", "data": OPENAI},
    ],
)
def test_vectors_in_every_form_of_value(value: Any) -> None:
    usage = Usage(7, estimated=True)
    answer = gradio.vectors_of(value, 2, who="space/m", usage=usage)
    assert [unpack(raw) for raw in answer.vectors] == VECTORS


@pytest.mark.parametrize("value", ["no", None, [], VECTORS[:1], {"a": 1}, [DEEP, DEEP], DEEP * 300])
def test_what_is_not_two_vectors(value: Any) -> None:
    with pytest.raises(UpstreamBroken):
        gradio.vectors_of(value, 2, who="space/m", usage=Usage())


def test_vectors_nested_too_deep_to_be_written_again() -> None:
    value: Any = 1.0
    for _ in range(600):
        value = [value]
    with pytest.raises(UpstreamBroken, match="nested too deep"):
        gradio.vectors_of(value, 1, who="space/m", usage=Usage())


# --- failures -----------------------------------------------------------------------------------

QUOTA = "You have exceeded your {} quota (60s requested vs. 0s left). Try again in {}"


@pytest.mark.parametrize(
    ("text", "title", "kind", "code", "cool_s"),
    [
        (
            QUOTA.format("Pro ZeroGPU", "1:02:03."),
            "ZeroGPU quota exceeded",
            RungRefused,
            "quota",
            3723,
        ),
        (QUOTA.format("free ZeroGPU", "0:00:09"), "", RungRefused, "quota", 9),
        (QUOTA.format("GPU", "23:59:59"), "Error", RungRefused, "quota", 86399),
        (QUOTA.format("GPU", "9 days, 3:00:00"), "Error", RungRefused, "quota", 86400),
        ("more text, no time", "ZeroGPU quota exceeded", RungRefused, "quota", 600),
        ("Space app has reached its GPU limit", "", RungRefused, "quota", 600),
        ("Ask for less.", "ZeroGPU illegal duration", RungRefused, "quota", 600),
        ("Pay first.", "ZeroGPU pending credits exceeded", RungRefused, "credit", 600),
        (QUOTA.format("GPU", "0:00:09"), "ZeroGPU queue timeout", UpstreamBusy, None, None),
        ("No GPU is currently available for you after 60s", "", UpstreamBusy, None, None),
        ("Unlogged user", "ZeroGPU client error", UpstreamFailed, None, None),
        ("'GPU task aborted'", "Error", UpstreamFailed, None, None),
        ("Rate limit reached", "Error", UpstreamBusy, None, None),
        ("This model's maximum context length is 9", "Error", PromptTooLong, None, None),
        ("it broke", "Error", UpstreamFailed, None, None),
        (None, "Error", UpstreamFailed, None, None),
        ({"not": "text"}, "", UpstreamFailed, None, None),
    ],
)
def test_failures(
    text: Any, title: str, kind: type[UpstreamError], code: str | None, cool_s: float | None
) -> None:
    error = failure("space/m", text, title)
    assert type(error) is kind
    assert error.cool_s == cool_s
    if code is not None:
        assert error.code == f"upstream_{code}"


@pytest.mark.parametrize(
    ("status", "body", "kind", "words"),
    [
        (401, '{"detail":{"error":"Not authenticated","auth_message":null}}', RungRefused, "auth="),
        (401, '{"detail":"bad token"}', RungRefused, "refused our token"),
        (503, '{"detail":"Queue is full. Max size is 3 and size is 3."}', UpstreamBusy, "Max size"),
        (503, '{"detail":"Queue is stopped."}', UpstreamFailed, "stopped"),
        (503, "Your space is in error, check its status on hf.co", UpstreamFailed, "in error"),
        (422, '{"detail":[{"type":"list_type","msg":"x"}]}', UpstreamBroken, "422"),
        (422, "{}", UpstreamBroken, "422"),
        (500, "Internal Server Error", RungRefused, "does not know the function"),
        (500, "<html>x</html>", UpstreamFailed, "HTML"),
        (500, '{"detail":"x"}', UpstreamFailed, "500"),
        (404, '{"detail":"Not Found"}', UpstreamFailed, "redeployed"),
        (400, '{"detail":"Session hash not found."}', UpstreamFailed, "Session hash"),
        (302, "", UpstreamBroken, "redirect"),
    ],
)
def test_refused_posts(status: int, body: str, kind: type[UpstreamError], words: str) -> None:
    error = gradio.refusal_of("space/m", status, {}, body.encode())
    assert type(error) is kind
    assert words in error.message
    assert error.moves_on


def test_a_recorded_validation_is_the_callers_mistake() -> None:
    body = (RECORDINGS / "71_validator.txt").read_bytes().split(b"\n\n", 1)[-1].strip()
    body = body if body.startswith(b"{") else body[body.index(b'{"detail"') :]
    error = gradio.refusal_of("space/m", 422, {}, body)
    assert isinstance(error, CallerMistake)
    assert "too short" in error.message


def test_a_recorded_traceback_is_not_told() -> None:
    body = (RECORDINGS / "857_unknown_api.txt").read_bytes().split(b"Traceback", 1)[1]
    error = gradio.refusal_of("space/m", 500, {}, b"Traceback" + body)
    assert isinstance(error, RungRefused)
    assert "File" not in error.message


def test_usage_is_estimated_by_bytes() -> None:
    assert gradio.estimated_usage("ä" * 4, "abcde") == Usage(2, 2, estimated=True)
