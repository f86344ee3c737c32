"""Follows one streamed chat answer chunk by chunk: what may pass, what commits, what is missing.

Payloads pass byte-identical unless they break OpenAI's shape. What is repaired, because a client
would fail on it or read it wrongly: an empty `id`, a foreign `finish_reason`, a tool-call fragment
without `index`, reasoning text under only one of its two names, and an end without any
`finish_reason`. A usage chunk that only we asked for is dropped.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from router.core import jsontext
from router.core.refusal import classify_in_stream, complaint_in
from router.core.skeleton import Skeleton
from router.errors import UpstreamBroken, UpstreamFailed
from router.types import Json, Usage

# TGI's own words, and those of old completion routes and of other gateways, for OpenAI's.
FINISH_REASONS = {
    "eos_token": "stop",
    "stop_sequence": "stop",
    "end_turn": "stop",
    "eos": "stop",
    "max_tokens": "length",
    "model_length": "length",
    "tool_use": "tool_calls",
}
KNOWN_FINISH = frozenset({"stop", "length", "tool_calls", "content_filter", "function_call"})
# The answer was not finished but given up (vLLM, SGLang, OpenRouter): never to look like a whole.
_GIVEN_UP = frozenset({"abort", "error", "cancelled"})
# No answer has more tokens; a larger count is nonsense, and sums of such leave JSON's integers.
_TOKENS_MAX = 1 << 40
# As many as OpenAI's `n` allows.
_CHOICES_MAX = 128
# So many skeletons that no chunk was like show a server whose chunks are never alike.
_VAIN_MAX = 16


class Seen(NamedTuple):
    """`payload` None: nothing for the client. `commits`: it has content, so it commits the call."""

    payload: bytes | None
    commits: bool


class ChunkWatch:
    """One answer's state. `who` names the rung; `call_id` mends answers that come without an id."""

    __slots__ = (
        "_call_id",
        "_called_tools",
        "_choices_wanted",
        "_finished",
        "_last",
        "_learnt_in_vain",
        "_wants_usage",
        "_who",
        "content_chars",
        "content_chunks",
        "is_complete",
        "skeleton",
        "unreported_chars",
        "unreported_chunks",
        "usage",
    )

    def __init__(
        self, *, who: str, call_id: str, wants_usage: bool, choices_wanted: int = 1
    ) -> None:
        self._who = who
        self._choices_wanted = choices_wanted
        self._call_id = call_id
        self._wants_usage = wants_usage
        self._finished: dict[int, bool] = {}
        # As many choices as were asked for have their finish reason.
        self.is_complete = False
        self._called_tools: set[int] | None = None
        self._last: Json = {}
        self._learnt_in_vain = 0
        # What chunks that are like the last one have in common with it.
        self.skeleton: Skeleton | None = None
        self.usage: Usage | None = None
        # All that was produced: text, reasoning, refusals, the calls of tools.
        self.content_chars = 0
        self.content_chunks = 0
        # Those of them that came after the newest usage: some report it at the start, or all along.
        self.unreported_chars = 0
        self.unreported_chunks = 0

    @property
    def has_choices(self) -> bool:
        return bool(self._finished)

    @property
    def last(self) -> Json:
        """The last chunk seen, as it was passed on; what is not its head only until `learn`."""
        return self._last

    def see(self, payload: bytes) -> Seen:
        """Take note of one chunk. Raises UpstreamError on an error event or anything else."""
        try:
            chunk = jsontext.read(payload)
        except ValueError as error:
            raise UpstreamBroken(f"{self._who} sent an event that is not JSON") from error
        choices = chunk.get("choices") if isinstance(chunk, dict) else None
        if type(choices) is not list or chunk.get("error"):
            complaint = complaint_in(chunk)
            if complaint is not None:
                raise classify_in_stream(self._who, complaint)
        if type(choices) is not list:
            raise UpstreamBroken(f"{self._who} sent an event that is not a chat chunk")
        usage = chunk.get("usage")
        reported = usage_in(usage) if usage is not None else None
        if reported is not None:
            self.usage = reported
            if not choices:
                self.unreported_chars = self.unreported_chunks = 0
        if usage is not None and not choices and not self._wants_usage:
            return Seen(None, False)
        commits = changed = False
        for choice in choices:
            if type(choice) is not dict:
                raise UpstreamBroken(f"{self._who} sent a chunk with a malformed choice")
            changed |= self._mend(choice)
            commits |= self._follow(choice)
        if reported is not None:
            self.unreported_chars = self.unreported_chunks = 0
        if not chunk.get("id"):
            chunk["id"] = self._call_id
            changed = True
        self._last, self.skeleton = chunk, None
        return Seen(self._written(chunk) if changed else payload, commits)

    def learn(self, payload: bytes) -> None:
        """The chunk seen last passed as it came, and is this: those to come may be like it."""
        if self._learnt_in_vain < _VAIN_MAX:
            self._learnt_in_vain += 1
            self.skeleton = Skeleton.of(payload, self._last)
            if self.skeleton is not None:
                # All that is needed of a chunk while others like it come.
                self._last = _head(self._last)

    def took(self, chars: int, chunks: int) -> None:
        """So much came in events like the skeleton, which passed without another look."""
        self._learnt_in_vain = 0
        self.content_chars += chars
        self.content_chunks += chunks
        self.unreported_chars += chars
        self.unreported_chunks += chunks

    def closing_payloads(self, cut: str | None = None) -> list[bytes]:
        """Finish chunks for the choices that `[DONE]` left without one (TGI's tool calls), or for
        those of an answer that is cut here, for the reason given."""
        payloads = []
        for index, finished in self._finished.items():
            if not finished:
                has_called = self._called_tools is not None and index in self._called_tools
                reason = cut or ("tool_calls" if has_called else "stop")
                choice = {"index": index, "delta": {}, "logprobs": None, "finish_reason": reason}
                self._finished[index] = cut is None
                payloads.append(self._written({**_head(self._last), "choices": [choice]}))
        self._count_finished()
        return payloads

    def usage_payload(self, usage: Usage) -> bytes:
        """The usage chunk for a client that asked for one where the upstream sent none."""
        return self._written({**_head(self._last), "choices": [], "usage": usage_object(usage)})

    def _written(self, chunk: Json) -> bytes:
        try:
            return jsontext.write(chunk)
        except ValueError as error:
            raise UpstreamBroken(f"{self._who} sent a chunk that cannot be passed on") from error

    def _count_finished(self) -> None:
        finished = self._finished
        self.is_complete = len(finished) >= self._choices_wanted and all(finished.values())

    def _follow(self, choice: Json) -> bool:
        """Note what the choice brings; whether that is more than a role."""
        index: int = choice["index"]
        if index not in self._finished and len(self._finished) == _CHOICES_MAX:
            raise UpstreamBroken(f"{self._who} sent more than {_CHOICES_MAX} choices")
        finish = choice.get("finish_reason")
        if finish or index not in self._finished:
            self._finished[index] = bool(finish)
            self._count_finished()
        delta = choice.get("delta")
        if type(delta) is not dict:
            return bool(finish)
        if delta.get("tool_calls"):
            self._called_tools = {*(self._called_tools or ()), index}
        if chars := produced_chars(delta):
            self.content_chars += chars
            self.content_chunks += 1
            self.unreported_chars += chars
            self.unreported_chunks += 1
            return True
        return bool(finish) or any(value and name != "role" for name, value in delta.items())

    def _mend(self, choice: Json) -> bool:
        """Repair the choice in place; whether anything had to be."""
        changed = False
        if type(choice.get("index")) is not int:
            choice["index"] = 0
            changed = True
        finish = choice.get("finish_reason")
        if finish is not None:
            known = known_finish(finish, self._who)
            if known != finish:
                choice["finish_reason"] = known
                changed = True
        delta = choice.get("delta")
        if type(delta) is not dict:
            return changed
        changed |= twin_reasoning(delta)
        calls = delta.get("tool_calls")
        if type(calls) is list:
            for position, call in enumerate(calls):
                if type(call) is dict and type(call.get("index")) is not int:
                    call["index"] = position
                    changed = True
        return changed


def produced_chars(message: Json) -> int:
    """The characters of a message, or of a piece of one, that a model has produced."""
    chars = 0
    others = []
    for name, value in message.items():
        # Reasoning may have two names (`twin_reasoning`), but was produced once.
        if (
            not value
            or name == "role"
            or (name == "reasoning_content" and message.get("reasoning"))
        ):
            continue
        if type(value) is str:
            chars += len(value)
        elif name == "tool_calls":
            chars += _call_chars(value)
        else:
            others.append(value)
    # Parts of content, an old function call, audio; or the same reasoning again, in other words.
    return chars or _text_chars(others)


def _call_chars(calls: Any) -> int:
    chars = 0
    for call in calls if type(calls) is list else ():
        function = call.get("function") if type(call) is dict else None
        if type(function) is dict:
            for part in (function.get("name"), function.get("arguments")):
                chars += len(part) if type(part) is str else 0
    return chars


def _text_chars(values: list[Any]) -> int:
    chars = 0
    while values:
        value = values.pop()
        if type(value) is str:
            chars += len(value)
        elif type(value) is dict:
            values += (inner for name, inner in value.items() if name != "type")
        elif type(value) is list:
            values += value
    return chars


def known_finish(reason: Any, who: str) -> Any:
    """OpenAI's word for a finish reason. Raises UpstreamFailed where the answer was given up."""
    if not reason:
        return None
    if type(reason) is not str:
        return "stop"
    if reason in KNOWN_FINISH:
        return reason
    if reason in _GIVEN_UP:
        raise UpstreamFailed(f"{who} gave the answer up (finish_reason {reason!r})")
    return FINISH_REASONS.get(reason, "stop")


def twin_reasoning(message: Json) -> bool:
    """Give reasoning text both its names: clients read `reasoning` or `reasoning_content`."""
    reasoning = message.get("reasoning")
    content = message.get("reasoning_content")
    if type(reasoning) is str and content is None:
        message["reasoning_content"] = reasoning
        return True
    if type(content) is str and reasoning is None:
        message["reasoning"] = content
        return True
    return False


def usage_in(value: Any) -> Usage | None:
    """An OpenAI `usage` object, or None where it has no believable counts."""
    if not isinstance(value, dict):
        return None
    prompt, completion = value.get("prompt_tokens"), value.get("completion_tokens", 0)
    if type(prompt) is not int or not 0 <= prompt <= _TOKENS_MAX:
        return None
    if type(completion) is not int or not 0 <= completion <= _TOKENS_MAX:
        return None
    return Usage(prompt, completion)


def usage_object(usage: Usage) -> Json:
    """Usage as OpenAI writes it."""
    return {
        "prompt_tokens": usage.input_tokens,
        "completion_tokens": usage.output_tokens,
        "total_tokens": usage.input_tokens + usage.output_tokens,
    }


def _head(chunk: Json) -> Json:
    return {name: chunk[name] for name in ("id", "object", "created", "model") if name in chunk}
