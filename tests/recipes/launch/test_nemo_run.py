"""NeMo-Run runs our script: submitted to a real SLURM, as a process of this machine, and from `nemorun`."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import slurm

ROOT = Path(__file__).parents[3]

SUBMIT = """
import sys
from pathlib import Path
import nemo_run as run
from gpt_oss_vision.recipes.launch.nemo_run import gpt_oss_vision_site, script, slurm_executor
import gpt_oss_vision.bridge.plugin
from megatron.bridge.recipes.run_plugins import PreemptionPlugin

folder = Path(sys.argv[1])
executor = slurm_executor(folder / "site.yaml", nodes=2, allow_uncommitted=True)
settings = ("env_vars.A=two 'words' a$ b", "data.path=rows.jsonl")
task = script("gpt_oss_vision_tiny_sft", *settings, executor=executor, python=str(folder / "python"))
with run.Experiment("submitted") as experiment:
    experiment.add(task, executor=executor, name="train", plugins=[PreemptionPlugin(preempt_time=90)])
    experiment.run(detach=False, tail_logs=False)
try:
    print("factory:", gpt_oss_vision_site().nodes)
except RuntimeError as error:  # in a working tree with changes
    print("factory:", error)
print("status:", [each["status"] for each in experiment.status(return_dict=True).values()])
"""


def python(code: str, *arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"NEMORUN_HOME": str(folder / "home"), "COLUMNS": "200"}
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done


@pytest.mark.skipif(bool(slurm.missing(accounting=True)), reason=f"not installed: {slurm.missing(accounting=True)}")
def test_slurm_runs_the_script_and_its_status_comes_back(tmp_path: Path):
    (tmp_path / "site.yaml").write_text("account: team\npartition: normal\ntime: 0:10:00\nseconds_to_save: 120\n")
    # One write per task: both tasks write to one log.
    (tmp_path / "python").write_text('#!/bin/sh\nprintf "%s\\n" "$(printf "[%s]" "$@")"\n')
    (tmp_path / "python").chmod(0o755)
    with slurm.Cluster(tmp_path / "cluster", accounting=True) as cluster:
        done = python(SUBMIT, str(tmp_path), folder=tmp_path)
        job = cluster.job(1)
    assert "SUCCEEDED" in done.stdout
    assert re.search("factory: (1|the package in .* has changes that are not committed)", done.stdout)
    assert (job["JobState"], job["NumNodes"]) == ("COMPLETED", "2")
    (script,) = tmp_path.glob("home/experiments/submitted/*/*_sbatch.sh")
    text = script.read_text()
    assert "#SBATCH --signal=TERM@90" in text  # by Megatron-Bridge's plug-in
    assert text.rindex("--wait=0") > text.rindex("--wait=60")
    (log,) = tmp_path.glob("home/experiments/submitted/*/train/log-*.out")
    commands = [re.findall(r"\[(.*?)\]", line) for line in log.read_text().splitlines() if line.startswith("[")]
    expected = [
        *("-m", "gpt_oss_vision.cli", "train", "gpt_oss_vision_tiny_sft", "env_vars.A=two 'words' a$ b"),
        *(f"data.path={tmp_path}/rows.jsonl", f"out={tmp_path}/runs/gpt_oss_vision_tiny_sft"),
        *("train.exit_signal_handler=True", "train.exit_signal_handler_for_dataloader=False"),
    ]
    assert commands == [expected, expected]


def test_changes_that_are_not_committed_are_named(tmp_path: Path):
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    (tmp_path / "model.py").write_text("a = 1\n")
    for command in (["init", "--quiet"], ["add", "."], ["commit", "--quiet", "-m", "a"]):
        subprocess.run([*git, *command], check=True)
    code = (
        "import sys; from pathlib import Path; from gpt_oss_vision.recipes.launch.nemo_run import refuse_uncommitted\n"
        "folder = Path(sys.argv[1]); refuse_uncommitted(folder); (folder / 'model.py').write_text('a = 2')\n"
        "try: refuse_uncommitted(folder)\n"
        "except ValueError as error: print(error)\n"
    )
    assert "has changes that are not committed (model.py)" in python(code, str(tmp_path), folder=tmp_path).stdout


def test_the_example_trains_on_this_machine(tmp_path: Path):
    steps = ("train.train_iters=3", "validation.eval_iters=0", "logger.log_interval=1", "out=run")
    command = [sys.executable, str(ROOT / "examples/nemo_run/launch.py"), "--local", *steps]
    environment = os.environ | {"NEMORUN_HOME": str(tmp_path / "home")}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    for stage in ("align", "sft"):
        lines = (tmp_path / "run" / stage / "metrics.jsonl").read_text().splitlines()
        assert [entry["step"] for entry in map(json.loads, lines) if "loss" in entry] == [1, 2, 3]


def test_nemorun_dry_runs_our_entry_point(tmp_path: Path):
    command = [str(Path(sys.executable).with_name("nemorun")), "gpt_oss_vision", "train", "--dryrun"]
    settings = ("recipe=gpt_oss_vision_tiny_sft", "settings=['train.train_iters=3']")
    environment = os.environ | {"NEMORUN_HOME": str(tmp_path / "home"), "COLUMNS": "200"}
    done = subprocess.run(
        [*command, *settings], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    for words in ("Dry run for train", "'gpt_oss_vision_tiny_sft'", "['train.train_iters=3']"):
        assert words in done.stdout
