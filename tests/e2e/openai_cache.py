"""What the real `openai` package makes of a live stream, and of the same one from the cache.

`python openai_cache.py BASE_URL NAME…`: asks for each name three times over; run by each major.
"""

from __future__ import annotations

import sys
from typing import Any

import openai
from openai import OpenAI


def main(base: str, names: list[str]) -> None:
    with OpenAI(base_url=f"{base}/v1", api_key="any", max_retries=0) as client:
        for name in names:
            live, again = gathered(client, name), gathered(client, name)
            assert (live.pop("cache"), again.pop("cache")) == ("miss", "hit"), name
            assert live == again, f"{name}: {live} {again}"
            raw = chunks(client, name)
            assert raw == live["chunks"], f"{name}: {raw} {live['chunks']}"
            whole = client.chat.completions.with_raw_response.create(**question(name))
            assert whole.headers["x-rungway-cache"] == "hit"
            said = whole.parse().to_dict()
            for one, other in zip(said["choices"], live["final"]["choices"], strict=True):
                assert one["finish_reason"] == other["finish_reason"]
                assert plain(one["message"]) == plain(other["message"]), name
    print(openai.__version__)


def question(name: str) -> Any:
    return {"model": "chat", "messages": [{"role": "user", "content": name}], "seed": 1}


def gathered(client: OpenAI, name: str) -> dict[str, Any]:
    """What the package's own accumulator makes of the stream, and which events it gives."""
    asked = {**question(name), "stream_options": {"include_usage": True}}
    kinds: list[str] = []
    said: list[str] = []
    with client.chat.completions.stream(**asked) as stream:
        cache = stream._response.headers["x-rungway-cache"]
        for event in stream:
            if not kinds or kinds[-1] != event.type:
                kinds.append(event.type)
            if event.type == "content.delta":
                said.append(event.delta)
        final = stream.get_final_completion().to_dict()
    done = [kind for kind in kinds if kind.endswith(".done")]
    # The order in which several choices take turns is free.
    letters = sorted("".join(said))
    sums = summed(final)
    return {"cache": cache, "final": final, "done": done, "letters": letters, "chunks": sums}


def chunks(client: OpenAI, name: str) -> Any:
    """The same sum from the bare chunks, with the order that clients rely on."""
    asked = {**question(name), "stream_options": {"include_usage": True}}
    found = list(client.chat.completions.create(**asked, stream=True))
    assert found[-1].choices == []
    assert found[-1].usage is not None
    assert all(chunk.usage is None for chunk in found[:-1])
    assert len({chunk.id for chunk in found}) == 1
    texts: dict[int, str] = {}
    reasons: dict[int, str] = {}
    for chunk in found[:-1]:
        assert chunk.object == "chat.completion.chunk"
        for choice in chunk.choices:
            assert choice.index not in reasons, "nothing comes after the finish"
            if choice.index not in texts:
                assert choice.delta.role == "assistant"
            texts[choice.index] = texts.get(choice.index, "") + (choice.delta.content or "")
            if choice.finish_reason is not None:
                reasons[choice.index] = choice.finish_reason
    return [texts, reasons, found[-1].usage.to_dict()]


def summed(final: Any) -> Any:
    texts = {one["index"]: one["message"].get("content") or "" for one in final["choices"]}
    reasons = {one["index"]: one["finish_reason"] for one in final["choices"]}
    return [texts, reasons, final["usage"]]


def plain(message: Any) -> Any:
    """A message without what the stream's helper adds of its own."""
    calls = [
        (call["id"], call["function"]["name"], call["function"]["arguments"])
        for call in message.get("tool_calls") or ()
    ]
    said = {name: message.get(name) for name in ("role", "content", "refusal", "reasoning")}
    return {**said, "calls": calls}


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
