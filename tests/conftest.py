"""What every test runs under: nothing comes from the Hub, one worker per core, and which tests a machine leaves out."""

import os
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"  # workers and ranks fill the cores; threads of theirs would wait for each other

WORKERS = 4  # at most: each has Megatron in memory, 2 GiB, and forks ranks
# The files that take longest, so that no worker begins one when the others are done.
LONGEST = (
    "mcore/test_layouts.py",
    "recipes/quickstart/test_quickstart.py",
    "recipes/training/test_resume.py",
    "recipes/training/test_training_options.py",
    "conversion/test_lora.py",
    "conversion/test_exporting.py",
    "conversion/test_import_failures.py",
    "conversion/test_importing.py",
    "hf/test_checkpoints.py",
    "hf/test_generation.py",
    "mcore/test_bridge.py",
)

# The versions at which every `upstream` test passes. Where others are installed, these tests run by default: one that
# fails names the work-around that can go. When all pass, write the new versions here.
VERSIONS_OF_UPSTREAM = {"megatron-bridge": "0.6.2", "megatron-core": "0.19.2", "torch": "2.11.0"}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--no-megatron", action="store_true", help="fail where anything imports Megatron")


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """Workers for `-n auto`: one per core; none for a single file, which would be whole on one worker, or with `-s`."""
    paths = {argument.partition("::")[0] for argument in config.args}
    is_one_file = len(paths) == 1 and Path(paths.pop()).is_file()
    return 0 if is_one_file or config.option.capture == "no" else min(WORKERS, len(os.sched_getaffinity(0)))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip `gpu` tests without a CUDA device, deselect `upstream` tests at known versions, sort the longest first."""
    if not Path("/dev/nvidiactl").exists():  # asking torch would load it for every test
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))
    if "upstream" not in config.option.markexpr and installed() == VERSIONS_OF_UPSTREAM:
        config.hook.pytest_deselected(items=[item for item in items if "upstream" in item.keywords])
        items[:] = [item for item in items if "upstream" not in item.keywords]
    items.sort(key=lambda item: order(item.path.relative_to(config.rootpath / "tests").as_posix()))


def pytest_collection_finish() -> None:
    """Start torch's autograd engine before a test can make it start threads, which no forked rank would survive.

    With a FakeTensorMode, as torch.compile opens it, torch (2.11.0) counts a CUDA device where there is none. A first
    backward pass after that starts a thread for it, and every backward pass in a fork fails.
    """
    if "torch" in sys.modules:
        torch = sys.modules["torch"]
        torch.ones((), requires_grad=True).backward()


def installed() -> dict[str, str]:
    """The installed versions, without what a build adds (``2.11.0+cpu``)."""
    return {name: metadata.version(name).partition("+")[0] for name in VERSIONS_OF_UPSTREAM}


def order(file: str) -> int:
    return LONGEST.index(file) if file in LONGEST else len(LONGEST)


@pytest.fixture(autouse=True)
def megatron_is_not_imported(request: pytest.FixtureRequest) -> Iterator[None]:
    """With `--no-megatron`: a test, or the import of its file, that loads Megatron fails."""
    yield
    if request.config.getoption("no_megatron"):
        assert not {"megatron.core", "megatron.bridge"} & sys.modules.keys()
