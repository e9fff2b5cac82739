"""Importing Megatron-Bridge where Transformer Engine or the NVIDIA resiliency extension are not installed."""

import contextlib
import importlib
import importlib.abc
import importlib.machinery
import sys
import warnings
from collections.abc import Iterator
from types import ModuleType
from typing import Any

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

    The stand-ins are removed on return; later imports of the two packages fail as usual.
    """
    with warnings.catch_warnings():
        # Dozens, of deprecated names and absent kernels; none is about anything that a user of ours has done.
        warnings.simplefilter("ignore")
        for name in IMPORTED_FIRST:
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
