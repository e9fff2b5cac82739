"""GRPO with TRL: a quickstart's model, damaged by noise, learns to read digits again from a reward that is computed.

uv run python examples/rl/grpo.py QUICKSTART [--lora] [--steps 60]    # after `uv sync --extra rl`
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

OPTIONS = {"per_device_train_batch_size": 64, "max_completion_length": 6, "bf16": False, "logging_steps": 1}
OPTIONS |= {"ddp_find_unused_parameters": False}  # none is unused, which TRL does not expect where there are images
LORA = LoraConfig(target_modules="all-linear", target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"])


def questions(digits: DigitsSplit) -> Dataset:
    """The training rows with an image; TRL puts it into the prompt."""
    rows = []
    for user, assistant in (json.loads(line)["messages"] for line in digits.train_path.open()):
        parts = {part["type"]: part for part in user["content"]}
        if "image" in parts:
            prompt, file = [{"role": "user", "content": parts["text"]["text"]}], digits.folder / parts["image"]["path"]
            rows.append({"prompt": prompt, "images": [Image.open(file)], "word": assistant["content"][0]["text"]})
    return Dataset.from_list(rows)


def reward(completions: list, word: list[str], **_columns: list) -> list[float]:
    """1 for the word of the digit. TRL drops special tokens; the channel's name, "final", stays before the answer."""
    return [float(m["content"].removeprefix("final") == right) for (m,), right in zip(completions, word, strict=True)]


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--lora", action="store_true")
    parser.add_argument("--steps", type=int, default=60)
    arguments = parser.parse_args()
    (model, processor), digits = load(arguments.folder / "hf"), write_digits(arguments.folder / "digits")
    torch.manual_seed(0)
    for matrix in [parameter.data for parameter in model.parameters() if parameter.ndim > 1]:
        matrix += 1.1 * matrix.std() * torch.randn_like(matrix)
    rate, lora = (2e-3, LORA) if arguments.lora else (3e-4, None)
    config = GRPOConfig(arguments.folder / "grpo", max_steps=arguments.steps, learning_rate=rate, **OPTIONS)
    trainer = GRPOTrainer(model, reward, config, questions(digits), processing_class=processor, peft_config=lora)
    rows = list(evaluation_rows(digits))
    for stage in ("before", "after"):
        if stage == "after":
            trainer.train()
        for image in ("right_image", "wrong_image"):
            said = answers_to(model.eval(), processor, [getattr(r, image) for r in rows], Sampling(max_new_tokens=6))
            right = sum(answer == row.truth for answer, row in zip(said, rows, strict=True)) / len(rows)
            print(f"{stage}, {image}: {right:.1%} of held-out digits")
