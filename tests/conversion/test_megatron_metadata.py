"""`run_config.yaml`, written without Megatron: byte for byte the file of Megatron-Bridge for the same config.

Run as a script, this file writes the defaults again (`just run-config-defaults`).
"""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from checkpoints import save_tiny
from gpt_oss_vision.bridge.hf.configuration_gpt_oss_vision import GPTOSSVisionConfig
from gpt_oss_vision.conversion.formats import megatron_metadata
from gpt_oss_vision.conversion.formats.megatron_metadata import DEFAULTS, run_config
from tiny import tiny_config, tiny_vision_config

HF, OUT = Path("/checkpoints/hf"), Path("/checkpoints/megatron")
PLAIN = {"rope_parameters": {"rope_type": "default", "rope_theta": 150000.0}, "use_vision": False}
CONFIGS = {
    "tiny": {},
    "no vision, bf16": {"use_vision": False, "dtype": torch.bfloat16},
    "CLIP, fp16": {"vision_config": tiny_vision_config("clip_vision_model"), "dtype": torch.float16},
    "SigLIP": {"vision_config": tiny_vision_config("siglip_vision_model"), "vision_pool_token": False},
    "rotation everywhere": {"use_nope": False},
    "no YaRN, no window": {**PLAIN, "sliding_window": None},
    "balanced experts": {"router_aux_loss_coef": 0.01},
    "balanced modalities": {"router_aux_loss_coef": 0.01, "router_aux_loss_per_modality": True},
    "other numbers": {"initializer_range": 0.03, "swiglu_limit": 5.0, "rms_norm_eps": 1e-6},
}


def bridge_text(config: GPTOSSVisionConfig, dtype: torch.dtype) -> str:
    """The `run_config.yaml` that Megatron-Bridge writes when `AutoBridge.import_ckpt` saves a model alone."""
    from gpt_oss_vision.bridge import plugin  # noqa: F401 - first: it makes Megatron-Bridge importable

    # isort: split
    from megatron.bridge.training.config import CheckpointConfig, ConfigContainer, LoggerConfig
    from megatron.bridge.training.tokenizers.config import TokenizerConfig
    from megatron.bridge.utils.yaml_utils import safe_yaml_representers
    from megatron.core.optimizer import OptimizerConfig

    from gpt_oss_vision.bridge.mcore.provider import provider_from_config

    config.dtype = dtype
    provider = provider_from_config(config, perform_initialization=False, hf_model_id=str(HF), backend="torch")
    provider.finalize()
    provider.backend = "auto"
    unused: dict[str, Any] = dict.fromkeys(("train", "ddp", "scheduler", "dataset", "dist"))
    optimizer: Any = OptimizerConfig(use_distributed_optimizer=False)
    found = ConfigContainer(
        **unused,
        model=provider,
        optimizer=optimizer,
        logger=LoggerConfig(),
        tokenizer=TokenizerConfig(tokenizer_type="HuggingFaceTokenizer", tokenizer_model=str(HF)),
        checkpoint=CheckpointConfig(
            async_save=False, save=str(OUT), save_optim=False, save_rng=False, dist_ckpt_optim_fully_reshardable=True
        ),
    )
    with safe_yaml_representers():
        return yaml.safe_dump(found.to_dict(), default_flow_style=False)


def defaults() -> str:
    """The part of `bridge_text` that does not depend on the model."""
    config = tiny_config(**PLAIN)
    found = yaml.safe_load(bridge_text(config, torch.float32))
    for name in (*megatron_metadata._model_fields(config, torch.float32), "hf_model_id"):
        del found["model"][name]
    del found["tokenizer"]["tokenizer_model"], found["checkpoint"]["save"]
    return yaml.safe_dump(found, default_flow_style=False)


def test_the_defaults_are_megatron_bridges():
    assert DEFAULTS.read_text() == defaults(), "`just run-config-defaults` writes them anew"


def compare(config: GPTOSSVisionConfig, dtype: torch.dtype) -> None:
    ours = yaml.safe_dump(run_config(config, dtype, HF, OUT), default_flow_style=False)
    theirs = bridge_text(config, dtype)
    assert yaml.safe_load(ours) == yaml.safe_load(theirs)
    assert ours == theirs


@pytest.mark.parametrize("fields", CONFIGS.values(), ids=CONFIGS)
def test_a_tiny_config_is_written_as_megatron_bridge_writes_it(fields: dict):
    compare(tiny_config(**fields), fields.get("dtype", torch.float32))


@pytest.mark.parametrize("sizes", [{"num_hidden_layers": 24, "num_local_experts": 32}, {}], ids=["20b", "120b"])
def test_the_config_of_a_real_size_is_written_as_megatron_bridge_writes_it(sizes: dict):
    compare(GPTOSSVisionConfig(**sizes), torch.bfloat16)


@pytest.mark.parametrize(
    ("fields", "said", "there"),
    [
        ({"attention_dropout": 0.1}, "attention_dropout=0.1, not 0", "attention_dropout"),
        ({"num_experts_per_tok": 1}, "num_experts_per_tok=1; Megatron-Core's softmax", "when topk is 1"),
    ],
)
def test_what_the_provider_refuses_is_refused_before_anything_is_written(fields: dict, said: str, there: str):
    with pytest.raises(ValueError, match=said):
        run_config(tiny_config(**fields), torch.float32, HF, OUT)
    with pytest.raises(ValueError, match=there):
        bridge_text(tiny_config(**fields), torch.float32)


def test_an_import_loads_no_megatron(tmp_path: Path):
    script = "import sys; from gpt_oss_vision import cli; code = cli.main(sys.argv[1:]); "
    script += "assert not [name for name in sys.modules if name.startswith('megatron')]; sys.exit(code)"
    arguments = ["convert", "import", "--hf", str(save_tiny(tmp_path / "hf")), "--out", str(tmp_path / "out")]
    done = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "iter_0000000" / "run_config.yaml").is_file()


if __name__ == "__main__":
    DEFAULTS.write_text(defaults())
