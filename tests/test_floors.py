"""The floors of the house: what a module may import. The table is in streaming/__init__.py."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import streaming

ROOT = Path(__file__).parent.parent
PURE = ("events", "markup", "dialects", "log", "encoders")
OUTSIDE = {"asyncio", "socket", "threading", "aiohttp", "httpx2", "openai"}


def imported(source: str) -> set[str]:
    """Every module that the source imports, anywhere in it, by its full name. What comes `from` a
    package may be a module too, so both readings are given.
    """
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, "imports are absolute here"
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


@cache
def modules(package: str) -> dict[str, set[str]]:
    """The modules of a package with what each imports."""
    files = (ROOT / package).rglob("*.py")
    return {f.stem: imported(f.read_text()) for f in files if f.name != "__init__.py"}


def below(names: set[str]) -> set[str]:
    """Those of `names` that are modules of streaming/, without the package's name."""
    return {name.removeprefix("streaming.") for name in names} & set(modules("streaming"))


def floors() -> dict[str, int]:
    """The table: module -> floor."""
    assert streaming.__doc__ is not None
    table: dict[str, int] = {}
    for line in re.findall(r"^ +([0-9]+ .+)$", streaming.__doc__, re.MULTILINE):
        floor, *names = line.split()
        assert not table.keys() & names, "a module stands on one floor"
        table |= dict.fromkeys(names, int(floor))
    return table


def test_the_table_names_every_module() -> None:
    """No module is without a floor, and no floor names a module that is not there."""
    assert sorted(floors()) == sorted(modules("streaming"))


def test_a_module_imports_only_from_lower_floors() -> None:
    """So there is no circle either."""
    table = floors()
    upward = [
        f"{name} ({table[name]}) imports {other} ({table[other]})"
        for name, names in modules("streaming").items()
        for other in below(names)
        if table[other] >= table[name]
    ]
    assert upward == []


def test_what_is_pure_reaches_no_event_loop_and_no_socket() -> None:
    """Events, markup, logs, dialects and encoders, and whatever they import, know no asyncio."""
    graph = modules("streaming")
    for name in PURE:
        reached, ahead = {name}, [name]
        while ahead:
            new = below(graph[ahead.pop()]) - reached
            reached |= new
            ahead += new
        packages = {other.partition(".")[0] for each in reached for other in graph[each]}
        assert not packages & OUTSIDE, name


def test_streaming_knows_nothing_of_routes() -> None:
    """Streaming imports neither handlers nor the application, handlers not the application."""
    for package, unknown in (("streaming", {"handlers", "app"}), ("handlers", {"app"})):
        for name, names in modules(package).items():
            packages = {other.partition(".")[0] for other in names}
            assert not packages & {*unknown, "tests", "bench"}, f"{package}/{name}.py"


def test_every_form_of_import_is_seen() -> None:
    """The checks above would see each of these."""
    source = (
        "import asyncio.tasks\nimport a.b as c\nfrom streaming import config as other\n"
        "from streaming.log import Log\ndef f():\n    from streaming import rooms\n"
        "if TYPE_CHECKING:\n    import handlers.chat\n"
    )
    assert imported(source) >= {"asyncio.tasks", "a.b", "streaming.config", "handlers.chat"}
    assert below(imported(source)) == {"config", "log", "rooms"}
