"""A few optimizer steps of Megatron at any parallel layout, and the same steps of the transformers model.

Runs inside ranks that `cpu.run_ranks` forks. The loss function, the schedules, Adam and clipping are Megatron's own;
on the other side they are torch's. Gradients have transformers' names: every parameter is replaced by its gradient, and
the model is exported, so the bridge converts a gradient in the same way as its weight.
"""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from gpt_oss_vision.bridge.mcore import cpu
from gpu import host_group

IGNORED = -100
# Settings of both optimizers. Gradients are clipped in every step; biases and norms have no weight decay.
ADAM: dict[str, Any] = {"lr": 1e-3, "weight_decay": 0.1, "eps": 1e-8}
BETAS = (0.9, 0.95)
MAX_NORM = 1.0

type Microbatch = dict[str, torch.Tensor]


@dataclass(frozen=True, slots=True)
class Layout:
    """Parallel sizes; ``extra`` are further provider fields, ``ddp`` fields of Megatron's data parallelism."""

    tp: int = 1
    pp: int = 1
    vpp: int = 1
    ep: int = 1
    etp: int = 1
    cp: int = 1
    dp: int = 1
    extra: dict[str, Any] = field(default_factory=dict)
    ddp: dict[str, Any] = field(default_factory=dict)

    @property
    def world_size(self) -> int:
        """Ranks needed: experts are laid out over tensor, context and data parallelism."""
        return self.pp * max(self.tp * self.cp * self.dp, self.ep * self.etp)

    def __str__(self) -> str:
        sizes = {"TP": self.tp, "PP": self.pp, "VPP": self.vpp, "EP": self.ep, "ETP": self.etp}
        sizes |= {"CP": self.cp, "DP": self.dp}
        words = [f"{name}{size}" for name, size in sizes.items() if size > 1]
        return "·".join([*words, *(f"{name}={value}" for name, value in (self.extra | self.ddp).items())]) or "one rank"

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
class Run:
    """The first step's logits per microbatch ``[b, s, vocab]`` and gradients; every step's loss and gradient norm."""

    logits: list[torch.Tensor]
    gradients: dict[str, torch.Tensor]
    losses: list[float]
    norms: list[float]


def with_labels(batch: Microbatch, image_token_id: int) -> Microbatch:
    """The batch with shifted labels: position t predicts t + 1, and no placeholder is predicted."""
    labels = F.pad(batch["input_ids"][:, 1:], (0, 1), value=IGNORED)
    return {**batch, "labels": labels.masked_fill(labels == image_token_id, IGNORED)}


# --- transformers ------------------------------------------------------------------------------------------------


def reference_run(model: torch.nn.Module, steps: list[list[Microbatch]]) -> Run:
    """Train the transformers model, one optimizer step per list of microbatches, on the mean loss per token."""
    model.train()
    named = dict(model.named_parameters())
    decayed = [parameter for name, parameter in named.items() if parameter.ndim > 1 and not name.endswith("bias")]
    others = [parameter for name, parameter in named.items() if parameter.ndim == 1 or name.endswith("bias")]
    groups = [{"params": decayed}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=BETAS, **ADAM)
    losses, norms = [], []
    for microbatches in steps:
        optimizer.zero_grad()
        loss, logits = _reference_loss(model, microbatches)
        loss.backward()
        if not losses:
            first = logits, {name: parameter.grad.clone() for name, parameter in named.items()}
        losses.append(float(loss.detach()))
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)))
        optimizer.step()
    return Run(*first, losses, norms)


def _reference_loss(model: torch.nn.Module, microbatches: list[Microbatch]) -> tuple[torch.Tensor, list[torch.Tensor]]:
    logits, losses = [], []
    for batch in microbatches:
        out = model(input_ids=batch["input_ids"], pixel_values=batch.get("pixel_values")).logits
        labels = batch["labels"].flatten()
        losses.append(F.cross_entropy(out.flatten(0, 1), labels, ignore_index=IGNORED, reduction="sum"))
        logits.append(out.detach())
    tokens = sum(int((batch["labels"] != IGNORED).sum()) for batch in microbatches)
    return torch.stack(losses).sum() / tokens, logits


# --- Megatron ----------------------------------------------------------------------------------------------------


def start_communication() -> None:
    """The default process group: gloo on CPUs, NCCL on a GPU; in tests/gpu, several ranks use gloo by host memory."""
    if os.environ["WORLD_SIZE"] != "1" and "RANKS_SHARE_A_GPU" in os.environ:
        host_group.register()
        torch.distributed.init_process_group(host_group.NAME)
    else:
        torch.distributed.init_process_group("cpu:gloo,cuda:nccl" if cpu.cuda_is_real() else "gloo")


def megatron_run(path: Path, layout: Layout, steps: list[list[Microbatch]]) -> Run | None:
    """The same by Megatron at a layout, on every rank; only rank 0 of the last pipeline stage returns a `Run`."""
    from megatron.bridge import AutoBridge
    from megatron.core import parallel_state

    start_communication()
    bridge = AutoBridge.from_hf_pretrained(path)
    model = build(bridge, layout)
    optimizer = build_optimizer(model, layout)
    logits = _run_schedule(_logits_step, model, steps[0], forward_only=True, collect_non_loss_data=True)
    losses, norms, gradients = [], [], {}
    for microbatches in steps:
        for chunk in model:
            chunk.zero_grad_buffer()
        optimizer.zero_grad()
        entries = _run_schedule(_loss_step, model, microbatches, forward_only=False)
        losses.append(_mean_per_token(entries))
        gradients = gradients or _exported_gradients(bridge, model)
        _, norm, _ = optimizer.step()
        norms.append(norm)
    if not parallel_state.is_pipeline_last_stage():
        return None
    gathered = _all_microbatches([_whole_sequence(_whole_vocabulary(out)) for out in logits])
    others = parallel_state.get_tensor_model_parallel_rank(), parallel_state.get_data_parallel_rank(True)
    if any(others):
        return None
    return Run([out.cpu() for out in gathered], {name: value.cpu() for name, value in gradients.items()}, losses, norms)


def megatron_logits(path: Path, layout: Layout, batch: Microbatch, *, training: bool, **changed: Any) -> torch.Tensor:
    """Logits ``[b, s, vocab]`` of one batch, without a pipeline; ``changed`` are fields set after ``finalize()``."""
    from megatron.bridge import AutoBridge

    start_communication()
    (model,) = build(AutoBridge.from_hf_pretrained(path), layout, **changed)
    model.train(training)
    batch = on_device(batch)
    with torch.no_grad():
        return _whole_vocabulary(model(batch["input_ids"], None, None, pixel_values=batch.get("pixel_values"))).cpu()


def on_device(batch: Microbatch) -> Microbatch:
    """The batch on the GPU, where there is one: `cpu.runtime` makes ``.cuda()`` do nothing."""
    return {name: tensor.cuda() for name, tensor in batch.items()}


def fork_checkpoint_queue() -> None:
    """Fork the queue process of Megatron-Core's checkpoint writer from this rank.

    By default it is spawned, and imports the main module and all its imports again, which takes seconds on every rank.
    """
    from megatron.core.dist_checkpointing.strategies.filesystem_async import get_write_results_queue

    get_write_results_queue("fork")


def build(bridge: Any, layout: Layout, *, load_weights: bool = True, **changed: Any) -> list[torch.nn.Module]:
    """The model of a checkpoint at a layout, wrapped for data parallelism, on initialised groups."""
    from megatron.bridge.training.config import DistributedDataParallelConfig

    provider = bridge.to_megatron_provider(load_weights=load_weights)
    layout.apply(provider)
    provider.finalize()
    for name, value in changed.items():
        setattr(provider, name, value)
    provider.initialize_model_parallel(seed=0)
    ddp = DistributedDataParallelConfig(
        **{"use_distributed_optimizer": True, "overlap_grad_reduce": False} | layout.ddp
    )
    ddp.finalize()
    return provider.provide_distributed_model(ddp_config=ddp, wrap_with_ddp=True)


def build_optimizer(model: list[torch.nn.Module], layout: Layout) -> Any:
    """Megatron's Adam; sets the functions that the schedules need, as Megatron-Bridge's training loop does."""
    from megatron.core.distributed import finalize_model_grads
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

    ddp, config = model[0].ddp_config, model[0].config
    settings = OptimizerConfig(
        adam_beta1=BETAS[0],
        adam_beta2=BETAS[1],
        adam_eps=ADAM["eps"],
        lr=ADAM["lr"],
        weight_decay=ADAM["weight_decay"],
        clip_grad=MAX_NORM,
        use_distributed_optimizer=ddp.use_distributed_optimizer,
        overlap_param_gather=ddp.overlap_param_gather,
    )
    optimizer = get_megatron_optimizer(settings, model)
    _constant_rates(optimizer, settings)
    config.grad_scale_func = optimizer.scale_loss
    config.finalize_model_grads_func = finalize_model_grads
    if ddp.overlap_grad_reduce:
        functions = [chunk.no_sync for chunk in model]
        config.no_sync_func = functions if len(model) > 1 else functions[0]
    return optimizer


def _constant_rates(optimizer: Any, settings: Any) -> None:
    """Give each group its learning rate and weight decay; Megatron leaves both to its scheduler."""
    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

    OptimizerParamScheduler(
        optimizer,
        init_lr=settings.lr,
        max_lr=settings.lr,
        min_lr=settings.lr,
        lr_warmup_steps=0,
        lr_decay_steps=1,
        lr_decay_style="constant",
        start_wd=settings.weight_decay,
        end_wd=settings.weight_decay,
        wd_incr_steps=1,
        wd_incr_style="constant",
    )


def _run_schedule(step: Callable, model: list[torch.nn.Module], microbatches: list[Microbatch], **options: Any) -> list:
    """Run Megatron's schedule on the microbatches of this data-parallel rank, which are distributed in turns."""
    from megatron.core import parallel_state
    from megatron.core.pipeline_parallel import get_forward_backward_func

    mine = microbatches[parallel_state.get_data_parallel_rank() :: parallel_state.get_data_parallel_world_size()]
    mine = [on_device(batch) for batch in mine]
    iterators = [iter(mine) for _ in model]
    rows, length = mine[0]["input_ids"].shape
    return get_forward_backward_func()(
        forward_step_func=step,
        data_iterator=iterators if len(model) > 1 else iterators[0],
        model=model,
        num_microbatches=len(mine),
        micro_batch_size=rows,
        seq_length=length,
        **options,
    )


def _logits_step(data: Iterator[Microbatch], model: torch.nn.Module) -> tuple[torch.Tensor, Callable]:
    batch = next(data)
    logits = model(batch["input_ids"], None, None, pixel_values=batch.get("pixel_values"))
    return logits, lambda output, non_loss_data: output.detach().clone()


def _loss_step(data: Iterator[Microbatch], model: torch.nn.Module) -> tuple[torch.Tensor, Callable]:
    from megatron.bridge.training.losses import create_masked_next_token_loss_function

    batch = next(data)
    mask = (batch["labels"] != IGNORED).float()
    output = model(
        batch["input_ids"],
        None,
        None,
        labels=batch["labels"],
        loss_mask=mask,
        pixel_values=batch.get("pixel_values"),
    )
    losses, mask = output if isinstance(output, tuple) else (output, mask)
    return losses, create_masked_next_token_loss_function(mask, True, False)


def _mean_per_token(entries: list[dict[str, torch.Tensor]]) -> float:
    """The loss that Megatron-Bridge's loop reports, on the last pipeline stage: over microbatches, DP and CP ranks."""
    from megatron.core import parallel_state

    if not entries:
        return float("nan")
    total = torch.stack([entry["lm loss"] for entry in entries]).sum(dim=0)
    torch.distributed.all_reduce(total, group=parallel_state.get_data_parallel_group(with_context_parallel=True))
    return float(total[0] / total[1])


def _exported_gradients(bridge: Any, model: list[torch.nn.Module]) -> dict[str, torch.Tensor]:
    parameters = [parameter for chunk in model for parameter in chunk.parameters()]
    weights = [parameter.detach().clone() for parameter in parameters]
    for chunk in model:
        _gather_gradients(chunk)
    for parameter in parameters:
        parameter.data.copy_(parameter.main_grad)
    gradients = {name: weight.clone() for name, weight in bridge.export_hf_weights(model, show_progress=False)}
    for parameter, weight in zip(parameters, weights, strict=True):
        parameter.data.copy_(weight)
    return gradients


def _gather_gradients(chunk: torch.nn.Module) -> None:
    """All-gather the gradients: the distributed optimizer reduces one shard of every bucket on each rank."""
    if not chunk.ddp_config.use_distributed_optimizer:
        return
    for group in (*chunk.bucket_groups, *chunk.expert_parallel_bucket_groups):
        ranks = group.intra_distributed_optimizer_instance_group
        for bucket in group.buckets:
            mine = bucket.grad_data.chunk(ranks.size())[ranks.rank()].clone()
            torch.distributed.all_gather_into_tensor(bucket.grad_data, mine, group=ranks)


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
    """The logits of all data-parallel ranks, in the order of the microbatches."""
    from megatron.core import parallel_state

    group = parallel_state.get_data_parallel_group()
    ranks: list[Any] = [None] * group.size()
    torch.distributed.all_gather_object(ranks, logits, group=group)
    return [ranks[index % len(ranks)][index // len(ranks)] for index in range(len(ranks) * len(logits))]
