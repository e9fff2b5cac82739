"""`launch --start ft_launcher` with the real nvidia-resiliency-ext: ranks that end or freeze are restarted in place."""

import os
import re
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import slurm
from runs import losses_of, numbers_of, process_of_rank, processes_with, wait_for_step
from warm import warm_python_with

from gpt_oss_vision.recipes.launch.plan import RESILIENCY
from gpt_oss_vision.recipes.launch.stand_in import tree_of

FOLDER = Path(__file__).parents[3] / ".cache" / RESILIENCY.replace("==", "-")
pytestmark = pytest.mark.skipif(not FOLDER.exists(), reason=f"{FOLDER} is not there: run `just resiliency`")

OPTIONS = ("--start", "ft_launcher")
SETTINGS = {"checkpoint.save_interval": 2, "hang": "5s"}
STEPS = 12
TO_BE_CONTINUED = 75


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """An interpreter that has the package, and starts at once."""
    with warm_python_with(FOLDER, tmp_path_factory.mktemp("warm")) as program:
        yield program


HERE = ("--executor=local", "--nodes=1", "--gpus-per-node=2")


def monitors_of(run: Path) -> set[int]:
    """The rank monitors: the processes that a launcher has forked. The variables of a rank name its launcher."""
    found = set()
    for process in processes_with("train", f"out={run}"):
        variables = Path(f"/proc/{process}/environ").read_text()
        if named := re.search(r"_ft_launcher(\d+)_rmon\d+\.socket", variables):
            found |= {each for each in tree_of({int(named[1])}) if os.getsid(each) != each} - {int(named[1])}
    return found


def test_a_killed_rank_and_frozen_ranks_are_restarted_in_place(launch, unbroken, tmp_path: Path):
    run = tmp_path / "run"
    command = launch(*HERE)
    wait_for_step(command, run, 5)
    os.kill(process_of_rank(run, 1), signal.SIGKILL)
    command.wait_until(lambda: "restart 1 of 3 from the newest checkpoint" in command.output.read_text())
    command.wait_until(lambda: numbers_of(run).count(5) == 2 and max(numbers_of(run)) >= 7)
    for rank in (0, 1):
        os.kill(process_of_rank(run, rank), signal.SIGSTOP)  # neither can end itself
    assert command.exit_code() == 0, command.output.read_text()
    said = command.output.read_text()
    assert "the connection to another rank was lost" in said
    assert "Timeout is 10.00 seconds" in said  # of the monitors: twice `hang`
    assert "restart 2 of 3" in said and "restart 3 of 3" not in said
    assert losses_of(run) == pytest.approx(unbroken, abs=1e-5)


def test_a_run_that_is_asked_to_end_is_saved_and_not_restarted(launch, unbroken, tmp_path: Path):
    run = tmp_path / "run"
    command = launch(*HERE)
    wait_for_step(command, run, 3)
    for monitor in monitors_of(run):
        os.kill(monitor, signal.SIGTERM)  # SLURM signals all processes of a step
    command.send(signal.SIGTERM)
    assert command.exit_code() == TO_BE_CONTINUED, command.output.read_text()
    said = command.output.read_text()
    assert said.count("Stopped by SIGTERM: saving after this step") == 2 and "restart" not in said
    assert launch(*HERE).exit_code() == 0, command.output.read_text()
    assert numbers_of(run) == [*range(1, STEPS + 1)]
    assert losses_of(run) == pytest.approx(unbroken, abs=1e-5)


def test_what_the_user_has_to_mend_is_not_restarted(launch):
    command = launch(*HERE, "data.path=/no/such.jsonl")
    assert command.exit_code() == 1
    assert command.output.read_text().count("/no/such.jsonl") == 1
    assert "restart" not in command.output.read_text()


@pytest.mark.skipif(bool(slurm.missing()), reason=f"not installed: {', '.join(slurm.missing())}")
def test_on_two_nodes_ranks_are_restarted_in_place_and_a_signal_requeues(launch, unbroken, tmp_path: Path):
    run = tmp_path / "run"
    with slurm.Cluster(tmp_path / "cluster") as cluster:
        command = launch("--executor=slurm", "--nodes=2", "--gpus-per-node=1")
        wait_for_step(command, run, 5)
        os.kill(process_of_rank(run, 1), signal.SIGKILL)
        command.wait_until(lambda: numbers_of(run).count(5) == 2 and max(numbers_of(run)) >= 6)
        job = int(re.findall(r"Job (\d+) is submitted", command.output.read_text())[0])
        subprocess.run(["scancel", "--signal=USR1", str(job)], check=True)
        assert command.exit_code() == 0, command.output.read_text()
        said = (run / f"launch/job-{job}.txt").read_text()
        assert said.count("restart 1 of 3 from the newest checkpoint") == 1
        assert "Stopped by SIGUSR1: saving" in said and "the job returns to the queue" in said
        assert (cluster.job(job)["JobState"], cluster.job(job)["Restarts"]) == ("COMPLETED", "1")
    assert losses_of(run) == pytest.approx(unbroken, abs=1e-5)
