"""The files of a Megatron checkpoint beside its tensors: `run_config.yaml`, train state, number of the iteration.

They are written from the transformers config and `DEFAULTS`: importing Megatron would take 10 to 20 seconds. A test
compares them key by key with those of Megatron-Bridge; `just run-config-defaults` writes `DEFAULTS` anew.
"""

import json
import math
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import yaml

from ...bridge.config_map import load_balancing_fields, megatron_fields
from ...errors import UserError
from .run_config import RUN_CONFIG

if TYPE_CHECKING:
    from ...bridge.hf.configuration_gpt_oss_vision import GPTOSSVisionConfig

ITERATION = "iter_0000000"
DEFAULTS = Path(__file__).with_name("run_config_defaults.yaml")
"""What Megatron-Bridge writes that does not depend on the model: our provider, finalized on the back end `torch`."""


def run_config(config: "GPTOSSVisionConfig", dtype: torch.dtype, source: Path, out: Path) -> dict[str, Any]:
    """The content of `run_config.yaml`, as `AutoBridge.import_ckpt` writes it.

    Args:
        config: of the model.
        dtype: of the weights.
        source: the Hugging Face checkpoint, which the configuration names for its tokenizer.
        out: the Megatron checkpoint, where it will be when it is complete.

    Raises:
        ValueError: Megatron cannot express the model, or cannot build it.
    """
    file = Path(config.name_or_path or "") / "config.json"
    if config.attention_dropout:
        raise UserError(f"{file} says attention_dropout={config.attention_dropout}, not 0; set it to 0 first")
    if config.num_experts_per_tok == 1:
        raise UserError(f"{file} says num_experts_per_tok=1; Megatron-Core's softmax over the chosen experts needs 2")
    found = yaml.safe_load(DEFAULTS.read_text())
    found["model"] |= _model_fields(config, dtype) | {"hf_model_id": str(source)}
    found["tokenizer"]["tokenizer_model"] = str(source)
    found["checkpoint"]["save"] = str(out)
    return found


def _model_fields(config: "GPTOSSVisionConfig", dtype: torch.dtype) -> dict[str, Any]:
    """The provider's fields that depend on the model, as Megatron-Bridge spells them in YAML."""
    fields = megatron_fields(config)
    std = fields["init_method_std"]
    precision = {name: {"_call_": False, "_target_": str(dtype)} for name in ("params_dtype", "autocast_dtype")}
    return {
        **fields,
        **load_balancing_fields(config),
        **precision,
        "bf16": dtype == torch.bfloat16,
        "fp16": dtype == torch.float16,
        "ffn_hidden_size": fields["moe_ffn_hidden_size"],
        "embedding_init_method_std": std,
        "init_method": _normal(std),
        "embedding_init_method": _normal(std),
        "output_layer_init_method": _normal(std / math.sqrt(2.0 * fields["num_layers"])),
    }


def _normal(std: float) -> dict[str, Any]:
    return {"_args_": [], "_partial_": True, "_target_": "torch.nn.init.normal_", "mean": 0.0, "std": std}


def write_metadata(config: dict[str, Any], output: Path) -> None:
    """Write what `AutoBridge.import_ckpt` writes beside the tensors.

    Args:
        config: see `run_config`.
        output: the folder to write into.
    """
    folder = output / ITERATION
    folder.mkdir(exist_ok=True)
    (folder / RUN_CONFIG).write_text(yaml.safe_dump(config, default_flow_style=False))
    (folder / "metadata.json").write_text(json.dumps({"sharded_backend": "torch_dist", "sharded_backend_version": 1}))
    torch.save(_train_state(), folder / "train_state.pt")
    shutil.copyfile(folder / "train_state.pt", output / "latest_train_state.pt")
    (output / "latest_checkpointed_iteration.txt").write_text("0")


def _train_state() -> dict[str, torch.Tensor]:
    """Megatron-Bridge's `TrainState` before the first step."""
    counts = ("step", "consumed_train_samples", "skipped_train_samples", "consumed_valid_samples")
    state = {name: torch.tensor(0, dtype=torch.int64) for name in counts}
    state["floating_point_operations_so_far"] = torch.tensor(0.0)  # fp64 in the class, fp32 where it saves
    return state | {name: torch.tensor(False) for name in ("do_train", "do_valid", "do_test")}
