"""Texts of rows to token ids, and which of these are learned."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import chain
from typing import Any, Literal

import numpy as np

from ...bridge.hf.processing_gpt_oss_vision import IMAGE_TAG, GPTOSSVisionProcessor
from .rows import Row

Channels = Literal["all", "final", "final_and_thinking"]


@dataclass(frozen=True, slots=True)
class Learned:
    """Which parts of a chat are learned; texts without turns are learned whole.

    Attributes:
        turns: those of the assistant, or the last one: its messages behind the last message of someone else.
        channels: all (analysis, commentary with calls of tools, final), the final one, or final and analysis.
    """

    turns: Literal["all", "last"] = "all"
    channels: Channels = "all"


ALL = Learned()

START, CHANNEL, END = 1, 2, 3
"""What a control token is to a message."""


def short_ids(texts: Sequence[str], rows: Sequence[Row], processor: GPTOSSVisionProcessor) -> tuple[np.ndarray, ...]:
    """The tokens of rows with one placeholder for each image, joined, ``[s]``; and the tokens of each, ``[rows]``.

    The images of a text without marks are in front.
    """
    with without_threads():
        marked = [_marked(text, row, processor) for text, row in zip(texts, rows, strict=True)]
        ids = [encoding.ids for encoding in processor.tokenizer.backend_tokenizer.encode_batch_fast(marked)]
    lengths = np.array([len(each) for each in ids], dtype=np.int64)
    return np.fromiter(chain.from_iterable(ids), dtype=np.int64, count=int(lengths.sum())), lengths


def count_tokens(
    rows: Sequence[Row],
    texts: Sequence[str | None],
    processor: GPTOSSVisionProcessor,
    learned_parts: Learned = ALL,
) -> list[tuple[int, int]]:
    """The number of tokens of each row, and how many of them are learned. No image is opened.

    Args:
        rows: which `encode_row` would encode.
        texts: rendered; None for a row of tokens.
        processor: of the model.
        learned_parts: of chats.
    """
    counts = [(0, 0) if row.tokens is None else (len(row.tokens), len(row.tokens) - 1) for row in rows]
    with_text = [place for place, text in enumerate(texts) if text is not None]
    if not with_text:
        return counts
    ids, lengths = short_ids([texts[place] for place in with_text], [rows[place] for place in with_text], processor)
    mask = loss_mask_of(ids, processor, learned_parts, lengths)
    starts = np.cumsum(lengths) - lengths
    mask[starts] = False  # nothing predicts a first token
    for place, length, learned in zip(with_text, lengths, np.add.reduceat(mask, starts, dtype=np.int64), strict=True):
        counts[place] = int(length) + len(rows[place].images) * (processor.num_image_tokens - 1), int(learned)
    return counts


def loss_mask_of(
    input_ids: np.ndarray,
    processor: GPTOSSVisionProcessor,
    learned_parts: Learned = ALL,
    lengths: np.ndarray | None = None,
) -> np.ndarray:
    """Which tokens, [s], the model is trained to write, as booleans.

    In a chat: the tokens that it generates when it answers, from behind `<|start|>assistant` to the turn's `<|end|>`,
    `<|return|>` or `<|call|>`, so the channel header too; and `<|start|>assistant` behind a message of the assistant at
    whose end generation doesn't stop, such as a thought. In a text without turns: all tokens. Image placeholders are
    never learned.

    Read from the token ids, which works for plain texts in harmony too; for chats it is the mask of the chat template's
    generation blocks.

    Args:
        input_ids: of a row, or of several, joined.
        processor: of the model.
        learned_parts: of chats.
        lengths: the tokens of each row; None for one row.
    """
    lengths = np.array([len(input_ids)]) if lengths is None else lengths
    messages = _Messages(input_ids, lengths, processor.tokenizer)
    learned = np.repeat(~messages.rows_with_turns(), lengths)
    firsts = np.cumsum(lengths) - lengths
    header = 1 + len(_words(processor.tokenizer)[0])
    kept = messages.learned(learned_parts)
    places = zip(messages.starts[kept], messages.lasts[kept], firsts[messages.rows[kept]], strict=True)
    stops = {int(last) for last in messages.lasts[messages.at_which_generation_stops()]}
    for start, last, first in ((int(a), int(b), int(c)) for a, b, c in places):
        goes_on = start > first and learned[start - 1] and start - 1 not in stops
        learned[start if goes_on else start + header : last + 1] = True
    return learned & (input_ids != processor.image_token_id)


def targets_of(
    input_ids: np.ndarray, processor: GPTOSSVisionProcessor, lengths: np.ndarray | None = None
) -> np.ndarray:
    """The token to predict before each token, ``[s]``: that token, or `<|return|>` for the `<|end|>` of an answer.

    gpt-oss's chat format ends the answers of earlier turns with `<|end|>`. When they were generated they ended with
    `<|return|>`, at which generation stops; at `<|end|>`, which ends a thought, it goes on.

    Args:
        input_ids: of a row, or of several, joined.
        processor: of the model.
        lengths: the tokens of each row; None for one row.
    """
    messages = _Messages(input_ids, np.array([len(input_ids)]) if lengths is None else lengths, processor.tokenizer)
    end, return_ = processor.tokenizer.convert_tokens_to_ids(["<|end|>", "<|return|>"])
    lasts = messages.lasts[messages.answers]
    targets = input_ids.copy()
    targets[lasts[input_ids[lasts] == end]] = return_
    return targets


class _Messages:
    """The messages of some rows, whose tokens are joined.

    Attributes:
        starts: where each starts, ``[messages]``.
        lasts: its last token.
        rows: its row.
    """

    def __init__(self, input_ids: np.ndarray, lengths: np.ndarray, tokenizer: Any) -> None:
        self._ids, self._tokenizer, self._number_of_rows = input_ids, tokenizer, len(lengths)
        codes = _codes(tokenizer)[input_ids]
        ends = np.cumsum(lengths)
        self.starts = np.flatnonzero(codes == START)
        self.rows = np.searchsorted(ends, self.starts, side="right")
        self._ends = ends[self.rows]
        self.lasts = np.minimum(_next(np.flatnonzero(codes == END), self.starts), self._ends - 1)
        self._channels = _next(np.flatnonzero(codes == CHANNEL), self.starts)
        self._of_assistant = self._holds(_words(tokenizer)[0], self.starts + 1)

    def rows_with_turns(self) -> np.ndarray:
        """Which rows are chats, ``[rows]``."""
        return np.bincount(self.rows, minlength=self._number_of_rows) > 0

    def learned(self, parts: Learned) -> np.ndarray:
        """Which messages are learned, ``[messages]``."""
        kept = self._of_assistant if parts.channels == "all" else self.answers
        if parts.channels == "final_and_thinking":
            thoughts = self._holds(_words(self._tokenizer)[2], self._channels + 1) & (self._channels < self.lasts)
            kept = kept | (self._of_assistant & thoughts)
        return kept & self._in_last_turn(self._of_assistant) if parts.turns == "last" else kept

    @cached_property
    def answers(self) -> np.ndarray:
        """Which messages are the assistant's in the final channel, or in none, ``[messages]``."""
        final = (self._channels >= self.lasts) | self._holds(_words(self._tokenizer)[1], self._channels + 1)
        return self._of_assistant & final

    def at_which_generation_stops(self) -> np.ndarray:
        """Which messages are answers or calls, ``[messages]``."""
        call = self._tokenizer.convert_tokens_to_ids("<|call|>")
        return self.answers | (self._ids[self.lasts] == call)

    def _in_last_turn(self, answers: np.ndarray) -> np.ndarray:
        """Whether each message is behind the last one of someone else that an answer follows."""
        numbers = np.arange(len(answers))
        last_answer = np.full(self._number_of_rows, -1)
        np.maximum.at(last_answer, self.rows[answers], numbers[answers])
        before = ~answers & (numbers < last_answer[self.rows])
        first = np.zeros(self._number_of_rows, dtype=np.int64)
        np.maximum.at(first, self.rows[before], numbers[before] + 1)
        return numbers >= first[self.rows]

    def _holds(self, word: Sequence[int], places: np.ndarray) -> np.ndarray:
        """Whether the tokens of a word stand at a place of each message, ``[messages]``."""
        found = places + len(word) <= self._ends
        for offset, token in enumerate(word):
            found &= self._ids[np.minimum(places + offset, len(self._ids) - 1)] == token
        return found


def _next(of: np.ndarray, places: np.ndarray) -> np.ndarray:
    """The first of some sorted places behind each place; a place behind all tokens where there is none."""
    return np.append(of, np.iinfo(np.int64).max // 2)[np.searchsorted(of, places, side="right")]


def _marked(text: str, row: Row, processor: GPTOSSVisionProcessor) -> str:
    marked = text.replace(IMAGE_TAG, processor.image_token)
    return marked if processor.image_token in marked else processor.image_token * len(row.images) + marked


@lru_cache(maxsize=8)
def _codes(tokenizer: Any) -> np.ndarray:
    """Of each token of the vocabulary, whether it starts a message, names its channel or ends it; 0 for the others."""
    codes = np.zeros(len(tokenizer), dtype=np.uint8)
    names = {"<|start|>": START, "<|channel|>": CHANNEL, "<|end|>": END, "<|return|>": END, "<|call|>": END}
    codes[tokenizer.convert_tokens_to_ids([*names])] = [*names.values()]
    return codes


@lru_cache(maxsize=8)
def _words(tokenizer: Any) -> tuple[list[int], list[int], list[int]]:
    """The tokens of "assistant", "final" and "analysis"."""
    return tuple(tokenizer.encode(word, add_special_tokens=False) for word in ("assistant", "final", "analysis"))


@contextmanager
def without_threads() -> Iterator[None]:
    """Let tokenizers (0.22.2) work in this thread: its pool does not exist in a fork, which would wait for it."""
    before = os.environ.get("TOKENIZERS_PARALLELISM")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    try:
        yield
    finally:
        if before is None:
            del os.environ["TOKENIZERS_PARALLELISM"]
        else:
            os.environ["TOKENIZERS_PARALLELISM"] = before
