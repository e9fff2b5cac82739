"""Training of gpt-oss-20B-Vision on one GPU: ceilings, slices of the model, and an estimate of tokens/s per GPU.

    uv run python tests/benchmarks/bench_gpu.py FOLDER [--toy] [--cases PATTERN ...] [--seconds 170]

One GPU cannot hold the model, so slices of it at full width are timed: the real Megatron model with few layers, wrapped
in Megatron's data parallelism. The difference between two numbers of layers gives the time of a layer and that of all
the rest. Slices of the share `ep8` have the 4 experts that a GPU holds with expert parallelism 8: each token chooses
all 4, so the experts compute on as many tokens as with balanced routing. Those of `ep1` have all 32 experts.

Each case is isolated: one that fails is recorded with its error, the traceback goes to FOLDER/errors.txt, and the
next one runs. FOLDER/results.json and FOLDER/table.txt are written again after every case, FOLDER/profile-*.txt holds
the kernels. `--toy` runs the same on a CPU with tiny sizes, to show that the script works; its times mean nothing.
"""

import argparse
import contextlib
import faulthandler
import fnmatch
import gc
import itertools
import json
import logging
import math
import os
import platform
import statistics
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

TORCH, ENGINE = "torch", "transformer_engine"
GIB = 2**30
ENVIRONMENT = {
    "CUDA_DEVICE_MAX_CONNECTIONS": "1",  # as Megatron's users set it; Transformer Engine warns without it
    "NCCL_SOCKET_IFNAME": "lo",  # one rank needs no network, and there may be none
    "GLOO_SOCKET_IFNAME": "lo",
    "HF_HUB_OFFLINE": "1",
}
PEAK_FLOPS = 989e12
"""Dense bf16 of an H100 or H200 SXM, by its data sheet."""
LINK_BYTES_PER_SECOND = 350e9
"""Assumed rate of an all-to-all over NVLink, per GPU and direction."""
ACCUMULATION = 8
"""Assumed microbatches of an optimizer step."""
ANCHORS = (
    "Other people's numbers for gpt-oss-20b without a vision tower, in tokens/s per GPU, quoted and not measured here:",
    "  13,058  NVIDIA NeMo Automodel's pages: 8 H100, FSDP 8, EP 8, DeepEP",
    "   5,851  Megatron-Bridge's performance page: 16 H100, natural routing, not tuned",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """What is measured: the model, its slices, and the number of repeats."""

    config: dict[str, Any] = field(default_factory=dict)
    """Fields of `GPTOSSVisionConfig`; its defaults have the widths of 20B and 120B, and the depth of 120B."""
    model_layers: int = 24
    experts: dict[str, int] = field(default_factory=lambda: {"ep8": 4, "ep1": 32})
    layers: dict[str, tuple[int, int]] = field(default_factory=lambda: {"ep8": (4, 8), "ep1": (2, 4)})
    length: int = 4096
    rows: int = 2
    images_per_row: int = 4
    backends: tuple[str, ...] = (ENGINE, TORCH)
    products: tuple[tuple[int, int, int], ...] = ((8192, 8192, 8192), (8192, 2880, 5760))
    copied: int = 2 * GIB
    attention: tuple[tuple[int, int], ...] = ((4096, 2), (8192, 1))
    """Length and rows."""
    warmup: int = 5
    repeats: int = 10

    @property
    def ranks(self) -> int:
        """Ranks of expert parallelism of the share `ep8`."""
        return self.experts["ep1"] // self.experts["ep8"]


TOY = Sizes(
    config={
        "vocab_size": 256,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "sliding_window": 8,
        "max_position_embeddings": 256,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 150000.0,
            "factor": 2.0,
            "original_max_position_embeddings": 128,
        },
        "image_token_id": 250,
        "pad_token_id": 0,
        "vision_embed_dim": 16,
        "vision_patch_size": 4,
        "vision_num_layers": 2,
        "vision_num_heads": 2,
        "vision_image_size": 8,
    },
    model_layers=4,
    experts={"ep8": 4, "ep1": 8},
    layers={"ep8": (1, 2), "ep1": (1, 2)},
    length=64,
    images_per_row=2,
    backends=(TORCH,),
    products=((64, 64, 64), (64, 32, 96)),
    copied=2**16,
    attention=((128, 2), (256, 1)),
    warmup=1,
    repeats=3,
)


class Skipped(Exception):
    """A case that cannot be measured here, with the reason."""


# --- times -------------------------------------------------------------------------------------------------------


def timed(run: Callable[[], object], sizes: Sizes) -> dict[str, float]:
    """Median time of a call in seconds, by CUDA events, with its spread; ``first`` includes compilation."""
    started = time.perf_counter()
    run()
    torch.cuda.synchronize()
    first = time.perf_counter() - started
    for _ in range(sizes.warmup - 1):
        run()
    torch.cuda.synchronize()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(sizes.repeats + 1)]
    events[0].record()
    for event in events[1:]:
        run()
        event.record()
    torch.cuda.synchronize()
    times = [one.elapsed_time(other) / 1e3 for one, other in itertools.pairwise(events)]
    return {"seconds": statistics.median(times), "fastest": min(times), "slowest": max(times), "first": first}


def matrix_product(bench: "Bench", shape: tuple[int, int, int]) -> dict[str, float]:
    """A bf16 product of ``[m, k]`` and ``[k, n]`` of normally distributed numbers."""
    m, k, n = shape
    left, right = (torch.randn(size, device=bench.device, dtype=torch.bfloat16) for size in ((m, k), (k, n)))
    result = timed(lambda: left @ right, bench.sizes)
    return result | {"tflops": 2 * m * k * n / result["seconds"] / 1e12}


def device_copy(bench: "Bench") -> dict[str, float]:
    """A copy within the device's memory; the rate counts bytes read and bytes written."""
    source = torch.randint(0, 256, (bench.sizes.copied,), device=bench.device, dtype=torch.uint8)
    target = torch.empty_like(source)
    result = timed(lambda: target.copy_(source), bench.sizes)
    return result | {"tb_per_s": 2 * bench.sizes.copied / result["seconds"] / 1e12}


# --- attention ---------------------------------------------------------------------------------------------------


def attention(bench: "Bench", backend: str, length: int, rows: int, window: int | None) -> dict[str, Any]:
    """Attention alone, forward and backward, from and to Megatron's layout ``[s, b, h, d]``."""
    config = bench.config("ep1", 1)
    heads, groups, size = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    made = {"device": bench.device, "dtype": torch.bfloat16}
    shapes = [(length, rows, count, size) for count in (heads, groups, groups)]
    tensors = [torch.randn(shape, **made).requires_grad_() for shape in shapes]
    attend, sinks = ATTENTION[backend](bench, heads, groups, size, window)
    grad_output = torch.randn(length, rows, heads * size, **made)

    def step() -> None:
        torch.autograd.grad(attend(*tensors), [*tensors, sinks], grad_output)

    result = timed(step, bench.sizes)
    pairs = sum(min(query + 1, window or length) for query in range(length))
    # Two products forward and four backward; kernels compute one of them again, which is not counted.
    result |= {"tflops": 12 * heads * size * pairs * rows / result["seconds"] / 1e12}
    return result | ({"kernel": engine_kernel()} if backend == ENGINE else {})


def torch_attention(bench: "Bench", heads: int, groups: int, size: int, window: int | None) -> tuple:
    """The core attention of the back end `torch`, and its sinks."""
    from gpt_oss_vision.bridge.ops.attention import fused_sink_attention

    sinks = torch.randn(heads, device=bench.device, dtype=torch.bfloat16).requires_grad_()

    def attend(*tensors: torch.Tensor) -> torch.Tensor:
        parts = (tensor.permute(1, 2, 0, 3) for tensor in tensors)
        context = fused_sink_attention(*parts, sinks, scale=size**-0.5, window=window)
        return context.permute(2, 0, 1, 3).flatten(2).contiguous()

    return attend, sinks


def engine_attention(bench: "Bench", heads: int, groups: int, size: int, window: int | None) -> tuple:
    """Transformer Engine's attention with Megatron's arguments, and its sinks."""
    bench.check_engine()
    from transformer_engine.pytorch import DotProductAttention

    module = DotProductAttention(
        heads,
        size,
        num_gqa_groups=groups,
        attention_dropout=0.0,
        qkv_format="sbhd",
        attn_mask_type="causal",
        window_size=None if window is None else (window - 1, 0),
        softmax_scale=size**-0.5,
        softmax_type="learnable",
    )
    torch.nn.init.normal_(module.softmax_offset)
    return module, module.softmax_offset


def engine_kernel() -> str:
    """The implementation that Transformer Engine (2.12) chose last: fused (cuDNN), flash or unfused."""
    try:
        from transformer_engine.pytorch.attention.dot_product_attention import _attention_backends as chosen

        return " ".join(name for name in chosen if name.startswith("use_") and chosen[name])
    except ImportError as error:  # a private name: the time counts without it
        return f"unknown: {error}"


ATTENTION = {TORCH: torch_attention, ENGINE: engine_attention}


# --- slices of the model -----------------------------------------------------------------------------------------


@dataclass(slots=True)
class Slice:
    """A built slice: its finalized provider, the model in Megatron's data parallelism, and memory before it."""

    provider: Any
    model: torch.nn.Module
    allocated_before: int

    @property
    def parameters(self) -> int:
        """Trainable parameters."""
        return sum(parameter.numel() for parameter in self.model.parameters() if parameter.requires_grad)


def start_megatron(stack: contextlib.ExitStack) -> dict[str, float]:
    """Import Megatron, and make the process groups of one rank; without CUDA, everything after runs on the CPU."""
    started = time.perf_counter()
    logging.getLogger("megatron").setLevel(logging.ERROR)  # hundreds of lines about one rank on a CPU
    from gpt_oss_vision.bridge import mcore

    mcore.register()
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    from gpt_oss_vision.bridge.mcore import cpu

    imported = time.perf_counter()
    stack.enter_context(cpu.runtime())
    torch.cuda.set_device(0)
    file = f"{stack.enter_context(tempfile.TemporaryDirectory())}/store"
    store = torch.distributed.FileStore(file, 1)
    torch.distributed.init_process_group("nccl" if cpu.cuda_is_real() else "gloo", store=store, rank=0, world_size=1)
    stack.callback(torch.distributed.destroy_process_group)
    parallel_state.initialize_model_parallel(create_gloo_process_groups=False)
    stack.callback(parallel_state.destroy_model_parallel)
    model_parallel_cuda_manual_seed(0)
    return {"seconds": time.perf_counter() - started, "imports": imported - started}


def provider_of(bench: "Bench", backend: str, share: str, layers: int) -> Any:
    """The finalized provider of a slice."""
    from gpt_oss_vision.bridge.mcore.provider import provider_from_config

    provider = provider_from_config(bench.config(share, layers), backend=backend, seq_length=bench.sizes.length)
    provider.finalize()
    return provider


def build(bench: "Bench", backend: str, share: str, layers: int) -> Slice:
    """Build a slice with random weights and gradients in fp32."""
    from megatron.bridge.training.config import DistributedDataParallelConfig

    before = torch.cuda.memory_allocated()

    def wrapped() -> Slice:
        provider = provider_of(bench, backend, share, layers)
        ddp = DistributedDataParallelConfig(
            use_distributed_optimizer=True, grad_reduce_in_fp32=True, overlap_grad_reduce=False
        )
        ddp.finalize()
        (model,) = provider.provide_distributed_model(ddp_config=ddp, wrap_with_ddp=True)
        model.train()
        model.zero_grad_buffer()
        return Slice(provider, model, before)

    try:
        # The tower's 300 M parameters take some ten seconds to initialise on the CPU.
        with bench.device:
            return wrapped()
    except Exception:  # noqa: BLE001 - whatever does not work inside the context may work without
        bench.note_error(f"building {backend} {share} {layers} on the device, done again on the CPU")
    release()
    return wrapped()


def batch_of(bench: "Bench", images_per_row: int) -> dict[str, torch.Tensor]:
    """Random tokens, labels and pixels; the placeholders of each image follow a text token."""
    config, sizes = bench.config("ep1", 1), bench.sizes
    shape, span = (sizes.rows, sizes.length), config.num_image_tokens
    tokens, labels = (torch.randint(0, config.image_token_id, shape, device=bench.device) for _ in range(2))
    for image in range(images_per_row):
        start = 1 + image * (span + 1)
        tokens[:, start : start + span] = config.image_token_id
    batch = {"input_ids": tokens, "labels": labels}
    if images_per_row:
        pixels = (sizes.rows * images_per_row, *config.image_shape)
        batch["pixel_values"] = torch.randn(pixels, device=bench.device, dtype=torch.bfloat16)
    return batch


def forward_backward(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """One microbatch; the gradients are added to those in fp32. Returns the loss."""
    inputs = dict(batch)
    output = model(inputs.pop("input_ids"), None, None, **inputs)
    loss = output.float().mean()
    loss.backward()
    return loss.detach()


def slice_step(bench: "Bench", backend: str, share: str, layers: int, images_per_row: int) -> dict[str, float]:
    """Forward and backward pass of a slice, its memory and the estimate of it."""
    built = bench.slice(backend, share, layers)
    batch = batch_of(bench, images_per_row)
    losses: list[torch.Tensor] = []
    torch.cuda.reset_peak_memory_stats()
    result = timed(lambda: losses.append(forward_backward(built.model, batch)), bench.sizes)
    loss = float(losses[-1])
    if not math.isfinite(loss):
        raise RuntimeError(f"The loss is {loss}.")
    flops = step_flops(built.provider, bench.sizes, images_per_row)
    return result | {
        "tokens_per_s": bench.sizes.rows * bench.sizes.length / result["seconds"],
        "tflops": flops / result["seconds"] / 1e12,
        "mfu": flops / result["seconds"] / PEAK_FLOPS,
        "parameters": built.parameters,
        "loss": loss,
        **memory(built, bench.sizes, images_per_row, with_optimizer=False),
    }


def step_flops(provider: Any, sizes: Sizes, images_per_row: int) -> float:
    """Operations of a forward and backward pass of one microbatch, by bridge/mcore/flops.py."""
    from gpt_oss_vision.bridge.mcore.flops import decoder_flops, image_flops

    images = sizes.rows * images_per_row
    return decoder_flops(provider, sizes.rows * sizes.length).training() + images * image_flops(provider).training()


def memory(built: Slice, sizes: Sizes, images_per_row: int, *, with_optimizer: bool) -> dict[str, float]:
    """Peak memory since the last reset beside the estimate by bridge/mcore/memory.py, both in GiB."""
    from gpt_oss_vision.bridge.mcore.memory import memory_per_rank

    batch = {"micro_batch_size": sizes.rows, "microbatches": 1, "images": sizes.rows * images_per_row}
    estimate = memory_per_rank(built.provider, world_size=1, **batch)
    expected = estimate.total - (0 if with_optimizer else estimate.optimizer)
    return {
        "peak_gib": (torch.cuda.max_memory_allocated() - built.allocated_before) / GIB,
        "estimated_gib": expected / GIB,
    }


def optimizer_step(bench: "Bench", backend: str, share: str, layers: int) -> dict[str, float]:
    """Megatron's Adam with clipping on all parameters of a slice, alone, and the time of a share of the model."""
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

    built = bench.slice(backend, share, layers)
    settings = OptimizerConfig(
        lr=1e-6,
        weight_decay=0.1,
        bf16=True,
        params_dtype=torch.bfloat16,
        clip_grad=1.0,
        use_distributed_optimizer=True,
    )
    torch.cuda.reset_peak_memory_stats()
    optimizer = get_megatron_optimizer(settings, [built.model], use_gloo_process_groups=False)
    forward_backward(built.model, batch_of(bench, bench.sizes.images_per_row))
    result = timed(optimizer.step, bench.sizes)
    # With the states in memory, the peak of a whole training step.
    forward_backward(built.model, batch_of(bench, bench.sizes.images_per_row))
    share_of_model = parameters_of_model(bench) / bench.sizes.ranks
    peak = memory(built, bench.sizes, bench.sizes.images_per_row, with_optimizer=True)
    bench.drop_slice()  # the model holds the states
    return (
        result
        | peak
        | {
            "parameters": built.parameters,
            "seconds_of_share": result["seconds"] / built.parameters * share_of_model,
        }
    )


def parameters_of_model(bench: "Bench") -> int:
    """Parameters of the whole model."""
    from gpt_oss_vision.bridge.mcore.memory import parameters_of_stage

    whole = provider_of(bench, TORCH, "ep1", bench.sizes.model_layers)
    return sum(part.count for part in parameters_of_stage(whole, 0))


# --- profile -----------------------------------------------------------------------------------------------------


def profile(bench: "Bench", backend: str, share: str, layers: int) -> dict[str, float]:
    """The kernels of one step, into a file; of the second one that is profiled, the first starts the profiler."""
    built = bench.slice(backend, share, layers)
    batch = batch_of(bench, bench.sizes.images_per_row)
    is_cuda = bench.device.type == "cuda"
    activity = torch.profiler.ProfilerActivity.CUDA if is_cuda else torch.profiler.ProfilerActivity.CPU
    for _ in range(bench.sizes.warmup):
        forward_backward(built.model, batch)
    torch.cuda.synchronize()
    for _ in range(2):
        with torch.profiler.profile(activities=[activity], acc_events=True) as profiler:
            forward_backward(built.model, batch)
            torch.cuda.synchronize()
    kind = torch.autograd.DeviceType.CUDA if is_cuda else torch.autograd.DeviceType.CPU
    kernels = [
        (event.name, event.time_range.start, event.time_range.end)
        for event in profiler.events()
        if event.device_type == kind and not getattr(event, "is_user_annotation", False)
    ]
    if not kernels:
        raise RuntimeError("The profiler recorded no kernels.")
    busy = busy_seconds([(start, end) for _, start, end in kernels])
    span = (max(end for *_, end in kernels) - min(start for _, start, _ in kernels)) / 1e6
    result = {"seconds": span, "busy": busy, "share_without_kernel": 1 - busy / span, "kernels": len(kernels)}
    step = bench.results.get(slice_name(backend, share, layers), {}).get("seconds")
    if step:
        result["share_without_kernel_unprofiled"] = 1 - busy / step
    text = "\n".join([f"{backend}, {share}, {layers} layers", *described(result), *table_of_kernels(kernels)])
    (bench.folder / f"profile-{backend}.txt").write_text(text + "\n")
    return result


def busy_seconds(intervals: list[tuple[float, float]]) -> float:
    """Length of the union of intervals in microseconds."""
    busy, reached = 0.0, -math.inf
    for start, end in sorted(intervals):
        busy += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return busy / 1e6


def table_of_kernels(kernels: list[tuple[str, float, float]], count: int = 25) -> list[str]:
    """The kernels with the largest total times: milliseconds, share of the sum, calls, name."""
    totals: dict[str, list[float]] = {}
    for name, start, end in kernels:
        totals.setdefault(name, []).append((end - start) / 1e3)
    whole = sum(sum(times) for times in totals.values())
    largest = sorted(totals.items(), key=lambda entry: -sum(entry[1]))[:count]
    head = f"{'ms':>10} {'share':>7} {'calls':>6}  kernel"
    return [
        head,
        *(f"{sum(times):10.3f} {sum(times) / whole:7.1%} {len(times):6}  {name[:160]}" for name, times in largest),
    ]


# --- the estimate ------------------------------------------------------------------------------------------------


def all_to_all_seconds(bench: "Bench") -> float:
    """Assumed: dispatch and combine, forward and backward, in each layer, not overlapped with computation."""
    sizes, config = bench.sizes, bench.config("ep1", 1)
    away = 1 - 1 / sizes.ranks
    sent = sizes.rows * sizes.length * config.num_experts_per_tok * away * config.hidden_size * 2
    return sizes.model_layers * 4 * sent / LINK_BYTES_PER_SECOND


def slopes(bench: "Bench", backend: str, share: str) -> dict[str, float] | None:
    """Seconds per layer, of all the rest, and of the images in it; None while a slice has no time."""
    few, many = bench.sizes.layers[share]
    times = [bench.results.get(slice_name(backend, share, layers), {}).get("seconds") for layers in (few, many)]
    if None in times:
        return None
    slope = (times[1] - times[0]) / (many - few)
    result = {"slope": slope, "intercept": times[0] - few * slope}
    text = bench.results.get(slice_name(backend, share, few) + "-text", {}).get("seconds")
    return result | ({} if text is None else {"images": times[0] - text})


def estimate(bench: "Bench", backend: str) -> dict[str, float] | None:
    """Tokens/s per GPU of the whole model with expert parallelism; None while a time is missing."""
    parts = slopes(bench, backend, "ep8")
    optimizers = [bench.results.get(f"optimizer-{name}", {}) for name in (backend, *bench.sizes.backends)]
    optimizer = next((result["seconds_of_share"] for result in optimizers if "seconds_of_share" in result), None)
    if parts is None or optimizer is None:
        return None
    exchange = all_to_all_seconds(bench)
    step = bench.sizes.model_layers * parts["slope"] + parts["intercept"] + optimizer / ACCUMULATION + exchange
    whole = provider_of(bench, TORCH, "ep1", bench.sizes.model_layers)
    flops = step_flops(whole, bench.sizes, bench.sizes.images_per_row)
    return parts | {
        "optimizer": optimizer / ACCUMULATION,
        "all_to_all": exchange,
        "seconds": step,
        "tokens_per_s_per_gpu": bench.sizes.rows * bench.sizes.length / step,
        "mfu": flops / step / PEAK_FLOPS,
    }


def estimates(bench: "Bench") -> dict[str, Any]:
    """By back end: the estimate, and time per layer and of the rest of each share."""
    return {
        backend: {"estimate": estimate(bench, backend)}
        | {share: slopes(bench, backend, share) for share in bench.sizes.layers}
        for backend in bench.sizes.backends
    }


def assumptions(bench: "Bench") -> list[str]:
    """What the estimate rests on, beside the times."""
    sizes = bench.sizes
    few, many = sizes.layers["ep8"]
    exchange = 1e3 * all_to_all_seconds(bench)
    text = f"""
microbatch of {sizes.rows} rows of {sizes.length} tokens with {sizes.images_per_row} images each
weights (std 0.02), tokens, labels and pixels are random; everything is trained, nothing is recomputed
step = {sizes.model_layers} * slope + intercept + optimizer / accumulation + all-to-all
tokens/s per GPU = {sizes.rows * sizes.length} / step
slope (of a layer) and intercept (embedding, tower, head, loss): from slices of {few} and {many} layers of share ep8
accumulation = {ACCUMULATION} microbatches (assumed)
optimizer: time per parameter of a slice * parameters of the model / {sizes.ranks} GPUs (distributed optimizer)
all-to-all: {sizes.model_layers} layers * 4 * bytes that leave a GPU / {LINK_BYTES_PER_SECOND / 1e9:.0f} GB/s = \
{exchange:.1f} ms (assumed, not measured), not overlapped
routing is balanced over GPUs; the sort by expert after the all-to-all moves one chunk an expert, not one per GPU
reducing gradients and gathering parameters over data parallelism, once in a step, are not included
share ep1: routing by random weights, about balanced; its slope is that of a layer without expert parallelism
MFU: operations by bridge/mcore/flops.py, with the tower's, against {PEAK_FLOPS / 1e12:.0f} TFLOP/s
memory estimate: bridge/mcore/memory.py, without the optimizer's part in the cases where none is built"""
    return text.strip().split("\n")


# --- cases and results -------------------------------------------------------------------------------------------


class Bench:
    """The cases of a run, one built slice at a time, and the results so far."""

    def __init__(self, folder: Path, sizes: Sizes, device: torch.device, seconds: float):
        self.folder, self.sizes, self.device = folder, sizes, device
        self.machine = machine(device)
        self.deadline = time.monotonic() + seconds
        self.results: dict[str, dict[str, Any]] = {}
        self.lost_after = ""
        self._slice: tuple[tuple[str, str, int], Slice] | None = None

    def config(self, share: str, layers: int) -> Any:
        """The config of a slice; of the whole model with the share `ep1` and all layers."""
        from gpt_oss_vision.bridge.hf.configuration_gpt_oss_vision import GPTOSSVisionConfig

        experts = self.sizes.experts[share]
        fields = {"num_hidden_layers": layers, "num_local_experts": experts, "dtype": torch.bfloat16}
        return GPTOSSVisionConfig(**self.sizes.config | fields)

    def check_engine(self) -> None:
        """Skip a case of Transformer Engine where it cannot run."""
        from gpt_oss_vision.bridge.mcore.backend import transformer_engine_problem

        problem = transformer_engine_problem(1)
        if problem:
            raise Skipped(f"Transformer Engine cannot run: {problem}")

    def slice(self, backend: str, share: str, layers: int) -> Slice:
        """The slice, built unless the last case had the same."""
        key = backend, share, layers
        if self._slice is None or self._slice[0] != key:
            self.drop_slice()
            if backend == ENGINE:
                self.check_engine()
            self._slice = key, build(self, *key)
        return self._slice[1]

    def drop_slice(self) -> None:
        """Free the memory of the built slice."""
        self._slice = None
        release()

    def run(self, name: str, case: Callable[[], dict[str, Any]]) -> None:
        """Run a case, record its result or why there is none, and write the files."""
        started = time.monotonic()
        try:
            if self.lost_after:
                raise Skipped(f"the CUDA device is unusable after {self.lost_after}")
            if started > self.deadline:
                raise Skipped("the time was over")
            result = case() | {"status": "ok"}
        except Skipped as reason:
            result = {"status": "skipped", "reason": str(reason)}
        except Exception as error:  # noqa: BLE001 - recorded, and the other cases go on
            result = {"status": "error", "error": f"{type(error).__name__}: {error}"[:2000]}
            self.note_error(name)
        if result["status"] == "error":  # outside of the handler, whose traceback holds tensors
            self._slice = None
            self._check_device(name)
        self.results[name] = result | {"wall": time.monotonic() - started}
        print("\n".join(lines_of(name, self.results[name])), flush=True)
        self.write()

    def _check_device(self, name: str) -> None:
        """Record whether an error has left the CUDA context unusable, as a failed assertion of a kernel does."""
        try:
            release()
            torch.zeros(1, device=self.device).item()
        except Exception:  # noqa: BLE001 - torch raises several types
            self.lost_after = name
            self.note_error(f"using the device after {name}")

    def note_error(self, what: str) -> None:
        """Append the traceback of the current exception to errors.txt."""
        with (self.folder / "errors.txt").open("a") as file:
            file.write(f"=== {what}\n{traceback.format_exc()}\n")

    def write(self) -> None:
        """Write results.json and table.txt, each in one piece."""
        try:
            summary = {"assumptions": assumptions(self), "estimates": estimates(self)}
        except Exception:  # noqa: BLE001 - the times must not be lost with the estimate
            self.note_error("the estimate")
            summary = {"assumptions": [], "estimates": {}}
        report = {"machine": self.machine, **summary, "anchors": ANCHORS, "cases": self.results}
        replace(self.folder / "results.json", json.dumps(report, indent=1, default=str))
        replace(self.folder / "table.txt", "\n".join(table(report)) + "\n")


def release() -> None:
    """Return unused memory to the device."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


def replace(path: Path, text: str) -> None:
    """Write a file so that a killed run leaves the old or the new one."""
    part = path.with_name(path.name + ".partial")
    part.write_text(text)
    part.replace(path)


def machine(device: torch.device) -> dict[str, Any]:
    """The device and the versions."""
    is_cuda = device.type == "cuda"
    versions = {}
    for name in ("megatron-core", "megatron-bridge", "transformers", "transformer-engine"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return {
        "device": torch.cuda.get_device_name(0) if is_cuda else platform.machine(),
        "memory_gib": torch.cuda.get_device_properties(0).total_memory / GIB if is_cuda else None,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version() if is_cuda else None,
        **versions,
    }


def described(values: dict[str, Any]) -> Iterator[str]:
    """Name and value of every number."""
    for key, value in values.items():
        yield f"{key} {value:.5g}" if isinstance(value, float) else f"{key} {value}"


def lines_of(name: str, result: dict[str, Any]) -> list[str]:
    """A result as text: milliseconds of the median, then the other numbers."""
    others = {key: value for key, value in result.items() if key not in ("status", "seconds")}
    if "seconds" not in result:
        return [f"{name:40} {result['status']}: {result.get('reason') or result.get('error')}"]
    return [f"{name:40} {1e3 * result['seconds']:12.3f} ms", "    " + ", ".join(described(others))]


def table(report: dict[str, Any]) -> Iterator[str]:
    """The report as text."""
    yield ", ".join(described(report["machine"]))
    yield from ("", "Times (median); wall, first, fastest and slowest in seconds")
    for name, result in report["cases"].items():
        yield from lines_of(name, result)
    yield from ("", "Estimates; all but tokens/s and MFU in seconds")
    for backend, parts in report["estimates"].items():
        for name, values in parts.items():
            yield f"{backend} {name}: " + (", ".join(described(values)) if values else "a time is missing")
    yield from ("", *report["anchors"], "", "Assumptions", *(f"- {line}" for line in report["assumptions"]))


def slice_name(backend: str, share: str, layers: int) -> str:
    return f"slice-{backend}-{share}-{layers}"


def cases(bench: Bench) -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    """Name and function of every case, the most important first; those of a slice follow one another."""
    sizes = bench.sizes
    for shape in sizes.products:
        yield "product-" + "x".join(map(str, shape)), partial(matrix_product, bench, shape)
    yield "copy", partial(device_copy, bench)
    few, many = sizes.layers["ep8"]
    for backend in sizes.backends:
        small = backend, "ep8", few
        yield slice_name(*small), partial(slice_step, bench, *small, sizes.images_per_row)
        yield slice_name(*small) + "-text", partial(slice_step, bench, *small, 0)
        yield f"optimizer-{backend}", partial(optimizer_step, bench, *small)
        yield slice_name(backend, "ep8", many), partial(slice_step, bench, backend, "ep8", many, sizes.images_per_row)
    window = bench.config("ep1", 1).sliding_window
    for length, rows in sizes.attention:
        for kind, width in (("window", window), ("full", None)):
            for backend in sizes.backends:
                name = f"attention-{backend}-{length}-{kind}"
                yield name, partial(attention, bench, backend, length, rows, width)
    for backend in sizes.backends:
        yield f"profile-{backend}", partial(profile, bench, backend, "ep8", few)
    for backend in sizes.backends:
        for layers in sizes.layers["ep1"]:
            name = slice_name(backend, "ep1", layers)
            yield name, partial(slice_step, bench, backend, "ep1", layers, sizes.images_per_row)


def run(folder: Path, sizes: Sizes, device: str, seconds: float, patterns: tuple[str, ...] = ("*",)) -> None:
    """Run the cases whose names match a pattern; none starts after ``seconds``."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "errors.txt").write_text("")
    with (folder / "errors.txt").open("a") as errors, contextlib.ExitStack() as stack:
        # A case that hangs ends the process, with the stacks of its threads.
        faulthandler.dump_traceback_later(seconds + 60, exit=True, file=errors)
        stack.callback(faulthandler.cancel_dump_traceback_later)
        torch.manual_seed(0)
        bench = Bench(folder, sizes, torch.device(device), seconds)
        bench.run("megatron", partial(start_megatron, stack))
        named = dict(cases(bench))
        chosen = [name for name in named if any(fnmatch.fnmatch(name, pattern) for pattern in patterns)]
        if not chosen:
            raise SystemExit(f"No case matches {' '.join(patterns)}; there are {', '.join(named)}.")
        for name in chosen:
            bench.run(name, named[name])
        bench.drop_slice()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="for results.json, table.txt, errors.txt and the profiles")
    parser.add_argument("--toy", action="store_true", help="tiny sizes on a CPU")
    parser.add_argument("--cases", nargs="+", default=["*"], help="names or patterns such as 'slice-torch-*'")
    parser.add_argument("--seconds", type=float, default=170.0, help="no case starts later than this")
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not arguments.toy:
        parser.error("there is no CUDA device; --toy runs tiny sizes on a CPU")
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    if device == "cpu":
        torch.set_num_threads(1)  # more only wait for each other at these sizes
    run(arguments.folder, TOY if arguments.toy else Sizes(), device, arguments.seconds, tuple(arguments.cases))
    print((arguments.folder / "table.txt").read_text())


if __name__ == "__main__":
    main()
