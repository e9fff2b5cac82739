"""What differs between the configuration of a checkpoint and that of the run that continues it: applied, or refused.

Applied differences are named, among them the learning rate, the number of steps, the batch size and the layout.
Refused are those by which the optimizer's states or the order of the samples would be those of another run.
"""

from ...bridge import plugin  # noqa: F401 - first: it makes Megatron-Bridge importable, and the model known to it

# isort: split

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import yaml
from megatron.bridge.training.config import ConfigContainer

from ...bridge.config_map import HF_TO_MEGATRON, TRAINING_ONLY, YARN

FREE_SECTIONS = (
    *("checkpoint", "comm_overlap", "ddp", "dist", "env_vars", "ft", "inprocess_restart", "logger", "nvrx_straggler"),
    *("profiling", "rerun_state_machine", "straggler", "tensor_inspect", "tokenizer", "validation"),
)
"""Sections in which nothing changes what is learned."""

FREE = (
    *("dataset.num_workers", "dataset.persistent_workers", "dataset.pin_memory", "dataset.data_sharding"),
    *("dataset.valid_path", "dataset.test_path", "dataset.dataloader_load", "dataset.dataloader_save"),
    "dataset.usable_rows",  # compared when the data are read
    *("model.derived", "model.timers", "model.config_logger_dir", "optimizer.timers", "optimizer.config_logger_dir"),
    *("train.manual_gc", "train.manual_gc_interval", "train.manual_gc_eval", "train.empty_unused_memory_level"),
    *("scheduler.lr_decay_steps", "scheduler.lr_warmup_steps", "scheduler.wd_incr_steps", "scheduler.wsd_decay_steps"),
)

WEIGHTS = "checkpoint.pretrained_checkpoint"
NAMED = (WEIGHTS, "ddp.grad_reduce_in_fp32", "ddp.average_in_collective")
NAMED_PREFIXES = ("validation.eval_",)
"""What is named though it is in such a section."""

ARCHITECTURE = {
    *({*HF_TO_MEGATRON.values()} - {*TRAINING_ONLY}),
    *YARN.values(),
    *("rotary_base", "position_embedding_type", "window_size", "window_attn_skip_freq", "no_rope_freq"),
    *("vision_config", "activation_func_clamp_value"),
}
"""Fields of the provider that the weights decide."""

FINGERPRINT = "dataset.fingerprint"

REFUSED = (
    *(f"model.{name}" for name in sorted(ARCHITECTURE)),
    *("model.seq_length", "model.params_dtype", "mixed_precision", "rng.seed", "rng.data_parallel_random_init"),
    *("dataset._target_", "dataset.seed", "dataset.seq_length", "dataset.max_skipped", FINGERPRINT),
    *("dataset.packing", "dataset.images_per_pack", "dataset.learned_turns", "dataset.learned_channels"),
)
REFUSED_PREFIXES = ("peft", "model.freeze_", "optimizer.")
"""Beginnings of the names of more such fields; `APPLIED` are the exceptions."""

APPLIED = ("optimizer.lr", "optimizer.min_lr", "optimizer.weight_decay", "optimizer.clip_grad")


@dataclass(frozen=True, slots=True)
class Change:
    """A field whose value is another than in the checkpoint."""

    name: str
    before: Any
    now: Any

    def __str__(self) -> str:
        if self.name == FINGERPRINT:
            if self.is_refused:
                return "the training data have another content, or a source of them is gone"
            return "there are more sources of training data"
        if self.name == WEIGHTS:
            return (
                f"weights={self.now or 'none'} are not read, as the run continues its own; it started from "
                f"{self.before or 'random weights'}"
            )
        return f"{self.name} was {self.before!r} and is {self.now!r}"

    @property
    def is_refused(self) -> bool:
        """Whether the run cannot be continued with it."""
        if self.name in APPLIED:
            return False
        if self.name == FINGERPRINT:  # sources may be added behind the others
            before, now = self.before.split(), self.now.split()
            return now[: len(before)] != before
        return self.name in REFUSED or self.name.startswith(REFUSED_PREFIXES)


def changes(saved: Mapping[str, Any], config: ConfigContainer) -> list[Change]:
    """The differences that are worth naming.

    Args:
        saved: ``run_config.yaml`` of a checkpoint.
        config: of the run that continues it, validated.
    """
    derived = {f"model.{name}" for name in (saved["model"].get("derived") or {}) | config.model.derived}
    found = _differences(saved, as_mapping(config))
    found = [change for change in found if change.name not in derived and not _is_free(change.name)]
    # Without the command `train` there is no fingerprint.
    return [change for change in found if change.name != FINGERPRINT or (change.before and change.now)]


def as_mapping(config: ConfigContainer) -> dict[str, Any]:
    """A configuration as it is written to ``run_config.yaml``."""
    with TemporaryDirectory() as folder:
        config.to_yaml(f"{folder}/run_config.yaml")
        return yaml.safe_load(Path(folder, "run_config.yaml").read_text())


def _differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[Change]:
    """The fields that differ; fields that hold objects are compared whole, and so is a section that was or is None."""
    for section, mine in now.items():
        saved = before.get(section)
        if not isinstance(mine, Mapping) or not isinstance(saved, Mapping):
            if mine != saved:
                yield Change(section, _named(saved), _named(mine))
            continue
        for name in sorted(
            mine.keys() & saved.keys()
        ):  # a field that one of them lacks has another version of its class
            if mine[name] != saved[name]:
                yield Change(f"{section}.{name}", saved[name], mine[name])


def _named(section: Any) -> Any:
    return section["_target_"].rpartition(".")[2] if isinstance(section, Mapping) else section


def _is_free(name: str) -> bool:
    section, _, field = name.partition(".")
    if name in NAMED or name.startswith(NAMED_PREFIXES):
        return False
    # Megatron-Bridge sets the functions when it builds the model.
    return section in FREE_SECTIONS or name in FREE or field.startswith("exit_") or field.endswith("_func")
