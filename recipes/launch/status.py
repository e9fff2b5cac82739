"""What is known of a run, from its folder and from SLURM."""

import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from ...errors import UserError
from ..training import outcome
from ..training.metrics import METRICS, Metrics
from . import slurm


def lines(run: Path) -> Iterator[tuple[str, str]]:
    """Titles and values.

    Raises:
        UserError: the folder is not there.
    """
    if not run.is_dir():
        raise UserError(f"{run} is not there: name the folder of a run")
    with suppress(UserError):
        job = slurm.job_of(run)
        yield "job", f"{job}, {_described(slurm.state(job))}"
        yield "output", str(slurm.output_of(run, job))
    for folder in _stages(run):
        title = "step" if folder == run else f"step of {folder.name}"
        metrics = Metrics(folder)
        metrics.update()
        if losses := metrics.series("loss"):
            (step, loss), age = losses[-1], time.time() - (folder / METRICS).stat().st_mtime
            yield title, f"{step}, loss {loss:.4f}, {age:.0f} s ago"
        if steps := sorted(path.parent.name for path in folder.glob("checkpoints/iter_*/run_config.yaml")):
            yield "checkpoint", str(folder / "checkpoints" / steps[-1])
    files = sorted([*run.glob(outcome.FILE), *run.glob("launch/outcome-*.txt")], key=lambda file: file.stat().st_mtime)
    if files and (found := outcome.read(files[-1])):
        yield "outcome", ": ".join(part for part in found if part)


def _described(state: slurm.State | None) -> str:
    if state is None:
        return "which SLURM does not know any more"
    parts = [state.name, state.reason, f"requeued {state.restarts} times" if state.restarts else ""]
    if state.is_over and state.name != "COMPLETED":
        parts.append(f"exit code {state.code}")
    return ", ".join(part for part in parts if part)


def _stages(run: Path) -> list[Path]:
    inner = [file.parent for file in run.glob(f"*/{METRICS}")]
    return sorted(inner, key=lambda folder: (folder / METRICS).stat().st_mtime) or [run]
