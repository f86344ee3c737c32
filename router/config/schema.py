"""Every setting of the configuration: its name, its type, its range and its default.

These are the file's own words, section by section. What follows from several settings together is
checked in `checks.py`; what the rest of the house is handed stands in `model.py`. A bound or a
pattern stands beside its setting, and `reading.py` turns it into words for the user; a pattern's
`description` says what was expected. `config/rungway.example.toml` shows each setting.
"""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

PROVIDERS_URL = "https://router.huggingface.co"
MANAGEMENT_URL = "https://api.endpoints.huggingface.cloud"

Seconds = Annotated[float, Meta(gt=0, le=86_400)]
SecondsOrZero = Annotated[float, Meta(ge=0, le=86_400)]
Count = Annotated[int, Meta(ge=1, le=1_000_000)]
Tokens = Annotated[int, Meta(ge=1, le=1_000_000_000)]
Mebibytes = Annotated[int, Meta(ge=1, le=4096)]
Usd = Annotated[float, Meta(ge=0, le=1e9)]
Share = Annotated[float, Meta(ge=0, le=1)]

# A name is shown in headers, metrics and addresses, so it is plain ASCII without blanks. A pattern
# ends in \Z, since $ would let a line break follow.
BackendName = Annotated[
    str,
    Meta(
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}\Z",
        description="a name of at most 64 letters, digits, dots, dashes and underscores",
    ),
]
LadderName = Annotated[
    str,
    Meta(
        pattern=r"^[!-~]{1,128}\Z",
        description="a name of at most 128 ASCII characters without blanks",
    ),
]
KeyName = BackendName
Tier = Annotated[
    str,
    Meta(
        pattern=r"^[A-Za-z0-9._-]{0,64}\Z",
        description="a name of at most 64 letters, digits, dots, dashes and underscores",
    ),
]
Model = Annotated[
    str,
    Meta(
        pattern=r"^[^\x00-\x20\x7f]([^\x00-\x1f\x7f]{0,510}[^\x00-\x20\x7f])?\Z",
        description="a model's name of at most 512 characters on one line",
    ),
]
Host = Annotated[
    str,
    Meta(
        pattern=r"^[A-Za-z0-9:._-]{1,255}\Z",
        description="an address or a host name, without a port",
    ),
]
Text = Annotated[
    str,
    Meta(pattern=r"^[^\x00-\x1f\x7f\ud800-\udfff]{1,4096}\Z", description="a line of text"),
]
Template = Annotated[str, Meta(max_length=65_536)]
Sha256 = Annotated[
    str,
    Meta(
        pattern=r"^[0-9a-f]{64}\Z",
        description="the 64 lowercase hexadecimal digits that `rungway keys create` prints",
    ),
]
MediaType = Annotated[
    str, Meta(pattern=r"^image/[a-z0-9.+-]{1,64}\Z", description='a media type such as "image/png"')
]
RepositoryName = Annotated[
    str,
    Meta(
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,95}/[A-Za-z0-9._-]{1,96}\Z",
        description='of the form "owner/name"',
    ),
]
ApiName = Annotated[
    str,
    Meta(pattern=r"^/[A-Za-z0-9._/-]{1,200}\Z", description='a name with its slash: "/chat"'),
]

# Given by reference; `secrets.py` says which references there are.
Token = Text
Url = Text


class Section(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Abstract: a table of the file."""


class Server(Section, frozen=True, kw_only=True):
    """[server]: the listener, and what one client may cost it."""

    host: Host = "127.0.0.1"
    port: Annotated[int, Meta(ge=0, le=65_535)] = 8484
    auth: Literal["keys", "open"] = "keys"
    workers: Annotated[int, Meta(ge=1, le=256)] = 1
    max_connections: Count = 10_000
    max_body_mib: Mebibytes = 16
    max_answer_mib: Mebibytes = 64
    max_image_mib: Mebibytes = 10
    image_types: tuple[MediaType, ...] = ("image/png", "image/jpeg", "image/webp", "image/gif")
    remote_images: bool = False
    header_s: Seconds = 10.0
    body_s: Seconds = 60.0
    idle_connection_s: Seconds = 75.0
    stall_s: Seconds = 60.0
    keepalive_s: Seconds = 15.0
    drain_s: SecondsOrZero = 30.0
    probe_s: Annotated[float, Meta(ge=1, le=3600)] = 15.0
    default_ladder: Annotated[str, Meta(max_length=128)] = ""
    cors_origins: tuple[Text, ...] = ()
    allowed_hosts: tuple[Host, ...] = ()
    open_usd_per_day: Usd = 1.0
    public_ops: bool = False
    hub_webhook_secret: Token | None = None


class State(Section, frozen=True, kw_only=True):
    """[state]: where what must outlive the process is kept. "" is the default place.

    `username` and `password` are a Valkey's; the password is given by reference.
    """

    url: Annotated[str, Meta(max_length=4096)] = ""
    username: Annotated[str, Meta(max_length=256)] = ""
    password: Token | None = None


class Cache(Section, frozen=True, kw_only=True):
    """[cache]"""

    memory_mib: Annotated[int, Meta(ge=0, le=1_048_576)] = 256
    ttl_s: Annotated[float, Meta(gt=0, le=31_536_000)] = 86_400.0
    scope: Literal["key", "shared"] = "key"
    chat: Literal["off", "deterministic", "always"] = "deterministic"


class TgiBackend(Section, frozen=True, kw_only=True, tag_field="kind", tag="tgi"):
    """A text-generation-inference server."""

    url: Url
    token: Token | None = None


class TeiBackend(Section, frozen=True, kw_only=True, tag_field="kind", tag="tei"):
    """A text-embeddings-inference server."""

    url: Url
    token: Token | None = None


class OpenAiBackend(Section, frozen=True, kw_only=True, tag_field="kind", tag="openai"):
    """Any server that speaks the OpenAI API."""

    url: Url
    token: Token | None = None


class ProvidersBackend(
    Section, frozen=True, kw_only=True, tag_field="kind", tag="inference-providers"
):
    """Hugging Face Inference Providers."""

    url: Url = PROVIDERS_URL
    token: Token | None = None
    bill_to: Text | None = None


class EndpointBackend(
    Section, frozen=True, kw_only=True, tag_field="kind", tag="inference-endpoint"
):
    """A dedicated Inference Endpoint, found by its name, its address, or both."""

    endpoint: RepositoryName | None = None
    url: Url | None = None
    token: Token | None = None
    usd_per_hour: Usd | None = None
    management_url: Url = MANAGEMENT_URL


class SpaceBackend(Section, frozen=True, kw_only=True, tag_field="kind", tag="gradio-space"):
    """A Gradio app, found by its name on the Hub or by its address."""

    space: RepositoryName | None = None
    url: Url | None = None
    token: Token | None = None
    api_name: ApiName | None = None
    inputs: dict[str, Template | int | float | bool] = {}


BackendConfig = (
    TgiBackend | TeiBackend | OpenAiBackend | ProvidersBackend | EndpointBackend | SpaceBackend
)
BACKEND_KINDS: dict[str, type[BackendConfig]] = {
    "tgi": TgiBackend,
    "tei": TeiBackend,
    "openai": OpenAiBackend,
    "inference-providers": ProvidersBackend,
    "inference-endpoint": EndpointBackend,
    "gradio-space": SpaceBackend,
}


class UsdPerMtok(Section, frozen=True, kw_only=True):
    """US dollars for a million tokens."""

    input: Usd
    output: Usd | None = None


class Rung(Section, frozen=True, kw_only=True):
    """[[ladders.NAME.rungs]]: one model on one backend."""

    backend: BackendName
    model: Model
    context: Tokens | None = None
    tools: bool | None = None
    vision: bool | None = None
    json_schema: bool | None = None
    max_in_flight: Count | None = None
    usd_per_mtok: UsdPerMtok | None = None
    vector_space: Model | None = None
    tiers: tuple[Tier, ...] = ()


class Ladder(Section, frozen=True, kw_only=True):
    """[ladders.NAME]"""

    task: Literal["chat", "embeddings"] = "chat"
    aliases: tuple[LadderName, ...] = ()
    policy: Literal["order", "cheapest", "fastest", "best"] = "order"
    connect_s: Seconds = 5.0
    first_token_s: Seconds = 10.0
    idle_s: Seconds = 30.0
    answer_s: Seconds | None = None
    total_s: Seconds | None = None
    queue_max: Annotated[int, Meta(ge=0, le=100_000)] = 64
    queue_s: SecondsOrZero = 5.0
    rescue: Literal["off", "continue"] = "off"
    commit: Literal["first", "complete"] = "first"
    escalate_on: tuple[Literal["invalid_json", "empty", "refusal", "content_filter"], ...] = ()
    hedge_after_s: SecondsOrZero = 0.0
    hedge_max_share: Share = 0.05
    vector_space: Model | None = None
    token_ids: Literal["cl100k_base", "model"] = "cl100k_base"
    rungs: Annotated[tuple[Rung, ...], Meta(min_length=1, max_length=64)]


class Limits(Section, frozen=True, kw_only=True):
    """[keys.NAME.limits]: left out is no limit of the key's own."""

    concurrent: Count | None = None
    max_input_kib: Annotated[int, Meta(ge=1, le=4_194_304)] | None = None
    max_output_tokens: Tokens | None = None
    requests_per_minute: Tokens | None = None
    tokens_per_minute: Tokens | None = None
    tokens_per_day: Tokens | None = None
    usd_per_day: Usd | None = None
    usd_per_month: Usd | None = None


class KeySettings(Section, frozen=True, kw_only=True):
    """What may be said of a key wherever it is made: nothing here is a secret or leads to one."""

    ladders: tuple[LadderName, ...] = ("*",)
    tier: Tier = ""
    admin: bool = False
    priority: Annotated[int, Meta(ge=-100, le=100)] = 0
    allow_unpriced: bool = False
    on_disconnect: Literal["cancel", "drain"] = "cancel"
    bill_to: Text | None = None
    limits: Limits = Limits()


class Key(KeySettings, frozen=True, kw_only=True):
    """[keys.NAME]: who may call, and what."""

    sha256: Sha256
    token: Token | None = None
