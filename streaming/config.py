"""Configuration: every key with its type, default, range and one line of why, said once, here.

    defaults  <  config.toml  <  RIVULET_SECTION__KEY  <  command line

`config.toml` shows the same to people; a test holds the two equal.
"""

from __future__ import annotations

import ipaddress
import json
import re
import tomllib
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import MISSING, dataclass, is_dataclass
from pathlib import Path
from typing import Any, get_type_hints

from streaming.grants import Grants
from streaming.schema import (
    API_KEY,
    JWT_SECRET,
    NAME,
    ORIGIN,
    REDIS,
    SECRET,
    URL,
    USER,
    Network,
    network,
    number,
    quoted,
    setting,
    table,
    text,
    unknown,
)
from streaming.schema import ConfigError as ConfigError  # what `load` raises

DEFAULT_PATH = Path(__file__).resolve().parent.parent / "config.toml"  # beside app.py


@dataclass(frozen=True, slots=True)
class Server:
    """The process and its port."""

    host: str = text("127.0.0.1", NAME, "Address to listen on; 0.0.0.0 is every interface.")
    port: int = number(8080, 0, 65535, "With 0 the system picks a port, and the log says which.")
    workers: int = number(1, 1, 1024, "Processes on the port; more than one are joined by Redis.")
    loop: str = setting(
        "asyncio", 'Event loop: "asyncio" or "uvloop".', choices=("asyncio", "uvloop")
    )
    drain: float = number(10.0, 0, 3600, "Seconds after SIGTERM in which answers may finish.")
    access_log: bool = setting(True, "One JSON line on stderr for each request.")
    header_timeout: float = number(15.0, 0.1, 3600, "Seconds in which a request's head must come.")
    body_timeout: float = number(60.0, 0.1, 3600, "Seconds in which its body must come.")
    trusted_proxies: tuple[Network, ...] = setting(
        (), "Addresses or networks whose X-Forwarded-For counts.", read=network
    )


@dataclass(frozen=True, slots=True)
class Key:
    """An API key, and for whom it speaks."""

    key: str = text(MISSING, API_KEY, "As it is, or sha256: and its digest.")
    user: str = text(MISSING, USER, "Whose it is.")
    service: bool = setting(False, "Whether it may also moderate, and tell users of events.")
    grants: Grants | None = setting(  # noqa: RUF009 - it is a field, as all others
        None, "Room patterns, or a table of pattern and actions.", read=Grants.read
    )


@dataclass(frozen=True, slots=True)
class Auth:
    """Who may come in."""

    mode: str = setting(
        "open", '"open": whoever reaches it, as whoever; or "token".', choices=("open", "token")
    )
    open_anywhere: bool = setting(False, "Open mode on other addresses than loopback too.")
    keys: tuple[Key, ...] = setting((), 'API keys: [{key = "...", user = "ann", service = false}].')
    keys_file: str = setting("", "A TOML or JSON file with more `keys`; read anew when it changes.")
    jwt_secret: str = text("", JWT_SECRET, "Of HS tokens; 32 random characters or more are right.")
    jwt_key: str = setting("", "A file: the PEM public key or JWKS of RS and ES tokens; read anew.")
    jwt_audience: str = setting(
        "", "The `aud` of tokens; where empty, one with an `aud` is refused."
    )
    jwt_issuer: str = setting("", "The `iss` of tokens; where empty, any.")
    jwt_leeway: int = number(0, 0, 60, "Seconds that the clock of who issues them may be off.")


@dataclass(frozen=True, slots=True)
class Cors:
    """Pages of other origins that may use it, with credentials."""

    origins: tuple[str, ...] = text(
        ("http://localhost:3000",), ORIGIN, "As a browser's address bar shows them, without path."
    )


@dataclass(frozen=True, slots=True)
class Model:
    """The default upstream, asked for every model that no other upstream lists."""

    name: str = text("demo", NAME, 'Asked where a request names none; "demo" is embedded.')
    base_url: str = text("", URL, 'API up to its /v1; "" is the demo, or OpenAI for other names.')
    api_key: str = text("", SECRET, "Where empty, OPENAI_API_KEY from the environment.")


@dataclass(frozen=True, slots=True)
class Upstream:
    """Another upstream, as often as needed; in the environment RIVULET_UPSTREAMS, a JSON list."""

    name: str = text(MISSING, NAME, "Unique; what logs and errors call it.")
    base_url: str = text(MISSING, URL, 'As in [model]; "" only where all models are demo names.')
    api_key: str = text("", SECRET, "Its own; OPENAI_API_KEY is never sent here.")
    models: tuple[str, ...] = text((), NAME, "Asked here, and listed by no other upstream.")
    fallbacks: tuple[str, ...] = text((), NAME, "Models tried in order where this one fails.")


@dataclass(frozen=True, slots=True)
class Generation:
    """How one answer runs, is retried, and is kept. Times in seconds."""

    linger: float = number(60.0, 0, 86400, "An answer that nobody reads is cancelled after this.")
    retention: float = number(300.0, 0, 604800, "An answer can be resumed so long after its end.")
    retained_bytes: int = number(268435456, 0, 2**40, "Past it the oldest ended answers go early.")
    max_bytes: int = number(4194304, 1, 2**30, "A longer answer ends as failed: too_long.")
    flush_interval: float = number(0.02, 0, 1, "Tokens gather for it; the first never waits.")
    commit_after: float = number(10.0, 0, 3600, "OpenAI clients get a 200 by then, token or not.")
    retries: int = number(2, 0, 20, "Only before the first token: later they would repeat text.")
    backoff: float = number(
        0.5, 0, 600, "Before the first retry; doubles for each next, with jitter."
    )
    backoff_max: float = number(8.0, 0, 3600, "The longest wait before a retry.")
    connect_timeout: float = number(5.0, 0.001, 3600, "To reach the upstream.")
    first_token_timeout: float = number(60.0, 0.001, 86400, "From the request to its first token.")
    idle_timeout: float = number(60.0, 0.001, 86400, "Between two tokens.")
    total_timeout: float = number(600.0, 0.001, 604800, "For the whole answer.")
    single_flight: bool = setting(
        False, "A user's equal requests share the answer that is running."
    )
    max_running: int = number(10000, 1, 10**7, "Answers at once; one more is told 503, come back.")


@dataclass(frozen=True, slots=True)
class Demo:
    """Caps on the knobs of the embedded demo model, which any client may turn."""

    max_rate: float = number(1000.0, 0.001, 10**7, "Tokens per second.")
    max_tokens: int = number(20000, 1, 10**7, "Tokens in one answer.")


@dataclass(frozen=True, slots=True)
class Delivery:
    """How bytes reach clients."""

    heartbeat: float = number(15.0, 0.001, 3600, "Seconds of silence; proxies often cut at 60.")
    write_timeout: float = number(20.0, 0.001, 3600, "Seconds a client may stall before it is cut.")
    high_water: int = number(65536, 1, 2**30, "Unsent bytes that make a client catch up alone.")
    compression: bool = setting(False, "Of WebSocket frames, once for all who read a room.")


@dataclass(frozen=True, slots=True)
class Rooms:
    """How much rooms remember."""

    max_rooms: int = number(100000, 1, 10**8, "Rooms held in memory.")
    events: int = number(1000, 1, 10**7, "Events a room keeps.")
    bytes: int = number(4194304, 1, 2**34, "Bytes of events a room keeps.")
    age: float = number(86400.0, 0.001, 10**9, "Seconds a room keeps an event.")
    idle: float = number(3600.0, 0.001, 10**9, "Seconds after which an unused room is forgotten.")
    grace: float = number(2.0, 0, 3600, "Seconds that a reload has before others see it leave.")


@dataclass(frozen=True, slots=True)
class History:
    """What is kept of rooms, and what a model is told of a conversation so far."""

    path: str = setting(
        "", "A SQLite file in which rooms outlive a restart; without it they do not."
    )
    messages: int = number(100, 1, 100, "Its last messages, at most 100.")


@dataclass(frozen=True, slots=True)
class Limits:
    """What a request may carry, a user and this process may have; more is refused, never cut."""

    body_bytes: int = number(8388608, 1, 2**30, "Bytes of the body.")
    prompt_chars: int = number(200000, 1, 2**30, "Characters of prompt or messages together.")
    messages: int = number(1000, 1, 10**6, "Messages.")
    frame_bytes: int = number(
        262144, 1, 2**30, "Bytes of a WebSocket frame; more closes with 1009."
    )
    echo_bytes: int = number(33554432, 1, 2**30, "The same for /echo.")
    streams_per_user: int = number(5, 1, 10**6, "Channel streams that a user may have open.")
    connections: int = number(50000, 0, 10**7, "Open at once; here and below 0 is no limit.")
    connections_per_ip: int = number(
        0, 0, 10**7, "Streams and WebSockets from one address, or an IPv6 /64."
    )
    connections_per_user: int = number(
        0, 0, 10**7, "The same of one user, on all instances together."
    )
    running_per_user: int = number(0, 0, 10**7, "Answers at once, on all instances together.")
    requests_per_minute: int = number(
        0, 0, 10**7, "Of one user, with WebSocket frames; not in open mode."
    )
    generations_per_minute: int = number(60, 0, 10**7, "Of one user, not in open mode.")


@dataclass(frozen=True, slots=True)
class Redis:
    """The bridge to other instances; without a url there is none."""

    url: str = text(
        "", REDIS, "redis://, rediss://, unix://, redis+sentinel:// or redis+cluster://."
    )
    prefix: str = text("rivulet:", SECRET, "Of all keys and channels of ours.")
    lease: float = number(10.0, 0.1, 3600, "Seconds of silence after which an instance is lost.")


@dataclass(frozen=True, slots=True)
class Config:
    """Everything that can be configured. Its repr shows no secret."""

    server: Server = Server()
    auth: Auth = Auth()
    cors: Cors = Cors()
    model: Model = Model()
    upstreams: tuple[Upstream, ...] = ()
    generation: Generation = Generation()
    demo: Demo = Demo()
    delivery: Delivery = Delivery()
    rooms: Rooms = Rooms()
    history: History = History()
    redis: Redis = Redis()
    limits: Limits = Limits()


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


def is_loopback(host: str) -> bool:
    """Whether this address, or `localhost`, is reached from this machine only."""
    with suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return host == "localhost"


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
        name: value
        for name, value in environ.items()
        if name.startswith("RIVULET_") and not _KUBERNETES.match(f"{name}={value}")
    }
    later |= {name: value for name, value in (overrides or {}).items() if value is not None}
    for name, value in later.items():
        if name not in _NAMES:
            problems[quoted(name)] = unknown(name, _NAMES)
            continue
        section, key, kind = _NAMES[name]
        if isinstance(value, str) and kind is not str:
            with suppress(ValueError, RecursionError):  # it stays a text, and is refused as one
                value = json.loads(value)
        if not key:
            draft[section] = value
            labels[section] = name
        elif isinstance(values := draft.setdefault(section, {}), dict):  # else refused below
            values[key] = value
            labels[f"{section}.{key}"] = name
    model, fallback = draft.setdefault("model", {}), environ.get("OPENAI_API_KEY")
    if fallback and isinstance(model, dict) and model.get("api_key", "") == "":
        model["api_key"] = fallback
        labels["model.api_key"] = "OPENAI_API_KEY"

    config: Config = table(Config, draft, "", problems)
    if not any(path.startswith(("model", "upstreams")) for path in problems):
        problems |= _upstreams(config)
    if not any(path.startswith(("server", "history", "redis")) for path in problems):
        problems |= _instances(config)
    if not any(path.startswith(("server", "auth")) for path in problems):
        problems |= _doors(config.server, config.auth)
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


def _upstreams(config: Config) -> dict[str, str]:
    """What is wrong between one model and another."""
    model, upstreams = config.model, config.upstreams
    known = {model.name}.union(*(upstream.models for upstream in upstreams))
    demo = (not model.base_url and is_demo(model.name)) or any(not u.base_url for u in upstreams)
    problems: dict[str, str] = {}
    names: set[str] = set()
    models: set[str] = set()
    for index, upstream in enumerate(upstreams):
        path = f"upstreams[{index}]"
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
                problems[f"{path}.fallbacks[{n}]"] = unknown(name, sorted(known), "model")
        names.add(upstream.name)
    return problems


def _instances(config: Config) -> dict[str, str]:
    """What is wrong between Redis and what there is with it only, or without it only."""
    if config.history.path and config.redis.url:
        return {"history.path": "must be empty where redis.url is set: Redis keeps the rooms then"}
    if config.server.workers > 1 and not config.redis.url:
        return {"server.workers": "more than one needs redis.url, which joins them"}
    return {}


def _doors(server: Server, auth: Auth) -> dict[str, str]:
    """Whether everybody could come in, or nobody."""
    if auth.mode == "open" and not (auth.open_anywhere or is_loopback(server.host)):
        reason = "must be loopback while auth.mode is open: whoever reaches it may do anything."
        return {"server.host": f'{reason} Set auth.mode = "token", or auth.open_anywhere = true'}
    if auth.mode == "token" and not (
        auth.keys or auth.keys_file or auth.jwt_secret or auth.jwt_key
    ):
        return {
            "auth.mode": "token needs keys, keys_file, jwt_secret or jwt_key: nobody could enter"
        }
    return {}
