"""The subcommands `launch`, `status`, `logs` and `cancel`. At module level the standard library only."""

import argparse
import os
import shlex
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ...arguments import add_command, at_least
from ...errors import UsageError, UserError

if TYPE_CHECKING:
    from .plan import Plan
    from .site import Site


def add_to(commands: argparse._SubParsersAction) -> None:
    """Add `launch`, `status`, `logs` and `cancel` to the command line."""
    command = add_command(commands, launch)
    add = command.add_argument
    add("recipe", metavar="RECIPE[,RECIPE...]", help="as for `train`")
    add("settings", nargs="*", metavar="KEY=VALUE", help="as for `train`")
    add("--executor", choices=("local", "slurm"), required=True, help="this machine, or a job of SLURM")
    add("--site", type=Path, metavar="FILE", help="defaults of the cluster, a YAML file of the options below")
    add("--nodes", type=at_least(1), metavar="N", help="number of nodes (the recipe's GPUs by those of a node)")
    add(
        "--gpus-per-node", type=at_least(1), metavar="N", help="ranks of a node, each with a GPU if the recipe has GPUs"
    )
    for name in ("account", "partition", "time", "dependency", "array"):
        add(f"--{name}", metavar=name.upper(), help=f"as of `sbatch --{name}`")
    add(
        "--sbatch",
        action="append",
        default=[],
        metavar="OPTION",
        help="another option of `sbatch`: --sbatch=--qos=high",
    )
    text = "one torchrun or ft_launcher per node, or one task of srun per rank (torchrun)"
    add("--start", choices=("torchrun", "srun", "ft_launcher"), help=text)
    add("--python", metavar="FILE", help="Python on the nodes, or in the container (this one)")
    add("--container", choices=("none", "pyxis", "apptainer", "docker"), help="what the ranks run in (none)")
    add("--container-image", metavar="IMAGE", help="a file, or a name that the container's runtime knows")
    add("--mount", dest="mounts", action="append", default=[], metavar="DIR[:DIR]", help="a folder for the container")
    add("--module", dest="modules", action="append", default=[], metavar="NAME", help="an environment module to load")
    add(
        "--env",
        action="append",
        default=[],
        metavar="NAME",
        help="a variable that the job needs; its value is inherited",
    )
    add("--seconds-to-save", type=at_least(1), metavar="N", help="before --time the run is asked to end (300)")
    add("--retries", type=at_least(0), metavar="N", help="restarts in an allocation after failures (3)")
    add("--requeues", type=at_least(0), metavar="N", help="returns to the queue (100)")
    add(
        "--export",
        action="store_true",
        help="convert the finished run to a checkpoint of transformers, in its folder hf",
    )
    add("--detach", action="store_true", help="return when the job is submitted")
    tries = command.add_mutually_exclusive_group()
    tries.add_argument("--dry-run", action="store_true", help="check everything, and write and print the batch script")
    tries.add_argument(
        "--rehearse",
        action="store_true",
        help="run the batch script here, with the tiny recipe of the task, and end it early in each way that jobs are",
    )

    for run in (status, logs, cancel):
        add_command(commands, run).add_argument("run_folder", type=Path, metavar="DIR", help="folder of the run")


def launch(
    recipe: str,
    settings: Sequence[str],
    executor: Literal["local", "slurm"],
    site: Path | None,
    nodes: int | None,
    export: bool,
    detach: bool,
    dry_run: bool,
    rehearse: bool,
    dependency: str | None,
    array: str | None,
    **options: Any,
) -> int:
    """Train by a recipe on this machine or as a job of SLURM, until it is finished.

    A job is asked to end before its time limit, saves, and returns to the queue; after a failure the run starts again
    from its newest checkpoint. The exit code is that of the job. Ctrl-C leaves a job of SLURM running.
    """
    from .site import read_site

    chosen = read_site(site, options)
    plan = _plan(recipe, settings, chosen, nodes, export=export, dependency=dependency, array=array)
    _check(plan, executor)
    if rehearse:
        return _rehearse(plan, recipe)
    if executor == "local":
        return _launch_here(plan, recipe, settings, dry_run)
    _validate(plan, recipe, settings)
    return _launch_on_slurm(plan, detach, dry_run)


def _launch_here(plan: "Plan", recipe: str, settings: Sequence[str], dry_run: bool) -> int:
    from . import local
    from .plan import local_command

    if plan.nodes > 1:
        raise UsageError(f"--executor local is this machine alone, and {plan.nodes} nodes are planned: give --nodes 1")
    if dry_run:
        _validate(plan, recipe, settings)
        print(shlex.join(local_command(plan)))
        return 0
    return local.run(plan)


def _rehearse(plan: "Plan", recipe: str) -> int:
    from ..catalog import find
    from .rehearse import rehearse

    tiny = ",".join(f"gpt_oss_vision_tiny_{find(name).task}" for name in recipe.split(","))
    for line in rehearse(plan, tiny, plan.run / "rehearsal"):
        print(line, flush=True)
    return 0


def _launch_on_slurm(plan: "Plan", detach: bool, dry_run: bool) -> int:
    from . import slurm
    from .plan import batch_script

    if plan.dependency is None and not dry_run:
        slurm.refuse_second_job(plan.run)
    plan.launch_folder.mkdir(parents=True, exist_ok=True)
    plan.script.write_text(batch_script(plan))
    if dry_run:
        print(plan.script.read_text(), end="")
        print(f"# in {plan.script}")
        return 0
    job = slurm.submit(plan.script)
    print(f"Job {job} is submitted: {plan.script}", flush=True)
    if detach:
        print(f"Follow it with `gpt-oss-vision logs {shlex.quote(str(plan.run))}`")
        return 0
    return _follow(plan.run, job)


def _follow(run: Path, job: int) -> int:
    from . import slurm

    try:
        end = slurm.follow(run, job)
    except KeyboardInterrupt:
        print(f"\nJob {job} goes on; end it with `gpt-oss-vision cancel {shlex.quote(str(run))}`")
        return 130
    if end.exit_code:
        print(f"Job {job} ended as {end.name}", file=sys.stderr)
    return end.exit_code


def _plan(
    recipe: str,
    settings: Sequence[str],
    site: "Site",
    nodes: int | None,
    *,
    export: bool,
    dependency: str | None,
    array: str | None,
) -> "Plan":
    """The plan of a command line.

    Raises:
        UsageError: the command line is wrong.
    """
    from ..catalog import find
    from ..training import overrides
    from .plan import Container, Plan

    recipes = [find(name) for name in recipe.split(",")]
    found = overrides.parse(settings)
    overrides.refuse_other_stages(found, [name for each in recipes for name in each.names])
    options = {override.key: override.value for override in found}
    run = overrides.run_folder(recipe, options, site.runs)
    gpus = options.get("gpus") or recipes[0].gpus
    ranks = site.gpus_per_node or min(gpus, 8)
    if nodes is None:
        nodes, rest = divmod(gpus, ranks)
        if rest:
            raise UsageError(f"{gpus} GPUs are no whole number of nodes with {ranks}: give --nodes and --gpus-per-node")
    kept = [setting for setting in settings if setting.partition("=")[0] not in ("out", "gpus", "gpu")]
    if "hang" not in options:
        kept.append(f"hang={site.hang}")
    return Plan(
        name=run.name,
        run=run,
        folder=Path.cwd(),
        train=("train", recipe, *kept, f"out={run}"),
        export=_export(run, recipes) if export else (),
        nodes=nodes,
        ranks_per_node=ranks,
        gpus=recipes[0].gpu is not None,
        starter=site.start,
        python=site.python or (sys.executable if site.container == "none" else "python"),
        container=Container(kind=site.container, image=site.container_image, mounts=site.mounts),
        modules=site.modules,
        environment=site.env,
        account=site.account,
        partition=site.partition,
        time=site.time,
        dependency=dependency,
        array=array,
        more=site.sbatch,
        seconds_to_save=site.seconds_to_save,
        retries=site.retries,
        requeues=site.requeues,
    )


def _export(run: Path, recipes: Sequence[Any]) -> tuple[str, ...]:
    from ..catalog import stage_names

    last = run if len(recipes) == 1 else run / stage_names(recipes)[-1]
    return ("convert", "export", "--megatron", str(last / "checkpoints"), "--out", str(run / "hf"), "--overwrite")


def _check(plan: "Plan", executor: str) -> None:
    """Refuse what would fail on the nodes, as far as it can be seen here.

    Raises:
        UserError: a file is missing, a variable is not set, a secret would be written.
    """
    if executor == "slurm" and plan.array is not None and not plan.array.endswith("%1"):
        raise UsageError(f"--array {plan.array}: the jobs continue one run, one at a time: --array {plan.array}%1")
    missing = [name for name in plan.environment if name not in os.environ]
    if missing:
        raise UserError(
            f"{' and '.join(missing)} is not set here, where the job inherits it: `export {missing[0]}=...`"
        )
    _refuse_secrets(plan)
    if plan.container.kind == "none":
        _check_python(plan)
        return
    if not plan.container.image:
        raise UsageError(f"--container {plan.container.kind} needs --container-image")
    files = [mount.partition(":")[0] for mount in plan.container.mounts]
    if plan.container.image.startswith(("/", ".")):
        files.append(plan.container.image)
    for file in files:
        if not Path(file).exists():
            raise UserError(f"{file}, which the container needs, is not there")


def _check_python(plan: "Plan") -> None:
    from shutil import which

    if which(plan.python) is None:
        raise UserError(f"{plan.python}, the Python of the nodes, is not there: name it with --python")
    if plan.python == sys.executable and find_spec("torch") is None:
        raise UserError("This Python has no torch: name the one of the nodes with --python, or in the site file")
    if plan.python == sys.executable and plan.starter == "ft_launcher":
        _check_ft_launcher()


def _check_ft_launcher() -> None:
    from ...bridge import resiliency
    from .plan import RESILIENCY

    found = resiliency.installed()
    if found is None or resiliency.is_too_old(found):
        has = "no ft_launcher" if found is None else f"{resiliency.PACKAGE} {found}, which is too old for Megatron-Core"
        raise UserError(
            f"This Python has {has}: `uv pip install {RESILIENCY}`, name another with --python, or leave out --start "
            "ft_launcher"
        )


def _refuse_secrets(plan: "Plan") -> None:
    from ..training.secrets import HIDDEN, without_secret

    for word in plan.train:
        key, equals, value = word.partition("=")
        if equals and without_secret(key, value) == HIDDEN:
            raise UserError(
                f"{key} is a secret, and the batch script would hold it: set it as a variable, with --env NAME"
            )
    for name in plan.environment:
        value = os.environ[name]
        if len(value) >= 8 and any(value in word for word in plan.train):
            raise UserError(f"a setting holds the value of {name}, and the batch script would hold it too")


def _validate(plan: "Plan", recipe: str, settings: Sequence[str]) -> None:
    """Check the run as `train --dry-run` does, where torch is installed."""
    if find_spec("torch") is None:
        print("# torch is not installed here: layout, memory and data are checked when the job starts")
        return
    from ..commands import train

    ranks = f"gpus={plan.ranks}"
    others = [setting for setting in settings if setting.partition("=")[0] not in ("gpus", "out")]
    train(recipe, [*others, ranks, f"out={plan.run}"], dry_run=True)


def status(run_folder: Path) -> int:
    """Show how far a run is, and the state of its job."""
    from .status import lines

    for title, value in lines(run_folder.absolute()):
        print(f"{title:<10}  {value}")
    return 0


def logs(run_folder: Path) -> int:
    """Print the output of a run's job as it is written, until the job is over. The exit code is that of the job."""
    from . import slurm

    run = run_folder.absolute()
    return _follow(run, slurm.job_of(run))


def cancel(run_folder: Path) -> int:
    """Cancel the job of a run. The run saves in the time that SLURM gives it."""
    from . import slurm

    run = run_folder.absolute()
    job = slurm.job_of(run)
    slurm.cancel(job)
    print(f"Job {job} is cancelled")
    return 0
