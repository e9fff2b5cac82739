"""The command `train`: a run that is killed or asked to end goes on by the same command, as if it had not ended."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import forked
import pytest
from runs import steps_of, wait_for_step

import gpt_oss_vision
from gpt_oss_vision.bridge.mcore import cpu
from gpt_oss_vision.cli import main

STEPS = 12
SMALL = {
    "train.train_iters": STEPS,
    "train.global_batch_size": 8,
    "train.micro_batch_size": 8,
    "logger.log_interval": 1,
    "validation.eval_iters": 0,
    "checkpoint.save_interval": 3,
}
TO_BE_CONTINUED = 75


@pytest.fixture(scope="module", autouse=True)
def _warm():
    gpt_oss_vision.register()
    from gpt_oss_vision.recipes import tiny  # noqa: F401 - so that forks need not import it
    from gpt_oss_vision.recipes.training import run  # noqa: F401


@pytest.fixture(scope="module")
def arguments(digits: Path) -> Callable[..., tuple[str, ...]]:
    """A function that returns a command line: a run of a few steps on a few rows."""

    def line(out: Path, *settings: str) -> tuple[str, ...]:
        names = [setting.partition("=")[0] for setting in settings]
        defaults = SMALL | {"out": out, "data.folder": digits, "data.path": digits / "few.jsonl"}
        kept = (f"{name}={value}" for name, value in defaults.items() if name not in names)
        return ("train", "gpt_oss_vision_tiny_sft", *kept, *settings)

    return line


def losses(out: Path) -> dict[int, float]:
    """The loss of each step; a step that was computed again must have had the same loss."""
    found: dict[int, float] = {}
    for entry in steps_of(out):
        assert found.setdefault(entry["step"], entry["loss"]) == entry["loss"]
    return found


@pytest.fixture(scope="module")
def unbroken(arguments, tmp_path_factory: pytest.TempPathFactory) -> dict[int, float]:
    out = tmp_path_factory.mktemp("unbroken")
    assert forked.run(*arguments(out / "run"), output=out / "output") == 0
    assert [*losses(out / "run")] == [*range(1, STEPS + 1)]
    return losses(out / "run")


def test_a_run_killed_at_ten_steps_has_the_losses_of_an_unbroken_one(
    arguments, unbroken: dict[int, float], tmp_path: Path
):
    out = tmp_path / "run"
    for number in range(1, 11):
        command = forked.Command(*arguments(out), output=tmp_path / "output")
        wait_for_step(command, out, number)
        command.send(signal.SIGKILL, group=True)
        assert command.exit_code() == -signal.SIGKILL
    assert forked.run(*arguments(out), output=tmp_path / "output") == 0
    assert losses(out) == unbroken


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT], ids=lambda number: number.name)
@pytest.mark.parametrize("group", [False, True], ids=["to the process", "to its group"])
def test_a_signal_ends_the_run_saved(
    arguments, number: signal.Signals, group: bool, unbroken: dict[int, float], tmp_path: Path
):
    out, output = tmp_path / "run", tmp_path / "output"
    workers = ("data.num_workers=2", "data.persistent_workers=true")
    command = forked.Command(*arguments(out, *workers), output=output)
    command.wait_until(lambda: len(steps_of(out)) >= 2)
    command.send(number, group=group)
    assert command.exit_code() == TO_BE_CONTINUED
    assert f"Stopped by {number.name}: saving after this step" in output.read_text()
    assert f"{out} is saved; the same command continues it" in output.read_text()
    last = steps_of(out)[-1]["step"]
    assert (out / f"checkpoints/iter_{last:07d}").is_dir()
    assert forked.run(*arguments(out, *workers), output=output) == 0
    assert f"after step {last}, in" in output.read_text()
    assert [entry["step"] for entry in steps_of(out)] == [*range(1, STEPS + 1)]
    assert losses(out) == unbroken


def test_a_time_limit_ends_the_run_saved(arguments, unbroken: dict[int, float], tmp_path: Path):
    out, output = tmp_path / "run", tmp_path / "output"
    codes = []
    while not codes or codes[-1] == TO_BE_CONTINUED:
        codes.append(forked.run(*arguments(out, "time=4s"), output=output))
        assert len(codes) < 20
    assert codes[-1] == 0 and len(codes) > 1
    assert "Stopped by the time limit" in output.read_text()
    assert losses(out) == unbroken


def test_a_second_interrupt_leaves_at_once(arguments, tmp_path: Path):
    out, output = tmp_path / "run", tmp_path / "output"
    long_step = ("train.global_batch_size=4096", "train.micro_batch_size=64")
    command = forked.Command(*arguments(out, *long_step), output=output)
    log = out / "logs/rank-0.txt"
    command.wait_until(lambda: log.exists() and "Starting training loop" in log.read_text())
    command.send(signal.SIGINT)
    command.wait_until(lambda: "Ctrl-C once more leaves at once" in output.read_text())
    time.sleep(1.2)  # what comes sooner belongs to the same Ctrl-C
    command.send(signal.SIGINT)
    assert command.exit_code() == 128 + signal.SIGINT
    assert not steps_of(out)


def test_a_finished_run_says_so(arguments, tmp_path: Path):
    out, output = tmp_path / "run", tmp_path / "output"
    assert forked.run(*arguments(out, "train.train_iters=2"), output=output) == 0
    assert forked.run(*arguments(out, "train.train_iters=2"), output=output) == 0
    assert "sft is finished: 2 steps are in" in output.read_text()
    assert "train longer with train.train_iters=N" in output.read_text()
    assert len(steps_of(out)) == 2
    assert "other settings" not in output.read_text()
    changed = arguments(out, "train.train_iters=1", "optimizer.lr=1e-5")
    assert forked.run(*changed, "--dry-run", output=output) == 0
    assert "starts        after step 2; optimizer.lr was 0.003 and is 1e-05" in output.read_text()
    assert forked.run(*changed, output=output) == 0
    assert "those of now have no effect: optimizer.lr was 0.003 and is 1e-05" in output.read_text()
    for option in ((), ("--dry-run",)):
        assert forked.run(*arguments(out, "train.train_iters=1", "rng.seed=7"), *option, output=output) == 1
        assert "cannot be continued, as rng.seed was 1 and is 7" in output.read_text()
    assert len(steps_of(out)) == 2


def test_weights_that_a_run_has_not_started_from_are_named(arguments, weights: Path, tmp_path: Path):
    out, output = tmp_path / "run", tmp_path / "output"
    assert forked.run(*arguments(out, "train.train_iters=1"), output=output) == 0
    assert forked.run(*arguments(out, "train.train_iters=2", f"weights={weights}"), output=output) == 0
    assert f"weights={weights} are not read, as the run continues its own; it started from random" in output.read_text()


LENGTHS = {"epochs": "train.epochs=2", "tokens": f"train.tokens={2 * 60 * 32}"}


@pytest.mark.parametrize("length", LENGTHS.values(), ids=LENGTHS)
def test_a_length_in_epochs_or_tokens_counts_what_was_read_with_another_batch(length: str, arguments, tmp_path: Path):
    out, output = tmp_path / "run", tmp_path / "output"
    small = ("train.micro_batch_size=10", "train.global_batch_size=10")
    assert forked.run(*arguments(out, "train.train_iters=6", *small), output=output) == 0  # 60 rows, an epoch
    large = [
        setting
        for setting in arguments(out, length, "train.micro_batch_size=10", "train.global_batch_size=20")
        if not setting.startswith("train.train_iters")
    ]
    assert forked.run(*large, "--dry-run", output=output) == 0
    assert "steps         9 of 20 rows" in output.read_text()
    assert forked.run(*large, output=output) == 0
    assert [*losses(out)] == [*range(1, 10)]
    rates = [entry["learning_rate"] for entry in steps_of(out)]
    assert rates[6] > rates[7] > rates[8] == pytest.approx(3e-5, rel=0.5)  # a hundredth of the highest
    output.unlink()
    assert forked.run(*large, output=output) == 0
    assert "sft is finished: 9 steps are in" in output.read_text()


def test_a_run_goes_on_from_a_step_that_is_named(arguments, tmp_path: Path):
    out, output = tmp_path / "run", tmp_path / "output"
    assert forked.run(*arguments(out, "train.train_iters=4"), output=output) == 0
    assert forked.run(*arguments(out, "train.train_iters=4", "checkpoint.ckpt_step=3"), output=output) == 0
    assert "Training sft to step 4, after step 3" in output.read_text()
    assert [entry["step"] for entry in steps_of(out)] == [1, 2, 3, 4, 4]
    assert losses(out)
    assert forked.run(*arguments(out, "train.train_iters=4", "checkpoint.ckpt_step=2"), output=output) == 1
    assert "checkpoint.ckpt_step=2:" in output.read_text() and "has no complete checkpoint" in output.read_text()


def test_a_run_is_not_continued_with_other_usable_rows(arguments, digits: Path, tmp_path: Path):
    out, output = tmp_path / "run", tmp_path / "output"
    folder = shutil.copytree(digits, tmp_path / "digits")
    data = (f"data.path={folder}/few.jsonl", "data.max_skipped=0.1")
    image = folder / re.findall(r'images/[^"]+', (folder / "few.jsonl").read_text())[0]
    assert forked.run(*arguments(out, *data, "train.train_iters=2"), output=output) == 0
    image.rename(folder / "elsewhere.png")
    again = arguments(out, *data, "train.train_iters=3")
    for option in ((), ("--dry-run",)):
        output.unlink()
        assert forked.run(*again, *option, output=output) == 1
        assert "60 rows of few.jsonl were usable when the checkpoint was saved, and now 59 are" in output.read_text()
    (folder / "elsewhere.png").rename(image)
    assert forked.run(*again, output=output) == 0
    assert [*losses(out)] == [1, 2, 3]
    image.rename(folder / "elsewhere.png")
    config = out / "checkpoints/iter_0000003/run_config.yaml"  # as it was before usable rows were saved
    config.write_text(re.sub(r"\n  usable_rows:\n  - .*", "", config.read_text()))
    assert forked.run(*arguments(out, *data, "train.train_iters=4"), output=output) == 0


def test_a_folder_in_use_is_refused(arguments, tmp_path: Path):
    out, output = tmp_path / "run", tmp_path / "output"
    command = forked.Command(*arguments(out), output=output)
    command.wait_until(lambda: len(steps_of(out)) >= 1)
    assert forked.run(*arguments(out), output=tmp_path / "second") == 1
    command.send(signal.SIGKILL, group=True)
    command.exit_code()
    assert f"{out} is in use by process {command.process} on" in (tmp_path / "second").read_text()


LAYOUTS = {
    "EP2·DP2": ("model.expert_model_parallel_size=2",),
    "TP2·PP2": ("model.tensor_model_parallel_size=2", "model.pipeline_model_parallel_size=2"),
}
FEW = ("train.train_iters=4", "train.micro_batch_size=2")


@pytest.fixture(scope="module")
def weights(arguments, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Megatron checkpoint: Megatron's random weights depend on the layout."""
    out = tmp_path_factory.mktemp("weights") / "run"
    assert forked.run(*arguments(out, "train.train_iters=1"), output=out.with_name("output")) == 0
    return out / "checkpoints"


@pytest.fixture(scope="module")
def on_one_rank(arguments, weights: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, float]:
    out = tmp_path_factory.mktemp("one") / "run"
    assert forked.run(*arguments(out, f"weights={weights}", *FEW), output=out.with_name("output")) == 0
    return losses(out)


@pytest.mark.parametrize("sizes", LAYOUTS.values(), ids=LAYOUTS)
def test_four_ranks_have_the_losses_of_one(sizes, arguments, weights: Path, on_one_rank: dict, tmp_path: Path):
    line = arguments(tmp_path / "run", f"weights={weights}", *FEW, *sizes)
    assert cpu.run_ranks(4, main, line, timeout=240) == [0] * 4
    assert losses(tmp_path / "run") == pytest.approx(on_one_rank, rel=1e-5)


@pytest.mark.slow
def test_torchrun_runs_two_stages_with_the_losses_of_one_rank(
    arguments, weights: Path, on_one_rank: dict, tmp_path: Path
):
    line = arguments(tmp_path / "run", f"weights={weights}", *FEW, "model.expert_model_parallel_size=2")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "gpt_oss_vision.cli", line[0], "gpt_oss_vision_tiny_sft,gpt_oss_vision_tiny_align"]
    done = subprocess.run([*command, *line[2:]], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert losses(tmp_path / "run/sft") == pytest.approx(on_one_rank, rel=1e-5)
    assert f"Training align to step 4, from {tmp_path}/run/sft/checkpoints" in done.stdout
    assert [*losses(tmp_path / "run/align")] == [1, 2, 3, 4]


def test_tasks_of_srun_are_ranks(arguments, weights: Path, on_one_rank: dict, tmp_path: Path):
    line = arguments(tmp_path / "run", f"weights={weights}", *FEW, "model.tensor_model_parallel_size=2")
    job = {"SLURM_JOB_ID": "4242", "SLURM_NODELIST": "localhost", "SLURM_NTASKS": "2", "SLURM_STEP_ID": "0"}
    job |= {"SLURM_STEP_NUM_TASKS": "2"}
    tasks = [
        forked.Command(
            *line,
            output=tmp_path / f"output_{task}",
            environment=job | {"SLURM_PROCID": str(task), "SLURM_LOCALID": str(task)},
        )
        for task in range(2)
    ]
    assert [task.exit_code() for task in tasks] == [0, 0]
    assert losses(tmp_path / "run") == pytest.approx(on_one_rank, rel=1e-5)


def fail_on_one_rank(rank: int, line: tuple[str, ...]) -> int:
    """Run the command; on one rank the disk is full in the second step."""
    from gpt_oss_vision.recipes.training.log import TrainingLog

    if int(os.environ["RANK"]) == rank:
        TrainingLog.on_train_step_end = _no_space
    return main(line)


def _no_space(log: object, context: object) -> None:
    raise OSError(28, "No space left on device", "somewhere")


def test_the_rank_that_fails_first_speaks_for_all(arguments, tmp_path: Path, capfd: pytest.CaptureFixture):
    layout = ("model.tensor_model_parallel_size=2",)
    with pytest.raises(RuntimeError, match=r"sys\.exit\(1\)"):  # of rank 0, which waits for the other
        cpu.run_ranks(2, fail_on_one_rank, 1, arguments(tmp_path / "run", *layout), timeout=120)
    said = capfd.readouterr().err
    assert said.count("gpt-oss-vision: ") == 1
    assert f"No space left on the disk of {tmp_path}/run/checkpoints" in said and "(on rank 1 of 2, " in said
