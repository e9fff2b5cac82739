"""One line of a JSONL file to a `Row`, and every reason to refuse it.

Three kinds of row; images are relative to the file's folder, or absolute:

    {"messages": [{"role": "user", "content": [{"type": "image", "path": "cat.jpg"}, {"type": "text", "text": "Who?"}]},
                  {"role": "assistant", "content": [{"type": "text", "text": "A cat."}]}]}
    {"text": "A cat on a mat.", "image": "cat.jpg"}
    {"text": "Cats sleep most of the day."}

A key whose value is null counts as absent. Other keys are ignored, except those that look like an image, a video or
audio: a model would be trained to describe images that it did not get.
"""

import json
import struct
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from ...bridge.hf.processing_gpt_oss_vision import IMAGE_TAG, GPTOSSVisionProcessor
from ...errors import UserError

ROLES = ("system", "developer", "user", "assistant", "tool")
# Calls of tools, which the chat template can render too, have no rows yet. The template ignores any other key.
MESSAGE_KEYS = {"role", "content", "thinking", "name"}
MEDIA = ("image", "img", "picture", "photo", "pixel", "media", "video", "audio")
"""How the names of keys begin that look like media."""
# What Pillow raises for a file that is missing, cut off, too large or no image: it has no base class for them.
UNREADABLE = (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error, Image.DecompressionBombError)
NAMED_AT_MOST = 5


class UnusableRow(UserError):
    """Why one row can't be used, without its file and line."""


class Skipped(NamedTuple):
    """One row that is left out: its line, counted from 1, and why."""

    line: int
    reason: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """`messages` or `text`, and the images as absolute paths, in the order of their tokens."""

    messages: list[dict[str, Any]] | None = None
    text: str | None = None
    images: tuple[Path, ...] = ()


def numbered_lines(path: Path) -> Iterator[tuple[int, int, bytes]]:
    """Number from 1, byte offset and content of every line that is not blank."""
    offset = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield number, offset, line
            offset += len(line)


def parse_row(line: bytes | str, folder: Path, *, for_training: bool = True) -> Row:
    """Parse one line. It is not checked whether its images exist.

    Args:
        line: JSON.
        folder: of the file, which relative paths start from.
        for_training: whether a chat needs an answer.

    Raises:
        UnusableRow: malformed JSON, an unknown shape, media that is not read, or an image path that leaves `folder`.
    """
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UnusableRow(f"malformed JSON ({error})") from error
    if not isinstance(record, dict):
        raise UnusableRow('neither an object with "messages" nor one with "text"')
    record = {key: value for key, value in record.items() if value is not None}
    _refuse_unread_media(record)
    match record:
        case {"messages": messages}:
            return _parse_messages(messages, folder, for_training)
        case {"text": str(text), "image": str(name)}:
            return Row(text=text, images=(resolve_image(name, folder),))
        case {"text": str(), "image": image}:
            raise UnusableRow(f'"image" is not a path but {image!r:.40}')
        case {"text": str(text)}:
            return Row(text=text)
    raise UnusableRow('neither an object with "messages" nor one with "text"')


def _refuse_unread_media(record: dict[str, Any]) -> None:
    """Refuse keys that look like media, except the "image" of a text and empty lists."""
    read = {"image"} if "messages" not in record else set()
    unread = [key for key, value in record.items() if key.lower().startswith(MEDIA) and key not in read and value != []]
    if unread:
        where = 'parts of "messages"' if "messages" in record else 'one path, "image"'
        raise UnusableRow(f"{', '.join(map(json.dumps, unread))} is not read; images are given as {where}")


def resolve_image(name: str, folder: Path) -> Path:
    """The absolute path of an image. A relative one must stay inside `folder`, with `..` and symbolic links followed.

    Raises:
        UnusableRow: it leaves the folder. A file elsewhere can be named by its absolute path.
    """
    if Path(name).is_absolute():
        return Path(name)
    try:
        folder = folder.resolve()
        path = (folder / name).resolve()
    except (OSError, ValueError, RuntimeError) as error:
        raise UnusableRow(f"image {name!r:.80} is no path ({error})") from error
    if not path.is_relative_to(folder):
        raise UnusableRow(f"image {name} leaves the data folder; a file elsewhere needs its absolute path")
    return path


def _parse_messages(messages: Any, folder: Path, for_training: bool) -> Row:
    if not isinstance(messages, list) or not messages or not all(isinstance(message, dict) for message in messages):
        raise UnusableRow('"messages" is not a list of objects')
    parsed = [_parse_message(message, folder) for message in messages]
    answers = [message["content"] for message in parsed if message["role"] == "assistant"]
    if for_training and not (answers and all(any(part.get("text") for part in content) for content in answers)):
        raise UnusableRow("an assistant message without text" if answers else "no assistant message to learn")
    images = [Path(part["path"]) for message in parsed for part in message["content"] if part["type"] == "image"]
    return Row(messages=parsed, images=tuple(images))


def _parse_message(message: dict[str, Any], folder: Path) -> dict[str, Any]:
    message = {key: value for key, value in message.items() if value is not None}
    if message.get("role") not in ROLES:
        raise UnusableRow(f"unknown role {message.get('role')!r:.40}")
    if unknown := message.keys() - MESSAGE_KEYS:
        known = ", ".join(sorted(MESSAGE_KEYS))
        raise UnusableRow(f"a message has {', '.join(sorted(unknown))}, and only {known} are read")
    if message["role"] == "tool" and "name" not in message:
        raise UnusableRow('a tool message without "name"')
    if not all(isinstance(message.get(key, ""), str) for key in ("thinking", "name")):
        raise UnusableRow('"thinking" and "name" must be texts')
    content = message.get("content")
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    if not isinstance(parts, list):
        raise UnusableRow('"content" is neither a text nor a list of parts')
    return {**message, "content": [_parse_part(part, folder) for part in parts]}


def _parse_part(part: Any, folder: Path) -> dict[str, str]:
    match part:
        case {"type": "text", "text": str(text)}:
            return {"type": "text", "text": text}
        case {"type": "image", "path": str(name)}:
            return {"type": "image", "path": str(resolve_image(name, folder))}
    raise UnusableRow(f'neither a text part with "text" nor an image part with "path": {part!r:.80}')


def render(row: Row, processor: GPTOSSVisionProcessor) -> str:
    """The text of a row, with the mark of the processor for each image."""
    return row.text if row.text is not None else processor.apply_chat_template(row.messages, tokenize=False)


def check_row(row: Row, processor: GPTOSSVisionProcessor, seq_length: int, decode_images: bool) -> None:
    """Refuse what can't be trained on.

    Raises:
        UnusableRow: nothing to learn, control tokens inside a message, more than `seq_length` tokens, a number of marks
            that is not that of the images, or an image that is missing or broken (`check_image`).
    """
    if row.messages is not None:
        refuse_control_tokens(row.messages, processor)
    elif not (text := row.text or "").strip():
        raise UnusableRow("an empty text")
    elif "<|start|>" in text and "<|start|>assistant" not in text:
        raise UnusableRow("turns in harmony, and no assistant among them")
    _refuse_too_long(render(row, processor), len(row.images), processor, seq_length)
    for path in row.images:
        check_image(path, processor, decode_images)


def refuse_control_tokens(messages: list[dict[str, Any]], processor: GPTOSSVisionProcessor) -> None:
    """Refuse control tokens inside messages: they would become turns, channels or images that nobody meant."""
    texts = [part["text"] for message in messages for part in message["content"] if part["type"] == "text"]
    texts += [message[key] for message in messages for key in ("thinking", "name") if key in message]
    for text in texts:
        # Control tokens all have a "<"; most texts have none, and there are a thousand control tokens.
        if "<" in text:
            special = (str(token) for token in processor.tokenizer.added_tokens_decoder.values() if token.special)
            for token in (IMAGE_TAG, *special):
                if token in text:
                    raise UnusableRow(f"a message's text has the control token {token}")


def check_image(path: Path, processor: GPTOSSVisionProcessor, decode: bool) -> None:
    """Refuse an image that can't be used. Its header is read, or with `decode` all of it.

    Raises:
        UnusableRow: it is missing or broken.
    """
    try:
        with Image.open(path) as image:
            # The processor's own steps: it refuses more than PIL, such as floats without a range.
            processor.image_processor(image) if decode else image.verify()
    except FileNotFoundError as error:
        raise UnusableRow(f"image {path} is missing") from error
    except UNREADABLE as error:
        raise UnusableRow(f"image {path} is broken ({error})") from error


def _refuse_too_long(text: str, num_images: int, processor: GPTOSSVisionProcessor, seq_length: int) -> None:
    marks = text.count(IMAGE_TAG) + text.count(processor.image_token)
    if marks not in (0, num_images):
        raise UnusableRow(f"the text has {marks} times {IMAGE_TAG}, with {num_images} images")
    image_tokens = num_images * processor.num_image_tokens
    # A byte-level token is a byte or more, so a text short enough in bytes needs no tokenizer.
    if len(text.encode()) + image_tokens <= seq_length:
        return
    one_each = processor.tokenizer(text.replace(IMAGE_TAG, processor.image_token))["input_ids"]
    tokens = len(one_each) - marks + image_tokens
    if tokens > seq_length:
        raise UnusableRow(f"{tokens} tokens, {image_tokens} of them of images, don't fit seq_length {seq_length}")


def describe_skipped(path: str | Path, skipped: Sequence[Skipped], rows: int) -> str:
    """How many of `rows` can't be used, and the first few by line and reason, in one sentence."""
    named = "; ".join(f"line {row.line}: {row.reason}" for row in skipped[:NAMED_AT_MOST])
    more = f"; and {len(skipped) - NAMED_AT_MOST:,} more" if len(skipped) > NAMED_AT_MOST else ""
    return f"{path}: {len(skipped):,} of {rows:,} rows can't be used ({len(skipped) / rows:.1%}): {named}{more}."
