"""The files of a Hugging Face checkpoint beside its weights, and the list of its tensors.

Both come from the model classes themselves, built on torch's meta device, so that a converted checkpoint has to the
byte the files that ``save_pretrained`` would write.
"""

import json
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import GptOssConfig, GptOssForCausalLM, PreTrainedModel
from transformers.utils import logging
from transformers.utils.quantization_config import Mxfp4Config

from ...atomic import atomic_folder, remove
from ...bridge import hf
from ...bridge.hf.configuration_gpt_oss_vision import GPTOSSVisionConfig
from ...bridge.hf.modeling_gpt_oss_vision import GPTOSSVisionForCausalLM
from ...errors import UserError
from ..parameters import packed_shapes
from .hf_config import check_json_files, config_fields, read_json
from .safetensors import TensorSpec
from .torch_dist_reader import TorchDistCheckpoint

KEPT_IN = "tokenizer"
"""Folder for `FILES` in a Megatron checkpoint or one of its iterations; Megatron-Bridge saves tokenizers there too."""

GENERATION = "generation_config.json"
TEXT_FILES = (
    GENERATION,
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "additional_chat_templates/*.jinja",
)
FILES = ("config.json", *TEXT_FILES, "processor_config.json")
"""Files of a checkpoint apart from weights and code; names or patterns."""

CODE = tuple(f"{part}_gpt_oss_vision.py" for part in ("tokenization", "processing", "image_processing"))
"""Files of code, apart from those that the model's own class writes."""

CONFIG_FILES = ("config.json", GENERATION)
PROCESSOR_FILES = tuple(name for name in FILES if name not in CONFIG_FILES)

PACKED = (".mlp.experts.gate_up_proj", ".mlp.experts.down_proj")
"""Suffixes of the names of the tensors that MXFP4 checkpoints pack."""

NOT_PACKED = ("model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head")
"""The modules that gpt-oss's own MXFP4 checkpoints list as not packed."""


def folder_of_files(candidates: Iterable[Path]) -> Path | None:
    """Return the first folder that has a config.json, or None."""
    return next((folder for folder in candidates if (folder / "config.json").is_file()), None)


def keep_files(candidates: Iterable[Path], megatron: Path, processor: Path | None = None) -> None:
    """Copy the `FILES` that an export will need into a Megatron checkpoint, unless it has them.

    Args:
        candidates: Hugging Face checkpoints, or Megatron checkpoints and their iterations; the first that has a config
            is copied from.
        megatron: root of a Megatron checkpoint.
        processor: folder of the tokenizer and processor that training uses, if they are not the candidate's.

    Raises:
        UserError: the checkpoint has another processor already.
    """
    source = folder_of_files([place for folder in candidates for place in (folder / KEPT_IN, folder)])
    kept = megatron / KEPT_IN
    if source is None:
        return
    if (kept / "config.json").is_file():
        if processor is not None:
            _refuse_another_processor(kept, processor)
        return
    megatron.mkdir(parents=True, exist_ok=True)  # training has saved nothing yet
    with atomic_folder(kept, overwrite=True) as folder:  # a kill never leaves a part of the files
        if kept.is_dir():
            shutil.copytree(kept, folder, dirs_exist_ok=True)
        copy_files(source, folder, FILES if processor is None else CONFIG_FILES)
        if processor is not None:
            copy_files(processor, folder, PROCESSOR_FILES)


def _refuse_another_processor(kept: Path, processor: Path) -> None:
    mine, theirs = (
        {name: file.read_bytes() for name, file in _find_files(folder, PROCESSOR_FILES)} for folder in (kept, processor)
    )
    for name in sorted(mine.keys() | theirs.keys()):
        if mine.get(name) != theirs.get(name):
            raise UserError(
                f"{processor} has another {name} than {kept}, with which this run was trained before; use the same "
                "processor, or save into another folder"
            )


def reference_folder(checkpoint: TorchDistCheckpoint, hf: Path | None) -> Path:
    """Return the folder of config, tokenizer and processor: `hf` if it is given, else the one in the checkpoint.

    Raises:
        FileNotFoundError: there is no config.
        ValueError: one of the files is not JSON.
    """
    if hf is not None:
        config_fields(hf)
    folder = hf or folder_of_files(place / KEPT_IN for place in (checkpoint.folder, checkpoint.root))
    if folder is None:
        raise FileNotFoundError(
            f"{checkpoint.folder} has no config of its model; name the Hugging Face checkpoint it came from with --hf"
        )
    check_json_files(folder)
    return folder


def copy_files(source: Path, target: Path, names: Iterable[str]) -> None:
    """Copy those files of `names`, which may be patterns, that exist."""
    for name, file in _find_files(source, names):
        copy = target / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, copy)


def _find_files(folder: Path, names: Iterable[str]) -> list[tuple[str, Path]]:
    """The existing files of `names`, which may be patterns, by their path in the folder."""
    files = [file for name in names for file in sorted(folder.glob(name)) if file.is_file()]
    return [(file.relative_to(folder).as_posix(), file) for file in files]


def meta_model(config: GPTOSSVisionConfig, dtype: torch.dtype, *, text_only: bool = False) -> PreTrainedModel:
    """Build the model with every tensor on torch's meta device.

    Raises:
        ValueError: `text_only`, and gpt-oss cannot express the text part of this model.
    """
    with torch.device("meta"):
        if text_only:
            return GptOssForCausalLM._from_config(gpt_oss_config(config), dtype=dtype)
        return GPTOSSVisionForCausalLM._from_config(config, dtype=dtype)


def gpt_oss_config(config: GPTOSSVisionConfig) -> GptOssConfig:
    """Return the config of the model's text part as a stock gpt-oss.

    Raises:
        ValueError: gpt-oss cannot express it.
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
    """Return the tensors of a model's checkpoint, in the model's order.

    Args:
        model: a `meta_model`.
        packed: the experts as MXFP4.

    Raises:
        ValueError: `packed`, and rows of experts are no multiple of MXFP4's blocks.
    """
    tensors = [TensorSpec(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in model.state_dict().items()]
    if not packed:
        return tensors
    parts = []
    for tensor in tensors:
        if tensor.name.endswith(PACKED):
            shapes = packed_shapes(tensor.name, tensor.shape)
            parts += [TensorSpec(name, torch.uint8, shape) for name, shape in shapes.items()]
        else:
            parts.append(tensor)
    return parts


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
    if is_ours:  # all code is of one version, and there also where the source has none
        copy_files(Path(hf.__file__).parent, out, CODE)
    if packed:
        not_packed = [*NOT_PACKED, "model.vision_adapter"] if is_ours else [*NOT_PACKED]
        model.config.quantization_config = Mxfp4Config(modules_to_not_convert=not_packed).to_dict()
    # Into a folder of its own: given no tensors it writes no weights, and it removes the shards of its folder.
    saved = out / ".saved"  # not in a temporary folder, whose disk may be full
    remove(saved)  # of a call that was killed
    with _without_bars():
        model.save_pretrained(saved, state_dict={})
    if (source / GENERATION).is_file():  # copied unchanged: transformers refuses to write contradictory settings
        (saved / GENERATION).unlink(missing_ok=True)
    copy_files(saved, out, ["*"])
    remove(saved)
    if not is_ours:
        _make_stock(out)


@contextmanager
def _without_bars() -> Iterator[None]:
    were_on = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if were_on:
            logging.enable_progress_bar()


def _make_stock(folder: Path) -> None:
    """Write config and tokenizer as gpt-oss's own files have them, which transformers 4 reads too.

    transformers 4.57.1 ignores ``rope_parameters``, and gives the model ``token_type_ids`` unless told not to. Our
    tokenizer class differs from transformers' only in padding on the left.
    """
    config = read_json(folder / "config.json")
    rope = dict(config["rope_parameters"])
    _write_json(folder / "config.json", config | {"rope_theta": rope.pop("rope_theta"), "rope_scaling": rope})
    file = folder / "tokenizer_config.json"
    if file.is_file():
        ours = ("auto_map", "processor_class")
        settings = {name: value for name, value in read_json(file).items() if name not in ours}
        stock = {"tokenizer_class": "PreTrainedTokenizerFast", "padding_side": "left"}
        _write_json(file, settings | stock | {"model_input_names": ["input_ids", "attention_mask"]})


def _write_json(file: Path, fields: dict[str, Any]) -> None:
    file.write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n")
