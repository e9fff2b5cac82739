"""Megatron-Bridge's own loop on this model: the same losses at every layout as on one rank."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from gpt_oss_vision.bridge.mcore import cpu, upstream
from gpt_oss_vision.errors import UserError
from gpt_oss_vision.recipes.data.digits import write_digits
from gpt_oss_vision.recipes.quickstart.run import fine_tune, training_config
from gpt_oss_vision.recipes.quickstart.settings import Settings
from gpt_oss_vision.recipes.training.log import Callback, CallbackContext
from gpt_oss_vision.recipes.training.train import train

STEPS = 3
LAYOUTS = {
    "TP2": {"tensor_parallel": 2},
    "PP2": {"pipeline_parallel": 2},
    "EP2": {"expert_parallel": 2},
    "TP2·PP2·EP2": {"tensor_parallel": 2, "pipeline_parallel": 2, "expert_parallel": 2},
}


def losses(out: Path, settings: Settings) -> list[float]:
    digits = write_digits(out / "digits", settings.seed)
    return cpu.run_ranks(settings.ranks, fine_tune, out, digits, settings, Console(quiet=True))[-1]


@pytest.fixture(scope="module")
def on_one_rank(start: Path, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    return losses(copy_of(start, tmp_path_factory.mktemp("one")), Settings(steps=STEPS, batch_size=16))


def copy_of(start: Path, out: Path) -> Path:
    """A folder to train in; its inputs, which are only read, are links."""
    for name in ("digits", "hf_start", "megatron_start"):
        (out / name).symlink_to(start / name)
    return out


@pytest.mark.parametrize("sizes", LAYOUTS.values(), ids=LAYOUTS)
def test_the_loop_learns_the_same_at_every_layout(sizes: dict, start: Path, on_one_rank: list[float], tmp_path: Path):
    found = losses(copy_of(start, tmp_path), Settings(steps=STEPS, batch_size=16, **sizes))
    assert len(found) == STEPS
    assert found == pytest.approx(on_one_rank, rel=1e-5)
    assert found[-1] < found[0]


def test_the_same_seed_gives_the_same_losses(start: Path, on_one_rank: list[float], tmp_path: Path):
    assert losses(copy_of(start, tmp_path), Settings(steps=STEPS, batch_size=16)) == on_one_rank


@dataclass
class WatchVisionBias(Callback):
    """Records the dtype of a router's ``vision_bias``, and how far training has moved it."""

    dtype: torch.dtype | None = None
    moved: float = 0.0
    other_dtype: torch.dtype | None = None

    def on_train_step_end(self, context: CallbackContext) -> None:
        parameters = dict(context.model[0].named_parameters())
        (name,) = [name for name in parameters if name.endswith("layers.0.mlp.router.vision_bias")]
        self.dtype, self.moved = parameters[name].dtype, float(parameters[name].detach().abs().max())
        self.other_dtype = parameters[name.replace("vision_bias", "weight")].dtype


def train_in_bf16(out: Path, settings: Settings) -> WatchVisionBias:
    config = training_config(out, write_digits(out / "digits", settings.seed), settings)
    config.mixed_precision = "bf16_mixed"
    watch = WatchVisionBias()
    train(config, callbacks=[watch])
    return watch


def test_in_bf16_the_vision_bias_stays_fp32_and_learns(start: Path, tmp_path: Path):
    settings = Settings(steps=2, batch_size=16, tensor_parallel=2)
    for watch in cpu.run_ranks(2, train_in_bf16, copy_of(start, tmp_path), settings):
        assert (watch.dtype, watch.other_dtype) == (torch.float32, torch.bfloat16)
        assert watch.moved > 0


@dataclass
class WatchWeightDecay(Callback):
    """Records the weight decay of every group of parameters after a step."""

    found: set[float] = field(default_factory=set)

    def on_train_step_end(self, context: CallbackContext) -> None:
        self.found |= {group["weight_decay"] for group in context.optimizer.param_groups}


def weight_decay(out: Path, of_optimizer: float | None, of_scheduler: float | None) -> set[float]:
    config = training_config(out, write_digits(out / "digits", 0), Settings(steps=1, batch_size=8))
    if of_optimizer is not None:
        config.optimizer.weight_decay = of_optimizer
        config.scheduler.start_weight_decay = config.scheduler.end_weight_decay = of_scheduler
    watch = WatchWeightDecay()
    train(config, callbacks=[watch])
    return watch.found


@pytest.mark.parametrize(
    ("of_optimizer", "of_scheduler", "expected"), [(None, None, 0.033), (0.2, None, 0.2), (0.2, 0.2, 0.2)]
)
def test_the_weight_decay_is_the_one_that_is_set(
    of_optimizer: float | None, of_scheduler: float | None, expected: float, start: Path, tmp_path: Path
):
    (found,) = cpu.run_ranks(1, weight_decay, copy_of(start, tmp_path), of_optimizer, of_scheduler)
    assert found == {0.0, expected}  # none for biases and norms


def test_a_weight_decay_without_effect_is_refused(start: Path, tmp_path: Path):
    said = r"optimizer.weight_decay=0.2 has no effect: the scheduler sets scheduler.end_weight_decay=0.1; set both"
    with pytest.raises(UserError, match=said):
        cpu.run_ranks(1, weight_decay, copy_of(start, tmp_path), 0.2, 0.1)


def train_in_bf16_without_our_order(out: Path, settings: Settings) -> None:
    upstream.DistributedOptimizer._build_model_and_main_param_groups = classmethod(upstream._build_groups)
    train_in_bf16(out, settings)


@pytest.mark.upstream
def test_megatron_core_still_mixes_up_optimizer_states_of_two_precisions(start: Path, tmp_path: Path):
    """When this fails, `upstream._build_groups_in_order` can be removed."""
    settings = Settings(steps=2, batch_size=16)
    with pytest.raises(AssertionError):
        cpu.run_ranks(1, train_in_bf16_without_our_order, copy_of(start, tmp_path), settings)


def stage(out: Path, load: Path | None, settings: dict[str, Any]) -> None:
    """Two steps; the settings are those of the configuration, as `section.field`."""
    config = training_config(out, write_digits(out / "digits", 0), Settings(steps=2, batch_size=8))
    for name, value in settings.items():
        section, field = name.split(".")
        setattr(getattr(config, section), field, value)
    config.checkpoint.load, config.checkpoint.save = load and str(load), str(out / "stage")
    train(config)


@pytest.fixture(scope="module")
def first_stage(start: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints of a run that has trained the projector and the tower."""
    out = copy_of(start, tmp_path_factory.mktemp("first"))
    cpu.run_ranks(1, stage, out, None, {"model.freeze_language_model": True})
    return out / "stage"


NEW_STAGES = {
    "other frozen groups": ({}, r"model\.freeze_language_model was True and is False"),
    "another optimizer": (
        {"model.freeze_language_model": True, "optimizer.adam_beta2": 0.5},
        r"optimizer\.adam_beta2 was 0\.95 and is 0\.5",
    ),
    "no optimizer states": ({"checkpoint.load": "import"}, "it has no optimizer states"),
}


@pytest.mark.parametrize(("settings", "said"), NEW_STAGES.values(), ids=NEW_STAGES)
def test_a_new_stage_that_is_started_as_the_rest_of_the_last_one_is_told_what_differs(
    settings: dict[str, Any], said: str, start: Path, first_stage: Path, tmp_path: Path
):
    load = start / "megatron_start" if "checkpoint.load" in settings else first_stage
    sentence = rf"iter_000000\d cannot be continued, as {said}; .* another run from its weights: weights=.*iter_000000"
    with pytest.raises(UserError, match=sentence):
        cpu.run_ranks(1, stage, copy_of(start, tmp_path), load, settings)
