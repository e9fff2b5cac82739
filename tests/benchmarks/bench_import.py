"""Time the import of a Hugging Face checkpoint, against the speed of the disk and Megatron-Bridge's own functions.

    uv run python tests/benchmarks/make_20b.py 20b                            (once; with --layers 2 for a small disk)
    uv run python tests/benchmarks/bench_import.py 20b out [--jobs 4] [--keep]

The limit is the same reads and writes of the same files by as many threads, without computation, measured before and
after the import. The page cache holds none of the source in all three. Memory is RssAnon, summed over all processes of
the import and sampled every 50 ms.

The experts of one layer are also read from the page cache and converted in memory on one core: by the import's threads,
once per layer of the model, and by Megatron-Bridge's functions in its order. The better of two runs counts. The numbers
for 20B and 120B are the seconds per layer, multiplied, and are labelled as estimates.
"""

import argparse
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from threading import local

import torch
from safetensors import safe_open

from gpt_oss_vision.conversion.engine.job import ConversionPlan
from gpt_oss_vision.conversion.engine.stream import STEP, Files, InMemoryJournal, Task, Worker, stream
from gpt_oss_vision.conversion.formats.hf_source import open_source
from gpt_oss_vision.conversion.formats.safetensors import TensorInfo
from gpt_oss_vision.conversion.formats.torch_dist_writer import TorchDistPlan
from gpt_oss_vision.conversion.importing import plan_import
from gpt_oss_vision.terminal import Progress

LAYERS = {"20b": (24, 32), "120b": (36, 128)}
MOST_SCRATCH = 4 * 10**9


def convert_and_watch(*words: object) -> tuple[float, int]:
    """Run `convert`; return its seconds, with all imports, and the peak RssAnon of its processes in bytes."""
    begun, peak = time.perf_counter(), 0
    process = subprocess.Popen([sys.executable, "-m", "gpt_oss_vision.cli", "convert", *map(str, words)])
    while process.poll() is None:
        peak = max(peak, sum(anonymous_memory(pid) for pid in family(process.pid)))
        time.sleep(0.05)
    if process.returncode:
        sys.exit(process.returncode)
    return time.perf_counter() - begun, peak


def family(pid: int) -> Iterator[int]:
    """The ids of a process and of all its descendants."""
    yield pid
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return
    for child in children:
        yield from family(int(child))


def anonymous_memory(pid: int) -> int:
    """RssAnon in bytes; 0 for a process that has just ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


def copy_seconds(reads: Iterable[tuple[Path, int, int]], total: int, scratch: Path, jobs: int) -> float:
    """Seconds for a conversion's reads and writes alone, in steps, each piece by one thread.

    If the output is larger than `MOST_SCRATCH`, the scratch file is overwritten repeatedly.

    Args:
        reads: file, offset and length of every piece.
        total: bytes that are written.
        scratch: a path; the scratch file is made in its parent folder.
        jobs: threads.
    """
    size = min(total, MOST_SCRATCH) // STEP * STEP
    pieces = sorted(reads)
    share = total / sum(nbytes for _, _, nbytes in pieces)
    tasks, written = [], 0
    for file, offset, nbytes in pieces:
        begin, written = int(written), written + nbytes * share

        def run(worker: Worker, piece=(file, offset, nbytes), begin=begin, end=int(written)) -> None:
            file, offset, nbytes = piece
            for done in range(0, nbytes, STEP):
                with worker.scope():
                    worker.read(file, offset + done, (min(STEP, nbytes - done),), torch.uint8)
            data = worker.take((STEP,), torch.uint8)
            for place in range(begin // STEP * STEP, end // STEP * STEP, STEP):
                worker.write("scratch", place % size, data)

        tasks.append(Task(f"{file} {offset}", ("scratch",), run, 0, 0))
    memory = InMemoryJournal()
    memory.output = scratch.parent
    begun = time.perf_counter()
    stream(tasks, memory, {"scratch": size}, jobs=jobs, progress=Progress("", 0))
    seconds = time.perf_counter() - begun
    (scratch.parent / "scratch").unlink()
    return seconds


def forget(files: Iterable[Path]) -> None:
    """Drop files from the page cache."""
    for file in files:
        with file.open("rb") as stream:
            os.fsync(stream.fileno())
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def remember(tensors: Iterable[TensorInfo]) -> None:
    """Read tensors into the page cache."""
    for tensor in tensors:
        with tensor.file.open("rb") as stream:
            os.pread(stream.fileno(), tensor.nbytes, tensor.offset)


def our_layer(plan: ConversionPlan, layers: int, jobs: int) -> float:
    """Seconds to read a layer's experts and convert them in memory, by the import's own threads."""
    tasks = [task for task in plan.tasks if "layers.0.mlp.experts" in task.name]
    files, threads = Files(Progress("", 0)), local()
    files.outputs = Nowhere()

    def run(task: Task) -> None:
        if not hasattr(threads, "worker"):
            threads.worker = Worker(files)
        with threads.worker.scope():
            task.run(threads.worker)

    begun = time.perf_counter()
    with ThreadPoolExecutor(jobs) as pool:
        for _ in pool.map(run, tasks * layers):
            pass
    files.close()
    return (time.perf_counter() - begun) / layers


class Nowhere(dict):
    """Output files that drop all bytes."""

    def __missing__(self, name: str) -> "Nowhere":
        return self

    def write(self, *_: object) -> None:
        """Drop the bytes."""

    def values(self) -> list:
        """No file is open."""
        return []


def bridge_layer(hf: Path, experts: int) -> float:
    """Seconds for the same layer by Megatron-Bridge's own functions: dequantise all experts, then copy one by one."""
    from gpt_oss_vision.bridge import plugin  # noqa: F401

    # isort: split
    from megatron.bridge.models.conversion.quantization_utils import dequantize_mxfp4
    from megatron.bridge.models.gpt_oss.gpt_oss_bridge import GPTOSSMLPGateUpProjMapping

    interleave = GPTOSSMLPGateUpProjMapping._interleave
    prefix = "model.layers.0.mlp.experts."
    files = {name: file for file in hf.glob("*.safetensors") for name in safe_open(file, "pt").keys()}  # noqa: SIM118

    def tensor(name: str) -> torch.Tensor:
        with safe_open(files[prefix + name], "pt") as file:
            return file.get_tensor(prefix + name)

    begun = time.perf_counter()
    for name in ("gate_up_proj", "down_proj"):
        whole = dequantize_mxfp4(tensor(f"{name}_blocks"), tensor(f"{name}_scales"))
        for expert in range(experts):
            one = interleave(whole[expert]) if name == "gate_up_proj" else whole[expert]
            torch.empty_like(one).copy_(one)  # into the model
        bias = tensor(f"{name}_bias")
        for expert in range(experts):
            one = interleave(bias[expert]) if name == "gate_up_proj" else bias[expert]
            torch.empty_like(one).copy_(one)
    return time.perf_counter() - begun


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("hf", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--jobs", type=int, default=4)
    parser.add_argument("--keep", action="store_true", help="leave the imported checkpoint where it is")
    arguments = parser.parse_args()
    source = open_source(arguments.hf)
    plan = plan_import(source, TorchDistPlan(source.parameters, torch.bfloat16), {})
    moved = plan.bytes_read + sum(plan.file_sizes.values())
    arguments.out.parent.mkdir(exist_ok=True, parents=True)
    reads = [(stored.file, stored.offset, stored.nbytes) for stored in source.tensors.values()]
    limit_of = partial(copy_seconds, reads, moved - plan.bytes_read, arguments.out.absolute(), arguments.jobs)
    files = {stored.file for stored in source.tensors.values()}
    forget(files)
    before = limit_of()
    forget(files)
    words = "--hf", arguments.hf, "--out", arguments.out, "--jobs", arguments.jobs, "--overwrite"
    seconds, peak = convert_and_watch("import", *words)
    if not arguments.keep:
        shutil.rmtree(arguments.out)
    forget(files)
    after = limit_of()
    torch.set_num_threads(1)
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    remember(stored for name, stored in source.tensors.items() if ".layers.0.mlp.experts." in name)
    layers, experts = source.config.num_hidden_layers, source.config.num_local_experts
    turns = [(our_layer(plan, layers, arguments.jobs), bridge_layer(arguments.hf, experts)) for _ in range(2)]
    ours, theirs = map(min, zip(*turns, strict=True))
    limit = (before + after) / 2
    print(f"{moved / 1e9:.1f} GB moved, {layers} layers, {arguments.jobs} jobs, {os.cpu_count()} cores")
    print(f"import, all imports included  {seconds:8.1f} s  {moved / 1e9 / seconds:.2f} GB/s")
    print(
        f"the disk alone                {limit:8.1f} s  {moved / 1e9 / limit:.2f} GB/s ({before:.1f} and {after:.1f} s)"
    )
    print(f"of what the disk gives        {limit / seconds:8.0%}")
    print(f"peak RssAnon, all processes   {peak / 2**30:8.2f} GiB")
    print(
        f"one layer's experts, one core {ours:8.2f} s  Megatron-Bridge's functions {theirs:.2f} s, {theirs / ours:.0f}x"
    )
    for name, (layers, experts) in LAYERS.items():
        one, other = (each * layers * experts / source.config.num_local_experts for each in (ours, theirs))
        print(f"{name} estimated from one layer{one:8.0f} s  Megatron-Bridge's functions {other:.0f} s")


if __name__ == "__main__":
    main()
