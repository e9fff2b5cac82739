"""The subcommand `convert`: parsers, and one function per action. At module level the standard library only."""

import argparse
import os
from collections.abc import Callable
from pathlib import Path

from ..arguments import add_command, at_least
from ..errors import UsageError, UserError


def add_to(commands: argparse._SubParsersAction) -> None:
    """Add `convert` with its actions to the command line."""
    text = "Move checkpoints between Hugging Face and Megatron, streamed, exact and resumable."
    group = commands.add_parser("convert", help=text, description=text, allow_abbrev=False)
    actions = group.add_subparsers(title="actions", metavar="ACTION", required=True)
    add = add_command(actions, import_, "import").add_argument
    add("--hf", type=Path, required=True, metavar="DIR", help="folder of the Hugging Face checkpoint")
    _add_output(add)
    add("--dtype", choices=("bf16", "fp16", "fp32"), help="type of the new weights (that of the checkpoint's config)")

    add = add_command(actions, export).add_argument
    add("--megatron", type=Path, required=True, metavar="DIR", help="folder of the Megatron checkpoint")
    _add_output(add)
    dtypes = ("bf16", "fp16", "fp32", "mxfp4")
    add("--dtype", choices=dtypes, help="type of the new weights (that of the checkpoint); mxfp4 packs the experts")
    add("--text-only", action="store_true", help="leave out visual weights and write a stock gpt-oss")
    add("--adapter", action="store_true", help="write the adapters of LoRA alone, for PEFT")
    add("--hf", type=Path, metavar="DIR", help="where config and tokenizer are, if --megatron keeps none")
    add("--base", type=Path, metavar="DIR", help="the Megatron checkpoint that adapters adapt, if it has moved")

    add = add_command(actions, verify).add_argument
    add("--hf", type=Path, required=True, metavar="DIR", help="folder of the Hugging Face checkpoint")
    add("--megatron", type=Path, required=True, metavar="DIR", help="folder of the Megatron checkpoint")
    add("--logits", action="store_true", help="compare logits too: each model has to fit in memory, in fp32")
    add("--report", type=Path, metavar="FILE", help="JSON file for the report, with a hash of every tensor")
    add("--overwrite", action="store_true", help="replace --report")
    add("--jobs", type=at_least(1), default=4, metavar="N", help="threads (%(default)s)")

    add = add_command(actions, assemble).add_argument
    add("--text", type=Path, required=True, metavar="DIR", help="folder of a gpt-oss checkpoint, bf16 or MXFP4")
    add("--vision", type=Path, required=True, metavar="DIR", help="folder of a ViT, CLIP or SigLIP checkpoint")
    add("--seed", type=at_least(0), default=0, metavar="N", help="seed of the new weights (%(default)s)")
    _add_output(add)


def _add_output(add: Callable[..., object]) -> None:
    """Add the options of all conversions that make a folder."""
    add("--out", type=Path, required=True, metavar="DIR", help="folder to make")
    add("--jobs", type=at_least(1), default=4, metavar="N", help="threads (%(default)s)")
    add("--overwrite", action="store_true", help="replace --out when the new one is complete")
    add("--dry-run", action="store_true", help="print the size of the output and the memory needed; write nothing")


def import_(hf: Path, out: Path, dtype: str | None, jobs: int, overwrite: bool, dry_run: bool) -> int:
    """Hugging Face to Megatron, streamed: a checkpoint that training loads at any parallel layout.

    Needs neither a GPU nor memory for the model. A call that was interrupted is continued by the same call.
    """
    from rich.console import Console

    from .importing import import_checkpoint

    console = Console(stderr=True)
    report = import_checkpoint(hf, out, dtype=dtype, jobs=jobs, overwrite=overwrite, dry_run=dry_run, console=console)
    return _summarize(out, report, dry_run)


def export(
    megatron: Path,
    out: Path,
    dtype: str | None,
    text_only: bool,
    adapter: bool,
    hf: Path | None,
    base: Path | None,
    jobs: int,
    overwrite: bool,
    dry_run: bool,
) -> int:
    """Megatron to Hugging Face, streamed: sharded safetensors with everything that transformers needs.

    Takes a checkpoint that was converted, or saved by training at any parallel layout; adapters of LoRA are merged.
    Needs neither a GPU nor memory for the model. A call that was interrupted is continued by the same call.
    """
    ignored = {"--text-only": text_only, "--dtype": dtype, "--base": base}
    if adapter and any(ignored.values()):
        raise UsageError(f"--adapter does not go with {', '.join(name for name, given in ignored.items() if given)}")
    from rich.console import Console

    console = Console(stderr=True)
    if adapter:
        from .lora import export_adapters

        done = export_adapters(megatron, out, hf=hf, overwrite=overwrite, dry_run=dry_run, console=console)
        return _summarize(out, done, dry_run)
    from .exporting import export_checkpoint

    choices = {"dtype": dtype, "text_only": text_only, "hf": hf, "base": base}
    output = {"jobs": jobs, "overwrite": overwrite, "dry_run": dry_run, "console": console}
    return _summarize(out, export_checkpoint(megatron, out, **choices, **output), dry_run)


def verify(hf: Path, megatron: Path, logits: bool, report: Path | None, overwrite: bool, jobs: int) -> int:
    """Compare a Hugging Face checkpoint with a Megatron one, tensor by tensor, bit by bit.

    Experts in MXFP4 may differ from the weights that they were packed from within the bound of the rounding. The exit
    code is 1 where the checkpoints differ.
    """
    from rich.console import Console

    from ..terminal import quiet

    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # both models run on the CPU
    from . import verify as task

    target = os.path.realpath(report) if report else None  # /dev/stdout is another file inside `quiet`
    # With `logits`, Megatron runs, which prints much.
    with os.fdopen(os.dup(2), "w") as terminal, quiet(Path(os.devnull)):
        output = {"report": target, "overwrite": overwrite, "console": Console(file=terminal)}
        found = task.verify(hf, megatron, logits=logits, jobs=jobs, **output)
    if not found["agrees"]:
        raise UserError(f"{found['worst']}; {f'{report} has all' if report else '--report FILE lists all'}")
    print(
        f"{hf} and {megatron} agree: {task.agreement(found)}" + (f"; {report} has a hash of each." if report else ".")
    )
    return 0


def assemble(text: Path, vision: Path, out: Path, seed: int, jobs: int, overwrite: bool, dry_run: bool) -> int:
    """A gpt-oss and a vision tower to a first GPT-OSS-Vision checkpoint, streamed.

    Text weights are copied unchanged, packed ones too. The tower is a ViT, CLIP or SigLIP. Projector, norm, pool token
    and vision biases are initialised, and have to be trained.
    """
    from rich.console import Console

    from . import assemble as task

    console = Console(stderr=True)
    report = task.assemble(
        text, vision, out, seed=seed, jobs=jobs, overwrite=overwrite, dry_run=dry_run, console=console
    )
    return _summarize(out, report, dry_run)


def _summarize(out: Path, report: dict, dry_run: bool) -> int:
    """Print one line about a conversion that is done, or that a dry run has planned."""
    from rich.filesize import decimal

    moved = f"{decimal(report['bytes_read'])} read, {decimal(report['bytes_written'])} written"
    if dry_run:
        needs = f"{decimal(report['peak_memory'])} of buffers; its disk has {decimal(report['free'])} free"
        print(f"Would write {out}: {moved}, with {needs}.")
    else:
        print(f"{out} is complete: {len(report['tensors'])} tensors, {moved}; conversion.json has a hash of each.")
    return 0
