"""The plan as text: a batch script that bash and shellcheck accept, without secrets, for every kind of container."""

import dataclasses
import itertools
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from gpt_oss_vision import cli
from gpt_oss_vision.recipes.launch import examples
from gpt_oss_vision.recipes.launch.plan import Container, Plan, batch_script

ROOT = Path(__file__).parents[3]
PLAN = Plan(
    name="first",
    run=Path("/shared/runs/first"),
    folder=Path("/scratch/a folder"),
    train=("train", "gpt_oss_vision_20b_sft", "data.path=it's.jsonl", "out=/shared/runs/first"),
    nodes=2,
    ranks_per_node=8,
    gpus=True,
)
CONTAINERS = ("none", "pyxis", "apptainer", "docker")
STARTERS = ("torchrun", "srun", "ft_launcher")


def plans() -> dict[str, Plan]:
    found = {}
    for kind, starter, is_full in itertools.product(CONTAINERS, STARTERS, (False, True)):
        container = Container(kind=kind, image="/images/a b.sif", mounts=("/shared", "/data:/d")[: 2 if is_full else 0])
        more = {
            "environment": ("WANDB_API_KEY", "NCCL_DEBUG"),
            "modules": ("cuda/13.0",),
            "export": ("convert", "export", "--hf", "a b"),
            "account": "a",
            "dependency": "afterok:1",
            "array": "0-3%1",
            "more": ("--qos=high", "--exclusive"),
        }
        plan = dataclasses.replace(PLAN, container=container, starter=starter, **(more if is_full else {}))
        found[f"{kind}-{starter}-{'full' if is_full else 'bare'}"] = plan
    return found


@pytest.mark.parametrize("plan", plans().values(), ids=plans())
def test_bash_and_shellcheck_accept_the_script(plan: Plan, tmp_path: Path):
    file = tmp_path / "job.sbatch"
    file.write_text(batch_script(plan))
    subprocess.run(["bash", "-n", file], check=True)
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed")
    done = subprocess.run(["shellcheck", file], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def command_of(plan: Plan, tmp_path: Path, environment: dict[str, str] | None = None) -> list[str]:
    """What the script of a plan calls in place of `srun`."""
    for program, text in (("srun", f'printf "%s\\0" "$@" > {tmp_path}/called'), ("scontrol", "echo"), ("module", ":")):
        (tmp_path / program).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / program).chmod(0o755)
    script = batch_script(dataclasses.replace(plan, modules=(), export=(), run=tmp_path))
    (tmp_path / "launch").mkdir(exist_ok=True)
    variables = {"PATH": f"{tmp_path}:/usr/bin:/bin", "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n"} | (
        environment or {}
    )
    done = subprocess.run(["bash", "-c", script], env=variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return (tmp_path / "called").read_text().split("\0")[:-1]


@pytest.mark.parametrize("kind", CONTAINERS)
@pytest.mark.parametrize("starter", STARTERS)
def test_the_command_comes_last_whatever_the_container(kind: str, starter: str, tmp_path: Path):
    plan = dataclasses.replace(PLAN, container=Container(kind=kind, image="i", mounts=("/shared",)), starter=starter)
    modules = {
        "torchrun": ["gpt_oss_vision.recipes.launch.torchrun", "8"],
        "ft_launcher": ["gpt_oss_vision.recipes.launch.ft_launcher", "8", "3"],
        "srun": ["gpt_oss_vision.cli"],
    }
    expected = ["python", "-m", *modules[starter], *plan.train]
    assert command_of(plan, tmp_path)[-len(expected) :] == expected


def test_pyxis_is_asked_by_options_of_srun(tmp_path: Path):
    container = Container(kind="pyxis", image="team/image:1", mounts=("/shared", "/data:/d"))
    called = command_of(
        dataclasses.replace(PLAN, container=container, environment=("TOKEN",)), tmp_path, environment={"TOKEN": "x"}
    )
    assert {
        "--container-image=team/image:1",
        "--container-mounts=/shared,/data:/d",
        "--container-workdir=/scratch/a folder",
        "--container-env=TOKEN",
    } <= {*called}


def test_apptainer_and_docker_get_gpus_folders_and_variables(tmp_path: Path):
    mounts = ("/shared", "/data:/d")
    called = shlex.join(
        command_of(
            dataclasses.replace(PLAN, container=Container(kind="apptainer", image="i.sif", mounts=mounts)), tmp_path
        )
    )
    assert "apptainer exec --nv --bind /shared --bind /data:/d --pwd '/scratch/a folder' i.sif python" in called
    plan = dataclasses.replace(
        PLAN, container=Container(kind="docker", image="i", mounts=mounts), environment=("TOKEN",)
    )
    called = shlex.join(command_of(plan, tmp_path, environment={"TOKEN": "x"}))
    assert "docker run --rm --gpus all --ulimit memlock=-1 --network host" in called
    assert "--volume /shared:/shared --volume /data:/d" in called
    assert "--env SLURM_PROCID" in called and "--env TOKEN" in called and "--env GPT_OSS_VISION_OUTCOME" in called


def test_a_variable_that_is_not_set_ends_the_job_with_its_name(tmp_path: Path):
    script = batch_script(dataclasses.replace(PLAN, environment=("WANDB_API_KEY",), run=tmp_path))
    done = subprocess.run(["bash", "-c", script], env={"PATH": "/usr/bin:/bin"}, capture_output=True, text=True)
    assert done.returncode == 2
    assert "WANDB_API_KEY is not set" in done.stdout


def test_the_examples_are_those_of_the_plans():
    written = {file.name: file.read_text() for file in (ROOT / "examples/slurm").glob("*.sbatch")}
    assert written == dict(examples.examples())


@pytest.mark.parametrize("text", dict(examples.examples()).values(), ids=dict(examples.examples()))
def test_the_commands_of_the_examples_are_those_of_the_command_line(text: str):
    lines = [line for line in text.splitlines() if line.startswith(("train=(", "export_command=("))]
    assert len(lines) == 2
    for line in lines:
        words = shlex.split(line.partition("(")[2].removesuffix(")"))
        if words:
            first = 3 if words[2] == "gpt_oss_vision.cli" else 4
            cli.parser().parse_args(words[first:])


@pytest.mark.parametrize("text", dict(examples.examples()).values(), ids=dict(examples.examples()))
def test_shellcheck_accepts_the_examples(text: str, tmp_path: Path):
    (tmp_path / "job.sbatch").write_text(text)
    subprocess.run(["bash", "-n", tmp_path / "job.sbatch"], check=True)
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed")
    subprocess.run(["shellcheck", tmp_path / "job.sbatch"], check=True)
