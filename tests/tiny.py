"""Tiny configurations, models and batches with every feature switched on, for the tests of all packages."""

from pathlib import Path
from typing import Any

import torch

from gpt_oss_vision.bridge.hf.configuration_gpt_oss_vision import GPTOSSVisionConfig
from gpt_oss_vision.bridge.hf.image_processing_gpt_oss_vision import GPTOSSVisionImageProcessor
from gpt_oss_vision.bridge.hf.modeling_gpt_oss_vision import GPTOSSVisionForCausalLM
from gpt_oss_vision.bridge.hf.processing_gpt_oss_vision import GPTOSSVisionProcessor
from gpt_oss_vision.recipes.data.tokenizer import train_tokenizer


def tiny_config(**overrides: Any) -> GPTOSSVisionConfig:
    """
    Four layers that differ in window and rotation, four experts, a two-layer ViT with six tokens an image.

    Of the matrices, only `k_proj`, `v_proj` and the tower's attention are square: hidden 32, experts 48, heads 4 x 16,
    groups 2, vision 16. YaRN starts at 32 positions and the window is 8, so a sequence of 40 is past both.
    """
    fields: dict[str, Any] = {
        "vocab_size": 256,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "sliding_window": 8,
        "max_position_embeddings": 256,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 150000.0,
            "factor": 8.0,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "truncate": False,
            "original_max_position_embeddings": 32,
        },
        "image_token_id": 250,
        "pad_token_id": 0,
        "use_nope": True,
        "nope_stride": 2,
        "vision_embed_dim": 16,
        "vision_patch_size": 4,
        "vision_num_layers": 2,
        "vision_num_heads": 2,
        "vision_image_size": 8,
    }
    return GPTOSSVisionConfig(**(fields | overrides))


def tiny_vision_config(model_type: str = "vit", **overrides: Any) -> dict[str, Any]:
    """The tower of `tiny_config` as any of the supported kinds, for `tiny_config(vision_config=…)`."""
    fields: dict[str, Any] = {
        "model_type": model_type,
        "hidden_size": 16,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 8,
        "patch_size": 4,
    }
    return fields | overrides


def randomise(model: torch.nn.Module, seed: int = 0) -> None:
    """
    Fill every parameter in place with values for which every part of the model changes the output: norms away from 1,
    biases and vision bias away from 0, sinks from -5 to +20, experts that reach their clamps.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(parameter: torch.Tensor, std: float) -> torch.Tensor:
        return std * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)

    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("sinks"):
                value = 25.0 * torch.rand(parameter.shape, generator=generator, dtype=torch.float64) - 5.0
            elif "norm" in name.rsplit(".", 2)[-2] and name.endswith("weight"):
                value = 1.0 + normal(parameter, 0.3)
            elif name.endswith("vision_bias"):
                value = normal(parameter, 1.5)
            elif name.endswith("gate_up_proj"):
                value = normal(parameter, 3.0 * parameter.shape[1] ** -0.5)
            elif name.endswith("down_proj"):
                value = normal(parameter, 0.3 * parameter.shape[1] ** -0.5)
            elif "embed" in name or parameter.ndim == 1:
                value = normal(parameter, 0.5)
            else:
                value = normal(parameter, parameter[0].numel() ** -0.5)
            parameter.copy_(value)


def tiny_model(config: GPTOSSVisionConfig | None = None, seed: int = 0) -> GPTOSSVisionForCausalLM:
    """The model of `tiny_config()`, or of the given one, in fp32 and eval mode, with `randomise`d weights."""
    model = GPTOSSVisionForCausalLM(config if config is not None else tiny_config())
    randomise(model, seed)
    return model.eval()


def tiny_batch(
    config: GPTOSSVisionConfig, images_per_row: tuple[int, ...] = (0, 1, 2), length: int = 40, seed: int = 0
) -> dict[str, torch.Tensor]:
    """
    `input_ids (b, length)` with the given number of images per row, and their `pixel_values`, absent without images.

    Each image's placeholders follow a few text tokens; the text never holds a placeholder or padding.
    """
    generator = torch.Generator().manual_seed(seed)
    input_ids = torch.randint(1, config.image_token_id, (len(images_per_row), length), generator=generator)
    for row, count in enumerate(images_per_row):
        for image in range(count):
            start = 2 + row + image * (config.num_image_tokens + 3)
            end = start + config.num_image_tokens
            if end > length:
                raise ValueError(f"{count} images don't fit into {length} tokens")
            input_ids[row, start:end] = config.image_token_id
    batch = {"input_ids": input_ids}
    if any(images_per_row):
        size, channels = config.vision_image_size, config.vision_num_channels
        batch["pixel_values"] = torch.randn(sum(images_per_row), channels, size, size, generator=generator)
    return batch


def tiny_processor(config: GPTOSSVisionConfig | None = None) -> GPTOSSVisionProcessor:
    """
    A processor for the tower of `tiny_config()`, or of the given one, with a tokenizer trained on a few words.

    Its placeholder has its own id: a model for it needs `tiny_config(vocab_size=len(processor.tokenizer),
    image_token_id=processor.image_token_id)`.
    """
    config = config if config is not None else tiny_config()
    texts = ["user assistant system developer final analysis", "Which digit is this? It is a seven. What is in there?"]
    tokenizer = train_tokenizer(texts, vocab_size=320)
    return GPTOSSVisionProcessor(
        GPTOSSVisionImageProcessor.from_config(config), tokenizer, num_image_tokens=config.num_image_tokens
    )


def tiny_checkpoint(folder: Path, **overrides: Any) -> Path:
    """Save a `tiny_model` that fits the `tiny_processor`, and that processor, to a folder; return the folder."""
    processor = tiny_processor()
    fields = {"vocab_size": len(processor.tokenizer), "image_token_id": processor.image_token_id}
    model = tiny_model(tiny_config(**(fields | overrides)))
    model.generation_config = processor.tokenizer.generation_config()
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder
