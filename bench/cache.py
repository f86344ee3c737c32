"""`python -m bench.cache`: what is gained by asking once, and what using an answer again costs.

All in one process, over real sockets: clients, Rungway and a model server that takes one request at
a time for a fixed while. What costs CPU is measured without sockets, in the parts themselves; bytes
of memory are what Python's allocator says. Numbers depend on the machine, ratios less so.

    --quick         fewer rounds
    --valkey URL    the second tier in this server too, as valkey://127.0.0.1:6379/0
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import tempfile
import time
import tracemalloc
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import orjson

from router.core import embeddings, vectors
from router.core.cache_key import CacheControl
from router.flow.cache import Cache, CacheRules, Slot
from router.flow.embedding import Vectors
from router.flow.observe import Record
from router.flow.second_tier import SecondTier
from router.flow.sink import Provenance
from router.flow.tasks import Tasks
from router.store.open import open_store
from router.types import (
    Answer,
    ChatCall,
    EmbedCall,
    Embeddings,
    Key,
    Ladder,
    Needs,
    Policy,
    Rung,
    Task,
    Usage,
)
from tests.fakes.counting import Counting, floats_of
from tests.fakes.upstream import FakeUpstream, Reply, Request
from tests.house import House, open_house

_CALLERS = 64
_REQUEST_S = 0.010
_WIDTH = 384
_ANY = CacheControl()
_RULES = CacheRules("deterministic", False, {})
_RUNG = Rung("gpu", "org/m")
_KEY = Key("alice")
_CHAT = Ladder("chat", Task.CHAT, (_RUNG,))
_EMBED = Ladder("embed", Task.EMBEDDINGS, (_RUNG,))


class OneAtATime(Counting):
    """A model server that does one request after another, each in the same time."""

    def __init__(self) -> None:
        super().__init__()
        self._turn = asyncio.Lock()

    async def __call__(self, request: Request, reply: Reply) -> None:
        if request.method != "GET":
            async with self._turn:
                await asyncio.sleep(_REQUEST_S)
        await super().__call__(request, reply)


@asynccontextmanager
async def _serving(cache: str = "") -> AsyncIterator[tuple[House, OneAtATime, str]]:
    model = OneAtATime()
    async with FakeUpstream(model) as up:
        text = (
            f'[server]\nauth = "open"\n[cache]\n{cache}\n'
            f'[backends.b]\nkind = "openai"\nurl = "{up.url}"\n'
            "[ladders.chat]\nqueue_max = 5000\nqueue_s = 60\n"
            'rungs = [{ backend = "b", model = "org/m" }]\n'
            '[ladders.embed]\ntask = "embeddings"\nqueue_max = 5000\nqueue_s = 60\n'
            'rungs = [{ backend = "b", model = "org/m" }]\n'
        )
        async with open_house(text) as house:
            yield house, model, up.url


async def _throughput(ask: Callable[[str], Awaitable[Any]], requests: int, callers: int) -> float:
    left = iter(range(requests))

    async def caller() -> None:
        for number in left:
            await ask(f"text {number}")

    began = time.perf_counter()
    await asyncio.gather(*(caller() for _ in range(callers)))
    return requests / (time.perf_counter() - began)


def _to(house: House, url: str) -> Callable[[str], Awaitable[Any]]:
    async def ask(text: str) -> Any:
        body = orjson.dumps({"model": "embed", "input": [text]})
        async with house.client.post(f"{url}/v1/embeddings", data=body) as answer:
            found = orjson.loads(await answer.read())
            assert found["data"][0]["embedding"] == floats_of(text)
            return found

    return ask


async def gain(quick: bool) -> None:
    """Batches, one call for many, and only the new texts."""
    requests = 256 if quick else 1024
    async with _serving("memory_mib = 0") as (house, model, url):
        direct = await _throughput(_to(house, url), requests // 4, _CALLERS)
        ours = await _throughput(_to(house, house.url), requests, _CALLERS)
        _line(f"{_CALLERS} callers, one input each, {_REQUEST_S * 1000:g} ms a request upstream")
        _line(
            f"  without batches {direct:8.0f} inputs/s",
            f"with {ours:8.0f}",
            f"x{ours / direct:.1f}",
        )
        alone = [await _throughput(_to(house, where), 30, 1) for where in (url, house.url)]
        waits = [1000 / rate for rate in alone]
        words = f"  a lone caller waits {waits[0]:.2f} ms direct, {waits[1]:.2f} ms through Rungway"
        _line(words, f"{len(model.embeds)} requests upstream in all")
    async with _serving() as (house, model, _):
        said = {"model": "chat", "messages": [{"role": "user", "content": "Hi"}], "temperature": 0}
        asks: tuple[tuple[str, dict[str, Any]], ...] = (
            ("/v1/chat/completions", said),
            ("/v1/chat/completions", {**said, "stream": True}),
            ("/v1/embeddings", {"model": "embed", "input": ["a", "b"]}),
        )
        for path, body in asks:
            before = len(model.chats) + len(model.embeds)
            body["seed" if "messages" in body else "made_up"] = before
            answers = await asyncio.gather(*(house.post(path, body) for _ in range(1000)))
            assert all(status == 200 for status, _, _ in answers)
            asked = len(model.chats) + len(model.embeds) - before
            _line(f"1,000 identical concurrent requests to {path}: {asked} upstream")
    async with _serving() as (house, model, _):
        corpus = [f"text {number}" for number in range(1000)]
        for texts in (corpus, [*corpus[:800], *(f"new {number}" for number in range(200))]):
            before = len(model.inputs)
            for at in range(0, 1000, 50):
                body = {"model": "embed", "input": texts[at : at + 50]}
                status, _, _ = await house.post("/v1/embeddings", body)
                assert status == 200
            _line(f"a corpus of 1,000 texts: {len(model.inputs) - before} inputs upstream")


class _Nowhere:
    """A sink that only renders."""

    is_committed = is_started = False

    def __init__(self, *, base64: bool = False) -> None:
        self._base64 = base64
        self.body = b""

    async def send_answer(self, answer: Answer, provenance: Provenance) -> None:
        self.body = answer.body

    async def send_embeddings(self, answer: Embeddings, provenance: Provenance) -> None:
        self.body = embeddings.write_openai(answer, model="embed", base64=self._base64)


async def _us(work: Callable[[], Awaitable[Any]], rounds: int) -> float:
    """Microseconds of CPU a round, the best of five."""
    found = []
    for _ in range(5):
        began = time.process_time()
        for _ in range(rounds):
            await work()
        found.append((time.process_time() - began) / rounds * 1e6)
    return min(found)


def _chat(seed: int = 0) -> ChatCall:
    body = {"model": "chat", "messages": [{"role": "user", "content": "word " * 200}], "seed": seed}
    return ChatCall("id", _KEY, _CHAT, Policy.ORDER, body, False, False, Needs())


def _embed(count: int, base: int = 0) -> EmbedCall:
    texts = [f"text {base + number} " + "word " * 40 for number in range(count)]
    return EmbedCall("id", _KEY, _EMBED, Policy.ORDER, texts, Needs())


def _slot(cache: Cache, call: ChatCall) -> Slot:
    slot = cache.slot(call, _ANY, _RULES)
    assert slot is not None
    return slot


def _keys(cache: Cache, call: EmbedCall) -> list[bytes]:
    keys = cache.input_keys(call, _ANY, _RULES)
    assert keys is not None
    return keys


async def cost(quick: bool) -> None:
    """CPU of a hit, and bytes of an entry."""
    rounds = 200 if quick else 2000
    cache = Cache(256 << 20, 3600.0)
    body = orjson.dumps({"choices": [{"message": {"content": "word " * 300}}]})
    call = _chat()
    cache.keep(_slot(cache, call), _RUNG, body, Usage(5, 7), 100)
    spent = await _us(lambda: cache.find(_slot(cache, call)), rounds)
    _line(f"a chat hit: {spent:.1f} us to make the key and find the answer")
    for count in (1, 32, 512):
        call_of = _embed(count)
        keys = _keys(cache, call_of)
        cache.keep_vectors(keys, [_vector(n) for n in range(count)], _RUNG, 100, time.time())

        async def find(call_of: EmbedCall = call_of) -> list[bytes | None]:
            return await cache.find_vectors(_keys(cache, call_of), _ANY)

        found = await _us(find, max(5, rounds // count))
        told = []
        for base64 in (True, False):

            async def tell(call_of: EmbedCall = call_of, base64: bool = base64) -> None:
                keys = _keys(cache, call_of)
                known = await cache.find_vectors(keys, _ANY)
                record, sink = Record("id", "/v1/embeddings"), _Nowhere(base64=base64)
                await Vectors(sink, cache, call_of, keys, known, record).send_known()  # type: ignore[arg-type]

            told.append(await _us(tell, max(5, rounds // count)))
        words = f"  {count:4} inputs: {found:8.1f} us to find; with the answer written as base64"
        _line(words, f"{told[0]:8.1f} us, as floats {told[1]:8.1f} us ({_WIDTH} dimensions)")
    _memory()


def _memory() -> None:
    count = 20_000
    cache = Cache(256 << 20, 3600.0)
    keys = [b"%032d" % number for number in range(count)]
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    cache.keep_vectors(
        [bytes(bytearray(key)) for key in keys],
        [_vector(n) for n in range(count)],
        _RUNG,
        0,
        time.time(),
    )
    taken = tracemalloc.get_traced_memory()[0] - before
    tracemalloc.stop()
    counted = cache.counts()["embeddings"].bytes
    words = f"an entry of {_WIDTH} dimensions ({4 * _WIDTH} bytes): {taken / count:.0f} bytes taken"
    _line(words, f"{counted / count:.0f} counted")


def _vector(number: int) -> bytes:
    return vectors.pack([float(number % 97)] * _WIDTH)


async def tier(url: str, name: str, quick: bool) -> None:
    """What the second tier adds to a miss, and how long a hit in it takes."""
    rounds = 50 if quick else 300
    store, tasks = await open_store(url), Tasks()
    try:
        behind = SecondTier(store, tasks, time.time, is_shared=store.is_shared)
        cache = Cache(64 << 20, 3600.0, behind)
        for count in (1, 32, 512):
            known, waits = _embed(count, 10_000), []
            cache.keep_vectors(
                _keys(cache, known), [_vector(n) for n in range(count)], _RUNG, 0, time.time()
            )
            await behind.flush(30)
            for what in ("miss", "hit"):
                took = []
                for number in range(max(5, rounds // count)):
                    base = 10_000 if what == "hit" else 20_000 + number * count
                    keys = _keys(cache, _embed(count, base))
                    cache._vectors.clear()
                    began = time.perf_counter()
                    found = await cache.find_vectors(keys, _ANY)
                    took.append(time.perf_counter() - began)
                    assert (found[0] is not None) is (what == "hit"), (name, what)
                waits.append(statistics.median(took) * 1e6)
            _line(
                f"  {name}, {count:4} inputs: a miss {waits[0]:8.0f} us, a hit {waits[1]:8.0f} us"
            )
    finally:
        await tasks.aclose()
        await store.aclose()


def _line(*parts: str) -> None:
    print("; ".join(parts), flush=True)


async def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.cache")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--valkey", metavar="URL")
    given = parser.parse_args()
    await gain(given.quick)
    await cost(given.quick)
    _line("the second tier, in wall time:")
    with tempfile.TemporaryDirectory() as folder:
        await tier(f"sqlite://{Path(folder)}/state.db", "SQLite", given.quick)
    if given.valkey:
        await tier(given.valkey, "Valkey", given.quick)


if __name__ == "__main__":
    asyncio.run(main())
