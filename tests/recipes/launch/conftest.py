"""What the tests of launchers share: an interpreter that starts at once, and a run of twelve small steps to launch."""

from collections.abc import Callable, Iterator
from pathlib import Path

import forked
import pytest
from runs import losses_of
from warm import WarmPython, import_all

STEPS = 12
SMALL = {
    "train.train_iters": STEPS,
    "train.global_batch_size": 8,
    "train.micro_batch_size": 2,
    "logger.log_interval": 1,
    "validation.eval_iters": 0,
    "checkpoint.save_interval": 4,
}


@pytest.fixture(scope="package")
def python(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A program that takes the place of `python`: its processes are forks of this one."""
    import_all()
    with WarmPython(tmp_path_factory.mktemp("warm")) as warm:
        yield warm.python


@pytest.fixture(scope="module")
def arguments(digits: Path, request: pytest.FixtureRequest) -> tuple[str, ...]:
    """Recipe and settings of a run of a few steps on a few rows; a test file may have other `SETTINGS`."""
    settings = SMALL | getattr(request.module, "SETTINGS", {})
    settings |= {"data.folder": digits, "data.path": digits / "few.jsonl"}
    return ("gpt_oss_vision_tiny_sft", *(f"{name}={value}" for name, value in settings.items()))


@pytest.fixture(scope="module")
def unbroken(arguments: tuple[str, ...], python: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, float]:
    """The losses of one rank that nothing ends early."""
    out = tmp_path_factory.mktemp("unbroken")
    assert forked.run("train", *arguments, f"out={out / 'run'}", output=out / "output") == 0
    return losses_of(out / "run")


@pytest.fixture
def launch(
    arguments: tuple[str, ...], python: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> Callable[..., forked.Command]:
    """A function that launches the run with the `OPTIONS` of the test file, and with others."""

    def launched(*options: str, output: str = "output") -> forked.Command:
        given = {option.partition("=")[0] for option in options}
        settings = [*(each for each in arguments if each.partition("=")[0] not in given), f"out={tmp_path / 'run'}"]
        always = ("--python", str(python), *request.module.OPTIONS)
        return forked.Command("launch", *settings, *always, *options, output=tmp_path / output)

    return launched
