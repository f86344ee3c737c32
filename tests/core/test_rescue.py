"""A rescued stream has every character once: none lost, none repeated, or no rescue."""

from __future__ import annotations

from typing import Any

import orjson
import pytest
from hypothesis import given as cases
from hypothesis import strategies as st

from router.core import rescue
from router.core.rescue import TEXT_CHARS_MAX, Given, Seam, Verdict, judge, part_of_stop
from router.errors import Echoed, UpstreamBroken
from router.types import Usage

HEAD = {"id": "chatcmpl-1", "created": 1, "model": "first"}
OTHER = {"id": "chatcmpl-2", "created": 2, "model": "second", "system_fingerprint": "x"}
ASK: dict[str, Any] = {"messages": [{"role": "user", "content": "Hi?"}]}
COUNTS = {"prompt_tokens": 9, "completion_tokens": 4, "total_tokens": 13}


def chunk(text: str | None = None, finish: str | None = None, **delta: Any) -> dict[str, Any]:
    if text is not None:
        delta["content"] = text
    choice = {"index": 0, "delta": delta, "finish_reason": finish}
    return {**HEAD, "choices": [choice]}


def given(*texts: str, **body: Any) -> Given:
    """What a client has that got these chunks."""
    made = Given({**ASK, **body})
    for text in texts:
        made.queue(chunk(text))
        made.ready()
    return made


class TestUnable:
    @pytest.mark.parametrize(
        "body",
        [
            {},
            {"n": 1, "tools": [], "logprobs": False, "top_logprobs": None, "stop": None},
            {"response_format": {"type": "text"}, "modalities": ["text"]},
            {"response_format": None, "stop": "END", "seed": 5, "temperature": 2},
            {"stop": ["a"] * 16},
            {"stop": "x" * 256},
        ],
    )
    def test_plain_text_can_be_continued(self, body: Any) -> None:
        assert rescue.unable({**ASK, **body}) is None

    @pytest.mark.parametrize(
        ("body", "why"),
        [
            ({"tools": [{"type": "function"}]}, "tools"),
            ({"functions": [{"name": "f"}]}, "functions"),
            ({"logprobs": True}, "logprobs"),
            ({"top_logprobs": 2}, "top_logprobs"),
            ({"grammar": "root ::= x"}, "grammar"),
            ({"guided_regex": "a+"}, "guided_regex"),
            ({"structured_outputs": {"choice": ["a"]}}, "structured_outputs"),
            ({"min_tokens": 3}, "min_tokens"),
            ({"echo": True}, "echo"),
            ({"n": 2}, "choice"),
            ({"response_format": {"type": "json_object"}}, "response_format"),
            ({"response_format": {"type": "regex", "value": "a"}}, "response_format"),
            ({"modalities": ["text", "audio"]}, "text"),
            ({"messages": [{"role": "assistant", "content": "So"}]}, "own last message"),
            ({"stop": ["a"] * 17}, "too many"),
            ({"stop": "x" * 257}, "too long"),
        ],
    )
    def test_what_is_never_continued(self, body: Any, why: str) -> None:
        assert why in (rescue.unable({**ASK, **body}) or "")


class TestGiven:
    def test_what_went_out_is_given_and_the_rest_is_not(self) -> None:
        one = given("Hel", "lo")
        one.queue(chunk(" there"))
        assert (one.text, one.head, one.tokens) == ("Hello", HEAD, 2)
        one.drop_queued()
        assert (one.ready(), one.text) == (0, "Hello")
        assert one.why_not() is None

    def test_text_that_may_begin_a_stop_string_waits(self) -> None:
        one = Given({**ASK, "stop": ["END", "\n\n"]})
        went = []
        for text in ("It is", " the E", "", "Nding.", "So.\n", "More", ".\n", " on"):
            one.queue(chunk(text))
            went.append(one.ready())
        # " the E" waits for the letter that makes it harmless; the empty chunk keeps its place.
        assert went == [1, 0, 0, 3, 0, 2, 0, 2]
        assert one.text == "It is the ENding.So.\nMore.\n on"

    def test_the_end_of_an_answer_waits_for_nothing(self) -> None:
        one = Given({**ASK, "stop": "END"})
        one.queue(chunk("the E"))
        assert one.ready() == 0
        one.queue(chunk(None, "stop"))
        assert (one.ready(), one.text) == (2, "the E")

    def test_the_first_character_of_a_stop_string_does_not_hide_one_before(self) -> None:
        assert part_of_stop("a\n", ("\n\n",)) == 1
        assert part_of_stop("ab", ("bX", "abX")) == 2
        assert part_of_stop("abX", ("abX",)) == 0
        assert part_of_stop("", ("abX",)) == 0
        assert part_of_stop("abc", ("x",)) == 0

    @cases(
        st.lists(st.text("ab\n", min_size=1, max_size=4), max_size=12),
        st.lists(st.text("ab\n", min_size=1, max_size=5), min_size=1, max_size=4),
    )
    def test_no_stop_string_ever_lies_across_a_seam(
        self, texts: list[str], stops: list[str]
    ) -> None:
        one = Given({**ASK, "stop": stops})
        queued = went = 0
        for text in texts:
            one.queue(chunk(text))
            queued += 1
            went += one.ready()
            assert queued - went <= 5, "no more is held than a stop string has letters"
            assert one.text == "".join(texts[:went])
            if one.why_not() is None:
                assert not any(stop in one.text for stop in stops)
                assert part_of_stop(one.text, tuple(stops)) == 0
        one.queue(chunk(None, "stop"))
        assert went + one.ready() == queued + 1

    def test_text_that_ends_near_a_stop_string_is_not_gone_on_from(self) -> None:
        one = Given({**ASK, "stop": "\n\n"})
        for text in ("a\n", "b\n"):
            one.queue(chunk(text))
        assert one.ready() == 1, "b shows that a's line was no stop string"
        assert "may begin a stop string" in (one.why_not() or "")

    @pytest.mark.parametrize(
        ("chunks", "why"),
        [
            ([], "no text"),
            ([chunk("")], "no text"),
            ([chunk(" \n")], "no text"),
            ([chunk(None, reasoning="hm", reasoning_content="hm")], "no text"),
            ([chunk("<think>so"), chunk(" it")], "thoughts"),
            ([chunk("so</think>it")], "thoughts"),
            ([chunk("a", tool_calls=[{"index": 0}])], "tool_calls"),
            ([chunk("a", refusal="no")], "refusal"),
            ([{**HEAD, "choices": [{"index": 1, "delta": {"content": "a"}}]}], "choice"),
            ([chunk("a"), chunk(None, "stop")], "its end"),
            ([chunk("a" * TEXT_CHARS_MAX), chunk("b")], "too long"),
        ],
    )
    def test_what_cannot_be_continued(self, chunks: list[Any], why: str) -> None:
        one = Given(ASK)
        for each in chunks:
            one.queue(each)
            one.ready()
        assert why in (one.why_not() or "")

    def test_finished_reasoning_is_no_hindrance(self) -> None:
        one = Given(ASK)
        for each in (chunk(None, reasoning="hm", refusal=None), chunk("So", role="assistant")):
            one.queue(each)
        assert one.ready() == 2
        assert (one.why_not(), one.text) == (None, "So")

    def test_what_has_no_delta_is_no_text(self) -> None:
        one = Given(ASK)
        one.queue({**HEAD, "choices": [{"index": 0, "delta": None}]})
        one.queue({"choices": [], "usage": COUNTS})
        assert (one.ready(), one.text, one.tokens) == (2, "", 4)

    def test_giving_up_holds_nothing_back(self) -> None:
        one = Given({**ASK, "stop": "ab"})
        one.queue(chunk("a"))
        assert one.ready() == 0
        one.give_up("enough")
        one.queue(chunk("a"))
        assert one.ready() == 1
        assert one.why_not() == "enough"

    @pytest.mark.parametrize(
        ("texts", "tokens"),
        [(["a"] * 5, 5), (["", "a", ""], 1), (["abcdef" * 4], 4)],
    )
    def test_tokens_given_are_guessed_low(self, texts: list[str], tokens: int) -> None:
        assert given(*texts).tokens == tokens

    def test_tokens_reported_on_the_way_are_believed(self) -> None:
        one = Given({**ASK, "max_tokens": 4})
        one.queue({**chunk("a long way"), "usage": COUNTS})
        assert one.tokens == 4
        assert one.is_spent

    @pytest.mark.parametrize(
        ("body", "spent"),
        [
            ({"max_tokens": 2}, True),
            ({"max_completion_tokens": 2, "max_tokens": 9}, True),
            ({"n_predict": -1}, False),
            ({"max_tokens": 3}, False),
            ({}, False),
        ],
    )
    def test_an_answer_with_all_its_tokens_is_spent(self, body: Any, spent: bool) -> None:
        assert given("a", "b", **body).is_spent is spent


class TestContinuation:
    def test_the_text_so_far_is_the_last_message(self) -> None:
        body = {**ASK, "max_tokens": 10, "n_predict": -1, "stop": "x"}
        assert rescue.continuation(body, "Hello \n", 3) == {
            "messages": [*ASK["messages"], {"role": "assistant", "content": "Hello"}],
            "continue_final_message": True,
            "add_generation_prompt": False,
            "max_tokens": 7,
            "n_predict": -1,
            "stop": "x",
        }
        assert len(body["messages"]) == 1, "the client's own request is not changed"

    def test_something_is_always_asked_for(self) -> None:
        asked = rescue.continuation({**ASK, "max_completion_tokens": 3}, "a", 50)
        assert asked["max_completion_tokens"] == 1

    def test_the_end_of_a_spent_answer(self) -> None:
        one = given("a", max_tokens=1)
        finish, usage = map(orjson.loads, rescue.closing(one, Usage(9, 4)))
        assert finish["choices"][0]["finish_reason"] == "length"
        assert usage["usage"] == COUNTS
        assert finish["id"] == usage["id"] == HEAD["id"]
        assert len(rescue.closing(one, None)) == 1


TEXT = "The sea is vast and old, and no one has ever seen all of it at once"
LOOP = "and the sea is a place where " * 4
VERDICTS: dict[str, tuple[str, str, bool, Verdict]] = {
    "goes on": (TEXT, " or so they say", False, Verdict.SOUND),
    "goes on inside a word": ("The sea is va", "st and old", False, Verdict.SOUND),
    "a line": (TEXT, "\n\nIt", False, Verdict.SOUND),
    "white space": (TEXT, "\n", False, Verdict.OPEN),
    "white space and the end": (TEXT, "\n", True, Verdict.SOUND),
    "the same first word": (TEXT, " The waves", False, Verdict.SOUND),
    "perhaps from the beginning": (TEXT, "The sea is", False, Verdict.OPEN),
    "a beginning that ends": (TEXT, "The sea", True, Verdict.SOUND),
    "from the beginning": (TEXT, "The sea is vast and old, and more", False, Verdict.ECHO),
    "from the beginning, spaced": (TEXT, "\n The sea is vast and old, ", False, Verdict.ECHO),
    "all of a short text": ("The", " The sea", False, Verdict.ECHO),
    "its end": (TEXT, "has ever seen all of it at once", False, Verdict.ECHO),
    "perhaps its end": (TEXT, "has ever seen all", False, Verdict.OPEN),
    "not its end after all": (TEXT, "has ever seen all the", False, Verdict.SOUND),
    "the last words alone": (TEXT, " at once", False, Verdict.SOUND),
    "the cut word anew": ("The sea is vas", "vast and old", False, Verdict.ECHO),
    "perhaps the cut word": ("The sea is vas", "va", False, Verdict.OPEN),
    "a syllable again": ("The sea is ba", "ba", False, Verdict.SOUND),
    "that that": ("I know that", " that is", False, Verdict.SOUND),
    "a loop goes on": (LOOP, "and the sea is a place where ", False, Verdict.SOUND),
    "a table goes on": ("| a |\n|---|\n" + "| - |\n" * 8, "| - |\n", False, Verdict.SOUND),
}


@pytest.mark.parametrize("name", VERDICTS)
def test_what_the_beginning_of_the_rest_shows(name: str) -> None:
    text, rest, is_ended, verdict = VERDICTS[name]
    assert judge(text, rest, is_ended=is_ended) is verdict


def joined(one: Given, chunks: list[Any], spent: Usage | None = None) -> list[Any]:
    """The chunks that the client gets of the rest."""
    seam = Seam(one, spent, who="b1/m")
    payloads = [out for each in chunks for out in seam.join(orjson.dumps(each))]
    return [orjson.loads(payload) for payload in [*payloads, *seam.end()]]


def second(text: str | None = None, finish: str | None = None, **delta: Any) -> dict[str, Any]:
    return {**chunk(text, finish, **delta), **OTHER}


def text_of(chunks: list[Any]) -> str:
    return "".join(
        choice["delta"].get("content") or "" for each in chunks for choice in each["choices"]
    )


class TestSeam:
    def test_later_chunks_look_like_the_first_ones(self) -> None:
        rest = [second(None, role="assistant"), second(" and"), second(" so", role="assistant")]
        out = joined(given("This"), [*rest, second(None, "stop")])
        assert [one["choices"][0]["delta"] for one in out] == [
            {"content": " and"},
            {"content": " so"},
            {},
        ]
        assert all(HEAD.items() <= one.items() for one in out)
        assert out[0]["system_fingerprint"] == "x", "what else it says stays"

    @pytest.mark.parametrize(
        ("text", "rest", "whole"),
        [
            ("One.\n", ["\n", "Two"], "One.\n\nTwo"),
            ("One.\n\n", ["\n", "\n", "Two"], "One.\n\nTwo"),
            ("One.\n\n", ["\n\nTwo"], "One.\n\nTwo"),
            ("One. ", ["Two"], "One. Two"),
            ("One. ", ["\nTwo"], "One. \nTwo"),
            ("One.", [" Two"], "One. Two"),
        ],
    )
    def test_white_space_at_the_seam_comes_once(
        self, text: str, rest: list[str], whole: str
    ) -> None:
        out = joined(given(text), [second(one) for one in rest])
        if text == "One.\n" and rest[0] == "\n":
            # The line's end was not in the prefix, so the first one is the one already given.
            whole = "One.\nTwo"
        assert text + text_of(out) == whole

    def test_an_echo_is_an_error_before_any_of_it_goes_out(self) -> None:
        seam = Seam(given(TEXT), None, who="b1/m")
        out: list[bytes] = []
        with pytest.raises(Echoed, match="b1/m began the answer anew") as caught:
            for start in range(0, len(TEXT), 5):
                out += seam.join(orjson.dumps(second(TEXT[start : start + 5])))
        assert out == []
        assert not caught.value.moves_on

    @pytest.mark.parametrize(
        "other",
        [
            second(None, tool_calls=[{"index": 0}]),
            second(None, reasoning="hm"),
            {**OTHER, "choices": [{"index": 1, "delta": {"content": "a"}}]},
        ],
    )
    def test_anything_but_text_is_an_error(self, other: Any) -> None:
        with pytest.raises(UpstreamBroken, match="something else"):
            joined(given("This"), [other])

    @pytest.mark.parametrize(
        "payload",
        [
            b"hello",
            b"[1]",
            b'{"error":{"message":"x"}}',
            b'{"choices":[],"error":"x"}',
            b'{"choices":[5]}',
        ],
    )
    def test_what_is_no_chunk_is_for_others_to_judge(self, payload: bytes) -> None:
        assert Seam(given("This"), None, who="w").join(payload) == [payload]

    def test_a_chunk_that_cannot_be_written_again_is_the_rungs_fault(self) -> None:
        deep = orjson.dumps(second(" so"))[:-1] + b',"x":' + b"[" * 1020 + b"]" * 1020 + b"}"
        with pytest.raises(UpstreamBroken, match="cannot be passed on"):
            Seam(given("This"), None, who="w").join(deep)

    def test_usage_is_that_of_all_attempts(self) -> None:
        counts = {**COUNTS, "prompt_tokens_details": {"cached_tokens": 1}}
        chunks = [second(" is"), second(None, "stop"), {**OTHER, "choices": [], "usage": counts}]
        *_, last = joined(given("This"), chunks, Usage(5, 2, estimated=True))
        assert last["usage"] == {
            "prompt_tokens": 14,
            "completion_tokens": 6,
            "total_tokens": 20,
            "prompt_tokens_details": {"cached_tokens": 1},
        }
        *_, alone = joined(given("This"), chunks)
        assert alone["usage"] == counts
        assert rescue.added(Usage(1, 2), Usage(3, 4, estimated=True)) == Usage(4, 6, True)

    def test_an_answer_that_was_whole_but_for_its_end(self) -> None:
        odd = {**OTHER, "choices": [{"index": 0, "delta": None, "finish_reason": None}]}
        out = joined(given("This"), [second(""), odd, second(None, "stop")])
        assert [one["choices"][0]["finish_reason"] for one in out] == ["stop"]

    def test_what_was_held_for_judging_goes_out_at_the_end(self) -> None:
        assert text_of(joined(given(TEXT), [second("The sea")])) == "The sea"

    def test_no_more_is_held_than_has_room(self) -> None:
        seam = Seam(given(TEXT), None, who="w")
        assert seam.join(orjson.dumps({**second("The sea"), "x": "y" * (1 << 20)}))

    @cases(st.text(max_size=60), st.integers(0, 60), st.lists(st.integers(1, 9), max_size=40))
    def test_a_true_rest_joins_without_loss_or_is_taken_for_an_echo(
        self, text: str, at: int, sizes: list[int]
    ) -> None:
        text = text.encode("utf-8", "replace").decode()
        one = given(text[:at])
        if one.why_not() is not None:
            return
        # What a model gives that goes on from the prefix, which ends before the white space.
        rest, chunks = text[len(text[:at].rstrip()) :], []
        for size in [*sizes, len(text) + 1]:
            if rest:
                chunks.append(second(rest[:size]))
                rest = rest[size:]
        try:
            out = joined(one, [*chunks, second(None, "stop")])
        except Echoed:
            return
        assert text[:at] + text_of(out) == text
