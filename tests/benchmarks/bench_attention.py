"""Fused sink attention against transformers' gpt-oss eager attention, forward and backward, in one process.

    uv run python tests/benchmarks/bench_attention.py [--tokens 2048] [--window 128] [--repeats 5] [--threads 1]

The floor is the time of the seven matrix products over visible query-key pairs, forward and backward (the backward pass
computes the logits again), at the measured speed of a dense matrix product of the same dtype.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from types import SimpleNamespace

import torch
from transformers.models.gpt_oss.modeling_gpt_oss import eager_attention_forward

from gpt_oss_vision.bridge.ops.attention import fused_sink_attention

HEADS, GROUPS, SIZE = 64, 8, 64
SCALE = SIZE**-0.5
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def inputs(tokens: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """Query, key and value in the layout of a model, `[b, s, h, d]` transposed to `[b, h, s, d]`, and sinks."""
    shapes = [(1, tokens, heads, SIZE) for heads in (HEADS, GROUPS, GROUPS)]
    tensors = [torch.randn(shape).to(dtype).transpose(1, 2).requires_grad_() for shape in shapes]
    return [*tensors, (2 * torch.randn(HEADS)).to(dtype).requires_grad_()]


def eager(tensors: list[torch.Tensor], mask: torch.Tensor) -> torch.Tensor:
    module = SimpleNamespace(num_key_value_groups=HEADS // GROUPS, sinks=tensors[3], training=True)
    return eager_attention_forward(module, *tensors[:3], mask, SCALE)[0]


def fused(tensors: list[torch.Tensor], window: int | None) -> torch.Tensor:
    return fused_sink_attention(*tensors, scale=SCALE, window=window).transpose(1, 2)


def eager_mask(visible: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The mask that eager attention gets from transformers; models build it once for all layers, so it is not timed."""
    return torch.zeros(visible.shape, dtype=dtype).masked_fill(~visible, torch.finfo(dtype).min)[None, None]


def step(
    attend: Callable[[], torch.Tensor], tensors: list[torch.Tensor], grad_output: torch.Tensor
) -> list[torch.Tensor]:
    output = attend()
    return [output.detach(), *torch.autograd.grad(output, tensors, grad_output)]


def seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def matrix_product(dtype: torch.dtype) -> Callable[[], torch.Tensor]:
    """A matrix product of 2 * 2048 ** 3 floating-point operations."""
    left, right = torch.randn(2048, 2048).to(dtype), torch.randn(2048, 2048).to(dtype)
    return lambda: left @ right


def compare(name: str, tokens: int, window: int | None, repeats: int) -> None:
    dtype = DTYPES[name]
    tensors = inputs(tokens, dtype)
    grad_output = torch.randn(1, tokens, HEADS, SIZE).to(dtype)
    distance = torch.arange(tokens)[:, None] - torch.arange(tokens)
    visible = (distance >= 0) & (distance < (window or tokens))
    mask = eager_mask(visible, dtype)
    runs: dict[str, Callable[[], object]] = {
        "eager": lambda: step(lambda: eager(tensors, mask), tensors, grad_output),
        "fused": lambda: step(lambda: fused(tensors, window), tensors, grad_output),
        "product": matrix_product(dtype),
    }
    check(step(lambda: fused(tensors, window), tensors, grad_output), runs["eager"](), dtype)
    times: dict[str, list[float]] = {run: [] for run in runs}
    for _ in range(repeats):  # in turns, so that a slow minute of the machine affects all three
        for run, function in runs.items():
            times[run].append(seconds(function))
    peer, ours, product = (statistics.median(times[run]) for run in runs)
    floor = 7 * 2 * int(visible.sum()) * HEADS * SIZE / (2 * 2048**3 / product)
    print(
        f"{name} {tokens} tokens, {f'window {window}' if window else 'full':10} "
        f"ours {1e3 * ours:7.0f} ms | eager {1e3 * peer:7.0f} ms | {peer / ours:5.1f}x faster | "
        f"floor {1e3 * floor:6.0f} ms, {100 * floor / ours:3.0f} % of it reached",
        flush=True,
    )


def check(found: list[torch.Tensor], expected: list[torch.Tensor], dtype: torch.dtype) -> None:
    """Assert that outputs and gradients agree within the rounding of the dtype."""
    tolerance = 1e-4 if dtype == torch.float32 else 3e-2
    for ours, theirs in zip(found, expected, strict=True):
        error = (ours.float() - theirs.float()).norm() / theirs.float().norm()
        assert error < tolerance, f"relative error {error:.1e}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--window", type=int, default=128, help="of the sliding layers")
    parser.add_argument("--dtype", choices=DTYPES, nargs="+", default=list(DTYPES))
    parser.add_argument("--repeats", type=int, default=5, help="of each; the median counts")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    print(
        f"torch {torch.__version__}, {torch.get_num_threads()} thread(s), {HEADS} heads, {GROUPS} groups of size {SIZE}"
    )
    for name in arguments.dtype:
        for window in (None, arguments.window):
            compare(name, arguments.tokens, window, arguments.repeats)


if __name__ == "__main__":
    main()
