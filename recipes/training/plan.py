"""What a run would do, found by the checks of the run itself: layout, memory, data, steps, disk. Needs no GPU."""

from ...bridge import plugin  # noqa: F401 - first: it makes Megatron-Bridge importable, and the model known to it

# isort: split

import copy
import math
import os
import shutil
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from megatron.bridge.training.config import ConfigContainer, runtime_config_update

from ...bridge.mcore import cpu
from ...bridge.mcore.activations import images_of_full_row
from ...bridge.mcore.backend import planned_for_gpu
from ...bridge.mcore.flops import decoder_flops, image_training_flops
from ...bridge.mcore.memory import GIB, MemoryEstimate, memory_per_rank, parameters_of_stage
from ...errors import UserError
from ..data.megatron import Counts
from ..data.packing import PackStatistics
from .uncounted import uncounted

TRACKERS = {
    "wandb": ("wandb_project",),
    "mlflow": tuple(f"mlflow_{name}" for name in ("experiment", "run_name", "tracking_uri", "tags", "description")),
    "comet_ml": tuple(f"comet_{name}" for name in ("project", "experiment_name", "workspace", "api_key", "tags")),
}
"""Packages, and the settings of the section `logger` by which Megatron-Bridge imports them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Hardware:
    """Where a run would run.

    Attributes:
        ranks: one per GPU, or per process on a CPU.
        gpu: name of the GPU; None for a CPU.
        memory: GiB that a process may allocate on it; None without a limit.
        tflops: operations per second, in 10^12, that are assumed for a GPU.
    """

    ranks: int
    gpu: str | None = None
    memory: float | None = None
    tflops: float | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Cost:
    """What the steps of a run cost. Tokens count padding.

    Attributes:
        flops_per_token: with the tower's of `images_per_row`.
        flops_per_image: of tower and projection.
        images_per_row: the mean; None where the data are not known.
        most_images: of a row, for the memory.
        uncounted: settings that the memory does not count.
    """

    hardware: Hardware
    memory: MemoryEstimate
    parameters: int
    steps: int
    batch: int
    tokens_per_step: int
    tokens_per_image: int
    flops_per_token: float
    flops_per_image: float
    images_per_row: float | None
    most_images: int
    uncounted: list[str]

    @property
    def gpu_hours_per_billion_tokens(self) -> float | None:
        """By the rate that is assumed for the GPU; None on a CPU."""
        rate = self.hardware.tflops
        return None if rate is None else 1e9 * self.flops_per_token / (rate * 1e12) / 3600

    def problems(self) -> list[str]:
        """Why the run would fail, a sentence each."""
        limit = self.hardware.memory
        if limit is None or self.memory.total / GIB <= limit:
            return []
        where = f"and an {self.hardware.gpu} gives {limit:.0f} GiB"
        less = "use more expert, tensor or pipeline parallelism, recomputation, or a shorter sequence"
        return [f"The rank that needs most needs {self.memory}, {where}: {less}"]

    def lines(self) -> Iterator[tuple[str, str]]:
        """Titles and values."""
        hardware, tokens = self.hardware, self.steps * self.tokens_per_step
        ranks = f"{hardware.ranks} {hardware.gpu or 'on a CPU'}"
        count, unit = (self.parameters / 1e9, "B") if self.parameters >= 1e8 else (self.parameters / 1e6, "M")
        yield "ranks", f"{ranks}; {count:.2f}{unit} parameters in all"
        limit = f"; {hardware.memory:.0f} GiB are usable" if hardware.memory else ""
        yield "memory", f"{self.memory} on the rank that needs most{limit}"
        image = f"; an image is {self.tokens_per_image} of them" if self.tokens_per_image else ""
        yield "steps", f"{self.steps:,} of {self.batch:,} rows, {self.tokens_per_step:,} tokens{image}"
        yield from self._lines_of_images()
        flops, is_text = self.flops_per_token, self.tokens_per_image and self.images_per_row is None
        text = " of text" if is_text else ""
        yield "operations", f"{flops:.3g} FLOPs per token{text}, {flops * tokens:.3g} for {tokens:,} tokens"
        if (hours := self.gpu_hours_per_billion_tokens) is not None:
            rate = f"at {hardware.tflops:.0f} TFLOP/s per GPU{', without the tower' if is_text else ''}"
            yield "GPU-hours", f"{hours:.1f} per billion tokens, {hours * tokens / 1e9:,.0f} in all ({rate})"
        if self.uncounted:
            yield "not counted", f"the estimate of memory does not count {', '.join(self.uncounted)}"

    def _lines_of_images(self) -> Iterator[tuple[str, str]]:
        if not self.tokens_per_image:
            return
        each = f"the tower takes {self.flops_per_image:.3g} FLOPs for one"
        if self.images_per_row is None:
            yield (
                "images",
                f"memory is for {self.most_images} in every row, as many as fit; {each}, which are not counted",
            )
        else:
            yield "images", f"{self.images_per_row:.1f} in a row, at most {self.most_images}; {each}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """A run in numbers. Sizes in bytes."""

    start: str
    cost: Cost
    rows: int
    held_out: dict[str, int]
    skipped: int
    images: int
    packs: PackStatistics | None
    of_sources: dict[str, int]
    checkpoint_size: float
    checkpoints: int
    free_disk: float

    def problems(self) -> list[str]:
        """Why the run would fail apart from the disk, a sentence each; none where it would not."""
        return self.cost.problems()

    def lines(self) -> Iterator[tuple[str, str]]:
        """Titles and values."""
        yield "starts", self.start
        yield from self.cost.lines()
        batch_rows = self.rows if self.packs is None else self.packs.packs
        epochs = self.cost.steps * self.cost.batch / batch_rows
        yield (
            "data",
            f"{self.rows:,} rows with {self.images:,} images, {self.skipped:,} rows are skipped; {epochs:.2f} epochs",
        )
        if len(self.of_sources) > 1:
            yield "an epoch", ", ".join(f"{rows:,} rows of {title}" for title, rows in self.of_sources.items())
        if self.held_out:
            yield "held out", ", ".join(f"{rows:,} rows for {what}" for what, rows in self.held_out.items())
        if self.packs is not None:
            yield "packs", str(self.packs)
        per_step = self.images / batch_rows * self.cost.batch * self.cost.tokens_per_image
        yield "image tokens", f"{per_step:,.0f} per step, {per_step / self.cost.tokens_per_step:.1%} of all"
        size, free = self.checkpoint_size / GIB, self.free_disk / GIB
        yield "checkpoints", f"{self.checkpoints} of {size:.2f} GiB; {free:,.0f} GiB are free"


def disk_problems(stages: Sequence[Plan]) -> list[str]:
    """Why the checkpoints of all stages of a run would not fit, a sentence or none."""
    free = stages[0].free_disk
    if sum(stage.checkpoint_size * stage.checkpoints for stage in stages) <= free:
        return []
    needed = " and ".join(
        f"{stage.checkpoints} checkpoints of {stage.checkpoint_size / GIB:.1f} GiB" for stage in stages
    )
    less = "keep fewer by checkpoint.most_recent_k, or name another disk by out=DIR"
    return [f"{needed} do not fit the {free / GIB:.1f} GiB that are free: {less}"]


def validate(config: ConfigContainer, hardware: Hardware, given: Collection[str] = ()) -> ConfigContainer:
    """Return a copy of a configuration as Megatron-Bridge completes and checks it before it trains.

    Args:
        config: complete.
        hardware: where it would run.
        given: names of the fields that the user has set.

    Raises:
        UserError: with what Megatron-Bridge, or this package, refuses; or a setting of the user would have no effect.
    """
    _check_ranks(config, hardware.ranks)
    _check_trackers(config.logger)
    if config.ddp.use_distributed_optimizer and config.optimizer.optimizer == "sgd":
        raise UserError(
            "optimizer.optimizer=sgd needs ddp.use_distributed_optimizer=false and "
            "optimizer.use_distributed_optimizer=false; Megatron-Core shards the states of Adam alone"
        )
    checked = copy.deepcopy(config)
    is_elsewhere = hardware.gpu is not None and not cpu.cuda_is_real()
    if not is_elsewhere:
        cpu.adapt_config_for_cpu(checked)
    asked = {name: value for name in given if isinstance(value := _value_of(checked, name), PLAIN)}
    with planned_for_gpu() if is_elsewhere else nullcontext(), _world_of(hardware.ranks):
        try:
            runtime_config_update(checked)
        except UserError:
            raise
        except (AssertionError, ValueError, RuntimeError) as error:
            raise UserError(f"Megatron-Bridge refuses this configuration: {' '.join(str(error).split())}") from error
    _check_effect(asked, checked)
    return checked


PLAIN = (bool, int, float, str, torch.dtype)
"""Types of values that are compared; a text may be the short form of an object, such as a pipeline layout."""


def _value_of(config: ConfigContainer, name: str) -> Any:
    section, _, field = name.partition(".")
    return getattr(getattr(config, section, None), field, None) if field else None


def _check_effect(asked: Mapping[str, Any], config: ConfigContainer) -> None:
    """Check that what the user has set is what is trained with.

    Raises:
        UserError: another setting has replaced it.
    """
    for name, value in asked.items():
        now = _value_of(config, name)
        if now == value or not (now is None or isinstance(now, PLAIN)):
            continue
        field = name.rpartition(".")[2]
        of_precision = hasattr(config.mixed_precision, field)
        place = f"mixed_precision.{field}" if of_precision else "the setting that it follows from"
        raise UserError(f"{name}={value} has no effect, as it becomes {now}; set {place}")


def _check_trackers(logger: Any) -> None:
    """Check that the package of each tracker that is configured is installed.

    Raises:
        UserError: it is not.
    """
    for package, names in TRACKERS.items():
        name = next((name for name in names if getattr(logger, name)), None)
        if name is not None and find_spec(package) is None:
            raise UserError(
                f"logger.{name} needs the package {package}, which is not installed; install it, or leave the setting "
                "out: metrics.jsonl and TensorBoard have the loss"
            )


def _check_ranks(config: ConfigContainer, ranks: int) -> None:
    """Check that layout and batch divide the ranks.

    Raises:
        UserError: with the numbers.
    """
    model, train = config.model, config.train
    shared = model.tensor_model_parallel_size * model.pipeline_model_parallel_size * model.context_parallel_size
    experts = model.pipeline_model_parallel_size * model.expert_model_parallel_size
    experts *= model.expert_tensor_parallel_size or 1
    for size, names in ((shared, "tensor · pipeline · context"), (experts, "pipeline · expert · expert-tensor")):
        if ranks % size:
            raise UserError(f"{ranks} ranks are no multiple of the {size} of {names} parallelism")
    at_once = train.micro_batch_size * (ranks // shared)
    if train.global_batch_size % at_once:
        raise UserError(
            f"train.global_batch_size={train.global_batch_size} is no multiple of the {at_once} rows of a microbatch "
            f"(train.micro_batch_size={train.micro_batch_size} · {ranks // shared} data-parallel ranks)"
        )


def check_processor(config: ConfigContainer) -> None:
    """Check that the processor of the data is one for this model.

    Raises:
        UserError: with both numbers.
    """
    dataset, model = config.dataset, config.model
    processor = dataset.processor()
    placeholders = (processor.image_token_id, processor.num_image_tokens)
    if len(processor.tokenizer) > model.vocab_size:
        raise UserError(
            f"The tokenizer in {dataset.processor_path} has {len(processor.tokenizer)} entries, the model's vocabulary "
            f"{model.vocab_size}; take the processor of the weights"
        )
    if model.use_vision and placeholders != (model.image_token_id, model.num_image_tokens):
        raise UserError(
            f"The processor in {dataset.processor_path} writes an image as {placeholders[1]} tokens {placeholders[0]}, "
            f"the model reads {model.num_image_tokens} tokens {model.image_token_id}; take the processor of the weights"
        )


def plan(config: ConfigContainer, hardware: Hardware, folder: Path, given: Collection[str], start: str) -> Plan:
    """Check a run and count what it would do.

    Args:
        config: complete.
        hardware: where it would run.
        folder: of the run.
        given: names of the fields that the user has set.
        start: what it would start from, in words.

    Raises:
        UserError: the configuration or the data cannot be used.
    """
    counts = config.dataset.count_with_images()
    checked = validate(config, hardware, given)
    return Plan(
        start=start,
        cost=cost(checked, hardware, counts),
        held_out=config.dataset.count_held_out() if config.validation.eval_iters else {},
        rows=counts.rows,
        skipped=counts.skipped,
        images=counts.images,
        packs=counts.packs,
        of_sources=counts.of_sources,
        checkpoint_size=_checkpoint_size(checked),
        checkpoints=_checkpoints(checked),
        free_disk=shutil.disk_usage(_existing(folder)).free,
    )


def cost(config: ConfigContainer, hardware: Hardware, counts: Counts | None = None) -> Cost:
    """What a run costs whose configuration is validated.

    Args:
        config: validated.
        hardware: where it would run.
        counts: of the training data; None where they are not known.
    """
    train, model = config.train, config.model
    tokens = train.global_batch_size * model.seq_length
    learns = not model.freeze_language_model and config.peft is None
    per_image = image_training_flops(model, config.peft) if model.use_vision else 0.0
    images = 0.0 if counts is None else train.global_batch_size * counts.images_per_row
    most = most_images(config) if counts is None else counts.most_images
    return Cost(
        hardware=hardware,
        memory=estimate(config, hardware.ranks, most),
        parameters=sum(part.count for part in parameters_of_stage(_on_one_rank(model), 0)),
        steps=train.train_iters,
        batch=train.global_batch_size,
        tokens_per_step=tokens,
        tokens_per_image=model.num_image_tokens if model.use_vision else 0,
        flops_per_token=(decoder_flops(model, tokens).training(weight_gradients=learns) + images * per_image) / tokens,
        flops_per_image=per_image,
        images_per_row=None if counts is None else counts.images_per_row,
        most_images=most,
        uncounted=uncounted(config),
    )


def cost_without_data(config: ConfigContainer, hardware: Hardware, given: Collection[str] = ()) -> Cost:
    """What a run costs whose paths are not known yet; `given` as of `validate`."""
    config = copy.deepcopy(config)
    if config.dataset.sources is None:
        config.dataset.path = config.dataset.path or "not named"
    config.dataset.processor_path = config.dataset.processor_path or "not named"
    config.checkpoint.save = config.checkpoint.save or "."  # which asynchronous saving needs
    if config.peft is not None:  # Megatron-Bridge wants a folder that exists
        config.checkpoint.pretrained_checkpoint = "."
    return cost(validate(config, hardware, given), hardware)


def estimate(config: ConfigContainer, ranks: int, images: int | None = None) -> MemoryEstimate:
    """Memory of the rank that needs most.

    Args:
        config: validated.
        ranks: in all.
        images: the most of a row or a pack; None for `most_images`.
    """
    model, train = config.model, config.train
    images = most_images(config) if images is None else images
    shared = model.tensor_model_parallel_size * model.pipeline_model_parallel_size * model.context_parallel_size
    return memory_per_rank(
        model,
        world_size=ranks,
        micro_batch_size=train.micro_batch_size,
        microbatches=train.global_batch_size // (train.micro_batch_size * (ranks // shared)),
        images=train.micro_batch_size * images,
        ddp=config.ddp,
        optimizer=config.optimizer,
        peft=config.peft,
    )


def most_images(config: ConfigContainer) -> int:
    """The most images of a row, or a pack: of the data once they are built, before that as many as fit."""
    if not config.model.use_vision:
        return 0
    if (found := getattr(config.dataset, "most_images", None)) is not None:
        return found
    limit = getattr(config.dataset, "images_per_pack", None)
    fitting = images_of_full_row(config.model)
    return fitting if limit is None else min(limit, fitting)


def complete_steps(
    config: ConfigContainer, tokens: int | None, epochs: float | None, done: int = 0, consumed: int = 0
) -> None:
    """Set the number of steps from a number of tokens, padding included, or of epochs, in place; with neither it stays.

    Args:
        config: has the batch size and the sequence length.
        tokens: length of the run, or None.
        epochs: length of the run, or None.
        done: steps of the checkpoint from which it continues.
        consumed: samples, or packs, of these steps, which may have had another batch size.
    """
    if tokens is None and epochs is None:
        return
    rows = math.ceil(tokens / config.model.seq_length) if epochs is None else config.dataset.batch_rows(epochs)
    batch: Any = config.train.global_batch_size
    config.train.train_iters = done + math.ceil(max(0, rows - consumed) / batch)
    if config.scheduler.lr_decay_iters is None and consumed != done * batch:
        # Megatron counts samples, as steps of the batch size of now: the learning rate ends with the run.
        config.scheduler.lr_decay_iters = math.ceil(rows / batch)


@contextmanager
def _world_of(ranks: int) -> Iterator[None]:
    """Let Megatron-Bridge find a number of ranks in the environment."""
    before = os.environ.get("WORLD_SIZE")
    os.environ["WORLD_SIZE"] = str(ranks)
    try:
        yield
    finally:
        os.environ.pop("WORLD_SIZE")
        if before is not None:
            os.environ["WORLD_SIZE"] = before


def _on_one_rank(model: Any) -> Any:
    whole = copy.copy(model)
    whole.tensor_model_parallel_size = whole.pipeline_model_parallel_size = whole.expert_model_parallel_size = 1
    whole.expert_tensor_parallel_size, whole.virtual_pipeline_model_parallel_size = 1, None
    whole.pipeline_model_parallel_layout = None
    return whole


def _checkpoint_size(config: ConfigContainer) -> float:
    """Bytes of weights and, for those that are trained, of Adam's moments and the fp32 copy; without adapters."""
    model, peft = config.model, config.peft
    width = model.params_dtype.itemsize
    states = (8 + (4 if width < 4 else 0)) if config.checkpoint.save_optim else 0
    total = 0.0
    for part in parameters_of_stage(_on_one_rank(model), 0):
        is_full = peft is None or part.group in getattr(peft, "full_weights", ())
        is_trained = part.group not in model.frozen_groups and is_full
        total += part.count * ((width if peft is None or is_trained else 0) + (states if is_trained else 0))
    return total


def _checkpoints(config: ConfigContainer) -> int:
    """How many are kept at most at once; one more than are kept while the next is written."""
    steps, interval, kept = config.train.train_iters, config.checkpoint.save_interval, config.checkpoint.most_recent_k
    saved = -(-steps // interval) if interval else 1
    return min(saved, kept + 1) if kept > 0 else saved


def _existing(folder: Path) -> Path:
    return next(place for place in (folder, *folder.parents) if place.exists())
