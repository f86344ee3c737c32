"""Local servers are told apart by what they answer, on any port, without a call that costs.

Each kind is a table of pages on a real socket, in the words of that server's own sources. Whatever
is found becomes a configuration that loads.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.config import schema
from router.config.load import parse
from router.config.model import Config
from router.hub.detect import Found, FoundModel, detect, usual_ports
from router.hub.zero_config import configuration_for
from router.transport.http import HttpClient
from router.types import Task
from tests.fakes.upstream import FakeUpstream, Handler, Reply, Request

# A page: a JSON value, a text, or either with a status.
Pages = dict[str, Any]
MISSING = (404, {"detail": "Not Found"})


def server(pages: Pages, missing: Any = MISSING) -> Handler:
    async def handle(request: Request, reply: Reply) -> None:
        page = pages.get(f"{request.method} {request.path}", missing)
        status, value = page if isinstance(page, tuple) else (200, page)
        if isinstance(value, bytes):
            await reply.whole(value, status, {"content-type": "text/plain"})
        else:
            await reply.json(value, status)

    return handle


def models(*entries: dict[str, Any]) -> dict[str, Any]:
    return {"object": "list", "data": [{"object": "model", "created": 1, **e} for e in entries]}


TGI_INFO = {
    "model_id": "org/m",
    "model_sha": None,
    "max_concurrent_requests": 128,
    "max_best_of": 2,
    "max_input_tokens": 4095,
    "max_total_tokens": 4096,
    "router": "text-generation-router",
    "version": "3.3.6",
}
TEI_INFO = {
    "model_id": "BAAI/bge-m3",
    "model_type": {"embedding": {"pooling": "cls"}},
    "max_input_length": 8192,
    "max_client_batch_size": 32,
    "version": "1.9.0",
}
LLAMA_ERROR = {"error": {"code": 404, "message": "File Not Found", "type": "not_found_error"}}
LLAMA = {
    "GET /v1/models": models(
        {"id": "smollm2", "owned_by": "llamacpp", "meta": {"n_ctx": 2048, "n_ctx_train": 8192}}
    ),
    "GET /props": {"default_generation_settings": {"n_ctx": 1024}, "total_slots": 2},
}
NO_EMBEDDINGS = (501, {"error": {"code": 501, "message": "Start it with `--embeddings`"}})
NO_INPUT = (400, {"error": {"code": 400, "message": '"input" or "content" must be provided'}})
OLLAMA = {
    "GET /v1/models": models(
        {"id": "llama3.2:latest", "owned_by": "library"},
        {"id": "all-minilm:latest", "owned_by": "library"},
        {"id": "vectors:latest", "owned_by": "me"},
    ),
    "GET /api/version": {"version": "0.12.0"},
    "GET /": b"Ollama is running",
    "GET /api/tags": {
        "models": [
            {"name": "llama3.2:latest", "details": {"family": "llama", "families": ["llama"]}},
            {"name": "all-minilm:latest", "details": {"family": "bert", "families": ["bert"]}},
            {"name": "vectors:latest", "details": {"family": "nomic-bert", "families": None}},
        ]
    },
}
LM_STUDIO = {
    "GET /v1/models": models(
        {"id": "qwen", "owned_by": "organization_owner"},
        {"id": "nomic", "owned_by": "organization_owner"},
    ),
    "GET /api/v0/models": {
        "object": "list",
        "data": [
            {"id": "qwen", "type": "llm", "state": "not-loaded", "max_context_length": 32768},
            {"id": "nomic", "type": "embeddings", "state": "not-loaded"},
            {
                "id": "gemma",
                "type": "vlm",
                "state": "loaded",
                "max_context_length": 8192,
                "loaded_context_length": 4096,
            },
        ],
    },
}
GRADIO_CONFIG = {
    "version": "5.50.0",
    "api_prefix": "/gradio_api",
    "title": "My Chat App!",
    "space_id": None,
    "components": [],
    "dependencies": [{"id": 0, "api_name": "lambda"}, {"id": 1, "api_name": "chat"}],
}

KINDS: list[tuple[str, Pages, str, str, list[FoundModel]]] = [
    ("tgi", {"GET /info": TGI_INFO}, "tgi", "TGI", [FoundModel("org/m", 4096, "chat")]),
    (
        "tgi-1",
        {
            "GET /info": {
                **{name: value for name, value in TGI_INFO.items() if name != "router"},
                "max_input_length": 1024,
            }
        },
        "tgi",
        "TGI",
        [FoundModel("org/m", 4096, "chat")],
    ),
    (
        "tgi-without-info",
        {"GET /v1/models": models({"id": "org/m", "owned_by": "org/m", "created": 0})},
        "tgi",
        "TGI",
        [FoundModel("org/m", None, "chat")],
    ),
    (
        "tei",
        {"GET /info": TEI_INFO},
        "tei",
        "TEI",
        [FoundModel("BAAI/bge-m3", 8192, "embeddings")],
    ),
    (
        "tei-reranker",
        {"GET /info": {**TEI_INFO, "model_type": {"reranker": {}}}},
        "tei",
        "TEI",
        [FoundModel("BAAI/bge-m3", 8192, None)],
    ),
    (
        "vllm",
        {
            "GET /v1/models": models({"id": "org/m", "owned_by": "vllm", "max_model_len": 4096}),
            "GET /version": {"version": "0.11.0"},
        },
        "openai",
        "vLLM",
        [FoundModel("org/m", 4096, "chat")],
    ),
    (
        "vllm-embedder",
        {"GET /v1/models": models({"id": "BAAI/bge-m3", "owned_by": "vllm"})},
        "openai",
        "vLLM",
        [FoundModel("BAAI/bge-m3", None, "embeddings")],
    ),
    (
        "vllm-of-a-fork",
        {
            "GET /v1/models": models({"id": "m", "owned_by": "acme", "max_model_len": 10}),
            "GET /version": {"version": "1"},
        },
        "openai",
        "vLLM",
        [FoundModel("m", 10, "chat")],
    ),
    (
        "sglang",
        {
            "GET /v1/models": models({"id": "bge", "owned_by": "sglang", "max_model_len": 99}),
            "GET /model_info": {"model_path": "bge", "is_generation": True},
        },
        "openai",
        "SGLang",
        [FoundModel("bge", 99, "chat")],
    ),
    (
        "sglang-embedder",
        {
            "GET /v1/models": models({"id": "m", "owned_by": "sglang"}),
            "GET /get_model_info": {"is_generation": False},
        },
        "openai",
        "SGLang",
        [FoundModel("m", None, "embeddings")],
    ),
    (
        "sglang-silent",
        {"GET /v1/models": models({"id": "e5-mistral", "owned_by": "sglang"})},
        "openai",
        "SGLang",
        [FoundModel("e5-mistral", None, "embeddings")],
    ),
    (
        "llama.cpp",
        {**LLAMA, "POST /v1/embeddings": NO_EMBEDDINGS},
        "openai",
        "llama.cpp",
        [FoundModel("smollm2", 1024, "chat")],
    ),
    (
        "llama.cpp-embedder",
        {**LLAMA, "POST /v1/embeddings": NO_INPUT},
        "openai",
        "llama.cpp",
        [FoundModel("smollm2", 1024, "embeddings")],
    ),
    (
        "llama.cpp-many",
        {
            "GET /v1/models": models(
                {"id": "a", "owned_by": "llamacpp", "meta": {"n_ctx": 5}},
                {"id": "b-embed", "owned_by": "llamacpp", "meta": None},
            )
        },
        "openai",
        "llama.cpp",
        [FoundModel("a", 5, "chat"), FoundModel("b-embed", None, "embeddings")],
    ),
    (
        "llama.cpp-renamed",
        {
            **LLAMA,
            "GET /v1/models": models({"id": "m", "owned_by": "x"}),
            "POST /v1/embeddings": NO_EMBEDDINGS,
        },
        "openai",
        "llama.cpp",
        [FoundModel("m", 1024, "chat")],
    ),
    (
        "llama.cpp-loading",
        {"GET /v1/models": (503, {"error": {"type": "unavailable_error", "code": 503}})},
        "openai",
        "llama.cpp",
        [],
    ),
    (
        "ollama",
        OLLAMA,
        "openai",
        "Ollama",
        [
            FoundModel("llama3.2:latest", None, "chat"),
            FoundModel("all-minilm:latest", None, "embeddings"),
            FoundModel("vectors:latest", None, "embeddings"),
        ],
    ),
    (
        "ollama-empty",
        {**OLLAMA, "GET /v1/models": {"object": "list", "data": None}},
        "openai",
        "Ollama",
        [],
    ),
    (
        "lm-studio",
        LM_STUDIO,
        "openai",
        "LM Studio",
        [
            FoundModel("gemma", 4096, "chat"),
            FoundModel("qwen", 32768, "chat"),
            FoundModel("nomic", None, "embeddings"),
        ],
    ),
    (
        "transformers",
        {"GET /v1/models": models({"id": "org/m", "owned_by": "org", "created": 1.5})},
        "openai",
        "transformers serve",
        [FoundModel("org/m", None, "chat")],
    ),
    (
        "unknown",
        {"GET /v1/models": models({"id": "m", "owned_by": "who"}, {"id": "gte-large"})},
        "openai",
        "an OpenAI-like server",
        [FoundModel("m", None, "chat"), FoundModel("gte-large", None, "embeddings")],
    ),
    ("unknown-empty", {"GET /v1/models": models()}, "openai", "an OpenAI-like server", []),
    (
        "gradio",
        {"GET /config": GRADIO_CONFIG},
        "gradio-space",
        "Gradio",
        [FoundModel("my-chat-app", None, "chat")],
    ),
    (
        "gradio-of-a-space",
        {
            "GET /config": {
                **GRADIO_CONFIG,
                "space_id": "acme/app",
                "dependencies": [{"api_name": "chat"}, {"api_name": "/embed"}, {"api_name": False}],
            }
        },
        "gradio-space",
        "Gradio",
        [FoundModel("acme/app", None, "chat"), FoundModel("acme/app", None, "embeddings")],
    ),
    (
        "gradio-of-other-functions",
        {"GET /config": {**GRADIO_CONFIG, "dependencies": [{"api_name": "predict"}]}},
        "gradio-space",
        "Gradio",
        [],
    ),
    (
        "token",
        {"GET /info": (401, b""), "GET /v1/models": (401, b"")},
        "",
        "a server behind a token",
        [],
    ),
]


@pytest.fixture
async def client() -> AsyncIterator[HttpClient]:
    client = HttpClient()
    yield client
    await client.aclose()


@pytest.mark.parametrize(
    ("pages", "kind", "name", "found_models"),
    [case[1:] for case in KINDS],
    ids=[case[0] for case in KINDS],
)
async def test_a_server_is_known_by_what_it_answers(
    client: HttpClient, pages: Pages, kind: str, name: str, found_models: list[FoundModel]
) -> None:
    async with FakeUpstream(server(pages)) as upstream:
        (found,) = await detect(client, [upstream.port])
        assert found.url == upstream.url
    assert (found.kind, found.server) == (kind, name)
    assert list(found.models) == found_models
    is_usable = any(model.task for model in found.models)
    assert bool(found.note) is not is_usable
    # Nothing was generated, loaded or billed, and SGLang's /health runs a token.
    asked = {(request.method, request.path) for request in upstream.requests}
    posted = [request for request in upstream.requests if request.method != "GET"]
    assert all((one.path, one.body) == ("/v1/embeddings", b"{}") for one in posted)
    assert ("GET", "/health") not in asked
    # Whatever it is, a daemon can start with it.
    loaded(configuration_for([found], has_token=False))


@pytest.mark.parametrize(
    ("pages", "missing"),
    [
        ({"GET /v1/models": models({"id": "chat", "owned_by": "rungway"})}, MISSING),
        ({}, MISSING),
        ({}, (200, b"<html>a page for every path</html>")),
        ({}, {"status": "ok"}),
        ({}, [1, 2]),
        ({}, (500, b"")),
        ({}, (302, b"")),
        ({"GET /info": {"model_type": {}, "model_id": 3}}, MISSING),
        ({"GET /config": {"version": "1", "dependencies": {}}}, MISSING),
        ({"GET /api/version": {"version": "1"}}, MISSING),
    ],
    ids=["rungway", "other", "pages", "ok", "list", "broken", "moved", "app", "config", "version"],
)
async def test_what_is_no_model_server_is_not_found(
    client: HttpClient, pages: Pages, missing: Any
) -> None:
    async with FakeUpstream(server(pages, missing)) as upstream:
        assert await detect(client, [upstream.port]) == []


async def hangs(request: Request, reply: Reply) -> None:
    await reply.client_left()


async def never_ends(request: Request, reply: Reply) -> None:
    await reply.start(sse=False)
    while True:
        await reply.send(b"x" * 65536)


async def speaks_something_else(request: Request, reply: Reply) -> None:
    await reply.raw(b"SSH-2.0-OpenSSH_9.2\r\n")
    reply.close()


async def cuts(request: Request, reply: Reply) -> None:
    reply.cut()


async def hangs_later(request: Request, reply: Reply) -> None:
    if request.path == "/info":
        await reply.json({})
    else:
        await reply.client_left()


@pytest.mark.parametrize("handler", [hangs, hangs_later, never_ends, speaks_something_else, cuts])
async def test_a_stranger_costs_little_time_and_hides_no_neighbour(
    client: HttpClient, handler: Handler
) -> None:
    async with (
        FakeUpstream(handler) as stranger,
        FakeUpstream(server({"GET /info": TGI_INFO})) as upstream,
        asyncio.timeout(2.0),
    ):
        found = await detect(client, [stranger.port, upstream.port], question_s=0.2)
    assert [one.server for one in found] == ["TGI"]
    assert len(stranger.requests) <= 3


async def test_where_nothing_listens_nothing_is_found(client: HttpClient) -> None:
    async with FakeUpstream(hangs) as upstream:
        port = upstream.port
    assert await detect(client, [port, port]) == []


async def test_found_in_the_order_of_the_ports_and_each_once(client: HttpClient) -> None:
    async with (
        FakeUpstream(server({"GET /info": TGI_INFO})) as first,
        FakeUpstream(server({"GET /info": TEI_INFO})) as second,
    ):
        found = await detect(client, [second.port, first.port, second.port])
    assert [one.server for one in found] == ["TEI", "TGI"]


async def test_the_count_and_the_names_of_models_are_bounded(client: HttpClient) -> None:
    names = ["", "a\nb", " a", "x" * 600, 3, None, *(f"m{i}" for i in range(1000))]
    listed = models(*({"id": name, "max_model_len": -1} for name in names))
    async with FakeUpstream(server({"GET /v1/models": listed})) as upstream:
        (found,) = await detect(client, [upstream.port])
    assert 100 < len(found.models) <= 200
    assert found.models[0] == FoundModel("m0", None, "chat")


def test_the_usual_ports_are_looked_at_once_each() -> None:
    assert len(set(usual_ports())) == len(usual_ports()) == 9


# --- what was found becomes a configuration -----------------------------------------------------


def loaded(text: str) -> Config:
    return parse(text, "found", {"HF_TOKEN": "hf_x", "HOME": "/h"})


def rungs(config: Config, ladder: str) -> list[str]:
    return [rung.name for rung in config.ladders[ladder].rungs]


LOCAL_CHAT = Found("http://127.0.0.1:8000", "openai", "vLLM", (FoundModel("org/m", 4096, "chat"),))
BGE = (FoundModel("BAAI/bge-m3", 8192, "embeddings"),)
LOCAL_EMBED = Found("http://127.0.0.1:3000", "tei", "TEI", BGE)


def test_local_first_and_providers_next() -> None:
    config = loaded(configuration_for([LOCAL_CHAT, LOCAL_EMBED], has_token=True))
    assert config.server.auth == "open"
    assert rungs(config, "chat") == [
        "vllm/org/m",
        "hf/meta-llama/Llama-3.3-70B-Instruct:cheapest",
    ]
    assert rungs(config, "embed") == ["tei/BAAI/bge-m3", "hf/BAAI/bge-m3"]
    assert config.ladders["embed"].task is Task.EMBEDDINGS
    assert isinstance(config.backends["hf"], schema.ProvidersBackend)
    assert config.warnings == ()


def test_without_a_token_only_what_is_here() -> None:
    config = loaded(configuration_for([LOCAL_CHAT], has_token=False))
    assert set(config.backends) == {"vllm"}
    assert set(config.ladders) == {"chat"}


def test_a_token_alone_is_enough() -> None:
    config = loaded(configuration_for([], has_token=True))
    assert set(config.ladders) == {"chat", "embed"}


def test_nothing_at_all_says_what_to_do() -> None:
    text = configuration_for([], has_token=False)
    assert "No model server answered" in text
    assert loaded(text).ladders == {}


def test_vectors_of_two_models_never_share_a_ladder() -> None:
    other = Found(
        "http://127.0.0.1:11434",
        "openai",
        "Ollama",
        (FoundModel("all-minilm:latest", None, "embeddings"),),
    )
    text = configuration_for([other, LOCAL_EMBED], has_token=True)
    assert rungs(loaded(text), "embed") == ["ollama/all-minilm:latest"]
    assert "# left out: tei has BAAI/bge-m3" in text
    assert "# left out: Inference Providers" in text


def test_a_second_embedder_of_the_same_model_joins() -> None:
    ollama = (FoundModel("nomic", None, "embeddings"), *BGE)
    second = Found("http://127.0.0.1:11434", "openai", "Ollama", ollama)
    config = loaded(configuration_for([LOCAL_EMBED, second], has_token=False))
    assert rungs(config, "embed") == ["tei/BAAI/bge-m3", "ollama/BAAI/bge-m3"]


def test_two_servers_of_one_kind_have_two_names_and_further_models_are_told() -> None:
    many = tuple(FoundModel(f"m{i}", None, "chat") for i in range(30))
    second = Found("http://127.0.0.1:8001", "openai", "vLLM", many)
    text = configuration_for([LOCAL_CHAT, second], has_token=False)
    assert set(loaded(text).backends) == {"vllm", "vllm-8001"}
    assert "also there: m1, m2" in text
    assert "and 9 more" in text


NAMES = st.text(min_size=1, max_size=20).filter(lambda s: s.isprintable() and s == s.strip())
MODELS = st.builds(
    FoundModel,
    NAMES,
    st.none() | st.integers(1, 10**9),
    st.sampled_from(["chat", "embeddings", None]),
)
KINDS_AND_NAMES = st.sampled_from(
    sorted({(kind, name) for _, _, kind, name, _ in KINDS}),
)


@st.composite
def servers(draw: st.DrawFn) -> Found:
    kind, name = draw(KINDS_AND_NAMES)
    task = {"tgi": "chat", "tei": "embeddings"}.get(kind)
    found = draw(st.lists(MODELS, max_size=4, unique_by=lambda model: model.id))
    fitting = [m for m in found if task is None or m.task in (task, None)]
    port = draw(st.integers(1, 65535))
    return Found(f"http://127.0.0.1:{port}", kind, name, tuple(fitting), draw(st.text(max_size=9)))


@given(st.lists(servers(), max_size=5), st.booleans())
def test_whatever_is_found_makes_a_configuration_that_loads(
    found: Sequence[Found], has_token: bool
) -> None:
    config = loaded(configuration_for(found, has_token))
    tasks = {model.task for one in found if one.kind for model in one.models}
    assert ("chat" in config.ladders) is (has_token or "chat" in tasks)
    assert ("embed" in config.ladders) is (has_token or "embeddings" in tasks)
