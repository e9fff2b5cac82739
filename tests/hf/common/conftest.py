"""Settings for transformers' own tests: marks are registered, warnings are ignored, and every skip is documented.

A test that is skipped must be named in `docs/transformers.md`, or it fails.
"""

import re
from collections.abc import Generator
from fnmatch import fnmatch
from pathlib import Path

import pytest

MARKS = (
    "accelerate_tests",
    "flash_attn_test",
    "flash_attn_3_test",
    "flash_attn_4_test",
    "flash_attn_mps_test",
    "generate",
    "is_pipeline_test",
    "is_tensor_parallel_test",
    "is_training_test",
    "torch_compile_test",
    "torch_export_test",
)
DOCS = Path(__file__).parents[3] / "docs/transformers.md"
EXPLAINED = re.findall(r"`(test_[\w*]+)`", DOCS.read_text())


def pytest_configure(config: pytest.Config) -> None:
    for mark in MARKS:
        config.addinivalue_line("markers", f"{mark}: transformers' own")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.is_relative_to(Path(__file__).parent):
            item.add_marker(pytest.mark.filterwarnings("ignore"))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.skipped and not any(fnmatch(item.name, pattern) for pattern in EXPLAINED):
        report.outcome = "failed"
        report.longrepr = f"{item.name} is skipped, but {DOCS.name} doesn't say so: {report.longrepr}"
    return report
