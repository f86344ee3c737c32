"""A fake Space that speaks Gradio 4, 5 or 6: documents as recorded, queue messages in their forms.

What it publishes is what `gradio_app.py` published under the real package (the recordings), and a
test says how a job goes by `play`. It counts what must be known of it: each job that was posted,
and each that was called off.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

import orjson

from tests.fakes.upstream import Reply, Request

RECORDINGS = Path(__file__).parent.parent / "recordings" / "gradio"
VERSIONS = {4: "4.44.1", 5: "5.50.0", 6: "6.31.0"}


def document(name: str) -> Any:
    return orjson.loads((RECORDINGS / name).read_bytes())


@dataclass
class Posted:
    """A job as it was posted. `api_name` is of the function that its number means."""

    event_id: str
    session: str
    api_name: str
    data: list[Any]


class Teller:
    """Tells of one job on an open stream, in one version's words."""

    def __init__(self, reply: Reply, job: Posted, version: int) -> None:
        self.reply = reply
        self.job = job
        self._version = version
        self._before: list[Any] | None = None

    async def message(self, msg: str, **fields: Any) -> None:
        await self.reply.event({"msg": msg, "event_id": self.job.event_id, **fields})

    async def place(self, rank: int, size: int, eta_s: float | None = None) -> None:
        await self.message("estimation", rank=rank, queue_size=size, rank_eta=eta_s)

    async def generating(self, *outputs: Any) -> None:
        """The outputs as they are now: whole the first time, as edits of text from then on."""
        data = list(outputs)
        if self._before is not None:
            data = [_edits(a, b) for a, b in zip(self._before, outputs, strict=True)]
        self._before = list(outputs)
        output = {"data": data, "is_generating": True, "duration": 0.03}
        await self.message("process_generating", output=output, success=True)

    async def completed(self, *outputs: Any) -> None:
        output = {"data": list(outputs), "is_generating": False, "duration": 0.03}
        await self.message("process_completed", output=output, success=True)
        await self.close()

    async def failed(self, error: str | None, title: str = "Error") -> None:
        """A `gr.Error`, or with None an exception whose text the app hides."""
        output: dict[str, Any] = {"error": error}
        if error is not None:
            output |= {"duration": 10, "visible": True, "title": title}
        if self._version == 4:
            output.pop("title", None)
            output["error"] = None if error is None else repr(error)
        await self.message("process_completed", output=output, success=False)
        await self.close()

    async def close(self) -> None:
        await self.reply.event({"msg": "close_stream", "event_id": None})
        await self.reply.end()


Play = Callable[[Posted, Teller], Awaitable[None]]


class FakeSpace:
    """A handler for FakeUpstream."""

    def __init__(self, version: int, play: Play) -> None:
        self.version = version
        self.prefix = "" if version == 4 else "/gradio_api"
        self.config = document(f"app-{VERSIONS[version]}-config.json")
        self.info = document(f"app-{VERSIONS[version]}-info.json")
        self.play = play
        self.posted: list[Posted] = []
        self.called_off: list[Any] = []
        self.was_called_off = asyncio.Event()

    async def handle(self, request: Request, reply: Reply) -> None:
        match request.method, request.path.removeprefix(self.prefix):
            case "GET", "/config":
                await reply.json(self.config)
            case "GET", "/info" if request.path.startswith(self.prefix):
                await reply.json(self.info)
            case "POST", "/queue/join" if request.path.startswith(self.prefix):
                await self.join(request, reply)
            case "GET", "/queue/data" if request.path.startswith(self.prefix):
                await self.tell(request, reply)
            case "POST", "/cancel" if request.path.startswith(self.prefix):
                self.called_off.append(request.json)
                self.was_called_off.set()
                await reply.json({"success": True})
            case _:
                await reply.json({"detail": "Not Found"}, 404)

    async def join(self, request: Request, reply: Reply) -> None:
        body = request.json
        if body.get("session_hash") is None:
            return await reply.json({"detail": "Session hash not found."}, 400)
        functions = {one["id"]: one for one in self.config["dependencies"]}
        function = functions.get(body["fn_index"])
        if function is None:
            return await reply.whole(
                b"Internal Server Error", 500, {"content-type": "text/plain; charset=utf-8"}
            )
        event_id = f"{len(self.posted):032x}"
        job = Posted(event_id, body["session_hash"], f"/{function['api_name']}", body["data"])
        self.posted.append(job)
        await reply.json({"event_id": event_id})

    async def tell(self, request: Request, reply: Reply) -> None:
        session = parse_qs(request.query)["session_hash"][0]
        await reply.start(headers={"cache-control": "no-store"})
        job = next((one for one in self.posted if one.session == session), None)
        if job is None:
            fields = {"message": "404: Not Found", "session_not_found": True, "success": False}
            await reply.event({"msg": "unexpected_error", "event_id": None, **fields})
            return await reply.end()
        await self.play(job, Teller(reply, job, self.version))


def _edits(before: Any, now: Any) -> list[Any]:
    """Gradio's edits from one value of an output to the next, for texts and what stays."""
    if before == now:
        return []
    if isinstance(before, str) and isinstance(now, str) and now.startswith(before):
        return [["append", [], now[len(before) :]]]
    return [["replace", [], now]]
