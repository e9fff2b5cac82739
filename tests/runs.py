"""What a run has left in its folder."""

import contextlib
import json
import os
from pathlib import Path


def steps_of(run: Path) -> list[dict]:
    """The steps in the order in which they were written."""
    file = run / "metrics.jsonl"
    lines = file.read_text().splitlines() if file.exists() else []
    return [entry for entry in map(json.loads, lines) if "loss" in entry]


def numbers_of(run: Path) -> list[int]:
    """The numbers of the steps."""
    return [entry["step"] for entry in steps_of(run)]


def process_of_rank(run: Path, rank: int) -> int:
    """The process whose output is the log of a rank."""
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if os.readlink(folder / "fd/1") == str(run / f"logs/rank-{rank}.txt"):
                return int(folder.name)
    raise AssertionError(f"no process of rank {rank}")


def processes_with(*words: str) -> list[int]:
    """The Python processes that have these words among their arguments."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            arguments = (folder / "cmdline").read_text().split("\0")
            if Path(arguments[0]).name.startswith("python") and {*words} <= {*arguments}:
                found.append(int(folder.name))
    return found
