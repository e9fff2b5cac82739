"""A rehearsal of a job on this machine: the batch script is run as it is, and ended early in each way jobs are.

The ranks are real; SLURM is the stand-in of `stand_in`. The tiny recipe of the same task is trained, on two nodes with
a rank each. The losses have to be those of a run that nothing ends early.
"""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ...errors import UserError
from ..training.metrics import METRICS, Metrics
from . import stand_in
from .plan import Container, Plan, batch_script

STEPS = 20
SETTINGS = (
    *(f"train.train_iters={STEPS}", "train.global_batch_size=16", "train.micro_batch_size=4"),
    *("checkpoint.save_interval=3", "logger.log_interval=1", "validation.eval_iters=0"),
)
NODES, RANKS_PER_NODE = 2, 1
SECONDS = 1800.0
TOLERANCE = 1e-5


@dataclass(frozen=True, slots=True)
class Incident:
    """Something that ends a job early.

    Attributes:
        step: after which it happens.
        text: what happens, and what has to follow.
        happen: with the processes of the tasks, and that of the batch script.
    """

    step: int
    text: str
    happen: Callable[[Sequence[int], int], None]


def _kill_rank(tasks: Sequence[int], script: int) -> None:
    stand_in.signal_tree(tasks[-1], signal.SIGKILL)


def _send(number: signal.Signals) -> Callable[[Sequence[int], int], None]:
    """To all processes of all tasks, as SLURM does."""

    def send(tasks: Sequence[int], script: int) -> None:
        for task in tasks:
            stand_in.signal_tree(task, number)

    return send


def _lose_node(tasks: Sequence[int], script: int) -> None:
    stand_in.signal_tree(script, signal.SIGKILL)  # the tasks are its descendants


INCIDENTS = (
    Incident(4, "a task is killed: a restart in the allocation", _kill_rank),
    Incident(8, "SIGTERM: saved, requeued", _send(signal.SIGTERM)),
    Incident(12, "the signal before the time limit: saved, requeued", _send(signal.SIGUSR1)),
    Incident(16, "a node is lost with all processes: requeued by SLURM", _lose_node),
)


def rehearse(plan: Plan, recipe: str, folder: Path) -> Iterator[str]:
    """Run the plan twice, once with the incidents; yield what happens.

    Args:
        plan: of the job; its starter, retries and requeues are rehearsed.
        recipe: a tiny recipe, or several.
        folder: for both runs; made anew.

    Raises:
        UserError: the run does not come to its end, or has other losses.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    yield f"{recipe}, {NODES} nodes with {RANKS_PER_NODE} ranks, {plan.starter}; output in {folder}"
    unbroken = _planned(plan, recipe, folder / "unbroken")
    yield "without incidents:"
    yield from _Controller(unbroken).run(())
    broken = _planned(plan, recipe, folder / "broken")
    yield "with incidents:"
    yield from _Controller(broken).run(INCIDENTS)
    yield from _compared(losses(unbroken.run), losses(broken.run))


def _planned(plan: Plan, recipe: str, run: Path) -> Plan:
    return dataclasses.replace(
        plan,
        run=run,
        train=("train", recipe, *SETTINGS, "hang=10m", f"out={run}"),
        export=(),
        nodes=NODES,
        ranks_per_node=RANKS_PER_NODE,
        gpus=False,
        python=sys.executable if plan.container.kind != "none" else plan.python,
        container=Container(),
        modules=(),
    )


def losses(run: Path) -> dict[tuple[str, int], float]:
    """The loss of each step, by stage; the last one where a step was computed twice."""
    found = {}
    for file in sorted([*run.glob(METRICS), *run.glob(f"*/{METRICS}")]):
        metrics = Metrics(file.parent)
        metrics.update()
        found |= {(file.parent.name, step): loss for step, loss in metrics.series("loss")}
    return found


def _compared(unbroken: Mapping[tuple[str, int], float], broken: Mapping[tuple[str, int], float]) -> Iterator[str]:
    first, second = list(unbroken.values()), list(broken.values())
    yield "step  without incidents  with incidents"
    for number, (one, other) in enumerate(zip(first, second, strict=False), start=1):
        yield f"{number:>4}  {one:>17.6f}  {other:>14.6f}"
    if len(first) != len(second):
        raise UserError(f"the rehearsal has {len(second)} steps in place of {len(first)}")
    difference = max(abs(one - other) for one, other in zip(first, second, strict=True))
    if difference > TOLERANCE:
        raise UserError(f"the losses differ by up to {difference:.2g} from those of the run without incidents")
    yield f"the losses are equal to within {difference:.2g}"


class _Controller:
    """Runs a batch script as SLURM does: with its variables, and again when the job is requeued."""

    def __init__(self, plan: Plan) -> None:
        self.plan, self.folder, self.restarts = plan, plan.launch_folder, 0

    def run(self, incidents: tuple[Incident, ...]) -> Iterator[str]:
        self.folder.mkdir(parents=True)
        stand_in.install(self.folder, sys.executable)
        self.plan.script.write_text(batch_script(self.plan))
        left, end = list(incidents), time.monotonic() + SECONDS
        while True:
            with (self.folder / "job-1.txt").open("a") as output:
                # In a session of its own: Ctrl-C ends the rehearsal, which ends the job.
                script = subprocess.Popen(
                    ["bash", self.plan.script],
                    env=self._environment(),
                    stdout=output,
                    stderr=output,
                    start_new_session=True,
                )
            try:
                yield from self._watch(script, left, end)
            finally:
                if script.poll() is None:
                    stand_in.signal_tree(script.pid, signal.SIGKILL)
            if script.returncode == 0:
                yield f"  the job is completed; it was requeued {self.restarts} times"
                return
            if script.returncode != -signal.SIGKILL:
                raise UserError(f"the job ended with {script.returncode}; its output is {self.folder / 'job-1.txt'}")
            self.restarts += 1

    def _watch(self, script: subprocess.Popen, left: list[Incident], end: float) -> Iterator[str]:
        """Wait until the script ends or the job is requeued; let the next incident happen when its step is done."""
        requeue = self.folder / stand_in.REQUEUE
        while script.poll() is None:
            if time.monotonic() > end:
                raise UserError(
                    f"the rehearsal takes longer than {SECONDS:.0f} s; its output is {self.folder}/job-1.txt"
                )
            if requeue.exists():
                requeue.unlink()
                stand_in.signal_tree(script.pid, signal.SIGKILL)
                script.wait()
            elif left and len(losses(self.plan.run)) >= left[0].step:
                incident = left.pop(0)
                yield f"  after step {len(losses(self.plan.run))}: {incident.text}"
                incident.happen(json.loads((self.folder / stand_in.TASKS).read_text()), script.pid)
            time.sleep(0.05)

    def _environment(self) -> dict[str, str]:
        tasks = RANKS_PER_NODE if self.plan.starter == "srun" else 1
        return os.environ | {
            "PATH": f"{self.folder}:{os.environ['PATH']}",
            stand_in.FOLDER: str(self.folder),
            "SLURM_JOB_ID": str(os.getpid()),
            "SLURM_JOB_NODELIST": ",".join(f"node{number + 1}" for number in range(NODES)),
            "SLURM_NNODES": str(NODES),
            "SLURM_NTASKS_PER_NODE": str(tasks),
            "SLURM_RESTART_COUNT": str(self.restarts),
        }
