"""Time the dequantising and quantising of MXFP4, against Megatron-Bridge, transformers and a plain copy.

    uv run python tests/benchmarks/bench_mxfp4.py [--experts 4] [--rounds 5] [--threads 1]

The tensors have the shape of gpt-oss-20b's `gate_up_proj`. All contenders run in turns in one process, once per round;
medians are printed. First it is asserted that all dequantise to the same bits. The floors are copies of the unpacked
values: into memory in use, and into new memory, which the kernel allocates page by page.
"""

import argparse
import logging
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

FFN, HIDDEN = 2880, 2880
DTYPE = torch.bfloat16


@dataclass(frozen=True)
class Contender:
    """A function to time; `is_peer` marks those of other projects, which ours are compared with."""

    name: str
    run: Callable[[], object]
    is_peer: bool = False


def dequantisers(blocks: torch.Tensor, scales: torch.Tensor) -> tuple[list[Contender], torch.Tensor]:
    """All functions that dequantise `blocks`, checked to give the same bits, and the values."""
    from megatron.bridge.models.conversion.quantization_utils import dequantize_mxfp4
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    from gpt_oss_vision.bridge.ops.mxfp4 import Dequantizer, dequantize

    values = dequantize(blocks, scales)
    assert torch.equal(values.view(torch.int16), dequantize_mxfp4(blocks, scales).view(torch.int16))
    assert torch.equal(values.mT, convert_moe_packed_tensors(blocks, scales))

    dequantizer, whole, parted = Dequantizer(), torch.zeros_like(values), torch.zeros_like(values)

    def into() -> None:
        dequantizer.into(whole.flatten(0, 1), blocks.flatten(0, 1), scales.flatten(0, 1))

    def into_gate_and_up() -> None:
        for mine, packed, scale in zip(parted, blocks, scales, strict=True):
            dequantizer.into(mine[:FFN], packed[0::2], scale[0::2])
            dequantizer.into(mine[FFN:], packed[1::2], scale[1::2])

    into()
    into_gate_and_up()
    assert torch.equal(whole.view(torch.int16), values.view(torch.int16))
    assert torch.equal(parted, torch.cat([values[:, 0::2], values[:, 1::2]], dim=1))
    return [
        Contender("a copy, the floor", lambda: whole.copy_(parted)),
        Contender("a copy, a new tensor", parted.clone),
        Contender("ours, into given memory", into),
        Contender("ours, gate and up parted", into_gate_and_up),
        Contender("ours, a new tensor", lambda: dequantize(blocks, scales)),
        Contender("Megatron-Bridge", lambda: dequantize_mxfp4(blocks, scales), is_peer=True),
        Contender("transformers", lambda: convert_moe_packed_tensors(blocks, scales), is_peer=True),
    ], values


def quantisers(values: torch.Tensor) -> list[Contender]:
    """All functions that quantise; Megatron-Bridge scales and rounds by another rule, so bits are not compared."""
    from megatron.bridge.models.conversion.quantization_utils import quantize_mxfp4_e2m1_like_scale

    from gpt_oss_vision.bridge.ops.mxfp4 import Quantizer, dequantize, quantize

    rows = values.flatten(0, 1)
    blocks, scales = quantize(rows)
    assert torch.equal(dequantize(blocks, scales), rows)
    like = scales.view(torch.float8_e8m0fnu)
    quantizer = Quantizer()
    return [
        Contender("ours, into given memory", lambda: quantizer.into(blocks, scales, rows)),
        Contender("Megatron-Bridge", lambda: quantize_mxfp4_e2m1_like_scale(rows, like), is_peer=True),
    ]


def measure(contenders: list[Contender], rounds: int) -> dict[str, float]:
    """Median seconds by name, over one run per round, after one warm-up run."""
    seconds: dict[str, list[float]] = {contender.name: [] for contender in contenders}
    for _ in range(rounds + 1):
        for contender in contenders:
            start = time.perf_counter()
            contender.run()
            seconds[contender.name].append(time.perf_counter() - start)
    return {name: statistics.median(times[1:]) for name, times in seconds.items()}


def report(title: str, contenders: list[Contender], rounds: int, size: int) -> None:
    """Print GB/s of unpacked values, and how many times faster than each peer."""
    seconds = measure(contenders, rounds)
    peers = [contender.name for contender in contenders if contender.is_peer]
    print(f"{title:28}{'GB/s':>8}" + "".join(f"{'× ' + peer:>20}" for peer in peers))
    for name, mine in seconds.items():
        ratios = "".join(f"{seconds[peer] / mine:20.1f}" for peer in peers)
        print(f"  {name:26}{size / mine / 1e9:8.2f}{ratios}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--experts", type=int, default=4, help="of gate_up_proj, 33 MB each in bfloat16")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    logging.disable(logging.INFO)  # Megatron-Bridge logs each of its optional packages that is missing

    from gpt_oss_vision.bridge import mcore  # lets Megatron-Bridge be imported without Transformer Engine

    mcore.register()
    generator = torch.Generator().manual_seed(0)
    shape = options.experts, 2 * FFN, HIDDEN // 32
    blocks = torch.randint(0, 256, (*shape, 16), dtype=torch.uint8, generator=generator)
    scales = torch.randint(113, 126, shape, dtype=torch.uint8, generator=generator)
    contenders, values = dequantisers(blocks, scales)
    size = values.numel() * values.element_size()
    print(
        f"{options.experts} experts of gate_up_proj, {size / 1e6:.0f} MB as {DTYPE}; torch {torch.__version__}, "
        f"{options.threads} thread(s), median of {options.rounds}"
    )
    report("MXFP4 to bfloat16", contenders, options.rounds, size)
    report("bfloat16 to MXFP4", quantisers(values), options.rounds, size)


if __name__ == "__main__":
    main()
