"""What `data show` shows of sources: a few rows, chosen from the numbers of all, as the model receives them."""

import base64
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from io import BytesIO
from itertools import chain, islice
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from transformers.convert_slow_tokenizer import bytes_to_unicode

from ...bridge.hf.processing_gpt_oss_vision import GPTOSSVisionProcessor
from .check import Check, check_source, open_rows
from .findings import Findings
from .lock import lock_of, read_lock
from .pictures import UNREADABLE
from .rows import Row, Skipped, check_text, render
from .samples import IGNORE_INDEX, Sample, encode_row
from .sources.base import Source
from .tokens import ALL, Learned

EXTREMES, SPREAD = 2, 6
"""The longest and the shortest rows that are shown; those that are spread evenly over the source."""
COMPARED = 1000
"""Rows spread over a source, and the strangest by numbers, of which the characters are compared."""
FIRST_TOKENS, LAST_TOKENS = 2000, 300
"""Tokens of a sample that are shown at most, from its start and its end; an image counts as one."""
BYTE_OF = {character: byte for byte, character in bytes_to_unicode().items()}
"""The byte that a character of a token stands for, in a byte-level BPE."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Span:
    """A token; or several that make one character, or an image; or those that are not shown.

    Attributes:
        text: that they stand for; of an image or a gap none.
        ids: of the tokens.
        position: of the first.
        kind: whether they are learned, or what they are.
        is_control: whether it is a control token.
        turn: number of the message of the sample that they are in.
        image: number of the image, from 1.
    """

    text: str
    ids: Sequence[int]
    position: int
    kind: Literal["learned", "given", "visual", "gap"]
    is_control: bool = False
    turn: int = 0
    image: int = 0


@dataclass(frozen=True, slots=True)
class ShownImage:
    """An image as the tower receives it, and what it was."""

    name: str
    width: int
    height: int
    mode: str
    tower: Image.Image

    @property
    def url(self) -> str:
        """Its pixels, as a `data:` address."""
        file = BytesIO()
        self.tower.save(file, "PNG")
        return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Shown:
    """One row.

    Attributes:
        place: its line or its key.
        file: that holds it.
        reason: why it was chosen.
        shape: name of its format.
        tokens: their number.
        learned: how many of them are learned.
        images: in their order.
        turns: names of its messages, such as ``assistant, final``; one without name in a plain text.
        spans: its tokens.
        left_out: of the row, and why.
        problem: why it cannot be shown.
    """

    place: str
    file: str
    reason: str
    shape: str = ""
    tokens: int = 0
    learned: int = 0
    images: Sequence[ShownImage] = ()
    turns: Sequence[str] = ("",)
    spans: Sequence[Span] = ()
    left_out: Sequence[str] = ()
    problem: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class ShownSource:
    """What was found in a source, and the rows that are shown, by heading."""

    check: Check
    samples: dict[str, list[Shown]]


@dataclass(frozen=True, slots=True)
class Choice:
    """Number of a row that is shown, and why."""

    row: int
    reason: str


def show_files(
    paths: Sequence[str],
    processor: GPTOSSVisionProcessor,
    seq_length: int,
    *,
    rows_per_step: int | None = None,
    image_folder: Path | None = None,
    allowed_hosts: frozenset[str] = frozenset(),
    learned_parts: Learned = ALL,
    strangest: int = 20,
) -> Iterator[ShownSource]:
    """Read the locks of sources, or check their rows, and encode a few.

    Args:
        paths: as of `open_source`.
        processor: of the model.
        seq_length: longest row in tokens.
        rows_per_step: of a recipe.
        image_folder: as of `open_source`.
        allowed_hosts: as of `open_source`.
        learned_parts: of chats.
        strangest: how many of the strangest rows are shown.

    Raises:
        UserError: a source is not of a kind that is read, has no rows, or has changed since it was checked.
        OSError: a source cannot be read.
    """
    console = Console(stderr=True, highlight=False)
    for path in paths:
        source = open_rows(path, image_folder, allowed_hosts, seq_length)
        found = read_lock(lock_of(path), source, processor, decode_images=False, learned_parts=learned_parts)
        if found is None:
            found = check_source(source, processor, learned_parts=learned_parts, console=console)
        check = Check.of(source, found, seq_length, rows_per_step)
        chosen = choose(check.found, source, processor, strangest)
        yield ShownSource(
            check=check,
            samples={
                heading: [show_row(source, choice, processor, learned_parts) for choice in choices]
                for heading, choices in chosen.items()
            },
        )


# --- which rows


def choose(
    found: Findings, source: Source, processor: GPTOSSVisionProcessor, strangest: int
) -> dict[str, list[Choice]]:
    """Rows by heading, each under the first heading that it fits. Of rows that are repeated, the first."""
    usable = found.usable[np.sort(np.unique(found.hashes[found.usable], return_index=True)[1])]
    by_length = usable[np.argsort(found.lengths[usable], kind="stable")]
    longest, shortest = by_length[::-1][:EXTREMES], by_length[:EXTREMES]
    headings = {
        "Longest": (EXTREMES, [Choice(int(row), "one of the longest") for row in longest]),
        "Shortest": (EXTREMES, [Choice(int(row), "one of the shortest") for row in shortest]),
        "Strangest": (strangest, _strangest(found, usable, source, processor) if len(usable) else []),
        "Spread evenly": (SPREAD, [Choice(int(row), "spread evenly") for row in _spread(usable, SPREAD)]),
    }
    chosen, taken = {}, set()
    for heading, (most, choices) in headings.items():
        new = (choice for choice in choices if choice.row not in taken)
        chosen[heading] = [*islice(new, most)]
        taken |= {choice.row for choice in chosen[heading]}
    return {heading: choices for heading, choices in chosen.items() if choices}


def _strangest(
    found: Findings, usable: np.ndarray, source: Source, processor: GPTOSSVisionProcessor
) -> Iterator[Choice]:
    """Rows by the largest of their distances from the median; those at the median in everything are left out."""
    numbers = {
        "tokens": found.lengths[usable].astype(float),
        "images": found.images[usable].astype(float),
        "learned share": found.learned[usable] / found.lengths[usable],
    }
    far = {name: distances(np.log(each) if name == "tokens" else each) for name, each in numbers.items()}
    worst = np.maximum.reduce([*far.values()])
    spread = _spread(np.arange(len(usable)), COMPARED)
    compared = np.union1d(spread, np.argsort(-worst, kind="stable")[:COMPARED])
    texts = [_text(source, int(usable[at]), processor) for at in compared]
    shares = shares_of_rare_characters(texts, np.isin(compared, spread))
    numbers = {name: each[compared] for name, each in numbers.items()} | {"rare characters": shares}
    far = {name: each[compared] for name, each in far.items()}
    far["rare characters"] = distances(shares, shares[np.isin(compared, spread)])
    names, values = list(far), np.stack([*far.values()])
    for at in np.argsort(-values.max(0), kind="stable"):
        name, distance = names[values[:, at].argmax()], values[:, at].max()
        if distance > 0:
            value, median = (_said(name, each) for each in (numbers[name][at], np.median(numbers[name])))
            reason = f"{name}: {value}, where the median is {median} ({distance:.1f} deviations)"
            yield Choice(int(usable[compared[at]]), reason)


def _said(name: str, value: float) -> str:
    return f"{value:,.0f}" if name in ("tokens", "images") else f"{value:.1%}"


def distances(values: np.ndarray, usual: np.ndarray | None = None) -> np.ndarray:
    """Distances from the median in robust standard deviations: 1.48 times the median absolute deviation.

    Where more than half of the values are the same, 1.25 times the mean absolute deviation takes its place.

    Args:
        values: ``[rows]``.
        usual: values that median and deviation are of; None for `values`.
    """
    usual = values if usual is None else usual
    apart = np.abs(usual - np.median(usual))
    scale = 1.4826 * np.median(apart) or 1.2533 * apart.mean()
    return np.abs(values - np.median(usual)) / scale if scale else (values != np.median(usual)) * 1.0


def shares_of_rare_characters(texts: Sequence[str], is_usual: np.ndarray) -> np.ndarray:
    """The share of each text's characters that fewer than 1 % of the usual texts have, or fewer than two."""
    usual = [set(text) for text, counts in zip(texts, is_usual, strict=True) if counts]
    texts_with, least = Counter(chain.from_iterable(usual)), max(2.0, 0.01 * len(usual))
    known = {character for character, count in texts_with.items() if count >= least}
    return np.array([sum(character not in known for character in text) / max(len(text), 1) for text in texts])


def _spread(places: np.ndarray, count: int) -> np.ndarray:
    return places[np.unique(np.linspace(0, len(places) - 1, min(count, len(places))).round().astype(int))]


def _text(source: Source, number: int, processor: GPTOSSVisionProcessor) -> str:
    row = source.row(number)
    return "" if row.tokens is not None else render(row, processor)


# --- one row


def show_row(source: Source, choice: Choice, processor: GPTOSSVisionProcessor, learned_parts: Learned = ALL) -> Shown:
    """Encode a row as training does, and name the parts of its sample."""
    file, line = source.place(choice.row)
    shown = Shown(place=Skipped(choice.row, file, line, "").place, file=file, reason=choice.reason)
    try:
        row = source.row(choice.row)
        if row.tokens is None:
            check_text(row, processor)
        facts = [picture.check(processor, decode=True) for picture in row.images]
        sample = encode_row(row, processor, learned_parts)
    except UNREADABLE as error:
        return replace(shown, problem=str(error))
    turns, spans = spans_of(sample, processor)
    pixels = () if sample["pixel_values"] is None else sample["pixel_values"]
    return replace(
        shown,
        shape=row.shape,
        tokens=len(sample["input_ids"]),
        learned=int((sample["labels"] != IGNORE_INDEX).sum()),
        images=[
            ShownImage(picture.name, *fact, image_of(each, processor))
            for picture, fact, each in zip(row.images, facts, pixels, strict=True)
        ],
        turns=turns,
        spans=spans,
        left_out=[*left_out(row, processor)],
    )


def image_of(pixels: torch.Tensor, processor: GPTOSSVisionProcessor) -> Image.Image:
    """The picture of processed pixels, ``[c, h, w]``: normalisation and rescaling undone."""
    made_by, values = processor.image_processor, pixels.double().numpy()
    if made_by.do_normalize:
        mean, std = (
            np.broadcast_to(np.asarray(each, dtype=float), len(values))[:, None, None]
            for each in (made_by.image_mean, made_by.image_std)
        )
        values = values * std + mean
    if made_by.do_rescale:
        values = values / made_by.rescale_factor
    array = values.round().clip(0, 255).astype(np.uint8)
    return Image.fromarray(array[0] if len(array) == 1 else np.ascontiguousarray(array.transpose(1, 2, 0)))


def left_out(row: Row, processor: GPTOSSVisionProcessor) -> Iterator[str]:
    """The keys that are not read, and what the chat template does not write."""
    if row.left_out:
        yield f"keys that are not read: {', '.join(f'{key:.80}' for key in row.left_out)}"
    if row.messages is None:
        return
    whole = render(row, processor)
    for number, message in enumerate(row.messages):
        for key in ("thinking", "name"):
            if message.get(key):
                others = {name: value for name, value in message.items() if name != key}
                messages = [*row.messages[:number], others, *row.messages[number + 1 :]]
                if render(replace(row, messages=messages), processor) == whole:
                    why = "; of turns before the last, answers stay and thoughts do not" if key == "thinking" else ""
                    yield f"{key} of message {number + 1}: the chat template does not write it{why}"


# --- tokens


def spans_of(sample: Sample, processor: GPTOSSVisionProcessor) -> tuple[list[str], list[Span]]:
    """The names of the messages of a sample, and its first and last tokens with a gap between them if there are many.

    A token is learned where the label of the position before it is not `IGNORE_INDEX`. Tokens that hold parts of one
    character are joined if they are alike; other parts of characters are shown as bytes (`\\xd9`).
    """
    tokens = _Tokens(sample, processor)
    ids, place, spans = tokens.ids, 0, []
    first, last = tokens.gap()
    while place < len(ids):
        if first <= place < last:
            spans.append(Span(text="", ids=ids[place:last], position=place, kind="gap", turn=int(tokens.turns[last])))
        else:
            spans.append(tokens.span(place))
        place += len(spans[-1].ids)
    return tokens.names(), spans


class _Tokens:
    """The tokens of a sample.

    Attributes:
        ids: of the tokens.
        turns: number of the message of each token, ``[s]``.
    """

    def __init__(self, sample: Sample, processor: GPTOSSVisionProcessor) -> None:
        array = sample["input_ids"].numpy()
        tokenizer, distinct = processor.tokenizer, np.unique(array).tolist()
        self.ids: list[int] = array.tolist()
        self._is_learned = [False, *(sample["labels"] != IGNORE_INDEX).tolist()[:-1]]
        self._added = tokenizer.added_tokens_decoder
        self._texts = dict(zip(distinct, tokenizer.convert_ids_to_tokens(distinct), strict=True))
        self._image_size = processor.num_image_tokens
        start, self._channel = tokenizer.convert_tokens_to_ids(["<|start|>", "<|channel|>"])
        self._starts = array == start
        self._controls = np.flatnonzero(np.isin(array, [*self._added]))
        self.turns = np.cumsum(self._starts) - self._starts[:1].sum()
        is_visual = (array == processor.image_token_id) & (sample["pixel_values"] is not None)
        self._visual_before = np.cumsum(is_visual) - is_visual
        self._is_visual = is_visual

    def gap(self) -> tuple[int, int]:
        """The tokens that are not shown, from and to; an image counts as one token."""
        units = np.flatnonzero(~self._is_visual | (self._visual_before % self._image_size == 0))
        if len(units) <= FIRST_TOKENS + LAST_TOKENS:
            return len(self.ids), len(self.ids)
        return int(units[FIRST_TOKENS]), int(units[-LAST_TOKENS])

    def names(self) -> list[str]:
        """The role of each message, and its channel."""
        names = [] if self._starts[0] else [""]
        for start in np.flatnonzero(self._starts):
            role, end = self._until_control(start + 1)
            has_channel = end < len(self.ids) and self.ids[end] == self._channel
            names.append(f"{role}, {self._until_control(end + 1)[0]}" if has_channel else role)
        return names

    def _until_control(self, place: int) -> tuple[str, int]:
        following = np.searchsorted(self._controls, place)
        end = int(self._controls[following]) if following < len(self._controls) else len(self.ids)
        content = b"".join(_bytes(self._texts[number]) for number in self.ids[place:end])
        return content.decode(errors="replace").strip(), end

    def span(self, place: int) -> Span:
        """The span that begins at a place."""
        end, number, text, is_control, image = place + 1, self.ids[place], "", False, 0
        kind = "learned" if self._is_learned[place] else "given"
        if self._is_visual[place]:
            end, kind, image = place + self._image_size, "visual", self._visual_before[place] // self._image_size + 1
        elif number in self._added:
            text, is_control = str(self._added[number]), True
        elif self._texts[number] is None:
            text, is_control = f"<no token {number}>", True
        else:
            end, text = self._characters(place)
        return Span(
            text=text,
            ids=self.ids[place:end],
            position=place,
            kind=kind,
            is_control=is_control,
            turn=int(self.turns[place]),
            image=int(image),
        )

    def _characters(self, place: int) -> tuple[int, str]:
        """The end and the text of the fewest tokens that are whole characters; of one token, if none are."""
        content = b""
        for end in range(place, min(place + 4, len(self.ids))):
            text = self._texts[self.ids[end]]
            if self.ids[end] in self._added or text is None or self._is_learned[end] != self._is_learned[place]:
                break
            content += _bytes(text)
            try:
                return end + 1, content.decode()
            except UnicodeDecodeError as error:
                if error.reason != "unexpected end of data":
                    break
        return place + 1, _bytes(self._texts[self.ids[place]]).decode(errors="backslashreplace")


def _bytes(token: str | None) -> bytes:
    """The bytes that a token stands for; none for a number without token."""
    return b"".join(bytes([BYTE_OF[each]]) if each in BYTE_OF else each.encode() for each in token or "")
