"""A real Gradio app, run as a process: `python gradio_app.py PORT`. Says `ready` when it serves.

/chat streams the words that it was given, with its other inputs and the length of its history, so
that a test sees what arrived; /embed gives vectors as JSON; /shout is a plain function. It says
`left` when a generator was stopped from outside (Gradio 4 and 5 only let go of it). It runs on
Gradio 4, 5 and 6; what it publishes under each is in `tests/recordings/gradio`.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import gradio as gr


def chat(message: str, history: list[Any], system_prompt: str, max_tokens: float) -> Iterator[str]:
    if message == "boom":
        raise gr.Error("the model exploded")
    if message == "quota":
        raise gr.Error(
            "You have exceeded your free ZeroGPU quota (60s requested vs. 0s left). "
            "Try again in 1:02:03."
        )
    if message == "crash":
        raise RuntimeError("a secret of the app's author")
    if message == "endless":
        yield from _endless()
    words = f"{message} | {system_prompt} | {max_tokens:g} | {len(history)}".split(" ")
    for count in range(1, len(words) + 1):
        yield " ".join(words[:count])


def _endless() -> Iterator[str]:
    text = "on"
    try:
        while True:
            yield text
            text += " and on"
            time.sleep(0.02)
    finally:
        print("left", flush=True)


def embed(texts: list[str]) -> list[list[float]]:
    return [[float(len(text)), 0.5, -1.0] for text in texts]


def shout(text: str) -> str:
    return text.upper()


def build() -> Any:
    with gr.Blocks() as app:
        gr.ChatInterface(
            chat,
            additional_inputs=[
                gr.Textbox("be nice", label="System prompt"),
                gr.Slider(1, 512, value=64, step=1, label="Max tokens"),
            ],
        )
        with gr.Row():
            texts, vectors, button = gr.JSON(), gr.JSON(), gr.Button("embed")
        button.click(embed, [texts], [vectors], api_name="embed")
        with gr.Row():
            quiet, loud, shouting = gr.Textbox(label="Text"), gr.Textbox(), gr.Button("shout")
        shouting.click(shout, [quiet], [loud], api_name="shout")
    return app


if __name__ == "__main__":
    build().queue().launch(
        server_name="127.0.0.1", server_port=int(sys.argv[1]), prevent_thread_lock=True, quiet=True
    )
    print("ready", flush=True)
    threading.Event().wait()
