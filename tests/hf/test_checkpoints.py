"""Saving and loading: bit for bit, in every dtype, under fixed names, by the Auto classes, without this package too."""

import json
import re
from pathlib import Path

import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoProcessor,
    AutoTokenizer,
    GptOssConfig,
    GptOssForCausalLM,
)
from transformers.models.auto import modeling_auto
from transformers.models.vit import modeling_vit

from checkpoints import change, pack
from fresh import Finished, run_fresh
from gpt_oss_vision.bridge import hf
from gpt_oss_vision.bridge.hf import register_auto_classes
from gpt_oss_vision.bridge.hf.configuration_gpt_oss_vision import AUTO_MAP, GPTOSSVisionConfig
from gpt_oss_vision.bridge.hf.image_processing_gpt_oss_vision import GPTOSSVisionImageProcessor
from gpt_oss_vision.bridge.hf.modeling_gpt_oss_vision import GPTOSSVisionForCausalLM, GPTOSSVisionModel
from gpt_oss_vision.bridge.hf.processing_gpt_oss_vision import GPTOSSVisionProcessor
from gpt_oss_vision.bridge.hf.tokenization_gpt_oss_vision import GPTOSSVisionTokenizer
from tiny import randomise, tiny_batch, tiny_config, tiny_model, tiny_processor, tiny_vision_config

TEXT_NAMES = {
    "model.embed_tokens.weight",
    "model.norm.weight",
    "lm_head.weight",
    "model.layers.N.input_layernorm.weight",
    "model.layers.N.post_attention_layernorm.weight",
    *(f"model.layers.N.self_attn.{name}_proj.{kind}" for name in "qkvo" for kind in ("weight", "bias")),
    "model.layers.N.self_attn.sinks",
    *(f"model.layers.N.mlp.router.{name}" for name in ("weight", "bias", "vision_bias")),
    *(f"model.layers.N.mlp.experts.{name}" for name in ("gate_up_proj", "gate_up_proj_bias")),
    *(f"model.layers.N.mlp.experts.{name}" for name in ("down_proj", "down_proj_bias")),
}
ADAPTER_NAMES = {"pool_token", "norm.weight", "norm.bias", "proj.weight", "proj.bias"}


def pairs(*names: str) -> set[str]:
    return {f"{name}.{kind}" for name in names for kind in ("weight", "bias")}


CLIP_LAYER = (
    "layer_norm1",
    "layer_norm2",
    "mlp.fc1",
    "mlp.fc2",
    *(f"self_attn.{name}_proj" for name in ("q", "k", "v")),
)
TOWER_NAMES = {
    "vit": {"embeddings.cls_token", "embeddings.position_embeddings"}
    | pairs("embeddings.patch_embeddings.projection", "layernorm")
    | pairs(*(f"layers.N.{name}" for name in ("layernorm_before", "layernorm_after", "mlp.fc1", "mlp.fc2")))
    | pairs(*(f"layers.N.attention.{name}_proj" for name in "qkvo")),
    "clip_vision_model": {"embeddings.class_embedding", "embeddings.patch_embedding.weight"}
    | {"embeddings.position_embedding.weight"}
    | pairs("pre_layrnorm", *(f"encoder.layers.N.{name}" for name in (*CLIP_LAYER, "self_attn.out_proj"))),
    "siglip_vision_model": {"embeddings.position_embedding.weight"}
    | pairs("embeddings.patch_embedding", "post_layernorm")
    | pairs(*(f"encoder.layers.N.{name}" for name in (*CLIP_LAYER, "self_attn.out_proj"))),
}


def saved_names(folder: Path) -> set[str]:
    return {re.sub(r"layers\.\d+\.", "layers.N.", name) for name in load_file(folder / "model.safetensors")}


def same_weights(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    ours, theirs = one.state_dict(), other.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("tower", TOWER_NAMES)
def test_a_checkpoint_has_the_agreed_names(tmp_path, tower):
    tiny_model(tiny_config(vision_config=tiny_vision_config(tower))).save_pretrained(tmp_path)
    adapter = ADAPTER_NAMES | {f"vit.{name}" for name in TOWER_NAMES[tower]}
    assert saved_names(tmp_path) == TEXT_NAMES | {f"model.vision_adapter.{name}" for name in adapter}


def test_a_checkpoint_without_vision_has_gpt_oss_s_names_and_the_vision_bias(tmp_path):
    tiny_model(tiny_config(use_vision=False)).save_pretrained(tmp_path)
    assert saved_names(tmp_path) == TEXT_NAMES


@pytest.mark.parametrize("tower", TOWER_NAMES)
def test_a_saved_model_loads_bit_for_bit(tmp_path, tower):
    model = tiny_model(tiny_config(vision_config=tiny_vision_config(tower)))
    model.save_pretrained(tmp_path)
    loaded, report = GPTOSSVisionForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values())
    assert same_weights(loaded, model)
    loaded.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again/model.safetensors").read_bytes() == (tmp_path / "model.safetensors").read_bytes()


@pytest.mark.parametrize("tower", TOWER_NAMES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_half_precision_the_vision_bias_stays_fp32_and_the_model_runs(tmp_path, dtype, tower):
    config = tiny_config(vision_config=tiny_vision_config(tower))
    model, batch = tiny_model(config), tiny_batch(config)
    model.save_pretrained(tmp_path)
    half = GPTOSSVisionForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    half.save_pretrained(tmp_path / "half")
    again = GPTOSSVisionForCausalLM.from_pretrained(tmp_path / "half")
    assert same_weights(again, half)
    biases = {
        name: weight for name, weight in load_file(tmp_path / "half/model.safetensors").items() if "vision_bias" in name
    }
    for name, bias in biases.items():
        assert torch.equal(bias, model.state_dict()[name])
    tower_types = {parameter.dtype for parameter in half.model.vision_adapter.parameters()}
    assert tower_types == {dtype}  # a LayerNorm can't mix types
    with torch.no_grad():
        assert (again(**batch).logits.float() - model(**batch).logits).abs().mean() < 0.1


def test_built_in_bf16_the_vision_bias_is_fp32():
    model = GPTOSSVisionForCausalLM._from_config(tiny_config(), dtype=torch.bfloat16)
    types = {name.rsplit(".", 1)[-1]: parameter.dtype for name, parameter in model.named_parameters()}
    assert types.pop("vision_bias") == torch.float32
    assert set(types.values()) == {torch.bfloat16}


OLDER_VIT = hasattr(modeling_vit, "ViTEncoder")


@pytest.mark.skipif(not OLDER_VIT, reason="loads, as the next test says, with transformers >= 5.9")
def test_a_tower_under_the_names_of_transformers_4_is_refused_where_transformers_itself_has_these_names(tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights = {name.replace(".attention.q_proj", ".attention.attention.query"): w for name, w in weights.items()}
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"doesn't fit .* it lacks 4 weights .*q_proj"):
        GPTOSSVisionForCausalLM.from_pretrained(tmp_path)


@pytest.mark.skipif(OLDER_VIT, reason="the table of these names came with transformers 5.9")
def test_a_tower_under_the_names_of_transformers_4_loads(tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path, save_original_format=True)
    assert any(
        "vit.encoder.layer.0.attention.attention.query" in name for name in load_file(tmp_path / "model.safetensors")
    )
    loaded, report = GPTOSSVisionForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values())
    assert same_weights(loaded, model)
    loaded.save_pretrained(tmp_path / "new")
    assert load_file(tmp_path / "new/model.safetensors").keys() == model.state_dict().keys()


# A stock gpt-oss checkpoint


@pytest.fixture(scope="module")
def stock(tmp_path_factory) -> dict[str, Path]:
    """A stock gpt-oss checkpoint with the whole vocabulary: in bf16, and with its experts in MXFP4."""
    folders = {kind: tmp_path_factory.mktemp("stock") / kind for kind in ("bf16", "mxfp4")}
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "head_dim": 16}
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2, "num_hidden_layers": 2, "num_key_value_heads": 2}
    config = GptOssConfig(**sizes, **experts, eos_token_id=200_002, pad_token_id=199_999, dtype="bfloat16")
    model = GptOssForCausalLM(config)
    randomise(model)
    for kind, folder in folders.items():
        model.bfloat16().save_pretrained(folder)
        if kind == "mxfp4":
            change(folder, pack)
            fields = json.loads((folder / "config.json").read_text())
            (folder / "config.json").write_text(json.dumps(fields | {"quantization_config": {"quant_method": kind}}))
    return folders


LOAD_STOCK = """
import logging, sys, torch
from gpt_oss_vision import GPTOSSVisionForCausalLM
folder, expected = sys.argv[1:]
model = GPTOSSVisionForCausalLM.from_pretrained(folder, vision_embed_dim=16, vision_num_layers=1, vision_num_heads=2)
expected = torch.load(expected, weights_only=True)
with torch.no_grad():
    assert torch.equal(model(expected["input_ids"]).logits, expected["logits"])
assert model.config.num_image_tokens == 258 and model.config.image_token_id == 200013
assert all(not layer.mlp.router.vision_bias.any() for layer in model.model.layers)
assert model.model.vision_adapter.proj.weight.std() > 0
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["bf16", "mxfp4"])
def test_a_stock_checkpoint_loads_in_a_fresh_process(kind, fresh):
    """Text logits equal those of gpt-oss, as transformers loads it; new weights are initialised and reported."""
    assert fresh[kind].returncode == 0, fresh[kind].stderr
    assert "has no vision_adapter: its 27 weights are new, and still to be trained." in fresh[kind].stderr
    assert "has no vision_bias: its 2 weights are new, and still to be trained." in fresh[kind].stderr


def test_a_stock_checkpoint_s_report_names_what_was_added(stock):
    tower = {"vision_embed_dim": 16, "vision_num_layers": 1, "vision_num_heads": 2}
    model, report = GPTOSSVisionForCausalLM.from_pretrained(stock["bf16"], **tower, output_loading_info=True)
    added = {name for name, _ in model.named_parameters() if "vision" in name}
    assert report["missing_keys"] == added
    assert not report["unexpected_keys"]


# A checkpoint that doesn't fit


@pytest.fixture
def saved(tmp_path) -> Path:
    tiny_model().save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("names", "sentence"),
    [
        (["model.norm.weight"], r"lacks 1 weight \(model.norm.weight\), and has nothing that"),
        (["model.vision_adapter.proj.bias"], r"lacks 1 weight \(model.vision_adapter.proj.bias\)"),
        (
            [f"model.layers.{layer}.self_attn.sinks" for layer in range(4)] + ["lm_head.weight"],
            r"lacks 5 weights \(lm_head.weight, model.layers.\*.self_attn.sinks\)",
        ),
    ],
)
def test_a_checkpoint_that_lacks_weights_is_refused_with_their_names(saved, names, sentence):
    change(saved, lambda tensors: [tensors.pop(name) for name in names])
    with pytest.raises(ValueError, match=sentence):
        GPTOSSVisionForCausalLM.from_pretrained(saved)
    _, report = GPTOSSVisionForCausalLM.from_pretrained(saved, output_loading_info=True)
    assert report["missing_keys"] == set(names)


def test_a_checkpoint_with_foreign_weights_is_refused_with_their_names(saved):
    change(saved, lambda tensors: tensors.update({"model.layers.0.mlp.gate.weight": torch.zeros(2)}))
    with pytest.raises(
        ValueError, match=r"has 1 weight \(model.layers.0.mlp.gate.weight\) that the model doesn't have"
    ):
        GPTOSSVisionForCausalLM.from_pretrained(saved)


def test_a_convolution_in_the_place_of_a_tower_is_refused_by_name(saved):
    """The original code saved such checkpoints when it failed to build its ViT."""

    def replace_tower(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if ".vit." in name]:
            del tensors[name]
        tensors["model.vision_adapter.patch_embed.weight"] = torch.zeros(16, 3, 4, 4)

    change(saved, replace_tower)
    with pytest.raises(
        ValueError, match=r"no vision tower, only the convolution model.vision_adapter.patch_embed.weight"
    ):
        GPTOSSVisionForCausalLM.from_pretrained(saved)


def test_without_vision_a_tower_in_the_checkpoint_is_left_there(saved):
    model = GPTOSSVisionForCausalLM.from_pretrained(saved, use_vision=False)
    assert model.model.vision_adapter is None


def test_a_file_cut_short_is_named(saved):
    tiny_model().save_pretrained(saved, max_shard_size="100KB")
    shard = sorted(saved.glob("model-*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-1000])
    (saved / "model.safetensors").unlink(missing_ok=True)
    with pytest.raises(OSError, match=rf"{shard.name} is truncated or damaged .*; download or copy it again\.$"):
        GPTOSSVisionForCausalLM.from_pretrained(saved)


def test_a_shard_that_is_missing_is_named(saved):
    tiny_model().save_pretrained(saved, max_shard_size="100KB")
    (saved / "model.safetensors").unlink(missing_ok=True)
    shard = sorted(saved.glob("model-*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(OSError, match=shard.name):
        GPTOSSVisionForCausalLM.from_pretrained(saved)


def test_the_model_and_its_head_load_each_other(tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path)
    base, report = GPTOSSVisionModel.from_pretrained(tmp_path, output_loading_info=True)
    assert report["unexpected_keys"] == {"lm_head.weight"}
    assert same_weights(base, model.model)
    base.save_pretrained(tmp_path / "base")
    head, report = GPTOSSVisionForCausalLM.from_pretrained(tmp_path / "base", output_loading_info=True)
    assert report["missing_keys"] == {"lm_head.weight"}
    assert same_weights(head.model, model.model)


def test_another_architecture_is_refused_by_name(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen3_moe"}))
    with pytest.raises(ValueError, match="This is a checkpoint of `qwen3_moe`"):
        GPTOSSVisionForCausalLM.from_pretrained(tmp_path)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    processor = tiny_processor()
    model = tiny_model(
        processor_config := tiny_config(vocab_size=len(processor.tokenizer), image_token_id=processor.image_token_id)
    )
    assert processor_config.num_image_tokens == processor.num_image_tokens
    model.generation_config = processor.tokenizer.generation_config()
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def test_auto_classes_find_everything_and_registering_twice_is_harmless(checkpoint):
    register_auto_classes()
    register_auto_classes()
    found = {
        AutoConfig: GPTOSSVisionConfig,
        AutoModel: GPTOSSVisionModel,
        AutoModelForCausalLM: GPTOSSVisionForCausalLM,
        AutoModelForImageTextToText: GPTOSSVisionForCausalLM,
        AutoModelForMultimodalLM: GPTOSSVisionForCausalLM,
        AutoImageProcessor: GPTOSSVisionImageProcessor,
        AutoProcessor: GPTOSSVisionProcessor,
        AutoTokenizer: GPTOSSVisionTokenizer,
    }
    for auto, ours in found.items():
        assert type(auto.from_pretrained(checkpoint)) is ours


def names_of(table: str) -> dict[str, str]:
    return getattr(modeling_auto, table)


# Image-text models of transformers that are in every table for such a model, and tables in which ours is not.
LIKE_OURS = ("gpt_oss", "llava", "gemma3", "mllama")
NOT_OURS = {
    "MODEL_FOR_PRETRAINING_MAPPING_NAMES",  # the same classes again
    "MODEL_FOR_IMAGE_MAPPING_NAMES",  # towers
    "MODEL_FOR_TEXT_ENCODING_MAPPING_NAMES",  # parts of diffusion models
    "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES",  # there are no such models of ours
    "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES",
}


def test_the_model_is_in_every_table_that_has_models_like_it():
    register_auto_classes()
    tables = [name for name in dir(modeling_auto) if re.fullmatch(r"MODEL\w*_MAPPING_NAMES", name)]
    expected = {table for table in tables if any(model in names_of(table) for model in LIKE_OURS)}
    found = {table for table in tables if "gpt_oss_vision" in names_of(table)}
    assert expected - NOT_OURS == found


def test_the_auto_map_names_the_registered_classes():
    register_auto_classes()
    for name, reference in AUTO_MAP.items():
        auto_class = getattr(transformers, name)
        ours = GPTOSSVisionConfig if name == "AutoConfig" else auto_class._model_mapping[GPTOSSVisionConfig]
        assert reference == f"{ours.__module__.rpartition('.')[2]}.{ours.__name__}"


@pytest.mark.parametrize("whose", ["config", "model", "base model", "loaded config"])
def test_a_saved_config_is_never_without_the_code_that_it_names(tmp_path, whose):
    model = tiny_model()
    model.config.save_pretrained(tmp_path / "once")
    savers = {"config": tiny_config(), "model": model, "base model": model.model}
    saver = savers.get(whose) or GPTOSSVisionConfig.from_pretrained(tmp_path / "once")
    if whose == "loaded config":
        del saver.auto_map  # as Megatron-Bridge does
    saver.save_pretrained(tmp_path / "again")
    assert json.loads((tmp_path / "again/config.json").read_text())["auto_map"] == AUTO_MAP
    package = Path(hf.__file__).parent
    for module in {reference.partition(".")[0] for reference in AUTO_MAP.values()}:
        assert (tmp_path / "again" / f"{module}.py").read_bytes() == (package / f"{module}.py").read_bytes()


WITHOUT_US = """
import json, os, sys, warnings
warnings.simplefilter("ignore")
sys.modules["gpt_oss_vision"] = None  # importing it fails
import torch
from PIL import Image
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor
from transformers import AutoModelForMultimodalLM
folder, logits = sys.argv[1:]
AutoConfig.from_pretrained(folder, trust_remote_code=True).save_pretrained(folder + "/config")
named = json.load(open(folder + "/config/config.json"))["auto_map"]
assert all(os.path.exists(f"{folder}/config/{reference.partition('.')[0]}.py") for reference in named.values())
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
inputs = processor(text="Which digit?", images=Image.new("L", (30, 20), 90), return_tensors="pt")
AutoModel.from_pretrained(folder, trust_remote_code=True)
for auto in (AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForMultimodalLM):
    model = auto.from_pretrained(folder, trust_remote_code=True)
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, torch.load(logits, weights_only=True))
model.save_pretrained(folder + "/again")
"""


@pytest.fixture(scope="module")
def fresh(stock, checkpoint, tmp_path_factory) -> dict[str, Finished]:
    """The results of the scripts above, each run in a fresh process, by name."""
    folder = tmp_path_factory.mktemp("fresh")
    scripts = {"without us": [WITHOUT_US, str(checkpoint), str(folder / "logits.pt")]}
    model = GPTOSSVisionForCausalLM.from_pretrained(checkpoint)
    processor = GPTOSSVisionProcessor.from_pretrained(checkpoint)
    inputs = processor(text="Which digit?", images=Image.new("L", (30, 20), 90), return_tensors="pt")
    with torch.no_grad():
        torch.save(model(**inputs).logits, folder / "logits.pt")
    input_ids = torch.randint(0, 199_000, (2, 150), generator=torch.Generator().manual_seed(0))
    for kind, path in stock.items():
        with torch.no_grad():
            logits = GptOssForCausalLM.from_pretrained(path)(input_ids).logits
        torch.save({"input_ids": input_ids, "logits": logits}, folder / f"{kind}.pt")
        scripts[kind] = [LOAD_STOCK, str(path), str(folder / f"{kind}.pt")]
    return run_fresh(folder, scripts)


@pytest.mark.slow
def test_a_checkpoint_works_in_a_process_without_this_package(checkpoint, fresh):
    assert fresh["without us"].returncode == 0, fresh["without us"].stderr
    assert (checkpoint / "again/modeling_gpt_oss_vision.py").exists()
    assert json.loads((checkpoint / "again/config.json").read_text())["auto_map"] == AUTO_MAP
