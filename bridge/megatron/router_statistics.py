"""Which experts see which modality: the routers' counts, summed over all ranks and written to TensorBoard."""

from dataclasses import dataclass

import torch
from megatron.bridge.training.callbacks import Callback, CallbackContext

from .router import VisionBiasedTopKRouter

MODALITIES = ("text", "visual")


def take_counts(model: list[torch.nn.Module], num_layers: int) -> torch.Tensor:
    """Choices since the last call, on every rank those of all: ``[layers, 2, experts]``, text before visual.

    Args:
        model: this rank's chunks. Its layers are elsewhere on no other pipeline rank, and its tokens on no other rank
            of the same stage: with tensor parallelism the sequence is cut too.
        num_layers: of the whole model.
    """
    routers = [module for chunk in model for module in chunk.modules() if isinstance(module, VisionBiasedTopKRouter)]
    counts = routers[0].tokens_per_expert.new_zeros(num_layers, *routers[0].tokens_per_expert.shape)
    for router in routers:
        counts[router.layer_number - 1] = router.tokens_per_expert
        router.tokens_per_expert.zero_()
    torch.distributed.all_reduce(counts)
    return counts


def entropy(counts: torch.Tensor) -> torch.Tensor:
    """Of the experts' shares along the last axis, in nats: 0 for one expert, ln E for all alike, NaN for no tokens."""
    return torch.special.entr(_shares(counts)).sum(-1)


def overlap(counts: torch.Tensor) -> torch.Tensor:
    """Of the shares of the two modalities, ``[…, 2, E]`` to ``[…]``: 0 without a common expert, 1 for equal shares."""
    return _shares(counts).amin(-2).sum(-1)


def _shares(counts: torch.Tensor) -> torch.Tensor:
    return counts / counts.sum(-1, keepdim=True)


@dataclass
class RouterStatistics(Callback):
    """Writes entropy and overlap per layer, and the tokens of every layer, modality and expert.

    The last are a tensor ``[layers, 2, experts]`` and, to look at, a picture of each modality's shares with a row per
    layer. Steps and interval are those of Megatron-Bridge's own log; other steps cost nothing.
    """

    def on_train_step_end(self, context: CallbackContext) -> None:
        """Called by Megatron-Bridge after each optimizer step."""
        config, step = context.state.cfg, context.state.train_state.step + 1
        if step % config.logger.tensorboard_log_interval:
            return
        counts = take_counts(context.model, config.model.num_layers).cpu()
        writer = context.state.tensorboard_logger
        if writer is not None:  # on the last rank
            write(writer, counts, step)


def write(writer, counts: torch.Tensor, step: int) -> None:
    """Write what can be said of ``[layers, 2, experts]`` counts; nothing of a modality without tokens."""
    writer.add_tensor("router/tokens_per_expert", counts, step)
    seen = counts.sum((0, 2)) > 0
    for index, modality in enumerate(MODALITIES):
        if seen[index]:
            shares = _shares(counts[:, index])
            writer.add_image(f"router/{modality}", shares / shares.max(), step, dataformats="HW")
            for layer, value in enumerate(entropy(counts[:, index]).tolist()):
                writer.add_scalar(f"router/{modality}_entropy/layer_{layer}", value, step)
    if seen.all():
        for layer, value in enumerate(overlap(counts).tolist()):
            writer.add_scalar(f"router/overlap/layer_{layer}", value, step)
