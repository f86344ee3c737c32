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
from router.core.estimate import Estimates
from router.errors import CallerError, StateUnavailable, UpstreamTimeout
from router.flow.ledger import Admission, Hold, Ledger
from router.types import Call, ChatCall, EmbedCall, Price, Rung, Usage

_FREE = Price(0, 0)


class Charge:
    """One attempt's. `call` is the call as it is to be put: with fewer output tokens, maybe.

    `clock` gives monotonic seconds.
    """

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
        self._hold: Hold | None = None
        self._prompt_max = 0
        self._choices = 1
        self._opened_at = 0.0
        self.usage: Usage | None = None
        # What was charged for it, once it is settled.
        self.nanousd = 0
        # Output tokens at which the hold must grow; never, where nothing limits it.
        self._grow_at = math.inf

    async def open(self, context: int | None) -> None:
        """Hold what the attempt may use. Raises QuotaUsedUp, RateLimited or StateUnavailable."""
        call = self.call
        if isinstance(call, EmbedCall):
            # Few texts are denser than twice the usual.
            self._prompt_max = 2 * estimate_tokens(call.inputs) + len(call.inputs)
            self._hold = await self._held(0)
        else:
            self._prompt_max = self.estimates.prompt_tokens_max(call.needs)
            self._choices = call.body.get("n") or 1
            try:
                self._hold = await self._hold_chat(call, context)
            except CallerError:
                # What was thought to be free went to others meanwhile: once more, for less.
                self._hold = await self._hold_chat(call, context)
        self._opened_at = self._clock()

    def is_due(self, chars: int, chunks: int) -> bool:
        """Whether so much of the answer has come that the hold has to grow."""
        return self.estimates.output_tokens(chars, chunks) >= self._grow_at

    async def keep_ahead(self, chars: int, chunks: int) -> bool:
        """Let the hold grow; False where it cannot, and the stream has to end."""
        hold, margin = self._hold, self._margin_tokens
        assert hold is not None
        received = self.estimates.output_tokens(chars, chunks)
        wanted = received + margin
        ledger, prompt = self._ledger, self._prompt_max
        try:
            if not ledger.grow(hold, input_tokens=prompt, output_tokens=wanted):
                await ledger.grow_from_store(hold, input_tokens=prompt, output_tokens=wanted)
        except (CallerError, StateUnavailable):
            return False
        self._grow_at = wanted - margin / 2
        return True

    def used(self, usage: Usage | None) -> None:
        """What the attempt has used, as far as is known now."""
        self.usage = usage

    def received(self, chars: int, chunks: int) -> Usage:
        """An estimate of what came, where the upstream did not say."""
        needs = self.call.needs
        return Usage(
            self.estimates.prompt_tokens(needs.prompt_chars + needs.schema_chars),
            self.estimates.output_tokens(chars, chunks),
            estimated=True,
        )

    def learn(self, usage: Usage, chars: int, chunks: int) -> None:
        """The upstream reported this for an answer that was received whole."""
        seconds = self._clock() - self._opened_at
        self.estimates.learn_prompt(self.call.needs, usage.input_tokens)
        self.estimates.learn_output(chars, chunks, usage.output_tokens, seconds)

    def call_nanousd(self, usage: Usage | None) -> int:
        """What the call will have been charged, attempts before included, with this usage."""
        own = accounts.cost_of(self._price, usage) if usage is not None else 0
        return self._admission.charged + own

    def close(self, error: BaseException | None) -> Usage | None:
        """Settle, exactly once; what was charged for."""
        assert self._hold is not None, "only an open charge is closed"
        if self.usage is None and _is_our_cancel(error):
            self.usage = self._produced()
        self.nanousd = self._ledger.settle(self._hold, self.usage, answered=error is None)
        return self.usage

    @property
    def _margin_tokens(self) -> int:
        return self.estimates.margin_tokens * self._choices

    async def _hold_chat(self, call: ChatCall, context: int | None) -> Hold:
        holds_all = not call.stream or self.estimates.hides_reasoning
        nanousd, tokens = await self._ledger.room(self._admission)
        found = estimate.terms(
            asked=chat_request.output_limit(call.body),
            choices=self._choices,
            holds_all=holds_all,
            prompt_tokens=self._prompt_max,
            context=context,
            price=self._price,
            nanousd=nanousd,
            tokens=tokens,
            margin_tokens=self._margin_tokens,
        )
        hold = await self._held(found.held_tokens)
        if found.output_tokens_max is not None:
            body, clamped_to = chat_request.clamp(call.body, found.output_tokens_max)
            self.call = replace(call, body=body)
            self.clamped_to = clamped_to if clamped_to is not None else self.clamped_to
        if found.held_tokens and not holds_all:
            self._grow_at = found.held_tokens - self._margin_tokens / 2
        return hold

    async def _held(self, output_tokens: int) -> Hold:
        return await self._ledger.hold(
            self._admission,
            self.call.ladder.name,
            self._rung,
            self._price,
            input_tokens=self._prompt_max,
            output_tokens=output_tokens,
        )

    def _produced(self) -> Usage:
        """An estimate of what an upstream that we cancelled had produced, unseen."""
        if isinstance(self.call, EmbedCall):
            return Usage(estimate_tokens(self.call.inputs), estimated=True)
        seen = self.received(0, 0)
        if self.call.stream:
            return seen
        elapsed_s = self._clock() - self._opened_at
        limit = chat_request.output_limit(self.call.body) or estimate.UNSAID_OUTPUT_TOKENS
        output_tokens = min(limit, round(elapsed_s * self.estimates.tokens_per_s)) * self._choices
        return replace(seen, output_tokens=output_tokens)


def _is_our_cancel(error: BaseException | None) -> bool:
    if isinstance(error, UpstreamTimeout):
        return error.phase != "connect"
    return isinstance(error, asyncio.CancelledError | ConnectionError)
