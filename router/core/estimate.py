"""How many tokens a prompt or a piece of an answer has, where nobody said so yet.

What upstreams report calibrates what they do not: by rung, since tokenizers differ. Two measures of
an answer are kept, its characters and its chunks, and the one that was nearer to the reports so far
is used: many servers send one token a chunk, others join them.

Also here: on what terms a rung may be asked, so that what is set aside covers what can be produced.
"""

from __future__ import annotations

from dataclasses import dataclass

from router.core.accounts import affordable
from router.types import Needs, Price

# Of English text in the common tokenizers; other languages and code have fewer.
_CHARS_PER_TOKEN = 4.0
# What is set aside for a prompt before its rung has reported any: few texts are denser.
_DENSE_CHARS_PER_TOKEN = 2.0
# A prompt may be so much denser than those before it.
_PROMPT_MARGIN = 1.25
# A chat template's own words, and those around each image.
_TEMPLATE_TOKENS = 32
_IMAGE_TOKENS = 1_500
# How fast the newest report moves what is known.
_WEIGHT = 0.2
# A rung whose answers are so much longer in the bill than in what is seen hides its reasoning.
_HIDDEN_FACTOR = 2.0
_HIDDEN_TOKENS = 64
# What a hold stays ahead of what was received, at least.
MARGIN_TOKENS = 64
# The most that is produced for a request which sets no limit, on a rung whose context is unknown.
UNSAID_OUTPUT_TOKENS = 4_096
_RATE_START = 50.0


@dataclass(slots=True)
class Estimates:
    """What is known of one rung's tokens. `tokens_per_s` is the speed of its output."""

    tokens_per_s: float = _RATE_START
    hides_reasoning: bool = False
    _prompt: float = 0.0
    _by_chars: float = 1 / _CHARS_PER_TOKEN
    _by_chunks: float = 1.0
    _chars_error: float = 0.0
    _chunks_error: float = 0.0
    _is_calibrated: bool = False

    def prompt_tokens(self, chars: int) -> int:
        """The likeliest count."""
        return max(1, round(chars * (self._prompt or 1 / _CHARS_PER_TOKEN)))

    def prompt_tokens_max(self, needs: Needs) -> int:
        """What to set aside for a prompt: seldom less than what will be reported."""
        known = self._prompt * _PROMPT_MARGIN
        chars = needs.prompt_chars + needs.schema_chars
        tokens = chars * (known or 1 / _DENSE_CHARS_PER_TOKEN)
        return int(tokens) + _TEMPLATE_TOKENS + _IMAGE_TOKENS * needs.images

    def output_tokens(self, chars: int, chunks: int) -> int:
        """Of an answer of so many characters that came in so many chunks (0: not in chunks)."""
        by_chars = chars * self._by_chars
        by_chunks = chunks * self._by_chunks
        if not chunks:
            return max(1, round(by_chars)) if chars else 0
        if not self._is_calibrated:
            return max(round(by_chars), round(by_chunks))
        return round(by_chars if self._chars_error < self._chunks_error else by_chunks)

    def learn_prompt(self, needs: Needs, tokens: int) -> None:
        """A report of a prompt. Short ones tell of the template more than of the text."""
        chars = needs.prompt_chars + needs.schema_chars
        text_tokens = tokens - _TEMPLATE_TOKENS
        if chars >= 200 and text_tokens > 0 and not needs.images:
            self._prompt = _moved(self._prompt, text_tokens / chars)

    def learn_output(self, chars: int, chunks: int, tokens: int, seconds: float) -> None:
        """A report of an answer that was received whole."""
        if tokens <= 0 or chars <= 0:
            return
        seen = self.output_tokens(chars, chunks)
        if tokens > seen * _HIDDEN_FACTOR + _HIDDEN_TOKENS:
            # What it hid says nothing of what it shows.
            self.hides_reasoning = True
            return
        if chunks:
            self._chars_error = _moved(self._chars_error, abs(chars * self._by_chars / tokens - 1))
            self._chunks_error = _moved(
                self._chunks_error, abs(chunks * self._by_chunks / tokens - 1)
            )
            self._by_chunks = _moved(self._by_chunks, tokens / chunks)
        first = not self._is_calibrated
        self._by_chars = tokens / chars if first else _moved(self._by_chars, tokens / chars)
        self._is_calibrated = True
        if seconds > 0:
            self.tokens_per_s = _moved(self.tokens_per_s, tokens / seconds)

    @property
    def margin_tokens(self) -> int:
        """What the rung can produce before a cancel reaches it: a second of its speed."""
        return max(MARGIN_TOKENS, round(self.tokens_per_s))


def _moved(known: float, seen: float) -> float:
    return known + _WEIGHT * (seen - known) if known else seen


@dataclass(frozen=True, slots=True)
class Terms:
    """`output_tokens_max`: what to send as the output's limit; None: as the client wrote it.
    `held_tokens`: the output tokens to set aside before asking.
    """

    output_tokens_max: int | None
    held_tokens: int


def terms(
    *,
    asked: int | None,
    choices: int,
    holds_all: bool,
    prompt_tokens: int,
    context: int | None,
    price: Price,
    nanousd: int | None,
    tokens: int | None,
    margin_tokens: int,
) -> Terms:
    """On what terms to ask a rung, where money (`nanousd`) or `tokens` are limited; None: not.

    `holds_all`: nothing is seen before all of it is produced (a whole answer, hidden reasoning),
    so all that may come is set aside. With nothing left the held tokens are those of one token,
    which the ledger will refuse with its reason.
    """
    limits = []
    if nanousd is not None and (bought := affordable(price, nanousd, prompt_tokens)) is not None:
        limits.append(bought // choices)
    if tokens is not None:
        limits.append(max(0, tokens - prompt_tokens) // choices)
    if not limits:
        return Terms(None, 0)
    if asked is not None:
        wanted = asked
    else:
        wanted = UNSAID_OUTPUT_TOKENS if context is None else max(1, context - prompt_tokens)
    bound = max(1, min(wanted, *limits))
    # A stream without a limit of the client's may go on as long as its hold can grow.
    sent = bound if bound < wanted or (asked is None and holds_all) else None
    held = bound if holds_all else min(bound, margin_tokens)
    return Terms(sent, held * choices)
