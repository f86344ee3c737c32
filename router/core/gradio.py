"""A Gradio job as its Space tells of it: queue messages in; values, text, waiting and failures out.

Follows `queue/data` of the protocols sse_v2 to sse_v3, which Gradio 4, 5 and 6 speak alike: the
first `process_generating` has an output's full value, each later one a list of edits to it, and
`process_completed` the full value again. One stream may carry several jobs, told apart by
`event_id`. How a chat call becomes a job's inputs is `core/gradio_inputs.py`.

Invariant: an OpenAI stream cannot unsay. Text goes out only as far as it extends what went out.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import orjson

from router.core import embeddings
from router.core.refusal import Complaint, classify_in_stream, refusal
from router.errors import (
    CallerMistake,
    RungRefused,
    UpstreamBroken,
    UpstreamBusy,
    UpstreamError,
    UpstreamFailed,
)
from router.types import Embeddings, Usage

_COMMENT_CHARS_MAX = 200
_NESTING_MAX = 16
_BYTES_PER_TOKEN = 4
_VECTORS_NAMES = ("embeddings", "embedding", "vectors", "data", "value")

# ZeroGPU's own words, the titles first: texts differ between versions of its library.
_QUOTA_TITLES = frozenset({"zerogpu quota exceeded"})
_CREDIT_TITLES = frozenset({"zerogpu pending credits exceeded"})
_DURATION_TITLES = frozenset({"zerogpu illegal duration"})
_BUSY_TITLES = frozenset({"zerogpu queue timeout"})
_QUOTA = re.compile(r"exceeded your .*quota|reached its GPU limit", re.IGNORECASE | re.DOTALL)
_NO_GPU = re.compile(r"\bNo (?:ZeroGPU )?GPUs?\b.*\bavailable\b", re.IGNORECASE | re.DOTALL)
_ZERO_GPU = re.compile(r"ZeroGPU|GPU quota|GPU limit|GPU task aborted", re.IGNORECASE)
_AGAIN_IN = re.compile(r"try again in\s+(?:(\d{1,3}) days?, )?(\d{1,3}):(\d{2}):(\d{2})", re.I)

# The quota opens 24 hours after its first use, so within a day at the latest.
_QUOTA_COOL_S = 600.0
_QUOTA_COOL_S_MAX = 86_400.0
_DURATION_COOL_S = 600.0
_CREDIT_COOL_S = 600.0
_LOGIN_COOL_S = 60.0


class Step(NamedTuple):
    """What one message brought: words to show while waiting, a new value, the end."""

    comment: str = ""
    has_value: bool = False
    is_completed: bool = False


_NOTHING = Step()


class JobWatch:
    """One job's state. `value` is what the watched output is now.

    `who` names the rung for people; `bytes_max` bounds what a value may grow to by its edits.
    """

    def __init__(self, *, who: str, event_id: str, output_index: int, bytes_max: int) -> None:
        self._who = who
        self._event_id = event_id
        self._output_index = output_index
        self._bytes_max = bytes_max
        self._held_bytes = 0
        self._has_begun = False
        self.is_over = False
        self.value: Any = None

    def see(self, payload: bytes) -> Step:
        """Take note of one message. Raises UpstreamError where the job failed or broke."""
        try:
            message = orjson.loads(payload)
        except orjson.JSONDecodeError as error:
            raise UpstreamBroken(f"{self._who} sent a queue message that is not JSON") from error
        if not isinstance(message, dict):
            raise UpstreamBroken(f"{self._who} sent a queue message that is not an object")
        if message.get("event_id") not in (self._event_id, None):
            return _NOTHING
        match message.get("msg"):
            case "process_generating" | "process_streaming":
                return self._generate(message, len(payload))
            case "process_completed":
                return self._complete(message)
            case "estimation":
                return Step(comment=_place(message))
            case "progress":
                return Step(comment=_progress(message))
            case "log":
                return Step(comment=_line(message.get("log")))
            case "unexpected_error" | "server_stopped":
                self.is_over = True
                raise UpstreamFailed(f"{self._who} lost the job: {_line(message.get('message'))}")
            case "queue_full":
                self.is_over = True
                raise UpstreamBusy(f"{self._who} has a full queue")
            case "close_stream":
                self.is_over = True
                raise UpstreamBroken(f"{self._who} closed the stream before the job was done")
            case _:  # heartbeats, process_starts, and whatever comes to be
                return _NOTHING

    def _generate(self, message: Any, size: int) -> Step:
        if message.get("success") is False:
            return self._complete(message)
        item = self._output(message)
        self._held_bytes += size
        if self._held_bytes > self._bytes_max:
            raise UpstreamBroken(f"{self._who}: the answer is larger than {self._bytes_max} bytes")
        if not self._has_begun:
            self._has_begun = True
            self.value = _unwrapped(item)
            return Step(has_value=True)
        if item == []:
            return _NOTHING
        try:
            self.value = apply_edits(self.value, item)
        except (ValueError, TypeError, LookupError) as error:
            why = _line(str(error))
            raise UpstreamBroken(f"{self._who} sent an edit that does not fit: {why}") from error
        return Step(has_value=True)

    def _complete(self, message: Any) -> Step:
        self.is_over = True
        output = message.get("output")
        if message.get("success") is not True or (isinstance(output, dict) and "error" in output):
            raise self._failure(message, output)
        if not isinstance(output, dict) or output.get("data") is None:
            raise UpstreamFailed(f"{self._who} ended the job without a value: it was called off")
        self.value = _unwrapped(self._output(message))
        return Step(has_value=True, is_completed=True)

    def _failure(self, message: Any, output: Any) -> UpstreamError:
        told = output if isinstance(output, dict) else {}
        title = told.get("title") or message.get("title")
        return failure(self._who, told.get("error"), title if isinstance(title, str) else "")

    def _output(self, message: Any) -> Any:
        output = message.get("output")
        data = output.get("data") if isinstance(output, dict) else None
        if not isinstance(data, list) or len(data) <= self._output_index:
            raise UpstreamBroken(f"{self._who} sent a value without the output that was asked for")
        return data[self._output_index]


def apply_edits(value: Any, edits: Any) -> Any:
    """The value after a list of Gradio's edits `[action, path, new]`; containers change in place.

    Raises ValueError, TypeError or LookupError on edits that do not fit the value.
    """
    for edit in _a_list(edits):
        action, path, new = _a_list(edit)
        value = _apply(value, action, _a_list(path), new)
    return value


def _apply(value: Any, action: Any, path: list[Any], new: Any) -> Any:
    if not path:
        if action == "replace":
            return new
        if action == "append":
            return _appended(value, new)
        raise ValueError(f"{action!r} of a whole value")
    parent = value
    for name in path[:-1]:
        parent = parent[_place_in(parent, name)]
    last = path[-1]
    match action:
        case "replace":
            parent[_place_in(parent, last)] = new
        case "append":
            place = _place_in(parent, last)
            parent[place] = _appended(parent[place], new)
        case "add" if isinstance(parent, list) and type(last) is int and 0 <= last <= len(parent):
            parent.insert(last, new)
        case "add" if isinstance(parent, dict) and isinstance(last, str):
            parent[last] = new
        case "delete":
            del parent[_place_in(parent, last)]
        case _:
            raise ValueError(f"{action!r} at {last!r}")
    return value


def _a_list(value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise ValueError(f"a {type(value).__name__} where a list belongs")
    return value


def _place_in(parent: Any, name: Any) -> Any:
    """`name` where it is a place in the parent; Python's negative ones are not Gradio's."""
    if isinstance(parent, list) and type(name) is int and 0 <= name < len(parent):
        return name
    if isinstance(parent, dict) and name in parent:
        return name
    raise LookupError(f"there is no {name!r} in a {type(parent).__name__}")


def _appended(value: Any, new: Any) -> Any:
    if isinstance(value, str) and isinstance(new, str):
        return value + new
    if isinstance(value, list) and isinstance(new, list):
        return value + new
    raise TypeError(f"a {type(new).__name__} appended to a {type(value).__name__}")


class TextSent:
    """What a client was told, against what the Space now says the text is."""

    def __init__(self, who: str) -> None:
        self._who = who
        self.text = ""

    def take(self, text: str, *, is_final: bool = False) -> str:
        """What may be said now. Raises UpstreamBroken where the Space took back what was said.

        A text cut short contradicts nothing yet, since it may grow back; a final one may lack only
        trailing white space.
        """
        if text.startswith(self.text):
            delta = text[len(self.text) :]
            self.text = text
            return delta
        if self.text.startswith(text) and (not is_final or self.text.rstrip() == text.rstrip()):
            return ""
        raise UpstreamBroken(f"{self._who} rewrote text that the client already has")


def text_of(value: Any, *, who: str) -> str:
    """The answer's text in the value of an output. Raises UpstreamBroken where there is none.

    A string; a message with `content`, or a list of messages (then the assistant's since the last
    user turn, without its thoughts); Gradio 4's pairs of user and bot; `{"text": ...}` of a
    multimodal box; a component as JSON with its `value`.
    """
    found = _text_in(value, _NESTING_MAX)
    if found is None:
        kind = type(value).__name__
        raise UpstreamBroken(f"{who} answered with a {kind} in which there is no text")
    return found


def _text_in(value: Any, depth: int) -> str | None:
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    if depth == 0:
        return None
    if isinstance(value, dict):
        for name in ("content", "text", "value"):
            if name in value:
                return _text_in(value[name], depth - 1)
        return None
    return _text_in_list(value, depth - 1) if isinstance(value, list) else None


def _text_in_list(items: list[Any], depth: int) -> str | None:
    if items and all(isinstance(item, list) and len(item) == 2 for item in items):
        return _text_in(items[-1][1], depth)
    has_roles = any(isinstance(item, dict) and "role" in item for item in items)
    if has_roles:
        items = _last_turn(items)
    parts = [_text_in(item, depth) for item in items]
    if None in parts:
        return None
    return ("\n\n" if has_roles else "").join(part for part in parts if part)


def _last_turn(messages: list[Any]) -> list[Any]:
    """What the assistant said since the last user turn, without titled thoughts and tool notes."""
    turn: list[Any] = []
    for message in messages:
        role = message.get("role") if isinstance(message, dict) else None
        if role == "user":
            turn = []
        elif role == "assistant" and not _is_thought(message):
            turn.append(message)
    return turn


def _is_thought(message: Any) -> bool:
    metadata = message.get("metadata")
    return isinstance(metadata, dict) and bool(metadata.get("title"))


def vectors_of(value: Any, count: int, *, who: str, usage: Usage) -> Embeddings:
    """Exactly `count` vectors in the value of an output. Raises UpstreamError.

    A list of vectors; the same as JSON text, or under a usual name; an OpenAI answer.
    """
    if isinstance(value, str):
        try:
            value = orjson.loads(value)
        except orjson.JSONDecodeError as error:
            raise UpstreamBroken(f"{who} answered with text where vectors were expected") from error
    if isinstance(value, dict):
        data = value.get("data")
        if isinstance(data, list) and data and isinstance(data[0], dict):
            return embeddings.read_openai(_dumped(value, who), count, who=who)
        value = next((value[name] for name in _VECTORS_NAMES if name in value), value)
    return embeddings.read_nested(_dumped(value, who), count, who=who, usage=usage)


def _dumped(value: Any, who: str) -> bytes:
    try:
        return orjson.dumps(value)
    except orjson.JSONEncodeError as error:
        raise UpstreamBroken(f"{who} answered with a value nested too deep") from error


def failure(who: str, error: Any, title: str = "") -> UpstreamError:
    """What the error of a job means: ZeroGPU's refusals by title, then by text, then any other's.

    `error` is a `gr.Error`'s text (in quotes on Gradio 4), or None where the Space hides its own.
    """
    text = _unquoted(error) if isinstance(error, str) else ""
    zero_gpu = _zero_gpu_failure(who, text, title.strip().lower())
    if zero_gpu is not None:
        return zero_gpu
    if not text:
        return UpstreamFailed(f"{who} failed without saying why (its show_error is off)")
    return classify_in_stream(who, Complaint(_line(text, chars_max=600)))


def _zero_gpu_failure(who: str, text: str, title: str) -> UpstreamError | None:
    is_titled = title.startswith("zerogpu")
    if not is_titled and not _ZERO_GPU.search(text) and not _NO_GPU.search(text):
        return None
    message = f"{who}: {_line(text, chars_max=600) or title}"
    if title in _CREDIT_TITLES:
        return RungRefused(message, code="upstream_credit", cool_s=_CREDIT_COOL_S)
    if title in _DURATION_TITLES:
        return RungRefused(message, code="upstream_quota", cool_s=_DURATION_COOL_S)
    if title in _BUSY_TITLES:
        return UpstreamBusy(message)
    if title in _QUOTA_TITLES or _QUOTA.search(text):
        again_s = quota_opens_in_s(text)
        cool_s = _QUOTA_COOL_S if again_s is None else again_s
        return RungRefused(message, code="upstream_quota", cool_s=cool_s, retry_after_s=again_s)
    if _NO_GPU.search(text):
        return UpstreamBusy(message)
    return UpstreamFailed(message)


def quota_opens_in_s(text: str) -> float | None:
    """The seconds of ZeroGPU's "Try again in H:MM:SS", at most a day; None without one."""
    found = _AGAIN_IN.search(text)
    if found is None:
        return None
    days, hours, minutes, seconds = (int(part or 0) for part in found.groups())
    return min(float(((days * 24 + hours) * 60 + minutes) * 60 + seconds), _QUOTA_COOL_S_MAX)


def refusal_of(who: str, status: int, headers: Mapping[str, str], body: bytes) -> UpstreamError:
    """What a refused request to a Space's own routes means; no function of it has run."""
    detail = _detail(body)
    if status == 401 and b"Not authenticated" in body:
        return RungRefused(
            f"{who} asks for a user name and a password of its own (Gradio's auth=), "
            "which Rungway does not send",
            code="upstream_auth",
            cool_s=_LOGIN_COOL_S,
        )
    if status == 422:
        invalid = [one for one in detail if _is_invalid(one)] if isinstance(detail, list) else []
        if invalid:
            words = "; ".join(_line(one.get("message")) or "invalid" for one in invalid[:5])
            return CallerMistake(f"{who} refused the request: {words}")
        return UpstreamBroken(f"{who} does not take the queue's request as Gradio 4 to 6 do (422)")
    if status == 503 and isinstance(detail, str) and "full" in detail:
        return UpstreamBusy(f"{who}: {_line(detail)}")
    if status == 404:
        return UpstreamFailed(f"{who} does not have the route any more (404): was it redeployed?")
    if status == 500 and detail is None and not body.lstrip().startswith(b"<"):
        return RungRefused(
            f"{who} does not know the function any more (500 on joining its queue)",
            code="upstream_model",
        )
    if status == 400:
        return UpstreamFailed(f"{who} could not queue the job: {_line(detail)}")
    return refusal(who, status, headers, body)


def _detail(body: bytes) -> Any:
    try:
        value = orjson.loads(body)
    except orjson.JSONDecodeError:
        return None
    return value.get("detail") if isinstance(value, dict) else None


def _is_invalid(one: Any) -> bool:
    return isinstance(one, dict) and one.get("__type__") == "validate" and not one.get("is_valid")


def estimated_usage(asked: str, answered: str) -> Usage:
    """Tokens of a chat at four bytes each: no Space reports them."""
    return Usage(_tokens(asked), _tokens(answered), estimated=True)


def _tokens(text: str) -> int:
    return -(-len(text.encode("utf-8", "replace")) // _BYTES_PER_TOKEN)


def _unwrapped(item: Any) -> Any:
    """The value in a `gr.update`, which a function may answer with in its place."""
    if isinstance(item, dict) and item.get("__type__") == "update":
        return item.get("value")
    return item


def _unquoted(text: str) -> str:
    if len(text) > 1 and text[0] == text[-1] and text[0] in "'\"":
        return text[1:-1].replace("\\n", "\n").replace("\\'", "'")
    return text


def _place(message: Any) -> str:
    rank, size, eta_s = (message.get(name) for name in ("rank", "queue_size", "rank_eta"))
    if type(rank) is not int:
        return ""
    of_size = f" of {size}" if type(size) is int else ""
    about = f", about {eta_s:.0f} s" if isinstance(eta_s, int | float) else ""
    return f"queue position {rank + 1}{of_size}{about}"


def _progress(message: Any) -> str:
    units = message.get("progress_data")
    unit = units[-1] if isinstance(units, list) and units else None
    if not isinstance(unit, dict):
        return ""
    index, length, share = (unit.get(name) for name in ("index", "length", "progress"))
    words = [_line(unit.get("desc"))]
    if isinstance(index, int | float) and isinstance(length, int | float):
        words.append(f"{index:g}/{length:g}")
    elif isinstance(share, int | float):
        words.append(f"{share:.0%}")
    return " ".join(["progress:", *filter(None, words)])


def _line(value: Any, *, chars_max: int = _COMMENT_CHARS_MAX) -> str:
    """Foreign text as one printable line: no break of it may end up in a stream's framing."""
    text = value if isinstance(value, str) else ""
    flat = " ".join("".join(c if c.isprintable() else " " for c in text[: chars_max * 4]).split())
    return flat if len(flat) <= chars_max else flat[:chars_max] + "…"
