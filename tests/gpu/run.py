"""What a first half hour on a GPU should answer, in parts that can be run again one by one.

    uv run python tests/gpu/run.py FOLDER [PART ...]

Each part writes FOLDER/PART.txt, its output, and FOLDER/PART.jsonl, a line for each test as soon as it has run, or a
folder of results. A part that takes over ten minutes is stopped; what it has written stays. Without a CUDA device all
parts run on the CPU, at toy size. The exit code is 1 where a part has failed.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from gpu.ranks import has_cuda

ROOT = Path(__file__).parents[2]
SECONDS = 600
BENCHMARK = "tests/benchmarks/bench_gpu.py"


@dataclass(frozen=True)
class Part:
    """A part: test files for pytest, with its options, or the cases of the benchmark."""

    answers: str
    tests: tuple[str, ...] = ()
    cases: tuple[str, ...] = ()

    def command(self, name: str, folder: Path) -> list[str]:
        """The command line that runs this part."""
        if self.cases:
            toy = [] if has_cuda() else ["--toy"]
            return [sys.executable, BENCHMARK, str(folder / name), *toy, "--cases", *self.cases]
        device = ["--cuda"] if has_cuda() else []
        # Warnings of libraries on a machine that nobody has seen before are no failures.
        options = [*device, "-W", "default", "-n", "0", "--reports", str(folder / f"{name}.jsonl")]
        return [sys.executable, "-P", "-m", "pytest", *self.tests, *options]


PARTS = {
    "environment": Part("versions, speed of matrix products and of memory", cases=("product-*", "copy")),
    "kernels": Part("attention and MXFP4 beside their formulas", ("tests/ops", "-m", "gpu")),
    "model": Part(
        "both back ends beside transformers in fp32: logits, gradients, steps, every supported setting",
        ("tests/gpu/test_model.py", "tests/gpu/test_packing.py", "tests/gpu/test_synchronization.py"),
    ),
    "training": Part("Megatron-Bridge's loop in bf16, killed and resumed", ("tests/gpu/test_training.py",)),
    "parallel": Part("two ranks on one GPU", ("tests/gpu/test_parallel.py", "tests/gpu/test_host_group.py")),
    "transformers": Part(
        "generation and Trainer",
        ("tests/gpu/test_transformers.py", "tests/hf/test_trainer.py", "tests/hf/test_generation.py"),
    ),
    "benchmark": Part(
        "tokens/s, memory, and where the time goes", cases=("slice-*", "optimizer-*", "attention-*", "profile-*")
    ),
}


def run(name: str, folder: Path) -> bool:
    """Run a part, print a line, and return whether it has passed."""
    part, log, start = PARTS[name], folder / f"{name}.txt", time.monotonic()
    (folder / f"{name}.jsonl").unlink(missing_ok=True)
    shutil.rmtree(folder / name, ignore_errors=True)
    environment = os.environ | {"PYTHONPATH": f"{ROOT / 'tests'}:{os.environ.get('PYTHONPATH', '')}"}
    with log.open("w") as output:
        try:
            command = part.command(name, folder)
            code = subprocess.run(command, cwd=ROOT, env=environment, stdout=output, stderr=output, timeout=SECONDS)
            ended = "passed" if code.returncode == 0 else f"failed (exit code {code.returncode})"
        except subprocess.TimeoutExpired:
            ended = f"stopped after {SECONDS} s"
    print(f"{name}: {ended}, {time.monotonic() - start:.0f} s{counts(folder / f'{name}.jsonl')}; see {log}", flush=True)
    return ended == "passed"


def counts(results: Path) -> str:
    """How many tests have passed, failed and been skipped, in words; empty without results."""
    if not results.is_file():
        return ""
    outcomes = [json.loads(line)["outcome"] for line in results.read_text().splitlines()]
    return "".join(f", {outcomes.count(outcome)} {outcome}" for outcome in sorted({*outcomes}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="for logs and results; is made")
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"one of {', '.join(PARTS)}; all by default")
    arguments = parser.parse_args()
    if unknown := [name for name in arguments.parts if name not in PARTS]:
        parser.error(f"there is no part {unknown[0]!r}; the parts are {', '.join(PARTS)}")
    folder = arguments.folder.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    passed = [run(name, folder) for name in arguments.parts or PARTS]
    raise SystemExit(not all(passed))


if __name__ == "__main__":
    main()
