"""Compare the logits of a Hugging Face and a Megatron checkpoint for the same tokens and image, on the CPU in fp32."""

from ...bridge import plugin  # noqa: F401 - first: it makes Megatron-Bridge importable, and the model known to it

# isort: split

from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from math import isfinite
from pathlib import Path
from typing import Any

import torch
from megatron.bridge.training.model_load_save import load_megatron_model, temporary_distributed_context

from ...bridge.hf.configuration_gpt_oss_vision import GPTOSSVisionConfig
from ...bridge.hf.modeling_gpt_oss_vision import GPTOSSVisionForCausalLM
from ...bridge.mcore import cpu
from ..formats.hf_config import read_json
from ..formats.hf_source import Source
from ..formats.run_config import model_fields

TEXT_TOKENS = 160
"""More than gpt-oss's attention window of 128."""

TOLERANCE = 1e-4
"""Largest difference between two implementations in fp32, relative to the largest logit."""

FP32: Any = {"params_dtype": torch.float32, "bf16": False, "fp16": False}


def compare_logits(source: Source, folder: Path) -> dict[str, Any]:
    """Run both models, one after the other.

    Args:
        source: the Hugging Face checkpoint.
        folder: iteration folder of the Megatron checkpoint.

    Returns:
        ``largest_difference`` and ``largest_logit``, None where they are NaN or infinite, and whether the models agree.
    """
    batch = sample(source.config, model_fields(folder).get("image_token_id", source.config.image_token_id))
    config = deepcopy(source.config)
    packing = read_json(source.folder / "config.json").get("quantization_config")
    if packing:
        config.quantization_config = packing
    model = GPTOSSVisionForCausalLM.from_pretrained(source.folder, config=config, dtype=torch.float32)
    with torch.no_grad():
        theirs = model.float().eval()(**batch).logits
    del model
    (mine,) = cpu.run_ranks(1, megatron_logits, folder, batch)
    difference, scale = float((theirs - mine).abs().max()), float(theirs.abs().max())
    agrees = difference <= TOLERANCE * scale  # False for a NaN
    numbers = {"largest_difference": difference, "largest_logit": scale}
    return {name: number if isfinite(number) else None for name, number in numbers.items()} | {"agrees": agrees}


def sample(config: GPTOSSVisionConfig, placeholder: int) -> dict[str, torch.Tensor]:
    """Make ``input_ids`` of the same random text each time and, for a model with vision, ``pixel_values`` of one image.

    Args:
        config: the config of the Hugging Face checkpoint.
        placeholder: ``image_token_id`` of the Megatron model; the random text does not contain it.
    """
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(config.vocab_size, (1, TEXT_TOKENS), generator=generator)
    ids[ids == placeholder] = 0
    if not config.use_vision:
        return {"input_ids": ids}
    image = torch.full((1, config.num_image_tokens), config.image_token_id)
    return {
        "input_ids": torch.cat([ids[:, :8], image, ids[:, 8:]], dim=1),
        "pixel_values": torch.randn(1, *config.image_shape, generator=generator),
    }


def megatron_logits(folder: Path, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """The Megatron model's logits ``[b, s, vocab]``; to be called on a rank (`cpu.run_ranks`)."""
    with megatron_model(folder) as model:
        return model(batch["input_ids"], None, None, pixel_values=batch.get("pixel_values"))


@contextmanager
def megatron_model(folder: Path) -> Iterator[Any]:
    """The model of an iteration folder in fp32, without gradients; to be used on a rank (`cpu.run_ranks`)."""
    with temporary_distributed_context(backend="gloo"), torch.no_grad():
        settings = {"use_cpu_init": True, "skip_temp_dist_context": True, "mp_overrides": FP32}
        loaded: Any = load_megatron_model(str(folder), **settings)
        model = loaded[0] if isinstance(loaded, list) else loaded
        yield model.eval().float()
