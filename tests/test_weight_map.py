"""The columns of the weight map agree with the transformers model's own tables, for the names of both formats."""

import re

import pytest

from gpt_oss_vision.bridge.hf.modeling_gpt_oss_vision import ADDED_WEIGHTS, GPTOSSVisionForCausalLM
from gpt_oss_vision.bridge.weight_map import KEPT_IN_FP32, LANGUAGE_MODEL, PARAM_GROUPS, ROWS, Row, group_of
from tiny import tiny_config

MODEL = GPTOSSVisionForCausalLM(tiny_config())


def filled(name: str) -> str:
    return name.replace("**", "x.y").replace("*", "3")


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.megatron)
def test_a_name_is_in_the_group_of_its_row(row: Row):
    assert row.group in PARAM_GROUPS
    names = [
        row.megatron,
        row.megatron.replace(".*.", "."),
        *([row.hf] if isinstance(row.hf, str) else row.hf.values()),
    ]
    for name in map(filled, names):
        assert group_of(name) == row.group
        assert group_of(f"module.module.{name}") == row.group


def test_every_group_has_a_row():
    assert {row.group for row in ROWS} == set(PARAM_GROUPS)


@pytest.mark.parametrize("name", [name for name, _ in MODEL.named_parameters()])
def test_the_transformers_model_adds_the_same_weights_and_keeps_the_same_in_fp32(name: str):
    assert (group_of(name) != LANGUAGE_MODEL) == any(kind in name.split(".") for kind in ADDED_WEIGHTS)
    strict = any(re.search(rf"(?:^|\.){kind}(?:\.|$)", name) for kind in MODEL._keep_in_fp32_modules_strict)
    assert strict == (name.rpartition(".")[2] in KEPT_IN_FP32)
