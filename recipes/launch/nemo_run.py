"""The same job for NeMo-Run 0.11.1: a `run.Script` for experiments, an executor from a site file, and entry points.

    import nemo_run as run
    from gpt_oss_vision.recipes.launch.nemo_run import script, slurm_executor

    executor = slurm_executor("site.yaml", nodes=2)
    with run.Experiment("first") as experiment:
        experiment.add(script("gpt_oss_vision_20b_sft", "data.path=rows.jsonl", executor=executor), executor=executor)
        experiment.run()

`nemorun gpt_oss_vision train` finds this module by the group `nemo_run.cli`. The script holds names of recipes and
settings, no configuration: so the plug-ins of Megatron-Bridge work on it, and nothing of it is pickled.
"""

import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import List, Optional  # noqa: UP035 - NeMo-Run 0.11.1 reads no `list[str] | None` on its command line

import nemo_run as run

from ...errors import UserError
from ..catalog import find
from ..training import overrides
from .site import read_site

MODULE = "gpt_oss_vision.cli"
PATHS = ("out", "weights", "path", "folder", "image_folder")


def script(
    recipe: str,
    *settings: str,
    executor: run.Executor,
    python: str | None = None,
) -> run.Script:
    """`train RECIPE key=value ...` as a script for an executor.

    Args:
        recipe: a recipe, or stages with commas between them.
        settings: as of `train`.
        executor: it decides about quotes: NeMo-Run hands arguments to SLURM as text, and to a process as they are.
        python: the interpreter where the script runs; this one for a process, ``python`` of a node.

    Raises:
        UsageError: a recipe or a setting does not exist.
    """
    for name in recipe.split(","):
        find(name)
    overrides.parse(settings)
    is_slurm = isinstance(executor, run.SlurmExecutor)
    if not any(setting.startswith("out=") for setting in settings):
        settings = (*settings, f"out={Path('runs', recipe.replace(',', '+'))}")
    # NeMo-Run starts a job in a folder of its own.
    arguments = ["train", recipe, *map(_with_absolute_path, settings)]
    return run.Script(
        path=MODULE,
        m=True,
        entrypoint=python or ("python" if is_slurm else sys.executable),
        args=[shlex.quote(argument) for argument in arguments] if is_slurm else arguments,
    )


def _with_absolute_path(setting: str) -> str:
    """A setting whose value is a path, from the current folder on."""
    if setting.startswith("@"):
        return f"@{Path(setting[1:]).absolute()}"
    key, equals, value = setting.partition("=")
    return f"{key}={Path(value).absolute()}" if equals and value and key.split(".")[-1] in PATHS else setting


def slurm_executor(
    site: str | Path,
    *,
    nodes: int = 1,
    folder: str | Path | None = None,
    allow_uncommitted: bool = False,
) -> run.SlurmExecutor:
    """An executor of one task of `srun` per GPU, from a site file.

    A run that is asked to end before the time limit exits with 75, and NeMo-Run requeues a job that does not exit with
    0. Variables are named, and inherited from where the job is submitted: NeMo-Run would write their values.

    Args:
        site: the file that `launch --site` reads.
        nodes: number of nodes.
        folder: for NeMo-Run's files, shared by all nodes; NEMORUN_HOME unless given.
        allow_uncommitted: run the installed package although its working tree differs from its commit.

    Raises:
        UserError: the package is a working tree with changes, or the container is one that NeMo-Run cannot start.
        UsageError: the site file is wrong.
    """
    chosen = read_site(Path(site), {})
    if chosen.container not in ("none", "pyxis"):
        raise UserError(f"NeMo-Run starts containers by pyxis alone, and {site} has {chosen.container}: use `launch`")
    if not allow_uncommitted:
        refuse_uncommitted(Path(__file__).parents[2])
    home = Path(folder or os.environ.get("NEMORUN_HOME") or Path.home() / ".nemo_run")
    ranks = chosen.gpus_per_node or 1
    return run.SlurmExecutor(
        account=chosen.account or os.environ.get("USER", ""),
        partition=chosen.partition,
        time=chosen.time or "04:00:00",
        nodes=nodes,
        ntasks_per_node=ranks,
        gpus_per_node=chosen.gpus_per_node,
        mem=None,
        exclusive=None,  # False becomes an option that sbatch refuses
        signal=f"USR1@{chosen.seconds_to_save}",
        retries=chosen.requeues,
        container_image=chosen.container_image or None,
        container_mounts=list(chosen.mounts),
        container_env=list(chosen.env) or None,
        # Tasks that still write when the first has ended are not killed after NeMo-Run's 60 seconds.
        srun_args=["--wait=0"],
        additional_parameters=_options(chosen.sbatch),
        setup_lines="\n".join(_setup_lines(chosen.env, chosen.modules)),
        packager=run.Packager(),
        tunnel=run.LocalTunnel(job_dir=str(home / "experiments")),
    )


def _setup_lines(variables: tuple[str, ...], modules: tuple[str, ...]) -> list[str]:
    checks = [f': "${{{name}:?set it where the job is submitted}}"' for name in variables]
    loads = [f"module load {shlex.quote(name)}" for name in modules]
    return [*checks, *loads, "export HF_HUB_OFFLINE=1"]


def _options(options: tuple[str, ...]) -> dict[str, str | bool]:
    pairs = (option.removeprefix("--").partition("=") for option in options)
    return {name.replace("-", "_"): value if equals else True for name, equals, value in pairs}


def refuse_uncommitted(package: Path) -> None:
    """Refuse a package that is a working tree with changes: the job would not run what its commit says.

    Raises:
        UserError: with the first files that differ.
    """
    if not (package / ".git").exists():
        return
    command = ["git", "-C", str(package), "status", "--porcelain", "--untracked-files=no"]
    if changed := subprocess.run(command, capture_output=True, text=True).stdout.strip():
        files = ", ".join(line[2:].strip() for line in changed.splitlines()[:3])
        raise UserError(
            f"the package in {package} has changes that are not committed ({files}): commit them, or allow them with "
            "allow_uncommitted=True"
        )


@run.cli.entrypoint(namespace="gpt_oss_vision", help="Train by a recipe of GPT-OSS-Vision.")
def train(recipe: str, settings: Optional[List[str]] = None) -> None:  # noqa: UP006, UP045
    """Train by a recipe, as `gpt-oss-vision train`.

    Args:
        recipe: a recipe, or stages with commas between them.
        settings: each as ``key=value``.
    """
    from ..commands import train as run_here

    sys.exit(run_here(recipe, settings or [], dry_run=False))


@run.cli.factory
def gpt_oss_vision_site() -> run.Config[run.SlurmExecutor]:
    """The executor of ``site.yaml`` in the current folder, for ``run.executor=gpt_oss_vision_site``."""
    try:
        return slurm_executor("site.yaml").to_config()
    except UserError as error:  # NeMo-Run 0.11.1 takes a ValueError for a factory that is not there
        raise RuntimeError(str(error)) from error
