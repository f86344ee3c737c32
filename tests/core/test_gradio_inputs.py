"""What Spaces publish, as recorded from three versions, and calls put into their inputs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from router.core import gradio_inputs as inputs
from router.core.gradio_inputs import Asked, Endpoint, Input, Published
from router.errors import RungRefused, UpstreamBroken, UpstreamError
from router.types import Task

RECORDINGS = Path(__file__).parent.parent / "recordings" / "gradio"
VERSIONS = ["4.44.1", "5.50.0", "6.31.0"]
WHO = "space/m"


def document(name: str) -> Any:
    return orjson.loads((RECORDINGS / name).read_bytes())


def published(version: str) -> Published:
    config, info = document(f"app-{version}-config.json"), document(f"app-{version}-info.json")
    return inputs.read_published(config, info, who=WHO)


LARGE = inputs.read_published(document("config.json"), document("info.json"), who=WHO)


def endpoint(*some: Input, api_name: str = "/chat") -> Endpoint:
    return Endpoint(api_name, 1, some, 0)


def showing(names: list[str]) -> Published:
    endpoints = {name: endpoint(api_name=name) for name in [*names, "/_own_page"]}
    return Published("6", "", endpoints, tuple(names))


def asked(*messages: tuple[str, Any], **fields: Any) -> Asked:
    turns = [{"role": role, "content": content} for role, content in messages]
    return inputs.asked_of_chat({"messages": turns, **fields})


HI = asked(("user", "hi"))
MESSAGE = Input("textbox", "message")
STATE = Input("state")
SYSTEM = Input("textbox", "system_prompt", "System prompt", has_default=True, default="be nice")
TOKENS = Input(
    "slider", "max_tokens", "Max tokens", True, 64, minimum=1, maximum=512, takes_number=True
)
TEMPERATURE = Input("slider", "t", "Temperature", True, 0.7, 0.1, 2.0, takes_number=True)
TOP_P = Input("number", "top-p", "", True, 0.9, takes_number=True)


# --- what a Space publishes ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("version", "prefix"), [("4.44.1", ""), ("5.50.0", "/gradio_api"), ("6.31.0", "/gradio_api")]
)
def test_recorded_documents_of_each_version(version: str, prefix: str) -> None:
    found = published(version)
    assert (found.version, found.prefix) == (version, prefix)
    chat = inputs.choose_endpoint(found, None, Task.CHAT, who=WHO)
    assert [one.component for one in chat.inputs] == ["textbox", "state", "textbox", "slider"]
    assert [one.name for one in chat.inputs] == ["message", "", "system_prompt", "max_tokens"]
    assert chat.output_index == 0
    embed = inputs.choose_endpoint(found, None, Task.EMBEDDINGS, who=WHO)
    assert embed.api_name == "/embed"
    assert inputs.takes_lists(embed, {})
    assert found.shown == ("/chat", "/embed", "/shout")


@pytest.mark.parametrize("version", VERSIONS)
def test_state_is_null_in_its_own_position(version: str) -> None:
    chat = published(version).endpoints["/chat"]
    assert inputs.fill_chat(chat, HI, {}, who=WHO) == ["hi", None, "be nice", 64]


def test_a_multimodal_chat_gets_its_own_form_of_message() -> None:
    chat = LARGE.endpoints["/chat_mm"]
    assert inputs.fill_chat(chat, HI, {}, who=WHO) == [{"text": "hi", "files": []}, None]


def test_without_info_the_labels_of_the_config_serve() -> None:
    found = inputs.read_published(document("app-6.31.0-config.json"), None, who=WHO)
    chat = found.endpoints["/chat"]
    filled = inputs.fill_chat(chat, asked(("system", "S"), ("user", "hi")), {}, who=WHO)
    assert filled == ["hi", None, "S", 64]


def test_a_chatbot_among_the_outputs_has_the_answer() -> None:
    components = [{"id": 1, "type": "textbox"}, {"id": 2, "type": "chatbot"}]
    functions = [{"id": 0, "api_name": "chat", "inputs": [1, 2], "outputs": [1, 2]}]
    config = {"protocol": "sse_v3", "components": components, "dependencies": functions}
    chat = inputs.read_published(config, {}, who=WHO).endpoints["/chat"]
    assert chat.output_index == 1
    assert inputs.fill_chat(chat, HI, {}, who=WHO) == ["hi", []]


@pytest.mark.parametrize(
    ("config", "error"),
    [
        (None, UpstreamBroken),
        ({}, UpstreamBroken),
        ({"dependencies": []}, RungRefused),
        ({"dependencies": [], "protocol": "ws"}, RungRefused),
        ({"dependencies": [], "protocol": "sse_v3"}, UpstreamBroken),
        ({"dependencies": [], "protocol": "sse_v3", "api_prefix": 3}, UpstreamBroken),
        ({"dependencies": [], "protocol": "sse_v3", "api_prefix": "@evil/"}, UpstreamBroken),
        ({"dependencies": [3], "protocol": "sse_v3", "components": []}, UpstreamBroken),
        ({"dependencies": [], "protocol": "sse_v3", "components": [{}]}, UpstreamBroken),
        ({"dependencies": [], "protocol": "sse_v3", "components": 3}, UpstreamBroken),
        (
            {
                "protocol": "sse_v3",
                "components": [],
                "dependencies": [{"id": 1, "api_name": "a", "inputs": [1], "outputs": []}],
            },
            UpstreamBroken,
        ),
    ],
)
def test_documents_that_are_none(config: Any, error: type[UpstreamError]) -> None:
    with pytest.raises(error, match=WHO):
        inputs.read_published(config, None, who=WHO)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=8,
)


@settings(max_examples=50)
@given(
    components=st.lists(st.fixed_dictionaries({"id": st.integers(0, 3), "type": JSON}) | JSON),
    dependencies=st.lists(
        st.fixed_dictionaries(
            {
                "id": JSON,
                "api_name": st.text(max_size=3),
                "inputs": st.lists(st.integers(0, 3)) | JSON,
                "outputs": st.lists(st.integers(0, 3)) | JSON,
            }
        )
    ),
    info=JSON | st.fixed_dictionaries({"named_endpoints": JSON}),
)
def test_any_documents_are_read_or_refused(components: Any, dependencies: Any, info: Any) -> None:
    config = {"protocol": "sse_v3", "components": components, "dependencies": dependencies}
    try:
        inputs.read_published(config, info, who=WHO)
    except UpstreamBroken:
        return


@pytest.mark.parametrize(
    ("names", "api_name", "task", "chosen"),
    [
        (["/chat", "/embed"], None, Task.CHAT, "/chat"),
        (["/chat", "/embed"], None, Task.EMBEDDINGS, "/embed"),
        (["/chat", "/chat_1"], "/chat_1", Task.CHAT, "/chat_1"),
        (["/predict"], None, Task.CHAT, "/predict"),
    ],
)
def test_the_endpoint_of_a_task(
    names: list[str], api_name: str | None, task: Task, chosen: str
) -> None:
    found = showing(names)
    assert inputs.choose_endpoint(found, api_name, task, who=WHO).api_name == chosen


@pytest.mark.parametrize(
    ("names", "api_name", "words"),
    [
        (["/a", "/b"], "/chat", "has no endpoint /chat: it publishes /a, /b; set"),
        (["/a", "/b"], None, "has no usual endpoint for chat: it publishes /a, /b"),
        ([], None, "no endpoint at all"),
    ],
)
def test_an_endpoint_that_is_not_there(names: list[str], api_name: str | None, words: str) -> None:
    found = showing(names)
    with pytest.raises(RungRefused, match=words):
        inputs.choose_endpoint(found, api_name, Task.CHAT, who=WHO)


# --- what a call asks ---------------------------------------------------------------------------

USER = {"role": "user", "content": "hi"}


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"tools": [{}]}, "tools"),
        ({"functions": [{}]}, "tools"),
        ({"n": 2}, "one answer"),
        ({"logprobs": True}, "logprobs"),
        ({"top_logprobs": 2}, "logprobs"),
        ({"stop": "x"}, "stop"),
        ({"response_format": {"type": "json_object"}}, "json_object"),
        ({"messages": [USER, {"role": "tool", "content": "x"}]}, "tool messages"),
        ({"messages": [{"role": "assistant", "tool_calls": [{}]}]}, "tool messages"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "images"),
    ],
)
def test_what_cannot_be_put_to_a_space(fields: Any, words: str) -> None:
    reason = inputs.unable_chat({"messages": [USER], **fields})
    assert reason is not None
    assert words in reason


def test_what_can_be_put_to_a_space() -> None:
    parts = [{"type": "text", "text": "hi"}]
    body = {
        "messages": [{"role": "user", "content": parts}],
        "n": 1,
        "tools": [],
        "stop": None,
        "response_format": {"type": "text"},
        "temperature": 0.5,
    }
    assert inputs.unable_chat(body) is None


@pytest.mark.parametrize(
    ("messages", "conversation"),
    [
        ([("user", "hi")], "hi"),
        ([("system", "S"), ("user", "hi")], "hi"),
        ([("user", [{"type": "text", "text": "h"}, {"type": "text", "text": "i"}])], "hi"),
        (
            [("user", "a"), ("assistant", "b"), ("user", "c")],
            "User: a\n\nAssistant: b\n\nUser: c\n\nAssistant:",
        ),
        ([("assistant", None)], "Assistant: \n\nAssistant:"),
        ([("system", "S")], ""),
    ],
)
def test_a_conversation_as_one_text(messages: Any, conversation: str) -> None:
    assert asked(*messages).conversation == conversation


def test_what_was_asked() -> None:
    found = asked(
        ("system", "S"),
        ("user", "a"),
        ("developer", "D"),
        ("user", "b"),
        ("assistant", "c"),
        max_tokens=5,
        max_completion_tokens=7,
        temperature=0,
        top_p=None,
    )
    assert (found.message, found.system) == ("b", "S\n\nD")
    assert found.numbers == {"max_tokens": 7, "temperature": 0}
    assert found.all_text.startswith("S\n\nD\n\nUser: a")


# --- the one put into the other -----------------------------------------------------------------


def test_a_system_prompt_without_a_place_goes_before_the_message() -> None:
    call = asked(("system", "S"), ("user", "hi"))
    assert inputs.fill_chat(endpoint(MESSAGE), call, {}, who=WHO) == ["S\n\nhi"]


def test_a_system_prompt_has_its_place_wherever_that_is() -> None:
    call = asked(("system", "S"), ("user", "a"), ("assistant", "b"), ("user", "c"))
    filled = inputs.fill_chat(endpoint(SYSTEM, STATE, MESSAGE), call, {}, who=WHO)
    assert filled == ["S", None, "User: a\n\nAssistant: b\n\nUser: c\n\nAssistant:"]


def test_a_required_system_prompt_may_be_empty() -> None:
    bare = Input("textbox", "system")
    assert inputs.fill_chat(endpoint(bare, MESSAGE), HI, {}, who=WHO) == ["", "hi"]


def test_the_message_is_known_by_its_name_before_its_position() -> None:
    style = Input("textbox", "style", has_default=True, default="plain")
    assert inputs.fill_chat(endpoint(style, MESSAGE), HI, {}, who=WHO) == ["plain", "hi"]
    assert inputs.fill_chat(endpoint(Input("textbox", "x")), HI, {}, who=WHO) == ["hi"]


def test_sampling_goes_where_the_space_offers_it() -> None:
    call = asked(("user", "hi"), max_tokens=7, temperature=0.2, top_p=0.5)
    filled = inputs.fill_chat(endpoint(MESSAGE, TOP_P, TEMPERATURE, TOKENS), call, {}, who=WHO)
    assert filled == ["hi", 0.5, 0.2, 7]


def test_more_tokens_than_the_space_gives_are_as_many_as_it_gives() -> None:
    call = asked(("user", "hi"), max_tokens=9999)
    assert inputs.fill_chat(endpoint(MESSAGE, TOKENS), call, {}, who=WHO) == ["hi", 512]


@pytest.mark.parametrize("temperature", [0, 2.5])
def test_a_number_that_the_space_does_not_take_is_the_rungs_refusal(temperature: float) -> None:
    call = asked(("user", "hi"), temperature=temperature)
    with pytest.raises(RungRefused, match=r"outside of the Space's 0\.1 to 2") as caught:
        inputs.fill_chat(endpoint(MESSAGE, TEMPERATURE), call, {}, who=WHO)
    assert caught.value.cool_s is None


def test_half_bounds_are_told_as_such() -> None:
    half = Input("number", "temperature", minimum=1, takes_number=True)
    call = asked(("user", "hi"), temperature=0)
    with pytest.raises(RungRefused, match="1 to any"):
        inputs.fill_chat(endpoint(MESSAGE, half), call, {}, who=WHO)


def test_a_required_input_that_nothing_fills() -> None:
    picture = Input("image", "picture")
    with pytest.raises(RungRefused, match="wants picture") as caught:
        inputs.fill_chat(endpoint(MESSAGE, picture), HI, {}, who=WHO)
    assert caught.value.cool_s is not None


def test_buttons_and_chat_histories_are_filled_without_being_asked() -> None:
    history, button = Input("chatbot", "history"), Input("button")
    assert inputs.fill_chat(endpoint(MESSAGE, history, button), HI, {}, who=WHO) == ["hi", [], None]


def test_an_endpoint_without_text_is_no_chat() -> None:
    with pytest.raises(RungRefused, match="no text input"):
        inputs.fill_chat(endpoint(TOKENS), HI, {}, who=WHO)


CALL = asked(("system", "S"), ("user", "a"), ("assistant", "b"), ("user", "c"), max_tokens=5)
TALK = "User: a\n\nAssistant: b\n\nUser: c\n\nAssistant:"


@pytest.mark.parametrize(
    ("templates", "filled"),
    [
        ({"message": "{message}"}, ["S\n\nc", None, "be nice", 64]),
        ({"message": "{transcript}"}, ["S\n\n" + TALK, None, "be nice", 64]),
        (
            {"message": "{message}", "system_prompt": "{system}"},
            ["c", None, "S", 64],
        ),
        (
            {"message": "{transcript}", "System prompt": "Obey: {system}"},
            [TALK, None, "Obey: S", 64],
        ),
        ({"message": "<{message}> {max_tokens}/{top_p}"}, ["<S\n\nc> 5/", None, "be nice", 64]),
        ({"message": "{other} {message}"}, ["{other} S\n\nc", None, "be nice", 64]),
        ({"message": "x", "max_tokens": "{max_tokens}"}, ["x", None, "be nice", 5]),
        ({"message": "x", "max_tokens": "{top_p}"}, ["x", None, "be nice", 64]),
        ({"message": "x", "max_tokens": "7"}, ["x", None, "be nice", 7]),
        ({"message": "x", "max_tokens": "0.5"}, ["x", None, "be nice", 0.5]),
        ({"message": "x", "max_tokens": "many"}, ["x", None, "be nice", "many"]),
        ({"message": "x", "max_tokens": 9}, ["x", None, "be nice", 9]),
    ],
)
def test_templates(templates: Any, filled: list[Any]) -> None:
    chat = endpoint(MESSAGE, STATE, SYSTEM, TOKENS)
    assert inputs.fill_chat(chat, CALL, templates, who=WHO) == filled


def test_a_system_template_without_a_system_prompt_leaves_the_default() -> None:
    templates = {"message": "{message}", "system_prompt": "{system}"}
    assert inputs.fill_chat(endpoint(MESSAGE, SYSTEM), HI, templates, who=WHO) == ["hi", "be nice"]
    bare = Input("textbox", "system_prompt")
    assert inputs.fill_chat(endpoint(MESSAGE, bare), HI, templates, who=WHO) == ["hi", ""]


def test_a_template_for_an_input_that_is_not_there() -> None:
    with pytest.raises(RungRefused, match="has no input 'prompt', only message"):
        inputs.fill_chat(endpoint(MESSAGE), HI, {"prompt": "{message}"}, who=WHO)


TEXTS = Input("json", "texts")


@pytest.mark.parametrize(
    ("some", "templates", "takes_lists", "filled"),
    [
        ([TEXTS, STATE], {}, True, [["a", "b"], None]),
        ([Input("textbox", "text")], {}, False, ["a"]),
        ([SYSTEM, Input("textbox", "text")], {}, False, ["be nice", "a"]),
        ([TEXTS], {"texts": "{inputs}"}, True, [["a", "b"]]),
        ([Input("textbox", "t")], {"t": "query: {inputs}"}, False, ["query: a\nb"]),
        ([TEXTS], {"texts": "fixed"}, False, ["fixed"]),
    ],
)
def test_embedding_texts(some: Any, templates: Any, takes_lists: bool, filled: Any) -> None:
    function = endpoint(*some, api_name="/embed")
    assert inputs.takes_lists(function, templates) is takes_lists
    assert inputs.fill_embed(function, ["a", "b"], templates, who=WHO) == filled


def test_an_endpoint_without_a_place_for_texts() -> None:
    with pytest.raises(RungRefused, match="no input for texts"):
        inputs.fill_embed(endpoint(TOKENS), ["a"], {}, who=WHO)
