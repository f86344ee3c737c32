"""`rungway serve`: find the configuration, run the daemon, say where it listens."""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlsplit

import msgspec
import uvloop

from router.cli import log
from router.cli.main import DONE, FAILED, WRONG_USE
from router.config.addresses import address_to_ask, is_loopback
from router.config.load import find, load, parse
from router.config.model import Config
from router.daemon import Alone, Daemon, StartError
from router.demo import start as demo
from router.types import Ladder, Task


def run(options: argparse.Namespace) -> int:
    """Serve until told to stop."""
    log.set_up()
    if options.demo and options.config:
        print("--demo brings its own configuration: leave out --config", file=sys.stderr)
        return WRONG_USE
    if options.demo and options.host and not is_loopback(options.host):
        print("--demo serves this machine only: leave out --host", file=sys.stderr)
        return WRONG_USE
    try:
        _serve(options)
    except (StartError, demo.DemoError) as error:
        print(f"rungway: {error}", file=sys.stderr)
        return FAILED
    except asyncio.CancelledError:
        return FAILED
    return DONE


def _serve(options: argparse.Namespace) -> None:
    path = None if options.demo else find(options.config, os.environ, Path.cwd())
    if path is None:
        uvloop.run(_serve_what_there_is(options))
        return

    def reread() -> Config:
        return _as_told(load(path, os.environ), options)

    config = reread()
    if config.server.workers == 1:
        uvloop.run(_run(config, reread))
        return
    from router.workers.parent import Parent  # noqa: PLC0415

    _say_warnings(config)
    Parent(config, reread, lambda url: announce(url, config)).run()


async def _serve_what_there_is(options: argparse.Namespace) -> None:
    """Without a configuration file: the demo, or what is found on this machine."""
    if options.demo:
        _say("starting the demo's model on this machine …")
        async with demo.running_models() as addresses:
            text = demo.configuration(addresses, has_token=bool(os.environ.get("HF_TOKEN")))
            config = parse(text, "the demo", os.environ)
            await _run(_as_told(config, options), None)
        return
    _say("no configuration file: looking for model servers on this machine …")
    from router.cli.detect import found_configuration  # noqa: PLC0415

    config = parse(await found_configuration(), "", os.environ)
    await _run(_as_told(config, options), None)


async def _run(config: Config, reread: Callable[[], Config] | None) -> None:
    _say_warnings(config)
    overseer = Alone(config.server, reread, lambda url: announce(url, config))
    await Daemon(config, overseer).run()


def _say_warnings(config: Config) -> None:
    for warning in config.warnings:
        logging.getLogger("rungway").warning("%s", warning)


def _as_told(config: Config, options: argparse.Namespace) -> Config:
    """The configuration with the command line's host and port. Raises ConfigError."""
    told = {"host": options.host, "port": options.port}
    changes = {name: value for name, value in told.items() if value is not None}
    if not changes:
        return config
    return config.with_server(msgspec.structs.replace(config.server, **changes))


def announce(url: str, config: Config) -> None:
    """Where it listens, which ladders there are, and what to paste to try it."""
    _say(f"Rungway listens on {url}")
    if not config.ladders:
        _announce_nothing(config)
    for ladder in config.ladders.values():
        rungs = " → ".join(rung.name for rung in ladder.rungs)
        _say(f"  ladder {ladder.name} ({ladder.task.value}): {rungs}")
    key = "" if config.server.auth == "open" else " -H 'Authorization: Bearer YOUR-KEY'"
    listening = urlsplit(url)
    base = f"http://{address_to_ask(listening.hostname or '')}:{listening.port}/v1"
    chat = _first(config, Task.CHAT)
    if chat is not None:
        body = f'{{"model": "{chat.name}", "messages": [{{"role": "user", "content": "Hello!"}}]}}'
        _say("try it:")
        _say(f"  curl {base}/chat/completions{key} -d '{body}'")
        _say("or from Python:")
        _say("  from openai import OpenAI")
        _say(f'  client = OpenAI(base_url="{base}", api_key="{"any" if not key else "YOUR-KEY"}")')
        _say('  messages = [{"role": "user", "content": "Hello!"}]')
        _say(f'  answer = client.chat.completions.create(model="{chat.name}", messages=messages)')
        _say("  print(answer.choices[0].message.content)")


def _announce_nothing(config: Config) -> None:
    """A daemon without a ladder: why, and what to do about it."""
    from router.hub.detect import usual_ports  # noqa: PLC0415

    _say("  no ladder: nothing can be answered yet, and /ready answers 503")
    if config.source is None:
        ports = ", ".join(str(port) for port in usual_ports())
        _say(f"looked for: model servers on 127.0.0.1, ports {ports}: none that can be used")
        _say("            HF_TOKEN in the environment: not set")
    else:
        _say(f"looked for: [ladders.NAME] in {config.source}: there is none")
    _say("do one of these, and start again:")
    _say("  start a model server: TGI, TEI, vLLM, SGLang, llama.cpp, Ollama, LM Studio, Gradio")
    _say("  set HF_TOKEN, for Hugging Face Inference Providers")
    _say("  rungway serve --demo, with a small model on this machine")
    _say("  write a configuration; `rungway detect` prints one of what it finds")


def _first(config: Config, task: Task) -> Ladder | None:
    return next((ladder for ladder in config.ladders.values() if ladder.task is task), None)


def _say(text: str) -> None:
    print(text, flush=True)
