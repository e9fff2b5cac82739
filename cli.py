"""The command `gpt-oss-vision`: the command line, its exit codes and what it prints about a failure.

Each package holds its own subcommands in `commands.py`: the parsers, and one small function per subcommand, which
imports what it needs when it runs, so that `--help` and a usage error answer within half a second. argparse, because
typer imports pydantic, which alone takes longer.

Exit codes: 0 done, 1 failed, 2 wrong usage. A failure is one sentence on stderr: what is wrong, where, what to do.
"""

import argparse
import getpass
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from . import __version__
from .arguments import add_command
from .conversion import commands as conversion
from .errors import UsageError, UserError
from .recipes import commands as recipes
from .recipes.launch import commands as launching


def doctor(site: Path | None) -> int:
    """Show what this machine can run, and fixes for the rest; with a site file also what a cluster can."""
    from .doctor import examine

    text, is_ready = examine(Path.cwd(), site)
    print(text)
    return 0 if is_ready else 1


def parser() -> argparse.ArgumentParser:
    """The command line: every subcommand with its options."""
    top = argparse.ArgumentParser("gpt-oss-vision", description="GPT-OSS-Vision for NVIDIA Megatron-Bridge.")
    top.add_argument("-V", "--version", action="version", version=__version__)
    commands = top.add_subparsers(title="commands", metavar="COMMAND", required=True)
    recipes.add_to(commands)
    launching.add_to(commands)
    conversion.add_to(commands)
    add = add_command(commands, doctor).add_argument
    add("--site", type=Path, metavar="FILE", help="the site file of `launch`: check that jobs can run there")
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code: the entry point of the installed script."""
    line = parser()
    options, rest = line.parse_known_args(argv)
    arguments = vars(options)
    if rest and "settings" not in arguments:
        line.error(f"unrecognized arguments: {' '.join(rest)}")
    elif rest:  # settings behind an option, or misspelt ones, which are explained where they are parsed
        arguments["settings"] += rest
    run, debug = arguments.pop("run"), arguments.pop("debug")
    _name_the_user()
    # torchao 0.17, which transformers imports where it is installed, has a wrong escape that Python warns about.
    warnings.filterwarnings("ignore", "invalid escape sequence", SyntaxWarning)
    return attempt(partial(run, **arguments), debug)


def _name_the_user() -> None:
    """Give a user a name where the machine has none, as in many containers: torch 2.11 fails without, on import."""
    try:
        getpass.getuser()
    except (KeyError, OSError):
        os.environ["USER"] = str(os.getuid())


def attempt(run: Callable[[], int], debug: bool) -> int:
    """Run a subcommand; turn an exception into one sentence and an exit code, or with `debug` let it through."""
    try:
        return run()
    except KeyboardInterrupt:
        return _fail("interrupted", 130)
    except Exception as error:
        if debug:
            raise
        return _fail(_sentence(error), 2 if isinstance(error, UsageError) else 1)


def _sentence(error: Exception) -> str:
    """What the user reads: the message of what can be mended; that memory is lacking; or that it is a bug of ours."""
    # run_ranks adds the traceback of a rank as a note; notes of one line are for the user.
    notes = "".join(f" ({note})" for note in getattr(error, "__notes__", ()) if "\n" not in note)
    message = " ".join(str(error).split()) or "no message"
    if isinstance(error, OSError) and error.strerror:
        files = " -> ".join(str(file) for file in (error.filename, error.filename2) if file)
        return (f"{error.strerror}: {files}" if files else error.strerror) + notes
    if isinstance(error, UserError | OSError):
        return message + notes
    if isinstance(error, ModuleNotFoundError) and error.name and not error.name.startswith("gpt_oss_vision"):
        return f"{error.name} is not installed in this Python, {sys.executable}: install all of the package (`uv sync`)"
    if (memory := _exhausted_memory(error)) is not None:
        return (
            f"out of {memory} memory: {message}; use fewer --jobs, a smaller --batch-size, --int8, or a machine with "
            f"more{notes}"
        )
    bug = f"{type(error).__name__}: {message}"
    return f"{bug} (a bug in gpt-oss-vision; run again with --debug to see where){notes}"


def _exhausted_memory(error: Exception) -> str | None:
    """Which memory ran out, "host" or "GPU", or None for another error. torch is looked up, never imported."""
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(error, torch.OutOfMemoryError):
        return "GPU"
    # torch 2.11 raises a plain RuntimeError when the host has no memory for a tensor.
    if isinstance(error, MemoryError) or "DefaultCPUAllocator: can't allocate memory" in str(error):
        return "host"
    return None


def _fail(sentence: str, code: int = 1) -> int:
    print(f"gpt-oss-vision: {sentence}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
