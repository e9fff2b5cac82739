"""A run: one stage or several, each from the weights of the one before, in a folder from which the run continues."""

from ...bridge import plugin  # noqa: F401 - first: it makes Megatron-Bridge importable, and the model known to it

# isort: split

import copy
import datetime
import fcntl
import os
import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from megatron.bridge.training.callbacks import Callback
from megatron.bridge.training.config import ConfigContainer
from megatron.bridge.utils.common_utils import get_master_addr_safe, get_master_port_safe

from ...bridge.mcore import cpu
from ...errors import UserError
from ...terminal import say
from ..data.megatron import on_rank_0
from . import outcome, ranks
from .changes import ARCHITECTURE
from .checkpoints import changes_since, compare_rows_with, consumed_by, start_of
from .derive import derive
from .failures import first_failure
from .heartbeat import Heartbeat
from .plan import Hardware, Plan, check_processor, complete_steps, plan, validate
from .report import FINISHED, SAVED, Report
from .settings import settings_of
from .stop_signals import EXIT_TO_BE_CONTINUED, Stopped
from .stopping import stop_requests
from .train import train
from .weights import start_from, take_architecture

CHECKPOINTS = "checkpoints"


@dataclass(frozen=True, kw_only=True, slots=True)
class Stage:
    """A recipe with the user's settings.

    Attributes:
        name: of its folder, where a run has several.
        config: of the recipe, settings applied.
        given: names of the fields that the user has set.
        needs_weights: whether it may not start from random weights.
        tokens: length of the stage in tokens, or None.
        epochs: length in passes over the data, or None.
        hardware: what the recipe is for.
        recipe: its name.
        recipe_settings: of the recipe, without the user's.
    """

    name: str
    config: ConfigContainer
    given: frozenset[str]
    needs_weights: bool
    tokens: int | None = None
    epochs: float | None = None
    hardware: Hardware
    recipe: str = ""
    recipe_settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def stated(self) -> set[str]:
        """The settings that are in a file of its configuration whatever their value."""
        return {*self.given, *self.recipe_settings}


def run(
    stages: Sequence[Stage],
    out: Path,
    *,
    weights: Path | None = None,
    seconds: float | None = None,
    hang: float | None = None,
) -> int:
    """Train the stages that are not finished.

    Args:
        stages: one after the other; each starts from the weights of the one before.
        out: folder of the run. Started again with the same folder, it continues.
        weights: Megatron checkpoint that the first stage starts from; None for random weights.
        seconds: time limit, after which the run is saved and ends.
        hang: seconds of the longest step; a longer one ends the run as failed.

    Returns:
        0 when all stages are finished, `EXIT_TO_BE_CONTINUED` when the run was asked to end and is saved.

    Raises:
        UserError: a configuration, the data, the weights or the folder cannot be used.
    """
    with _locked(out), first_failure(out), ExitStack() as stack:
        callbacks: list[Callback] = [stack.enter_context(stop_requests(seconds))]
        if hang is not None:
            log = stack.enter_context((out / "logs" / f"rank-{ranks.rank()}.txt").open("a"))
            callbacks.append(Heartbeat(out, hang, log))
        try:
            stack.enter_context(_process_group(stages[0].config))
            for stage, folder in zip(stages, folders_of(stages, out), strict=True):
                if not _train_stage(stage, folder, out, weights, callbacks):
                    _end(out, outcome.SAVED, f"{out} is saved; the same command continues it")
                    return EXIT_TO_BE_CONTINUED
                weights = folder / CHECKPOINTS
            _end(out, outcome.FINISHED)
        except Stopped:
            _end(out, outcome.SAVED, f"Stopped before the first step; the same command continues {out}")
            if ranks.world_size() > 1:
                os._exit(EXIT_TO_BE_CONTINUED)  # others may wait for this rank, which then waits at its end
            return EXIT_TO_BE_CONTINUED
    return 0


def dry_run(stages: Sequence[Stage], out: Path, *, weights: Path | None = None) -> Iterator[tuple[str, Plan]]:
    """Check all stages as `run` does before it trains; yield name and plan of each.

    Raises:
        UserError: as of `run`.
    """
    first, before = stages[0].config, out
    with TemporaryDirectory() as digits:
        for stage, folder in zip(stages, folders_of(stages, out), strict=True):
            config, is_first = copy.deepcopy(stage.config), stage is stages[0]
            start = weights if is_first else before / CHECKPOINTS
            _check_weights(stage, start)
            if not is_first:
                _take_over(config, first)
            complete(config, stage, folder, Path(digits), weights)
            check_processor(config)
            if start is not None:  # Megatron-Bridge wants a folder that exists
                config.checkpoint.pretrained_checkpoint = str(start) if start.exists() else digits
            yield stage.name, plan(config, stage.hardware, out, stage.given, _would_start(config, stage, start))
            first, before = config if is_first else first, folder


def _take_over(config: ConfigContainer, first: ConfigContainer) -> None:
    """Let a later stage of a dry run have what it takes from the stage before, whose checkpoint is not there yet."""
    fields = {name: getattr(first.model, name) for name in sorted(ARCHITECTURE & {*vars(first.model)})}
    take_architecture(config, fields, "The model of the stage before")
    if config.dataset.processor_path is None:
        config.dataset.processor_path = first.dataset.processor_path


def _would_start(config: ConfigContainer, stage: Stage, weights: Path | None) -> str:
    """What a stage of a dry run would start from.

    Raises:
        UserError: its folder has a run that cannot be continued with this configuration.
    """
    done = start_of(config.checkpoint)
    if done is None:
        return _start(None, weights)
    config.dataset.fingerprint = config.dataset.fingerprint_of_data()
    compare_rows_with(done[1], config.dataset)
    found = changes_since(done[1], validate(config, stage.hardware, stage.given))
    return "; ".join([_start(done, weights), *map(str, found)])


def _start(done: tuple[int, Path] | None, weights: Path | None) -> str:
    return f"after step {done[0]}" if done else f"from {weights}" if weights else "from random weights"


def derived(stage: Stage) -> ConfigContainer:
    """The configuration of a stage with what follows from its settings; paths stay as they are."""
    config = copy.deepcopy(stage.config)
    derive(config, stage.given, stage.recipe_settings)
    if stage.tokens is not None:
        complete_steps(config, stage.tokens, None)
    return config


def folders_of(stages: Sequence[Stage], out: Path) -> list[Path]:
    """The folder of each stage: that of the run, or in it one with the name of the stage."""
    return [out] if len(stages) == 1 else [out / stage.name for stage in stages]


def complete(config: ConfigContainer, stage: Stage, folder: Path, digits: Path, weights: Path | None) -> None:
    """Set, in place, what a recipe leaves open: paths, weights to start from, length, and what follows from these.

    Args:
        config: of the stage.
        stage: with the user's settings.
        folder: of the stage.
        digits: where the digits are written, if they are the data.
        weights: Megatron checkpoint, or None.

    Raises:
        UserError: weights or data cannot be used, or two settings contradict each other.
    """
    if weights is not None:
        start_from(config, weights)
    config.checkpoint.save = config.checkpoint.load = str(folder / CHECKPOINTS)
    config.logger.tensorboard_dir = str(folder / "tensorboard")
    if getattr(config.dataset, "folder", "") is None:
        config.dataset.folder = str(digits)
    derive(config, stage.given, stage.recipe_settings)
    config.dataset.prepare()
    if stage.tokens is not None or stage.epochs is not None:
        done = start_of(config.checkpoint)
        before = (0, 0) if done is None else (done[0], consumed_by(done[1]))
        complete_steps(config, stage.tokens, stage.epochs, *before)


def _check_weights(stage: Stage, weights: Path | None) -> None:
    if weights is None and (stage.needs_weights or stage.config.peft is not None):
        raise UserError(
            f"{stage.name} starts from weights: name a Megatron checkpoint with weights=DIR (`gpt-oss-vision convert "
            "import` makes one), or a stage before it, as in `train RECIPE,RECIPE`"
        )


def _train_stage(stage: Stage, folder: Path, out: Path, weights: Path | None, callbacks: Sequence[Callback]) -> bool:
    """Train a stage unless it is finished; return whether it is."""
    _check_weights(stage, weights)
    config = stage.config
    complete(config, stage, folder, out / "digits", weights)
    check_processor(config)
    config.dataset.fingerprint = on_rank_0(config.dataset.fingerprint_of_data)
    config.train.exit_signal_handler = config.train.exit_signal_handler_for_dataloader = True
    checked = validate(config, Hardware(ranks=ranks.world_size()), stage.given)
    done, steps = start_of(config.checkpoint), config.train.train_iters
    if done is not None and done[0] >= steps:
        found = changes_since(done[1], checked)
        _say(f"{stage.name} is finished: {done[0]} steps are in {done[1]}; train longer with train.train_iters=N")
        if found:
            _say(f"It was trained with other settings, and those of now have no effect: {'; '.join(map(str, found))}")
        return True
    _say(f"Training {stage.name} to step {steps}, {_start(done, weights)}, in {folder}")
    report = Report(folder, stage.recipe, settings_of(config, stage.stated), stage.recipe_settings)
    is_finished = train(config, callbacks=callbacks, log=folder, report=report)
    report.write(FINISHED if is_finished else SAVED)
    if is_finished:
        _say(f"{stage.name} is finished: {steps} steps are in {folder / CHECKPOINTS}")
    return is_finished


def _end(out: Path, how: str, sentence: str = "") -> None:
    if outcome.write(outcome.file_of(out), how, sentence) and sentence:
        say(sentence)


def _say(sentence: str) -> None:
    if ranks.rank() == 0:
        say(sentence)


@contextmanager
def _locked(out: Path) -> Iterator[None]:
    """Keep other runs out of a folder.

    Raises:
        UserError: another run is in it.
    """
    if ranks.rank():
        yield
        return
    out.mkdir(parents=True, exist_ok=True)
    with (out / "lock").open("a+") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # of this process alone, not of its children
        except (BlockingIOError, PermissionError):
            file.seek(0)
            sentence = f"{out} is in use by {file.read()}; wait for it, or name another folder with out=DIR"
            if outcome.VARIABLE in os.environ:  # else the file is that of the other run
                outcome.write(outcome.file_of(out), outcome.REFUSED, sentence)
            raise UserError(sentence) from None
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        yield


@contextmanager
def _process_group(config: ConfigContainer) -> Iterator[None]:
    """One process group for all stages: a second one would find the addresses of the first in `torchrun`'s store."""
    backend = "nccl" if cpu.cuda_is_real() else "gloo"
    if backend == "nccl":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    os.environ.setdefault("MASTER_ADDR", get_master_addr_safe())
    os.environ.setdefault("MASTER_PORT", str(get_master_port_safe()))
    minutes = datetime.timedelta(minutes=config.dist.distributed_timeout_minutes)
    torch.distributed.init_process_group(backend, timeout=minutes)
    yield  # after an exception the group stays: destroying it would wait for the other ranks
    torch.distributed.barrier()  # launchers kill the ranks that still write when the first one has ended
    torch.distributed.destroy_process_group()
