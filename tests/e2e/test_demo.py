"""The first minute of a user: the demo, with the real SDKs, huggingface_hub and curl."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import InferenceClient
from huggingface_hub.errors import HfHubHTTPError

from tests.e2e.conftest import Running

SCRIPT = Path(__file__).with_name("openai_sdk.py")
OTHER_PYTHON = "RUNGWAY_TEST_OPENAI2_PYTHON"


def run_sdk(python: str, url: str) -> str:
    done = subprocess.run(
        [python, str(SCRIPT), url], capture_output=True, text=True, timeout=110, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_openai_3(demo: Running) -> None:
    assert run_sdk(sys.executable, demo.url).startswith("3.")


def test_openai_2(demo: Running) -> None:
    python = os.environ.get(OTHER_PYTHON)
    assert python, f"set ${OTHER_PYTHON} to a Python with openai 2, as `make test` does"
    assert run_sdk(python, demo.url).startswith("2.")


@pytest.mark.parametrize("base", ["", "/v1", "/v1/", "/v1/chat/completions"])
def test_huggingface_hub_chat(demo: Running, base: str) -> None:
    client = InferenceClient(base_url=demo.url + base, api_key="any")
    messages = [{"role": "user", "content": "Say hello."}]
    answer = client.chat_completion(messages, max_tokens=5)
    assert answer.choices[0].message.content
    chunks = list(client.chat_completion(messages, max_tokens=5, stream=True))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks)


def test_huggingface_hub_json_schema_which_it_sends_in_tgis_form(demo: Running) -> None:
    client = InferenceClient(base_url=demo.url, api_key="any")
    schema: Any = {
        "type": "object",
        "properties": {"answer": {"type": "boolean"}},
        "required": ["answer"],
    }
    form: Any = {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}
    answer = client.chat_completion(
        [{"role": "user", "content": "Is water wet? Answer in JSON."}],
        max_tokens=40,
        response_format=form,
    )
    assert isinstance(json.loads(answer.choices[0].message.content or "")["answer"], bool)


@pytest.mark.parametrize("base", ["", "/v1"])
def test_huggingface_hub_vectors(demo: Running, base: str) -> None:
    client = InferenceClient(base_url=demo.url + base, api_key="any")
    assert client.feature_extraction("hello").shape == (1, 576)
    cosines = client.sentence_similarity("a cat", other_sentences=["a cat", "the stock market"])
    assert cosines[0] > 0.999 > cosines[1]


def test_huggingface_hub_sees_our_errors(demo: Running) -> None:
    client = InferenceClient(base_url=demo.url, api_key="any")
    messages = [{"role": "user", "content": "x"}]
    with pytest.raises(HfHubHTTPError) as caught:
        client.chat_completion(messages, model="no-such-ladder", max_tokens=1)
    assert "404" in str(caught.value)


def curl(*arguments: str) -> str:
    return subprocess.run(
        ["curl", "-sS", "-N", *arguments], capture_output=True, text=True, timeout=60, check=True
    ).stdout


def test_the_pasted_curl_line_works(demo: Running) -> None:
    line = next(line for line in demo.lines if line.strip().startswith("curl "))
    done = subprocess.run(
        ["sh", "-c", line], capture_output=True, text=True, timeout=60, check=True
    )
    assert json.loads(done.stdout)["choices"][0]["message"]["content"]


def test_the_pasted_python_works(demo: Running) -> None:
    start = next(i for i, line in enumerate(demo.lines) if "import OpenAI" in line)
    code = "\n".join(line.strip() for line in demo.lines[start:])
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.strip()


def test_curl_streams(demo: Running) -> None:
    body = {"model": "demo", "stream": True, "max_tokens": 4}
    body["messages"] = [{"role": "user", "content": "Say hello."}]
    out = curl(f"{demo.url}/v1/chat/completions", "-d", json.dumps(body))
    assert out.endswith("data: [DONE]\n\n")
    out = curl("-0", f"{demo.url}/v1/chat/completions", "-d", json.dumps(body))
    assert out.endswith("data: [DONE]\n\n")


def test_other_forms_of_curl(demo: Running) -> None:
    out = curl("-X", "POST", f"{demo.url}/v1", "-d", '{"inputs": ["a", "b"]}')
    assert [len(vector) for vector in json.loads(out)] == [576, 576]
    assert json.loads(curl(f"{demo.url}/models/demo/"))["id"] == "demo"
    assert "rungway_calls_total" in curl(f"{demo.url}/metrics")
