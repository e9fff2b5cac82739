"""The back end and the attention kernel of each recipe, by the versions that the ranks would have, and why.

As `bridge/mcore/backend.py` and `packing.py` decide when a run starts, without torch.
"""

from collections.abc import Iterator, Mapping

from ..bridge import cudnn
from .catalog import GPUS, RECIPES, Recipe

ENGINE, CUDNN = "transformer-engine-torch", "nvidia-cudnn-cu13"
PACKAGES = ("torch", ENGINE, CUDNN)


def lines(versions: Mapping[str, str | None]) -> Iterator[str]:
    """Each answer once, followed by the recipes that get it.

    Args:
        versions: of `PACKAGES`; None for one that is missing.
    """
    answers: dict[tuple[str, ...], list[Recipe]] = {}
    for recipe in RECIPES:
        answers.setdefault(tuple(_answer(recipe, versions)), []).append(recipe)
    for answer, recipes in answers.items():
        yield from answer
        for recipe in recipes:
            yield f"    {recipe.name}, on {f'an {GPUS[recipe.gpu].name}' if recipe.gpu else 'a CPU'}"


def _answer(recipe: Recipe, versions: Mapping[str, str | None]) -> Iterator[str]:
    if recipe.gpu is None:
        yield "- back end torch, attention by torch's flash attention or the formula: there is no GPU"
        return
    problem = _engine_problem(versions)
    if problem is None:
        has = f"sinks need cuDNN {cudnn.spelled(cudnn.WITH_SINKS)}, {versions[CUDNN]} is there"
        yield f"- back end transformer_engine, attention by cuDNN's fused kernel: {has}"
    else:
        yield f"- back end torch, attention by torch's flash attention, to which the sinks are added exactly: {problem}"
    if recipe.context_parallel_size > 1:
        size = f"model.context_parallel_size={recipe.context_parallel_size}"
        yield f"  {size}: ranks exchange heads (a2a), each kernel has whole rows; data.packing=true is refused"
    else:
        yield f"  rows are not packed; with data.packing=true {_packed(problem, versions)}"


def _engine_problem(versions: Mapping[str, str | None]) -> str | None:
    """Why the layers do not run on Transformer Engine; None if they do."""
    if versions[ENGINE] is None:
        return "Transformer Engine is missing"
    return _too_old(versions, cudnn.WITH_SINKS, "sinks")


def _packed(problem: str | None, versions: Mapping[str, str | None]) -> str:
    if problem is not None:
        return "the same kernel runs once per sample"
    if older := _too_old(versions, cudnn.WITH_PACKED_SINKS, "sinks of packed rows"):
        return f"the run is refused: {older}; set model.backend=torch"
    return f"the same: sinks of packed rows need cuDNN {cudnn.spelled(cudnn.WITH_PACKED_SINKS)}"


def _too_old(versions: Mapping[str, str | None], least: int, feature: str) -> str | None:
    found = versions[CUDNN]
    if found is not None and cudnn.number(found) >= least:
        return None
    return f"{feature} need cuDNN {cudnn.spelled(least)}, {found or 'none'} is there"
