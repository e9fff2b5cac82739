"""Write a synthetic gpt-oss-20b with a ViT-L/14: real names, shapes and dtypes, random finite values.

    uv run python tests/benchmarks/make_20b.py FOLDER [--layers 24]

13.8 GB and the tower's 0.6 GB; less with fewer layers.

The experts are in MXFP4, as in gpt-oss, with the scales that the OCP rule gives: quantising the dequantised values
returns the same bytes.
"""

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

from gpt_oss_vision.bridge.hf.configuration_gpt_oss_vision import GPTOSSVisionConfig
from gpt_oss_vision.bridge.ops.mxfp4 import MXFP4_PARTS
from gpt_oss_vision.conversion.engine.journal import check_space, open_output
from gpt_oss_vision.conversion.engine.stream import STEP, Task, Worker, stream
from gpt_oss_vision.conversion.formats.hf_source import shapes_of
from gpt_oss_vision.conversion.formats.safetensors import ShardPlan, TensorSpec, plan_shards
from gpt_oss_vision.terminal import Progress


def config_20b(layers: int = 24, experts: int = 32) -> GPTOSSVisionConfig:
    """The config of gpt-oss-20b, or of a smaller one; 36 layers and 128 experts give the 120b."""
    return GPTOSSVisionConfig(
        num_hidden_layers=layers,
        num_local_experts=experts,
        dtype=torch.bfloat16,
        architectures=["GPTOSSVisionForCausalLM"],
    )


def tensors_of(config: GPTOSSVisionConfig) -> list[TensorSpec]:
    """Every tensor as it is stored: experts' weights packed, the vision bias in fp32, the rest in bf16."""
    tensors = []
    for name, shape in shapes_of(config).items():
        if name.endswith(("gate_up_proj", "down_proj")):
            experts, inside, outside = shape
            blocks, scales = (name + part for part in MXFP4_PARTS)
            tensors.append(TensorSpec(blocks, torch.uint8, (experts, outside, inside // 32, 16)))
            tensors.append(TensorSpec(scales, torch.uint8, (experts, outside, inside // 32)))
        else:
            dtype = torch.float32 if name.endswith("vision_bias") else torch.bfloat16
            tensors.append(TensorSpec(name, dtype, shape))
    return tensors


def random_bytes(tensor: TensorSpec, nbytes: int, generator: np.random.Generator) -> np.ndarray:
    """Bytes of finite values; the largest value of an MXFP4 block is 4 or 6, so that its scale follows the rule."""
    raw = np.frombuffer(generator.bytes(nbytes), dtype=np.uint8).copy()
    if tensor.name.endswith(MXFP4_PARTS[0]):
        raw[::16] |= 0x06
    elif tensor.name.endswith(MXFP4_PARTS[1]):
        raw = raw % 8 + 116  # 2^-11 to 2^-4
    else:
        # The sign, the two low bits of the exponent and the mantissa are random: magnitudes from 2^-7 to 2^-3.
        is_short = tensor.dtype.itemsize == 2
        numbers = raw.view(np.uint16 if is_short else np.uint32)
        numbers &= 0x81FF if is_short else 0x81FFFFFF
        numbers |= 0x3C00 if is_short else 0x3C000000
    return raw


def task_of(tensor: TensorSpec, plan: ShardPlan) -> Task:
    """The task that writes one tensor, in steps."""
    place = plan.places[tensor.name]

    def run(worker: Worker) -> None:
        generator = np.random.default_rng([*tensor.name.encode()])
        for done in range(0, tensor.nbytes, STEP):
            nbytes = min(STEP, tensor.nbytes - done)
            data = torch.from_numpy(random_bytes(tensor, nbytes, generator).view(np.uint8))
            worker.write(place.file, place.offset + done, data)

    return Task(tensor.name, (place.file,), run, STEP, tensor.nbytes)


def make(folder: Path, config: GPTOSSVisionConfig, **options: Any) -> int:
    """Write a checkpoint of a config; return the size of its weights in bytes."""
    tensors = tensors_of(config)
    plan = plan_shards(tensors)
    tasks = plan.header_tasks() + [task_of(tensor, plan) for tensor in tensors]
    total = sum(plan.sizes.values())
    with open_output(folder, {"config": config.to_dict() | {"dtype": "bfloat16"}}, **options) as journal:
        check_space(journal.out, total)
        with Progress("Making", total, Console(stderr=True), in_bytes=True) as progress:
            stream(tasks, journal, plan.sizes, jobs=3, progress=progress)
        config.save_pretrained(journal.output)
        if plan.index:
            (journal.output / "model.safetensors.index.json").write_text(plan.index)
        journal.finish()
    return total


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, default=24)
    arguments = parser.parse_args()
    print(f"{make(arguments.folder, config_20b(arguments.layers)) / 1e9:.2f} GB")
