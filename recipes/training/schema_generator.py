"""Write `schema.json` from the dataclasses of a training run's `ConfigContainer` (`just schema`)."""

from ...bridge import plugin  # noqa: F401 - first: it makes Megatron-Bridge importable, and the model known to it

# isort: split

import collections.abc
import dataclasses
import enum
import json
import math
import types
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import torch
from megatron.bridge.training import config
from megatron.bridge.training.mixed_precision import (
    MIXED_PRECISION_RECIPES,
    MixedPrecisionConfig,
    get_mixed_precision_config,
)

from ...bridge.config_map import TRAINING_ONLY, megatron_fields
from ...bridge.hf.configuration_gpt_oss_vision import GPTOSSVisionConfig
from ...bridge.mcore.param_groups import LearningRateFactors
from ...bridge.mcore.provider import GPTOSSVisionProvider
from ..data.megatron import DigitsDatasetProvider
from .peft import GPTOSSVisionLoRA
from .schema import FILE

CLASSES = {
    "model": GPTOSSVisionProvider,
    "dataset": DigitsDatasetProvider,  # with the settings of `ChatDatasetProvider`
    "optimizer_config_override_provider": LearningRateFactors,
    "peft": GPTOSSVisionLoRA,
    "mixed_precision": MixedPrecisionConfig,
}
"""The classes of sections for which Megatron-Bridge permits several."""

IN_VALIDATION = ("eval_iters", "eval_interval", "skip_train")
REFUSED = {
    "model.derived": "holds what is derived from other settings",
    "train.num_epochs": "counts only Megatron-Bridge's text data; set train.epochs",
    **{f"train.{name}": f"is deprecated in Megatron-Bridge; set validation.{name}" for name in IN_VALIDATION},
    "train.train_samples": "is not counted here; set train.train_iters, train.epochs or train.tokens",
    "dataset.usable_rows": "is counted by the run",
    "train.rampup_batch_size": "is not supported; all steps have train.global_batch_size",
    "train.exit_signal_handler": "is always on: SIGTERM and SIGUSR1 save the run",
    "train.exit_signal_handler_for_dataloader": "is always on: the loader's workers ignore signals",
    "checkpoint.save": "is in the folder of the run; set out=DIR",
    "checkpoint.load": "is in the folder of the run; set out=DIR, and weights=DIR for the weights to start from",
    "checkpoint.pretrained_checkpoint": "is set by weights=DIR",
    "checkpoint.finetune": "would start at step 0 again; weights=DIR and another out=DIR start a new run",
    "checkpoint.custom_manager_class": "is that of this package, whose checkpoints survive a kill",
    "logger.tensorboard_dir": "is in the folder of the run; set out=DIR",
    "tokenizer.vocab_size": "follows from the model",
    "dist.distributed_backend": "follows from the device: nccl with CUDA, gloo on a CPU",
}
PATHS = ("path", "valid_path", "test_path", "processor_path", "image_folder", "folder")
NARROWED = {
    **{f"model.{kind}_model_parallel_size": "size" for kind in ("tensor", "pipeline", "expert")},
    "model.context_parallel_size": "size",
    "model.expert_tensor_parallel_size": "size",
    "model.seq_length": "size",
    "dataset.seq_length": "size",
    **{f"train.{name}": "size" for name in ("train_iters", "global_batch_size", "micro_batch_size")},
    "checkpoint.save_interval": "size",
    "validation.eval_interval": "size",
    "logger.log_interval": "size",
    "optimizer.lr": "rate",
    "optimizer.min_lr": "rate",
    "optimizer.weight_decay": "rate",
    "optimizer.clip_grad": "rate",
    "model.hidden_dropout": "share",
    "model.attention_dropout": "share",
    "scheduler.lr_warmup_fraction": "share",
    "dataset.max_skipped": "share",
    **{f"dataset.{name}": "path" for name in PATHS},
    **{
        f"optimizer_config_override_provider.{field.name}": "positive"
        for field in dataclasses.fields(LearningRateFactors)
    },
}
"""Settings that take less than the type of their field: the type in place of it (`values.TYPES`)."""
NEEDED = ("optimizer.lr", "train.train_iters", "train.global_batch_size", "train.micro_batch_size")
"""Settings that a run has, though their fields may be None."""
FIXED = "is fixed by gpt-oss"
SET_BY_MEGATRON = "is set by Megatron-Bridge itself"

HELD = {"model.rotary_base": float}
"""Types of fields that hold another type than Megatron-Core annotates: the base is that of transformers."""

PLAIN = {bool: "bool", int: "int", float: "float", str: "str", torch.dtype: "dtype", Any: "any", dict: "dict[any]"}
CONTAINERS = {list: "list", tuple: "tuple", set: "set"}
STRICTEST_FIRST = ("choice", "bool", "int", "float", "dtype", "list", "tuple", "set", "dict", "str", "any")


def generate() -> str:
    """The text of `schema.json`: one line per section and per field."""
    sections, fields = {}, {}
    hints = get_type_hints(config.ConfigContainer)
    for section in _public_fields(config.ConfigContainer):
        classes = [CLASSES[section.name]] if section.name in CLASSES else _dataclasses(hints[section.name])
        if not classes:
            fields[section.name] = _described(hints[section.name], section)
            continue
        (cls,) = classes
        sections[section.name] = _section(cls, section)
        fields |= {f"{section.name}.{field.name}": _entry(section.name, cls, field) for field in _public_fields(cls)}
    sections["mixed_precision"]["from_name"] = _path(get_mixed_precision_config)
    fields["mixed_precision"] = {"types": ["choice"], "choices": sorted(MIXED_PRECISION_RECIPES), "none": True}
    return f'{{\n"sections": {_lines(sections)},\n"fields": {_lines(fields)}\n}}\n'


def _lines(entries: dict[str, Any]) -> str:
    return "{\n" + ",\n".join(f"{json.dumps(key)}: {json.dumps(entry)}" for key, entry in entries.items()) + "\n}"


def _path(thing: Any) -> str:
    return f"{thing.__module__}:{thing.__qualname__}"


def _public_fields(cls: type) -> list[dataclasses.Field]:
    return [field for field in dataclasses.fields(cls) if not field.name.startswith("_")]


def _dataclasses(hint: Any) -> list[type]:
    return [kind for kind in _alternatives(hint) if dataclasses.is_dataclass(kind)]


def _alternatives(hint: Any) -> list[Any]:
    return list(get_args(hint)) if get_origin(hint) in (Union, types.UnionType) else [hint]


def _section(cls: type, section: dataclasses.Field) -> dict[str, Any]:
    required = [field.name for field in _public_fields(cls) if field.init and _default(field) is dataclasses.MISSING]
    entry = {"class_name": _path(cls), "none": section.default is None, "required": required}
    return {name: value for name, value in entry.items() if value}


def _default(field: dataclasses.Field) -> Any:
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def _entry(section: str, cls: type, field: dataclasses.Field) -> dict[str, Any]:
    key = f"{section}.{field.name}"
    if key in REFUSED:
        return {"refused": REFUSED[key]}
    if not field.init:
        default = _default(field)
        fixed = f"{FIXED}: {getattr(default, '__name__', default)}"
        return {"refused": fixed if cls is GPTOSSVisionProvider else SET_BY_MEGATRON}
    entry = _described(HELD.get(key) or _hint(cls, field.name), field)
    if key in NARROWED:
        entry = {"types": [NARROWED[key]]} | ({"none": True} if entry.get("none") and key not in NEEDED else {})
    return entry | {"architecture": True} if section == "model" and field.name in _architecture() else entry


def _architecture() -> set[str]:
    return megatron_fields(GPTOSSVisionConfig()).keys() - {*TRAINING_ONLY} | {"vocab_size"}


def _hint(cls: type, name: str) -> Any:
    """The type of a field; where a class says Any, that of the class that it inherits the field from."""
    hints = [get_type_hints(base) for base in cls.__mro__ if dataclasses.is_dataclass(base)]
    return next((known[name] for known in hints if known.get(name, Any) is not Any), Any)


def _described(hint: Any, field: dataclasses.Field) -> dict[str, Any]:
    """Types and choices of a field with this type; or why it cannot be set."""
    kinds = [kind for kind in _alternatives(hint) if kind is not type(None)]
    choices = next((list(get_args(kind)) for kind in kinds if get_origin(kind) is Literal), [])
    enums = [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, enum.Enum)]
    names = {name for kind in kinds for name in _type_names(kind)}
    if enums and names == {"choice"}:
        choices = [member.name for member in enums[0]]
    elif "str" in names:  # which stands for the members of the enum as well
        names.discard("choice")
    if not names:
        return {"refused": _reason(kinds)}
    entry = {
        "types": sorted(names, key=lambda name: (STRICTEST_FIRST.index(name.partition("[")[0]), name)),
        "choices": choices,
        "enum": _path(enums[0]) if names == {"choice"} and enums else None,
        "none": len(kinds) < len(_alternatives(hint)) or _default(field) is None,
        "infinite": _default(field) == math.inf,
    }
    return {name: value for name, value in entry.items() if value}


def _type_names(kind: Any) -> list[str]:
    """The name of a type in the schema; none for one that has no text."""
    if get_origin(kind) is Literal or (isinstance(kind, type) and issubclass(kind, enum.Enum)):
        return ["choice"]
    if kind in PLAIN:
        return [PLAIN[kind]]
    origin, inner = get_origin(kind) or kind, [each for each in get_args(kind) if each is not Ellipsis]
    if origin in CONTAINERS:
        return [f"{CONTAINERS[origin]}[{name}]" for name in _item_names(inner)]
    if origin is dict:
        return [f"dict[{name}]" for name in _item_names(inner[1:])]
    return []


def _item_names(kinds: list[Any]) -> list[str]:
    """The type of the items of a container, "any" where they may have several; none for items that have no text."""
    names = {PLAIN[each] for kind in kinds for each in _alternatives(kind) if each in PLAIN}
    return ["any"] if not kinds or len(names) > 1 else sorted(names)


def _reason(kinds: list[Any]) -> str:
    if any(collections.abc.Callable in (kind, get_origin(kind)) for kind in kinds):
        return "takes a Python function, which only a recipe can give"
    name = getattr(kinds[0], "__name__", str(kinds[0]))
    return f"takes an object of the class {name}, which only a recipe can give"


if __name__ == "__main__":
    FILE.write_text(generate())
