"""A wrong file is refused whole: each fault at its line, with its setting, what is wrong, the mend.

Most cases are one broken setting in a good file. The table's entry is the text that is added, a
part of it by which its line is known, and what the problem says.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.config import schema
from router.config.load import find, load, parse
from router.config.model import Config
from router.errors import ConfigError
from router.types import Abilities, KeyLimits, PhaseLimits, Policy, Price, Task

HASH = "ab" * 32
OTHER_HASH = "cd" * 32
GOOD = f"""\
[backends.gpu]
kind = "tgi"
url = "http://127.0.0.1:8080"
[backends.tei]
kind = "tei"
url = "http://127.0.0.1:3000"
[backends.hf]
kind = "inference-providers"
token = "env:HF_TOKEN"
[ladders.chat]
rungs = [{{ backend = "gpu", model = "m" }}]
[ladders.embed]
task = "embeddings"
rungs = [{{ backend = "tei", model = "e" }}]
[keys.alice]
sha256 = "{HASH}"
"""
ENVIRON = {"HF_TOKEN": "hf_very-secret", "HOME": "/home/u"}


def problems(text: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        parse(text, "f.toml", ENVIRON)
    return caught.value.problems


def good(text: str) -> Config:
    return parse(text, "f.toml", ENVIRON)


RUNG = '[ladders.l]\n[[ladders.l.rungs]]\nbackend = "gpu"\nmodel = "m"\n'
EMBED = '[ladders.l]\ntask = "embeddings"\n'
SPACE = '[backends.s]\nkind = "gradio-space"\n'
ENDPOINT = '[backends.e]\nkind = "inference-endpoint"\n'
KEY = f'[keys.k]\nsha256 = "{OTHER_HASH}"\n'

# What is added, the line's mark in it, the setting, and the words.
BROKEN: list[tuple[str, str, str, str]] = [
    # unknown names
    ("[serve]\n", "[serve]", "serve", 'no such section; did you mean "server"?'),
    ("[weather]\n", "[weather]", "weather", 'no such section; known are "server", "state"'),
    ("[server]\nprot = 1\n", "prot", "server.prot", 'no such setting; did you mean "port"?'),
    ("[state]\nfoo = 1\n", "foo", "state.foo", 'no such setting; known are "url"'),
    (f"{RUNG}contxt = 1\n", "contxt", "ladders.l.rungs[0].contxt", 'mean "context"?'),
    (f"{KEY}limits.usd_per_dya = 1\n", "dya", "keys.k.limits.usd_per_dya", '"usd_per_day"?'),
    (f'[ladders.l]\n"a b" = 1\n{RUNG[12:]}', '"a b"', 'ladders.l."a b"', "no such setting"),
    # kinds of values
    ('[server]\nport = "8484"\n', "port", "server.port", "is text, not a whole number from 0 to"),
    ('[server]\nport = "8484"\n', "port", "server.port", "write it without quotes"),
    ("[server]\nhost = 1\n", "host", "server.host", "is a number, not an address"),
    ("[server]\nhost = 1\n", "host", "server.host", "write it in quotes"),
    ("[server]\nport = true\n", "port", "server.port", "is true or false, not a whole number"),
    ("[server]\nport = 1.5\n", "port", "server.port", "1.5 is not a whole number from 0 to 65535"),
    ("[server]\nport = 1979-05-27\n", "port", "server.port", "is a date or time, not a whole"),
    ("[server]\nport = [1]\n", "port", "server.port", "is a list, not a whole number"),
    ("[server]\nport = { a = 1 }\n", "port", "server.port", "is a table, not a whole number"),
    ("[server]\npublic_ops = 1\n", "public_ops", "server.public_ops", "1 is not true or false"),
    ('[server]\npublic_ops = "true"\n', "ops", "server.public_ops", "is text; write true or false"),
    ('[server]\ncors_origins = "x"\n', "cors", "server.cors_origins", 'not a list; write ["x"]'),
    (
        '[ladders.l.rungs]\nbackend = "gpu"\nmodel = "m"\n',
        "rungs]",
        "ladders.l.rungs",
        "not a list of tables; write [[ladders.l.rungs]]",
    ),
    ("[server]\nallowed_hosts = [\n1]\n", "1]", "server.allowed_hosts[0]", "is a number"),
    ("[ladders]\nl = 3\n", "l = 3", "ladders.l", "is a number, where a table of settings"),
    ("[backends]\nb = 3\n", "b = 3", "backends.b", "must be a table"),
    (f"{KEY}limits = 3\n", "limits", "keys.k.limits", "is a number, where a table"),
    (f"{RUNG}usd_per_mtok = 3\n", "usd", "ladders.l.rungs[0].usd_per_mtok", "where a table"),
    ('[ladders.l]\nrungs = ["gpu"]\n', "rungs", "ladders.l.rungs[0]", "is text, where a table"),
    # ranges
    ("[server]\nport = 70000\n", "port", "server.port", "70000 is not a whole number from 0 to"),
    ("[server]\nport = -1\n", "port", "server.port", "-1 is not a whole number from 0 to 65535"),
    ("[server]\nworkers = 0\n", "workers", "server.workers", "from 1 to 256"),
    ("[server]\nheader_s = 0\n", "header_s", "server.header_s", "above 0 and up to 86400"),
    ("[server]\nbody_s = nan\n", "body_s", "server.body_s", "nan is not a number above 0"),
    ("[server]\nbody_s = inf\n", "body_s", "server.body_s", "inf is not a number above 0"),
    (f"[server]\nport = {'9' * 60}\n", "port", "server.port", "a number of that size is not"),
    ("[cache]\nttl_s = 1e9\n", "ttl_s", "cache.ttl_s", "1e+09 is not a number above 0"),
    (f"{RUNG}context = 0\n", "context", "ladders.l.rungs[0].context", "from 1 to"),
    (f"{RUNG}max_in_flight = 0\n", "max_in", "ladders.l.rungs[0].max_in_flight", "from 1 to"),
    ("[ladders.l]\nrungs = []\n", "rungs", "ladders.l.rungs", "at least one"),
    (f"{KEY}limits.concurrent = 0\n", "limits", "keys.k.limits.concurrent", "from 1 to 1000000"),
    (f"{RUNG}usd_per_mtok = {{ input = -1, output = 1 }}\n", "usd", "input", "-1 is not a number"),
    # words from a list
    ('[server]\nauth = "opne"\n', "auth", "server.auth", '"keys", "open"; did you mean "open"?'),
    ('[ladders.l]\ntask = "x"\n' + RUNG[12:], "task", "ladders.l.task", '"x" is not one of "chat"'),
    ('[ladders.l]\npolicy = "chepest"\n' + RUNG[12:], "policy", "ladders.l.policy", '"cheapest"?'),
    (
        '[ladders.l]\nescalate_on = ["empty",\n"refusl"]\n' + RUNG[12:],
        "refusl",
        "ladders.l.escalate_on[1]",
        'did you mean "refusal"?',
    ),
    ('[backends.b]\nkind = "tgo"\n', "kind", "backends.b.kind", 'did you mean "tgi"?'),
    ('[backends.b]\nkind = "zzz"\n', "kind", "backends.b.kind", 'known are "tgi", "tei", "openai"'),
    ("[backends.b]\nkind = 3\n", "kind", "backends.b.kind", "no such kind of backend"),
    # what is missing
    ('[backends.b]\nurl = "http://x"\n', "[backends.b]", "backends.b", "`kind` is missing"),
    ('[backends.b]\nkind = "tgi"\n', "[backends.b]", "backends.b", "`url` is missing; add url ="),
    ("[ladders.l]\n", "[ladders.l]", "ladders.l", "`rungs` is missing"),
    ('[ladders.l]\nrungs = [{ model = "m" }]\n', "rungs", "ladders.l.rungs[0]", "`backend` is mis"),
    ("[keys.k]\n", "[keys.k]", "keys.k", "`sha256` is missing; add sha256 = … (the 64 lowercase"),
    # names
    ('[backends."a b"]\nkind = "tgi"\nurl = "http://x"\n', "a b", '"a b"', "is not a name; give"),
    ('[keys."é"]\nsha256 = "' + OTHER_HASH + '"\n', "é", 'keys."é"', "letters, digits, dots"),
    (RUNG.replace("ladders.l", 'ladders."a b"'), "[ladders", '"a b"', "without blanks"),
    (f"{RUNG}tiers = [\n'a b']\n", "a b", "ladders.l.rungs[0].tiers[0]", "letters, digits"),
    ('[ladders.l]\nrungs=[{backend="gpu",model=" m"}]\n', "rungs", "rungs[0].model", "on one line"),
    ('[ladders.l]\nrungs=[{backend="gpu",model="a\\nb"}]\n', "rungs", "model", "on one line"),
    # addresses
    ('[backends.b]\nkind = "tgi"\nurl = "x:1"\n', "x:1", "backends.b.url", "begin with http://"),
    ('[backends.b]\nkind = "tgi"\nurl = "ftp://x"\n', "ftp", "backends.b.url", "begin with http"),
    ('[backends.b]\nkind = "tgi"\nurl = "http://"\n', "url", "backends.b.url", "has no host"),
    ('[backends.b]\nkind = "tgi"\nurl = "http://u:p@x"\n', "url", "backends.b.url", "a password"),
    ('[backends.b]\nkind = "tgi"\nurl = "http://x/?a=1"\n', "url", "backends.b.url", "a query"),
    ('[backends.b]\nkind = "tgi"\nurl = "http://x/#a"\n', "url", "backends.b.url", "a fragment"),
    ('[backends.b]\nkind = "tgi"\nurl = "http://x:99999"\n', "url", "url", "is not an address"),
    ('[backends.b]\nkind = "tgi"\nurl = "http://x:0"\n', "url", "backends.b.url", "the port 0"),
    ('[backends.b]\nkind = "tgi"\nurl = "http://x/a b"\n', "url", "url", "no address has"),
    *(
        (f'[backends.b]\nkind = "openai"\nurl = "http://x{path}"\n', "url", "b.url", words)
        for path, words in (
            ("/v1/chat/completions", "ends in the route /chat/completions; end it at the host or"),
            ("/v1/embeddings/", "the route /embeddings"),
            ("/v1/models", "the route /v1/models"),
            ("/v1/completions", "the route /completions"),
        )
    ),
    ('[backends.b]\nkind = "tgi"\nurl = "http://[::1"\n', "url", "url", "is not an address"),
    (f'{ENDPOINT}url = "http://x"\nmanagement_url = "x"\n', "man", "management_url", "begin with"),
    ('[server]\nhost = "a b"\n', "host", "server.host", '"a b" is not an address or a host name'),
    ('[server]\ncors_origins = ["*"]\n', "cors", "server.cors_origins[0]", "every web page"),
    ('[server]\ncors_origins = ["x.org"]\n', "cors", "server.cors_origins[0]", "begin with http"),
    ('[server]\ncors_origins = ["https://x.org/"]\n', "cors", "cors_origins[0]", "not an origin"),
    ('[server]\ncors_origins = ["https://X.org"]\n', "cors", "cors_origins[0]", "not an origin"),
    ('[state]\nurl = "postgres://x"\n', "url", "state.url", "must be sqlite:///path, valkey://"),
    ('[state]\nurl = "sqlite://state.db"\n', "url", "state.url", "needs an absolute path"),
    ('[state]\nurl = "valkey://:pw@h/0"\n', "url", "state.url", "no password in it"),
    ('[state]\nurl = "valkey:///0"\n', "url", "state.url", "needs a host"),
    # what must go together
    ('[server]\nauth = "open"\nhost = "0.0.0.0"\n', "auth", "server.auth", "refused unless"),
    ('[server]\nauth = "open"\nhost = "10.0.0.1"\n', "auth", "server.auth", 'host = "127.0.0.1"'),
    ('[server]\nauth = "open"\nhost = "example.org"\n', "auth", "server.auth", "refused unless"),
    ('[server]\nworkers = 2\n[state]\nurl = "memory://"\n', "url", "state.url", "workers is 2"),
    ('[server]\ndefault_ladder = "chta"\n', "default", "server.default_ladder", 'mean "chat"?'),
    (
        '[server]\ndefault_ladder = "x"\n[ladders.l]\naliases = ["x"]\n' + RUNG[12:],
        "default",
        "server.default_ladder",
        'is an alias; write the name of its ladder, "l"',
    ),
    (f"{SPACE}", "[backends.s]", "backends.s", "needs one of space"),
    (f'{SPACE}space = "a/b"\nurl = "http://x"\n', "[backends.s]", "backends.s", "and not both"),
    (f'{SPACE}space = "name"\n', "space =", "backends.s.space", 'of the form "owner/name"'),
    (f'{SPACE}url = "http://x"\napi_name = "chat"\n', "api_n", "api_name", 'its slash: "/chat"'),
    (f'{SPACE}url = "http://x"\ninputs = {{ a = [1] }}\n', "inputs", "inputs.a", "is a list, not"),
    (f"{ENDPOINT}", "[backends.e]", "backends.e", "needs endpoint"),
    (f'{ENDPOINT}endpoint = "a/b"\n', "[backends.e]", "backends.e", "needs a token"),
    (RUNG.replace('"gpu"', '"gpuu"'), "gpuu", "ladders.l.rungs[0].backend", 'mean "gpu"?'),
    (RUNG.replace('"gpu"', '"tei"'), '"tei"', "rungs[0].backend", "tei, which does not serve chat"),
    (
        f'{EMBED}rungs = [{{ backend = "gpu", model = "m" }}]\n',
        "rungs",
        "ladders.l.rungs[0].backend",
        "of kind tgi, which does not serve embeddings",
    ),
    (
        f"{RUNG}[[ladders.l.rungs]]  # again\nbackend = 'gpu'\nmodel = 'm'\n",
        "# again",
        "ladders.l.rungs[1]",
        "gpu/m is a rung of this ladder already; remove it",
    ),
    (f"{RUNG}usd_per_mtok = {{ input = 1 }}\n", "usd", "usd_per_mtok", "`output` is missing"),
    (
        f"{EMBED}[[ladders.l.rungs]]\nbackend='tei'\nmodel='e'\n"
        "[[ladders.l.rungs]]\nbackend='hf'\nmodel='f:cheapest'\n",
        "f:cheapest",
        "ladders.l.rungs[1].model",
        '"f" is another model than "e"',
    ),
    (
        f"{EMBED}[[ladders.l.rungs]]\nbackend='tei'\nmodel='e'\n"
        "[[ladders.l.rungs]]\nbackend='hf'\nmodel='e'\nvector_space = 'f'\n",
        "vector_space",
        "ladders.l.rungs[1].vector_space",
        '"f" is another vector space than "e"',
    ),
    (
        f"{EMBED}vector_space = 'v'\n[[ladders.l.rungs]]\nbackend='tei'\nmodel='e'\n"
        "vector_space = 'e' # own\n",
        "# own",
        "ladders.l.rungs[0].vector_space",
        '"e" is another vector space than "v"',
    ),
    (
        f"{EMBED}[[ladders.l.rungs]]\nbackend='tei'\nmodel='e'\nvector_space = 'v'\n"
        "[[ladders.l.rungs]]\nbackend='hf'\nmodel = 'e' # second\n",
        "# second",
        "ladders.l.rungs[1].model",
        '"e" is another model than "v"',
    ),
    (f"{RUNG}vector_space = 'x'\n", "vector", "ladders.l.rungs[0].vector_space", "remove it"),
    (f'[ladders.l]\nvector_space = "x"\n{RUNG[12:]}', "vector", "vector_space", "remove it"),
    ('[ladders.l]\naliases = ["embed"]\n' + RUNG[12:], "alia", "aliases[0]", "name of a ladder"),
    ('[ladders.l]\naliases = ["x", "x"]\n' + RUNG[12:], "alia", "aliases", "an alias twice"),
    (
        '[ladders.l]\naliases = ["x"]\n' + RUNG[12:] + "[ladders.k]\naliases = [ 'x' ]\n"
        'rungs = [{ backend = "gpu", model = "m" }]\n',
        "[ 'x' ]",
        "ladders.k.aliases[0]",
        'is an alias of the ladder "l" already',
    ),
    (f'{KEY}ladders = ["chta"]\n', "ladders", "keys.k.ladders[0]", 'did you mean "chat"?'),
    # secrets
    ('[keys.k]\nsha256 = "xyz"\n', "xyz", "keys.k.sha256", "what stands here is not the 64"),
    (f'[keys.k]\nsha256 = "{HASH.upper()}"\n', "ABAB", "keys.k.sha256", "64 lowercase hexadec"),
    (f'[keys.k]\nsha256 = "{HASH}"\n', "sha256", "keys.k.sha256", 'that of the key "alice" too'),
    (f'{KEY}token = "hf_very-secret"\n', "token", "keys.k.token", "given by reference"),
    (
        f'{KEY}token = "env:ABSENT"\n',
        "token",
        "keys.k.token",
        "ABSENT is not set; `export ABSENT=…`",
    ),
    (f'{KEY}token = "env:ABSENT"\n', "token", "keys.k.token", ", or remove this setting"),
    (
        '[backends.b]\nkind = "tgi"\nurl = "http://x"\ntoken = "env:ABSENT"\n',
        "token",
        "backends.b.token",
        "`export ABSENT=…`, or remove this backend and its rungs",
    ),
    (f'{KEY}token = "credential:hf"\n', "token", "keys.k.token", "is LoadCredential= in the unit"),
    (
        '[backends.b]\nkind = "tgi"\nurl = "http://x"\ntoken = "hf_very-secret"\n',
        "token",
        "backends.b.token",
        'write "env:NAME"',
    ),
    ('[backends.b]\nkind = "tgi"\nurl = "http://x"\ntoken = ""\n', "token", "token", "what stands"),
]


@pytest.mark.parametrize(("added", "mark", "setting", "words"), BROKEN)
def test_a_broken_setting(added: str, mark: str, setting: str, words: str) -> None:
    text = GOOD + added
    before = GOOD.count("\n")
    line = before + next(i for i, one in enumerate(added.split("\n"), 1) if mark in one)
    (problem,) = problems(text)
    assert problem.startswith(f"f.toml:{line}: "), problem
    path, _, told = problem.partition(": ")[2].partition(": ")
    assert path.endswith(setting), problem
    assert words in told, problem
    assert "hf_very-secret" not in problem


def test_the_good_file_is_good() -> None:
    assert good(GOOD).warnings == ()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a = \n", "f.toml:1: is not TOML at column 5: Invalid value"),
        ("[server]\nport = 1\nport = 2\n", "f.toml:3: is not TOML"),
        ("[server\n", "f.toml:1: is not TOML"),
        (
            "[server]\nauth = open\n",
            "f.toml:2: is not TOML at column 8: Invalid value; text needs quotes",
        ),
        (
            "[server]\nhost = 127.0.0.1\n",
            "f.toml:2: is not TOML at column 13: Expected newline or end of document after a "
            "statement; text needs quotes",
        ),
        (
            "[server]\npublic_ops = True\n",
            "f.toml:2: is not TOML at column 14: Invalid value; write true",
        ),
        (
            "[ladders.x.rungs]\nmodel = 'm'\n[ ladders.x.rungs ]\nmodel = 'n'\n",
            "f.toml:3: is not TOML at column 19: Cannot declare ('ladders', 'x', 'rungs') twice; "
            "write [[ladders.x.rungs]] before each rung",
        ),
        (
            "[ladders.x.rungs]\nmodel = 'm'\n[[ladders.x.rungs]]\nmodel = 'n'\n",
            "f.toml:3: is not TOML at column 18: Cannot overwrite a value; "
            "write [[ladders.x.rungs]] before each rung",
        ),
        (
            "[server]\n[state]\n[ server ]\n",
            "f.toml:3: is not TOML at column 10: Cannot declare ('server',) twice; "
            "it stands on line 1 already",
        ),
        ("a = " + "[" * 5000, "f.toml: nests lists or tables far too deep"),
        ("a = " + "9" * 5000, "f.toml: has a number of far too many digits"),
        ("backends = 3", "f.toml:1: backends: must be tables: [backends.NAME]"),
        ("server = 3", "f.toml:1: server: is a number, where a table of settings is expected"),
        ("port = 1", "f.toml:1: port: stands outside of its table; put it below [server]"),
        ("[[server]]", "f.toml:1: server: is a list, where a table of settings is expected"),
    ],
)
def test_what_is_not_a_configuration_at_all(text: str, words: str) -> None:
    (problem,) = problems(text)
    assert problem.startswith(words)


def test_a_misspelt_section_is_told_once() -> None:
    (problem,) = problems(f'[backend.x]\nkind = "tgi"\n{RUNG.replace("gpu", "x")}')
    assert problem == 'f.toml:1: backend: there is no such section; did you mean "backends"?'
    (problem,) = problems(f'[server]\ndefault_ladder = "l"\n[ladder.l]\n{KEY}ladders = ["l"]\n')
    assert problem == 'f.toml:3: ladder: there is no such section; did you mean "ladders"?'


def test_a_credential_of_a_service_elsewhere_is_not_missed(tmp_path: Path) -> None:
    file = tmp_path / "rungway.toml"
    file.write_text(GOOD.replace("env:HF_TOKEN", "credential:hf"))
    assert load(file, ENVIRON, is_for_service=True).warnings == (
        f"{file}:9: backends.hf.token: "
        "is not checked: only the service has its $CREDENTIALS_DIRECTORY",
    )
    with pytest.raises(ConfigError, match="is LoadCredential= in the unit"):
        load(file, ENVIRON)


def test_a_text_without_a_source_has_no_lines() -> None:
    assert "there are no ladders" in parse("", "", {}).warnings[1]
    assert parse("", "", {}).warnings[0].startswith("server.auth: is")


def test_all_problems_are_told_at_once_in_the_order_of_the_file() -> None:
    text = (
        '[server]\nport = -1\nauth = "open"\nhost = "0.0.0.0"\n[backends.b]\nkind = "tgi"\n'
        'url = "x"\n[ladders.l]\npolicy = "x"\n[[ladders.l.rungs]]\nbackend = "c"\n'
        '[[ladders.l.rungs]]\nbackend = "d"\nmodel = "m"\n[keys.k]\nsha256 = "x"\n'
        'ladders = ["l"]\n[cach]\n'
    )
    lines = [int(problem.split(":")[1]) for problem in problems(text)]
    assert lines == [2, 3, 7, 9, 10, 11, 13, 16, 18]


def test_a_thousand_problems_are_told_in_a_hundred_lines() -> None:
    told = problems("[server]\n" + "".join(f"x{i} = 1\n" for i in range(1000)))
    assert len(told) == 101
    assert told[-1] == "f.toml: and 900 more problems"


def test_a_list_and_a_section_have_their_limits() -> None:
    (problem,) = problems(f"[server]\nallowed_hosts = {['h'] * 1001}\n")
    assert "has 1001 entries, where at most 1000 may stand" in problem
    rung = '{ backend = "gpu", model = "m%d" }'
    rungs = ",".join(rung % i for i in range(65))
    (problem,) = problems(f"{GOOD}[ladders.l]\nrungs = [{rungs}]\n")
    assert "at most 64" in problem
    (problem,) = problems("".join(f"[keys.k{i}]\n" for i in range(10_001)))
    assert problem == "f.toml:1: keys: has more than 10000 tables"


def test_a_long_or_unprintable_value_is_shown_cut() -> None:
    (problem,) = problems(f'[server]\nauth = "{"x" * 100}"\n')
    assert f'"{"x" * 40}…" is not one of' in problem
    (problem,) = problems('[server]\nauth = "a\\u001bb"\n')
    assert "\x1b" not in problem


@given(
    st.dictionaries(
        st.sampled_from(["server", "state", "backends", "ladders", "keys", "cache", "x"]),
        st.sampled_from(
            ["3", '"a"', "[]", "{}", "{ a = {} }", "{ a = [1] }", "[{}]", "1979-05-27"]
        ),
    ),
    st.text(max_size=30),
)
def test_any_text_is_a_configuration_or_a_named_problem(shape: dict[str, str], text: str) -> None:
    shaped = "".join(f"{name} = {value}\n" for name, value in shape.items())
    for one in (shaped, shaped + text):
        try:
            parse(one, "f", {})
        except ConfigError as error:
            assert all(re.match(r"f(:\d+)?: .", problem) for problem in error.problems)


# --- warnings -----------------------------------------------------------------------------------

RUNG_LINE = 'rungs = [{ backend = "gpu", model = "n" }]\n'


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", 'f.toml:1: server.auth: is "keys" and there are no [keys.NAME] tables'),
        ("", "f.toml:1: there are no ladders, so nothing can be answered"),
        (f"{GOOD}[ladders.tgi]\n{RUNG_LINE}", 'ladders.tgi: clients that send "tgi"'),
        (
            f'{GOOD}[ladders.l]\naliases = ["dummy", "https://x"]\n{RUNG_LINE}',
            'f.toml:18: ladders.l.aliases[0]: clients that send "dummy"',
        ),
        (
            f'{GOOD}[ladders.l]\naliases = ["dummy", "https://x"]\n{RUNG_LINE}',
            'ladders.l.aliases[1]: clients that send "https://x"',
        ),
        (
            f'{GOOD}[ladders.l]\naliases = ["chat:fastest"]\n{RUNG_LINE}',
            'aliases[0]: hides the reordered ladder "chat"',
        ),
        (f"{GOOD}[backends.p]\nkind = 'inference-providers'\n", "backends.p: has no token"),
        (
            f"{GOOD}[backends.p]\nkind = 'openai'\nurl = 'http://x.org'\ntoken = 'env:HF_TOKEN'\n",
            "backends.p.url: sends the token unencrypted",
        ),
        (f"{GOOD}{KEY}ladders = []\n", "keys.k.ladders: is empty, so the key may call nothing"),
    ],
)
def test_what_is_odd_but_possible_is_warned_of(text: str, words: str) -> None:
    assert any(words in warning for warning in good(text).warnings)


UNPRICED = """
[backends.p]
kind = "openai"
url = "https://{host}"
[ladders.l]
[[ladders.l.rungs]]
backend = "p"
model = "m"
"""
OPEN = '[server]\nauth = "open"\n'


@pytest.mark.parametrize(
    ("host", "added", "words"),
    [
        ("api.example.com", OPEN, ["open_usd_per_day"]),
        ("api.example.com", f"{KEY}limits.usd_per_month = 3\n", ['"k" has a money limit']),
        ("api.example.com", f"{KEY}limits.tokens_per_day = 3\n", []),
        ("api.example.com", f"{KEY}limits.usd_per_day = 3\nallow_unpriced = true\n", []),
        ("10.0.0.2", OPEN, []),
    ],
)
def test_a_rung_that_its_callers_may_not_pay_for_is_warned_of(
    host: str, added: str, words: list[str]
) -> None:
    text = UNPRICED.format(host=host) + added
    warnings = [one for one in good(text).warnings if "usd_per_mtok" in one]
    assert len(warnings) == len(words)
    assert all(word in one for word, one in zip(words, warnings, strict=True))
    priced = text.replace('"m"', '"m"\nusd_per_mtok = { input = 1, output = 2 }')
    assert not any("usd_per_mtok" in one for one in good(priced).warnings)


@pytest.mark.parametrize(
    "url", ["http://127.0.0.1:1", "http://10.0.0.2", "http://gpu:80", "https://x.org"]
)
def test_a_token_within_the_house_or_encrypted_is_not_warned_of(url: str) -> None:
    added = f"[backends.p]\nkind = 'openai'\nurl = '{url}'\ntoken = 'env:HF_TOKEN'\n"
    assert good(GOOD + added).warnings == ()


# --- what is accepted, and what it becomes -----------------------------------------------------


def test_an_empty_file_is_all_defaults() -> None:
    config = good("")
    assert config.server == schema.Server()
    assert (config.ladders, config.keys, config.default_ladder) == ({}, {}, None)
    assert config.source is None


def test_an_origin_is_accepted_as_browsers_send_it() -> None:
    origins = '["https://app.example.org", "http://localhost:3000"]'
    config = good(f"[server]\ncors_origins = {origins}\n")
    assert config.server.cors_origins == ("https://app.example.org", "http://localhost:3000")


def test_a_ladder_becomes_the_houses_own() -> None:
    config = good(
        f"""{GOOD}
[ladders.l]
aliases = ["gpt-4o-mini"]
policy = "best"
connect_s = 1
first_token_s = 2
idle_s = 3
answer_s = 4
total_s = 5
[[ladders.l.rungs]]
backend = "gpu"
model = "m"
context = 8192
tools = true
vision = false
max_in_flight = 32
usd_per_mtok = {{ input = 0.13, output = 0.40 }}
tiers = ["premium"]
"""
    )
    ladder = config.ladders["l"]
    assert (ladder.task, ladder.policy, ladder.aliases) == (
        Task.CHAT,
        Policy.BEST,
        ("gpt-4o-mini",),
    )
    assert ladder.limits == PhaseLimits(1.0, 2.0, 3.0, 4.0, 5.0)
    (rung,) = ladder.rungs
    assert rung.name == "gpu/m"
    assert rung.abilities == Abilities(context=8192, tools=True, vision=False)
    assert rung.max_in_flight == 32
    assert rung.price == Price(130_000, 400_000)
    assert rung.tiers == {"premium"}


@pytest.mark.parametrize(
    ("backend", "is_free"),
    [
        ('kind = "tgi"\nurl = "https://tgi.example.org"', True),
        ('kind = "inference-endpoint"\nurl = "https://x.example.org"', True),
        ('kind = "gradio-space"\nspace = "a/b"', True),
        ('kind = "openai"\nurl = "http://10.0.0.3:8000/v1"', True),
        ('kind = "openai"\nurl = "http://[::1]:8000"', True),
        ('kind = "openai"\nurl = "http://vllm:8000"', True),
        ('kind = "openai"\nurl = "https://api.example.org/v1"', False),
        ('kind = "openai"\nurl = "https://8.8.8.8"', False),
        ('kind = "inference-providers"\ntoken = "env:HF_TOKEN"', False),
    ],
)
def test_where_a_token_costs_nothing_its_price_is_known(backend: str, is_free: bool) -> None:
    added = f"[backends.b]\n{backend}\n{RUNG.replace('gpu', 'b')}"
    free = Price(0, 0)
    assert good(GOOD + added).ladders["l"].rungs[0].price == (free if is_free else None)
    own = f"{added}usd_per_mtok = {{ input = 1, output = 2 }}\n"
    assert good(GOOD + own).ladders["l"].rungs[0].price == Price(1_000_000, 2_000_000)
    assert good(GOOD).ladders["embed"].rungs[0].price == free


def test_an_embeddings_ladder_is_one_vector_space() -> None:
    two = (
        f"{EMBED}[[ladders.l.rungs]]\nbackend='tei'\nmodel='BAAI/bge-m3'\n"
        "[[ladders.l.rungs]]\nbackend='hf'\nmodel='BAAI/bge-m3:cheapest'\n"
        "usd_per_mtok = { input = 0.01 }\n"
    )
    ladder = good(GOOD + two).ladders["l"]
    assert ladder.vector_space == "BAAI/bge-m3"
    assert ladder.rungs[1].price == Price(10_000, 0)
    named = two.replace("model='BAAI/bge-m3'", "model='bge'").replace(
        "[[", "vector_space = 'v'\ntoken_ids = 'model'\n[[", 1
    )
    ladder = good(GOOD + named).ladders["l"]
    assert (ladder.vector_space, ladder.token_ids) == ("v", "model")


def test_a_vector_space_may_stand_on_the_rungs() -> None:
    both = (
        f"{EMBED}[[ladders.l.rungs]]\nbackend='tei'\nmodel='bge'\nvector_space='BAAI/bge-m3'\n"
        "[[ladders.l.rungs]]\nbackend='hf'\nmodel='BAAI/bge-m3:cheapest'\n"
    )
    assert good(GOOD + both).ladders["l"].vector_space == "BAAI/bge-m3"
    with_ladders = both.replace("[[", "vector_space = 'BAAI/bge-m3'\n[[", 1)
    assert good(GOOD + with_ladders).ladders["l"].vector_space == "BAAI/bge-m3"


def test_only_a_providers_suffix_is_left_out_of_the_vector_space() -> None:
    added = (
        "[backends.o]\nkind='openai'\nurl='http://x'\n"
        f"{EMBED}[[ladders.l.rungs]]\nbackend='o'\nmodel='bge-m3:latest'\n"
    )
    assert good(GOOD + added).ladders["l"].vector_space == "bge-m3:latest"


def test_a_key_becomes_the_houses_own() -> None:
    config = good(
        f"{GOOD}{KEY}ladders = ['chat']\ntier = 'premium'\nadmin = true\nbill_to = 'acme'\n"
        "token = 'env:HF_TOKEN'\nlimits = { concurrent = 8, max_input_kib = 256 }\n"
    )
    key = config.keys[bytes.fromhex(OTHER_HASH)]
    assert (key.name, key.ladders, key.tier, key.admin) == (
        "k",
        frozenset({"chat"}),
        "premium",
        True,
    )
    assert key.limits == KeyLimits(concurrent=8, max_input_bytes=256 << 10)
    assert (key.bill_to, key.token) == ("acme", "hf_very-secret")
    assert config.keys[bytes.fromhex(HASH)].name == "alice"
    assert config.keys[bytes.fromhex(HASH)].ladders is None
    assert "hf_very-secret" not in repr(config)


def test_the_backends_keep_their_settings_by_kind() -> None:
    config = good(
        f"{GOOD}{SPACE}space = 'a/b'\ninputs = {{ message = '{{transcript}}', top_k = 3 }}\n"
        f"{ENDPOINT}endpoint = 'a/b'\nurl = 'https://x.example'\ntoken = 'env:HF_TOKEN'\n"
    )
    space, endpoint = config.backends["s"], config.backends["e"]
    assert isinstance(space, schema.SpaceBackend)
    assert space.inputs == {"message": "{transcript}", "top_k": 3}
    assert isinstance(endpoint, schema.EndpointBackend)
    assert endpoint.management_url == schema.MANAGEMENT_URL
    assert isinstance(config.backends["hf"], schema.ProvidersBackend)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.0.1", "::1", "::ffff:127.0.0.1", "LOCALHOST"])
def test_open_is_for_loopback(host: str) -> None:
    config = good(f'[server]\nauth = "open"\nhost = "{host}"\n')
    assert config.server.auth == "open"


def test_the_command_line_cannot_open_what_the_file_may_not() -> None:
    config = good('[server]\nauth = "open"\n')
    moved = config.with_server(schema.Server(auth="open", port=9))
    assert moved.server.port == 9
    with pytest.raises(ConfigError, match="refused unless"):
        config.with_server(schema.Server(auth="open", host="0.0.0.0"))
    with pytest.raises(ConfigError, match="command line"):
        config.with_server(schema.Server(port=70_000))


@pytest.mark.parametrize(
    ("environ", "url"),
    [
        ({"STATE_DIRECTORY": "/var/lib/rungway:/x"}, "sqlite:///var/lib/rungway/state.db"),
        ({"XDG_STATE_HOME": "/s", "HOME": "/h"}, "sqlite:///s/rungway/state.db"),
        ({"HOME": "/h"}, "sqlite:///h/.local/state/rungway/state.db"),
    ],
)
def test_the_states_default_place(environ: dict[str, str], url: str) -> None:
    assert parse("", "f", environ).state.url == url
    assert parse('[state]\nurl = "memory://"', "f", environ).state.url == "memory://"


# --- files --------------------------------------------------------------------------------------


def test_a_file_is_loaded_with_its_name_and_its_mark_of_order(tmp_path: Path) -> None:
    file = tmp_path / "rungway.toml"
    file.write_bytes(b"\xef\xbb\xbf" + GOOD.replace("\n", "\r\n").encode())
    config = load(file, ENVIRON)
    assert config.source == file
    assert set(config.ladders) == {"chat", "embed"}


def refused(path: Path) -> str:
    with pytest.raises(ConfigError) as caught:
        load(path, ENVIRON)
    (problem,) = caught.value.problems
    return problem


def test_what_is_no_readable_file_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "f.toml"
    assert refused(file) == f"{file}: cannot be read: No such file or directory"
    assert refused(tmp_path) == f"{tmp_path}: cannot be read: Is a directory"
    os.mkfifo(tmp_path / "pipe")
    assert "not a regular file" in refused(tmp_path / "pipe")
    file.write_bytes(b"# " + b"x" * (1 << 20))
    assert "larger than 1 MiB" in refused(file)
    file.write_bytes(b"[server]\n# \xff\n")
    assert refused(file).startswith(f"{file}:2: is not UTF-8 text")


def test_the_search_for_a_file(tmp_path: Path) -> None:
    here, home = tmp_path / "here", tmp_path / "home"
    (home / ".config" / "rungway").mkdir(parents=True)
    (home / "xdg" / "rungway").mkdir(parents=True)
    here.mkdir()
    in_home = home / ".config" / "rungway" / "rungway.toml"
    in_xdg = home / "xdg" / "rungway" / "rungway.toml"
    in_cwd = here / "rungway.toml"
    environ = {"HOME": str(home)}
    in_home.touch()
    assert find(None, environ, here) == in_home
    in_xdg.touch()
    xdg = {**environ, "XDG_CONFIG_HOME": str(home / "xdg")}
    assert find(None, xdg, here) == in_xdg
    in_cwd.touch()
    assert find(None, xdg, here) == in_cwd
    named = {**environ, "RUNGWAY_CONFIG": "/n.toml"}
    assert find(None, named, here) == Path("/n.toml")
    assert find("e.toml", named, here) == here / "e.toml"


def test_no_file_at_all(tmp_path: Path) -> None:
    found = find(None, {"HOME": str(tmp_path)}, tmp_path)
    assert found in (None, Path("/etc/rungway/rungway.toml"))


def test_time_limits_that_are_left_out_follow_the_task() -> None:
    rung = '[[ladders.{0}.rungs]]\nbackend = "b"\nmodel = "m"\n'
    text = (
        '[backends.b]\nkind = "openai"\nurl = "http://127.0.0.1:1"\n[ladders.chat]\n'
        + rung.format("chat")
        + '[ladders.embed]\ntask = "embeddings"\n'
        + rung.format("embed")
        + '[ladders.own]\ntask = "embeddings"\nanswer_s = 5\n'
        + rung.format("own")
    )
    ladders = parse(text, "f", {}).ladders
    times = {name: (one.limits.answer_s, one.limits.total_s) for name, one in ladders.items()}
    assert times == {"chat": (120, 600), "embed": (30, 120), "own": (5, 120)}


def test_a_valkey_without_its_package_is_told_before_the_start(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    text = GOOD + '[state]\nurl = "valkey://127.0.0.1:6379/0"\n'
    assert good(text).state.url == "valkey://127.0.0.1:6379/0"
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    (told,) = problems(text)
    assert "pip install 'rungway[valkey]'" in told
