"""A job of SLURM: submitted, followed until it ends, asked for its state, cancelled. By SLURM's own commands."""

import json
import re
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from ...errors import UserError

JOB = "job.json"
SECONDS_BETWEEN_POLLS = 2.0

ENDED = (
    *("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED", "OUT_OF_MEMORY", "BOOT_FAIL"),
    *("DEADLINE", "REVOKED"),
)
"""States of a job that has ended; some stand for a moment before the job is requeued."""


@dataclass(frozen=True, slots=True)
class State:
    """A job as SLURM knows it.

    Attributes:
        name: SLURM's name of the state, such as ``RUNNING``.
        code: exit code of the batch script; 128 + N where signal N ended it.
        reason: why it waits or has ended.
        restarts: how often it was requeued.
    """

    name: str
    code: int = 0
    reason: str = ""
    restarts: int = 0

    @property
    def is_over(self) -> bool:
        """Whether it has ended, unless it is requeued."""
        return self.name in ENDED

    @property
    def exit_code(self) -> int:
        """For the command that waits: 0 for a job that was completed, else never 0."""
        return 0 if self.name == "COMPLETED" else self.code or 1


def submit(script: Path) -> int:
    """Submit a batch script; return the number of the job.

    Raises:
        UserError: there is no SLURM here, or it refuses the script.
    """
    if shutil.which("sbatch") is None:
        raise UserError(f"sbatch is not on this machine: run this where jobs are submitted, or submit {script} there")
    done = subprocess.run(["sbatch", "--parsable", script], capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"SLURM refuses {script}: {_last_line(done.stderr)}")
    job = int(done.stdout.split(";")[0])
    (script.parent / JOB).write_text(json.dumps({"job": job, "submitted": time.time()}) + "\n")
    return job


def job_of(run: Path) -> int:
    """The number of the newest job of a run.

    Raises:
        UserError: it has none.
    """
    file = run / "launch" / JOB
    if not file.is_file():
        raise UserError(
            f"{run} has no job of SLURM: name the folder of a run that `launch --executor slurm` has started"
        )
    return int(json.loads(file.read_text())["job"])


def state(job: int) -> State | None:
    """What the controller knows of a job, or else the accounting; None where neither does."""
    shown = subprocess.run(["scontrol", "show", "job", "--oneliner", str(job)], capture_output=True, text=True)
    if shown.returncode == 0:
        lines = sorted((line for line in shown.stdout.splitlines() if line.strip()), key=_array_task)
        states = [_state(line) for line in lines]
        return next((each for each in states if not each.is_over), states[-1])
    command = ["sacct", "--noheader", "--parsable2", "--allocations", "--format=State,ExitCode", "--jobs", str(job)]
    if shutil.which("sacct") is None:
        return None
    kept = subprocess.run(command, capture_output=True, text=True)
    if kept.returncode or not kept.stdout.strip():
        return None
    name, code = kept.stdout.splitlines()[-1].split("|")
    return State(name.split()[0], _code(code))


def _array_task(line: str) -> int:
    """The number of a job in its array; 0 for other jobs."""
    found = re.search(r"ArrayTaskId=(\d+)", line)
    return int(found[1]) if found else 0


def _state(line: str) -> State:
    fields = dict(re.findall(r"(JobState|ExitCode|Reason|Restarts)=(\S+)", line))
    reason = fields.get("Reason", "None")
    code, restarts = _code(fields["ExitCode"]), int(fields["Restarts"])
    return State(fields["JobState"], code, "" if reason == "None" else reason, restarts)


def refuse_second_job(run: Path) -> None:
    """Refuse a job for a run that has one in the queue.

    Raises:
        UserError: it has.
    """
    if not (run / "launch" / JOB).is_file():
        return
    job = job_of(run)
    found = state(job) if shutil.which("scontrol") else None
    if found is not None and not found.is_over:
        raise UserError(f"{run} has job {job}, which is {found.name}: follow it with `logs`, or end it with `cancel`")


def cancel(job: int) -> None:
    """Cancel a job.

    Raises:
        UserError: SLURM refuses it.
    """
    done = subprocess.run(["scancel", str(job)], capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"SLURM does not cancel job {job}: {_last_line(done.stderr)}")


def output_of(run: Path, job: int) -> Path:
    """The file with the output of a job."""
    return run / "launch" / f"job-{job}.txt"


def follow(run: Path, job: int) -> State:
    """Print the output of a job as it is written, until the job is over; return its last state.

    Raises:
        UserError: SLURM does not know the job any more.
    """
    file, position, waiting, was_over = output_of(run, job), 0, "", False
    while True:
        found = state(job)
        position = _print_from(file, position)
        if found is None:
            raise UserError(f"SLURM does not know job {job} any more; its output is {file}")
        if found.is_over and was_over:
            _print_from(file, position)
            return found
        if found.name == "PENDING" and waiting != found.reason:
            print(f"Job {job} waits: {found.reason or 'no reason given'}", flush=True)
        was_over = found.is_over
        waiting = found.reason if found.name == "PENDING" else ""
        time.sleep(SECONDS_BETWEEN_POLLS)


def _print_from(file: Path, position: int) -> int:
    if not file.exists():
        return position
    with file.open("rb") as opened:
        opened.seek(position)
        shutil.copyfileobj(opened, sys.stdout.buffer)
        sys.stdout.flush()
        return opened.tell()


def _code(text: str) -> int:
    """An exit code as SLURM writes it: ``CODE:SIGNAL``."""
    code, _, signal = text.partition(":")
    return int(code) or (128 + int(signal) if int(signal or 0) else 0)


def _last_line(text: str) -> str:
    return ([line for line in text.splitlines() if line.strip()] or ["no message"])[-1]
