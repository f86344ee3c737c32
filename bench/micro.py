"""`make micro`: what the hot pure functions cost, against the costs that are checked in.

A guard against creep, one case a function. A cost is a ratio: processor time of the function over
that of a fixed piece of Python, both the least of many short turns taken by turns in one process,
so that neither the machine's speed nor what else it does shows. Ratios still differ between Python
versions and processors by some per cent, hence the tolerance; `--update` writes new ones.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import itertools
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

from bench.upstream import CHAT, stream_event
from router.core import (
    accounts,
    answers,
    batch,
    cache_key,
    chat_request,
    embed_request,
    embeddings,
    jsontext,
    ladder,
    replay,
    vectors,
)
from router.core.breaker import Breaker, BreakerSettings
from router.core.byte_cache import ByteCache
from router.core.chunks import ChunkWatch
from router.core.concurrency import AdaptiveLimit, ConcurrencySettings, Outcome
from router.core.estimate import Estimates, terms
from router.core.key_filter import KeyFilter
from router.core.limiter import Limiter, Ticket
from router.core.percentiles import Recent
from router.core.skeleton import Skeleton
from router.core.sse import SseParser, frame
from router.types import Call, ChatCall, Key, Ladder, Policy, Price, Rung, Task

BASELINE = Path(__file__).with_name("micro.json")
# Creep beyond this fails; a function that has become this much cheaper asks for a new baseline.
_TOLERANCE = 0.35
_TURNS = 60
_TURN_NS = 1_000_000
_AGAIN = 3

_PROMPT = "Say in one sentence what a ladder of models is good for, and then say it again. " * 8
_BODY = jsontext.read(
    json.dumps(
        {
            "model": "assistant",
            "messages": [{"role": "user", "content": _PROMPT}],
            "temperature": 0,
            "max_tokens": 256,
        }
    ).encode()
)
_RAW = jsontext.write(_BODY)
_ANSWER = CHAT.partition(b"\r\n\r\n")[2]
_EVENT = stream_event(last=False)
_PAYLOAD = _EVENT.removeprefix(b"data: ").rstrip()
_PRICE = Price.per_mtok(0.13, 0.40)
_RUNGS = tuple(Rung("fake", f"model-{number}", price=_PRICE) for number in range(4))
_LADDER = Ladder("assistant", Task.CHAT, _RUNGS)
_NEEDS = chat_request.needs_of(_BODY)
_CALL = ChatCall(
    id="req",
    key=Key("bench"),
    ladder=_LADDER,
    policy=Policy.ORDER,
    body=_BODY,
    stream=False,
    wants_usage=False,
    needs=_NEEDS,
)

Work = Callable[[], object]


def _able(_: Call, __: Rung) -> str | None:
    return None


_VIEW = ladder.RungView()


def _fresh(_: Ladder, __: Rung, ___: int) -> ladder.RungView:
    return _VIEW


def _affords(_: Call, __: Rung, ___: Price | None) -> ladder.Unaffordable | None:
    return None


def _read() -> Work:
    return lambda: chat_request.read(jsontext.read(_RAW))


def _needs() -> Work:
    return lambda: chat_request.needs_of(_BODY)


def _chat_key() -> Work:
    return lambda: cache_key.of_chat(_BODY, ladder=b"ladder", scope=b"scope")


def _input_key() -> Work:
    return lambda: cache_key.of_inputs(
        ["one rung higher"], space=b"space", scope=b"scope", dimensions=None, extra={}
    )


def _plan() -> Work:
    return lambda: ladder.plan(_CALL, _fresh, _able, _affords)


def _estimate() -> Work:
    estimates = Estimates()
    return lambda: (estimates.prompt_tokens(_NEEDS), estimates.prompt_tokens_max(_NEEDS))


def _terms() -> Work:
    return lambda: terms(
        asked=256,
        choices=1,
        holds_all=True,
        prompt_tokens=120,
        context_left=None,
        price=_PRICE,
        nanousd=10**12,
        tokens=10**9,
        margin_tokens=64,
    )


def _cost() -> Work:
    return lambda: accounts.shown_usd(accounts.cost(_PRICE, 120, 84))


def _place() -> Work:
    limiter = Limiter(AdaptiveLimit(ConcurrencySettings(), 4096), 64)

    def work() -> None:
        ticket = limiter.enter(1.0, 0, 5.0)
        assert isinstance(ticket, Ticket)
        limiter.leave(1.5, ticket, Outcome.SERVED)

    return work


def _permit() -> Work:
    breaker = Breaker(BreakerSettings())

    def work() -> None:
        permit = breaker.enter(1.0)
        assert permit is not None
        breaker.succeeded(permit, 1.5)

    return work


def _timing() -> Work:
    recent = Recent()

    def work() -> None:
        recent.timed(1.0, 0.25)
        recent.ended(1.0, failed=False)

    return work


def _answer() -> Work:
    return lambda: answers.check(_ANSWER, who="fake/bench", call_id="req")


def _event() -> Work:
    parser = SseParser()
    watch = ChunkWatch(who="fake/bench", call_id="req", wants_usage=False)

    def work() -> bytes:
        [event] = parser.feed(_EVENT)
        payload = watch.see(event.data).payload
        assert payload is not None
        return frame(payload)

    return work


def _like_event() -> Work:
    """One that is like the event before it, as nearly all of a stream are."""
    watch = ChunkWatch(who="fake/bench", call_id="req", wants_usage=False)
    watch.see(_PAYLOAD)
    watch.learn(_PAYLOAD)
    skeleton = watch.skeleton
    assert skeleton is not None

    def work() -> None:
        found = skeleton.read(_EVENT)
        assert found is not None
        watch.took(len(found[0]), found[1])

    return work


def _skeleton() -> Work:
    chunk = jsontext.read(_PAYLOAD)
    return lambda: Skeleton.of(_PAYLOAD, chunk)


def _cache_hit() -> Work:
    cache: ByteCache[bytes] = ByteCache(1 << 24, 86_400)
    keys = [number.to_bytes(32, "big") for number in range(1_000)]
    for key in keys:
        cache.put(key, _ANSWER, len(_ANSWER), made_s=0.0, now_s=0.0)
    return lambda: cache.get(keys[500], 1.0)


def _cache_miss() -> Work:
    known = KeyFilter(100_000)
    for number in range(100_000):
        known.add(hashlib.sha256(b"%d" % number).digest())
    keys = itertools.cycle([hashlib.sha256(b"no %d" % number).digest() for number in range(1_000)])
    return lambda: known.may_have(next(keys))


def _replayed() -> Work:
    answer = jsontext.read(_ANSWER)
    return lambda: replay.payloads_of(answer, include_usage=False)


def _merged() -> Work:
    chunk = jsontext.read(_PAYLOAD)

    def work() -> None:
        whole = replay.Whole()
        whole.take(chunk)

    return work


def _embed_read() -> Work:
    raw = b'{"model":"embed","input":"one rung higher","encoding_format":"base64"}'
    return lambda: embed_request.read(jsontext.read(raw))


def _float_vectors() -> Work:
    values = [number / 1_000 for number in range(384)]
    body = jsontext.write(
        {
            "object": "list",
            "data": [{"object": "embedding", "index": 0, "embedding": values}],
            "model": "bench",
            "usage": {"prompt_tokens": 8, "total_tokens": 8},
        }
    )

    def work() -> bytes:
        found = embeddings.read_openai(body, 1, who="fake/bench")
        return embeddings.write_openai(found, model="embed", base64=True)

    return work


def _base64_vectors() -> Work:
    vector = vectors.to_base64(vectors.pack([number / 1_000 for number in range(384)]))
    body = jsontext.write(
        {
            "object": "list",
            "data": [{"object": "embedding", "index": 0, "embedding": vector}],
            "model": "bench",
            "usage": {"prompt_tokens": 8, "total_tokens": 8},
        }
    )

    def work() -> bytes:
        found = embeddings.read_openai(body, 1, who="fake/bench")
        return embeddings.write_openai(found, model="embed", base64=True)

    return work


def _kept() -> Work:
    cache: ByteCache[bytes] = ByteCache(1 << 20, 86_400)
    numbers = itertools.count()
    vector = bytes(1_536)

    def work() -> None:
        key = next(numbers).to_bytes(32, "big")
        cache.put(key, vector, len(vector), made_s=0.0, now_s=0.0, group="fake/bench")

    return work


def _batched() -> Work:
    limits = batch.Limits()

    def work() -> None:
        queue: batch.Queue[int] = batch.Queue()
        for number in range(16):
            queue.add(number, "one rung higher", 4, "bench", number, 0)
        queue.take(limits, 1_000, lambda identity: False)

    return work


CASES: dict[str, Callable[[], Work]] = {
    "read a chat body": _read,
    "what a chat body needs": _needs,
    "cache_key of a chat body": _chat_key,
    "cache_key of an input": _input_key,
    "plan four rungs": _plan,
    "estimate a prompt": _estimate,
    "terms of a hold": _terms,
    "cost of an answer": _cost,
    "a place and back": _place,
    "a permit and back": _permit,
    "note a time": _timing,
    "check an answer": _answer,
    "pass an event": _event,
    "pass one that is like it": _like_event,
    "learn a skeleton": _skeleton,
    "find in the cache": _cache_hit,
    "keep in a full cache": _kept,
    "miss in the store": _cache_miss,
    "an answer as chunks": _replayed,
    "a chunk into an answer": _merged,
    "read an embeddings body": _embed_read,
    "vectors in and out": _float_vectors,
    "base64 vectors in and out": _base64_vectors,
    "batch sixteen inputs": _batched,
}


class _Counter:
    def __init__(self) -> None:
        self.count = 0

    def add(self, amount: int) -> int:
        self.count += amount
        return self.count


def reference() -> None:
    """The yardstick: calls, attributes, dicts, lists and text, as the functions use them."""
    counter = _Counter()
    found: dict[str, tuple[int, int, str]] = {}
    for number in range(20):
        found[f"name-{number}"] = (counter.add(number), number * 2, str(number))
    total = 0
    for name, values in found.items():
        if name.startswith("name") and len(values) == 3:
            total += values[0] + values[1]
    assert total == 1_710


def ratio(work: Work) -> float:
    """The least time of the work over the least of the yardstick, turn by turn."""
    loops, yard_loops = _loops(work), _loops(reference)
    least = yard_least = float("inf")
    for _ in range(_TURNS):
        yard_least = min(yard_least, _timed(reference, yard_loops))
        least = min(least, _timed(work, loops))
    return least / yard_least


def _loops(work: Work) -> int:
    """How often it fits into a turn; the first calls warm it up."""
    loops = 1
    while (taken := _timed(work, loops) * loops) < _TURN_NS and loops < 1 << 20:
        loops = max(loops * 2, int(loops * _TURN_NS / max(taken, 1)))
    return loops


def _timed(work: Work, loops: int) -> float:
    turns = range(loops)
    before = time.thread_time_ns()
    for _ in turns:
        work()
    return (time.thread_time_ns() - before) / loops


def compare(found: dict[str, float], known: dict[str, float]) -> list[str]:
    """What has crept up, or is not known."""
    crept = []
    for name, value in found.items():
        if name not in known:
            crept.append(f"{name}: {value:.2f}, and no baseline")
        elif value > known[name] * (1 + _TOLERANCE):
            crept.append(f"{name}: {value:.2f}, was {known[name]:.2f}")
    return crept


def main() -> None:
    parser = argparse.ArgumentParser(prog="make micro", description=__doc__)
    parser.add_argument("--update", action="store_true", help="write the baseline anew")
    options = parser.parse_args()
    python = ".".join(map(str, sys.version_info[:2]))
    baseline = json.loads(BASELINE.read_text()) if BASELINE.exists() else {}
    known: dict[str, float] = {} if options.update else baseline.get("ratios", {})
    gc.disable()
    found = {}
    for name, case in CASES.items():
        work = case()
        found[name] = ratio(work)
        # A busy moment makes a ratio worse, never better.
        for _ in range(_AGAIN):
            if name not in known or not compare({name: found[name]}, known):
                break
            found[name] = min(found[name], ratio(work))
        was = f"{known[name]:8.2f}" if name in known else "       –"
        print(f"{name:28}{found[name]:8.2f}{was}", flush=True)
    if options.update:
        ratios = {name: round(value, 3) for name, value in found.items()}
        BASELINE.write_text(json.dumps({"python": python, "ratios": ratios}, indent=1) + "\n")
        print(f"→ written to {BASELINE.name}")
        return
    if python != baseline.get("python"):
        print(f"! the baseline is Python {baseline.get('python')}'s, this is {python}")
    if crept := compare(found, known):
        raise SystemExit("✗ dearer than they were:\n  " + "\n  ".join(crept))
    print(f"→ none is more than {_TOLERANCE:.0%} above the baseline")


if __name__ == "__main__":
    main()
