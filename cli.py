"""The command `gpt-oss-vision`: one small function per subcommand, which imports what it needs when it runs.

Exit codes: 0 done, 1 failed, 2 wrong usage. A failure is one sentence on stderr. The rooms share one rule for it: what
the user can mend is raised as ValueError (a wrong value), OSError (a file, a folder, a disk) or ImportError (a package
that is not installed), and its message says what is wrong, where, and what to do. Anything else is our bug.

argparse, because a usage error has to answer at once and typer imports pydantic for it.
"""

import argparse
import inspect
import os
import shutil
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from . import __version__
from .errors import UserError


class UsageError(UserError):
    """Options that don't go together."""


def quickstart(out: Path, overwrite: bool, **settings: int | None) -> int:
    """Train, convert and answer on a CPU, in minutes.

    A tiny model with everything on learns to read real handwritten digits: written in Hugging Face format, trained by
    Megatron, exported, and asked about digits that it has not seen.
    """
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the same run on every machine
    with output_folder(out, overwrite, proof="report.json"):
        from .terminal import quiet

        with quiet(out / "log.txt") as console:
            console.print("Loading torch, transformers and Megatron-Bridge")
            from .recipes.quickstart import run as recipe
        given = {name: value for name, value in settings.items() if value is not None}
        report = recipe.run(out, settings=recipe.Settings(**given))
    right, wrong, without = (report[f"accuracy_{image}_image"] for image in ("right", "wrong", "no"))
    print(f"Digits named rightly: {right:.1%} with their image, {wrong:.1%} with another, {without:.1%} with none.")
    print(f"Checkpoints, pictures and report.json are in {out}.")
    return 0


def generate(
    model: Path,
    prompt: str | None,
    image: list[Path],
    batch: Path | None,
    out: Path | None,
    overwrite: bool,
    batch_size: int,
    int8: bool,
    **sampling: Any,
) -> int:
    """Ask a checkpoint in Hugging Face format a question with images, or a file of questions.

    The answer is written while the model generates it. Of a model that thinks, the final channel is shown.
    """
    if batch is None and out is not None:
        raise UsageError("--out goes with --batch")
    if batch is not None and (out is None or image):
        raise UsageError("--batch needs --out for its answers, and names its images in its lines, not by --image")
    if out is not None and out.exists() and not overwrite:
        raise FileExistsError(f"--out {out} exists; name another file, or replace it with --overwrite")
    if out is not None and not out.parent.is_dir():
        raise FileNotFoundError(f"--out {out} has no folder to be in; make {out.parent} first")
    if batch is not None and not batch.is_file():
        raise FileNotFoundError(f"--batch {batch} is no file")
    from .conversion.formats.hf_config import check_checkpoint

    check_checkpoint(model)
    from .recipes.inference import generate as recipe

    choice = recipe.Sampling(**sampling)
    asked = recipe.load(model, int8=int8)
    if int8:
        from .bridge.hf_int8 import describe_weights

        print(describe_weights(asked[0]), file=sys.stderr)
    if batch is not None and out is not None:
        from .recipes.inference.batch import answer_file

        print(answer_file(*asked, batch, out, choice, batch_size))
    elif not recipe.answer(*asked, prompt or "", image, choice, sys.stdout):
        raise UserError(f"no answer in {choice.max_new_tokens} tokens; allow more with --max-new-tokens")
    return 0


def convert_import(hf: Path, out: Path, dtype: str | None, jobs: int, overwrite: bool, dry_run: bool) -> int:
    """Hugging Face to Megatron, streamed: a checkpoint that training loads at any parallel layout.

    Needs neither a GPU nor memory for the model. A call that was interrupted is continued by the same call.
    """
    from rich.console import Console

    from .conversion.importing import import_checkpoint

    console = Console(stderr=True)
    report = import_checkpoint(hf, out, dtype=dtype, jobs=jobs, overwrite=overwrite, dry_run=dry_run, console=console)
    return _tell(out, report, dry_run)


def convert_export(
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
        from .conversion.lora import export_adapters

        done = export_adapters(megatron, out, hf=hf, overwrite=overwrite, dry_run=dry_run, console=console)
        return _tell(out, done, dry_run)
    from .conversion.exporting import export_checkpoint

    choices = {"dtype": dtype or "bf16", "text_only": text_only, "hf": hf, "base": base}
    output = {"jobs": jobs, "overwrite": overwrite, "dry_run": dry_run, "console": console}
    return _tell(out, export_checkpoint(megatron, out, **choices, **output), dry_run)


def convert_verify(hf: Path, megatron: Path, logits: bool, report: Path, jobs: int) -> int:
    """Compare a Hugging Face checkpoint with a Megatron one, tensor by tensor, bit by bit.

    Experts in MXFP4 are compared with what they were packed from, within the bound of the rounding. The report is JSON,
    with a hash of every tensor. The exit code is 1 where they differ.
    """
    from rich.console import Console

    from .conversion.verify import agreement, verify
    from .terminal import quiet

    target = os.path.realpath(report)  # /dev/stdout is another file while `quiet` holds it
    # Megatron, which `logits` asks, talks much.
    with os.fdopen(os.dup(2), "w") as terminal, quiet(Path(os.devnull)):
        found = verify(hf, megatron, logits=logits, report=target, jobs=jobs, console=Console(file=terminal))
    if not found["agrees"]:
        raise UserError(f"{found['worst']}; {report} has all")
    print(f"{hf} and {megatron} agree: {agreement(found)}; {report} has a hash of each.")
    return 0


def convert_assemble(text: Path, vision: Path, out: Path, seed: int, jobs: int, overwrite: bool, dry_run: bool) -> int:
    """A gpt-oss and a vision tower to a first GPT-OSS-Vision checkpoint, streamed.

    Text weights stay as they are, packed ones too. The tower is a ViT, CLIP or SigLIP. Projector, norm, pool token and
    vision biases are new, and still to be trained.
    """
    from rich.console import Console

    from .conversion.assemble import assemble

    console = Console(stderr=True)
    report = assemble(text, vision, out, seed=seed, jobs=jobs, overwrite=overwrite, dry_run=dry_run, console=console)
    return _tell(out, report, dry_run)


def _tell(out: Path, report: dict, dry_run: bool) -> int:
    """One line about a conversion that is done, or that a dry run has planned."""
    from rich.filesize import decimal

    moved = f"{decimal(report['bytes_read'])} read, {decimal(report['bytes_written'])} written"
    if dry_run:
        room = f"{decimal(report['peak_memory'])} of buffers; its disk has {decimal(report['free'])} free"
        print(f"Would write {out}: {moved}, with {room}.")
    else:
        print(f"{out} is complete: {len(report['tensors'])} tensors, {moved}; conversion.json has a hash of each.")
    return 0


def doctor() -> int:
    """Show what this machine can run, and fixes for the rest."""
    from . import doctor as recipe

    text, is_ready = recipe.examine(Path.cwd())
    print(text)
    return 0 if is_ready else 1


def parser() -> argparse.ArgumentParser:
    """The command line: every subcommand with its options."""
    top = argparse.ArgumentParser("gpt-oss-vision", description="GPT-OSS-Vision for NVIDIA Megatron-Bridge.")
    top.add_argument("-V", "--version", action="version", version=__version__)
    commands = top.add_subparsers(title="commands", metavar="COMMAND", required=True)
    add = _command(commands, quickstart).add_argument
    add("--out", type=Path, default="out", metavar="DIR", help="folder for checkpoints, plots and report (%(default)s)")
    add("--seed", type=_at_least(0), default=0, metavar="N", help="same seed, same result (%(default)s)")
    add("--steps", type=_at_least(1), metavar="N", help="optimizer steps; with few it learns little")
    for kind in ("tensor", "pipeline", "expert"):
        add(f"--{kind}-parallel", type=_at_least(1), metavar="N", help=f"{kind}-parallel size of the training (1)")
    add("--overwrite", action="store_true", help="replace an earlier quickstart in --out")
    command = _command(commands, generate)
    add = command.add_argument
    add("--model", type=Path, required=True, metavar="DIR", help="folder of the checkpoint")
    asked = command.add_mutually_exclusive_group(required=True)
    asked.add_argument("--prompt", metavar="TEXT", help="what to ask")
    asked.add_argument("--batch", type=Path, metavar="FILE", help="a JSONL file of questions")
    add("--image", type=Path, action="append", default=[], metavar="FILE", help="an image; may be repeated")
    add("--out", type=Path, metavar="FILE", help="with --batch: the JSONL file for the answers")
    add("--overwrite", action="store_true", help="replace an earlier --out")
    add("--batch-size", type=_at_least(1), default=8, metavar="N", help="questions answered at once (%(default)s)")
    add("--max-new-tokens", type=_at_least(1), default=256, metavar="N", help="longest answer (%(default)s)")
    add(
        "--temperature", type=_at_least(0.0), default=0.0, metavar="T", help="0 takes the likeliest token (%(default)s)"
    )
    add("--seed", type=_at_least(0), default=0, metavar="N", help="same seed, same answer (%(default)s)")
    add("--int8", action="store_true", help="hold the weights in 8 bits")
    _add_convert(commands)
    _command(commands, doctor)
    return top


def _add_convert(commands: argparse._SubParsersAction) -> None:
    text = "Move checkpoints between Hugging Face and Megatron, streamed, exact and resumable."
    group = commands.add_parser("convert", help=text, description=text, allow_abbrev=False)
    actions = group.add_subparsers(title="actions", metavar="ACTION", required=True)
    add = _command(actions, convert_import, "import").add_argument
    add("--hf", type=Path, required=True, metavar="DIR", help="folder of the Hugging Face checkpoint")
    _add_output(add)
    add("--dtype", choices=("bf16", "fp16", "fp32"), help="of the new weights (that of the checkpoint's config)")

    add = _command(actions, convert_export, "export").add_argument
    add("--megatron", type=Path, required=True, metavar="DIR", help="folder of the Megatron checkpoint")
    _add_output(add)
    dtypes = ("bf16", "fp32", "mxfp4")
    add("--dtype", choices=dtypes, help="of the new weights; mxfp4 packs the experts (bf16)")
    add("--text-only", action="store_true", help="leave out what is visual and write a stock gpt-oss")
    add("--adapter", action="store_true", help="write the adapters of LoRA alone, for PEFT")
    add("--hf", type=Path, metavar="DIR", help="where config and tokenizer are, if --megatron keeps none")
    add("--base", type=Path, metavar="DIR", help="the Megatron checkpoint that adapters adapt, if it has moved")

    add = _command(actions, convert_verify, "verify").add_argument
    add("--hf", type=Path, required=True, metavar="DIR", help="folder of the Hugging Face checkpoint")
    add("--megatron", type=Path, required=True, metavar="DIR", help="folder of the Megatron checkpoint")
    add("--logits", action="store_true", help="compare logits too: each model has to fit in memory, in fp32")
    add("--report", type=Path, default="verify.json", metavar="FILE", help="file to write (%(default)s)")
    add("--jobs", type=_at_least(1), default=4, metavar="N", help="threads (%(default)s)")
    add = _command(actions, convert_assemble, "assemble").add_argument
    add("--text", type=Path, required=True, metavar="DIR", help="folder of a gpt-oss checkpoint, bf16 or MXFP4")
    add("--vision", type=Path, required=True, metavar="DIR", help="folder of a ViT, CLIP or SigLIP checkpoint")
    add("--seed", type=_at_least(0), default=0, metavar="N", help="of the new weights (%(default)s)")
    _add_output(add)


def _add_output(add: Callable[..., object]) -> None:
    """The options that all conversions share."""
    add("--out", type=Path, required=True, metavar="DIR", help="folder to make")
    add("--jobs", type=_at_least(1), default=4, metavar="N", help="threads (%(default)s)")
    add("--overwrite", action="store_true", help="replace --out when the new one is complete")
    add("--dry-run", action="store_true", help="say what would be written, how large, and the memory needed")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code: the entry point of the installed script."""
    arguments = vars(parser().parse_args(argv))
    run, debug = arguments.pop("run"), arguments.pop("debug")
    # torchao 0.17, which transformers imports where it is, has a wrong escape that Python tells of when it compiles it.
    warnings.filterwarnings("ignore", "invalid escape sequence", SyntaxWarning)
    return attempt(partial(run, **arguments), debug)


def attempt(run: Callable[[], int], debug: bool) -> int:
    """Run a subcommand, turning an exception into one sentence and exit code 1; with `debug`, let it through."""
    try:
        return run()
    except KeyboardInterrupt:
        return _fail("interrupted", 130)
    except (UserError, OSError) as error:
        if debug:
            raise
        return _fail(_sentence(error), 2 if isinstance(error, UsageError) else 1)
    except Exception as error:  # the last station: nobody above can say it better
        if debug:
            raise
        bug = f"{type(error).__name__}: {_sentence(error)}"
        return _fail(f"{bug} (a bug in gpt-oss-vision; run again with --debug to see where)")


def _sentence(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    return " ".join(str(error).split()) or "no message"


def _fail(sentence: str, code: int = 1) -> int:
    print(f"gpt-oss-vision: {sentence}", file=sys.stderr)
    return code


def _command(
    commands: argparse._SubParsersAction, run: Callable[..., int], name: str | None = None
) -> argparse.ArgumentParser:
    """Add a subcommand that has the docstring of its function, and its name where no other is given."""
    text = inspect.getdoc(run) or ""
    command = commands.add_parser(name or run.__name__, help=text.splitlines()[0], description=text, allow_abbrev=False)
    command.add_argument("--debug", action="store_true", help="show the traceback of a failure")
    command.set_defaults(run=run)
    return command


def _at_least[Number: (int, float)](minimum: Number) -> Callable[[str], Number]:
    def number(text: str) -> Number:
        value = type(minimum)(text)
        if not minimum <= value < float("inf"):
            raise argparse.ArgumentTypeError(f"{text} is not a number from {minimum} up")
        return value

    return number  # argparse shows this function's name for what is no number


@contextmanager
def output_folder(out: Path, overwrite: bool, *, proof: str) -> Iterator[None]:
    """Keep `out` empty for a run and whole after it.

    What `out` held comes back when the run fails; when it succeeds, what was not made anew comes back. Nothing is
    replaced without `overwrite`, nor where no file `proof` shows that an earlier run of the same command made it.
    """
    is_new = not out.exists()
    _make_writable(out)
    held = list(out.iterdir())
    if held and not overwrite:
        raise FileExistsError(
            f"--out {out} is not empty; name another folder, or replace an earlier run with --overwrite"
        )
    if held and not (out / proof).is_file():
        raise FileExistsError(f"--out {out} holds no {proof}, so this command did not make it; name another folder")
    out = out.absolute()  # mkdtemp gives an absolute path, and `aside` must be known among what `out` holds
    aside = Path(tempfile.mkdtemp(prefix=".replaced-", dir=out))
    for entry in held:
        entry.rename(aside / entry.name)
    try:
        yield
    except BaseException:
        for made in out.iterdir():
            if made != aside:
                _remove(made)
        _bring_back(aside, out)
        if is_new:
            out.rmdir()
        raise
    _bring_back(aside, out)


def _make_writable(out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=out).close()
    except OSError as error:
        raise type(error)(f"--out {out} cannot be written ({error.strerror}); name another folder") from error


def _bring_back(aside: Path, out: Path) -> None:
    for entry in aside.iterdir():
        if not (out / entry.name).exists():
            entry.rename(out / entry.name)
    shutil.rmtree(aside)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


if __name__ == "__main__":
    sys.exit(main())
