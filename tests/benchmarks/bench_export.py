"""Time the export and the verification of a Megatron checkpoint, against the speed of the disk.

    uv run python tests/benchmarks/bench_import.py 20b megatron --keep        (once; see there)
    uv run python tests/benchmarks/bench_export.py megatron out [--dtype mxfp4] [--jobs 4] [--hf 20b] [--keep]

The limit is the same reads and writes of the same files by as many threads, without computation, measured before and
after the export. Memory is RssAnon, summed over all processes and sampled every 50 ms. With ``--hf``, the output is
compared with the safetensors that the Megatron checkpoint was imported from.
"""

import argparse
import os
import shutil
from functools import partial
from pathlib import Path

from bench_import import convert_and_watch, copy_seconds

from gpt_oss_vision.conversion.exporting import Export, prepare_export, reference_folder
from gpt_oss_vision.conversion.formats.safetensors import read_index
from gpt_oss_vision.conversion.formats.torch_dist_reader import open_checkpoint


def reads_of(export: Export) -> list[tuple[Path, int, int]]:
    """File, offset and length of every chunk."""
    stored = {parameter.key: export.checkpoint.tensors[parameter.key] for parameter in export.parameters}
    return [(chunk.file, chunk.position, chunk.length) for tensor in stored.values() for chunk in tensor.chunks]


def same_tensors(ours: Path, theirs: Path) -> str:
    """Count the tensors with the same bytes; return a sentence for the report."""
    mine, other = read_index(ours), read_index(theirs)
    same = 0
    for name in mine.keys() & other.keys():
        data = []
        for stored in (mine[name], other[name]):
            with stored.file.open("rb") as file:
                file.seek(stored.offset)
                data.append(file.read(stored.nbytes))
        same += data[0] == data[1]
    return f"{same} of {len(other)} tensors have the bytes of {theirs}, {len(mine)} were written"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("megatron", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--dtype", default="mxfp4")
    parser.add_argument("--jobs", type=int, default=4)
    parser.add_argument("--hf", type=Path, help="where the Megatron checkpoint came from")
    parser.add_argument("--keep", action="store_true", help="leave the exported checkpoint where it is")
    arguments = parser.parse_args()
    checkpoint = open_checkpoint(arguments.megatron.absolute())
    export = prepare_export(checkpoint, reference_folder(checkpoint, None), dtype=arguments.dtype, text_only=False)
    plan = export.conversion_plan({})
    written = sum(plan.file_sizes.values())
    limit_of = partial(copy_seconds, reads_of(export), written, arguments.out.absolute(), arguments.jobs)
    before = limit_of()
    words = "--megatron", arguments.megatron, "--jobs", arguments.jobs
    out = "--out", arguments.out, "--dtype", arguments.dtype, "--overwrite"
    seconds, peak = convert_and_watch("export", *words, *out)
    after = limit_of()
    checking, most = convert_and_watch("verify", *words, "--hf", arguments.out, "--report", os.devnull)
    moved, limit = (plan.bytes_read + written) / 1e9, (before + after) / 2
    print(f"{moved:.1f} GB moved, {arguments.dtype}, {arguments.jobs} jobs, {os.cpu_count()} cores")
    print(f"export, all imports included  {seconds:8.1f} s  {moved / seconds:.2f} GB/s")
    print(f"the disk alone                {limit:8.1f} s  {moved / limit:.2f} GB/s ({before:.1f} and {after:.1f} s)")
    print(f"of what the disk gives        {limit / seconds:8.0%}")
    print(f"peak RssAnon, all processes   {peak / 2**30:8.2f} GiB; of verify {most / 2**30:.2f} GiB")
    print(f"verify, reading both          {checking:8.1f} s  {moved / checking:.2f} GB/s")
    if arguments.hf:
        print(same_tensors(arguments.out, arguments.hf))
    if not arguments.keep:
        shutil.rmtree(arguments.out)


if __name__ == "__main__":
    main()
