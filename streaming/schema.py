"""Tables of typed keys: how a dataclass says its rules, and how a document is checked against them.

Every key has a type, a default unless it must be given, a help line, and the rules of its value.
"""

from __future__ import annotations

import difflib
import ipaddress
import json
import re
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import MISSING, field, fields, is_dataclass
from typing import Any, NamedTuple, TypeVar, get_args, get_origin, get_type_hints

T = TypeVar("T")

Network = ipaddress.IPv4Network | ipaddress.IPv6Network


class Form(NamedTuple):
    """What a text must match in full, the reason where it does not, and whether it is for no eye
    but the server's.
    """

    pattern: str
    reason: str
    secret: bool = False


NAME = Form(r"\S(.*\S)?", "must not be empty, or begin or end with a space")
SECRET = Form(r"[!-~]*", "must be printable ASCII without spaces", secret=True)
# User, query and fragment are refused: a secret in them would show in logs.
URL = Form(
    r"((?i:https?)://([\w.-]+|\[[0-9a-fA-F:.]+\])(:[0-9]{1,5})?(/[^\s?#]*)?)?",
    "must be an http:// or https:// URL without user, query and fragment",
)
REDIS = Form(
    r"((rediss?|unix|rediss?\+(sentinel|cluster))://[!-~]+)?",
    "must be a redis://, rediss://, unix://, redis+sentinel:// or redis+cluster:// URL",
    secret=True,
)
USER = Form(r"\S(.{0,126}\S)?", "must have 1 to 128 characters, none of them a space at the ends")
# A shorter one can be guessed from a single token, on somebody's own machine and at any speed.
JWT_SECRET = Form(
    r"([!-~]{16,})?", "must have 16 or more characters of ASCII without spaces", secret=True
)
# A digest with a typing error in it is not to become a key itself.
API_KEY = Form(
    r"sha256:[0-9a-fA-F]{64}|(?!sha256:)[!-~]+",
    "must be printable ASCII without spaces, or sha256: and 64 hexadecimal digits",
    secret=True,
)
ORIGIN = Form(
    r"[a-z][a-z0-9+.-]*://([a-z0-9._-]+|\[[0-9a-f:.]+\])(:[0-9]{1,5})?",
    "must be as browsers say it, https://example.com or http://localhost:3000; never *,"
    " because credentials are sent",
)


def network(value: object) -> Network:
    """An address or a network. Raises ValueError."""
    with suppress(ValueError):
        if isinstance(value, str):
            return ipaddress.ip_network(value, strict=False)
    raise ValueError("must be an address or a network, 10.0.0.1 or 10.0.0.0/8")


def setting(default: Any, help: str, **rules: Any) -> Any:
    """A field with its help line and its rules: choices, form, min and max, or `read`: from what is
    given to what the key holds, a ValueError says what is wrong.
    """
    shown = not ("form" in rules and rules["form"].secret)
    return field(default=default, repr=shown, metadata={"help": help, **rules})


def text(default: Any, form: Form, help: str) -> Any:
    """A field for a text, or for a list of them."""
    return setting(default, help, form=form)


def number(default: float, min: float, max: float, help: str) -> Any:
    """A field for a number. It always has both bounds, so neither infinity nor NaN passes."""
    return setting(default, help, min=min, max=max)


class ConfigError(ValueError):
    """All that is wrong with a configuration, a line each: key, reason, and for an unknown key the
    nearest known one. The value at fault is not repeated: it could be a secret."""

    def __init__(self, problems: Iterable[str]) -> None:
        self.problems = tuple(problems)
        super().__init__("\n".join(self.problems))


def checked(kind: type[T], value: object, path: str) -> T:
    """A table as the dataclass `kind`; path: what it is called. Raises ConfigError."""
    problems: dict[str, str] = {}
    found: T = _value(kind, value, path, {}, problems)
    if problems:
        raise ConfigError(f"{where}: {reason}" for where, reason in problems.items())
    return found


def table(kind: Any, values: dict[str, Any], path: str, problems: dict[str, str]) -> Any:
    """An instance of the dataclass `kind`, not to be used where `problems` grew."""
    hints, prefix = get_type_hints(kind), path and f"{path}."
    for key in values:
        if key not in hints:
            problems[prefix + quoted(key)] = unknown(prefix + key, [prefix + k for k in hints])
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
    if get_origin(kind) is tuple:
        if isinstance(value, list):
            item, rows = get_args(kind)[0], enumerate(value)
            return tuple(_value(item, v, f"{path}[{n}]", rules, problems) for n, v in rows)
        reason = "must be a list"
    elif "read" in rules:
        try:
            return rules["read"](value)
        except ValueError as error:
            reason = str(error)
    elif is_dataclass(kind):
        if isinstance(value, dict):
            return table(kind, value, path, problems)
        reason = "must be a table"
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
    if "form" in rules and not re.fullmatch(rules["form"].pattern, value):
        return str(rules["form"].reason)
    return ""


def unknown(name: str, known: Iterable[str], what: str = "key") -> str:
    """Why this name is refused."""
    nearest = difflib.get_close_matches(name, list(known), 1, 0.0)[0]
    return f"unknown {what}; the nearest known one is {nearest}"


def quoted(key: str) -> str:
    """`key` as TOML writes it: a line break in one begins no new line of the message."""
    return key if re.fullmatch(r"[A-Za-z0-9_-]+", key) else json.dumps(key)
