"""One rig a kind; a new kind adds its rig to `ALL` and thereby stands under the contract."""

from tests.backends.contract import Rig
from tests.backends.rigs.openai import OpenAiRig

ALL: list[type[Rig]] = [OpenAiRig]
