"""What a Hugging Face checkpoint is besides the bytes of its weights: which tensors it has, and the files around them.

Both are asked of the model classes themselves, built without memory, so that a converted checkpoint has to the byte
what ``save_pretrained`` would write.
"""

import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import GptOssConfig, GptOssForCausalLM, PreTrainedModel
from transformers.utils import logging
from transformers.utils.quantization_config import Mxfp4Config

from ...bridge.hf.configuration_gpt_oss_vision import GPTOSSVisionConfig
from ...bridge.hf.modeling_gpt_oss_vision import GPTOSSVisionForCausalLM
from ...bridge.ops.mxfp4 import BLOCK
from ...errors import UserError
from ..parameters import MXFP4_PARTS
from .hf_config import config_fields, read_json
from .safetensors import TensorSpec
from .torch_dist_reader import TorchDistCheckpoint

KEPT_IN = "tokenizer"
"""Folder of a Megatron checkpoint, or of one of its iterations, for `FILES`: Megatron-Bridge keeps tokenizers there."""

GENERATION = "generation_config.json"
TEXT_FILES = (
    GENERATION,
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
)
FILES = (
    "config.json",
    *TEXT_FILES,
    "processor_config.json",
    *(f"{part}_gpt_oss_vision.py" for part in ("tokenization", "processing", "image_processing")),
)
"""What a checkpoint has besides weights, and besides the code that the model's own class writes."""

CHECKED_FILES = ("config.json", GENERATION, "tokenizer_config.json", "processor_config.json")
"""Files that are looked into before anything is written."""

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "mxfp4": torch.bfloat16}
"""What `--dtype` may be, and the type of the tensors that are not packed."""

PACKED = (".mlp.experts.gate_up_proj", ".mlp.experts.down_proj")
"""How the names of the tensors end that MXFP4 checkpoints pack."""

NOT_PACKED = ("model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head")
"""The modules that gpt-oss's own MXFP4 checkpoints name as left alone."""


def folder_of_files(candidates: Iterable[Path]) -> Path | None:
    """The first of some folders that has a config."""
    return next((folder for folder in candidates if (folder / "config.json").is_file()), None)


def keep_files(candidates: Iterable[Path], megatron: Path) -> None:
    """Put what an export will need beside Megatron's files, unless it is there or none of the candidates has it.

    Args:
        candidates: Hugging Face checkpoints, or Megatron checkpoints and their iterations.
        megatron: root of a Megatron checkpoint.
    """
    source = folder_of_files([place for folder in candidates for place in (folder / KEPT_IN, folder)])
    if source is not None and not (megatron / KEPT_IN / "config.json").is_file():
        copy_files(source, megatron / KEPT_IN, FILES)


def reference_folder(checkpoint: TorchDistCheckpoint, hf: Path | None) -> Path:
    """Where config, tokenizer and processor are: in `hf` if it is given, else kept in the checkpoint.

    Raises:
        FileNotFoundError: there is no config.
        ValueError: one of the files is no JSON.
    """
    if hf is not None:
        config_fields(hf)
    folder = hf or folder_of_files(place / KEPT_IN for place in (checkpoint.folder, checkpoint.root))
    if folder is None:
        raise FileNotFoundError(
            f"{checkpoint.folder} keeps no config of its model; name the Hugging Face checkpoint it came from with --hf"
        )
    for name in CHECKED_FILES:
        if (folder / name).is_file():
            read_json(folder / name)
    return folder


def copy_files(source: Path, target: Path, names: Iterable[str]) -> None:
    """Copy those of the files that are there."""
    target.mkdir(parents=True, exist_ok=True)
    for name in names:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)


def meta_model(config: GPTOSSVisionConfig, dtype: torch.dtype, *, text_only: bool = False) -> PreTrainedModel:
    """The model without its weights: every tensor on torch's meta device.

    Raises:
        ValueError: `text_only`, and the text of this model is not what gpt-oss computes.
    """
    with torch.device("meta"):
        if text_only:
            return GptOssForCausalLM._from_config(gpt_oss_config(config), dtype=dtype)
        return GPTOSSVisionForCausalLM._from_config(config, dtype=dtype)


def gpt_oss_config(config: GPTOSSVisionConfig) -> GptOssConfig:
    """The config of the same model without what is visual.

    Raises:
        ValueError: when it has what gpt-oss has not, so that another model would come out.
    """
    if any(config.nope_layers):
        layers = ", ".join(str(layer) for layer, skips in enumerate(config.nope_layers) if skips)
        raise UserError(f"Layers {layers} have no rotation, which gpt-oss cannot express; export without --text-only")
    if config.swiglu_limit != GPTOSSVisionConfig.swiglu_limit:
        raise UserError(
            f"swiglu_limit is {config.swiglu_limit}, which gpt-oss cannot express; export without --text-only"
        )
    ours = {*GPTOSSVisionConfig().to_dict(), "auto_map"} - GptOssConfig().to_dict().keys()
    return GptOssConfig(
        **{name: value for name, value in config.to_dict().items() if name not in ours | {"model_type"}}
    )


def tensors_of(model: PreTrainedModel, *, packed: bool = False) -> list[TensorSpec]:
    """What a checkpoint of a model holds, in the model's order.

    Args:
        model: a `meta_model`.
        packed: as MXFP4.

    Raises:
        ValueError: `packed`, and rows of experts are no multiple of MXFP4's blocks.
    """
    tensors = [TensorSpec(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in model.state_dict().items()]
    if not packed:
        return tensors
    return [part for tensor in tensors for part in (_packed(tensor) if tensor.name.endswith(PACKED) else [tensor])]


def _packed(tensor: TensorSpec) -> list[TensorSpec]:
    """``[E, in, out]`` as blocks ``[E, out, in / 32, 16]`` and scales ``[E, out, in / 32]``."""
    experts, inside, outside = tensor.shape
    if inside % BLOCK:
        raise UserError(f"MXFP4 packs rows in blocks of {BLOCK}; those of {tensor.name} have {inside} numbers")
    shapes = (experts, outside, inside // BLOCK, BLOCK // 2), (experts, outside, inside // BLOCK)
    return [TensorSpec(tensor.name + part, torch.uint8, shape) for part, shape in zip(MXFP4_PARTS, shapes, strict=True)]


def write_files(model: PreTrainedModel, source: Path, out: Path, *, packed: bool) -> None:
    """Write config, generation config, code, tokenizer, processor and chat template.

    Args:
        model: a `meta_model`.
        source: folder of `FILES`.
        out: existing folder.
        packed: the weights are MXFP4.
    """
    is_ours = isinstance(model, GPTOSSVisionForCausalLM)
    copy_files(source, out, FILES if is_ours else TEXT_FILES)
    if packed:
        left_alone = [*NOT_PACKED, "model.vision_adapter"] if is_ours else [*NOT_PACKED]
        model.config.quantization_config = Mxfp4Config(modules_to_not_convert=left_alone).to_dict()
    # It writes no file of weights, having no tensors, and would remove the shards that are in its folder.
    with tempfile.TemporaryDirectory() as folder, _without_bars():
        model.save_pretrained(folder, state_dict={})
        written = {*os.listdir(folder)}
        if (source / GENERATION).is_file():  # as it is: transformers would refuse to write settings that contradict
            written.discard(GENERATION)
        copy_files(Path(folder), out, written)
    if not is_ours and (out / "tokenizer_config.json").is_file():
        _make_stock(out / "tokenizer_config.json")


@contextmanager
def _without_bars() -> Iterator[None]:
    were_on = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if were_on:
            logging.enable_progress_bar()


def _make_stock(file: Path) -> None:
    """Name a tokenizer that every transformers has: ours differs only in padding on the left."""
    settings: dict[str, Any] = json.loads(file.read_text())
    for ours in ("auto_map", "processor_class"):
        settings.pop(ours, None)
    settings |= {"tokenizer_class": "PreTrainedTokenizerFast", "padding_side": "left"}
    file.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n")
