"""How many tokens a prompt or a piece of an answer has, where nobody said so yet.

What upstreams report calibrates what they do not: by rung, since tokenizers differ. Two measures of
an answer are kept, its characters and its chunks, and the one that was nearer to the reports so far
is used: many servers send one token a chunk, others join them.

Also here: on what terms a rung may be asked, so that what is set aside covers what can be produced.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from router.core.accounts import affordable
from router.types import Needs, Price

# Of English text in the common tokenizers; other languages and code have fewer.
_CHARS_PER_TOKEN = 4.0
# What is set aside for a prompt before its rung has reported any: few texts are denser.
_DENSE_CHARS_PER_TOKEN = 2.0
# A prompt may be so much denser than those before it.
_PROMPT_MARGIN = 1.25
# A chat template's own words: what is likely, and what is set aside; and those of an image.
_TEMPLATE_START = 8.0
_TEMPLATE_TOKENS = 32
_IMAGE_TOKENS = 1_500
# Shorter prompts tell of the template more than of the text.
_PROMPT_CHARS_MIN = 200
# Of a rung that has reported nothing: a chunk with more than so many tokens' text holds several.
_JOINED_TOKENS = 2
# How fast the newest report moves what is known.
_WEIGHT = 0.2
# A rung whose answers are so much longer in the bill than in what is seen hides its reasoning.
_HIDDEN_FACTOR = 2.0
_HIDDEN_TOKENS = 64
# What a hold stays ahead of what was received, at least and at most: the fastest rungs make some
# thousands a second, and one that answered from a cache is no measure.
MARGIN_TOKENS, MARGIN_TOKENS_MAX = 64, 4_096
# The most that is produced for a request which sets no limit, on a rung whose context is unknown.
UNSAID_OUTPUT_TOKENS = 4_096
_RATE_START = 50.0


@dataclass(slots=True)
class Estimates:
    """What is known of one rung's tokens. `tokens_per_s` is the speed of its output."""

    tokens_per_s: float = _RATE_START
    hides_reasoning: bool = False
    _template: float = 0.0
    _prompt: float = 0.0
    _by_chars: float = 1 / _CHARS_PER_TOKEN
    _by_chunks: float = 1.0
    _chars_error: float = 0.0
    _chunks_error: float = 0.0
    _is_calibrated: bool = False

    def prompt_tokens(self, needs: Needs) -> int:
        """The likeliest count."""
        chars = needs.prompt_chars + needs.schema_chars
        text = chars * (self._prompt or 1 / _CHARS_PER_TOKEN)
        return round((self._template or _TEMPLATE_START) + text) + _IMAGE_TOKENS * needs.images

    def prompt_tokens_max(self, needs: Needs) -> int:
        """What to set aside for a prompt: seldom less than what will be reported."""
        known = self._prompt * _PROMPT_MARGIN
        chars = needs.prompt_chars + needs.schema_chars
        text = chars * (known or 1 / _DENSE_CHARS_PER_TOKEN)
        template = max(_TEMPLATE_TOKENS, self._template * _PROMPT_MARGIN)
        return int(text + template) + _IMAGE_TOKENS * needs.images

    def output_tokens(self, chars: int, chunks: int) -> int:
        """Of an answer of so many characters that came in so many chunks (0: not in chunks)."""
        by_chars = chars * self._by_chars
        by_chunks = chunks * self._by_chunks
        if not chunks:
            return max(1, round(by_chars)) if chars else 0
        if not self._is_calibrated:
            return round(by_chars if by_chars > by_chunks * _JOINED_TOKENS else by_chunks)
        return round(by_chars if self._chars_error < self._chunks_error else by_chunks)

    def learn_prompt(self, needs: Needs, tokens: int) -> None:
        """A report of a prompt. Nobody knows how it counts images."""
        chars = needs.prompt_chars + needs.schema_chars
        if tokens <= 0 or needs.images:
            return
        if chars < _PROMPT_CHARS_MIN:
            text = chars * (self._prompt or 1 / _CHARS_PER_TOKEN)
            self._template = _moved(self._template, max(1.0, tokens - text))
        elif (text := tokens - (self._template or _TEMPLATE_START)) > 0:
            self._prompt = _moved(self._prompt, text / chars)

    def learn_output(self, chars: int, chunks: int, tokens: int, seconds: float) -> None:
        """A report of an answer that was received whole; of one whose text was not looked at
        (`chars` 0), only its speed is learnt."""
        if tokens > 0 and seconds > 0:
            self.tokens_per_s = _moved(self.tokens_per_s, tokens / seconds)
        if tokens <= 0 or chars <= 0:
            return
        seen = self.output_tokens(chars, chunks)
        # Few scripts take more than a token a character.
        if tokens > max(seen * _HIDDEN_FACTOR, chars) + _HIDDEN_TOKENS:
            # What it hid says nothing of what it shows.
            self.hides_reasoning = True
            return
        by_chars, by_chunks = tokens / chars, tokens / chunks if chunks else 0.0
        if not self._is_calibrated:
            self._is_calibrated = True
            self._by_chars, self._by_chunks = by_chars, by_chunks or self._by_chunks
        else:
            if chunks:
                self._chars_error = _moved(self._chars_error, abs(self._by_chars / by_chars - 1))
                self._chunks_error = _moved(
                    self._chunks_error, abs(self._by_chunks / by_chunks - 1)
                )
                self._by_chunks = _moved(self._by_chunks, by_chunks)
            self._by_chars = _moved(self._by_chars, by_chars)

    @property
    def margin_tokens(self) -> int:
        """What the rung can produce before a cancel reaches it: a second of its speed."""
        if self.tokens_per_s <= MARGIN_TOKENS:
            return MARGIN_TOKENS
        return min(round(self.tokens_per_s), MARGIN_TOKENS_MAX)


def _moved(known: float, seen: float) -> float:
    return known + _WEIGHT * (seen - known) if known else seen


class Terms(NamedTuple):
    """`output_tokens_max`: what to send as the output's limit; None: as the client wrote it.
    `held_tokens`: the output tokens to set aside before asking. `is_short`: the budget's rest buys
    fewer than there would have been.
    """

    output_tokens_max: int | None
    held_tokens: int
    is_short: bool = False


def terms(
    asked: int | None,
    choices: int,
    holds_all: bool,
    prompt_tokens: int,
    context_left: int | None,
    price: Price,
    nanousd: int | None,
    tokens: int | None,
    margin_tokens: int,
) -> Terms:
    """On what terms to ask a rung, where money (`nanousd`) or `tokens` are limited; None: not.

    `holds_all`: nothing is seen before all of it is produced (a whole answer, hidden reasoning),
    so all that may come is set aside. `context_left`: the most that the rung's context has room
    for. With nothing left the held tokens are those of one token, which the ledger will refuse with
    its reason.
    """
    affords = None if nanousd is None else affordable(price, nanousd, prompt_tokens)
    if tokens is not None and (affords is None or tokens - prompt_tokens < affords):
        affords = max(0, tokens - prompt_tokens)
    wanted = asked if asked is not None else UNSAID_OUTPUT_TOKENS
    if context_left is not None and (asked is None or context_left < asked):
        wanted = context_left
    wanted = max(1, wanted)
    bound = wanted if affords is None else max(1, min(wanted, affords // choices))
    if asked is not None:
        sent = bound if bound < asked else None
    else:
        # A stream without a limit of the client's may go on as long as its hold can grow.
        sent = bound if bound < wanted or (affords is not None and holds_all) else None
    if affords is None and asked is None:
        # Nothing bounds it, and nobody is refused for it: the doubt after a crash is a guess.
        bound = min(bound, UNSAID_OUTPUT_TOKENS)
    held = bound if holds_all else min(bound, margin_tokens)
    return Terms(sent, held * choices, affords is not None and bound < wanted)
