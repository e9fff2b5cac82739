"""GRPO with TRL: the model of a quickstart, damaged by noise, learns to read digits again from a computed reward.

uv sync --extra rl
uv run gpt-oss-vision quickstart --out out
uv run python examples/rl/grpo.py out [--lora] [--steps 60]
"""

import argparse
import json
from pathlib import Path

import torch
from datasets import Dataset
from peft import LoraConfig
from PIL import Image
from trl import GRPOConfig, GRPOTrainer

from gpt_oss_vision.recipes.data.digits import DigitsSplit, evaluation_rows, write_digits
from gpt_oss_vision.recipes.inference.generate import Sampling, answers_to, load


def prompts(digits: DigitsSplit) -> Dataset:
    """A question, its image and the word for it, per training row with an image; TRL puts the image into the prompt."""
    rows = []
    for line in digits.train_path.read_text().splitlines():
        user, assistant = json.loads(line)["messages"]
        parts = {part["type"]: part for part in user["content"]}
        if "image" in parts:
            prompt = [{"role": "user", "content": parts["text"]["text"]}]
            image = Image.open(digits.folder / parts["image"]["path"])
            rows.append({"prompt": prompt, "images": [image], "answer": assistant["content"][0]["text"]})
    return Dataset.from_list(rows)


def names_the_digit(completions: list, answer: list[str], **_) -> list[float]:
    """The reward. TRL decodes without special tokens, which leaves harmony's word for the channel before the answer."""
    said = [completion[0]["content"].removeprefix("final").strip() for completion in completions]
    return [float(word == right) for word, right in zip(said, answer, strict=True)]


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--lora", action="store_true")
    parser.add_argument("--steps", type=int, default=60)
    arguments = parser.parse_args()
    model, processor = load(arguments.folder / "hf")
    digits = write_digits(arguments.folder / "digits")
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter += 0.9 * parameter.std() * torch.randn_like(parameter)
    config = GRPOConfig(
        output_dir=arguments.folder / "grpo",
        max_steps=arguments.steps,
        per_device_train_batch_size=64,
        num_generations=8,
        max_completion_length=6,
        learning_rate=2e-3 if arguments.lora else 3e-4,
        beta=0.0,
        bf16=False,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        ddp_find_unused_parameters=False,  # every parameter is used, which TRL does not expect of a model with images
    )
    # The experts are parameters, not modules: target_modules="all-linear" would leave them out.
    lora = LoraConfig(
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj"],
        target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    )
    trainer = GRPOTrainer(
        model,
        names_the_digit,
        config,
        train_dataset=prompts(digits),
        processing_class=processor,
        peft_config=lora if arguments.lora else None,
    )
    trainer.train()
