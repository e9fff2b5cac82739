"""A file of questions to a file of answers: JSONL in, JSONL out, in order.

A row has any format of training data (`data/formats.py`): a chat, or a text with or without images. Answers at the end
of a chat are left out and generated, so that a file made for training can be used as it is.
"""

import json
from collections.abc import Iterator, Sequence
from itertools import batched
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console

from ...atomic import atomic_file
from ...bridge.hf.modeling_gpt_oss_vision import GPTOSSVisionForCausalLM
from ...bridge.hf.processing_gpt_oss_vision import GPTOSSVisionProcessor
from ...errors import UserError
from ...terminal import Progress
from ..data.rows import Row, Skipped, describe_skipped, refuse_control_tokens
from ..data.sources.opening import open_source
from .generate import Chat, Sampling, answers_to, parts_of


class Question(NamedTuple):
    """A chat that waits for an answer, and the line where its row begins, from 1."""

    line: int | str
    chat: Chat


def answer_file(
    model: GPTOSSVisionForCausalLM,
    processor: GPTOSSVisionProcessor,
    questions: Path,
    answers: Path,
    sampling: Sampling,
    batch_size: int,
) -> str:
    """Answer every line of a file: a line each, with its number and "answer", or "error" where it can't be used.

    Returns:
        A sentence: how many were answered, and which could not be used.

    Raises:
        UserError: no line can be used; then `answers` is not written.
    """
    total = len(open_source(questions))
    if not total:
        raise UserError(f"{questions} has no questions.")
    skipped: list[Skipped] = []
    torch.manual_seed(sampling.seed)
    with (
        atomic_file(answers) as file,
        Progress("Batches answered", -(-total // batch_size), Console(stderr=True, highlight=False)) as progress,
    ):
        for rows in batched(read_questions(questions, processor), batch_size):
            for line in _answered(model, processor, rows, sampling):
                print(json.dumps(line, ensure_ascii=False), file=file)
            skipped += [row for row in rows if isinstance(row, Skipped)]
            progress.advance()
        if len(skipped) == total:
            raise UserError(describe_skipped(questions, skipped, total))
    said = f"{total - len(skipped):,} of {total:,} answers are in {answers}."
    return f"{said} {describe_skipped(questions, skipped, total)}" if skipped else said


def read_questions(path: Path, processor: GPTOSSVisionProcessor) -> Iterator[Question | Skipped]:
    """The question of each row, or why it can't be used. Images are decoded, so that none fails later in a batch."""
    source = open_source(path)
    for index in range(len(source)):
        file, line = source.place(index)
        try:
            row = source.row(index, for_training=False)
            for picture in row.images:
                picture.check(processor, decode=True)
            chat = _chat_of(row)
            refuse_control_tokens(chat, processor)
            processor.apply_chat_template(chat, tokenize=False).encode()  # half a surrogate pair is JSON, but no text
        except (UserError, UnicodeEncodeError) as error:
            # A reason may quote surrogates, which cannot be written.
            yield Skipped(index, file, line, str(error).rstrip(".").encode(errors="backslashreplace").decode())
        else:
            yield Question(line, chat)


def _chat_of(row: Row) -> Chat:
    if row.text is not None:
        return [{"role": "user", "content": parts_of(row.text, [picture.source() for picture in row.images])}]
    question = row.question()
    if not question.messages:
        raise UserError("a chat without a question")
    return question.chat()


def _answered(
    model: GPTOSSVisionForCausalLM,
    processor: GPTOSSVisionProcessor,
    rows: Sequence[Question | Skipped],
    sampling: Sampling,
) -> Iterator[dict[str, Any]]:
    chats = [row.chat for row in rows if isinstance(row, Question)]
    answers = iter(answers_to(model, processor, chats, sampling) if chats else [])
    for row in rows:
        outcome = {"error": row.reason} if isinstance(row, Skipped) else {"answer": next(answers)}
        yield {"line": row.line} | outcome
