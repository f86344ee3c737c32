"""A fast fake upstream for the bench: `python -m bench.upstream PORT`.

It answers at once and always the same, so that what is measured is the proxy. Its parser knows only
what HTTP clients send it here: a head, a content-length, no chunked requests. What is not streamed
is one write; a stream is one write an event, with a pause between events where the prompt names
one, because events that leave together are measured as one.

GET /count tells how many answers and events were sent, which is what CPU time is divided by. Each
input of an embeddings request counts as an answer: a proxy may send those of many callers together.

The model `faulty` fails in all the ways there are, in turn; only the soak asks for it.
"""

from __future__ import annotations

import asyncio
import base64
import itertools
import json
import re
import struct
import sys
from typing import cast

import orjson
import uvloop

MODEL = "bench"
VECTOR_SIZE = 384
SMALL_VECTOR_SIZE = 8
# A client asks for a stream's form in its prompt, which every proxy relays.
_FORM = re.compile(rb"events=(\d+) pause_ms=(\d+)")
_LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)


def sized(status: bytes, content_type: bytes, body: bytes) -> bytes:
    head = b"HTTP/1.1 %s\r\ncontent-type: %s\r\ncontent-length: %d\r\n\r\n"
    return head % (status, content_type, len(body)) + body


def json_answer(value: object, status: bytes = b"200 OK") -> bytes:
    return sized(status, b"application/json", json.dumps(value, separators=(",", ":")).encode())


def chat_answer() -> bytes:
    """0.64 KB of JSON, as a short chat answer has."""
    message = {"role": "assistant", "content": "The ladder has four rungs. " * 12}
    choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": "stop"}
    usage = {"prompt_tokens": 120, "completion_tokens": 84, "total_tokens": 204}
    return json_answer(
        {
            "id": "chatcmpl-bench0000000000000000",
            "object": "chat.completion",
            "created": 1_700_000_000,
            "model": MODEL,
            "choices": [choice],
            "usage": usage,
            "system_fingerprint": "fp_bench",
        }
    )


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


def stream_event(*, last: bool) -> bytes:
    """About 0.25 KB, as the events of the common servers have."""
    event = {
        "id": "chatcmpl-bench0000000000000000",
        "object": "chat.completion.chunk",
        "created": 1_700_000_000,
        "model": MODEL,
        "system_fingerprint": "fp_bench",
        "choices": [
            {
                "index": 0,
                "delta": {"role": "assistant", "content": "rung "},
                "logprobs": None,
                "finish_reason": "stop" if last else None,
            }
        ],
    }
    return b"data: " + json.dumps(event, separators=(",", ":")).encode() + b"\n\n"


def _vector(size: int, *, as_base64: bool) -> bytes:
    values = [((i * 37) % 101 - 50) / 1000 for i in range(size)]
    packed = base64.b64encode(struct.pack(f"<{size}f", *values)).decode()
    return orjson.dumps(packed if as_base64 else values)


VECTORS = {
    (size, as_base64): _vector(size, as_base64=as_base64)
    for size in (SMALL_VECTOR_SIZE, VECTOR_SIZE)
    for as_base64 in (False, True)
}


def embeddings_answer(request: bytes) -> tuple[bytes, int]:
    """The answer, and how many vectors it has."""
    asked = orjson.loads(request[request.find(b"\r\n\r\n") :])
    count = len(asked["input"]) if isinstance(asked["input"], list) else 1
    size = SMALL_VECTOR_SIZE if asked.get("dimensions") == SMALL_VECTOR_SIZE else VECTOR_SIZE
    vector = VECTORS[size, asked.get("encoding_format") == "base64"]
    data = b",".join(
        b'{"object":"embedding","index":%d,"embedding":%s}' % (index, vector)
        for index in range(count)
    )
    tokens = 8 * count
    body = (
        b'{"object":"list","data":[%s],"model":"%s","usage":{"prompt_tokens":%d,"total_tokens":%d}}'
    ) % (data, MODEL.encode(), tokens, tokens)
    return sized(b"200 OK", b"application/json", body), count


CHAT = chat_answer()
MODELS = json_answer({"object": "list", "data": [{"id": MODEL, "object": "model"}]})
STREAM_HEAD = (
    b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
)
EVENT = chunk(stream_event(last=False))
STREAM_END = chunk(stream_event(last=True)) + chunk(b"data: [DONE]\n\n") + b"0\r\n\r\n"

_ERROR = {"error": {"message": "the bench's upstream fails on purpose", "type": "server_error"}}
# What a faulty backend sends before it closes the connection.
FAULTS = itertools.cycle(
    (
        json_answer(_ERROR, b"500 Internal Server Error"),
        json_answer(_ERROR, b"429 Too Many Requests"),
        sized(b"200 OK", b"text/html", b"<html>not what was asked for</html>"),
        CHAT[: len(CHAT) // 2],
        STREAM_HEAD + EVENT[: len(EVENT) // 2],
        b"HTTP/1.1 nonsense\r\n\r\n",
        b"",
    )
)


class Counts:
    answers = 0
    events = 0


class Upstream(asyncio.Protocol):
    """One connection; requests are answered in turn, as clients without pipelining send them."""

    transport: asyncio.Transport

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self.buffer = b""
        self.timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)

    def connection_lost(self, exc: Exception | None) -> None:
        if self.timer is not None:
            self.timer.cancel()

    def data_received(self, data: bytes) -> None:
        self.buffer += data
        while (end := self.buffer.find(b"\r\n\r\n")) >= 0:
            length = _LENGTH.search(self.buffer, 0, end)
            whole = end + 4 + (int(length[1]) if length else 0)
            if len(self.buffer) < whole:
                return
            request, self.buffer = self.buffer[:whole], self.buffer[whole:]
            self.answer(request)

    def answer(self, request: bytes) -> None:
        path = request[: request.find(b" HTTP/")].partition(b" ")[2]
        if path.endswith(b"/chat/completions"):
            if b'"faulty"' in request:
                self.transport.write(next(FAULTS))
                self.transport.close()
            elif b'"stream":true' in request or b'"stream": true' in request:
                self.stream(_FORM.search(request))
            else:
                Counts.answers += 1
                self.transport.write(CHAT)
        elif path.endswith(b"/embeddings"):
            answer, count = embeddings_answer(request)
            Counts.answers += count
            self.transport.write(answer)
        elif path == b"/count":
            self.transport.write(json_answer({"answers": Counts.answers, "events": Counts.events}))
        else:
            self.transport.write(MODELS)

    def stream(self, form: re.Match[bytes] | None) -> None:
        events, pause_ms = (int(form[1]), int(form[2])) if form else (1, 0)
        if events == 1:
            self.transport.write(STREAM_HEAD + STREAM_END)
            self.ended()
        else:
            Counts.events += 1
            self.transport.write(STREAM_HEAD + EVENT)
            self.send_later(events - 1, pause_ms / 1000)

    def send_later(self, left: int, pause_s: float) -> None:
        self.timer = self.loop.call_later(pause_s, self.send, left, pause_s)

    def send(self, left: int, pause_s: float) -> None:
        if left > 1:
            Counts.events += 1
            self.transport.write(EVENT)
            self.send_later(left - 1, pause_s)
        else:
            self.transport.write(STREAM_END)
            self.ended()

    def ended(self) -> None:
        Counts.events += 1
        Counts.answers += 1


async def serve(port: int) -> None:
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: Upstream(loop), "127.0.0.1", port)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    uvloop.run(serve(int(sys.argv[1])))
