"""The training entry: Megatron-Bridge's own loop, on whatever this machine has."""

from ...bridge import plugin  # noqa: F401 - first: it makes Megatron-Bridge importable, and the model known to it

# isort: split

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
from .checkpoints import MarkedCheckpoints, resume
from .log import TrainingLog


def train(config: ConfigContainer, callbacks: Sequence[Callback] = ()) -> None:
    """Train as ``config`` says, from ``checkpoint.pretrained_checkpoint`` or from random weights, or go on.

    With ``checkpoint.load`` the same folder as ``checkpoint.save``, a run that was killed goes on from its newest whole
    checkpoint when it is started again, with the data, random numbers and losses of a run that was never stopped.

    Args:
        config: complete; on a machine without CUDA its communication settings are adapted (`cpu.adapt_config_for_cpu`).
        callbacks: told of every step by Megatron-Bridge, before our own.
    """
    cpu.adapt_config_for_cpu(config)
    config.checkpoint.custom_manager_class = f"{MarkedCheckpoints.__module__}.{MarkedCheckpoints.__qualname__}"
    # The queue of Megatron-Core's checkpoint writer is a process. Made now, it is a fork of this one; made by the
    # writer, it is a new one that imports everything again, which takes every rank some seconds and 320 MB.
    get_write_results_queue("fork")
    resume(config.checkpoint)
    _keep_files(config)
    with cpu.runtime():
        pretrain(config, forward_step, callbacks=[*callbacks, TrainingLog()])


def _keep_files(config: ConfigContainer) -> None:
    """Put config, tokenizer and processor beside the checkpoints, so that these can be exported by themselves.

    They are taken from the checkpoint that training starts from, or from the folder of the dataset's processor.
    """
    if config.checkpoint.save is None or int(os.environ.get("RANK", "0")):
        return
    start, processor = config.checkpoint.pretrained_checkpoint, getattr(config.dataset, "processor_path", None)
    folders = [folder for path in (start, processor) if path for folder in (Path(path), *Path(path).glob("iter_*"))]
    keep_files(folders, Path(config.checkpoint.save))
