"""The quickstart: a tiny model is trained by Megatron on real images, exported, and evaluated, without a GPU.

The steps, each a function below: digits and a tiny Hugging Face checkpoint → Megatron checkpoint → Megatron-Bridge's
training loop → Megatron checkpoint → Hugging Face checkpoint → questions about digits that were held out → report.
"""

import json
import math
import os
import resource
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from rich.console import Console

from ...bridge.hf.configuration_gpt_oss_vision import GPTOSSVisionConfig
from ...bridge.hf.modeling_gpt_oss_vision import GPTOSSVisionForCausalLM
from ...bridge.mcore import cpu
from ...bridge.mcore.provider import GPTOSSVisionProvider, provider_from_config
from ...conversion.exporting import export_checkpoint
from ...conversion.importing import import_checkpoint
from ...terminal import Progress, quiet
from ..base import WEIGHT_DECAY, ConfigContainer, set_learning_rate, set_weight_decay
from ..data.digits import DigitsSplit, EvaluationRow, evaluation_rows, write_digits
from ..data.tiny import tiny_config, tiny_processor
from ..inference.generate import load
from ..tiny import gpt_oss_vision_tiny_sft_1cpu_fp32_config
from ..training.log import LossHistory
from ..training.train import train
from . import figures
from .evaluate import ASKED_AT_ONCE, accuracy, ask, expert_shares, largest_difference
from .settings import Settings

VERSIONS = ("torch", "transformers", "megatron-core", "megatron-bridge", "gpt-oss-vision")


def run(out: str | Path, *, settings: Settings | None = None) -> dict[str, Any]:
    """Train, convert and evaluate; write checkpoints, TensorBoard logs, pictures and ``report.json`` into a folder.

    Args:
        out: an existing folder.
        settings: seed and size of the run.

    Returns:
        The report: accuracy with the right, a wrong and no image, first and last loss, the largest difference between
        the logits of the exported and of the trained model, seconds, peak memory and versions.
    """
    out, settings, started = Path(out).absolute(), settings or Settings(), time.perf_counter()
    with quiet(out / "log.txt") as console:
        console.print("Writing digits and a tiny checkpoint")
        digits = write_digits(out / "digits", settings.seed)
        write_checkpoint(out / "hf_start", settings)
        console.print("Hugging Face → Megatron")
        import_checkpoint(out / "hf_start", out / "megatron_start")
        # Megatron keeps its state in globals, so each step that runs it has processes of its own.
        losses = cpu.run_ranks(settings.ranks, fine_tune, out, digits, settings, console)[-1]
        console.print("Megatron → Hugging Face")
        export_checkpoint(out / "megatron", out / "hf")
        model, processor = load(out / "hf")
        rows = list(evaluation_rows(digits))[: settings.max_questions]
        with Progress("Asking", 3 * math.ceil(len(rows) / ASKED_AT_ONCE), console) as progress:
            answers = {image: ask(model, processor, rows, image, progress) for image in ("right", "wrong", "no")}
        (difference,) = cpu.run_ranks(
            1, largest_difference, model, processor, rows, out / f"megatron/iter_{settings.steps:07d}"
        )
        draw(out, losses, rows, answers["right"], expert_shares(model, processor, rows))
    report = {f"accuracy_{image}_image": accuracy(rows, said) for image, said in answers.items()}
    report |= {"loss_first": losses[0], "loss_last": losses[-1], "max_logit_difference": difference}
    report |= {"seconds": round(time.perf_counter() - started, 1), "peak_rss_gib": round(peak_rss_gib(), 2)}
    report |= {"versions": {name: version(name) for name in VERSIONS}}
    (out / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    return report


def write_checkpoint(folder: Path, settings: Settings) -> None:
    """A tiny random checkpoint in Hugging Face format with everything on, and a tokenizer made for the digits."""
    processor = tiny_processor()
    torch.manual_seed(settings.seed)
    model = GPTOSSVisionForCausalLM(tiny_config())
    model.generation_config = processor.tokenizer.generation_config()
    model.save_pretrained(folder)
    # safetensors 0.8.0 lets only the owner read its files, whatever the umask.
    (folder / "model.safetensors").chmod((folder / "config.json").stat().st_mode)
    processor.save_pretrained(folder)


def fine_tune(out: Path, digits: DigitsSplit, settings: Settings, console: Console) -> list[float]:
    """Train on the digits with Megatron-Bridge's own loop; the loss of every step, in nats per answer token."""
    config = training_config(out, digits, settings)
    is_last = int(os.environ["RANK"]) == settings.ranks - 1  # the last pipeline stage computes the loss
    with Progress("Training", settings.steps, console if is_last else None) as progress:
        history = LossHistory(progress)
        train(config, callbacks=[history])
    return history.losses


def provider_for(checkpoint: Path, settings: Settings) -> GPTOSSVisionProvider:
    """The Megatron model of a checkpoint at the parallel sizes of the run."""
    return provider_from_config(
        GPTOSSVisionConfig.from_pretrained(checkpoint),
        seq_length=settings.seq_length,
        tensor_model_parallel_size=settings.tensor_parallel,
        pipeline_model_parallel_size=settings.pipeline_parallel,
        expert_model_parallel_size=settings.expert_parallel,
    )


def training_config(out: Path, digits: DigitsSplit, settings: Settings) -> ConfigContainer:
    """The tiny recipe for fine-tuning with the settings and the folders of the run."""
    config = gpt_oss_vision_tiny_sft_1cpu_fp32_config()
    config.model = provider_for(out / "hf_start", settings)
    config.dataset.path, config.dataset.processor_path = str(digits.train_path), str(out / "hf_start")
    config.dataset.seq_length, config.dataset.seed = settings.seq_length, settings.seed
    config.train.train_iters, config.train.global_batch_size = settings.steps, settings.batch_size
    config.train.micro_batch_size = settings.micro_batch_size
    config.validation.eval_interval, config.validation.eval_iters = None, 0
    set_learning_rate(config, settings.learning_rate, lowest=settings.learning_rate / 100)
    set_weight_decay(config, WEIGHT_DECAY)
    config.scheduler.lr_warmup_fraction, config.scheduler.lr_warmup_iters = None, settings.steps // 10
    config.rng.seed = settings.seed + 1
    config.logger.tensorboard_dir = str(out / "tensorboard")
    config.checkpoint.save, config.checkpoint.save_interval = str(out / "megatron"), settings.steps
    config.checkpoint.pretrained_checkpoint = str(out / "megatron_start")
    return config


def draw(out: Path, losses: list[float], rows: Sequence[EvaluationRow], answers: list[str], shares: np.ndarray) -> None:
    """Draw the three pictures."""
    figures.loss_figure(losses, out / "loss.png")
    figures.predictions_figure(
        [Image.open(row.image_path) for row in rows],
        [row.question for row in rows],
        answers,
        [row.truth for row in rows],
        out / "predictions.png",
    )
    figures.experts_figure(shares, out / "experts.png")


def peak_rss_gib() -> float:
    """Peak memory of this process, plus the peak of the largest of its workers."""
    kib = sum(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return kib / 2**20
