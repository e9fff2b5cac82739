"""Error messages that several files share."""

from collections.abc import Mapping
from pathlib import Path

from ..errors import UserError


def listed(names: list[str], shown: int = 5) -> str:
    """Join names for a sentence: the first few, and the count of the rest."""
    rest = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(names[:shown]) + rest


def refuse_mismatch(folder: Path, titles: Mapping[str, list[str]]) -> None:
    """Refuse a checkpoint whose tensors do not match, if there are any.

    Args:
        folder: of the checkpoint.
        titles: names of tensors under what is wrong with them.

    Raises:
        ValueError: listing them.
    """
    wrong = [f"{title}: {listed(names)}" for title, names in titles.items() if names]
    if wrong:
        raise UserError(f"{folder} does not match its config. {'; '.join(wrong)}.")
