"""The training entry: Megatron-Bridge's own loop, with CUDA or on a CPU."""

import os
from collections.abc import Sequence
from pathlib import Path

from megatron.bridge.training.callbacks import Callback
from megatron.bridge.training.config import ConfigContainer
from megatron.bridge.training.pretrain import pretrain
from megatron.bridge.training.vlm_step import forward_step
from megatron.core.dist_checkpointing.strategies.filesystem_async import get_write_results_queue

from ...bridge.mcore import cpu
from ...conversion.formats.hf_files import keep_files
from .checkpoints import CrashSafeCheckpoints, resume
from .log import TrainingLog


def train(config: ConfigContainer, callbacks: Sequence[Callback] = ()) -> None:
    """Train from ``checkpoint.pretrained_checkpoint``, from random weights, or from where ``checkpoint.load`` ends.

    With ``checkpoint.load`` the same folder as ``checkpoint.save``, a run that was killed continues from its newest
    complete checkpoint when it is started again, with the data, random numbers and losses of an unbroken run.

    Args:
        config: complete; on a machine without CUDA its communication settings are adapted (`cpu.adapt_config_for_cpu`).
        callbacks: called by Megatron-Bridge at every step, before our own.
    """
    cpu.adapt_config_for_cpu(config)
    config.checkpoint.custom_manager_class = f"{CrashSafeCheckpoints.__module__}.{CrashSafeCheckpoints.__qualname__}"
    # The queue of Megatron-Core's checkpoint writer is a process. Started here, it is a fork of this one; started by
    # the writer, it imports everything again, which costs every rank some seconds and 320 MB.
    get_write_results_queue("fork")
    resume(config.checkpoint)
    _keep_files(config)
    with cpu.runtime():
        pretrain(config, forward_step, callbacks=[*callbacks, TrainingLog()])


def _keep_files(config: ConfigContainer) -> None:
    """Copy config, tokenizer and processor beside the checkpoints, so that export needs nothing else.

    They are taken from the checkpoint that training starts from, or from the folder of the dataset's processor.
    """
    if config.checkpoint.save is None or int(os.environ.get("RANK", "0")):
        return
    start, processor = config.checkpoint.pretrained_checkpoint, getattr(config.dataset, "processor_path", None)
    folders = [folder for path in (start, processor) if path for folder in (Path(path), *Path(path).glob("iter_*"))]
    keep_files(folders, Path(config.checkpoint.save))
