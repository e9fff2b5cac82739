"""transformers' own common tests, loaded as modules from a folder of its source.

The installed package does not contain them. `TRANSFORMERS_TESTS` names the `tests` folder of a checkout at the
installed version; without it, the folder of the source distribution is used, which `just mixins` downloads. That folder
lacks some modules that the others import, among them the generation tests; minimal stubs replace these.
"""

import importlib
import importlib.machinery
import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import transformers

PACKAGE = "transformers_tests"  # its own name, `tests`, is taken
SDIST = Path(__file__).parents[1] / ".cache" / f"transformers-{transformers.__version__}"
FOLDER = Path(os.environ.get("TRANSFORMERS_TESTS", SDIST / "tests"))

# Modules that the source distribution imports, but lacks.
ABSENT: dict[str, dict[str, Any]] = {
    f"{PACKAGE}.generation": {},
    f"{PACKAGE}.generation.test_utils": {"GenerationTesterMixin": type("GenerationTesterMixin", (), {})},
    f"{PACKAGE}.utils": {},
    f"{PACKAGE}.utils.test_configuration_utils": {"config_common_kwargs": {"output_hidden_states": True}},
    "fetch_hub_objects_for_ci": {"url_to_local_path": lambda url: url},
}


def load(name: str) -> ModuleType:
    """A module of transformers' tests. Without a folder to load it from, the calling test file is skipped."""
    if not (FOLDER / "test_modeling_common.py").exists():
        pytest.skip(f"{FOLDER} does not hold transformers' own tests: run `just mixins`", allow_module_level=True)
    if PACKAGE not in sys.modules:
        _open_package()
    return importlib.import_module(f"{PACKAGE}.{name}")


def _open_package() -> None:
    sys.modules[PACKAGE] = _module(PACKAGE)
    sys.modules[PACKAGE].__path__ = [str(FOLDER)]
    is_checkout = (FOLDER / "generation").exists()
    for name, content in ({} if is_checkout else ABSENT).items():
        sys.modules[name] = _module(name)
        vars(sys.modules[name]).update(content)


def _module(name: str) -> ModuleType:
    return importlib.util.module_from_spec(importlib.machinery.ModuleSpec(name, None, is_package=True))
