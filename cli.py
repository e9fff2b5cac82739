"""The command `gpt-oss-vision`: one small function per subcommand, which imports what it needs when it runs.

Exit codes: 0 done, 1 failed, 2 wrong usage. A failure is one sentence on stderr. The rooms share one rule for it: what
the user can mend is raised as ValueError (a wrong value), OSError (a file, a folder, a disk) or ImportError (a package
that is not installed), and its message says what is wrong, where, and what to do. Anything else is our bug.
"""

import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, NoReturn

import typer

# Plain help and errors: rich's boxes cost a quarter of a second, and a log keeps them badly.
app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode=None)

Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of a failure.")]


@app.callback()
def gpt_oss_vision() -> None:
    """GPT-OSS-Vision for NVIDIA Megatron-Bridge: train, convert, answer."""


@app.command()
def quickstart(
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder for checkpoints, plots and report.")] = Path("out"),
    seed: Annotated[int, typer.Option(min=0, help="Same seed, same result.")] = 0,
    steps: Annotated[int | None, typer.Option(min=1, help="Optimizer steps; with few it learns little.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier quickstart in --out.")] = False,
    debug: Debug = False,
) -> None:
    """Train, convert and answer on a CPU, in minutes.

    A tiny model with everything on learns to read real handwritten digits: written in Hugging Face format, trained
    by Megatron, exported, and asked about digits that it has not seen.
    """
    with one_sentence(debug), output_folder(out, overwrite, proof="report.json"):
        print("Loading torch, transformers and Megatron-Bridge …", flush=True)
        from .recipes import quickstart as recipe

        settings = recipe.Settings(seed=seed) if steps is None else recipe.Settings(seed=seed, steps=steps)
        report = recipe.run(out, settings=settings)
    right, wrong, without = (report[f"accuracy_{image}_image"] for image in ("right", "wrong", "no"))
    print(f"Digits named rightly: {right:.1%} with their image, {wrong:.1%} with another, {without:.1%} with none.")
    print(f"Checkpoints, pictures and report.json are in {out}.")


@app.command()
def doctor(debug: Debug = False) -> None:
    """Show what this machine can run, and fixes for the rest."""
    with one_sentence(debug):
        from .recipes import doctor as recipe

        text, is_ready = recipe.examine(Path.cwd())
    print(text)
    raise typer.Exit(0 if is_ready else 1)


@contextmanager
def one_sentence(debug: bool) -> Iterator[None]:
    """Turn an exception into one sentence and exit 1; with `debug`, let it through with its traceback."""
    try:
        yield
    except (ValueError, OSError, ImportError) as error:
        if debug:
            raise
        _fail(_sentence(error))
    except Exception as error:  # the last station: nobody above can say it better
        if debug:
            raise
        _fail(
            f"{type(error).__name__}: {_sentence(error)} (a bug in gpt-oss-vision; run again with --debug to see where)"
        )


def _sentence(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    return " ".join(str(error).split()) or "no message"


def _fail(sentence: str) -> NoReturn:
    print(f"gpt-oss-vision: {sentence}", file=sys.stderr)
    raise typer.Exit(1) from None


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


def main() -> None:
    """Run the command line: the entry point of the installed script."""
    app(prog_name="gpt-oss-vision")


if __name__ == "__main__":
    main()
