"""The Dockerfile without a container engine: what it says, and its steps done in directories."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePath

from tests.processes import ROOT

DOCKERFILE = (ROOT / "Dockerfile").read_text()
TRUSTED = "/tmp/trusted.pem"  # whom this machine's pip trusts, for the stage that has one
# A process of its own: it sees these files and no others, its own processes and no others, and is
# the first of those, as in a container.
_ENTER = """
mount --bind "$ROOT" "$ROOT"
mount -o "remount,bind,$MODE" "$ROOT"
mount -t proc proc "$ROOT/proc"
for volume in $VOLUMES; do mount -t tmpfs -o "uid=${USER%:*}" none "$ROOT$volume"; done
exec chroot --userspec="$USER" --groups= "$ROOT" env --ignore-environment --chdir="$DIR" "$@"
"""


def instructions(text: str = DOCKERFILE) -> Iterator[tuple[str, list[str], str]]:
    """Each instruction: its name, its `--flags`, and the rest of it."""
    text = re.sub(r"^\s*#.*\n", "", text, flags=re.MULTILINE).replace("\\\n", "")
    for line in filter(None, map(str.strip, text.splitlines())):
        name, _, rest = line.partition(" ")
        flags = re.match(r"(--\S+\s+)*", rest)
        assert flags is not None
        yield name, flags[0].split(), rest[flags.end() :].strip()


def in_context(path: PurePath) -> bool:
    """Whether .dockerignore lets this file in: the last line counts that matches it, or a directory
    that it is in.
    """
    taken = True
    for line in (ROOT / ".dockerignore").read_text().splitlines():
        pattern = line.removeprefix("!")
        if not line or line.startswith("#"):
            continue
        form = re.escape(pattern).replace(r"\*\*/", "(.*/)?").replace(r"\*", "[^/]*")
        if any(re.fullmatch(form, str(each)) for each in (path, *path.parents)):
            taken = line.startswith("!")
    return taken


def copy_context(source: str, to: Path) -> None:
    """What `COPY source to` takes: one file, or with "." all of the context."""
    for path in ROOT.rglob("*") if source == "." else [ROOT / source]:
        file = path.relative_to(ROOT)
        if path.is_file() and in_context(file):
            (to / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(path, to / file)


@dataclass(frozen=True)
class Image:
    """A stage so far: its files, and how a process in it starts."""

    root: Path
    env: Mapping[str, str] = field(default_factory=dict)
    user: str = "0:0"
    directory: str = "/"
    entrypoint: tuple[str, ...] = ()
    healthcheck: tuple[str, ...] = ()

    def process(
        self,
        command: tuple[str, ...],
        env: Mapping[str, str],
        *,
        writable: bool = False,
        volumes: str = "",
    ) -> tuple[list[str], dict[str, str]]:
        """The command, and its environment, that runs this one there. env: besides the image's.
        volumes: directories that can be written to where all else cannot.
        """
        variables = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", **self.env, **env}
        settings = {"ROOT": str(self.root), "USER": self.user, "DIR": self.directory}
        settings |= {"MODE": "rw" if writable else "ro", "VOLUMES": volumes}
        given = [f"{name}={value}" for name, value in variables.items()]
        enter = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "sh", "-ec", _ENTER, "-"]
        return [*enter, *given, *command], {"PATH": os.environ["PATH"], **settings}

    def megabytes(self) -> int:
        """The size of its files, but for those that Debian's slim images do without."""
        without = (
            "var/cache",
            "var/lib/apt",
            *(f"usr/share/{n}" for n in ("doc", "man", "locale")),
        )
        command = [
            "du",
            "--summarize",
            "--block-size=M",
            *(f"--exclude={path}" for path in without),
        ]
        done = subprocess.run([*command, str(self.root)], capture_output=True, check=True)
        return int(done.stdout.split(b"M")[0])

    def run(
        self, *command: str, env: Mapping[str, str] | None = None, writable: bool = False
    ) -> int:
        """Runs it to its end: its status."""
        argv, around = self.process(command, env or {}, writable=writable)
        return subprocess.run(argv, env=around, stdin=subprocess.DEVNULL, check=False).returncode


def base_of(directory: Path, suite: str) -> Image:
    """Debian as debootstrap makes it, from where this machine's apt has it."""
    listed = subprocess.run(
        ["apt-get", "indextargets", "--format", "$(REPO_URI)", f"Codename: {suite}"],
        capture_output=True,
        text=True,
        check=True,
    )
    root, mirror = directory / "debian", listed.stdout.split()[0]
    subprocess.run(["debootstrap", "--variant=minbase", suite, str(root), mirror], check=True)
    fetching = subprocess.run(["apt-config", "dump", "Acquire"], stdout=subprocess.PIPE, check=True)
    (root / "etc/apt/apt.conf.d/zz-as-here").write_bytes(fetching.stdout)
    if "PIP_CERT" in os.environ:
        shutil.copy(os.environ["PIP_CERT"], root / TRUSTED.strip("/"))
    return Image(root)


def build(base: Image, directory: Path) -> Image:
    """The last stage, with all instructions done. base: what the first FROM names."""
    # What `docker build` takes as arguments: proxies, and where pip finds packages.
    outside = {k: v for k, v in os.environ.items() if k.startswith("PIP_") or "proxy" in k.lower()}
    if "PIP_CERT" in outside:
        outside["PIP_CERT"] = TRUSTED
    stages: dict[str, Image] = {}
    alias = ""
    for name, flags, rest in instructions():
        match name:
            case "FROM":
                parent, _, alias = rest.partition(" AS ")
                before, root = stages.get(parent, base), directory / f"stage{len(stages)}"
                _copy(before.root, root)
                stages[alias] = replace(before, root=root)
            case "RUN":
                step = ("/bin/sh", "-c", rest)
                assert stages[alias].run(*step, env=outside, writable=True) == 0, rest
            case "COPY":
                taken, to = rest.split()
                there = stages[alias].root / to.strip("/")
                if flags:
                    _copy(stages[flags[0].removeprefix("--from=")].root / taken.strip("/"), there)
                else:
                    copy_context(taken, there)
            case _:
                stages[alias] = configured(stages[alias], name, rest)
    return stages[alias]


def _copy(source: Path, to: Path) -> None:
    subprocess.run(["cp", "--archive", str(source), str(to)], check=True)


def configured(image: Image, name: str, rest: str) -> Image:
    """The image after an instruction that changes none of its files."""
    match name:
        case "ENV":
            pairs = (pair.split("=", 1) for pair in shlex.split(rest))
            return replace(image, env={**image.env, **dict(pairs)})
        case "WORKDIR":
            return replace(image, directory=rest)
        case "USER":
            return replace(image, user=rest)
        case "ENTRYPOINT":
            return replace(image, entrypoint=tuple(json.loads(rest)))
        case "HEALTHCHECK":
            return replace(image, healthcheck=tuple(json.loads(rest.removeprefix("CMD "))))
    assert name == "EXPOSE", name
    return image


def as_started() -> Image:
    """How the image starts, without its files."""
    image = Image(Path("/nowhere"))
    for name, _, rest in instructions():
        if name not in ("FROM", "RUN", "COPY"):
            image = configured(image, name, rest)
    return image
