"""Which model a Hub webhook says has other content now."""

from __future__ import annotations

from typing import Any

import pytest

from router.core.hub_event import changed_models, is_of

MAIN = [{"ref": "refs/heads/main", "oldSha": "a", "newSha": "b"}]
PULL = [{"ref": "refs/pr/1", "oldSha": None, "newSha": "b"}]


def event(scope: str = "repo.content", kind: str = "model", **more: Any) -> Any:
    what = {"action": "update", "scope": scope}
    return {"event": what, "repo": {"type": kind, "name": "org/m"}, "webhook": {"id": "x"}, **more}


@pytest.mark.parametrize(
    ("told", "names"),
    [
        (event(), ["org/m"]),
        (event(updatedRefs=MAIN), ["org/m"]),
        (event(updatedRefs=[*PULL, *MAIN]), ["org/m"]),
        (event(updatedRefs=PULL), []),
        (event(updatedRefs=[{"ref": "refs/convert/parquet"}]), []),
        (event(updatedRefs=["odd"]), ["org/m"]),
        (event("repo"), ["org/m"]),
        (event("repo.content.lfs"), ["org/m"]),
        (event("repo.something.new"), ["org/m"]),
        (event("repo.config"), []),
        (event("repo.config.gated"), []),
        (event("discussion.comment"), []),
        (event("repo", movedTo={"name": "org/n"}), ["org/m", "org/n"]),
        (event("repo", movedTo={"name": 7}), ["org/m"]),
        (event(kind="dataset"), []),
    ],
)
def test_which_models_changed(told: Any, names: list[str]) -> None:
    assert changed_models(told) == names


@pytest.mark.parametrize(
    "told", [None, [], {}, {"event": {}, "repo": {}}, {"event": {"scope": "repo"}, "repo": 1}]
)
def test_what_is_no_event_is_told_apart(told: Any) -> None:
    with pytest.raises(ValueError, match="must be"):
        changed_models(told)


def test_suffixes_and_case_do_not_matter() -> None:
    for model in ("org/m", "Org/M", "org/m:cheapest", "org/m@main"):
        assert is_of(model, "org/m")
    assert not is_of("org/m-large", "org/m")
