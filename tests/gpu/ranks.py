"""Functions on ranks: forks on a CPU, spawned processes that stay warm on a GPU."""

import os
import tempfile
import traceback
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from typing import Any

SECONDS = 100.0
_pools: dict[int, ProcessPoolExecutor] = {}


def has_cuda() -> bool:
    """Whether the ranks use a CUDA device; `pytest` without `--cuda` hides it. Does not initialise CUDA."""
    import torch

    return torch.cuda.device_count() > 0


def on_ranks[T](world_size: int, function: Callable[..., T], *args: Any, fresh: bool = False) -> list[T]:
    """Call a function on several ranks, with the environment of torchrun; return the results in order.

    Args:
        world_size: number of ranks. On a GPU they share device 0.
        function: in an importable module, called as ``function(*args)``.
        fresh: new processes on a GPU too, for functions that leave state behind or end their process.
    """
    if not has_cuda():
        from gpt_oss_vision.bridge.mcore import cpu

        return cpu.run_ranks(world_size, function, *args)
    if fresh:
        end_pool(world_size)
    pool = _pools.setdefault(world_size, ProcessPoolExecutor(world_size, get_context("spawn")))
    with tempfile.TemporaryDirectory() as stores:
        calls = [pool.submit(_rank, rank, world_size, stores, function, args) for rank in range(world_size)]
        try:
            return [call.result(SECONDS) for call in calls]
        except BaseException as error:
            end_pool(world_size)
            if isinstance(error, BrokenProcessPool | TimeoutError):
                raise RuntimeError(f"A rank of {world_size} died or took over {SECONDS:.0f} s.") from error
            raise
        finally:
            if fresh:
                end_pool(world_size)


def end_pool(world_size: int) -> None:
    """Kill the processes that are kept for this number of ranks."""
    if pool := _pools.pop(world_size, None):
        for process in list((pool._processes or {}).values()):
            process.kill()
        pool.shutdown(wait=False, cancel_futures=True)


def end_pools() -> None:
    """Kill all processes that are kept."""
    for world_size in list(_pools):
        end_pool(world_size)


def _rank(rank: int, world_size: int, stores: str, function: Callable, args: tuple) -> Any:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world_size), "LOCAL_WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    import torch

    from gpt_oss_vision.bridge import hf, mcore
    from gpt_oss_vision.bridge.mcore.cpu.ranks import _meet_in_files

    _meet_in_files(stores)
    hf.register_auto_classes()
    mcore.register()
    torch.cuda.set_device(0)
    try:
        return function(*args)
    except BaseException as error:
        raise RuntimeError(f"On rank {rank} of {world_size}:\n{traceback.format_exc()}") from error
    finally:
        _leave()


def _leave() -> None:
    import torch
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    torch.cuda.empty_cache()
