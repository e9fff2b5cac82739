"""One optimizer step's worth of Megatron at any parallel layout, and the same from the transformers model.

Runs inside ranks that `cpu.run_ranks` forks. Gradients come back under transformers' names: the exported form of a
model whose parameters are replaced by their gradients, so what the bridge does to a weight it does to its gradient.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

IGNORED = -100


@dataclass(frozen=True, slots=True)
class Layout:
    """Parallel sizes; ``extra`` are further provider fields."""

    tp: int = 1
    pp: int = 1
    vpp: int = 1
    ep: int = 1
    etp: int = 1
    cp: int = 1
    dp: int = 1
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def world_size(self) -> int:
        """Ranks needed: experts are laid out over tensor and data parallelism."""
        return self.pp * max(self.tp * self.cp * self.dp, self.ep * self.etp)

    def __str__(self) -> str:
        sizes = {"TP": self.tp, "PP": self.pp, "VPP": self.vpp, "EP": self.ep, "ETP": self.etp}
        sizes |= {"CP": self.cp, "DP": self.dp}
        words = [f"{name}{size}" for name, size in sizes.items() if size > 1]
        return "·".join([*words, *(f"{name}={value}" for name, value in self.extra.items())]) or "one rank"

    def apply(self, provider: Any) -> None:
        """Set the sizes on a provider that is not yet finalized."""
        provider.tensor_model_parallel_size = self.tp
        provider.pipeline_model_parallel_size = self.pp
        provider.virtual_pipeline_model_parallel_size = self.vpp if self.vpp > 1 else None
        provider.expert_model_parallel_size = self.ep
        provider.expert_tensor_parallel_size = self.etp
        provider.context_parallel_size = self.cp
        for name, value in self.extra.items():
            setattr(provider, name, value)


@dataclass(frozen=True, slots=True)
class StepResult:
    """What one step gives: logits per microbatch ``[b, s, vocab]``, the mean loss, gradients by transformers' name."""

    logits: list[torch.Tensor]
    loss: float
    gradients: dict[str, torch.Tensor]


def with_labels(batch: dict[str, torch.Tensor], image_token_id: int) -> dict[str, torch.Tensor]:
    """The batch with shifted labels: position t predicts t + 1, and no placeholder is predicted."""
    labels = F.pad(batch["input_ids"][:, 1:], (0, 1), value=IGNORED)
    return {**batch, "labels": labels.masked_fill(labels == image_token_id, IGNORED)}


def reference_step(model: torch.nn.Module, microbatches: list[dict[str, torch.Tensor]]) -> StepResult:
    """The step by the transformers model, in train mode: the mean over microbatches of their mean loss per token."""
    model.train()
    model.zero_grad()
    logits, losses = [], []
    for batch in microbatches:
        out = model(input_ids=batch["input_ids"], pixel_values=batch.get("pixel_values")).logits
        losses.append(F.cross_entropy(out.flatten(0, 1), batch["labels"].flatten(), ignore_index=IGNORED))
        logits.append(out.detach())
    loss = torch.stack(losses).mean()
    loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert all(gradient is not None for gradient in gradients.values())
    return StepResult(logits, float(loss.detach()), gradients)


def megatron_step(path: Path, layout: Layout, microbatches: list[dict[str, torch.Tensor]]) -> StepResult | None:
    """The step by Megatron at a layout. Every rank calls it; rank 0 of the last pipeline stage answers, others None."""
    from megatron.bridge import AutoBridge
    from megatron.core import parallel_state
    from megatron.core.distributed import finalize_model_grads
    from megatron.core.pipeline_parallel import get_forward_backward_func

    torch.distributed.init_process_group("gloo")
    bridge = AutoBridge.from_hf_pretrained(path)
    model = build(bridge, layout)
    model[0].config.finalize_model_grads_func = finalize_model_grads
    mine = microbatches[parallel_state.get_data_parallel_rank() :: parallel_state.get_data_parallel_world_size()]
    shape = mine[0]["input_ids"].shape
    schedule = {
        "forward_step_func": _forward_step,
        "model": model,
        "num_microbatches": len(mine),
        "micro_batch_size": shape[0],
        "seq_length": shape[1],
    }
    run = get_forward_backward_func()
    logits = run(data_iterator=_iterators(mine, model), forward_only=True, collect_non_loss_data=True, **schedule)
    losses = run(data_iterator=_iterators(mine, model), forward_only=False, **schedule)
    gradients = _exported_gradients(bridge, model)
    if not parallel_state.is_pipeline_last_stage():
        return None
    loss = torch.stack([entry["loss"] for entry in losses]).mean()
    torch.distributed.all_reduce(loss, group=parallel_state.get_data_parallel_group(with_context_parallel=True))
    gathered = _all_microbatches([_whole_sequence(_whole_vocabulary(out)) for out in logits])
    if parallel_state.get_tensor_model_parallel_rank() or parallel_state.get_data_parallel_rank(
        with_context_parallel=True
    ):
        return None
    return StepResult(gathered, float(loss) / parallel_state.get_data_parallel_world_size(), gradients)


def build(bridge: Any, layout: Layout) -> list[torch.nn.Module]:
    """The model of a checkpoint at a layout, wrapped for data parallelism, on initialised groups."""
    from megatron.bridge.training.config import DistributedDataParallelConfig

    provider = bridge.to_megatron_provider()
    layout.apply(provider)
    provider.finalize()
    provider.initialize_model_parallel(seed=0)
    ddp = DistributedDataParallelConfig(overlap_grad_reduce=False, use_distributed_optimizer=False)
    ddp.finalize()
    return provider.provide_distributed_model(ddp_config=ddp, wrap_with_ddp=True)


def _iterators(microbatches: list, model: list) -> Any:
    iterators = [iter(microbatches) for _ in model]
    return iterators if len(model) > 1 else iterators[0]


def _forward_step(data: Iterator[dict[str, torch.Tensor]], model: torch.nn.Module) -> tuple[torch.Tensor, Any]:
    batch = next(data)
    labels = batch["labels"]
    logits = model(batch["input_ids"], None, None, pixel_values=batch.get("pixel_values"))

    def loss(output: torch.Tensor, non_loss_data: bool = False) -> Any:
        from megatron.core import parallel_state
        from megatron.core.tensor_parallel import vocab_parallel_cross_entropy

        from gpt_oss_vision.bridge.megatron.context_parallel import this_ranks_part

        if non_loss_data:
            return output.detach().clone()
        mine = this_ranks_part(labels, 1, parallel_state.get_context_parallel_group())
        per_token = vocab_parallel_cross_entropy(output.clone(), mine)
        # This rank's share of the mean over the whole sequence; the schedule multiplies by the ranks that share it.
        mean = per_token[mine != IGNORED].sum() / (labels != IGNORED).sum()
        # The schedule divides the loss in place.
        return mean, {"loss": mean.detach().clone()}

    return logits, loss


def _exported_gradients(bridge: Any, model: list[torch.nn.Module]) -> dict[str, torch.Tensor]:
    for chunk in model:
        for parameter in chunk.parameters():
            parameter.data.copy_(parameter.main_grad)
    return {name: weight.clone() for name, weight in bridge.export_hf_weights(model, show_progress=False)}


def _whole_vocabulary(logits: torch.Tensor) -> torch.Tensor:
    from megatron.core import parallel_state

    pieces = [torch.empty_like(logits) for _ in range(parallel_state.get_tensor_model_parallel_world_size())]
    torch.distributed.all_gather(pieces, logits, group=parallel_state.get_tensor_model_parallel_group())
    return torch.cat(pieces, dim=-1)


def _whole_sequence(logits: torch.Tensor) -> torch.Tensor:
    """Put the pieces of all context-parallel ranks in order: rank r holds pieces r and 2 cp - 1 - r."""
    from megatron.core import parallel_state

    ranks = parallel_state.get_context_parallel_world_size()
    parts = [torch.empty_like(logits) for _ in range(ranks)]
    torch.distributed.all_gather(parts, logits.contiguous(), group=parallel_state.get_context_parallel_group())
    halves = [part.chunk(2, dim=1) if ranks > 1 else (part,) for part in parts]
    return torch.cat([half[0] for half in halves] + [half[-1] for half in reversed(halves) if ranks > 1], dim=1)


def _all_microbatches(logits: list[torch.Tensor]) -> list[torch.Tensor]:
    """Those of all data-parallel ranks, in the order in which they were dealt out."""
    from megatron.core import parallel_state

    group = parallel_state.get_data_parallel_group()
    ranks: list[Any] = [None] * group.size()
    torch.distributed.all_gather_object(ranks, logits, group=group)
    return [ranks[index % len(ranks)][index // len(ranks)] for index in range(len(ranks) * len(logits))]
