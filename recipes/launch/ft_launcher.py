"""`ft_launcher` of nvidia-resiliency-ext 0.6: ranks that fail or hang are started again in place.

    python -m gpt_oss_vision.recipes.launch.ft_launcher RANKS_PER_NODE RESTARTS train RECIPE key=value ...

A process beside each rank, its rank monitor, kills it when a step, a save or the start takes too long, also where the
rank itself is frozen. Then the launchers of all nodes end their ranks, meet again and start new ones, which continue
from the newest checkpoint.

ft_launcher starts ranks again after every exit code but 0. Here a run that is finished, saved or refused stays ended;
signals are passed on to the ranks alone, and the exit code is that of the ranks, as in `torchrun`.
"""

import logging
import os
import signal
import socket
import sys
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib import import_module
from pathlib import Path
from typing import Any

from ...bridge import resiliency
from ...errors import UsageError, UserError
from ..training import outcome, overrides
from ..training.stop_signals import EXIT_TO_BE_CONTINUED
from .plan import RESILIENCY
from .torchrun import PASSED_ON, STILL_HANDLED_BY_TORCHRUN, WORKER, exit_code, ignore_signals, pass_signals_on

INSTALL = f"`uv pip install {RESILIENCY}`, or leave out --start ft_launcher"

SECONDS_LATER = 60.0
"""At most: how much later than the rank itself (`hang=`), which writes where it stands, its monitor ends it."""
SECONDS_OF_START = 3600.0
"""At least: for the model, the optimizer, the data and the checkpoint that is loaded."""
SECONDS_TO_STOP = 5
"""Before the other ranks are killed: they wait for one that has ended, and cannot save."""
WRONG_USAGE = 2


def main(arguments: Sequence[str]) -> int:
    """Start the ranks of this node, and return when all have ended and are not started again."""
    try:
        return _run(arguments)
    except UserError as error:
        print(f"gpt-oss-vision: {error}", file=sys.stderr)
        return WRONG_USAGE if isinstance(error, UsageError) else 1


def _run(arguments: Sequence[str]) -> int:
    pass_signals_on()
    ranks, restarts, train, recipe, *settings = arguments
    options = {override.key: override.value for override in overrides.parse(settings)}
    if "ft.enable_ft_package" not in options:
        settings.append("ft.enable_ft_package=true")
    file = outcome.file_of(overrides.run_folder(recipe, options))
    try:
        launcher = _launcher()
    except UserError as error:
        outcome.write(file, outcome.REFUSED, str(error))
        raise
    ended: set[int] = set()
    launcher.LocalElasticAgent = _agent(launcher.LocalElasticAgent, file, ended)
    words = [*_options(ranks, restarts), *_limits(options.get("hang")), *WORKER, train, recipe, *settings]
    try:
        launcher.run(launcher.parse_args(words))
    except Exception as error:  # noqa: BLE001 - as its own `main`: the nodes may end while they meet
        print(f"gpt-oss-vision: ft_launcher has failed: {type(error).__name__}: {error}", file=sys.stderr)
    known = {outcome.FINISHED: 0, outcome.SAVED: EXIT_TO_BE_CONTINUED}
    return known.get(_how(file), exit_code(ended))


def _how(file: Path) -> str:
    """How the run has ended; a rank that is killed writes nothing."""
    return (outcome.read(file) or (outcome.FAILED,))[0]


def _launcher() -> Any:
    """The module of `ft_launcher`.

    Raises:
        UserError: it is not installed, or too old.
    """
    if (found := resiliency.installed()) is None:
        raise UserError(f"{resiliency.PACKAGE} is not installed in {sys.executable}: {INSTALL}")
    if resiliency.is_too_old(found):
        raise UserError(f"{resiliency.PACKAGE} {found} is too old for Megatron-Core: {INSTALL}")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ["TORCHELASTIC_SIGNALS_TO_HANDLE"] = STILL_HANDLED_BY_TORCHRUN
    logging.disable(logging.INFO)  # of the launcher and its monitors, dozens of lines per start
    return import_module("nvidia_resiliency_ext.fault_tolerance.launcher")


def _options(ranks: str, restarts: str) -> list[str]:
    # 2 restarts without a new checkpoint would end the run otherwise
    options = ["--nproc-per-node", ranks, "--max-restarts", restarts, "--ft-max-no-progress-cycles", "0"]
    options += ["--workers-stop-timeout", str(SECONDS_TO_STOP)]
    # It refuses a job of SLURM with several tasks per node, such as an interactive one, and needs a number of the node.
    os.environ["NVRX_ENABLE_MULTI_LAUNCHERS_PER_NODE"] = "1"
    os.environ.setdefault("SLURM_PROCID", "0")
    nodes = os.environ.get("SLURM_STEP_NUM_NODES", "1")
    if nodes == "1":
        return [*options, "--standalone"]
    address, port = os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
    is_host = os.environ["SLURM_NODEID"] == "0"
    return [
        *options,
        *("--nnodes", nodes, "--rdzv-backend", "c10d", "--rdzv-endpoint", f"{address}:{port}"),
        *("--rdzv-id", os.environ["SLURM_JOB_ID"], "--rdzv-conf", f"is_host={is_host}"),
        *("--local-addr", _own_address(address)),
    ]


def _own_address(other: str) -> str:
    """The address of this node towards another: its name may not be known to a name service."""
    family, kind, _, _, place = socket.getaddrinfo(other, 9, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind) as towards:
        towards.connect(place)  # of a datagram: nothing is sent
        return towards.getsockname()[0]


def _limits(hang: float | None) -> list[str]:
    """Options for the sections that Megatron-Bridge announces to the monitors, in seconds."""
    step = None if hang is None else hang + min(hang, SECONDS_LATER)
    start = None if step is None else max(step, SECONDS_OF_START)
    sections = f"setup:{start},step:{step},checkpointing:{step}"
    between = [] if step is None else ["--ft-rank-out-of-section-timeout", str(step)]
    return ["--ft-rank-section-timeouts", sections, *between]


def _agent(base: Any, file: Path, ended: set[int]) -> Any:
    """The agent of `ft_launcher`, which ends where the run has ended for good.

    Args:
        base: `LocalElasticAgent`.
        file: the outcome of the run.
        ended: gets the exit codes of the ranks, those that ended first where they failed; negative for a signal.
    """
    from torch.distributed.elastic.multiprocessing import SignalException

    class Agent(base):
        def _initialize_workers(self, worker_group: Any) -> None:
            """Meet the other nodes and start ranks. The old ones of this node have ended, and do not write any more."""
            found, spec, is_restart = outcome.read(file), worker_group.spec, self._pcontext is not None
            with suppress(FileNotFoundError):
                file.unlink()
                if is_restart and found:  # on the node that was the first to remove it
                    _say(f"The run failed: {found[1]}")
            if is_restart and worker_group.group_rank == 0:
                number = spec.max_restarts - self._remaining_restarts
                _say(f"restart {number} of {spec.max_restarts} from the newest checkpoint")
            ended.clear()
            super()._initialize_workers(worker_group)

        def _monitor_workers(self, worker_group: Any) -> Any:
            result = super()._monitor_workers(worker_group)
            ended.update(failure.exitcode for failure in result.failures.values())
            return result

        def _handle_restart_decision(self, *arguments: Any, **options: Any) -> bool:
            return not _is_over(file, ended) and super()._handle_restart_decision(*arguments, **options)

        def run(self, role: str = "default") -> Any:
            try:
                result = super().run(role)
            except SignalException as error:  # while there were no ranks
                ended.add(-error.sigval)
                raise
            finally:
                ignore_signals()  # `srun` ends the other launchers when the first one has ended
            if result is None or result.is_failed():
                return None  # 0.6.0 fails where it reports ranks that have failed
            ended.add(0)
            return result

        @staticmethod
        def setup_rank_monitors_early(**options: Any) -> Any:
            """Start the monitors without signals: SLURM signals all processes, and a rank cannot save without its own.

            0.6.0 lets a monitor end by SIGTERM, SIGUSR1 and SIGINT; its rank then fails with "Broken pipe".
            """
            with _signals_blocked():
                return base.setup_rank_monitors_early(**options)

        def shutdown_rank_monitors(self) -> None:
            for monitor in self._rank_monitors.values():
                monitor.process.kill()
            super().shutdown_rank_monitors()

    return _checked(Agent, base)


def _checked(agent: type, base: Any) -> type:
    """Refuse a version whose agent lacks what ours overrides.

    Raises:
        UserError: with the name.
    """
    if missing := [name for name in vars(agent) if not name.startswith("__") and not hasattr(base, name)]:
        raise UserError(f"{resiliency.PACKAGE} {resiliency.installed()} has no {missing[0]}: {INSTALL}")
    return agent


def _is_over(file: Path, ended: Collection[int]) -> bool:
    """Whether ranks that have failed are not started again: starting them again does not help, or they had to end."""
    is_stopped = bool(ended) and {*ended} <= {-number for number in PASSED_ON}
    return _how(file) != outcome.FAILED or WRONG_USAGE in ended or is_stopped


@contextmanager
def _signals_blocked() -> Iterator[None]:
    before = signal.pthread_sigmask(signal.SIG_BLOCK, PASSED_ON)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _say(sentence: str) -> None:
    print(f"gpt-oss-vision: {sentence}", flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
