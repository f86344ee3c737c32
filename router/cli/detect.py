"""`rungway detect`: what model servers run here, as a configuration that could be used as it is."""

from __future__ import annotations

import argparse
import asyncio
import os
from dataclasses import asdict

import orjson

from router.cli.main import DONE
from router.hub.detect import Found, detect, usual_ports
from router.hub.zero_config import configuration_for
from router.transport.http import HttpClient


def run(options: argparse.Namespace) -> int:
    ports = tuple(dict.fromkeys((*options.ports, *usual_ports())))
    found = asyncio.run(_look(ports))
    if options.json:
        print(orjson.dumps([asdict(one) for one in found]).decode())
    else:
        print(configuration_for(found, _has_token()))
    return DONE


async def found_configuration() -> str:
    """The configuration of a daemon that was given none."""
    return configuration_for(await _look(usual_ports()), _has_token())


async def _look(ports: tuple[int, ...]) -> list[Found]:
    client = HttpClient()
    try:
        return await detect(client, ports)
    finally:
        await client.aclose()


def _has_token() -> bool:
    return bool(os.environ.get("HF_TOKEN", "").strip())
