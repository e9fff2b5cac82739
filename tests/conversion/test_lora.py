"""Adapters that Megatron-Bridge's own LoRA has trained: as PEFT's, and merged, they give the same logits."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftModel

import gpt_oss_vision
from gpt_oss_vision.bridge.hf.modeling_gpt_oss_vision import GPTOSSVisionForCausalLM
from gpt_oss_vision.bridge.megatron import cpu
from gpt_oss_vision.conversion.exporting import export_checkpoint
from gpt_oss_vision.conversion.importing import import_checkpoint
from gpt_oss_vision.conversion.lora import export_adapters
from gpt_oss_vision.recipes.digits import write_digits
from gpt_oss_vision.recipes.quickstart import Settings, training_config, write_checkpoint
from gpt_oss_vision.recipes.training import train
from tiny import tiny_batch

ATTENTION = ("linear_qkv", "linear_proj")


def train_lora(start: Path, out: Path, targets: tuple[str, ...], tensor_parallel: int = 1) -> None:
    from megatron.bridge.peft.lora import LoRA

    settings = Settings(steps=3, batch_size=8, tensor_parallel=tensor_parallel)
    config = training_config(start, write_digits(start / "digits", 0), settings)
    config.peft = LoRA(target_modules=list(targets), dim=4, alpha=12)
    config.optimizer.lr = config.optimizer.min_lr = 0.03  # so that three steps leave something to see
    config.checkpoint.pretrained_checkpoint, config.checkpoint.save = str(start / "megatron"), str(out)
    train(config)


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    gpt_oss_vision.register()
    folder = tmp_path_factory.mktemp("start")
    write_digits(folder / "digits", 0)
    write_checkpoint(folder / "hf_start", Settings())
    import_checkpoint(folder / "hf_start", folder / "megatron")
    return folder


@pytest.fixture(scope="module", params=[1, 2], ids=["one rank", "TP2"])
def adapter(request: pytest.FixtureRequest, start: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of adapters."""
    out = tmp_path_factory.mktemp("adapter") / "megatron"
    cpu.run_ranks(request.param, train_lora, start, out, ATTENTION, request.param)
    return out


def test_an_adapter_by_peft_and_merged_weights_give_the_same_logits(adapter: Path, start: Path, tmp_path: Path):
    export_adapters(adapter, tmp_path / "adapter")
    export_checkpoint(adapter, tmp_path / "merged", dtype="fp32")
    base = GPTOSSVisionForCausalLM.from_pretrained(start / "hf_start").eval()
    batch = tiny_batch(base.config)
    with torch.no_grad():
        before = base(**batch).logits
        merged = GPTOSSVisionForCausalLM.from_pretrained(tmp_path / "merged").eval()(**batch).logits
        adapted = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()(**batch).logits
    scale = before.abs().max()
    assert (adapted - before).abs().max() > 1e-2 * scale  # the adapter does something
    assert (adapted - merged).abs().max() < 1e-5 * scale


def megatron_logits(start: Path, adapter: Path, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """What Megatron itself computes with the adapters in place, not merged."""
    from megatron.bridge import AutoBridge
    from megatron.bridge.peft.lora import LoRA
    from megatron.bridge.peft.utils import load_peft_adapter_checkpoint

    torch.distributed.init_process_group("gloo")
    provider = AutoBridge.from_hf_pretrained(start / "hf_start").to_megatron_provider()
    provider.finalize()
    provider.initialize_model_parallel(seed=0)
    lora = LoRA(target_modules=list(ATTENTION), dim=4, alpha=12)
    model = lora(provider.provide_distributed_model(wrap_with_ddp=False), training=False)
    lora.set_params_to_save(model)
    load_peft_adapter_checkpoint(model, adapter / "iter_0000003", lora)
    with torch.no_grad():
        return model[0].eval()(batch["input_ids"], None, None, pixel_values=batch.get("pixel_values"))


def test_merged_weights_give_the_logits_of_megatrons_adapters(adapter: Path, start: Path, tmp_path: Path):
    export_checkpoint(adapter, tmp_path / "merged", dtype="fp32")
    merged = GPTOSSVisionForCausalLM.from_pretrained(tmp_path / "merged").eval()
    batch = tiny_batch(merged.config)
    (expected,) = cpu.run_ranks(1, megatron_logits, start, adapter, batch)
    with torch.no_grad():
        assert (merged(**batch).logits - expected).abs().max() < 1e-5 * expected.abs().max()


def test_a_base_that_has_moved_is_asked_for(adapter: Path, start: Path, tmp_path: Path):
    moved = shutil.copytree(adapter, tmp_path / "adapter")
    file = moved / "iter_0000003" / "run_config.yaml"
    file.write_text(file.read_text().replace(str(start / "megatron"), "/nowhere"))
    with pytest.raises(FileNotFoundError, match="weights in /nowhere, which is not there; name it with --base"):
        export_checkpoint(moved, tmp_path / "out")
    export_checkpoint(moved, tmp_path / "out", base=start / "megatron")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model_type"] == "gpt_oss_vision"


def test_a_checkpoint_without_adapters_is_refused(start: Path, tmp_path: Path):
    with pytest.raises(ValueError, match="holds no adapters; export it without --adapter"):
        export_adapters(start / "megatron", tmp_path / "out")


def lora_without_the_work_around(start: Path, out: Path) -> None:
    import megatron.bridge.peft.utils

    megatron.bridge.peft.utils.HAVE_TE = True
    train_lora(start, out, ATTENTION)


def test_megatron_bridge_still_takes_transformer_engine_for_present(start: Path, tmp_path: Path):
    """When this fails, the line about ``HAVE_TE`` in `upstream.apply` can go."""
    if gpt_oss_vision.bridge.megatron.upstream.HAVE_TE:
        pytest.skip("Transformer Engine is installed")
    with pytest.raises(TypeError, match="isinstance"):
        cpu.run_ranks(1, lora_without_the_work_around, start, tmp_path / "out")
