"""A fast fake upstream for the bench: `python -m bench.upstream PORT`.

It answers at once and always the same, so that what is measured is the proxy. Its parser knows only
what HTTP clients send it here: a head, a content-length, no chunked requests. What is not streamed
is one write; a stream is one write an event, with a pause between events where the body's `user`
field names one, because events that leave together are measured as one.

GET /count tells how many answers and events were sent, which is what CPU time is divided by.
"""

from __future__ import annotations

import asyncio
import base64
import json
import re
import struct
import sys
from typing import cast

import uvloop

MODEL = "bench"
VECTOR_SIZE = 384
# A client asks for a stream's form in `user`, which every proxy relays: "events=100 pause_ms=20".
_FORM = re.compile(rb"events=(\d+) pause_ms=(\d+)")
_LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)


def json_answer(value: object) -> bytes:
    body = json.dumps(value, separators=(",", ":")).encode()
    head = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n"
    return head % len(body) + body


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


def embeddings_answer(*, as_base64: bool) -> bytes:
    values = [((i * 37) % 101 - 50) / 1000 for i in range(VECTOR_SIZE)]
    packed = base64.b64encode(struct.pack(f"<{VECTOR_SIZE}f", *values)).decode()
    vector = {"object": "embedding", "index": 0, "embedding": packed if as_base64 else values}
    usage = {"prompt_tokens": 8, "total_tokens": 8}
    return json_answer({"object": "list", "data": [vector], "model": MODEL, "usage": usage})


CHAT = chat_answer()
MODELS = json_answer({"object": "list", "data": [{"id": MODEL, "object": "model"}]})
EMBEDDINGS_FLOAT = embeddings_answer(as_base64=False)
EMBEDDINGS_BASE64 = embeddings_answer(as_base64=True)
STREAM_HEAD = (
    b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
)
EVENT = chunk(stream_event(last=False))
STREAM_END = chunk(stream_event(last=True)) + chunk(b"data: [DONE]\n\n") + b"0\r\n\r\n"


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
            if b'"stream":true' in request or b'"stream": true' in request:
                self.stream(_FORM.search(request))
                return
            answer = CHAT
        elif path.endswith(b"/embeddings"):
            answer = EMBEDDINGS_BASE64 if b'"base64"' in request else EMBEDDINGS_FLOAT
        elif path == b"/count":
            self.transport.write(json_answer({"answers": Counts.answers, "events": Counts.events}))
            return
        else:
            self.transport.write(MODELS)
            return
        Counts.answers += 1
        self.transport.write(answer)

    def stream(self, form: re.Match[bytes] | None) -> None:
        events, pause_ms = (int(form[1]), int(form[2])) if form else (1, 0)
        if events == 1:
            self.transport.write(STREAM_HEAD + STREAM_END)
            self.ended()
        else:
            self.transport.write(STREAM_HEAD)
            self.send_later(events, pause_ms / 1000)

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
