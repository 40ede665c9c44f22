"""docs/load-testing.md: its recipes can be read by what reads them, and wrk's runs."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

from tests.processes import ROOT, Server

PAGE = (ROOT / "docs/load-testing.md").read_text()


def blocks(language: str) -> list[str]:
    """Its code in this language."""
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)


def test_its_programs_can_be_read(tmp_path: Path) -> None:
    """Python's by Python, k6's by node, as modules."""
    (program,) = blocks("python")
    compile(program, "locustfile.py", "exec")
    scripts = blocks("js")
    assert len(scripts) == 2
    for script in scripts:
        file = tmp_path / "script.mjs"
        file.write_text(script)
        done = subprocess.run(["node", "--check", str(file)], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


def test_wrk_reads_whole_answers(demo_server: Server, tmp_path: Path) -> None:
    """With the script and the options that are printed, but for how long and how many: every answer
    comes, and none faster than the model speaks.
    """
    (tmp_path / "stream.lua").write_text(blocks("lua")[0])
    (command,) = (line for line in "".join(blocks("sh")).splitlines() if line.startswith("wrk"))
    command = command.replace("-c200 -d20s", "-c4 -d5s").replace("8080", str(demo_server.port))
    done = subprocess.run(
        command.split(), cwd=tmp_path, capture_output=True, text=True, timeout=60, check=True
    )
    assert "Non-2xx" not in done.stdout
    assert "Socket errors" not in done.stdout
    (median,) = re.findall(r"50%\s+([\d.]+)s\b", done.stdout)
    assert float(median) >= 1.9
