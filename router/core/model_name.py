"""What a client's `model` means: a ladder, an alias, one of them with another order, or nothing.

`dummy` (huggingface_hub), `tgi` and a URL (@huggingface/inference) are what clients send when their
user named no model; they mean the default ladder. A client never chooses an upstream address.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from router.errors import BadRequest, UnknownModel
from router.types import Key, Ladder, Policy, Task

_NAMELESS = frozenset({"", "dummy", "tgi"})
_REORDERED = {
    "cheapest": Policy.CHEAPEST,
    "fastest": Policy.FASTEST,
    "best": Policy.BEST,
}
_ROUTES = {Task.CHAT: "/v1/chat/completions", Task.EMBEDDINGS: "/v1/embeddings"}
_NAME_CHARS_MAX = 200


class Choice(NamedTuple):
    ladder: Ladder
    policy: Policy


class LadderNames:
    """The ladders by every name that a client may use for them."""

    def __init__(self, ladders: Mapping[str, Ladder], default: str | None = None) -> None:
        self.ladders = dict(ladders)
        self._by_name = {
            name: ladder for ladder in ladders.values() for name in (*ladder.aliases, ladder.name)
        }
        self._default = default

    def choose(self, model: Any, key: Key, task: Task) -> Choice:
        """The ladder that `model` means to this key for this task.

        Raises UnknownModel for a name that is of another task, unknown, or not allowed to the key:
        from outside the last two look the same.
        """
        if model is not None and not isinstance(model, str):
            raise BadRequest("model must be a string", code="invalid_type", param="model")
        name = model or ""
        ladder = self._by_name.get(name)
        if ladder is None and (name in _NAMELESS or name.startswith(("http://", "https://"))):
            ladder = self._default_for(key, task)
        policy = ladder.policy if ladder is not None else Policy.ORDER
        if ladder is None:
            base, _, suffix = name.rpartition(":")
            if suffix in _REORDERED:
                ladder, policy = self._by_name.get(base), _REORDERED[suffix]
        if ladder is None or ladder.task is not task or not may_use(key, ladder):
            raise self._unknown(name, key, task)
        return Choice(ladder, policy)

    def visible(self, key: Key) -> list[Ladder]:
        """The ladders that this key may use, in the configuration's order."""
        return [ladder for ladder in self.ladders.values() if may_use(key, ladder)]

    def find(self, name: str, key: Key) -> Ladder | None:
        ladder = self._by_name.get(name)
        return ladder if ladder is not None and may_use(key, ladder) else None

    def _default_for(self, key: Key, task: Task) -> Ladder | None:
        named = self.ladders.get(self._default or "")
        if named is not None and named.task is task and may_use(key, named):
            return named
        return next((one for one in self.visible(key) if one.task is task), None)

    def _unknown(self, name: str, key: Key, task: Task) -> UnknownModel:
        shown = name if len(name) <= _NAME_CHARS_MAX else name[:_NAME_CHARS_MAX] + "…"
        other = self.find(name, key)
        if other is not None:
            return UnknownModel(
                f"The model {shown!r} is a ladder for {other.task.value}, not {task.value}; "
                f"ask for it at {_ROUTES[other.task]}",
                param="model",
            )
        names = [ladder.name for ladder in self.visible(key) if ladder.task is task]
        known = ", ".join(names) if names else "none that this key may use"
        return UnknownModel(
            f"The model {shown!r} does not exist; ladders for {task.value}: {known}",
            param="model",
        )


def may_use(key: Key, ladder: Ladder) -> bool:
    return key.ladders is None or ladder.name in key.ladders
