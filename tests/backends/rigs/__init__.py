"""One rig a kind; a new kind adds its rig to `ALL` and thereby stands under the contract."""

from tests.backends.contract import Rig
from tests.backends.rigs.gradio_space import Gradio4Rig, Gradio5Rig, Gradio6Rig
from tests.backends.rigs.inference_endpoint import InferenceEndpointRig
from tests.backends.rigs.inference_providers import InferenceProvidersRig
from tests.backends.rigs.openai import OpenAiRig
from tests.backends.rigs.tei import TeiRig
from tests.backends.rigs.tgi import TgiRig

ALL: list[type[Rig]] = [
    OpenAiRig,
    TgiRig,
    TeiRig,
    InferenceProvidersRig,
    InferenceEndpointRig,
    Gradio6Rig,
    Gradio5Rig,
    Gradio4Rig,
]
