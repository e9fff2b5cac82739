"""Importing Megatron-Bridge where Transformer Engine or the NVIDIA resiliency extension cannot be used."""

import contextlib
import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from types import ModuleType
from typing import Any

from ... import resiliency
from .runtime import NEEDS_CUDA, cuda_is_real

# Names that Megatron-Bridge 0.6.2 imports unconditionally.
STAND_INS: dict[str, tuple[str, ...]] = {
    "transformer_engine": (),
    "transformer_engine.pytorch": ("TransformerLayer",),
    "transformer_engine.pytorch.ops": ("Sequential",),
    "nvidia_resiliency_ext": (),
    "nvidia_resiliency_ext.inprocess": ("CallWrapper",),
}

# Imported before the stand-ins: these modules record whether Transformer Engine and the resiliency extension are there.
IMPORTED_FIRST = (
    "megatron.core.extensions.transformer_engine",
    "megatron.core.dist_checkpointing.strategies.nvrx",
    "peft",  # Megatron-Bridge imports it through diffusers; its LoRA compares each layer with TE's classes
)
BRIDGE_MODULES = (
    "megatron.bridge",
    "megatron.bridge.training.pretrain",
    "megatron.bridge.training.vlm_step",
    "megatron.bridge.recipes.common",
)


class _HidingFinder:
    """Another finder of ``sys.meta_path``, which does not find some packages."""

    def __init__(self, finder: Any, packages: Sequence[str]):
        self.finder, self.packages = finder, packages

    def find_spec(self, fullname: str, path: Any = None, target: ModuleType | None = None):
        if fullname.partition(".")[0] in self.packages:
            return None
        return self.finder.find_spec(fullname, path, target)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.finder, name)


class _StandInFinder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds the missing packages: modules whose classes raise when they are instantiated."""

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
    """Import Megatron-Bridge, with stand-ins for Transformer Engine and the resiliency extension if they are missing.

    A resiliency extension before 0.6 counts as missing. Without a CUDA device, Transformer Engine and APEX do too, also
    where another library, such as PEFT, has imported them before; where Megatron itself has been imported before, they
    don't (see `adapt_config_for_cpu`). The stand-ins are removed on return; later imports of the packages work or fail
    as usual.
    """
    _let_transformer_engine_use_the_cudnn_of_torch()
    hidden = () if cuda_is_real() or "megatron.core" in sys.modules else NEEDS_CUDA
    hidden = (*hidden, *_too_old())
    with warnings.catch_warnings(), hidden_packages(hidden):
        # Dozens, of deprecated names and absent kernels; none is about anything that a user of ours has done.
        warnings.simplefilter("ignore")
        for name in IMPORTED_FIRST:
            importlib.import_module(name)
        with _stand_ins(hidden):
            for name in BRIDGE_MODULES:
                importlib.import_module(name)


def _too_old() -> tuple[str, ...]:
    """The resiliency extension, if it is one on which the import of Megatron-Core fails."""
    found = resiliency.installed()
    return ("nvidia_resiliency_ext",) if found is not None and resiliency.is_too_old(found) else ()


def _let_transformer_engine_use_the_cudnn_of_torch() -> None:
    """Name the folder of the package nvidia-cudnn, where torch has its cuDNN from, unless the user has named another.

    Transformer Engine 2.12 looks for cuDNN in the system first. With torch's beside it, attention fails in its first
    call (CUDNN_STATUS_SUBLIBRARY_LOADING_FAILED).
    """
    package = importlib.util.find_spec("nvidia.cudnn") if importlib.util.find_spec("nvidia") else None
    if package is not None and package.submodule_search_locations and "CUDNN_HOME" not in os.environ:
        os.environ.setdefault("CUDNN_PATH", next(iter(package.submodule_search_locations)))


@contextlib.contextmanager
def hidden_packages(packages: Sequence[str]) -> Iterator[None]:
    """Let every import of these packages fail, as if they were not installed; those imported before are put back."""
    imported = {name: sys.modules.pop(name) for name in list(sys.modules) if name.partition(".")[0] in packages}
    try:
        with _finders([_HidingFinder(finder, packages) for finder in sys.meta_path]):
            yield
    finally:
        sys.modules.update(imported)


@contextlib.contextmanager
def _finders(finders: list[Any]) -> Iterator[None]:
    """Use other finders for imports; those that an import adds, as `six` does, stay."""
    before = sys.meta_path[:]
    sys.meta_path[:] = finders
    try:
        yield
    finally:
        sys.meta_path[:] = before + [finder for finder in sys.meta_path if finder not in finders]


@contextlib.contextmanager
def _stand_ins(hidden: Sequence[str]) -> Iterator[None]:
    packages = {name for name in STAND_INS if "." not in name}
    missing = {name for name in packages if name in hidden or importlib.util.find_spec(name) is None}
    try:
        with _finders([*sys.meta_path, _StandInFinder(missing)]):
            for name in STAND_INS:
                importlib.import_module(name)
            yield
    finally:
        for name in STAND_INS:
            if name.partition(".")[0] in missing:
                sys.modules.pop(name, None)
