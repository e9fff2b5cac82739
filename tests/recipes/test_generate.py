"""Asking a checkpoint from the command line: what is wrong with it is said in one sentence."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from gpt_oss_vision.cli import main
from gpt_oss_vision.recipes.generate import parts_of
from tiny import tiny_config, tiny_model, tiny_processor


@pytest.fixture
def generate(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    """Runs the command in this process; gives its exit code and what it says on stderr."""

    def run(model: Path, *arguments: str) -> tuple[int, str]:
        return main(["generate", "--model", str(model), *arguments]), capsys.readouterr().err

    return run


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A tiny checkpoint with its processor, and an image beside it."""
    processor = tiny_processor()
    config = tiny_config(vocab_size=len(processor.tokenizer), image_token_id=processor.image_token_id)
    model = tiny_model(config)
    model.generation_config = processor.tokenizer.generation_config()
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    Image.fromarray(np.zeros((9, 7, 3), dtype=np.uint8)).save(tmp_path / "image.png")
    return tmp_path / "model"


def test_it_answers_with_an_image(checkpoint: Path, generate: Callable):
    image = str(checkpoint.parent / "image.png")
    assert generate(checkpoint, "--prompt", "What?", "--image", image, "--max-new-tokens", "3") == (0, "")


def test_an_image_goes_to_its_mark_or_to_the_front():
    text, image = {"type": "text", "text": "a "}, {"type": "image", "path": "x.png"}
    assert parts_of("a <image>?", [Path("x.png")]) == [text, image, {"type": "text", "text": "?"}]
    assert parts_of("a ", [Path("x.png")]) == [image, text]


def truncate(model: Path) -> None:
    file = model / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])


def change_config(**fields: object) -> Callable[[Path], None]:
    def change(model: Path) -> None:
        file = model / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | fields))

    return change


def remove(name: str) -> Callable[[Path], None]:
    return lambda model: (model / name).unlink()


BROKEN = {
    "truncated weights": (truncate, "model.safetensors is cut off or damaged"),
    "missing weights": (remove("model.safetensors"), "lacks model.safetensors; copy the checkpoint again"),
    "damaged config": (lambda model: (model / "config.json").write_text("{"), "config.json is not JSON"),
    "no config": (remove("config.json"), "holds no config.json"),
    "another architecture": (change_config(model_type="llama"), "is a checkpoint of 'llama', not of 'gpt_oss_vision'"),
    "NoPE stride 0": (change_config(use_nope=True, nope_stride=0), "nope_stride must be at least 1, got 0"),
}


@pytest.mark.parametrize(("spoil", "sentence"), BROKEN.values(), ids=BROKEN)
def test_a_broken_checkpoint_is_one_sentence(
    spoil: Callable[[Path], None], sentence: str, checkpoint: Path, generate: Callable
):
    spoil(checkpoint)
    code, said = generate(checkpoint, "--prompt", "What?")
    assert code == 1
    assert sentence in said
    assert len(said.splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--prompt", "<image> what?"], "The prompt has 1 <image> for 0 images."),
        (["--prompt", "<image><image>?", "--image", "image.png"], "The prompt has 2 <image> for 1 images."),
        (["--prompt", "what?", "--image", "missing.png"], "missing.png"),
    ],
)
def test_images_that_do_not_fit_the_prompt_are_one_sentence(
    arguments: list[str], sentence: str, checkpoint: Path, generate: Callable
):
    arguments = [str(checkpoint.parent / word) if word.endswith(".png") else word for word in arguments]
    code, said = generate(checkpoint, *arguments)
    assert code == 1
    assert sentence in said
    assert len(said.splitlines()) == 1
