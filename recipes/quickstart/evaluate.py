"""Answers of a model about the held-out digits: their accuracy, the experts used, and the exactness of the export."""

from collections.abc import Sequence
from itertools import batched
from pathlib import Path

import numpy as np
import torch

from ...bridge.hf.modeling_gpt_oss_vision import GPTOSSVisionForCausalLM
from ...bridge.hf.processing_gpt_oss_vision import GPTOSSVisionProcessor
from ...conversion.comparison.logits import megatron_model
from ...terminal import Progress
from ..data.digits import EvaluationRow
from ..inference.generate import Chat, Sampling, answers_to, inputs_of

ASKED_AT_ONCE = 99


def chats(rows: Sequence[EvaluationRow], image: str) -> list[Chat]:
    """The questions of some rows, with the image named by ``image``: "right", "wrong" or "no"."""
    return [getattr(row, f"{image}_image") for row in rows]


def ask(
    model: GPTOSSVisionForCausalLM,
    processor: GPTOSSVisionProcessor,
    rows: Sequence[EvaluationRow],
    image: str,
    progress: Progress,
) -> list[str]:
    """The answer of the model to each row."""
    answers = []
    for some in batched(rows, ASKED_AT_ONCE):
        answers += answers_to(model, processor, chats(some, image), Sampling(max_new_tokens=12))
        progress.advance()
    return answers


def accuracy(rows: Sequence[EvaluationRow], answers: Sequence[str]) -> float:
    """Share of answers that name the digit of the row, whatever image was shown."""
    return sum(said == row.truth for row, said in zip(rows, answers, strict=True)) / len(rows)


def expert_shares(
    model: GPTOSSVisionForCausalLM, processor: GPTOSSVisionProcessor, rows: Sequence[EvaluationRow]
) -> np.ndarray:
    """``[layers, 2, experts]``: which share of visual and of text tokens goes to each expert, over the questions."""
    config = model.config
    counts = torch.zeros(config.num_hidden_layers, 2, config.num_local_experts)
    for some in batched(rows, ASKED_AT_ONCE):
        inputs = inputs_of(processor, chats(some, "right"))
        with torch.no_grad():
            logits = model(**inputs, output_router_logits=True).router_logits
        visual = (inputs["input_ids"] == config.image_token_id).flatten()
        text = inputs["attention_mask"].bool().flatten() & ~visual
        for layer, scores in enumerate(logits):
            chosen = torch.zeros_like(scores).scatter(1, scores.topk(config.num_experts_per_tok).indices, 1.0)
            counts[layer] += torch.stack([chosen[visual].sum(0), chosen[text].sum(0)])
    return (counts / counts.sum(-1, keepdim=True)).numpy()


def largest_difference(
    model: GPTOSSVisionForCausalLM,
    processor: GPTOSSVisionProcessor,
    rows: Sequence[EvaluationRow],
    checkpoint: Path,
) -> float:
    """The largest difference between any logit of the exported model and of the Megatron checkpoint, in fp32.

    Args:
        checkpoint: the folder of an iteration; loaded on the rank that calls (`cpu.run_ranks`).
    """
    some = rows[:ASKED_AT_ONCE]
    largest = torch.zeros(())
    with megatron_model(checkpoint) as trained:
        for image in ("right", "no"):
            for row in some:
                inputs = inputs_of(processor, chats([row], image))
                theirs = trained(inputs["input_ids"], None, None, pixel_values=inputs.get("pixel_values"))
                largest = torch.maximum(largest, (model(**inputs).logits - theirs).abs().max())  # keeps a NaN
    return float(largest)
