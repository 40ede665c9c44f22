"""docs/operating.md says what the code says."""

from __future__ import annotations

import re

from tests.processes import ROOT
from tests.tables import PAGE, rewritten


def test_its_tables_are_those_of_the_code() -> None:
    """Every metric, every key; `make docs` writes them."""
    assert PAGE.read_text() == rewritten(PAGE.read_text())
    assert "\tpython -m tests.tables" in (ROOT / "Makefile").read_text().replace("$(BIN)/", "")


def test_it_names_what_is_logged() -> None:
    """Every event that the server logs, as it is written in the code."""
    code = [ROOT / "app.py", *ROOT.glob("handlers/*.py"), *ROOT.glob("streaming/*.py")]
    called = r'(?:logger|access)\.(?:info|warning|error|exception)\(\s*"([^"]+)"'
    code.remove(ROOT / "streaming" / "publisher.py")  # that one runs in other processes
    events = {event for file in code for event in re.findall(called, file.read_text())}
    assert len(events) > 10
    assert not {event for event in events if event not in PAGE.read_text()}


def test_it_names_every_reason_not_to_be_ready() -> None:
    """What `/ready` can say."""
    said = re.findall(r'needs\["(\w+)"\]', (ROOT / "app.py").read_text())
    assert said and all(f"| `{reason}` |" in PAGE.read_text() for reason in said)
