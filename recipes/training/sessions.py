"""The starts of a run: when, from which step, on what, by which command and which versions. No secrets."""

import datetime
import json
import os
import platform
import re
import shlex
import socket
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from ...bridge.mcore import cpu
from .secrets import without_secret

SESSIONS = "sessions.jsonl"
VERSIONS = ("gpt-oss-vision", "megatron-bridge", "megatron-core", "torch", "transformers", "transformer-engine")


def session(first_step: int, ranks: int) -> dict[str, Any]:
    """This process as a line of ``sessions.jsonl``."""
    return {
        "started": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "first_step": first_step,
        "ranks": ranks,
        "device": device(),
        "host": socket.gethostname(),
        "command": command(sys.argv),
        "revision": revisions(),
        "versions": versions(),
    }


def add_session(folder: Path, first_step: int, ranks: int) -> None:
    """Append this process to ``sessions.jsonl``."""
    with (folder / SESSIONS).open("a") as file:
        file.write(json.dumps(session(first_step, ranks)) + "\n")


def read_sessions(folder: Path) -> list[dict[str, Any]]:
    """All starts, in their order."""
    file = folder / SESSIONS
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def command(arguments: list[str]) -> str:
    """A command line as it is typed, values of secrets hidden."""
    shown = [Path(arguments[0]).name]
    for argument in arguments[1:]:
        key, equals, value = argument.partition("=")
        shown.append(f"{key}={without_secret(key, value)}" if equals else without_secret("", argument))
    return shlex.join(shown)


def device() -> str:
    """The GPU of this rank, or the processor."""
    if cpu.cuda_is_real():
        return torch.cuda.get_device_name()
    cpuinfo = Path("/proc/cpuinfo")
    names = re.findall(r"^model name\s*: (.+)$", cpuinfo.read_text(), re.MULTILINE) if cpuinfo.exists() else []
    return f"CPU, {names[0] if names else platform.machine()}, {os.cpu_count()} cores"


def versions() -> dict[str, str]:
    """Python and the packages that are installed of `VERSIONS`."""
    found = {"python": platform.python_version()}
    for name in VERSIONS:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    if torch.version.cuda and cpu.cuda_is_real():
        found["CUDA"] = torch.version.cuda
    return found


def revisions() -> dict[str, str]:
    """Git revisions of the working folder and of this package, where these are working trees."""
    package, found = Path(__file__).parents[2], {}
    if (package / ".git").exists() and (said := _revision(package)):
        found["package"] = said
    if (said := _revision(Path.cwd())) and said != found.get("package"):
        found["working folder"] = said
    return found


def _revision(folder: Path) -> str | None:
    """The commit that is checked out, and whether files differ from it; None without git or outside a working tree."""
    try:
        commit = _git(folder, "rev-parse", "HEAD")
        changed = _git(folder, "status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.SubprocessError):
        return None
    return f"{commit[:12]}{' with changes' if changed else ''}"


def _git(folder: Path, *arguments: str) -> str:
    done = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=True, timeout=5)
    return done.stdout.strip()
