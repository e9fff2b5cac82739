"""What a training run logs beyond Megatron-Bridge: estimated memory at the start, then speed and routing."""

from ...bridge import plugin  # noqa: F401 - first: it makes Megatron-Bridge importable, and the model known to it

# isort: split

import json
import math
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from megatron.bridge.training.callbacks import Callback, CallbackContext
from megatron.bridge.training.config import ConfigContainer
from megatron.bridge.utils.common_utils import is_last_rank, print_rank_0, print_rank_last
from megatron.core import parallel_state

from ...bridge.mcore.batch_statistics import pop_losses, pop_source_losses, pop_squared_lengths, statistics_of
from ...bridge.mcore.flops import decoder_flops, image_training_flops
from ...bridge.mcore.router_statistics import pop_expert_counts, write_router_statistics
from ...terminal import Progress, say
from ..data.mixture import source_titles
from .experts import keep_expert_counts
from .metrics import METRICS, OF_SOURCE
from .plan import estimate

"""Groups of values in TensorBoard, where they are not "throughput"."""


@dataclass
class LossHistory(Callback):
    """Keep the loss of every step, in nats per learned token, and advance a progress."""

    progress: Progress
    losses: list[float] = field(default_factory=list)

    def on_train_step_end(self, context: CallbackContext) -> None:
        """Called by Megatron-Bridge after each optimizer step."""
        if context.loss_dict:
            self.losses.append(float(context.loss_dict["lm loss"]))
            self.progress.advance(words=f"loss {self.losses[-1]:.3f}")


@dataclass
class TrainingLog(Callback):
    """The log of a run: at the start the estimate of memory, and every `log_interval` steps a line of progress.

    Logged are the loss, also of text with and without images before it; speeds in tokens, images and FLOPs; images per
    rank; GPU-hours. In `folder` they are lines of ``metrics.jsonl``, one per step, the last one of an interval with all
    values; they are in TensorBoard too, with the experts of each modality (`write_router_statistics`). Losses are read
    from the device, and the other values reduced over all ranks, once an interval.

    Times are those of training, without evaluations and saving. Tokens and images are counted by the routers, on the
    device and over all ranks; padding is no token, and takes no FLOPs. The tower's FLOPs are also added to
    Megatron-Bridge's running total, whose formula for this model (`GPTOSSVisionProvider`) covers text only, on whole
    rows.

    Args:
        folder: of the run; None for a run without ``metrics.jsonl`` and without lines on the terminal.
    """

    folder: Path | None = None
    started: float = 0.0
    seconds: float = 0.0
    """Seconds of training since the last log."""
    images: int = 0
    """Images of this rank since the last log."""
    steps: int = 0
    """Steps since the last log."""
    steps_without_image: int = 0
    evaluated: int | None = None
    """The last step after which the validation data were evaluated."""
    unwritten: list[dict[str, Any]] = field(default_factory=list)
    """Steps that are not in the file yet."""

    def on_train_start(self, context: CallbackContext) -> None:
        """Print the memory that the most loaded rank will need."""
        config = context.state.cfg
        assert config is not None
        memory = estimate(config, torch.distributed.get_world_size())
        print_rank_0(f"Estimated memory of the rank that needs most, without what libraries take: {memory}")

    def on_train_step_start(self, context: CallbackContext) -> None:
        """Called by Megatron-Bridge before each optimizer step."""
        self.started = time.perf_counter()

    def on_train_step_end(self, context: CallbackContext) -> None:
        """Called by Megatron-Bridge after each optimizer step, before its own log."""
        state, config, step = context.state, context.state.cfg, context.state.train_state.step + 1
        assert config is not None
        self.seconds += time.perf_counter() - self.started
        self._count(context, step)
        if step % config.logger.log_interval:
            return
        counts = pop_expert_counts(context.model, config.model.num_layers, config.model.num_moe_experts).cpu()
        state.train_state.floating_point_operations_so_far += self._tower_flops(config, counts)
        shared = context.model, config.model.tensor_model_parallel_size
        values = self._throughput(config, counts, pop_squared_lengths(*shared))
        values |= self._images_per_rank() | pop_losses(*shared)
        if getattr(config.dataset, "sources", None) and len(titles := source_titles(config.dataset.sources)) > 1:
            values |= {f"{OF_SOURCE}{titles[number]}": loss for number, loss in pop_source_losses(*shared).items()}
        values |= self._cost(config.train.train_iters - step)
        if state.tensorboard_logger is not None:  # on the last rank
            write_router_statistics(state.tensorboard_logger, counts, step)
            for name, value in values.items():
                state.tensorboard_logger.add_scalar(f"{_group(name)}/{name}", value, step)
        self._write(values)
        print_rank_last(" | ".join(f"{name.replace('_', ' ')}: {value:.4g}" for name, value in values.items()))
        if self.folder is not None and is_last_rank():
            keep_expert_counts(self.folder, counts, step)
            say(self._line(step, config.train.train_iters, values))
        self.seconds, self.images, self.steps, self.steps_without_image = 0.0, 0, 0, 0

    def on_checkpoint_save(self, context: CallbackContext) -> None:
        """Write the steps that the checkpoint holds."""
        self._write({})

    def on_train_end(self, context: CallbackContext) -> None:
        """Write the last steps."""
        self._write({})

    def on_eval_end(self, context: CallbackContext) -> None:
        """Write the loss of the validation data, unless that of this step is written.

        Megatron-Bridge evaluates at the end of training again.
        """
        step = int(context.state.train_state.step)
        if step != self.evaluated:
            self._write_held_out(context, "validation")
        self.evaluated = step

    def on_test_end(self, context: CallbackContext) -> None:
        """Write the loss of the test data."""
        self._write_held_out(context, "test")

    def _write_held_out(self, context: CallbackContext, kind: str) -> None:
        if context.total_loss_dict and (loss := context.total_loss_dict.get("lm loss")) is not None:
            step = int(context.state.train_state.step)
            self.unwritten.append({"step": step, f"{kind}_loss": float(loss)})
            self._write({})
            if self.folder is not None and is_last_rank():
                say(f"step {step}: loss of the {kind} data {float(loss):.4f}")

    def _count(self, context: CallbackContext, step: int) -> None:
        images = sum(statistics.pop_images() for statistics in statistics_of(context.model))
        self.images, self.steps = self.images + images, self.steps + 1
        self.steps_without_image += not images
        assert context.optimizer is not None
        rates = [group["lr"] for group in context.optimizer.param_groups if group.get("default_config")]
        entry = {"step": step, "learning_rate": rates[0] if rates else None, "grad_norm": context.grad_norm}
        if context.loss_dict:  # on the last stage of the pipeline
            entry["loss"] = context.loss_dict["lm loss"]
        self.unwritten.append(entry)

    def _write(self, values: dict[str, float]) -> None:
        """Append the steps to the file, the values to the last of them."""
        entries, self.unwritten = self.unwritten, []
        if self.folder is None or not entries or not is_last_rank():
            return
        entries[-1] |= values
        self.last = entries[-1]
        with (self.folder / METRICS).open("a") as file:
            file.writelines(json.dumps(_plain(entry)) + "\n" for entry in entries)

    def _images_per_rank(self) -> dict[str, float]:
        """Images per step on the ranks that encode them, and the share of these ranks' steps that had none."""
        mine = torch.tensor([self.images, self.steps_without_image], dtype=torch.float64)
        is_first = parallel_state.is_pipeline_first_stage(ignore_virtual=True)
        found: list[Any] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(found, (mine / self.steps).tolist() if is_first else None)
        images, without = zip(*(each for each in found if each is not None), strict=True)
        return {
            "images_per_rank": sum(images) / len(images),
            "images_per_rank_least": min(images),
            "images_per_rank_most": max(images),
            "share_of_ranks_without_image": sum(without) / len(without),
        }

    def _cost(self, steps_left: int) -> dict[str, float]:
        seconds = self.seconds / self.steps
        gpus = torch.distributed.get_world_size()
        return {
            "seconds_per_step": seconds,
            "seconds_left": steps_left * seconds,
            "GPU_hours_left": steps_left * seconds * gpus / 3600,
        }

    def _line(self, step: int, steps: int, values: dict[str, float]) -> str:
        """The line of progress."""
        gpus = torch.distributed.get_world_size()
        parts = [
            f"step {step} of {steps}",
            f"loss {float(self.last['loss']):.4f}",
            f"{values['tokens_per_second_per_GPU'] * gpus:,.0f} tokens/s",
            f"{values['model_TFLOP_per_second_per_GPU']:.3g} TFLOP/s per GPU",
            f"{values['GPU_hours_left']:.2g} GPU-hours and {_duration(values['seconds_left'])} left",
        ]
        return " | ".join(parts)

    def _throughput(self, config: ConfigContainer, counts: torch.Tensor, squared: float) -> dict[str, float]:
        """Speeds since the last log, by name, also from the sum of the samples' squared lengths."""
        provider = config.model
        tokens, images = _tokens_and_images(provider, counts)
        learns = config.peft is None and not provider.freeze_language_model
        text = decoder_flops(provider, tokens, squared).training(weight_gradients=learns)
        seconds = self.seconds * torch.distributed.get_world_size()
        return {
            "tokens_per_second_per_GPU": tokens / seconds,
            "images_per_second_per_GPU": images / seconds,
            "model_TFLOP_per_second_per_GPU": (text + self._tower_flops(config, counts)) / seconds / 1e12,
        }

    def _tower_flops(self, config: ConfigContainer, counts: torch.Tensor) -> float:
        _, images = _tokens_and_images(config.model, counts)
        return images * image_training_flops(config.model, config.peft) if images else 0.0


def _group(name: str) -> str:
    """The group of a value in TensorBoard."""
    return "loss" if name.startswith("loss_") else "throughput"


def _plain(entry: dict[str, Any]) -> dict[str, Any]:
    """Numbers in place of tensors; those that are not finite are None, which JSON has."""
    numbers = {
        name: value if isinstance(value, int) else float(value) for name, value in entry.items() if value is not None
    }
    return {name: value if math.isfinite(value) else None for name, value in numbers.items()}


def _duration(seconds: float) -> str:
    """A duration in its two largest units."""
    minutes, hours = divmod(round(seconds), 60), divmod(round(seconds) // 60, 60)
    if hours[0]:
        return f"{hours[0]} h {hours[1]} min"
    return f"{minutes[0]} min {minutes[1]} s" if minutes[0] else f"{minutes[1]} s"


def _tokens_and_images(provider: Any, counts: torch.Tensor) -> tuple[float, float]:
    text, visual = (counts[0].sum(-1) / provider.moe_router_topk).tolist()
    return text + visual, visual / provider.num_image_tokens if visual else 0.0
