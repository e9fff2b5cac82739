"""Which back end runs the decoder layers: `transformer_engine` where it can run, else `torch`."""

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any, Literal

import torch
from megatron.core.extensions.transformer_engine import HAVE_TE

from ...errors import UserError
from .. import cudnn
from . import cpu

TORCH, ENGINE = "torch", "transformer_engine"
Backend = Literal["auto", "transformer_engine", "torch"]


_is_planned = False


@contextmanager
def planned_for_gpu() -> Iterator[None]:
    """Resolve the back end as on a machine with a GPU and Transformer Engine, for a plan of a run on such a machine."""
    global _is_planned
    _is_planned = True
    try:
        yield
    finally:
        _is_planned = False


def is_planned() -> bool:
    """Whether this is inside `planned_for_gpu`."""
    return _is_planned


def resolve_backend(provider: Any) -> str:
    """The back end of a provider: `TORCH` or `ENGINE`; ``auto`` is Transformer Engine unless there is a problem.

    Raises:
        UserError: ``transformer_engine`` is set and cannot run here, or the name is unknown.
    """
    backend = provider.backend
    if backend not in ("auto", TORCH, ENGINE):
        raise UserError(f"backend={backend!r} is unknown; choose 'auto', 'transformer_engine' or 'torch'.")
    if backend == TORCH:
        return TORCH
    problem = transformer_engine_problem(provider.expert_tensor_parallel_size or 1)
    if problem and backend == ENGINE:
        raise UserError(f"backend='transformer_engine' cannot run: {problem}; backend='torch' runs everywhere.")
    return TORCH if problem else ENGINE


def transformer_engine_problem(expert_tensor_parallel_size: int) -> str | None:
    """Why the layers cannot run on Transformer Engine here; None if they can."""
    if not _is_planned and (problem := _machine_problem()):
        return problem
    if expert_tensor_parallel_size > 1:
        return (
            f"with expert_tensor_parallel_size={expert_tensor_parallel_size} each rank would add the experts' whole "
            "biases"
        )
    return None


def _machine_problem() -> str | None:
    if not cpu.cuda_is_real():
        return "it needs a CUDA device"
    if find_spec("transformer_engine") is None:
        return "the package is missing (pip install 'gpt-oss-vision[te]')"
    if not HAVE_TE:
        return (
            "the package is installed and cannot be imported (python -c 'import transformer_engine.pytorch' says why)"
        )
    return cudnn_problem(cudnn.WITH_SINKS, "learnable sinks")


def cudnn_problem(least: int, feature: str) -> str | None:
    """Why the cuDNN that torch has found cannot be used for a feature of Transformer Engine; None if it can."""
    try:
        found = torch.backends.cudnn.version() or 0
    except RuntimeError as error:  # of a version that torch was not compiled for, found before its own
        return f"torch cannot use the cuDNN that was found ({error})"
    if found >= least:
        return None
    return (
        f"it needs cuDNN {cudnn.spelled(least)} for {feature}, this is {cudnn.spelled(found)}; install a newer "
        "nvidia-cudnn"
    )
