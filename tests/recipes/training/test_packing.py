"""Megatron-Bridge's loop learns the same from packs as from the same samples in rows of their own, at every layout."""

from gpt_oss_vision.bridge import plugin  # noqa: F401 - first: it makes Megatron-Bridge importable

# isort: split

import json
import os
import signal
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from megatron.bridge.training.losses import masked_next_token_loss

from gpt_oss_vision.bridge.mcore import cpu
from gpt_oss_vision.bridge.mcore.flops import decoder_flops, image_flops
from gpt_oss_vision.bridge.mcore.provider import provider_from_config
from gpt_oss_vision.errors import UserError
from gpt_oss_vision.recipes.data.dataset import ChatDataset
from gpt_oss_vision.recipes.data.digits import write_digits
from gpt_oss_vision.recipes.data.megatron import ChatDatasetProvider
from gpt_oss_vision.recipes.data.order import Order
from gpt_oss_vision.recipes.data.packing import PackedOrder
from gpt_oss_vision.recipes.data.samples import EXPONENTS
from gpt_oss_vision.recipes.data.tiny import tiny_config
from gpt_oss_vision.recipes.inference.generate import load
from gpt_oss_vision.recipes.quickstart.run import training_config
from gpt_oss_vision.recipes.quickstart.settings import Settings
from gpt_oss_vision.recipes.sft import gpt_oss_vision_20b_sft_8gpu_h100_bf16_config
from gpt_oss_vision.recipes.tiny import gpt_oss_vision_tiny_sft_1cpu_fp32_config
from gpt_oss_vision.recipes.training.derive import derive
from gpt_oss_vision.recipes.training.log import Callback, CallbackContext
from gpt_oss_vision.recipes.training.metrics import Metrics
from gpt_oss_vision.recipes.training.step import weight_scale, weighted_loss
from gpt_oss_vision.recipes.training.train import train

SEQ_LENGTH = 80
ROWS, PACKS = 12, 6
"""An epoch of the data, which is one optimizer step, in rows and in packs."""


@pytest.fixture(scope="module")
def data(start: Path) -> Path:
    """Chats with no image, one and two, and with answers of one word up to twelve."""
    digits = write_digits(start / "digits", Settings().seed)
    with digits.train_path.open() as rows:
        images = [part for row in islice(rows, 40) for part in json.loads(row)["messages"][0]["content"]]
    images = [part for part in images if part["type"] == "image"]
    lines = []
    for row in range(ROWS):
        content = [*images[row : row + row % 3], {"type": "text", "text": "Which digit is this?"}]
        answer = " ".join(["seven", "three", "one"][word % 3] for word in range(row + 1))
        messages = [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]
        lines.append(json.dumps({"messages": messages}) + "\n")
    path = digits.folder / "chats.jsonl"
    path.write_text("".join(lines))
    return path


@dataclass
class Watch(Callback):
    """Losses and norms of all steps; the gradients of the first one, as they are after clipping."""

    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    gradients: dict[str, torch.Tensor] = field(default_factory=dict)

    def on_train_step_end(self, context: CallbackContext) -> None:
        if context.loss_dict:
            self.losses.append(float(context.loss_dict["lm loss"]))
        self.norms.append(float(context.grad_norm))
        if not self.gradients:
            for chunk in context.model:
                self.gradients |= {name: each.main_grad.clone() for name, each in chunk.named_parameters()}


def configured(out: Path, data: Path, settings: Settings, *, packing: bool, **dataset: Any) -> Any:
    config = training_config(out, write_digits(out / "digits", settings.seed), settings)
    config.dataset.path, config.dataset.packing = str(data), packing
    for name, value in dataset.items():
        setattr(config.dataset, name, value)
    config.train.global_batch_size, config.train.micro_batch_size = (PACKS, 1) if packing else (ROWS, 2)
    config.checkpoint.save = None
    # So that every rank has whole gradients.
    config.ddp.use_distributed_optimizer = config.optimizer.use_distributed_optimizer = False
    config.ddp.overlap_param_gather = False
    return config


def run(
    out: Path, data: Path, sizes: dict[str, int], packing: bool, loss_weights: str = "token", context_parallel: int = 1
) -> Watch:
    """Two steps, each of them an epoch."""
    settings = Settings(steps=2, seq_length=SEQ_LENGTH, **sizes)
    watch = Watch()
    config = configured(out, data, settings, packing=packing, loss_weights=loss_weights)
    config.model.context_parallel_size = context_parallel
    train(config, callbacks=[watch])
    return watch


LAYOUTS: dict[str, dict[str, int]] = {
    "one rank": {},
    "TP2": {"tensor_parallel": 2},
    "PP2": {"pipeline_parallel": 2},
    # Two of the four stages have neither the embedding nor the loss.
    "PP4": {"pipeline_parallel": 4},
    "EP2": {"expert_parallel": 2},
}


@pytest.mark.parametrize("sizes", LAYOUTS.values(), ids=LAYOUTS)
def test_packs_have_the_losses_and_gradients_of_their_samples(sizes: dict, data: Path, out: Path):
    ranks = Settings(**sizes).ranks
    apart, packed = (cpu.run_ranks(ranks, run, out, data, sizes, packing) for packing in (False, True))
    assert len(packed[-1].losses) == 2
    assert packed[-1].losses == pytest.approx(apart[-1].losses, rel=1e-5)
    for mine, expected in zip(packed, apart, strict=True):
        assert mine.norms == pytest.approx(expected.norms, rel=1e-5)
        largest = max(float(gradient.abs().max()) for gradient in expected.gradients.values())
        for name, gradient in expected.gradients.items():
            # A bias of all keys has no effect in a softmax without a sink: its gradient is rounding only.
            is_rounding = "vision_adapter.vit" in name and name.endswith("k_proj.bias")
            scale = max(float(gradient.abs().max()), (1e-2 if is_rounding else 1e-3) * largest)
            torch.testing.assert_close(mine.gradients[name], gradient, rtol=0, atol=1e-5 * scale, msg=name)


# --- weights of the losses ---------------------------------------------------------------------------------------


def by_transformers(out: Path, data: Path, exponent: float) -> tuple[float, float]:
    """Loss and norm of the gradients of the weighted mean, sample by sample."""
    model, processor = load(out / "hf_start")
    dataset = ChatDataset(data, processor, SEQ_LENGTH)
    losses, weights = [], []
    for sample in (dataset[row] for row in range(ROWS)):
        pixels = sample["pixel_values"]
        logits = model.train()(input_ids=sample["input_ids"][None], pixel_values=pixels).logits[0]
        losses.append(torch.nn.functional.cross_entropy(logits, sample["labels"], reduction="sum"))
        count = float((sample["labels"] != -100).sum())
        weights.append(count**-exponent)
        losses[-1], weights[-1] = losses[-1] * weights[-1], weights[-1] * count
    loss = torch.stack(losses).sum() / sum(weights)
    loss.backward()
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    return float(loss.detach()), float(torch.nn.utils.get_total_norm(gradients))


@pytest.mark.parametrize(
    ("loss_weights", "exponent", "packing", "sizes", "context_parallel"),
    [
        ("sample", 1.0, True, {"expert_parallel": 2}, 1),
        # A rank has a part of each sample.
        ("sample", 1.0, False, {}, 2),
        ("square_root", 0.5, False, {}, 2),
        ("square_root", 0.5, True, {}, 1),
        ("square_root", 0.5, False, {"pipeline_parallel": 2}, 1),
    ],
)
def test_the_loss_is_the_weighted_mean(
    loss_weights: str, exponent: float, packing: bool, sizes: dict, context_parallel: int, data: Path, out: Path
):
    ranks = Settings(**sizes).ranks * context_parallel
    found = cpu.run_ranks(ranks, run, out, data, sizes, packing, loss_weights, context_parallel)[-1]
    loss, norm = by_transformers(out, data, exponent)
    assert found.losses[0] == pytest.approx(loss, rel=1e-5)
    assert found.norms[0] == pytest.approx(norm, rel=1e-5)
    assert loss != pytest.approx(by_transformers(out, data, 0.0)[0], rel=1e-4)


def sums_of_weights(packing: bool, loss_weights: str) -> tuple[float, int, float]:
    """Of the 512 microbatches of a step: exactly, as Megatron counts it, and the scale of that count."""
    config = gpt_oss_vision_20b_sft_8gpu_h100_bf16_config()
    config.train.global_batch_size, config.model.seq_length = 512, 8192
    config.dataset.packing, config.dataset.loss_weights = packing, loss_weights
    scale, random = weight_scale(config), np.random.default_rng(0)
    exact, counted = 0.0, 0
    for _ in range(512):
        counts = random.integers(5, 400, 16 if packing else 1)
        exponent = EXPONENTS[loss_weights]
        mask = torch.cat([torch.full((count,), count**-exponent) for count in counts.tolist()])
        loss_function = partial(masked_next_token_loss, mask, check_for_nan_in_loss=False)
        loss, weight, report = weighted_loss(loss_function, scale, torch.ones(1, len(mask)))
        expected = float((counts ** (1.0 - exponent)).sum())
        assert [float(loss) / scale, *report["lm loss"].tolist()] == pytest.approx([expected] * 3, rel=1e-6)
        exact, counted = exact + expected, counted + int(weight)
    return exact, counted, scale


@pytest.mark.parametrize("loss_weights", ["sample", "square_root"])
@pytest.mark.parametrize("packing", [True, False])
def test_rounding_the_weights_of_microbatches_changes_their_sum_by_less_than_a_millionth(
    packing: bool, loss_weights: str
):
    ((exact, counted, scale),) = cpu.run_ranks(1, sums_of_weights, packing, loss_weights)
    assert counted < 2**31
    assert counted / scale == pytest.approx(exact, rel=1e-6)


# --- refused -----------------------------------------------------------------------------------------------------


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "rows that are no packs": ({"train.micro_batch_size": 2}, r"packing needs train\.micro_batch_size=1, .*; it is 2"),
    "rows of an evaluation": ({"validation.eval_micro_batch_size": 4}, r"validation\.eval_micro_batch_size=1"),
    "context parallelism": (
        {"model.context_parallel_size": 2},
        "does not support model.context_parallel_size=2; use 1",
    ),
    "a balance of each row": (
        {"model.moe_router_load_balancing_type": "seq_aux_loss", "model.moe_aux_loss_coeff": 0.1},
        "would balance each pack in place of each sample",
    ),
    "weights within a microbatch": (
        {"dataset.loss_weights": "sample", "model.calculate_per_token_loss": False},
        "loss_weights=sample needs model.calculate_per_token_loss=true",
    ),
}


@pytest.mark.parametrize(("settings", "said"), REFUSED.values(), ids=REFUSED)
def test_what_packs_do_not_support_is_refused_before_the_run(settings: dict[str, Any], said: str):
    config = gpt_oss_vision_tiny_sft_1cpu_fp32_config()
    config.dataset.packing, config.train.micro_batch_size = True, 1
    derive(config)
    for name, value in settings.items():
        section, _, name = name.partition(".")
        setattr(getattr(config, section), name, value)
    with pytest.raises(UserError, match=said):
        derive(config)


@pytest.mark.parametrize(
    ("settings", "said"),
    [({"images_per_pack": 4}, "has no effect without"), ({"images_per_pack": 0, "packing": True}, "=0 is below 1")],
)
def test_a_number_of_images_that_is_none_of_a_pack_is_refused(settings: dict[str, Any], said: str):
    provider = ChatDatasetProvider(seq_length=8, path="rows.jsonl", processor_path="processor", **settings)
    with pytest.raises(UserError, match=said):
        provider.finalize()


# --- the log, and a run that goes on -----------------------------------------------------------------------------


def logged_run(out: Path, data: Path, saved: Path, goes_on: bool, *callbacks: Callback) -> Watch:
    """Four steps of four packs, so of less than an epoch each, with an evaluation; each step is saved."""
    config = configured(out, data, Settings(steps=4, seq_length=SEQ_LENGTH), packing=True, images_per_pack=4)
    config.train.global_batch_size, config.logger.log_interval = 4, 2
    config.checkpoint.save, config.checkpoint.save_interval = str(saved), 1
    config.checkpoint.load = str(saved) if goes_on else None
    config.dataset.valid_path = str(data)
    config.validation.eval_interval, config.validation.eval_iters = 4, 1
    watch = Watch()
    train(config, callbacks=[watch, *callbacks], log=saved)
    return watch


@dataclass
class Death(Callback):
    """Kills the process at the start of a step, counted from 0."""

    step: int

    def on_train_step_start(self, context: CallbackContext) -> None:
        if context.state.train_state.step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def test_a_run_by_packs_that_was_killed_goes_on_with_equal_losses_and_its_log_counts_tokens(
    data: Path, out: Path, tmp_path: Path
):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    whole.mkdir()
    killed.mkdir()
    (expected,) = cpu.run_ranks(1, logged_run, out, data, whole, False)
    with pytest.raises(RuntimeError, match="exit code -9"):
        cpu.run_ranks(1, logged_run, out, data, killed, True, Death(step=2))
    (found,) = cpu.run_ranks(1, logged_run, out, data, killed, True)
    assert found.losses == expected.losses[2:]

    _, processor = load(out / "hf_start")
    dataset = ChatDataset(data, processor, SEQ_LENGTH)
    order = PackedOrder(
        Order((ROWS,), seed=0), dataset.lengths, dataset.image_counts, seq_length=SEQ_LENGTH, images_per_pack=4
    )
    packs = [order.epoch(epoch)[number] for epoch, number in map(order.locate, range(8))]
    tokens = dataset.lengths[np.concatenate(packs)]
    metrics = Metrics(whole)
    metrics.update()
    values = metrics.steps[2]
    seconds = 2 * values["seconds_per_step"]
    assert values["tokens_per_second_per_GPU"] * seconds == pytest.approx(tokens.sum())
    assert values["images_per_rank"] * 2 == dataset.image_counts[np.concatenate(packs)].sum()
    assert values["images_per_second_per_GPU"] * seconds == pytest.approx(values["images_per_rank"] * 2)
    text = decoder_flops(provider_from_config(tiny_config()), tokens.sum(), (tokens.astype(int) ** 2).sum()).training()
    images = image_flops(provider_from_config(tiny_config())).training() * values["images_per_rank"] * 2
    assert values["model_TFLOP_per_second_per_GPU"] * seconds * 1e12 == pytest.approx(text + images)
    assert metrics.validation.keys() == {4}
