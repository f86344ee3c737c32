"""TEI's wire with its traps: flat errors in capitals, a batch limit, permits to be had at once."""

from __future__ import annotations

import base64
import struct
from typing import Any

from router.backends.base import Backend
from router.backends.tei import TeiBackend
from router.config.secrets import Credential
from router.transport.http import HttpClient
from router.types import Rung, Task
from tests.backends.contract import Rig, Scenario, vector_of
from tests.fakes.upstream import Reply, Request

MODEL = "org/embedder"
INFO: dict[str, Any] = {
    "model_id": MODEL,
    "model_sha": None,
    "model_dtype": "float16",
    "served_model_name": "embedder",
    "model_type": {"embedding": {"pooling": "cls"}},
    "max_concurrent_requests": 512,
    "max_input_length": 512,
    "max_batch_tokens": 16384,
    "max_batch_requests": None,
    "max_client_batch_size": 32,
    "auto_truncate": True,
    "version": "1.9.3",
}
TOKENS_EACH = 3
COMPLAINTS = {
    Scenario.BUSY: (429, "Overloaded", "Model is overloaded"),
    Scenario.FAILED: (424, "Backend", "CUDA error: an illegal memory access was encountered"),
    Scenario.TOO_LONG: (
        422,
        "Tokenizer",
        "Input validation error: `inputs` must have less than 512 tokens. Given: 600",
    ),
    Scenario.MISTAKE: (
        422,
        "Validation",
        "Input validation error: `dimensions` should be positive",
    ),
}


class TeiRig(Rig):
    """`free` are the permits nobody of this test has taken; `slices` the sizes that arrived."""

    kind = "tei"
    tasks = frozenset({Task.EMBEDDINGS})
    # It streams nothing, so no stream breaks.
    plays = frozenset(Scenario) - {Scenario.ERROR_FIRST, Scenario.CUT, Scenario.ENDLESS}

    def __init__(self) -> None:
        super().__init__()
        self.info = dict(INFO)
        self.slices: list[int] = []
        self.free: int = INFO["max_concurrent_requests"]
        self.health = 200

    def backend(self, url: str, client: HttpClient) -> Backend:
        return TeiBackend("cpu", url, client, credential=Credential())

    def rung(self, task: Task) -> Rung:
        return Rung("cpu", MODEL)

    async def handle(self, request: Request, reply: Reply) -> None:
        if request.path == "/info":
            await reply.json(self.info)
        elif request.path == "/health":
            await reply.whole(b"", self.health)
        elif await self.refuse(reply):
            return
        elif request.path == "/v1/embeddings":
            await self.serve(request.json["input"], request, reply)
        elif request.path == "/embed":
            await self.serve(request.json["inputs"], request, reply)
        else:
            await reply.whole(b"", 404)

    async def refuse(self, reply: Reply) -> bool:
        """Play the scenarios that are a refusal; whether this was one."""
        match self.scenario:
            case Scenario.HTML:
                await reply.whole(b"<html>bad gateway</html>", 502, {"content-type": "text/html"})
            case Scenario.REDIRECT:
                await reply.whole(b"", 302, {"location": "http://127.0.0.1:1/elsewhere"})
            case Scenario.UNAUTHORIZED:
                await reply.whole(b"", 401)
            case Scenario.NOT_JSON:
                await reply.whole(b"<html>hello</html>", 200, {"content-type": "text/html"})
            case known if known in COMPLAINTS:
                await self.complain(reply, *COMPLAINTS[known])
            case _:
                return False
        return True

    async def serve(self, inputs: list[Any], request: Request, reply: Reply) -> None:
        batch_max = self.info["max_client_batch_size"]
        if len(inputs) > batch_max:
            text = f"batch size {len(inputs)} > maximum allowed batch size {batch_max}"
            return await self.complain(reply, 422, "Validation", text)
        self.slices.append(len(inputs))
        if len(inputs) > self.free:
            return await self.complain(reply, 429, "Overloaded", "Model is overloaded")
        self.free -= len(inputs)
        try:
            await self.work(inputs)
        finally:
            self.free += len(inputs)
        await self.answer(inputs, request, reply)

    async def work(self, inputs: list[Any]) -> None:
        """While the permits are held; a test may make this last."""

    async def answer(self, inputs: list[Any], request: Request, reply: Reply) -> None:
        vectors = [vector_of(str(one)) for one in inputs]
        if self.scenario is Scenario.WRONG_COUNT:
            vectors.pop()
        tokens = TOKENS_EACH * len(inputs)
        if request.path == "/embed":
            return await reply.json(vectors, headers={"x-compute-tokens": str(tokens)})
        as_text = request.json.get("encoding_format") == "base64"
        data = [
            {"object": "embedding", "index": index, "embedding": coded(vector, as_text)}
            for index, vector in enumerate(vectors)
        ]
        usage = {"prompt_tokens": tokens, "total_tokens": tokens}
        await reply.json({"object": "list", "data": data, "model": MODEL, "usage": usage})

    @staticmethod
    async def complain(reply: Reply, status: int, kind: str, text: str) -> None:
        await reply.json({"message": text, "code": status, "type": kind}, status)


def coded(vector: list[float], as_text: bool) -> Any:
    raw = struct.pack(f"<{len(vector)}f", *vector)
    return base64.b64encode(raw).decode() if as_text else vector
