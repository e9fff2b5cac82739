"""`launch --executor slurm` on a real SLURM of two nodes: a job that ends early goes on as if it had not ended."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import forked
import pytest
import slurm
import torch
from runs import losses_of, numbers_of, process_of_rank, processes_with, steps_of, wait_for_step

from gpt_oss_vision import GPTOSSVisionForCausalLM, GPTOSSVisionProcessor, cli
from gpt_oss_vision.bridge.mcore import cpu
from gpt_oss_vision.recipes.data.tiny import tiny_config

pytestmark = pytest.mark.skipif(bool(slurm.missing()), reason=f"not installed: {', '.join(slurm.missing())}")

OPTIONS = ("--executor", "slurm", "--nodes", "2", "--gpus-per-node", "1")
STEPS = 12
TO_BE_CONTINUED = 75


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[slurm.Cluster]:
    with slurm.Cluster(tmp_path_factory.mktemp("slurm") / "cluster") as running:
        yield running


@pytest.fixture(params=["torchrun", "srun"])
def start(request: pytest.FixtureRequest) -> str:
    return request.param


def job_of(run: Path) -> int:
    return json.loads((run / "launch/job.json").read_text())["job"]


def output_of(run: Path) -> str:
    return (run / f"launch/job-{job_of(run)}.txt").read_text()


def is_whole(run: Path, unbroken: dict[int, float]) -> bool:
    return losses_of(run) == pytest.approx(unbroken, abs=1e-5)


def test_two_nodes_train_as_one_rank(start: str, launch, cluster, unbroken, tmp_path: Path):
    run = tmp_path / "run"
    command = launch("--start", start, "--gpus-per-node=2")
    assert command.exit_code() == 0, command.output.read_text()
    assert cluster.job(job_of(run))["JobState"] == "COMPLETED"
    assert is_whole(run, unbroken)
    assert [json.loads(line)["ranks"] for line in (run / "sessions.jsonl").read_text().splitlines()] == [4]
    assert f"step {STEPS} of {STEPS}" in command.output.read_text()


@pytest.mark.parametrize(("start", "name"), [("torchrun", "TERM"), ("srun", "USR1")])
def test_a_run_that_receives_a_signal_is_requeued(start: str, name: str, launch, cluster, unbroken, tmp_path: Path):
    run = tmp_path / "run"
    command = launch("--start", start)
    wait_for_step(command, run, 5)
    subprocess.run(["scancel", f"--signal={name}", str(job_of(run))], check=True)
    assert command.exit_code() == 0, command.output.read_text()
    assert f"Stopped by SIG{name}: saving" in output_of(run)
    assert cluster.job(job_of(run))["Restarts"] == "1"
    assert numbers_of(run) == [*range(1, STEPS + 1)]
    assert is_whole(run, unbroken)


PREEMPT = ["sbatch", "--partition=urgent", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=true"]


@pytest.mark.parametrize(
    ("start", "command_of"),
    [("srun", lambda job: ["scontrol", "requeue", str(job)]), ("torchrun", lambda job: PREEMPT)],
    ids=["requeued", "preempted"],
)
def test_a_job_that_slurm_requeues_goes_on(start: str, command_of, launch, cluster, unbroken, tmp_path: Path):
    run = tmp_path / "run"
    command = launch("--start", start)
    wait_for_step(command, run, 8)
    subprocess.run(command_of(job_of(run)), check=True)
    assert command.exit_code() == 0, command.output.read_text()
    assert cluster.job(job_of(run))["Restarts"] == "1"
    assert is_whole(run, unbroken)


def test_a_cancelled_job_is_saved_and_stays_cancelled(launch, cluster, unbroken, tmp_path: Path):
    run = tmp_path / "run"
    command = launch("--start", "srun")
    wait_for_step(command, run, 6)
    second = launch("--detach", output="second")
    assert second.exit_code() == 1
    assert f"has job {job_of(run)}, which is RUNNING" in second.output.read_text()
    assert forked.run("cancel", str(run), output=tmp_path / "cancel") == 0
    assert command.exit_code() != 0
    assert cluster.job(job_of(run))["JobState"] == "CANCELLED"
    assert f"continues with: sbatch {run}/launch/job.sbatch" in output_of(run)
    done = subprocess.run(["sbatch", "--wait", run / "launch/job.sbatch"], stdout=subprocess.PIPE)
    assert done.returncode == 0
    assert numbers_of(run) == [*range(1, STEPS + 1)]
    assert is_whole(run, unbroken)


def test_a_killed_rank_is_restarted_in_the_allocation(start: str, launch, cluster, unbroken, tmp_path: Path):
    run = tmp_path / "run"
    command = launch("--start", start)
    wait_for_step(command, run, 8)
    os.kill(process_of_rank(run, 1), signal.SIGKILL)
    assert command.exit_code() == 0, command.output.read_text()
    assert "restart 1 of 3 from the newest checkpoint" in command.output.read_text()
    assert cluster.job(job_of(run))["Restarts"] == "0"
    assert is_whole(run, unbroken)


def test_the_jobs_of_an_array_continue_one_run(launch, cluster, unbroken, tmp_path: Path):
    run = tmp_path / "run"
    command = launch("--start=srun", "--array=0-1%1", "--requeues=0")
    wait_for_step(command, run, 5)
    subprocess.run(["scancel", "--signal=TERM", f"{job_of(run)}_0"], check=True)
    assert command.exit_code() == 0, command.output.read_text()
    assert "the run is saved, and continues with: sbatch" in command.output.read_text()
    assert numbers_of(run) == [*range(1, STEPS + 1)]
    assert is_whole(run, unbroken)
    assert len([*(run / "launch").glob("job-*.txt")]) == 1


def test_ranks_killed_in_a_save_lose_nothing_older(launch, cluster, unbroken, tmp_path: Path):
    run = tmp_path / "run"
    command = launch("--start=srun", "checkpoint.save_interval=2")
    command.wait_until(lambda: any((run / "checkpoints").glob("iter_0000006*")))
    os.kill(process_of_rank(run, 1), signal.SIGKILL)
    assert command.exit_code() == 0, command.output.read_text()
    assert "restart 1 of 3 from the newest checkpoint" in command.output.read_text()
    assert is_whole(run, unbroken)


@pytest.mark.parametrize(
    ("ended_by", "requeues", "message"),
    [
        (signal.SIGKILL, "0", "restart 1 of 3"),
        (signal.SIGTERM, "1", "the job returns to the queue"),
    ],
    ids=["killed", "signalled"],
)
def test_an_export_that_is_ended_goes_on(
    ended_by: signal.Signals, requeues: str, message: str, launch, cluster, tmp_path: Path
):
    run = tmp_path / "run"
    command = launch("--start=srun", "--export", "--gpus-per-node=1")
    command.wait_until(lambda: processes_with("export", str(run / "checkpoints")))
    for process in processes_with("export", str(run / "checkpoints")):
        os.kill(process, ended_by)
    assert command.exit_code() == 0, command.output.read_text()
    assert message in output_of(run)
    assert cluster.job(job_of(run))["Restarts"] == requeues
    GPTOSSVisionForCausalLM.from_pretrained(run / "hf")
    assert not (run / "hf.partial").exists()


def test_a_job_on_a_lost_node_goes_on(launch, cluster, unbroken, tmp_path: Path):
    run = tmp_path / "run"
    command = launch("--start", "torchrun", "--retries", "0")
    wait_for_step(command, run, 8)
    cluster.kill_node("n2")
    time.sleep(1)
    cluster.start_node("n2")
    assert command.exit_code() == 0, command.output.read_text()
    assert is_whole(run, unbroken)


def test_a_job_is_saved_before_its_time_limit(launch, cluster, tmp_path: Path):
    run = tmp_path / "run"
    command = launch("--start", "srun", "--time=1", "--seconds-to-save=52", "train.train_iters=100000", "--requeues=1")
    assert command.exit_code() == TO_BE_CONTINUED
    job = cluster.job(job_of(run))
    assert (job["JobState"], job["Restarts"], job["ExitCode"]) == ("FAILED", "1", "75:0")
    assert "The job was requeued 1 times and ends here; the run is saved" in command.output.read_text()
    assert numbers_of(run) == [*range(1, len(steps_of(run)) + 1)]


def test_a_failing_rank_fails_the_job_with_its_sentence(start: str, launch, digits: Path, cluster, tmp_path: Path):
    run, copy = tmp_path / "run", tmp_path / "digits"
    shutil.copytree(digits, copy)
    command = launch(
        "--start", start, f"data.path={copy / 'few.jsonl'}", "data.max_skipped=0", "train.train_iters=1000"
    )
    wait_for_step(command, run, 2)
    for image in copy.rglob("*.png"):
        image.unlink()
    began = time.monotonic()
    assert command.exit_code() == 1
    assert time.monotonic() - began < 10
    assert cluster.job(job_of(run))["JobState"] == "FAILED"
    said = [line for line in command.output.read_text().splitlines() if "The run failed: " in line]
    assert len(said) == 1
    assert re.search(r"The run failed: .*\.png.* \(rank [01] of 2, n[12]\)", said[0])


TEXTS = ("two words", "x[1,2]", "a'b\"c", "line\nline", "a$ `id`", "ünï", "%j", "#", "a=b")


def test_settings_arrive_byte_for_byte(start: str, cluster, tmp_path: Path):
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\nprintf "%s\\0" "$@" > "$(dirname "$0")/arguments"\n')
    python.chmod(0o755)
    settings = [f"env_vars.N{number}={text}" for number, text in enumerate(TEXTS)]
    options = ("--executor", "slurm", "--start", start, "--python", str(python), f"out={tmp_path / 'a folder' / 'run'}")
    output = tmp_path / "output"
    assert forked.run("launch", "gpt_oss_vision_tiny_sft", *settings, *options, output=output) == 0, output.read_text()
    assert {setting.encode() for setting in settings} <= {*(tmp_path / "arguments").read_bytes().split(b"\0")}


def toy(script: str, shared: Path, python: Path) -> str:
    """An example as it is, but for its size and its site."""
    for old, new in (
        ("/shared/venv/bin/python", str(python)),
        ("gpt_oss_vision_20b_", "gpt_oss_vision_tiny_"),
        ("/shared", str(shared)),
        (".torchrun 8 ", ".torchrun 2 "),
        ("out=/", "train.train_iters=4 validation.eval_iters=0 out=/"),
        ("--array=0-7", "--array=0-1"),
        ("ACCOUNT", "team"),
        ("PARTITION", "normal"),
        ("--cpus-per-task=32", "--cpus-per-task=2"),
    ):
        script = script.replace(old, new)
    return re.sub(r"#SBATCH --(gpus|exclusive|mem).*\n", "", script)


def test_the_examples_run_at_toy_size(digits: Path, python: Path, cluster: slurm.Cluster, tmp_path: Path):
    shared, here = tmp_path / "shared", tmp_path / "here"
    here.mkdir()
    cpu.run_ranks(1, write_model, shared / "checkpoints/gpt-oss-20b-vision", digits / "processor")
    shutil.copytree(digits, shared / "data")
    for name in ("pretrain", "chats"):
        shutil.copy(digits / "few.jsonl", shared / f"data/{name}.jsonl")
    question = {"messages": [{"role": "user", "content": [{"type": "text", "text": "Which digit?"}]}]}
    for number in (0, 1):
        (shared / f"data/questions-{number}.jsonl").write_text(json.dumps(question) + "\n")
    scripts = {
        file.stem: file.read_text() for file in (Path(slurm.__file__).parents[1] / "examples/slurm").glob("*.sbatch")
    }
    assert {*scripts} == {"convert", "pretrain", "sft", "lora", "answer"}
    for name in ("convert", "pretrain", "sft", "lora", "answer"):
        (here / f"{name}.sbatch").write_text(toy(scripts[name], shared, python))
        done = subprocess.run(["sbatch", "--wait", f"{name}.sbatch"], cwd=here, capture_output=True, text=True)
        assert done.returncode == 0, "".join(file.read_text() for file in here.glob(f"{name}-*.txt"))
    for name in ("pretrain", "sft", "lora"):
        assert len(steps_of(shared / "runs" / name)) == 4
    answers = [json.loads((shared / f"data/answers-{number}.jsonl").read_text()) for number in (0, 1)]
    assert answers[0] == answers[1] and "answer" in answers[0]


def write_model(folder: Path, processor: Path) -> None:
    torch.manual_seed(0)
    GPTOSSVisionForCausalLM(tiny_config()).save_pretrained(folder)
    GPTOSSVisionProcessor.from_pretrained(processor).save_pretrained(folder)


SITES = {
    "all is there": ("partition: normal\ntime: 0:30:00", None),
    "no such partition": ("partition: gpu", "there is no partition gpu; this cluster has normal, urgent"),
    "too long": ("partition: urgent\ntime: 3:00:00", "time 3:00:00 is longer than partition urgent permits, 02:00:00"),
    "no GPUs": ("partition: normal\ngpus_per_node: 8", "nodes of partition normal have 0 GPUs, and gpus_per_node is 8"),
    "no folder": ("runs: /proc/runs", "/proc/runs, the folder of the runs, cannot be written"),
    "no pyxis": ("container: pyxis\ncontainer_image: a", "pyxis is not installed"),
    "no apptainer": ("container: apptainer\ncontainer_image: /a.sif", "apptainer is not on this machine"),
    "no image": ("container: docker\ncontainer_image: /a.tar", "/a.tar, the image, is not there"),
    "no mount": (
        "container: docker\ncontainer_image: a\nmounts: [/a/b]",
        "/a/b, a mount of the container, is not there",
    ),
    "no Python": ("python: /a/python", "/a/python, the Python of the nodes, is not there"),
    "no ft_launcher": (
        f"python: {sys.executable}\nstart: ft_launcher",
        "has no nvidia-resiliency-ext, which `start: ft_launcher` needs: install it, `uv pip install",
    ),
    "another Python": ("python: /usr/bin/false", "/usr/bin/false does not import gpt_oss_vision"),
}


@pytest.mark.parametrize(("text", "problem"), SITES.values(), ids=SITES)
def test_the_doctor_checks_a_site(text: str, problem: str | None, cluster, tmp_path: Path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "site.yaml").write_text(text)
    code = cli.main(["doctor", "--site", "site.yaml"])
    said = capsys.readouterr().out
    assert code == (problem is not None), said
    assert ("yes  jobs at the site of site.yaml" in said) if problem is None else (problem in said)
    assert "gpt_oss_vision_20b_sft_8gpu_h100_bf16, on an H100" in said or "unknown without torch" in said
