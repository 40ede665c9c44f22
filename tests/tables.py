"""The tables of docs/operating.md, made from the code: `python -m tests.tables` writes them anew.

Each stands between `<!-- NAME -->` and `<!-- end -->`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import MISSING, fields
from typing import Any, get_type_hints

from handlers.metrics import ROWS
from streaming.config import Config, Upstream
from tests.processes import ROOT

PAGE = ROOT / "docs" / "operating.md"


def metrics() -> Iterator[str]:
    """All of ours."""
    yield "| metric | type | labels | |\n|---|---|---|---|"
    for row in ROWS:
        labels = ", ".join(f"`{label}`" for label in row.labels)
        yield f"| `{row.name}` | {row.kind} | {labels} | {row.help} |"


def configuration() -> Iterator[str]:
    """Every key of every section."""
    for section, kind in get_type_hints(Config).items():
        listed = section == "upstreams"
        table = Upstream if listed else kind
        yield f"\n### `{'[[upstreams]]' if listed else f'[{section}]'}`\n\n{table.__doc__}\n"
        yield "| key | default | values | |\n|---|---|---|---|"
        for field in fields(table):
            default = "" if field.default is MISSING else f"`{_toml(field.default)}`"
            help = field.metadata["help"]
            yield f"| `{field.name}` | {default} | {_values(field.metadata)} | {help} |"


def _toml(value: Any) -> str:
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:_}" if value >= 10**5 else str(value)
    return json.dumps(value)  # strings, numbers, booleans and lists are spelled alike


def _values(rules: Any) -> str:
    if "min" in rules:
        return f"{_toml(rules['min'])} to {_toml(rules['max'])}"
    return ", ".join(f"`{_toml(choice)}`" for choice in rules.get("choices", ()))


TABLES = {"metrics": metrics, "configuration": configuration}


def rewritten(text: str) -> str:
    """The page with its tables as the code has them now."""
    for name, rows in TABLES.items():
        before, begin, rest = text.partition(f"<!-- {name} -->\n")
        _, end, after = rest.partition("<!-- end -->")
        text = before + begin + "\n".join(rows()) + f"\n{end}{after}"
    return text


if __name__ == "__main__":
    PAGE.write_text(rewritten(PAGE.read_text()))
