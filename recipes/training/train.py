"""The training entry: Megatron-Bridge's own loop, with CUDA or on a CPU."""

from ...bridge import plugin  # noqa: F401 - first: it makes Megatron-Bridge importable, and the model known to it

# isort: split

import os
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path

from megatron.bridge.training.callbacks import Callback
from megatron.bridge.training.config import ConfigContainer
from megatron.bridge.training.pretrain import pretrain
from megatron.bridge.utils.common_utils import get_rank_safe
from megatron.core.dist_checkpointing.strategies.filesystem_async import get_write_results_queue
from transformers.utils.hub import cached_file

from ...atomic import naming_full_disk
from ...bridge.mcore import cpu
from ...conversion.formats.hf_files import keep_files
from ...errors import UserError
from .checkpoints import CrashSafeCheckpoints, check_start, resume
from .derive import derive
from .log import TrainingLog
from .step import forward_step


def train(
    config: ConfigContainer,
    callbacks: Sequence[Callback] = (),
    log: Path | None = None,
    report: Callback | None = None,
) -> bool:
    """Train from ``checkpoint.pretrained_checkpoint``, from random weights, or from where ``checkpoint.load`` ends.

    With ``checkpoint.load`` the same folder as ``checkpoint.save``, a run that was killed continues from its newest
    complete checkpoint when it is started again, with the data, random numbers and losses of an unbroken run.

    Args:
        config: complete; on a machine without CUDA its communication settings are adapted (`cpu.adapt_config_for_cpu`).
        callbacks: called by Megatron-Bridge at every step, before our own.
        log: folder for ``metrics.jsonl``; the terminal then has lines of progress too.
        report: called after our own callbacks, when what it reads is in the files.

    Returns:
        Whether all steps are done; else the run was asked to end, is saved, and can be continued.

    Raises:
        UserError: a checkpoint to start from is not there, ``ft`` is on without a rank monitor, the run in
            ``checkpoint.save`` has another processor, Megatron has an optimizer that needs CUDA where there is none, or
            two settings contradict.
    """
    check_start(config.checkpoint)
    _check_rank_monitor(config)
    derive(config)
    cpu.adapt_config_for_cpu(config)
    config.checkpoint.custom_manager_class = f"{CrashSafeCheckpoints.__module__}.{CrashSafeCheckpoints.__qualname__}"
    # The queue of Megatron-Core's checkpoint writer is a process. Started here, it is a fork of this one; started by
    # the writer, it imports everything again, which costs every rank some seconds and 320 MB.
    with _child_processes_bound_to_this_one():
        get_write_results_queue("fork")
    resume(config.checkpoint)
    _keep_files(config)
    folder = config.checkpoint.save
    with cpu.runtime(), naming_full_disk(Path(folder)) if folder else nullcontext():
        try:
            pretrain(config, forward_step, callbacks=[*callbacks, TrainingLog(log), *([report] if report else [])])
        except SystemExit as end:  # by a signal, a time limit or `train.exit_interval`
            if end.code:
                raise
            return False
    return True


def _check_rank_monitor(config: ConfigContainer) -> None:
    if config.ft is not None and config.ft.enable_ft_package and "FT_RANK_MONITOR_IPC_SOCKET" not in os.environ:
        raise UserError("ft.enable_ft_package=true needs a rank monitor: `launch --start ft_launcher` starts them")


@contextmanager
def _child_processes_bound_to_this_one() -> Iterator[None]:
    """Let the processes that are forked inside ignore SIGTERM, and end only with this process.

    SLURM and terminals send SIGTERM to whole process groups; with ``train.exit_signal_handler`` this process saves a
    checkpoint then, for which it needs its children.
    """
    global _is_binding
    handler = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    _is_binding = True
    try:
        yield
    finally:
        _is_binding = False
        signal.signal(signal.SIGTERM, handler)


_is_binding = False
os.register_at_fork(after_in_child=lambda: cpu.die_with_parent() if _is_binding else None)


def _keep_files(config: ConfigContainer) -> None:
    """Copy config, tokenizer and processor beside the checkpoints, so that export needs nothing else.

    The config is that of the checkpoint that training starts from, tokenizer and processor are those of the dataset.
    """
    if config.checkpoint.save is None or get_rank_safe():
        return
    start, processor = config.checkpoint.pretrained_checkpoint, getattr(config.dataset, "processor_path", None)
    if processor is not None:
        processor = Path(str(cached_file(processor, "tokenizer_config.json"))).parent  # it may be a name on the Hub
    folders = [folder for path in (start, processor) if path for folder in (Path(path), *Path(path).glob("iter_*"))]
    keep_files(folders, Path(config.checkpoint.save), processor)
