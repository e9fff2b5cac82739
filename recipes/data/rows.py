"""A `Row`, what is left out and why, and the check whether a row can be trained on."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
from jinja2 import TemplateError

from ...bridge.hf.processing_gpt_oss_vision import IMAGE_TAG, GPTOSSVisionProcessor
from ...bridge.hf.tokenization_gpt_oss_vision import CHAT_TEMPLATE
from .pictures import Picture, UnusableRow

NAMED_AT_MOST = 5
BEFORE = {
    "system": "<|message|>",
    "developer": "<|message|># Instructions\n\n",
    "user": "<|message|>",
    "assistant": "<|channel|>final<|message|>",
}
"""What the chat template writes between a role and a content."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One sample before it becomes tensors: `messages`, or `text`, or `tokens`.

    Attributes:
        messages: a chat; contents are lists of parts, and {"type": "image"} is the place of an image.
        text: learned whole; if it is in harmony, the turns of the assistant are.
        tokens: as they are, `[s]`; learned whole.
        images: in the order of their places.
        tools: definitions, for the chat template.
        shape: name of the format that it was read from.
        left_out: keys of the record that are not read.
    """

    messages: list[dict[str, Any]] | None = None
    text: str | None = None
    tokens: np.ndarray | None = None
    images: tuple[Picture, ...] = ()
    tools: list[Any] | None = None
    shape: str = ""
    left_out: tuple[str, ...] = ()

    def chat(self) -> list[dict[str, Any]]:
        """The messages with their images, as `apply_chat_template` opens them.

        Raises:
            OSError: an image that is no file of its own cannot be read.
        """
        assert self.messages is not None
        images = iter(self.images)
        return [
            message | {"content": [_opened(part, images) for part in message["content"]]} for message in self.messages
        ]

    def question(self) -> "Row":
        """The chat without the assistant's messages at its end; the row may have none left."""
        messages = list(self.messages or ())
        while messages and messages[-1]["role"] == "assistant":
            messages.pop()
        places = sum(part["type"] == "image" for message in messages for part in message["content"])
        return replace(self, messages=messages, images=self.images[:places])


class Skipped(NamedTuple):
    """One row that is left out.

    Attributes:
        row: its number in the source, from 0.
        file: that holds it.
        line: its line in the file, from 1, or its key in an archive.
        reason: why.
    """

    row: int
    file: str
    line: int | str
    reason: str

    @property
    def place(self) -> str:
        """Its line or its key."""
        return f"line {self.line}" if isinstance(self.line, int) else str(self.line)


def _opened(part: dict[str, Any], images: Any) -> dict[str, Any]:
    if part["type"] != "image":
        return part
    source = next(images).source()
    return {"type": "image", "path" if isinstance(source, str) else "image": source}


def render(row: Row, processor: GPTOSSVisionProcessor) -> str:
    """The text of a row, with the mark of the processor for each image.

    Raises:
        UnusableRow: the chat template refuses it.
    """
    if row.text is not None:
        return row.text
    assert row.messages is not None
    if row.tools is None and processor.chat_template == CHAT_TEMPLATE and all(map(_is_plain, row.messages)):
        return _render_plain(row.messages)
    try:
        return processor.apply_chat_template(row.messages, tools=row.tools, tokenize=False)
    except (TemplateError, TypeError) as error:
        raise UnusableRow(f"the chat template refuses it: {error}") from error


def _is_plain(message: dict[str, Any]) -> bool:
    return message["role"] in BEFORE and message.keys() == {"role", "content"}


def _render_plain(messages: Sequence[dict[str, Any]]) -> str:
    """What the chat template makes of messages without thoughts, names and calls, in a fiftieth of its time."""
    text = ""
    for number, message in enumerate(messages):
        content = "".join(IMAGE_TAG if part["type"] == "image" else part["text"] for part in message["content"])
        is_answer = message["role"] == "assistant" and number == len(messages) - 1
        start = f"<|start|>{message['role']}{BEFORE[message['role']]}"
        text += f"{start}{content}{'<|return|>' if is_answer else '<|end|>'}"
    return text


def check_text(row: Row, processor: GPTOSSVisionProcessor) -> str:
    """The text of a row, once it can be trained on.

    Raises:
        UnusableRow: nothing to learn, control tokens inside a message, a number of marks that is not that of the
            images, or a text that is not Unicode.
    """
    if row.messages is not None:
        refuse_control_tokens(row.messages, processor, row.tools)
    elif not (row.text or "").replace(IMAGE_TAG, "").replace(processor.image_token, "").strip():
        raise UnusableRow("an empty text")
    text = render(row, processor)
    try:
        text.encode()
    except UnicodeEncodeError as error:  # half a surrogate pair is JSON, but no text
        raise UnusableRow(str(error)) from error
    marks = text.count(IMAGE_TAG) + text.count(processor.image_token)
    if marks not in (0, len(row.images)):
        raise UnusableRow(f"the text has {marks} times {IMAGE_TAG}, with {len(row.images)} images")
    if row.text is not None and "<|start|>" in text:
        _, start, answer = text.rpartition("<|start|>assistant")
        if not start:
            raise UnusableRow("turns in harmony, and no assistant among them")
        if not answer.rpartition("<|message|>")[2].partition("<|")[0].strip():
            raise UnusableRow("turns in harmony, and the last of the assistant has no text")
    return text


def refuse_control_tokens(
    messages: Sequence[dict[str, Any]], processor: GPTOSSVisionProcessor, tools: Sequence[Any] | None = None
) -> None:
    """Refuse control tokens in messages and definitions of tools: they would be turns, channels or images nobody meant.

    Raises:
        UnusableRow: there is one.
    """
    # Parts are joined: a token may be in several.
    texts = ["".join(part.get("text", "\0") for part in message["content"]) for message in messages]
    texts += [json.dumps(tools, ensure_ascii=False)] if tools else []
    texts += [message[key] for message in messages for key in ("thinking", "name") if key in message]
    texts += [str(call["function"]) for message in messages for call in message.get("tool_calls", ())]
    for text in texts:
        # Control tokens all have a "<"; most texts have none, and there are a thousand control tokens.
        if "<" in text:
            special = (str(token) for token in processor.tokenizer.added_tokens_decoder.values() if token.special)
            for token in (IMAGE_TAG, *special):
                if token in text:
                    raise UnusableRow(f"a message's text, or a tool's, has the control token {token}")


def describe_skipped(path: object, skipped: Sequence[Skipped], rows: int) -> str:
    """How many of `rows` can't be used, and the first few by line and reason, in one sentence."""
    files = {row.file for row in skipped}

    def place(row: Skipped) -> str:
        return row.place if len(files) == 1 else f"{row.file}, {row.place}"

    named = "; ".join(f"{place(row)}: {row.reason}" for row in skipped[:NAMED_AT_MOST])
    more = f"; and {len(skipped) - NAMED_AT_MOST:,} more" if len(skipped) > NAMED_AT_MOST else ""
    return f"{path}: {len(skipped):,} of {rows:,} rows can't be used ({len(skipped) / rows:.1%}): {named}{more}."
