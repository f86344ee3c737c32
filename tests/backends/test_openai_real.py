"""The `openai` backend against the real llama.cpp server: what the contract's fake cannot tell."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

import pytest

from router.backends.base import State
from router.backends.openai import OpenAiBackend
from router.config.secrets import Credential
from router.core.vectors import cosine, unpack
from router.demo.models import CONTEXT_TOKENS, MODEL
from router.errors import PromptTooLong
from router.hub.detect import detect
from router.transport.http import HttpClient
from router.types import Rung
from tests.backends.contract import chat_attempt, embed_attempt, read_to_end, text_of

RUNG = Rung("real", MODEL)


@asynccontextmanager
async def backend_of(url: str) -> AsyncIterator[OpenAiBackend]:
    client = HttpClient()
    try:
        yield OpenAiBackend("real", url, client, credential=Credential())
    finally:
        await client.aclose()


async def test_chat_whole_and_streamed_say_the_same(real_models: Mapping[str, str]) -> None:
    fields: dict[str, Any] = {"max_tokens": 12, "temperature": 0, "seed": 1}
    async with backend_of(real_models["chat"]) as backend:
        answer = await backend.complete_chat(chat_attempt(RUNG, **fields))
        stream = await backend.stream_chat(chat_attempt(RUNG, stream=True, **fields))
        text, watch = text_of(await read_to_end(stream))
    whole = json.loads(answer.body)["choices"][0]["message"]["content"]
    assert text == whole != ""
    assert watch.is_complete
    assert watch.usage is not None
    assert watch.usage == answer.usage


async def test_the_context_overflow_is_known_by_its_words(real_models: Mapping[str, str]) -> None:
    long = [{"role": "user", "content": "word " * (CONTEXT_TOKENS + 500)}]
    async with backend_of(real_models["chat"]) as backend:
        for stream in (False, True):
            attempt = chat_attempt(RUNG, stream=stream)
            attempt.call.body["messages"] = long
            with pytest.raises(PromptTooLong):
                await (backend.stream_chat if stream else backend.complete_chat)(attempt)


async def test_an_overlong_embedding_input_is_known_too(real_models: Mapping[str, str]) -> None:
    async with backend_of(real_models["embed"]) as backend:
        with pytest.raises(PromptTooLong):
            await backend.embed(embed_attempt(RUNG, ["word " * (CONTEXT_TOKENS + 500)]))


async def test_vectors_mean_something(real_models: Mapping[str, str]) -> None:
    texts = ["a small cat", "a little kitten", "quarterly interest rates"]
    async with backend_of(real_models["embed"]) as backend:
        answer = await backend.embed(embed_attempt(RUNG, texts))
    cat, kitten, rates = (unpack(raw) for raw in answer.vectors)
    assert len(cat) == 576
    assert cosine(cat, kitten) > cosine(cat, rates)
    assert answer.usage.input_tokens > 0
    assert not answer.usage.estimated


async def test_token_ids_are_understood(real_models: Mapping[str, str]) -> None:
    async with backend_of(real_models["embed"]) as backend:
        answer = await backend.embed(embed_attempt(RUNG, [[1, 2, 3], [4]]))
    assert [len(raw) for raw in answer.vectors] == [576 * 4] * 2


async def test_a_closed_stream_frees_the_servers_slot(real_models: Mapping[str, str]) -> None:
    """More streams are left half-read than the server has slots, and it still answers."""
    async with backend_of(real_models["chat"]) as backend:
        for _ in range(6):
            attempt = chat_attempt(RUNG, stream=True, max_tokens=1500, ignore_eos=True)
            stream = await backend.stream_chat(attempt)
            await stream.read()
            stream.close()
        async with asyncio.timeout(10):
            await backend.complete_chat(chat_attempt(RUNG, max_tokens=1))


async def test_the_probe_learns_the_context(real_models: Mapping[str, str]) -> None:
    async with backend_of(real_models["chat"]) as backend:
        found = await backend.probe()
    assert found.state is State.UP
    assert found.models[MODEL].context == CONTEXT_TOKENS


async def test_it_is_detected_on_its_odd_port(real_models: Mapping[str, str]) -> None:
    ports = [int(url.rpartition(":")[2]) for url in real_models.values()]
    client = HttpClient()
    try:
        found = await detect(client, ports)
    finally:
        await client.aclose()
    assert {one.url.rpartition(":")[2] for one in found} == {str(port) for port in ports}
    assert {one.kind for one in found} == {"openai"}
    assert {one.server for one in found} == {"llama.cpp"}
    assert [one.models[0].id for one in found] == [MODEL, MODEL]
