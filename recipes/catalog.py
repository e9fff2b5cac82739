"""The recipes by name, with what each needs and is for: strings and numbers, so that listing them takes no time."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from importlib import import_module
from typing import TYPE_CHECKING, Any

from ..errors import UsageError

if TYPE_CHECKING:
    from .base import ConfigContainer


@dataclass(frozen=True, kw_only=True, slots=True)
class Gpu:
    """A kind of GPU.

    Attributes:
        name: as NVIDIA writes it.
        memory_gib: memory that CUDA reports in all.
        bf16_tflops: dense products in bf16 at most, by NVIDIA's data sheet.
    """

    name: str
    memory_gib: float
    bf16_tflops: float

    @property
    def usable_gib(self) -> float:
        """Memory for what the estimate counts (`bridge/mcore/memory.py`)."""
        return self.memory_gib - RESERVED_GIB


GPUS = {
    "h100": Gpu(name="H100 SXM 80 GB", memory_gib=79.1, bf16_tflops=989),
    "h200": Gpu(name="H200 SXM 141 GB", memory_gib=139.8, bf16_tflops=989),
}

ASSUMED_TFLOPS = 300.0
"""Operations per second of a GPU, in 10^12, by which GPU-hours are stated. Slices of the 20B on an H200 did 310 and 331
(docs/gpu.md), without the communication of a whole run."""

RESERVED_GIB = 6.0
"""Memory that is left for what the estimate does not count: the CUDA context, NCCL's buffers for each group of ranks,
workspaces of cuBLAS and of attention, buckets of gathered parameters, gradients of activations, fragments that the
allocator cannot use, and the 1.3 % by which the estimate was off at most (docs/gpu.md). A judgement, not a
measurement."""

_NAME = re.compile(r"gpt_oss_vision_(?P<size>20b|120b|tiny)_(?P<task>\w+?)_(?P<gpus>\d+)(gpu_(?P<gpu>[a-z]+\d+)|cpu)_")


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """One row of the catalogue. Its name is Megatron-Bridge's form, without ``_config``, and holds size, task and GPUs.

    Attributes:
        name: of the function, without ``_config``.
        purpose: one line.
        memory_gib: estimate for the rank that needs most.
        tokens_per_step: padding included.
        seq_length: tokens of a row.
        context_parallel_size: ranks that share a row.
    """

    name: str
    purpose: str
    memory_gib: float
    tokens_per_step: int
    seq_length: int
    context_parallel_size: int

    @property
    def size(self) -> str:
        """``20b``, ``120b`` or ``tiny``."""
        return self._parts["size"]

    @property
    def task(self) -> str:
        """``pretrain``, ``align``, ``sft``, ``lora`` or ``long_context``."""
        return self._parts["task"]

    @property
    def gpus(self) -> int:
        """Number of GPUs; of processes where there are none."""
        return int(self._parts["gpus"])

    @property
    def gpu(self) -> str | None:
        """A key of `GPUS`; None for a CPU."""
        return self._parts["gpu"]

    @property
    def stem(self) -> str:
        """The name without hardware and precision; it selects the first recipe that has it."""
        return f"gpt_oss_vision_{self.size}_{self.task}"

    @property
    def names(self) -> tuple[str, str, str]:
        """What a setting for a stage by this recipe may begin with."""
        return self.task, self.stem, self.name

    @property
    def module(self) -> str:
        """The module of the function."""
        return f"{__package__}.{'tiny' if self.size == 'tiny' else self.task}"

    @property
    def function(self) -> str:
        """The name of the function."""
        return f"{self.name}_config"

    @property
    def _parts(self) -> dict[str, str]:
        found = _NAME.match(self.name)
        assert found is not None, self.name
        return found.groupdict()


_CONTEXT_PARALLEL = {
    "20b_long_context_16gpu_h100_bf16": 4,
    "20b_long_context_8gpu_h100_bf16_32k": 2,
    "120b_long_context_64gpu_h100_bf16": 4,
    "120b_long_context_64gpu_h100_bf16_32k": 4,
}

RECIPES = tuple(
    Recipe(
        name=f"gpt_oss_vision_{name}",
        purpose=purpose,
        memory_gib=memory_gib,
        tokens_per_step=tokens,
        seq_length=length,
        context_parallel_size=_CONTEXT_PARALLEL.get(name, 1),
    )
    for name, memory_gib, tokens, length, purpose in (
        ("20b_pretrain_16gpu_h100_bf16", 61.4, 4_194_304, 8_192, "all parameters, on images with text and text alone"),
        ("20b_align_8gpu_h100_bf16", 50.3, 2_097_152, 8_192, "projector and vision bias alone, the first stage"),
        ("20b_sft_8gpu_h100_bf16", 61.4, 2_097_152, 8_192, "all parameters, on chats"),
        ("20b_sft_16gpu_h100_bf16", 61.4, 2_097_152, 8_192, "the same, the decoder without recomputation"),
        ("20b_lora_1gpu_h100_bf16", 64.1, 524_288, 4_096, "adapters, with projector and vision bias as full weights"),
        ("20b_lora_1gpu_h200_bf16", 88.2, 524_288, 4_096, "the same, two rows at once"),
        ("20b_long_context_16gpu_h100_bf16", 56.6, 1_048_576, 131_072, "all parameters, on 131,072 tokens"),
        ("20b_long_context_8gpu_h100_bf16_32k", 56.7, 1_048_576, 32_768, "all parameters, on 32,768 tokens"),
        ("120b_pretrain_64gpu_h100_bf16", 71.9, 4_194_304, 8_192, "all parameters, on images with text and text alone"),
        ("120b_align_64gpu_h100_bf16", 45.4, 2_097_152, 8_192, "projector and vision bias alone, the first stage"),
        ("120b_sft_64gpu_h100_bf16", 71.9, 2_097_152, 8_192, "all parameters, on chats"),
        ("120b_lora_8gpu_h100_bf16", 64.0, 524_288, 4_096, "adapters, with projector and vision bias as full weights"),
        ("120b_long_context_64gpu_h100_bf16", 52.1, 1_048_576, 131_072, "all parameters, on 131,072 tokens"),
        ("120b_long_context_64gpu_h100_bf16_32k", 71.9, 1_048_576, 32_768, "all parameters, on 32,768 tokens"),
        ("tiny_pretrain_1cpu_fp32", 0.035, 2_048, 32, "digits: all parameters, from random weights"),
        ("tiny_align_1cpu_fp32", 0.017, 2_048, 32, "digits: projector and vision bias alone"),
        ("tiny_sft_1cpu_fp32", 0.035, 2_048, 32, "digits: all parameters"),
        ("tiny_lora_1cpu_fp32", 0.023, 2_048, 32, "digits: adapters, with projector and vision bias as full weights"),
        ("tiny_long_context_1cpu_fp32", 0.104, 8_192, 512, "digits: all parameters, on 512 tokens"),
    )
)


def find(name: str) -> Recipe:
    """The recipe of a name, with or without ``_config``, or the first one of a stem.

    Raises:
        UsageError: there is none; it says the names that are nearest.
    """
    wanted = name.removesuffix("_config")
    for recipe in RECIPES:
        if wanted in (recipe.name, recipe.stem):
            return recipe
    names = [*dict.fromkeys(known for recipe in RECIPES for known in (recipe.stem, recipe.name))]
    holding = [known for known in names if wanted in known]
    nearest = [*dict.fromkeys([*holding, *get_close_matches(wanted, names, n=3, cutoff=0.5)])] or [RECIPES[0].stem]
    raise UsageError(
        f"There is no recipe {name}; near it are {', '.join(nearest[:3])}; the command `recipes` lists all."
    )


def stage_names(recipes: Sequence[Recipe]) -> list[str]:
    """The names of the stages of a run, and of their folders: the task, with a number where it comes twice."""
    tasks = [recipe.task for recipe in recipes]
    return [task if tasks.count(task) == 1 else f"{number}-{task}" for number, task in enumerate(tasks, start=1)]


def load(recipe: Recipe) -> "ConfigContainer":
    """Call the function of a recipe, which imports Megatron-Bridge."""
    return getattr(import_module(recipe.module), recipe.function)()


def publish(package: Any) -> None:
    """Make every recipe's function an attribute of a package, for runners that look for them there by name.

    A function imports its module when it is called.
    """
    for recipe in RECIPES:
        setattr(package, recipe.function, _function_of(recipe))


def _function_of(recipe: Recipe) -> Callable[[], "ConfigContainer"]:
    def function() -> "ConfigContainer":
        return load(recipe)

    function.__name__ = function.__qualname__ = recipe.function
    function.__module__, function.__doc__ = recipe.module, recipe.purpose
    return function
