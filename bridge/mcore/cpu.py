"""Megatron without a CUDA device: what has to be redirected, where, and why.

Two things, both only where they are needed:

- `import_megatron_bridge()` makes Megatron-Bridge importable where Transformer Engine or the NVIDIA resiliency
  extension are not installed. It is called once, by the package `bridge.mcore`.
- `runtime()` is a context in which Megatron's calls of ``torch.cuda`` end on the CPU, with gloo for collectives.
  With a CUDA device it does nothing. `run_ranks()` forks ranks out of one process that has imported everything.

Versions: megatron-bridge 0.6.2, megatron-core 0.19.2, torch 2.11.0. A test asks for every name in the tables.
"""

import contextlib
import ctypes
import gc
import importlib
import importlib.abc
import importlib.machinery
import math
import multiprocessing
import os
import pickle
import signal
import socket
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

CPU = torch.device("cpu")

_is_cuda_available = torch.cuda.is_available


def cuda_is_real() -> bool:
    """Whether there is a CUDA device, also inside `runtime()`, where ``torch.cuda.is_available()`` says so."""
    return _is_cuda_available()


# --- importing ---------------------------------------------------------------------------------------------------

# Names that Megatron-Bridge 0.6.2 imports without asking whether they are there.
STAND_INS: dict[str, tuple[str, ...]] = {
    "transformer_engine": (),
    "transformer_engine.pytorch": ("TransformerLayer",),
    "transformer_engine.pytorch.ops": ("Sequential",),
    "nvidia_resiliency_ext": (),
    "nvidia_resiliency_ext.inprocess": ("CallWrapper",),
}

# What must see honestly that Transformer Engine and the resiliency extension are missing, and keeps what it saw.
HONEST_MODULES = (
    "megatron.core.extensions.transformer_engine",
    "megatron.core.dist_checkpointing.strategies.nvrx",
    "peft",  # Megatron-Bridge imports it through diffusers; its LoRA would ask each layer whether it is TE's
)
BRIDGE_MODULES = (
    "megatron.bridge",
    "megatron.bridge.training.pretrain",
    "megatron.bridge.training.vlm_step",
    "megatron.bridge.recipes.common",
)


class _StandInFinder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Answers for the packages that are missing, with modules whose classes refuse to be used."""

    def __init__(self, packages: set[str]):
        self.packages = packages

    def find_spec(self, fullname: str, path: Any = None, target: ModuleType | None = None):
        if fullname in STAND_INS and fullname.partition(".")[0] in self.packages:
            return importlib.machinery.ModuleSpec(fullname, self, is_package=True)
        return None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> None:
        return None

    def exec_module(self, module: ModuleType) -> None:
        package = module.__name__.partition(".")[0]
        module.__version__ = "0.0.0"
        for name in STAND_INS[module.__name__]:
            setattr(module, name, _refusing_class(name, package))


def _refusing_class(name: str, package: str) -> type:
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        raise ImportError(f"{name} needs the package `{package}`, which is not installed here.")

    return type(name, (), {"__init__": __init__})


def import_megatron_bridge() -> None:
    """Import Megatron-Bridge, standing in for Transformer Engine and the resiliency extension where they are missing.

    Megatron-Core and peft are imported first and see honestly that they are not there. The stand-ins are gone again
    when this returns, so that whoever asks for the packages later hears the truth too.
    """
    with warnings.catch_warnings():
        # Dozens, of deprecated names and absent kernels; none is about anything that a user of ours has done.
        warnings.simplefilter("ignore")
        for name in HONEST_MODULES:
            importlib.import_module(name)
        with _stand_ins():
            for name in BRIDGE_MODULES:
                importlib.import_module(name)


@contextlib.contextmanager
def _stand_ins() -> Iterator[None]:
    packages = {name for name in STAND_INS if "." not in name}
    missing = {name for name in packages if importlib.util.find_spec(name) is None}
    finder = _StandInFinder(missing)
    sys.meta_path.append(finder)
    try:
        for name in STAND_INS:
            importlib.import_module(name)
        yield
    finally:
        sys.meta_path.remove(finder)
        for name in STAND_INS:
            if name.partition(".")[0] in missing:
                sys.modules.pop(name, None)


# --- running -----------------------------------------------------------------------------------------------------


class _DevicesToCPU(TorchFunctionMode):
    """Every torch call that names a CUDA device gets the CPU; ``tensor.type()`` answers in CUDA spelling."""

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
    """A CUDA event by the wall clock."""

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
    """A CUDA stream in which everything has already happened."""

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
    """A new function each time: torch's compiler keeps a table of torch's functions and takes no object twice."""
    return lambda *args, **kwargs: value


# What Megatron asks of torch.cuda, and what it is told. The first entry is why `runtime()` is a context: everybody
# else must go on hearing that there is no CUDA.
CUDA_ANSWERS: dict[str, Any] = {
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
    """Gloo wants split sizes as ints; Megatron's dispatcher may hand over tensors."""

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
    """Gloo gathers equal pieces only; experts' tokens, gathered for expert tensor parallelism, are not."""

    def all_gather(tensor_list: list[torch.Tensor], tensor: torch.Tensor, group: Any = None, async_op: bool = False):
        if len({piece.shape for piece in tensor_list}) == 1:
            return original(tensor_list, tensor, group=group, async_op=async_op)
        tensor_list[torch.distributed.get_rank(group)].copy_(tensor)
        for rank, piece in enumerate(tensor_list):
            torch.distributed.broadcast(piece, group=group, group_src=rank)
        return None

    return all_gather


def _reduce_scatter_of_any_size(original: Callable) -> Callable:
    """The way back of the above."""

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
        *((torch.cuda, name, answer) for name, answer in CUDA_ANSWERS.items()),
        (torch.nn.Module, "cuda", lambda self, *args, **kwargs: self),
        (torch.cuda.nvtx, "range_push", _always(0)),
        (torch.cuda.nvtx, "range_pop", _always(0)),
        (megatron_random, "_get_cuda_rng_state", lambda *args, **kwargs: torch.get_rng_state()),
        (megatron_random, "_set_cuda_rng_state", lambda state, *args, **kwargs: torch.set_rng_state(state)),
        (torch.distributed, "all_to_all_single", _all_to_all_with_lists(torch.distributed.all_to_all_single)),
        (torch.distributed, "all_gather", _all_gather_of_any_size(torch.distributed.all_gather)),
        (torch.distributed, "reduce_scatter", _reduce_scatter_of_any_size(torch.distributed.reduce_scatter)),
    ]


SECONDS_TO_END = 30.0

_depth = 0


@contextlib.contextmanager
def runtime() -> Iterator[None]:
    """Run Megatron on the CPU inside this context; with a CUDA device, change nothing. May be nested."""
    global _depth
    if cuda_is_real() or _depth:
        yield
        return
    with contextlib.ExitStack() as undo:
        for owner, name, replacement in redirections():
            undo.callback(setattr, owner, name, getattr(owner, name))
            setattr(owner, name, replacement)
        # Compiling the fused activations takes longer than a tiny model's whole run.
        undo.enter_context(torch.compiler.set_stance("force_eager"))
        undo.enter_context(_DevicesToCPU())
        _depth += 1
        undo.callback(_leave)
        yield


def settle_model(provider: Any) -> None:
    """Set what a model's provider needs where there is no CUDA device; with one, change nothing."""
    if not cuda_is_real():
        # Gloo does not keep batched sends and receives apart: interleaved pipeline stages would get each other's.
        provider.batch_p2p_comm = False


def settle(config: Any) -> None:
    """Set what a training configuration needs where there is no CUDA device; with one, change nothing.

    Args:
        config: Megatron-Bridge's ``ConfigContainer``. Precision is left alone: bf16 works, only slowly.
    """
    if cuda_is_real():
        return
    config.dist.distributed_backend = "gloo"
    config.dist.use_gloo_process_groups = True
    config.dataset.pin_memory = False
    config.ddp.overlap_grad_reduce = config.ddp.overlap_param_gather = False
    # The first would need NCCL's averaging, the second shares its worker process with CUDA.
    config.ddp.average_in_collective = False
    config.checkpoint.async_save = False


def _leave() -> None:
    global _depth
    _depth -= 1


# --- ranks -------------------------------------------------------------------------------------------------------


def run_ranks[T](world_size: int, function: Callable[..., T], *args: Any, timeout: float | None = None) -> list[T]:
    """Call a function on several ranks, forked from this process so that nothing is imported again.

    Each rank has the environment of ``torchrun`` and runs inside `runtime()`.

    Args:
        world_size: number of ranks.
        function: called as ``function(*args)`` in each; its result must be picklable.
        timeout: seconds until the ranks are given up; None waits as long as they work.

    Returns:
        The results in the order of the ranks.

    Raises:
        Exception: what the first rank that failed raised, with its number and traceback as a note.
        RuntimeError: when a rank died or did not finish in time.
    """
    context = multiprocessing.get_context("fork")
    port = _free_port()
    pipes = [context.Pipe(duplex=False) for _ in range(world_size)]
    ranks = [
        context.Process(target=_rank, args=(rank, world_size, port, pipes[rank][1], function, args))
        for rank in range(world_size)
    ]
    for rank in ranks:
        rank.start()
    try:
        deadline = math.inf if timeout is None else time.monotonic() + timeout
        results = _collect([reader for reader, _ in pipes], ranks, deadline)
        for rank in ranks:
            rank.join(SECONDS_TO_END)  # it ends the workers that Megatron's checkpoint writer has started
        return results
    finally:
        for rank in ranks:
            _end(rank)


def _end(rank: Any) -> None:
    """Kill a rank with all its workers: they would outlive it, with some 300 MB each."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(rank.pid, signal.SIGKILL)
    rank.join()


@dataclass
class _Failure:
    """What a rank sends instead of its result."""

    error: Exception


def _rank(rank: int, world_size: int, port: int, result: Any, function: Callable, args: tuple) -> None:
    os.setpgrp()  # a group to be ended by
    _die_with_parent()
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    # What the parent has imported never becomes garbage; without this, every collection walks through all of it.
    gc.freeze()
    # Threads of the parent's OpenMP pool do not exist in a fork; one thread needs no pool.
    torch.set_num_threads(1)
    try:
        with runtime():
            answer = function(*args)
    except BaseException as error:  # noqa: BLE001 - torch's CheckpointException is no Exception
        answer = _Failure(_portable(error))
        answer.error.add_note(f"On rank {rank} of {world_size}:\n{traceback.format_exc()}")
    # Plainly pickled: multiprocessing's own way shares memory with tensors, and they would outlive this process.
    result.send_bytes(pickle.dumps(answer))


def _die_with_parent() -> None:
    """Ask Linux to kill this process when its parent is killed; a rank on its own would train on for ever."""
    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)


def _portable(error: BaseException) -> Exception:
    """The error itself, or one that says the same where it would not survive the way to the parent."""
    with contextlib.suppress(Exception):
        if isinstance(error, Exception) and str(pickle.loads(pickle.dumps(error))) == str(error):  # noqa: S301
            return error
    return RuntimeError(f"{type(error).__name__}: {error}")


def _collect(readers: list, ranks: list, deadline: float) -> list:
    results: dict[int, Any] = {}
    while len(results) < len(ranks):
        for index in set(range(len(ranks))) - set(results):
            died = not ranks[index].is_alive()
            if readers[index].poll(0.02):
                results[index] = pickle.loads(readers[index].recv_bytes())  # noqa: S301 - from our own fork
                if isinstance(results[index], _Failure):
                    raise results[index].error
            elif died:
                raise RuntimeError(f"Rank {index} of {len(ranks)} ended with exit code {ranks[index].exitcode}.")
        if time.monotonic() > deadline:
            late = sorted(set(range(len(ranks))) - set(results))
            raise RuntimeError(f"Ranks {late} of {len(ranks)} did not finish in time.")
    return [results[index] for index in range(len(ranks))]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
