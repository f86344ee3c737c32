"""Continuing a broken stream on another rung, with the answer so far as a prefix. Pure.

`unable` says which calls are never continued, `Given` follows what a client has been given,
`continuation` is the request that asks for the rest, and `Seam` joins the rest to it. The seam is
the last event that went out whole.

How engines are asked, checked against their sources, and llama.cpp's running: vLLM and SGLang go
on with a last message of the assistant's when `continue_final_message` is true and
`add_generation_prompt` is not; TGI (3.0 on) and llama.cpp do so whenever the last message is the
assistant's, and ignore both fields. TGI, and many templates, cut off the prefix's white space at
its end, so it is never sent there: what the rest repeats of it is taken away again. In a whole
answer llama.cpp repeats the prefix, in a stream it does not: only streams are continued.

Text that might be the beginning of a stop string is held back until more of it has come, and never
continued from, so no stop string lies across a seam, where the second upstream could not see it.
"""

from __future__ import annotations

import enum
import math
from typing import Any

from router.core import jsontext
from router.core.chat_request import OUTPUT_LIMITS
from router.core.chunks import usage_in, usage_object
from router.errors import Echoed, UpstreamBroken
from router.types import Json, Usage

# A longer answer is not followed: it would have to be kept, and fits no second context.
TEXT_CHARS_MAX = 1 << 20
# OpenAI takes four stop strings; looking for many or for long ones would cost every event dearly.
_STOPS_MAX = 16
_STOP_CHARS_MAX = 256
# An answer that repeats so much of the text given, from its beginning or at its end, is an echo.
_ECHO_CHARS = 24
# How far back from the end an echo may begin.
_ECHO_CHARS_MAX = 512
_WORD_CHARS_MIN = 3
# How much of the text given is looked at for whether it was repeating itself already.
_LOOK_CHARS = 4096
# What may be held back until the rest is judged.
_HELD_BYTES_MAX = 1 << 20
# Tokens seldom have more characters, so this seldom overestimates.
_CHARS_PER_TOKEN_MAX = 6

# With any of these the answer is not plain text, or what they ask counts from its beginning.
_NEVER_WITH = (
    *("tools", "functions", "logprobs", "top_logprobs", "prompt_logprobs", "return_token_ids"),
    *("grammar", "json_schema", "guided_json", "guided_regex", "guided_choice", "guided_grammar"),
    *("structured_outputs", "regex", "ebnf", "structural_tag"),
    *("audio", "echo", "min_tokens", "include_stop_str_in_output", "continue_final_message"),
    *("use_beam_search", "best_of"),
)
_THOUGHTS = ("<think>", "</think>")
_HEAD = ("id", "created", "model")


def unable(body: Json) -> str | None:
    """Why no stream that answers this request can be continued elsewhere, or None."""
    for name in _NEVER_WITH:
        if body.get(name):
            return f"{name} is asked for"
    if (body.get("n") or 1) > 1:
        return "more than one choice is asked for"
    form = body.get("response_format")
    if isinstance(form, dict) and form.get("type") not in (None, "text"):
        return "a response_format is asked for"
    modalities = body.get("modalities")
    if modalities and modalities != ["text"]:
        return "more than text is asked for"
    if body["messages"][-1].get("role") == "assistant":
        return "the client's own last message is the assistant's"
    stops = _stops(body)
    if len(stops) > _STOPS_MAX or any(len(stop) > _STOP_CHARS_MAX for stop in stops):
        return "its stop strings are too many or too long to look for"
    return None


class Given:
    """What the client of one streamed answer has been given of it.

    Chunks come in by `queue` and count as given when `ready` lets them out. `head` is what every
    later chunk must keep: the first one's id, created and model.
    """

    def __init__(self, body: Json) -> None:
        self._stops = _stops(body)
        self._limits = [
            value for name in OUTPUT_LIMITS if type(value := body.get(name)) is int and value > 0
        ]
        self._parts: list[str] = []
        self._chars = 0
        self._pieces = 0
        self._reported = 0
        self._queued: list[tuple[str, bool]] = []
        self._why_not: str | None = None
        self.head: Json = {}

    @property
    def text(self) -> str:
        return "".join(self._parts)

    @property
    def tokens(self) -> int:
        """Output tokens given: as reported, else a guess that seldom is too high.

        Nearly every engine sends an event for each token, and the others several tokens in one.
        """
        return max(self._reported, self._pieces, self._chars // _CHARS_PER_TOKEN_MAX)

    @property
    def is_spent(self) -> bool:
        """As many tokens as were asked for have surely been given: only their end is missing."""
        return max(self._reported, self._pieces) >= min(self._limits, default=math.inf)

    def why_not(self) -> str | None:
        """Why what was given cannot be continued, or None."""
        if self._why_not is not None:
            return self._why_not
        text = self.text
        if not text.strip():
            return "no text was given yet"
        if part_of_stop(text, self._stops):
            # The next event showed it to be none, but that one is lost, and another may come.
            return "the text ends in what may begin a stop string"
        if any(mark in text for mark in _THOUGHTS):
            # Templates take finished thoughts out of the prefix, and unfinished ones apart.
            return "the text has the model's thoughts in it"
        return None

    def queue(self, chunk: Json) -> None:
        """Take note of a chunk that is to go out after those before it."""
        if not self.head:
            self.head = {
                name: chunk[name] for name in _HEAD if isinstance(chunk.get(name), str | int)
            }
        text, is_last = "", False
        for choice in chunk["choices"]:
            is_last |= bool(choice.get("finish_reason"))
            delta = choice.get("delta")
            if type(delta) is dict:
                text += self._text_of(delta)
            if choice["index"] != 0:
                self._why_not = "it has more than one choice"
            elif choice.get("finish_reason"):
                self._why_not = "it has its end"
        usage = usage_in(chunk.get("usage"))
        if usage is not None:
            self._reported = max(self._reported, usage.output_tokens)
        self._queued.append((text, is_last or not chunk["choices"]))

    def ready(self) -> int:
        """How many of the queued chunks may go out now; they count as given from here on."""
        count = len(self._queued)
        if self._stops and not any(is_last for _, is_last in self._queued):
            # No stop string begins in what went out before: it would have been held back.
            waiting = "".join(text for text, _ in self._queued)
            if any(stop in waiting for stop in self._stops):
                # Some servers give the stop string too (TGI), and then only the end is to come.
                self._why_not, self._stops = "the text has a stop string in it", ()
            held = part_of_stop(waiting, self._stops)
            while held > 0:
                count -= 1
                held -= len(self._queued[count][0])
        for text, _ in self._queued[:count]:
            self._note(text, 1)
        del self._queued[:count]
        if self._chars > TEXT_CHARS_MAX:
            self.give_up("the text is too long")
        return count

    @property
    def holds_nothing(self) -> bool:
        """Whether text is given as it comes: there is no stop string to look for, and nothing is
        queued."""
        return not (self._stops or self._queued)

    def give(self, text: str, pieces: int) -> None:
        """As `queue` and `ready` for chunks that bring so much text of the only choice, in so many
        pieces, and nothing else."""
        self._note(text, pieces)
        if self._chars > TEXT_CHARS_MAX:
            self.give_up("the text is too long")

    def drop_queued(self) -> None:
        """The stream broke: what was held back goes out from another rung, or not at all."""
        self._queued.clear()

    def give_up(self, why: str) -> None:
        """From now on nothing is followed or held back."""
        self._why_not = why
        self._stops = ()
        self._parts.clear()
        self._queued.clear()
        self._chars = 0

    def _note(self, text: str, pieces: int) -> None:
        if text:
            self._parts.append(text)
            self._chars += len(text)
            self._pieces += pieces

    def _text_of(self, delta: Json) -> str:
        for name, value in delta.items():
            if value and name not in ("role", "content", "reasoning", "reasoning_content"):
                self._why_not = f"it has {name}"
        text = delta.get("content")
        return text if type(text) is str else ""


def continuation(body: Json, text: str, tokens: int) -> Json:
    """The request that asks another rung for the rest of an answer of which so much was given."""
    prefix = {"role": "assistant", "content": text.rstrip()}
    out = {
        **body,
        "messages": [*body["messages"], prefix],
        "continue_final_message": True,
        "add_generation_prompt": False,
    }
    for name in OUTPUT_LIMITS:
        value = body.get(name)
        if type(value) is int and value > 0:
            out[name] = max(1, value - tokens)
    return out


def closing(given: Given, usage: Usage | None) -> list[bytes]:
    """The end of an answer that `is_spent`: all its tokens were given, but not their end."""
    head = {**given.head, "object": "chat.completion.chunk"}
    choice = {"index": 0, "delta": {}, "logprobs": None, "finish_reason": "length"}
    payloads = [jsontext.write({**head, "choices": [choice]})]
    if usage is not None:
        whole = {**head, "choices": [], "usage": usage_object(usage)}
        payloads.append(jsontext.write(whole))
    return payloads


def part_of_stop(text: str, stops: tuple[str, ...]) -> int:
    """How many characters at the text's end may be the beginning of a stop string, unfinished."""
    tail = text[-_STOP_CHARS_MAX:]
    longest = 0
    for stop in stops:
        for size in range(min(len(stop) - 1, len(tail)), longest, -1):
            if tail.endswith(stop[:size]):
                longest = size
                break
    return longest


class Verdict(enum.Enum):
    """What the beginning of the rest shows: OPEN needs more of it."""

    SOUND = "sound"
    OPEN = "open"
    ECHO = "echo"


def judge(given: str, rest: str, *, is_ended: bool) -> Verdict:
    """Whether `rest` goes on with the text given or says some of it again.

    An echo is: the text's beginning once more, all of it where it is short; a good piece of its
    end; the word that the seam has cut, begun anew. A text that was repeating itself already may
    go on doing so. One word alone, the first one for example, is no echo: sentences begin alike.
    """
    bare = rest.lstrip()
    beginning = given[:_LOOK_CHARS].lstrip()
    head = beginning[:_ECHO_CHARS].rstrip()
    is_repeating = head in beginning[1:]
    if bare.startswith(head) and not is_repeating:
        return Verdict.ECHO
    word = _cut_word(given)
    if word and rest.startswith(word):
        return Verdict.ECHO
    is_open = (head.startswith(bare) and not is_repeating) or (bool(word) and word.startswith(rest))
    tail = given[-_ECHO_CHARS_MAX:]
    looked_at = given[-_LOOK_CHARS:]
    start = rest[:_ECHO_CHARS]
    at = tail.find(start)
    while at != -1:
        end = tail[at:]
        piece = end[:_ECHO_CHARS]
        if len(piece) == _ECHO_CHARS and looked_at.find(piece) == looked_at.rfind(piece):
            if rest.startswith(end):
                return Verdict.ECHO
            is_open |= end.startswith(rest)
        at = tail.find(start, at + 1)
    return Verdict.OPEN if is_open and not is_ended else Verdict.SOUND


class Seam:
    """Joins one rung's rest to what was given: its chunks come out as the first stream's own.

    `spent` is what the attempts before have used. Raises Echoed where the rung begins anew, and
    UpstreamBroken where it goes on with anything but text.
    """

    def __init__(self, given: Given, spent: Usage | None, *, who: str) -> None:
        text = given.text
        self._given = text
        # Given to the client, but not in the prefix: the rest may begin with it.
        self._owed = text[len(text.rstrip()) :]
        self._head = given.head
        self._spent = spent
        self._who = who
        self._rest = ""
        self._is_sound = False
        self._held: list[bytes] = []

    def join(self, payload: bytes) -> list[bytes]:
        """What is to go on in this payload's place; errors and the like go on as they are."""
        try:
            chunk = jsontext.read(payload)
        except ValueError:
            return [payload]
        if type(chunk) is not dict or type(chunk.get("choices")) is not list:
            return [payload]
        if chunk.get("error") or not all(type(choice) is dict for choice in chunk["choices"]):
            return [payload]
        had_text = is_last = False
        for choice in chunk["choices"]:
            had_text |= self._join_choice(choice)
            is_last |= bool(choice.get("finish_reason"))
        usage = self._add_up(chunk)
        if had_text or is_last or usage:
            try:
                self._held.append(jsontext.write({**chunk, **self._head}))
            except ValueError as error:
                raise UpstreamBroken(f"{self._who} sent what cannot be passed on") from error
        return self._let_go(is_ended=is_last or not chunk["choices"])

    def end(self) -> list[bytes]:
        """What was held back of a stream that has ended."""
        return self._let_go(is_ended=True)

    def _join_choice(self, choice: Json) -> bool:
        """Mend the choice in place; whether it has text for the client."""
        delta = choice.get("delta")
        if type(delta) is not dict:
            return False
        delta.pop("role", None)
        text = delta.get("content")
        others = any(value for name, value in delta.items() if name != "content")
        if choice.get("index") not in (0, None) or others:
            raise UpstreamBroken(f"{self._who} went on with something else than the text")
        if type(text) is not str:
            return False
        while self._owed and text:
            if text[0] != self._owed[0]:
                self._owed = ""
                break
            text, self._owed = text[1:], self._owed[1:]
        delta["content"] = text
        if not self._is_sound:
            self._rest += text
        return bool(text)

    def _add_up(self, chunk: Json) -> bool:
        """Put the usage of all attempts in place of this one's; whether there is any."""
        usage = usage_in(chunk.get("usage"))
        if usage is None:
            return False
        if self._spent is not None:
            chunk["usage"] = {**chunk["usage"], **usage_object(added(self._spent, usage))}
        return True

    def _let_go(self, *, is_ended: bool) -> list[bytes]:
        if not self._is_sound:
            is_ended |= sum(map(len, self._held)) > _HELD_BYTES_MAX
            verdict = judge(self._given, self._rest, is_ended=is_ended) if self._rest else None
            if verdict is Verdict.ECHO:
                raise Echoed(f"{self._who} began the answer anew instead of going on with it")
            if verdict is not Verdict.SOUND and not is_ended:
                return []
            self._is_sound = True
        held, self._held = self._held, []
        return held


def added(one: Usage, other: Usage) -> Usage:
    """The usage of two attempts together."""
    return Usage(
        one.input_tokens + other.input_tokens,
        one.output_tokens + other.output_tokens,
        one.estimated or other.estimated,
    )


def without(total: Usage, before: Usage) -> Usage:
    """What the last attempt used of a total that has those before in it."""
    return Usage(
        max(0, total.input_tokens - before.input_tokens),
        max(0, total.output_tokens - before.output_tokens),
    )


def _cut_word(text: str) -> str:
    """The letters at the text's end, where they are enough to know a word by."""
    start = len(text)
    while start and text[start - 1].isalpha() and len(text) - start < _ECHO_CHARS_MAX:
        start -= 1
    return text[start:] if len(text) - start >= _WORD_CHARS_MIN else ""


def _stops(body: Json) -> tuple[str, ...]:
    stop: Any = body.get("stop")
    stops = [stop] if isinstance(stop, str) else stop or []
    return tuple(one for one in stops if one)
