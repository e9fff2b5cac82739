"""`register()` tells each host what it has to know. Here, because it imports Megatron-Bridge."""

import sys

from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import gpt_oss_vision


def test_register_brings_sink_sdpa_to_transformers(monkeypatch):
    for mapping in (ALL_ATTENTION_FUNCTIONS._global_mapping, ALL_MASK_ATTENTION_FUNCTIONS._global_mapping):
        monkeypatch.delitem(mapping, "sink_sdpa", raising=False)
    monkeypatch.delitem(sys.modules, "gpt_oss_vision.bridge.plugin", raising=False)
    gpt_oss_vision.register()
    assert "sink_sdpa" in ALL_ATTENTION_FUNCTIONS
    assert "sink_sdpa" in ALL_MASK_ATTENTION_FUNCTIONS
