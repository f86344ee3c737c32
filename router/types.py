"""The values that travel through the house: keys, ladders, calls, usage. No behaviour beyond names.

Words as in ARCHITECTURE.md: a *call* is a client's request, a *key* its credential, a *rung* one
model on one backend, a *ladder* ordered rungs.

None of them is changed once it is made. Those that every call makes are not declared `frozen` for
all that, which costs a tenth of a microsecond for each field.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from typing import Any

Json = dict[str, Any]


class Task(enum.StrEnum):
    """What a ladder is for."""

    CHAT = "chat"
    EMBEDDINGS = "embeddings"


class Policy(enum.StrEnum):
    """How a ladder's rungs are ordered for a call."""

    ORDER = "order"
    CHEAPEST = "cheapest"
    FASTEST = "fastest"
    BEST = "best"


# Money is counted in whole nano-dollars.
NANO_USD = 1_000_000_000


def nanousd_of(usd: float) -> int:
    """Nano-dollars of a number that a person wrote, such as 0.1."""
    return round(usd * NANO_USD)


@dataclass(frozen=True, slots=True)
class Price:
    """Pico-dollars a token: 1 USD for a million tokens are 1,000,000 of them."""

    input_picousd: int
    output_picousd: int

    @property
    def is_free(self) -> bool:
        return not (self.input_picousd or self.output_picousd)

    @classmethod
    def per_mtok(cls, input_usd: float, output_usd: float) -> Price:
        """A price as people write it: dollars for a million tokens."""
        return cls(round(input_usd * 1_000_000), round(output_usd * 1_000_000))


@dataclass(frozen=True, slots=True)
class Abilities:
    """What a rung can do; None is unknown, and the unknown is tried."""

    context: int | None = None
    tools: bool | None = None
    vision: bool | None = None
    json_schema: bool | None = None


UNKNOWN_ABILITIES = Abilities()


@dataclass(frozen=True, slots=True)
class Rung:
    """One model on one backend. `abilities` and `price` are what the configuration says."""

    backend: str
    model: str
    abilities: Abilities = UNKNOWN_ABILITIES
    max_in_flight: int | None = None
    price: Price | None = None
    tiers: frozenset[str] = frozenset()
    name: str = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "name", f"{self.backend}/{self.model}")


@dataclass(frozen=True, slots=True)
class PhaseLimits:
    """A ladder's limits of time, in seconds, and of who may wait for a place on a rung."""

    connect_s: float = 5.0
    first_token_s: float = 10.0
    idle_s: float = 30.0
    answer_s: float = 120.0
    total_s: float = 600.0
    queue_s: float = 5.0
    queue_max: int = 64
    hedge_after_s: float = 0.0
    hedge_max_share: float = 0.05


@dataclass(frozen=True, slots=True)
class Ladder:
    """Named, ordered rungs; clients send the name, or an alias, as `model`.

    `token_ids`: whose ids an embeddings call gives when it gives token ids, "cl100k_base" or the
    "model"'s own. `rescue`: a stream that breaks is continued on another rung. `commit_complete`:
    a stream is sent when it is whole. `escalate_on`: answers that a better rung is to replace.
    """

    name: str
    task: Task
    rungs: tuple[Rung, ...]
    aliases: tuple[str, ...] = ()
    policy: Policy = Policy.ORDER
    limits: PhaseLimits = PhaseLimits()
    token_ids: str = "cl100k_base"
    vector_space: str = ""
    rescue: bool = False
    commit_complete: bool = False
    escalate_on: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class KeyLimits:
    """A key's limits; None is no limit of the key's own. Money is in nano-dollars."""

    concurrent: int | None = None
    max_output_tokens: int | None = None
    max_input_bytes: int | None = None
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    tokens_per_day: int | None = None
    usd_per_day: int | None = None
    usd_per_month: int | None = None


@dataclass(frozen=True, slots=True)
class Key:
    """A client's credential with its rights. `ladders` None: every ladder.

    `token` and `bill_to` are this key's own for the Hugging Face backends; a token is a secret
    and stays out of `repr`. `allow_unpriced`: may use rungs of unknown price under a money limit.
    `drains`: what it asked for is read to the end when it leaves, and charged whole.

    A session has its parent's name, since their budget is one; `session` is its id, and
    `session_usd` (nano-dollars) its share of that budget.
    """

    name: str
    ladders: frozenset[str] | None = None
    tier: str = ""
    admin: bool = False
    limits: KeyLimits = KeyLimits()
    priority: int = 0
    bill_to: str | None = None
    token: str | None = field(default=None, repr=False)
    allow_unpriced: bool = False
    drains: bool = False
    session: str = ""
    session_usd: int | None = None


@dataclass(slots=True)
class Needs:
    """What a call asks of a rung. `prompt_tokens_min` seldom overestimates; `prompt_chars` is all
    of the prompt's text, `schema_chars` what else a model reads: tools, their calls, schemas.
    """

    prompt_tokens_min: int = 0
    prompt_chars: int = 0
    schema_chars: int = 0
    images: int = 0
    tools: bool = False
    vision: bool = False
    json_schema: bool = False


@dataclass(slots=True)
class ChatCall:
    """A chat request after validation. `body` is the client's JSON and is never changed, but
    for its messages: they are let go once an answer has begun that no other can go on with.

    `wants_usage` is the client's own wish for a usage chunk; `clamped_to` the output tokens that
    the key's limit left, when that is fewer than were asked for.
    """

    id: str
    key: Key
    ladder: Ladder
    policy: Policy
    body: Json
    stream: bool
    wants_usage: bool
    needs: Needs
    clamped_to: int | None = None


@dataclass(slots=True)
class EmbedCall:
    """An embeddings request after validation.

    `inputs` has one entry for each input: a text, or a list of token ids. `extra` are fields that
    Rungway has no opinion of and relays.
    """

    id: str
    key: Key
    ladder: Ladder
    policy: Policy
    inputs: list[str] | list[list[int]]
    needs: Needs
    dimensions: int | None = None
    extra: Json = field(default_factory=dict)

    @property
    def is_tokens(self) -> bool:
        return bool(self.inputs) and isinstance(self.inputs[0], list)


Call = ChatCall | EmbedCall


@dataclass(slots=True)
class Usage:
    """Tokens of one answer; `estimated` when the upstream did not report them."""

    input_tokens: int = 0
    output_tokens: int = 0
    estimated: bool = False


@dataclass(slots=True)
class Answer:
    """A whole chat answer: the bytes for the client, OpenAI-shaped, and what it used."""

    body: bytes
    usage: Usage | None = None


@dataclass(slots=True)
class Embeddings:
    """One vector for each input, in order, each as raw little-endian float32."""

    vectors: list[bytes]
    usage: Usage
