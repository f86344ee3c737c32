"""Which model servers answer on this machine, told apart by what they say and never by the port.

Each address is asked a few small questions in an order that separates the servers without side
effects: nothing is generated, loaded or billed. (SGLang's /health runs a token, so it is never
asked; llama.cpp's /v1/embeddings is asked without an input, which it refuses at once.) What a
stranger answers is bounded in time, bytes and count. The signs are those of each server's own
sources: TGI and TEI `/info`, `owned_by` in `/v1/models`, LM Studio's and Ollama's own lists.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import orjson

from router.errors import ConnectFailed, UpstreamError, UpstreamTimeout
from router.transport.http import HttpClient

_QUESTION_S = 2.0
_ADDRESS_S = 6.0
_ANSWER_BYTES_MAX = 2 << 20  # a Gradio app's /config has hundreds of kilobytes
_MODELS_MAX = 200
_AT_ONCE_MAX = 16
_NAME_CHARS_MAX = 512
_CONTEXT_MAX = 1_000_000_000

CHAT, EMBEDDINGS = "chat", "embeddings"
# Where a server does not say what a model is for, its name has to.
_EMBEDDER = re.compile(r"embed|\bbge\b|\be5\b|\bgte\b|minilm|arctic-embed|mxbai", re.IGNORECASE)
_GRADIO_EMBEDS = ("embed", "embeddings", "encode", "feature_extraction")


@dataclass(frozen=True, slots=True)
class FoundModel:
    """A model that a server lists. `task` None: neither chat nor embeddings, or not known."""

    id: str
    context: int | None = None
    task: str | None = None


@dataclass(frozen=True, slots=True)
class Found:
    """A server: its address, its kind in the configuration ("": not to be told), its name."""

    url: str
    kind: str
    server: str
    models: tuple[FoundModel, ...] = ()
    note: str = ""


def usual_ports() -> tuple[int, ...]:
    """Where model servers listen unless told otherwise; which one it is, is asked."""
    return (3000, 8000, 8080, 30000, 11434, 1234, 7860, 8001, 8081)


async def detect(
    client: HttpClient,
    ports: Iterable[int],
    host: str = "127.0.0.1",
    *,
    question_s: float = _QUESTION_S,
) -> list[Found]:
    """The servers on these ports, in the order of the ports; another Rungway is left out."""
    slots = asyncio.Semaphore(_AT_ONCE_MAX)
    name = f"[{host}]" if ":" in host else host

    async def ask(port: int) -> Found | None:
        async with slots:
            return await _identify(_Address(client, f"http://{name}:{port}", question_s))

    found = await asyncio.gather(*(ask(port) for port in dict.fromkeys(ports)))
    return [one for one in found if one is not None]


class _Silent(Exception):
    """Nothing there speaks HTTP: no further question is worth its wait."""


class _Address:
    """One address with its questions. An answer that is not JSON is None."""

    def __init__(self, client: HttpClient, url: str, question_s: float) -> None:
        self._client = client
        self._question_s = question_s
        self.url = url
        self._has_answered = False

    async def get(self, path: str) -> tuple[int, Any]:
        status, body = await self.ask("GET", path)
        return status, _json(body)

    async def ask(self, method: str, path: str, body: bytes | None = None) -> tuple[int, bytes]:
        """Status and body; status 0 where a server that spoke before gives no answer to this."""
        headers = {"Accept": "application/json, */*"}
        if body is not None:
            headers["Content-Type"] = "application/json"
        try:
            status, _, answer = await self._client.fetch(
                method,
                self.url + path,
                headers=headers,
                body=body,
                bytes_max=_ANSWER_BYTES_MAX,
                within_s=self._question_s,
            )
        except UpstreamError as error:
            if not self._has_answered or isinstance(error, ConnectFailed | UpstreamTimeout):
                raise _Silent from error
            return 0, b""
        self._has_answered = True
        return status, answer


async def _identify(at: _Address) -> Found | None:
    try:
        async with asyncio.timeout(_ADDRESS_S):
            return await _questions(at)
    except (_Silent, TimeoutError):
        return None


async def _questions(at: _Address) -> Found | None:
    info_status, info = await at.get("/info")
    if isinstance(info, dict) and (found := _by_info(at, info)) is not None:
        return found
    status, listed = await at.get("/v1/models")
    entries = _entries(listed)
    if any(entry.get("owned_by") == "rungway" for entry in entries):
        return None
    if entries:
        return await _by_models(at, entries)
    if status == 503 and _is_loading(listed):
        return Found(at.url, "openai", "llama.cpp", note="its model is still loading; look again")
    if (found := await _ollama(at, [])) is not None:
        return found
    if isinstance(listed, dict) and isinstance(listed.get("data"), list):
        return Found(at.url, "openai", "an OpenAI-like server", note="it lists no models")
    if (found := await _gradio(at)) is not None:
        return found
    if {info_status, status} & {401, 403}:
        note = "it wants a token, so it cannot be told what it is; configure it by hand"
        return Found(at.url, "", "a server behind a token", note=note)
    return None


# --- by its own page ----------------------------------------------------------------------------


def _by_info(at: _Address, info: dict[str, Any]) -> Found | None:
    """TGI names its router; TEI says what its model is."""
    name = _name(info.get("model_id"))
    if isinstance(kinds := info.get("model_type"), dict) and name:
        context = _context(info.get("max_input_length"))
        if "embedding" in kinds:
            return Found(at.url, "tei", "TEI", (FoundModel(name, context, EMBEDDINGS),))
        other = next((str(kind)[:40] for kind in kinds), "model")
        note = f"its model is a {other}, which no ladder serves yet"
        return Found(at.url, "tei", "TEI", (FoundModel(name, context, None),), note)
    # Releases before 2.0 name no router but have TGI's own limits.
    is_tgi = info.get("router") == "text-generation-router" or "max_best_of" in info
    if is_tgi and name:
        context = _context(info.get("max_total_tokens"))
        return Found(at.url, "tgi", "TGI", (FoundModel(name, context, CHAT),))
    return None


# --- by its list of models ----------------------------------------------------------------------


async def _by_models(at: _Address, entries: list[dict[str, Any]]) -> Found | None:
    owners = {entry.get("owned_by") for entry in entries}
    if "vllm" in owners:
        return _openai(at, "vLLM", entries)
    if "sglang" in owners:
        return await _sglang(at, entries)
    if "llamacpp" in owners:
        return await _llama_cpp(at, entries)
    if "organization_owner" in owners and (found := await _lm_studio(at)) is not None:
        return found
    first = entries[0]
    if len(entries) == 1 and first.get("created") == 0 and first.get("owned_by") == first["id"]:
        return Found(at.url, "tgi", "TGI", _models(entries, CHAT))
    # An integer everywhere else.
    if any(isinstance(entry.get("created"), float) for entry in entries):
        return Found(at.url, "openai", "transformers serve", _models(entries, CHAT))
    return await _by_other_pages(at, entries)


async def _by_other_pages(at: _Address, entries: list[dict[str, Any]]) -> Found | None:
    """The same servers under another name, as behind `--served-model-name` or in a fork."""
    if (found := await _ollama(at, entries)) is not None:
        return found
    _, props = await at.get("/props")
    if isinstance(props, dict) and "default_generation_settings" in props:
        return await _llama_cpp(at, entries)
    if (found := await _lm_studio(at)) is not None:
        return found
    _, version = await at.get("/version")
    if isinstance(version, dict) and any("max_model_len" in entry for entry in entries):
        return _openai(at, "vLLM", entries)
    return _openai(at, "an OpenAI-like server", entries)


def _openai(at: _Address, server: str, entries: list[dict[str, Any]]) -> Found:
    return Found(at.url, "openai", server, _models(entries, None))


async def _sglang(at: _Address, entries: list[dict[str, Any]]) -> Found:
    for path in ("/model_info", "/get_model_info"):
        _, info = await at.get(path)
        generates = info.get("is_generation") if isinstance(info, dict) else None
        if isinstance(generates, bool):
            task = CHAT if generates else EMBEDDINGS
            return Found(at.url, "openai", "SGLang", _models(entries, task))
    return _openai(at, "SGLang", entries)


async def _llama_cpp(at: _Address, entries: list[dict[str, Any]]) -> Found:
    """With `--embeddings` it asks for the input; without, it says that it has no embeddings."""
    status, _ = await at.ask("POST", "/v1/embeddings", b"{}")
    task = {501: CHAT, 400: EMBEDDINGS}.get(status)
    _, props = await at.get("/props")
    settings = props.get("default_generation_settings") if isinstance(props, dict) else None
    context = _context(settings.get("n_ctx")) if isinstance(settings, dict) else None
    models = _models(entries, task)
    if context is not None and len(models) == 1:
        models = (FoundModel(models[0].id, context, models[0].task),)
    return Found(at.url, "openai", "llama.cpp", models)


async def _lm_studio(at: _Address) -> Found | None:
    """Its own list says what each model is for. Loaded ones first: the others must load first."""
    _, listed = await at.get("/api/v0/models")
    entries = [entry for entry in _entries(listed) if "type" in entry and "state" in entry]
    if not entries:
        return None
    entries.sort(key=lambda entry: entry["state"] != "loaded")
    tasks = {"llm": CHAT, "vlm": CHAT, "embeddings": EMBEDDINGS}
    models = tuple(
        FoundModel(
            entry["id"],
            _context(entry.get("loaded_context_length") or entry.get("max_context_length")),
            tasks.get(entry["type"]) if isinstance(entry["type"], str) else None,
        )
        for entry in entries
    )
    return Found(at.url, "openai", "LM Studio", models)


async def _ollama(at: _Address, entries: list[dict[str, Any]]) -> Found | None:
    """Ollama has a version and a greeting. It tells embedders by their family, as in bert."""
    _, version = await at.get("/api/version")
    if not (isinstance(version, dict) and isinstance(version.get("version"), str)):
        return None
    _, greeting = await at.ask("GET", "/")
    status, tags = await at.get("/api/tags")
    if b"Ollama" not in greeting[:200] and status != 200:
        return None
    tagged = tags.get("models") if isinstance(tags, dict) else None
    embedders = {
        entry.get("name")
        for entry in (tagged if isinstance(tagged, list) else [])
        if isinstance(entry, dict) and _is_bert(entry.get("details"))
    }
    # Not its context: a prompt is cut at `num_ctx`, which is smaller and which nothing tells.
    models = tuple(
        FoundModel(entry["id"], None, EMBEDDINGS if entry["id"] in embedders else _guess(entry))
        for entry in entries
    )
    note = "" if models else "it has no models; `ollama pull` fetches one"
    return Found(at.url, "openai", "Ollama", models, note)


def _is_bert(details: Any) -> bool:
    if not isinstance(details, dict):
        return False
    families = details.get("families")
    names = [details.get("family"), *(families if isinstance(families, list) else ())]
    return any(isinstance(name, str) and "bert" in name.lower() for name in names)


# --- by its app ---------------------------------------------------------------------------------


async def _gradio(at: _Address) -> Found | None:
    _, config = await at.get("/config")
    if not (isinstance(config, dict) and isinstance(config.get("version"), str)):
        return None
    dependencies = config.get("dependencies")
    if not isinstance(dependencies, list) or not isinstance(config.get("components"), list):
        return None
    names = {
        one["api_name"].removeprefix("/")
        for one in dependencies
        if isinstance(one, dict) and isinstance(one.get("api_name"), str)
    }
    name = _name(config.get("space_id")) or _slug(config.get("title")) or "app"
    tasks = [CHAT] if "chat" in names else []
    tasks += [EMBEDDINGS] if names.intersection(_GRADIO_EMBEDS) else []
    note = "" if tasks else "it has no /chat and no /embed; name its function with api_name"
    models = tuple(FoundModel(name, None, task) for task in tasks)
    return Found(at.url, "gradio-space", "Gradio", models, note)


def _slug(title: Any) -> str:
    words = re.findall(r"[a-z0-9]+", title.lower()) if isinstance(title, str) else []
    return "-".join(words)[:64].strip("-")


# --- what strangers answer ----------------------------------------------------------------------


def _json(body: bytes) -> Any:
    try:
        return orjson.loads(body)
    except orjson.JSONDecodeError:
        return None


def _entries(listed: Any) -> list[dict[str, Any]]:
    """The entries of a list of models that have a usable name."""
    data = listed.get("data") if isinstance(listed, dict) else None
    if not isinstance(data, list):
        return []
    return [
        entry for entry in data[:_MODELS_MAX] if isinstance(entry, dict) and _name(entry.get("id"))
    ]


def _models(entries: list[dict[str, Any]], task: str | None) -> tuple[FoundModel, ...]:
    """`task` where the server told it for all of them; else each one's name has to tell."""
    return tuple(
        FoundModel(entry["id"], _entry_context(entry), task or _guess(entry)) for entry in entries
    )


def _guess(entry: dict[str, Any]) -> str:
    return EMBEDDINGS if _EMBEDDER.search(entry["id"]) else CHAT


def _entry_context(entry: dict[str, Any]) -> int | None:
    meta = entry.get("meta")
    told = entry.get("max_model_len")
    if told is None and isinstance(meta, dict):
        told = meta.get("n_ctx")
    return _context(told)


def _context(value: Any) -> int | None:
    return value if type(value) is int and 0 < value <= _CONTEXT_MAX else None


def _name(value: Any) -> str:
    """A model's name as the configuration may hold it, or ""."""
    if not isinstance(value, str) or not 0 < len(value) <= _NAME_CHARS_MAX:
        return ""
    return value if value.isprintable() and value == value.strip() else ""


def _is_loading(body: Any) -> bool:
    error = body.get("error") if isinstance(body, dict) else None
    return isinstance(error, dict) and error.get("type") == "unavailable_error"
