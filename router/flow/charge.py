"""What one attempt costs: its hold, kept ahead of what is received, and its settlement.

A charge is opened when an attempt has its place on a rung and closed when the attempt is over,
however it ended. What an upstream reported is charged; what it did not is estimated from what came,
and marked so. A failed attempt costs what was received: nothing, where nothing was. One that we
cancelled costs what the upstream will have produced by then.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from dataclasses import replace

from router.core import accounts, chat_request, estimate
from router.core.embeddings import estimate_tokens
from router.core.estimate import Estimates, Terms
from router.errors import CallerError, StateUnavailable, UpstreamTimeout
from router.flow.ledger import Admission, Hold, Ledger
from router.types import Call, ChatCall, EmbedCall, Json, Price, Rung, Usage

_FREE = Price(0, 0)
_NO_OUTPUT = Terms(None, 0)


class Charge:
    """One attempt's. `call` is the call as it is to be put: with fewer output tokens, maybe.

    `clock` gives monotonic seconds.
    """

    # Fewer tokens were asked for than the client may have had, for want of money.
    is_short = False
    usage: Usage | None = None
    # What was charged for it, once it is settled.
    nanousd = 0
    # Why the stream had to end, where it had to.
    cut_reason = ""
    opened_at = 0.0
    _hold: Hold | None = None
    _share: int | None = None
    _prompt_max = 0
    _choices = 1
    # What the rung was told to produce at most, of all choices.
    _output_max: int | None = None
    # Output tokens at which the hold must grow; never, where they cost nothing.
    _grow_at = math.inf

    def __init__(
        self,
        ledger: Ledger,
        admission: Admission,
        call: Call,
        rung: Rung,
        price: Price | None,
        estimates: Estimates,
        clock: Callable[[], float],
    ) -> None:
        self.call = call
        self.clamped_to: int | None = call.clamped_to if isinstance(call, ChatCall) else None
        self.estimates = estimates
        self._ledger = ledger
        self._admission = admission
        self._rung = rung
        self._price = price or _FREE
        self._clock = clock

    def open_at_once(self, context: int | None) -> bool:
        """Hold what the attempt may use on a rung with that context; False: it is for `open`."""
        room = self._ledger.room_at_once(self._admission)
        if room is None:
            return False
        terms = self._terms(context, *room)
        try:
            hold = self._ledger.hold_at_once(
                self._admission,
                self.call.ladder.name,
                self._rung,
                self._price,
                self._prompt_max,
                terms.held_tokens,
            )
        except StateUnavailable:
            # The journal is full.
            return False
        if hold is None:
            return False
        self._begin(hold, terms)
        return True

    async def open(self, context: int | None) -> None:
        """The same, asking the store. Raises QuotaUsedUp, RateLimited or StateUnavailable."""
        if self.open_at_once(context):
            return
        try:
            await self._open(context)
        except CallerError:
            if isinstance(self.call, EmbedCall):
                raise
            # What was thought to be free went to others meanwhile: once more, for less.
            await self._open(context)

    async def _open(self, context: int | None) -> None:
        terms = self._terms(context, *await self._ledger.room(self._admission))
        hold = await self._ledger.hold(
            self._admission,
            self.call.ladder.name,
            self._rung,
            self._price,
            input_tokens=self._prompt_max,
            output_tokens=terms.held_tokens,
        )
        self._begin(hold, terms)

    def is_due(self, chars: int, chunks: int) -> bool:
        """Whether so much of the answer has come that the hold has to grow."""
        return self.estimates.output_tokens(chars, chunks) >= self._grow_at

    async def keep_ahead(self, chars: int, chunks: int) -> bool:
        """Let the hold grow; False where it cannot, and the stream has to end."""
        hold, margin = self._hold, self._margin_tokens
        assert hold is not None
        received = self.estimates.output_tokens(chars, chunks)
        wanted, most = received + margin, self._output_max
        if most is not None and received <= most < wanted:
            # More can only come of a rung that does not do what it was told.
            wanted = most
        ledger, prompt = self._ledger, self._prompt_max
        try:
            if not ledger.grow(hold, input_tokens=prompt, output_tokens=wanted):
                await ledger.grow_from_store(hold, input_tokens=prompt, output_tokens=wanted)
        except (CallerError, StateUnavailable) as refused:
            self.cut_reason = refused.message
            return False
        self._grow_at = self._next_growth(wanted)
        return True

    def used(self, usage: Usage | None, nanousd: int | None = None) -> None:
        """What the attempt has used, as far as is known now; `nanousd`: its share of the cost of
        a request that it shared with others."""
        self.usage = usage
        self._share = nanousd

    def received(self, chars: int, chunks: int) -> Usage:
        """An estimate of what came, where the upstream did not say."""
        output_tokens = self.estimates.output_tokens(chars, chunks)
        most = self._output_max
        if self.cut_reason and most is not None and output_tokens < most + self._margin_tokens:
            # Cut at what the rung was told to produce at most: a little more is our mistake.
            output_tokens = min(output_tokens, most)
        return Usage(
            self.estimates.prompt_tokens(self.call.needs),
            output_tokens,
            estimated=True,
        )

    def learn(self, usage: Usage, chars: int, chunks: int) -> None:
        """The upstream reported this for an answer that was received whole."""
        seconds = self._clock() - self.opened_at
        self.estimates.learn_prompt(self.call.needs, usage.input_tokens)
        self.estimates.learn_output(chars, chunks, usage.output_tokens, seconds)

    def nanousd_of(self, usage: Usage) -> int:
        """What this usage costs here."""
        return accounts.cost(self._price, usage.input_tokens, usage.output_tokens)

    def call_nanousd(self, usage: Usage | None) -> int:
        """What the call will have been charged, attempts before included, with this usage."""
        own = self._share
        if own is None:
            own = 0 if usage is None else self.nanousd_of(usage)
        admission = self._admission if self._hold is None else self._hold.admission
        return admission.charged + own

    def close(self, error: BaseException | None) -> Usage | None:
        """Settle, exactly once; what was charged for."""
        assert self._hold is not None, "only an open charge is closed"
        if self.usage is None and _is_our_cancel(error):
            self.usage = self._produced()
        self.nanousd = self._ledger.settle(
            self._hold, self.usage, answered=error is None, share=self._share
        )
        return self.usage

    @property
    def _margin_tokens(self) -> int:
        return self.estimates.margin_tokens * self._choices

    def _terms(self, context: int | None, nanousd: int | None, tokens: int | None) -> Terms:
        """On what terms to ask the rung, where that much is left to the call."""
        call, estimates = self.call, self.estimates
        if isinstance(call, EmbedCall):
            # Few texts are denser than twice the usual.
            self._prompt_max = 2 * estimate_tokens(call.inputs) + len(call.inputs)
            return _NO_OUTPUT
        self._prompt_max = estimates.prompt_tokens_max(call.needs)
        self._choices = call.body.get("n") or 1
        holds_all = not call.stream or estimates.hides_reasoning
        return estimate.terms(
            chat_request.output_limit(call.body),
            self._choices,
            holds_all,
            self._prompt_max,
            None if context is None else context - call.needs.prompt_tokens_min,
            self._price,
            nanousd,
            tokens,
            0 if holds_all else self._margin_tokens,
        )

    def _begin(self, hold: Hold, terms: Terms) -> None:
        self._hold = hold
        self.opened_at = self._clock()
        self.is_short = terms.is_short
        call = self.call
        if isinstance(call, EmbedCall):
            return
        if terms.output_tokens_max is not None:
            body, clamped_to = chat_request.clamp(call.body, terms.output_tokens_max)
            self.call = call = _with_body(call, body)
            self.clamped_to = clamped_to if clamped_to is not None else self.clamped_to
        if not call.stream:
            return
        most = chat_request.output_limit(call.body)
        self._output_max = None if most is None else most * self._choices
        if hold.tokens or not self._price.is_free:
            self._grow_at = self._next_growth(terms.held_tokens)

    def _next_growth(self, held: int) -> float:
        """The output tokens at which to let the hold grow."""
        most = self._output_max
        return most + 1 if most is not None and held >= most else held - self._margin_tokens / 2

    def _produced(self) -> Usage:
        """An estimate of what an upstream that we cancelled had produced, unseen."""
        if isinstance(self.call, EmbedCall):
            return Usage(estimate_tokens(self.call.inputs), estimated=True)
        seen = self.received(0, 0)
        if self.call.stream:
            return seen
        elapsed_s = self._clock() - self.opened_at
        limit = chat_request.output_limit(self.call.body) or estimate.UNSAID_OUTPUT_TOKENS
        output_tokens = min(limit, round(elapsed_s * self.estimates.tokens_per_s)) * self._choices
        return replace(seen, output_tokens=output_tokens)


def _with_body(call: ChatCall, body: Json) -> ChatCall:
    """The call with another body: four times as quick as `replace`, which asks for each field."""
    return ChatCall(
        call.id,
        call.key,
        call.ladder,
        call.policy,
        body,
        call.stream,
        call.wants_usage,
        call.needs,
        call.clamped_to,
    )


def _is_our_cancel(error: BaseException | None) -> bool:
    if isinstance(error, UpstreamTimeout):
        return error.phase != "connect"
    return isinstance(error, asyncio.CancelledError | ConnectionError)
