"""A run that is continued with other settings: applied and named, or refused."""

import re
from pathlib import Path
from typing import Any

import pytest

from gpt_oss_vision.bridge.mcore import cpu
from gpt_oss_vision.bridge.mcore.param_groups import LearningRateFactors
from gpt_oss_vision.errors import UserError
from gpt_oss_vision.recipes.data.digits import write_digits
from gpt_oss_vision.recipes.quickstart.run import training_config
from gpt_oss_vision.recipes.quickstart.settings import Settings
from gpt_oss_vision.recipes.training.changes import Change
from gpt_oss_vision.recipes.training.log import Callback, CallbackContext
from gpt_oss_vision.recipes.training.train import train

SAVED = 2


class Rates(Callback):
    """Records the learning rate of each group in every step, as it is used."""

    def __init__(self) -> None:
        self.found: list[dict[str, float]] = []

    def on_train_step_start(self, context: CallbackContext) -> None:
        groups = [group for group in context.optimizer.param_groups if group["params"]]
        self.found.append({f"{group.get('max_lr')} {group['wd_mult']}": group["lr"] for group in groups})


def run(
    out: Path, start: Path, steps: int, settings: dict[str, Any], factors: dict[str, float] | None = None
) -> list[dict[str, float]]:
    """Train to a step in a folder, from its newest checkpoint if it has one; the learning rates of each step."""
    config = training_config(start, write_digits(start / "digits", 0), Settings(steps=4, batch_size=8))
    config.train.train_iters, config.scheduler.lr_decay_iters = steps, 100
    config.optimizer_config_override_provider = LearningRateFactors(**factors or {})
    config.checkpoint.save = config.checkpoint.load = str(out)
    for name, value in settings.items():
        section, field = name.split(".")
        setattr(getattr(config, section), field, value)
    rates = Rates()
    train(config, callbacks=[rates])
    return rates.found


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from gpt_oss_vision.conversion.importing import import_checkpoint
    from gpt_oss_vision.recipes.quickstart.run import write_checkpoint

    folder = tmp_path_factory.mktemp("start")
    write_checkpoint(folder / "hf_start", Settings())
    import_checkpoint(folder / "hf_start", folder / "megatron_start")
    return folder


@pytest.mark.parametrize("factors", [{}, {"vision_projection": 10.0, "vision_model": 0.1}], ids=["no factors", "two"])
def test_another_learning_rate_is_applied_to_every_group_and_said(factors: dict, start: Path, tmp_path: Path, capfd):
    cpu.run_ranks(1, run, tmp_path / "changed", start, SAVED, {}, factors)
    settings = {"optimizer.lr": 0.25, "optimizer.min_lr": 0.125}
    (changed,) = cpu.run_ranks(1, run, tmp_path / "changed", start, 4, settings, factors)
    (whole,) = cpu.run_ranks(1, run, tmp_path / "whole", start, 4, settings, factors)
    assert changed == whole[SAVED:]
    assert max(whole[-1].values()) > 0.1
    said = capfd.readouterr().out
    assert "Continuing with other settings: optimizer.lr was 0.003 and is 0.25; optimizer.min_lr was" in said


def test_factors_that_would_regroup_the_parameters_are_refused(start: Path, tmp_path: Path):
    cpu.run_ranks(1, run, tmp_path, start, SAVED, {}, {"vision_projection": 10.0, "vision_model": 10.0})
    with pytest.raises(UserError, match="gives the optimizer other groups of parameters"):
        cpu.run_ranks(1, run, tmp_path, start, 4, {}, {"vision_projection": 10.0, "vision_model": 5.0})


REFUSED = {"optimizer.adam_beta1": 0.5, "dataset.seed": 7, "model.freeze_vision_model": True, "rng.seed": 3}


@pytest.mark.parametrize(("name", "value"), REFUSED.items(), ids=REFUSED)
def test_settings_that_make_it_another_run_are_refused(name: str, value: Any, start: Path, first: Path):
    with pytest.raises(UserError, match=rf"cannot be continued, as {name} was .* and is {value}"):
        cpu.run_ranks(1, run, first, start, 4, {name: value})


@pytest.fixture(scope="module")
def first(start: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("first")
    cpu.run_ranks(1, run, out, start, SAVED, {})
    return out


def test_a_change_says_both_values():
    assert str(Change("optimizer.lr", 0.1, 0.2)) == "optimizer.lr was 0.1 and is 0.2"


@pytest.mark.parametrize(
    ("before", "now", "is_refused"),
    [("a", "b", True), ("a b", "a", True), ("a b", "b a", True), ("a", "a b", False), ("a b", "a b c", False)],
)
def test_sources_may_be_added_behind_the_others(before: str, now: str, is_refused: bool):
    assert Change("dataset.fingerprint", before, now).is_refused is is_refused


def test_a_source_that_is_added_says_which_samples_are_read_again(start: Path, tmp_path: Path, capfd):
    digits = write_digits(start / "digits", 0)
    sources = [{"path": str(path), "weight": 1.0} for path in (digits.train_path, digits.test_path)]
    mixed = {"dataset.path": None, "dataset.sources": sources}
    cpu.run_ranks(1, run, tmp_path, start, SAVED, {})
    cpu.run_ranks(1, run, tmp_path, start, 3, mixed)
    said = capfd.readouterr().out
    # 2 steps of 8 samples; with the other half of the samples from another source it would have read 8 of the first.
    found = re.search(r"the last (\d+) samples of train.jsonl are read again; test.jsonl is new, .* sample (\d+)", said)
    assert found is not None
    again, new = map(int, found.groups())
    assert 6 <= again <= 10 and again == new
