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
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from . import __version__


def quickstart(out: Path, overwrite: bool, **settings: int | None) -> int:
    """Train, convert and answer on a CPU, in minutes.

    A tiny model with everything on learns to read real handwritten digits: written in Hugging Face format, trained by
    Megatron, exported, and asked about digits that it has not seen.
    """
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the same run on every machine
    with output_folder(out, overwrite, proof="report.json"):
        from .recipes.console import quiet

        with quiet(out / "log.txt") as console:
            console.print("Loading torch, transformers and Megatron-Bridge")
            from .recipes import quickstart as recipe
        given = {name: value for name, value in settings.items() if value is not None}
        report = recipe.run(out, settings=recipe.Settings(**given))
    right, wrong, without = (report[f"accuracy_{image}_image"] for image in ("right", "wrong", "no"))
    print(f"Digits named rightly: {right:.1%} with their image, {wrong:.1%} with another, {without:.1%} with none.")
    print(f"Checkpoints, pictures and report.json are in {out}.")
    return 0


def generate(model: Path, prompt: str, image: list[Path], max_new_tokens: int) -> int:
    """Ask a checkpoint in Hugging Face format a question, with images."""
    from .conversion.checkpoint import check_checkpoint

    check_checkpoint(model)
    from .recipes import generate as recipe

    print(recipe.generate(model, prompt, image, max_new_tokens=max_new_tokens))
    return 0


def doctor() -> int:
    """Show what this machine can run, and fixes for the rest."""
    from .recipes import doctor as recipe

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
    add = _command(commands, generate).add_argument
    add("--model", type=Path, required=True, metavar="DIR", help="folder of the checkpoint")
    add("--prompt", required=True, metavar="TEXT", help="what to ask")
    add("--image", type=Path, action="append", default=[], metavar="FILE", help="an image; may be repeated")
    add("--max-new-tokens", type=_at_least(1), default=256, metavar="N", help="longest answer (%(default)s)")
    _command(commands, doctor)
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code: the entry point of the installed script."""
    arguments = vars(parser().parse_args(argv))
    run, debug = arguments.pop("run"), arguments.pop("debug")
    return attempt(partial(run, **arguments), debug)


def attempt(run: Callable[[], int], debug: bool) -> int:
    """Run a subcommand, turning an exception into one sentence and exit code 1; with `debug`, let it through."""
    try:
        return run()
    except KeyboardInterrupt:
        return _fail("interrupted", 130)
    except (ValueError, OSError, ImportError) as error:
        if debug:
            raise
        return _fail(_sentence(error))
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


def _command(commands: argparse._SubParsersAction, run: Callable[..., int]) -> argparse.ArgumentParser:
    """Add a subcommand that has the name and the docstring of its function."""
    text = inspect.getdoc(run) or ""
    command = commands.add_parser(run.__name__, help=text.splitlines()[0], description=text, allow_abbrev=False)
    command.add_argument("--debug", action="store_true", help="show the traceback of a failure")
    command.set_defaults(run=run)
    return command


def _at_least(minimum: int) -> Callable[[str], int]:
    def integer(text: str) -> int:
        if int(text) < minimum:
            raise argparse.ArgumentTypeError(f"{text} is less than {minimum}")
        return int(text)

    return integer  # argparse shows this function's name for what is no number


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
