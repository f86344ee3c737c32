"""A configuration from what was found: for a start without a file, and for `rungway detect`.

Local servers come first, in the order found, each with its first fitting model; Inference Providers
follow where there is a token. Vectors of different models never share a ladder: the first embedder
found gives the ladder `embed` its vector space, and one of another model is only named.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from router.hub.detect import CHAT, EMBEDDINGS, Found, FoundModel

# Widely served models of a middle size; a provider that serves one is chosen by price.
_PROVIDERS_CHAT = "meta-llama/Llama-3.3-70B-Instruct:cheapest"
_PROVIDERS_EMBED = "BAAI/bge-m3"
_PROVIDERS_BACKEND = "hf"
# A local server may have to load its model first.
_FIRST_TOKEN_S = 60
_OTHERS_SHOWN_MAX = 20

_HEAD = """\
# Made from what was found on this machine. Save it as rungway.toml to keep and change it.

[server]
auth = "open"  # anyone on this machine may call; it listens on 127.0.0.1 alone
"""
_NOTHING = """
# No model server answered here, and HF_TOKEN is not set, so there is no ladder.
# Start a server (TGI, TEI, vLLM, SGLang, llama.cpp, Ollama, LM Studio, a Gradio app), or set
# HF_TOKEN for Inference Providers.
"""


@dataclass(frozen=True, slots=True)
class _Rung:
    backend: str
    model: str
    note: str = ""


def configuration_for(found: Sequence[Found], has_token: bool) -> str:
    """The TOML of a configuration that can be used as it is."""
    named = list(_named(found))
    chat = [
        _Rung(name, model.id, _others(one, model))
        for name, one in named
        if (model := _first(one, CHAT)) is not None
    ]
    embed, left_out = _one_space(named)
    if has_token:
        chat.append(_Rung(_PROVIDERS_BACKEND, _PROVIDERS_CHAT, "a default: choose your own"))
        if not embed or embed[0].model == _PROVIDERS_EMBED:
            embed.append(_Rung(_PROVIDERS_BACKEND, _PROVIDERS_EMBED, "a default: choose your own"))
        else:
            left_out.append(
                f"Inference Providers: its rung would need {embed[0].model} too, "
                "for vectors of different models must not mix"
            )
    parts = [_HEAD]
    parts += [_backend(name, one) for name, one in named]
    parts += [_useless(one) for one in found if not one.kind]
    if has_token:
        parts.append(
            f'\n[backends.{_PROVIDERS_BACKEND}]\nkind = "inference-providers"\n'
            'token = "env:HF_TOKEN"\n'
        )
    parts += _ladder("chat", CHAT, chat, [])
    parts += _ladder("embed", EMBEDDINGS, embed, left_out)
    if not chat and not embed:
        parts.append(_NOTHING)
    return "".join(parts)


def _named(found: Sequence[Found]) -> Iterator[tuple[str, Found]]:
    """Each usable server with a name for its backend, by what it is."""
    used = {_PROVIDERS_BACKEND}
    for one in found:
        if not one.kind:
            continue
        base = {
            "an OpenAI-like server": "local",
            "LM Studio": "lm-studio",
            "transformers serve": "transformers",
            "llama.cpp": "llama-cpp",
        }.get(one.server, one.server.lower())
        name = base if base not in used else f"{base}-{one.url.rpartition(':')[2]}"
        while name in used:
            name += "-2"
        used.add(name)
        yield name, one


def _first(one: Found, task: str) -> FoundModel | None:
    return next((model for model in one.models if model.task == task), None)


def _others(one: Found, taken: FoundModel) -> str:
    """The server's further models of the same task, for a comment."""
    names = [model.id for model in one.models if model.task == taken.task and model is not taken]
    if not names:
        return ""
    more = len(names) - _OTHERS_SHOWN_MAX
    return (
        "also there: "
        + ", ".join(names[:_OTHERS_SHOWN_MAX])
        + (f" and {more} more" if more > 0 else "")
    )


def _one_space(named: Sequence[tuple[str, Found]]) -> tuple[list[_Rung], list[str]]:
    """The rungs of one vector space, and what to say of the embedders of others."""
    rungs: list[_Rung] = []
    left_out = []
    for name, one in named:
        models = [model for model in one.models if model.task == EMBEDDINGS]
        same = [model for model in models if not rungs or model.id == rungs[0].model]
        if same:
            rungs.append(_Rung(name, same[0].id, _others(one, same[0])))
        elif models:
            left_out.append(f"{name} has {models[0].id}: another model needs a ladder of its own")
    return rungs, left_out


def _backend(name: str, one: Found) -> str:
    note = f"  # {_comment(one.note)}" if one.note else ""
    return (
        f"\n[backends.{name}]  # {_comment(one.server)}\n"
        f"kind = {_quoted(one.kind)}\nurl = {_quoted(one.url)}{note}\n"
    )


def _useless(one: Found) -> str:
    return f"\n# {_comment(one.url)}: {_comment(one.server)}: {_comment(one.note)}\n"


def _ladder(name: str, task: str, rungs: Sequence[_Rung], left_out: Sequence[str]) -> list[str]:
    if not rungs:
        return []
    lines = [f"\n[ladders.{name}]", f"task = {_quoted(task)}"]
    if task == CHAT:
        lines.append(f"first_token_s = {_FIRST_TOKEN_S}  # a local model may have to load first")
    lines += [f"# left out: {_comment(one)}" for one in left_out]
    for rung in rungs:
        note = f"  # {_comment(rung.note)}" if rung.note else ""
        lines += [
            f"[[ladders.{name}.rungs]]",
            f"backend = {_quoted(rung.backend)}",
            f"model = {_quoted(rung.model)}{note}",
        ]
    return ["\n".join(lines) + "\n"]


def _quoted(text: str) -> str:
    """A TOML string. JSON's escapes are TOML's too, but for DEL, which JSON leaves bare."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def _comment(text: str) -> str:
    """Text that stays on its line."""
    return "".join(c if c.isprintable() else "?" for c in text)
