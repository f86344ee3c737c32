"""What a Space publishes, and a call put into its words: the positional inputs of a job.

Positions come from `/config` (a dependency's component ids), names and defaults from `/info`, which
leaves out state. State is sent as null in its own position: Gradio 4 and 5 fail without it, and in
a chat it stands second, not last. A stateless call has no history, so a conversation goes into the
message as one text.

Nothing that changes an answer's meaning is dropped in silence: what a Space has no input for is a
reason to skip the rung (`unable_chat`), or is told in the refusal. Limits of sampling that a Space
does not offer (temperature, top_p, max_tokens) are left to the Space.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from router.errors import RungRefused, UpstreamBroken
from router.types import Json, Task

Template = str | int | float | bool

PROTOCOLS = frozenset({"sse_v2", "sse_v2.1", "sse_v3"})
_STATE_TYPES = frozenset({"state", "browserstate"})
_MULTIMODAL = "multimodaltextbox"
_TEXT_TYPES = frozenset({"textbox", "text", "textarea", _MULTIMODAL})
_NUMBER_TYPES = frozenset({"slider", "number"})
# The name that a task's endpoint usually has; ChatInterface always publishes /chat.
_USUAL_NAMES = {
    Task.CHAT: ("/chat",),
    Task.EMBEDDINGS: ("/embed", "/embeddings", "/encode", "/feature_extraction"),
}
_NAMES_SHOWN_MAX = 20
# How long a rung stays closed whose Space has no inputs for us: its author has to change it.
_UNFIT_COOL_S = 60.0

_PLACEHOLDER = re.compile(r"\{([a-z_]+)\}")
_SYSTEM = re.compile(r"system", re.IGNORECASE)
_MESSAGE = re.compile(
    r"message|prompt|question|query|instruction|\buser\b|\btexts?\b|\binputs?\b", re.IGNORECASE
)
_TEXTS = re.compile(r"texts?|inputs?|sentences?|documents?|quer(?:y|ies)", re.IGNORECASE)
_NUMBERS = {
    "max_tokens": re.compile(
        r"^max(?:imum)?[ _]?(?:new|output|completion)?[ _]?(?:tokens?|length)\b", re.IGNORECASE
    ),
    "temperature": re.compile(r"^temperature\b", re.IGNORECASE),
    "top_p": re.compile(r"^top[ _-]?p\b", re.IGNORECASE),
}


@dataclass(frozen=True, slots=True)
class Input:
    """One input of an endpoint, in its position. `component` is its type, lower case."""

    component: str
    name: str = ""
    label: str = ""
    has_default: bool = False
    default: Any = None
    minimum: float | None = None
    maximum: float | None = None
    takes_number: bool = False

    @property
    def is_text(self) -> bool:
        return self.component in _TEXT_TYPES

    @property
    def title(self) -> str:
        return self.name or self.label or f"an unnamed {self.component}"

    def is_like(self, words: re.Pattern[str]) -> bool:
        return bool(words.search(self.name) or words.search(self.label))


@dataclass(frozen=True, slots=True)
class Endpoint:
    """One function of a Space. `output_index` is where its answer is among its outputs."""

    api_name: str
    fn_index: int
    inputs: tuple[Input, ...]
    output_index: int


@dataclass(frozen=True, slots=True)
class Published:
    """A Space as its documents describe it. `prefix` stands before `/queue/join` and the like.

    `shown` are the endpoints that its author means for callers; an app has others for its own page.
    """

    version: str
    prefix: str
    endpoints: Mapping[str, Endpoint]
    shown: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Asked:
    """A call in the words that templates know."""

    message: str = ""
    conversation: str = ""
    system: str = ""
    numbers: Mapping[str, float] | None = None
    texts: Sequence[str] = ()

    def transcript(self, *, with_system: bool) -> str:
        return _joined(self.system, self.conversation) if with_system else self.conversation

    @property
    def all_text(self) -> str:
        return self.transcript(with_system=True)


# --- what a Space publishes ---------------------------------------------------------------------


def read_prefix(config: Any, *, who: str) -> str:
    """The path before the queue's routes: none on Gradio 4. Raises UpstreamError."""
    if not isinstance(config, dict) or not isinstance(config.get("dependencies"), list):
        raise UpstreamBroken(f"{who} has a /config that is not a Gradio app's")
    protocol = config.get("protocol")
    if protocol not in PROTOCOLS:
        raise RungRefused(
            f"{who} speaks the Gradio protocol {str(protocol)[:40]!r}; "
            "Rungway speaks that of Gradio 4.20 and newer",
            code="upstream_model",
            cool_s=_UNFIT_COOL_S,
        )
    prefix = config.get("api_prefix") or ""
    if not isinstance(prefix, str) or not re.fullmatch(r"(?:/[\w.-]{1,64}){0,4}", prefix):
        raise UpstreamBroken(f"{who} has a /config with an api_prefix that is not a path")
    return prefix


def read_published(config: Any, info: Any, *, who: str) -> Published:
    """The endpoints in `/config` and `/info` (None: the Space shows none). Raises UpstreamError."""
    prefix = read_prefix(config, who=who)
    named = info.get("named_endpoints") if isinstance(info, dict) else None
    try:
        components = {one["id"]: one for one in config["components"]}
        endpoints = {}
        for dependency in config["dependencies"]:
            api_name = dependency.get("api_name")
            if isinstance(api_name, str) and dependency.get("backend_fn", True):
                name = "/" + api_name.removeprefix("/")
                described = named.get(name) if isinstance(named, dict) else None
                endpoints[name] = _endpoint(name, dependency, components, described)
        shown = [name for name in endpoints if not isinstance(named, dict) or name in named]
        version = str(config.get("version", ""))[:40]
        return Published(version, prefix, endpoints, tuple(sorted(shown)))
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise UpstreamBroken(f"{who} has a /config or /info that cannot be read") from error


def choose_endpoint(
    published: Published, api_name: str | None, task: Task, *, who: str
) -> Endpoint:
    """The configured endpoint, else the task's usual one, else the only one. Raises RungRefused."""
    endpoints, shown = published.endpoints, published.shown
    wanted = (api_name,) if api_name else _USUAL_NAMES[task]
    for name in wanted:
        if name in endpoints:
            return endpoints[name]
    if api_name is None and len(shown) == 1:
        return endpoints[shown[0]]
    names = ", ".join(shown[:_NAMES_SHOWN_MAX]) or "no endpoint at all"
    lead = f"has no endpoint {api_name}" if api_name else f"has no usual endpoint for {task}"
    raise RungRefused(
        f"{who} {lead}: it publishes {names}; set the backend's api_name to one of these",
        code="upstream_model",
        cool_s=_UNFIT_COOL_S,
    )


def _endpoint(
    name: str, dependency: Any, components: Mapping[Any, Any], described: Any
) -> Endpoint:
    parameters = iter(described["parameters"] if described else ())
    inputs = []
    for component_id in dependency["inputs"]:
        component = components[component_id]
        is_hidden = _type(component) == "state" or component.get("skip_api") is True
        inputs.append(_input(component, {} if is_hidden else next(parameters, {})))
    outputs = [_type(components[component_id]) for component_id in dependency["outputs"]]
    return Endpoint(name, int(dependency["id"]), tuple(inputs), _answer_index(outputs))


def _input(component: Any, parameter: Any) -> Input:
    props = component.get("props") or {}
    kind = _type(component)
    value = props.get("value")
    schema = parameter.get("type")
    types = schema.get("type") if isinstance(schema, dict) else None
    label = parameter.get("label") or props.get("label")
    return Input(
        component=kind,
        name=str(parameter.get("parameter_name") or ""),
        label=label if isinstance(label, str) else "",
        has_default=bool(parameter.get("parameter_has_default", value is not None)),
        default=parameter.get("parameter_default", value),
        minimum=_number(props.get("minimum")),
        maximum=_number(props.get("maximum")),
        takes_number=kind in _NUMBER_TYPES or types in ("number", "integer"),
    )


def _answer_index(outputs: Sequence[str]) -> int:
    """A chatbot's place, since the box beside it is only being cleared; else the first output's."""
    if "chatbot" in outputs:
        return outputs.index("chatbot")
    return next((i for i, kind in enumerate(outputs) if kind not in _STATE_TYPES), 0)


def _type(component: Any) -> str:
    return str(component["type"]).lower()


def _number(value: Any) -> float | None:
    return value if type(value) in (int, float) else None


# --- what a call asks ---------------------------------------------------------------------------


def unable_chat(body: Json) -> str | None:
    """Why a chat request cannot be put to a Space faithfully, or None."""
    if body.get("tools") or body.get("functions"):
        return "a Space takes no tools"
    if (body.get("n") or 1) > 1:
        return "a Space gives one answer, not n"
    if body.get("logprobs") or body.get("top_logprobs"):
        return "a Space gives no logprobs"
    if body.get("stop"):
        return "a Space knows no stop strings"
    form = body.get("response_format")
    if isinstance(form, dict) and form.get("type") not in (None, "text"):
        return f"a Space cannot be held to response_format {form.get('type')}"
    for message in body["messages"]:
        if message.get("role") in ("tool", "function") or message.get("tool_calls"):
            return "a Space takes no tool messages"
        content = message.get("content")
        parts = content if isinstance(content, list) else []
        if any(part.get("type") not in ("text", "refusal") for part in parts):
            return "a Space is given text only: no images, audio or files"
    return None


def asked_of_chat(body: Json) -> Asked:
    """A chat request in the words of templates."""
    system = ""
    turns: list[tuple[str, str]] = []
    for message in body["messages"]:
        role, text = message["role"], _text(message.get("content"))
        if role in ("system", "developer"):
            system = _joined(system, text)
        else:
            turns.append(("Assistant" if role == "assistant" else "User", text))
    numbers = {
        "max_tokens": _number(body.get("max_completion_tokens") or body.get("max_tokens")),
        "temperature": _number(body.get("temperature")),
        "top_p": _number(body.get("top_p")),
    }
    return Asked(
        message=next((text for role, text in reversed(turns) if role == "User"), ""),
        conversation=_flattened(turns),
        system=system,
        numbers={name: value for name, value in numbers.items() if value is not None},
    )


def _flattened(turns: Sequence[tuple[str, str]]) -> str:
    if not turns:
        return ""
    if len(turns) == 1 and turns[0][0] == "User":
        return turns[0][1]
    lines = [f"{role}: {text}" for role, text in turns]
    return "\n\n".join([*lines, "Assistant:"])


def _text(content: Any) -> str:
    if isinstance(content, str):
        return content
    parts = content if isinstance(content, list) else []
    return "".join(str(part.get("text") or part.get("refusal") or "") for part in parts)


def _joined(first: str, second: str) -> str:
    return f"{first}\n\n{second}" if first and second else first or second


# --- the one put into the other -----------------------------------------------------------------


def fill_chat(
    endpoint: Endpoint, asked: Asked, templates: Mapping[str, Template], *, who: str
) -> list[Any]:
    """A chat's inputs in their positions. Raises RungRefused where one cannot be filled."""
    if templates:
        return _fill_templates(endpoint, asked, templates, who)
    texts = [one for one in endpoint.inputs if one.is_text]
    system = next((one for one in texts if one.is_like(_SYSTEM)), None)
    others = [one for one in texts if one is not system]
    message = next((one for one in others if one.is_like(_MESSAGE)), others[0] if others else None)
    if message is None:
        raise _unfit(who, f"{endpoint.api_name} has no text input for the message")
    text = asked.transcript(with_system=system is None)
    values = []
    for one in endpoint.inputs:
        if one is message:
            values.append(_as_text(one, text))
        elif one is system and asked.system:
            values.append(_as_text(one, asked.system))
        else:
            values.append(_number_or_default(one, asked, endpoint, who))
    return values


def takes_lists(endpoint: Endpoint, templates: Mapping[str, Template]) -> bool:
    """Whether the endpoint takes all texts of an embeddings call at once."""
    target = _texts_input(endpoint, templates)
    return target is not None and not target.is_text


def fill_embed(
    endpoint: Endpoint, texts: Sequence[str], templates: Mapping[str, Template], *, who: str
) -> list[Any]:
    """An embeddings call's inputs: all its texts, or its one text where a text box takes them."""
    if templates:
        return _fill_templates(endpoint, Asked(texts=texts), templates, who)
    target = _texts_input(endpoint, templates)
    if target is None:
        raise _unfit(who, f"{endpoint.api_name} has no input for texts")
    return [
        _texts_value(one, texts) if one is target else _default(one, endpoint, who)
        for one in endpoint.inputs
    ]


def _texts_input(endpoint: Endpoint, templates: Mapping[str, Template]) -> Input | None:
    if templates:
        named = [
            one for one in endpoint.inputs if _mentions(_template_of(one, templates), "inputs")
        ]
        return named[0] if named else None
    able = [one for one in endpoint.inputs if one.is_text or one.component == "json"]
    return next((one for one in able if one.is_like(_TEXTS)), able[0] if able else None)


def _texts_value(one: Input, texts: Sequence[str]) -> Any:
    return _as_text(one, texts[0]) if one.is_text else list(texts)


def _fill_templates(
    endpoint: Endpoint, asked: Asked, templates: Mapping[str, Template], who: str
) -> list[Any]:
    names = {name for one in endpoint.inputs for name in (one.name, one.label)}
    unknown = sorted(set(templates) - names)
    if unknown:
        known = ", ".join(sorted(names - {""})[:_NAMES_SHOWN_MAX])
        raise _unfit(who, f"{endpoint.api_name} has no input {unknown[0]!r}, only {known}")
    has_system = any(_mentions(template, "system") for template in templates.values())
    values = []
    for one in endpoint.inputs:
        template = _template_of(one, templates)
        if template is None:
            values.append(_default(one, endpoint, who))
        else:
            values.append(_filled(one, template, asked, has_system, endpoint, who))
    return values


def _filled(
    one: Input, template: Template, asked: Asked, has_system: bool, endpoint: Endpoint, who: str
) -> Any:
    if not isinstance(template, str):
        return template
    whole = _PLACEHOLDER.fullmatch(template)
    name = whole[1] if whole else ""
    if name == "inputs":
        return _texts_value(one, asked.texts)
    if name in _NUMBERS:
        value = (asked.numbers or {}).get(name)
        return _default(one, endpoint, who) if value is None else _in_range(one, name, value, who)
    text = _PLACEHOLDER.sub(lambda found: _said(found[1], found[0], asked, has_system), template)
    if whole and name == "system" and not text:
        return _default(one, endpoint, who) if one.has_default else _as_text(one, "")
    return _as_number(text) if one.takes_number else _as_text(one, text)


def _said(name: str, as_written: str, asked: Asked, has_system: bool) -> str:
    """A placeholder's text; the system prompt goes before the message unless it has its own place.

    Braces around any other word are the template's own text.
    """
    match name:
        case "message":
            return asked.message if has_system else _joined(asked.system, asked.message)
        case "transcript":
            return asked.transcript(with_system=not has_system)
        case "system":
            return asked.system
        case "inputs":
            return "\n".join(asked.texts)
        case "max_tokens" | "temperature" | "top_p":
            value = (asked.numbers or {}).get(name)
            return "" if value is None else f"{value:g}"
        case _:
            return as_written


def _template_of(one: Input, templates: Mapping[str, Template]) -> Template | None:
    if one.name and one.name in templates:
        return templates[one.name]
    return templates.get(one.label) if one.label else None


def _mentions(template: Template | None, name: str) -> bool:
    return isinstance(template, str) and f"{{{name}}}" in template


def _number_or_default(one: Input, asked: Asked, endpoint: Endpoint, who: str) -> Any:
    if one.takes_number:
        for name, words in _NUMBERS.items():
            value = (asked.numbers or {}).get(name)
            if value is not None and one.is_like(words):
                return _in_range(one, name, value, who)
    return _default(one, endpoint, who)


def _in_range(one: Input, name: str, value: float, who: str) -> float:
    """The number as the Space takes it: fewer tokens than asked for are still an answer to it."""
    if name == "max_tokens" and one.maximum is not None and value > one.maximum:
        return one.maximum
    below = one.minimum is not None and value < one.minimum
    if below or (one.maximum is not None and value > one.maximum):
        bounds = f"{_bound(one.minimum)} to {_bound(one.maximum)}"
        raise RungRefused(
            f"{who}: {name} {value:g} is outside of the Space's {bounds}",
            code="upstream_unsupported_value",
            param=name,
        )
    return value


def _bound(value: float | None) -> str:
    return "any" if value is None else f"{value:g}"


def _default(one: Input, endpoint: Endpoint, who: str) -> Any:
    if one.component in _STATE_TYPES:
        return None
    if one.has_default:
        return one.default
    if one.component == "chatbot":
        return []
    if one.component in ("button", "uploadbutton", "downloadbutton", "clearbutton"):
        return None
    if one.is_text and one.is_like(_SYSTEM):
        return _as_text(one, "")
    raise _unfit(
        who,
        f"{endpoint.api_name} wants {one.title} ({one.component}), which has no default; "
        "say what goes there in the backend's inputs",
    )


def _as_text(one: Input, text: str) -> Any:
    return {"text": text, "files": []} if one.component == _MULTIMODAL else text


def _as_number(text: str) -> Any:
    for parse in (int, float):
        try:
            return parse(text)
        except ValueError:
            continue
    return text


def _unfit(who: str, reason: str) -> RungRefused:
    return RungRefused(f"{who}: {reason}", code="upstream_model", cool_s=_UNFIT_COOL_S)
