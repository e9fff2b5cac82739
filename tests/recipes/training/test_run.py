"""The command `train`: a run that is killed or asked to end goes on by the same command, as if it had not ended."""

import json
import os
import signal
import time
from pathlib import Path

import forked
import pytest

import gpt_oss_vision
from gpt_oss_vision.bridge.mcore import cpu
from gpt_oss_vision.cli import main

STEPS = 12
SMALL = ("train.global_batch_size=8", "train.micro_batch_size=8", "logger.log_interval=1", "validation.eval_iters=0")
TO_BE_CONTINUED = 75


@pytest.fixture(scope="module", autouse=True)
def _warm():
    gpt_oss_vision.register()
    from gpt_oss_vision.recipes import tiny  # noqa: F401 - so that forks need not import it
    from gpt_oss_vision.recipes.training import run  # noqa: F401


def arguments(out: Path, *settings: str, name: str = "gpt_oss_vision_tiny_sft") -> tuple[str, ...]:
    length = () if any(setting.startswith("train.") for setting in settings) else (f"train.train_iters={STEPS}",)
    return ("train", name, f"out={out}", *SMALL, "checkpoint.save_interval=3", *length, *settings)


def steps(out: Path) -> list[dict]:
    """The steps in the order in which they were written."""
    file = out / "metrics.jsonl"
    lines = file.read_text().splitlines() if file.exists() else []
    return [entry for entry in map(json.loads, lines) if "loss" in entry]


def losses(out: Path) -> dict[int, float]:
    """The loss of each step; a step that was computed again must have had the same loss."""
    found: dict[int, float] = {}
    for entry in steps(out):
        assert found.setdefault(entry["step"], entry["loss"]) == entry["loss"]
    return found


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> dict[int, float]:
    out = tmp_path_factory.mktemp("unbroken")
    assert forked.run(*arguments(out / "run"), output=out / "output") == 0
    assert [*losses(out / "run")] == [*range(1, STEPS + 1)]
    return losses(out / "run")


def test_a_run_killed_at_ten_steps_has_the_losses_of_an_unbroken_one(unbroken: dict[int, float], tmp_path: Path):
    out = tmp_path / "run"
    for number in range(1, 11):
        command = forked.Command(*arguments(out), output=tmp_path / "output")
        command.wait_until(lambda number=number: any(entry["step"] >= number for entry in steps(out)))
        command.send(signal.SIGKILL, group=True)
        assert command.exit_code() == -signal.SIGKILL
    assert forked.run(*arguments(out), output=tmp_path / "output") == 0
    assert losses(out) == unbroken


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT], ids=lambda number: number.name)
@pytest.mark.parametrize("group", [False, True], ids=["to the process", "to its group"])
def test_a_signal_ends_the_run_saved(number: signal.Signals, group: bool, unbroken: dict[int, float], tmp_path: Path):
    out, output = tmp_path / "run", tmp_path / "output"
    workers = ("data.num_workers=2", "data.persistent_workers=true")
    command = forked.Command(*arguments(out, *workers), output=output)
    command.wait_until(lambda: len(steps(out)) >= 2)
    command.send(number, group=group)
    assert command.exit_code() == TO_BE_CONTINUED
    assert f"Stopped by {number.name}: saving after this step" in output.read_text()
    assert f"{out} is saved; the same command continues it" in output.read_text()
    last = steps(out)[-1]["step"]
    assert (out / f"checkpoints/iter_{last:07d}").is_dir()
    assert forked.run(*arguments(out, *workers), output=output) == 0
    assert f"after step {last}, in" in output.read_text()
    assert [entry["step"] for entry in steps(out)] == [*range(1, STEPS + 1)]
    assert losses(out) == unbroken


def test_a_time_limit_ends_the_run_saved(unbroken: dict[int, float], tmp_path: Path):
    out, output = tmp_path / "run", tmp_path / "output"
    codes = []
    while not codes or codes[-1] == TO_BE_CONTINUED:
        codes.append(forked.run(*arguments(out, "time=4s"), output=output))
        assert len(codes) < 20
    assert codes[-1] == 0 and len(codes) > 1
    assert "Stopped by the time limit" in output.read_text()
    assert losses(out) == unbroken


def test_a_second_interrupt_leaves_at_once(tmp_path: Path):
    out = tmp_path / "run"
    command = forked.Command(*arguments(out, "train.global_batch_size=512"), output=tmp_path / "output")
    command.wait_until(lambda: "Training sft" in (tmp_path / "output").read_text() and (out / "checkpoints").exists())
    time.sleep(3)
    command.send(signal.SIGINT)
    time.sleep(1.2)
    command.send(signal.SIGINT)
    assert command.exit_code() in (128 + signal.SIGINT, TO_BE_CONTINUED)


def test_a_finished_run_says_so(unbroken: dict[int, float], tmp_path: Path):
    out, output = tmp_path / "run", tmp_path / "output"
    assert forked.run(*arguments(out, "train.train_iters=2"), output=output) == 0
    assert forked.run(*arguments(out, "train.train_iters=2"), output=output) == 0
    assert "sft is finished: 2 steps are in" in output.read_text()
    assert "train longer with train.train_iters=N" in output.read_text()
    assert len(steps(out)) == 2


def test_a_folder_in_use_is_refused(tmp_path: Path):
    out, output = tmp_path / "run", tmp_path / "output"
    command = forked.Command(*arguments(out), output=output)
    command.wait_until(lambda: len(steps(out)) >= 1)
    assert forked.run(*arguments(out), output=tmp_path / "second") == 1
    command.send(signal.SIGKILL, group=True)
    command.exit_code()
    assert f"{out} is in use by process {command.process} on" in (tmp_path / "second").read_text()


@pytest.mark.parametrize(
    "sizes",
    [
        ("model.expert_model_parallel_size=2",),
        ("model.tensor_model_parallel_size=2", "model.pipeline_model_parallel_size=2"),
    ],
    ids=["EP2·DP2", "TP2·PP2"],
)
def test_four_ranks_have_the_losses_of_one(sizes: tuple[str, ...], tmp_path: Path):
    settings = ("train.micro_batch_size=2", f"train.train_iters={STEPS}")
    for world, folder, layout in ((1, "one", ()), (4, "four", sizes)):
        codes = cpu.run_ranks(world, main, arguments(tmp_path / folder, *settings, *layout))
        assert codes == [0] * world
    assert losses(tmp_path / "four") == pytest.approx(losses(tmp_path / "one"), rel=1e-5)


def fail_on_one_rank(rank: int, line: tuple[str, ...]) -> int:
    """Run the command; on one rank the disk refuses a folder."""
    from gpt_oss_vision.recipes.training import train

    if int(os.environ["RANK"]) == rank:
        train.cpu.adapt_config_for_cpu = _no_space  # the step before Megatron-Bridge's loop
    return main(line)


def _no_space(config: object) -> None:
    raise OSError(28, "No space left on device", "somewhere")


def test_the_rank_that_fails_first_speaks_for_all(tmp_path: Path, capfd: pytest.CaptureFixture):
    layout = ("model.tensor_model_parallel_size=2", f"train.train_iters={STEPS}")
    with pytest.raises(RuntimeError):
        codes = cpu.run_ranks(2, fail_on_one_rank, 1, arguments(tmp_path / "run", *layout))
        raise RuntimeError(str(codes))
    said = capfd.readouterr().err
    assert said.count("gpt-oss-vision: ") == 1
    assert "No space left on device: somewhere (on rank 1 of 2, " in said
