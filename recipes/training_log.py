"""What a training run tells of itself beyond Megatron-Bridge's own log: memory before, speed and routing on the way."""

from ..bridge import plugin  # noqa: F401 - first: it makes Megatron-Bridge importable, and the model known to it

# isort: split

import time
from dataclasses import dataclass

import torch
from megatron.bridge.training.callbacks import Callback, CallbackContext
from megatron.bridge.training.config import ConfigContainer
from megatron.bridge.utils.common_utils import print_rank_0, print_rank_last
from megatron.core.num_microbatches_calculator import get_num_microbatches

from ..bridge.megatron.cost import image_operations, memory_per_rank, text_operations
from ..bridge.megatron.router_statistics import take_counts, write


@dataclass
class TrainingLog(Callback):
    """The estimate of memory at the start; at every step that Megatron-Bridge logs, tokens per second, operations per
    second with the tower's, and the routers' choices (`router_statistics.write`).

    Tokens and images are counted by the routers, on the device and over all ranks. The tower's operations are added to
    Megatron-Bridge's running total too, whose formula for this model (`GPTOSSVisionProvider`) knows of text only.
    """

    since: float = 0.0

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
        )
        print_rank_0(f"Estimated memory of the rank that needs most, without what libraries take: {memory}")
        self.since = time.perf_counter()

    def on_train_step_end(self, context: CallbackContext) -> None:
        """Called by Megatron-Bridge after each optimizer step, before its own log."""
        state, config, step = context.state, context.state.cfg, context.state.train_state.step + 1
        assert config is not None
        if step % config.logger.tensorboard_log_interval:
            return
        counts = take_counts(context.model, config.model.num_layers).cpu()
        now = time.perf_counter()
        speed, tower = self._throughput(config, counts, now - self.since)
        self.since = now
        state.train_state.floating_point_operations_so_far += tower
        if state.tensorboard_logger is not None:  # on the last rank
            write(state.tensorboard_logger, counts, step)
            for name, value in speed.items():
                state.tensorboard_logger.add_scalar(f"throughput/{name}", value, step)
        if step % config.logger.log_interval == 0:
            print_rank_last(" | ".join(f"{name.replace('_', ' ')}: {value:.1f}" for name, value in speed.items()))

    def _throughput(self, config: ConfigContainer, counts: torch.Tensor, seconds: float) -> tuple[dict, float]:
        """Speeds since the last time, and the tower's operations in it."""
        provider, per_token = config.model, counts[0].sum(-1) / config.model.moe_router_topk
        tokens, images = float(per_token.sum()), float(per_token[1]) / provider.num_image_tokens
        learns = config.peft is None
        text = text_operations(provider, tokens).training(
            weight_gradients=learns and not provider.freeze_language_model
        )
        tower = 0.0
        if images:
            operations = image_operations(provider)
            trains = learns and not provider.freeze_vision_model
            tower = images * (operations.training() if trains else operations.forward)
        ranks = torch.distributed.get_world_size()
        return {
            "tokens_per_second_per_GPU": tokens / seconds / ranks,
            "images_per_second_per_GPU": images / seconds / ranks,
            "model_TFLOP_per_second_per_GPU": (text + tower) / seconds / ranks / 1e12,
        }, tower
