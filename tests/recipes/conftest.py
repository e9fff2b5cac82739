"""A tiny processor and two pictures, for the tests of data; a checkpoint to train from, for those of training."""

from pathlib import Path

import pytest
from PIL import Image

from gpt_oss_vision.bridge.hf.processing_gpt_oss_vision import GPTOSSVisionProcessor
from gpt_oss_vision.recipes.data.digits import all_texts, write_digits
from gpt_oss_vision.recipes.data.tiny import write_processor
from gpt_oss_vision.recipes.data.tokenizer import train_tokenizer
from tiny import tiny_config


@pytest.fixture(scope="session")
def processor() -> GPTOSSVisionProcessor:
    tokenizer = train_tokenizer([*all_texts(), "It is a cat. It is a dog."], vocab_size=400)
    image_token_id = tokenizer.convert_tokens_to_ids("<|reserved_200013|>")
    config = tiny_config(vocab_size=len(tokenizer), image_token_id=image_token_id)
    return GPTOSSVisionProcessor.from_config(config, tokenizer)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with `red.png` and `blue.png`."""
    for name, colour in {"red": (200, 10, 10), "blue": (10, 10, 200)}.items():
        Image.new("RGB", (12, 9), colour).save(tmp_path / f"{name}.png")
    return tmp_path


@pytest.fixture(scope="session")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the digits and the two checkpoints that the quickstart trains from."""
    from gpt_oss_vision.conversion.importing import import_checkpoint
    from gpt_oss_vision.recipes.data.digits import write_digits
    from gpt_oss_vision.recipes.quickstart.run import write_checkpoint
    from gpt_oss_vision.recipes.quickstart.settings import Settings

    out = tmp_path_factory.mktemp("start")
    write_digits(out / "digits", Settings().seed)
    write_checkpoint(out / "hf_start", Settings())
    import_checkpoint(out / "hf_start", out / "megatron_start")
    return out


@pytest.fixture
def out(start: Path, tmp_path: Path) -> Path:
    """A folder to train in; its inputs, which are only read, are links."""
    for name in ("digits", "hf_start", "megatron_start"):
        (tmp_path / name).symlink_to(start / name)
    return tmp_path


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the digits, the processor, and a file of a few rows."""
    from gpt_oss_vision.bridge.mcore import cpu  # it imports Megatron, which most tests of data do without

    folder = tmp_path_factory.mktemp("shared") / "digits"
    cpu.run_ranks(1, write_few, folder)  # not here: a fork of a process that has trained a tokenizer cannot train one
    return folder


def write_few(folder: Path) -> None:
    rows = write_digits(folder, 0).train_path.read_text().splitlines(keepends=True)
    (folder / "few.jsonl").write_text("".join(rows[:60]))
    write_processor(folder / "processor")
