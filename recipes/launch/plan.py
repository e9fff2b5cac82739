"""The plan of a job: what runs, on which nodes, in which container, and the batch script that is made of it.

Data in, text out, with the standard library alone, so that a login node without torch can launch.
"""

import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

BODY = Path(__file__).with_name("job.bash")
"""The part of the batch script that is the same for all jobs."""

MODULE = "gpt_oss_vision"

RESILIENCY = "nvidia-resiliency-ext==0.6.0"
"""The package of `ft_launcher`, in the version that Megatron-Core 0.19.2 names."""

RANK_VARIABLES = (
    *("SLURM_JOB_ID", "SLURM_RESTART_COUNT", "SLURM_STEP_ID", "SLURM_STEP_NUM_TASKS", "SLURM_STEP_NUM_NODES"),
    *("SLURM_PROCID", "SLURM_LOCALID", "SLURM_NODEID", "SLURMD_NODENAME", "MASTER_ADDR", "MASTER_PORT"),
    "GPT_OSS_VISION_OUTCOME",
)
"""What a process reads of SLURM and of the batch script: Docker passes on none by itself."""

type ContainerKind = Literal["none", "pyxis", "apptainer", "docker"]
type Starter = Literal["torchrun", "srun", "ft_launcher"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Container:
    """What the processes of a job run in.

    Attributes:
        kind: ``none`` runs them on the node itself.
        image: of the container: a file, or a name that the runtime knows.
        mounts: folders of the node, each as ``FOLDER`` or ``FOLDER:FOLDER_INSIDE``.
    """

    kind: ContainerKind = "none"
    image: str = ""
    mounts: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """A job.

    Attributes:
        name: of the job.
        run: folder of the run, absolute, on a disk that all nodes share.
        folder: where the job starts, absolute; None: where it is submitted.
        train: the command line of `gpt-oss-vision`, from ``train`` on.
        export: the one that follows when the run is finished, or nothing.
        nodes: number of nodes.
        ranks_per_node: processes of a node, one per GPU where there are GPUs.
        gpus: whether GPUs are asked for.
        starter: one `torchrun` or `ft_launcher` per node, or one task of `srun` per rank.
        python: the interpreter on the nodes, or in the container.
        container: what the processes run in.
        modules: environment modules that are loaded.
        environment: names of variables that must be set where the job is submitted; values are never written.
        account: as SLURM's options of the same names, also the next ones.
        partition: of SLURM.
        time: limit of the job.
        dependency: on other jobs.
        array: several jobs one after the other, which all continue the run.
        more: further options of `sbatch`, each as ``--name=value``.
        file: of the batch script; in the folder of the run unless given.
        output: file for the output of the job; in the folder of the run unless given.
        seconds_to_save: how long before the time limit SLURM sends SIGUSR1; 0 for never.
        retries: restarts inside the allocation after a failure.
        requeues: how often the job returns to the queue.
    """

    name: str
    run: Path
    folder: Path | None = None
    train: tuple[str, ...]
    export: tuple[str, ...] = ()
    nodes: int
    ranks_per_node: int
    gpus: bool
    starter: Starter = "torchrun"
    python: str = "python"
    container: Container = Container()
    modules: tuple[str, ...] = ()
    environment: tuple[str, ...] = ()
    account: str | None = None
    partition: str | None = None
    time: str | None = None
    dependency: str | None = None
    array: str | None = None
    more: tuple[str, ...] = ()
    file: str = ""
    output: str = ""
    seconds_to_save: int = 300
    retries: int = 3
    requeues: int = 100

    @property
    def ranks(self) -> int:
        """Number of processes that train."""
        return self.nodes * self.ranks_per_node

    @property
    def retries_of_script(self) -> int:
        """Restarts of the training by the batch script; `ft_launcher` restarts the ranks itself."""
        return 0 if self.starter == "ft_launcher" else self.retries

    @property
    def launch_folder(self) -> Path:
        """Where script, output and number of the job are kept."""
        return self.run / "launch"

    @property
    def script(self) -> Path:
        """The batch script."""
        return Path(self.file) if self.file else self.launch_folder / "job.sbatch"


def batch_script(plan: Plan) -> str:
    """The whole batch script: options of `sbatch`, the variables of this job, and `job.bash`."""
    lines = [
        "#!/usr/bin/env bash",
        *(f"#SBATCH {option}" for option in sbatch_options(plan)),
        "",
        f"# Submit it by hand with: sbatch {shlex.quote(str(plan.script))}",
        *(f"{name}={value}" for name, value in _variables(plan)),
        *_modules(plan),
        "export HF_HUB_OFFLINE=1 # nothing is downloaded on a node",
        "",
    ]
    return "\n".join(lines) + BODY.read_text()


def sbatch_options(plan: Plan) -> Iterator[str]:
    """The options of `sbatch`."""
    yield f"--job-name={_directive(plan.name)}"
    yield f"--nodes={plan.nodes}"
    yield f"--ntasks-per-node={_tasks_per_node(plan)}"
    if plan.gpus:
        yield f"--gpus-per-node={plan.ranks_per_node}"
        if not any(option.startswith(("--exclusive", "--cpus-per", "--mem")) for option in plan.more):
            yield "--exclusive"
            yield "--mem=0"
    for name in ("account", "partition", "time", "dependency", "array"):
        if (value := getattr(plan, name)) is not None:
            yield f"--{name}={_directive(value)}"
    if plan.seconds_to_save:
        yield f"--signal=USR1@{plan.seconds_to_save}"
    yield "--requeue"
    yield "--open-mode=append"
    if plan.folder is not None:
        yield f"--chdir={_directive(str(plan.folder))}"
    number = "%j" if plan.array is None else "%A"  # one file for all jobs of an array
    yield f"--output={_directive(plan.output or str(plan.launch_folder).replace('%', '%%') + f'/job-{number}.txt')}"
    yield from plan.more


def _modules(plan: Plan) -> Iterator[str]:
    if plan.modules:
        yield "# shellcheck source=/dev/null"
        yield "source /etc/profile"
    for name in plan.modules:
        yield f"module load {shlex.quote(name)}"


def _directive(value: str) -> str:
    """A value as `sbatch` reads it in a line of the script: quoted where it has white space or a quote."""
    return f'"{value}"' if any(character in value for character in " \t'#") else value


def local_command(plan: Plan) -> tuple[str, ...]:
    """The command that starts all ranks on this machine."""
    return (plan.python, *_launcher(plan), *plan.train)


def _launcher(plan: Plan) -> tuple[str, ...]:
    """The module that starts the ranks of a node, with its own arguments."""
    if plan.starter == "ft_launcher":
        return ("-m", f"{MODULE}.recipes.launch.ft_launcher", str(plan.ranks_per_node), str(plan.retries))
    return ("-m", f"{MODULE}.recipes.launch.torchrun", str(plan.ranks_per_node))


def _tasks_per_node(plan: Plan) -> int:
    return plan.ranks_per_node if plan.starter == "srun" else 1


def _variables(plan: Plan) -> Iterator[tuple[str, str]]:
    """The variables that `job.bash` reads, as bash."""
    program = ("-m", f"{MODULE}.cli")
    yield "run", shlex.quote(str(plan.run))
    yield "script", shlex.quote(str(plan.script))
    yield "variables", _array(plan.environment)
    yield "retries", str(plan.retries)
    yield "retries_of_training", str(plan.retries_of_script)
    yield "requeues", str(plan.requeues)
    yield "srun_options", _array(_srun_options(plan))
    yield "prefix", _array(_prefix(plan))
    yield "train", _array((plan.python, *(program if plan.starter == "srun" else _launcher(plan)), *plan.train))
    yield "export_command", _array((plan.python, *program, *plan.export) if plan.export else ())


def _array(words: tuple[str, ...]) -> str:
    return f"({' '.join(map(_quoted, words))})"


def _quoted(word: str) -> str:
    """A word of bash, in quotes also where shellcheck takes a comma for a mistake."""
    return f"'{word}'" if "," in word and shlex.quote(word) == word else shlex.quote(word)


def _srun_options(plan: Plan) -> tuple[str, ...]:
    options = () if plan.starter == "srun" else ("--cpu-bind=none",)
    if plan.container.kind != "pyxis":
        return options
    mounts = (f"--container-mounts={','.join(plan.container.mounts)}",) if plan.container.mounts else ()
    names = (f"--container-env={','.join(plan.environment)}",) if plan.environment else ()
    folder = () if plan.folder is None else (f"--container-workdir={plan.folder}",)
    image = (f"--container-image={plan.container.image}", *folder)
    return (*options, *image, *mounts, *names)


def _prefix(plan: Plan) -> tuple[str, ...]:
    """What stands in front of a command, to run it in a container."""
    image, mounts = plan.container.image, plan.container.mounts
    if plan.container.kind == "apptainer":
        gpus = ("--nv",) if plan.gpus else ()
        binds = (word for mount in mounts for word in ("--bind", mount))
        folder = () if plan.folder is None else ("--pwd", str(plan.folder))
        return ("apptainer", "exec", *gpus, *binds, *folder, image)
    if plan.container.kind == "docker":
        gpus = ("--gpus", "all", "--ulimit", "memlock=-1") if plan.gpus else ()
        binds = (word for mount in mounts for word in ("--volume", mount if ":" in mount else f"{mount}:{mount}"))
        names = (word for name in (*RANK_VARIABLES, *plan.environment) for word in ("--env", name))
        shared = ("--network", "host", "--ipc", "host", "--env", "HF_HUB_OFFLINE")
        folder = () if plan.folder is None else ("--workdir", str(plan.folder))
        return ("docker", "run", "--rm", *gpus, *shared, *names, *binds, *folder, image)
    return ()
