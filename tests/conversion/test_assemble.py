"""Assembling a gpt-oss and a tower: every weight in its place, the rest new and named."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from crashes import many_small_tasks, survives_kills, survives_kills_at_changes
from rich.console import Console
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    GptOssConfig,
    GptOssForCausalLM,
    SiglipConfig,
    SiglipModel,
    ViTConfig,
    ViTForImageClassification,
    ViTModel,
)

from checkpoints import change, edit_config, files_of, load_hf, pack
from gpt_oss_vision.bridge.hf.modeling_gpt_oss_vision import GPTOSSVisionForCausalLM
from gpt_oss_vision.bridge.hf.processing_gpt_oss_vision import GPTOSSVisionProcessor
from gpt_oss_vision.conversion.assemble import assemble
from tiny import randomise, tiny_config, tiny_processor, tiny_vision_config

TOWER = {name: value for name, value in tiny_vision_config().items() if name != "model_type"}
TEXT_TOWER = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
TEXT_TOWER |= {"vocab_size": 64, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}


def save_text(folder: Path, *, packed: bool = False) -> Path:
    """A tiny stock gpt-oss with a tokenizer."""
    processor = tiny_processor()
    ours = tiny_config(vocab_size=len(processor.tokenizer), hidden_size=64, intermediate_size=96)
    fields = {name: value for name, value in ours.to_dict().items() if name in GptOssConfig().to_dict()}
    model = GptOssForCausalLM(GptOssConfig(**fields | {"model_type": "gpt_oss"}))
    randomise(model)
    model.save_pretrained(folder)
    processor.tokenizer.save_pretrained(folder)
    return change(folder, pack) if packed else folder


def towers() -> dict[str, torch.nn.Module]:
    """A tower by itself, in a classifier, and with the text half of its model."""
    return {
        "ViT": ViTModel(ViTConfig(**TOWER), add_pooling_layer=False),
        "ViT with a classifier": ViTForImageClassification(ViTConfig(**TOWER)),
        "CLIP's tower": CLIPVisionModel(CLIPVisionConfig(**TOWER)),
        "CLIP": CLIPModel(CLIPConfig(vision_config=TOWER, text_config=TEXT_TOWER, projection_dim=8)),
        "SigLIP": SiglipModel(SiglipConfig(vision_config=TOWER, text_config=TEXT_TOWER)),
    }


LEFT_OUT = {
    "ViT": set(),
    "ViT with a classifier": {"classifier"},
    "CLIP's tower": {"post_layernorm", "vision_model"},
    "CLIP": {"logit_scale", "text_model", "text_projection", "visual_projection", "vision_model"},
    "SigLIP": {"logit_bias", "logit_scale", "text_model", "vision_model"},
}


@pytest.mark.parametrize("kind", LEFT_OUT)
@pytest.mark.parametrize("packed", [False, True], ids=["fp32", "MXFP4"])
def test_every_weight_gets_into_its_place(kind: str, packed: bool, tmp_path: Path):
    text, tower = save_text(tmp_path / "text", packed=packed), towers()[kind]
    for parameter in tower.parameters():
        parameter.data.normal_()
    tower.save_pretrained(tmp_path / "vision")
    report = assemble(text, tmp_path / "vision", tmp_path / "out", image_token_id=tiny_processor().image_token_id)
    made, before = load_hf(tmp_path / "out"), load_hf(text)
    assert [name for name in before if not torch.equal(made[name], before[name])] == []
    found = tower.state_dict()
    tails = [name for name in made if name.startswith("model.vision_adapter.vit.")]
    assert tails
    for name in tails:
        (same,) = [
            other
            for other in found
            if other.endswith(name.removeprefix("model.vision_adapter.vit.")) and "text" not in other
        ]
        assert torch.equal(made[name], found[same]), name
    assert {name.split(".")[0] for name in report["left_out"]} <= LEFT_OUT[kind]
    assert bool(report["left_out"]) == bool(LEFT_OUT[kind])
    assert {name.removeprefix("model.vision_adapter.") for name in report["added"] if "vision_adapter" in name} == {
        "pool_token",
        "norm.weight",
        "norm.bias",
        "proj.weight",
        "proj.bias",
    }


def test_the_result_loads_and_answers_text_as_gpt_oss_does(tmp_path: Path):
    text = save_text(tmp_path / "text")
    towers()["CLIP"].save_pretrained(tmp_path / "vision")
    assemble(text, tmp_path / "vision", tmp_path / "out", image_token_id=tiny_processor().image_token_id)
    ours, stock = (
        cls.from_pretrained(path).eval()
        for cls, path in ((GPTOSSVisionForCausalLM, tmp_path / "out"), (GptOssForCausalLM, text))
    )
    tokens = torch.arange(2, 42).unsqueeze(0)
    with torch.no_grad():
        assert torch.equal(ours(input_ids=tokens).logits, stock(input_ids=tokens).logits)
        processor = GPTOSSVisionProcessor.from_pretrained(tmp_path / "out")
        inputs = processor(text="<image> What?", images=torch.zeros(3, 8, 8, dtype=torch.uint8), return_tensors="pt")
        assert ours(**inputs).logits.isfinite().all()


def test_new_weights_depend_on_the_seed_alone(tmp_path: Path):
    text = save_text(tmp_path / "text")
    towers()["ViT"].save_pretrained(tmp_path / "vision")
    token = tiny_processor().image_token_id
    for name, seed in {"a": 0, "b": 0, "c": 1}.items():
        assemble(text, tmp_path / "vision", tmp_path / name, seed=seed, image_token_id=token)
    assert files_of(tmp_path / "a") == files_of(tmp_path / "b")
    for weight in ("pool_token", "proj.weight"):
        assert not torch.equal(*(load_hf(tmp_path / name)[f"model.vision_adapter.{weight}"] for name in "ac"))


def test_every_new_weight_is_drawn_as_the_model_class_draws_it(tmp_path: Path):
    """Constants are equal, and random weights have the mean and the standard deviation of the model's own."""
    text = edit_config(save_text(tmp_path / "text"), initializer_range=0.3)
    ViTModel(ViTConfig(**TOWER | {"hidden_size": 512}), add_pooling_layer=False).save_pretrained(tmp_path / "vision")
    report = assemble(text, tmp_path / "vision", tmp_path / "out", image_token_id=tiny_processor().image_token_id)
    made = load_hf(tmp_path / "out")
    torch.manual_seed(0)
    model = GPTOSSVisionForCausalLM(GPTOSSVisionForCausalLM.config_class.from_pretrained(tmp_path / "out"))
    for name in report["added"]:
        mine, theirs = made[name].flatten(), model.state_dict()[name].flatten()
        error = theirs.std() / len(theirs) ** 0.5  # of the mean; that of the standard deviation is smaller
        assert (mine.mean() - theirs.mean()).abs() <= 5 * error, name
        assert (mine.std() - theirs.std()).abs() <= 5 * error, name
    drawn = [name.removeprefix("model.vision_adapter.") for name in report["added"] if made[name].std() > 0]
    assert drawn == ["pool_token", "proj.weight"]
    token, matrix = (made[f"model.vision_adapter.{name}"].flatten() for name in drawn)
    assert not torch.equal(token, matrix[: len(token)])


def test_a_tower_in_fp32_is_rounded_to_the_type_of_the_text_with_a_warning(tmp_path: Path):
    text, tower = save_text(tmp_path / "text"), towers()["ViT"]
    GptOssForCausalLM.from_pretrained(text, dtype=torch.bfloat16).save_pretrained(text)
    tower.save_pretrained(tmp_path / "vision")
    with (tmp_path / "log").open("w") as log:
        assemble(text, tmp_path / "vision", tmp_path / "out", image_token_id=3, console=Console(file=log, width=200))
    count = len(tower.state_dict())
    assert f"Warning: {count} tensors are rounded from float32 to bfloat16\n" in (tmp_path / "log").read_text()
    made = load_hf(tmp_path / "out")["model.vision_adapter.vit.layernorm.weight"]
    assert torch.equal(made, tower.layernorm.weight.bfloat16())


def test_killed_at_any_record_it_is_continued_to_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    many_small_tasks(monkeypatch)
    text = save_text(tmp_path / "text")
    towers()["ViT"].save_pretrained(tmp_path / "vision")
    token, out = tiny_processor().image_token_id, tmp_path / "out"
    assert survives_kills(lambda: assemble(text, tmp_path / "vision", out, image_token_id=token), out) > 10


def test_killed_at_any_change_to_files_it_is_continued_to_the_same_bytes(tmp_path: Path):
    text, out = save_text(tmp_path / "text"), tmp_path / "out"
    towers()["ViT"].save_pretrained(tmp_path / "vision")
    assert survives_kills_at_changes(lambda: assemble(text, tmp_path / "vision", out, image_token_id=3), out) > 40


BROKEN = {
    "a tower of another kind": (
        lambda vision: edit_config(vision, model_type="resnet"),
        "is a checkpoint of 'resnet', not of",
    ),
    "a tower that lacks weights": (
        lambda vision: change(vision, lambda tensors: tensors.pop("layernorm.weight")),
        r"lacks tensors of its tower: layernorm\.weight",
    ),
    "a tower of another width": (lambda vision: edit_config(vision, intermediate_size=32), "do not match its config"),
    "a tower of integers": (
        lambda vision: change(vision, lambda tensors: tensors.update({"layernorm.bias": torch.ones(16).int()})),
        r"do not match its config: model\.vision_adapter\.vit\.layernorm\.bias",
    ),
    "a tower without a config": (lambda vision: (vision / "config.json").unlink(), r"holds no config\.json"),
    "no folder": (shutil.rmtree, "vision is not a folder; name the folder of"),
    "fewer layers than are stored": (
        lambda vision: edit_config(vision, num_hidden_layers=1),
        r"config\.json has no layers for some tensors of its tower: (\w+\.)+1\.",
    ),
    "a weight under two names": (
        lambda vision: change(
            vision, lambda tensors: tensors.update({"vit.layernorm.weight": tensors["layernorm.weight"].clone()})
        ),
        r"holds layernorm\.weight of its tower twice, as (vit\.)?layernorm\.weight and (vit\.)?layernorm\.weight",
    ),
    **{
        f"a config that is {text}": (
            lambda vision, text=text: (vision / "config.json").write_text(text),
            r"config\.json holds \w+ in place of an object",
        )
        for text in ("[]", "null", '"x"')
    },
    **{
        f"{kind} with {tower!r} for a tower": (
            lambda vision, kind=kind, tower=tower: edit_config(vision, model_type=kind, vision_config=tower),
            rf"config\.json has {tower!r} for vision_config, not its fields",
        )
        for kind, tower in (("clip", None), ("siglip", "vit"))
    },
    **{
        f"{name} {value!r}": (
            lambda vision, name=name, value=value: edit_config(vision, **{name: value}),
            rf"vision/config\.json describes a model that cannot be built \(.*{said}",
        )
        for name, value, said in (
            ("hidden_size", "x", "'hidden_size' expected int, got str"),
            ("num_attention_heads", 0, "ZeroDivisionError"),
            ("hidden_act", "foo", "foo"),
        )
    },
    "an architecture that is no word": (
        lambda vision: edit_config(vision, model_type=[]),
        r"is a checkpoint of \[\], not of",
    ),
}


@pytest.mark.parametrize("kind", ["CLIP", "SigLIP"])
def test_layers_beyond_the_config_are_found_under_every_prefix(kind: str, tmp_path: Path):
    save_text(tmp_path / "text")
    towers()[kind].save_pretrained(tmp_path / "vision")
    edit_config(tmp_path / "vision", vision_config={**TOWER, "num_hidden_layers": 1})
    with pytest.raises(
        ValueError, match=r"no layers for some tensors of its tower: vision_model\.encoder\.layers\.1\."
    ):
        assemble(tmp_path / "text", tmp_path / "vision", tmp_path / "out", image_token_id=3)


def test_a_clip_config_without_a_tower_is_refused(tmp_path: Path):
    save_text(tmp_path / "text")
    towers()["CLIP"].save_pretrained(tmp_path / "vision")
    file = tmp_path / "vision" / "config.json"
    file.write_text(json.dumps({"model_type": "clip"}))
    with pytest.raises(ValueError, match=r"config\.json has None for vision_config, not its fields"):
        assemble(tmp_path / "text", tmp_path / "vision", tmp_path / "out", image_token_id=3)


@pytest.mark.parametrize(("spoil", "sentence"), BROKEN.values(), ids=BROKEN)
def test_broken_input_is_refused_with_the_reason_and_leaves_nothing(spoil, sentence: str, tmp_path: Path):
    save_text(tmp_path / "text")
    towers()["ViT"].save_pretrained(tmp_path / "vision")
    spoil(tmp_path / "vision")
    with pytest.raises((ValueError, FileNotFoundError), match=sentence):
        assemble(tmp_path / "text", tmp_path / "vision", tmp_path / "out", image_token_id=3)
    assert {path.name for path in tmp_path.iterdir()} <= {"text", "vision"}


def test_a_text_checkpoint_that_has_vision_already_is_refused(tmp_path: Path):
    save_text(tmp_path / "text")
    towers()["ViT"].save_pretrained(tmp_path / "vision")
    assemble(tmp_path / "text", tmp_path / "vision", tmp_path / "first", image_token_id=3)
    with pytest.raises(ValueError, match="is no stock 'gpt_oss' checkpoint"):
        assemble(tmp_path / "first", tmp_path / "vision", tmp_path / "out", image_token_id=3)
    shutil.rmtree(tmp_path / "first")
