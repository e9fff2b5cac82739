"""examples/plain/model.py against the transformers model, bit for bit, and against the fp64 oracle."""

import json
import math

import pytest
import torch
from safetensors.torch import save_file
from torch.nn import functional as F

import checkpoint
import model as plain
import oracle
from gpt_oss_vision import GPTOSSVisionConfig, GPTOSSVisionForCausalLM
from gpt_oss_vision.bridge.ops import mxfp4
from tiny import tiny_batch, tiny_config, tiny_model, tiny_vision_config

VARIANTS = {
    "text, images, NoPE": {},
    "no NoPE": {"use_nope": False},
    "NoPE everywhere": {"nope_stride": 1},
    "grey images": {"vision_num_channels": 1},
    "one expert": {"num_experts_per_tok": 1},
    "no groups": {"num_key_value_heads": 4},
    "square": {"intermediate_size": 32},
    "another clamp": {"swiglu_limit": 3.0},
    "no vision": {"use_vision": False},
}


def pair(folder, dtype, **overrides):
    """The same checkpoint in both: ours with eager attention and experts, and the example's."""
    config = tiny_config(**overrides)
    tiny_model(config).to(dtype).save_pretrained(folder)
    ours = GPTOSSVisionForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="eager")
    ours.set_experts_implementation("eager")
    batch = tiny_batch(config, images_per_row=(0, 1, 2) if config.use_vision else (0, 0))
    return ours.eval(), checkpoint.load(folder), batch


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_are_those_of_transformers_bit_for_bit(dtype, variant, tmp_path):
    ours, example, batch = pair(tmp_path, dtype, **VARIANTS[variant])
    with torch.no_grad():
        assert torch.equal(example(**batch), ours(**batch).logits)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_rows_are_those_of_transformers_bit_for_bit(side, tmp_path):
    ours, example, batch = pair(tmp_path, torch.float32)
    padding = slice(0, 2) if side == "left" else slice(35, 40)
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    batch["attention_mask"][:, padding] = 0
    with torch.no_grad():
        assert torch.equal(example(**batch), ours(**batch).logits)


def test_the_loss_and_every_gradient_are_those_of_transformers(tmp_path):
    ours, example, batch = pair(tmp_path, torch.float32)
    labels = batch["input_ids"].masked_fill(batch["input_ids"] == ours.config.image_token_id, -100)
    expected = ours(**batch, labels=labels).loss
    expected.backward()
    logits = example(**batch)
    found = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    found.backward()
    assert abs(found.item() - expected.item()) < 1e-6
    gradients = {name: parameter.grad for name, parameter in ours.named_parameters()}
    for name, parameter in example.named_parameters():
        scale = gradients[name].abs().max().clamp(min=1e-3)
        assert (parameter.grad - gradients[name]).abs().max() <= 1e-6 * scale, name


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_in_fp64_equal_the_oracle(variant, tmp_path):
    ours, example, batch = pair(tmp_path, torch.float32, **VARIANTS[variant])
    reference = oracle.forward(ours.state_dict(), ours.config.to_dict(), **batch)
    with torch.no_grad():
        found = example.double()(**batch)
    assert (found - reference).abs().max() <= 1e-12 * reference.abs().max()


def test_cached_steps_equal_one_call(tmp_path):
    """Past the window and YaRN's original context, with two images in the prompt."""
    _, example, batch = pair(tmp_path, torch.float32)
    row, images = batch["input_ids"][2:], batch["pixel_values"][1:]
    with torch.no_grad():
        expected, cache = example(row, images), {}
        steps = [example(row[:, :20], images, cache=cache)]
        steps += [example(row[:, i : i + 1], cache=cache) for i in range(20, 40)]
    found = torch.cat(steps, dim=1)
    assert (found - expected).abs().max() <= 1e-6 * expected.abs().max()


@pytest.mark.parametrize("config", [plain.GPT_OSS_20B, plain.GPT_OSS_120B])
def test_the_real_sizes_have_the_shapes_and_parameters_of_gpt_oss(config):
    with torch.device("meta"):
        example = plain.GPTOSSVision(config)
        layers, experts = config.num_hidden_layers, config.num_local_experts
        ours = GPTOSSVisionForCausalLM(GPTOSSVisionConfig(num_hidden_layers=layers, num_local_experts=experts))
    shapes = {name: parameter.shape for name, parameter in example.state_dict().items()}
    assert shapes == {name: parameter.shape for name, parameter in ours.state_dict().items()}
    text = sum(shape.numel() for name, shape in shapes.items() if "vision" not in name)
    assert round(text / 1e9, 1) == {24: 20.9, 36: 116.8}[layers]


def test_yarn_at_the_real_size_equals_the_oracle():
    positions = torch.tensor([0, 1, 127, 4095, 4096, 131_071])
    cos, sin = plain.rotation(plain.GPT_OSS_20B, positions, torch.float64)
    expected_cos, expected_sin = oracle.rotation(GPTOSSVisionConfig(num_hidden_layers=1).to_dict(), 131_072)
    torch.testing.assert_close(cos, expected_cos[positions], rtol=0, atol=1e-9)
    torch.testing.assert_close(sin, expected_sin[positions], rtol=0, atol=1e-9)


def test_mxfp4_is_unpacked_as_the_converters_do_it():
    generator = torch.Generator().manual_seed(0)
    blocks = torch.randint(256, (2, 5, 3, 16), dtype=torch.uint8, generator=generator)
    scales = torch.arange(30, dtype=torch.uint8).view(2, 5, 3)
    for first in (0, 30, 60, 90, 120, 150, 180, 210, 225):
        expected = mxfp4.dequantize(blocks, scales + first).transpose(1, 2)
        assert torch.equal(checkpoint.unpack_mxfp4(blocks, scales + first), expected)


def test_a_stock_gpt_oss_with_packed_experts_loads(tmp_path):
    """Under the field names of transformers 4, and without a vision bias."""
    config = tiny_config(use_vision=False, use_nope=False, hidden_size=32, intermediate_size=64)
    ours = tiny_model(config)
    weights = {name: tensor.bfloat16() for name, tensor in ours.state_dict().items() if "vision_bias" not in name}
    for name in [name for name in weights if name.endswith(("gate_up_proj", "down_proj"))]:
        packed = mxfp4.quantize(weights.pop(name).transpose(1, 2).contiguous())
        weights |= {name + part: tensor.contiguous() for part, tensor in zip(mxfp4.MXFP4_PARTS, packed, strict=True)}
    save_file(weights, tmp_path / "model.safetensors")
    raw = config.to_dict()
    raw = {name: value for name, value in raw.items() if "vision" not in name} | {"model_type": "gpt_oss"}
    raw["rope_scaling"] = raw.pop("rope_parameters")
    raw["rope_theta"] = raw["rope_scaling"].pop("rope_theta")
    (tmp_path / "config.json").write_text(json.dumps(raw))
    example = checkpoint.load(tmp_path)
    batch = tiny_batch(config, images_per_row=(0,))
    with torch.no_grad():
        reference = oracle.forward(example.state_dict(), config.to_dict(), **batch)
        found = example.double()(**batch)
    assert (found - reference).abs().max() <= 1e-12 * reference.abs().max()


@pytest.mark.parametrize(
    ("overrides", "field"),
    [
        ({"vision_config": tiny_vision_config("siglip_vision_model")}, "vision_model_type = vit"),
        ({"vision_config": tiny_vision_config(layer_norm_eps=1e-6)}, "vision_layer_norm_eps = 1e-12"),
        ({"vision_config": tiny_vision_config(intermediate_size=32)}, "vision_intermediate_size = 64"),
        ({"vision_pool_token": False}, "vision_pool_token = True"),
        ({"layer_types": ["full_attention"] * 4}, "layer_types = "),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}, "rope_type = yarn"),
    ],
)
def test_a_checkpoint_with_parts_that_the_page_does_not_have_is_refused(overrides, field, tmp_path):
    tiny_config(**overrides).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"^model.py has {field}"):
        checkpoint.load(tmp_path)


def test_weights_that_do_not_fit_are_refused(tmp_path):
    ours = tiny_model()
    ours.save_pretrained(tmp_path)
    weights = ours.state_dict() | {"model.extra": torch.zeros(1)}
    save_file({name: tensor.contiguous() for name, tensor in weights.items()}, tmp_path / "model.safetensors")
    with pytest.raises(RuntimeError, match=r"Unexpected key.*model\.extra"):
        checkpoint.load(tmp_path)


def test_images_without_their_placeholders_are_refused():
    example = plain.GPTOSSVision(plain.GPT_OSS_SMALL)
    with pytest.raises(ValueError, match=r"^6 image tokens, but 5 placeholders$"):
        example(torch.full((1, 5), plain.GPT_OSS_SMALL.image_token_id), torch.zeros(1, 1, 8, 8))


def test_the_quick_start_and_the_training_loop_of_the_founding_document_run():
    """`../shared/seeds/gpt-oss-pure-pytorch.md` with our names; the loss shifted, and no cache."""
    config = plain.GPT_OSS_SMALL
    torch.manual_seed(0)
    model = plain.GPTOSSVision(config)
    batch_size, seq_len = 2, 5
    input_ids = torch.randint(0, config.image_token_id, (batch_size, seq_len))
    attention_mask = torch.ones(batch_size, seq_len)
    logits = model(input_ids=input_ids, attention_mask=attention_mask)
    assert logits.shape == (batch_size, seq_len, config.vocab_size)
    assert logits.std() > 0

    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4)
    loss_fn = torch.nn.CrossEntropyLoss()
    losses = []
    for _ in range(100):
        logits = model(input_ids=input_ids)
        loss = loss_fn(logits[:, :-1].reshape(-1, config.vocab_size), input_ids[:, 1:].reshape(-1))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(math.log(config.vocab_size), abs=0.2)
    assert losses[-1] < 0.5 * losses[0]


def test_training_a_loaded_model_leaves_its_file_as_it_is(tmp_path):
    """Weights are mapped from the file; what an optimizer writes stays in memory."""
    _, example, batch = pair(tmp_path, torch.float32)
    before = (tmp_path / "model.safetensors").read_bytes()
    example(**batch).square().mean().backward()
    torch.optim.SGD(example.parameters(), lr=1.0).step()
    assert (tmp_path / "model.safetensors").read_bytes() == before
