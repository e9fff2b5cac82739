"""What the ranks of these tests run. In a module of its own: spawned processes import it."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from gpt_oss_vision.bridge import hf_attention
from gpt_oss_vision.bridge.hf.modeling_gpt_oss_vision import GPTOSSVisionForCausalLM
from gpt_oss_vision.bridge.mcore import cpu
from gpt_oss_vision.recipes.data.digits import DigitsSplit
from gpt_oss_vision.recipes.quickstart import run as quickstart
from gpt_oss_vision.recipes.quickstart.settings import Settings
from gpt_oss_vision.recipes.training.log import Callback, CallbackContext
from gpt_oss_vision.recipes.training.train import train
from gpu.ranks import has_cuda
from layouts import Layout, Microbatch, build, on_device, start_communication

GREEDY = {"do_sample": False, "max_new_tokens": 6, "return_dict_in_generate": True, "output_logits": True}
STEPS, SAVED, KILLED = (20, 10, 12) if has_cuda() else (4, 2, 3)


def steps_without_waiting(path: Path, layout: Layout, batch: Microbatch) -> list[str]:
    """Run the model once, then its parts with an error for each synchronization; the names of the parts that ran."""
    from megatron.bridge import AutoBridge
    from megatron.core.utils import unwrap_model

    start_communication()
    (wrapped,) = build(AutoBridge.from_hf_pretrained(path), layout)
    batch = on_device(batch)
    wrapped(batch["input_ids"], None, None, labels=batch["labels"], pixel_values=batch["pixel_values"])
    model = unwrap_model(wrapped)
    pixels, ran = batch["pixel_values"].to(model.embedding.word_embeddings.weight.dtype), []
    torch.cuda.synchronize()
    if cpu.cuda_is_real():
        torch.cuda.set_sync_debug_mode("error")
    try:
        is_visual = model.visual_mask(batch["input_ids"])
        ran.append("mask")
        hidden = model.embed(batch["input_ids"], None, is_visual, pixels)
        ran.append("merge")
        weights, _ = model.decoder.layers[0].mlp.router(hidden, padding_mask=is_visual.mT.contiguous())
        ran.append("router")
        (hidden.sum() + weights.sum()).backward()
        ran.append("backward")
    finally:
        if cpu.cuda_is_real():
            torch.cuda.set_sync_debug_mode("default")
    return ran


def forked_ranks() -> str:
    with pytest.raises(RuntimeError) as caught:
        cpu.run_ranks(1, print)
    return str(caught.value)


def initial_means(layout: Layout, reference_path) -> dict[str, float]:
    from megatron.bridge import AutoBridge

    start_communication()
    torch.manual_seed(0)  # of the tower, which transformers initialises on the CPU
    (model,) = build(AutoBridge.from_hf_pretrained(reference_path), layout, load_weights=False)
    return {name: float(parameter.detach().double().mean()) for name, parameter in model.named_parameters()}


def generate(
    path: Path, batch: Microbatch, device: str, dtype: torch.dtype, attention: str, **options: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens of greedy generation, and the logits of the first step."""
    hf_attention.register_attention()
    model = GPTOSSVisionForCausalLM.from_pretrained(path, dtype=dtype, attn_implementation=attention, **options)
    if not options:
        model.to(device)
    batch = {name: value.to(device) for name, value in batch.items()}
    batch["pixel_values"] = batch["pixel_values"].to(dtype)
    found = model.eval().generate(**batch, **GREEDY)
    return found.sequences.cpu(), found.logits[0].float().cpu()


@dataclass(frozen=True)
class Start:
    """Checkpoints to start from, in a folder, and digits to train on."""

    folder: Path
    digits: DigitsSplit


@dataclass
class Ledger(Callback):
    """Writes the loss of each step into a file; ends the process without warning in a step."""

    path: Path
    kill_at: int | None

    def on_train_step_start(self, context: CallbackContext) -> None:
        if context.state.train_state.step == self.kill_at:
            os._exit(9)

    def on_train_step_end(self, context: CallbackContext) -> None:
        with self.path.open("a") as file:
            file.write(f"{context.state.train_state.step} {float(context.loss_dict['lm loss'])}\n")


def training(start: Start, folder: Path, backend: str, kill_at: int | None = None) -> None:
    config = quickstart.training_config(start.folder, start.digits, Settings(steps=STEPS, batch_size=8))
    config.model.backend = backend
    config.mixed_precision = "bf16_mixed"
    config.dataset.path = str(start.digits.train_path.with_name("few.jsonl"))
    config.ddp.overlap_grad_reduce = config.ddp.overlap_param_gather = True
    config.logger.tensorboard_dir = None
    config.checkpoint.save = config.checkpoint.load = str(folder / "saved")
    config.checkpoint.save_interval = SAVED
    train(config, callbacks=[Ledger(folder / "losses", kill_at)])
