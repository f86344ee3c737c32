"""What several workers may do together is what the file says."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.config.load import parse
from router.config.share import share, share_of
from router.errors import ConfigError

CHAT = """
[server]
auth = "open"
workers = {workers}
max_connections = 101
[backends.b]
kind = "openai"
url = "http://127.0.0.1:1"
[ladders.l]
queue_max = 7
[[ladders.l.rungs]]
backend = "b"
model = "m"
{rung}
"""


@given(limit=st.integers(1, 10_000), workers=st.integers(1, 256))
def test_shares_add_up_and_none_is_nothing(limit: int, workers: int) -> None:
    shares = [share(limit, index, workers) for index in range(workers)]
    assert min(shares) >= 1
    assert max(shares) - min(shares) <= 1
    assert sum(shares) == max(limit, workers)


def test_no_queue_stays_none() -> None:
    assert share(0, 0, 4) == 0


def test_a_worker_keeps_its_share_of_the_file() -> None:
    whole = parse(CHAT.format(workers=2, rung="max_in_flight = 5"), "f", {})
    shares = [share_of(whole, index, 2) for index in range(2)]
    assert [one.ladders["l"].rungs[0].max_in_flight for one in shares] == [3, 2]
    assert [one.ladders["l"].limits.queue_max for one in shares] == [4, 3]
    assert [one.server.max_connections for one in shares] == [51, 50]
    assert {one.ladders["l"].rungs[0].name for one in shares} == {"b/m"}
    assert whole.ladders["l"].rungs[0].max_in_flight == 5
    unlimited = parse(CHAT.format(workers=2, rung=""), "f", {})
    assert share_of(unlimited, 1, 2).ladders["l"].rungs[0].max_in_flight is None


@pytest.mark.parametrize(("places", "workers", "is_warned"), [(3, 4, True), (4, 4, False)])
def test_a_limit_that_workers_cannot_keep_is_said(
    places: int, workers: int, is_warned: bool
) -> None:
    text = CHAT.format(workers=workers, rung=f"max_in_flight = {places}")
    told = [one for one in parse(text, "f", {}).warnings if "max_in_flight" in one]
    assert bool(told) is is_warned
    if told:
        assert told[0].startswith("f:14: ")
        assert "up to 4 calls are in flight" in told[0]


def test_a_state_in_memory_is_for_one_process() -> None:
    text = CHAT.format(workers=2, rung="") + '[state]\nurl = "memory://"\n'
    with pytest.raises(ConfigError, match=r"memory:// is for one process, and .* workers is 2"):
        parse(text, "f", {})
