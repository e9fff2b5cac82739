"""The schema of all settings, beside the classes that it describes."""

import dataclasses
from typing import Any

import pytest

from gpt_oss_vision.bridge.config_map import HF_TO_MEGATRON, TRAINING_ONLY, YARN
from gpt_oss_vision.recipes.base import ConfigContainer
from gpt_oss_vision.recipes.training import schema, schema_generator
from gpt_oss_vision.recipes.training.values import TYPES


def test_the_file_is_that_of_the_installed_classes():
    assert schema.FILE.read_text() == schema_generator.generate(), "`just schema` writes it anew"


def test_every_section_of_a_configuration_is_a_section_or_a_field():
    names = {field.name for field in dataclasses.fields(ConfigContainer) if not field.name.startswith("_")}
    found = schema.load()
    assert names == found.sections.keys() | {"env_vars"}
    assert {key.partition(".")[0] for key in found.fields} == names | set(schema.FOR_ALL_STAGES)


def test_every_type_can_be_read():
    for field in schema.load().fields.values():
        assert bool(field.types) != bool(field.refused), field
        for name in field.types:
            outer, _, inner = name.rstrip("]").partition("[")
            assert (outer in {"list", "tuple", "set", "dict"} and inner in TYPES) if inner else outer in TYPES, field


@pytest.mark.parametrize(
    ("key", "types", "none"),
    [
        ("train.train_iters", ("size",), False),
        ("optimizer.lr", ("rate",), False),
        ("ddp.use_distributed_optimizer", ("bool",), False),
        ("logger.wandb_entity", ("str",), True),
        ("model.params_dtype", ("dtype",), False),
        ("model.pipeline_model_parallel_layout", ("list[any]", "str"), True),
        ("model.window_size", ("tuple[int]",), True),
        ("profiling.profile_ranks", ("list[int]",), False),
        ("env_vars", ("dict[any]",), False),
        ("mixed_precision", ("choice", "group"), True),
        ("ft", ("group",), True),
        ("train", ("group",), False),
        ("time", ("duration",), False),
    ],
)
def test_types_are_those_of_the_annotation(key: str, types: tuple[str, ...], none: bool):
    field = schema.load().fields[key]
    assert (field.types, field.none) == (types, none)


def test_a_field_that_our_provider_leaves_open_has_the_type_of_megatrons():
    """The provider annotates what it derives with Any."""
    assert schema.load().fields["model.moe_grouped_gemm"].types == ("bool",)
    assert schema.load().fields["model.moe_token_dispatcher_type"].choices == ("allgather", "alltoall", "flex")


@pytest.mark.parametrize(
    ("key", "reason"),
    [
        ("model.normalization", "is fixed by gpt-oss: RMSNorm"),
        ("model.activation_func", "is fixed by gpt-oss: quick_gelu"),
        ("model.init_method", "takes a Python function, which only a recipe can give"),
        ("model.quant_recipe", "takes an object of the class RecipeConfig, which only a recipe can give"),
        ("scheduler.lr_decay_steps", "is set by Megatron-Bridge itself"),
        ("train.eval_interval", "is deprecated in Megatron-Bridge; set validation.eval_interval"),
        ("train.num_epochs", "counts only Megatron-Bridge's text data; set train.epochs"),
    ],
)
def test_what_cannot_be_set_has_a_reason(key: str, reason: str):
    assert schema.load().fields[key].refused == reason


def test_fields_of_the_architecture_are_marked():
    marked = {key for key, field in schema.load().fields.items() if field.architecture}
    of_the_weights = ({*HF_TO_MEGATRON.values(), *YARN.values()} - set(TRAINING_ONLY)) | {
        *("position_embedding_type", "rotary_base", "window_size", "window_attn_skip_freq", "no_rope_freq"),
        *("vision_config", "vocab_size"),
    }
    assert marked == {f"model.{name}" for name in of_the_weights}


def test_each_enum_and_class_is_where_the_schema_says():
    from gpt_oss_vision.recipes.training.overrides import _load

    found: Any = schema.load()
    for section in found.sections.values():
        assert dataclasses.is_dataclass(_load(section.class_name))
    for field in found.fields.values():
        assert field.enum is None or {member.name for member in _load(field.enum)} == set(field.choices)
