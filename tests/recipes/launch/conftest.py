"""What the tests of launchers share: an interpreter that starts at once."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from warm import WarmPython, import_all


@pytest.fixture(scope="package")
def python(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A program that takes the place of `python`: its processes are forks of this one."""
    import_all()
    with WarmPython(tmp_path_factory.mktemp("warm")) as warm:
        yield warm.python
