"""Every name of the configuration that users and other tools rely on is accepted, in one file.

The names, and what they mean, are a promise: a file like this one loads with every later version.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from router.config import schema
from router.config.load import parse
from router.config.pending import PENDING
from router.types import Price

SAMPLE = """
[server]
host = "127.0.0.1"
port = 8484
auth = "keys"
workers = 1
max_body_mib = 16
max_answer_mib = 64
max_image_mib = 10
image_types = ["image/png"]
remote_images = false
drain_s = 30
keepalive_s = 15
default_ladder = ""
cors_origins = []
allowed_hosts = []

[state]
url = "sqlite:///var/lib/rungway/state.db"

[backends.gpu]
kind = "tgi"
url = "http://127.0.0.1:8080"

[backends.vectors]
kind = "tei"
url = "http://127.0.0.1:3000"

[backends.local]
kind = "openai"
url = "http://127.0.0.1:8000"

[backends.hf]
kind = "inference-providers"
url = "https://router.huggingface.co"
token = "env:HF_TOKEN"
bill_to = "acme"

[backends.big]
kind = "inference-endpoint"
endpoint = "acme/llama-70b"
token = "env:HF_TOKEN"
usd_per_hour = 2.5
management_url = "https://api.endpoints.huggingface.cloud"

[backends.dedicated]
kind = "inference-endpoint"
url = "https://x.endpoints.huggingface.cloud"

[backends.space]
kind = "gradio-space"
space = "owner/name"
api_name = "/chat"
inputs = { message = "{transcript}", system_prompt = "{system}" }

[backends.app]
kind = "gradio-space"
url = "http://127.0.0.1:7860"

[ladders.assistant]
task = "chat"
aliases = ["gpt-4o-mini"]
policy = "order"
connect_s = 5
first_token_s = 10
idle_s = 30
answer_s = 120
total_s = 600
queue_max = 64
queue_s = 5
rescue = "off"
commit = "first"
escalate_on = []
hedge_after_s = 0
hedge_max_share = 0.05
[[ladders.assistant.rungs]]
backend = "gpu"
model = "meta-llama/Llama-3.1-8B-Instruct"
context = 8192
tools = true
vision = false
json_schema = true
max_in_flight = 32
[[ladders.assistant.rungs]]
backend = "hf"
model = "meta-llama/Llama-3.3-70B-Instruct:cheapest"
usd_per_mtok = { input = 0.13, output = 0.40 }
tiers = ["premium"]

[ladders.embed]
task = "embeddings"
[[ladders.embed.rungs]]
backend = "vectors"
model = "BAAI/bge-m3"
vector_space = "BAAI/bge-m3"

[keys.alice]
sha256 = "2bd806c97f0e00af1a1fc3328fa763a9269723c8db8fac4f93af71db186d6e90"
ladders = ["assistant", "embed"]
tier = "premium"
admin = false
priority = 0
allow_unpriced = false
on_disconnect = "cancel"
bill_to = "acme"
token = "env:ALICE_TOKEN"
[keys.alice.limits]
usd_per_day = 5.0
usd_per_month = 50.0
tokens_per_minute = 100000
tokens_per_day = 2000000
requests_per_minute = 60
concurrent = 8
max_output_tokens = 2048
max_input_kib = 256

[cache]
memory_mib = 256
ttl_s = 86400
scope = "key"
chat = "deterministic"
"""
ENVIRON = {"HF_TOKEN": "hf_x", "ALICE_TOKEN": "hf_y", "HOME": "/home/u"}

# The other words that a setting takes.
WORDS = [
    ('auth = "keys"', 'auth = "open"'),
    ('url = "sqlite:///var/lib/rungway/state.db"', 'url = "valkey://host:6379/0"'),
    ('url = "sqlite:///var/lib/rungway/state.db"', 'url = "memory://"'),
    *(('policy = "order"', f'policy = "{word}"') for word in ("cheapest", "fastest", "best")),
    ('rescue = "off"', 'rescue = "continue"'),
    ('commit = "first"', 'commit = "complete"'),
    (
        "escalate_on = []",
        'escalate_on = ["invalid_json", "empty", "refusal", "content_filter"]',
    ),
    ('on_disconnect = "cancel"', 'on_disconnect = "drain"'),
    ('scope = "key"', 'scope = "shared"'),
    *(('chat = "deterministic"', f'chat = "{word}"') for word in ("off", "always")),
    ('default_ladder = ""', 'default_ladder = "assistant"'),
    ("cors_origins = []", 'cors_origins = ["https://app.example.org"]'),
    ("allowed_hosts = []", 'allowed_hosts = ["router.example.org"]'),
    ('ladders = ["assistant", "embed"]', 'ladders = ["*"]'),
]


def test_the_whole_sample_loads_with_its_values() -> None:
    config = parse(SAMPLE, "sample", ENVIRON)
    assert {type(backend) for backend in config.backends.values()} == set(
        schema.BACKEND_KINDS.values()
    )
    chat, embed = config.ladders["assistant"], config.ladders["embed"]
    assert chat.aliases == ("gpt-4o-mini",)
    assert chat.rungs[1].price == Price(130_000, 400_000)
    assert embed.vector_space == "BAAI/bge-m3"
    (key,) = config.keys.values()
    assert (key.name, key.token) == ("alice", "hf_y")
    assert key.ladders == frozenset({"assistant", "embed"})
    assert key.limits.max_input_bytes == 256 << 10
    # Nothing is warned of but what has no effect in this version.
    assert config.warnings
    assert all(any(f": {why}" in one for why in PENDING.values()) for one in config.warnings)


@pytest.mark.parametrize(("given", "other"), WORDS, ids=[other for _, other in WORDS])
def test_each_other_word_is_taken(given: str, other: str) -> None:
    assert SAMPLE.count(given) == 1
    parse(SAMPLE.replace(given, other), "sample", ENVIRON)


@pytest.mark.parametrize("reference", ["file:{folder}/hf", "credential:hf"])
def test_a_token_may_be_a_file_or_a_credential(reference: str, tmp_path: Path) -> None:
    (tmp_path / "hf").write_text("hf_x\n")
    text = SAMPLE.replace("env:HF_TOKEN", reference.format(folder=tmp_path))
    parse(text, "sample", {**ENVIRON, "HF_TOKEN": "", "CREDENTIALS_DIRECTORY": str(tmp_path)})
