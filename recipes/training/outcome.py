"""How a run ended, in a file that a launcher reads: ``outcome.txt`` in the folder of the run, unless it names another.

Its first line is `FINISHED`, `SAVED`, `REFUSED` or `FAILED`, and a sentence may follow. The first rank that ends writes
it. Without it the run goes on, or was killed. Standard library only.
"""

import os
from contextlib import suppress
from pathlib import Path

FILE = "outcome.txt"
VARIABLE = "GPT_OSS_VISION_OUTCOME"
"""By it a launcher names the file, so that two jobs in one folder have two."""

FINISHED = "finished"
SAVED = "saved"
"""The run was asked to end; the same command continues it."""
REFUSED = "refused"
"""What failed can be mended by the user alone; trying again does not help."""
FAILED = "failed"


def file_of(run: Path) -> Path:
    """The file, for a process that trains."""
    return Path(os.environ.get(VARIABLE) or run / FILE)


def forget(run: Path) -> None:
    """Remove the outcome of an earlier start; a launcher removes what it has named."""
    if VARIABLE not in os.environ:
        (run / FILE).unlink(missing_ok=True)


def write(file: Path, outcome: str, sentence: str = "") -> bool:
    """Write the outcome, unless there is one.

    Returns:
        Whether this call has written it; also where the disk does not let it, so that no failure stays unsaid.
    """
    lines = [outcome, *([" ".join(sentence.split())] if sentence else [])]
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("x") as opened:
            opened.write("\n".join(lines) + "\n")
    except FileExistsError:
        return False
    except OSError:
        return True
    return True


def read(file: Path) -> tuple[str, str] | None:
    """Outcome and sentence; None while the run goes on, or after it was killed."""
    with suppress(FileNotFoundError):
        outcome, _, sentence = file.read_text().partition("\n")
        return outcome, sentence.strip()
    return None
