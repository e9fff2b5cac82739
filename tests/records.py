"""The same conversations as records of every format in use."""

import base64
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from gpt_oss_vision.bridge.hf.processing_gpt_oss_vision import GPTOSSVisionProcessor
from gpt_oss_vision.recipes.data.samples import encode_row
from gpt_oss_vision.recipes.data.sources.opening import open_source


@dataclass(frozen=True)
class Conversation:
    """Images, names of files without `.png`, which stand in front of the first question; questions and answers."""

    images: tuple[str, ...]
    turns: tuple[tuple[str, str], ...]

    def messages(self, role: str, content: str, names: tuple[str, str], first: Callable[[str], Any]) -> list[Any]:
        """Messages with these keys and names of roles; `first` makes the content of the first."""
        made = []
        for question, answer in self.turns:
            made += [
                {role: names[0], content: question if made else first(question)},
                {role: names[1], content: answer},
            ]
        return made

    def marked(self, question: str) -> str:
        """The question, with a mark for each image."""
        return "<image>" * len(self.images) + question

    def parts(self, question: str, part: Callable[[str], dict[str, Any]]) -> Any:
        """The question as a list of parts, with one for each image."""
        return [*map(part, self.images), {"type": "text", "text": question}] if self.images else question


CONVERSATIONS = (
    Conversation(("red", "blue"), (("What is it?", "a cat"),)),
    Conversation((), (("Hi", "one"),)),
    Conversation(("blue",), (("one?", "two"), ("three?", "four"))),
)
CHAT = ("role", "content", ("user", "assistant"))
SHAREGPT = ("from", "value", ("human", "gpt"))


def png(folder: Path, name: str) -> bytes:
    return (folder / f"{name}.png").read_bytes()


def encoded(folder: Path, name: str) -> str:
    return base64.b64encode(png(folder, name)).decode()


def ours(one: Conversation, folder: Path) -> dict[str, Any]:
    return in_parts(one, lambda name: {"type": "image", "path": f"{name}.png"})


def in_parts(one: Conversation, part: Callable[[str], dict[str, Any]]) -> dict[str, Any]:
    return {"messages": one.messages(*CHAT, lambda question: one.parts(question, part))}


def llava(one: Conversation, folder: Path) -> dict[str, Any]:
    """As in LLaVA's own files: one image is a string, several are a list, and without one the key is missing."""
    record = {"id": "7", "conversations": one.messages(*SHAREGPT, one.marked)}
    names = [f"{name}.png" for name in one.images]
    return record | ({"image": names[0] if len(names) == 1 else names} if names else {})


def sharegpt(one: Conversation, folder: Path) -> dict[str, Any]:
    return {
        "conversations": one.messages(*SHAREGPT, one.marked),
        "images": [f"{name}.png" for name in one.images],
    }


def llama_factory(one: Conversation, folder: Path) -> dict[str, Any]:
    return {"messages": one.messages(*CHAT, one.marked), "images": [f"{name}.png" for name in one.images]}


def openai_data(one: Conversation, folder: Path) -> dict[str, Any]:
    def part(name: str) -> dict[str, Any]:
        url = f"data:image/png;base64,{encoded(folder, name)}"
        return {"type": "image_url", "image_url": {"url": url, "detail": "high"}}

    return in_parts(one, part)


def openai_file(one: Conversation, folder: Path) -> dict[str, Any]:
    return in_parts(one, lambda name: {"type": "image_url", "image_url": {"url": f"file://{folder}/{name}.png"}})


def anthropic(one: Conversation, folder: Path) -> dict[str, Any]:
    def part(name: str) -> dict[str, Any]:
        return {
            "type": "image",
            "source": {"type": "base64", "media_type": "image/png", "data": encoded(folder, name)},
        }

    return in_parts(one, part)


def bare(one: Conversation, folder: Path) -> dict[str, Any]:
    return in_parts(one, lambda _: {"type": "image"}) | {"images": [f"{name}.png" for name in one.images]}


def cauldron(one: Conversation, folder: Path) -> dict[str, Any]:
    texts = [{"user": question, "assistant": answer, "source": "vqa"} for question, answer in one.turns]
    return {"images": [f"{name}.png" for name in one.images], "texts": texts}


def windows(one: Conversation, folder: Path) -> dict[str, Any]:
    return in_parts(one, lambda name: {"type": "image", "path": f"deep\\{name}.png"})


RECORDS = (*(ours, llava, sharegpt, llama_factory, openai_data, openai_file, anthropic, bare, cauldron, windows),)


def records(shape: Callable[[Conversation, Path], dict[str, Any]], folder: Path) -> list[dict[str, Any]]:
    return [shape(one, folder) for one in CONVERSATIONS]


def write_lines(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def samples_of(path: Path | str, processor: GPTOSSVisionProcessor, **options: Any) -> list[Any]:
    """All rows of a source as samples; the options are those of `open_source`."""
    source = open_source(path, **options)
    return [encode_row(source.row(index), processor) for index in range(len(source))]


def assert_same(found: list[Any], expected: list[Any]) -> None:
    """Compare tokens, labels and pixels of samples."""
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert one["input_ids"].tolist() == other["input_ids"].tolist()
        assert one["labels"].tolist() == other["labels"].tolist()
        assert (one["pixel_values"] is None) == (other["pixel_values"] is None)
        assert one["pixel_values"] is None or torch.equal(one["pixel_values"], other["pixel_values"])
