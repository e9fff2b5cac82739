"""What a training run logs beyond Megatron-Bridge: estimated memory at the start, then speed and routing."""

from ...bridge import plugin  # noqa: F401 - first: it makes Megatron-Bridge importable, and the model known to it

# isort: split

import time
from dataclasses import dataclass, field
from typing import Any

import torch
from megatron.bridge.training.callbacks import Callback, CallbackContext
from megatron.bridge.training.config import ConfigContainer
from megatron.bridge.utils.common_utils import print_rank_0, print_rank_last

from ...bridge.mcore.flops import decoder_flops, image_flops
from ...bridge.mcore.router_statistics import pop_expert_counts, write_router_statistics
from ...terminal import Progress
from .plan import estimate


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
    """Log the estimate of memory at the start; every `log_interval` steps, speeds in tokens, images and FLOPs; the
    same with `write_router_statistics` to TensorBoard. Each is a reduction over all ranks, so it is not done at
    `tensorboard_log_interval`, which is 1 by default.

    Times are those of training, without evaluations and saving. Tokens and images are counted by the routers, on the
    device and over all ranks. The tower's FLOPs are also added to Megatron-Bridge's running total, whose formula for
    this model (`GPTOSSVisionProvider`) covers text only.
    """

    started: float = 0.0
    seconds: float = 0.0
    """Seconds of training since the last log."""

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
        if step % config.logger.log_interval:
            return
        counts = pop_expert_counts(context.model, config.model.num_layers, config.model.num_moe_experts).cpu()
        state.train_state.floating_point_operations_so_far += self._tower_flops(config, counts)
        speed = self._throughput(config, counts)
        print_rank_last(" | ".join(f"{name.replace('_', ' ')}: {value:.1f}" for name, value in speed.items()))
        if state.tensorboard_logger is not None:  # on the last rank
            write_router_statistics(state.tensorboard_logger, counts, step)
            for name, value in speed.items():
                state.tensorboard_logger.add_scalar(f"throughput/{name}", value, step)
        self.seconds = 0.0

    def _throughput(self, config: ConfigContainer, counts: torch.Tensor) -> dict[str, float]:
        """Speeds since the last log, by name."""
        provider = config.model
        tokens, images = _tokens_and_images(provider, counts)
        learns = config.peft is None and not provider.freeze_language_model
        text = decoder_flops(provider, tokens).training(weight_gradients=learns)
        seconds = self.seconds * torch.distributed.get_world_size()
        return {
            "tokens_per_second_per_GPU": tokens / seconds,
            "images_per_second_per_GPU": images / seconds,
            "model_TFLOP_per_second_per_GPU": (text + self._tower_flops(config, counts)) / seconds / 1e12,
        }

    def _tower_flops(self, config: ConfigContainer, counts: torch.Tensor) -> float:
        _, images = _tokens_and_images(config.model, counts)
        if not images:
            return 0.0
        flops = image_flops(config.model)
        trains = config.peft is None and not config.model.freeze_vision_model
        return images * (flops.training() if trains else flops.forward)


def _tokens_and_images(provider: Any, counts: torch.Tensor) -> tuple[float, float]:
    text, visual = (counts[0].sum(-1) / provider.moe_router_topk).tolist()
    return text + visual, visual / provider.num_image_tokens if visual else 0.0
