"""The tiny model of the quickstart and of the tiny recipes: its config, and a processor made for the digits.

At module level the standard library only: the quickstart's command checks its sizes before it imports torch.
"""

from pathlib import Path
from typing import TYPE_CHECKING

from ...atomic import atomic_folder

if TYPE_CHECKING:
    from ...bridge.hf.configuration_gpt_oss_vision import GPTOSSVisionConfig
    from ...bridge.hf.processing_gpt_oss_vision import GPTOSSVisionProcessor

VOCABULARY = 410
"""Tokens of the texts of the digits, bytes and special tokens."""
LAYERS = 4
KEY_VALUE_HEADS = 2
EXPERTS = 8


def tiny_config() -> "GPTOSSVisionConfig":
    """gpt-oss's architecture at a size that trains in minutes on two cores: MoE, sinks, window, YaRN, NoPE, ViT."""
    from ...bridge.hf.configuration_gpt_oss_vision import GPTOSSVisionConfig
    from ...bridge.hf.tokenization_gpt_oss_vision import IMAGE_TOKEN
    from .tokenizer import SPECIAL_TOKENS

    ids = dict(zip(SPECIAL_TOKENS, range(VOCABULARY - len(SPECIAL_TOKENS), VOCABULARY), strict=True))

    return GPTOSSVisionConfig(
        num_hidden_layers=LAYERS,
        hidden_size=64,
        intermediate_size=96,
        head_dim=16,
        num_attention_heads=4,
        num_key_value_heads=KEY_VALUE_HEADS,
        num_local_experts=EXPERTS,
        num_experts_per_tok=2,
        sliding_window=16,
        max_position_embeddings=512,
        rope_parameters={
            "rope_type": "yarn",
            "rope_theta": 150000.0,
            "factor": 32.0,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "truncate": False,
            "original_max_position_embeddings": 16,
        },
        use_nope=True,
        nope_stride=4,
        vision_embed_dim=64,
        vision_patch_size=8,
        vision_num_layers=2,
        vision_num_heads=4,
        vision_image_size=16,
        vocab_size=VOCABULARY,
        image_token_id=ids[IMAGE_TOKEN],
        bos_token_id=ids["<|startoftext|>"],
        eos_token_id=ids["<|return|>"],
        pad_token_id=ids["<|endoftext|>"],
        initializer_range=0.05,
    )


def tiny_processor() -> "GPTOSSVisionProcessor":
    """The processor of the tiny model, with a tokenizer trained on the texts of the digits. Always the same."""
    from ...bridge.hf.processing_gpt_oss_vision import GPTOSSVisionProcessor
    from .digits import all_texts
    from .tokenizer import train_tokenizer

    tokenizer = train_tokenizer(all_texts(), vocab_size=VOCABULARY)
    return GPTOSSVisionProcessor.from_config(tiny_config(), tokenizer)


def write_processor(folder: Path) -> None:
    """Write the files of a checkpoint of the tiny model apart from weights, unless the folder has them."""
    if (folder / "config.json").is_file():
        return
    processor = tiny_processor()
    folder.parent.mkdir(parents=True, exist_ok=True)
    with atomic_folder(folder, overwrite=True) as partial:
        processor.save_pretrained(partial)
        processor.tokenizer.generation_config().save_pretrained(partial)
        tiny_config().save_pretrained(partial)
