"""The effects of `register()` on transformers and PEFT. In this folder, because it imports Megatron-Bridge."""

import subprocess
import sys

import pytest
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import gpt_oss_vision


def test_register_adds_sink_sdpa_to_transformers(monkeypatch):
    for mapping in (ALL_ATTENTION_FUNCTIONS._global_mapping, ALL_MASK_ATTENTION_FUNCTIONS._global_mapping):
        monkeypatch.delitem(mapping, "sink_sdpa", raising=False)
    monkeypatch.delitem(sys.modules, "gpt_oss_vision.bridge.plugin", raising=False)
    gpt_oss_vision.register()
    assert "sink_sdpa" in ALL_ATTENTION_FUNCTIONS
    assert "sink_sdpa" in ALL_MASK_ATTENTION_FUNCTIONS


LORA_AFTER_US = """
import sys, warnings
warnings.simplefilter("ignore")
import gpt_oss_vision
gpt_oss_vision.register()
import torch
from peft import LoraConfig, get_peft_model
get_peft_model(torch.nn.Sequential(torch.nn.Linear(2, 2)), LoraConfig(target_modules=["0"]))
"""


@pytest.mark.slow
def test_after_register_peft_still_builds_a_lora():
    done = subprocess.run([sys.executable, "-c", LORA_AFTER_US], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
