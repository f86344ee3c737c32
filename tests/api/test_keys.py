"""Keys, sessions and usage by the API: who may, what comes back, and what each mistake is told."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import orjson
import pytest

from tests.backends.rigs.openai import OpenAiRig
from tests.fakes.upstream import FakeUpstream
from tests.house import House, ladder_of, open_house

HI = {"model": "chat", "messages": [{"role": "user", "content": "Hi?"}]}
GOOD = OpenAiRig().handle
KEYS = f"""
[keys.alice]
sha256 = "{hashlib.sha256(b"alice-key").hexdigest()}"
tier = "gold"
[keys.root]
sha256 = "{hashlib.sha256(b"root-key").hexdigest()}"
admin = true
"""


def bearer(secret: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {secret}"}


ALICE, ROOT = bearer("alice-key"), bearer("root-key")


async def ask(
    house: House,
    method: str,
    path: str,
    body: Any = None,
    headers: dict[str, str] = ROOT,
) -> tuple[int, Any]:
    """Status and parsed body of one request."""
    data = None if body is None else orjson.dumps(body)
    url = house.url + path
    async with house.client.request(method, url, data=data, headers=headers) as answer:
        return answer.status, orjson.loads(await answer.read())


async def chat(house: House, secret: str) -> int:
    return (await house.post("/v1/chat/completions", HI, bearer(secret)))[0]


async def test_a_key_is_made_used_shown_rotated_and_revoked() -> None:
    async with FakeUpstream(GOOD) as up, open_house(ladder_of(up.url, keys=KEYS)) as house:
        wanted = {
            "name": "bob",
            "ladders": ["chat"],
            "tier": "gold",
            "limits": {"usd_per_day": 0.1, "concurrent": 2, "max_input_kib": None},
            "bill_to": None,
        }
        status, made = await ask(house, "POST", "/router/v1/keys", wanted)
        assert (status, made["name"], made["source"]) == (200, "bob", "state")
        assert made["limits"] == {"usd_per_day": 0.1, "concurrent": 2}
        secret = made.pop("key")
        assert secret.startswith("rk-")
        assert len(secret) >= 3 + 43
        assert await chat(house, secret) == 200
        assert house.lines[-1]["key"] == "bob"
        assert (await house.post("/v1/embeddings", {"input": "a"}, bearer(secret)))[0] == 404

        status, shown = await ask(house, "GET", "/router/v1/keys/bob")
        assert (status, shown) == (200, made)
        assert secret not in str(shown)
        digest = hashlib.sha256(secret.encode()).hexdigest()
        assert digest not in str(shown)
        assert digest.startswith(shown["secrets"][0]["sha256_begins"])

        status, rotated = await ask(house, "POST", "/router/v1/keys/bob/rotate", {"overlap_s": 60})
        assert status == 200
        assert [await chat(house, one) for one in (secret, rotated["key"])] == [200, 200]
        status, again = await ask(house, "POST", "/router/v1/keys/bob/rotate")
        assert status == 200
        secrets = (secret, rotated["key"], again["key"])
        assert [await chat(house, one) for one in secrets] == [401, 401, 200]

        status, gone = await ask(house, "DELETE", "/router/v1/keys/bob")
        assert (status, gone["revoked_at"] is not None) == (200, True)
        assert await chat(house, again["key"]) == 401
        written = "".join(map(str, house.lines))
        assert not any(one in written for one in secrets)


async def test_the_list_has_the_files_keys_too_and_pages() -> None:
    async with open_house(ladder_of("http://127.0.0.1:9", keys=KEYS)) as house:
        await ask(house, "POST", "/router/v1/keys", {"name": "bob"})
        status, first = await ask(house, "GET", "/router/v1/keys?limit=2")
        assert (status, first["object"], first["has_more"]) == (200, "list", True)
        _, rest = await ask(house, "GET", f"/router/v1/keys?after={first['data'][-1]['name']}")
        keys = first["data"] + rest["data"]
        assert [(key["name"], key["source"]) for key in keys] == [
            ("alice", "file"),
            ("bob", "state"),
            ("root", "file"),
        ]
        assert not rest["has_more"]
        assert keys[0]["tier"] == "gold"
        assert "key" not in keys[1]


async def test_a_key_of_the_file_is_revoked_but_not_rotated() -> None:
    async with FakeUpstream(GOOD) as up, open_house(ladder_of(up.url, keys=KEYS)) as house:
        assert await chat(house, "alice-key") == 200
        status, body = await ask(house, "POST", "/router/v1/keys/alice/rotate")
        assert (status, body["error"]["code"]) == (409, "key_in_file")
        assert "rungway keys create alice --offline" in body["error"]["message"]
        assert (await ask(house, "DELETE", "/router/v1/keys/alice"))[0] == 200
        assert await chat(house, "alice-key") == 401


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "`name` is missing"),
        ([], "must be a JSON object"),
        ({"name": "no/good"}, "name: "),
        ({"name": "a~b"}, "name: "),
        ({"name": "bob", "colour": "blue"}, "colour: there is no such setting"),
        ({"name": "bob", "sha256": "0" * 64}, "sha256: there is no such setting"),
        ({"name": "bob", "token": "env:HF_TOKEN"}, "token: there is no such setting"),
        (
            {"name": "bob", "ladders": ["chta"]},
            'ladders[0]: there is no such ladder; did you mean "chat"',
        ),
        ({"name": "bob", "limits": {"usd_per_day": -1}}, "limits.usd_per_day: -1 is not a number"),
        ({"name": "bob", "limits": {"usd_per_dya": 1}}, 'did you mean "usd_per_day"'),
        ({"name": "bob", "limits": {"concurrent": 1.5}}, "limits.concurrent: 1.5 is not a whole"),
        ({"name": "bob", "admin": "yes"}, "admin: is text"),
        ({"name": "bob", "tier": "two words"}, "tier: "),
        ({"name": "bob\n"}, "name: "),
        ({"name": "bob", "bill_to": "acme\n"}, "bill_to: "),
        ({"name": "bob", "limits": {str(i): 1 for i in range(101)}}, "more than 100 settings"),
        ({"name": "bob", "ladders": [str(i) for i in range(1000)]}, "ladders[9]: "),
    ],
)
async def test_a_wrong_setting_is_told_by_its_path(body: Any, param: str) -> None:
    async with open_house(ladder_of("http://127.0.0.1:9", keys=KEYS)) as house:
        status, answer = await ask(house, "POST", "/router/v1/keys", body)
        assert status == 400
        assert param in answer["error"]["message"]
        assert len((await ask(house, "GET", "/router/v1/keys"))[1]["data"]) == 2


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "code"),
    [
        ("POST", "/router/v1/keys", {"name": "alice"}, 409, "name_taken"),
        ("GET", "/router/v1/keys/none", None, 404, "key_not_found"),
        ("GET", "/router/v1/keys/a%2Fb%00%ff", None, 404, "key_not_found"),
        ("DELETE", "/router/v1/keys/none", None, 404, "key_not_found"),
        ("POST", "/router/v1/keys/none/rotate", None, 404, "key_not_found"),
        ("POST", "/router/v1/keys/alice/rotate", {"overlap_s": -1}, 400, "invalid_value"),
        ("POST", "/router/v1/keys/alice/rotate", {"overlap_s": 1e9}, 400, "invalid_value"),
        ("GET", "/router/v1/keys?limit=0", None, 400, "invalid_value"),
        ("GET", "/router/v1/keys?limit=99999999999", None, 400, "invalid_value"),
        ("GET", "/router/v1/keys?limit=%C2%B2", None, 400, "invalid_value"),
        ("GET", "/router/v1/keys?lim=1", None, 400, None),
        ("PUT", "/router/v1/keys/alice", {}, 405, "method_not_allowed"),
        ("GET", "/router/v1/keys/alice/rotate", None, 405, "method_not_allowed"),
        ("DELETE", "/router/v1/sessions/none", None, 404, "session_not_found"),
        ("GET", "/router/v1/keys/", None, 200, None),
        ("POST", "/router/v1/sessions", {"ttl_s": 0}, 400, "invalid_value"),
        ("POST", "/router/v1/sessions", {"ttl_s": 86_401}, 400, "invalid_value"),
        ("POST", "/router/v1/sessions", {"ttl_s": 60, "usd": 0}, 400, "invalid_value"),
        ("POST", "/router/v1/sessions", {"admin": True}, 400, "invalid_value"),
        ("GET", "/router/v1/usage?group=keys", None, 400, None),
        ("GET", "/router/v1/usage?group=key,key", None, 400, "invalid_value"),
        ("GET", "/router/v1/usage?since=yesterday", None, 400, "invalid_value"),
        ("GET", "/router/v1/usage?since=2026-02-30", None, 400, "invalid_value"),
        ("GET", "/router/v1/usage?since=9999-01-01", None, 400, "invalid_value"),
        ("GET", "/router/v1/usage?since=2026-02-02&until=2026-02-02", None, 400, "invalid_value"),
        (
            "POST",
            "/router/v1/usage/resolve",
            {"key": "nobody", "charge": True},
            404,
            "key_not_found",
        ),
        ("POST", "/router/v1/usage/resolve", {}, 400, "invalid_value"),
        ("POST", "/router/v1/usage/resolve", {"charge": "no"}, 400, "invalid_value"),
    ],
)
async def test_what_cannot_be_done_is_told(
    method: str, path: str, body: Any, status: int, code: str | None
) -> None:
    async with open_house(ladder_of("http://127.0.0.1:9", keys=KEYS)) as house:
        found, answer = await ask(house, method, path, body)
        assert found == status, answer
        if code is not None:
            assert answer["error"]["code"] == code


async def test_only_an_admin_may_see_or_change_keys_and_the_usage_of_others() -> None:
    async with open_house(ladder_of("http://127.0.0.1:9", keys=KEYS)) as house:
        _, session = await ask(house, "POST", "/router/v1/sessions", {}, ROOT)
        forbidden = [
            ("POST", "/router/v1/keys", {"name": "x"}),
            ("GET", "/router/v1/keys", None),
            ("GET", "/router/v1/keys/alice", None),
            ("DELETE", "/router/v1/keys/root", None),
            ("POST", "/router/v1/keys/root/rotate", None),
            ("GET", "/router/v1/usage?key=root", None),
            ("GET", "/router/v1/sessions?key=root", None),
            ("POST", "/router/v1/usage/resolve", {"charge": True}),
        ]
        for method, path, body in forbidden:
            status, answer = await ask(house, method, path, body, ALICE)
            assert (status, answer["error"]["code"]) == (403, "forbidden"), path
            assert (await ask(house, method, path, body, bearer("none")))[0] == 401
            # A session of an admin is no admin.
            assert (await ask(house, method, path, body, bearer(session["key"])))[0] == 403


async def test_a_session_is_made_used_listed_and_ended() -> None:
    async with FakeUpstream(GOOD) as up, open_house(ladder_of(up.url, keys=KEYS)) as house:
        status, made = await ask(
            house, "POST", "/router/v1/sessions", {"ttl_s": 60, "usd": 0.5}, ALICE
        )
        assert status == 200
        assert made["expires_at"] - made["created_at"] == 60
        session = made.pop("key")
        assert await chat(house, session) == 200
        assert house.lines[-1]["key"] == "alice"
        for method, path in (("POST", "/router/v1/sessions"), ("GET", "/router/v1/sessions")):
            assert (await ask(house, method, path, None, bearer(session)))[0] == 403
        assert (await ask(house, "GET", "/router/v1/usage", None, bearer(session)))[0] == 403
        for headers, path in ((ALICE, ""), (ROOT, "?key=alice")):
            status, listed = await ask(house, "GET", f"/router/v1/sessions{path}", None, headers)
            assert (status, listed["data"], listed["has_more"]) == (200, [made], False)
        assert (await ask(house, "GET", "/router/v1/sessions"))[1]["data"] == []
        status, ended = await ask(house, "DELETE", f"/router/v1/sessions/{made['id']}", None, ALICE)
        assert (status, ended["revoked_at"] is not None) == (200, True)
        assert await chat(house, session) == 401
        assert await chat(house, "alice-key") == 200


async def test_a_sessions_share_holds_over_a_restart(tmp_path: Path) -> None:
    async with FakeUpstream(GOOD) as up:
        price = 'model = "org/m"\nusd_per_mtok = { input = 100, output = 100 }\n'
        state = f'\n[state]\nurl = "sqlite://{tmp_path}/state.db"\n'
        config = ladder_of(up.url, keys=KEYS).replace('model = "org/m"\n', price) + state
        async with open_house(config) as house:
            wanted = {"ttl_s": 600, "usd": 0.006}
            _, made = await ask(house, "POST", "/router/v1/sessions", wanted, ALICE)
        answers = []
        for _ in range(8):
            async with open_house(config) as house:
                body = {**HI, "max_tokens": 5}
                answer = await house.post("/v1/chat/completions", body, bearer(made["key"]))
                answers.append(answer[0])
                _, usage = await ask(house, "GET", "/router/v1/usage")
        assert (answers[0], answers[-1]) == (200, 429)
        assert 0 < usage["data"][0]["settled_usd"] <= 0.006
        async with open_house(config) as house:
            assert await chat(house, "alice-key") == 200


async def test_where_no_key_is_asked_for_there_are_no_sessions() -> None:
    async with open_house(ladder_of("http://127.0.0.1:9")) as house:
        status, body = await ask(house, "POST", "/router/v1/sessions", {}, {})
        assert (status, 'auth = "open"' in body["error"]["message"]) == (400, True)
        assert (await ask(house, "GET", "/router/v1/keys", None, {}))[0] == 200


async def test_usage_counts_by_what_is_asked_and_shows_each_key_its_own() -> None:
    ladder = "[ladders.chat]\n"
    config = ladder_of("{url}", keys=KEYS)
    async with FakeUpstream(GOOD) as up:
        priced = config.replace("{url}", up.url).replace(
            'model = "org/m"\n', 'model = "org/m"\nusd_per_mtok = { input = 1, output = 2 }\n'
        )
        assert ladder in priced
        async with open_house(priced) as house:
            for _ in range(2):
                assert await chat(house, "alice-key") == 200
            assert await chat(house, "root-key") == 200
            status, usage = await ask(house, "GET", "/router/v1/usage")
            assert (status, usage["object"], usage["group"]) == (200, "list", ["key"])
            assert [(line["key"], line["requests"]) for line in usage["data"]] == [
                ("alice", 2),
                ("root", 1),
            ]
            line = usage["data"][0]
            nano = 1000 * line["input_tokens"] + 2000 * line["output_tokens"]
            assert nano > 0
            assert line["nano_usd"] == nano
            assert line["settled_usd"] == nano / 1e9
            zeros = ("held_usd", "in_doubt_usd", "overrun_usd", "estimated_usd")
            assert [line[name] for name in zeros] == [0, 0, 0, 0]

            _, own = await ask(house, "GET", "/router/v1/usage", None, ALICE)
            assert own["data"] == usage["data"][:1]
            path = "/router/v1/usage?group=ladder,rung,day,key&key=alice"
            _, finer = await ask(house, "GET", path, None, ALICE)
            assert finer["group"] == ["ladder", "rung", "day", "key"]
            [line] = finer["data"]
            assert (line["ladder"], line["rung"], line["key"]) == ("chat", "b0/org/m", "alice")
            for query, count in (
                (f"since={line['day']}", 1),
                (f"until={line['day']}", 0),
                ("since=2999-01-01", 0),
            ):
                _, found = await ask(house, "GET", f"/router/v1/usage?{query}", None, ALICE)
                assert len(found["data"]) == count, query

            body = {"charge": False, "key": "alice"}
            status, resolved = await ask(house, "POST", "/router/v1/usage/resolve", body)
            assert (status, resolved["resolved_usd"], resolved["nano_usd"]) == (
                200,
                0,
                0,
            )


async def test_with_the_state_gone_only_what_is_not_known_is_503() -> None:
    async with FakeUpstream(GOOD) as up, open_house(ladder_of(up.url, keys=KEYS)) as house:
        assert await chat(house, "alice-key") == 200
        await house.shared.store.aclose()
        assert await chat(house, "alice-key") == 200
        status, body, headers = await house.post("/v1/chat/completions", HI, bearer("rk-unknown"))
        assert (status, body["error"]["code"]) == (503, "state_unavailable")
        assert (headers["x-should-retry"], "retry-after" in headers) == ("true", True)
        for method, path in (("POST", "/router/v1/keys"), ("GET", "/router/v1/usage")):
            assert (await ask(house, method, path, {"name": "x"}))[0] == 503
