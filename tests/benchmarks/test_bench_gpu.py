"""The benchmark for a GPU runs from end to end on a CPU, at toy size."""

import json
import math
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from benchmarks import bench_gpu

from gpt_oss_vision.bridge.mcore import cpu


@pytest.fixture
def bench(tmp_path: Path) -> bench_gpu.Bench:
    return bench_gpu.Bench(tmp_path, bench_gpu.TOY, torch.device("cpu"), seconds=600.0)


def written(folder: Path) -> dict:
    return json.loads((folder / "results.json").read_text())


def test_every_case_has_a_time_and_no_error(bench: bench_gpu.Bench):
    cpu.run_ranks(1, bench_gpu.run, bench.folder, bench_gpu.TOY, "cpu", 600.0)
    report = written(bench.folder)
    assert (bench.folder / "errors.txt").read_text() == ""
    assert report["cases"].keys() == dict(bench_gpu.cases(bench)).keys() | {"megatron"}
    for name, case in report["cases"].items():
        assert case["status"] == "ok" and math.isfinite(case["seconds"]) and case["seconds"] > 0, name
    # A slope of such short times may be negative.
    assert math.isfinite(report["estimates"]["torch"]["estimate"]["tokens_per_s_per_gpu"])
    assert "kernel" in (bench.folder / "profile-torch.txt").read_text()


def test_a_case_that_fails_is_recorded_and_the_next_one_runs(bench: bench_gpu.Bench):
    bench.run("wrong", partial(bench_gpu.matrix_product, bench, (-1, 1, 1)))
    bench.run("right", lambda: {"seconds": 1.0})
    wrong, right = written(bench.folder)["cases"].values()
    assert wrong["status"] == "error" and "RuntimeError" in wrong["error"]
    assert right["status"] == "ok"
    assert "=== wrong\nTraceback" in (bench.folder / "errors.txt").read_text()
    assert "RuntimeError" in (bench.folder / "table.txt").read_text()


def test_transformer_engine_is_skipped_with_the_reason_where_it_cannot_run(tmp_path: Path):
    sizes = replace(bench_gpu.TOY, backends=("transformer_engine",))
    bench = bench_gpu.Bench(tmp_path, sizes, torch.device("cpu"), seconds=600.0)
    named = dict(bench_gpu.cases(bench))
    for name in ("slice-transformer_engine-ep8-1", "attention-transformer_engine-128-full"):
        bench.run(name, named[name])
        assert bench.results[name]["status"] == "skipped"
        assert "needs a CUDA device" in bench.results[name]["reason"]


def test_no_case_starts_when_the_time_is_over(tmp_path: Path):
    bench = bench_gpu.Bench(tmp_path, bench_gpu.TOY, torch.device("cpu"), seconds=-1.0)
    bench.run("late", lambda: {"seconds": 1.0})
    assert bench.results["late"]["status"] == "skipped"


def test_overlapping_kernels_are_counted_once():
    assert bench_gpu.busy_seconds([(0, 4e6), (1e6, 2e6), (3e6, 5e6), (7e6, 8e6)]) == 6.0
