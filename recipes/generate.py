"""One question to a model, and its answer."""

from collections.abc import Sequence
from pathlib import Path

from transformers.utils import logging

from ..bridge.hf.modeling_gpt_oss_vision import GPTOSSVisionForCausalLM
from ..bridge.hf.processing_gpt_oss_vision import IMAGE_MARK, GPTOSSVisionProcessor


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
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": parts_of(prompt, images)}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    output = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
    return final_words(processor.decode(output[0, inputs["input_ids"].shape[1] :]))


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
