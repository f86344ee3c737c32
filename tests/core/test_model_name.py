"""Which ladder a client's `model` means."""

from __future__ import annotations

import pytest

from router.core.model_name import LadderNames
from router.errors import BadRequest, UnknownModel
from router.types import Key, Ladder, Policy, Rung, Task

RUNG = Rung("gpu", "m")
CHAT = Ladder("assistant", Task.CHAT, (RUNG,), aliases=("gpt-4o-mini",))
ODD = Ladder("assistant:cheapest", Task.CHAT, (RUNG,))
SECRET = Ladder("secret", Task.CHAT, (RUNG,))
EMBED = Ladder("embed", Task.EMBEDDINGS, (RUNG,), policy=Policy.FASTEST)
NAMES = LadderNames({one.name: one for one in (CHAT, ODD, SECRET, EMBED)})
ANY = Key("any")
FEW = Key("few", ladders=frozenset({"secret", "embed"}))


@pytest.mark.parametrize(
    ("model", "task", "key", "ladder", "policy"),
    [
        ("assistant", Task.CHAT, ANY, CHAT, Policy.ORDER),
        ("gpt-4o-mini", Task.CHAT, ANY, CHAT, Policy.ORDER),
        ("assistant:best", Task.CHAT, ANY, CHAT, Policy.BEST),
        ("gpt-4o-mini:fastest", Task.CHAT, ANY, CHAT, Policy.FASTEST),
        pytest.param("assistant:cheapest", Task.CHAT, ANY, ODD, Policy.ORDER, id="exact wins"),
        ("embed", Task.EMBEDDINGS, ANY, EMBED, Policy.FASTEST),
        ("embed:cheapest", Task.EMBEDDINGS, ANY, EMBED, Policy.CHEAPEST),
        (None, Task.CHAT, ANY, CHAT, Policy.ORDER),
        ("", Task.CHAT, ANY, CHAT, Policy.ORDER),
        ("dummy", Task.CHAT, ANY, CHAT, Policy.ORDER),
        ("tgi", Task.EMBEDDINGS, ANY, EMBED, Policy.FASTEST),
        ("http://127.0.0.1:8484/v1", Task.CHAT, ANY, CHAT, Policy.ORDER),
        pytest.param(None, Task.CHAT, FEW, SECRET, Policy.ORDER, id="first that the key may use"),
    ],
)
def test_names(model: str | None, task: Task, key: Key, ladder: Ladder, policy: Policy) -> None:
    assert NAMES.choose(model, key, task) == (ladder, policy)


@pytest.mark.parametrize(
    ("model", "task", "key"),
    [
        ("gpt-5", Task.CHAT, ANY),
        ("assistant:quickest", Task.CHAT, ANY),
        ("assistant", Task.EMBEDDINGS, FEW),
        ("assistant", Task.CHAT, FEW),
        ("x" * 10_000, Task.CHAT, ANY),
        ("dummy", Task.CHAT, Key("none", ladders=frozenset())),
    ],
)
def test_unknown_and_not_allowed_look_the_same(model: str, task: Task, key: Key) -> None:
    with pytest.raises(UnknownModel) as caught:
        NAMES.choose(model, key, task)
    assert caught.value.code == "model_not_found"
    assert caught.value.param == "model"
    assert len(caught.value.message) < 600
    assert ("assistant" in caught.value.message) is (
        (key is ANY and task is Task.CHAT) or model == "assistant"
    )


def test_an_unknown_name_is_told_what_there_is() -> None:
    with pytest.raises(UnknownModel) as caught:
        NAMES.choose("gpt-5", FEW, Task.CHAT)
    assert caught.value.message == "The model 'gpt-5' does not exist; ladders for chat: secret"
    with pytest.raises(UnknownModel) as caught:
        NAMES.choose("gpt-5", Key("none", ladders=frozenset()), Task.CHAT)
    assert caught.value.message.endswith("ladders for chat: none that this key may use")


@pytest.mark.parametrize(
    ("model", "task", "route"),
    [
        ("gpt-4o-mini", Task.EMBEDDINGS, "for chat, not embeddings; ask for it at /v1/chat/compl"),
        ("embed", Task.CHAT, "for embeddings, not chat; ask for it at /v1/embeddings"),
    ],
)
def test_a_ladder_of_the_other_task_is_told_its_route(model: str, task: Task, route: str) -> None:
    with pytest.raises(UnknownModel) as caught:
        NAMES.choose(model, ANY, task)
    assert f"is a ladder {route}" in caught.value.message


def test_a_model_that_is_no_string_is_a_bad_request() -> None:
    with pytest.raises(BadRequest):
        NAMES.choose(["assistant"], ANY, Task.CHAT)


def test_the_configured_default_goes_before_the_first() -> None:
    names = LadderNames({one.name: one for one in (CHAT, SECRET, EMBED)}, default="secret")
    assert names.choose("dummy", ANY, Task.CHAT).ladder is SECRET
    assert names.choose("dummy", ANY, Task.EMBEDDINGS).ladder is EMBED


def test_a_key_sees_only_its_ladders() -> None:
    assert NAMES.visible(FEW) == [SECRET, EMBED]
    assert NAMES.find("assistant", FEW) is None
    assert NAMES.find("gpt-4o-mini", ANY) is CHAT
