"""LoRA with full weights: what is trained, what a checkpoint holds, and that a run continues from it."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from checkpoints import load_megatron
from gpt_oss_vision.bridge.mcore import cpu
from gpt_oss_vision.bridge.weight_map import PARAM_GROUPS, group_of
from gpt_oss_vision.errors import UserError
from gpt_oss_vision.recipes.base import ConfigContainer
from gpt_oss_vision.recipes.data.digits import write_digits
from gpt_oss_vision.recipes.quickstart.run import training_config
from gpt_oss_vision.recipes.quickstart.settings import Settings
from gpt_oss_vision.recipes.training.log import Callback, CallbackContext
from gpt_oss_vision.recipes.training.peft import GPTOSSVisionLoRA
from gpt_oss_vision.recipes.training.train import train

FULL = ("vision_projection", "vision_bias")


@dataclass
class Watch(Callback):
    """The loss of each step, and which parameters have moved."""

    losses: list[float] = field(default_factory=list)
    before: dict[str, torch.Tensor] = field(default_factory=dict)
    moved: dict[str, bool] = field(default_factory=dict)

    def on_train_start(self, context: CallbackContext) -> None:
        self.before = {name: one.detach().clone() for name, one in context.model[0].named_parameters()}

    def on_train_step_end(self, context: CallbackContext) -> None:
        if context.loss_dict:
            self.losses.append(float(context.loss_dict["lm loss"]))

    def on_train_end(self, context: CallbackContext) -> None:
        after = dict(context.model[0].named_parameters())
        self.moved = {name: not torch.equal(after[name].detach(), one) for name, one in self.before.items()}


def run(out: Path, settings: Settings, edit: Callable[[ConfigContainer], Any]) -> Watch:
    config = training_config(out, write_digits(out / "digits", 0), settings)
    config.peft = GPTOSSVisionLoRA(dim=4, alpha=8)
    config.checkpoint.save = config.checkpoint.load = str(out / "saved")
    config.checkpoint.save_interval = 2
    edit(config)
    watch = Watch()
    train(config, callbacks=[watch])
    watch.before = {}
    return watch


def no_edit(config: ConfigContainer) -> None:
    pass


@pytest.mark.parametrize("sizes", [{}, {"pipeline_parallel": 2}, {"tensor_parallel": 2}], ids=str)
def test_adapters_and_full_weights_are_trained_and_saved_and_nothing_else(sizes: dict, out: Path):
    settings = Settings(steps=3, batch_size=8, **sizes)
    watches = cpu.run_ranks(settings.ranks, run, out, settings, no_edit)
    moved = {name: any(watch.moved.get(name, False) for watch in watches) for watch in watches for name in watch.moved}
    still = {name for name in moved if group_of(name) in FULL and not moved[name]}
    # No loss is computed at visual tokens, so the last layer's bias for them has no effect.
    assert all(name.endswith("vision_bias") for name in still) and len(still) <= settings.pipeline_parallel
    trained = {name for name in moved if ".adapter." in name or group_of(name) in FULL}
    assert {name for name in moved if moved[name]} <= trained
    keys = {key for key in load_megatron(out / "saved", "iter_0000003") if not key.startswith(("optimizer", "rng"))}
    added = {key for key in keys if ".adapter." not in key and group_of(key) in FULL}
    assert "decoder.layers.mlp.router.vision_bias" in added and "vision_adapter.pool_token" in added
    assert all(".adapter." in key for key in keys - added)


@pytest.mark.parametrize("is_shared", [True, False], ids=["one adapter for all experts", "one for each"])
def test_a_run_with_full_weights_continues_with_the_losses_of_an_unbroken_one(
    is_shared: bool, out: Path, tmp_path: Path
):
    """To the last bit but one with shared adapters, of which Megatron-Bridge 0.6.2 loads the mean of equal copies."""
    settings = Settings(steps=4, batch_size=8)

    def edit(config: ConfigContainer) -> None:
        config.peft.share_expert_adapters = is_shared

    def again(config: ConfigContainer) -> None:
        edit(config)
        config.checkpoint.load, config.checkpoint.save = checkpoint, str(tmp_path / "again")

    (whole,) = cpu.run_ranks(1, run, out, settings, edit)
    checkpoint = str(out / "saved" / "iter_0000002")
    (rest,) = cpu.run_ranks(1, run, out, settings, again)
    assert len(whole.losses) == 4
    assert rest.losses == pytest.approx(whole.losses[2:], rel=2e-7 if is_shared else 0, abs=0)


def test_a_group_that_the_model_freezes_stays_frozen(out: Path):
    def freeze(config: ConfigContainer) -> None:
        config.model.freeze_vision_projection = True

    (watch,) = cpu.run_ranks(1, run, out, Settings(steps=3, batch_size=8), freeze)
    moved = {group_of(name) for name, has_moved in watch.moved.items() if has_moved}
    assert moved == {"vision_bias", "language_model"}
    keys = load_megatron(out / "saved", "iter_0000003")
    assert not [key for key in keys if key.startswith("vision_adapter.")]


@pytest.mark.parametrize("group", ["tower", "language_model"])
def test_full_weights_that_are_no_group_of_theirs_are_refused(group: str):
    lora = GPTOSSVisionLoRA(full_weights=[group])
    groups = ", ".join(PARAM_GROUPS[:-1])
    with pytest.raises(UserError, match=rf"peft.full_weights has {group}; it takes {groups}\."):
        lora.freeze_model(torch.nn.Linear(1, 1))


def test_a_target_that_matches_no_module_is_refused():
    lora = GPTOSSVisionLoRA(target_modules=["linear_proj", "linear_qvk"], dim=1)
    model = torch.nn.ModuleDict({"linear_proj": torch.nn.Linear(1, 1), "linear_qkv": torch.nn.Linear(1, 1)})
    with pytest.raises(UserError, match=r"peft.target_modules has linear_qvk, which no module of the model is called"):
        lora(model)
