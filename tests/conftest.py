"""Settings of all tests: no access to the Hub, at most one worker per core, and the tests that are left out."""

import json
import os
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest
from disks import on_disk  # noqa: F401 - a fixture
from hypothesis import settings

# The same examples in every run; a deadline fails on a busy machine.
settings.register_profile("here", database=None, deadline=None, derandomize=True)
settings.load_profile("here")

os.environ["HF_HUB_OFFLINE"] = "1"
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"  # workers and ranks use all cores; more threads would compete for them

WORKERS = 4  # at most: each has Megatron in memory, 2 GiB, and forks ranks
# The slowest files, which run first, so that no worker starts one when the others have finished.
LONGEST = (
    "mcore/test_layouts.py",
    "recipes/launch/test_slurm.py",
    "recipes/launch/test_ft_launcher.py",
    "examples/test_rl.py",
    "examples/test_plain_training.py",
    "recipes/quickstart/test_quickstart.py",
    "recipes/training/test_run.py",
    "recipes/training/test_resume.py",
    "recipes/test_recipes.py",
    "recipes/training/test_report.py",
    "recipes/training/test_training_options.py",
    "conversion/test_lora.py",
    "conversion/test_exporting.py",
    "conversion/test_import_failures.py",
    "conversion/test_importing.py",
    "hf/test_checkpoints.py",
    "hf/test_generation.py",
    "mcore/test_bridge.py",
)

# The versions with which every `upstream` test passes. With other versions these tests run by default; one that fails
# names the work-around that can be removed. When all pass, write the new versions here.
VERSIONS_OF_UPSTREAM = {
    "megatron-bridge": "0.6.2",
    "megatron-core": "0.19.2",
    "safetensors": "0.8.0",
    "torch": "2.11.0",
}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--no-megatron", action="store_true", help="fail where anything imports Megatron")
    parser.addoption("--cuda", action="store_true", help="use CUDA devices, which are hidden otherwise")
    parser.addoption(
        "--reports", type=Path, help="a file to which each test's result is added as a line of JSON, at once"
    )


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """Workers for `-n auto`: one per core; none for a single file, which one worker runs anyway, or with `-s`."""
    paths = {argument.partition("::")[0] for argument in config.args}
    is_one_file = len(paths) == 1 and Path(paths.pop()).is_file()
    return 0 if is_one_file or config.option.capture == "no" else min(WORKERS, len(os.sched_getaffinity(0)))


def pytest_configure(config: pytest.Config) -> None:
    """Hide CUDA devices unless asked for: forked ranks run on the CPU."""
    if not config.option.cuda:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    if config.option.reports and "PYTEST_XDIST_WORKER" not in os.environ:
        config.pluginmanager.register(Reports(config.option.reports))


class Reports:
    """Writes results while the tests run: a run that is killed has those until then."""

    def __init__(self, path: Path):
        self.path = path

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or report.outcome != "passed":
            fields = {name: getattr(report, name) for name in ("nodeid", "when", "outcome", "duration")}
            with self.path.open("a") as file:
                file.write(json.dumps(fields | {"error": report.longreprtext}) + "\n")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Leave out tests/te, which imports Transformer Engine, unless it is named (`just test-te`)."""
    is_named = any("te" in Path(argument.partition("::")[0]).parts for argument in config.args)
    return True if collection_path.name == "te" and not is_named else None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip `gpu` tests without `--cuda`, deselect `upstream` tests at known versions, sort the longest first."""
    if not config.option.cuda:
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device and `--cuda`"))
    if "upstream" not in config.option.markexpr and installed() == VERSIONS_OF_UPSTREAM:
        config.hook.pytest_deselected(items=[item for item in items if "upstream" in item.keywords])
        items[:] = [item for item in items if "upstream" not in item.keywords]
    items.sort(key=lambda item: order(item.path.relative_to(config.rootpath / "tests").as_posix()))


def pytest_collection_finish() -> None:
    """Start torch's autograd engine before a test can make it start device threads, which break forked ranks.

    Under a FakeTensorMode, which torch.compile uses, torch (2.11.0) counts a CUDA device on a machine without one. If
    the first backward pass comes after that, it starts a thread for this device, and every one in a fork fails.
    """
    if "torch" in sys.modules:
        torch = sys.modules["torch"]
        torch.ones((), requires_grad=True).backward()


def installed() -> dict[str, str]:
    """The installed versions, without local version labels such as ``+cpu``."""
    return {name: metadata.version(name).partition("+")[0] for name in VERSIONS_OF_UPSTREAM}


def order(file: str) -> int:
    return LONGEST.index(file) if file in LONGEST else len(LONGEST)


@pytest.fixture(autouse=True)
def megatron_is_not_imported(request: pytest.FixtureRequest) -> Iterator[None]:
    """With `--no-megatron`, fail a test that imports Megatron, or whose file does."""
    yield
    if request.config.getoption("no_megatron"):
        assert not {"megatron.core", "megatron.bridge"} & sys.modules.keys()
