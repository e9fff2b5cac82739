"""Conversion through Megatron-Bridge: exact and complete, with an error that names each tensor that does not fit."""

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from gpt_oss_vision.bridge import hf, mcore
from gpt_oss_vision.bridge.hf.modeling_gpt_oss_vision import GPTOSSVisionForCausalLM
from gpt_oss_vision.bridge.mcore import cpu
from gpt_oss_vision.recipes.data.tokenizer import train_tokenizer
from layouts import Layout, build, fork_checkpoint_queue
from tiny import tiny_checkpoint, tiny_config, tiny_model

LAYOUTS = {"one rank": {}, "TP2": {"tp": 2}, "PP2": {"pp": 2}, "EP2": {"ep": 2}}


@pytest.fixture(scope="module", autouse=True)
def registered():
    hf.register_auto_classes()
    mcore.register()


def saved(folder: Path, **config: object) -> Path:
    tiny_model(tiny_config(**config)).save_pretrained(folder)
    train_tokenizer(["some text"], vocab_size=280).save_pretrained(folder)
    return folder


def there_and_back(source: Path, megatron_path: Path, target: Path) -> None:
    """Import and export in one process, each on distributed groups of its own."""
    from megatron.bridge import AutoBridge
    from megatron.bridge.training.model_load_save import temporary_distributed_context

    fork_checkpoint_queue()
    with temporary_distributed_context(backend="gloo"):
        AutoBridge.import_ckpt(source, megatron_path)
    AutoBridge.from_hf_pretrained(source).export_ckpt(megatron_path, target, strict=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_there_and_back_keeps_every_bit(dtype: torch.dtype, tmp_path: Path):
    """Other towers, shapes and layouts are compared with Megatron-Bridge, in both directions, in tests/conversion."""
    source = tiny_checkpoint(tmp_path / "hf")
    GPTOSSVisionForCausalLM.from_pretrained(source, dtype=dtype).save_pretrained(source)
    cpu.run_ranks(1, there_and_back, source, tmp_path / "megatron", tmp_path / "back")
    before, after = load_file(source / "model.safetensors"), load_file(tmp_path / "back" / "model.safetensors")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert tensor.dtype == after[name].dtype, name
        assert torch.equal(tensor, after[name]), name
    check_other_files(source, tmp_path / "back")


def check_other_files(before: Path, after: Path) -> None:
    """All files apart from weights are there, with the same content; JSON may have what loading adds to settings."""
    added = {"is_local", "local_files_only", "trust_remote_code"}
    for path in before.iterdir():
        if path.suffix == ".json":
            ours, theirs = (json.loads((folder / path.name).read_text()) for folder in (before, after))
            assert {name: value for name, value in theirs.items() if name not in added} == ours, path.name
        elif path.suffix != ".safetensors":
            assert (after / path.name).read_bytes() == path.read_bytes(), path.name


def exported(path: Path, sizes: dict[str, int]) -> dict[str, torch.Tensor]:
    from megatron.bridge import AutoBridge

    torch.distributed.init_process_group("gloo")
    bridge = AutoBridge.from_hf_pretrained(path)
    model = build(bridge, Layout(**sizes))
    return {name: weight.clone() for name, weight in bridge.export_hf_weights(model, show_progress=False)}


@pytest.mark.parametrize("sizes", LAYOUTS.values(), ids=LAYOUTS)
def test_every_layout_holds_the_same_weights(sizes: dict[str, int], tmp_path: Path):
    source = saved(tmp_path)
    before = load_file(source / "model.safetensors")
    for after in cpu.run_ranks(max([1, *sizes.values()]), exported, source, sizes):
        assert before.keys() == after.keys()
        assert [name for name in before if not torch.equal(before[name], after[name])] == []


def save_at(path: Path, layout: Layout, megatron_path: Path) -> None:
    from megatron.bridge import AutoBridge

    fork_checkpoint_queue()
    torch.distributed.init_process_group("gloo")
    bridge = AutoBridge.from_hf_pretrained(path)
    provider = bridge.to_megatron_provider()
    layout.apply(provider)
    provider.finalize()
    provider.initialize_model_parallel(seed=0)
    bridge.save_megatron_model(provider.provide_distributed_model(wrap_with_ddp=False), megatron_path, path)


def export(source: Path, megatron_path: Path, target: Path) -> None:
    from megatron.bridge import AutoBridge

    AutoBridge.from_hf_pretrained(source).export_ckpt(megatron_path, target, strict=True)


@pytest.mark.parametrize("layout", [Layout(tp=2, pp=2, ep=2), Layout(tp=2, etp=2), Layout(ep=2, etp=2)], ids=str)
def test_a_checkpoint_saved_by_many_ranks_is_read_by_one(layout: Layout, tmp_path: Path):
    source = saved(tmp_path / "hf")
    cpu.run_ranks(layout.world_size, save_at, source, layout, tmp_path / "megatron")
    cpu.run_ranks(1, export, source, tmp_path / "megatron", tmp_path / "back")
    before, after = load_file(source / "model.safetensors"), load_file(tmp_path / "back" / "model.safetensors")
    assert before.keys() == after.keys()
    assert [name for name in before if not torch.equal(before[name], after[name])] == []


def fails(path: Path) -> str:
    """The message of the error that importing raises."""
    with pytest.raises(Exception) as failure:  # noqa: PT011 - the tests check its message
        cpu.run_ranks(1, exported, path, {})
    return str(failure.value)


def changed(path: Path, change) -> Path:
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    return path


def test_a_tensor_that_nothing_reads_is_named(tmp_path: Path):
    path = changed(saved(tmp_path), lambda tensors: tensors.update({"model.layers.0.extra.weight": torch.ones(2)}))
    assert "tensors of the checkpoint that nothing reads: model.layers.0.extra.weight" in fails(path)


def test_a_tensor_that_is_missing_is_named(tmp_path: Path):
    path = changed(saved(tmp_path), lambda tensors: tensors.pop("model.layers.1.self_attn.sinks"))
    assert "tensors missing in the checkpoint: model.layers.1.self_attn.sinks" in fails(path)


def test_a_megatron_parameter_without_a_row_is_named():
    from megatron.bridge.models.conversion.mapping_registry import MegatronMappingRegistry

    from gpt_oss_vision.bridge.mcore.bridge import check_coverage, mapping_of
    from gpt_oss_vision.bridge.weight_map import ROWS

    registry = MegatronMappingRegistry(*(mapping_of(row) for row in ROWS))
    with pytest.raises(ValueError, match=re.escape("without a mapping: decoder.layers.0.mlp.novelty")):
        check_coverage(["decoder.layers.0.mlp.novelty"], None, registry)


def test_the_names_of_transformer_engine_have_rows_too():
    from megatron.bridge.models.conversion.mapping_registry import MegatronMappingRegistry

    from gpt_oss_vision.bridge.mcore.bridge import check_coverage, mapping_of
    from gpt_oss_vision.bridge.weight_map import ROWS

    registry = MegatronMappingRegistry(*(mapping_of(row) for row in ROWS))
    fused = "decoder.layers.7.self_attention.linear_qkv.layer_norm_weight"
    check_coverage([fused], ["model.layers.7.input_layernorm.weight"], registry)


def test_a_truncated_file_is_refused(tmp_path: Path):
    file = saved(tmp_path) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    assert "incomplete" in fails(tmp_path).lower() or "invalid" in fails(tmp_path).lower()


def test_a_checkpoint_of_another_architecture_is_refused_by_name(tmp_path: Path):
    from transformers import GPT2Config, GPT2LMHeadModel

    GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=16)).save_pretrained(tmp_path)
    assert "GPT2" in fails(tmp_path)


def test_mxfp4_experts_are_read_in_the_right_orientation(tmp_path: Path):
    """The experts are square, so no shape shows a wrong orientation."""
    from megatron.bridge.models.conversion.quantization_utils import dequantize_mxfp4

    path = saved(tmp_path, hidden_size=64, intermediate_size=64)
    torch.manual_seed(0)
    expected = {}

    def quantise(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
            experts, inside, outside = tensors.pop(name).shape
            blocks = torch.randint(0, 256, (experts, outside, inside // 32, 16), dtype=torch.uint8)
            scales = torch.randint(120, 130, (experts, outside, inside // 32), dtype=torch.uint8)
            tensors[f"{name}_blocks"], tensors[f"{name}_scales"] = blocks, scales
            expected[name] = dequantize_mxfp4(blocks, scales).mT.float()

    (found,) = cpu.run_ranks(1, exported, changed(path, quantise), {})
    assert len(expected) == 8
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


def test_mxfp4_is_read_to_the_bit_as_megatron_bridge_reads_it():
    from megatron.bridge.models.conversion.quantization_utils import dequantize_mxfp4

    from gpt_oss_vision.bridge.ops.mxfp4 import dequantize

    every = torch.arange(256, dtype=torch.uint8)
    blocks, scales = every.view(16, 16).repeat(2, 256, 1, 1), every.view(256, 1).repeat(2, 1, 16)
    for dtype, bits in {torch.bfloat16: torch.int16, torch.float16: torch.int16, torch.float32: torch.int32}.items():
        theirs = dequantize_mxfp4(blocks, scales, dtype=dtype)
        assert torch.equal(dequantize(blocks, scales, dtype).view(bits), theirs.view(bits)), dtype
