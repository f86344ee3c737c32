"""What a Hugging Face webhook says: which model repository has other content than before.

An event has a `scope` and an `action`. The content of a repository is `repo.content`; a scope that
is not known counts as an update of the broader one that its name begins with, as the Hub asks.
Pull requests and the Hub's own conversions are branches beside the one that servers load.
"""

from __future__ import annotations

from typing import Any

# Talk, and settings: nothing that a model's answers depend on.
_WITHOUT_CONTENT = ("discussion", "repo.config")
_BESIDE = ("refs/pr/", "refs/convert/")
_NAMES_MAX = 2


def changed_models(event: Any) -> list[str]:
    """The names of the model that this event is of, where its content may be another now.

    Raises ValueError where it is no event of the Hub's.
    """
    told = _dict(event, "the body")
    what, repo = _dict(told.get("event"), "event"), _dict(told.get("repo"), "repo")
    scope, name = what.get("scope"), repo.get("name")
    if not isinstance(scope, str) or not isinstance(name, str):
        raise ValueError("event.scope and repo.name must be texts")
    if repo.get("type") != "model":
        return []
    if any(scope == one or scope.startswith(f"{one}.") for one in _WITHOUT_CONTENT):
        return []
    refs = told.get("updatedRefs")
    if isinstance(refs, list) and refs and all(map(_is_beside, refs)):
        return []
    moved = told.get("movedTo")
    names = [name, moved.get("name") if isinstance(moved, dict) else None]
    return [one for one in names if isinstance(one, str)][:_NAMES_MAX]


def is_of(model: str, repository: str) -> bool:
    """Whether a rung's model is this repository, suffixes (`:cheapest`, `@revision`) left out."""
    return model.partition(":")[0].partition("@")[0].casefold() == repository.casefold()


def _is_beside(ref: Any) -> bool:
    name = ref.get("ref") if isinstance(ref, dict) else None
    return isinstance(name, str) and name.startswith(_BESIDE)


def _dict(value: Any, what: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{what} must be an object")
    return value
