"""Configuration: defaults, layers, refusals, and config.toml, which says the same as the code."""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import FrozenInstanceError, asdict, fields
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streaming import config
from streaming.auth import Auth, digest
from streaming.config import Config, ConfigError, Key, Upstream, is_demo, is_loopback, load
from streaming.errors import CannotStart
from streaming.grants import ACTIONS
from tests.properties import property_test

ROOT = Path(__file__).parent.parent
SECTIONS = [f.name for f in fields(Config) if f.name != "upstreams"]
KEYS = [(section, f.name) for section in SECTIONS for f in fields(getattr(Config(), section))]
SECRET = "sk-0123456789abcdef"
LOCAL = {"name": "local", "base_url": "http://127.0.0.1:8000/v1", "models": ["llama"]}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "rivulet.toml"


def problems(
    file: Path | None = None,
    text: str = "",
    environ: Mapping[str, str] | None = None,
    overrides: Mapping[str, object] | None = None,
) -> list[str]:
    """The lines of the refusal, [] where there is none."""
    if file is not None:
        file.write_text(text)
    try:
        load(str(file or ROOT / "config.toml"), environ or {}, overrides)
    except ConfigError as error:
        assert str(error).split("\n") == list(error.problems)
        return list(error.problems)
    return []


def with_upstreams(*upstreams: Mapping[str, Any], **environ: str) -> list[str]:
    return problems(environ={"RIVULET_UPSTREAMS": json.dumps(upstreams), **environ})


# The file at the root


def test_config_toml_says_what_the_code_says() -> None:
    """Every section, key, help line and default, in the code's order; upstreams as a comment."""
    text = (ROOT / "config.toml").read_text()
    expected: list[str] = []
    for name, kind in get_type_hints(Config).items():
        table, head = (Upstream, "[[upstreams]]") if name == "upstreams" else (kind, f"[{name}]")
        expected += ["", f"# {table.__doc__}", head]
        for f in fields(table):
            expected += [f"# {f.metadata['help']}", f"{f.name} ="]
    shown = re.sub(r"(?m)^(\w+ =) .*", r"\1", uncommented(text)).splitlines()
    assert shown[shown.index("") :] == expected
    defaults = {s: asdict(getattr(Config(), s)) for s in SECTIONS}
    assert tomllib.loads(text) == json.loads(json.dumps(defaults))
    assert load(str(ROOT / "config.toml"), {}) == Config()


def test_its_example_of_an_upstream_works(file: Path) -> None:
    """The commented table can be taken as it is; what it does not need to show is the default."""
    file.write_text(uncommented((ROOT / "config.toml").read_text()))
    (upstream,) = load(str(file), {}).upstreams
    assert upstream.models and upstream.fallbacks and upstream.api_key == Upstream("", "").api_key


def uncommented(text: str) -> str:
    """The file with its example taken out of the comment."""
    before, head, rest = text.partition("# [[upstreams]]\n")
    example, blank, after = rest.partition("\n\n")
    return before + re.sub("(?m)^# ", "", head + example) + blank + after


def test_every_key_is_explained_and_every_number_has_its_range() -> None:
    """A number without both bounds would let infinity and NaN through."""
    for table in [*(type(getattr(Config(), s)) for s in SECTIONS), Upstream, Key]:
        for f in fields(table):
            assert f.metadata["help"].endswith(".") and "\n" not in f.metadata["help"]
            if get_type_hints(table)[f.name] in (int, float):
                assert f.metadata["min"] <= f.default <= f.metadata["max"]
                assert isinstance(f.default, get_type_hints(table)[f.name])


# Layers


def test_without_a_file_the_defaults_hold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """config.toml beside app.py is read where it is, and not missed where it is not."""
    assert config.DEFAULT_PATH == ROOT / "config.toml"
    monkeypatch.setattr(config, "DEFAULT_PATH", tmp_path / "config.toml")
    assert load(None, {}) == Config()
    (tmp_path / "config.toml").write_text("[server]\nport = 9")
    assert load(None, {}).server.port == 9


def test_each_layer_goes_before_the_one_below(file: Path) -> None:
    """Defaults, file, environment, command line; None on the command line is "not given"."""
    file.write_text('[server]\nport = 1\nhost = "::1"\ndrain = 5\n')
    assert load(str(file), {}).server.port == 1
    environ = {"RIVULET_SERVER__PORT": "2", "RIVULET_GENERATION__SINGLE_FLIGHT": "true"}
    loaded = load(str(file), environ, {"server.port": None})
    assert loaded.server.port == 2 and loaded.generation.single_flight is True
    loaded = load(str(file), environ, {"server.port": 3, "server.host": "localhost"})
    assert (loaded.server.port, loaded.server.host) == (3, "localhost")
    assert loaded.server.loop == "asyncio"
    assert loaded.server.drain == 5.0 and isinstance(loaded.server.drain, float)


@pytest.mark.parametrize(("section", "key"), KEYS)
def test_every_key_can_be_set_from_the_environment(section: str, key: str) -> None:
    """As RIVULET_SECTION__KEY, spelled as JSON, but strings as they are."""
    default = getattr(getattr(Config(), section), key)
    text = default if isinstance(default, str) else json.dumps(default)
    environ = {f"RIVULET_{section}__{key}".upper(): text}
    assert load(str(ROOT / "config.toml"), environ) == Config()
    if not isinstance(default, str):
        assert problems(environ=dict.fromkeys(environ, "no"))[0].startswith(next(iter(environ)))


def test_a_text_from_the_command_line_is_read_as_from_the_environment() -> None:
    assert load(None, {}, {"server.port": "0"}).server.port == 0
    assert problems(overrides={"server.port": "x"}) == ["server.port: must be a whole number"]
    assert problems(overrides={"server.prt": 1}) == [
        '"server.prt": unknown key; the nearest known one is server.port'
    ]


def test_upstreams_come_from_the_file_or_as_json_from_the_environment(file: Path) -> None:
    """The later list takes the place of the earlier one."""
    file.write_text('[[upstreams]]\nname = "a"\nbase_url = "https://a/v1"\nmodels = ["m"]\n')
    assert load(str(file), {}).upstreams == (Upstream("a", "https://a/v1", models=("m",)),)
    loaded = load(str(file), {"RIVULET_UPSTREAMS": json.dumps([LOCAL])})
    assert loaded.upstreams == (Upstream("local", LOCAL["base_url"], models=("llama",)),)  # type: ignore[arg-type]
    assert load(str(file), {"RIVULET_UPSTREAMS": "[]"}).upstreams == ()


def test_the_default_upstream_falls_back_to_openai_api_key(file: Path) -> None:
    """Only where [model] api_key is empty, and for no other upstream."""
    environ = {"OPENAI_API_KEY": SECRET, "RIVULET_UPSTREAMS": json.dumps([LOCAL])}
    loaded = load(str(ROOT / "config.toml"), environ)
    assert loaded.model.api_key == SECRET
    assert loaded.upstreams[0].api_key == ""
    file.write_text('[model]\napi_key = "sk-file"')
    assert load(str(file), environ).model.api_key == "sk-file"
    assert load(str(file), environ | {"RIVULET_MODEL__API_KEY": "sk-x"}).model.api_key == "sk-x"
    assert load(str(file), environ | {"RIVULET_MODEL__API_KEY": ""}).model.api_key == SECRET


def test_the_configuration_cannot_be_changed() -> None:
    with pytest.raises(FrozenInstanceError):
        Config().server.port = 1  # type: ignore[misc]


# Refusals


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("[server]\nprot = 1", "server.prot: unknown key; the nearest known one is server.port"),
        ("[sever]\nport = 1", "sever: unknown key; the nearest known one is server"),
        ("[reddit]", "reddit: unknown key; the nearest known one is redis"),
        ("upstream = []", "upstream: unknown key; the nearest known one is upstreams"),
        ('[server]\n"a\\nb" = 1', 'server."a\\nb": unknown key; the nearest known one is server.'),
        (
            "[[upstreams]]\nname='a'\nbase_url='http://a'\nmodel='m'",
            "upstreams[0].model: unknown key; the nearest known one is upstreams[0].models",
        ),
    ],
)
def test_an_unknown_key_in_the_file(file: Path, text: str, line: str) -> None:
    """Is refused with the nearest known one."""
    (problem,) = problems(file, text)
    assert problem.startswith(line)


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("RIVULET_SERVER__PROT", "RIVULET_SERVER__PORT"),
        ("RIVULET_SERVER_PORT", "RIVULET_SERVER__PORT"),
        ("RIVULET_UPSTREAM", "RIVULET_UPSTREAMS"),
        ("RIVULET_MODEL_BASE_URL", "RIVULET_MODEL__BASE_URL"),
    ],
)
def test_an_unknown_variable(name: str, nearest: str) -> None:
    """Is refused with the nearest known one."""
    assert problems(environ={name: "9000"}) == [
        f"{name}: unknown key; the nearest known one is {nearest}"
    ]


def test_other_variables_are_none_of_our_business() -> None:
    """Nor those of Kubernetes, which it sets in every pod beside a service of our name."""
    environ = {
        "PATH": "/bin",
        "RIVULETS": "1",
        "RIVULET_SERVICE_HOST": "10.0.0.1",
        "RIVULET_SERVICE_PORT": "80",
        "RIVULET_SERVICE_PORT_HTTP": "80",
        "RIVULET_PORT": "tcp://10.0.0.1:80",
        "RIVULET_PORT_80_TCP": "tcp://10.0.0.1:80",
        "RIVULET_PORT_80_TCP_ADDR": "10.0.0.1",
        "RIVULET_REDIS_SERVICE_HOST": "10.0.0.2",
        "RIVULET_REDIS_PORT": "tcp://10.0.0.2:6379",
    }
    assert problems(environ=environ) == []


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        ("server.port", "'80'", "must be a whole number"),
        ("server.port", "80.0", "must be a whole number"),
        ("server.port", "true", "must be a whole number"),
        ("server.port", "-1", "must be between 0 and 65535"),
        ("server.port", "65536", "must be between 0 and 65535"),
        ("server.port", "9" * 400, "must be between 0 and 65535"),
        ("server.drain", "true", "must be a number"),
        ("server.drain", "'1'", "must be a number"),
        ("server.drain", "2026-01-01", "must be a number"),
        ("server.drain", "-0.1", "must be between 0 and 3600"),
        ("server.drain", "nan", "must be between 0 and 3600"),
        ("server.drain", "inf", "must be between 0 and 3600"),
        ("server.drain", "9" * 400, "must be between 0 and 3600"),
        ("server.access_log", "1", "must be true or false"),
        ("server.access_log", "'true'", "must be true or false"),
        ("server.loop", "'trio'", 'must be "asyncio" or "uvloop"'),
        ("server.host", "0", "must be a string"),
        ("server.host", "''", "must not be empty, or begin or end with a space"),
        ("model.name", "' x'", "must not be empty, or begin or end with a space"),
        ("model.name", '"a\\nb"', "must have no control characters"),
        ("model.api_key", '"sk-a\\n"', "must have no control characters"),
        ("model.api_key", "'sk a'", "must be printable ASCII without spaces"),
        ("model.api_key", "['sk']", "must be a string"),
        ("history.messages", "101", "must be between 1 and 100"),
        ("server.trusted_proxies", "'10.0.0.1'", "must be a list"),
        ("auth.mode", "'closed'", 'must be "open" or "token"'),
        ("auth.keys", "{}", "must be a list"),
        (
            "auth.jwt_secret",
            "'fifteen-letters'",
            "must have 16 or more characters of ASCII without spaces",
        ),
    ],
)
def test_a_bad_value(file: Path, key: str, value: str, reason: str) -> None:
    """Is refused with the key and the reason. A bool is no number, an int is good for a float."""
    section, _, name = key.partition(".")
    assert problems(file, f"[{section}]\n{name} = {value}") == [f"{key}: {reason}"]


@pytest.mark.parametrize(
    "url",
    [
        "http://127.0.0.1:8000",
        "https://api.openai.com/v1",
        "HTTP://[::1]:8000/v1/",
        "http://my_vllm/v1",
    ],
)
def test_a_base_url(url: str) -> None:
    assert load(None, {"RIVULET_MODEL__BASE_URL": url}).model.base_url == url


@pytest.mark.parametrize(
    "url",
    [
        "api.openai.com/v1",
        "ftp://a/v1",
        "http://",
        "http:///v1",
        "http://a:port/v1",
        "http://a b/v1",
        "http://a/v1?key=1",
        "http://a/v1#x",
        f"http://user:{SECRET}@a/v1",
    ],
)
def test_what_is_no_base_url(url: str) -> None:
    """A user, query or fragment could be a secret that later shows in a log."""
    (problem,) = problems(environ={"RIVULET_MODEL__BASE_URL": url})
    assert problem.startswith("RIVULET_MODEL__BASE_URL: must be an http:// or https:// URL without")


def test_everything_wrong_is_said_at_once(file: Path) -> None:
    """A line each, from all layers, and what is wrong between keys that are right by themselves."""
    text = "logging = 1\nserver = 1\n[generation]\nretries = -1\nlinger = '1'\n"
    environ = {
        "RIVULET_SERVER__PORT": "1",
        "RIVULET_DEMO__RATE": "1",
        "RIVULET_DEMO__MAX_RATE": "fast",
        "RIVULET_UPSTREAMS": json.dumps([LOCAL, LOCAL]),
    }
    found = problems(file, text, environ, {"server.host": 1})
    assert [line.partition(":")[0] for line in found] == [
        "RIVULET_DEMO__RATE",
        "logging",
        "server",
        "generation.linger",
        "generation.retries",
        "RIVULET_DEMO__MAX_RATE",
        "RIVULET_UPSTREAMS[1].name",
        "RIVULET_UPSTREAMS[1].models[0]",
    ]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "cannot be read: No such file or directory"),
        (b"[server", "is not TOML: "),
        (b"\xff", "is not TOML: "),
        (b"a = " + b"[" * 100_000, "is not TOML: "),
        (b"a = " + b"9" * 100_000, "is not TOML: "),
    ],
)
def test_a_file_that_cannot_be_read(file: Path, content: bytes | None, reason: str) -> None:
    """Is refused if it was asked for, missing or not."""
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(ConfigError, match=re.escape(f"{file}: {reason}")):
        load(str(file), {})


def test_a_directory_or_no_path_at_all_is_no_file(tmp_path: Path) -> None:
    for path in (str(tmp_path), "", "a\0b"):
        with pytest.raises(ConfigError):
            load(path, {})


# Upstreams


def test_upstreams_of_the_wrong_shape() -> None:
    """Each problem names the upstream by its number."""
    assert problems(environ={"RIVULET_UPSTREAMS": "[{"}) == ["RIVULET_UPSTREAMS: must be a list"]
    assert with_upstreams(LOCAL, 1, {"models": "m", "fallbacks": [1]}) == [  # type: ignore[arg-type]
        "RIVULET_UPSTREAMS[1]: must be a table",
        "RIVULET_UPSTREAMS[2].name: is missing",
        "RIVULET_UPSTREAMS[2].base_url: is missing",
        "RIVULET_UPSTREAMS[2].models: must be a list",
        "RIVULET_UPSTREAMS[2].fallbacks[0]: must be a string",
    ]


def test_names_and_models_of_upstreams_are_unique() -> None:
    """A model listed twice would silently never reach the second. The default model may be listed:
    then that upstream, with its fallbacks, is asked."""
    other = LOCAL | {"name": "other", "models": ["qwen"]}
    assert with_upstreams(LOCAL, other, RIVULET_MODEL__NAME="qwen") == []
    assert with_upstreams(LOCAL, other | {"name": "local", "models": ["qwen", "llama"]}) == [
        "RIVULET_UPSTREAMS[1].name: is the name of another upstream already",
        "RIVULET_UPSTREAMS[1].models[1]: is listed already",
    ]


def test_fallbacks_are_known_models() -> None:
    """Listed by an upstream, the default model, or a demo name where the demo can be reached."""
    backed = LOCAL | {"fallbacks": ["gpt", "demo:rate=9"]}
    real = {"RIVULET_MODEL__NAME": "gpt", "RIVULET_MODEL__BASE_URL": "http://a/v1"}
    demo = {"name": "demo", "base_url": "", "models": ["demo"]}
    assert with_upstreams(backed, demo, **real) == []
    assert with_upstreams(backed, **real) == [
        "RIVULET_UPSTREAMS[0].fallbacks[1]: unknown model; the nearest known one is gpt"
    ]
    assert with_upstreams(backed, RIVULET_MODEL__NAME="demo:tokens=3") == [
        "RIVULET_UPSTREAMS[0].fallbacks[0]: unknown model; the nearest known one is demo:tokens=3"
    ]


@pytest.mark.parametrize("models", [[], ["llama"], ["demo", "llama"]])
def test_an_upstream_without_address_is_the_demo(models: list[str]) -> None:
    """So it may list nothing else."""
    assert with_upstreams({"name": "demo", "base_url": "", "models": ["demo", "demo:x"]}) == []
    assert with_upstreams({"name": "demo", "base_url": "", "models": models}) == [
        "RIVULET_UPSTREAMS[0].base_url: may be empty only where all its models are demo names"
    ]


def test_demo_names() -> None:
    assert is_demo("demo") and is_demo("demo:rate=1")
    assert not is_demo("demolition") and not is_demo("")


# The doors


def test_open_mode_is_for_loopback_unless_asked_for_by_name(file: Path) -> None:
    """Whoever reaches an open server may do anything there."""
    for host in ("127.0.0.1", "127.8.0.1", "::1", "localhost"):
        assert is_loopback(host) and problems(overrides={"server.host": host}) == []
    for host in ("0.0.0.0", "::", "10.0.0.1", "example.com", "localhost.example.com"):
        (problem,) = problems(environ={"RIVULET_SERVER__HOST": host})
        assert problem.startswith("RIVULET_SERVER__HOST: must be loopback while auth.mode is open")
        text = f'[server]\nhost = "{host}"\n[auth]\nopen_anywhere = true'
        assert not is_loopback(host) and problems(file, text) == []
    token = {"RIVULET_AUTH__MODE": "token", "RIVULET_AUTH__JWT_SECRET": SECRET}
    assert problems(environ={**token, "RIVULET_SERVER__HOST": "0.0.0.0"}) == []


def test_token_mode_lets_somebody_in(file: Path) -> None:
    """By one of its four ways at least."""
    (problem,) = problems(file, '[auth]\nmode = "token"')
    assert problem.startswith("auth.mode: token needs keys, keys_file, jwt_secret or jwt_key")
    for way in ('keys = [{key = "k", user = "ann"}]', 'keys_file = "k"', 'jwt_key = "k"'):
        assert problems(file, f'[auth]\nmode = "token"\n{way}') == []


def test_api_keys_come_from_the_file_or_as_json_from_the_environment(file: Path) -> None:
    """As they are, or by their digest, with grants in one of two shapes."""
    hashed = f"sha256:{digest(SECRET).hex()}"
    file.write_text(f"""[auth]\nkeys = [
        {{key = "k", user = "ann b"}},
        {{key = "{hashed}", user = "c", service = true, grants = {{"a*" = ["moderate"]}}}},
    ]""")
    ann, c = load(str(file), {}).auth.keys
    assert (ann.key, ann.user, ann.service, ann.grants) == ("k", "ann b", False, None)
    assert c.key == hashed and c.service and c.grants is not None
    assert c.grants.rules == (("a*", ("moderate",)),)
    keys = json.dumps([{"key": "k", "user": "d", "grants": ["x", "y"]}])
    (d,) = load(str(file), {"RIVULET_AUTH__KEYS": keys}).auth.keys
    assert d.grants is not None and [pattern for pattern, _ in d.grants.rules] == ["x", "y"]


@pytest.mark.parametrize(
    ("key", "reason"),
    [
        ({"user": "ann"}, "RIVULET_AUTH__KEYS[0].key: is missing"),
        ({"key": "k"}, "RIVULET_AUTH__KEYS[0].user: is missing"),
        ({"key": "", "user": "a"}, "RIVULET_AUTH__KEYS[0].key: must be printable ASCII"),
        ({"key": "sha256:12", "user": "a"}, "RIVULET_AUTH__KEYS[0].key: must be printable ASCII"),
        ({"key": "k", "user": "a" * 129}, "RIVULET_AUTH__KEYS[0].user: must have 1 to 128"),
        ({"key": "k", "user": "a\n"}, "RIVULET_AUTH__KEYS[0].user: must have no control"),
        ({"key": "k", "user": "a", "service": 1}, "RIVULET_AUTH__KEYS[0].service: must be true"),
        ({"key": "k", "user": "a", "grants": "x"}, "RIVULET_AUTH__KEYS[0].grants: must be a list"),
        (
            {"key": "k", "user": "a", "grants": {"x": ["see"]}},
            "RIVULET_AUTH__KEYS[0].grants: must give each pattern a list of subscribe, publish,",
        ),
    ],
)
def test_what_is_no_api_key(key: dict[str, Any], reason: str) -> None:
    """A digest with a typing error does not become a key of its own."""
    (problem,) = problems(environ={"RIVULET_AUTH__KEYS": json.dumps([key])})
    assert problem.startswith(reason)


@pytest.mark.parametrize(
    "origin",
    ["https://example.com", "http://localhost:3000", "http://[::1]:80", "tauri://localhost"],
)
def test_an_origin(origin: str) -> None:
    assert load(None, {"RIVULET_CORS__ORIGINS": json.dumps([origin])}).cors.origins == (origin,)


@pytest.mark.parametrize("origin", ["*", "null", "", "example.com", "https://a/", "https://A.com"])
def test_what_is_no_origin(origin: str) -> None:
    """`*` would let every page act for whoever visits it."""
    (problem,) = problems(environ={"RIVULET_CORS__ORIGINS": json.dumps([origin])})
    assert problem.startswith("RIVULET_CORS__ORIGINS[0]: must be as browsers say it")


def test_trusted_proxies() -> None:
    """Addresses and networks, of both kinds."""
    said = json.dumps(["10.0.0.1", "10.1.2.3/8", "::1"])
    trusted = load(None, {"RIVULET_SERVER__TRUSTED_PROXIES": said}).server.trusted_proxies
    assert [str(network) for network in trusted] == ["10.0.0.1/32", "10.0.0.0/8", "::1/128"]
    for wrong in ("proxy", "10.0.0.0/33", 1, True, None):
        (problem,) = problems(environ={"RIVULET_SERVER__TRUSTED_PROXIES": json.dumps([wrong])})
        assert problem.startswith("RIVULET_SERVER__TRUSTED_PROXIES[0]: must be an address or a net")


# Secrets


def test_keys_do_not_show() -> None:
    """In the repr of a configuration, which may end in a log."""
    upstreams = json.dumps([LOCAL | {"api_key": SECRET}])
    loaded = load(None, {"OPENAI_API_KEY": SECRET, "RIVULET_UPSTREAMS": upstreams})
    assert loaded.model.api_key == loaded.upstreams[0].api_key == SECRET
    assert SECRET not in repr(loaded)
    keys = json.dumps([{"key": SECRET, "user": "ann"}])
    loaded = load(None, {"RIVULET_AUTH__KEYS": keys, "RIVULET_AUTH__JWT_SECRET": SECRET})
    assert loaded.auth.keys[0].key == loaded.auth.jwt_secret == SECRET
    assert SECRET not in repr(loaded)


@pytest.mark.parametrize(
    "environ",
    [
        {"RIVULET_MODEL__API_KEY": SECRET + " "},
        {"OPENAI_API_KEY": SECRET + "\n"},
        {"RIVULET_MODEL__APIKEY": SECRET},
        {"RIVULET_SERVER__PORT": SECRET},
        {"RIVULET_SERVER__LOOP": SECRET},
        {"RIVULET_MODEL__BASE_URL": SECRET},
        {"RIVULET_UPSTREAMS": json.dumps([LOCAL | {"api_key": SECRET + "é"}])},
        {"RIVULET_UPSTREAMS": json.dumps([{"api_key": SECRET}])},
        {"RIVULET_UPSTREAMS": f'[{{"api_key": "{SECRET}"'},
        {"RIVULET_UPSTREAMS": json.dumps([LOCAL | {"fallbacks": [SECRET]}])},
        {"RIVULET_AUTH__JWT_SECRET": SECRET + " "},
        {"RIVULET_AUTH__KEYS": json.dumps([{"key": SECRET + " ", "user": "ann"}])},
        {"RIVULET_AUTH__KEYS": json.dumps([{"key": "k", "user": "a", "grants": {SECRET: ["x"]}}])},
        {"RIVULET_AUTH__KEYS": json.dumps({SECRET: "ann"})},
        {"RIVULET_AUTH__MODE": SECRET},
        {"RIVULET_CORS__ORIGINS": json.dumps([SECRET])},
    ],
)
def test_a_refusal_repeats_no_value(environ: dict[str, str]) -> None:
    """Whatever the mistake, the value may be a key."""
    found = problems(environ=environ)
    assert found and SECRET not in "".join(found)


def test_a_file_that_is_no_toml_is_not_quoted(file: Path) -> None:
    """An unquoted key is a likely mistake."""
    (problem,) = problems(file, f"[model]\napi_key = {SECRET}")
    assert SECRET not in problem and "line 2" in problem


# Anything at all


NAMES = st.sampled_from(
    [*SECTIONS, "upstreams", *(key for _, key in KEYS), *(f.name for f in fields(Upstream))]
)
TEXTS = st.one_of(st.text(), st.sampled_from(["demo", "demo:x", "asyncio", "http://a/v1", ""]))
SCALARS = st.one_of(st.booleans(), st.integers(), st.floats(), TEXTS)
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner) | st.dictionaries(NAMES | st.text(), inner), max_leaves=9
)


def upstream_tables() -> st.SearchStrategy[list[dict[str, Any]]]:
    """Upstreams with the right keys, so that what comes after the types is reached too."""
    lists = st.lists(st.sampled_from(["a", "b", "demo", "demo:x"]), max_size=3)
    names = st.sampled_from(["a", "b", ""])
    urls = st.sampled_from(["", "http://a/v1", "a"])
    required = {"name": names, "base_url": urls}
    table = st.fixed_dictionaries(required, optional={"models": lists, "fallbacks": lists})
    return st.lists(table, max_size=3)


def key_tables() -> st.SearchStrategy[list[dict[str, Any]]]:
    """API keys, as `upstream_tables`."""
    actions = st.lists(st.sampled_from([*ACTIONS, "other", 1]), max_size=3)
    grants = st.lists(st.sampled_from(["*", "a*", "", 1]), max_size=3)
    required = {"key": st.sampled_from(["k", "l", "", "sha256:", "sha256:" + "a" * 64, " "])}
    optional = {
        "user": st.sampled_from(["ann", "", " ", "a\n"]),
        "service": st.booleans() | SCALARS,
        "grants": grants | st.dictionaries(st.sampled_from(["*", "a:*", ""]), actions) | VALUES,
    }
    return st.lists(st.fixed_dictionaries(required, optional=optional), max_size=3)


def spelled(value: Any) -> str:
    """A value as TOML."""
    if isinstance(value, dict):
        return f"{{{', '.join(f'{spelled(k)} = {spelled(v)}' for k, v in value.items())}}}"
    if isinstance(value, list):
        return f"[{', '.join(map(spelled, value))}]"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return json.dumps(value) if isinstance(value, bool) else repr(value)


def whole(loaded: Config) -> bool:
    """Whether every value has its type."""
    tables = [*(getattr(loaded, section) for section in SECTIONS), *loaded.upstreams]
    for table in tables:
        for name, kind in get_type_hints(type(table)).items():
            value = getattr(table, name)
            if get_origin(kind) is tuple:
                if not all(isinstance(item, get_args(kind)[0]) for item in value):
                    return False
            elif type(value) is not kind:
                return False
    return True


@property_test
@given(
    document=st.dictionaries(
        NAMES | st.text(), st.dictionaries(NAMES | st.text(), VALUES) | VALUES
    ),
    upstreams=st.none() | upstream_tables(),
    keys=st.none() | key_tables(),
)
def test_any_file_is_loaded_or_refused(
    tmp_path_factory: pytest.TempPathFactory,
    document: dict[str, Any],
    upstreams: list[dict[str, Any]] | None,
    keys: list[dict[str, Any]] | None,
) -> None:
    """Never another exception, and what is loaded has the right types."""
    if upstreams is not None:
        document["upstreams"] = upstreams
    if keys is not None:
        document["auth"] = {"mode": "token", "keys": keys}
    path = tmp_path_factory.getbasetemp() / "any.toml"
    lines = [f"{spelled(key)} = {spelled(value)}" for key, value in document.items()]
    path.write_text("\n".join(lines), "utf-8", "surrogatepass")
    try:
        loaded = load(str(path), {})
        assert whole(loaded)
        with suppress(CannotStart):  # a key that is there twice
            Auth(loaded.auth)
    except ConfigError as error:
        assert error.problems
        assert all("\n" not in problem for problem in error.problems)
        assert not any("is not TOML" in problem for problem in error.problems)


@property_test
@given(
    environ=st.dictionaries(
        st.sampled_from([f"RIVULET_{s}__{k}".upper() for s, k in KEYS])
        | st.sampled_from(["RIVULET_UPSTREAMS", "OPENAI_API_KEY", "RIVULET_MODEL"])
        | st.text().map("RIVULET_{}".format),
        TEXTS | (VALUES | upstream_tables() | key_tables()).map(json.dumps),
    ),
    overrides=st.dictionaries(
        st.sampled_from([f"{s}.{k}" for s, k in KEYS]) | st.text(), VALUES | st.none()
    ),
)
def test_any_environment_and_command_line_are_taken_or_refused(
    environ: dict[str, str], overrides: dict[str, object]
) -> None:
    """Never another exception, and what is loaded has the right types."""
    try:
        assert whole(load(None, environ, overrides))
    except ConfigError as error:
        assert error.problems
        assert all("\n" not in problem for problem in error.problems)
