"""What a training run tells of itself beyond Megatron-Bridge's own log: memory before, speed and routing on the way."""

from ...bridge import plugin  # noqa: F401 - first: it makes Megatron-Bridge importable, and the model known to it

# isort: split

import time
from dataclasses import dataclass, field
from typing import Any

import torch
from megatron.bridge.training.callbacks import Callback, CallbackContext
from megatron.bridge.training.config import ConfigContainer
from megatron.bridge.utils.common_utils import print_rank_0, print_rank_last
from megatron.core.num_microbatches_calculator import get_num_microbatches

from ...bridge.mcore.flops import decoder_flops, image_flops
from ...bridge.mcore.memory import memory_per_rank
from ...bridge.mcore.router_statistics import pop_expert_counts, write_router_statistics


@dataclass(frozen=True, slots=True)
class Stretch:
    """Some steps: what they took, and the routers' choices in them, ``[layers, 2, experts]``."""

    seconds: float = 0.0
    counts: Any = 0

    def longer(self, seconds: float, counts: Any) -> "Stretch":
        """With what came after."""
        return Stretch(self.seconds + seconds, self.counts + counts)


@dataclass
class TrainingLog(Callback):
    """The estimate of memory at the start; with every line of Megatron-Bridge's, tokens per second and operations per
    second with the tower's; with everything that it writes to TensorBoard, these and `write_router_statistics`.

    Times are those of training: evaluations and saving are left out.

    Tokens and images are counted by the routers, on the device and over all ranks. The tower's operations are added to
    Megatron-Bridge's running total too, whose formula for this model (`GPTOSSVisionProvider`) knows of text only.
    """

    started: float = 0.0
    line: Stretch = field(default_factory=Stretch)
    board: Stretch = field(default_factory=Stretch)

    def on_train_start(self, context: CallbackContext) -> None:
        """Print the memory that the most loaded rank will need."""
        config = context.state.cfg
        assert config is not None
        memory = memory_per_rank(
            config.model,
            world_size=torch.distributed.get_world_size(),
            micro_batch_size=config.train.micro_batch_size,
            microbatches=get_num_microbatches(),
            is_distributed=config.ddp.use_distributed_optimizer,
            is_adapted=config.peft is not None,
        )
        print_rank_0(f"Estimated memory of the rank that needs most, without what libraries take: {memory}")

    def on_train_step_start(self, context: CallbackContext) -> None:
        """Called by Megatron-Bridge before each optimizer step."""
        self.started = time.perf_counter()

    def on_train_step_end(self, context: CallbackContext) -> None:
        """Called by Megatron-Bridge after each optimizer step, before its own log."""
        state, config, step = context.state, context.state.cfg, context.state.train_state.step + 1
        assert config is not None
        prints = step % config.logger.log_interval == 0
        writes = step % config.logger.tensorboard_log_interval == 0
        counts = 0
        if prints or writes:
            counts = pop_expert_counts(context.model, config.model.num_layers, config.model.num_moe_experts).cpu()
            state.train_state.floating_point_operations_so_far += self._tower_operations(config, counts)
        seconds = time.perf_counter() - self.started
        self.line, self.board = self.line.longer(seconds, counts), self.board.longer(seconds, counts)
        if prints:
            speed = self._throughput(config, self.line)
            print_rank_last(" | ".join(f"{name.replace('_', ' ')}: {value:.1f}" for name, value in speed.items()))
            self.line = Stretch()
        if writes:
            if state.tensorboard_logger is not None:  # on the last rank
                write_router_statistics(state.tensorboard_logger, self.board.counts, step)
                for name, value in self._throughput(config, self.board).items():
                    state.tensorboard_logger.add_scalar(f"throughput/{name}", value, step)
            self.board = Stretch()

    def _throughput(self, config: ConfigContainer, stretch: Stretch) -> dict[str, float]:
        """Speeds over some steps."""
        provider = config.model
        tokens, images = _tokens_and_images(provider, stretch.counts)
        learns = config.peft is None and not provider.freeze_language_model
        text = decoder_flops(provider, tokens).training(weight_gradients=learns)
        seconds = stretch.seconds * torch.distributed.get_world_size()
        return {
            "tokens_per_second_per_GPU": tokens / seconds,
            "images_per_second_per_GPU": images / seconds,
            "model_TFLOP_per_second_per_GPU": (text + self._tower_operations(config, stretch.counts)) / seconds / 1e12,
        }

    def _tower_operations(self, config: ConfigContainer, counts: torch.Tensor) -> float:
        _, images = _tokens_and_images(config.model, counts)
        if not images:
            return 0.0
        operations = image_flops(config.model)
        trains = config.peft is None and not config.model.freeze_vision_model
        return images * (operations.training() if trains else operations.forward)


def _tokens_and_images(provider: Any, counts: torch.Tensor) -> tuple[float, float]:
    text, visual = (counts[0].sum(-1) / provider.moe_router_topk).tolist()
    return text + visual, visual / provider.num_image_tokens
