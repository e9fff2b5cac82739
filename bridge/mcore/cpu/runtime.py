"""Calls of ``torch.cuda`` on a machine without a CUDA device: redirected to the CPU, with gloo for collectives."""

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from ....errors import UserError

CPU = torch.device("cpu")

# Hidden while Megatron is imported without a CUDA device: Megatron-Core 0.19.2 uses their kernels wherever they can be
# imported, for tensors on the CPU too (router, gradient clipping, Adam).
NEEDS_CUDA = ("transformer_engine", "transformer_engine_torch", "apex", "amp_C")

_is_cuda_available = torch.cuda.is_available


def cuda_is_real() -> bool:
    """Whether there is a CUDA device, also inside `runtime()`, where ``torch.cuda.is_available()`` returns True."""
    return _is_cuda_available()


class _DevicesToCPU(TorchFunctionMode):
    """Replaces a CUDA device by the CPU in every torch call; ``tensor.type()`` returns CUDA's spelling."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.Tensor.cuda:
            return args[0]
        if kwargs and _names_cuda(kwargs.get("device")):
            kwargs = {**kwargs, "device": CPU}
        if kwargs.get("pin_memory"):
            kwargs = {**kwargs, "pin_memory": False}
        if func is torch.Tensor.to:
            args = tuple(CPU if _names_cuda(argument) else argument for argument in args)
        result = func(*args, **kwargs)
        if func is torch.Tensor.type and isinstance(result, str):
            # Megatron's optimizer and gradient clipping compare with "torch.cuda.FloatTensor".
            return result.replace("torch.", "torch.cuda.", 1)
        return result


def _names_cuda(device: Any) -> bool:
    if isinstance(device, torch.device):
        return device.type == "cuda"
    return isinstance(device, str) and device.startswith("cuda")


class _Event:
    """A CUDA event that records wall-clock time."""

    def __init__(self, *args: Any, **kwargs: Any):
        self.at = 0.0

    def record(self, stream: Any = None) -> None:
        self.at = time.perf_counter()

    def elapsed_time(self, end: "_Event") -> float:
        return (end.at - self.at) * 1e3

    def synchronize(self) -> None:
        pass

    wait = record_stream = synchronize

    def query(self) -> bool:
        return True


class _Stream(contextlib.nullcontext):
    """A CUDA stream whose work is always complete."""

    cuda_stream = 0

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__()

    def _nothing(self, *args: Any) -> None:
        pass

    wait_stream = wait_event = synchronize = _nothing

    def record_event(self, event: _Event | None = None) -> _Event:
        return event or _Event()


def _device_properties(*args: Any, **kwargs: Any) -> SimpleNamespace:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return SimpleNamespace(name="cpu", major=0, minor=0, total_memory=memory, multi_processor_count=1)


def _always(value: Any) -> Callable[..., Any]:
    """Return a new function each time: the table of torch's compiler refuses the same object twice."""
    return lambda *args, **kwargs: value


# Replacements for the functions of torch.cuda that Megatron calls. `runtime()` is a context because of the first one:
# outside Megatron ``is_available()`` must stay False.
CUDA_REPLACEMENTS: dict[str, Any] = {
    "is_available": _always(True),
    "is_initialized": _always(True),
    "is_current_stream_capturing": _always(False),
    "device_count": _always(1),
    "current_device": _always(CPU),
    "set_device": _always(None),
    "get_device_properties": _device_properties,
    "get_device_capability": _always((0, 0)),
    "get_device_name": _always("cpu"),
    "manual_seed": lambda seed: torch.manual_seed(seed),
    "get_rng_state": lambda *args, **kwargs: torch.get_rng_state(),
    "set_rng_state": lambda state, *args, **kwargs: torch.set_rng_state(state),
    "synchronize": _always(None),
    "Stream": _Stream,
    "current_stream": lambda *args: _Stream(),
    "default_stream": lambda *args: _Stream(),
    "stream": lambda stream: _Stream(),
    "set_stream": _always(None),
    "Event": _Event,
    "empty_cache": _always(None),
    "memory_allocated": _always(0),
    "max_memory_allocated": _always(0),
    "memory_reserved": _always(0),
    "max_memory_reserved": _always(0),
    "reset_peak_memory_stats": _always(None),
    "memory_stats": _always({}),
}


def _all_to_all_with_lists(original: Callable) -> Callable:
    """Gloo needs split sizes as ints; Megatron's dispatcher may pass tensors."""

    def all_to_all_single(
        output: torch.Tensor,
        input: torch.Tensor,  # noqa: A002 - torch's own name, given by keyword
        output_split_sizes: Any = None,
        input_split_sizes: Any = None,
        group: Any = None,
        async_op: bool = False,
    ) -> Any:
        sizes = [
            None if split is None else [int(size) for size in split]
            for split in (output_split_sizes, input_split_sizes)
        ]
        return original(output, input, *sizes, group=group, async_op=async_op)

    return all_to_all_single


def _all_gather_of_any_size(original: Callable) -> Callable:
    """Gloo gathers tensors of equal size only; expert tensor parallelism gathers unequal numbers of tokens."""

    def all_gather(tensor_list: list[torch.Tensor], tensor: torch.Tensor, group: Any = None, async_op: bool = False):
        if len({piece.shape for piece in tensor_list}) == 1:
            return original(tensor_list, tensor, group=group, async_op=async_op)
        tensor_list[torch.distributed.get_rank(group)].copy_(tensor)
        for rank, piece in enumerate(tensor_list):
            torch.distributed.broadcast(piece, group=group, group_src=rank)
        return None

    return all_gather


def _reduce_scatter_of_any_size(original: Callable) -> Callable:
    """The inverse of `_all_gather_of_any_size`."""

    def reduce_scatter(output: torch.Tensor, input_list: list[torch.Tensor], group: Any = None, **kwargs: Any):
        if len({piece.shape for piece in input_list}) == 1:
            return original(output, input_list, group=group, **kwargs)
        pieces = [piece.clone() for piece in input_list]  # a reduction leaves its input changed
        for rank, piece in enumerate(pieces):
            torch.distributed.reduce(piece, group=group, group_dst=rank)
        output.copy_(pieces[torch.distributed.get_rank(group)])
        return None

    return reduce_scatter


def redirections() -> list[tuple[Any, str, Any]]:
    """Every ``(module, name, replacement)`` that `runtime()` puts in place."""
    import megatron.core.tensor_parallel.random as megatron_random

    return [
        *((torch.cuda, name, replacement) for name, replacement in CUDA_REPLACEMENTS.items()),
        (torch.nn.Module, "cuda", lambda self, *args, **kwargs: self),
        (torch.cuda.nvtx, "range_push", _always(0)),
        (torch.cuda.nvtx, "range_pop", _always(0)),
        (megatron_random, "_get_cuda_rng_state", lambda *args, **kwargs: torch.get_rng_state()),
        (megatron_random, "_set_cuda_rng_state", lambda state, *args, **kwargs: torch.set_rng_state(state)),
        (torch.distributed, "all_to_all_single", _all_to_all_with_lists(torch.distributed.all_to_all_single)),
        (torch.distributed, "all_gather", _all_gather_of_any_size(torch.distributed.all_gather)),
        (torch.distributed, "reduce_scatter", _reduce_scatter_of_any_size(torch.distributed.reduce_scatter)),
    ]


@contextlib.contextmanager
def runtime() -> Iterator[None]:
    """Run Megatron on the CPU inside this context; do nothing where there is a CUDA device. May be nested."""
    is_inside = torch.cuda.is_available is not _is_cuda_available
    if cuda_is_real() or is_inside:
        yield
        return
    with contextlib.ExitStack() as undo:
        for owner, name, replacement in redirections():
            undo.callback(setattr, owner, name, getattr(owner, name))
            setattr(owner, name, replacement)
        # Compiling the fused activations takes longer than a tiny model's whole run.
        undo.enter_context(torch.compiler.set_stance("force_eager"))
        undo.enter_context(_DevicesToCPU())
        yield


def adapt_config_for_cpu(config: Any) -> None:
    """Change the fields of a training configuration that need CUDA; do nothing where there is a CUDA device.

    Args:
        config: Megatron-Bridge's ``ConfigContainer``. Precision is not changed: bf16 works, but is slow.

    Raises:
        UserError: Megatron was imported before this package and has an optimizer that needs CUDA.
    """
    if cuda_is_real():
        return
    _check_optimizer()
    config.dist.distributed_backend = "gloo"
    config.dist.use_gloo_process_groups = True
    config.dataset.pin_memory = False
    config.ddp.overlap_grad_reduce = config.ddp.overlap_param_gather = False
    # Averaging is NCCL's only; the worker process of asynchronous saving uses CUDA.
    config.ddp.average_in_collective = False
    config.checkpoint.async_save = False


def _check_optimizer() -> None:
    from megatron.core.optimizer import Adam

    package = Adam.__module__.partition(".")[0]
    if package in NEEDS_CUDA:
        raise UserError(
            f"Megatron has taken its optimizer from `{package}`, which needs a CUDA device, and there is none here: "
            "call gpt_oss_vision.register() before Megatron is imported, which hides that package from it."
        )
