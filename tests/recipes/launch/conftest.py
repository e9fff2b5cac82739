"""What the tests of launchers share: an interpreter that starts at once."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from warm import WarmPython

import gpt_oss_vision


@pytest.fixture(scope="package")
def python(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A program that takes the place of `python`: its processes are forks of this one."""
    gpt_oss_vision.register()
    from gpt_oss_vision.recipes import tiny  # noqa: F401 - so that forks need not import it
    from gpt_oss_vision.recipes.training import run  # noqa: F401

    with WarmPython(tmp_path_factory.mktemp("warm")) as warm:
        yield warm.python
