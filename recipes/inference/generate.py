"""Answers of a checkpoint to questions.

A model that was trained on harmony writes its thoughts, its calls of tools and its answer as separate messages. Only
the answer is shown: the messages of the channel "final".
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import torch
from PIL import Image
from transformers import BatchFeature, TextStreamer
from transformers.utils import logging

from ...bridge.hf.modeling_gpt_oss_vision import GPTOSSVisionForCausalLM
from ...bridge.hf.processing_gpt_oss_vision import IMAGE_TAG, GPTOSSVisionProcessor
from ...errors import UserError

Chat = list[dict[str, Any]]
"""Messages as a chat template takes them: a role and content each."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampling:
    """How the next token is chosen."""

    max_new_tokens: int = 256
    temperature: float = 0.0  # 0 takes the likeliest token; 1 draws from the model's distribution
    seed: int = 0

    def to_generate_kwargs(self) -> dict[str, Any]:
        """Keyword arguments of `model.generate`; only the temperature changes the distribution of the model."""
        if self.temperature == 0:
            return {"max_new_tokens": self.max_new_tokens, "do_sample": False}
        drawn = {"do_sample": True, "temperature": self.temperature, "top_k": 0, "top_p": 1.0}
        return {"max_new_tokens": self.max_new_tokens} | drawn


class FinalChannel:
    """Selects the tokens that belong to the answer, given one after the other.

    Tokens outside any message belong to it too: a model that was not trained on harmony writes nothing else.
    """

    def __init__(self, processor: GPTOSSVisionProcessor) -> None:
        tokenizer = processor.tokenizer
        self.header_starts = set(tokenizer.convert_tokens_to_ids(["<|start|>", "<|channel|>"]))
        self.message = tokenizer.convert_tokens_to_ids("<|message|>")
        self.control = {token for token, added in tokenizer.added_tokens_decoder.items() if added.special}
        self.final = tokenizer.encode("final", add_special_tokens=False)
        self.header: list[int] | None = None  # the tokens of a header so far, None outside of one
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
    """Write the answer to `file`, word by word, while the model generates it."""

    def __init__(self, processor: GPTOSSVisionProcessor, file: TextIO) -> None:
        super().__init__(processor.tokenizer, skip_prompt=True)
        self.file = file
        self.channel = FinalChannel(processor)

    def put(self, value: torch.Tensor) -> None:
        """Called by `model.generate` with the prompt first, then with each token."""
        if self.next_tokens_are_prompt or self.channel.takes(int(value)):
            super().put(value)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Write text that ends in a whole word; called by `TextStreamer`."""
        print(text, file=self.file, flush=True, end="\n" if stream_end else "")


def load(model_path: Path, *, int8: bool = False) -> tuple[GPTOSSVisionForCausalLM, GPTOSSVisionProcessor]:
    """Load a checkpoint with its processor, on the devices of this machine; with `int8`, its weights in INT8.

    Raises:
        UserError: the processor or the model cannot be built from the files.
    """
    logging.disable_progress_bar()
    with _refusals_as_user_errors(model_path):
        processor = GPTOSSVisionProcessor.from_pretrained(model_path)  # first, since it fails at once
    options = {}
    if int8:
        from ...bridge.hf_int8 import int8_config

        options["quantization_config"] = int8_config()
    with _refusals_as_user_errors(model_path):
        model = GPTOSSVisionForCausalLM.from_pretrained(model_path, device_map="auto", **options)
    return model.eval(), processor


@contextmanager
def _refusals_as_user_errors(model_path: Path | None = None) -> Iterator[None]:
    """Raise a UserError for a ValueError: transformers and our files for the Hub raise no UserError."""
    try:
        yield
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"{model_path} cannot be loaded: {error}" if model_path else str(error)) from error


def answer(
    model: GPTOSSVisionForCausalLM,
    processor: GPTOSSVisionProcessor,
    prompt: str,
    images: Sequence[Path],
    sampling: Sampling,
    file: TextIO,
) -> bool:
    """Write the answer of a model to a prompt with images while it is generated. False when there is none.

    Args:
        prompt: the user's words; ``<image>`` marks where an image belongs. Without any mark, images come first.
        images: image files, in the order in which the model sees them.

    Raises:
        UserError: an image cannot be read, or the prompt has another number of marks than there are images.
    """
    streamer = AnswerStreamer(processor, file)
    inputs = inputs_of(processor, [[{"role": "user", "content": parts_of(prompt, images)}]]).to(model.device)
    torch.manual_seed(sampling.seed)
    model.generate(**inputs, **sampling.to_generate_kwargs(), streamer=streamer)
    return streamer.channel.has_begun


def answers_to(
    model: GPTOSSVisionForCausalLM, processor: GPTOSSVisionProcessor, chats: Sequence[Chat], sampling: Sampling
) -> list[str]:
    """The next answer in each of some chats, generated in one batch. Empty where there is none."""
    inputs = inputs_of(processor, chats).to(model.device)
    output = model.generate(**inputs, **sampling.to_generate_kwargs())
    return [final_words(processor, tokens.tolist()) for tokens in output[:, inputs["input_ids"].shape[1] :]]


def inputs_of(processor: GPTOSSVisionProcessor, chats: Sequence[Chat]) -> BatchFeature:
    """Chats up to the answer, as one left-padded batch of tokens and pixels.

    Raises:
        UserError: an image cannot be read.
    """
    with _refusals_as_user_errors():
        return processor.apply_chat_template(
            list(chats),
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={"padding": True, "padding_side": "left"},
        )


def parts_of(prompt: str, images: Sequence[Path | str | Image.Image]) -> list[dict[str, Any]]:
    """The parts of a chat message: the prompt cut at its marks, with an image at each cut.

    Raises:
        UserError: the number of marks is neither 0 nor that of the images, or the prompt is not in UTF-8.
    """
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"The prompt is not in UTF-8 ({error}).") from error
    texts = prompt.split(IMAGE_TAG)
    if len(texts) == 1:
        texts = [""] * len(images) + texts
    if len(texts) != len(images) + 1:
        raise UserError(f"The prompt has {len(texts) - 1} {IMAGE_TAG} for {len(images)} images.")
    parts: list[dict[str, Any]] = [{"type": "text", "text": texts[0]}]
    for image, text in zip(images, texts[1:], strict=True):
        source = {"image": image} if isinstance(image, Image.Image) else {"path": str(image)}
        parts += [{"type": "image"} | source, {"type": "text", "text": text}]
    return [part for part in parts if part != {"type": "text", "text": ""}]


def final_words(processor: GPTOSSVisionProcessor, tokens: Sequence[int]) -> str:
    """The answer in generated tokens: the text of the final channel."""
    channel = FinalChannel(processor)
    return processor.decode([token for token in tokens if channel.takes(token)]).strip()
