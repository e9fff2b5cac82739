"""What the parsers of all subcommands share. Standard library only, so that `--help` answers at once."""

import argparse
import inspect
from collections.abc import Callable


def add_command(
    commands: argparse._SubParsersAction, run: Callable[..., int], name: str | None = None
) -> argparse.ArgumentParser:
    """Add a subcommand with the name, unless another is given, and the docstring of its function.

    Returns:
        Its parser. The function is called with the parsed options as keyword arguments, and returns the exit code.
    """
    text = inspect.getdoc(run) or ""
    command = commands.add_parser(name or run.__name__, help=text.splitlines()[0], description=text, allow_abbrev=False)
    command.add_argument("--debug", action="store_true", help="show the traceback of a failure")
    command.set_defaults(run=run)
    return command


def at_least[Number: (int, float)](minimum: Number) -> Callable[[str], Number]:
    """An argument type: a finite number of the type of `minimum`, not below it."""

    def number(text: str) -> Number:
        value = type(minimum)(text)
        if not minimum <= value < float("inf"):
            raise argparse.ArgumentTypeError(f"{text} is not a number from {minimum} up")
        return value

    return number  # argparse names this function in its message about a text that is no number
