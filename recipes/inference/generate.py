"""Asking a checkpoint: questions in, and what the model says next.

A model that thinks in harmony writes its thoughts, its calls of tools and its answer as messages of their own. What is
shown is the answer: the messages of the channel «final».
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import torch
from transformers import BatchFeature, TextStreamer
from transformers.utils import logging

from ...bridge.hf.modeling_gpt_oss_vision import GPTOSSVisionForCausalLM
from ...bridge.hf.processing_gpt_oss_vision import IMAGE_MARK, GPTOSSVisionProcessor
from ...errors import UserError

Chat = list[dict[str, Any]]
"""Messages as a chat template takes them: a role and content each."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampling:
    """How the next token is chosen."""

    max_new_tokens: int = 256
    temperature: float = 0.0  # 0 takes the likeliest token; 1 draws from what the model says
    seed: int = 0

    def arguments(self) -> dict[str, Any]:
        """As `model.generate` takes them; nothing but the temperature changes the model's distribution."""
        if self.temperature == 0:
            return {"max_new_tokens": self.max_new_tokens, "do_sample": False}
        drawn = {"do_sample": True, "temperature": self.temperature, "top_k": 0, "top_p": 1.0}
        return {"max_new_tokens": self.max_new_tokens} | drawn


class FinalChannel:
    """Tells which of the tokens that a model writes belong to its answer.

    Tokens that stand in no message, as a model writes that has not learned harmony, do as well.
    """

    def __init__(self, processor: GPTOSSVisionProcessor) -> None:
        tokenizer = processor.tokenizer
        self.header_starts = set(tokenizer.convert_tokens_to_ids(["<|start|>", "<|channel|>"]))
        self.message = tokenizer.convert_tokens_to_ids("<|message|>")
        self.control = {token for token, added in tokenizer.added_tokens_decoder.items() if added.special}
        self.final = tokenizer.encode("final", add_special_tokens=False)
        self.header: list[int] | None = None  # its tokens so far, inside one
        self.is_shown = True
        self.has_begun = False

    def takes(self, token: int) -> bool:
        """Whether the next token belongs to the answer."""
        if token in self.header_starts:
            self.header, self.is_shown = [], False
        elif token == self.message:
            self.is_shown, self.header = (self.header or [])[: len(self.final)] == self.final, None
            self.has_begun |= self.is_shown
        elif token in self.control:
            self.is_shown = False
        elif self.header is not None:
            self.header.append(token)
        else:
            self.has_begun |= self.is_shown
            return self.is_shown
        return False


class AnswerStreamer(TextStreamer):
    """Writes the answer to `file`, word by word, while the model generates it."""

    def __init__(self, processor: GPTOSSVisionProcessor, file: TextIO) -> None:
        super().__init__(processor.tokenizer, skip_prompt=True)
        self.file = file
        self.channel = FinalChannel(processor)

    def put(self, value: torch.Tensor) -> None:
        """Takes the prompt first, then token after token."""
        if self.next_tokens_are_prompt or self.channel.takes(int(value)):
            super().put(value)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Writes what has become whole words."""
        print(text, file=self.file, flush=True, end="\n" if stream_end else "")


def load(model_path: Path, *, int8: bool = False) -> tuple[GPTOSSVisionForCausalLM, GPTOSSVisionProcessor]:
    """A checkpoint with its processor, on the devices that are there; with `int8`, its weights in INT8."""
    logging.disable_progress_bar()
    processor = GPTOSSVisionProcessor.from_pretrained(model_path)  # first, since it fails in no time
    options = {}
    if int8:
        from ...bridge.hf_int8 import int8_config

        options["quantization_config"] = int8_config()
    model = GPTOSSVisionForCausalLM.from_pretrained(model_path, device_map="auto", **options).eval()
    return model, processor


def answer(
    model: GPTOSSVisionForCausalLM,
    processor: GPTOSSVisionProcessor,
    prompt: str,
    images: Sequence[Path],
    sampling: Sampling,
    file: TextIO,
) -> bool:
    """Write what a model says to a prompt with images, while it says it. False when it came to no answer.

    Args:
        prompt: the user's words; ``<image>`` stands where an image belongs. Without any, images come first.
        images: image files, in the order in which the model sees them.

    Raises:
        ValueError: when an image cannot be read, or the prompt has another number of marks than there are images.
    """
    streamer = AnswerStreamer(processor, file)
    inputs = inputs_of(processor, [[{"role": "user", "content": parts_of(prompt, images)}]]).to(model.device)
    torch.manual_seed(sampling.seed)
    model.generate(**inputs, **sampling.arguments(), streamer=streamer)
    return streamer.channel.has_begun


def answers_to(
    model: GPTOSSVisionForCausalLM, processor: GPTOSSVisionProcessor, chats: Sequence[Chat], sampling: Sampling
) -> list[str]:
    """What a model says next in each of some chats, in one batch. Empty where it came to no answer."""
    inputs = inputs_of(processor, chats).to(model.device)
    output = model.generate(**inputs, **sampling.arguments())
    return [final_words(processor, tokens.tolist()) for tokens in output[:, inputs["input_ids"].shape[1] :]]


def inputs_of(processor: GPTOSSVisionProcessor, chats: Sequence[Chat]) -> BatchFeature:
    """Chats up to where the model speaks, as one left-padded batch of tokens and pixels."""
    return processor.apply_chat_template(
        list(chats),
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"padding": True, "padding_side": "left"},
    )


def parts_of(prompt: str, images: Sequence[Path]) -> list[dict[str, str]]:
    """The parts of a chat message: the prompt cut at its marks, with an image at each cut.

    Raises:
        ValueError: when there are marks, but not as many as images, or the prompt is no text, as bytes of a shell.
    """
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"The prompt is not in UTF-8 ({error}).") from error
    texts = prompt.split(IMAGE_MARK)
    if len(texts) == 1:
        texts = [""] * len(images) + texts
    if len(texts) != len(images) + 1:
        raise UserError(f"The prompt has {len(texts) - 1} {IMAGE_MARK} for {len(images)} images.")
    parts = [{"type": "text", "text": texts[0]}]
    for image, text in zip(images, texts[1:], strict=True):
        parts += [{"type": "image", "path": str(image)}, {"type": "text", "text": text}]
    return [part for part in parts if part != {"type": "text", "text": ""}]


def final_words(processor: GPTOSSVisionProcessor, tokens: Sequence[int]) -> str:
    """The answer in what a model wrote: the text of its final channel."""
    channel = FinalChannel(processor)
    return processor.decode([token for token in tokens if channel.takes(token)]).strip()
