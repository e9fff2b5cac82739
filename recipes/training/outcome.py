"""How a run ended, in a file of its folder that a batch script can read: ``outcome.txt``.

Its first line is `FINISHED`, `SAVED`, `REFUSED` or `FAILED`, and a sentence may follow. The first rank that ends writes
it. Without it the run goes on, or was killed. Standard library only.
"""

from contextlib import suppress
from pathlib import Path

OUTCOME = "outcome.txt"

FINISHED = "finished"
SAVED = "saved"
"""The run was asked to end; the same command continues it."""
REFUSED = "refused"
"""What failed can be mended by the user alone; trying again does not help."""
FAILED = "failed"


def forget(run: Path) -> None:
    """Remove the outcome of an earlier start."""
    (run / OUTCOME).unlink(missing_ok=True)


def write(run: Path, outcome: str, sentence: str = "") -> bool:
    """Write the outcome, unless there is one.

    Returns:
        Whether this call has written it; also where the disk does not let it, so that no failure stays unsaid.
    """
    run.mkdir(parents=True, exist_ok=True)
    text = "\n".join([outcome, *([" ".join(sentence.split())] if sentence else []), ""])
    try:
        with (run / OUTCOME).open("x") as file:
            file.write(text)
    except FileExistsError:
        return False
    except OSError:
        return True
    return True


def read(run: Path) -> tuple[str, str] | None:
    """Outcome and sentence; None while the run goes on, or after it was killed."""
    with suppress(FileNotFoundError):
        outcome, _, sentence = (run / OUTCOME).read_text().partition("\n")
        return outcome, sentence.strip()
    return None
