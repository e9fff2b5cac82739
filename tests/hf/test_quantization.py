"""Models in less memory: half precision, INT8 for the experts too, MXFP4, and devices chosen by transformers."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.integrations import mxfp4

from gpt_oss_vision.bridge.hf.configuration_gpt_oss_vision import GPTOSSVisionConfig
from gpt_oss_vision.bridge.hf.modeling_gpt_oss_vision import GPTOSSVisionForCausalLM
from gpt_oss_vision.bridge.hf_int8 import EXPERT_WEIGHTS, LINEAR_WEIGHTS, describe_weights, int8_config, weight_usage
from gpt_oss_vision.bridge.ops.mxfp4 import dequantize, quantize
from tiny import tiny_batch, tiny_config, tiny_model

# torchao gives this warning when it reads a file that it has saved.
pytestmark = pytest.mark.filterwarnings("ignore:Stored version is not the same as current default version")


@pytest.fixture(scope="module")
def config() -> GPTOSSVisionConfig:
    """Wide, so that scales take little memory; every expert is chosen, so that rounding can't change the choice."""
    return tiny_config(hidden_size=96, intermediate_size=128, num_experts_per_tok=4)


@pytest.fixture(scope="module")
def checkpoint(config, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    tiny_model(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def model(checkpoint) -> GPTOSSVisionForCausalLM:
    return GPTOSSVisionForCausalLM.from_pretrained(checkpoint)


def logits_of(model: GPTOSSVisionForCausalLM) -> torch.Tensor:
    with torch.no_grad():
        return model(**tiny_batch(model.config)).logits.float()


def bytes_of(model: nn.Module) -> int:
    return sum(row.bytes for row in weight_usage(model))


# INT8


@pytest.fixture(scope="module")
def int8(checkpoint) -> GPTOSSVisionForCausalLM:
    return GPTOSSVisionForCausalLM.from_pretrained(checkpoint, quantization_config=int8_config())


def test_int8_holds_experts_attention_tower_and_head(int8):
    names = {row.name for row in weight_usage(int8) if row.is_quantized}
    layer, tower = "model.layers.N", "model.vision_adapter.vit.layers.N"
    assert names == {
        *(f"{layer}.mlp.experts.{name}" for name in ("gate_up_proj", "down_proj")),
        *(f"{layer}.self_attn.{name}_proj.weight" for name in "qkvo"),
        *(f"{tower}.attention.{name}_proj.weight" for name in "qkvo"),
        *(f"{tower}.mlp.{name}.weight" for name in ("fc1", "fc2")),
        "model.vision_adapter.proj.weight",
        "lm_head.weight",
    }


def test_int8_takes_a_quarter_of_fp32_and_half_of_bf16(int8, model, checkpoint):
    half = GPTOSSVisionForCausalLM.from_pretrained(checkpoint, dtype=torch.bfloat16)
    half_int8 = GPTOSSVisionForCausalLM.from_pretrained(
        checkpoint, dtype=torch.bfloat16, quantization_config=int8_config()
    )
    assert bytes_of(int8) < 0.32 * bytes_of(model)
    assert bytes_of(half_int8) < 0.58 * bytes_of(half)


def test_int8_changes_the_logits_a_little(int8, model):
    ours, theirs = logits_of(int8), logits_of(model)
    error = (ours - theirs).norm() / theirs.norm()
    assert 0 < error < 0.03


def test_int8_generates_with_images(int8):
    batch = tiny_batch(int8.config)
    assert int8.generate(**batch, do_sample=False, max_new_tokens=4).shape == (3, 44)


def test_a_saved_int8_model_loads_as_it_is_and_can_be_printed(int8, tmp_path):
    int8.save_pretrained(tmp_path)
    loaded = GPTOSSVisionForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits_of(loaded), logits_of(int8))
    assert bytes_of(loaded) == bytes_of(int8)
    assert "GptOssExperts" in repr(loaded)


def test_a_lora_on_the_attention_of_int8_learns(checkpoint):
    model = GPTOSSVisionForCausalLM.from_pretrained(checkpoint, quantization_config=int8_config())
    tuned = get_peft_model(model, LoraConfig(r=4, target_modules=r".*\.self_attn\.[qkvo]_proj")).train()
    batch = tiny_batch(model.config)
    tuned(**batch, labels=batch["input_ids"]).loss.backward()
    gradients = [weight.grad for name, weight in tuned.named_parameters() if "lora_B" in name]
    assert len(gradients) == 16
    assert all(gradient.abs().max() > 0 for gradient in gradients)


def test_a_lora_on_experts_of_int8_is_not_possible(checkpoint):
    """As the page says. PEFT 0.21.2 adds it to the whole parameter, which torchao 0.17.0 can't."""
    model = GPTOSSVisionForCausalLM.from_pretrained(checkpoint, quantization_config=int8_config())
    adapter = LoraConfig(r=4, target_modules=[], target_parameters=["mlp.experts.gate_up_proj"])
    with pytest.raises(NotImplementedError, match="baddbmm"):
        get_peft_model(model, adapter)(**tiny_batch(model.config))


def test_what_is_not_quantised_is_named_with_its_share(int8):
    said = describe_weights(int8)
    left = sum(row.weights for row in weight_usage(int8) if not row.is_quantized)
    total = sum(parameter.numel() for parameter in int8.parameters())
    assert said.startswith(f"{total:,} weights in ")
    assert f"; {left / total:.2%} of them not quantised: model.embed_tokens.weight " in said


def test_of_the_20b_model_less_than_3_percent_is_not_quantised():
    with torch.device("meta"):
        model = GPTOSSVisionForCausalLM(GPTOSSVisionConfig(num_hidden_layers=24, num_local_experts=32))
    total = sum(parameter.numel() for parameter in model.parameters())
    left = sum(
        parameter.numel()
        for name, parameter in model.named_parameters()
        if not re.fullmatch(f"{LINEAR_WEIGHTS}|{EXPERT_WEIGHTS}", name)
    )
    assert 0.02 < left / total < 0.03


def test_experts_unpacked_one_by_one_give_the_same_logits(model, checkpoint):
    one_by_one = GPTOSSVisionForCausalLM.from_pretrained(checkpoint, experts_implementation="dequantized")
    torch.testing.assert_close(logits_of(one_by_one), logits_of(model), rtol=1e-4, atol=1e-5)


# MXFP4


@pytest.fixture(scope="module")
def packed(checkpoint, tmp_path_factory) -> Path:
    """The checkpoint with its experts in MXFP4, under gpt-oss's names."""
    folder = tmp_path_factory.mktemp("packed")
    config = GPTOSSVisionConfig.from_pretrained(checkpoint)
    config.quantization_config = {"quant_method": "mxfp4"}
    config.save_pretrained(folder)
    weights = {}
    for name, weight in load_file(checkpoint / "model.safetensors").items():
        if re.fullmatch(EXPERT_WEIGHTS, name):
            weights[f"{name}_blocks"], weights[f"{name}_scales"] = quantize(weight.transpose(1, 2).contiguous())
        else:
            weights[name] = weight
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


def test_mxfp4_experts_are_unpacked_on_a_cpu(packed):
    model = GPTOSSVisionForCausalLM.from_pretrained(packed)
    weights = load_file(packed / "model.safetensors")
    name = "model.layers.1.mlp.experts.down_proj"
    unpacked = dequantize(weights[f"{name}_blocks"], weights[f"{name}_scales"], torch.bfloat16)
    assert torch.equal(model.get_parameter(name).bfloat16(), unpacked.transpose(1, 2))
    assert logits_of(model).isfinite().all()


class PlainExperts(mxfp4.Mxfp4GptOssExperts):
    """Stand-in for packed experts, whose kernels need a GPU: the same arguments, computed by the plain experts."""

    def __init__(self, experts: nn.Module):
        nn.Module.__init__(self)
        self.experts = experts

    def forward(self, hidden_states, routing_data, gather_idx, scatter_idx):
        return self.experts(hidden_states, *routing_data)


def plain_routing(logits: torch.Tensor, top_k: int) -> tuple[tuple[torch.Tensor, torch.Tensor], None, None]:
    """The `routing` of the kernels in plain torch: indices of the largest logits, and their softmax."""
    top, indices = logits.topk(top_k)
    return (indices, top.softmax(-1)), None, None


def test_packed_experts_route_visual_tokens_with_the_vision_bias(checkpoint, monkeypatch):
    config = GPTOSSVisionConfig.from_pretrained(checkpoint, num_experts_per_tok=2)
    model = GPTOSSVisionForCausalLM.from_pretrained(checkpoint, config=config)
    expected = logits_of(model)
    kernels = SimpleNamespace(routing=SimpleNamespace(routing=plain_routing))
    monkeypatch.setattr(mxfp4, "triton_kernels_hub", kernels, raising=False)
    for layer in model.model.layers:
        layer.mlp.experts = PlainExperts(layer.mlp.experts)
    # The kernels run on the current device, which is not that of every layer of a model on several GPUs.
    devices = []

    @contextmanager
    def recording(index: int | None) -> Iterator[None]:
        devices.append(index)
        yield

    monkeypatch.setattr(torch.accelerator, "device_index", recording)
    assert torch.equal(logits_of(model), expected)
    assert devices == [torch.device("cpu").index] * len(model.model.layers)


# Where the weights are


@pytest.mark.parametrize("arguments", [{"device_map": "auto"}, {"device_map": "cpu"}, {"low_cpu_mem_usage": True}])
def test_transformers_may_choose_the_device(checkpoint, model, arguments):
    placed = GPTOSSVisionForCausalLM.from_pretrained(checkpoint, **arguments)
    assert torch.equal(logits_of(placed), logits_of(model))


def test_layers_offloaded_to_disk_give_the_same_logits(checkpoint, model, tmp_path):
    device_map = dict.fromkeys(("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"), "cpu")
    device_map |= {"model.vision_adapter": "disk", "model.layers.0": "cpu"}
    device_map |= {f"model.layers.{layer}": "disk" for layer in (1, 2, 3)}
    offloaded = GPTOSSVisionForCausalLM.from_pretrained(checkpoint, device_map=device_map, offload_folder=tmp_path)
    assert offloaded.model.layers[2].mlp.experts.down_proj.is_meta
    assert torch.equal(logits_of(offloaded), logits_of(model))
