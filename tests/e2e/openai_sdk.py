"""What the real `openai` package does against a Rungway that serves the demo: run by each major.

`python openai_sdk.py BASE_URL`: prints the package's version and exits 0 if all went as it should.
"""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Any

import openai
from openai import AsyncOpenAI, OpenAI

ASK: list[Any] = [{"role": "user", "content": "Say hello."}]
SCHEMA = {
    "type": "object",
    "properties": {"answer": {"type": "boolean"}},
    "required": ["answer"],
    "additionalProperties": False,
}
FORM: Any = {
    "type": "json_schema",
    "json_schema": {"name": "answer", "schema": SCHEMA, "strict": True},
}


def main(base: str) -> None:
    with OpenAI(base_url=f"{base}/v1", api_key="any", max_retries=0) as client:
        whole(client)
        streamed(client)
        structured(client)
        vectors(client)
        models(client)
        errors(client)
    with OpenAI(base_url=base, api_key="any", max_retries=0) as client:
        whole(client)
    asyncio.run(in_parallel(base))
    print(openai.__version__)


def whole(client: OpenAI) -> None:
    answer = client.chat.completions.create(model="demo", messages=ASK, max_tokens=8, temperature=0)
    assert answer.choices[0].message.content
    assert answer.choices[0].finish_reason in ("stop", "length")
    assert answer.usage is not None
    assert 0 < answer.usage.completion_tokens <= 8
    assert answer._request_id
    assert answer._request_id.startswith("req_")
    both = client.chat.completions.create(model="dummy", messages=ASK, max_tokens=3, n=2)
    assert [choice.index for choice in both.choices] == [0, 1]


def streamed(client: OpenAI) -> None:
    text, reasons = "", []
    for chunk in client.chat.completions.create(
        model="demo", messages=ASK, max_completion_tokens=8, stream=True, temperature=0
    ):
        text += chunk.choices[0].delta.content or ""
        reasons.append(chunk.choices[0].finish_reason)
    assert text
    assert reasons[-1] in ("stop", "length")
    assert reasons[:-1] == [None] * (len(reasons) - 1)

    chunks = list(
        client.chat.completions.create(
            model="demo",
            messages=ASK,
            max_tokens=4,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.prompt_tokens > 0

    with client.chat.completions.stream(
        model="demo", messages=ASK, max_tokens=60, response_format=FORM
    ) as stream:
        for event in stream:
            assert event.type
        assert stream.get_final_completion().choices[0].message.content


def structured(client: OpenAI) -> None:
    answer = client.chat.completions.create(
        model="demo",
        messages=[{"role": "user", "content": "Is water wet? Answer in JSON."}],
        max_tokens=40,
        response_format=FORM,
    )
    assert isinstance(json.loads(answer.choices[0].message.content or "")["answer"], bool)


def vectors(client: OpenAI) -> None:
    texts = ["a cat", "a kitten", "the stock market"]
    plain = client.embeddings.create(model="demo-embed", input=texts, encoding_format="float")
    default = client.embeddings.create(model="demo-embed", input=texts)
    assert [item.index for item in plain.data] == [0, 1, 2]
    for one, other in zip(plain.data, default.data, strict=True):
        assert len(one.embedding) == 576
        assert all(abs(a - b) < 1e-3 for a, b in zip(one.embedding, other.embedding, strict=True))
    assert plain.usage.prompt_tokens > 0
    single = client.embeddings.create(model="demo-embed", input="a cat")
    assert len(single.data) == 1


def models(client: OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["demo", "demo-embed"]
    assert client.models.retrieve("demo").owned_by == "rungway"


def errors(client: OpenAI) -> None:
    cases: list[tuple[type[openai.APIStatusError], str | None, dict[str, Any]]] = [
        (openai.NotFoundError, "model_not_found", {"model": "gpt-5", "messages": ASK}),
        (openai.BadRequestError, "invalid_type", {"model": "demo", "messages": []}),
        (
            openai.BadRequestError,
            "context_length_exceeded",
            {"model": "demo", "messages": [{"role": "user", "content": "word " * 30_000}]},
        ),
    ]
    for kind, code, request in cases:
        try:
            client.chat.completions.create(**request)
        except kind as error:
            assert error.code == code, error.code
            assert error.request_id
            assert str(error)
        else:
            raise AssertionError(f"{kind.__name__} was not raised")
    try:
        client.chat.completions.create(
            model="demo", messages=[{"role": "user", "content": "word " * 2_300}], stream=True
        )
    except openai.BadRequestError as error:
        # The plan's estimate lets it pass; the model's own words say that it is too long.
        assert error.code == "context_length_exceeded", error.code
    else:
        raise AssertionError("a prompt over the context was not refused")


async def in_parallel(base: str) -> None:
    async with AsyncOpenAI(base_url=f"{base}/v1", api_key="any", max_retries=0) as client:

        async def one() -> str:
            stream = await client.chat.completions.create(
                model="demo", messages=ASK, max_tokens=4, stream=True
            )
            return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

        texts = await asyncio.gather(*(one() for _ in range(4)))
        assert all(texts)


if __name__ == "__main__":
    main(sys.argv[1])
