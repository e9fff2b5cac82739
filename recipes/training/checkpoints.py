"""Checkpoints of a run that may be killed at any moment: which of them are whole, and where to go on."""

from ...bridge import plugin  # noqa: F401 - first: it makes Megatron-Bridge importable, and the model known to it

# isort: split

from pathlib import Path

import torch
from megatron.bridge.training.callbacks import CallbackContext, CallbackManager
from megatron.bridge.training.checkpointing import (
    CheckpointLoadContext,
    CheckpointSaveContext,
    DefaultCheckpointManager,
    get_rng_state,
)
from megatron.bridge.training.config import CheckpointConfig
from megatron.bridge.training.utils.checkpoint_utils import is_checkpoint_iteration_directory
from megatron.bridge.training.utils.pg_utils import get_pg_collection
from megatron.bridge.utils.common_utils import print_rank_0
from megatron.core.dist_checkpointing.serialization import load_sharded_metadata

MARK = "saving_{step}"
"""A file beside the checkpoints, there while the checkpoint of that step is not whole."""


class MarkedCheckpoints(DefaultCheckpointManager):
    """Megatron-Bridge's own checkpoints, marked while they are written.

    Megatron-Bridge 0.6.2 names a checkpoint as the latest before its last file is written, and writes into the tracker
    in place. A run killed there could not be resumed; with the marks it goes on from the checkpoint before.
    """

    def __init__(self, checkpoint_config: CheckpointConfig) -> None:
        super().__init__(checkpoint_config)
        self._marks: list[Path] = []
        self._is_told = False

    def save(self, ctx: CheckpointSaveContext, callback_manager: CallbackManager | None = None) -> None:
        """Save; the mark stands from before the first byte until after the last, and is gone before old ones go."""
        assert callback_manager is not None
        if not self._is_told:
            callback_manager.register("on_checkpoint_save", self._unmark)
            self._is_told = True
        if torch.distributed.get_rank() == 0:
            mark = Path(self.checkpoint_config.save, MARK.format(step=int(ctx.state.train_state.step)))
            mark.parent.mkdir(parents=True, exist_ok=True)
            mark.touch()
            self._marks.append(mark)
        super().save(ctx, callback_manager)

    def load(self, ctx: CheckpointLoadContext) -> tuple[int, int]:
        """Load, without the random states where the ranks are laid out otherwise than they were."""
        self._leave_foreign_random_states(ctx)
        return super().load(ctx)

    def _unmark(self, context: CallbackContext) -> None:
        # Checkpoints are finished in their order. Only the marks of this run: an older one may stand at a checkpoint
        # that this run has not come to yet.
        if self._marks:
            self._marks.pop(0).unlink()

    def _leave_foreign_random_states(self, ctx: CheckpointLoadContext) -> None:
        """Megatron-Bridge does so where tensor or pipeline parallelism differ, and fails where only others do."""
        config, folder = ctx.state.cfg, self.checkpoint_config.load
        assert config is not None
        if folder is None or not is_checkpoint_iteration_directory(folder):
            return
        mine = get_rng_state(config.rng.data_parallel_random_init, pg_collection=get_pg_collection(ctx.model))
        if mine.unique_key not in load_sharded_metadata(folder):
            print_rank_0(f"The random states in {folder} are of another layout; they start from the seed.")
            self.checkpoint_config.load_rng = False


def resume(checkpoint: CheckpointConfig) -> None:
    """Point ``load``, when it is a folder of checkpoints, to the newest one in it that is whole, and say which.

    A folder without any is left to Megatron-Bridge, which then takes ``pretrained_checkpoint`` or random weights.
    """
    if checkpoint.load is None or checkpoint.ckpt_step is not None:
        return
    folder = Path(checkpoint.load)
    unfinished = {_step(mark) for mark in folder.glob(MARK.format(step="*"))}
    # The run's configuration is the last file that is written.
    saved = {_step(file.parent): file.parent for file in folder.glob("iter_*/run_config.yaml")}
    whole = saved.keys() - unfinished
    if whole:
        checkpoint.load = str(saved[max(whole)])
        print_rank_0(f"Going on after step {max(whole)}, from {checkpoint.load}")
    elif unfinished:
        print_rank_0(f"No checkpoint in {folder} is whole; starting at step 0.")
        checkpoint.load = None


def _step(path: Path) -> int:
    return int(path.name.rpartition("_")[2])
