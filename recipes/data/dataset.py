"""Chat data for fine-tuning: rows of a JSONL file, through the processor, to padded batches.

Three kinds of row, one a line; images are relative to the file's folder, or absolute:

    {"messages": [{"role": "user", "content": [{"type": "image", "path": "cat.jpg"}, {"type": "text", "text": "Who?"}]},
                  {"role": "assistant", "content": [{"type": "text", "text": "A cat."}]}]}
    {"text": "A cat on a mat.", "image": "cat.jpg"}
    {"text": "Cats sleep most of the day."}

In a chat the assistant's text is learned; a plain text is learned whole. Nothing here knows Megatron, whose training
loop gets this from `megatron_data.py`. Shapes: b rows, s tokens, n images of c channels, h × w pixels.
"""

import json
import struct
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypedDict

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset

from ...bridge.hf.processing_gpt_oss_vision import IMAGE_MARK, GPTOSSVisionProcessor
from ...errors import UserError

IGNORE_INDEX = -100
ROLES = ("system", "developer", "user", "assistant", "tool")
# What can be learned. Calls of tools, which the chat template knows too, have no rows yet; any other key it would drop
# without a word.
MESSAGE_KEYS = {"role", "content", "thinking", "name"}
# What Pillow raises for a file that is missing, cut off, too large or no image: it has no base class for them.
UNREADABLE = (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error, Image.DecompressionBombError)
NAMED_AT_MOST = 5


class UnusableRow(ValueError):
    """Why one row can't be trained on, without its file and line."""


class Skipped(NamedTuple):
    """One row that is left out: its line, counted from 1, and why."""

    line: int
    reason: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """What one line says: `messages` or `text`, and its images as absolute paths, in the order of their tokens."""

    messages: list[dict[str, Any]] | None = None
    text: str | None = None
    images: tuple[Path, ...] = ()


class Sample(TypedDict):
    """One row as tensors, not padded."""

    input_ids: torch.Tensor  # [s]
    labels: torch.Tensor  # [s], shifted: labels[t] is the token to predict at t, or IGNORE_INDEX
    loss_mask: torch.Tensor  # [s], 1.0 where there is a label
    position_ids: torch.Tensor  # [s]
    pixel_values: torch.Tensor | None  # [n, c, h, w]


class Batch(TypedDict):
    """A micro-batch of fixed length."""

    tokens: torch.Tensor  # [b, s]
    labels: torch.Tensor  # [b, s]
    loss_mask: torch.Tensor  # [b, s]
    position_ids: torch.Tensor  # [b, s]
    attention_mask: None
    pixel_values: torch.Tensor | None  # [n of all rows, c, h, w]; None when no row has an image


class ChatDataset(Dataset[Sample]):
    """The usable rows of a JSONL file, in the file's order, as samples.

    Only the places of the rows are held in memory, 16 bytes each; a row is read and its images are decoded when it is
    asked for. Which rows are usable is settled when the dataset is made, never later, so that all ranks and all runs
    agree on what row i is: `skipped` is what the ranks found together, or None to check the file in this process.

    Raises:
        ValueError: more than `max_skipped` (a fraction) of the rows can't be used, or none can; it names the first few.
        RuntimeError: on access, when a row that had passed the check can't be read.
    """

    def __init__(
        self,
        path: str | Path,
        processor: GPTOSSVisionProcessor,
        seq_length: int,
        *,
        max_skipped: float = 0.01,
        skipped: Sequence[Skipped] | None = None,
    ) -> None:
        self.path = Path(path)
        self.processor = processor
        self.seq_length = seq_length
        self.skipped = tuple(find_unusable(path, processor, seq_length) if skipped is None else skipped)
        places = ((line, offset) for line, offset, _ in numbered_lines(self.path))
        self._places = np.fromiter(places, dtype=[("line", np.int64), ("offset", np.int64)])
        self._refuse_too_many(len(self._places), max_skipped)
        self._places = self._places[~np.isin(self._places["line"], [row.line for row in self.skipped])]

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: int) -> Sample:
        line, offset = self._places[index].tolist()
        try:
            # Opened each time: forked loader workers would share the position of an open file.
            with self.path.open("rb") as file:
                file.seek(offset)
                return encode_row(parse_row(file.readline(), self.path.parent), self.processor)
        except UNREADABLE as error:
            # Taking another row instead would be this rank's decision alone, and ranks that share a row would part.
            raise RuntimeError(
                f"{self.path}, line {line}, had passed the check and can't be used now ({error}). Of images the check "
                "reads the headers; with decode_images=True also the pixels."
            ) from error

    def _refuse_too_many(self, rows: int, max_skipped: float) -> None:
        if not rows:
            raise UserError(f"{self.path} has no rows.")
        if len(self.skipped) == rows or len(self.skipped) > max_skipped * rows:
            raise UserError(
                f"{describe_skipped(self.path, self.skipped, rows)} At most {max_skipped:.1%} may be skipped."
            )


class ShuffledEpochs(Dataset[Sample]):
    """A dataset repeated for `num_samples` and more, every epoch in another order, which `seed` and the epoch decide.

    What sample i is depends on i alone, not on the rank, the layout or what was asked before: a loader that walks on
    from the number of samples already consumed needs no state of its own. The length is in whole epochs, and always
    more than `num_samples`: Megatron's sampler refuses to start when nothing is left, as in a finished run resumed.
    """

    def __init__(self, dataset: ChatDataset, num_samples: int, seed: int) -> None:
        self.dataset = dataset
        self.seed = seed
        self._length = (num_samples // len(dataset) + 1) * len(dataset)
        self._order: tuple[int, np.ndarray] | None = None

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < self._length:
            raise IndexError(f"sample {index} of {self._length}")
        epoch, place = divmod(index, len(self.dataset))
        if self._order is None or self._order[0] != epoch:
            self._order = epoch, np.random.default_rng((self.seed, epoch)).permutation(len(self.dataset))
        return self.dataset[int(self._order[1][place])]


def parse_row(line: bytes | str, folder: Path, *, is_learned: bool = True) -> Row:
    """Read one line. Whether its images exist is not looked at here.

    Raises:
        UnusableRow: malformed JSON, an unknown shape, an image path that leaves `folder`, or, in a row that
            `is_learned`, a chat without an answer.
    """
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UnusableRow(f"malformed JSON ({error})") from error
    match record:
        case {"messages": messages}:
            return _parse_messages(messages, folder, is_learned)
        case {"text": str(text), "image": str(name)}:
            return Row(text=text, images=(resolve_image(name, folder),))
        case {"text": str(), "image": image}:
            raise UnusableRow(f"«image» is not a path but {image!r:.40}")
        case {"text": str(text)}:
            return Row(text=text)
    raise UnusableRow("neither an object with «messages» nor one with «text»")


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


def encode_row(row: Row, processor: GPTOSSVisionProcessor) -> Sample:
    """Tokens, shifted labels and pixels of one row."""
    images = [str(path) for path in row.images] or None
    inputs = processor(text=_render(row, processor), images=images, return_tensors="pt")
    input_ids = inputs["input_ids"][0]
    learned = learned_tokens(input_ids, processor)
    # The logits at t predict token t + 1, so the labels move one to the left; the last position predicts nothing.
    labels = torch.full_like(input_ids, IGNORE_INDEX)
    labels[:-1] = torch.where(learned[1:], input_ids[1:], IGNORE_INDEX)
    return Sample(
        input_ids=input_ids,
        labels=labels,
        loss_mask=(labels != IGNORE_INDEX).float(),
        position_ids=torch.arange(len(input_ids)),
        pixel_values=inputs.get("pixel_values"),
    )


def learned_tokens(input_ids: torch.Tensor, processor: GPTOSSVisionProcessor) -> torch.Tensor:
    """Which tokens, [s], the model is trained to write.

    In a chat: what it writes itself when it answers, from behind `<|start|>assistant` to the turn's `<|end|>`,
    `<|return|>` or `<|call|>`, so the channel header too; and `<|start|>assistant` between a thought and the answer,
    where generation doesn't stop. A text without turns is learned whole. Image placeholders are never learned.

    Found in the token ids and not in the rendered characters: the processor puts many placeholders for one image mark,
    which moves every character offset behind it, while control tokens can't be taken for anything else.
    """
    tokenizer = processor.tokenizer
    start, *ends = tokenizer.convert_tokens_to_ids(["<|start|>", "<|end|>", "<|return|>", "<|call|>"])
    assistant = tokenizer.encode("assistant", add_special_tokens=False)
    ids = input_ids.tolist()
    is_text = input_ids != processor.image_token_id
    if start not in ids:
        return is_text
    learned = torch.zeros(len(ids), dtype=torch.bool)
    for place, token in enumerate(ids):
        first = place + 1 + len(assistant)
        if token == start and ids[place + 1 : first] == assistant:
            last = next((i for i in range(first, len(ids)) if ids[i] in ends), len(ids) - 1)
            goes_on = place > 0 and bool(learned[place - 1])
            learned[place if goes_on else first : last + 1] = True
    return learned & is_text


def find_unusable(
    path: str | Path,
    processor: GPTOSSVisionProcessor,
    seq_length: int,
    *,
    decode_images: bool = False,
    shard: int = 0,
    shards: int = 1,
) -> list[Skipped]:
    """Check every row whose place in the file is `shard` modulo `shards`, and name those that can't be used.

    A row is usable when it parses, has something to learn, its images open, and it fits `seq_length` whole. Image
    headers are read (of PNG files the checksums too), and an image's tokens are counted without its pixels, so nothing
    is decoded unless `decode_images` asks for it: then a file that is cut off behind a good header is found as well.

    On one slow core a row takes 0.1 ms, with a small image 0.2 ms; a text that has more bytes than `seq_length` is
    tokenised, at 0.3 ms a kilobyte. So half a million short rows are a minute or two, and ranks share them.
    """
    path = Path(path)
    skipped = []
    for place, (line, _, content) in enumerate(numbered_lines(path)):
        if place % shards != shard:
            continue
        try:
            _check_row(parse_row(content, path.parent), processor, seq_length, decode_images)
        except (UnusableRow, UnicodeEncodeError) as error:  # half a surrogate pair is JSON, but no text
            skipped.append(Skipped(line, str(error)))
    return skipped


def describe_skipped(path: str | Path, skipped: Sequence[Skipped], rows: int) -> str:
    """A sentence: how many of `rows` can't be used, and the first few by line and reason."""
    named = "; ".join(f"line {row.line}: {row.reason}" for row in skipped[:NAMED_AT_MOST])
    more = f"; and {len(skipped) - NAMED_AT_MOST:,} more" if len(skipped) > NAMED_AT_MOST else ""
    return f"{path}: {len(skipped):,} of {rows:,} rows can't be used ({len(skipped) / rows:.1%}): {named}{more}."


def collate(samples: Sequence[Sample], seq_length: int, pad_token_id: int, dtype: torch.dtype = torch.float32) -> Batch:
    """Pad samples on the right to `seq_length` and join their images, in row order, to one `pixel_values` of `dtype`.

    The length is fixed because pipeline stages agree on shapes before the run. Attention is causal and padding stands
    last, so no attention mask is needed. When no row has an image, `pixel_values` is None: the model's «no images».

    Raises:
        ValueError: a sample is longer than `seq_length`. Nothing is ever cut: an image that loses tokens is no image.
    """
    longest = max(len(sample["input_ids"]) for sample in samples)
    if longest > seq_length:
        raise UserError(f"A sample of {longest} tokens doesn't fit a batch of {seq_length}, and rows are never cut.")
    images = [sample["pixel_values"] for sample in samples if sample["pixel_values"] is not None]

    def padded(rows: list[torch.Tensor], value: float) -> torch.Tensor:
        return torch.stack([torch.nn.functional.pad(row, (0, seq_length - len(row)), value=value) for row in rows])

    return Batch(
        tokens=padded([sample["input_ids"] for sample in samples], pad_token_id),
        labels=padded([sample["labels"] for sample in samples], IGNORE_INDEX),
        loss_mask=padded([sample["loss_mask"] for sample in samples], 0.0),
        position_ids=torch.arange(seq_length).repeat(len(samples), 1),
        attention_mask=None,
        pixel_values=torch.cat(images).to(dtype) if images else None,
    )


def collate_for_trainer(samples: Sequence[Sample], pad_token_id: int) -> dict[str, torch.Tensor]:
    """A batch for transformers' `Trainer`, as long as its longest sample: padded on the right, labels not shifted.

    The model shifts them itself. `pixel_values` is there when a row has an image.
    """
    length = max(len(sample["input_ids"]) for sample in samples)
    batch = collate(samples, length, pad_token_id)
    is_token = torch.arange(length) < torch.tensor([[len(sample["input_ids"])] for sample in samples])
    labels = torch.full_like(batch["labels"], IGNORE_INDEX)
    labels[:, 1:] = batch["labels"][:, :-1]
    inputs = {"input_ids": batch["tokens"], "attention_mask": is_token.long(), "labels": labels}
    return inputs if batch["pixel_values"] is None else inputs | {"pixel_values": batch["pixel_values"]}


def numbered_lines(path: Path) -> Iterator[tuple[int, int, bytes]]:
    """Number from 1, byte offset and content of every line that is not blank."""
    offset = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield number, offset, line
            offset += len(line)


def _parse_messages(messages: Any, folder: Path, is_learned: bool) -> Row:
    if not isinstance(messages, list) or not messages or not all(isinstance(message, dict) for message in messages):
        raise UnusableRow("«messages» is not a list of objects")
    parsed = [_parse_message(message, folder) for message in messages]
    answers = [message["content"] for message in parsed if message["role"] == "assistant"]
    if is_learned and not (answers and all(any(part.get("text") for part in content) for content in answers)):
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
        raise UnusableRow("a tool message without «name»")
    if not all(isinstance(message.get(key, ""), str) for key in ("thinking", "name")):
        raise UnusableRow("«thinking» and «name» must be texts")
    content = message.get("content")
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    if not isinstance(parts, list):
        raise UnusableRow("«content» is neither a text nor a list of parts")
    return {**message, "content": [_parse_part(part, folder) for part in parts]}


def _parse_part(part: Any, folder: Path) -> dict[str, str]:
    match part:
        case {"type": "text", "text": str(text)}:
            return {"type": "text", "text": text}
        case {"type": "image", "path": str(name)}:
            return {"type": "image", "path": str(resolve_image(name, folder))}
    raise UnusableRow(f"neither a text part with «text» nor an image part with «path»: {part!r:.80}")


def _render(row: Row, processor: GPTOSSVisionProcessor) -> str:
    return row.text if row.text is not None else processor.apply_chat_template(row.messages, tokenize=False)


def _check_row(row: Row, processor: GPTOSSVisionProcessor, seq_length: int, decode_images: bool) -> None:
    text = _render(row, processor)
    if row.messages is not None:
        refuse_control_tokens(row.messages, processor)
    elif not text.strip():
        raise UnusableRow("an empty text")
    elif "<|start|>" in text and "<|start|>assistant" not in text:
        raise UnusableRow("turns in harmony, and no assistant among them")
    _refuse_too_long(text, len(row.images), processor, seq_length)
    for path in row.images:
        check_image(path, processor, decode_images)


def refuse_control_tokens(messages: list[dict[str, Any]], processor: GPTOSSVisionProcessor) -> None:
    """A control token inside a message would be a turn, a channel or an image that nobody meant."""
    texts = [part["text"] for message in messages for part in message["content"] if part["type"] == "text"]
    texts += [message[key] for message in messages for key in ("thinking", "name") if key in message]
    for text in texts:
        # Control tokens all have a «<»; most texts have none, and there are a thousand names to look for.
        if "<" in text:
            special = (str(token) for token in processor.tokenizer.added_tokens_decoder.values() if token.special)
            for token in (IMAGE_MARK, *special):
                if token in text:
                    raise UnusableRow(f"a message's text has the control token {token}")


def check_image(path: Path, processor: GPTOSSVisionProcessor, decode: bool) -> None:
    """Whether an image can be used: its header is read, or, to `decode`, all of it.

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
    marks = text.count(IMAGE_MARK) + text.count(processor.image_token)
    if marks not in (0, num_images):
        raise UnusableRow(f"the text has {marks} times {IMAGE_MARK}, with {num_images} images")
    image_tokens = num_images * processor.num_image_tokens
    # A byte-level token is a byte or more, so a text short enough in bytes needs no tokenizer.
    if len(text.encode()) + image_tokens <= seq_length:
        return
    one_each = processor.tokenizer(text.replace(IMAGE_MARK, processor.image_token))["input_ids"]
    tokens = len(one_each) - marks + image_tokens
    if tokens > seq_length:
        raise UnusableRow(f"{tokens} tokens, {image_tokens} of them of images, don't fit seq_length {seq_length}")
