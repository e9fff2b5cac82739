"""Checkpoints of a run that may be killed at any moment: which of them are complete, and where to continue."""

from ...bridge import plugin  # noqa: F401 - first: it makes Megatron-Bridge importable, and the model known to it

# isort: split

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from megatron.bridge.training.callbacks import CallbackContext, CallbackManager
from megatron.bridge.training.checkpointing import (
    CheckpointLoadContext,
    CheckpointSaveContext,
    DefaultCheckpointManager,
    get_rng_state,
)
from megatron.bridge.training.config import CheckpointConfig
from megatron.bridge.training.utils.checkpoint_utils import (
    checkpoint_exists,
    is_checkpoint_iteration_directory,
    read_run_config,
)
from megatron.bridge.training.utils.pg_utils import get_pg_collection
from megatron.bridge.utils.common_utils import get_rank_safe, print_rank_0
from megatron.core.dist_checkpointing.serialization import load_sharded_metadata

from ...bridge.weight_map import PARAM_GROUPS
from ...errors import UserError
from ...terminal import say
from .changes import Change, as_mapping, changes

IN_PROGRESS = "saving_{step}"
"""A file beside the checkpoints that exists while the checkpoint of that step is incomplete."""


class CrashSafeCheckpoints(DefaultCheckpointManager):
    """Megatron-Bridge's own checkpoints, with a file beside each while it is written.

    Megatron-Bridge 0.6.2 names a checkpoint as the latest before its last file is written, and writes into the tracker
    in place, so a run killed there could not be resumed; by these files `resume` finds the checkpoint before.
    """

    def __init__(self, checkpoint_config: CheckpointConfig) -> None:
        """Called on every rank before any looks for a checkpoint.

        Raises:
            UserError: the ranks have found different checkpoints.
        """
        super().__init__(checkpoint_config)
        _check_same_on_all_ranks(checkpoint_config.load)
        self._in_progress: list[Path] = []
        self._is_registered = False

    def save(self, ctx: CheckpointSaveContext, callback_manager: CallbackManager | None = None) -> None:
        """Save; the file exists from before the first byte until after the last, and is removed before old ones are."""
        assert callback_manager is not None
        if not self._is_registered:
            callback_manager.register("on_checkpoint_save", self._complete)
            self._is_registered = True
        if torch.distributed.get_rank() == 0:
            file = Path(self.checkpoint_config.save, IN_PROGRESS.format(step=int(ctx.state.train_state.step)))
            file.parent.mkdir(parents=True, exist_ok=True)
            file.touch()
            self._in_progress.append(file)
        super().save(ctx, callback_manager)

    def load(self, ctx: CheckpointLoadContext) -> tuple[int, int]:
        """Load, without the random states where they were saved by another layout of ranks.

        The settings of this run are applied where they differ from the checkpoint's, and are named.

        Raises:
            UserError: the optimizer's states are those of the other back end, or of other settings.
        """
        self._refuse_states_of_the_other_back_end(ctx)
        self._leave_foreign_random_states(ctx)
        folder = self._iteration_folder()
        if folder is None or not self.checkpoint_config.load_optim or self.checkpoint_config.finetune:
            return super().load(ctx)
        assert ctx.state.cfg is not None
        saved = compare_rows_with(Path(folder), ctx.state.cfg.dataset)
        if (found := changes_since(Path(folder), ctx.state.cfg)) and get_rank_safe() == 0:
            say(f"Continuing with other settings: {'; '.join(map(str, found))}")
        with _learning_rates_of(saved, ctx.optimizer, ctx.state.cfg):
            loaded = super().load(ctx)
        _say_what_is_read(saved["dataset"], ctx.state.cfg.dataset, ctx.state.train_state.consumed_train_samples)
        if ctx.opt_param_scheduler is not None:
            ctx.opt_param_scheduler.step(increment=0)  # the learning rates of the next step, by this run's settings
        return loaded

    def _complete(self, context: CallbackContext) -> None:
        # Checkpoints are completed in their order. Only files of this run are removed: one of an earlier run may belong
        # to a checkpoint that this run has not reached yet.
        if self._in_progress:
            self._in_progress.pop(0).unlink()

    def _refuse_states_of_the_other_back_end(self, ctx: CheckpointLoadContext) -> None:
        """Refuse optimizer states that would be loaded into other parameters.

        The back ends have the same parameters in another order, and Megatron-Core's default format addresses optimizer
        states by their offset in a buffer of all parameters.
        """
        config, folder = self.checkpoint_config, self._iteration_folder()
        if folder is None or not config.load_optim or config.dist_ckpt_optim_fully_reshardable:
            return
        saved = read_run_config(str(Path(folder, "run_config.yaml")))["model"]["transformer_impl"]
        assert ctx.state.cfg is not None
        mine = ctx.state.cfg.model.transformer_impl
        if saved != mine:
            raise UserError(
                f"The optimizer states in {folder} were saved with transformer_impl={saved!r}; this run has {mine!r}. "
                "Set the same `backend`, or checkpoint.load_optim=False, or save with "
                "checkpoint.dist_ckpt_optim_fully_reshardable=True."
            )

    def _iteration_folder(self) -> str | None:
        """The iteration folder that is loaded, if it is known before Megatron-Bridge looks for it."""
        folder, step = self.checkpoint_config.load, self.checkpoint_config.ckpt_step
        if folder is not None and step is not None:
            folder = str(Path(folder, f"iter_{step:07d}"))
        return folder if folder is not None and is_checkpoint_iteration_directory(folder) else None

    def _leave_foreign_random_states(self, ctx: CheckpointLoadContext) -> None:
        """Megatron-Bridge does so where tensor or pipeline parallelism differ, and fails where only others do."""
        config, folder = ctx.state.cfg, self._iteration_folder()
        assert config is not None
        if folder is None:
            return
        mine = get_rng_state(config.rng.data_parallel_random_init, pg_collection=get_pg_collection(ctx.model))
        if mine.unique_key not in load_sharded_metadata(folder):
            print_rank_0(f"The random states in {folder} are of another layout of ranks; they start from the seed.")
            self.checkpoint_config.load_rng = False


def _check_same_on_all_ranks(load: str | None) -> None:
    """Each rank has looked for the newest checkpoint by itself, and a network file system may show it late."""
    mine = load if load is not None and checkpoint_exists(load) else "none"
    found = [mine] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(found, mine)
    if len({*found}) > 1:
        folders = ", ".join(sorted({*found}))
        raise UserError(f"The ranks would continue from different checkpoints ({folders}); start the run again.")


def changes_since(folder: Path, config: Any) -> list[Change]:
    """The settings that differ from those of a checkpoint and are applied when a run continues from it.

    Args:
        folder: of the iteration.
        config: of the run, validated.

    Raises:
        UserError: the run cannot be continued with one of them, or the checkpoint has no optimizer states.
    """
    found = changes(read_run_config(str(folder / "run_config.yaml")), config)
    refused = [str(change) for change in found if change.is_refused]
    if not any("optimizer" in key for key in load_sharded_metadata(str(folder))):
        refused = ["it has no optimizer states"]
    if refused:
        raise UserError(
            f"{folder} cannot be continued, as {', '.join(refused)}; continue with its settings, or start another run "
            f"from its weights: weights={folder} and another out=DIR (in a configuration: "
            "checkpoint.pretrained_checkpoint in place of checkpoint.load)"
        )
    return found


def compare_rows_with(folder: Path, dataset: Any) -> dict[str, Any]:
    """Let a dataset refuse other usable rows than those of a checkpoint; return the checkpoint's configuration.

    Args:
        folder: of the iteration. Checkpoints that were saved without usable rows are compared with nothing.
        dataset: of the run that continues it.
    """
    saved = read_run_config(str(folder / "run_config.yaml"))
    dataset.rows_before = (saved.get("dataset") or {}).get("usable_rows")  # a converted checkpoint has no dataset
    return saved


def _say_what_is_read(saved: dict[str, Any], dataset: Any, place: int) -> None:
    """Name the samples that are read again, or left out, where the sources of the data have changed."""
    sources = (saved.get("sources"), getattr(dataset, "sources", None))
    if not any(sources) or sources[0] == sources[1]:
        return
    sentences = dataset.describe_change(saved, place)
    if sentences and get_rank_safe() == 0:
        say(f"With other sources {'; '.join(sentences)}")


@contextmanager
def _learning_rates_of(saved: dict[str, Any], optimizer: Any, config: Any) -> Iterator[None]:
    """Give the groups of an optimizer the learning rates of a checkpoint inside this context.

    Megatron-Core 0.19.2 finds the saved group of a group by its rates, among others, and takes them over from it.

    Raises:
        UserError: with other factors the parameters would be in other groups.
    """
    mine, theirs = _rates(as_mapping(config)), _rates(saved)
    there = {rates: theirs[group] for group, rates in mine.items()}
    back = {rates: mine[group] for group, rates in theirs.items()}
    if any(there[mine[group]] != theirs[group] or back[theirs[group]] != mine[group] for group in mine):
        raise UserError(
            f"The factors of the learning rate were {theirs} and are {mine}, which gives the optimizer other groups of "
            "parameters; keep equal factors equal, or start another run from the checkpoint's weights"
        )
    _exchange_rates(optimizer, there)
    yield
    _exchange_rates(optimizer, back)


def _rates(config: dict[str, Any]) -> dict[str, tuple[float, float]]:
    """Largest and least learning rate of each group that has a factor."""
    rates, factors = config["optimizer"], config["optimizer_config_override_provider"] or {}
    return {
        group: (rates["lr"] * factors[group], (rates["min_lr"] or 0.0) * factors[group])
        for group in PARAM_GROUPS
        if group in factors
    }


def _exchange_rates(optimizer: Any, rates: dict[tuple[float, float], tuple[float, float]]) -> None:
    for group in optimizer.param_groups:
        if group.get("max_lr") is not None:
            group["max_lr"], group["min_lr"] = rates[group["max_lr"], group["min_lr"]]


def check_start(checkpoint: CheckpointConfig) -> None:
    """Refuse a checkpoint to start from that is not there; Megatron-Bridge 0.6.2 would train random weights.

    ``load`` may be empty where it is also the folder to save in: the run begins there, and later continues.

    Raises:
        UserError: with the field and the folder.
    """
    starts = {"pretrained_checkpoint": checkpoint.pretrained_checkpoint}
    if checkpoint.load != checkpoint.save:
        starts["load"] = checkpoint.load
    for field, folder in starts.items():
        if folder is not None and not checkpoint_exists(folder):
            raise UserError(
                f"checkpoint.{field}={folder} is no Megatron checkpoint; name the folder with "
                "latest_train_state.pt, or one of its iteration folders"
            )


def resume(checkpoint: CheckpointConfig) -> None:
    """Set ``load``, when it is a folder of checkpoints, to the newest complete one in it, and print which.

    A folder without any is left to Megatron-Bridge, which then takes ``pretrained_checkpoint`` or random weights.
    """
    if checkpoint.load is None or checkpoint.ckpt_step is not None:
        return
    folder = Path(checkpoint.load)
    newest = newest_complete(folder)
    if newest is not None:
        step, checkpoint.load = newest[0], str(newest[1])
        print_rank_0(f"Continuing after step {step}, from {checkpoint.load}")
    elif any(folder.glob(IN_PROGRESS.format(step="*"))):
        print_rank_0(f"No checkpoint in {folder} is complete; starting at step 0.")
        checkpoint.load = None


def newest_complete(folder: Path) -> tuple[int, Path] | None:
    """Step and folder of the newest complete checkpoint in a folder of checkpoints; None if there is none."""
    unfinished = _by_step(folder.glob(IN_PROGRESS.format(step="*")), IN_PROGRESS.format(step=r"(\d+)")).keys()
    # The run's configuration is the last file that is written.
    written = (file.parent for file in folder.glob("iter_*/run_config.yaml"))
    saved = _by_step(written, r"iter_(\d{7})")  # not a copy, such as iter_0000100_best
    complete = saved.keys() - unfinished
    return (max(complete), saved[max(complete)]) if complete else None


def start_of(checkpoint: CheckpointConfig) -> tuple[int, Path] | None:
    """Step and folder of the checkpoint from which a run in ``save`` continues; None where it begins.

    Raises:
        UserError: ``ckpt_step`` is not there.
    """
    assert checkpoint.save is not None
    folder, step = Path(checkpoint.save), checkpoint.ckpt_step
    if step is None:
        return newest_complete(folder)
    place, is_unfinished = folder / f"iter_{step:07d}", (folder / IN_PROGRESS.format(step=step)).exists()
    if is_unfinished or not (place / "run_config.yaml").is_file():
        raise UserError(f"checkpoint.ckpt_step={step}: {folder} has no complete checkpoint of that step")
    return step, place


def consumed_by(folder: Path) -> int:
    """Samples, or packs, that the steps up to a checkpoint have consumed; `folder` is that of the iteration."""
    return int(torch.load(folder / "train_state.pt", weights_only=True)["consumed_train_samples"])


def _by_step(paths: Iterable[Path], pattern: str) -> dict[int, Path]:
    """Paths whose names match, by the step that the pattern's group finds."""
    return {int(found[1]): path for path in paths if (found := re.fullmatch(pattern, path.name))}
