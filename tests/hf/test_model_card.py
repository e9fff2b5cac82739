"""The model card's examples run as written, except for the names of the checkpoint and of the package."""

from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tiny import tiny_checkpoint

NAME = "AIGym/gpt_oss_vision_20B"

# "Usage Examples" of the card, one after the other, in one namespace.
TEXT = """
from transformers import GPTOSSVisionForCausalLM, GPTOSSVisionTokenizer

model = GPTOSSVisionForCausalLM.from_pretrained("AIGym/gpt_oss_vision_20B")
tokenizer = GPTOSSVisionTokenizer.from_pretrained("AIGym/gpt_oss_vision_20B")

text = "The future of artificial intelligence is"
inputs = tokenizer(text, return_tensors="pt")
outputs = model.generate(**inputs, max_new_tokens=50)
print(tokenizer.decode(outputs[0], skip_special_tokens=True))
"""
IMAGE = """
from transformers import GPTOSSVisionProcessor
from PIL import Image

processor = GPTOSSVisionProcessor.from_pretrained("AIGym/gpt_oss_vision_20B")
image = Image.open("image.jpg")

text = "Describe this image in detail:"
inputs = processor(text=text, images=image, return_tensors="pt")
outputs = model.generate(**inputs, max_new_tokens=100)
print(processor.decode(outputs[0], skip_special_tokens=True))
"""
NOPE = """
from transformers import GPTOSSVisionConfig

config = GPTOSSVisionConfig.from_pretrained("AIGym/gpt_oss_vision_20B")
config.use_nope = True
config.nope_stride = 4

model = GPTOSSVisionForCausalLM.from_pretrained(
    "AIGym/gpt_oss_vision_20B",
    config=config
)
"""


@pytest.fixture
def names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The namespace of the examples, empty at first; the working directory has a checkpoint and an image."""
    tiny_checkpoint(tmp_path / "checkpoint", use_nope=False, num_hidden_layers=5)
    Image.new("RGB", (30, 20), "red").save(tmp_path / "image.jpg")
    monkeypatch.chdir(tmp_path)
    return {}


def run(example: str, names: dict[str, Any]) -> None:
    exec(example.replace(NAME, "checkpoint").replace("from transformers", "from gpt_oss_vision"), names)


def test_basic_text_generation(names, capsys):
    run(TEXT, names)
    assert capsys.readouterr().out.startswith("The future of artificial intelligence is")
    assert 0 < names["outputs"].shape[1] - names["inputs"]["input_ids"].shape[1] <= 50


def test_multimodal_generation(names, capsys):
    run(TEXT, names)
    run(IMAGE, names)
    assert "Describe this image in detail:" in capsys.readouterr().out
    places = names["inputs"]["input_ids"] == names["processor"].image_token_id
    assert places.sum() == names["processor"].num_image_tokens
    assert names["inputs"]["pixel_values"].shape == (1, 3, 8, 8)


def test_long_context_with_nope(names):
    run(TEXT, names)
    before = names["model"](**names["inputs"]).logits
    run(NOPE, names)
    assert [layer.skips_rotation for layer in names["model"].model.layers] == [False, False, False, True, False]
    assert not names["model"](**names["inputs"]).logits.equal(before)
