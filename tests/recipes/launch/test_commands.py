"""`launch`, `status`, `logs` and `cancel` without SLURM: what is refused, the site file, and the executor `local`."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import forked
import pytest
from runs import numbers_of, process_of_rank

from gpt_oss_vision import cli
from gpt_oss_vision.recipes.launch.site import Site
from gpt_oss_vision.recipes.launch.site_check import problems

RECIPE = "gpt_oss_vision_tiny_sft"
TO_BE_CONTINUED = 75


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert cli.main(["launch", *arguments]) in (1, 2)
    return capsys.readouterr().err


REFUSED = {
    "a recipe that is not there": (["gpt_oss_vision_20b_sftt"], "There is no recipe"),
    "a setting that is not there": ([RECIPE, "train.train_itres=3"], "train.train_iters"),
    "a stage that is not there": ([RECIPE, "lora.optimizer.lr=1e-3"], "this run has no stage lora"),
    "GPUs that fill no nodes": (["gpt_oss_vision_20b_sft", "--gpus-per-node=3"], "8 GPUs are no whole number of nodes"),
    "several jobs at once": ([RECIPE, "--array=0-3"], "one at a time: --array 0-3%1"),
    "a variable that is not set": ([RECIPE, "--env=NO_SUCH_KEY"], "NO_SUCH_KEY is not set here"),
    "a container without image": ([RECIPE, "--container=pyxis"], "--container pyxis needs --container-image"),
    "an image that is not there": (
        [RECIPE, "--container=apptainer", "--container-image=./no.sif"],
        "./no.sif, which the container needs, is not there",
    ),
    "a mount that is not there": (
        [RECIPE, "--container=pyxis", "--container-image=team/i", "--mount=/no/such:/x"],
        "/no/such, which the container needs, is not there",
    ),
    "a Python that is not there": (
        [RECIPE, "--python=/no/python"],
        "/no/python, the Python of the nodes, is not there",
    ),
    "no ft_launcher": (
        [RECIPE, "--start=ft_launcher"],
        "This Python has no ft_launcher: `uv pip install nvidia-resiliency-ext==0.6.0`",
    ),
    "a secret": ([RECIPE, "env_vars.WANDB_API_KEY=abc"], "env_vars.WANDB_API_KEY is a secret"),
}


@pytest.mark.parametrize(("arguments", "sentence"), REFUSED.values(), ids=REFUSED)
def test_what_would_fail_on_the_nodes_is_refused_here(arguments: list[str], sentence: str, capsys):
    assert sentence in refused(capsys, *arguments, "--executor=slurm")
    assert not [*Path().rglob("*.sbatch")]


def test_an_ft_launcher_that_megatron_refuses_is_refused_here(tmp_path: Path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(write_old_resiliency(tmp_path))
    sentence = (
        "This Python has nvidia-resiliency-ext 0.4.1, which is too old for Megatron-Core: `uv pip install nvidia-"
    )
    assert sentence in refused(capsys, RECIPE, "--start=ft_launcher", "--executor=slurm")


def test_the_doctor_names_an_ft_launcher_that_megatron_refuses(tmp_path: Path):
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nPYTHONPATH={write_old_resiliency(tmp_path)} exec {sys.executable} "$@"\n')
    python.chmod(0o755)
    found = [*problems(Site(start="ft_launcher", python=str(python)))]
    assert f"{python} has nvidia-resiliency-ext 0.4.1, which is too old for Megatron-Core" in found[-1]


def write_old_resiliency(folder: Path) -> Path:
    """What is installed of a version that Megatron-Core does not take, as far as it is looked at."""
    (folder / "nvidia_resiliency_ext/fault_tolerance").mkdir(parents=True)
    for name in ("nvidia_resiliency_ext", "nvidia_resiliency_ext/fault_tolerance"):
        (folder / name / "__init__.py").touch()
    metadata = folder / "nvidia_resiliency_ext-0.4.1.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: nvidia-resiliency-ext\nVersion: 0.4.1\n")
    return folder


def test_the_value_of_a_named_variable_may_not_stand_in_a_setting(capsys, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TEAM_KEY", "0123456789")
    said = refused(capsys, RECIPE, "--executor=slurm", "--env=TEAM_KEY", "logger.wandb_entity=x0123456789")
    assert "a setting holds the value of TEAM_KEY" in said
    assert "0123456789" not in said


SITES = {
    "an unknown name": ("partiton: a", "partiton is no setting of a site; near it is partition"),
    "a list for a text": ("account: [a]", "account is a text, and not ['a']"),
    "a text for a number": ("gpus_per_node: eight", "gpus_per_node is a whole number, and not eight"),
    "a text for a list": ("mounts: /a", "mounts is a list, such as [/a]"),
    "an unknown container": ("container: podman", "container is one of none, pyxis, apptainer, docker, and not podman"),
    "a list": ("- a", "names with values are expected"),
    "no YAML": ("a: [", "is not YAML"),
}


@pytest.mark.parametrize(("text", "sentence"), SITES.values(), ids=SITES)
def test_a_wrong_site_file_is_refused(text: str, sentence: str, capsys):
    Path("site.yaml").write_text(text)
    assert sentence in refused(capsys, RECIPE, "--executor=slurm", "--site=site.yaml")


def test_a_site_file_that_is_not_there_is_refused(capsys):
    assert "no.yaml cannot be read (No such file" in refused(capsys, RECIPE, "--executor=slurm", "--site=no.yaml")


def light(*arguments: str) -> subprocess.CompletedProcess[str]:
    """The command line in an interpreter that finds neither torch nor transformers nor Megatron."""
    code = (
        "import sys, importlib.abc\n"
        "class Missing(importlib.abc.MetaPathFinder):\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.partition('.')[0] in ('torch', 'transformers', 'megatron', 'numpy', 'datasets'):\n"
        "            raise ModuleNotFoundError(name, name=name)\n"
        "import importlib.util\n"
        "find = importlib.util.find_spec\n"
        "importlib.util.find_spec = lambda name, *a: None if name == 'torch' else find(name, *a)\n"
        "sys.meta_path.insert(0, Missing())\n"
        "from gpt_oss_vision.cli import main\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    return subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)


def test_a_login_node_without_torch_writes_the_script():
    Path("site.yaml").write_text(
        "partition: batch\ntime: 4:00:00\nruns: shared runs\nsbatch: [--qos=high]\nhang: 20m\n"
    )
    options = ("--executor=slurm", "--site=site.yaml", "--python=/bin/sh", "--time=1:00:00", "--dry-run")
    done = light("launch", "gpt_oss_vision_20b_sft", "data.path=rows.jsonl", *options)
    assert done.returncode == 0, done.stderr
    assert "torch is not installed here" in done.stdout
    script = Path("shared runs/gpt_oss_vision_20b_sft/launch/job.sbatch").read_text()
    assert script in done.stdout
    for option in ("--partition=batch", "--time=1:00:00", "--qos=high", "--gpus-per-node=8", "--nodes=1"):
        assert f"#SBATCH {option}\n" in script
    assert "hang=20m" in script and f"'out={Path.cwd()}/shared runs/gpt_oss_vision_20b_sft'" in script
    this = light("launch", "gpt_oss_vision_20b_sft", "--executor=slurm", "--dry-run")
    assert "This Python has no torch: name the one of the nodes with --python" in this.stderr


def test_what_needs_torch_says_so_without_it():
    done = light("train", RECIPE)
    assert done.returncode == 1
    assert "torch is not installed in this Python" in done.stderr


def test_without_slurm_the_script_is_named():
    done = light("launch", RECIPE, "--executor=slurm", "--python=/bin/sh")
    assert done.returncode == 1
    assert "sbatch is not on this machine" in done.stderr or "SLURM refuses" in done.stderr
    assert str(Path.cwd() / f"runs/{RECIPE}/launch/job.sbatch") in done.stderr


def test_a_folder_without_a_job_is_refused(capsys):
    assert cli.main(["cancel", "."]) == 1
    assert "has no job of SLURM" in capsys.readouterr().err
    assert cli.main(["status", "nowhere"]) == 1
    assert "nowhere is not there" in capsys.readouterr().err


@pytest.fixture
def launch(python: Path, tmp_path: Path) -> Callable[..., forked.Command]:
    """A function that launches a run with 2 ranks on this machine."""

    def launched(*options: str) -> forked.Command:
        settings = ("train.train_iters=12", "train.global_batch_size=8", "train.micro_batch_size=4")
        rest = ("validation.eval_iters=0", "logger.log_interval=1", f"out={tmp_path / 'run'}", "data.num_workers=0")
        here = ("--executor", "local", "--gpus-per-node", "2", "--nodes", "1", "--python", str(python))
        return forked.Command("launch", RECIPE, *settings, *rest, *here, *options, output=tmp_path / "output")

    return launched


def test_here_a_signal_ends_the_run_saved_and_the_same_command_goes_on(launch, tmp_path: Path):
    run = tmp_path / "run"
    command = launch()
    command.wait_until(lambda: len(numbers_of(run)) >= 3)
    command.send(signal.SIGTERM)
    assert command.exit_code() == TO_BE_CONTINUED, command.output.read_text()
    assert "Stopped by SIGTERM: saving after this step" in command.output.read_text()
    assert launch().exit_code() == 0, command.output.read_text()
    assert numbers_of(run) == [*range(1, 13)]


def test_here_a_killed_rank_is_restarted(launch, tmp_path: Path):
    run = tmp_path / "run"
    command = launch("checkpoint.save_interval=2")
    command.wait_until(lambda: len(numbers_of(run)) >= 5)
    os.kill(process_of_rank(run, 1), signal.SIGKILL)
    assert command.exit_code() == 0, command.output.read_text()
    assert "the connection to another rank was lost: it was killed, or its node is down" in command.output.read_text()
    assert "restart 1 of 3" in command.output.read_text()
    assert sorted({*numbers_of(run)}) == [*range(1, 13)]


def test_here_a_refused_run_is_not_started_again(launch, tmp_path: Path):
    command = launch("data.path=/no/such.jsonl")
    assert command.exit_code() == 1
    assert command.output.read_text().count("/no/such.jsonl") == 1
    assert "restart" not in command.output.read_text()


def test_a_step_that_hangs_ends_the_run_with_the_place(launch, tmp_path: Path):
    run = tmp_path / "run"
    command = launch("hang=4s", "--retries=0")
    command.wait_until(lambda: len(numbers_of(run)) >= 3)
    os.kill(process_of_rank(run, 1), signal.SIGSTOP)  # rank 0 waits for it
    assert command.exit_code() == 1
    said = command.output.read_text()
    assert "has taken more than 4 seconds (rank 0 of 2" in said
    stacks = (run / "logs/rank-0.txt").read_text()
    assert "most recent call first" in stacks and "torch/distributed" in stacks


def test_status_shows_step_checkpoint_and_outcome(launch, tmp_path: Path, capsys):
    assert launch().exit_code() == 0
    assert cli.main(["status", str(tmp_path / "run")]) == 0
    said = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert said["step"].startswith("12, loss ")
    assert said["checkpoint"] == str(tmp_path / "run/checkpoints/iter_0000012")
    assert said["outcome"] == "finished"
