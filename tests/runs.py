"""What a run has read, and what it has left in its folder."""

import contextlib
import json
import os
from pathlib import Path

import numpy as np
from forked import Command

from gpt_oss_vision.recipes.data.megatron import ChatDatasetProvider, DatasetBuildContext


def steps_of(run: Path) -> list[dict]:
    """The steps in the order in which they were written."""
    file = run / "metrics.jsonl"
    lines = file.read_text().splitlines() if file.exists() else []
    return [entry for entry in map(json.loads, lines) if "loss" in entry]


def numbers_of(run: Path) -> list[int]:
    """The numbers of the steps."""
    return [entry["step"] for entry in steps_of(run)]


def losses_of(run: Path) -> dict[int, float]:
    """The loss of each step, the last one where a step was computed twice."""
    return {entry["step"]: entry["loss"] for entry in steps_of(run)}


def wait_for_step(command: Command, run: Path, number: int) -> None:
    """Wait until a step is written, while the command runs."""
    command.wait_until(lambda: max(numbers_of(run), default=0) >= number)


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


def lengths_read(data: Path, processor: Path, samples: int, seed: int) -> np.ndarray:
    """The lengths of the first samples that are trained on, without padding."""
    provider = ChatDatasetProvider(path=str(data), processor_path=str(processor), seq_length=32, seed=seed)
    train, *_ = provider.build_datasets(DatasetBuildContext(train_samples=samples, valid_samples=0, test_samples=0))
    return np.array([len(train[number]["input_ids"]) for number in range(samples)])
