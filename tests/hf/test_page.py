"""The examples of docs/transformers.md run as written, one after the other."""

import json
import re
from pathlib import Path

import pytest
from PIL import Image

from tiny import tiny_checkpoint

PAGE = Path(__file__).parents[2] / "docs/transformers.md"
# Without the examples that need a checkpoint of the reader.
EXAMPLES = [code for code in re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL) if "path/to/" not in code]


@pytest.fixture
def out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The output of a quickstart, as far as the page uses it: a checkpoint, an image and chats."""
    out = tmp_path / "out"
    (out / "digits/images").mkdir(parents=True)
    tiny_checkpoint(out / "hf")
    Image.new("L", (8, 8), 90).save(out / "digits/images/0003.png")
    question = [{"type": "image", "path": "images/0003.png"}, {"type": "text", "text": "Which digit is this?"}]
    chat = [{"role": "user", "content": question}, {"role": "assistant", "content": "It is a seven."}]
    (out / "digits/train.jsonl").write_text(json.dumps({"messages": chat}))
    monkeypatch.chdir(tmp_path)
    return out


@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true but no accelerator is found")
def test_the_examples_of_the_page_run_as_written(out: Path, capsys: pytest.CaptureFixture[str]):
    names = {}
    for example in EXAMPLES:
        exec(example, names)
    said = capsys.readouterr().out
    assert "type look = (_: {\n// How close.\ndepth?: number,\n}) => any;" in said
    assert "<|start|>functions.look to=assistant<|channel|>commentary<|message|>a seven<|end|>" in said
    assert "of them not quantised: model.embed_tokens.weight" in said
    assert {file.name for file in (out / "lora").iterdir()} >= {"adapter_config.json", "adapter_model.safetensors"}
    assert (out / "int8/model.safetensors").stat().st_size < (out / "hf/model.safetensors").stat().st_size
