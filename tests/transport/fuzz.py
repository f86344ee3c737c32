"""`make fuzz`: mutated answers, cut anywhere, against one connection. Not a test: it runs as long
as it is told, and what it finds becomes one.

Whatever arrives, an answer is given whole, given up with UpstreamBroken, or still waited for; it
reads the same however it is cut; what is kept is clean; and little is held of what brings nothing.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import sys
import time

from tests.transport.feeding import Outcome, outcome
from tests.transport.test_framing import CHUNKED, EARLY, OK, SIZED, UNFRAMED

_SEEDS = [
    SIZED,
    EARLY + SIZED,
    CHUNKED + b"5;a=b\r\nhello\r\n10\r\n0123456789abcdef\r\n0\r\nX: y\r\n\r\n",
    OK + b"Content-Type: text/event-stream\r\n\r\ndata: {}\n\n",
    b"HTTP/1.0 200 OK\r\nConnection: keep-alive\r\nContent-Length: 2\r\n\r\nhi",
    b"HTTP/1.1 204 No Content\r\nServer: x\r\n\r\n",
    b"HTTP/1.1 503 Busy\r\nRetry-After: 7\r\nConnection: close\r\nContent-Length: 2\r\n\r\nno",
    *(data for data in UNFRAMED.values() if len(data) < 500),
]
_PARTS = [
    *(b"\r\n", b"\r", b"\n", b"\x00", b" ", b"\t", b":", b";", b",", b"0", b"-", b"\xff"),
    *(b"Content-Length: 3\r\n", b"Transfer-Encoding: chunked\r\n", b"Connection: close\r\n"),
    *(b"HTTP/1.1 100 Continue\r\n\r\n", b"HTTP/1.1 200 OK\r\n", b"0\r\n\r\n", b"ffffffffffffffff"),
    *(b"Content-Encoding: gzip\r\n", b"Upgrade: x\r\nConnection: upgrade\r\n", b"a" * 3000),
]


def mutated(dice: random.Random) -> bytes:
    data = bytearray(dice.choice(_SEEDS))
    for _ in range(dice.choice((0, 1, 1, 2, 3, 6))):
        at = dice.randrange(len(data) + 1)
        match dice.randrange(6):
            case 0:
                data[at:at] = dice.choice(_PARTS)
            case 1:
                del data[at : at + dice.choice((1, 1, 2, 8))]
            case 2 if at < len(data):
                data[at] = dice.randrange(256)
            case 3:
                end = at + dice.randrange(1, 20)
                data[at:at] = data[at:end]
            case 4:
                data += dice.choice(_SEEDS)
            case _:
                other = dice.choice(_SEEDS)
                data = data[:at] + other[dice.randrange(len(other)) :]
    return bytes(data)


def cut(dice: random.Random, data: bytes) -> list[bytes]:
    if dice.random() < 0.3:
        return [data[at : at + 1] for at in range(len(data))]
    places = sorted(dice.randrange(len(data) + 1) for _ in range(dice.randrange(1, 6)))
    return [data[a:b] for a, b in zip([0, *places], [*places, len(data)], strict=True) if a < b]


def fault(whole: Outcome, split: Outcome, data: bytes) -> str | None:
    """What must not be, or None."""
    for found in (whole, split):
        kind = found.error.partition(":")[0]
        if kind not in ("", "UpstreamBroken"):
            return f"it ended as {found.error!r}"
        if found.is_kept and found.error and b"ncoding" not in data:
            return "kept, though broken"
        if found.body and found.body not in data and b"chunked" not in data.lower():
            return "a body that nobody sent"
    # Cut in two reads, what comes behind an answer is unasked for; in one, it spoils the answer's
    # connection alone: either way it is the same answer.
    same = (whole.status, whole.body, bool(whole.error))
    if same != (split.status, split.body, bool(split.error)) and not (whole.error or split.error):
        return "it reads otherwise when it is cut"
    if bool(whole.error) != bool(split.error):
        return "it breaks only one way of cutting it"
    return None


async def run(dice: random.Random, seconds: float) -> int:
    until = time.monotonic() + seconds
    count = 0
    while time.monotonic() < until:
        data = mutated(dice)
        method = dice.choice(("POST", "POST", "POST", "HEAD"))
        whole = await outcome([data], method=method, ends=True)
        pieces = cut(dice, data)
        split = await outcome(pieces, method=method, ends=True)
        if (words := fault(whole, split, data)) is not None:
            print(f"✗ {words}\n  {data!r}\n  whole {whole}\n  split {split}\n  {pieces}")
            return 1
        count += 1
    print(f"→ {count} answers, nothing found")
    return 0


def main() -> None:
    parser = argparse.ArgumentParser(prog="make fuzz", description=__doc__)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=time.time_ns())
    options = parser.parse_args()
    print(f"→ fuzzing the transport for {options.seconds:g} s, --seed {options.seed}")
    sys.exit(asyncio.run(run(random.Random(options.seed), options.seconds)))


if __name__ == "__main__":
    main()
