"""One question to a model, and its answer."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import BatchFeature
from transformers.utils import logging

from ..bridge.hf.modeling_gpt_oss_vision import GPTOSSVisionForCausalLM
from ..bridge.hf.processing_gpt_oss_vision import IMAGE_MARK, GPTOSSVisionProcessor

Chat = list[dict[str, Any]]
"""Messages as a chat template takes them: a role and content each."""


def generate(model_path: Path, prompt: str, images: Sequence[Path] = (), *, max_new_tokens: int = 256) -> str:
    """What a model says to a prompt with images in front of it, greedily.

    Args:
        model_path: folder of a checkpoint with tokenizer and processor.
        prompt: the user's words; ``<image>`` stands where an image belongs. Without any, images come first.
        images: image files, in the order in which the model sees them.
        max_new_tokens: where an answer is cut off.

    Raises:
        ValueError: when an image cannot be read, or the prompt has another number of marks than there are images.
    """
    logging.disable_progress_bar()
    model = GPTOSSVisionForCausalLM.from_pretrained(model_path).eval()
    processor = GPTOSSVisionProcessor.from_pretrained(model_path)
    (answer,) = answers_to(
        model, processor, [[{"role": "user", "content": parts_of(prompt, images)}]], max_new_tokens=max_new_tokens
    )
    return answer


def answers_to(
    model: GPTOSSVisionForCausalLM, processor: GPTOSSVisionProcessor, chats: Sequence[Chat], *, max_new_tokens: int
) -> list[str]:
    """What a model says next in each of some chats, greedily and with its cache, in one batch."""
    inputs = inputs_of(processor, chats)
    output = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
    return [final_words(processor.decode(tokens)) for tokens in output[:, inputs["input_ids"].shape[1] :]]


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
        ValueError: when there are marks, but not as many as images.
    """
    texts = prompt.split(IMAGE_MARK)
    if len(texts) == 1:
        texts = [""] * len(images) + texts
    if len(texts) != len(images) + 1:
        raise ValueError(f"The prompt has {len(texts) - 1} {IMAGE_MARK} for {len(images)} images.")
    parts = [{"type": "text", "text": texts[0]}]
    for image, text in zip(images, texts[1:], strict=True):
        parts += [{"type": "image", "path": str(image)}, {"type": "text", "text": text}]
    return [part for part in parts if part != {"type": "text", "text": ""}]


def final_words(text: str) -> str:
    """The text of the final channel in what a model wrote: after the last ``<|message|>``, up to the turn's end."""
    text = text.rpartition("<|message|>")[2]
    for end in ("<|return|>", "<|end|>", "<|call|>", "<|endoftext|>"):
        text = text.partition(end)[0]
    return text.strip()
