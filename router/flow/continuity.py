"""Which rungs go on with a text that was begun: shown by a canary, never on the path of a call.

A server that ignores the wish answers anew, and its answer joined to the text so far would be a
lie. So each rung is asked, streamed as a rescue is, to go on with two texts whose next letters
nobody doubts: one is cut inside a number, where only the same message can go on, and one before a
white space, which some servers lose. What was shown holds until the backend is seen down (it may
come back as another model), the rung echoes in a rescue, or the configuration is loaded anew.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable, Mapping

from router.backends.base import Backend, ChatAttempt, EventKind, State
from router.core import jsontext
from router.core.rescue import continuation
from router.errors import CallerMistake, RouterError
from router.flow.board import Board
from router.types import ChatCall, Json, Key, Ladder, Needs, Policy, Rung, Task

_log = logging.getLogger("rungway")
_CANARY_LIMIT_S = 20.0
_CONNECT_S = 5.0
_TOKENS = 8
_ANSWER_BYTES_MAX = 1 << 20
_CANARIES = (
    ("Count from 1 to 20, with commas.", "1, 2, 3, 4, 5, 6, 7, 8, 9, 1", "0"),
    (
        "Name the days of the week in order, beginning with Monday. Give the names alone, "
        "with commas between them.",
        "Monday, Tuesday,",
        " Wednesday",
    ),
)
_UNKNOWN = "not yet seen to go on with a text that was begun"
_REFUTED = "does not go on with a text that was begun"
_KIND = "servers of its kind are not asked to go on with a text that was begun"
_NOBODY = Key("rungway")


class Continuity:
    """What the canaries have shown of each rung."""

    def __init__(self, backends: Mapping[str, Backend], board: Board) -> None:
        self._backends = backends
        self._board = board
        self._shown: dict[str, bool] = {}

    def why_not(self, rung: Rung) -> str | None:
        """Why this rung may not be asked to continue an answer, or None."""
        if not self._backends[rung.backend].can_continue:
            return _KIND
        shown = self._shown.get(rung.name)
        if shown is None:
            return _UNKNOWN
        return None if shown else _REFUTED

    def refute(self, rung: Rung) -> None:
        """The rung began an answer anew in a rescue."""
        self._shown[rung.name] = False
        _log.warning("%s %s: it continues no answers from now on", rung.name, _REFUTED)

    async def prove_forever(self, ladders: Iterable[Ladder], every_s: float) -> None:
        """Keep what is known of the rescuing ladders' rungs up to date, until cancelled."""
        rungs = rungs_to_prove(ladders)
        while rungs:
            await self.prove_all(rungs)
            await asyncio.sleep(every_s)

    async def prove_all(self, rungs: Iterable[Rung]) -> None:
        """Ask each rung of which nothing is known."""
        await asyncio.gather(*(self._prove(rung) for rung in rungs))

    async def _prove(self, rung: Rung) -> None:
        if not self._backends[rung.backend].can_continue:
            return
        if self._board.probe_of(rung.backend).state not in (State.UP, State.UNKNOWN):
            self._shown.pop(rung.name, None)
        elif rung.name not in self._shown:
            shown = await self._ask(rung)
            if shown is not None:
                self._shown[rung.name] = shown
                _log.info("%s %s", rung.name, "continues answers" if shown else _REFUTED)

    async def _ask(self, rung: Rung) -> bool | None:
        """What the canaries show; None where there was no answer to judge."""
        try:
            async with asyncio.timeout(_CANARY_LIMIT_S):
                for question, begun, rest in _CANARIES:
                    answer = await self._answer(rung, question, begun, len(rest))
                    if not answer.startswith(rest):
                        return False
        except CallerMistake:
            # It does not know what it was asked for, and says so.
            return False
        except (TimeoutError, RouterError):
            return None
        except Exception:
            # The edge of a background task: one backend's odd answer must not end all canaries.
            _log.exception("the canary of %s failed in a way nobody foresaw", rung.name)
            return None
        return True

    async def _answer(self, rung: Rung, question: str, begun: str, chars: int) -> str:
        """The beginning of the rung's answer to a canary."""
        opened = await self._backends[rung.backend].stream_chat(_attempt(rung, question, begun))
        text = ""
        try:
            while len(text) < chars and (events := await opened.read()):
                for event in events:
                    if event.kind is EventKind.CHUNK:
                        text += _text_in(event.data)
                if events[-1].kind is EventKind.DONE:
                    break
        finally:
            opened.close()
        return text


def rungs_to_prove(ladders: Iterable[Ladder]) -> list[Rung]:
    """The rungs that may have to continue an answer; a policy can put any of them behind others."""
    found = {
        rung.name: rung
        for ladder in ladders
        if ladder.rescue and ladder.task is Task.CHAT and len(ladder.rungs) > 1
        for rung in ladder.rungs
    }
    return list(found.values())


def _attempt(rung: Rung, question: str, begun: str) -> ChatAttempt:
    body: Json = {
        "messages": [{"role": "user", "content": question}],
        "temperature": 0,
        "max_tokens": _TOKENS,
    }
    call = ChatCall(
        id="chatcmpl-canary",
        key=_NOBODY,
        ladder=Ladder("canary", Task.CHAT, (rung,)),
        policy=Policy.ORDER,
        body=continuation(body, begun, 0),
        stream=True,
        wants_usage=False,
        needs=Needs(),
    )
    return ChatAttempt(call, rung, _CONNECT_S, _ANSWER_BYTES_MAX)


def _text_in(payload: bytes) -> str:
    """The text of a chunk; what is none has none."""
    try:
        delta = jsontext.read(payload)["choices"][0]["delta"]
        text = delta["content"]
    except (ValueError, LookupError, TypeError):
        return ""
    return text if type(text) is str else ""
