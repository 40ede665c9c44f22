"""Configuration: every key with its type, default, range and one line of why, said once, here.

    defaults  <  config.toml  <  RIVULET_SECTION__KEY  <  command line

`config.toml` shows the same to people; a test holds the two equal.
"""

from __future__ import annotations

import difflib
import json
import re
import tomllib
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

DEFAULT_PATH = Path(__file__).resolve().parent.parent / "config.toml"  # beside app.py


# What a text must match in full, and the reason where it does not.
_NAME = r"\S(.*\S)?", "must not be empty, or begin or end with a space"
_SECRET = r"[!-~]*", "must be printable ASCII without spaces"
# User, query and fragment are refused: a secret in them would show in logs.
_URL = (
    r"((?i:https?)://([\w.-]+|\[[0-9a-fA-F:.]+\])(:[0-9]{1,5})?(/[^\s?#]*)?)?",
    "must be an http:// or https:// URL without user, query and fragment",
)
_REDIS = (
    r"((rediss?|unix|rediss?\+(sentinel|cluster))://[!-~]+)?",
    "must be a redis://, rediss://, unix://, redis+sentinel:// or redis+cluster:// URL",
)


def _key(default: Any, help: str, **rules: Any) -> Any:
    """A field with its help line and its rules: choices, form, or min and max."""
    secret = rules.get("form") in (_SECRET, _REDIS)
    return field(default=default, repr=not secret, metadata={"help": help, **rules})


def _text(default: Any, form: tuple[str, str], help: str) -> Any:
    return _key(default, help, form=form)


def _number(default: float, min: float, max: float, help: str) -> Any:
    """A field for a number. It always has both bounds, so neither infinity nor NaN passes."""
    return _key(default, help, min=min, max=max)


@dataclass(frozen=True, slots=True)
class Server:
    """The process and its port."""

    host: str = _text("127.0.0.1", _NAME, "Address to listen on; 0.0.0.0 is every interface.")
    port: int = _number(8080, 0, 65535, "With 0 the system picks a port, and the log says which.")
    workers: int = _number(1, 1, 1024, "Processes on the port; more than one are joined by Redis.")
    loop: str = _key("asyncio", 'Event loop: "asyncio" or "uvloop".', choices=("asyncio", "uvloop"))
    drain: float = _number(10.0, 0, 3600, "Seconds after SIGTERM in which answers may finish.")
    access_log: bool = _key(True, "One JSON line on stderr for each request.")


@dataclass(frozen=True, slots=True)
class Model:
    """The default upstream, asked for every model that no other upstream lists."""

    name: str = _text("demo", _NAME, 'Asked where a request names none; "demo" is embedded.')
    base_url: str = _text("", _URL, 'API up to its /v1; "" is the demo, or OpenAI for other names.')
    api_key: str = _text("", _SECRET, "Where empty, OPENAI_API_KEY from the environment.")


@dataclass(frozen=True, slots=True)
class Upstream:
    """Another upstream, as often as needed; in the environment RIVULET_UPSTREAMS, a JSON list."""

    name: str = _text(MISSING, _NAME, "Unique; what logs and errors call it.")
    base_url: str = _text(MISSING, _URL, 'As in [model]; "" only where all models are demo names.')
    api_key: str = _text("", _SECRET, "Its own; OPENAI_API_KEY is never sent here.")
    models: tuple[str, ...] = _text((), _NAME, "Asked here, and listed by no other upstream.")
    fallbacks: tuple[str, ...] = _text((), _NAME, "Models tried in order where this one fails.")


@dataclass(frozen=True, slots=True)
class Generation:
    """How one answer runs, is retried, and is kept. Times in seconds."""

    linger: float = _number(60.0, 0, 86400, "An answer that nobody reads is cancelled after this.")
    retention: float = _number(300.0, 0, 604800, "An answer can be resumed so long after its end.")
    retained_bytes: int = _number(268435456, 0, 2**40, "Past it the oldest ended answers go early.")
    max_bytes: int = _number(4194304, 1, 2**30, "A longer answer ends as failed: too_long.")
    flush_interval: float = _number(0.02, 0, 1, "Tokens gather for it; the first never waits.")
    commit_after: float = _number(10.0, 0, 3600, "OpenAI clients get a 200 by then, token or not.")
    retries: int = _number(2, 0, 20, "Only before the first token: later they would repeat text.")
    backoff: float = _number(
        0.5, 0, 600, "Before the first retry; doubles for each next, with jitter."
    )
    backoff_max: float = _number(8.0, 0, 3600, "The longest wait before a retry.")
    connect_timeout: float = _number(5.0, 0.001, 3600, "To reach the upstream.")
    first_token_timeout: float = _number(60.0, 0.001, 86400, "From the request to its first token.")
    idle_timeout: float = _number(60.0, 0.001, 86400, "Between two tokens.")
    total_timeout: float = _number(600.0, 0.001, 604800, "For the whole answer.")
    single_flight: bool = _key(False, "A user's equal requests share the answer that is running.")
    max_running: int = _number(10000, 1, 10**7, "Answers at once; one more is told 503, come back.")


@dataclass(frozen=True, slots=True)
class Demo:
    """Caps on the knobs of the embedded demo model, which any client may turn."""

    max_rate: float = _number(1000.0, 0.001, 10**7, "Tokens per second.")
    max_tokens: int = _number(20000, 1, 10**7, "Tokens in one answer.")


@dataclass(frozen=True, slots=True)
class Delivery:
    """How bytes reach clients."""

    heartbeat: float = _number(15.0, 0.001, 3600, "Seconds of silence; proxies often cut at 60.")
    write_timeout: float = _number(
        20.0, 0.001, 3600, "Seconds a client may stall before it is cut."
    )
    high_water: int = _number(65536, 1, 2**30, "Unsent bytes that make a client catch up alone.")
    compression: bool = _key(False, "Of WebSocket frames, once for all who read a room.")


@dataclass(frozen=True, slots=True)
class Rooms:
    """How much rooms remember."""

    max_rooms: int = _number(100000, 1, 10**8, "Rooms held in memory.")
    events: int = _number(1000, 1, 10**7, "Events a room keeps.")
    bytes: int = _number(4194304, 1, 2**34, "Bytes of events a room keeps.")
    age: float = _number(86400.0, 0.001, 10**9, "Seconds a room keeps an event.")
    idle: float = _number(3600.0, 0.001, 10**9, "Seconds after which an unused room is forgotten.")
    grace: float = _number(2.0, 0, 3600, "Seconds that a reload has before others see it leave.")


@dataclass(frozen=True, slots=True)
class History:
    """What is kept of rooms, and what a model is told of a conversation so far."""

    path: str = _key("", "A SQLite file in which rooms outlive a restart; without it they do not.")
    messages: int = _number(100, 1, 100, "Its last messages, at most 100.")


@dataclass(frozen=True, slots=True)
class Limits:
    """What one request may carry; more is refused, never cut."""

    body_bytes: int = _number(8388608, 1, 2**30, "Bytes of the body.")
    prompt_chars: int = _number(200000, 1, 2**30, "Characters of prompt or messages together.")
    messages: int = _number(1000, 1, 10**6, "Messages.")
    frame_bytes: int = _number(
        262144, 1, 2**30, "Bytes of a WebSocket frame; more closes with 1009."
    )
    echo_bytes: int = _number(33554432, 1, 2**30, "The same for /echo.")
    streams_per_user: int = _number(5, 1, 10**6, "Channel streams that a user may have open.")


@dataclass(frozen=True, slots=True)
class Redis:
    """The bridge to other instances; without a url there is none."""

    url: str = _text(
        "", _REDIS, "redis://, rediss://, unix://, redis+sentinel:// or redis+cluster://."
    )
    prefix: str = _text("rivulet:", _SECRET, "Of all keys and channels of ours.")
    lease: float = _number(10.0, 0.1, 3600, "Seconds of silence after which an instance is lost.")


@dataclass(frozen=True, slots=True)
class Config:
    """Everything that can be configured. Its repr shows no API key."""

    server: Server = Server()
    model: Model = Model()
    upstreams: tuple[Upstream, ...] = ()
    generation: Generation = Generation()
    demo: Demo = Demo()
    delivery: Delivery = Delivery()
    rooms: Rooms = Rooms()
    history: History = History()
    redis: Redis = Redis()
    limits: Limits = Limits()


class ConfigError(ValueError):
    """All that is wrong with a configuration, a line each: key, reason, and for an unknown key the
    nearest known one. The value at fault is not repeated: it could be a secret."""

    def __init__(self, problems: Iterable[str]) -> None:
        self.problems = tuple(problems)
        super().__init__("\n".join(self.problems))


# Both names of each key, server.port and RIVULET_SERVER__PORT, with section, key and type.
_NAMES: dict[str, tuple[str, str, Any]] = {
    name: (section, key, kind)
    for section, table in get_type_hints(Config).items()
    if is_dataclass(table)
    for key, kind in get_type_hints(table).items()
    for name in (f"{section}.{key}", f"RIVULET_{section}__{key}".upper())
}
_NAMES["RIVULET_UPSTREAMS"] = ("upstreams", "", tuple)
# What Kubernetes sets in every pod beside a service called `rivulet` or `rivulet-redis`.
_KUBERNETES = re.compile(r"RIVULET_(?!\w*__)(\w+_)?(SERVICE_(HOST|PORT)|PORT_\d|PORT=\w+://)")


def is_demo(model: str) -> bool:
    """Whether `model` is a name of the embedded demo model."""
    return model == "demo" or model.startswith("demo:")


def load(
    path: str | None, environ: Mapping[str, str], overrides: Mapping[str, object] | None = None
) -> Config:
    """The configuration from all layers; where a key is set twice, the later layer counts.

    path: a TOML file, which must exist; None: config.toml beside app.py, where there is one.
    overrides: the command line, by dotted key (`server.port`); None stands for "not given".
    Raises ConfigError and nothing else.
    """
    problems: dict[str, str] = {}  # path -> reason
    labels: dict[str, str] = {}  # path -> what the key is called where it was set
    draft = _file(path, problems)
    later: dict[str, object] = {
        name: text
        for name, text in environ.items()
        if name.startswith("RIVULET_") and not _KUBERNETES.match(f"{name}={text}")
    }
    later |= {name: value for name, value in (overrides or {}).items() if value is not None}
    for name, value in later.items():
        if name not in _NAMES:
            problems[_quoted(name)] = _unknown(name, _NAMES)
            continue
        section, key, kind = _NAMES[name]
        if isinstance(value, str) and kind is not str:
            with suppress(ValueError, RecursionError):  # it stays a text, and is refused as one
                value = json.loads(value)
        if not key:
            draft[section] = value
            labels[section] = name
        elif isinstance(table := draft.setdefault(section, {}), dict):  # else refused below
            table[key] = value
            labels[f"{section}.{key}"] = name
    model, fallback = draft.setdefault("model", {}), environ.get("OPENAI_API_KEY")
    if fallback and isinstance(model, dict) and model.get("api_key", "") == "":
        model["api_key"] = fallback
        labels["model.api_key"] = "OPENAI_API_KEY"

    config: Config = _table(Config, draft, "", problems)
    if not any(path.startswith(("model", "upstreams")) for path in problems):
        problems |= _upstreams(config)
    if not any(path.startswith(("server", "history", "redis")) for path in problems):
        problems |= _instances(config)
    if problems:
        lines = []
        for path, reason in problems.items():
            whole, bracket, index = path.partition("[")  # RIVULET_UPSTREAMS is set as a whole
            lines.append(f"{labels.get(whole, whole)}{bracket}{index}: {reason}")
        raise ConfigError(lines)
    return config


def _file(path: str | None, problems: dict[str, str]) -> dict[str, Any]:
    source = DEFAULT_PATH if path is None else Path(path)
    try:
        return tomllib.loads(source.read_text("utf-8"))
    except OSError as error:
        if path is not None or not isinstance(error, FileNotFoundError):
            problems[str(source)] = f"cannot be read: {error.strerror}"
    except (ValueError, RecursionError) as error:
        problems[str(source)] = f"is not TOML: {error}"
    return {}


def _table(kind: Any, values: dict[str, Any], path: str, problems: dict[str, str]) -> Any:
    """An instance of the dataclass `kind`, not to be used where `problems` grew."""
    hints, prefix = get_type_hints(kind), path and f"{path}."
    for key in values:
        if key not in hints:
            problems[prefix + _quoted(key)] = _unknown(prefix + key, [prefix + k for k in hints])
    good: dict[str, Any] = {}
    for f in fields(kind):
        if f.name in values:
            value, rules = values[f.name], f.metadata
            good[f.name] = _value(hints[f.name], value, prefix + f.name, rules, problems)
        elif f.default is MISSING:
            good[f.name] = None
            problems[prefix + f.name] = "is missing"
    return kind(**good)


def _value(
    kind: Any, value: Any, path: str, rules: Mapping[str, Any], problems: dict[str, str]
) -> Any:
    """`value` as the type `kind`, or None where `problems` grew."""
    if is_dataclass(kind):
        if isinstance(value, dict):
            return _table(kind, value, path, problems)
        reason = "must be a table"
    elif get_origin(kind) is tuple:
        if isinstance(value, list):
            item, rows = get_args(kind)[0], enumerate(value)
            return tuple(_value(item, v, f"{path}[{n}]", rules, problems) for n, v in rows)
        reason = "must be a list"
    else:
        reason = _fault(kind, value, rules)
        if not reason:
            return kind(value)
    problems[path] = reason
    return None


def _fault(kind: Any, value: Any, rules: Mapping[str, Any]) -> str:
    """What is wrong with one value; "" where nothing is."""
    # A bool is an int to Python, not here; an int is a float here.
    accepted: Any = (int, float) if kind is float else kind
    if not isinstance(value, accepted) or isinstance(value, bool) is not (kind is bool):
        words = {bool: "true or false", int: "a whole number", float: "a number", str: "a string"}
        return f"must be {words[kind]}"
    if "min" in rules and not rules["min"] <= value <= rules["max"]:
        return f"must be between {rules['min']} and {rules['max']}"
    if "choices" in rules and value not in rules["choices"]:
        return f"must be {' or '.join(map(json.dumps, rules['choices']))}"
    if kind is str and not value.isprintable():  # half a surrogate pair is not printable either
        return "must have no control characters"
    if "form" in rules and not re.fullmatch(rules["form"][0], value):
        return str(rules["form"][1])
    return ""


def _upstreams(config: Config) -> dict[str, str]:
    """What is wrong between one model and another."""
    model, upstreams = config.model, config.upstreams
    known = {model.name}.union(*(upstream.models for upstream in upstreams))
    demo = (not model.base_url and is_demo(model.name)) or any(not u.base_url for u in upstreams)
    problems: dict[str, str] = {}
    names: set[str] = set()
    models: set[str] = set()
    for number, upstream in enumerate(upstreams):
        path = f"upstreams[{number}]"
        if upstream.name in names:
            problems[f"{path}.name"] = "is the name of another upstream already"
        if not upstream.base_url and not (upstream.models and all(map(is_demo, upstream.models))):
            problems[f"{path}.base_url"] = "may be empty only where all its models are demo names"
        for n, name in enumerate(upstream.models):
            if name in models:
                problems[f"{path}.models[{n}]"] = "is listed already"
            models.add(name)
        for n, name in enumerate(upstream.fallbacks):
            if name not in known and not (demo and is_demo(name)):
                problems[f"{path}.fallbacks[{n}]"] = _unknown(name, sorted(known), "model")
        names.add(upstream.name)
    return problems


def _instances(config: Config) -> dict[str, str]:
    """What is wrong between Redis and what there is with it only, or without it only."""
    if config.history.path and config.redis.url:
        return {"history.path": "must be empty where redis.url is set: Redis keeps the rooms then"}
    if config.server.workers > 1 and not config.redis.url:
        return {"server.workers": "more than one needs redis.url, which joins them"}
    return {}


def _unknown(name: str, known: Iterable[str], what: str = "key") -> str:
    nearest = difflib.get_close_matches(name, list(known), 1, 0.0)[0]
    return f"unknown {what}; the nearest known one is {nearest}"


def _quoted(key: str) -> str:
    """`key` as TOML writes it: a line break in one begins no new line of the message."""
    return key if re.fullmatch(r"[A-Za-z0-9_-]+", key) else json.dumps(key)
