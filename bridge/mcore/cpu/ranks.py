"""Ranks of a distributed run as forks of one process, so that Megatron is imported once."""

import contextlib
import ctypes
import gc
import importlib
import itertools
import math
import multiprocessing
import os
import pickle
import signal
import tempfile
import time
import traceback
from collections.abc import Callable
from typing import Any

import torch
from torch.distributed import FileStore  # pyright: ignore[reportPrivateImportUsage]

from .runtime import cuda_is_real, runtime

SECONDS_TO_END = 30.0
STORE_FACTORY = "_create_c10d_store"


def run_ranks[T](world_size: int, function: Callable[..., T], *args: Any, timeout: float | None = None) -> list[T]:
    """Call a function on several ranks, forked from this process.

    Each rank has the environment of ``torchrun`` and runs inside `runtime()`. They meet in a
    file, not at a port, so any number of calls can run side by side.

    Args:
        world_size: number of ranks.
        function: called as ``function(*args)`` in each; its result must be picklable.
        timeout: seconds after which the ranks are killed; None for no limit.

    Returns:
        The results in the order of the ranks; None from one that called ``sys.exit(0)``.

    Raises:
        Exception: the exception of the first rank that failed, with its number and traceback as a note.
        RuntimeError: when a rank died or did not finish in time, or this process can use a CUDA device, which its forks
            could not.
    """
    if cuda_is_real():
        raise RuntimeError("Forked ranks run on the CPU: set CUDA_VISIBLE_DEVICES='' before torch is imported.")
    context = multiprocessing.get_context("fork")
    stores = tempfile.TemporaryDirectory()
    pipes = [context.Pipe(duplex=False) for _ in range(world_size)]
    ranks = [
        context.Process(target=_rank, args=(rank, world_size, stores.name, pipes[rank][1], function, args))
        for rank in range(world_size)
    ]
    for rank in ranks:
        rank.start()
    try:
        deadline = math.inf if timeout is None else time.monotonic() + timeout
        results = _collect([reader for reader, _ in pipes], ranks, deadline)
        for rank in ranks:
            rank.join(SECONDS_TO_END)  # a rank first ends the workers of Megatron's checkpoint writer
        return results
    finally:
        for rank in ranks:
            _end(rank)
        stores.cleanup()


def _end(rank: Any) -> None:
    """Kill a rank with all its workers, which would outlive it with some 300 MB each."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(rank.pid, signal.SIGKILL)
    rank.join()


def _rank(rank: int, world_size: int, stores: str, result: Any, function: Callable, args: tuple) -> None:
    os.setpgrp()  # so that `_end` can kill the whole group
    die_with_parent()
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        # Must be set, and are not used.
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "0",
    }
    _meet_in_files(stores)
    # The parent's modules never become garbage; without this, every collection walks through all of them.
    gc.freeze()
    # Threads of the parent's OpenMP pool do not exist in a fork; one thread needs no pool.
    torch.set_num_threads(1)
    try:
        with runtime():
            answer, error = function(*args), None
    except SystemExit as end:
        answer, error = None, RuntimeError(f"The rank called sys.exit({end.code!r})") if end.code else None
    except BaseException as failure:  # noqa: BLE001 - torch's CheckpointException is no Exception
        answer, error = None, _portable(failure)
        error.add_note(f"On rank {rank} of {world_size}:\n{traceback.format_exc()}")
    # Plain pickle: multiprocessing's own would put tensors into shared memory, which this process must outlive.
    result.send_bytes(pickle.dumps((answer, error)))


def _meet_in_files(folder: str) -> None:
    """Let torch's ``env://`` rendezvous (2.11.0) use a file per process group in place of a TCP port.

    A free port may be taken before rank 0 listens on it, and each TCP connection of a store waits for a reverse DNS
    look-up, some of them for 5 s.
    """
    numbers = itertools.count()

    def create_store(hostname: str, port: int, rank: int, world_size: int, *args: Any, **kwargs: Any) -> FileStore:
        return FileStore(f"{folder}/{next(numbers)}", world_size)

    # Imported by name: `torch.distributed.rendezvous` is the function of the module.
    setattr(importlib.import_module("torch.distributed.rendezvous"), STORE_FACTORY, create_store)


def die_with_parent() -> None:
    """Let Linux kill this process when its parent dies, which would leave it running for ever."""
    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)


def _portable(error: BaseException) -> Exception:
    """The error itself, or a RuntimeError with its text where it cannot be pickled."""
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
                results[index], error = pickle.loads(readers[index].recv_bytes())  # noqa: S301 - from our own fork
                if error is not None:
                    raise error
            elif died:
                raise RuntimeError(f"Rank {index} of {len(ranks)} ended with exit code {ranks[index].exitcode}.")
        if time.monotonic() > deadline:
            late = sorted(set(range(len(ranks))) - set(results))
            raise RuntimeError(f"Ranks {late} of {len(ranks)} did not finish in time.")
    return [results[index] for index in range(len(ranks))]
